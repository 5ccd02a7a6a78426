"""What a memory is: chunks found by embedding, each with its keys, values and token span. Knows no model."""

from memlong.bank.arrays import Floats, Ids
from memlong.bank.base import BankOptions, MemoryBank, Metric
from memlong.bank.draft import Draft
from memlong.bank.eviction import EvictionPolicy, Usage, eviction_policy
from memlong.bank.results import Retrieved, SearchResult, StoredEmbeddings
from memlong.bank.store import InMemoryStore, KeyValueStore

__all__ = [
    "BankOptions",
    "Draft",
    "EvictionPolicy",
    "Floats",
    "Ids",
    "InMemoryStore",
    "KeyValueStore",
    "MemoryBank",
    "Metric",
    "Retrieved",
    "SearchResult",
    "StoredEmbeddings",
    "Usage",
    "eviction_policy",
]
