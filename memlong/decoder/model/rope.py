"""Rotary positions of any transformers model: rotating keys to positions, and back."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Angles = tuple[Tensor, Tensor]
"""Cosine and sine [rows, tokens, width / 2] of the angle of each pair of dimensions, float32."""

Form = Literal["halves", "pairs"]
"""Which dimension is rotated with dimension i: i + width / 2, or its neighbor."""

Pick = Literal["all", "first half", "every other"]
"""Which of a rotary module's angles are those of the pairs: most modules return each twice."""


@dataclass(frozen=True)
class RotaryCall:
    """One call of a model's rotary module, replayed for other positions.

    Models differ in how they scale positions (linear, dynamic, YaRN, Llama 3 …) and in whether layer types have
    rotations of their own; replaying the very call that the model made keeps all of that the model's business.
    """

    module: nn.Module
    arguments: Mapping[str, Any]
    positions: str

    @classmethod
    def record(
        cls, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], positions: Tensor
    ) -> RotaryCall | None:
        """Note down a call as a forward hook sees it; None if it is not about these positions [rows, tokens]."""
        try:
            bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        except TypeError:
            return None
        given = {**bound, **bound.pop("kwargs", {})}
        arguments, name = {}, None
        for key, value in given.items():
            if not isinstance(value, Tensor):
                arguments[key] = value
            elif value.is_floating_point():
                arguments[key] = value.new_empty(0)  # of which a rotary module asks dtype and device
            elif value.shape[-2:] == positions.shape and bool((value == positions).all()):
                arguments[key], name = value, key
            else:
                return None
        return None if name is None else cls(module, arguments, name)

    @property
    def key(self) -> tuple[object, ...]:
        """Return a key that is equal for calls with equal angles at equal positions."""
        others = sorted(
            (name, value) for name, value in self.arguments.items() if isinstance(value, str | int | float)
        )
        return (id(self.module), *others)

    def given(self, positions: Tensor) -> Angles | None:
        """Cosine and sine [rows, tokens, any] as the module gives them; None if it gives something else."""
        before: Tensor = self.arguments[self.positions]
        with torch.no_grad():
            shape = (*before.shape[:-2], *positions.shape)  # of several axes, text stands at one place on all
            moved = {  # with the model
                name: value.to(positions.device) if isinstance(value, Tensor) else value
                for name, value in self.arguments.items()
            }
            output = self.module(**{**moved, self.positions: positions.expand(shape)})
        if isinstance(output, Tensor) and output.is_complex():
            output = output.real, output.imag
        if not isinstance(output, tuple | list) or len(output) != 2:
            return None
        cos, sin = (_of_text(each, positions) for each in output)
        return None if cos is None or sin is None else (cos, sin)


def _of_text(angles: object, positions: Tensor) -> Tensor | None:
    if not isinstance(angles, Tensor) or not angles.is_floating_point():
        return None
    while angles.ndim > 3:
        angles = angles[0] if angles.shape[1:-1] == positions.shape else angles.squeeze(1)
        if angles.ndim > 3 and angles.shape[1] != 1 and angles.shape[1:-1] != positions.shape:
            return None
    fits = (
        angles.ndim == 3 and angles.shape[1] == positions.shape[1] and angles.shape[0] in (1, len(positions))
    )
    return angles.float() if fits else None


