"""Look up a name that plugins registered, with errors that say which plugins are involved."""

from __future__ import annotations

from memlong.errors import PluginError, UnknownNameError
from memlong.plugins.manager import PluginManager
from memlong.plugins.names import brief, cut, did_you_mean, normalize, quoted
from memlong.plugins.report import PluginReport
from memlong.plugins.spec import Kind, Spec


def find(manager: PluginManager, kind: Kind, name: str) -> Spec:
    """Return the spec registered under this name.

    Raises
    ------
    UnknownNameError
        If there is none, or the name is not a string.
    PluginError
        If two plugins registered the name, or the plugin of this name failed.
    """
    if not isinstance(name, str):
        raise UnknownNameError(f"The name of a {kind} must be text, such as 'my-index', got {brief(name)}")
    specs = manager.specs(kind)
    found = [spec for spec in specs if spec.name == name]
    if len(found) > 1:
        raise _contested(manager, found)
    if not found:
        raise _unknown(manager, kind, name, [spec.name for spec in specs])
    return found[0]


def _unknown(
    manager: PluginManager, kind: Kind, name: str, known: list[str]
) -> PluginError | UnknownNameError:
    unavailable = [report for report in manager.reports if report.status in ("failed", "disabled")]
    for report in unavailable:
        if _namesake(report, name):
            error = PluginError(f"The {kind} {name!r} is not available: {_why(report)}")
            error.__cause__ = report.error
            return error
    failures = [_why(report) for report in unavailable if report.status == "failed"]
    return UnknownNameError(
        f"There is no {kind} {_shown(name)!r}{did_you_mean(name, known) or '.'} Known: {quoted(dict.fromkeys(known))}"
        + "".join(f".\nIt may belong to a plugin that did not load: {failure}" for failure in failures)
    )


def _contested(manager: PluginManager, specs: list[Spec]) -> PluginError:
    owners = [manager.owner(spec) for spec in specs]
    return PluginError(
        f"The {specs[0].kind} {specs[0].name!r} is registered by several plugins: "
        f"{', '.join(owner.label for owner in owners)}. "
        f"Disable all but one, for example with {manager.switch_off(owners[-1])}"
    )


def _shown(name: str) -> str:
    # Names have no "@": this is a URI without "://", and the part before "@" may be a password.
    _, at, rest = name.rpartition("@")
    return cut(f"***@{rest}" if at else name, 100)


def _namesake(report: PluginReport, name: str) -> bool:
    return normalize(name) in (normalize(report.name), normalize(report.name).removeprefix("memlong_"))


def _why(report: PluginReport) -> str:
    verb = "failed" if report.status == "failed" else f"is {report.status}"
    return f"plugin {report.label} {verb}: {report.reason}"
