"""The array types that the bank's own code passes around: NumPy inside, torch at the public edge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Floats = npt.NDArray[np.float32]
"""float32 embeddings or scores."""

Ids = npt.NDArray[np.int64]
"""int64 chunk ids, row numbers or counters."""

FloatInput = torch.Tensor | npt.NDArray[Any]
"""What callers may pass where floats are expected."""

IntInput = torch.Tensor | npt.NDArray[Any] | Sequence[Any]
"""What callers may pass where integers are expected."""
