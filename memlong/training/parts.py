"""The trainable parts of a decoder: LoRA on upper layers, latent maps, gates, a null chunk; all else is frozen."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, register_parametrization, remove_parametrizations
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from memlong.decoder import MemoryConfig, MemoryDecoder
from memlong.decoder.kv.latent import LatentMaps
from memlong.decoder.kv.null_chunk import NullChunk, null_chunk_facts
from memlong.decoder.kv.sources import KvSource, LatentSource, shared_memory_layer
from memlong.decoder.model.probe import probe
from memlong.decoder.persistence.adapter_files import ADAPTER, attach_adapter
from memlong.decoder.persistence.pretrained import read_pretrained
from memlong.errors import InvalidArgumentError, MissingDependencyError
from memlong.training.config import TrainingConfig

_APART = ("q_proj", "o_proj")
"""Linear layers of attention that its keys and values do not come from, by transformers' usual names."""


@torch.no_grad()
def first_chunk(decoder: MemoryDecoder, text: Tensor) -> NullChunk:
    """Return the first chunk of a text as a null chunk to train."""
    with decoder:
        decoder.reset()
        decoder.read(text[None])
        decoder.flush()
        (bank,) = decoder.banks
        found = bank.fetch(bank.ids[:1])
    return NullChunk(found.keys[0], found.values[0], null_chunk_facts(decoder.config, decoder.source))


