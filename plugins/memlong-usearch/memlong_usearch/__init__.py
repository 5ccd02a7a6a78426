"""usearch as a memlong plugin."""

from __future__ import annotations

from memlong.plugins import Register, hookimpl


@hookimpl
def memlong_register_backends(register: Register) -> None:
    """Register the backend "usearch"; the library is imported only when a bank is created."""
    register(
        "usearch",
        "memlong_usearch.index:UsearchIndex",
        requires=("usearch",),
        install="pip install memlong-usearch",
        description="usearch: a small, fast HNSW graph on the CPU",
    )
