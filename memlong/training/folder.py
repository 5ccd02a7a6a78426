"""The folder of a run: what it holds of memlong's, and what a run would not respect."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from memlong.bank.snapshot.locking import FolderLock
from memlong.decoder.persistence.adapter_files import ADAPTER, ADAPTER_SETTINGS
from memlong.decoder.persistence.json_file import read_json
from memlong.decoder.persistence.pretrained import GATES, MAPS, SETTINGS
from memlong.errors import InvalidArgumentError, StorageError

CURVE, PICTURE = "curve.jsonl", "curve.png"
"""What a run leaves in its folder, beside the decoder."""

TENSORS, FACTS = "training.safetensors", "training.json"
"""Files of a checkpoint."""

FORMATS = "memlong-checkpoint-"
"""How what a checkpoint says of its format begins."""

MOST_FACTS = 256 << 20
"""Bytes of a checkpoint's JSON, which has a line for each tensor and more."""

_MODEL, _GENERATION = "config.json", "generation_config.json"
_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
_OURS = re.compile(rf"{re.escape(TENSORS)}|{re.escape(FACTS)}|\.tmp\w+")  # the last as safetensors writes it
_UNFINISHED = re.compile(r"\.checkpoint-[0-9]+\.(writing|removing)")


def lock(folder: Path) -> FolderLock:
    """Return the lock of a run: two in one folder would mix their curves and remove each other's checkpoints."""
    return FolderLock(folder, "training.lock")


def check_folder(folder: Path, *, resume: bool) -> None:
    """Refuse a folder in which a run would overwrite, or mistake for its own, what is not.

    Parameters
    ----------
    folder
        Of the run, made or not.
    resume
        Whether the run goes on from what is there.

    Raises
    ------
    InvalidArgumentError
        If something has the name of a checkpoint and is none; or a new run would overwrite a checkpoint, a curve, an
        adapter or a model.
    StorageError
        If the folder cannot be made, read or written, or another run is at work in it.
    """
    there = folder
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "may not be written" if there.is_dir() else "is no folder"
        raise StorageError(f"The folder {str(folder)!r} cannot be made: {str(there)!r} {why}. Name another.")
    if there != folder:
        return
    try:
        for path in sorted(folder.iterdir()):
            if why := _strange(path):
                raise InvalidArgumentError(
                    f"{str(path)!r} {why}, but it has the name of a checkpoint, which a run writes and removes: "
                    "move it away, or name another folder."
                )
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(
            f"The folder {str(folder)!r} cannot be read: {error.strerror}. Name another."
        ) from error
    if not resume:
        _check_new(folder)


def _check_new(folder: Path) -> None:
    if checkpoints(folder):
        raise InvalidArgumentError(
            f"The folder {str(folder)!r} holds the checkpoint of a run that has not ended: resume it, remove "
            "the checkpoint, or name another folder."
        )
    for name in (SETTINGS, CURVE, PICTURE, MAPS, GATES, ADAPTER_SETTINGS, ADAPTER, _MODEL, _GENERATION):
        path = folder / name
        if path.is_symlink() or (path.exists() and not (path.is_file() and not path.stat().st_size)):
            what = "a model, which an adapter beside it would change" if name == _MODEL else "of another run"
            raise InvalidArgumentError(
                f"{str(path)!r} is there already, {what}, and a new run does not overwrite it: remove it, or name "
                "another folder."
            )


def holds_decoder(folder: Path, training: dict[str, Any], memory: dict[str, Any]) -> bool:
    """Whether a run of these settings has ended in a folder, and its decoder is there."""
    path = folder / SETTINGS
    if checkpoints(folder) or not path.is_file():
        return False
    try:
        facts = read_json(path)
        theirs = [dict(facts["training"]), dict(facts["memory"])]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    ours = json.loads(json.dumps([training, memory], default=str))
    for each in (*theirs, *ours):
        for name in ("checkpoint_every", "store", "maps", "gates"):  # maps and gates are in the folder itself
            each.pop(name, None)
    return bool(theirs == ours)


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, the oldest first."""
    found = [
        (int(match[1]), path)
        for path in folder.iterdir()
        if (match := _NAME.fullmatch(path.name)) and not _strange(path)
    ]
    return [path for _, path in sorted(found)]


def remove_checkpoints(folder: Path) -> None:
    """Remove what only a run that goes on needs."""
    for path in checkpoints(folder):
        remove_checkpoint(path)


def clear_unfinished(folder: Path) -> None:
    """Remove checkpoints that were being written, or removed, when their process ended."""
    for path in folder.iterdir():
        if _UNFINISHED.fullmatch(path.name):
            clear(path)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint at once, and nothing that another program has put there."""
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        if read_json(path / FACTS, MOST_FACTS)["format"].startswith(FORMATS):
            gone = path.with_name(f".{path.name}.removing")
            path.rename(gone)
            clear(gone)


def clear(path: Path) -> None:
    """Remove what memlong writes into a checkpoint, and the folder if there is nothing else."""
    if path.is_dir() and not path.is_symlink():
        with suppress(OSError):
            for each in path.iterdir():
                if _OURS.fullmatch(each.name):
                    each.unlink()
            path.rmdir()


def _strange(path: Path) -> str:
    """Say why what has a checkpoint's name is none of memlong's; nothing if it is one, or has another name."""
    if not (_NAME.fullmatch(path.name) or _UNFINISHED.fullmatch(path.name)):
        return ""
    if path.is_symlink():
        return "is a link, which could lead anywhere"
    if not path.is_dir():
        return "is no folder"
    names = {each.name for each in path.iterdir()}
    is_ours = all(map(_OURS.fullmatch, names)) if path.name.startswith(".") else FACTS in names
    return "" if is_ours else "holds files of another program"
