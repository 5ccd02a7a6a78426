r"""memlong as a model of lm-eval, beside transformers' own: equal wherever the local window holds all of a prompt.

python bench/lm_eval_equality.py                     # the eleven local tasks of RULER, at 2,048 tokens
python bench/lm_eval_equality.py --tasks sst2_local,text_local --num-fewshot 8 --limit 20 \
    --metadata '{"sst2_train": "sst2.tsv", "text": "book.txt", "characters": 3000}'
python bench/lm_eval_equality.py --tasks my_task --include-path my_tasks --model Qwen/Qwen3-0.6B
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from results import Report
from tables_alternatives import answers
from tqdm import tqdm

from memlong import MemoryConfig, MemoryDecoder, load_model
from memlong.decoder import choose_machine
from memlong.errors import InvalidArgumentError, MemlongError
from memlong.lm_eval import TASKS, MemlongLM

EXAMPLES = Path(__file__).parents[1] / "examples" / "lm_eval"


@dataclass(frozen=True)
class Row:
    """One task in both.

    Attributes
    ----------
    requests
        Prompts, or prompts and continuations.
    same
        How many have the same answer, or agree on whether a continuation is the greedy one; None of documents.
    difference
        Largest difference of two log-likelihoods, in nats; None where a task has none.
    score, theirs
        The task's first metric.
    """

    task: str
    metric: str
    score: float
    theirs: float
    requests: int
    same: int | None
    difference: float | None


def main(
    tasks: Annotated[str, typer.Option(help="Tasks and groups, comma-separated.")] = "ruler_local",
    model: Annotated[str, typer.Option(help="Hub id, folder, GGUF file, 'demo' or 'demo-gemma'.")] = "demo",
    metadata: Annotated[str, typer.Option(help="As lm-eval's own, in JSON.")] = "{}",
    include_path: Annotated[Path, typer.Option(help="Folder of more tasks.")] = EXAMPLES,
    length: Annotated[int, typer.Option(min=1024, help="Tokens of prompts that are made here.")] = 2048,
    local_window: Annotated[int, typer.Option(help="Tokens of memlong's local window.")] = 4096,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples in prompts of tasks that have some.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Samples of each task.")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result as JSON.")] = None,
) -> None:
    """Run tasks on both, and compare every answer."""
    dtype, device = choose_machine("float32", "auto").names
    told = {"pretrained": model, "max_seq_lengths": [length], "samples": limit, **_mapping(metadata)}
    language_model, tokenizer = load_model(model, dtype=dtype, device=device)
    found = TaskManager(include_path=[str(TASKS), str(include_path)], include_defaults=False, metadata=told)
    facts = {"model": model, "dtype": dtype, "device": device, "local_window": local_window, "limit": limit}
    report = Report(json_file, {**facts, "num_fewshot": num_fewshot, "metadata": told}, device)
    config = MemoryConfig(local_window=local_window)
    models = {
        "memlong": MemlongLM(MemoryDecoder(language_model, tokenizer, config)),
        "transformers": HFLM(language_model, tokenizer=tokenizer, backend="causal"),
    }
    rows: list[Row] = []
    for task in tqdm([name for each in tasks.split(",") for name in _members(found, each)], unit="task"):
        shows_examples = found.load([task])["tasks"][task].config.fewshot_split is not None
        both = {}
        for name, each in models.items():
            with warnings.catch_warnings():
                for kind in (DeprecationWarning, FutureWarning):  # of what lm-eval uses
                    warnings.simplefilter("ignore", kind)
                both[name] = simple_evaluate(
                    each,
                    tasks=[task],
                    task_manager=found,
                    num_fewshot=num_fewshot if shows_examples else None,
                    limit=limit,
                    log_samples=True,
                    bootstrap_iters=0,
                    verbosity="ERROR",
                )
        rows.append(_compared(task, both["memlong"], both["transformers"]))
        report.add({"rows": [asdict(row) for row in rows]})
    typer.echo("\n" + answers(map(asdict, rows)))
    report.end()


def _mapping(metadata: str) -> dict[str, Any]:
    try:
        found = json.loads(metadata)
    except ValueError as error:
        raise InvalidArgumentError(f"--metadata must be JSON, got {metadata!r}: {error}") from error
    if not isinstance(found, dict):
        raise InvalidArgumentError(f"--metadata must be a mapping in JSON, such as '{{}}', got {metadata!r}")
    return found


def _members(manager: TaskManager, name: str) -> list[str]:
    """Return the tasks of a group, or the task itself."""
    if name not in manager.all_tasks:
        raise InvalidArgumentError(
            f"There is no task {name!r} among {', '.join(sorted(manager.all_tasks))}: see --include-path"
        )
    return [str(each) for each in manager.load([name])["tasks"]]


def _compared(task: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Row:
    pairs = list(zip(_answers(ours, task), _answers(theirs, task), strict=True))
    numbers = [abs(one[0] - other[0]) for one, other in pairs if isinstance(one[0], float)]
    says = [one[-1] == other[-1] for one, other in pairs if not isinstance(one[-1], float)]
    metric = next(
        name
        for name in theirs["results"][task]
        if "," in name and "stderr" not in name and _is_there(theirs, task, name)
    )
    scores = (float(each["results"][task][metric]) for each in (ours, theirs))
    return Row(
        task,
        metric.partition(",")[0],
        *scores,
        len(pairs),
        sum(says) if says else None,
        max(numbers, default=None),
    )


def _is_there(result: Mapping[str, Any], task: str, metric: str) -> bool:
    value = result["results"][task][metric]
    return isinstance(value, int | float) and value != -1  # as RULER has lengths that no prompt had


def _answers(result: Mapping[str, Any], task: str) -> Iterator[tuple[Any, ...]]:
    """Yield the answer to each request of a task: text, a log-likelihood, or that and whether it is greedy."""
    for sample in result["samples"][task]:
        for (answer,) in sample["resps"]:
            yield answer if isinstance(answer, tuple) else (answer,)


if __name__ == "__main__":
    try:
        typer.run(main)
    except MemlongError as error:
        raise SystemExit(f"lm_eval_equality: {error}") from error
