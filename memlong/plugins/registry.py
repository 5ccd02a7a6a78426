"""Registry: from a name to a backend or a retriever."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from memlong.errors import InvalidArgumentError, PluginError, UnknownNameError
from memlong.plugins.loading import load_class
from memlong.plugins.manager import PluginManager
from memlong.plugins.names import did_you_mean, normalise, quoted
from memlong.plugins.options import check_options
from memlong.plugins.report import PluginReport
from memlong.plugins.spec import Kind, Spec

if TYPE_CHECKING:
    from memlong.bank.base import MemoryBank
    from memlong.bank.snapshot.reader import StoredBank


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

    def load_bank(
        self,
        path: str | Path,
        backend: str | None = None,
        *,
        row: int | None = None,
        lazy: bool = False,
        trust_index: bool = False,
        most_bytes: int | str | None = None,
        kv_device: str | None = None,
        **options: object,
    ) -> MemoryBank:
        """Make a bank of what was saved into a folder.

        Parameters
        ----------
        path
            The folder.
        backend
            The name of the backend; by default, the one that was saved. Another one builds its index anew.
        row, lazy, trust_index, most_bytes, kv_device, **options
            As `MemoryBank.load` takes them.

        Raises
        ------
        SnapshotError, InvalidArgumentError, DeviceUnavailableError
            As `MemoryBank.load` does; `InvalidArgumentError` also if no plugin has the backend that was saved.
        UnknownNameError, PluginError, MissingDependencyError
            As `load_backend_class` does.
        """
        from memlong.bank.snapshot.reader import folder_of, open_snapshot, read_bank

        folder = folder_of(path)
        return open_snapshot(
            folder,
            lambda manifest: self.bank_of(
                read_bank(folder, manifest, row, kv_device),
                backend,
                lazy=lazy,
                trust_index=trust_index,
                **options,
            ),
            most_bytes,
        )

    def bank_of(
        self,
        stored: StoredBank,
        backend: str | None = None,
        *,
        lazy: bool = False,
        trust_index: bool = False,
        **options: object,
    ) -> MemoryBank:
        """Make a bank of what a snapshot holds; as `load_bank`."""
        name = self._backend_that_made(stored) if backend is None else backend
        bank_class = self.load_backend_class(name)
        check_options(f"backend {name!r}", bank_class, options.keys(), besides=("dim",))
        return bank_class.of_stored(stored, lazy=lazy, trust_index=trust_index, **options)

    def _backend_that_made(self, stored: StoredBank) -> str:
        # Never imported by the name that a file gives: it could be anything.
        for spec in self.list_backends():
            if spec.target == stored.record.made_by:
                return spec.name
        raise InvalidArgumentError(
            f"{str(stored.folder)!r} was saved by {stored.record.made_by!r}, which is no backend of a plugin here. "
            "Install its plugin, or load the snapshot into another backend, such as backend='torch'"
        )

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


def load_bank(
    path: str | Path, backend: str | None = None, *, registry: Registry | None = None, **options: Any
) -> MemoryBank:
    """Make a bank of what was saved into a folder; see `Registry.load_bank`.

    Raises
    ------
    SnapshotError, InvalidArgumentError, DeviceUnavailableError
        As `MemoryBank.load` does.
    UnknownNameError, PluginError, MissingDependencyError
        As `Registry.load_bank` does.
    """
    return (Registry() if registry is None else registry).load_bank(path, backend, **options)


def list_backends(registry: Registry | None = None) -> tuple[Spec, ...]:
    """Return all backends, installed or not; `Spec.missing` tells which libraries are not there."""
    return (Registry() if registry is None else registry).list_backends()
