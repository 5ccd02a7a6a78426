"""The hooks that plugins implement, and the markers to declare and implement them."""

from __future__ import annotations

from typing import Protocol

import pluggy

hookspec = pluggy.HookspecMarker("memlong")
hookimpl = pluggy.HookimplMarker("memlong")


class Register(Protocol):
    """The callback that a hook receives."""

    def __call__(
        self,
        name: str,
        target: str,
        *,
        requires: tuple[str, ...] = (),
        install: str = "",
        description: str = "",
    ) -> None:
        """Register a name; ``target`` is ``"module:Class"``, imported on first use."""


@hookspec(historic=True)
def memlong_register_backends(register: Register) -> None:
    """Call ``register`` once for each of the plugin's backends."""


@hookspec(historic=True)
def memlong_register_retrievers(register: Register) -> None:
    """Call ``register`` once for each of the plugin's retrievers."""


@hookspec(historic=True)
def memlong_register_eviction_policies(register: Register) -> None:
    """Call ``register`` once for each of the plugin's eviction policies; the class must have the same ``name``."""


@hookspec(historic=True)
def memlong_register_uri_schemes(register: Register) -> None:
    """Call ``register`` once for each of the plugin's URI schemes; the function turns a URI into (backend, options)."""
