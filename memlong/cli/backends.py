"""``memlong backends``: list the backends, and how to install those that are missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from typing import Annotated

import typer

from memlong.cli.output import print_json, print_section, print_table
from memlong.plugins.registry import Registry
from memlong.plugins.report import PluginReport
from memlong.plugins.spec import Spec


def backends(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the backends and how to install them.

    Index libraries are not imported, so one that is installed but broken is listed as available.

    \b
    Examples:
      memlong backends
      memlong backends --json
      MEMLONG_PLUGINS= memlong backends    # built-in ones only
    """  # noqa: D301 - the backspace makes the help keep these line breaks
    registry = Registry()
    specs = registry.list_backends()
    unavailable = [report for report in registry.manager.reports if report.status != "loaded"]
    claims = Counter(spec.name for spec in specs)
    contested = {name for name, count in claims.items() if count > 1}
    missing = _missing(specs)
    status = {spec: _status(spec, contested, missing[spec]) for spec in specs}
    if as_json:
        print_json(
            {
                "backends": [
                    asdict(spec) | {"status": status[spec], "missing": missing[spec]} for spec in specs
                ],
                "unavailable_plugins": [_as_json(report) for report in unavailable],
            }
        )
        return
    print_table(
        ("backend", "status", "plugin", "description"),
        [(spec.name, status[spec], spec.plugin, spec.description) for spec in specs],
    )
    print_section(
        "To install",
        [_how_to_get(spec, missing[spec]) for spec in specs if status[spec] == "not installed"],
    )
    print_section("Claimed by several plugins; disable all but one", _contests(specs, contested))
    print_section(
        "Plugins not loaded",
        [f"{report.name} ({report.origin}): {report.reason}" for report in unavailable],
    )


def _missing(specs: Iterable[Spec]) -> dict[Spec, tuple[str, ...]]:
    """Return the modules that each backend lacks; each set of requirements is looked up once."""
    found: dict[tuple[str, ...], tuple[str, ...]] = {}
    for spec in specs:
        if spec.requires not in found:
            found[spec.requires] = spec.missing()
    return {spec: found[spec.requires] for spec in specs}


def _status(spec: Spec, contested: set[str], missing: tuple[str, ...]) -> str:
    if spec.name in contested:
        return "conflict"
    return "not installed" if missing else "available"


def _how_to_get(spec: Spec, missing: tuple[str, ...]) -> str:
    needs = f"{spec.name} needs {', '.join(missing)}"
    return f"{needs}: {spec.install}" if spec.install else needs


def _contests(specs: tuple[Spec, ...], contested: set[str]) -> list[str]:
    return [f"{spec.name}: MEMLONG_DISABLE_PLUGINS={spec.plugin}" for spec in specs if spec.name in contested]


def _as_json(report: PluginReport) -> dict[str, str]:
    return {"name": report.name, "origin": report.origin, "status": report.status, "reason": report.reason}
