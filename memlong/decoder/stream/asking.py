"""Where a prompt ends and its answer begins."""

from __future__ import annotations

from torch import Tensor

from memlong.decoder.config import MemoryConfig
from memlong.decoder.stream.attention_record import Counted
from memlong.decoder.stream.batch import StreamBatch
from memlong.decoder.stream.token_stream import TokenStream


def ask(batch: StreamBatch, config: MemoryConfig, *, answers: int = 1) -> tuple[StreamBatch, Tensor]:
    """Fork streams that have read a prompt, and let the forks read its end again with memory retrieved for it.

    The last token counts as asking, once for each of so many ``answers``.

    Returns
    -------
    tuple
        The forks, which have space for as many tokens as come before the next retrieval, and their logits [rows, 1,
        vocabulary] of the first token of an answer.
    """
    forks = batch.fork(range(len(batch.streams)))
    for stream in forks.streams:
        stream.forget_query()  # one that was given for text that was not read
        stream.is_answer = True
    # Where nothing is found and nothing leaves the window, no more than the last token, which has the logits. Each row
    # by itself: its answer does not depend on the others.
    most = max(1, config.segment_size - config.retrieval_interval)
    tails = forks.rewind([most if _changes(stream) else 1 for stream in forks.streams])
    counted = Counted(latest=1, times=lambda: float(answers))
    return forks, forks.advance(tails, 1, retrieve=lambda _: True, counted=counted).logits


def _changes(stream: TokenStream) -> bool:
    """Whether a stream that retrieves now attends to anything else than before."""
    return bool(stream.departing()) or (stream.bank is not None and len(stream.bank) > 0)
