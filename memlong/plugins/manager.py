"""PluginManager: finds, loads, disables and reports plugins."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import pluggy

from memlong.errors import InvalidArgumentError, PluginError
from memlong.plugins import hookspecs
from memlong.plugins.discovery import IN_CODE, LONGEST, Candidate, built_ins, third_parties
from memlong.plugins.names import brief, did_you_mean, explained, normalize
from memlong.plugins.report import PluginReport, Status
from memlong.plugins.selection import DISABLE_VARIABLE, Selection
from memlong.plugins.spec import Kind, Spec
from memlong.plugins.staging import Staging


@dataclass(frozen=True)
class _Record:
    """The result of loading a candidate."""

    candidate: Candidate
    status: Status
    reason: str = ""
    specs: tuple[Spec, ...] = ()
    error: BaseException | None = None

    def names(self, kind: Kind) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.specs if spec.kind == kind)


_Owners = dict[tuple[Kind, str], list[_Record]]


class PluginManager:
    """The plugins of this process, as of the creation of the manager.

    Built-in plugins and those of installed distributions (entry-point group ``memlong``) are loaded one by one. A
    plugin that fails, at import or in a hook, is excluded as a whole and reported with the reason; others are not
    affected. Any exception counts as a failure, including ``SystemExit``, as no plugin may exit its host; only
    ``KeyboardInterrupt`` is raised.

    Parameters
    ----------
    environ
        The environment with ``MEMLONG_PLUGINS`` (third-party plugins to load; unset means all, empty means none) and
        ``MEMLONG_DISABLE_PLUGINS`` (plugins to skip, built-in ones included), both comma-separated; ``os.environ`` by
        default.
    """

    def __init__(self, *, environ: Mapping[str, str] | None = None) -> None:
        self._selection = Selection.from_environment(os.environ if environ is None else environ)
        self._staging = Staging()
        self._records: list[_Record] = []
        self._plugins: list[object] = []
        for candidate in (*built_ins(), *third_parties()):
            self._records.append(self._take(candidate))

    def register(self, plugin: object, *, name: str) -> PluginReport:
        """Add a plugin object, for tests, notebooks and examples.

        Parameters
        ----------
        plugin
            A module or an object with hook implementations.
        name
            Its name in reports and messages.

        Returns
        -------
        PluginReport
            Its status is ``"loaded"``, or ``"disabled"`` if ``MEMLONG_DISABLE_PLUGINS`` names it.

        Raises
        ------
        InvalidArgumentError
            If the name is not text, is empty or too long.
        PluginError
            If the name is taken, or the plugin fails; then nothing of it is registered.
        """
        if not isinstance(name, str) or not 0 < len(name.strip()) <= LONGEST:
            raise InvalidArgumentError(
                f"name must be non-empty text of at most {LONGEST} characters, got {brief(name)}"
            )
        if any(normalize(record.candidate.name) == normalize(name) for record in self._records):
            raise PluginError(
                f"name must be unused, but there is already a plugin named {name!r}: choose another"
            )
        # Objects and classes have __module__, modules only __name__.
        module = str(getattr(plugin, "__module__", None) or getattr(plugin, "__name__", ""))
        record = self._take(Candidate(name, IN_CODE, module, lambda: plugin))
        if record.status == "failed":
            raise PluginError(f"The plugin {name!r} failed: {record.reason}") from record.error
        self._records.append(record)
        return self._report(record)

    def specs(self, kind: Kind) -> tuple[Spec, ...]:
        """Return all registered specs of a kind, built-in ones first; a name may occur more than once."""
        return tuple(spec for record in self._records for spec in record.specs if spec.kind == kind)

    def owner(self, spec: Spec) -> PluginReport:
        """Return the report of the plugin that registered ``spec``, one of `specs`.

        Raises
        ------
        InvalidArgumentError
            If it was not registered with this manager.
        """
        for record in self._records:
            if any(own is spec for own in record.specs):
                return self._report(record)
        raise InvalidArgumentError(f"spec must be registered with this manager, got {spec!r}")

    def switch_off(self, report: PluginReport) -> str:
        """Return the environment setting that disables the plugin of ``report``, but no other of the same name."""
        namesakes = [record for record in self._records if record.candidate.answers_to(report.name)]
        name = report.name if len(namesakes) == 1 else report.distribution or report.name
        return f"{DISABLE_VARIABLE}={name}"

    @property
    def reports(self) -> tuple[PluginReport, ...]:
        """A report for each plugin, and for each name in the environment that matches no plugin."""
        owners = self._owners()
        return (*(self._report(record, owners) for record in self._records), *self._unmatched())

    def _take(self, candidate: Candidate) -> _Record:
        if reason := self._selection.reason_against(candidate):
            return _Record(candidate, "disabled", reason)
        try:
            with self._staging.collecting(candidate.name) as found:
                plugin = candidate.load()
                self._call_hooks(plugin)
                specs = tuple(found.values())
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - a plugin may raise anything
            return _Record(candidate, "failed", _reason(error), error=error)
        self._plugins.append(plugin)
        return _Record(candidate, "loaded", specs=specs)

    def _call_hooks(self, plugin: object) -> None:
        if any(plugin is other for other in self._plugins):
            raise PluginError("the same plugin is already loaded under another name")
        # One host per plugin: pluggy compares plugins with ==, which may fail for some objects.
        host = pluggy.PluginManager("memlong")
        host.add_hookspecs(hookspecs)
        hooks = host.hook
        kinds: dict[Kind, pluggy.HookCaller] = {
            "backend": hooks.memlong_register_backends,
            "retriever": hooks.memlong_register_retrievers,
            "eviction policy": hooks.memlong_register_eviction_policies,
            "URI scheme": hooks.memlong_register_uri_schemes,
        }
        for kind, caller in kinds.items():
            caller.call_historic(kwargs={"register": self._staging.register_for(kind)})
        try:
            host.register(plugin, name="it")
        except pluggy.PluginValidationError as error:
            said = " ".join(str(error).splitlines()[1:])  # the first line is just the name
            raise PluginError(f"a hook has the wrong signature: {said}") from error
        callers = host.get_hookcallers(plugin) or []
        known = [name for name in dir(hookspecs) if name.startswith("memlong_")]
        for caller in callers:
            optional = all(impl.optionalhook for impl in caller.get_hookimpls() if impl.plugin is plugin)
            if not caller.has_spec() and not optional:
                raise PluginError(
                    f"it implements an unknown hook, {caller.name!r}{did_you_mean(caller.name, known)}"
                )
        if not callers:
            raise PluginError(
                f"it implements no memlong hook ({', '.join(known)}): mark them with @memlong.hookimpl"
            )

    def _owners(self) -> _Owners:
        owners: _Owners = {}
        for record in self._records:
            for spec in record.specs:
                owners.setdefault((spec.kind, spec.name), []).append(record)
        return owners

    def _report(self, record: _Record, owners: _Owners | None = None) -> PluginReport:
        return PluginReport(
            name=record.candidate.name,
            origin=record.candidate.origin,
            module=record.candidate.module,
            status=record.status,
            distribution=record.candidate.distribution,
            reason=record.reason,
            backends=record.names("backend"),
            retrievers=record.names("retriever"),
            eviction_policies=record.names("eviction policy"),
            uri_schemes=record.names("URI scheme"),
            conflicts=tuple(self._conflicts(record, self._owners() if owners is None else owners)),
            error=record.error,
        )

    def _conflicts(self, record: _Record, owners: _Owners) -> list[str]:
        return [
            f"{spec.kind} {spec.name!r} is also registered by plugin "
            f"{other.candidate.name!r} ({other.candidate.origin})"
            for spec in record.specs
            for other in owners[spec.kind, spec.name]
            if other is not record
        ]

    def _unmatched(self) -> list[PluginReport]:
        candidates = [record.candidate for record in self._records]
        names = [candidate.name for candidate in candidates]
        return [
            PluginReport(
                name=name,
                origin=variable,
                module="",
                status="missing",
                reason=f"{variable} names it, but no such plugin is installed" + did_you_mean(name, names),
            )
            for variable, name in self._selection.named()
            if not any(candidate.answers_to(name) for candidate in candidates)
        ]


def _reason(error: BaseException) -> str:
    said = explained(error)
    return said.removeprefix("PluginError: ") if isinstance(error, PluginError) else said
