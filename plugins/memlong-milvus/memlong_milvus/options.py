"""The options of a bank that a snapshot keeps, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict, get_args

import torch

from memlong.bank import EvictionPolicy, Metric
from memlong.bank.validate import whole_number
from memlong.errors import InvalidArgumentError
from memlong_milvus.rows import Consistency

_BOUNDS = {
    "M": (2, 2048),
    "ef_construction": (1, 32_768),
    "ef": (1, 32_768),
    "partitions": (1, 1024),
    "attempts": (1, 100),
    "readers": (1, 256),
}
SAVED = {
    "consistency": None,
    "staleness": 3600,
    "M": 64,
    "ef_construction": 1024,
    "ef": 4096,
    "partitions": 64,
    "timeout": 60,
    "attempts": 10,
    "readers": 64,
}
"""What a file may choose, and the most of it: never where Milvus is, who asks, or whose session it is."""


class OtherOptions(TypedDict, total=False):
    """The options of every bank, but for `store`, which takes more here."""

    metric: Metric
    max_chunks: int | None
    max_bytes: int | str | None
    eviction: str | EvictionPolicy
    device: str | torch.device | None


@dataclass(frozen=True)
class Tuning:
    """How a bank asks Milvus, by the names of `MilvusBank`'s options; where it is and who asks are not among them.

    Raises
    ------
    InvalidArgumentError
        If an option has a value that cannot be used.
    """

    consistency: Consistency
    staleness: float
    M: int
    ef_construction: int
    ef: int
    partitions: int
    timeout: float
    attempts: int
    readers: int

    def __post_init__(self) -> None:
        for name, (least, most) in _BOUNDS.items():
            object.__setattr__(
                self, name, whole_number(name, getattr(self, name), at_least=least, at_most=most)
            )
        for name in ("staleness", "timeout"):
            object.__setattr__(self, name, _seconds(name, getattr(self, name)))
        if not self.timeout:
            raise InvalidArgumentError(
                "timeout is 0 seconds, in which nobody can answer: give more, such as 10"
            )
        if self.consistency not in get_args(Consistency):
            raise InvalidArgumentError(
                f"consistency must be one of {', '.join(get_args(Consistency))}, got {self.consistency!r}"
            )

    def as_options(self) -> dict[str, Any]:
        """Return them by name."""
        return dict(vars(self))


def check_resume(resume: object, *, named: bool) -> None:
    """Raise unless it is True or False, and True only for a session that is named."""
    if not isinstance(resume, bool):
        raise InvalidArgumentError(f"resume must be True or False, got {resume!r}")
    if resume and not named:
        raise InvalidArgumentError("resume goes on with a session: name it, as session='…'")


def device_of(kv_device: str) -> torch.device:
    """Return the device that keys and values go to."""
    try:
        if isinstance(kv_device, str | torch.device):
            return torch.device(kv_device)
    except RuntimeError:
        pass
    raise InvalidArgumentError(
        f"kv_device must be the name of a torch device, such as 'cpu', got {kv_device!r}"
    )


def _seconds(name: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1e6:
        raise InvalidArgumentError(f"{name} must be a number of seconds >= 0, got {value!r}")
    return float(value)
