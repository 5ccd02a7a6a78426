"""What a memory costs in time: streaming, generating and training with it, beside a plain window of equal budget.

All systems run in turns in one process, segment by segment, on the same tokens; a ratio is the median over the segments
of one system's time over the other's, its retriever included.

    python bench/decoder.py
    python bench/decoder.py --model random-135m --device cuda --backend torch --json out/decoder.json
    python bench/decoder.py --retriever sentence-transformers --skip decoding --skip training
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import chain, pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any

import torch
import typer
from parts import PARTS, watched
from ratios import Clock, Ratio, summary
from results import write
from shapes import MODEL_HELP, load, token_ids
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel

from memlong import MemoryConfig, MemoryDecoder
from memlong.decoder import choose_machine
from memlong.errors import MemlongError
from memlong.training import TrainingConfig
from memlong.training.parts import LearningParts

TARGET = 1.15
TEXT = Path(inspect.getfile(typing))
PLAIN = "plain window"
PROMPT = 16


@dataclass(frozen=True)
class Run:
    """How time is told, and what came of it."""

    clock: Clock
    ratios: list[Ratio] = field(default_factory=list)


def main(
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "demo",
    text: Annotated[Path, typer.Option(help="UTF-8 text; by default Python's own typing.py.")] = TEXT,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="Memory backend; may come again. By default torch, faiss, hnswlib."),
    ] = None,
    index_device: Annotated[str, typer.Option(help="Where the backend searches.")] = "cpu",
    retriever: Annotated[str, typer.Option(help="Retriever by name.")] = "lm",
    tokens: Annotated[int, typer.Option(help="Tokens that are timed, once memory is full.")] = 4096,
    new_tokens: Annotated[int, typer.Option(help="Tokens that are generated, in each of two rounds.")] = 96,
    training_tokens: Annotated[int, typer.Option(help="Tokens of a training step.")] = 1024,
    skip: Annotated[
        list[str] | None, typer.Option(help="Leave out 'parts', 'decoding' or 'training'.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="'float32', 'bfloat16', 'float16' or 'auto'.")] = "auto",
    device: Annotated[str, typer.Option(help="'cpu', 'cuda', 'cuda:N', 'mps' or 'auto'.")] = "auto",
    clock: Annotated[
        Clock,
        typer.Option(help="'wall'; or 'cpu', the time of this process, which other work does not spoil."),
    ] = Clock.WALL,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here too.")] = None,
) -> None:
    """Time streaming, generating and training with a memory beside the plain window of equal budget."""
    dtype, device = choose_machine(dtype, device).names
    language_model, tokenizer = load(model, dtype=dtype, device=device)
    names = backend or ["torch", "faiss", "hnswlib"]
    where = {} if index_device == "cpu" else {"device": index_device}
    configs = {name: MemoryConfig(backend=name, backend_options=where, retriever=retriever) for name in names}
    usual = MemoryConfig()
    budget = usual.local_window + usual.top_k * usual.chunk_size
    configs = {PLAIN: MemoryConfig(backend=None, local_window=budget)} | configs
    decoders = {name: MemoryDecoder(language_model, tokenizer, config) for name, config in configs.items()}
    step = usual.segment_size
    warm = budget + step
    count = warm + -(-max(tokens, training_tokens) // step) * step + PROMPT
    ids = token_ids(language_model, tokenizer, text, count).to(device)
    found: dict[str, Any] = {
        "model": model,
        "dtype": dtype,
        "retriever": retriever,
        "attention_budget": budget,
        "clock": clock,
    }
    run = Run(clock)
    ratios = run.ratios
    parts = ids[:, warm : warm + tokens].split(step, dim=1)
    found["streaming"] = _streaming(decoders, ids[:, :warm], parts, run)
    left_out = set(skip or ())
    pair = {name: decoders[name] for name in (PLAIN, names[0])}
    if "parts" not in left_out:
        found["parts"] = _parts(pair, parts[-8:], clock)
    if "decoding" not in left_out:
        found["decoding"] = _decoding(pair, ids[:, :budget], ids[:, -PROMPT:], new_tokens, run)
    if "training" not in left_out:
        found["training"] = _training(pair, ids[:, :warm], ids[:, warm : warm + training_tokens], step, run)
    write(json_file, found, ratios, device)
    for ratio in ratios:
        typer.echo(str(ratio))
    typer.echo(summary(ratios))


def _seconds(device: torch.device, action: Callable[[], object], clock: Clock) -> float:
    _wait(device)
    started = clock.now()
    action()
    _wait(device)
    return clock.now() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _in_turns(
    systems: dict[str, MemoryDecoder],
    parts: tuple[Tensor, ...],
    use: Callable[[MemoryDecoder, Tensor], object],
    clock: Clock,
) -> dict[str, list[float]]:
    """Seconds of each system for each part; who is first changes."""
    times: dict[str, list[float]] = {name: [] for name in systems}
    for number, part in enumerate(tqdm(parts, unit="segment", leave=False)):
        order = list(systems) if number % 2 else list(reversed(systems))
        for name in order:
            with systems[name] as decoder:
                times[name].append(_seconds(decoder.model.device, lambda: use(decoder, part), clock))  # noqa: B023
    return times


def _beside(times: dict[str, list[float]], name: str, baseline: str) -> float:
    return median(mine / other for mine, other in zip(times[name], times[baseline], strict=True))


def _streaming(
    systems: dict[str, MemoryDecoder], first: Tensor, parts: tuple[Tensor, ...], run: Run
) -> dict[str, float]:
    """Tokens per second of each system, once its window and its memory are full."""
    for decoder in systems.values():
        with decoder:
            decoder.read(first)
    times = _in_turns(systems, parts, lambda decoder, part: decoder.read(part), run.clock)
    speeds = {name: parts[0].shape[1] / median(mine) for name, mine in times.items()}
    for name, speed in speeds.items():
        typer.echo(f"streaming, {name}: {speed:.0f} tokens/s")
        if name != PLAIN:
            run.ratios.append(Ratio(f"streaming, {name}", _beside(times, name, PLAIN), TARGET))
    return speeds


def _parts(
    systems: dict[str, MemoryDecoder], parts: tuple[Tensor, ...], clock: Clock
) -> dict[str, dict[str, float]]:
    """Milliseconds of a segment that each part takes."""
    found: dict[str, dict[str, float]] = {}
    for name, decoder in systems.items():
        rows = []
        with decoder, watched(decoder, clock) as watch:
            for part in parts:
                watch.reset()
                decoder.read(part)
                rows.append(watch.read())
        found[name] = {part: 1000 * median(row[part] for row in rows) for part in PARTS}
    typer.echo(f"{'ms a segment':14s}" + "".join(f"{name:>14s}{'share':>8s}" for name in found))
    for part in PARTS:
        cells = [(row[part], row[part] / sum(row.values())) for row in found.values()]
        typer.echo(f"{part:14s}" + "".join(f"{spent:14.2f}{share:8.1%}" for spent, share in cells))
    return found


def _decoding(
    systems: dict[str, MemoryDecoder], context: Tensor, prompt: Tensor, count: int, run: Run
) -> dict[str, dict[str, float]]:
    """Milliseconds of each new token after the first; transformers' own cache holds as much as the plain window."""
    model = next(iter(systems.values())).model
    everything = torch.cat([context, prompt], dim=1)
    rounds: dict[str, list[list[float]]] = {name: [] for name in (*systems, "transformers")}
    for _ in range(2):
        for name, decoder in systems.items():
            with decoder:
                rounds[name].append(_token_times(decoder, prompt, count, run.clock, remember=False))
        rounds["transformers"].append(_token_times(model, everything, count, run.clock))
    found = {
        name: {"median_ms": 1000 * median(chain.from_iterable(runs)), "mean_ms": 1000 * min(map(fmean, runs))}
        for name, runs in rounds.items()
    }
    for name, row in found.items():
        typer.echo(
            f"generating, {name}: median {row['median_ms']:.1f} ms a token, mean {row['mean_ms']:.1f} ms"
        )
    memory = list(systems)[-1]
    for baseline in (PLAIN, "transformers"):
        value = found[memory]["mean_ms"] / found[baseline]["mean_ms"]
        run.ratios.append(Ratio(f"generating, {memory} to {baseline}", value))
    return found


