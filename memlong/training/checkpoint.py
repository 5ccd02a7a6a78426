"""Checkpoints of a training run: a folder with safetensors and JSON, written under another name and then renamed."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from memlong.bank.snapshot.files import oddity, sync_folder
from memlong.decoder.persistence.json_file import read_json
from memlong.errors import InvalidArgumentError, StorageError
from memlong.training.folder import FACTS, FORMATS, MOST_FACTS, TENSORS, checkpoints, clear, remove_checkpoint

_FORMAT = f"{FORMATS}6"
_STATE = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state per parameter
_RANDOM = ("random.torch", "random.cuda")
_WIDEST_RANDOM = 1 << 16
_DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError)


@dataclass
class Progress:
    """The progress of a run.

    Attributes
    ----------
    step
        Optimizer steps done.
    episodes
        Episodes read.
    tokens
        Tokens read.
    seconds
        Wall time spent.
    """

    step: int = 0
    episodes: int = 0
    tokens: int = 0
    seconds: float = 0.0


def save_checkpoint(
    folder: Path,
    progress: Progress,
    parameters: dict[str, nn.Parameter],
    optimizer: Optimizer,
    made_of: dict[str, Any],
) -> None:
    """Write ``checkpoint-<step>`` into a folder, and remove older checkpoints.

    Parameters
    ----------
    folder
        Folder of the run.
    progress
        Progress of the run.
    parameters
        Trainable parameters by name, in the optimizer's order. The learning rate follows from the step.
    optimizer
        The optimizer, whose state is saved, as is that of torch's global random generators.
    made_of
        Facts that must match for a run to resume from this checkpoint.

    Raises
    ------
    StorageError
        If it cannot be written; earlier checkpoints are kept.
    """
    names = list(parameters)
    tensors = {f"parameter.{name}": parameter.detach() for name, parameter in parameters.items()}
    for index, entries in optimizer.state_dict()["state"].items():
        for name, entry in entries.items():
            tensors[f"optimizer.{names[index]}.{name}"] = torch.as_tensor(entry)
    tensors["random.torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    target = folder / f"checkpoint-{progress.step}"
    partial = folder / f".{target.name}.writing"
    facts = {
        "format": _FORMAT,
        "progress": vars(progress),
        "made_of": made_of,
        "shapes": {name: list(tensor.shape) for name, tensor in tensors.items()},
    }
    try:
        partial.mkdir()
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial / TENSORS)
        facts["sha256"] = _digest(partial / TENSORS)
        (partial / FACTS).write_text(json.dumps(facts, indent=2, default=str) + "\n", encoding="utf-8")
        for file in partial.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        sync_folder(partial)
        if os.path.lexists(target):
            raise FileExistsError(0, "something else has that name")
        partial.rename(target)
        sync_folder(folder)
        for other in checkpoints(folder):
            if other != target:
                remove_checkpoint(other)
    except BaseException as error:
        clear(partial)
        if not isinstance(error, OSError | SafetensorError):
            raise
        why = getattr(error, "strerror", None) or error
        raise StorageError(
            f"Cannot write the checkpoint {str(target)!r}: {why}. The previous checkpoint, if any, is intact. Free "
            "some space or make the folder writable, then resume"
        ) from error


def load_checkpoint(
    folder: Path,
    parameters: dict[str, nn.Parameter],
    optimizer: Optimizer,
    made_of: dict[str, Any],
) -> Progress:
    """Restore a run from its latest checkpoint.

    Raises
    ------
    InvalidArgumentError
        If there is no checkpoint, or it is damaged or from a different run.
    """
    found = checkpoints(folder)
    if not found:
        raise InvalidArgumentError(
            f"The folder {str(folder)!r} has no checkpoint to resume from: give the folder of a run that has one, or "
            "start without resuming"
        )
    latest = found[-1]
    try:
        facts = read_json(latest / FACTS, MOST_FACTS)
        _check_kind(latest, facts, made_of)
        progress = _progress(latest, facts["progress"])
        tensors = _read(latest / TENSORS, facts, parameters)
        _check_values(tensors, progress)
        torch.Generator().set_state(tensors["random.torch"])  # raises if it is none
    except InvalidArgumentError:
        raise
    except (*_DAMAGE, SafetensorError) as error:
        raise InvalidArgumentError(
            f"Cannot read the checkpoint {str(latest)!r}: {error!r}. Remove it, and resume from an older one or start "
            "over"
        ) from error
    _restore(tensors, parameters, optimizer)
    torch.set_rng_state(tensors["random.torch"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
    return progress


def _check_kind(latest: Path, facts: dict[str, Any], made_of: dict[str, Any]) -> None:
    if facts["format"] != _FORMAT:
        raise InvalidArgumentError(
            f"The checkpoint {str(latest)!r} must have the format {_FORMAT!r}, got {facts['format']!r}: resume with "
            "the version of memlong that wrote it, or start over in another folder"
        )
    for name, ours in json.loads(json.dumps(made_of, default=str)).items():
        if name.startswith("model.config.") and name not in facts["made_of"]:
            continue  # new releases of transformers add fields
        theirs = facts["made_of"].get(name)
        if ours != theirs:
            raise InvalidArgumentError(
                f"{name} must be {theirs!r}, as in the checkpoint {str(latest)!r}, got {ours!r}: resume with the same "
                "model, settings and text, or start over in another folder"
            )


def _progress(latest: Path, facts: dict[str, Any]) -> Progress:
    progress = Progress(**facts)
    counts = (progress.step, progress.episodes, progress.tokens)
    seconds = progress.seconds
    if not all(type(each) is int and each >= 0 for each in counts) or not (
        isfinite(seconds) and seconds >= 0
    ):
        raise ValueError(f"progress is {facts}")
    if latest.name != f"checkpoint-{progress.step}":
        raise ValueError(f"it is from step {progress.step}")
    return progress


def _read(path: Path, facts: dict[str, Any], parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return the tensors of a file, after checking its hash and the shapes of its tensors."""
    if odd := oddity(path):
        raise ValueError(f"its {path.name} {odd}")
    if facts["sha256"] != _digest(path):
        raise ValueError(f"its {path.name} does not match the hash in its {FACTS}")
    with safe_open(path, framework="pt") as file:
        found = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a mapping
        _check_shapes(found, facts["shapes"], parameters)
        return {name: file.get_tensor(name) for name in found}


