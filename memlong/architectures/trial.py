"""Try whether memory attaches to an architecture, and whether what it then computes is right."""

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
_TOLERANCE = 1e-4  # of the largest logit, in float32
_SIZES: dict[str, Any] = {"chunk_size": 8, "segment_size": 16, "sink_tokens": 2, "position_mode": "original"}
_WAYS = {
    "the whole text in the window": MemoryConfig(local_window=_TOKENS + 32, **_SIZES),
    "all but the window in memory": MemoryConfig(
        local_window=32, top_k=40, **_SIZES
    ),  # less than sliding layers see
}


_UNMADE = "No tiny model of it can be made"


@dataclass(frozen=True)
class Trial:
    """What came of attaching memory to a tiny model of an architecture.

    Attributes
    ----------
    architecture
        That was tried.
    status
        ``"works"``: the logits are those of the plain model, with the whole text in the window and with all but the
        window in memory. ``"refused"``: memlong says why it cannot attach, or there is no model that reads text.
        ``"fails"``: any other error, or other logits.
    reason
        Why it does not work.
    layers
        Which kinds of layers it has, where it works.
    stored
        What memory stores of a token, where it works.
    """

    architecture: Architecture
    status: Status
    reason: str = ""
    layers: str = ""
    stored: str = ""

    @property
    def is_unmade(self) -> bool:
        """Whether there was no tiny model to be tried."""
        return self.reason.startswith(_UNMADE)

    @property
    def short_reason(self) -> str:
        """The reason without what every refusal says."""
        begin = self.reason.find(": ") + 2 if self.reason.startswith("Memory cannot be attached to ") else 0
        return self.reason[begin:].partition(" Supported are ")[0]


def try_architecture(architecture: Architecture) -> Trial:
    """Make a tiny random model and try memory on it; nothing is raised."""
    with quiet_loading(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = tiny_model_of(architecture)
        except Exception as error:  # noqa: BLE001 - whatever the class raises is the finding
            return Trial(architecture, "refused", f"{_UNMADE}: {_told(error)}")
        return _tried(architecture, model)


def _tried(architecture: Architecture, model: PreTrainedModel) -> Trial:
    decoders = []
    for config in _WAYS.values():
        try:
            decoders.append(MemoryDecoder(model, None, config))
        except MemlongError as error:
            return Trial(architecture, "refused", _told(error))
        except Exception as error:  # noqa: BLE001
            return Trial(architecture, "fails", f"Attaching ends in {_told(error)}")
    text = torch.randint(3, 90, (1, _TOKENS), generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            plain = model(input_ids=text).logits
    except Exception as error:  # noqa: BLE001
        return Trial(architecture, "fails", f"Memory attaches, but the model reads no text: {_told(error)}")
    for way, decoder in zip(_WAYS, decoders, strict=True):
        try:
            with decoder:
                logits = torch.cat([segment.logits for segment in decoder.stream(text)], dim=1)
        except Exception as error:  # noqa: BLE001
            return Trial(architecture, "fails", f"With {way}, reading ends in {_told(error)}")
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
    """Whether the plain model gives other logits when it reads the same text in pieces, with its own cache."""
    try:
        with torch.no_grad():
            cache = DynamicCache(config=model.config.get_text_config(decoder=True))
            pieces = [
                model(input_ids=piece, past_key_values=cache, use_cache=True).logits
                for piece in text.split(16, dim=1)
            ]
        off = _distance(torch.cat(pieces, dim=1), plain)
    except Exception as error:  # noqa: BLE001
        return f" (the plain model cannot read it in pieces at all: {_told(error)})"
    return "" if off <= _TOLERANCE else f" (the plain model's own, read in pieces, are off by {off:.0e})"


def _told(error: Exception) -> str:
    told = " ".join(str(error).split())
    return told if isinstance(error, MemlongError) else f"{type(error).__name__}: {told}"
