"""The local window: sink tokens and the latest tokens of every row, as a cache for transformers.

Keys are held twice: un-rotated, as the bank wants them and as moving the window needs them, and rotated to where they
stand now, as attention wants them. The window is small and bounded, and no rounding ever adds up. Tokens that come one
by one are un-rotated together, when the window moves, and written behind the others, without copying those.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from memlong.decoder.probe import ModelLayout
from memlong.decoder.room import Room, few
from memlong.decoder.rope import AngleCache, LayerRope
from memlong.decoder.stored import tensor_of

_PADDING = -1


class WindowLayer(DynamicLayer):
    """K-V of one layer: rotated ``keys``, ``raw_keys`` and ``values``, each [rows, kv_heads, columns, head_dim]."""

    keys: Tensor
    values: Tensor

    def __init__(self, rope: LayerRope) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rope = rope
        self.angles: AngleCache | None = None
        self._raw_keys: Tensor | None = (
            None  # of the first columns; the others' are made when they are wanted
        )
        self._room: Room | None = None

    @property
    def raw_keys(self) -> Tensor:
        """Un-rotated keys."""
        raw = self._raw_keys
        known = 0 if raw is None else raw.shape[2]
        if raw is None or known < self.keys.shape[2]:
            assert self.angles is not None  # noqa: S101 - LocalWindow.expecting comes first
            angles = self.angles.of(self.rope, known)
            # What the window holds is a constant to later segments: no gradient goes back into this one.
            fresh = self.rope.unrotate(self.keys[:, :, known:].detach(), angles)
            self._raw_keys = raw = fresh if raw is None else torch.cat([raw, fresh], dim=2)
        return raw

    @property
    def nbytes(self) -> int:
        """Bytes of keys, rotated and not, and values."""
        raw = 0 if self._raw_keys is None else self._raw_keys.nbytes
        return self.keys.nbytes + self.values.nbytes + raw if self.is_initialized else 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Take in the K-V of a segment, as transformers calls it, and give that of the whole window."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if few(key_states) and self.keys.numel():
            count = self.keys.shape[2]
            if self._room is None or not self._room.has_space(count + key_states.shape[2]):
                self._room = Room.around(self.keys, self.values)
            self.keys, self.values = self._room.put(count, key_states, value_states)
        else:
            self.keys = torch.cat([self.keys, key_states], dim=2)
            self.values = torch.cat([self.values, value_states], dim=2)
            self._room = None
        return self.keys, self.values

    def hold(self, keys: Tensor, raw_keys: Tensor, values: Tensor) -> None:
        """Hold these columns, and no others."""
        self.lazy_initialization(keys, values)
        self.keys, self._raw_keys, self.values, self._room = keys, raw_keys, values, None

    def keeping(self, columns: Tensor) -> WindowLayer:
        """Return a layer of these columns [rows or 1, kept] alone; its ``keys`` must be placed anew."""
        if columns.shape[0] == 1:
            raw, values = (states.index_select(2, columns[0]) for states in (self.raw_keys, self.values))
        else:
            index = columns[:, None, :, None]
            raw, values = (states.take_along_dim(index, dim=2) for states in (self.raw_keys, self.values))
        other = copy(self)
        other.hold(raw, raw, values)
        return other

    def of_rows(self, rows: Tensor) -> WindowLayer:
        """Return a layer of these rows."""
        other = copy(self)
        if self.is_initialized:
            states = (self.keys, self.raw_keys, self.values)
            other.hold(*(state.index_select(0, rows) for state in states))
        return other

    def detach(self) -> None:
        """Let no later gradient reach what made these keys and values."""
        if self.is_initialized:
            self.keys, self.values = self.keys.detach(), self.values.detach()

    def place(self, angles: AngleCache) -> None:
        """Rotate all keys to the positions of ``angles``."""
        self.keys = self.rope.rotate(self.raw_keys, angles.of(self.rope))


class LocalWindow(Cache):
    """The windows of all rows and layers.

    A window that has been filled is not changed any more: what comes next is a window of its own, made beside it, so
    that whatever goes wrong meanwhile leaves the one at hand as it was.

    Attributes
    ----------
    tokens
        [rows, columns], int64: which token of its stream a column holds, counted from 0; −1 for padding. Columns of a
        row ascend; rows may have padding anywhere, since what a token sees goes by position.
    """

    def __init__(self, layout: ModelLayout, rows: int, device: torch.device) -> None:
        self._hold([WindowLayer(layer.rope) for layer in layout.layers])
        self.tokens = torch.empty(rows, 0, dtype=torch.long, device=device)
        self._positions = self.tokens

    def _hold(self, layers: list[WindowLayer]) -> None:
        self._window_layers = layers
        super().__init__(layers=list(layers))

    def _of(self, layers: list[WindowLayer], tokens: Tensor, positions: Tensor) -> LocalWindow:
        other = copy(self)
        other._hold(layers)  # noqa: SLF001 - its own
        other.tokens, other._positions = tokens, positions  # noqa: SLF001
        return other

    def of_rows(self, rows: Tensor) -> LocalWindow:
        """Return a window of these rows [n], which may come more than once."""
        layers = [layer.of_rows(rows) for layer in self._window_layers]
        return self._of(layers, self.tokens.index_select(0, rows), self._positions.index_select(0, rows))

    @property
    def valid(self) -> Tensor:
        """[rows, columns], bool: False for padding."""
        return self.tokens != _PADDING

    @property
    def nbytes(self) -> int:
        """Bytes of keys, rotated and not, and values."""
        return sum(layer.nbytes for layer in self._window_layers)

    def tensors(self) -> dict[str, Tensor]:
        """Return all that the window holds, for :meth:`of_tensors`."""
        found = {"window.tokens": self.tokens}
        for index, layer in enumerate(self._window_layers):
            if layer.is_initialized:
                states = {"keys": layer.keys, "raw_keys": layer.raw_keys, "values": layer.values}
                found |= {f"window.{index}.{name}": state.contiguous() for name, state in states.items()}
        return found

    def of_tensors(
        self, tensors: Mapping[str, Tensor], like: Tensor, kv_heads: int, head_dim: int
    ) -> LocalWindow:
        """Return a window that holds what another one held; ValueError or KeyError if it cannot have."""
        tokens = tensor_of(tensors, "window.tokens", len(self.tokens), None)
        layers = [copy(layer) for layer in self._window_layers]
        shape = (*tokens.shape[:1], kv_heads, tokens.shape[1], head_dim)
        for index, layer in enumerate(layers if tokens.shape[1] else []):
            keys, raw_keys, values = (
                tensor_of(tensors, f"window.{index}.{name}", *shape, like=like)
                for name in ("keys", "raw_keys", "values")
            )
            layer.hold(keys, raw_keys, values)
        tokens = tokens.to(like.device)
        return self._of(layers, tokens, torch.zeros_like(tokens))  # where they stand, raw keys need not know

    def expecting(self, tokens: Tensor, positions: Tensor) -> LocalWindow:
        """Return a window that a forward call fills with the tokens [rows, new], which stand at ``positions``."""
        everywhere = torch.cat([self._positions, positions], dim=1)
        angles = AngleCache(everywhere)
        layers = [copy(layer) for layer in self._window_layers]
        for layer in layers:
            layer.angles = angles
        return self._of(layers, torch.cat([self.tokens, tokens], dim=1), everywhere)

    def columns_of(self, row: int, start: int, end: int) -> Tensor:
        """Columns that hold the tokens ``start`` to ``end`` of a row, in order."""
        tokens = self.tokens[row]
        return ((tokens >= start) & (tokens < end)).nonzero().squeeze(1)

    def keys_and_values(self, row: int, columns: Tensor, layers: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Un-rotated keys, and values, of some columns: [layers, kv_heads, columns, head_dim] each."""
        chosen = [self._window_layers[layer] for layer in layers]
        keys = torch.stack([layer.raw_keys[row].index_select(1, columns) for layer in chosen])
        values = torch.stack([layer.values[row].index_select(1, columns) for layer in chosen])
        return keys, values

    def keeping(self, wanted: Tensor) -> LocalWindow:
        """Return a window of the columns marked in ``wanted`` [rows, columns], bool; follow it with :meth:`place`."""
        if bool((wanted == wanted[:1]).all()):
            columns = wanted[0].nonzero().T
            tokens = self.tokens.index_select(1, columns[0])
        else:
            # Rows keep different columns: gather each row's own, and pad the shorter rows on the left.
            width = int(wanted.sum(dim=1).max())
            order = wanted.to(torch.int8).argsort(dim=1, stable=True)
            columns = order[:, order.shape[1] - width :]
            kept = wanted.take_along_dim(columns, dim=1)
            tokens = self.tokens.take_along_dim(columns, dim=1).masked_fill(~kept, _PADDING)
        return self._of([layer.keeping(columns) for layer in self._window_layers], tokens, tokens)

    def place(self, positions: Tensor) -> None:
        """Put the columns at these positions [rows, columns]."""
        angles = AngleCache(positions)
        for layer in self._window_layers:
            layer.place(angles)
        self._positions = positions

    def detach(self) -> None:
        """Make what the window holds a constant to what follows (truncated backpropagation)."""
        for layer in self._window_layers:
            layer.detach()
