"""The built-in eviction policies, registered through the hook that third parties use."""

from __future__ import annotations

from memlong.plugins.hookspecs import Register, hookimpl


@hookimpl
def memlong_register_eviction_policies(register: Register) -> None:
    """Register the built-in policies; none of them is imported here."""
    register("fifo", "memlong.bank.eviction:Fifo", description="the oldest chunks leave first")
    register("lru", "memlong.bank.eviction:Lru", description="the least recently used chunks leave first")
    register(
        "retrieval_frequency",
        "memlong.bank.eviction:RetrievalFrequency",
        description="MemLong's dynamic memory update: what is old or seldom retrieved leaves, down to half",
    )
