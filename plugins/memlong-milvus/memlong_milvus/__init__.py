"""Milvus, embedded or a cluster, offered to memlong as a plugin."""

from __future__ import annotations

from memlong.plugins.hookspecs import Register, hookimpl


@hookimpl
def memlong_register_backends(register: Register) -> None:
    """Offer the backend "milvus"."""
    register(
        "milvus",
        "memlong_milvus.bank:MilvusBank",
        requires=("pymilvus", "milvus_lite", "stamina"),
        install="pip install memlong-milvus",
        description="Milvus: embedded in a local file, a server or a cluster",
    )


@hookimpl
def memlong_register_uri_schemes(register: Register) -> None:
    """Offer the milvus:// URIs."""
    for scheme in ("milvus", "milvus+http", "milvus+https", "milvus+lite"):
        register(
            scheme,
            "memlong_milvus.uri:resolve",
            description=f"{scheme}://…: a Milvus and its options",
        )
