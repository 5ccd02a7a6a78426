"""Time overhead of a memory in streaming, generation and training, over a plain window of equal budget.

All systems alternate in one process, segment by segment, on the same tokens; a ratio is the median over segments of
one system's time, retriever included, over the other's.

    python bench/decoder.py
    python bench/decoder.py --model random-135m --device cuda --backend torch --json out/decoder.json
    python bench/decoder.py --retriever sentence-transformers --skip decoding --skip training
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain, pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any

import torch
import typer
from parts import PARTS, watched
from ratios import Clock, Ratio
from results import Budget, Report
from shapes import MODEL_HELP, load, token_ids
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel

from memlong import MemoryConfig, MemoryDecoder
from memlong.decoder import choose_machine
from memlong.decoder.model.kernels import steady_kernels
from memlong.errors import MemlongError
from memlong.training import TrainingConfig
from memlong.training.parts import TrainableParts

TARGET = 1.15
TEXT = Path(inspect.getfile(typing))
PLAIN = "plain window"
PROMPT = 16
_NOTED = 8  # segments between updates of the result file


@dataclass(frozen=True)
class Run:
    """The clock, the result file, and the time limit of the current part."""

    clock: Clock
    report: Report
    budget: Budget


def main(
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "demo",
    text: Annotated[Path, typer.Option(help="UTF-8 text; by default Python's own typing.py.")] = TEXT,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="Memory backend; repeatable. By default, torch, faiss and hnswlib."),
    ] = None,
    index_device: Annotated[str, typer.Option(help="Device that the backend searches on.")] = "cpu",
    retriever: Annotated[str, typer.Option(help="Retriever by name.")] = "lm",
    tokens: Annotated[int, typer.Option(help="Tokens to time, once the memory is full.")] = 4096,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate, in each of two rounds.")] = 96,
    training_tokens: Annotated[int, typer.Option(help="Tokens per training step.")] = 1024,
    skip: Annotated[list[str] | None, typer.Option(help="Skip 'parts', 'decoding' or 'training'.")] = None,
    dtype: Annotated[str, typer.Option(help="'float32', 'bfloat16', 'float16' or 'auto'.")] = "auto",
    device: Annotated[str, typer.Option(help="'cpu', 'cuda', 'cuda:N', 'mps' or 'auto'.")] = "auto",
    clock: Annotated[
        Clock,
        typer.Option(help="'wall', or 'cpu': CPU time of this process, unaffected by other load."),
    ] = Clock.WALL,
    seconds: Annotated[
        float | None, typer.Option(help="Approximate time limit in seconds; if too short, less is measured.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the result to this file.")
    ] = None,
) -> None:
    """Time streaming, generation and training with a memory and with a plain window of equal budget."""
    dtype, device = choose_machine(dtype, device).names
    budget = Budget(seconds)
    language_model, tokenizer = load(model, dtype=dtype, device=device)
    names = backend or ["torch", "faiss", "hnswlib"]
    where = {} if index_device == "cpu" else {"device": index_device}
    configs = {name: MemoryConfig(backend=name, backend_options=where, retriever=retriever) for name in names}
    usual = MemoryConfig()
    context = usual.local_window + usual.top_k * usual.chunk_size
    configs = {PLAIN: MemoryConfig(backend=None, local_window=context)} | configs
    decoders = {name: MemoryDecoder(language_model, tokenizer, config) for name, config in configs.items()}
    step = usual.segment_size
    warm = context + step
    count = warm + -(-max(tokens, training_tokens) // step) * step + PROMPT
    ids = token_ids(language_model, tokenizer, text, count)
    facts = {
        "model": model,
        "dtype": dtype,
        "retriever": retriever,
        "attention_budget": context,
        "clock": clock,
    }
    report = Report(json_file, facts, device, budget)
    parts = ids[:, warm : warm + tokens].split(step, dim=1)
    pair = {name: decoders[name] for name in (PLAIN, names[0])}
    acts: dict[str, Callable[[Run], object]] = {
        "streaming": lambda run: _streaming(decoders, ids[:, :warm], parts, run),
        "parts": lambda run: _parts(pair, parts[-8:], run),
        "decoding": lambda run: _decoding(pair, ids[:, :context], ids[:, -PROMPT:], new_tokens, run),
        "training": lambda run: _training(pair, ids[:, :warm], ids[:, warm : warm + training_tokens], run),
    }
    acts = {name: act for name, act in acts.items() if name not in (skip or ())}
    for number, (name, act) in enumerate(acts.items()):
        if number and budget.is_spent:
            report.leave_out(name)
            continue
        with steady_kernels(language_model.device):  # also for plain transformers
            act(Run(clock, report, budget.share(len(acts) - number)))
    for ratio in report.ratios:
        typer.echo(str(ratio))
    report.end()


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
    run: Run,
    what: str,
    note: Callable[[dict[str, list[float]]], object],
) -> None:
    """Record the seconds of each system for each part, in alternating order, until time is up."""
    times: dict[str, list[float]] = {name: [] for name in systems}
    for number, part in enumerate(tqdm(parts, unit="segment", leave=False)):
        order = list(systems) if number % 2 else list(reversed(systems))
        for name in order:
            with systems[name] as decoder:
                times[name].append(_seconds(decoder.model.device, lambda: use(decoder, part), run.clock))  # noqa: B023
        if run.budget.is_spent and number + 1 < len(parts):
            run.report.leave_out(f"{what} beyond {number + 1} of {len(parts)} segments")
            break
        if number % _NOTED == _NOTED - 1:
            note(times)
    note(times)


def _median_ratio(times: dict[str, list[float]], name: str, baseline: str) -> float:
    return median(mine / other for mine, other in zip(times[name], times[baseline], strict=True))


def _streaming(systems: dict[str, MemoryDecoder], first: Tensor, parts: tuple[Tensor, ...], run: Run) -> None:
    """Tokens per second of each system, once its window and memory are full."""
    for decoder in systems.values():
        with decoder:
            decoder.read(first)
    speeds: dict[str, float] = {}

    def note(times: dict[str, list[float]]) -> None:
        speeds.update((name, parts[0].shape[1] / median(mine)) for name, mine in times.items())
        run.report.ratios = [
            Ratio(f"streaming, {name}", _median_ratio(times, name, PLAIN), TARGET)
            for name in times
            if name != PLAIN
        ]
        run.report.add({"streaming": speeds, "segments": len(times[PLAIN])})

    _in_turns(systems, parts, lambda decoder, part: decoder.read(part), run, "streaming", note)
    for name, speed in speeds.items():
        typer.echo(f"streaming, {name}: {speed:.0f} tokens/s")


def _parts(systems: dict[str, MemoryDecoder], parts: tuple[Tensor, ...], run: Run) -> None:
    """Milliseconds that each part of a segment takes."""
    found: dict[str, dict[str, float]] = {}
    for name, decoder in systems.items():
        rows = []
        with decoder, watched(decoder, run.clock) as watch:
            for part in parts:
                watch.reset()
                decoder.read(part)
                rows.append(watch.read())
        found[name] = {part: 1000 * median(row[part] for row in rows) for part in PARTS}
        run.report.add({"parts": found})
    typer.echo(f"{'ms per segment':14s}" + "".join(f"{name:>14s}{'share':>8s}" for name in found))
    for part in PARTS:
        cells = [(row[part], row[part] / sum(row.values())) for row in found.values()]
        typer.echo(f"{part:14s}" + "".join(f"{spent:14.2f}{share:8.1%}" for spent, share in cells))


def _decoding(
    systems: dict[str, MemoryDecoder], context: Tensor, prompt: Tensor, count: int, run: Run
) -> None:
    """Milliseconds per new token after the first; transformers' own cache is as long as the plain window."""
    model = next(iter(systems.values())).model
    prompt = prompt.to(model.device)
    everything = torch.cat([context.to(model.device), prompt], dim=1)
    names = [*systems, "transformers"]
    rounds: dict[str, list[list[float]]] = {name: [] for name in names}
    found: dict[str, dict[str, float]] = {}
    for number, name in enumerate(2 * names):
        if number >= len(names) and run.budget.is_spent:
            break
        budget = run.budget.share(2 * len(names) - number)
        if name in systems:
            with systems[name]:
                times = _token_times(systems[name], prompt, count, run.clock, budget, remember=False)
        else:
            times = _token_times(model, everything, count, run.clock, budget)
        rounds[name].append(times)
        found[name] = {
            "median_ms": 1000 * median(chain.from_iterable(rounds[name])),
            "mean_ms": 1000 * min(map(fmean, rounds[name])),
        }
        run.report.add({"decoding": found})
    for name, row in found.items():
        typer.echo(
            f"generating, {name}: median {row['median_ms']:.1f} ms per token, mean {row['mean_ms']:.1f} ms"
        )
    memory = list(systems)[-1]
    means = {name: row["mean_ms"] for name, row in found.items()}
    ratios = [
        Ratio(f"generating, {memory} to {baseline}", means[memory] / means[baseline])
        for baseline in (PLAIN, "transformers")
    ]
    run.report.add({}, ratios)


