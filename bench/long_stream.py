"""A very long stream: do speed, memory and perplexity stay constant?

Streams text through a model with the bank's keys and values on disk, and records tokens per second and resident memory.
At some lengths it scores the same passage, always with the same chapters in the bank, so that only the distance from
the beginning differs.

    python bench/long_stream.py --tokens 100000
    python bench/long_stream.py --tokens 1000000 --text library.txt --out out
"""

from __future__ import annotations

import inspect
import json
import math
import platform
import tempfile
import time
import typing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import torch
import typer
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from memlong import MemoryBank, MemoryConfig, MemoryDecoder, create_bank, load_model
from memlong.cli.values import numbers
from memlong.decoder import choose_machine
from memlong.errors import MemlongError
from memlong.evaluation import read_text, tokenize
from memlong.versions import versions

STORY = "_pydecimal.py"
CHAPTERS, LEAD_IN, PASSAGE = 8192, 2048, 2048


@dataclass(frozen=True)
class Point:
    """The stream at some length: speed since the previous point, resident memory and bank size."""

    tokens: int
    tokens_per_second: float
    rss_bytes: int
    chunks: int
    stored_bytes: int


@dataclass(frozen=True)
class Placed:
    """Perplexity of the passage after this many tokens."""

    tokens: int
    perplexity: float


