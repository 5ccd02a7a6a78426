"""An upper bound that peeks: the chunks that help a segment most, as its own tokens show."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from memlong import MemoryBank, MemoryConfig, Passage, Segment
from memlong.bank import whole_number
from memlong.decoder.stream.retrieval import StreamMemory
from memlong.errors import InvalidArgumentError
from systems.chosen import ChosenMemory


class PeekingOracle(ChosenMemory):
    """A memory that retrieves with knowledge of the tokens to be predicted: no system, but a bound for systems.

    For each segment, the best ``candidates`` of the memory's own retriever are tried one by one: a fork of the stream
    reads the segment with that chunk alone. The ``top_k`` with the lowest losses are then retrieved together. That
    bounds retrievers that score chunks one by one, up to what chunks do to each other; to add greedily the chunk that
    helps most beside those already chosen would come closer to the best set, at ``top_k`` times the cost. The cost is a
    forward call of the segment for each candidate.

    Parameters
    ----------
    model, tokenizer, config
        As for `MemoryDecoder`. Chunks may leave a bank of limited capacity only in their order, since tries count as
        uses.
    candidates
        How many chunks are tried for a segment.

    Notes
    -----
    A segment's loss is that of all tokens that its forward call predicts, the first of the next segment included, as
    far as a call of `stream` has them.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, config: MemoryConfig, *, candidates: int = 32
    ) -> None:
        eviction = config.backend_options.get("eviction", "fifo")
        if eviction != "fifo":
            raise InvalidArgumentError(
                f"eviction must be 'fifo' for an oracle, whose tries count as uses, got {eviction!r}: leave it out"
            )
        self.candidates = whole_number("candidates", candidates, at_least=1)
        super().__init__(model, tokenizer, config)

    def stream(self, input_ids: Tensor, *, logits: Literal["all", "last"] = "all") -> Iterator[Segment]:
        """Read more of the text [1, tokens] segment by segment, peeking at what is still to come of it."""
        segments = super().stream(input_ids, logits=logits)
        (start,) = self.memory.tokens_read or (0,)
        self._coming = Passage(tuple(input_ids[0].tolist()), start)
        return segments

    def choose(self, bank: MemoryBank, query: Tensor) -> tuple[MemoryBank, Tensor, Tensor]:
        """Choose the candidates that, each alone, give the segment to come the lowest loss."""
        device = self.model.device
        main = torch.cuda.default_stream(device) if device.type == "cuda" else None
        with torch.cuda.stream(main):  # where the model runs: K-V of memory are fetched on another one
            found = bank.search(query[None], min(self.candidates, len(bank)))
            ids, scores = found.ids[0], found.scores[0]
            losses = torch.tensor(
                [self._loss(StreamMemory.of_chunks(bank.fetch(each))) for each in ids[:, None]]
            )
        best = losses.argsort(stable=True)[: self.config.top_k]
        return bank, ids[best], scores[best]

    def _loss(self, memory: StreamMemory | None) -> float:
        """Return the loss of the segment to come where the stream attends to this memory, in nats."""
        batch = self.memory._streams.batch  # noqa: SLF001 - nothing public forks a stream before a segment
        assert batch is not None  # noqa: S101 - it is asking
        fork = batch.fork([0])
        (stream,) = fork.streams
        stream.memory = memory
        size = self.config.segment_size
        start = stream.seen - self._coming.start
        text = self._coming.token_ids[start : start + size + 1]
        logits = fork.advance([text[:size]], 0, retrieve=lambda _: False).logits[0]
        targets = torch.tensor(text[1:], dtype=torch.long, device=logits.device)
        return float(cross_entropy(logits[: len(targets)].float(), targets, reduction="sum"))
