"""Replacing an attribute of one module for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from memlong.decoder.interrupts import uninterrupted


@contextmanager
def replaced(module: nn.Module, name: str, value: object) -> Iterator[None]:
    """Replace a method or a flag of this module, and restore it."""
    own, before = name in vars(module), vars(module).get(name)
    vars(module)[name] = value
    try:
        yield
    finally:
        with uninterrupted():
            del vars(module)[name]
            if own:
                vars(module)[name] = before