def _token_times(
    speaker: MemoryDecoder | PreTrainedModel,
    prompt: Tensor,
    count: int,
    clock: Clock,
    budget: Budget,
    **options: Any,
) -> list[float]:
    marks: list[float] = []

    def mark(ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        _wait(ids.device)
        marks.append(clock.now())
        stop = budget.is_spent and len(marks) > 2
        return torch.full((len(ids),), stop, dtype=torch.bool, device=ids.device)

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


def _training(systems: dict[str, MemoryDecoder], first: Tensor, ids: Tensor, run: Run) -> None:
    """Seconds of forward and backward passes (LoRA of rank 16), segment by segment, and in a single plain pass."""
    if find_spec("peft") is None:
        run.report.leave_out("training", "the package peft is not installed")
        return
    memory = list(systems)[-1]
    model = systems[memory].model
    TrainableParts(systems[memory], TrainingConfig(steps=1))
    for decoder in systems.values():
        decoder.reset()
        with decoder:
            decoder.read(first)

    def learn(decoder: MemoryDecoder, part: Tensor) -> None:
        for segment in decoder.stream(part, gradients=True):
            _loss(segment.logits, part.to(model.device)).backward()

    parts = ids.split(systems[memory].config.segment_size, dim=1)
    earlier = run.report.ratios
    found: dict[str, float] = {}

    def note(times: dict[str, list[float]]) -> None:
        found.update((name, sum(mine)) for name, mine in times.items())
        found["tokens"] = sum(part.shape[1] for part in parts[: len(times[PLAIN])])
        run.report.ratios = [
            *earlier,
            Ratio(f"training, {memory} to {PLAIN}", _median_ratio(times, memory, PLAIN)),
        ]
        run.report.add({"training": found})

    _in_turns(systems, parts, learn, run, "training", note)
    ids = ids[:, : int(found["tokens"])].to(model.device)
    found["one plain pass"] = _seconds(
        model.device, lambda: _loss(model(input_ids=ids, use_cache=False).logits, ids).backward(), run.clock
    )
    ratio = Ratio(f"training, {memory} to one plain pass", found[memory] / found["one plain pass"])
    run.report.add({"training": found}, [ratio])
    for name in (*systems, "one plain pass"):
        typer.echo(f"training, {name}: {found[name]:.2f} s for {ids.shape[1]:,} tokens")


def _loss(logits: Tensor, ids: Tensor) -> Tensor:
    return cross_entropy(logits[0, :-1].float(), ids[0, 1:])


if __name__ == "__main__":
    try:
        typer.run(main)
    except MemlongError as error:
        raise SystemExit(f"bench: {error}") from error
