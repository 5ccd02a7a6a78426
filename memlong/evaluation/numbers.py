"""Check a model's logits for NaN, so that no result is computed from them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from memlong.errors import MemlongError


def checked_logits(_input_ids: Tensor | None, logits: Tensor) -> Tensor:
    """Return logits unchanged; usable as a logits processor of generate().

    Raises
    ------
    MemlongError
        If one is NaN.
    """
    if bool(logits.isnan().any()):
        raise MemlongError(
            "The model's logits must be numbers, got NaN: its weights are damaged, or its dtype overflows. Load it in "
            "float32 or bfloat16, or download the model again"
        )
    return logits


def perplexity_of(losses: NDArray[np.float64]) -> float:
    """Return the exponential of the mean loss, in nats; infinity if float64 overflows."""
    with np.errstate(over="ignore"):
        return float(np.exp(losses.mean()))
