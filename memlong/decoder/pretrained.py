"""A trained decoder as a folder: the peft adapter, maps, gates, and ``memlong.json``, which says what goes together."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from memlong.decoder.adapters import own_names
from memlong.decoder.config import MemoryConfig
from memlong.decoder.gates import MemoryGates
from memlong.decoder.latent import LatentMaps
from memlong.decoder.loading import NAME, stable_name
from memlong.decoder.machine import dtype_name
from memlong.decoder.quiet import quiet_loading
from memlong.decoder.weights import left_as_they_are, true_tensor
from memlong.errors import InvalidArgumentError, MissingDependencyError, StorageError

SETTINGS, MAPS, GATES = "memlong.json", "maps.safetensors", "gates.safetensors"
ADAPTER_SETTINGS, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
"""Files of the folder; the latter two are as transformers and peft write and read them."""

CHANGEABLE = ("backend", "backend_options", "retriever", "retriever_options", "store")
"""Fields of a MemoryConfig that can be others than those trained with."""

_FORMAT = "memlong-decoder-1"
_SAMPLE = 256  # numbers of a tensor that tell it from others
_PACKAGES = ("memlong", "torch", "transformers", "peft")


@dataclass(frozen=True)
class Pretrained:
    """What a folder says of its decoder.

    Attributes
    ----------
    folder
        Where it is.
    base_model
        Under which name :func:`load_model` finds the model that the adapter goes with; None if it was not known.
    config
        The settings, maps and gates named by their place.
    has_adapter
        Whether weights of the model were trained.
    dtype
        That of the model when it was trained; None if the folder is older than its being noted down.
    """

    folder: Path
    base_model: str | None
    config: MemoryConfig
    has_adapter: bool
    dtype: str | None = None

    @property
    def trained_in(self) -> tuple[str, str] | None:
        """Dtype of the training, and the folder, as :func:`choose_machine` takes them."""
        return None if self.dtype is None else (self.dtype, str(self.folder))


def write_pretrained(
    folder: str | Path,
    model: PreTrainedModel,
    config: MemoryConfig,
    maps: LatentMaps | None,
    gates: MemoryGates | None,
    *,
    base_model: str | None,
    training: Mapping[str, Any] | None,
) -> None:
    """Write a decoder's folder, for :func:`read_pretrained`.

    Raises
    ------
    InvalidArgumentError
        If several adapters are at work, of which a folder holds one.
    StorageError
        If it cannot be written.
    """
    folder = Path(folder)
    has_adapter = bool(getattr(model, "peft_config", None))
    memory = replace(config, maps=MAPS if maps else None, gates=GATES if gates else None).as_dict()
    del memory["store"]  # where a machine keeps its chunks says nothing about the decoder
    facts = {
        "format": _FORMAT,
        "base_model": base_model
        or getattr(model, NAME, None)
        or stable_name(model.name_or_path or "")
        or None,
        "base_weights": _base_weights(model),
        "dtype": dtype_name(model.dtype),
        "adapter": has_adapter,
        "memory": memory,
        "training": training,
        "versions": {package: importlib.metadata.version(package) for package in _installed()},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if has_adapter:
            _write_adapter(folder, model)
        if maps is not None:
            maps.save(folder / MAPS)
        if gates is not None:
            gates.save(folder / GATES)
        (folder / SETTINGS).write_text(json.dumps(facts, indent=2, default=str) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise StorageError(f"The decoder cannot be written to {str(folder)!r}: {error}") from error


def read_pretrained(name: str | Path, changes: Mapping[str, Any] | None = None) -> Pretrained:
    """Read what a folder, or a repository of the hub, says of its decoder.

    Parameters
    ----------
    name
        The folder; where there is none, a hub id.
    changes
        Fields of the MemoryConfig that are to be others, of those in ``CHANGEABLE``.

    Raises
    ------
    InvalidArgumentError
        If there is no such folder, it holds no decoder, or a field cannot be changed.

    Notes
    -----
    A backend or retriever that takes the place of another gets its own options, or none.
    """
    for field in changes or {}:
        if field not in CHANGEABLE:
            raise InvalidArgumentError(
                f"{field} was decided when the decoder was trained; what can be changed is {', '.join(CHANGEABLE)}."
            )
    folder = _folder(name)
    try:
        facts = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        if facts["format"] != _FORMAT:
            raise InvalidArgumentError(
                f"{str(folder / SETTINGS)!r} has the format {facts['format']!r}; expected {_FORMAT!r}. Use the memlong "
                "that wrote it, or a newer one."
            )
        memory = dict(facts["memory"])
        for field in ("maps", "gates"):
            if memory.get(field):
                memory[field] = str(folder / memory[field])
        for field in ("backend", "retriever"):
            if changes and field in changes and changes[field] != memory.get(field):
                memory[f"{field}_options"] = {}
        if not isinstance(facts["base_model"], str | None):
            raise TypeError(f"base_model is {facts['base_model']!r}")
        if not isinstance(facts.get("dtype"), str | None):
            raise TypeError(f"dtype is {facts['dtype']!r}")
        config = MemoryConfig(**{**memory, **(changes or {})})
        return Pretrained(folder, facts["base_model"], config, bool(facts["adapter"]), facts.get("dtype"))
    except FileNotFoundError as error:
        raise InvalidArgumentError(
            f"The folder {str(name)!r} holds no {SETTINGS}, so no decoder that save_pretrained or `memlong train` "
            "wrote. Name one that does."
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InvalidArgumentError):
            raise
        raise InvalidArgumentError(
            f"{str(folder / SETTINGS)!r} cannot be read as a decoder's settings: {error!r}. Save the decoder again, or "
            "use the memlong that wrote it."
        ) from error


def _write_adapter(folder: Path, model: PreTrainedModel) -> None:
    flag = (
        "_hf_peft_config_loaded"  # which a PeftModel does not set, and without which all weights are written
    )
    was_loaded = getattr(model, flag, False)
    setattr(model, flag, True)
    try:
        active = model.active_adapters()
        if len(active) != 1:
            raise InvalidArgumentError(
                f"{len(active)} adapters of the model are at work ({', '.join(active)}), and a folder holds one. Merge "
                "them into one, or choose one by set_adapter."
            )
        with quiet_loading(), left_as_they_are(model):
            model.save_pretrained(folder)
    finally:
        setattr(model, flag, was_loaded)


def attach_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Load the adapter of a folder into a model.

    Raises
    ------
    InvalidArgumentError
        If it is missing, damaged, or of another model, or the model has one already. The model is then as it was.
    MissingDependencyError
        If peft is not installed.
    """
    for file in (ADAPTER_SETTINGS, ADAPTER):
        if not (folder / file).is_file():
            raise InvalidArgumentError(
                f"The folder {str(folder)!r} holds no {file}, but its {SETTINGS} says that there is an adapter. Get "
                "the folder anew."
            )
    if getattr(model, "peft_config", None):
        raise InvalidArgumentError(
            f"This {type(model).__name__} has an adapter already: give the plain model, or none."
        )
    trained_on, ours = _read_base_weights(folder), _base_weights(model)
    if trained_on and ours and trained_on != ours:
        raise InvalidArgumentError(
            f"The adapter in {str(folder)!r} was trained for other weights than those of this {type(model).__name__}. "
            "Use the model that it was trained for."
        )
    learning = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        with quiet_loading():
            model.load_adapter(str(folder))
        _check_loaded(model, folder)
    except ImportError as error:
        _remove_adapter(model, learning)
        raise MissingDependencyError(
            f"The adapter in {str(folder)!r} needs the package peft: pip install 'memlong[train]'"
        ) from error
    except InvalidArgumentError:
        _remove_adapter(model, learning)
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        _remove_adapter(model, learning)
        raise InvalidArgumentError(
            f"The adapter in {str(folder)!r} could not be loaded into this {type(model).__name__}: {error}. Use the "
            "model that it was trained for."
        ) from error


