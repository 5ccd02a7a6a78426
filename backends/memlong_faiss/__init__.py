"""FAISS as a memlong plugin."""

from __future__ import annotations

from memlong.plugins.hookspecs import Register, hookimpl


@hookimpl
def memlong_register_backends(register: Register) -> None:
    """Register the backend "faiss"."""
    register(
        "faiss",
        "memlong_faiss.index:FaissIndex",
        requires=("faiss",),
        install="pip install 'memlong[faiss]'",
        description="FAISS: Flat, HNSW, IVF and quantised indexes on the CPU; Flat and IVF on a GPU",
    )
