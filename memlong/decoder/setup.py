"""What a decoder consists of: its model and settings, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from memlong.bank import ChunkLayout, LayeredBank, MemoryBank, TieredStore
from memlong.decoder.config import MemoryConfig
from memlong.decoder.kv.sources import KvSource
from memlong.decoder.model.gates import MemoryGates
from memlong.decoder.model.layout import ModelLayout
from memlong.decoder.retrievers.base import Retriever
from memlong.decoder.retrievers.query_map import QueryMap
from memlong.plugins import Registry


@dataclass(frozen=True, eq=False)
class Setup:
    """A model, its memory settings, and the parts made for them.

    Attributes
    ----------
    model, model_layout
        The model and its layers.
    config
        Sizes and modes.
    retrieval_layers
        Those that attend to retrieved K-V.
    source
        What is stored of a chunk, and what each retrieval layer makes of it.
    gates
        What each head adds to its logits of memory; None for nothing.
    retriever
        Makes embeddings; None for the plain window.
    registry
        Where names of backends are looked up.
    query_map
        Maps the embeddings of queries; None for no map.
    """

    model: PreTrainedModel
    model_layout: ModelLayout
    config: MemoryConfig
    retrieval_layers: tuple[int, ...]
    source: KvSource
    gates: MemoryGates | None
    retriever: Retriever | None
    registry: Registry
    query_map: QueryMap | None = None

    @property
    def block_layout(self) -> ChunkLayout:
        """Shape (layers, kv_heads, chunk_size, head_dim), dtype and device of a chunk's keys and of its values."""
        return self.source.block_layout(self.config.chunk_size, self.model.dtype, self.model.device)

    @property
    def bank_options(self) -> Mapping[str, Any]:
        """Options of a bank: the backend's, and the store that the configuration asks for."""
        options = dict(self.config.backend_options)
        if self.config.store:
            options["store"] = TieredStore(**self.config.store)
        return options

    def new_bank(self, bases: Sequence[MemoryBank] = ()) -> MemoryBank | None:
        """Make an empty bank, over bases if there are any; None for the plain window."""
        if self.config.backend is None or self.retriever is None:
            return None
        options = {"metric": self.retriever.metric, **self.bank_options}
        bank = self.registry.create_bank(self.config.backend, self.retriever.dim, **options)
        return LayeredBank(bank, bases) if bases else bank
