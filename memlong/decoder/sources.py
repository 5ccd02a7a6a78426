"""K-V sources: which keys and values of a chunk are stored, and what each retrieval layer makes of them."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from memlong.bank import ChunkLayout
from memlong.decoder.arrays import Ints
from memlong.decoder.config import MemoryConfig
from memlong.decoder.latent import LatentMaps
from memlong.decoder.probe import ModelLayout
from memlong.decoder.window import LocalWindow
from memlong.errors import InvalidArgumentError


class KvSource(ABC):
    """What stands between a model's K-V and the blocks of the bank.

    Parameters
    ----------
    retrieval_layers
        The layers that attend to retrieved K-V.
    """

    def __init__(self, retrieval_layers: tuple[int, ...]) -> None:
        self.retrieval_layers = retrieval_layers

    @abstractmethod
    def block_layout(self, chunk_size: int, dtype: torch.dtype, device: torch.device) -> ChunkLayout:
        """Of what kind the blocks are that :meth:`collect` makes for a chunk."""

    @abstractmethod
    def collect(self, window: LocalWindow, row: int, columns: Ints) -> tuple[Tensor, Tensor]:
        """Keys and values to be stored for some columns of a row's window: [layers, kv_heads, columns, width] each."""

    @abstractmethod
    def supply(self, layers: tuple[int, ...], keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Un-rotated keys, and values, [layers, kv_heads, tokens, head_dim], of some retrieval layers.

        ``keys`` and ``values`` are what was collected, [layers, kv_heads, tokens, width].
        """


class LayerSource(KvSource):
    """Some memory layers store their K-V as it is, and each retrieval layer reads that of one of them.

    Parameters
    ----------
    layout
        The model's layers.
    memory_layer_of
        By retrieval layer, the layer whose K-V it reads: its own (training-free), or one for all (MemLong,
        arXiv 2408.16967).
    """

    def __init__(self, layout: ModelLayout, memory_layer_of: dict[int, int]) -> None:
        super().__init__(tuple(memory_layer_of))
        self.memory_layers = tuple(sorted(set(memory_layer_of.values())))
        self._place = {layer: self.memory_layers.index(read) for layer, read in memory_layer_of.items()}
        self._kv_heads, self._head_dim = layout.layers[0].kv_heads, layout.layers[0].head_dim

    def block_layout(self, chunk_size: int, dtype: torch.dtype, device: torch.device) -> ChunkLayout:
        """One block layer for each memory layer."""
        shape = (len(self.memory_layers), self._kv_heads, chunk_size, self._head_dim)
        return ChunkLayout(shape, dtype, device)

    def collect(self, window: LocalWindow, row: int, columns: Ints) -> tuple[Tensor, Tensor]:
        """The memory layers' K-V."""
        return window.keys_and_values(row, columns, self.memory_layers)

    def supply(self, layers: tuple[int, ...], keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The K-V of the memory layers that these layers read."""
        places = [self._place[layer] for layer in layers]
        if places == list(range(keys.shape[0])):
            return keys, values
        if len(set(places)) == 1:
            one = slice(places[0], places[0] + 1)
            return keys[one].expand(len(layers), -1, -1, -1), values[one].expand(len(layers), -1, -1, -1)
        return torch.stack([keys[place] for place in places]), torch.stack(
            [values[place] for place in places]
        )


class LatentSource(KvSource):
    """One latent vector a token is stored, from which each retrieval layer makes its own K-V.

    Half of the vector is stored as a block's keys, half as its values.

    Parameters
    ----------
    maps
        Between the vector and the layers' K-V.
    """

    def __init__(self, maps: LatentMaps) -> None:
        super().__init__(maps.layers)
        self.maps = maps

    def block_layout(self, chunk_size: int, dtype: torch.dtype, device: torch.device) -> ChunkLayout:
        """One layer with one head of half the latent width."""
        return ChunkLayout((1, 1, chunk_size, self.maps.dim // 2), dtype, device)

    def collect(self, window: LocalWindow, row: int, columns: Ints) -> tuple[Tensor, Tensor]:
        """The latent vectors' halves."""
        latent = self.maps.to_latent(*window.keys_and_values(row, columns, self.retrieval_layers))
        first, second = latent[None, None].chunk(2, dim=-1)
        return first, second

    def supply(self, layers: tuple[int, ...], keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The layers' own K-V, made from the vectors."""
        return self.maps.from_latent(torch.cat([keys[0, 0], values[0, 0]], dim=-1), layers)


def make_source(
    config: MemoryConfig, layout: ModelLayout, retrieval_layers: tuple[int, ...], like: Tensor
) -> KvSource:
    """Make the source that the configuration names; maps get the dtype and the device of ``like``.

    Raises
    ------
    InvalidArgumentError
        If the memory layer does not exist, or maps are missing or made for another model.
    """
    if config.kv_source == "layer":
        return LayerSource(layout, {layer: layer for layer in retrieval_layers})
    if config.kv_source == "latent":
        return LatentSource(_fitting_maps(config, layout, retrieval_layers, like))
    memory_layer = shared_memory_layer(config, layout)
    return LayerSource(layout, dict.fromkeys(retrieval_layers, memory_layer))


def shared_memory_layer(config: MemoryConfig, layout: ModelLayout) -> int:
    """Return the layer whose K-V is stored for all: ``memory_layer``, or the first of the upper half."""
    count = len(layout.layers)
    layer = count // 2 if config.memory_layer is None else config.memory_layer
    if layer >= count:
        raise InvalidArgumentError(
            f"memory_layer is {layer}, but the model has the layers 0 to {count - 1}; name one of those."
        )
    return layer


def _fitting_maps(
    config: MemoryConfig, layout: ModelLayout, retrieval_layers: tuple[int, ...], like: Tensor
) -> LatentMaps:
    if config.maps is None:
        raise InvalidArgumentError(
            "kv_source is 'latent', but maps is None; name the file that `memlong fit` wrote for this model."
        )
    maps = LatentMaps.load(config.maps)
    ours = (retrieval_layers, layout.layers[0].kv_heads, layout.layers[0].head_dim)
    theirs = (maps.layers, *maps.mean.shape[2:])
    if ours != theirs:
        raise InvalidArgumentError(
            f"maps names {config.maps!r}, made for the layers {theirs[0]} with {theirs[1]} K-V heads of {theirs[2]}, "
            f"but memory is in the layers {ours[0]} with {ours[1]} of {ours[2]}. Set retrieval_layers to those of the "
            "maps, or make maps for this model with `memlong fit`."
        )
    return maps.to(device=like.device, dtype=like.dtype)