def _check_shapes(
    found: dict[str, list[int]], written: dict[str, list[int]], parameters: dict[str, nn.Parameter]
) -> None:
    wanted = {name: found[name] for name in _RANDOM if name in found}
    for name, parameter in parameters.items():
        shape = list(parameter.shape)
        wanted[f"parameter.{name}"] = shape
        if any(
            f"optimizer.{name}.{entry}" in found for entry in _STATE
        ):  # AdamW has no state for parameters without a gradient so far
            wanted |= {f"optimizer.{name}.{entry}": [] if entry == "step" else shape for entry in _STATE}
    for other in (written, wanted):
        if odd := sorted(name for name in found.keys() | other.keys() if found.get(name) != other.get(name)):
            raise ValueError(
                f"{len(odd)} tensors are missing, unknown or of the wrong shape, such as {odd[0]}"
            )
    if any(len(shape) != 1 or shape[0] > _WIDEST_RANDOM for name, shape in found.items() if name in _RANDOM):
        raise ValueError("its random states have the wrong shape")


def _check_values(tensors: dict[str, Tensor], progress: Progress) -> None:
    for name, tensor in tensors.items():
        entry = name.rpartition(".")[2] if name.startswith("optimizer.") else ""
        least, most = {"step": (1, progress.step), "exp_avg_sq": (0, None)}.get(entry, (None, None))
        if (
            not bool(tensor.isfinite().all())
            or (least is not None and bool((tensor < least).any()))
            or (most is not None and bool((tensor > most).any()))
        ):
            raise ValueError(f"{name} has values that training cannot produce")


def _restore(tensors: dict[str, Tensor], parameters: dict[str, nn.Parameter], optimizer: Optimizer) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"parameter.{name}"])
    state = {
        index: {entry: tensors[f"optimizer.{name}.{entry}"] for entry in _STATE}
        for index, name in enumerate(parameters)
        if f"optimizer.{name}.step" in tensors
    }
    # The optimizer's settings are the run's, which were compared; the learning rate is set at each step.
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
