"""PayloadStore: keys and values as objects, one a chunk, in a folder for each session."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from memlong.bank import ChunkLayout, KeyValueStore
from memlong.errors import InvalidArgumentError, LostChunksError, StorageError
from memlong_milvus.block import Bytes, decode, encode, layout_of
from memlong_milvus.objects import Objects
from memlong_milvus.parallel import Workers
from memlong_milvus.sessions import Session
from memlong_milvus.uri import redacted

_FACTS = "session.json"
_SUFFIX = ".kv"
_BLOCK = re.compile(r"(0|[1-9][0-9]{0,17})\.kv")
_MOST_ID = 10**18
_HEADER = 1 << 16  # bytes before the keys, at most
_MOST_FACTS, _MOST_BLOCK = 1 << 20, 1 << 31


@dataclass(frozen=True)
class Folder:
    """Where a session's objects are, and how they are named.

    Attributes
    ----------
    collection, origin : str
        Name and origin of the collection that the session's rows are in.
    session : Session
        Whose.
    """

    collection: str
    origin: str
    session: Session

    @property
    def name(self) -> str:
        """Below the place of the objects."""
        return f"{self.collection}-{self.origin}/{self.session.key}"

    @property
    def facts(self) -> str:
        """Name of the object that tells what the session is."""
        return f"{self.name}/{_FACTS}"

    def block(self, chunk_id: int) -> str:
        """Return the name of a chunk's object."""
        return f"{self.name}/{chunk_id}{_SUFFIX}"


def chunk_id_of(name: str) -> int | None:
    """Return whose object this is; None if it is no chunk's."""
    found = _BLOCK.fullmatch(name.rpartition("/")[2])
    return None if found is None else int(found[1])


