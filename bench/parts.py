"""Where a stream spends its time: timers patched into the decoder's functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from ratios import Clock

from memlong import MemoryDecoder
from memlong.bank import BankState
from memlong.decoder.kv.cache_layers import WindowLayer
from memlong.decoder.kv.window import LocalWindow
from memlong.decoder.model import kernels
from memlong.decoder.model.attention import AttentionSlot
from memlong.decoder.stream import batch, token_stream
from memlong.decoder.stream.batch_memory import MemoryLoader

PARTS = {
    "lower layers": "below the first retrieval layer, without attention",
    "upper layers": "from the first retrieval layer up, with embedding and head, without attention",
    "attention": "the kernel, in all layers",
    "joining": "concatenating memory and window, building the mask",
    "window": "adding K-V, dropping old columns, rotating the rest",
    "retriever": "embedding chunks and queries",
    "storing": "adding chunks to the bank",
    "search": "the index",
    "gather": "reading retrieved K-V from the store",
    "placing": "batching retrieved K-V, rotating keys",
    "rest": "bookkeeping",
}


class PartClock:
    """Seconds by part; time in a nested part counts only for that part.

    Parameters
    ----------
    device
        The model's device; CUDA is synchronized whenever the part changes, so that work counts where it was launched.
    clock
        Which time to use.
    """

    def __init__(self, device: torch.device, clock: Clock = Clock.WALL) -> None:
        self._device = device
        self._clock = clock
        self._part = "rest"
        self.reset()

    def reset(self) -> None:
        """Set all parts to zero."""
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._since = self._now()

    def read(self) -> dict[str, float]:
        """Seconds by part so far."""
        self._switch(self._part)
        return dict(self._seconds)

    def timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        """Return the function, with its time counted for a part."""

        def call(*args: Any, **options: Any) -> Any:
            outer = self._switch(part)
            try:
                return function(*args, **options)
            finally:
                self._switch(outer)

        return call

    def _switch(self, part: str) -> str:
        now = self._now()
        self._seconds[self._part] += now - self._since
        self._since, outer, self._part = now, self._part, part
        return outer

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._clock.now()


@contextmanager
def watched(decoder: MemoryDecoder, clock: Clock = Clock.WALL) -> Iterator[PartClock]:
    """Time the parts of an attached decoder's work; for the clock, see `PartClock`."""
    watch = PartClock(decoder.model.device, clock)
    timed_calls: list[tuple[Any, str, Callable[..., Any], str]] = [
        (decoder.model, "forward", decoder.model.forward, "upper layers")
    ]
    for owner, name, part in (
        (AttentionSlot, "attend", "joining"),
        (kernels, "attend_to_all_before", "attention"),
        (kernels, "attend_with_mask", "attention"),
        (token_stream, "retrieve_chunks", "gather"),
        (WindowLayer, "update", "window"),
        (LocalWindow, "expecting", "window"),
        (LocalWindow, "complete", "window"),
        (LocalWindow, "moved", "window"),
        (LocalWindow, "hold_memory", "placing"),
        (batch, "store_chunks", "storing"),
        (MemoryLoader, "load", "placing"),
        (BankState, "_rank", "search"),
    ):
        timed_calls.append((owner, name, getattr(owner, name), part))
    retriever = decoder.retriever
    embedding = ("embed_chunks", "embed_queries") if retriever is not None else ()
    timed_calls += [(retriever, name, getattr(retriever, name), "retriever") for name in embedding]
    timed_calls += [(layer, "forward", layer.forward, "lower layers") for layer in _lower_layers(decoder)]
    with ExitStack() as stack:
        for owner, name, function, part in timed_calls:
            stack.enter_context(patch.object(owner, name, watch.timed(function, part)))
        yield watch


def _lower_layers(decoder: MemoryDecoder) -> list[torch.nn.Module]:
    names = {id(module): name for name, module in decoder.model.named_modules()}
    first = min(decoder.retrieval_layers)
    below = [module for module, layers in decoder.model_layout.readers.items() if max(layers) < first]
    return [decoder.model.get_submodule(names[id(module)].rpartition(".")[0]) for module in below]