def _check_loaded(model: PreTrainedModel, folder: Path) -> None:
    with left_as_they_are(model):
        odd = _unlike(load_file(folder / ADAPTER), model.get_adapter_state_dict())
    if odd:
        raise InvalidArgumentError(
            f"The adapter in {str(folder)!r} does not fit this {type(model).__name__}: {len(odd)} of its tensors are "
            f"missing, unknown or of another shape, such as {min(odd)}. Use the model that it was trained "
            "for."
        )


def _remove_adapter(model: PreTrainedModel, learning: Mapping[str, bool]) -> None:
    """Make a model what it was before an adapter was loaded, however far that came."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "base_layer"):  # peft's layers, each around the model's own
            home, _, place = name.rpartition(".")
            setattr(model.get_submodule(home), place, module.base_layer)
    vars(model).pop("peft_config", None)
    model._hf_peft_config_loaded = False  # noqa: SLF001 - transformers has no public way to forget a broken one
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(learning[name])


def _base_weights(model: PreTrainedModel) -> str | None:
    """A hash of some numbers of each of the model's own weights, whatever its adapter, in bfloat16 or float32.

    None in float16, whose rounding is another, and of quantized weights.
    """
    if model.dtype == torch.float16 or getattr(model, "hf_quantizer", None) is not None:
        return None
    digest = hashlib.sha256()
    parameters = dict(model.named_parameters())
    own = {plain: name for name, plain in own_names(model, parameters).items()}
    for name, full_name in sorted(own.items()):
        parameter = true_tensor(model, full_name, parameters[full_name])
        digest.update(f"{name} {list(parameter.shape)}".encode())
        flat = parameter.detach().flatten()
        places = torch.linspace(0, max(0, len(flat) - 1), min(len(flat), _SAMPLE), dtype=torch.float64).long()
        sample = flat[places.to(flat.device)].bfloat16().cpu()
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read_base_weights(folder: Path) -> str | None:
    """What the folder says of them; older ones say nothing."""
    found = json.loads((folder / SETTINGS).read_text(encoding="utf-8")).get("base_weights")
    return found if isinstance(found, str) else None


def _unlike(stored: dict[str, Tensor], loaded: dict[str, Tensor]) -> set[str]:
    """Tensors that are not in the model as they are in the file, for which transformers has no more than a warning."""
    ours = {f"base_model.model.{name}": tensor for name, tensor in loaded.items()}
    return {
        name
        for name in stored.keys() | ours.keys()
        if name not in stored or name not in ours or not torch.equal(stored[name].to(ours[name]), ours[name])
    }


def _folder(name: str | Path) -> Path:
    folder = Path(name)
    try:
        is_folder, is_there = folder.is_dir(), folder.exists()
    except OSError as error:  # such as a name that is too long
        raise InvalidArgumentError(f"{str(name)!r} cannot be read: {error.strerror}.") from error
    if is_folder:
        return folder
    if is_there:
        raise InvalidArgumentError(f"{str(name)!r} is a file; name the folder that holds {SETTINGS}.")
    try:
        return Path(snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, ValueError) as error:  # which all errors of huggingface_hub are
        raise InvalidArgumentError(
            f"{str(name)!r} is no folder here, and cannot be had from the hub: {error}"
        ) from error


def _installed() -> list[str]:
    found = {each.metadata["Name"] for each in importlib.metadata.distributions()}
    return [package for package in _PACKAGES if package in found]
