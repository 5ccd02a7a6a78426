"""``memlong bank``: look into a snapshot, check it, and give its space back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from memlong.cli.answer import answering, say, shown
from memlong.cli.output import print_json, print_section, print_table
from memlong.uri import hide_credentials

Folder = Annotated[
    Path, typer.Argument(metavar="PATH", help="Folder of a snapshot: of a bank, or of a decoder.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def info(path: Folder, as_json: AsJson = False) -> None:
    """Say what is in a snapshot.

    Only the manifest is read, so this is quick, whatever the size.

    \b
    Examples:
      memlong bank info memory
      memlong bank info memory --json
    """  # noqa: D301 - the backspace makes the help keep these line breaks
    from memlong.bank.snapshot.tending import describe

    _show(path, describe(path), as_json=as_json)


def verify(path: Folder, as_json: AsJson = False) -> None:
    """Read all of a snapshot and check it: sizes, hashes, checksums, and that it makes sense.

    Exits with 1, naming the file, if something is not what was saved.

    \b
    Examples:
      memlong bank verify memory
      memlong bank verify memory --json
    """  # noqa: D301
    from tqdm import tqdm

    from memlong.bank.snapshot.tending import describe
    from memlong.bank.snapshot.tending import verify as verified

    total = describe(path)["bytes"]
    with tqdm(total=total, unit="B", unit_scale=True, desc=path.name, leave=False, disable=as_json) as bar:
        found = verified(path, bar.update)
    _show(path, found | {"is_whole": True}, as_json=as_json)
    if not as_json:
        say(f"\n{shown(str(path))}: all {found['files']} files are what was saved")


def compact(path: Folder, as_json: AsJson = False) -> None:
    """Rewrite a snapshot without the chunks that have left, so that nothing of them remains.

    A bank that is in use somewhere is not disturbed; when it is saved next, it is saved as a whole.

    \b
    Examples:
      memlong bank compact memory
      memlong bank compact memory --json
    """  # noqa: D301
    from memlong.bank.snapshot.tending import compact as compacted
    from memlong.bank.snapshot.tending import describe

    before = describe(path)["bytes"]
    found = compacted(path)
    _show(path, found | {"bytes_before": before}, as_json=as_json)
    if not as_json:
        say(f"\n{before:,} bytes before, {found['bytes']:,} now")


def add_bank_commands(app: typer.Typer) -> None:
    """Add ``bank`` with its commands to the application."""
    group = typer.Typer(
        help="Look into the snapshot of a memory, check it, and give its space back.",
        no_args_is_help=True,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for command in (info, verify, compact):
        group.command()(answering(command))
    app.add_typer(group, name="bank")


def _show(path: Path, found: dict[str, Any], *, as_json: bool) -> None:
    for bank in found["banks"]:
        bank["options"] = hide_credentials(bank["options"])
    if as_json:
        print_json({"path": str(path), **found})
        return
    print_table(
        ("row", "chunks", "left behind", "dim", "metric", "eviction", "chunk", "bytes"),
        [
            (
                str(row),
                f"{bank['chunks']:,}",
                f"{bank['left_behind']:,}",
                str(bank["dim"]),
                bank["metric"],
                shown(bank["eviction"] or "its owner's"),
                shown(_chunk(bank)),
                f"{bank['bytes']:,}",
            )
            for row, bank in enumerate(found["banks"])
        ],
    )
    print_section("Made by", [_maker(row, bank) for row, bank in enumerate(found["banks"])])
    print_section("Saved by", [shown(f"{name} {version}") for name, version in found["versions"].items()])
    print_section(
        f"A {found['kind']}",
        [f"state {found['generation']}, {found['files']} files, {found['bytes']:,} bytes"],
    )
    fingerprint = found["fingerprint"] or {}
    print_section("Of the model", [shown(f"{name} {value}") for name, value in _facts(fingerprint)])


def _facts(fingerprint: dict[str, Any]) -> Iterator[tuple[str, object]]:
    for name, value in fingerprint.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{part}", each) for part, each in value.items())
        else:
            yield name, value


def _maker(row: int, bank: dict[str, Any]) -> str:
    options = " ".join(f"{name}={value}" for name, value in bank["options"].items())
    return shown(f"{row}: {bank['made_by']} {options}".rstrip())


def _chunk(bank: dict[str, Any]) -> str:
    if bank["chunk_shape"] is None:
        return ""
    return f"{' x '.join(map(str, bank['chunk_shape']))} {bank['chunk_dtype']}"
