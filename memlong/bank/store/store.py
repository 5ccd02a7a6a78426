"""The KeyValueStore interface, and the default store."""

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

    The bank calls `put`, `remove` and `clear` from one thread at a time. It may call `get`, `in`, `len` and the byte
    counts from many threads at once, but never during the former. Where a block is kept between `put` and `get` is up
    to the store: it comes back in the dtype and on the device it came from, bit for bit unless the store is lossy.

    An interrupt (KeyboardInterrupt) may leave `put` and `remove` half done; the bank then finds out with `in` which
    blocks are held, and can get or remove all of them.
    """

    why_uncopied = "it belongs to one bank. Copy or pickle that, or save it and load it elsewhere"

    @property
    def storage_dtype(self) -> StorageDtype | None:
        """The dtype that blocks are stored in; None means their own."""
        return None

    @abstractmethod
    def put(self, ids: Sequence[int], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store a copy of one block per id; on an error, nothing is stored.

        Parameters
        ----------
        ids : sequence of int
            n ids that the store does not hold.
        keys, values : torch.Tensor
            [n, layers, kv_heads, chunk, head_dim], any strides. They belong to the caller.
        """

    def take(self, ids: Sequence[int], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store blocks like `put`, but take ownership: the store may keep the tensors themselves."""
        self.put(ids, keys, values)

    @abstractmethod
    def get(self, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return stacked copies of the keys and values of some ids.

        Parameters
        ----------
        ids : sequence of int
            n >= 1 ids that the store holds; may contain duplicates.

        Returns
        -------
        tuple of torch.Tensor
            Keys and values, each [n, layers, kv_heads, chunk, head_dim].
        """

    def peek(self, ids: Sequence[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield each id's keys and values without a copy if possible; valid until the next ones, and read-only."""
        for chunk_id in ids:
            keys, values = self.get([chunk_id])
            yield keys[0], values[0]

    @abstractmethod
    def remove(self, ids: Sequence[int]) -> None:
        """Remove the blocks of ids that the store holds; on an error, all are still there."""

    @abstractmethod
    def clear(self) -> None:
        """Remove all blocks."""

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
        """Bytes of keys and values in memory rather than on disk, copies included; by default, all of them."""
        return self.nbytes

    @property
    def open_files(self) -> int:
        """Number of files kept open; by default, none."""
        return 0

    @property
    def max_bytes(self) -> int | None:
        """Maximum bytes of keys and values that the bank may store; None means no limit."""
        return None

    def record_bytes(self, layout: ChunkLayout) -> int:
        """Return the stored size of a block of this layout, in bytes."""
        return layout.nbytes

    def check_layout(self, layout: ChunkLayout) -> None:
        """Raise InvalidArgumentError if no block of this layout fits; by default, all do."""


class InMemoryStore(KeyValueStore):
    """Keeps every block on the device that it came from.

    Each block is its own tensor, so that `put` copies once, `get` is one stacking copy, and removing a block frees its
    memory at once. One large slab would have to be copied to grow, and compacted to shrink.
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
        """Keep a single block itself; copy several, as otherwise one of them would keep the memory of all."""
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
        """Yield the blocks themselves."""
        self._check_held(ids)
        for chunk_id in ids:
            yield self._blocks[chunk_id]

    def remove(self, ids: Sequence[int]) -> None:
        """Delete the blocks."""
        self._check_held(ids)
        for chunk_id in ids:
            del self._blocks[chunk_id]

    def clear(self) -> None:
        """Delete all blocks."""
        self._blocks.clear()

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, chunk_id: object) -> bool:
        return chunk_id in self._blocks

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held; all blocks have the same size."""
        for key, value in self._blocks.values():
            return len(self._blocks) * (key.nbytes + value.nbytes)
        return 0

    def _check_held(self, ids: Sequence[int]) -> None:
        unknown = [chunk_id for chunk_id in ids if chunk_id not in self._blocks]
        if unknown:
            raise InvalidArgumentError(f"the store holds no block for ids {unknown}")
