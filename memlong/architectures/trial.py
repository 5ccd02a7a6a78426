"""Test whether memory attaches to an architecture, and whether its logits are then correct."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from memlong.architectures.described import kinds_of_layers, stored_of_a_token
from memlong.architectures.listing import Architecture
from memlong.architectures.tiny import tiny_model_of
from memlong.decoder import MemoryConfig, MemoryDecoder
from memlong.decoder.model.quiet_loading import quiet_loading
from memlong.errors import MemlongError

Status = Literal["works", "refused", "fails"]

_TOKENS = 150
_TOLERANCE = 1e-4  # relative to the largest logit, in float32
_SIZES: dict[str, Any] = {"chunk_size": 8, "segment_size": 16, "sink_tokens": 2, "position_mode": "original"}
_WAYS = {
    "the whole text in the window": MemoryConfig(local_window=_TOKENS + 32, **_SIZES),
    "all but the window in memory": MemoryConfig(
        local_window=32, top_k=40, **_SIZES
    ),  # shorter than the models' sliding windows
}


_UNMADE = "Cannot build a tiny model"


@dataclass(frozen=True)
class Trial:
    """The result of attaching memory to a tiny model of an architecture.

    Attributes
    ----------
    architecture
        The architecture tested.
    status
        ``"works"``: logits match the plain model's, both with the whole text in the window and with all but the window
        in memory. ``"refused"``: memlong explains why it does not attach, or no model can be built. ``"fails"``: any
        other error, or wrong logits.
    reason
        Why it does not work.
    layers
        Kinds of layers, if it works.
    stored
        What memory stores per token, if it works.
    """

    architecture: Architecture
    status: Status
    reason: str = ""
    layers: str = ""
    stored: str = ""

    @property
    def is_unmade(self) -> bool:
        """Whether no tiny model could be built."""
        return self.reason.startswith(_UNMADE)

    @property
    def short_reason(self) -> str:
        """The reason, without the text common to all refusals."""
        begin = self.reason.find(": ") + 2 if self.reason.startswith("Memory cannot be attached to ") else 0
        return self.reason[begin:].partition(". Supported are ")[0]


def try_architecture(architecture: Architecture) -> Trial:
    """Test memory on a tiny random model of an architecture; never raises."""
    with quiet_loading(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = tiny_model_of(architecture)
        except Exception as error:  # noqa: BLE001 - the error is the result
            return Trial(architecture, "refused", f"{_UNMADE}: {_message(error)}")
        return _tried(architecture, model)


def _tried(architecture: Architecture, model: PreTrainedModel) -> Trial:
    decoders = []
    for config in _WAYS.values():
        try:
            decoders.append(MemoryDecoder(model, None, config))
        except MemlongError as error:
            return Trial(architecture, "refused", _message(error))
        except Exception as error:  # noqa: BLE001
            return Trial(architecture, "fails", f"Attaching raises {_message(error)}")
    text = torch.randint(3, 90, (1, _TOKENS), generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            plain = model(input_ids=text).logits
    except Exception as error:  # noqa: BLE001
        return Trial(
            architecture, "fails", f"Memory attaches, but the plain model cannot read text: {_message(error)}"
        )
    for way, decoder in zip(_WAYS, decoders, strict=True):
        try:
            with decoder:
                logits = torch.cat([segment.logits for segment in decoder.stream(text)], dim=1)
        except Exception as error:  # noqa: BLE001
            return Trial(architecture, "fails", f"With {way}, reading raises {_message(error)}")
        if (off := _distance(logits, plain)) > _TOLERANCE:
            return Trial(
                architecture,
                "fails",
                f"With {way}, logits are off by {off:.0e} of the largest{_of_itself(model, text, plain)}",
            )
    layout = decoders[0].model_layout
    return Trial(architecture, "works", "", kinds_of_layers(layout), stored_of_a_token(decoders[0]))


def _distance(logits: Tensor, plain: Tensor) -> float:
    if logits.shape != plain.shape:
        return float("inf")
    return float(((logits - plain).abs().max() / plain.abs().max()).nan_to_num(nan=float("inf")))


def _of_itself(model: PreTrainedModel, text: Tensor, plain: Tensor) -> str:
    """Note if the plain model's own logits differ when it reads the text in pieces, with its own cache."""
    try:
        with torch.no_grad():
            cache = DynamicCache(config=model.config.get_text_config(decoder=True))
            pieces = [
                model(input_ids=piece, past_key_values=cache, use_cache=True).logits
                for piece in text.split(16, dim=1)
            ]
        off = _distance(torch.cat(pieces, dim=1), plain)
    except Exception as error:  # noqa: BLE001
        return f" (the plain model cannot read the text in pieces: {_message(error)})"
    return "" if off <= _TOLERANCE else f" (the plain model reading in pieces is off by {off:.0e})"


def _message(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, MemlongError) else f"{type(error).__name__}: {text}"
