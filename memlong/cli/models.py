"""``memlong models``: show which models memory attaches to, and how."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from tqdm import tqdm

from memlong.cli import options
from memlong.cli.answer import escaped, say
from memlong.cli.files import writable
from memlong.cli.output import print_json, print_section, print_table
from memlong.errors import InvalidArgumentError

if TYPE_CHECKING:
    from memlong.architectures import Outline, Trial

_NAME = (
    "Model type such as qwen3_next, hub id, folder, config.json, GGUF file, 'demo' or 'demo-gemma'  "
    "[default: all model types]"
)
_COLUMNS = ("model type", "class", "memory", "layers", "stored per token", "why not")


def models(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help=_NAME)] = None,
    markdown: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the table of all model types as a Markdown page."),
    ] = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show whether and how memory attaches to a model, or list all architectures of the installed transformers.

    For a model, only its configuration is read: memory is attached to a model built from it without weights. Model
    types are tested with tiny random models: logits must match the plain model's, both with the text in the window
    and with all but the window in memory.

    \b
    Examples:
      memlong models demo
      memlong models Qwen/Qwen3-8B --json
      memlong models path/to/config.json
      memlong models qwen3_next
      memlong models
      memlong models --markdown docs/models.md
    """  # noqa: D301 - the backspace makes the help keep these line breaks
    if markdown is not None:
        if name is not None:
            raise InvalidArgumentError(
                f"--markdown writes all model types, and cannot be combined with {name!r}: leave one of them out"
            )
        writable(markdown, replaces=(_PAGE.split("{")[0].encode(),))
    from memlong.architectures import is_model_type

    if name is not None and (_is_there(name) or not is_model_type(name)):
        _show_outline(name, trust_remote_code=trust_remote_code, as_json=as_json)
        return
    trials = _trials(name)
    if markdown is not None:
        try:
            markdown.write_text(page(trials), encoding="utf-8")
        except OSError as error:
            say(page(trials))
            raise InvalidArgumentError(
                f"Cannot write {str(markdown)!r}: {error.strerror}. The page is printed instead"
            ) from error
        say(f"{escaped(str(markdown))}: {_counted(trials)}")
    elif as_json:
        print_json({**_summary(trials), "architectures": [_as_dict(each) for each in trials]})
    else:
        print_table(_COLUMNS, [row(each) for each in trials])
        print_section("Summary", [_counted(trials)] if name is None else [])


def _trials(model_type: str | None) -> list[Trial]:
    from memlong.architectures import architectures, of_model_type, try_architecture

    chosen = architectures() if model_type is None else of_model_type(model_type)
    with tqdm(chosen, desc="testing", unit="model", leave=False, disable=model_type is not None) as bar:
        return [try_architecture(each) for each in bar]


def _summary(trials: Sequence[Trial]) -> dict[str, Any]:
    from memlong.architectures import TRANSFORMERS

    counts = Counter(each.status for each in trials)
    return {"transformers": TRANSFORMERS} | {name: counts[name] for name in ("works", "refused", "fails")}


def _counted(trials: Sequence[Trial]) -> str:
    summary = _summary(trials)
    return (
        f"of {len(trials)} architectures in transformers {summary['transformers']}, {summary['works']} work, "
        f"{summary['refused']} are refused, {summary['fails']} fail"
    )


def _as_dict(trial: Trial) -> dict[str, str]:
    return {
        "model_type": trial.architecture.model_type,
        "class": trial.architecture.class_name,
        "status": trial.status,
        "layers": trial.layers,
        "stored": trial.stored,
        "reason": trial.reason,
    }


def row(trial: Trial) -> tuple[str, ...]:
    """Return the cells of a trial's table row."""
    return (*list(_as_dict(trial).values())[:5], trial.short_reason)


def line(trial: Trial) -> str:
    """Return a trial's row of the Markdown table."""
    cells = [re.sub(r"([|*<\[])", r"\\\1", cell) for cell in row(trial)]
    return f"| {' | '.join(cells)} |"


