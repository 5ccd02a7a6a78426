"""Which retriever helps a language model most, by perplexity and cost.

Memlong's own retrievers are compared with candidates that it does not ship: BM25, the model's token embeddings, hidden
states, keys and queries, and mixtures. All score only by what comes before a segment. A row's cost is the time that
embedding or scoring took in its run; for hidden states and keys, it excludes the model's pass over the text. BM25 is
reindexed at each query.

    python bench/retrievers.py                                             # Python's own typing.py
    python bench/retrievers.py --text moby_dick.txt --max-tokens 24576 --score-from 8192 --row lm --row BM25
"""

from __future__ import annotations

import inspect
import json
import time
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from candidates import Score, Scored, States, attention, bm25, embedding, mixed, pooled, token_vectors
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from memlong import Candidates, MemoryConfig, MemoryDecoder, Passage, Retriever, load_model
from memlong.decoder import choose_machine, create_retriever
from memlong.errors import InvalidArgumentError, MemlongError, MissingDependencyError
from memlong.evaluation import evaluate_perplexity, read_text, tokenize
from memlong.versions import versions

TEXT = Path(inspect.getfile(typing))
Given = TypeVar("Given")


class Timed(Retriever):
    """A retriever that records how long another one takes."""

    def __init__(self, inner: Retriever) -> None:
        super().__init__(inner.model, inner.tokenizer)
        self._inner = inner
        self.metric = inner.metric  # type: ignore[misc] - of one object
        self.candidates = inner.candidates
        self.seconds = 0.0

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        return self._inner.dim

    def embed_chunks(self, chunks: Sequence[Passage]) -> Tensor:
        """Embeddings of the chunks."""
        return self._timed(self._inner.embed_chunks, chunks)

    def embed_queries(self, queries: Sequence[Passage]) -> Tensor:
        """Embeddings of the queries."""
        return self._timed(self._inner.embed_queries, queries)

    def rerank(self, found: Candidates) -> Tensor:
        """New scores of the candidates."""
        return self._timed(self._inner.rerank, found)

    def _timed(self, make: Callable[[Given], Tensor], given: Given) -> Tensor:
        started = time.perf_counter()
        found = make(given)
        self.seconds += time.perf_counter() - started
        return found


def main(
    text: Annotated[Path, typer.Option(help="UTF-8 text; by default Python's own typing.py.")] = TEXT,
    model: Annotated[
        str, typer.Option(help="Llama-like model: hub id, folder, GGUF file, or 'demo'.")
    ] = "demo",
    row: Annotated[
        list[str] | None, typer.Option(help="Only rows with this name prefix; repeatable.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Use the first N tokens.")] = 12288,
    score_from: Annotated[int, typer.Option(help="Index of the first scored token.")] = 4096,
    dtype: Annotated[str, typer.Option(help="'float32', 'bfloat16', 'float16' or 'auto'.")] = "auto",
    out: Annotated[Path, typer.Option(help="JSON file.")] = Path("out/retrievers.json"),
) -> None:
    """Compare retrievers by perplexity and cost."""
    dtype, device = choose_machine(dtype).names
    language_model, tokenizer = load_model(model, dtype=dtype, device=device)
    input_ids = tokenize(tokenizer, read_text(text), max_tokens)
    rows = _rows(language_model, tokenizer, input_ids)
    chosen = {name: make for name, make in rows.items() if not row or name.startswith(tuple(row))}
    if not chosen:
        raise InvalidArgumentError(f"--row must start one of {', '.join(map(repr, rows))}, got {row}")
    about = {"model": model, "text": text.name, "tokens": input_ids.shape[1], "score_from": score_from}
    about |= {"dtype": dtype, "device": device}
    out.parent.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    for name, make in chosen.items():
        try:
            results.append(
                {
                    "retriever": name,
                    **_measured(name, make(), language_model, tokenizer, input_ids, score_from),
                }
            )
        except MissingDependencyError as error:
            typer.echo(f"Skipped {name}: {error}", err=True)
            continue
        result = {**about, "versions": versions(), "rows": results}
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    table = Table(
        "retriever", "perplexity", "long-range", "ms per segment", "share of time", box=box.MARKDOWN
    )
    for each in results:
        table.add_row(
            each["retriever"],
            f"{each['perplexity']:.3f}",
            f"{each['long_range_perplexity'] or float('nan'):.2f}",
            f"{each['ms_per_segment']:.0f}",
            f"{each['share_of_time']:.1%}",
        )
    Console(width=120).print(table)
    typer.echo(f"Written: {out}")


def _measured(
    name: str, retriever: Retriever, model: Any, tokenizer: Any, input_ids: Tensor, score_from: int
) -> dict[str, Any]:
    timed = Timed(retriever)
    config = MemoryConfig(position_mode="zero", embedding_overlap=0)  # candidates look at a chunk's own K-V
    with (
        MemoryDecoder(model, tokenizer, config, retriever=timed) as decoder,
        tqdm(total=input_ids.shape[1], unit="tok", desc=name) as bar,
    ):
        found = evaluate_perplexity(decoder, input_ids, score_from=score_from, progress=bar.update)
        segments = input_ids.shape[1] / decoder.config.segment_size
    return {
        "perplexity": found.perplexity,
        "long_range_perplexity": found.long_range_perplexity,
        "ms_per_segment": 1000 * timed.seconds / segments,
        "share_of_time": timed.seconds / found.seconds,
    }


def _rows(model: Any, tokenizer: Any, input_ids: Tensor) -> dict[str, Callable[[], Retriever]]:
    most = input_ids.shape[1] // MemoryConfig().chunk_size + 1
    states: list[States] = []

    def of_states(make: Callable[[States], Score]) -> Callable[[], Retriever]:
        def made() -> Retriever:
            if not states:
                states.append(States(model, tokenizer, input_ids))
            return Scored(make(states[0]), most)

        return made

    def named(name: str, **options: Any) -> Retriever:
        return create_retriever(name, model, tokenizer, options)

    last = model.config.num_hidden_layers - 1
    middle = last // 2
    return {
        "sentence-transformers": lambda: named("sentence-transformers"),
        "lm": lambda: named("lm"),
        "lm without recency": lambda: named("lm", recency=0),
        "lm, tokens alone": lambda: named("lm", pairs=0, recency=0),
        "hybrid": lambda: named("hybrid"),
        "random": lambda: named("random"),
        "recent": lambda: named("recent"),
        "BM25": lambda: Scored(bm25, most),
        "token embeddings": lambda: Scored(
            token_vectors(model.get_input_embeddings().weight.detach().float(), input_ids[0]), most
        ),
        "hidden states, middle layer": of_states(lambda made: pooled(made.hidden(middle))),
        "hidden states, last layer": of_states(lambda made: pooled(made.hidden(last))),
        "keys and queries, middle layer": of_states(lambda made: attention(*made.keys_and_queries(middle))),
        "mixed: lm and sentence-transformers": lambda: Scored(
            mixed(embedding(named("lm", recency=0)), embedding(named("sentence-transformers"))), most
        ),
        "mixed: lm and last hidden states": of_states(
            lambda made: mixed(embedding(named("lm", recency=0)), pooled(made.hidden(last)))
        ),
    }


if __name__ == "__main__":
    try:
        typer.run(main)
    except MemlongError as error:
        raise SystemExit(f"retrievers: {error}") from error
