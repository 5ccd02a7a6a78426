"""Speed of `memlong train` by the number of rows, on one thread: of this checkout, and of another for comparison.

The model has random weights, as has the text. An episode is read before the clock starts. Each checkout has a process
of its own, which measures all numbers of rows; they take turns or, with --clock cpu, run at the same time, so that what
else the machine does slows all alike (on Linux, `taskset -c 1` keeps them on one core). With --processes, it is also
measured how long processes that share the largest number of rows take together for the same tokens.

    python bench/rows.py --before ../before --json out/rows.json
    python bench/rows.py --model random-tiny --rows 1 --rows 8 --rounds 1
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from ratios import Clock, Ratio
from results import Report
from shapes import MODEL_HELP, load

from memlong import MemoryConfig, MemoryDecoder
from memlong.errors import MemlongError
from memlong.training import Step, Trainer, TrainingConfig, usual_retrieval_layers

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Work:
    """What is trained: the lengths, in tokens, and how many episodes are timed."""

    model: str
    document_tokens: int
    local_window: int
    segment_size: int
    episodes: int
    clock: Clock


@dataclass(frozen=True)
class Measured:
    """Training with so many rows in each process."""

    rows: int
    tokens: int
    seconds: float
    losses: list[float]


def train(work: Work, rows: int) -> Measured:
    """Train, and time all episodes but the first."""
    model, tokenizer = load(work.model, dtype="float32", device="cpu")
    config = MemoryConfig(
        backend="torch",
        retriever="lm",
        kv_source="shared",
        local_window=work.local_window,
        segment_size=work.segment_size,
        retrieval_layers=usual_retrieval_layers(model, MemoryConfig(kv_source="shared")),
    )
    generator = torch.Generator().manual_seed(0)
    shape = (32, work.document_tokens + 1)
    documents = list(torch.randint(3, model.config.vocab_size, shape, generator=generator))
    first = work.document_tokens // work.segment_size
    training = TrainingConfig(
        steps=first * (1 + work.episodes),
        rows=rows,
        document_tokens=work.document_tokens,
        accumulate=1,
        warmup_steps=0,
        checkpoint_every=10**6,
    )
    clocked: list[tuple[float, Step]] = []
    with tempfile.TemporaryDirectory() as folder:
        shared = os.environ.get("MEMLONG_BENCH_FOLDER", folder)  # all processes of a run write to one folder
        into = Path(shared) / f"rows {rows}"
        trainer = Trainer(MemoryDecoder(model, tokenizer, config), documents, training, folder=into)
        trainer.run(progress=lambda step: clocked.append((work.clock.now(), step)))
    if not clocked:  # the main process alone is told
        return Measured(rows, 0, 0.0, [])
    (began, start), (ended, end) = clocked[first - 1], clocked[-1]
    return Measured(rows, end.tokens - start.tokens, ended - began, [step.loss for _, step in clocked])


def main(
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "random-tiny",
    rows: Annotated[list[int] | None, typer.Option(help="Numbers of rows; by default 1, 2, 4 and 8.")] = None,
    before: Annotated[Path | None, typer.Option(help="Another checkout to compare with.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Processes of each checkout.")] = 5,
    processes: Annotated[int, typer.Option(min=1, help="Processes to share the largest number of rows.")] = 1,
    episodes: Annotated[int, typer.Option(min=1, help="Episodes to time.")] = 2,
    document_tokens: Annotated[int, typer.Option(help="Tokens of an episode.")] = 2048,
    local_window: Annotated[int, typer.Option(help="Tokens of the local window.")] = 512,
    segment_size: Annotated[int, typer.Option(help="Tokens of a segment.")] = 128,
    clock: Annotated[Clock, typer.Option(help="Time that passes, or that the processor works.")] = Clock.WALL,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the result to this file.")
    ] = None,
    measure: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Time training."""
    torch.set_num_threads(1)
    rows = rows or [1, 2, 4, 8]
    work = Work(model, document_tokens, local_window, segment_size, episodes, clock)
    if measure:
        print(json.dumps([asdict(train(work, each)) for each in rows]))
        return
    report = Report(json_file, {**asdict(work), "rounds": rounds})
    checkouts = {"now": ROOT} if before is None else {"before": before.absolute(), "now": ROOT}
    found: dict[str, dict[int, list[Measured]]] = {name: {each: [] for each in rows} for name in checkouts}
    facts: list[dict[str, Any]] = []
    for _ in range(rounds):
        with ThreadPoolExecutor(len(checkouts) if clock is Clock.CPU else 1) as pool:
            made = pool.map(lambda checkout: _measured(work, rows, checkout), checkouts.values())
            for name, several in zip(checkouts, made, strict=True):
                for each in several:
                    found[name][each.rows].append(each)
        report.ratios = []
        facts = [_compared(each, found, report) for each in rows]
        report.add({"by_rows": facts})
    for fact in facts:
        told = ", ".join(f"{name} {median(fact[name]):8,.0f} tokens/s" for name in checkouts)
        spread = f", {min(fact['ratios']):.2f} to {max(fact['ratios']):.2f} times" if before else ""
        typer.echo(f"{fact['rows']} rows: {told}{spread}")
    if processes > 1:
        alone, shared = (_elapsed(work, max(rows) // count, count) for count in (1, processes))
        report.add(
            {"processes": {"count": processes, "rows": max(rows), "one": alone, "shared": shared}},
            [Ratio(f"tokens/s, {processes} processes to 1 with {max(rows)} rows in all", alone / shared)],
        )
        typer.echo(f"{max(rows)} rows: {alone:.1f} s in one process, {shared:.1f} s in {processes}")
    report.end()


def _compared(rows: int, found: dict[str, dict[int, list[Measured]]], report: Report) -> dict[str, Any]:
    """Return the tokens a second with so many rows, and how they compare with those before."""
    speeds = {name: [each.tokens / each.seconds for each in of[rows]] for name, of in found.items()}
    fact: dict[str, Any] = {"rows": rows, **speeds}
    if "before" in found:
        fact["ratios"] = [now / then for now, then in zip(speeds["now"], speeds["before"], strict=True)]
        losses = zip(found["now"][rows][0].losses, found["before"][rows][0].losses, strict=True)
        fact["loss_difference"] = max(abs(one - other) for one, other in losses)
        report.ratios.append(Ratio(f"tokens/s, {rows} rows, now to before", median(fact["ratios"])))
    return fact


def _measured(work: Work, rows: list[int], checkout: Path, processes: int = 1) -> list[Measured]:
    """Measure a checkout in a new process, or several that share each episode's rows."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    options = [f"--{name.replace('_', '-')}={value}" for name, value in asdict(work).items()]
    folders = [checkout, checkout / "backends"]
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, folders)),
            "OMP_NUM_THREADS": "1",
            "MEMLONG_BENCH_FOLDER": folder,
        }
        made = subprocess.run(  # noqa: S603 - this file
            [
                sys.executable,
                *launcher,
                __file__,
                "--measure",
                *options,
                *(f"--rows={each}" for each in rows),
            ],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    found = [
        [Measured(**each) for each in json.loads(line)]
        for line in made.stdout.splitlines()
        if line[:2] == "[{"
    ]
    return next(each for each in found if each[0].tokens)


def _elapsed(work: Work, rows: int, processes: int) -> float:
    """Return the seconds that training takes, without its start."""
    (found,) = _measured(work, [rows], ROOT, processes)
    return found.seconds


if __name__ == "__main__":
    try:
        typer.run(main)
    except MemlongError as error:
        raise SystemExit(f"bench: {error}") from error
