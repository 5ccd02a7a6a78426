"""What a model says, made sure to be numbers: no result is to be made of others."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from memlong.errors import MemlongError


def checked_logits(_input_ids: Tensor | None, logits: Tensor) -> Tensor:
    """Return logits as they are, as a logits processor of generate() does.

    Raises
    ------
    MemlongError
        If one is not a number.
    """
    if bool(logits.isnan().any()):
        raise MemlongError(
            "The model's logits are not numbers (NaN): its weights are damaged, or its dtype does not hold what it "
            "computes. Load it in float32 or bfloat16, or download the model again."
        )
    return logits


def perplexity_of(losses: NDArray[np.float64]) -> float:
    """Return the exponential of the mean of losses in nats; infinite where float64 has no such number."""
    with np.errstate(over="ignore"):
        return float(np.exp(losses.mean()))
