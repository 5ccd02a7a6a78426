"""Copy and pickle of a bank: a snapshot whose files are in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from memlong.bank.snapshot.locking import LOCK
from memlong.bank.snapshot.saving import Bank, write_bank
from memlong.bank.snapshot.writer import SnapshotWriter


def packed(bank: Bank) -> dict[str, bytes]:
    """Return the files of a snapshot of a bank, by name; what it knows of its own folder is unchanged."""
    with TemporaryDirectory(prefix="memlong-") as name:
        folder = Path(name)
        with SnapshotWriter(folder, "bank") as writer:
            writer.commit([write_bank(bank, writer).record])
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != LOCK}


@contextmanager
def unpacked(files: Mapping[str, bytes]) -> Iterator[Path]:
    """Provide a folder with the files that `packed` returned."""
    with TemporaryDirectory(prefix="memlong-") as folder:
        for name, content in files.items():
            Path(folder, name).write_bytes(content)
        yield Path(folder)
