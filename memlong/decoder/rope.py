"""Rotary positions of any transformers model: rotate keys to positions, and undo it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Angles = tuple[Tensor, Tensor]
"""Cosine and sine [rows, tokens, rotary_dim], float32, as the model's own rotary module gives them."""


@dataclass(frozen=True)
class RotaryCall:
    """One call of a model's rotary module, replayed for other positions.

    Models differ in how they scale positions (linear, dynamic, YaRN, Llama 3 …) and in whether layer types have
    rotations of their own; replaying the very call that the model made keeps all of that the model's business.
    """

    module: nn.Module
    arguments: Mapping[str, Any]

    @classmethod
    def record(cls, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RotaryCall:
        """Note down a call as a forward hook sees it."""
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        return cls(module, dict(bound.arguments))

    @property
    def replayable(self) -> bool:
        """Whether the call takes positions under the name that transformers uses."""
        return "position_ids" in self.arguments and "x" in self.arguments

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for calls that give equal angles at equal positions."""
        others = sorted(
            (name, value) for name, value in self.arguments.items() if isinstance(value, str | int | float)
        )
        return (id(self.module), *others)

    def angles(self, positions: Tensor) -> Angles:
        """Angles at the positions [rows, tokens]."""
        like = self.arguments["x"].new_empty(0)
        with torch.no_grad():
            cos, sin = self.module(**{**self.arguments, "x": like, "position_ids": positions})
        return cos.float(), sin.float()


@dataclass(frozen=True)
class LayerRope:
    """How one layer rotates its keys; ``call`` is None for a layer without positions.

    ``apply`` is the ``apply_rotary_pos_emb`` of the model's own module, so half-split and interleaved rotations come
    out as the model means them; it turns the first ``width`` dimensions of a head. Its first argument is a query, for
    which ``stand_ins`` heads of the keys are given: none, or one to functions that cannot do with none. Where it turns
    dimension i with i + width / 2, as most do (``in_halves``), that is done here, in half the time.
    """

    call: RotaryCall | None
    apply: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    width: int = 0
    stand_ins: int = 1
    in_halves: bool = False

    def rotate(self, keys: Tensor, angles: Angles | None) -> Tensor:
        """Put un-rotated keys [rows, kv_heads, tokens, head_dim] at the positions of ``angles``."""
        return self.rotated(keys, angles).to(keys.dtype)

    def unrotate(self, keys: Tensor, angles: Angles | None) -> Tensor:
        """Undo :meth:`rotate`. Angles may be scaled by s (YaRN), so the inverse is R(-a) / s²."""
        return self.unrotated(keys, angles).to(keys.dtype)

    def rotated(self, keys: Tensor, angles: Angles | None) -> Tensor:
        """Do what :meth:`rotate` does, in float32."""
        return keys if angles is None else self._turn(keys, *angles)

    def unrotated(self, keys: Tensor, angles: Angles | None) -> Tensor:
        """Do what :meth:`unrotate` does, in float32."""
        if angles is None:
            return keys
        cos, sin = angles
        square = cos.square() + sin.square()
        return self._turn(keys, cos / square, -sin / square)

    def _turn(self, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        wide = keys[..., : self.width].float()
        if self.in_halves:
            turned = _turned_in_halves(wide, cos[:, None], sin[:, None])
        else:
            assert self.apply is not None  # noqa: S101 - a layer with angles has a rotation
            _, turned = self.apply(wide[:, : self.stand_ins], wide, cos, sin)
        if self.width == keys.shape[-1]:
            return turned
        return torch.cat([turned, keys[..., self.width :].float()], dim=-1)


def _turned_in_halves(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = states.shape[-1] // 2
    turned = states * cos
    turned[..., :half].addcmul_(states[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(states[..., :half], sin[..., half:])
    return turned


class AngleCache:
    """Angles of one set of positions, computed once for all layers that rotate alike."""

    def __init__(self, positions: Tensor) -> None:
        self._positions = positions
        self._angles: dict[tuple[object, ...], Angles] = {}

    def of(self, rope: LayerRope, start: int = 0) -> Angles | None:
        """Angles for this layer, from column ``start`` on, or None if it has no positions."""
        if rope.call is None:
            return None
        key = rope.call.key
        if key not in self._angles:
            self._angles[key] = rope.call.angles(self._positions)
        cos, sin = self._angles[key]
        return cos[:, start:], sin[:, start:]
