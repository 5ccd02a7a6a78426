"""A bank as a value of its own, for copy and pickle: a snapshot whose files are in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Protocol

from memlong.bank.snapshot.locking import LOCK
from memlong.bank.snapshot.manifest import BankRecord
from memlong.bank.snapshot.writer import SnapshotWriter

if TYPE_CHECKING:
    from memlong.bank.base import MemoryBank
    from memlong.bank.store.codec import StorageDtype


class Written(Protocol):
    """What was written of a bank."""

    @property
    def record(self) -> BankRecord:
        """What the manifest says of it."""


class Whole(Protocol):
    """A bank, for this module."""

    def write_snapshot(self, writer: SnapshotWriter) -> Written:
        """Write what a state of a folder needs of it."""


def packed(bank: Whole) -> dict[str, bytes]:
    """Return the files of a snapshot of a bank, by name; what is known of its own folder stays as it is."""
    with TemporaryDirectory(prefix="memlong-") as name:
        folder = Path(name)
        with SnapshotWriter(folder, "bank") as writer:
            writer.commit([bank.write_snapshot(writer).record])
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != LOCK}


def unpacked(
    kind: type, files: Mapping[str, bytes], options: Mapping[str, Any], dtype: StorageDtype | None
) -> MemoryBank:
    """Make a bank of a snapshot's files, with keys and values in memory. For one's own files alone."""
    from memlong.bank.base import bank_of  # which comes to this module for its own pickling
    from memlong.bank.store.tiers import TieredStore

    store: Mapping[str, Any] = {} if dtype is None else {"store": TieredStore(host="all", dtype=dtype)}

    with TemporaryDirectory(prefix="memlong-") as folder:
        for name, content in files.items():
            Path(folder, name).write_bytes(content)
        return bank_of(kind).load(Path(folder), trust_index=True, **options, **store)
