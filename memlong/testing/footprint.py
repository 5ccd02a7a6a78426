"""How much a bank's index holds, as far as Python and what it saves tell."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable
from types import BuiltinFunctionType, FunctionType, ModuleType

import numpy as np
import torch

from memlong.bank import MemoryBank

_SHARED = (type, ModuleType, BuiltinFunctionType)  # of the process, not of a bank


def index_bytes(bank: MemoryBank) -> int:
    """Return the bytes of all objects that a bank leads to but for its table and store, and of the index it would save.

    What a library holds outside of Python is not seen, unless it is saved.
    """
    saved = bank.index.dump()
    held = reachable_bytes(bank.index, besides=(bank.index.rows,))
    return held + (0 if saved is None else len(saved[1]))


def reachable_bytes(root: object, besides: Iterable[object] = ()) -> int:
    """Return the bytes of an object and of all that it leads to, arrays and tensors whole, each once."""
    total, seen, ahead = 0, {id(each) for each in besides}, [root]
    storages: set[object] = set()
    while ahead:
        each = ahead.pop()
        if isinstance(each, FunctionType):
            each = each.__closure__
        if id(each) in seen or isinstance(each, _SHARED):
            continue
        seen.add(id(each))
        if isinstance(each, torch.Tensor):  # whose views share one storage
            place = ("storage", each.untyped_storage().data_ptr())
            total += 0 if place in storages else each.untyped_storage().nbytes()
            storages.add(place)
        else:
            total += sys.getsizeof(each, 0)  # of an array that owns its numbers, with these
        ahead += gc.get_referents(each)
        if isinstance(each, np.ndarray | memoryview):
            ahead.append(each.base if isinstance(each, np.ndarray) else each.obj)
    return total
