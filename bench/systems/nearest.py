"""Each token's own nearest keys, in each layer and head: what Memorizing Transformers and FoT retrieve."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache

from memlong.errors import UnsupportedModelError
from systems.cached import Cached

_NAME = "nearest_keys"


class NearestKeys(Cached):
    """Exact kNN over all K-V that has left the local window.

    Each token attends, in one softmax, to sink tokens, the local window, and so many earlier keys as a memory of this
    configuration retrieves tokens: those with the largest logits for it, chosen in each layer and each attention head.
    All keys are at their own positions, and all are compared; layers with a sliding window of their own stay as they
    are. The model has not been trained for this, as FoT's (arXiv 2307.03170) has.

    Raises
    ------
    UnsupportedModelError
        If attention has more to it: capped logits, or sinks of its own.
    """

    def empty(self) -> DynamicCache:
        """Return a cache of nothing."""
        return DynamicCache(config=self.model.config)

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """Answer a prompt [1, tokens]; the stream stays where it is."""
        with self._attending():
            return super().generate(input_ids, attention_mask, **options)

    @property
    def device_kv_bytes(self) -> int:
        """Bytes of the cache."""
        layers: list[Any] = self._cache.layers
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers if layer.is_initialized)

    def _forward(self, cache: Cache, tokens: list[int], keep: int) -> Tensor:
        with self._attending():
            return super()._forward(cache, tokens, keep)

    def kv_read_bytes(self, tokens: int, size: int) -> int:
        """Return the bytes of all K-V, whose keys are all compared."""
        layers = self.model_layout.layers.values()
        return sum(min(tokens, each.sliding_window or tokens) * each.shape.numbers * size for each in layers)

    @contextmanager
    def _attending(self) -> Iterator[None]:
        """Have the model attend so while it reads, and to everything again afterwards."""
        config = self.config
        near, nearest = config.local_window, config.top_k * config.chunk_size

        def attention(_: nn.Module, q: Tensor, k: Tensor, v: Tensor, *_mask: Any, **options: Any) -> Any:
            return _attended(q, k, v, near=near, sinks=config.sink_tokens, nearest=nearest, **options), None

        AttentionInterface.register(_NAME, attention)
        AttentionMaskInterface.register(_NAME, lambda *_, **__: None)  # a stream is never padded
        usual = self.model.config._attn_implementation  # noqa: SLF001 - nothing public tells
        self.model.set_attn_implementation(_NAME)
        try:
            yield
        finally:
            self.model.set_attn_implementation(usual)


def _attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    near: int,
    sinks: int,
    nearest: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> Tensor:
    """Return [1, tokens, heads, width]: what tokens see, the last of the keys [1, K-V heads, keys, width]."""
    if odd := [name for name in ("softcap", "s_aux") if others.get(name) is not None]:
        raise UnsupportedModelError(
            f"Nearest keys leave out {odd[0]} of this model's attention: take another"
        )
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    logits = (query @ key.transpose(2, 3)).float() * (scaling or query.shape[-1] ** -0.5)
    index = torch.arange(key.shape[2], device=key.device)
    distance = index[-query.shape[2] :, None] - index
    seen = distance >= 0
    if sliding_window is not None:
        kept = seen & (distance < sliding_window)
    else:
        is_near = seen & ((distance < near) | (index < sinks))
        is_far = seen & ~is_near
        kept = seen
        if int(is_far.sum(-1).max()) > nearest:
            far = logits.masked_fill(~is_far, float("-inf"))
            kept = is_near | (is_far & (far >= _least(far, nearest)))
    weights = logits.masked_fill(~kept, float("-inf")).softmax(dim=-1).to(value.dtype)
    return (weights @ value).transpose(1, 2).contiguous()


def _least(numbers: Tensor, count: int) -> Tensor:
    """Return the least [..., 1] of the ``count`` largest numbers of each row."""
    if numbers.device.type != "cpu":
        return numbers.topk(count, dim=-1).values[..., -1:]
    # Several times faster than topk here.
    return torch.from_numpy(np.partition(numbers.numpy(), -count, axis=-1)[..., -count, None])
