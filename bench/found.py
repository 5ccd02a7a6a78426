"""How many of the values that RULER asks for are before the model when it answers, by how a memory retrieves.

They stand in retrieved chunks, or in the local window. Nothing is read or generated, so that many prompts take minutes,
and what is lost in retrieval is told from what the model does not read out of its chunks (bench/benchmarks.py).

    python bench/found.py                                                   # at 16,384 tokens
    python bench/found.py --lengths 65536 --system "MiniLM: retriever=sentence-transformers"
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer
from cells import table
from results import Report
from systems import MEMORY, System, all_different, described
from systems.rag import RagAsText
from tqdm import tqdm

from memlong import MemoryConfig, load_model
from memlong.cli.values import numbers
from memlong.errors import InvalidArgumentError, MemlongError
from memlong.lm_eval.tasks.ruler import GENERATORS, dataset

_TASKS = "niah_single_2,niah_single_3,niah_multikey_1,niah_multivalue,niah_multiquery"


@dataclass(frozen=True)
class Prompt:
    """A prompt that asks for values, each of which it holds once."""

    token_ids: list[int]
    values: list[str]


def main(
    tasks: Annotated[str, typer.Option(help="RULER's, comma-separated.")] = _TASKS,
    model: Annotated[str, typer.Option(help="Hub id, folder, GGUF file, 'demo' or 'demo-gemma'.")] = "demo",
    lengths: Annotated[str, typer.Option(help="Tokens of a prompt, comma-separated.")] = "16384",
    samples: Annotated[int, typer.Option(min=1, help="Prompts of each task and length.")] = 12,
    system: Annotated[
        list[str] | None,
        typer.Option(metavar="'NAME: K=V, K=V'", help="Another memory, by its settings; repeatable."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Result file.")] = None,
) -> None:
    """Count the values that are retrieved for a question."""
    wanted = tasks.split(",")
    if unknown := [each for each in wanted if each not in GENERATORS]:
        raise InvalidArgumentError(f"--tasks must be among {', '.join(GENERATORS)}, got {unknown[0]!r}")
    systems = all_different(
        [System("memory", MemoryConfig()), *(described(each, MemoryConfig()) for each in system or ())]
    )
    for each in systems:
        if each.kind != MEMORY or each.config.backend in (None, "none"):
            raise InvalidArgumentError(
                f"--system must be a memory, got {each.name!r}: leave out kind and backend"
            )
    language_model, tokenizer = load_model(model, dtype="float32", device="cpu")
    sizes = numbers("--lengths", lengths, int)
    listed = {each.name: each.settings for each in systems}
    told = {"model": model, "samples": samples, "tasks": wanted, "lengths": sizes, "systems": listed}
    report = Report(json_file, told, "cpu")
    rows: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for length in sizes:
        found = rows[str(length)] = {each.name: {} for each in systems}
        for task in tqdm(wanted, unit="task", desc=f"{length:,} tokens"):
            prompts = _prompts(task, length, model, tokenizer, samples)
            for each in systems:
                reader = RagAsText(language_model, tokenizer, each.config)
                counts, tokens = zip(*(_found(reader, prompt, tokenizer) for prompt in prompts), strict=True)
                found[each.name][task] = {
                    "found": sum(counts),
                    "of": sum(len(prompt.values) for prompt in prompts),
                    "tokens": mean(tokens),
                }
        report.add({"found": rows})
        typer.echo(f"\n{length:,} tokens:\n\n" + shares(found))
    report.end()


def shares(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """Return a table of the shares of values that each system finds, in %, of each task, and of tokens attended to."""
    tasks = list(next(iter(found.values())))
    rows = [
        [
            name,
            *(f"{100 * of[task]['found'] / of[task]['of']:.0f}" for task in tasks),
            f"{mean(each['tokens'] for each in of.values()):,.0f}",
        ]
        for name, of in found.items()
    ]
    return table(["system", *tasks, "tokens"], rows)


def _prompts(task: str, length: int, model: str, tokenizer: Any, samples: int) -> list[Prompt]:
    made = dataset(ruler=task, max_seq_lengths=[length], samples=samples, pretrained=model)["test"]
    return [
        Prompt(
            tokenizer(f"{each['input']} {each['gen_prefix']}", add_special_tokens=False).input_ids,
            each["outputs"],
        )
        for each in made
    ]


def _found(reader: RagAsText, prompt: Prompt, tokenizer: Any) -> tuple[int, int]:
    """Return how many of a prompt's values a memory attends to when it begins to answer, and how many tokens."""
    reader.reset()
    asked = reader.asked(prompt.token_ids)
    text = tokenizer.decode(asked)
    return sum(value in text for value in prompt.values), len(asked)


if __name__ == "__main__":
    try:
        typer.run(main)
    except MemlongError as error:
        raise SystemExit(f"found: {error}") from error
