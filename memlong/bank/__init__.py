"""What a memory is: chunks found by embedding, each with its keys, values and token span. Knows no model."""

from memlong.bank.arrays import Floats, Ids
from memlong.bank.base import BankOptions, MemoryBank, bank_of
from memlong.bank.capacity import Capacity
from memlong.bank.draft import Draft
from memlong.bank.eviction import EvictionPolicy, Usage, eviction_policy
from memlong.bank.index.index import Index, IndexRows, NoOptions
from memlong.bank.layers import LayeredBank
from memlong.bank.layout import ChunkLayout
from memlong.bank.metric import Metric
from memlong.bank.results import Chunks, Retrieved, SearchResult, StoredEmbeddings
from memlong.bank.sessions.banks import BankPool
from memlong.bank.state import BankState
from memlong.bank.store.folder import ObjectFolder
from memlong.bank.store.objects import Objects, StoredObject, objects_at
from memlong.bank.store.store import InMemoryStore, KeyValueStore
from memlong.bank.store.tiers import TieredStore
from memlong.bank.validate import whole_number

__all__ = [
    "BankOptions",
    "BankPool",
    "BankState",
    "Capacity",
    "ChunkLayout",
    "Chunks",
    "Draft",
    "EvictionPolicy",
    "Floats",
    "Ids",
    "InMemoryStore",
    "Index",
    "IndexRows",
    "KeyValueStore",
    "LayeredBank",
    "MemoryBank",
    "Metric",
    "NoOptions",
    "ObjectFolder",
    "Objects",
    "Retrieved",
    "SearchResult",
    "StoredEmbeddings",
    "StoredObject",
    "TieredStore",
    "Usage",
    "bank_of",
    "eviction_policy",
    "objects_at",
    "whole_number",
]
