"""The usearch library, offered to memlong as a plugin."""

from __future__ import annotations

from memlong.plugins import Register, hookimpl


@hookimpl
def memlong_register_backends(register: Register) -> None:
    """Offer the backend "usearch"; its library is imported only when a bank is made."""
    register(
        "usearch",
        "memlong_usearch.index:UsearchIndex",
        requires=("usearch",),
        install="pip install memlong-usearch",
        description="usearch: a small and fast HNSW graph on the CPU",
    )
