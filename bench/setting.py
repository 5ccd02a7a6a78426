"""A backend and its options: what a row of a benchmark measures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Setting:
    """A backend and its options."""

    backend: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name in tables, such as ``faiss HNSW32, ef_search=64``."""
        options = [f"{option}={value}" for option, value in self.options.items() if option != "index"]
        return ", ".join([f"{self.backend} {self.options.get('index', '')}".strip(), *options])

    @property
    def is_exact(self) -> bool:
        """Whether search is exact."""
        return self.backend == "torch" or self.options.get("index") == "Flat"
