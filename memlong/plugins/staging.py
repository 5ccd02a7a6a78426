"""Staging: hold what a plugin registers until all its hooks have succeeded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from memlong.errors import PluginError
from memlong.plugins.hookspecs import Register
from memlong.plugins.names import brief
from memlong.plugins.spec import Kind, Spec

_MOST = 1_000


class Staging:
    """Collects the specs of the plugin whose hooks are running."""

    def __init__(self) -> None:
        self._plugin: str | None = None
        self._specs: dict[tuple[Kind, str], Spec] = {}
        self._has_too_many = False

    @contextmanager
    def collecting(self, plugin: str) -> Iterator[Mapping[tuple[Kind, str], Spec]]:
        """Collect what ``plugin`` registers inside the ``with`` statement.

        Raises
        ------
        PluginError
            If it registers too many names, even if the plugin swallows the first error.
        """
        self._plugin, self._specs, self._has_too_many = plugin, {}, False
        try:
            yield self._specs
            if self._has_too_many:
                raise _too_many()
        finally:
            self._plugin, self._specs = None, {}

    def register_for(self, kind: Kind) -> Register:
        """Return the callback for the hook of this kind; see `Spec` for its arguments."""

        def register(
            name: str,
            target: str,
            *,
            requires: tuple[str, ...] = (),
            install: str = "",
            description: str = "",
        ) -> None:
            self._stage(Spec(kind, name, target, self._owner(name), requires, install, description))

        return register

    def _owner(self, name: str) -> str:
        if self._plugin is None:
            raise PluginError(
                f"register({brief(name)}, ...) must be called inside the hook that received it, not after the hook has "
                "returned"
            )
        return self._plugin

    def _stage(self, spec: Spec) -> None:
        if (spec.kind, spec.name) in self._specs:
            raise PluginError(f"it registers the {spec.kind} {spec.name!r} twice")
        if len(self._specs) == _MOST:
            self._has_too_many = True
            raise _too_many()
        self._specs[spec.kind, spec.name] = spec


def _too_many() -> PluginError:
    return PluginError(f"it must register at most {_MOST:,} names, and tries more")
