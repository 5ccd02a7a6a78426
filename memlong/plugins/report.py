"""PluginReport: what became of one plugin, and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Status = Literal["loaded", "failed", "disabled", "missing"]


@dataclass(frozen=True)
class PluginReport:
    """What became of one plugin.

    Parameters
    ----------
    name
        Its entry-point name, or the name a built-in or programmatic plugin goes by.
    origin
        ``"built-in"``, ``"registered in code"``, the distribution's name and version, or, for a name
        that matches no plugin, the environment variable that holds it.
    module
        Where it lives.
    distribution
        The name of the distribution that brought it; empty for one that is built in or registered in code.
    status
        ``"loaded"``; ``"failed"``, and ``reason`` says why; ``"disabled"`` by an environment variable;
        ``"missing"``: an environment variable names it and nothing installed has that name.
    reason
        Why it is not loaded; empty if it is.
    backends, retrievers, eviction_policies, uri_schemes
        The names it registered; empty unless it is loaded.
    conflicts
        One line for each of those names that another plugin registered too.
    error
        What it raised, where it did.
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
        """The plugin as messages call it: its name and where it comes from."""
        return f"{self.name!r} ({self.origin})"
