"""The built-in eviction policies, registered through the same hook as third-party ones."""

from __future__ import annotations

from memlong.plugins.hookspecs import Register, hookimpl


@hookimpl
def memlong_register_eviction_policies(register: Register) -> None:
    """Register the built-in policies without importing them."""
    register("fifo", "memlong.bank.eviction:Fifo", description="evicts the oldest chunks first")
    register("lru", "memlong.bank.eviction:Lru", description="evicts the least recently used chunks first")
    register(
        "retrieval_frequency",
        "memlong.bank.eviction:RetrievalFrequency",
        description="MemLong's dynamic memory update: evicts old or rarely retrieved chunks, down to half",
    )