def main(
    model: Annotated[str, typer.Option(help="Hub id, folder, GGUF file, or 'demo'.")] = "demo",
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text, read repeatedly; by default Python's own library.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Length of the stream.")] = 100_000,
    places: Annotated[str, typer.Option(help="Lengths at which to also score the passage.")] = "10000,100000",
    retriever: Annotated[str, typer.Option(help="Retriever by name.")] = "lm",
    backend: Annotated[str, typer.Option(help="Memory backend.")] = "torch",
    dtype: Annotated[str, typer.Option(help="'float32', 'bfloat16', 'float16' or 'auto'.")] = "auto",
    folder: Annotated[
        Path | None, typer.Option(help="Folder of the disk tier; a temporary one by default.")
    ] = None,
    points: Annotated[int, typer.Option(help="Number of points on the curve.")] = 50,
    out: Annotated[Path, typer.Option(help="Folder for the JSON file and the plot.")] = Path("out"),
) -> None:
    """Stream a very long text and watch speed, memory and perplexity."""
    out.mkdir(parents=True, exist_ok=True)
    dtype, device = choose_machine(dtype).names
    language_model, tokenizer = load_model(model, dtype=dtype, device=device)
    library = Path(inspect.getfile(typing)).parent
    others = [file for file in sorted(library.glob("*.py")) if file.name != STORY]
    files = [library / STORY, *others] if text is None else [text]
    words = torch.cat([tokenize(tokenizer, read_text(file)) for file in files], dim=1)
    story, filler = words[:, : CHAPTERS + LEAD_IN + PASSAGE], words[:, CHAPTERS + LEAD_IN + PASSAGE :]
    if filler.shape[1] < CHAPTERS:
        raise SystemExit(
            f"The text has {words.shape[1]:,} tokens, too few for the passage and text before it: give a longer one"
        )
    process = psutil.Process()
    curve: list[Point] = []
    placed: list[Placed] = []
    with tempfile.TemporaryDirectory() as spare:
        store = {"disk": str(folder or spare), "host": "256MB"}
        config = MemoryConfig(backend=backend, retriever=retriever, store=store, position_mode="zero")
        step = config.segment_size
        wanted = sorted({-(-place // step) * step for place in (*numbers("--places", places, int), tokens)})
        noted = {-(-tokens * number // (points * step)) * step for number in range(1, points + 1)}
        with MemoryDecoder(language_model, tokenizer, config) as decoder:
            decoder.read(story[:, :CHAPTERS])
            chapters = decoder.banks[0]
            decoder.reset()
            since, started = 0, time.perf_counter()
            for read in tqdm(range(step, wanted[-1] + step, step), unit_scale=step, unit="tok"):
                decoder.read(filler[:, torch.arange(read - step, read) % filler.shape[1]])
                if read in noted:
                    speed = (read - since) / (time.perf_counter() - started)
                    held = sum(len(bank) for bank in decoder.banks)
                    stored = sum(bank.nbytes for bank in decoder.banks)
                    curve.append(Point(read, speed, process.memory_info().rss, held, stored))
                    since, started = read, time.perf_counter()
                if read in wanted:
                    before = time.perf_counter()
                    placed.append(Placed(read, _score(decoder, chapters, story[:, CHAPTERS:])))
                    started += time.perf_counter() - before
    _report(curve, placed)
    result = {
        "model": model,
        "text": f"{len(files)} modules of Python's library" if text is None else text.name,
        "text_tokens": words.shape[1],
        "backend": backend,
        "retriever": retriever,
        "dtype": dtype,
        "device": device,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": versions(),
        "curve": [asdict(point) for point in curve],
        "placed": [asdict(place) for place in placed],
    }
    (out / "long_stream.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    _draw(curve, f"{model}, keys and values on disk", out / "long_stream.png")


def _score(decoder: MemoryDecoder, chapters: MemoryBank, story: Tensor) -> float:
    """Perplexity of the passage, with the chapters in memory and the lead-in in the window."""
    own = decoder.banks
    decoder.use_banks([_copy(chapters, decoder)])
    logits = decoder.read(story[:, :LEAD_IN])[:, None]
    decoder.use_banks(
        [_copy(chapters, decoder)]
    )  # without the chunks that the lead-in has pushed out of the window
    loss = 0.0
    for segment in decoder.stream(story[:, LEAD_IN:]):
        predicting = torch.cat([logits, segment.logits[:, :-1]], dim=1)
        loss += float(cross_entropy(predicting[0].float(), segment.input_ids[0], reduction="sum"))
        logits = segment.logits[:, -1:].clone()
    decoder.use_banks(own)
    return math.exp(loss / PASSAGE)


def _copy(bank: MemoryBank, decoder: MemoryDecoder) -> MemoryBank:
    other = create_bank(decoder.config.backend or "", bank.dim, metric=bank.metric)
    held = bank.fetch(bank.ids)
    other.add(bank.embeddings.embeddings, held.keys, held.values, held.spans)
    return other


def _report(curve: list[Point], placed: list[Placed]) -> None:
    for point in curve[:: max(1, len(curve) // 10)]:
        typer.echo(
            f"{point.tokens:9,} tokens: {point.tokens_per_second:5.0f} tokens/s, resident "
            f"{point.rss_bytes / 2**30:.2f} GiB, {point.chunks:,} chunks, {point.stored_bytes / 2**30:.2f} GiB"
        )
    tenth = max(1, len(curve) // 10)
    ratio = _speed(curve[-tenth:]) / _speed(curve[tenth : 2 * tenth] or curve)
    typer.echo(f"Speed in the last tenth relative to the second tenth: {ratio:.3f} (target: at least 0.9)")
    first = placed[0].perplexity
    for place in placed:
        typer.echo(
            f"Passage after {place.tokens:9,} tokens: perplexity {place.perplexity:.4f} "
            f"({place.perplexity / first - 1:+.2%})"
        )


def _speed(points: list[Point]) -> float:
    return float(np.mean([point.tokens_per_second for point in points]))


def _draw(curve: list[Point], title: str, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    tokens = [point.tokens for point in curve]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    axes[0].plot(tokens, [point.tokens_per_second for point in curve])
    axes[0].set(title="speed", xlabel="tokens", ylabel="tokens/s")
    axes[1].plot(tokens, [point.rss_bytes / 2**30 for point in curve], label="resident memory")
    axes[1].plot(tokens, [point.stored_bytes / 2**30 for point in curve], label="in the bank")
    axes[1].set(title="memory", xlabel="tokens", ylabel="GiB")
    axes[1].legend(frameon=False)
    for axis in axes:
        axis.set_ylim(bottom=0)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    try:
        typer.run(main)
    except MemlongError as error:
        raise SystemExit(f"bench: {error}") from error