@dataclass(frozen=True)
class LayerRope:
    """How one layer rotates its keys; ``call`` is None for a layer without positions.

    Dimensions ``start`` to ``start + width`` of a head turn, by ``sign`` times the angles.
    """

    call: RotaryCall | None
    width: int = 0
    start: int = 0
    form: Form = "halves"
    pick: Pick = "first half"
    sign: int = 1

    @property
    def kind(self) -> tuple[object, ...]:
        """Return a key that is equal for layers that rotate alike."""
        key = None if self.call is None else self.call.key
        return (key, self.width, self.start, self.form, self.pick, self.sign)

    def angles(self, positions: Tensor) -> Angles | None:
        """Angles at the positions [rows, tokens], or None for a layer without them."""
        if self.call is None:
            return None
        given = self.call.given(positions)
        assert given is not None  # noqa: S101 - it gave angles when it was recorded
        cos, sin = (picked(each, self.pick) for each in given)
        return cos, self.sign * sin

    def rotate(self, keys: Tensor, angles: Angles | None) -> Tensor:
        """Rotate keys [rows, kv_heads, tokens, head_dim] to the positions of ``angles``."""
        return self.rotated(keys, angles).to(keys.dtype)

    def unrotate(self, keys: Tensor, angles: Angles | None) -> Tensor:
        """Undo `rotate`. Angles may be scaled by s (YaRN), so the inverse is R(-a) / s²."""
        return self.unrotated(keys, angles).to(keys.dtype)

    def rotated(self, keys: Tensor, angles: Angles | None) -> Tensor:
        """Do as `rotate`, in float32."""
        return keys if angles is None else self._turn(keys, *angles)

    def unrotated(self, keys: Tensor, angles: Angles | None) -> Tensor:
        """Do as `unrotate`, in float32."""
        if angles is None:
            return keys
        cos, sin = angles
        square = cos.square() + sin.square()
        return self._turn(keys, cos / square, -sin / square)

    def _turn(self, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        end = self.start + self.width
        wide = keys[..., self.start : end].float()
        turn = _turned_in_halves if self.form == "halves" else _turned_in_pairs
        turned = turn(wide, cos[:, None], sin[:, None])
        if self.width == keys.shape[-1]:
            return turned
        return torch.cat([keys[..., : self.start].float(), turned, keys[..., end:].float()], dim=-1)


def picked(angles: Tensor, pick: Pick) -> Tensor:
    """Return the angles of the pairs among those of a rotary module [rows, tokens, any]."""
    if pick == "all":
        return angles
    return angles[..., : angles.shape[-1] // 2] if pick == "first half" else angles[..., ::2]


def possible_ropes(call: RotaryCall, given: Tensor, head_dim: int) -> Iterator[LayerRope]:
    """Yield the ways in which keys of this width may rotate by a call's angles [rows, tokens, any]."""
    picks: tuple[Pick, ...] = ("first half", "every other", "all")
    for pick in picks:
        width = 2 * picked(given, pick).shape[-1]
        if not 0 < width <= head_dim or (pick != "all" and given.shape[-1] % 2):
            continue
        forms: tuple[Form, ...] = ("halves", "pairs")
        for form in forms:
            for start in sorted({0, head_dim - width}):
                for sign in (1, -1):
                    yield LayerRope(call, width, start, form, pick, sign)


def _turned_in_halves(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = states.shape[-1] // 2
    if torch.is_grad_enabled() and states.requires_grad:  # what has gradients is better not overwritten
        first, second = states.split(half, dim=-1)
        return torch.cat(
            [(first * cos).addcmul(second, sin, value=-1), (second * cos).addcmul(first, sin)], dim=-1
        )
    turned = states * torch.cat([cos, cos], dim=-1)
    turned[..., :half].addcmul_(states[..., half:], sin, value=-1)
    turned[..., half:].addcmul_(states[..., :half], sin)
    return turned


def _turned_in_pairs(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = states * cos.repeat_interleave(2, dim=-1)
    turned[..., ::2].addcmul_(states[..., 1::2], sin, value=-1)
    turned[..., 1::2].addcmul_(states[..., ::2], sin)
    return turned


class AngleCache:
    """Angles of one set of positions, computed once for all layers that rotate alike."""

    def __init__(self, positions: Tensor) -> None:
        self._positions = positions
        self._angles: dict[tuple[object, ...], Angles] = {}

    def of(self, rope: LayerRope, start: int = 0) -> Angles | None:
        """Return angles for this layer, from column ``start`` on, or None if it has no positions."""
        if rope.call is None:
            return None
        if rope.kind not in self._angles:
            angles = rope.angles(self._positions)
            assert angles is not None  # noqa: S101 - it has positions
            self._angles[rope.kind] = angles
        cos, sin = self._angles[rope.kind]
        return cos[:, start:], sin[:, start:]
