"""hnswlib as a memlong plugin."""

from __future__ import annotations

from memlong.plugins.hookspecs import Register, hookimpl


@hookimpl
def memlong_register_backends(register: Register) -> None:
    """Register the backend "hnswlib"."""
    register(
        "hnswlib",
        "memlong_hnswlib.index:HnswlibIndex",
        requires=("hnswlib",),
        install="pip install 'memlong[hnswlib]'",
        description="hnswlib: a fast HNSW graph on the CPU",
    )
