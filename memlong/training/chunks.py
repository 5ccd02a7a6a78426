"""What training retrieves for a row besides what it asks for: random chunks, and chunks of other rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from memlong.bank import Chunks, Draft, MemoryBank
from memlong.decoder.stream.retrieval import Choice, Retrieval, Search

Chosen = tuple[Retrieval, Chunks]


@dataclass(frozen=True)
class RandomChunks(Choice):
    """Retrieves random chunks now and then, so that training has something to tell memory from.

    Parameters
    ----------
    share
        Share of retrievals that are random, from 0 to 1.
    generator
        Decides when, and which chunks.
    """

    share: float
    generator: torch.Generator

    def choose(self, search: Search) -> Chosen | None:
        """Take as many of the bank's chunks as would be retrieved, at random, in the order of the text."""
        due = float(torch.rand(1, generator=self.generator, dtype=torch.float32, device="cpu")) < self.share
        if not due:
            return None
        stored = search.bank.ids
        some = torch.randperm(len(stored), generator=self.generator, device="cpu")[: search.config.top_k]
        found = search.bank.fetch(stored[some].sort().values)
        scores = torch.zeros(len(found.ids), dtype=torch.float32, device="cpu")
        return Retrieval(search.query, found.ids, scores), found


@dataclass(frozen=True)
class Negatives(Choice):
    """Puts the best chunks of other rows among those of a row, so that it learns to tell content apart.

    A memory that is trained on its own text alone attends to the right one of d texts in a d-th of the cases (Focused
    Transformer, arXiv 2307.03170).

    Parameters
    ----------
    before
        Asked first; what it chooses stays.
    others
        How many other rows there are to find chunks in.
    generator
        Decides how many chunks are foreign, from none to half, and where they stand.
    """

    before: Choice
    others: int
    generator: torch.Generator

    def choose(self, search: Search) -> Chosen | None:
        """Retrieve as usual, but put foreign chunks in the place of some."""
        chosen = self.before.choose(search)
        others = _filled(search.others)[: self.others]
        if chosen is not None or not others:
            return chosen
        found = search.best()
        wanted = int(torch.randint(len(found.ids) // 2 + 1, (1,), generator=self.generator, device="cpu"))
        foreign = best_of(others, search.query, wanted)
        kept = len(found.ids) - len(foreign)
        retrieval = Retrieval(search.query, found.ids[:kept], found.scores[:kept])
        # Its own stay in the order of the text; foreign ones stand anywhere among them.
        own = [search.bank.fetch([each]) for each in retrieval.ids.sort().values.tolist()]
        places = torch.randperm(len(own) + len(foreign), generator=self.generator, device="cpu").tolist()
        each = dict(zip(sorted(places[: len(own)]), own, strict=True))
        each |= dict(zip(places[len(own) :], foreign, strict=True))
        return retrieval, _joined([each[place] for place in range(len(each))])


@dataclass(frozen=True)
class ForeignChunks(Choice):
    """Retrieves from other rows alone: what memory gives whose content is of no use."""

    def choose(self, search: Search) -> Chosen | None:
        """Take the best chunks of all the other rows; where they have none, there is nothing."""
        found = best_of(_filled(search.others), search.query, search.config.top_k)
        nothing = torch.zeros(0, dtype=torch.int64, device="cpu")
        retrieval = Retrieval(search.query, nothing, nothing.to(torch.float32))
        return retrieval, _joined(found) if found else search.bank.fetch([])


def best_of(banks: Sequence[MemoryBank | Draft], query: Tensor, count: int) -> list[Chunks]:
    """Return the chunks of several banks that are nearest to a query [dim], each with the id −1.

    They stand in the order of their texts, as those of a row's own do: order alone must not tell them apart.
    """
    if not count:
        return []
    scored: list[tuple[float, int, int]] = []
    for number, bank in enumerate(banks):
        found = bank.search(query[None], min(count, len(bank)))
        both = zip(found.ids[0].tolist(), found.scores[0].tolist(), strict=True)
        scored += [(score, number, each) for each, score in both if each >= 0]
    best = sorted(scored, key=lambda each: (-each[0], each[1], each[2]))[:count]
    chunks = [banks[number].fetch([each]) for _, number, each in best]
    chunks.sort(key=lambda each: int(each.spans[0, 0]))
    return [replace(each, ids=torch.full_like(each.ids, -1)) for each in chunks]


def _filled(banks: Sequence[MemoryBank | Draft]) -> list[MemoryBank | Draft]:
    return [bank for bank in banks if len(bank)]


def _joined(parts: Sequence[Chunks]) -> Chunks:
    names = ("ids", "keys", "values", "spans")
    return Chunks(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})
