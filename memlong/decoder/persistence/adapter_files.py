"""The adapter of a decoder's folder: writing it, and loading it into a model, which stays unchanged if that fails."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from memlong.decoder.model.adapters import own_names
from memlong.decoder.model.demos import DEMOS
from memlong.decoder.model.loading import NAME
from memlong.decoder.model.quiet_loading import quiet_loading
from memlong.decoder.model.weights import left_as_they_are, true_tensor
from memlong.decoder.persistence.json_file import read_json
from memlong.decoder.persistence.lora_settings import lora_options, unreadable_lora
from memlong.decoder.persistence.tensor_file import check_tensors
from memlong.errors import InvalidArgumentError, MemlongError, MissingDependencyError

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER_SETTINGS, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
"""Files of the folder, as transformers and peft write and read them."""

_BASE_WEIGHTS = "memlong_base_weights"  # attribute of a model
_SAMPLE = 256  # numbers of a tensor that are compared
_LARGEST = 4  # times as many numbers as the model


def write_adapter(folder: Path, model: PreTrainedModel) -> None:
    """Write a model's active adapter.

    Raises
    ------
    InvalidArgumentError
        If several are, or it is none that `attach_adapter` would load.
    """
    flag = "_hf_peft_config_loaded"  # not set by a PeftModel; without it all weights are written
    was_loaded = getattr(model, flag, False)
    setattr(model, flag, True)
    try:
        active = model.active_adapters()
        if len(active) != 1:
            raise InvalidArgumentError(
                f"The model must have one active adapter, got {len(active)} ({', '.join(active)}). Merge them into "
                "one, or choose one with set_adapter"
            )
        config: Any = model.peft_config[active[0]]
        settings = json.loads(json.dumps(config.to_dict(), default=lambda each: sorted(map(str, each))))
        if odd := unreadable_lora(settings):
            raise InvalidArgumentError(
                f"The adapter {active[0]!r} could not be loaded again from a decoder's folder: {odd}. Save it with "
                "model.save_pretrained, or merge it into the model, and save that"
            )
        with quiet_loading(), left_as_they_are(model):
            model.save_pretrained(folder)
        if getattr(model, NAME, None) in DEMOS:  # peft names a file of this machine's package
            saved = read_json(folder / ADAPTER_SETTINGS) | {"base_model_name_or_path": None}
            (folder / ADAPTER_SETTINGS).write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")
    finally:
        setattr(model, flag, was_loaded)


def attach_adapter(
    model: PreTrainedModel, folder: Path, trained_on: str | None, *, expected: LoraConfig | None = None
) -> None:
    """Load the adapter of a folder into a model.

    Parameters
    ----------
    model, folder
        Which and where.
    trained_on
        The `base_weights` that it was trained for; None if that is not known.
    expected
        The rank, scaling and full names of layers that it must have; None for any.

    Raises
    ------
    InvalidArgumentError
        If it is missing, damaged, of another model or kind, or not as expected, or the model has one already. The model
        is then as it was.
    MissingDependencyError
        If peft is not installed.
    """
    for file in (ADAPTER_SETTINGS, ADAPTER):
        if not (folder / file).exists():
            raise InvalidArgumentError(
                f"The folder {str(folder)!r} holds no {file}, but its settings say that there is an adapter. Get the "
                "folder again"
            )
    if getattr(model, "peft_config", None):
        raise InvalidArgumentError(
            f"This {type(model).__name__} has an adapter already: give the plain model, or none"
        )
    ours = base_weights(model)
    if trained_on and ours and trained_on != ours:
        raise InvalidArgumentError(
            f"The adapter in {str(folder)!r} was trained for other weights than those of this {type(model).__name__}. "
            "Use the model that it was trained for"
        )
    learning = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        options = _options(model, folder)
        _load(model, folder, options)
        _check_loaded(model, folder)
        if expected is not None:
            _check_expected(model, folder, expected)
    except BaseException as error:
        _remove_adapter(model, learning)
        if isinstance(error, ImportError):
            raise MissingDependencyError(
                f"The adapter in {str(folder)!r} needs the package peft: pip install 'memlong[train]'"
            ) from error
        if not isinstance(error, Exception) or isinstance(error, MemlongError):
            raise
        raise InvalidArgumentError(
            f"The adapter in {str(folder)!r} could not be loaded into this {type(model).__name__}: {error}. Use the "
            "model that it was trained for"
        ) from error


def _options(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    """Return the adapter's configuration, checked to be a LoRA of this model."""
    settings = read_json(folder / ADAPTER_SETTINGS)
    if odd := unreadable_lora(settings):
        raise ValueError(odd)
    check_tensors(folder / ADAPTER)
    with safe_open(folder / ADAPTER, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    most = _LARGEST * sum(parameter.numel() for parameter in model.parameters())
    widest = model.config.get_text_config(decoder=True).hidden_size
    return lora_options(settings, shapes, {name for name, _ in model.named_modules()}, most, widest)


def _load(model: PreTrainedModel, folder: Path, options: dict[str, Any]) -> None:
    from peft import LoraConfig

    load: Any = model.load_adapter  # which takes a config as well as the dict that it asks for
    with quiet_loading():
        load(str(folder), peft_config=LoraConfig(**options))


def _check_loaded(model: PreTrainedModel, folder: Path) -> None:
    stored = load_file(folder / ADAPTER)
    spoilt = [name for name, tensor in stored.items() if not tensor.isfinite().all()]
    if spoilt:
        raise ValueError(f"its tensor {min(spoilt)!r} holds numbers that are not finite")
    with left_as_they_are(model):
        odd = _unlike(stored, model.get_adapter_state_dict())
    if odd:
        raise InvalidArgumentError(
            f"The adapter in {str(folder)!r} does not fit this {type(model).__name__}: {len(odd)} of its tensors are "
            f"missing, unknown or of another shape, such as {min(odd)}. Use the model that it was trained "
            "for"
        )


def _check_expected(model: PreTrainedModel, folder: Path, expected: LoraConfig) -> None:
    layers = {name.rpartition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A." in name}
    (found,) = model.peft_config.values()
    wrong = [
        f"{name} {getattr(expected, field):g}, got {getattr(found, field):g}"
        for name, field in (("rank", "r"), ("alpha", "lora_alpha"))
        if getattr(expected, field) != getattr(found, field)
    ]
    if odd := layers ^ {*(expected.target_modules or ())}:
        wrong.append(f"the layers to be trained, got {len(odd)} that differ, such as {min(odd)}")
    special = ("use_rslora", "use_dora", "lora_dropout", "rank_pattern", "alpha_pattern")
    wrong += [f"no {name}, got {getattr(found, name)!r}" for name in special if getattr(found, name)]
    if wrong:
        raise InvalidArgumentError(
            f"The LoRA in {str(folder)!r} must have {'; and '.join(wrong)}: to begin with it, give the settings "
            "that it was trained with"
        )


def _remove_adapter(model: PreTrainedModel, learning: Mapping[str, bool]) -> None:
    """Restore a model after loading an adapter failed, at whatever point."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "base_layer"):  # peft's layers, each around the model's own
            home, _, place = name.rpartition(".")
            setattr(model.get_submodule(home), place, module.base_layer)
    vars(model).pop("peft_config", None)
    model._hf_peft_config_loaded = False  # noqa: SLF001 - transformers has no public way to forget a broken one
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(learning[name])


def base_weights(model: PreTrainedModel) -> str | None:
    """A hash of some numbers of each of the model's own weights, whatever its adapter, in bfloat16 or float32.

    None in float16, whose rounding is another, and of quantized weights.
    """
    known: str | None = getattr(model, _BASE_WEIGHTS, None)
    if known is not None:
        return known
    if model.dtype == torch.float16 or getattr(model, "hf_quantizer", None) is not None:
        return None
    digest = hashlib.sha256()
    parameters = dict(model.named_parameters())
    own = {plain: name for name, plain in own_names(model, parameters).items()}
    for name, full_name in sorted(own.items()):
        parameter = true_tensor(model, full_name, parameters[full_name])
        digest.update(f"{name} {list(parameter.shape)}".encode())
        flat = parameter.detach().flatten()
        places = torch.linspace(
            0, max(0, len(flat) - 1), min(len(flat), _SAMPLE), dtype=torch.float64, device="cpu"
        ).long()
        sample = flat[places.to(flat.device)].bfloat16().cpu()
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def remember_base_weights(model: PreTrainedModel) -> None:
    """Let `base_weights` of a model stay what they are now, since from here on it holds a share of its weights."""
    setattr(model, _BASE_WEIGHTS, base_weights(model))


def _unlike(stored: dict[str, Tensor], loaded: dict[str, Tensor]) -> set[str]:
    """Return tensors that differ between model and file, about which transformers only warns."""
    ours = {f"base_model.model.{name}": tensor for name, tensor in loaded.items()}
    return {
        name
        for name in stored.keys() | ours.keys()
        if name not in stored or name not in ours or not torch.equal(stored[name].to(ours[name]), ours[name])
    }
