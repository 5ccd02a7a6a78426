"""Keys and values of alike layers in one buffer: retrieved chunks on the left, the local window on their right.

Attention reads slices of the buffer, so nothing is copied for it. Moving the window (rotating, dropping columns, adding
memory) is done for all layers of a buffer at once, in a few operations on a device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from memlong.decoder.model.head_names import Heads, runs
from memlong.decoder.model.layout import KvShape, ModelLayout
from memlong.decoder.model.rope import Angles, LayerRope

_SPARE = 64  # columns
# Numbers rotated at a time: on a CPU, what fits its caches; on other devices, a bound on float32 temporaries.
_PIECE = {"cpu": 1 << 17}
_LARGE_PIECE = 1 << 25


@dataclass(frozen=True)
class LayerGroup:
    """Layers that are moved together: of the same shape and rotation, keeping the same tokens.

    Attributes
    ----------
    has_memory
        Whether they attend to memory.
    heads
        The K-V heads that do, ascending; none where all do.
    reach
        How many tokens their window keeps, including the next one: those that a sliding-window layer sees. None for the
        local window of the whole model.
    """

    layers: tuple[int, ...]
    rope: LayerRope
    shape: KvShape
    has_memory: bool
    heads: tuple[int, ...] = ()
    reach: int | None = None


def layer_groups(
    model_layout: ModelLayout,
    retrieval_layers: Sequence[int],
    memory_layers: Sequence[int] = (),
    local_window: int = 0,
    heads: Heads | None = None,
) -> tuple[LayerGroup, ...]:
    """Sort the layers of a model into groups, each ascending; ``heads`` are those that attend to memory, where not all.

    A sliding-window layer keeps what it sees itself, unless it attends to memory; one whose K-V are stored also keeps
    the local window.
    """
    groups: dict[tuple[bool, KvShape, object, tuple[int, ...], int | None], list[int]] = {}
    for index, layer in model_layout.layers.items():
        has_memory = index in retrieval_layers
        reach = None if has_memory else layer.sliding_window
        if reach is not None and index in memory_layers:
            reach = max(reach, local_window + 1)
        some = heads.get(index, ()) if heads else ()
        some = () if len(some) == layer.kv_heads else some
        groups.setdefault((has_memory, layer.shape, layer.rope.kind, some, reach), []).append(index)
    return tuple(
        LayerGroup(tuple(layers), model_layout.layers[layers[0]].rope, shape, has_memory, some, reach)
        for (has_memory, shape, _, some, reach), layers in groups.items()
    )


Turn = Callable[[Tensor, Angles | None], Tensor]
"""A rotation of keys [rows, heads, tokens, head_dim], or its inverse, in float32."""


def turned(states: Tensor, angles: Angles | None, turn: Turn, out: Tensor | None = None) -> Tensor:
    """Rotate keys [rows, layers, kv_heads, tokens, head_dim] with ``turn``, some layers at a time, into ``out``."""
    rows, layers, heads, tokens, width = states.shape
    most = _PIECE.get(states.device.type, _LARGE_PIECE)
    step = max(1, most // max(1, rows * heads * tokens * width))
    if out is None and (angles is None or step >= layers):
        whole = turn(states.flatten(1, 2), angles).to(
            states.dtype
        )  # [rows, layers * kv_heads, tokens, head_dim]
        return whole.view(rows, layers, heads, tokens, width)
    parts = [slice(start, start + step) for start in range(0, layers, step)]
    if torch.is_grad_enabled() and states.requires_grad:  # what has gradients is not overwritten
        # Of slices, each gradient would be as large as all of them.
        return torch.cat([turned(part, angles, turn) for part in states.split(step, dim=1)], dim=1)
    if out is None:
        out = torch.empty_like(states, memory_format=torch.contiguous_format)
    for part in parts:
        out[:, part] = turn(states[:, part].flatten(1, 2), angles).view(rows, -1, heads, tokens, width)
    return out


@dataclass(frozen=True)
class LayerBuffer:
    """Keys and values [rows, layers, heads, columns, width] each, of which the first columns are in use.

    The first ``memory`` columns are for retrieved tokens. Writing after the columns that a window knows does not affect
    it.
    """

    keys: Tensor
    values: Tensor
    memory: int

    @classmethod
    def of(cls, group: LayerGroup, rows: int, columns: int, memory: int, like: Tensor) -> Self:
        """Make a buffer for the layers of a group, of the dtype and on the device of ``like``."""
        sizes = [
            (rows, len(group.layers), heads, memory + columns, width)
            for heads, width in (
                (group.shape.kv_heads, group.shape.head_dim),
                (group.shape.value_heads, group.shape.value_dim),
            )
        ]
        with torch.inference_mode(False):  # it is written to later, in whatever mode
            keys, values = (torch.empty(size, dtype=like.dtype, device=like.device) for size in sizes)
        return cls(keys, values, memory)

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.keys.nbytes + self.values.nbytes

    def fits(self, rows: int, columns: int, memory: int, like: Tensor) -> bool:
        """Whether this buffer is about as large as one that `of` would make for the same group."""
        mine, held = self.keys, self.keys.shape[3]
        return (mine.dtype, mine.device, mine.shape[0]) == (like.dtype, like.device, rows) and (
            memory + columns <= held <= 2 * (memory + columns)
        )

    def has_space(self, columns: int) -> bool:
        """Whether the window can have this many columns."""
        return self.memory + columns <= self.keys.shape[3]

    def grown(self, group: LayerGroup, columns: int, used: int) -> LayerBuffer:
        """Return a larger buffer that holds the memory and the first ``used`` columns of this one."""
        with torch.no_grad():
            other = self.of(group, self.keys.shape[0], columns + _SPARE, self.memory, self.keys)
            end = self.memory + used
            other.keys[:, :, :, :end] = self.keys[:, :, :, :end]
            other.values[:, :, :, :end] = self.values[:, :, :, :end]
        return other

    def of_rows(self, rows: Tensor) -> LayerBuffer:
        """Return the buffer of these rows."""
        with torch.inference_mode(False), torch.no_grad():
            return LayerBuffer(
                self.keys.index_select(0, rows), self.values.index_select(0, rows), self.memory
            )

    def window(self, count: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of the window's first ``count`` columns, of all layers."""
        columns = slice(self.memory, self.memory + count)
        return self.keys[:, :, :, columns], self.values[:, :, :, columns]

    def hold_memory(
        self,
        keys: Tensor,
        values: Tensor,
        angles: Angles | None = None,
        turn: Turn | None = None,
        heads: Sequence[int] = (),
    ) -> None:
        """Write the K-V of all retrieved tokens, of these heads or of all, rotating the keys if there are angles."""
        first = 0
        for run in runs(heads) or [slice(None)]:
            part = slice(first, first + run.stop - run.start) if heads else run
            first = part.stop
            target = self.keys[:, :, run, : self.memory]
            if angles is None or turn is None:
                target.copy_(keys[:, :, part])
            else:
                turned(keys[:, :, part], angles, turn, out=target)
            self.values[:, :, run, : self.memory] = values[:, :, part]
