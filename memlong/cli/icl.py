"""``memlong icl``: in-context learning with the labeled examples in memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from tqdm import tqdm

from memlong.cli import options
from memlong.cli.answer import say
from memlong.cli.choice import choose_decoder
from memlong.cli.files import keep_apart
from memlong.cli.loading import machine_of
from memlong.cli.memory import MemoryOptions, described, with_memory
from memlong.cli.output import JsonOutput, print_table
from memlong.cli.values import numbers
from memlong.errors import InvalidArgumentError

if TYPE_CHECKING:
    from memlong.evaluation import Shots


@with_memory()
def icl(
    ctx: typer.Context,
    *,
    model: options.ModelUnlessAdapter = None,
    adapter: options.Adapter = None,
    demonstrations: Annotated[
        Path,
        typer.Option(metavar="FILE", help="CSV or TSV file of labeled texts to use as shots, one per row."),
    ],
    tests: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Labeled texts to test on  [default: the demonstrations left over]"
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(metavar="LABEL=WORD,...", help="The word for each label, if labels are not words."),
    ] = None,
    label_column: Annotated[
        Literal["first", "last"] | None,
        typer.Option(help="Column of the labels  [default: the one with more repeated values]"),
    ] = None,
    shots: Annotated[str, typer.Option(help="Numbers of shots, comma-separated.")] = "4,20,200",
    test_limit: Annotated[int, typer.Option(min=1, help="Maximum number of test texts.")] = 200,
    template: Annotated[
        str, typer.Option(help=r"Template of a shot; \n is a newline.")
    ] = r"Review: {text}\nSentiment: {word}\n\n",
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Divide by each word's probability for the text N/A.")
    ] = False,
    memory: MemoryOptions,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    seed: options.Seed = 0,
    json_file: options.JsonFile = None,
) -> None:
    """Show more labeled texts than the window holds, and predict the labels of others.

    Every label gets the same number of shots; smaller sets are prefixes of larger ones. The prediction is the label
    word with the highest probability. Small models often favor one word whatever the text: compare with the majority
    baseline, and try --calibrate.

    \b
    Examples:
      memlong icl --model demo --demonstrations train.tsv --tests dev.tsv --labels 0=negative,1=positive
      memlong icl --model demo --demonstrations train.tsv --labels 0=negative,1=positive --backend none
      memlong icl --adapter trained --demonstrations train.tsv --labels 0=negative,1=positive
      memlong icl --model demo --demonstrations news.csv --label-column first --shots 8,400 --calibrate \\
          --template 'Article: {text}\\nTopic: {word}\\n\\n' --json out.json
    """  # noqa: D301 - the backspace makes the help keep these line breaks
    keep_apart(
        {"--json": json_file},
        {
            "--demonstrations": [demonstrations],
            "--tests": [tests],
            "--maps": [memory.maps],
            "--model": [model],
        },
    )
    output = JsonOutput(json_file)
    from memlong.evaluation import draw_task, evaluate_icl, read_examples
    from memlong.versions import versions

    counts = list(dict.fromkeys(numbers("--shots", shots, int)))
    words = None if labels is None else _words(labels)
    shown = read_examples(demonstrations, labels=words, label_column=label_column)
    known = words or {example.word: example.word for example in shown}
    asked = None if tests is None else read_examples(tests, labels=known, label_column=label_column)
    task = draw_task(shown, asked, shots=max(counts), test_limit=test_limit, seed=seed)
    decoder = choose_decoder(
        ctx,
        model,
        adapter,
        memory,
        seed=seed,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    ).open()
    with (
        decoder,
        tqdm(
            total=len(counts) * len(task.tests), unit="test", desc=f"testing ({machine_of(decoder.model)})"
        ) as bar,
    ):
        found = evaluate_icl(
            decoder,
            task,
            counts,
            template=template.replace("\\n", "\n"),
            calibrate=calibrate,
            seed=seed,
            progress=bar.update,
        )
    majority, floor = task.majority
    result = {
        "model": model,
        "adapter": adapter,
        **described(decoder),
        "settings": {
            "demonstrations": str(demonstrations),
            "tests": None if tests is None else str(tests),
            "words": list(task.words),
            "template": template,
            "calibrate": calibrate,
            "seed": seed,
        },
        "shots": [_record(each) for each in found],
        "majority": {"word": majority, "accuracy": floor},
        "versions": versions(),
    }
    if output.write(result):
        _print(found)
        say(f"\nmajority baseline: {floor:.1%}, always {majority!r} ({machine_of(decoder.model)})")


def _words(labels: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in labels.split(","):
        label, _, word = (piece.strip() for piece in part.partition("="))
        if not label or not word:
            raise InvalidArgumentError(
                f"--labels must give a word for each label, such as --labels 0=negative,1=positive, got {labels!r}"
            )
        if label in found:
            raise InvalidArgumentError(f"--labels must give each label once, got {label!r} twice")
        found[label] = word
    return found


def _record(found: Shots) -> dict[str, object]:
    return {
        "shots": found.shots,
        "demonstration_tokens": found.demonstration_tokens,
        "tests": len(found.predictions),
        "accuracy": found.accuracy.value,
        "low": found.accuracy.low,
        "high": found.accuracy.high,
        "seconds": found.seconds,
    }


def _print(found: list[Shots]) -> None:
    rows = [
        (
            f"{each.shots:,}",
            f"{each.demonstration_tokens:,}",
            f"{len(each.predictions):,}",
            f"{each.accuracy.value:.1%} [{each.accuracy.low:.1%}, {each.accuracy.high:.1%}]",
            f"{each.seconds:.1f}",
        )
        for each in found
    ]
    print_table(("shots", "tokens", "tests", "accuracy", "seconds"), rows)
