"""How much a bank's index holds, as far as Python and what it saves tell."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch

from memlong.bank import MemoryBank

_SHARED = (type, ModuleType, BuiltinFunctionType)  # of the process, not of a bank


def index_bytes(bank: MemoryBank) -> int:
    """Return the bytes of all objects that a bank leads to but for its table and store, and of the index it would save.

    What a library holds outside of Python is not seen, unless it is saved.
    """
    saved = bank._index_save()  # noqa: SLF001 - the seams under test
    held = reachable_bytes(bank, besides=(bank._table, bank._store, bank._contents))  # noqa: SLF001
    return held + (0 if saved is None else len(saved[1]))


def reachable_bytes(root: object, besides: Iterable[object] = ()) -> int:
    """Return the bytes of an object and of all that it leads to, arrays and tensors whole, each once."""
    total, seen, ahead = 0, {id(each) for each in besides}, [root]
    while ahead:
        each = ahead.pop()
        if isinstance(each, FunctionType):
            each = each.__closure__
        if id(each) in seen or isinstance(each, _SHARED):
            continue
        seen.add(id(each))
        total += _own_bytes(each)
        ahead += gc.get_referents(each)
        if isinstance(each, np.ndarray | memoryview):
            ahead.append(each.base if isinstance(each, np.ndarray) else each.obj)
    return total


def _own_bytes(each: Any) -> int:
    if isinstance(each, torch.Tensor):
        return each.untyped_storage().nbytes()
    return sys.getsizeof(each, 0)  # of an array that owns its numbers, with these
