"""Selection: which plugins the environment enables and disables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from memlong.plugins.discovery import Candidate

SELECT_VARIABLE = "MEMLONG_PLUGINS"
DISABLE_VARIABLE = "MEMLONG_DISABLE_PLUGINS"


@dataclass(frozen=True)
class Selection:
    """Which plugins to load.

    Parameters
    ----------
    selected
        The third-party plugins to load; ``None`` means all.
    disabled
        The plugins to skip, built-in ones included.
    """

    selected: tuple[str, ...] | None = None
    disabled: tuple[str, ...] = ()

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Selection:
        """Read ``MEMLONG_PLUGINS`` (unset: all, empty: none) and ``MEMLONG_DISABLE_PLUGINS``."""
        selected = environ.get(SELECT_VARIABLE)
        return cls(
            selected=None if selected is None else _names(selected),
            disabled=_names(environ.get(DISABLE_VARIABLE, "")),
        )

    def reason_against(self, candidate: Candidate) -> str:
        """Return why ``candidate`` must not be loaded; empty if it may be."""
        if any(candidate.answers_to(name) for name in self.disabled):
            return f"disabled by {DISABLE_VARIABLE}={','.join(self.disabled)!r}"
        if self.selected is None or not candidate.is_third_party:
            return ""
        if any(candidate.answers_to(name) for name in self.selected):
            return ""
        return f"not in {SELECT_VARIABLE}={','.join(self.selected)!r}"

    def named(self) -> tuple[tuple[str, str], ...]:
        """Return each ``(variable, name)`` in the environment."""
        return (
            *((SELECT_VARIABLE, name) for name in self.selected or ()),
            *((DISABLE_VARIABLE, name) for name in self.disabled),
        )


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
