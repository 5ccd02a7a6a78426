"""``memlong plugins``: list the plugins, what they register and what failed; and ``new``."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated

import typer

from memlong.cli.answer import answering
from memlong.cli.new_plugin.command import new
from memlong.cli.output import print_json, print_section, print_table
from memlong.plugins.manager import PluginManager
from memlong.plugins.report import PluginReport

_MOST_NAMES = 40  # per cell; --json and `memlong backends` list all


def add_plugin_commands(app: typer.Typer) -> None:
    """Add ``plugins`` to the application: it lists plugins by itself, and has the subcommand ``new``."""
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
    """List the plugins and their status, or create your own.

    MEMLONG_PLUGINS lists the third-party plugins to load (unset: all; empty: none), and MEMLONG_DISABLE_PLUGINS those
    to skip, built-in ones included.

    \b
    Examples:
      memlong plugins
      memlong plugins --json
      MEMLONG_DISABLE_PLUGINS=memlong_faiss memlong plugins
      memlong plugins new my-index
    """  # noqa: D301 - the backspace makes the help keep these line breaks
    if context.invoked_subcommand is not None:
        if as_json:
            raise typer.BadParameter("it only applies to the list of plugins", param_hint="--json")
        return
    reports = PluginManager().reports
    if as_json:
        print_json({"plugins": [_as_json(report) for report in reports]})
        return
    print_table(
        ("plugin", "status", "origin", "registers"),
        [(report.name, report.status, report.origin, _brought(report)) for report in reports],
    )
    print_section(
        "Not loaded because", [f"{report.name}: {report.reason}" for report in reports if report.reason]
    )
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
    # An exception cannot be serialized; `reason` has its text.
    return {field.name: getattr(report, field.name) for field in fields(report) if field.name != "error"}
