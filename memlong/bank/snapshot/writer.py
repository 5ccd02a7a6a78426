"""SnapshotWriter: writes a new state next to the current one in a folder, and switches to it atomically."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from memlong.bank.snapshot.fields import FILE_NAME
from memlong.bank.snapshot.files import FileRecord, NewFile, sync_folder, unwritable
from memlong.bank.snapshot.locking import LOCK, FolderLock
from memlong.bank.snapshot.manifest import (
    MANIFEST,
    BankRecord,
    CorpusRecord,
    ExtraRecord,
    Kind,
    Manifest,
    has_manifest,
    parse_manifest,
    read_manifest,
)
from memlong.errors import InvalidArgumentError, SnapshotError
from memlong.versions import versions

_NEW_MANIFEST = f"{MANIFEST}.new"


class SnapshotWriter:
    """Write a state into a folder, in a `with` block, as its only writer.

    The manifest decides which state is current, and is written last: first the new files are synced to disk, then the
    folder that names them, then the new manifest, which replaces the old one in one step. So the folder holds the old
    state or the new one, whenever the process ends or the power fails. Files that no manifest names are removed after
    that, and before the next state is written.

    Parameters
    ----------
    folder : Path
        Made if it does not exist; a folder that holds other things is refused.
    kind : "bank", "decoder" or "corpus"
        What is saved.

    Raises
    ------
    SnapshotError
        On entering, if something else is in the folder, another process writes there, or nothing can be written.

    Attributes
    ----------
    current : Manifest or None
        What the folder holds.
    token : str
        Identifies the new state.
    """

    def __init__(self, folder: Path, kind: Kind) -> None:
        self._folder, self._kind = folder, kind
        self._held = ExitStack()
        self.current: Manifest | None = None
        self.token = secrets.token_hex(16)
        self._generation, self._number = 1, 0
        self._is_committed = False
        self._around: set[Path] = set()

    def __enter__(self) -> Self:
        try:
            absent = [each for each in (self._folder, *self._folder.parents) if not each.exists()]
            self._folder.mkdir(parents=True, exist_ok=True)
            self._around = {each.resolve().parent for each in (self._folder, *absent)}
        except OSError as error:
            raise unwritable(self._folder, error) from error
        _check_strangers(self._folder)
        with ExitStack() as stack:
            stack.enter_context(FolderLock(self._folder))
            if has_manifest(self._folder):
                self.current = read_manifest(self._folder)
                self._generation = self.current.generation + 1
            _check_kind(self._folder, self.current, self._kind)
            self._remove_all_but(self.current)
            self._held = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._held, suppress(SnapshotError):
            if not self._is_committed:  # the manifest decides, wherever an interrupt came
                self._remove_all_but(read_manifest(self._folder) if has_manifest(self._folder) else None)

    @property
    def folder(self) -> Path:
        """Where it is written."""
        return self._folder

    @contextmanager
    def new_file(self, kind: str, ending: str) -> Iterator[NewFile]:
        """Write a new file; see `NewFile`."""
        self._number += 1
        with NewFile(self._folder / f"{kind}-{self._generation}-{self._number}.{ending}") as file:
            yield file

    def write(self, kind: str, content: Any, ending: str = "safetensors") -> FileRecord:
        """Write a new file at once."""
        with self.new_file(kind, ending) as file:
            file.write(content)
        return file.record

    def commit(
        self,
        banks: Sequence[BankRecord],
        extra: ExtraRecord | None = None,
        corpus: CorpusRecord | None = None,
    ) -> Manifest:
        """Make what was written the current state, and remove files that it does not need."""
        manifest = Manifest(
            self._kind, self.token, self._generation, dict(versions()), tuple(banks), extra, corpus
        )
        path, new = self._folder / MANIFEST, self._folder / _NEW_MANIFEST
        content = _readable(path, manifest)
        sync_folder(self._folder)
        if self.current is None:
            for folder in self._around:
                sync_folder(folder)
        with NewFile(new) as file:
            file.write(content)
        try:
            new.replace(path)
        except OSError as error:
            raise unwritable(path, error) from error
        try:
            self._remove_all_but(manifest)
        except SnapshotError as error:
            self._is_committed = True  # remove nothing: a disk that failed once may later report success
            raise SnapshotError(
                f"{str(path)!r} names what was saved now, but the disk has not confirmed that: {error.__cause__}. What "
                "was saved before is still there as well, in case the power fails. Check the disk, and save again"
            ) from error
        self._is_committed = True
        return manifest

    def _remove_all_but(self, manifest: Manifest | None) -> None:
        sync_folder(self._folder)  # or, after a power failure, the old manifest might name files removed here
        needed = {file.name for file in manifest.files} if manifest else set()
        for name in _names(self._folder):
            if name not in needed and (FILE_NAME.fullmatch(name) or name == _NEW_MANIFEST):
                with suppress(OSError):  # open elsewhere, on Windows; the next state tries again
                    (self._folder / name).unlink()


def check_place(folder: Path, kind: Kind) -> None:
    """Check that a state of this kind can be saved in a folder, before the long work; nothing is made there.

    Raises
    ------
    SnapshotError
        If something else is in the folder, or it, or the folder that it would be made in, cannot be written.
    """
    try:
        there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    except OSError as error:  # such as a name that is too long
        raise unwritable(folder, error) from error
    if not there.is_dir():
        raise unwritable(folder, NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)))
    if not os.access(there, os.W_OK):
        raise unwritable(folder, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    if there == folder:
        _check_strangers(folder)
        _check_kind(folder, read_manifest(folder) if has_manifest(folder) else None, kind)


def _check_strangers(folder: Path) -> None:
    names = _names(folder)
    if has_manifest(folder):  # checked last: a first save may be under way
        return
    own = {LOCK, _NEW_MANIFEST}
    was_cut_off = not own.isdisjoint(names)  # a save makes its lock first, and removes it last
    for name in names:
        if name not in own and not (was_cut_off and FILE_NAME.fullmatch(name)):
            raise SnapshotError(
                f"{str(folder / name)!r} is not part of a snapshot: a folder that holds other things is left alone. "
                "Name a new folder"
            )


def _check_kind(folder: Path, current: Manifest | None, kind: Kind) -> None:
    if current is not None and current.kind != kind:
        raise SnapshotError(
            f"{str(folder)!r} holds the snapshot of a {current.kind}, and this is one of a {kind}: name another "
            "folder, or remove that one"
        )


def _readable(path: Path, manifest: Manifest) -> bytes:
    """Return the manifest's content, checked to be readable."""
    try:
        content = manifest.to_bytes()
        parse_manifest(path, content)
    except (SnapshotError, ValueError) as error:
        why = str(error).partition(": the snapshot is damaged")[0]
        raise InvalidArgumentError(
            f"this cannot be saved, as it could not be loaded: {why}. What was saved before is as it was"
        ) from error
    return content


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))  # noqa: PTH208 - names, not paths
    except OSError as error:
        raise unwritable(folder, error) from error
