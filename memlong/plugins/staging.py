"""Staging: what one plugin registers, kept apart until all of its hooks have succeeded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from memlong.errors import PluginError
from memlong.plugins.hookspecs import Register
from memlong.plugins.spec import Kind, Spec


class Staging:
    """Collects the specs of the plugin whose hooks are running, and of no other."""

    def __init__(self) -> None:
        self._plugin: str | None = None
        self._specs: list[Spec] = []

    @contextmanager
    def collecting(self, plugin: str) -> Iterator[list[Spec]]:
        """Collect what ``plugin`` registers inside the ``with`` statement."""
        self._plugin, self._specs = plugin, []
        try:
            yield self._specs
        finally:
            self._plugin, self._specs = None, []

    def register_for(self, kind: Kind) -> Register:
        """Return the callback for the hook of a kind; see `Spec` for its arguments."""

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
                f"register({name!r}, ...) was called after its hook had returned, so nobody can tell whose "
                "it is: call it inside the hook that received it"
            )
        return self._plugin

    def _stage(self, spec: Spec) -> None:
        if any(earlier.claims_same(spec) for earlier in self._specs):
            raise PluginError(f"it registers the {spec.kind} {spec.name!r} twice")
        self._specs.append(spec)
