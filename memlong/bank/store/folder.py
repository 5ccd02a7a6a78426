"""ObjectFolder: the blocks of one bank as objects, one per chunk, in their own folder."""

from __future__ import annotations

import json
import os
import re
import secrets
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from memlong.bank.forks import unless_forked
from memlong.bank.store.block import BlockKind, decode, encode, kind_of
from memlong.bank.store.objects import Objects
from memlong.bank.store.parallel import MOST_THREADS, Workers
from memlong.bank.validate import whole_number
from memlong.errors import InvalidArgumentError, LostChunksError, StorageError
from memlong.uri import without_credentials

_NOTES = "bank.json"
_BLOCK = re.compile(r"(0|[1-9][0-9]{0,17})\.kv")
_HEADER = 1 << 16  # maximum bytes before the record
_MOST_NOTES, _MOST_BLOCK = 1 << 20, 1 << 31


class ObjectFolder:
    """The blocks of one bank as objects, each with a checksum, written and read by several threads in parallel.

    Next to them is an object with notes, written before the first block. If blocks and notes are all missing, the place
    is unreachable and no chunk counts as lost. Objects that cannot be removed are retried at the next removal.

    Parameters
    ----------
    objects : Objects
        The place that the folder is in.
    name : str, optional
        Name of the folder. Its last part must be unique in the place. By default, it is random.
    readers : int, default 8
        Threads that read and write.
    lasting : bool, default False
        Whether the folder outlives this object.
    notes : mapping, optional
        Facts about the bank to store, as JSON.
    """

    def __init__(
        self,
        objects: Objects,
        name: str | None = None,
        *,
        readers: int = 8,
        lasting: bool = False,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(objects, Objects):
            raise InvalidArgumentError(f"objects must be what objects_at(place) returns, got {objects!r:.80}")
        if name is not None and not _is_name(name):
            raise InvalidArgumentError(
                f"name must be parts of letters, digits, '.', '_' and '-' with '/' between them, got {name!r:.80}"
            )
        self.readers = whole_number("readers", readers, at_least=1, at_most=MOST_THREADS)
        if notes is not None and not isinstance(notes, Mapping):
            raise InvalidArgumentError(f"notes must be a mapping, got {notes!r:.80}")
        self.name = name or f"memlong-{secrets.token_hex(8)}"
        self._user: weakref.ref[object] | None = None
        self._objects, self._notes = objects, dict(notes or {})
        self._is_noted = False
        self._leftover: set[str] = set()
        self._workers = Workers(self.readers)
        self._owner = os.getpid()
        if not lasting:
            weakref.finalize(self, unless_forked(_remove, objects, self.name))

    def claim(self, user: object) -> None:
        """Register a store as the only user; InvalidArgumentError if there is another, as both would write the same."""
        if self._user is not None and self._user() not in (None, user):
            raise InvalidArgumentError(
                "objects must be a folder that no other store uses, got one that is in use"
            )
        self._user = weakref.ref(user)

    @property
    def place(self) -> str:
        """The place of the objects, without secrets."""
        return self._objects.place

    def write(self, ids: Sequence[int], kind: BlockKind, records: Sequence[torch.Tensor]) -> None:
        """Write blocks; on an error, those already written are removed."""
        self.require_owner()

        def write(row: int) -> None:
            content = encode(self._bank, ids[row], kind, records[row])
            self._objects.write(self._block(ids[row]), content)

        try:
            if not self._is_noted:
                self.note({})
            self._workers.each(write, range(len(ids)))
        except BaseException as error:
            self.delete(ids)
            if isinstance(error, OSError) and not isinstance(error, StorageError):
                raise self._unusable("written", error) from None
            raise
        self._leftover.difference_update(map(self._block, ids))  # they belong to these chunks now

    def read_into(self, ids: Sequence[int], kind: BlockKind, records: Sequence[torch.Tensor]) -> None:
        """Read records into tensors, each uint8 [bytes] on the CPU.

        Raises
        ------
        LostChunksError
            If objects are missing or damaged; it names their chunks.
        StorageError
            If the place cannot be read.
        """
        lost: dict[int, str] = {}

        def read(row: int) -> None:
            try:
                content = self._objects.read(self._block(ids[row]), len(records[row]) + _HEADER)
                decode(content, self._bank, ids[row], kind, records[row])
            except FileNotFoundError:
                lost[ids[row]] = "its object is missing"
            except ValueError as error:
                lost[ids[row]] = str(error)

        try:
            self._workers.each(read, range(len(ids)))
            if lost:
                with suppress(ValueError):  # damaged notes: the place is there
                    self._objects.read(self._path(_NOTES), _MOST_NOTES)
        except OSError as error:
            raise self._unusable("read", error) from None  # the cause may show credentials
        if lost:
            raise LostChunksError(lost)

    def delete(self, ids: Iterable[int]) -> None:
        """Remove objects."""
        self._leftover.update(map(self._block, ids))  # until they are gone
        with suppress(OSError):
            self._objects.delete(sorted(self._leftover))
            self._leftover.clear()

    def drop(self) -> None:
        """Remove the folder; StorageError if that fails."""
        self.require_owner()
        self._leftover.clear()
        self._is_noted = False
        try:
            self._objects.delete_folder(self.name)
        except OSError as error:
            raise self._unusable("removed", error) from None  # the cause may show credentials

    def ids(self) -> list[int]:
        """Return the ids of all chunks in the folder, ascending, whichever process wrote them."""
        names = (each.name for each in self._objects.list(self.name))
        return sorted(chunk_id for chunk_id in map(chunk_id_of, names) if chunk_id is not None)

    def kind(self, ids: Iterable[int]) -> BlockKind | None:
        """Return the kind of the first readable block; None if there is none."""
        for chunk_id in ids:
            try:
                return kind_of(self._objects.read(self._block(chunk_id), _MOST_BLOCK), self._bank, chunk_id)
            except (FileNotFoundError, ValueError):  # lost; the next one may not be
                continue
            except OSError as error:
                raise self._unusable("read", error) from None
        return None

    def forget_notes(self) -> None:
        """Write the notes again with the next block, as they may have been removed with the folder."""
        self._is_noted = False

    def note(self, more: Mapping[str, Any]) -> None:
        """Add to the notes, and write them."""
        self.require_owner()
        notes = {**self._notes, **more}
        try:
            self._objects.write(self._path(_NOTES), json.dumps(notes).encode())
        except StorageError:
            raise
        except OSError as error:
            raise self._unusable("written", error) from None  # the cause may show credentials
        self._notes, self._is_noted = notes, True

    def notes(self) -> dict[str, Any]:
        """Return the stored notes; empty if there are none."""
        try:
            notes = json.loads(self._objects.read(self._path(_NOTES), _MOST_NOTES))
            if not isinstance(notes, dict):
                raise ValueError(f"it holds a {type(notes).__name__}, not an object")
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise self._unusable("read", error) from None  # the cause may show credentials
        except (ValueError, RecursionError) as error:
            raise self.damaged(str(error)) from error
        self._is_noted = True
        return notes

    def damaged(self, why: str) -> StorageError:
        """Return the error for damaged notes."""
        return StorageError(
            f"{self._path(_NOTES)!r} in {self.place!r} is damaged ({why}). Restore it, or start a new memory"
        )

    def require_owner(self) -> None:
        """Raise StorageError in a forked process, as both would write the same objects."""
        if os.getpid() != self._owner:
            raise StorageError(
                f"The objects in {self.place!r} belong to process {self._owner}, from which this one was forked: "
                "both would write the same. Create the bank in this process, or start processes with the method 'spawn'"
            )

    @property
    def _bank(self) -> str:
        return self.name.rpartition("/")[2]

    def _path(self, name: str) -> str:
        return f"{self.name}/{name}"

    def _block(self, chunk_id: int) -> str:
        return self._path(f"{chunk_id}.kv")

    def _unusable(self, what: str, error: OSError) -> StorageError:
        return StorageError(
            f"Keys and values cannot be {what} in {self.place!r}: {without_credentials(str(error))}. Is the place "
            "there, and may this process use it? Otherwise name another place"
        )


def _is_name(name: object) -> bool:
    return isinstance(name, str) and all(
        re.fullmatch(r"[\w.-]+", part) and part not in (".", "..") for part in name.split("/")
    )


def chunk_id_of(name: str) -> int | None:
    """Return the id of the chunk in an object of this name; None for other objects."""
    found = _BLOCK.fullmatch(name.rpartition("/")[2])
    return None if found is None else int(found[1])


def _remove(objects: Objects, folder: str) -> None:
    with suppress(Exception):  # a finalizer: at interpreter exit, threads cannot be started
        objects.delete_folder(folder)
