"""Gradient checkpointing: layers that run again in the backward pass, with the same window and the same memory.

transformers gives checkpointed layers no cache, since they would write to it twice. So during a forward call memlong
checkpoints them itself, and when they run again, gives them a cache as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from memlong.decoder.kv.window_cache import WindowCache
from memlong.decoder.model.replacing import replaced

_FLAG = "gradient_checkpointing"

Again = Callable[[], AbstractContextManager[WindowCache]]
"""Return to where a forward call began: attention uses the cache that this yields."""


class Checkpointing:
    """The gradient checkpointing of a model, as its ``gradient_checkpointing_enable()`` has set it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._modules = [module for module in model.modules() if hasattr(module, _FLAG)]

    @property
    def is_on(self) -> bool:
        """Whether any layer would be checkpointed: it is enabled, and the layer is in training mode."""
        return any(module.gradient_checkpointing and module.training for module in self._modules)

    @contextmanager
    def done_here(self, cache: WindowCache, again: Again) -> Iterator[None]:
        """Checkpoint the layers that transformers would, whose cache is ``cache``."""
        with ExitStack() as changes:
            for module in [module for module in self._modules if module.gradient_checkpointing]:
                changes.enter_context(replaced(module, _FLAG, value=False))
                is_layer = isinstance(module, GradientCheckpointingLayer) and module.training
                if is_layer and torch.is_grad_enabled():
                    changes.enter_context(replaced(module, "forward", _twice(module, cache, again)))
            yield


def _twice(layer: nn.Module, cache: WindowCache, again: Again) -> Callable[..., Any]:
    """Return a layer's ``forward`` that keeps nothing for the backward pass, where it runs again."""
    inner = layer.forward
    asked = getattr(layer, "_gradient_checkpointing_func", None)
    settings = asked.keywords if isinstance(asked, partial) and asked.func is checkpoint else {}

    @wraps(inner)
    def forward(*args: Any, **options: Any) -> Any:
        has_run = False

        def run(*args: Any, **options: Any) -> Any:
            nonlocal has_run
            if not has_run:
                has_run = True
                return inner(*args, **options)
            with again() as fresh, replaced(layer, _FLAG, value=False):
                given = [fresh if each is cache else each for each in args]
                return inner(
                    *given, **{name: fresh if each is cache else each for name, each in options.items()}
                )

        # The other kind, ``use_reentrant=True``, runs first without gradients, and gives the same ones.
        return checkpoint(run, *args, **{**settings, "use_reentrant": False}, **options)

    return forward
