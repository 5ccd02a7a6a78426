"""``python -m memlong_milvus sweep``: what an operator runs now and then."""

from __future__ import annotations

import argparse
import sys

from memlong.errors import MemlongError


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return the exit status."""
    given = _parser().parse_args(arguments)
    from memlong_milvus.sweep import sweep

    try:
        swept = sweep(
            given.store, uri=given.uri, database=given.database, grace=given.grace, dry_run=given.dry_run
        )
    except MemlongError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    did = "would be removed" if given.dry_run else "removed"
    print(f"{swept.orphans} orphans {did}, {swept.young} too young to tell, {swept.living} in use")
    if swept.passed_over:
        print(f"Passed over, as this Milvus has no such collection: {', '.join(swept.passed_over)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m memlong_milvus",
        description="Tend what MilvusBank keeps. Who asks goes into the environment, as MEMLONG_MILVUS_TOKEN.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    swept = commands.add_parser(
        "sweep",
        help="remove keys and values that no row refers to",
        epilog="python -m memlong_milvus sweep --uri http://localhost:19530 --store s3://bucket/memory --dry-run",
    )
    swept.add_argument("--uri", help="a file that ends in .db, or http://host:19530; or MEMLONG_MILVUS_URI")
    swept.add_argument("--store", required=True, help="the folder or URI that banks were given as store")
    swept.add_argument("--database", help="of the server, if not the default one")
    swept.add_argument(
        "--grace", type=float, default=3600.0, help="seconds to leave young objects alone (3600)"
    )
    swept.add_argument("--dry-run", action="store_true", help="count only")
    return parser


if __name__ == "__main__":
    sys.exit(main())
