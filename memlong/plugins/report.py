"""PluginReport: the status of a plugin, and the reason for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Status = Literal["loaded", "failed", "disabled", "missing"]


@dataclass(frozen=True)
class PluginReport:
    """The status of a plugin.

    Parameters
    ----------
    name
        Name of its entry point, or of a plugin that is built in or registered in code.
    origin
        ``"built-in"``, ``"registered in code"``, or the distribution's name and version; for a name that matches no
        plugin, the environment variable that contains it.
    module
        Its module.
    distribution
        Name of its distribution; empty if built in or registered in code.
    status
        ``"loaded"``; ``"failed"``, see ``reason``; ``"disabled"`` by an environment variable; or ``"missing"``: named
        in an environment variable, but not installed.
    reason
        Why it is not loaded; empty if it is.
    backends, retrievers, eviction_policies, uri_schemes
        The names it registered; empty unless it is loaded.
    conflicts
        One line for each name that another plugin also registered.
    error
        The exception it raised, if any.
    """

    name: str
    origin: str
    module: str
    status: Status
    distribution: str = ""
    reason: str = ""
    backends: tuple[str, ...] = ()
    retrievers: tuple[str, ...] = ()
    eviction_policies: tuple[str, ...] = ()
    uri_schemes: tuple[str, ...] = ()
    conflicts: tuple[str, ...] = ()
    error: BaseException | None = field(default=None, repr=False, compare=False)

    @property
    def label(self) -> str:
        """The plugin's name and origin, for messages."""
        return f"{self.name!r} ({self.origin})"
