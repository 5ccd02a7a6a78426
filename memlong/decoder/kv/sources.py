"""K-V sources: which keys and values of a chunk are stored, and what each retrieval layer reads of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import gcd

import torch
from torch import Tensor

from memlong.bank import ChunkLayout
from memlong.decoder.config import MemoryConfig
from memlong.decoder.kv.latent import LatentMaps
from memlong.decoder.kv.null_chunk import NullChunk
from memlong.decoder.kv.window import LocalWindow
from memlong.decoder.model.head_names import Heads, has_plain_heads, parse_heads
from memlong.decoder.model.layer_names import ranges
from memlong.decoder.model.layout import ModelLayout
from memlong.errors import InvalidArgumentError


class KvSource(ABC):
    """What stands between a model's K-V and the blocks of the bank.

    Parameters
    ----------
    retrieval_layers
        The layers that attend to retrieved K-V.

    Attributes
    ----------
    null_chunk
        What is read beside all that is retrieved, in the form in which it is stored; None for nothing.
    gradient_chunks
        Of how many of its latest chunks a stream keeps the K-V, so that gradients reach what makes their stored form.
    """

    def __init__(self, retrieval_layers: tuple[int, ...]) -> None:
        self.retrieval_layers = retrieval_layers
        self.null_chunk: NullChunk | None = None
        self.gradient_chunks = 0

    @property
    def heads(self) -> Heads | None:
        """The K-V heads of the retrieval layers that attend to retrieved K-V; None if all do."""
        return None

    @property
    def stored_layers(self) -> tuple[int, ...]:
        """The layers whose K-V are stored, or what is stored is made of."""
        return self.retrieval_layers

    @abstractmethod
    def block_layout(self, chunk_size: int, dtype: torch.dtype, device: torch.device) -> ChunkLayout:
        """Return shape, dtype and device of the blocks that `collect` makes for a chunk."""

    @abstractmethod
    def collect(self, window: LocalWindow, row: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Return what is stored of tokens ``start`` to ``end`` as keys and values [layers, heads, tokens, width]."""

    def stored(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the stored form of un-rotated K-V [layers, heads, tokens, width] of the stored layers."""
        return keys, values

    @abstractmethod
    def supply(self, layers: tuple[int, ...], keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return un-rotated keys, and values, [layers, heads, tokens, width], of some retrieval layers that are alike.

        ``keys`` and ``values`` are what was collected.
        """


class LayerSource(KvSource):
    """Some memory layers store their K-V as it is, and each retrieval layer reads that of one of them.

    Parameters
    ----------
    model_layout
        The model's layers.
    memory_layer_of
        By retrieval layer, the layer whose K-V it reads: its own (training-free), or one for all (MemLong,
        arXiv 2408.16967).
    """

    def __init__(self, model_layout: ModelLayout, memory_layer_of: dict[int, int]) -> None:
        super().__init__(tuple(memory_layer_of))
        self.memory_layers = tuple(sorted(set(memory_layer_of.values())))
        self._place = {layer: self.memory_layers.index(read) for layer, read in memory_layer_of.items()}
        shape = model_layout.layers[self.memory_layers[0]].shape
        self._kv_heads, self._head_dim = shape.kv_heads, shape.head_dim

    @property
    def stored_layers(self) -> tuple[int, ...]:
        """The memory layers."""
        return self.memory_layers

    def block_layout(self, chunk_size: int, dtype: torch.dtype, device: torch.device) -> ChunkLayout:
        """One block layer for each memory layer."""
        shape = (len(self.memory_layers), self._kv_heads, chunk_size, self._head_dim)
        return ChunkLayout(shape, dtype, device)

    def collect(self, window: LocalWindow, row: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """The memory layers' K-V."""
        return window.stacked(row, start, end, self.memory_layers)

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


class PackedSource(KvSource):
    """Each retrieval layer stores and reads its own K-V, whatever their shapes are.

    All numbers of a token are concatenated and cut into pieces of one width, half of which are stored as a block's keys
    and half as its values. With multi-head latent attention, that is as much as the model's own cache takes.

    Parameters
    ----------
    model_layout
        The model's layers.
    retrieval_layers
        Those that store and read.
    """

    def __init__(self, model_layout: ModelLayout, retrieval_layers: tuple[int, ...]) -> None:
        super().__init__(retrieval_layers)
        shapes = [model_layout.layers[layer].shape for layer in retrieval_layers]
        # Of each layer's keys and then of its values: heads and width.
        self._parts = [
            part
            for shape in shapes
            for part in ((shape.kv_heads, shape.head_dim), (shape.value_heads, shape.value_dim))
        ]
        self._width = gcd(*(width for _, width in self._parts))
        self._pieces = sum(heads * width for heads, width in self._parts) // self._width

    def block_layout(self, chunk_size: int, dtype: torch.dtype, device: torch.device) -> ChunkLayout:
        """One layer, whose heads are the pieces."""
        return ChunkLayout((1, -(-self._pieces // 2), chunk_size, self._width), dtype, device)

    def collect(self, window: LocalWindow, row: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """All layers' K-V, in pieces."""
        each = window.keys_and_values(row, start, end, self.retrieval_layers)
        pieces = [self._cut(states) for pair in each for states in pair]
        if self._pieces % 2:
            pieces.append(torch.zeros_like(pieces[0][:1]))
        first, second = torch.cat(pieces)[None].chunk(2, dim=1)
        return first, second

    def supply(self, layers: tuple[int, ...], keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The layers' own K-V, put together from the pieces."""
        pieces = torch.cat([keys[0], values[0]])
        sizes = [heads * width // self._width for heads, width in self._parts]
        each = pieces[: self._pieces].split(sizes)
        whole = [self._joined(states, *part) for states, part in zip(each, self._parts, strict=True)]
        places = [2 * self.retrieval_layers.index(layer) for layer in layers]
        return torch.stack([whole[place] for place in places]), torch.stack(
            [whole[place + 1] for place in places]
        )

    def _cut(self, states: Tensor) -> Tensor:
        """[heads, tokens, width] -> [pieces, tokens, width of a piece]."""
        heads, tokens, width = states.shape
        each = states.reshape(heads, tokens, width // self._width, self._width)
        # [heads, tokens, pieces of a head, piece] -> [heads, pieces of a head, tokens, piece]
        return each.transpose(1, 2).reshape(-1, tokens, self._width)

    def _joined(self, pieces: Tensor, heads: int, width: int) -> Tensor:
        """[pieces, tokens, width of a piece] -> [heads, tokens, width]."""
        each = pieces.view(heads, width // self._width, -1, self._width)
        # [heads, pieces of a head, tokens, piece] -> [heads, tokens, pieces of a head, piece]
        return each.transpose(1, 2).reshape(heads, -1, width)


class HeadSource(KvSource):
    """Some K-V heads of the retrieval layers store and read their own K-V.

    A block has one layer with all of these heads. Layers with the same ones are next to each other, so that nothing is
    copied to supply them.

    Parameters
    ----------
    model_layout
        The model's layers.
    heads
        By retrieval layer, its heads.
    """

    def __init__(self, model_layout: ModelLayout, heads: Heads) -> None:
        super().__init__(tuple(heads))
        self._heads = dict(heads)
        self._head_dim = model_layout.layers[self.retrieval_layers[0]].head_dim
        self._first: dict[int, int] = {}  # by layer, the place of its first head in a block
        self._pairs: list[tuple[int, int]] = []
        for place, layer in sorted(enumerate(heads), key=lambda each: (heads[each[1]], each[0])):
            self._first[layer] = len(self._pairs)
            self._pairs += [(place, head) for head in heads[layer]]

    @property
    def heads(self) -> Heads:
        """The heads that store and read."""
        return self._heads

    def block_layout(self, chunk_size: int, dtype: torch.dtype, device: torch.device) -> ChunkLayout:
        """One layer, with the heads of all."""
        return ChunkLayout((1, len(self._pairs), chunk_size, self._head_dim), dtype, device)

    def collect(self, window: LocalWindow, row: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """The heads' K-V."""
        keys, values = window.stacked(row, start, end, self.retrieval_layers)
        places, heads = torch.tensor(self._pairs, device="cpu").T.to(keys.device)
        return keys[places, heads][None], values[places, heads][None]

    def supply(self, layers: tuple[int, ...], keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The K-V of these layers' heads."""
        count = len(self._heads[layers[0]])
        places = [self._first[layer] for layer in layers]
        if places == list(range(places[0], places[0] + count * len(layers), count)):
            part = slice(places[0], places[-1] + count)
            size = (len(layers), count, -1, self._head_dim)
            return keys[0, part].reshape(size), values[0, part].reshape(size)
        keys, values = (
            torch.stack([states[0, place : place + count] for place in places]) for states in (keys, values)
        )
        return keys, values


class LatentSource(KvSource):
    """One latent vector per token is stored, from which each retrieval layer makes its own K-V.

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

    def collect(self, window: LocalWindow, row: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """The latent vectors' halves."""
        return self.stored(*window.stacked(row, start, end, self.retrieval_layers))

    def stored(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The latent vectors' halves."""
        first, second = self.maps.to_latent(keys, values)[None, None].chunk(2, dim=-1)
        return first, second

    def supply(self, layers: tuple[int, ...], keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The layers' own K-V, made from the vectors."""
        return self.maps.from_latent(torch.cat([keys[0, 0], values[0, 0]], dim=-1), layers)


def make_source(
    config: MemoryConfig, model_layout: ModelLayout, retrieval_layers: tuple[int, ...], like: Tensor
) -> KvSource:
    """Make the source that the configuration names; maps get the dtype and the device of ``like``.

    Raises
    ------
    InvalidArgumentError
        If the memory layer or a head does not exist, or maps are missing or made for another model.
    """
    if config.kv_source == "layer":
        if config.retrieval_heads.strip() != "all":
            return _of_heads(config, model_layout, retrieval_layers)
        if not model_layout.alike(retrieval_layers):
            return PackedSource(model_layout, retrieval_layers)
        return LayerSource(model_layout, {layer: layer for layer in retrieval_layers})
    if config.kv_source == "latent":
        _check_alike(config, model_layout, retrieval_layers)
        return LatentSource(_fitting_maps(config, model_layout, retrieval_layers, like))
    memory_layer = shared_memory_layer(config, model_layout)
    _check_alike(config, model_layout, (*retrieval_layers, memory_layer))
    return LayerSource(model_layout, dict.fromkeys(retrieval_layers, memory_layer))


def _of_heads(config: MemoryConfig, model_layout: ModelLayout, retrieval_layers: tuple[int, ...]) -> KvSource:
    heads = parse_heads(config.retrieval_heads, model_layout, retrieval_layers)
    if not has_plain_heads(model_layout, tuple(heads)):
        raise InvalidArgumentError(
            "retrieval_heads must be 'all' for this model, whose retrieval layers do not each attend to K-V heads of "
            f"their own, of one shape, or have learned sinks, got {config.retrieval_heads!r:.80}"
        )
    if all(len(some) == model_layout.layers[layer].kv_heads for layer, some in heads.items()):
        return LayerSource(model_layout, {layer: layer for layer in heads})
    return HeadSource(model_layout, heads)


def shared_memory_layer(config: MemoryConfig, model_layout: ModelLayout) -> int:
    """Return the layer whose K-V is stored for all: ``memory_layer``, or the first of the upper half that sees all."""
    numbers = tuple(model_layout.layers)
    upper = numbers[len(numbers) // 2 :]
    usual = next((number for number in upper if number in model_layout.full_attention_layers), upper[0])
    layer = usual if config.memory_layer is None else config.memory_layer
    if layer not in model_layout.layers:
        raise InvalidArgumentError(
            f"memory_layer must be among {ranges(numbers)}, the layers with K-V of their own, got {layer}"
        )
    return layer


def _check_alike(config: MemoryConfig, model_layout: ModelLayout, layers: tuple[int, ...]) -> None:
    if not model_layout.alike(layers):
        raise InvalidArgumentError(
            f"Layers {ranges(layers)} must have keys and values of one shape for kv_source={config.kv_source!r}, got "
            "different ones. Name layers that are alike, or use kv_source='layer'"
        )


def _fitting_maps(
    config: MemoryConfig, model_layout: ModelLayout, retrieval_layers: tuple[int, ...], like: Tensor
) -> LatentMaps:
    if config.maps is None:
        raise InvalidArgumentError(
            "maps must name the file that `memlong fit` wrote for this model if kv_source is 'latent', got None"
        )
    maps = LatentMaps.load(config.maps)
    shape = model_layout.layers[retrieval_layers[0]].shape
    ours = (retrieval_layers, shape.kv_heads, shape.head_dim)
    theirs = (maps.layers, *maps.mean.shape[2:])
    if ours != theirs:
        raise InvalidArgumentError(
            f"maps names {config.maps!r}, made for the layers {theirs[0]} with {theirs[1]} K-V heads of {theirs[2]}, "
            f"but memory is in the layers {ours[0]} with {ours[1]} of {ours[2]}. Set retrieval_layers to those of the "
            "maps, or make maps for this model with `memlong fit`"
        )
    return maps.to(device=like.device, dtype=like.dtype)