class TrainableParts:
    """The trainable parameters of a decoder, in float32 during training.

    Parameters
    ----------
    decoder
        A decoder whose model has no adapter. The model is frozen and gets a LoRA adapter.
    config
        What to train.
    lora
        Folder of a trained decoder whose LoRA to begin with, or None for one that changes nothing.

    Raises
    ------
    InvalidArgumentError
        If the model already has an adapter or cannot checkpoint gradients, there is nothing to train, or the LoRA to
        begin with is none of this model, or of another rank, scaling or other layers.
    MissingDependencyError
        If peft is not installed.
    """

    def __init__(
        self, decoder: MemoryDecoder, config: TrainingConfig, lora: str | Path | None = None
    ) -> None:
        self._model = decoder.model
        self._first = first_learning_layer(decoder)
        self._shares = decoder.config.kv_source == "shared"
        self.parameters: dict[str, nn.Parameter] = {}
        self.begun_with: str | None = None  # a digest of the LoRA that was given
        self._lower: set[str] = set()
        if config.gradient_checkpointing and not checkpointing_layers(self._model):
            raise InvalidArgumentError(
                f"gradient_checkpointing must be False, as {type(self._model).__name__} does not support it, got True"
            )
        self._model.requires_grad_(False)
        if config.gradient_chunks and not (isinstance(decoder.source, LatentSource) and config.train_maps):
            raise InvalidArgumentError(
                "gradient_chunks must be 0 unless maps are trained (kv_source 'latent'), as nothing else makes a "
                f"stored form that could be trained, got {config.gradient_chunks}"
            )
        if lora is not None and not config.lora_rank:
            raise InvalidArgumentError("lora_rank must be above 0 to begin with a LoRA, got 0")
        if config.lora_rank:
            self._add_lora(decoder, config, lora)
        self._maps = decoder.source.maps if isinstance(decoder.source, LatentSource) else None
        if self._maps is not None and config.gradient_chunks:
            _scale_encoding(self._maps)
        for part, wanted, prefix in (
            (self._maps, config.train_maps, "maps"),
            (decoder.gates, config.train_gates, "gates"),
            (decoder.source.null_chunk, config.null_chunk, "null_chunk"),
        ):
            for name, parameter in part.named_parameters() if part is not None else ():
                learns = wanted and (name != "encode" or config.gradient_chunks > 0)
                name = name.removeprefix("parametrizations.").removesuffix(".original")
                parameter.requires_grad_(learns)
                if learns:
                    self.parameters[f"{prefix}.{name}"] = parameter
        if not self.parameters:
            raise InvalidArgumentError(
                "Nothing to train: lora_rank is 0, and there are no maps, gates or null chunk to train. Set lora_rank, "
                "null_chunk, or gate_init in the MemoryConfig"
            )
        for parameter in self.parameters.values():
            parameter.data = parameter.data.float()

    def groups(self, config: TrainingConfig) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups; gates have their own learning rate, and no weight decay."""
        gates = [parameter for name, parameter in self.parameters.items() if name.startswith("gates.")]
        others = [parameter for name, parameter in self.parameters.items() if not name.startswith("gates.")]
        groups = [
            {"params": others, "lr": config.lr, "weight_decay": config.weight_decay},
            {"params": gates, "lr": config.gate_lr, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def learn(self, *, lower_layers: bool) -> None:
        """Train the layers below the memory layer as well, or freeze them."""
        for name in self._lower:
            self.parameters[name].requires_grad_(lower_layers)

    def freeze(self) -> None:
        """Freeze everything and convert it to the model's dtype, so that it equals what is saved."""
        if self._maps is not None and is_parametrized(self._maps, "encode"):
            remove_parametrizations(self._maps, "encode")
            self.parameters["maps.encode"] = cast("nn.Parameter", self._maps.encode)
        for name, parameter in self.parameters.items():
            if not name.startswith("gates."):
                parameter.data = parameter.data.to(self._model.dtype)
            parameter.requires_grad_(False)
        if self._maps is not None:
            self._maps.round_to_saved()

    def _add_lora(self, decoder: MemoryDecoder, config: TrainingConfig, begun: str | Path | None) -> None:
        if find_spec("peft") is None:
            raise MissingDependencyError("Training LoRA needs the package peft: pip install 'memlong[train]'")
        from peft import LoraConfig

        if getattr(self._model, "peft_config", None):
            raise InvalidArgumentError(
                f"decoder.model must not have an adapter, got a {type(self._model).__name__} with one: load the plain "
                "model for training"
            )
        layer_of = _linear_layers(decoder, config.lora_targets)
        upper = {name for name, layer in layer_of.items() if self._is_upper(name, layer)}
        targets = (
            list(layer_of) if config.warmup_stage_steps else [name for name in layer_of if name in upper]
        )
        if not targets:
            raise InvalidArgumentError(
                f"lora_targets must name linear layers from layer {self._first} up, got {config.lora_targets!r}: name "
                "existing ones, or leave it empty for those of attention"
            )
        lora = LoraConfig(
            r=config.lora_rank, lora_alpha=cast("int", config.lora_alpha), target_modules=targets
        )
        if begun is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                self._model.add_adapter(lora)
        else:
            found = read_pretrained(begun)
            if not found.has_adapter:
                raise InvalidArgumentError(
                    f"The decoder in {str(begun)!r} has no LoRA to begin with, as it was trained without: leave lora "
                    "out, and give its maps with maps"
                )
            if (found.config.adapter_for, decoder.config.adapter_for) == ("memory", "all"):
                raise InvalidArgumentError(
                    f"adapter_for must be 'memory' to begin with the LoRA of {str(begun)!r}, which acts with memory "
                    "alone, got 'all'"
                )
            attach_adapter(self._model, found.folder, found.base_weights, expected=lora)
            self.begun_with = hashlib.sha256((found.folder / ADAPTER).read_bytes()).hexdigest()
        for name, parameter in self._model.named_parameters():
            if ".lora_" in name:
                parameter.requires_grad_(True)
                self.parameters[f"model.{name}"] = parameter
                if not any(name.startswith(f"{target}.") for target in upper):
                    self._lower.add(f"model.{name}")

    def _is_upper(self, name: str, layer: int) -> bool:
        """Whether what memory stores does not depend on a linear layer: of a shared memory layer, two do not count."""
        if not self._shares:
            return layer >= self._first
        return layer > self._first or (layer == self._first and name.rpartition(".")[2] in _APART)


class _Scaled(nn.Module):
    """Multiplies a parameter by constants."""

    scale: Tensor

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, parameter: Tensor) -> Tensor:
        """Return the product."""
        return parameter * self.scale

    def right_inverse(self, product: Tensor) -> Tensor:
        """Return the parameter."""
        return product / self.scale


