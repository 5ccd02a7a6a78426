"""Where keys and values live: the KeyValueStore interface, and the store that keeps them as they come."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch

from memlong.bank.layout import ChunkLayout
from memlong.bank.store.codec import StorageDtype
from memlong.bank.store.copying import keep_while_read, separate, stack
from memlong.bank.uncopied import Uncopied
from memlong.errors import InvalidArgumentError


class KeyValueStore(Uncopied, ABC):
    """A map from chunk id to the chunk's keys and values.

    The bank calls `put`, `remove` and `clear` alone, and `get`, `in`, `len` and both counts of bytes from many
    threads at once but never during the former. Where a block lies between `put` and `get` is the store's own affair:
    callers only rely on getting it back in the dtype and on the device it was put in from: bit by bit, unless
    the store was told to keep fewer bits.

    An interrupt (KeyboardInterrupt) may leave `put` and `remove` half done; the bank then asks with `in` for what
    is there, and can get or remove all of that.
    """

    why_uncopied = "it belongs to one bank. Copy or pickle that, or save it and load it elsewhere"

    @property
    def storage_dtype(self) -> StorageDtype | None:
        """In which numbers it keeps blocks; None for those that it gets."""
        return None

    @abstractmethod
    def put(self, ids: Sequence[int], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store a copy of one block per id; if this raises, nothing has been stored.

        Parameters
        ----------
        ids : sequence of int
            n ids that the store does not hold.
        keys, values : torch.Tensor
            [n, layers, kv_heads, chunk, head_dim], any strides; they belong to the caller.
        """

    def take(self, ids: Sequence[int], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store blocks that the caller gives away, as `put` does otherwise; a store may keep the very tensors."""
        self.put(ids, keys, values)

    @abstractmethod
    def get(self, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return fresh stacked copies of the keys and of the values of at least one id.

        Parameters
        ----------
        ids : sequence of int
            n >= 1 ids that the store holds; an id may come more than once.

        Returns
        -------
        tuple of torch.Tensor
            Keys and values, each [n, layers, kv_heads, chunk, head_dim].
        """

    def peek(self, ids: Sequence[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Give the keys and the values of each id, to be read before the next and never changed; no copy if it can."""
        for chunk_id in ids:
            keys, values = self.get([chunk_id])
            yield keys[0], values[0]

    @abstractmethod
    def remove(self, ids: Sequence[int]) -> None:
        """Forget the blocks of ids that the store holds; if this raises, all of them are still there."""

    @abstractmethod
    def clear(self) -> None:
        """Forget every block."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __contains__(self, chunk_id: object) -> bool: ...

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of keys and values held."""

    @property
    def resident_bytes(self) -> int:
        """Bytes of them in memory, copies included, and not on disk; by default all."""
        return self.nbytes

    @property
    def open_files(self) -> int:
        """How many files are kept open for them; by default none."""
        return 0

    @property
    def max_bytes(self) -> int | None:
        """The most bytes of keys and values that the bank may keep here; None is no limit."""
        return None

    def record_bytes(self, layout: ChunkLayout) -> int:
        """Bytes that a block of this layout takes."""
        return layout.nbytes

    def check_layout(self, layout: ChunkLayout) -> None:
        """Raise InvalidArgumentError if not even one block of this layout could be kept; by default all can."""


class InMemoryStore(KeyValueStore):
    """Keep every block where it came from: on the CPU or on its device.

    Each block is a tensor of its own, so `put` copies once, `get` is one stacking copy, and a removed block
    gives its memory back at once; one large slab would have to be copied to grow and compacted to shrink.
    """

    def __init__(self) -> None:
        self._blocks: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def put(self, ids: Sequence[int], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store a contiguous copy of each block."""
        held = [chunk_id for chunk_id in ids if chunk_id in self._blocks]
        if held:
            raise InvalidArgumentError(f"the store already holds ids {held}; ids are never reused")
        pairs = zip(separate(keys), separate(values), strict=True)
        self._blocks.update(dict(zip(ids, pairs, strict=True)))

    def take(self, ids: Sequence[int], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keep a single block as it is; of several, copies, or one that stays would keep the memory of all."""
        if len(ids) > 1 or ids[0] in self._blocks:
            self.put(ids, keys, values)
        else:
            self._blocks[ids[0]] = (keys[0], values[0])

    def get(self, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Stack the blocks."""
        self._check_held(ids)
        keys, values = zip(*(self._blocks[chunk_id] for chunk_id in ids), strict=True)
        keep_while_read((*keys, *values))
        return stack(keys), stack(values)

    def peek(self, ids: Sequence[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Give the blocks themselves."""
        self._check_held(ids)
        for chunk_id in ids:
            yield self._blocks[chunk_id]

    def remove(self, ids: Sequence[int]) -> None:
        """Drop the blocks."""
        self._check_held(ids)
        for chunk_id in ids:
            del self._blocks[chunk_id]

    def clear(self) -> None:
        """Drop every block."""
        self._blocks.clear()

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, chunk_id: object) -> bool:
        return chunk_id in self._blocks

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held; one block is as large as another."""
        for key, value in self._blocks.values():
            return len(self._blocks) * (key.nbytes + value.nbytes)
        return 0

    def _check_held(self, ids: Sequence[int]) -> None:
        unknown = [chunk_id for chunk_id in ids if chunk_id not in self._blocks]
        if unknown:
            raise InvalidArgumentError(f"the store holds no block for ids {unknown}")
