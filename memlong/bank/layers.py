"""LayeredBank: one bank to write to over any number of others, which many sessions share and none changes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch

from memlong.bank.arrays import FloatInput, Floats, Ids, IntInput
from memlong.bank.base import MemoryBank
from memlong.bank.eviction import Usage
from memlong.bank.index.index import Index
from memlong.bank.layout import UNKNOWN, ChunkLayout
from memlong.bank.metric import Metric
from memlong.bank.results import Chunks, Retrieved, SearchResult, StoredEmbeddings
from memlong.bank.state import BankState
from memlong.bank.store.copying import stack
from memlong.bank.validate import blocks_of, ids_of
from memlong.errors import InvalidArgumentError, MemlongError

_PER_LAYER = 1 << 40  # ids of one bank; with those of the top, all are integers that JSON readers keep exact
_TOP = 1 << 12


class LayeredBank(MemoryBank):
    """A session's own bank, the top, over bases: a corpus, a manual, a user's past.

    Searching and retrieving see all of them as one bank would that holds their chunks: the best of the union, equal
    scores in one order. Everything that changes something acts on the top alone: `add`, `remove`, `evict`, `reset`,
    capacity and `save`. So sessions share a base, in memory once, and nothing of one session reaches another. A base
    may grow or lose chunks meanwhile, through others that hold it. Retrieving counts in the layer that a chunk is of.

    Ids tell the layer (`layer_of`): those of base i are its own plus i * 2**40, so those of the first base are as they
    are there, and those of the top its own plus 2**52. They stay as they are when a base grows or another is added.

    Sizes (`nbytes`, `resident_bytes`, `open_files`) are the top's, and so is `usage`; ``len``, `ids` and `embeddings`
    are those of all layers.

    Parameters
    ----------
    top : MemoryBank
        What this session adds goes here.
    bases : sequence of MemoryBank
        What lies below, such as ``load_bank(folder, lazy=True)``.
    among : sequence, optional
        For each base the ids, its own, of the chunks that this session may find there, or None for all: those of
        documents with some tag, say. It is a filter of searches and not a lock: `fetch` and `ids` know all chunks,
        sizes and means are of all. It is saved with a session.

    Raises
    ------
    InvalidArgumentError
        If a base does not fit the others (dim, metric, shape of chunks, model), is given twice, or is layered itself.

    Examples
    --------
    >>> manual = load_bank("manual", lazy=True)  # doctest: +SKIP
    >>> session = LayeredBank(create_bank("torch", manual.dim), [manual])  # doctest: +SKIP
    """

    def __init__(
        self,
        top: MemoryBank,
        bases: Sequence[MemoryBank],
        *,
        among: Sequence[IntInput | None] | None = None,
    ) -> None:
        if isinstance(bases, str) or not isinstance(bases, Sequence):
            raise InvalidArgumentError(f"bases must be a sequence of banks, got {bases!r:.80}")
        layers = (top, *bases)
        for bank in layers:
            if not isinstance(bank, MemoryBank):
                raise InvalidArgumentError(f"top and bases must be banks, got {bank!r:.80}")
            if isinstance(bank, LayeredBank):
                raise InvalidArgumentError(
                    "top and bases must not be layered themselves: give the layers, as LayeredBank(bank.top, "
                    "[*bank.bases, another])"
                )
        if len({id(bank) for bank in layers}) < len(layers):
            raise InvalidArgumentError("top and bases hold one bank twice")
        if len(bases) > _TOP:
            raise InvalidArgumentError(f"bases must be at most {_TOP:,}, got {len(bases):,}")
        for bank in bases:
            if (bank.dim, bank.metric) != (top.dim, top.metric):
                raise InvalidArgumentError(
                    f"bases must have the top's dim {top.dim} and metric {top.metric!r}, got a bank of dim {bank.dim} "
                    f"and metric {bank.metric!r}: make the top with those, or choose bases of one retriever"
                )
        for bank in layers:
            if bank.next_id > _PER_LAYER:
                raise InvalidArgumentError(
                    f"top and bases must have ids below 2**40, got one at {bank.next_id:,}"
                )
        if among is not None and (not isinstance(among, Sequence) or len(among) != len(bases)):
            raise InvalidArgumentError(
                f"among must hold ids or None for each of the {len(bases)} bases, got {among!r:.80}"
            )
        self._top, self._bases = top, tuple(bases)
        self._open: tuple[Ids | None, ...] = tuple(
            None if each is None else np.unique(ids_of(each, "among"))
            for each in among or [None] * len(bases)
        )
        self._reader = None
        for bank in layers:
            self._check_fit(bank)

    def _check_fit(self, bank: MemoryBank) -> None:
        if self.layout is not None and bank.layout is not None:
            self.layout.require_same(bank.layout)
        if len(bank) and None not in (bank.origin, self.origin) and bank.origin != self.origin:
            raise InvalidArgumentError(
                "bases must be of one model with the same settings, got two that differ: read one of them again with "
                "the other's model and settings"
            )

    @property
    def top(self) -> MemoryBank:
        """The bank that changes go to."""
        return self._top

    @property
    def bases(self) -> tuple[MemoryBank, ...]:
        """The banks below it."""
        return self._bases

    @property
    def among(self) -> tuple[Ids | None, ...]:
        """For each of them the ids, its own, of the chunks that can be found there, ascending, or None for all."""
        return self._open

    @property
    def identity(self) -> str:
        """Which bank the top is; as `MemoryBank.identity`."""
        return self._top.identity

    def layer_of(self, ids: IntInput) -> torch.Tensor:
        """Return the layer of each id, int64 [n]: bases from 0, then the top; -1 for an id that can be of none."""
        layers = ids_of(ids) // _PER_LAYER
        layers[layers == _TOP] = len(self._bases)
        layers[layers > len(self._bases)] = -1
        return torch.from_numpy(layers)

    def own_ids(self, ids: IntInput) -> torch.Tensor:
        """Return what ids, int64 [n], are in the layer that `layer_of` tells."""
        return torch.from_numpy(ids_of(ids) % _PER_LAYER)

    def fingerprint(self) -> str:
        """Return the SHA-256 of what all layers hold; as `MemoryBank.fingerprint`."""
        told = "".join(bank.fingerprint() for _, bank in self._layers())
        return hashlib.sha256(told.encode()).hexdigest()

    @property
    def state(self) -> BankState:
        """What the top is made of."""
        return self._top.state

    @property
    def index(self) -> Index[Any]:
        """What finds the top's chunks."""
        return self._top.index

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        return self._top.dim

    @property
    def metric(self) -> Metric:
        """What counts as near."""
        return self._top.metric

    @property
    def device(self) -> torch.device:
        """Where the top's index computes."""
        return self._top.device

    @property
    def origin(self) -> Mapping[str, Any] | None:
        """Which model made the chunks: as the top knows, or else the first base that does."""
        known = (bank.origin for bank in (self._top, *self._bases) if len(bank))
        return next((origin for origin in known if origin is not None), self._top.origin)

    @origin.setter
    def origin(self, origin: Mapping[str, Any] | None) -> None:
        self._top.origin = origin

    def refuse_changes(self, why: str) -> None:
        """From now on, raise MemlongError with this reason for every change to the top."""
        self._top.refuse_changes(why)

    @property
    def next_id(self) -> int:
        """The id that the next chunk of the top will get."""
        return _TOP * _PER_LAYER + self._top.next_id

    @property
    def layout(self) -> ChunkLayout | None:
        """Shape, dtype and device of a chunk's keys and of its values; None where no layer has any."""
        layouts = (bank.layout for bank in (self._top, *self._bases))
        return next((layout for layout in layouts if layout is not None), None)

    @property
    def nbytes(self) -> int:
        """Bytes of the top's embeddings, keys and values."""
        return self._top.nbytes

    @property
    def resident_bytes(self) -> int:
        """Bytes of the top in memory."""
        return self._top.resident_bytes

    @property
    def open_files(self) -> int:
        """How many files the top's store keeps open."""
        return self._top.open_files

    @property
    def ids(self) -> torch.Tensor:
        """The ids of all layers, int64 [n], ascending; a copy."""
        return torch.cat([first + bank.ids for first, bank in self._layers()])

    @property
    def embeddings(self) -> StoredEmbeddings:
        """Ids and embeddings of all layers; a copy."""
        found = [(first, bank.embeddings) for first, bank in self._layers()]
        return StoredEmbeddings(
            torch.cat([first + each.ids for first, each in found]),
            torch.cat([each.embeddings for _, each in found]),
        )

    @property
    def usage(self) -> Usage:
        """Ids, retrieval counts and last uses of the top; a copy."""
        usage = self._top.usage
        return Usage(usage.ids + _TOP * _PER_LAYER, usage.retrievals, usage.last_used)

    def embedding_sum(self, start: int, step: int) -> tuple[Floats, int, int]:
        """Return the sum [dim] of every ``step``-th embedding of all layers; as `MemoryBank.embedding_sum`."""
        total, count, length = np.zeros(self.dim, dtype=np.float32), 0, 0
        for _, bank in self._layers():
            part, of, held = bank.embedding_sum(start, step)
            total, count = total + part, count + of
            start += of * step - held
            length += held
        return total, count, length

    def __len__(self) -> int:
        return sum(len(bank) for _, bank in self._layers())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._top!r}, [{', '.join(map(repr, self._bases))}])"

    def check_layout(self, layout: ChunkLayout) -> None:
        """Check whether the top can hold chunks of a layout, as `MemoryBank.check_layout`, and bases hold such."""
        self._require_same(layout)
        self._top.check_layout(layout)

    def add(
        self,
        embeddings: FloatInput,
        keys: FloatInput,
        values: FloatInput,
        spans: IntInput,
        *,
        check_first: bool = True,
    ) -> torch.Tensor:
        """Store chunks in the top; as `MemoryBank.add`."""
        if self._top.layout is None and self._bases:
            blocks, _ = blocks_of(keys, values, len(embeddings))
            if len(blocks):
                self._require_same(ChunkLayout.of(blocks))
        added = self._top.add(embeddings, keys, values, spans, check_first=check_first)
        return added + _TOP * _PER_LAYER

    def search(self, queries: FloatInput, k: int, *, among: IntInput | None = None) -> SearchResult:
        """Find the k best chunks of each query in all layers; as `MemoryBank.search`."""
        return self._best(lambda bank, own: bank.search(queries, k, among=own), k, among)

    def exact_search(self, queries: FloatInput, k: int, *, among: IntInput | None = None) -> SearchResult:
        """Search all layers by brute force; as `MemoryBank.exact_search`."""
        return self._best(lambda bank, own: bank.exact_search(queries, k, among=own), k, among)

    def retrieve(self, queries: FloatInput, k: int, *, among: IntInput | None = None) -> Retrieved:
        """Find the k best chunks of each query in all layers with their K-V; as `MemoryBank.retrieve`.

        Each layer counts those of its own.
        """
        found = self.search(queries, k, among=among)
        ids, times = torch.unique(found.ids[found.ids >= 0], return_counts=True)
        chunks = self.fetch(ids)
        for more in range(1, int(times.max()) if len(times) else 0):  # an id counts for every query
            self.fetch((), known=ids[times > more])
        # What has left since the search is missing, and what is missing comes last.
        gone = torch.isin(found.ids, chunks.ids, invert=True)
        scores, order = found.scores.masked_fill(gone, -torch.inf).sort(dim=1, descending=True, stable=True)
        ids = found.ids.masked_fill(gone, -1).gather(1, order)
        held = ids >= 0
        where = torch.searchsorted(chunks.ids, ids[held])
        keys, values = (each.new_zeros(*ids.shape, *each.shape[1:]) for each in (chunks.keys, chunks.values))
        keys[held], values[held] = chunks.keys[where], chunks.values[where]
        spans = torch.full((*ids.shape, 2), -1, dtype=torch.int64, device="cpu")
        spans[held] = chunks.spans[where]
        return Retrieved(ids, scores, keys, values, spans)

    def spans_of(self, ids: IntInput) -> torch.Tensor:
        """Return the token positions of chunks, each in the text of its layer; as `MemoryBank.spans_of`."""
        wanted = ids_of(ids)
        spans = torch.full((len(wanted), 2), -1, dtype=torch.int64, device="cpu")
        for bank, places, own in self._split(wanted):
            spans[torch.from_numpy(places)] = bank.spans_of(own)
        return spans

    def embeddings_of(self, ids: IntInput) -> torch.Tensor:
        """Return the embeddings of chunks; as `MemoryBank.embeddings_of`."""
        wanted = ids_of(ids)
        found = torch.zeros(len(wanted), self.dim, dtype=torch.float32, device="cpu")
        for bank, places, own in self._split(wanted):
            found[torch.from_numpy(places)] = bank.embeddings_of(own)
        return found

    def fetch(self, ids: IntInput, *, known: IntInput = ()) -> Chunks:
        """Return chunks by id, each counted in its layer; as `MemoryBank.fetch`."""
        wanted, others = ids_of(ids), ids_of(known)
        counted = {id(bank): own for bank, _, own in self._split(others)}
        parts: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]] = {}
        for first, bank in self._layers():
            own = wanted[wanted // _PER_LAYER == first // _PER_LAYER] - first
            also = counted.get(id(bank), own[:0])
            if not len(own) and not len(also):
                continue
            found = bank.fetch(own, known=also)
            if len(found.ids):
                self._require_same(ChunkLayout.of(found.keys))
            rows = zip(found.keys, found.values, found.spans, found.ids.tolist(), strict=True)
            parts |= {first + row[3]: row for row in rows}
        held = [parts[each] for each in wanted.tolist() if each in parts]
        if not held:
            layout = self.layout or UNKNOWN
            nothing = torch.empty(0, 2, dtype=torch.int64, device="cpu")
            return Chunks(nothing[:, 0], layout.empty(0), layout.empty(0), nothing)
        keys, values, spans = (stack([part[side] for part in held]) for side in range(3))  # type: ignore[misc]
        return Chunks(
            torch.from_numpy(wanted[[each in parts for each in wanted.tolist()]]), keys, values, spans
        )

    def evict(self, n: int) -> torch.Tensor:
        """Have the top's eviction policy remove at least n of its chunks; as `MemoryBank.evict`."""
        return self._top.evict(n) + _TOP * _PER_LAYER

    def remove(self, ids: IntInput) -> None:
        """Remove chunks of the top; as `MemoryBank.remove`, also for ids of a base."""
        leaving = ids_of(ids)
        below = leaving[leaving // _PER_LAYER != _TOP]
        if len(below):
            raise InvalidArgumentError(
                f"ids {below.tolist()[:9]} are not of the top, and bases are not changed from here: remove them from "
                "the base itself, by its own ids; nothing was removed"
            )
        self._top.remove(leaving - _TOP * _PER_LAYER)

    def reset(self) -> None:
        """Remove every chunk of the top; as `MemoryBank.reset`."""
        self._top.reset()

    def options_to_save(self) -> dict[str, Any]:
        """Return the options of the top's backend for a snapshot."""
        return self._top.options_to_save()

    def __reduce_ex__(self, _: object) -> NoReturn:
        """A copy would hold every base again."""
        raise MemlongError(
            f"A {type(self).__name__} cannot be copied or pickled, as it would copy its bases: copy bank.top, and put "
            "it over the same bases"
        )

    def _layers(self) -> Iterator[tuple[int, MemoryBank]]:
        """Yield all layers in the order of their ids, each with the id of its first chunk."""
        for number, base in enumerate(self._bases):
            yield number * _PER_LAYER, base
        yield _TOP * _PER_LAYER, self._top

    def _split(self, ids: Ids) -> Iterator[tuple[MemoryBank, Ids, Ids]]:
        """Yield each layer that ids name, with their places among them and their ids there."""
        numbers = ids // _PER_LAYER
        for first, bank in self._layers():
            places = np.flatnonzero(numbers == first // _PER_LAYER)
            if len(places):
                yield bank, places, ids[places] - first

    def _best(
        self, find: Callable[[MemoryBank, Ids | None], SearchResult], k: int, among: IntInput | None
    ) -> SearchResult:
        """Return the k best of what each layer finds."""
        wanted = None if among is None else ids_of(among, "among")
        found = []
        for (first, bank), opened in zip(self._layers(), (*self._open, None), strict=True):
            own = opened
            if wanted is not None:
                own = wanted[wanted // _PER_LAYER == first // _PER_LAYER] - first
                own = own if opened is None else np.intersect1d(own, opened)
            found.append((first, find(bank, own)))
        ids = torch.cat([each.ids + first * (each.ids >= 0) for first, each in found], dim=1)
        # Layers are in the order of their ids, and so is what one finds with equal scores.
        scores, order = torch.cat([each.scores for _, each in found], dim=1).sort(
            dim=1, descending=True, stable=True
        )
        return SearchResult(scores[:, :k], ids.gather(1, order)[:, :k])

    def _require_same(self, layout: ChunkLayout) -> None:
        if self.layout is not None:
            self.layout.require_same(layout)