class PayloadStore(KeyValueStore):
    """Blocks as objects, each with a checksum, written and read by several threads at once.

    What cannot be removed is let go of all the same, and tried again with the next removal; `sweep` finds the rest.

    Parameters
    ----------
    objects : Objects
        Where they are; `settle` says in which folder.
    readers : int
        Threads.
    lasting : bool
        Whether the session goes on after this process; then the newest id is noted down before its chunk goes.
    facts : dict
        What to note down of the session besides.
    """

    _folder: Folder

    def __init__(self, objects: Objects, *, readers: int, lasting: bool, facts: dict[str, Any]) -> None:
        self._objects, self._lasting, self._facts = objects, lasting, facts
        self._held: dict[int, int] = {}
        self._newest = -1
        self._is_noted = False
        self._leftover: set[str] = set()
        self._layout: ChunkLayout | None = None
        self._workers = Workers(readers)
        self._owner = os.getpid()

    def settle(self, folder: Folder) -> None:
        """Say whose objects these are; before anything else."""
        self._folder = folder

    @property
    def place(self) -> str:
        """Where the objects are, without secrets."""
        return self._objects.place

    def put(self, ids: Sequence[int], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write all of them, or remove what was written."""
        self._require_owner()
        again = [chunk_id for chunk_id in ids if chunk_id in self._held]
        if again:
            raise InvalidArgumentError(f"the store already holds ids {again}; ids are never reused")

        def write(row: int) -> None:
            content = encode(self._folder.session.key, ids[row], keys[row], values[row])
            self._objects.write(self._folder.block(ids[row]), content)

        try:
            if self._lasting and not self._is_noted:
                self._note_newest()
            self._workers.each(write, range(len(ids)))
        except BaseException as error:
            self._delete(ids)
            if isinstance(error, OSError) and not isinstance(error, StorageError):
                raise self._unusable("written", error) from error
            raise
        layout = ChunkLayout.of(keys)
        self._layout = layout
        self._held.update(dict.fromkeys(ids, layout.nbytes))
        self._leftover.difference_update(map(self._folder.block, ids))  # they are these chunks' now
        self._newest = max(self._newest, *ids)

    def get(self, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Read them; LostChunksError names those that are missing or damaged."""
        self._check_held(ids)
        layout = self._layout
        assert layout is not None  # noqa: S101 - what is held was put
        keys, values = (np.empty((len(ids), layout.nbytes // 2), dtype=np.uint8) for _ in range(2))
        lost: dict[int, str] = {}

        def read(row: int) -> None:
            try:
                content = self._objects.read(self._folder.block(ids[row]), layout.nbytes + _HEADER)
                keys[row], values[row] = decode(content, self._folder.session.key, ids[row], layout)
            except FileNotFoundError:
                lost[ids[row]] = "its object is missing"
            except ValueError as error:
                lost[ids[row]] = str(error)

        try:
            self._workers.each(read, range(len(ids)))
            if lost and self._lasting:
                self._objects.read(
                    self._folder.facts, _MOST_FACTS
                )  # if this is not there either, it is the place that is missing
        except OSError as error:
            raise self._unusable("read", error) from error
        if lost:
            raise LostChunksError(lost)
        with torch.inference_mode(False):  # they may be used outside it
            return _states(keys, layout), _states(values, layout)

    def remove(self, ids: Sequence[int]) -> None:
        """Forget them, and remove their objects."""
        self._require_owner()
        self._check_held(ids)
        if self._lasting and self._newest in ids:
            self._note_newest()
        for chunk_id in ids:
            del self._held[chunk_id]
        self._delete(ids)

    def clear(self) -> None:
        """Forget all, and remove their objects."""
        if self._held:
            self.remove(list(self._held))
        self._layout = None

    def drop(self) -> None:
        """Remove the whole folder of the session; StorageError if the place does not let it go."""
        self._require_owner()
        self._held.clear()
        self._leftover.clear()
        self._is_noted = False
        try:
            self._objects.delete_folder(self._folder.name)
        except OSError as error:
            raise self._unusable("removed", error) from error

    def stored_ids(self) -> list[int]:
        """Return the ids of all objects in the folder, whoever wrote them, ascending."""
        names = (each.name for each in self._objects.list(self._folder.name))
        return sorted(chunk_id for chunk_id in map(chunk_id_of, names) if chunk_id is not None)

    def stored_facts(self) -> dict[str, Any]:
        """Return what was noted down of the session; nothing if it is new."""
        try:
            facts = json.loads(self._objects.read(self._folder.facts, _MOST_FACTS))
            if not isinstance(facts, dict):
                raise ValueError(f"it holds a {type(facts).__name__}, and no object")
            newest = facts.get("newest", -1)
            if type(newest) is not int or not -1 <= newest <= _MOST_ID:
                raise ValueError(f"its newest is {newest!r:.50}, which is no id of a chunk")
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise self._unusable("read", error) from error
        except (ValueError, RecursionError) as error:
            raise StorageError(
                f"{self._folder.facts!r} in {self.place!r} is damaged ({error}). Restore it, or begin another session"
            ) from error
        return facts

    def adopt(self, ids: Sequence[int], newest: int, device: torch.device) -> ChunkLayout | None:
        """Take over objects that are there, and return their layout; None if none can be read."""
        for chunk_id in ids:
            with suppress(OSError, ValueError):
                found = layout_of(
                    self._objects.read(self._folder.block(chunk_id), _MOST_BLOCK),
                    self._folder.session.key,
                    chunk_id,
                )
                self._layout = ChunkLayout(found.shape, found.dtype, device)
                break
        self._newest, self._is_noted = newest, True
        if self._layout is not None:
            self._held.update(dict.fromkeys(ids, self._layout.nbytes))
        return self._layout

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, chunk_id: object) -> bool:
        return chunk_id in self._held

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held."""
        return sum(list(self._held.values()))

    @property
    def resident_bytes(self) -> int:
        """None: all are elsewhere."""
        return 0

    def _require_owner(self) -> None:
        if os.getpid() != self._owner:
            raise StorageError(
                f"the objects in {self.place!r} are those of process {self._owner}, from which this one was forked: "
                "both would write the same. Make the bank in this process, or start processes with the method 'spawn'"
            )

    def _check_held(self, ids: Sequence[int]) -> None:
        unknown = [chunk_id for chunk_id in ids if chunk_id not in self._held]
        if unknown:
            raise InvalidArgumentError(f"the store holds no block for ids {unknown}")

    def _note_newest(self) -> None:
        facts = {**self._facts, "session": self._folder.session.name, "newest": self._newest}
        try:
            self._objects.write(self._folder.facts, json.dumps(facts).encode())
        except StorageError:
            raise
        except OSError as error:
            raise self._unusable("written", error) from error
        self._is_noted = True

    def _delete(self, ids: Iterable[int]) -> None:
        self._leftover.update(map(self._folder.block, ids))  # until they are gone
        with suppress(OSError):
            self._objects.delete(sorted(self._leftover))
            self._leftover.clear()

    def _unusable(self, what: str, error: OSError) -> StorageError:
        return StorageError(
            f"keys and values cannot be {what} in {self.place!r}: {redacted(str(error))}. Is the place there, "
            "and may this process use it? store names another"
        )


def _states(content: Bytes, layout: ChunkLayout) -> torch.Tensor:
    states = torch.from_numpy(content).view(layout.dtype).view(len(content), *layout.shape)
    return states.to(layout.device)
