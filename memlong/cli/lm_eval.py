"""``memlong lm-eval``: the command line of the lm-evaluation-harness, with the model ``memlong``."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import typer

from memlong.errors import MemlongError

_COMMANDS = ("run", "ls", "validate")
_FOLDER = "--include_path"


def lm_eval(ctx: typer.Context) -> None:
    """Run benchmarks of the lm-evaluation-harness on a model with a memory.

    Takes everything that `lm-eval` takes, with --model memlong as the default. --model_args are those of a model
    (pretrained, adapter, dtype, tokenizer) and any memory settings, such as top_k. Every request begins with an empty
    memory; prompts of any length are streamed, and what several have in common at their beginning is read once.
    `memlong lm-eval run --help` lists the options.

    The groups ruler_local, ruler_local_qa (RULER's questions on documents), babilong_local and hard_needle_local make
    their prompts here, of any length and without a hub. They are found next to what --include_path names, but not next
    to what a file given by --config includes. In --metadata, `samples` is the number of prompts of each length (500),
    `haystack` a text file or folder, `babi` a folder with bAbI's files, and `squad` and `hotpotqa` the file of each.

    \b
    Examples:
      memlong lm-eval --model_args pretrained=demo --tasks arc_easy,hellaswag --limit 100
      memlong lm-eval --model_args pretrained=demo top_k=16 dtype=float32 --tasks niah_single_1,ruler_vt \\
          --metadata '{"max_seq_lengths": [4096, 32768]}' --limit 20 --output_path results
      memlong lm-eval --model_args pretrained=demo backend=none local_window=2048 --tasks niah_single_1
      memlong lm-eval --model_args pretrained=demo --tasks ruler_local \\
          --metadata '{"max_seq_lengths": [4096, 16384], "samples": 20, "haystack": "book.txt"}'
      memlong lm-eval ls tasks
    """  # noqa: D301 - the backspace makes the help keep these line breaks
    if not ctx.args:
        typer.echo(ctx.get_help())
        return
    from lm_eval.__main__ import cli_evaluate

    import memlong.lm_eval  # noqa: F401 - registers the model

    with _typed(ctx.args):
        try:
            cli_evaluate()
        except (ValueError, FileNotFoundError) as error:  # such as a task that there is not
            raise MemlongError(f"lm-eval: {error}") from error


@contextmanager
def _typed(arguments: Sequence[str]) -> Iterator[None]:
    """Let lm-eval find these arguments, the way it finds its own."""
    before = sys.argv
    with tempfile.TemporaryDirectory(prefix="memlong-") as folder:
        sys.argv = ["lm-eval", *_completed(arguments, Path(folder))]
        try:
            yield
        finally:
            sys.argv = before


def _completed(arguments: Sequence[str], folder: Path) -> list[str]:
    """Add what memlong knows: its model and tasks, and a tokenizer that tasks which write their own texts can load."""
    command, typed = "run", list(arguments)
    if typed[0] in _COMMANDS:
        command, *typed = typed
    options = {each.partition("=")[0] for each in typed}
    if not options & {"--config", "-C"}:  # a file's own include_path would be replaced
        typed = _with_tasks(typed, folder / "tasks")
    if command != "run":
        return [command, *typed]
    if not options & {"--model", "-M"}:
        typed = ["--model", "memlong", *typed]
    if "--device" not in options:  # it would name a GPU
        typed += ["--device", "auto"]
    typed = [part for each in typed for part in _parted(each)]
    for place, each in enumerate(typed):
        if each in ("--model_args", "-a"):
            following = typed[place + 1 :]
            ends = (number for number, this in enumerate(following) if this.startswith("-"))
            given = ",".join(following[: next(ends, len(following))]).split(",")
            tokenizer = _tokenizer_for(given, folder)
            return ["run", *typed[: place + 1], *tokenizer, *typed[place + 1 :]]
    return ["run", *typed]


def _parted(word: str) -> tuple[str, ...]:
    """Part ``--model_args=...`` into option and value."""
    option, equals, value = word.partition("=")
    return (option, value) if equals and option == "--model_args" else (word,)


def _with_tasks(typed: Sequence[str], folder: Path) -> list[str]:
    """Add memlong's folder of tasks, or one that leads to both if another is typed: lm-eval takes one, the last."""
    from memlong.lm_eval import TASKS

    given = [number for number, each in enumerate(typed) if each.partition("=")[0] == _FOLDER]
    if not given:
        return [*typed, _FOLDER, str(TASKS)]
    place = given[-1]
    theirs = Path(typed[place].partition("=")[2] or "".join(typed[place + 1 : place + 2]))
    if not theirs.is_dir():
        return list(typed)
    folder.mkdir()
    files = [path for root in (theirs, TASKS) for path in sorted(root.rglob("*.yaml"))]
    for number, path in enumerate(files):
        include = json.dumps({"include": str(path.resolve())})  # JSON is YAML
        folder.joinpath(f"{number:06}_{path.name}").write_text(include, encoding="utf-8")
    return [*typed, _FOLDER, str(folder)]


def _tokenizer_for(given: Sequence[str], folder: Path) -> list[str]:
    """Return a setting for a tokenizer as a folder, where the model is no folder or hub id."""
    from memlong.decoder.model.demos import DEMOS
    from memlong.decoder.model.loading import load_tokenizer

    settings = dict(each.partition("=")[::2] for each in given)
    name = settings.get("pretrained", "")
    if "tokenizer" in settings or not (name in DEMOS or name.endswith(".gguf")):
        return []
    load_tokenizer(name).save_pretrained(folder)
    return [f"tokenizer={folder}"]
