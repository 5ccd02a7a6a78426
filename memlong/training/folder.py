"""The folder of a training run: which files are memlong's, and which a run must not touch."""

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
from memlong.decoder.persistence.pretrained import GATES, MAPS, NULL_CHUNK, QUERY_MAP, SETTINGS
from memlong.errors import InvalidArgumentError, StorageError

CURVE, PICTURE = "curve.jsonl", "curve.png"
"""Files that a run leaves in its folder, in addition to the decoder."""

TENSORS, FACTS = "training.safetensors", "training.json"
"""Files of a checkpoint."""

FORMATS = "memlong-checkpoint-"
"""Prefix of a checkpoint's format name."""

MOST_FACTS = 256 << 20
"""Maximum size of a checkpoint's JSON in bytes; it has at least a line per tensor."""

UNSAID = ("adapter_for", "all")
"""A setting of a memory, and what it is where a run does not say."""

_MODEL, _GENERATION = "config.json", "generation_config.json"
_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
_OURS = re.compile(
    rf"{re.escape(TENSORS)}|{re.escape(FACTS)}|\.tmp\w+"
)  # the last are safetensors' temporary files
_UNFINISHED = re.compile(r"\.checkpoint-[0-9]+\.(writing|removing)")


def lock(folder: Path) -> FolderLock:
    """Return the folder's lock: two runs in one folder would mix their curves and remove each other's checkpoints."""
    return FolderLock(folder, "training.lock")


def check_folder(folder: Path, *, resume: bool) -> None:
    """Reject a folder in which a run would overwrite files that are not its own.

    Parameters
    ----------
    folder
        Folder of the run, which may not exist yet.
    resume
        Whether the run resumes from a checkpoint in it.

    Raises
    ------
    InvalidArgumentError
        If something that is not a checkpoint has the name of one, or a new run would overwrite a checkpoint, a curve,
        an adapter or a model.
    StorageError
        If the folder cannot be created, read or written, or another run uses it.
    """
    there = folder
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "is not writable" if there.is_dir() else "is not a folder"
        raise StorageError(
            f"Cannot create the folder {str(folder)!r}: {str(there)!r} {why}. Give another folder"
        )
    if there != folder:
        return
    try:
        for path in sorted(folder.iterdir()):
            if why := _strange(path):
                raise InvalidArgumentError(
                    f"{str(path)!r} {why}, but it has the name of a checkpoint, which a run would overwrite or remove: "
                    "move it, or give another folder"
                )
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(
            f"Cannot read the folder {str(folder)!r}: {error.strerror}. Give another folder"
        ) from error
    if not resume:
        _check_new(folder)


def _check_new(folder: Path) -> None:
    if checkpoints(folder):
        raise InvalidArgumentError(
            f"The folder {str(folder)!r} has the checkpoint of an unfinished run: resume it, remove the checkpoint, or "
            "give another folder"
        )
    ours = (SETTINGS, CURVE, PICTURE, MAPS, GATES, NULL_CHUNK, QUERY_MAP, ADAPTER_SETTINGS, ADAPTER)
    for name in (*ours, _MODEL, _GENERATION):
        path = folder / name
        if path.is_symlink() or (path.exists() and not (path.is_file() and not path.stat().st_size)):
            what = (
                "a model, which an adapter in the same folder would modify"
                if name == _MODEL
                else "from another run"
            )
            raise InvalidArgumentError(
                f"{str(path)!r} already exists ({what}), and a new run does not overwrite it: remove it, or give "
                "another folder"
            )


def holds_decoder(folder: Path, training: dict[str, Any], memory: dict[str, Any]) -> bool:
    """Return whether the folder has the trained decoder of a complete run with these settings."""
    path = folder / SETTINGS
    if checkpoints(folder) or not path.is_file():
        return False
    try:
        facts = read_json(path)
        theirs = [dict(facts["training"]), dict(facts["memory"])]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    ours = json.loads(json.dumps([training, memory], default=str))
    for of_training, of_memory in (theirs, ours):
        for name in ("checkpoint_every", "shard"):
            of_training.pop(name, None)
        for name in (
            "store",
            "maps",
            "gates",
            "null_chunk",
            "query_map",
        ):  # all but the first are in the folder itself
            of_memory.pop(name, None)
        if ("adapter_for", of_memory.get("adapter_for")) == UNSAID:
            del of_memory["adapter_for"]
    return bool(theirs == ours)


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first."""
    found = [
        (int(match[1]), path)
        for path in folder.iterdir()
        if (match := _NAME.fullmatch(path.name)) and not _strange(path)
    ]
    return [path for _, path in sorted(found)]


def remove_checkpoints(folder: Path) -> None:
    """Remove all checkpoints of a folder."""
    for path in checkpoints(folder):
        remove_checkpoint(path)


def clear_unfinished(folder: Path) -> None:
    """Remove checkpoints whose writing or removal was interrupted."""
    for path in folder.iterdir():
        if _UNFINISHED.fullmatch(path.name):
            clear(path)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint atomically, but no files of other programs."""
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        if read_json(path / FACTS, MOST_FACTS)["format"].startswith(FORMATS):
            gone = path.with_name(f".{path.name}.removing")
            path.rename(gone)
            clear(gone)


def clear(path: Path) -> None:
    """Remove memlong's files from a checkpoint folder, and the folder if it is then empty."""
    if path.is_dir() and not path.is_symlink():
        with suppress(OSError):
            for each in path.iterdir():
                if _OURS.fullmatch(each.name):
                    each.unlink()
            path.rmdir()


def _strange(path: Path) -> str:
    """Return why a path with a checkpoint's name is not one of memlong's; empty if it is, or has another name."""
    if not (_NAME.fullmatch(path.name) or _UNFINISHED.fullmatch(path.name)):
        return ""
    if path.is_symlink():
        return "is a link, which could point anywhere"
    if not path.is_dir():
        return "is not a folder"
    names = {each.name for each in path.iterdir()}
    is_ours = all(map(_OURS.fullmatch, names)) if path.name.startswith(".") else FACTS in names
    return "" if is_ours else "has files of another program"
