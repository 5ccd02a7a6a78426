"""A trial: whether memory works in a model, where a probe alone cannot tell.

A few tokens are read as a stream whose window holds the last of them and whose memory all others. With everything in
memory, at its place in the text, that is full attention: the logits must be the plain model's.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from memlong.decoder.config import MemoryConfig
from memlong.decoder.kv.sources import make_source
from memlong.decoder.model.attention import AttentionSlot, evaluating, installed, replaced_attention
from memlong.decoder.model.layout import ModelLayout
from memlong.decoder.retrievers.create import create_retriever
from memlong.decoder.setup import Setup
from memlong.decoder.stream.batch import StreamBatch
from memlong.errors import MemlongError, UnsupportedModelError
from memlong.plugins import Registry

_CONFIG = MemoryConfig(
    retriever="recent", chunk_size=1, segment_size=2, local_window=3, sink_tokens=0, position_mode="original"
)
_TOKENS = 4  # two segments: the second continues from the first one's states, and remembers a token
_TOLERANCE = {torch.float32: 0.01, torch.float64: 0.01}
_COARSE = 0.05  # in half precision
_NOISE = 4  # times what rounding the embeddings differently makes, where that is more, as in very deep models


def try_out(model: PreTrainedModel, model_layout: ModelLayout, registry: Registry) -> None:
    """Compare memory of everything with full attention, over a few tokens.

    Raises
    ------
    UnsupportedModelError
        If they differ, or the model does not come to an end.
    """
    like = cast("Tensor", model.get_input_embeddings().weight)
    input_ids = torch.arange(5, 5 + _TOKENS, device=like.device)[None] % model_layout.vocabulary
    try:
        with evaluating(model), torch.no_grad():
            plain: Tensor = model(input_ids=input_ids).logits
            streamed = _streamed(model, model_layout, registry, input_ids, like)
    except MemlongError:
        raise
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise _refused(
            model, f"a trial over {_TOKENS} tokens ended in {type(error).__name__}: {first}"
        ) from error
    error_size = _off(streamed, plain)
    tolerance = _TOLERANCE.get(model.dtype, _COARSE)
    if not error_size <= tolerance:
        tolerance = max(tolerance, _NOISE * _off(_rounded_otherwise(model, input_ids), plain))
    if not error_size <= tolerance:
        own = _off(_by_its_own_cache(model, input_ids), plain)
        if own > tolerance:
            raise _refused(
                model,
                "transformers' own implementation cannot go on from its cache with several tokens at a time: read so, "
                f"{_TOKENS} tokens give other logits ({own:.0%}) than in one pass",
            )
        raise _refused(
            model,
            f"in a trial over {_TOKENS} tokens, memory of all of them was not what full attention is: logits differ by "
            f"{error_size:.0%}, so that the text must have a part in them other than by attention to keys and values",
        )


def _streamed(
    model: PreTrainedModel, model_layout: ModelLayout, registry: Registry, input_ids: Tensor, like: Tensor
) -> Tensor:
    retriever = create_retriever(_CONFIG.retriever, model, None, {}, registry)
    source = make_source(_CONFIG, model_layout, model_layout.full_attention_layers, like)
    bank = registry.create_bank("torch", retriever.dim, metric=retriever.metric)
    layers = model_layout.full_attention_layers
    setup = Setup(model, model_layout, _CONFIG, layers, source, None, retriever, registry)
    slot = AttentionSlot()
    streams = StreamBatch(setup, slot, [bank])
    with installed(slot, model_layout.modules), replaced_attention(model):
        segments = list(streams.read(input_ids.tolist(), 0))
    return torch.cat([segment.logits for segment in segments], dim=1)


def _rounded_otherwise(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Logits in one pass, with each number of the embeddings as far off as rounding may put it."""

    def shaken(_module: object, _given: object, output: Tensor) -> Tensor:
        sign = 1 - 2 * (torch.arange(output.shape[-1], device=output.device) % 2)
        return output * (1 + torch.finfo(output.dtype).eps * sign).to(output.dtype)

    hook = model.get_input_embeddings().register_forward_hook(shaken)
    try:
        with evaluating(model), torch.no_grad():
            logits: Tensor = model(input_ids=input_ids).logits
    finally:
        hook.remove()
    return logits


def _by_its_own_cache(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Logits of the same segments without a memory."""
    cache = DynamicCache(config=model.config)
    parts = input_ids.split(_CONFIG.segment_size, dim=1)
    with evaluating(model), torch.no_grad():
        logits = [model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in parts]
    return torch.cat(logits, dim=1)


def _off(logits: Tensor, plain: Tensor) -> float:
    return float((logits.double() - plain.double()).norm() / plain.double().norm())


def _refused(model: PreTrainedModel, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"Memory cannot be attached to {type(model).__name__}: {reason}")
