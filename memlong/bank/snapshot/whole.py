"""A bank as a value of its own, for copy and pickle: a snapshot whose files are in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, Self

from memlong.bank.snapshot.locking import LOCK
from memlong.bank.snapshot.manifest import BankRecord
from memlong.bank.snapshot.writer import SnapshotWriter


class Written(Protocol):
    """What was written of a bank."""

    @property
    def record(self) -> BankRecord:
        """What the manifest says of it."""


class Whole(Protocol):
    """A bank, for this module."""

    def write_snapshot(self, writer: SnapshotWriter) -> Written:
        """Write what a state of a folder needs of it."""

    @classmethod
    def load(cls, path: Path, *, trust_index: bool, **options: Any) -> Self:
        """Make one of what was written."""


def packed(bank: Whole) -> dict[str, bytes]:
    """Return the files of a snapshot of a bank, by name; what is known of its own folder stays as it is."""
    with TemporaryDirectory(prefix="memlong-") as name:
        folder = Path(name)
        with SnapshotWriter(folder, "bank") as writer:
            writer.commit([bank.write_snapshot(writer).record])
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != LOCK}


def unpacked(kind: type[Whole], files: Mapping[str, bytes], options: Mapping[str, Any]) -> Whole:
    """Make a bank of its files, with keys and values in memory. Like all of pickle, for files of one's own alone."""
    with TemporaryDirectory(prefix="memlong-") as folder:
        for name, content in files.items():
            Path(folder, name).write_bytes(content)
        return kind.load(Path(folder), trust_index=True, **options)
