"""Looking a name up among what plugins registered, with an error that says who is to be asked."""

from __future__ import annotations

from memlong.errors import PluginError, UnknownNameError
from memlong.plugins.manager import PluginManager
from memlong.plugins.names import brief, cut, did_you_mean, normalise, quoted
from memlong.plugins.report import PluginReport
from memlong.plugins.spec import Kind, Spec


def find(manager: PluginManager, kind: Kind, name: str) -> Spec:
    """Return what a plugin of ``manager`` registered by this name.

    Raises
    ------
    UnknownNameError
        If none did, or it is no name.
    PluginError
        If two did, or the plugin of this name failed.
    """
    if not isinstance(name, str):
        raise UnknownNameError(f"a {kind} is asked for by its name, such as 'my-index', got {brief(name)}")
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
            error = PluginError(f"{kind} {name!r} is not available: {_why(report)}")
            error.__cause__ = report.error
            return error
    failures = [_why(report) for report in unavailable if report.status == "failed"]
    return UnknownNameError(
        f"there is no {kind} {_shown(name)!r}.{did_you_mean(name, known)} Known: {quoted(dict.fromkeys(known))}."
        + "".join(f"\nIt may belong to this: {failure}" for failure in failures)
    )


def _contested(manager: PluginManager, specs: list[Spec]) -> PluginError:
    owners = [manager.owner(spec) for spec in specs]
    return PluginError(
        f"{specs[0].kind} {specs[0].name!r} is registered by more than one plugin: "
        f"{', '.join(owner.label for owner in owners)}. "
        f"Turn all but one off, for example with {manager.switch_off(owners[-1])}"
    )


def _shown(name: str) -> str:
    # No name holds an "@": this is a URI without its "://", and what stands before may be a password.
    _, at, rest = name.rpartition("@")
    return cut(f"***@{rest}" if at else name, 100)


def _namesake(report: PluginReport, name: str) -> bool:
    return normalise(name) in (normalise(report.name), normalise(report.name).removeprefix("memlong_"))


def _why(report: PluginReport) -> str:
    verb = "failed" if report.status == "failed" else f"is {report.status}"
    return f"plugin {report.label} {verb}: {report.reason}"
