"""``memlong bank``: inspect, verify and compact a snapshot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memlong.cli.answer import answering, escaped, say
from memlong.cli.output import print_json, print_section, print_table
from memlong.uri import hide_credentials

if TYPE_CHECKING:
    from memlong.bank.snapshot.manifest import CorpusRecord
    from memlong.bank.snapshot.reader import StoredBank

Folder = Annotated[
    Path, typer.Argument(metavar="PATH", help="Snapshot folder of a bank, a corpus or a decoder.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def info(path: Folder, as_json: AsJson = False) -> None:
    """Show what a snapshot contains.

    Keys, values and embeddings are not read, so this is fast at any size.

    \b
    Examples:
      memlong bank info memory
      memlong bank info memory --json
    """  # noqa: D301 - the backspace makes the help keep these line breaks
    from memlong.bank.snapshot.tending import describe

    _show(path, describe(path), as_json=as_json)


def verify(path: Folder, as_json: AsJson = False) -> None:
    """Read a whole snapshot and check it: sizes, hashes, checksums and consistency.

    Exits with 1 and names the file if anything differs from what was saved.

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
        found = verified(path, bar.update, _check_documents)
    _show(path, found | {"is_whole": True}, as_json=as_json)
    if not as_json:
        say(f"\n{escaped(str(path))}: all {found['files']} files are intact")


def compact(path: Folder, as_json: AsJson = False) -> None:
    """Rewrite a snapshot without its evicted and removed chunks, so that no trace of them remains.

    A bank loaded elsewhere is not affected; its next save writes everything.

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
        say(f"\n{before:,} bytes before, {found['bytes']:,} after")


def add_bank_commands(app: typer.Typer) -> None:
    """Add ``bank`` and its subcommands to the application."""
    group = typer.Typer(
        help="Inspect, verify and compact the snapshot of a memory.",
        no_args_is_help=True,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for command in (info, verify, compact):
        group.command()(answering(command))
    app.add_typer(group, name="bank")


def _check_documents(stored: StoredBank, corpus: CorpusRecord) -> None:
    from memlong.corpus.table import check_documents

    check_documents(stored, corpus)


def _documents(path: Path) -> dict[str, list[str]]:
    """Return the sources and tags of the documents of a corpus."""
    from memlong.corpus.table import list_documents

    documents = list_documents(path)
    return {
        "sources": [each.source for each in documents],
        "tags": sorted({tag for each in documents for tag in each.tags}),
    }


def _show(path: Path, found: dict[str, Any], *, as_json: bool) -> None:
    if found["corpus"] is not None:
        found["corpus"] |= _documents(path)
    for bank in found["banks"]:
        bank["options"] = hide_credentials(bank["options"])
    if as_json:
        print_json({"path": str(path), **found})
        return
    print_table(
        ("row", "chunks", "removed", "dim", "metric", "eviction", "chunk", "bytes"),
        [
            (
                str(row),
                f"{bank['chunks']:,}",
                f"{bank['left_behind']:,}",
                str(bank["dim"]),
                bank["metric"],
                escaped(bank["eviction"] or "custom"),
                escaped(_chunk(bank)),
                f"{bank['bytes']:,}",
            )
            for row, bank in enumerate(found["banks"])
        ],
    )
    print_section("Created by", [_maker(row, bank) for row, bank in enumerate(found["banks"])])
    print_section("Saved by", [escaped(f"{name} {version}") for name, version in found["versions"].items()])
    print_section(
        f"Snapshot of a {found['kind']}",
        [f"state {found['generation']}, {found['files']} files, {found['bytes']:,} bytes"],
    )
    if found["corpus"] is not None:
        _show_corpus(found["corpus"])
    fingerprint = found["fingerprint"] or {}
    print_section("Model", [escaped(f"{name} {value}") for name, value in _facts(fingerprint)])


def _show_corpus(corpus: dict[str, Any]) -> None:
    lines = [
        f"model {corpus['model'] or 'unknown'}",
        f"{corpus['documents']:,} documents, {corpus['tokens']:,} tokens",
    ]
    if corpus["tags"]:
        lines.append(f"tags {', '.join(corpus['tags'])}")
    print_section("Corpus", lines)
    print_section("Documents", corpus["sources"])


def _facts(fingerprint: dict[str, Any]) -> Iterator[tuple[str, object]]:
    for name, value in fingerprint.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{part}", each) for part, each in value.items())
        else:
            yield name, value


def _maker(row: int, bank: dict[str, Any]) -> str:
    options = " ".join(f"{name}={value}" for name, value in bank["options"].items())
    return escaped(f"{row}: {bank['made_by']} {options}".rstrip())


def _chunk(bank: dict[str, Any]) -> str:
    if bank["chunk_shape"] is None:
        return ""
    return f"{' x '.join(map(str, bank['chunk_shape']))} {bank['chunk_dtype']}"
