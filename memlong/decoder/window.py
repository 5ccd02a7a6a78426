"""The local window: sink tokens and the latest tokens of every row, as a cache for transformers.

Keys are held twice: un-rotated, as the bank wants them and as moving the window needs them, and rotated to where they
stand now, as attention wants them. The window is small and bounded, and no rounding ever adds up.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from memlong.decoder.probe import ModelLayout
from memlong.decoder.rope import AngleCache, LayerRope

_PADDING = -1


class WindowLayer(DynamicLayer):
    """K-V of one layer: rotated ``keys``, ``raw_keys`` and ``values``, each [rows, kv_heads, columns, head_dim]."""

    keys: Tensor
    values: Tensor
    raw_keys: Tensor

    def __init__(self, rope: LayerRope) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rope = rope
        self.incoming: AngleCache | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Take in the K-V of a segment, as transformers calls it, and give that of the whole window."""
        assert self.incoming is not None  # noqa: S101 - LocalWindow.expect comes first
        # What the window holds is a constant to later segments: no gradient goes back into this one.
        raw = self.rope.unrotate(key_states.detach(), self.incoming.of(self.rope))
        self.raw_keys = torch.cat([self.raw_keys, raw], dim=2) if self.is_initialized else raw
        keys, values = super().update(key_states, value_states)
        return keys, values

    def keep(self, columns: Tensor) -> None:
        """Keep these columns [rows or 1, kept] and forget the others; ``keys`` must be placed anew."""
        if columns.shape[0] == 1:
            self.raw_keys = self.raw_keys.index_select(2, columns[0])
            self.values = self.values.index_select(2, columns[0])
        else:
            index = columns[:, None, :, None]
            self.raw_keys = self.raw_keys.take_along_dim(index, dim=2)
            self.values = self.values.take_along_dim(index, dim=2)

    def of_rows(self, rows: Tensor) -> WindowLayer:
        """Return a layer of these rows; this one stays as it is."""
        other = WindowLayer(self.rope)
        if self.is_initialized:
            other.lazy_initialization(self.keys, self.values)
            other.keys, other.values, other.raw_keys = (
                states.index_select(0, rows) for states in (self.keys, self.values, self.raw_keys)
            )
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

    Attributes
    ----------
    tokens
        [rows, columns], int64: which token of its stream a column holds, counted from 0; −1 for padding. Columns of a
        row ascend; rows may have padding anywhere, since what a token sees goes by position.
    """

    def __init__(self, layout: ModelLayout, rows: int, device: torch.device) -> None:
        self._hold([WindowLayer(layer.rope) for layer in layout.layers])
        self.tokens = torch.empty(rows, 0, dtype=torch.long, device=device)

    def _hold(self, layers: list[WindowLayer]) -> None:
        self._window_layers = layers
        super().__init__(layers=list(layers))

    def of_rows(self, rows: Tensor) -> LocalWindow:
        """Return a window of these rows [n], which may come more than once; this one stays as it is."""
        other = copy(self)
        other._hold([layer.of_rows(rows) for layer in self._window_layers])  # noqa: SLF001 - its own
        other.tokens = self.tokens.index_select(0, rows)
        return other

    @property
    def valid(self) -> Tensor:
        """[rows, columns], bool: False for padding."""
        return self.tokens != _PADDING

    @property
    def nbytes(self) -> int:
        """Bytes of keys, rotated and not, and values."""
        layers = [layer for layer in self._window_layers if layer.is_initialized]
        return sum(layer.keys.nbytes + layer.raw_keys.nbytes + layer.values.nbytes for layer in layers)

    def expect(self, tokens: Tensor, positions: Tensor) -> None:
        """Announce the tokens [rows, new] of the next forward call and where they stand."""
        self.tokens = torch.cat([self.tokens, tokens], dim=1)
        angles = AngleCache(positions)
        for layer in self._window_layers:
            layer.incoming = angles

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

    def keep(self, wanted: Tensor) -> None:
        """Keep the columns marked in ``wanted`` [rows, columns], bool; follow it with :meth:`place`."""
        if bool((wanted == wanted[:1]).all()):
            columns = wanted[0].nonzero().T
            self.tokens = self.tokens.index_select(1, columns[0])
        else:
            # Rows keep different columns: gather each row's own, and pad the shorter rows on the left.
            width = int(wanted.sum(dim=1).max())
            order = wanted.to(torch.int8).argsort(dim=1, stable=True)
            columns = order[:, order.shape[1] - width :]
            kept = wanted.take_along_dim(columns, dim=1)
            self.tokens = self.tokens.take_along_dim(columns, dim=1).masked_fill(~kept, _PADDING)
        for layer in self._window_layers:
            layer.keep(columns)

    def place(self, positions: Tensor) -> None:
        """Put the columns at these positions [rows, columns]."""
        angles = AngleCache(positions)
        for layer in self._window_layers:
            layer.place(angles)

    def detach(self) -> None:
        """Make what the window holds a constant to what follows (truncated backpropagation)."""
        for layer in self._window_layers:
            layer.detach()

    def forget_last(self, count: int) -> None:
        """Take back the tokens announced last, after a forward call that failed."""
        self.tokens = self.tokens[:, : self.tokens.shape[1] - count]
        for layer in self._window_layers:
            if layer.is_initialized:
                size = self.tokens.shape[1]
                layer.keys, layer.values = layer.keys[:, :, :size], layer.values[:, :, :size]
                layer.raw_keys = layer.raw_keys[:, :, :size]
