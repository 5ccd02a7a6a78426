"""Losses of a text's tokens, cached by what they were measured on, so that adding a system reruns only that."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


def kept_path(folder: Path, facts: Mapping[str, Any]) -> Path:
    """Return the file in the folder for a run with these facts, which JSON or ``str`` can tell apart."""
    key = json.dumps(facts, sort_keys=True, default=str)
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy"


def kept_losses(
    folder: Path, facts: Mapping[str, Any], measure: Callable[[], NDArray[np.float64]]
) -> NDArray[np.float64]:
    """Return the losses [tokens] of a run, in nats: those that an earlier run cached, or measure and cache them."""
    path = kept_path(folder, facts)
    if path.is_file():
        return np.asarray(np.load(path, allow_pickle=False), dtype=np.float64)
    found = measure()
    np.save(path, found, allow_pickle=False)
    return found


def digest(input_ids: Tensor) -> str:
    """Return the SHA-256 of token ids, by which a text is known."""
    return hashlib.sha256(input_ids.numpy().tobytes()).hexdigest()
