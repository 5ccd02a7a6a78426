"""Where a training run stands, in a folder: safetensors and JSON, written beside and renamed into place."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from memlong.errors import InvalidArgumentError

_FORMAT = "memlong-checkpoint-3"
_NAME = re.compile(r"checkpoint-(\d+)")
_DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError)


@dataclass
class Progress:
    """How far a run is.

    Attributes
    ----------
    step
        Steps of the optimizer made.
    episodes
        Episodes read.
    tokens, seconds
        Read and spent.
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
    generator: torch.Generator,
    made_of: dict[str, Any],
) -> None:
    """Write ``checkpoint-<step>`` into a folder, and remove older ones.

    Parameters
    ----------
    folder
        Of the run.
    progress
        Where it stands.
    parameters
        What learns, by name, in the optimizer's order. The learning rate follows from the step.
    optimizer
        Its state is written tensor by tensor.
    generator
        Of random chunks. The state of torch's own is written as well.
    made_of
        What a run that goes on must have in common with this one.
    """
    state = optimizer.state_dict()
    tensors = {f"parameter.{name}": parameter.detach() for name, parameter in parameters.items()}
    for index, entries in state["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(entry) for name, entry in entries.items()}
    tensors |= {"random.chunks": generator.get_state(), "random.torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    facts = {
        "format": _FORMAT,
        "progress": vars(progress),
        "groups": state["param_groups"],
        "made_of": made_of,
        "shapes": {name: list(tensor.shape) for name, tensor in tensors.items()},
    }
    target = folder / f"checkpoint-{progress.step}"
    beside = folder / f".{target.name}.writing"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    save_file(
        {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
        beside / "training.safetensors",
    )
    (beside / "training.json").write_text(json.dumps(facts, indent=2, default=str) + "\n", encoding="utf-8")
    for file in beside.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())
    if target.exists():
        shutil.rmtree(target)
    beside.rename(target)
    for other in checkpoints(folder):
        if other != target:
            shutil.rmtree(other)


def load_checkpoint(
    folder: Path,
    parameters: dict[str, nn.Parameter],
    optimizer: Optimizer,
    generator: torch.Generator,
    made_of: dict[str, Any],
) -> Progress:
    """Put a run where its latest checkpoint was written.

    Raises
    ------
    InvalidArgumentError
        If there is no checkpoint, it is damaged, or it is of a run of another kind.
    """
    found = checkpoints(folder)
    if not found:
        raise InvalidArgumentError(
            f"The folder {str(folder)!r} holds no checkpoint to go on from. Name the folder of a run that has written "
            "one, or begin anew without resuming."
        )
    latest = found[-1]
    try:
        facts = json.loads((latest / "training.json").read_text(encoding="utf-8"))
        _check_kind(latest, facts, made_of)
        tensors = load_file(latest / "training.safetensors")
        progress = _progress(latest, facts["progress"])
        _check_shapes(tensors, facts["shapes"], parameters)
        _restore(tensors, facts["groups"], parameters, optimizer)
        generator.set_state(tensors["random.chunks"])
        torch.set_rng_state(tensors["random.torch"])
        if "random.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["random.cuda"])
    except InvalidArgumentError:
        raise
    except (*_DAMAGE, SafetensorError) as error:
        raise InvalidArgumentError(
            f"The checkpoint {str(latest)!r} cannot be read: {error!r}. Remove it, and begin anew or go on from an "
            "older one."
        ) from error
    return progress


def _check_kind(latest: Path, facts: dict[str, Any], made_of: dict[str, Any]) -> None:
    if facts["format"] != _FORMAT:
        raise InvalidArgumentError(
            f"The checkpoint {str(latest)!r} has the format {facts['format']!r}; expected {_FORMAT!r}."
        )
    for name, ours in json.loads(json.dumps(made_of, default=str)).items():
        if name.startswith("model.config.") and name not in facts["made_of"]:
            continue  # a release of transformers may add fields
        theirs = facts["made_of"].get(name)
        if ours != theirs:
            raise InvalidArgumentError(
                f"The checkpoint {str(latest)!r} was made with {name} {theirs!r}, but now it is {ours!r}. Resume with "
                "the model, the settings and the text of the run, or begin anew in another folder."
            )


def _progress(latest: Path, facts: dict[str, Any]) -> Progress:
    progress = Progress(**facts)
    counts = (progress.step, progress.episodes, progress.tokens)
    if not all(type(each) is int and each >= 0 for each in counts) or not progress.seconds >= 0:
        raise ValueError(f"progress is {facts}")
    if latest.name != f"checkpoint-{progress.step}":
        raise ValueError(f"it is of step {progress.step}")
    return progress


def _check_shapes(
    tensors: dict[str, Tensor], written: dict[str, list[int]], parameters: dict[str, nn.Parameter]
) -> None:
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    wanted = {f"parameter.{name}": list(parameter.shape) for name, parameter in parameters.items()}
    ours = {name: shape for name, shape in found.items() if name.startswith("parameter.")}
    for one, other in ((found, written), (ours, wanted)):
        if odd := sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name)):
            raise ValueError(f"{len(odd)} tensors are missing, unknown or of another shape, such as {odd[0]}")


def _restore(
    tensors: dict[str, Tensor],
    groups: list[dict[str, Any]],
    parameters: dict[str, nn.Parameter],
    optimizer: Optimizer,
) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"parameter.{name}"])
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part == "optimizer":
            index, _, entry = rest.partition(".")
            state.setdefault(int(index), {})[entry] = tensor
    for group in groups:
        if "betas" in group:  # JSON knows no tuples
            group["betas"] = tuple(group["betas"])
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, the oldest first."""
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def remove_checkpoints(folder: Path) -> None:
    """Remove what only a run that goes on needs."""
    for path in checkpoints(folder):
        shutil.rmtree(path)
