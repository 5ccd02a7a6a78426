"""Array types of a stream's bookkeeping, which stays on the host."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
"""Token numbers, positions or columns."""

Floats = npt.NDArray[np.float32]
"""Weights."""

Bools = npt.NDArray[np.bool_]
"""Which of them are meant."""
