"""``memlong plugins``: which plugins were found, what they brought and what went wrong; and ``new``."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated

import typer

from memlong.cli.answer import answering
from memlong.cli.new_plugin.command import new
from memlong.cli.output import print_json, print_section, print_table
from memlong.plugins.manager import PluginManager
from memlong.plugins.report import PluginReport

_MOST_NAMES = 40  # in a cell; --json and `memlong backends` have them all


def add_plugin_commands(app: typer.Typer) -> None:
    """Add ``plugins`` to the application: by itself it lists them, and it has a command to write one."""
    group = typer.Typer(
        rich_markup_mode=None,
        subcommand_metavar="[COMMAND] ...",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    group.callback(invoke_without_command=True)(answering(plugins))
    group.command()(answering(new))
    app.add_typer(group, name="plugins")


def plugins(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the plugins and what became of them, or write one of your own.

    MEMLONG_PLUGINS holds the third-party plugins to load (unset: all; empty: none),
    MEMLONG_DISABLE_PLUGINS those not to load, memlong's own included.

    \b
    Examples:
      memlong plugins
      memlong plugins --json
      MEMLONG_DISABLE_PLUGINS=memlong_faiss memlong plugins
      memlong plugins new my-index
    """  # noqa: D301 - the backspace makes the help keep these line breaks
    if context.invoked_subcommand is not None:
        if as_json:
            raise typer.BadParameter("it goes with the list of plugins alone", param_hint="--json")
        return
    reports = PluginManager().reports
    if as_json:
        print_json({"plugins": [_as_json(report) for report in reports]})
        return
    print_table(
        ("plugin", "status", "origin", "what it brings"),
        [(report.name, report.status, report.origin, _brought(report)) for report in reports],
    )
    print_section("Why not", [f"{report.name}: {report.reason}" for report in reports if report.reason])
    print_section("Conflicts", [f"{report.name}: {line}" for report in reports for line in report.conflicts])


def _brought(report: PluginReport) -> str:
    kinds = {
        "backend": report.backends,
        "retriever": report.retrievers,
        "eviction policy": report.eviction_policies,
        "URI scheme": report.uri_schemes,
    }
    return "; ".join(f"{kind} {_listed(names)}" for kind, names in kinds.items() if names)


def _listed(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _MOST_NAMES:,} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _as_json(report: PluginReport) -> dict[str, object]:
    # The exception itself has no JSON; its text is the reason.
    return {field.name: getattr(report, field.name) for field in fields(report) if field.name != "error"}