def _token_times(
    speaker: MemoryDecoder | PreTrainedModel, prompt: Tensor, count: int, clock: Clock, **options: Any
) -> list[float]:
    marks: list[float] = []

    def mark(ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        _wait(ids.device)
        marks.append(clock.now())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    speaker.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        stopping_criteria=[mark],
        **options,
    )
    return [after - before for before, after in pairwise(marks)]


def _training(
    systems: dict[str, MemoryDecoder], first: Tensor, ids: Tensor, step: int, run: Run
) -> dict[str, float]:
    """Seconds of forward and backward passes (LoRA of rank 16), segment by segment, and in one plain pass."""
    if find_spec("peft") is None:
        typer.echo("training: left out, since the package peft is not installed")
        return {}
    memory = list(systems)[-1]
    LearningParts(systems[memory], TrainingConfig(steps=1))
    for decoder in systems.values():
        decoder.reset()
        with decoder:
            decoder.read(first)

    def learn(decoder: MemoryDecoder, part: Tensor) -> None:
        for segment in decoder.stream(part, gradients=True):
            _loss(segment.logits, part).backward()

    times = _in_turns(systems, ids.split(step, dim=1), learn, run.clock)
    model = systems[memory].model
    whole = _seconds(
        model.device, lambda: _loss(model(input_ids=ids, use_cache=False).logits, ids).backward(), run.clock
    )
    found = {name: sum(mine) for name, mine in times.items()} | {"one plain pass": whole}
    for name, seconds in found.items():
        typer.echo(f"training, {name}: {seconds:.2f} s for {ids.shape[1]:,} tokens")
    run.ratios.append(Ratio(f"training, {memory} to {PLAIN}", _beside(times, memory, PLAIN)))
    run.ratios.append(Ratio(f"training, {memory} to one plain pass", found[memory] / whole))
    return found


def _loss(logits: Tensor, ids: Tensor) -> Tensor:
    return cross_entropy(logits[0, :-1].float(), ids[0, 1:])


if __name__ == "__main__":
    try:
        typer.run(main)
    except MemlongError as error:
        raise SystemExit(f"bench: {error}") from error
