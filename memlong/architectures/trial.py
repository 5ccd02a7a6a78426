"""Try whether memory attaches to an architecture, and whether what it then computes is right."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from memlong.architectures.listing import Architecture
from memlong.architectures.tiny import tiny_model_of
from memlong.decoder import MemoryConfig, MemoryDecoder
from memlong.decoder.quiet import quiet_loading
from memlong.errors import MemlongError

Status = Literal["works", "refused", "fails"]

_TOKENS = 150
_TOLERANCE = 1e-4  # of the largest logit, in float32
_SIZES: dict[str, Any] = {"chunk_size": 8, "segment_size": 16, "sink_tokens": 2}
_WHOLE_TEXT = MemoryConfig(local_window=_TOKENS + 32, position_mode="original", **_SIZES)
_MEMORY_OF_ALL = MemoryConfig(local_window=64, top_k=40, position_mode="original", **_SIZES)


@dataclass(frozen=True)
class Trial:
    """What came of attaching memory to a tiny model of an architecture.

    ``status`` is ``"works"`` if the logits are those of the plain model, with the whole text in the window and with all
    but the window in memory; ``"refused"`` if memlong says why it cannot attach; ``"fails"`` in every other case.
    """

    architecture: Architecture
    status: Status
    reason: str = ""
    layers: str = ""
    stored: str = ""


def try_architecture(architecture: Architecture) -> Trial:
    """Make a tiny model and try memory on it.

    A model that cannot be made, or that does not read text by itself, is refused: there is nothing to attach to.
    """
    with quiet_loading(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = tiny_model_of(architecture)
        except Exception as error:  # noqa: BLE001 - whatever the class raises is the finding
            return Trial(architecture, "refused", f"no tiny model of it can be made here: {_told(error)}")
        text = torch.randint(3, 90, (1, _TOKENS), generator=torch.Generator().manual_seed(0))
        try:
            with torch.no_grad():
                plain = model(input_ids=text).logits
        except Exception as error:  # noqa: BLE001
            plain = error
        try:
            decoder = MemoryDecoder(model, None, _WHOLE_TEXT)
        except MemlongError as error:
            return Trial(architecture, "refused", _told(error))
        except Exception as error:  # noqa: BLE001
            return Trial(architecture, "fails", f"attaching ends in {_told(error)}")
        if isinstance(plain, Exception):
            return Trial(
                architecture, "fails", f"memory attaches, but the model does not read text: {_told(plain)}"
            )
        try:
            return _compared(architecture, model, decoder, text, plain)
        except Exception as error:  # noqa: BLE001
            return Trial(architecture, "fails", f"reading ends in {_told(error)}")


def _compared(
    architecture: Architecture, model: PreTrainedModel, decoder: MemoryDecoder, text: Tensor, plain: Tensor
) -> Trial:
    scale = plain.abs().max()
    for name, each in (
        ("the whole text in the window", decoder),
        ("all but the window in memory", MemoryDecoder(model, None, _MEMORY_OF_ALL)),
    ):
        with each:
            logits = torch.cat([segment.logits for segment in each.stream(text)], dim=1)
        error = float((logits - plain).abs().max() / scale)
        if not error <= _TOLERANCE:
            return Trial(
                architecture,
                "fails",
                f"with {name}, logits differ from the plain model's by {error:.1g} of the largest",
            )
    return Trial(architecture, "works")


def _told(error: Exception) -> str:
    told = " ".join(str(error).split())
    return told if isinstance(error, MemlongError) else f"{type(error).__name__}: {told}"
