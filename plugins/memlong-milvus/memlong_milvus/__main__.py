"""``python -m memlong_milvus``: what an operator runs now and then."""

from __future__ import annotations

import argparse
import sys

from memlong.errors import MemlongError
from memlong.uri import without_credentials


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return the exit status."""
    given = _parser().parse_args(arguments)
    try:
        given.run(given)
    except (MemlongError, OSError) as error:  # an OSError is the store's
        print(f"Error: {_shown(without_credentials(str(error)))}", file=sys.stderr)
        return 1
    return 0


def _sweep(given: argparse.Namespace) -> None:
    from memlong_milvus.sweep import sweep

    swept = sweep(
        given.store, uri=given.uri, database=given.database, grace=given.grace, dry_run=given.dry_run
    )
    did = "would be removed" if given.dry_run else "removed"
    print(f"{swept.orphans} orphans {did}, {swept.young} too young to tell, {swept.living} in use")
    if swept.passed_over:
        print(f"Skipped, as this Milvus has no such collection: {_shown(', '.join(swept.passed_over))}")


def _purge(given: argparse.Namespace) -> None:
    from memlong_milvus.sweep import purge

    names = purge(uri=given.uri, database=given.database)
    print(
        f"Sessions without a name removed from: {_shown(', '.join(names)) or 'nothing, there is no collection'}"
    )


def _shown(text: str) -> str:
    """Escape what would control the terminal: a name may be a stranger's."""
    return "".join(each if each.isprintable() or each == "\n" else repr(each)[1:-1] for each in text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m memlong_milvus",
        description="Clean up what MilvusBank keeps. Credentials come from the environment, MEMLONG_MILVUS_TOKEN.",
    )
    place = argparse.ArgumentParser(add_help=False)
    place.add_argument("--uri", help="a file that ends in .db, or http://host:19530; or MEMLONG_MILVUS_URI")
    place.add_argument("--database", help="database of the server, if not the default one")
    commands = parser.add_subparsers(required=True, metavar="command")
    swept = commands.add_parser(
        "sweep",
        parents=[place],
        help="remove keys and values that no row refers to",
        epilog="python -m memlong_milvus sweep --uri http://localhost:19530 --store s3://bucket/memory --dry-run",
    )
    swept.add_argument("--store", required=True, help="the folder or URI that banks were given as store")
    swept.add_argument(
        "--grace", type=float, default=3600.0, help="seconds to leave young objects alone (3600)"
    )
    swept.add_argument("--dry-run", action="store_true", help="count only")
    swept.set_defaults(run=_sweep)
    purged = commands.add_parser(
        "purge",
        parents=[place],
        help="remove the rows of sessions without a name, while none is in use",
        epilog="python -m memlong_milvus purge --uri http://localhost:19530",
    )
    purged.set_defaults(run=_purge)
    return parser


if __name__ == "__main__":
    sys.exit(main())
