"""What a memory costs in time: streaming with memory beside the plain window of equal attention budget.

Both run in turns, in one process, on the same tokens, and the ratio of their best times is the result; the retriever is
timed apart, since it is the user's choice.

    make bench
    python bench/streaming.py --model demo --tokens 4096 --rounds 3 --json out/streaming.json
"""

from __future__ import annotations

import inspect
import json
import platform
import time
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from ratios import Ratio, summary
from torch import Tensor
from tqdm import tqdm

from memlong import MemoryConfig, MemoryDecoder, Passage, Retriever, load_model
from memlong.decoder import create_retriever
from memlong.errors import MemlongError
from memlong.evaluation import read_text, tokenize
from memlong.evaluation.environment import versions

TARGET = 1.3
TEXT = Path(inspect.getfile(typing))


class TimedRetriever(Retriever):
    """Another retriever, and the seconds that it took."""

    def __init__(self, inner: Retriever) -> None:
        super().__init__(inner.model, inner.tokenizer)
        self._inner = inner
        self.seconds = 0.0

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        return self._inner.dim

    def embed_chunks(self, chunks: Sequence[Passage]) -> Tensor:
        """Embeddings of the chunks."""
        started = time.perf_counter()
        found = self._inner.embed_chunks(chunks)
        self.seconds += time.perf_counter() - started
        return found

    def embed_queries(self, queries: Sequence[Passage]) -> Tensor:
        """Embeddings of the queries."""
        started = time.perf_counter()
        found = self._inner.embed_queries(queries)
        self.seconds += time.perf_counter() - started
        return found


def main(
    model: Annotated[str, typer.Option(help="Hub id, folder, GGUF file, or 'demo'.")] = "demo",
    text: Annotated[Path, typer.Option(help="UTF-8 text; by default Python's own typing.py.")] = TEXT,
    retriever: Annotated[str, typer.Option(help="Retriever by name.")] = "sentence-transformers",
    tokens: Annotated[int, typer.Option(help="Tokens that are timed, after the windows have filled.")] = 4096,
    rounds: Annotated[int, typer.Option(help="How often each system runs; the best counts.")] = 3,
    dtype: Annotated[str, typer.Option(help="'float32', 'bfloat16' or 'float16'.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="'cpu', 'cuda' or 'cuda:N'.")] = "cpu",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here too.")] = None,
) -> None:
    """Time streaming with memory beside the plain window of equal budget."""
    language_model, tokenizer = load_model(model, dtype=dtype, device=device)
    encoder = TimedRetriever(create_retriever(retriever, language_model, tokenizer))
    memory = MemoryConfig()
    budget = memory.local_window + memory.top_k * memory.chunk_size
    plain = MemoryConfig(backend=None, local_window=budget)
    input_ids = tokenize(tokenizer, read_text(text), 2 * budget + tokens)
    systems = {"plain": plain} | {name: MemoryConfig(backend=name) for name in ("torch", "faiss", "hnswlib")}
    best = dict.fromkeys(systems, (float("inf"), 0.0))
    turns = [name for _ in range(rounds) for name in systems]
    for name in tqdm(turns, unit="run"):
        with MemoryDecoder(language_model, tokenizer, systems[name], retriever=encoder) as decoder:
            best[name] = min(best[name], _time(decoder, encoder, input_ids, 2 * budget))
    rows = [_row(name, best) for name in systems]
    for row in rows:
        typer.echo(
            f"{row['system']:8s} {row['seconds']:7.2f} s, of which retriever {row['retriever_seconds']:.2f} s; "
            f"ratio to the plain window without retriever {row['ratio']:.3f}, with it {row['ratio_with_retriever']:.3f}"
        )
    result: dict[str, Any] = {
        "model": model,
        "tokens": input_ids.shape[1] - 2 * budget,
        "attention_budget": budget,
        "target": TARGET,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {device}",
        "versions": versions(),
        "systems": rows,
    }
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    typer.echo(
        summary([Ratio(row["system"], row["ratio"], TARGET) for row in rows if row["system"] != "plain"])
    )


def _time(
    decoder: MemoryDecoder, encoder: TimedRetriever, input_ids: Tensor, warm: int
) -> tuple[float, float]:
    """Seconds of the stream after its first ``warm`` tokens: without the retriever, and the retriever's."""
    decoder.reset()
    decoder.read(input_ids[:, :warm])
    encoder.seconds = 0.0
    started = time.perf_counter()
    decoder.read(input_ids[:, warm:])
    return time.perf_counter() - started - encoder.seconds, encoder.seconds


def _row(name: str, best: dict[str, tuple[float, float]]) -> dict[str, Any]:
    own, retrieving = best[name]
    plain = best["plain"][0]
    return {
        "system": name,
        "seconds": own + retrieving,
        "retriever_seconds": retrieving,
        "ratio": own / plain,
        "ratio_with_retriever": (own + retrieving) / plain,
    }


if __name__ == "__main__":
    try:
        typer.run(main)
    except MemlongError as error:
        raise SystemExit(f"bench: {error}") from error
