"""Registry: look up what plugins registered, by name."""

from __future__ import annotations

import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memlong.errors import InvalidArgumentError
from memlong.plugins.loading import fault, load_class, read_uri
from memlong.plugins.lookup import find
from memlong.plugins.manager import PluginManager
from memlong.plugins.names import explained, quoted
from memlong.plugins.options import check_options
from memlong.plugins.selection import DISABLE_VARIABLE, SELECT_VARIABLE
from memlong.plugins.spec import Kind, Spec
from memlong.uri import scheme_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from memlong.bank.base import MemoryBank
    from memlong.bank.eviction import EvictionPolicy
    from memlong.bank.snapshot.reader import StoredBank


class Registry:
    """Looks up names that the plugins of a manager registered.

    Parameters
    ----------
    manager
        The plugin manager; a new one by default. Plugins that are registered with it later count as well.
    """

    def __init__(self, manager: PluginManager | None = None) -> None:
        self.manager = PluginManager() if manager is None else manager

    def list_backends(self) -> tuple[Spec, ...]:
        """Return all backends, built-in ones first, installed or not; a conflicting name occurs twice."""
        return self.manager.specs("backend")

    def list_retrievers(self) -> tuple[Spec, ...]:
        """Return all retrievers, built-in ones first, installed or not; a conflicting name occurs twice."""
        return self.manager.specs("retriever")

    def list_eviction_policies(self) -> tuple[Spec, ...]:
        """Return all eviction policies, built-in ones first; a conflicting name occurs twice."""
        return self.manager.specs("eviction policy")

    def list_uri_schemes(self) -> tuple[Spec, ...]:
        """Return all URI schemes of backends; a conflicting one occurs twice."""
        return self.manager.specs("URI scheme")

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
        """Return the retriever of this name; raises the same errors as `backend`."""
        return self._one("retriever", name)

    def load_backend_class(self, name: str) -> type[MemoryBank]:
        """Import a backend, given as for `create_bank`, and return the class of its banks.

        Raises
        ------
        UnknownNameError, PluginError
            As in `backend`; `PluginError` also if the class does not exist, or is neither an `Index` nor a
            `MemoryBank`.
        MissingDependencyError
            If a required library is not installed, or fails to import.
        """
        spec = self.backend(self.resolve(name)[0])
        # Imported here, as listing backends must be fast and the bank imports torch.
        from memlong.bank.base import MemoryBank, bank_of
        from memlong.bank.index.index import Index

        found = bank_of(load_class(spec, Index, MemoryBank))
        if not hasattr(found, "index_class"):
            raise fault(spec, f"its target {spec.target!r} does not implement index_class")
        return found

    def load_retriever_class(self, name: str, base: type | None = None) -> type:
        """Import and return the class of a retriever, which must derive from ``base``, if given.

        Raises
        ------
        UnknownNameError, PluginError, MissingDependencyError
            As `load_backend_class` does.
        """
        return load_class(self.retriever(name), *([] if base is None else [base]))

    def resolve(self, name: str, **options: object) -> tuple[str, dict[str, object]]:
        """Return the backend's name and all options for a name or URI.

        Parameters
        ----------
        name
            A backend's name, or a URI with a registered scheme, such as ``"milvus://localhost:19530"``.
        **options
            Further options.

        Raises
        ------
        UnknownNameError, PluginError, MissingDependencyError
            If no plugin registered the scheme, or two did, or its function fails to load or breaks its contract.
        InvalidArgumentError
            If the plugin rejects the URI, or the URI has an option that is also given.
        """
        scheme = scheme_of(name) if isinstance(name, str) else None
        if scheme is None:
            return name, options
        spec = self._one("URI scheme", scheme)
        backend, held = read_uri(spec, name)
        if twice := sorted(held.keys() & options.keys()):
            raise InvalidArgumentError(
                f"Options must be given once, got {quoted(twice)} both in the backend's URI and as an option: leave "
                "one out"
            )
        return backend, {**held, **options}

    def eviction_policy(self, name: str) -> EvictionPolicy:
        """Return the eviction policy of this name.

        Raises
        ------
        UnknownNameError, PluginError, MissingDependencyError
            As `load_backend_class` does.
        """
        from memlong.bank.eviction import EvictionPolicy

        spec = self._one("eviction policy", name)
        policy_class = load_class(spec, EvictionPolicy)
        if vars(policy_class).get("name") != name:
            what = f"the class {spec.target!r} must have name = {name!r}, which snapshots refer to"
            raise fault(spec, what)
        try:
            return policy_class()  # type: ignore[no-any-return]
        except Exception as error:
            what = f"the class {spec.target!r} must be constructible without arguments ({explained(error)})"
            raise fault(spec, what) from error

    def create_bank(self, name: str, dim: int, **options: object) -> MemoryBank:
        """Create an empty bank.

        Parameters
        ----------
        name
            A backend's name, or a URI as in `resolve`.
        dim
            Dimension of the embeddings.
        **options
            Options of the backend and of `MemoryBank`.

        Raises
        ------
        UnknownNameError, PluginError, MissingDependencyError
            As `load_backend_class` does.
        InvalidArgumentError
            If an option is unknown or has an invalid value.
        """
        name, options = self.resolve(name, **options)
        bank_class = self.load_backend_class(name)
        check_options(f"backend {name!r}", bank_class, options.keys(), besides=("dim",))
        return bank_class(dim, **self._with_policy(options))  # type: ignore[arg-type]

    def load_bank(
        self,
        path: str | Path,
        backend: str | None = None,
        *,
        bases: Sequence[MemoryBank] = (),
        any_bases: bool = False,
        row: int | None = None,
        lazy: bool = False,
        trust_index: bool = False,
        most_bytes: int | str | None = None,
        kv_device: str | None = None,
        **options: object,
    ) -> MemoryBank:
        """Load a bank from a snapshot folder; over bases, a `LayeredBank`.

        Parameters
        ----------
        path
            The folder.
        backend
            Name of the backend; the saved one by default. Another backend rebuilds its index.
        bases
            The banks that it was saved over, in their order, whatever they hold by now, or some to put it over. What it
            could find in each (`LayeredBank.among`) is as it was.
        any_bases
            Accept other bases than it was saved over, or none. All chunks of those can be found.
        row, lazy, trust_index, most_bytes, kv_device, **options
            As in `MemoryBank.load`.

        Raises
        ------
        SnapshotError, InvalidArgumentError, DeviceUnavailableError
            As in `MemoryBank.load`; `InvalidArgumentError` also if the saved backend is not installed.
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
                bases=bases,
                any_bases=any_bases,
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
        bases: Sequence[MemoryBank] = (),
        any_bases: bool = False,
        lazy: bool = False,
        trust_index: bool = False,
        **options: object,
    ) -> MemoryBank:
        """Create a bank from the content of a snapshot; see `load_bank`."""
        from memlong.bank.layers import LayeredBank

        if isinstance(bases, str) or not hasattr(bases, "__getitem__"):
            raise InvalidArgumentError(f"bases must be a sequence of banks, got {bases!r:.80}")
        stored = stored.apart_from(bases, any_bases=any_bases)
        name = self._backend_that_made(stored) if backend is None else backend
        name, options = self.resolve(name, **options)
        policy = stored.record.eviction
        if "eviction" not in options and policy is not None:
            if policy not in {spec.name for spec in self.list_eviction_policies()}:
                raise InvalidArgumentError(
                    f"{str(stored.folder)!r} was saved with the eviction policy {policy!r}, which is not installed: "
                    "install its plugin, or pass a policy as eviction"
                )
            options["eviction"] = policy
        bank_class = self.load_backend_class(name)
        check_options(f"backend {name!r}", bank_class, options.keys(), besides=("dim",))
        options = self._with_policy(options)
        bank = bank_class.of_stored(stored, lazy=lazy, trust_index=trust_index, **options)
        return LayeredBank(bank, bases, among=stored.among) if bases else bank

    def _with_policy(self, options: dict[str, object]) -> dict[str, object]:
        policy = options.get("eviction")
        return {**options, "eviction": self.eviction_policy(policy)} if isinstance(policy, str) else options

    def _backend_that_made(self, stored: StoredBank) -> str:
        # Never import a name from a file: it could be any code.
        for spec in self.list_backends():
            if spec.target == stored.record.made_by:
                return spec.name
        raise InvalidArgumentError(
            f"{str(stored.folder)!r} was saved by {stored.record.made_by!r}, which is not an installed backend: "
            "install its plugin, or load the snapshot with another backend, such as backend='torch'"
        )

    def _one(self, kind: Kind, name: str) -> Spec:
        return find(self.manager, kind, name)


def installed_registry() -> Registry:
    """Return the registry of all installed plugins, cached per process and plugin selection."""
    return _installed(os.environ.get(SELECT_VARIABLE), os.environ.get(DISABLE_VARIABLE), tuple(sys.path))


@lru_cache(maxsize=4)
def _installed(*_: object) -> Registry:
    return Registry()


def create_bank(name: str, dim: int, *, registry: Registry | None = None, **options: object) -> MemoryBank:
    """Create an empty bank of the backend ``name``, which may be a URI; see `Registry.create_bank`.

    The default ``registry`` has the plugins that were installed when the process first used it.

    Raises
    ------
    UnknownNameError, PluginError, MissingDependencyError, InvalidArgumentError
        As `Registry.create_bank` does.
    """
    return (installed_registry() if registry is None else registry).create_bank(name, dim, **options)


def load_bank(
    path: str | Path, backend: str | None = None, *, registry: Registry | None = None, **options: Any
) -> MemoryBank:
    """Load a bank from a snapshot folder; see `Registry.load_bank`.

    Raises
    ------
    SnapshotError, InvalidArgumentError, DeviceUnavailableError
        As `MemoryBank.load` does.
    UnknownNameError, PluginError, MissingDependencyError
        As `Registry.load_bank` does.
    """
    return (installed_registry() if registry is None else registry).load_bank(path, backend, **options)


def list_backends(registry: Registry | None = None) -> tuple[Spec, ...]:
    """Return all backends, installed or not; `Spec.missing` returns the missing libraries."""
    return (installed_registry() if registry is None else registry).list_backends()
