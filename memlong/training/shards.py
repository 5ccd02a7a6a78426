"""Frozen weights in shares: each process holds one, and gathers a layer's weights from the others while it runs it.

This is torch's FSDP2, for the frozen weights alone. The few trained ones stay whole in every process, and their
gradients are summed as without it. As gathering waits for all processes, they must run the model equally often, and
gradients must pass the same layers in each, whatever it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from memlong.decoder import MemoryDecoder
from memlong.decoder.kv.sources import LatentSource
from memlong.decoder.model.attention import evaluating
from memlong.decoder.persistence.adapter_files import remember_base_weights
from memlong.errors import InvalidArgumentError
from memlong.training.processes import Processes


class Shards:
    """A model whose frozen weights are divided among processes.

    Parameters
    ----------
    decoder
        A decoder whose model has its adapter. Its weights move to this process's device, and those that are not trained
        stay there in part: from now on, the model runs in all processes at once or not at all.
    trained
        The parameters that each process keeps whole.
    processes
        Several processes, which hold the same model.

    Raises
    ------
    InvalidArgumentError
        If the model is quantized, offloaded or on several devices, or its layers are not found.
    """

    def __init__(
        self, decoder: MemoryDecoder, trained: Collection[nn.Parameter], processes: Processes
    ) -> None:
        model = decoder.model
        _check(model)
        layers = _layers(model, decoder.model_layout.modules)
        assert processes.device is not None  # noqa: S101 - there are several processes
        self._model, self._device, self._processes = model, processes.device, processes
        self._goes_by_length = bool(decoder.model_layout.states)  # see ModelCalls.run_by_length
        pictures = decoder.model_layout.placeholders
        self._token = next(token for token in range(len(pictures) + 1) if token not in pictures)
        remember_base_weights(model)
        whole = {*trained, *_shared(model, layers)}
        mesh = init_device_mesh(self._device.type, (processes.count,))
        for layer in layers:
            fully_shard(layer, mesh=mesh, ignored_params=whole)
        fully_shard(model, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
        maps = decoder.source.maps if isinstance(decoder.source, LatentSource) else None
        for part in (maps, decoder.gates, decoder.source.null_chunk):
            if part is not None:
                part.to(self._device)
        for parameter in whole:
            parameter.data = parameter.data.to(self._device)
        self._let_gradients_begin(decoder, layers, trained)

    def calls_for(self, mask: Tensor) -> int:
        """How often reading the text of this mask [rows, tokens] runs the model."""
        some = {length for length in mask.sum(dim=1).tolist() if length}
        return len(some) if self._goes_by_length else min(1, len(some))

    def idle(self, calls: int, *, gradients: bool) -> Tensor:
        """Run the model as often as other processes still do, over a token that counts for nothing.

        Returns
        -------
        Tensor
            0, whose gradient passes the layers that theirs does.
        """
        nothing = torch.full((1, 1), self._token, dtype=torch.long, device=self._device)
        total = torch.zeros((), dtype=torch.float32, device=self._device)
        with evaluating(self._model), torch.set_grad_enabled(gradients):
            for _ in range(calls):
                logits: Tensor = self._model(input_ids=nothing, use_cache=False).logits
                total = total + 0 * logits.float().sum()
        return total

    def _let_gradients_begin(
        self, decoder: MemoryDecoder, layers: Collection[nn.Module], trained: Collection[nn.Parameter]
    ) -> None:
        """Let gradients pass all layers from the first that learns: others need them only once memory is retrieved."""
        layout = decoder.model_layout
        readers = {
            id(module)
            for module, read in layout.readers.items()
            if not set(read).isdisjoint(decoder.retrieval_layers)
        }
        inside = {id(parameter) for parameter in decoder.model.parameters()}
        outside = [
            parameter for parameter in trained if id(parameter) not in inside
        ]  # maps, gates, a null chunk
        wanted = set(map(id, trained))
        for layer in layers:
            own = [parameter for parameter in layer.parameters() if id(parameter) in wanted]
            if any(id(module) in readers for module in layer.modules()):
                own += outside
            if own:
                layer.register_forward_pre_hook(_beginning(own), prepend=True, with_kwargs=True)


_Given = tuple[tuple[Any, ...], dict[str, Any]]


def _beginning(
    learning: list[nn.Parameter],
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], _Given]:
    """Return a hook that lets gradients reach the input of a layer while one of these parameters learns."""

    def begin(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> _Given:
        if not torch.is_grad_enabled() or not any(each.requires_grad for each in learning):
            return args, options
        if args:
            return (_with_gradient(args[0]), *args[1:]), options
        return args, {**options, "hidden_states": _with_gradient(options["hidden_states"])}

    return begin


def _with_gradient(states: Tensor) -> Tensor:
    if states.requires_grad:
        return states
    return states.detach().requires_grad_().clone()  # a copy, which a layer may overwrite


def _check(model: PreTrainedModel) -> None:
    name = type(model).__name__
    if getattr(model, "hf_quantizer", None) is not None:
        raise InvalidArgumentError(
            f"shard must be False for quantized weights, which cannot be divided, got True for a quantized {name}: "
            "load the model in bfloat16 or float32, or train it without shard"
        )
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1 or devices == ["meta"]:
        raise InvalidArgumentError(
            f"decoder.model must be on one device to be divided among processes, got a {name} on "
            f"{' and '.join(devices)}: load it with load_model(..., device='cpu')"
        )


def _layers(model: PreTrainedModel, attention: Collection[nn.Module]) -> list[nn.Module]:
    """Return the layers of a model, those of towers for images and sound included."""
    attending = set(map(id, attention))

    def is_layer(module: nn.Module) -> bool:
        return isinstance(module, GradientCheckpointingLayer) or any(
            id(part) in attending for part in module.modules()
        )

    found: list[nn.Module] = []
    lists: list[nn.Module] = [model]
    while lists:
        module = lists.pop()
        children = list(module.children())
        if isinstance(module, nn.ModuleList) and any(map(is_layer, children)):
            found += children
        else:
            lists += children
    if attending - {id(part) for layer in found for part in layer.modules()}:
        raise InvalidArgumentError(
            f"shard must be False for a {type(model).__name__}, whose layers are in no list, got True: train it without"
        )
    return found


def _shared(model: PreTrainedModel, layers: Collection[nn.Module]) -> set[nn.Parameter]:
    """Return parameters that several layers use, or a layer and something else: each process keeps them whole."""
    owners: dict[nn.Parameter, set[int]] = {}
    inside: set[int] = set()
    for layer in layers:
        for part in layer.modules():
            inside.add(id(part))
            for parameter in part.parameters(recurse=False):
                owners.setdefault(parameter, set()).add(id(layer))
    for part in model.modules():
        if id(part) not in inside:
            for parameter in part.parameters(recurse=False):
                owners.setdefault(parameter, set()).add(id(model))
    return {parameter for parameter, users in owners.items() if len(users) > 1}