def page(trials: Sequence[Trial]) -> str:
    """Return the page for ``--markdown``."""
    from memlong.architectures import encoder_decoders

    return _PAGE.format(
        counts=_counted(trials).capitalize(),
        table="\n".join(map(line, trials)),
        columns=" | ".join(_COLUMNS),
        rule=" | ".join("---" for _ in _COLUMNS),
        left_out=", ".join(f"`{name}`" for name in encoder_decoders()),
    )


_PAGE = """\
# Models

{counts}.

Each is tested with a tiny random model. *works*: its logits match the plain model's, both with the text in the window
and with all but the window in memory. *refused*: memory does not attach, for the reason given. A model type with
several classes has several rows. `memlong models NAME` tests one model type; for a hub id, a folder or a `config.json`,
it also shows which layers retrieve, and how many bytes a token of memory takes.

Memory stores text only, not the images, sound and video of multimodal models. Recurrent and convolutional layers keep
their own state throughout a text; memory extends what the attention layers can look up.

This page is generated by `memlong models --markdown docs/models.md`. Not listed, as an encoder reads their text:
{left_out}.

| {columns} |
| {rule} |
{table}
"""


def _show_outline(name: str, *, trust_remote_code: bool, as_json: bool) -> None:
    from memlong.architectures import outline, read_config

    if not _is_there(name):
        _check_name(name)
    found = outline(read_config(name, trust_remote_code=trust_remote_code))
    if as_json:
        print_json({"model": name, "attaches": found.attaches, **asdict(found)})
        return
    print_table(("model", escaped(name)), _outline_rows(found))


def _is_there(name: str) -> bool:
    try:
        return Path(name).exists()
    except OSError:  # such as a file name that is too long
        return False


def _check_name(name: str) -> None:
    """Reject a name that is not a file, a model type or a possible hub id."""
    from memlong.architectures import TRANSFORMERS, architectures, encoder_decoders
    from memlong.decoder.model.demos import DEMOS

    if name in encoder_decoders():
        raise InvalidArgumentError(
            f"NAME must be a decoder-only model, got {name!r}, an encoder-decoder: its encoder cannot use a memory"
        )
    if Path(name).suffix in (".json", ".gguf"):
        raise InvalidArgumentError(f"The file {name!r} does not exist: check the path")
    if Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise InvalidArgumentError(f"The path {name!r} does not exist: check it")
    near = get_close_matches(name, [each.model_type for each in architectures()], n=1, cutoff=0.8)
    if near and name not in DEMOS and "/" not in name:
        raise InvalidArgumentError(
            f"transformers {TRANSFORMERS} has no model type {name!r}; did you mean {near[0]!r}? For a model on the "
            "hub, include its owner"
        )


def _local_window(least: int, most: int | None) -> str:
    if most is not None and most < least:
        return f"at most {max(most, 0):,} tokens: lower chunk_size and segment_size, which need {least:,} by default"
    return f"{least:,} {'or more' if most is None else f'to {most:,}'} tokens, with the default sizes"


def _outline_rows(found: Outline) -> list[tuple[str, str]]:
    from memlong.decoder.model.layer_names import ranges

    class_row = ("class", found.class_name)
    if not found.attaches:
        return [class_row, ("memory", "does not attach"), ("why", escaped(found.reason))]
    windows = sorted({size for size in found.windows.values() if size is not None})
    sizes = ", ".join(f"{size:,} ({dtype})" for dtype, size in found.token_bytes.items())
    least, most = found.local_window
    return [
        class_row,
        ("memory", "attaches"),
        ("layers", f"{found.depth}: {found.layers}"),
        *([("sliding windows", ", ".join(f"{size:,}" for size in windows) + " tokens")] if windows else []),
        ("retrieval layers", ranges(found.retrieval_layers)),
        ("stored per token", found.stored),
        ("bytes per token", sizes),
        ("local window", _local_window(least, most)),
        ("trained positions", "unknown" if found.max_positions is None else f"{found.max_positions:,}"),
    ]
