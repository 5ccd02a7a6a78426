"""Which chunks of memory help: the model itself tries some for each segment of a text, each alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from memlong.bank import Chunks, Draft, MemoryBank
from memlong.bank.validate import whole_number
from memlong.decoder.decoder import MemoryDecoder
from memlong.decoder.retrievers.query_map import check_mappable
from memlong.decoder.stream.retrieval import Choice, Retrieval, Search
from memlong.errors import InvalidArgumentError
from memlong.evaluation.numbers import checked_logits
from memlong.training.projections import check_passages


@dataclass(frozen=True, eq=False)
class Tries:
    """What single chunks were worth to the model.

    Attributes
    ----------
    queries
        Embeddings of the text before each segment [segments, dim], float32.
    chunks
        Embeddings of the chunks tried for it [segments, candidates, dim], float32, of unit length. The first half are
        the best of the retriever, best first; the others are random.
    losses
        The segment's loss with each of them alone in memory [segments, candidates], in nats per token.
    passages
        Number of the passage that each segment is in [segments], int64.
    """

    queries: Tensor
    chunks: Tensor
    losses: Tensor
    passages: Tensor

    def __len__(self) -> int:
        return len(self.queries)

    def of(self, rows: Tensor) -> Tries:
        """Return those of some segments, by index or as a mask [segments]."""
        return Tries(self.queries[rows], self.chunks[rows], self.losses[rows], self.passages[rows])


def try_chunks(
    decoder: MemoryDecoder,
    passages: Sequence[Tensor],
    *,
    candidates: int = 8,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Tries:
    """Stream passages through a decoder, and try chunks for each segment, side by side.

    A segment is tried once the memory holds enough chunks. It is read once for each candidate, and then once more as
    usual.

    Parameters
    ----------
    decoder
        An attached decoder with a memory; its streams are reset.
    passages
        Token ids [1, tokens]; each is read with a memory of its own.
    candidates
        How many chunks are tried for a segment: half of them the best of the retriever, the others random.
    seed
        Random seed.
    progress
        Called with the number of tokens in each segment.

    Raises
    ------
    InvalidArgumentError
        If text that is read retrieves nothing, or its queries are mapped already; if the retriever does not compare by
        cosine, or re-ranks; or if no segment of the passages can be tried.
    MemlongError
        If the model's logits are NaN.
    """
    candidates = whole_number("candidates", candidates, at_least=2)
    _check(decoder)
    check_passages(passages, decoder.model_layout)
    generator = torch.Generator("cpu").manual_seed(seed)
    tried: list[tuple[Tensor, Tensor, Tensor, int]] = []
    for number, passage in enumerate(passages):
        decoder.reset()
        for ids in passage.split(decoder.config.segment_size, dim=1):
            found = _tried(decoder, ids, candidates, generator) if ids.shape[1] > 1 else None
            if found is not None:
                tried.append((*found, number))
            for _ in decoder.stream(ids, logits="last"):
                pass
            if progress is not None:
                progress(ids.shape[1])
    if not tried:
        raise InvalidArgumentError(
            f"passages must be long enough for {candidates} chunks of {decoder.config.chunk_size} tokens to leave the "
            f"window of {decoder.config.local_window} tokens, got at most "
            f"{max(each.shape[1] for each in passages)} tokens: give longer ones"
        )
    queries, chunks, losses, numbers = zip(*tried, strict=True)
    return Tries(
        torch.stack(queries),
        torch.stack(chunks),
        torch.stack(losses),
        torch.tensor(numbers, dtype=torch.int64, device="cpu"),
    )


def _check(decoder: MemoryDecoder) -> None:
    config, retriever = decoder.config, decoder.retriever
    if config.backend is None or retriever is None:
        raise InvalidArgumentError("backend must name a memory backend, got None: there are no chunks to try")
    if config.retrieve_for != "all":
        raise InvalidArgumentError(
            "retrieve_for must be 'all' to try chunks for text that is read, got 'answers': leave it out, or load a "
            "trained decoder with changes={'retrieve_for': 'all'}"
        )
    if config.query_map is not None:
        raise InvalidArgumentError(
            f"query_map must be None where one is to be trained, got {config.query_map!r}: leave it out"
        )
    check_mappable(retriever)


def _tried(
    decoder: MemoryDecoder, ids: Tensor, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return query, chunks and losses of the segment to come; None while there are too few chunks."""
    if not decoder.banks or len(decoder.banks[0]) + 1 < count:  # one more may leave the window now
        return None
    drawn = _Drawn(count, generator)
    made = decoder.preview(ids.expand(count, -1), choice=[_One(drawn, place) for place in range(count)])
    if drawn.ids is None or drawn.query is None or drawn.embeddings is None:
        return None
    targets = made.input_ids[0, 1:]
    losses = [
        float(cross_entropy(checked_logits(None, logits[:-1].float()), targets)) for logits in made.logits
    ]
    return (
        drawn.query,
        normalize(drawn.embeddings, dim=1),
        torch.tensor(losses, dtype=torch.float32, device="cpu"),
    )


@dataclass(eq=False)
class _Drawn:
    """The chunks that are tried for a segment, by id, once the first row has drawn them."""

    count: int
    generator: torch.Generator
    ids: Tensor | None = field(default=None, init=False)
    query: Tensor | None = field(default=None, init=False)
    embeddings: Tensor | None = field(default=None, init=False)

    def draw(self, bank: MemoryBank | Draft, query: Tensor) -> None:
        ranked = bank.search(query[None], len(bank)).ids[0]
        ranked = ranked[ranked >= 0]
        if len(ranked) < self.count:
            return
        best, rest = ranked[: self.count // 2], ranked[self.count // 2 :]
        order = torch.randperm(len(rest), generator=self.generator, device="cpu")
        self.ids = torch.cat([best, rest[order[: self.count - len(best)]]])
        self.query = torch.as_tensor(query, dtype=torch.float32, device="cpu").detach()
        self.embeddings = bank.embeddings_of(self.ids)


@dataclass(frozen=True, eq=False)
class _One(Choice):
    """Gives a row one of the chunks drawn for all rows, which are forks of one stream."""

    drawn: _Drawn
    place: int

    def choose(self, search: Search) -> tuple[Retrieval, Chunks] | None:
        if self.place == 0:
            self.drawn.draw(search.bank, search.query)
        if self.drawn.ids is None:
            return None
        found = search.bank.fetch(self.drawn.ids[self.place : self.place + 1])
        return Retrieval(search.query, found.ids, torch.zeros(1, dtype=torch.float32, device="cpu")), found