def _scale_encoding(maps: LatentMaps) -> None:
    """Train the encoding in units in which each channel of K-V is as large as the decoding.

    A step of Adam is about as large as the learning rate, whatever the parameter, and weights of channels differ by
    orders of magnitude. A channel that is not encoded at all, as all of a layer's may be, can learn like the others: it
    has their mean scale.
    """
    with torch.no_grad():
        maps.encode.data = maps.encode.data.float()  # as it is trained; a parametrization keeps its dtype
        size = maps.encode.float().square().mean(dim=-1, keepdim=True).sqrt()
        scale = size / maps.decode.float().square().mean().sqrt()
        mean = scale.sum() / (size > 0).sum().clamp(min=1)
        scale = scale.where(size > 0, mean).clamp(min=torch.finfo(torch.float32).tiny)
    register_parametrization(maps, "encode", _Scaled(scale))


def usual_retrieval_layers(model: PreTrainedModel, config: MemoryConfig) -> str:
    """Return the default retrieval layers: every fourth from the memory layer up with shared K-V, else all.

    With shared K-V, retrieval in all upper layers is worse than in four of them (arXiv 2408.16967).
    """
    if config.kv_source != "shared":
        return "all"
    layout = probe(model)
    memory_layer = shared_memory_layer(config, layout)
    upper = [layer for layer in layout.layers if layer >= memory_layer]
    full = _every_fourth([layer for layer in upper if layer in layout.full_attention_layers])
    chosen = _every_fourth(upper)
    return ",".join(map(str, full or chosen))


def _every_fourth(layers: list[int]) -> list[int]:
    chosen: list[int] = []
    for layer in layers:
        if not chosen or layer - chosen[-1] >= 4:
            chosen.append(layer)
    return chosen


def first_learning_layer(decoder: MemoryDecoder) -> int:
    """Return the lowest trainable layer.

    With shared K-V, that is the memory layer, of which only the projections of queries and outputs are trained, so that
    stored K-V never goes stale. Otherwise it is the first retrieval layer, as memory does not affect layers below it.

    Raises
    ------
    InvalidArgumentError
        If a retrieval layer is below the memory layer.
    """
    if decoder.config.kv_source == "shared":
        memory_layer = shared_memory_layer(decoder.config, decoder.model_layout)
        below = [layer for layer in decoder.retrieval_layers if layer < memory_layer]
        if below:
            raise InvalidArgumentError(
                f"retrieval_layers must be {memory_layer} or above, as the memory layer's K-V must not depend on "
                f"retrieval, got {decoder.config.retrieval_layers!r} with layer {below[0]}"
            )
        return memory_layer
    return min(decoder.retrieval_layers)


def _linear_layers(decoder: MemoryDecoder, named: tuple[str, ...]) -> dict[str, int]:
    """Map the names of attention's linear modules, or of all linear modules ``named``, to their layers."""
    names = {id(module): name for name, module in decoder.model.named_modules()}
    found: dict[str, int] = {}
    for attention, layers in decoder.model_layout.readers.items():
        index = layers[-1]
        home = names[id(attention)]
        if named:
            home = home.rpartition(".")[0]
        for name, module in decoder.model.get_submodule(home).named_modules(prefix=home):
            if isinstance(module, nn.Linear) and (not named or name.rpartition(".")[2] in named):
                found[name] = index
    return found


@contextmanager
def checkpointed(model: PreTrainedModel) -> Iterator[None]:
    """Let the model's layers run again in the backward pass; dropout stays off."""
    layers = checkpointing_layers(model)
    before = [(layer, layer.gradient_checkpointing, layer.training) for layer in layers]
    try:
        for layer in layers:
            layer.gradient_checkpointing = layer.training = True  # its own flags alone
        yield
    finally:
        for layer, was_on, was_training in before:
            layer.gradient_checkpointing, layer.training = was_on, was_training


@contextmanager
def keeping_chunks(source: KvSource, count: int) -> Iterator[None]:
    """Let streams keep the K-V of so many of their latest chunks, for gradients into what is stored of them."""
    before, source.gradient_chunks = source.gradient_chunks, count
    try:
        yield
    finally:
        source.gradient_chunks = before


def checkpointing_layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """Return the layers that can run again in the backward pass."""
    return [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
