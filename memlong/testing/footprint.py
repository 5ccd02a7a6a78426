"""Measure the memory of a bank's index, as far as Python objects and saved files show it."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable
from types import BuiltinFunctionType, FunctionType, ModuleType

import numpy as np
import torch

from memlong.bank import MemoryBank

_SHARED = (type, ModuleType, BuiltinFunctionType)  # shared by the process, not owned by a bank


def index_bytes(bank: MemoryBank) -> int:
    """Return the bytes of all objects reachable from a bank's index, except its rows, plus those of its saved file.

    Memory that a library holds outside of Python is only seen if it is saved.
    """
    saved = bank.index.dump()
    held = reachable_bytes(bank.index, besides=(bank.index.rows,))
    return held + (0 if saved is None else len(saved[1]))


def reachable_bytes(root: object, besides: Iterable[object] = ()) -> int:
    """Return the bytes of an object and everything reachable from it, each array and tensor counted in full, once."""
    total, seen, ahead = 0, {id(each) for each in besides}, [root]
    storages: set[object] = set()
    while ahead:
        each = ahead.pop()
        if isinstance(each, FunctionType):
            each = each.__closure__
        if id(each) in seen or isinstance(each, _SHARED):
            continue
        seen.add(id(each))
        if isinstance(each, torch.Tensor):  # views share one storage
            place = ("storage", each.untyped_storage().data_ptr())
            total += 0 if place in storages else each.untyped_storage().nbytes()
            storages.add(place)
        else:
            total += sys.getsizeof(each, 0)  # of an array that owns its data, including the data
        ahead += gc.get_referents(each)
        if isinstance(each, np.ndarray | memoryview):
            ahead.append(each.base if isinstance(each, np.ndarray) else each.obj)
    return total
