"""The hooks a plugin may implement, and the markers that declare and implement them."""

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
        """Register by name; ``target`` is ``"module:Class"``, imported when first asked for."""


@hookspec(historic=True)
def memlong_register_backends(register: Register) -> None:
    """Call ``register`` once for each memory bank the plugin brings."""


@hookspec(historic=True)
def memlong_register_retrievers(register: Register) -> None:
    """Call ``register`` once for each retriever the plugin brings."""


@hookspec(historic=True)
def memlong_register_eviction_policies(register: Register) -> None:
    """Call ``register`` once for each eviction policy; its class has the same ``name``."""


@hookspec(historic=True)
def memlong_register_uri_schemes(register: Register) -> None:
    """Call ``register`` once for each URI scheme; its function makes ``(backend, options)`` of a URI."""
