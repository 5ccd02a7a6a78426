"""Which of torch's attention kernels compute the softmax over memory and window.

Where every token sees all keys up to its own, no mask is needed: torch then uses its flash kernel on a GPU, and
grouped-query attention needs no copies of keys and values. Elsewhere an additive mask says what is visible.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Output = tuple[Tensor, Tensor | None]
Attend = Callable[..., Output]
"""An attention function of transformers: (module, query, key, value, attention_mask, **options)."""

_ALIGNED = 8  # what kernels that take a mask ask of a head's width, and of a mask's rows
_BEYOND_SDPA = ("softcap", "s_aux", "position_bias", "cache")


def steady_kernels(device: torch.device) -> AbstractContextManager[None]:
    """Keep torch from cuDNN's attention while a model runs on CUDA.

    It plans for each new key length, which a stream has at every token (40 to 60 ms on an H200, see docs/results); it
    cannot differentiate a bias, such as gates; and its backward pass gives NaN (pytorch/pytorch#196678). Other devices
    offer no choice.
    """
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def prefers_no_mask(query: Tensor) -> bool:
    """Whether a maskless kernel for many tokens is faster than one with a mask that all layers share.

    It is where flash attention runs: on CUDA in half precision. On a CPU, a shared mask costs nothing.
    """
    return query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)


def is_plain(base: Attend, options: dict[str, Any]) -> bool:
    """Whether this is torch's attention: a softmax of scaled products, with nothing more to it."""
    return base is ALL_ATTENTION_FUNCTIONS["sdpa"] and not beyond_sdpa(options)


def beyond_sdpa(options: dict[str, Any]) -> str:
    """Name the options of an attention function that are more than a softmax of scaled products."""
    odd = ["dropout"] if options.get("dropout") else []
    return ", ".join(odd + [name for name in _BEYOND_SDPA if options.get(name) is not None])


def attend_to_all_before(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Output:
    """Attend to every key up to a token's own, the last key being the last query's; like an attention function.

    Parameters
    ----------
    query
        [rows, heads, queries, head_dim].
    key, value
        [rows, kv_heads, keys, head_dim].
    scale
        Factor of the products; None is 1 / sqrt(head_dim).
    """
    queries, keys = query.shape[2], key.shape[2]
    mask = None if queries == 1 else causal_lower_right(queries, keys)
    return _sdpa(query, key, value, mask, scale)


def attend_with_mask(
    base: Attend,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    options: dict[str, Any],
) -> Output:
    """Let transformers' own function attend with an additive mask [rows, 1 or heads, queries, keys].

    On CUDA, heads whose width is not a multiple of 8 are padded: else torch would fall back to products in float32.
    """
    options = {**options, "is_causal": False}
    if mask.requires_grad and not query.requires_grad:
        query = (
            query.detach().requires_grad_()
        )  # else torch's kernels for CUDA keep nothing for the bias's gradient
    width = query.shape[-1]
    if query.is_cuda and (width % _ALIGNED or value.shape[-1] % _ALIGNED):
        return attend_padded(base, module, query, key, value, mask, options)
    if query.device.type == "cpu" and is_plain(base, options):  # copies no K-V for grouped-query attention
        return _sdpa(query, key, value, mask, options.get("scaling"))
    return base(module, query, key, value, mask, **options)


def attend_padded(
    base: Attend,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    options: dict[str, Any],
) -> Output:
    """Attend as ``base`` does, with heads that are padded with zeros to a width that all kernels take."""
    width, value_width = query.shape[-1], value.shape[-1]
    scale = options.get("scaling")
    options = {**options, "scaling": width**-0.5 if scale is None else scale}
    query, key, value = (functional.pad(states, (0, -width % _ALIGNED)) for states in (query, key, value))
    output, weights = base(module, query, key, value, mask, **options)
    return output[..., :value_width], weights


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn what is visible [rows, queries, keys] into a mask [rows, 1, queries, keys] whose rows kernels can read."""
    rows, queries, keys = visible.shape
    mask = torch.zeros(rows, 1, queries, keys + -keys % _ALIGNED, dtype=dtype, device=visible.device)[
        ..., :keys
    ]
    return mask.masked_fill_(~visible[:, None], torch.finfo(dtype).min)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Output:
    output = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return output.transpose(1, 2).contiguous(), None
