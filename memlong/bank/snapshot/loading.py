"""Loading: a bank is made with the saved options and filled, and its index loaded or rebuilt."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np

from memlong.bank.capacity import Capacity
from memlong.bank.layout import ChunkLayout
from memlong.bank.snapshot.files import damaged
from memlong.bank.snapshot.lazy import SnapshotStore
from memlong.bank.snapshot.matrix import map_matrix
from memlong.bank.snapshot.options import refused_option
from memlong.bank.snapshot.reader import StoredBank
from memlong.bank.snapshot.saving import Bank, name_of
from memlong.bank.snapshot.segments import SavedBank
from memlong.bank.state import BankState
from memlong.errors import DeviceUnavailableError, InvalidArgumentError, SnapshotError

Made = TypeVar("Made", bound=Bank)

_OF_EVERY_BANK = {"metric", "max_chunks", "max_bytes", "eviction", "device", "store", "dim"}


def load(
    kind: type[Made], stored: StoredBank, given: dict[str, Any], *, lazy: bool, trust_index: bool
) -> Made:
    """Make a bank of a class of what a snapshot holds; as `MemoryBank.load`."""
    if stored.record.bases:
        raise SnapshotError(
            f"{str(stored.folder)!r} was saved over {len(stored.record.bases)} bases, which it does not hold: load it "
            "with memlong.load_bank(path, bases=[...])"
        )
    if lazy and given.get("store") is not None:
        raise InvalidArgumentError(
            "lazy leaves keys and values in the snapshot, but a store is given: use one of the two"
        )
    bank = _made_for(
        kind, stored, {**given, "store": SnapshotStore()} if lazy else given, trusted=trust_index
    )
    try:
        _check_capacity(bank.state, stored)
        _fill(bank.state, stored)
        if trust_index and (stored.record.made_by, dict(stored.record.options)) == (
            name_of(kind.maker),
            bank.options_to_save(),
        ):
            _load_index(bank.state, stored)
        else:
            stored.check_index()
        if (
            bank.state.index.repairs_before_changes
        ):  # kept outside the process: at once, and not before the first search
            with bank.state.reading(searching=True):
                pass
        bank.state.saved = SavedBank(stored.token, stored.record, tuple(stored.on_disk))
    except BaseException:
        bank.state.store.clear()  # unproven blocks must not be used, and loading may be tried again
        raise
    return bank


def _made_for(kind: type[Made], stored: StoredBank, given: dict[str, Any], *, trusted: bool) -> Made:
    """Make an empty bank with the saved options, except for those given."""
    record = stored.record
    if given.get("metric", record.metric) != record.metric:
        raise InvalidArgumentError(
            f"metric is {given['metric']!r}, but the bank was saved with {record.metric!r}, for which its "
            "embeddings were made: leave metric out"
        )
    if record.eviction is None and "eviction" not in given:
        raise InvalidArgumentError(
            "the bank was saved with a custom eviction policy: give it, or another, as eviction"
        )
    options: dict[str, Any] = {
        name: getattr(record, name) for name in ("metric", "max_chunks", "max_bytes", "eviction")
    }
    if record.made_by == name_of(kind.maker):
        odd = _OF_EVERY_BANK & record.options.keys()
        if odd:
            raise damaged(stored.manifest_path, f"has options of no backend's own: {', '.join(odd)}")
        own = {name: value for name, value in record.options.items() if name not in given}
        allowed = dict.fromkeys(kind.saved_options) if trusted else kind.saved_options
        if refused := refused_option(kind, own, allowed):
            raise SnapshotError(f"{str(stored.manifest_path)!r} {refused}")
        options |= {**own, "device": record.device}
    try:
        return kind(record.dim, **{**options, **given})
    except DeviceUnavailableError:
        raise
    except (InvalidArgumentError, TypeError, ValueError, OverflowError, MemoryError, RuntimeError) as error:
        _check_given(kind, record.dim, given)
        raise SnapshotError(
            f"{str(stored.manifest_path)!r} names options that {kind.__name__} does not take ({error}). Give others "
            "when loading, or load into another backend"
        ) from error


def _check_given(kind: type[Bank], dim: int, given: dict[str, Any]) -> None:
    """Raise what is wrong with the options that the caller gave, whatever the snapshot says."""
    try:
        kind(dim, **given)
    except TypeError as error:
        raise InvalidArgumentError(f"{kind.__name__} does not take {', '.join(given)} ({error})") from error


def _fill(state: BankState, stored: StoredBank) -> None:
    content, layout, record = stored.content, stored.layout, stored.record
    limit = None if layout is None else _capacity_for(state, layout, stored)
    leaving = state.capacity.victims(content.usage, limit)
    if len(leaving):
        content = content.rows(~np.isin(content.ids, leaving))
    is_lazy, embeddings = isinstance(state.store, SnapshotStore), content.embeddings
    if is_lazy and record.matrix is not None and not len(leaving) and state.device.type == "cpu":
        embeddings = map_matrix(stored.folder, record.matrix, embeddings)
    with state.lock.write():
        state.fill(
            content.ids,
            embeddings,
            content.spans,
            layout,
            record.next_id,
            retrievals=content.retrievals,
            last_used=content.last_used,
            clock=record.clock,
        )
        state.origin, state.identity = record.origin, record.identity
        if isinstance(state.store, SnapshotStore):
            stored.attach_to(state.store, content.ids)
        elif layout is not None:
            for ids, blocks in stored.blocks(content.ids):
                keys, values = blocks.to(layout.device).unbind(1)
                state.store.take(ids, keys, values)


def _load_index(state: BankState, stored: StoredBank) -> None:
    """Have the index read its own file, if there is one; otherwise it is rebuilt."""
    content, record = stored.index_file(), stored.record.index
    if content is None or record is None:
        return
    with state.lock.write():
        if len(state.table) != stored.record.count:  # some were evicted at once
            return
        try:
            state.load_index(record.facts, content)
        except (
            RuntimeError,
            ValueError,
            KeyError,
            TypeError,
            OverflowError,
            MemoryError,
            OSError,
        ) as error:
            raise SnapshotError(
                f"{str(stored.folder / record.file.name)!r} is not read by this backend's library ({error}). Load "
                "the snapshot without trust_index, which rebuilds the index"
            ) from error


def _capacity_for(state: BankState, layout: ChunkLayout, stored: StoredBank) -> int | None:
    try:
        return state.capacity_for(layout)
    except InvalidArgumentError as error:
        if state.capacity.max_bytes != stored.record.max_bytes or state.store.max_bytes is not None:
            raise  # the caller asked for it
        raise SnapshotError(
            f"{str(stored.manifest_path)!r} cannot be loaded within its own limit: {error}. If its store kept "
            "fewer bits, give such a store (store=TieredStore(host='2GB', dtype='int8')), or another max_bytes"
        ) from error


def _check_capacity(state: BankState, stored: StoredBank) -> None:
    """Refuse to drop chunks that the bank held when it was saved, unless limits have changed since."""
    if stored.layout is None:
        return
    capacity, record, count = state.capacity, stored.record, len(stored.content.ids)
    fit = _capacity_for(state, stored.layout, stored)
    changed = Capacity(
        None if capacity.max_chunks == record.max_chunks else capacity.max_chunks,
        None if capacity.max_bytes == record.max_bytes else capacity.max_bytes,
        capacity.policy,
    )
    asked = changed.in_chunks(*state.chunk_bytes(stored.layout), state.store.max_bytes)
    wanted = count if asked is None else min(count, asked)
    if fit is not None and fit < wanted:
        raise SnapshotError(
            f"{str(stored.folder)!r} holds {count} chunks, but only {fit} fit into its limits (max_chunks "
            f"{capacity.max_chunks}, max_bytes {capacity.max_bytes}): its store kept fewer bits. Give another "
            "max_bytes, or, without lazy, such a store (store=TieredStore(host='2GB', dtype='int8'))"
        )
