"""Registry: from a name to a backend or a retriever."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memlong.errors import PluginError, UnknownNameError
from memlong.plugins.loading import load_class
from memlong.plugins.manager import PluginManager
from memlong.plugins.names import did_you_mean, normalise, quoted
from memlong.plugins.options import check_options
from memlong.plugins.report import PluginReport
from memlong.plugins.spec import Kind, Spec

if TYPE_CHECKING:
    from memlong.bank.base import MemoryBank


class Registry:
    """Looks names up among what a manager's plugins registered.

    Parameters
    ----------
    manager
        Whose plugins; a new `PluginManager` if left out. What is registered with it later counts too.
    """

    def __init__(self, manager: PluginManager | None = None) -> None:
        self.manager = PluginManager() if manager is None else manager

    def list_backends(self) -> tuple[Spec, ...]:
        """Return all backends, built-ins first, installed or not; a contested name occurs twice."""
        return self.manager.specs("backend")

    def list_retrievers(self) -> tuple[Spec, ...]:
        """Return all retrievers, built-ins first, installed or not; a contested name occurs twice."""
        return self.manager.specs("retriever")

    def backend(self, name: str) -> Spec:
        """Return the backend of this name.

        Raises
        ------
        UnknownNameError
            If no plugin registered it.
        PluginError
            If two plugins registered it, or the plugin of this name failed.
        """
        return self._one("backend", name)

    def retriever(self, name: str) -> Spec:
        """Return the retriever of this name; raises as `backend` does."""
        return self._one("retriever", name)

    def load_backend_class(self, name: str) -> type[MemoryBank]:
        """Import and return the class of a backend.

        Raises
        ------
        UnknownNameError, PluginError
            As `backend` does; `PluginError` also if the class is not there or not a `MemoryBank`.
        MissingDependencyError
            If a library it needs is not installed or does not import.
        """
        spec = self.backend(name)
        # Listing backends must stay quick, and the bank brings torch.
        from memlong.bank.base import MemoryBank

        return load_class(spec, MemoryBank)

    def load_retriever_class(self, name: str, base: type | None = None) -> type:
        """Import and return the class of a retriever, which must derive from ``base`` if it is given.

        Raises
        ------
        UnknownNameError, PluginError, MissingDependencyError
            As `load_backend_class` does.
        """
        return load_class(self.retriever(name), base)

    def create_bank(self, name: str, dim: int, **options: object) -> MemoryBank:
        """Construct an empty bank.

        Parameters
        ----------
        name
            A backend's name.
        dim
            The width of the embeddings.
        **options
            The backend's own options and those of every `MemoryBank`.

        Raises
        ------
        UnknownNameError, PluginError, MissingDependencyError
            As `load_backend_class` does.
        InvalidArgumentError
            If the backend has no such option, or not with such a value.
        """
        bank_class = self.load_backend_class(name)
        check_options(f"backend {name!r}", bank_class, options.keys(), besides=("dim",))
        return bank_class(dim, **options)  # type: ignore[arg-type]

    def _one(self, kind: Kind, name: str) -> Spec:
        specs = self.manager.specs(kind)
        found = [spec for spec in specs if spec.name == name]
        if len(found) > 1:
            raise self._contested(found)
        if not found:
            raise self._unknown(kind, name, [spec.name for spec in specs])
        return found[0]

    def _unknown(self, kind: Kind, name: str, known: list[str]) -> PluginError | UnknownNameError:
        unavailable = [report for report in self.manager.reports if report.status in ("failed", "disabled")]
        for report in unavailable:
            if _namesake(report, name):
                error = PluginError(f"{kind} {name!r} is not available: {_why(report)}")
                error.__cause__ = report.error
                return error
        failures = [_why(report) for report in unavailable if report.status == "failed"]
        return UnknownNameError(
            f"there is no {kind} {name!r}.{did_you_mean(name, known)} Known: {quoted(known)}."
            + "".join(f"\nIt may belong to this: {failure}" for failure in failures)
        )

    def _contested(self, specs: list[Spec]) -> PluginError:
        owners = [self.manager.owner(spec) for spec in specs]
        return PluginError(
            f"{specs[0].kind} {specs[0].name!r} is registered by more than one plugin: "
            f"{', '.join(owner.label for owner in owners)}. "
            f"Turn all but one off, for example with {self.manager.switch_off(owners[-1])}"
        )


def _namesake(report: PluginReport, name: str) -> bool:
    return normalise(name) in (normalise(report.name), normalise(report.name).removeprefix("memlong_"))


def _why(report: PluginReport) -> str:
    verb = "failed" if report.status == "failed" else f"is {report.status}"
    return f"plugin {report.label} {verb}: {report.reason}"


def create_bank(name: str, dim: int, *, registry: Registry | None = None, **options: object) -> MemoryBank:
    """Construct an empty bank of the backend ``name``; see `Registry.create_bank`.

    Without a ``registry`` the installed plugins are looked up afresh, which takes tens of milliseconds:
    make a `Registry` once where many banks are made.

    Raises
    ------
    UnknownNameError, PluginError, MissingDependencyError, InvalidArgumentError
        As `Registry.create_bank` does.
    """
    return (Registry() if registry is None else registry).create_bank(name, dim, **options)


def list_backends(registry: Registry | None = None) -> tuple[Spec, ...]:
    """Return all backends, installed or not; `Spec.missing` tells which libraries are not there."""
    return (Registry() if registry is None else registry).list_backends()
