"""Search by FAISS, offered to memlong as a plugin."""

from __future__ import annotations

from memlong.plugins.hookspecs import Register, hookimpl


@hookimpl
def memlong_register_backends(register: Register) -> None:
    """Offer the backend "faiss"."""
    register(
        "faiss",
        "memlong_faiss.bank:FaissBank",
        requires=("faiss",),
        install="pip install 'memlong[faiss]'",
        description="exact and approximate search, CPU and CUDA",
    )
