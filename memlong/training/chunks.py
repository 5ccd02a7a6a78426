"""What training retrieves for a row besides what it asks for: random chunks, and chunks of other rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from memlong.bank import Chunks, Draft, MemoryBank
from memlong.decoder.config import MemoryConfig
from memlong.decoder.stream.retrieval import Choice, Retrieval

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

    def choose(self, bank: MemoryBank | Draft, query: Tensor, config: MemoryConfig) -> Chosen | None:
        """Take as many of the bank's chunks as would be retrieved, at random, in the order of the text."""
        due = float(torch.rand(1, generator=self.generator, dtype=torch.float32, device="cpu")) < self.share
        if not due:
            return None
        stored = bank.ids
        some = torch.randperm(len(stored), generator=self.generator, device="cpu")[: config.top_k]
        found = bank.fetch(stored[some].sort().values)
        scores = torch.zeros(len(found.ids), dtype=torch.float32, device="cpu")
        return Retrieval(query, found.ids, scores), found


@dataclass(frozen=True)
class Negatives(Choice):
    """Puts the best chunks of other rows among those of a row, so that it learns to tell content apart.

    A memory that is trained on its own text alone attends to the right one of d texts in a d-th of the cases (Focused
    Transformer, arXiv 2307.03170).

    Parameters
    ----------
    before
        Asked first; what it chooses stays.
    banks
        Returns the banks of all rows.
    others
        How many other rows there are to find chunks in.
    generator
        Decides how many chunks are foreign, from none to half, and where they stand.
    """

    before: Choice
    banks: Callable[[], Sequence[MemoryBank]]
    others: int
    generator: torch.Generator

    def choose(self, bank: MemoryBank | Draft, query: Tensor, config: MemoryConfig) -> Chosen | None:
        """Retrieve from the bank, but fewer chunks, and put foreign ones among them."""
        chosen = self.before.choose(bank, query, config)
        others = others_of(bank, self.banks())[: self.others]
        if chosen is not None or not others:
            return chosen
        most = config.top_k // 2
        wanted = int(torch.randint(most + 1, (1,), generator=self.generator, device="cpu"))
        foreign = best_of(others, query, wanted)
        result = bank.search(query[None], max(1, min(config.top_k - len(foreign), len(bank))))
        found = result.ids[0] >= 0
        retrieval = Retrieval(query, result.ids[0, found], result.scores[0, found])
        # Its own stay in the order of the text; foreign ones stand anywhere among them.
        own = [bank.fetch([each]) for each in retrieval.ids.sort().values.tolist()]
        places = torch.randperm(len(own) + len(foreign), generator=self.generator, device="cpu").tolist()
        each = dict(zip(sorted(places[: len(own)]), own, strict=True))
        each |= dict(zip(places[len(own) :], foreign, strict=True))
        return retrieval, _joined([each[place] for place in range(len(each))])


@dataclass(frozen=True)
class ForeignChunks(Choice):
    """Retrieves from other rows alone: what memory gives whose content is of no use.

    Parameters
    ----------
    banks
        Returns the banks of all rows.
    """

    banks: Callable[[], Sequence[MemoryBank]]

    def choose(self, bank: MemoryBank | Draft, query: Tensor, config: MemoryConfig) -> Chosen | None:
        """Take the best chunks of all the banks; where other rows have none, there is nothing."""
        found = best_of(others_of(bank, self.banks()), query, config.top_k)
        nothing = torch.zeros(0, dtype=torch.int64, device="cpu")
        retrieval = Retrieval(query, nothing, nothing.to(torch.float32))
        return retrieval, _joined(found) if found else bank.fetch([])


def others_of(bank: MemoryBank | Draft, banks: Sequence[MemoryBank]) -> list[MemoryBank]:
    """Return the banks of other rows that hold something, from the next row on."""
    own = bank.bank if isinstance(bank, Draft) else bank
    place = next((place for place, each in enumerate(banks) if each is own), 0)
    return [each for each in (*banks[place + 1 :], *banks[:place]) if len(each)]


def best_of(banks: Sequence[MemoryBank], query: Tensor, count: int) -> list[Chunks]:
    """Return the chunks of several banks that are nearest to a query [dim], best first, each with the id −1."""
    if not count:
        return []
    scored: list[tuple[float, int, int]] = []
    for number, bank in enumerate(banks):
        found = bank.search(query[None], min(count, len(bank)))
        both = zip(found.ids[0].tolist(), found.scores[0].tolist(), strict=True)
        scored += [(score, number, each) for each, score in both if each >= 0]
    best = sorted(scored, key=lambda each: (-each[0], each[1], each[2]))[:count]
    chunks = [banks[number].fetch([each]) for _, number, each in best]
    return [replace(each, ids=torch.full_like(each.ids, -1)) for each in chunks]


def _joined(parts: Sequence[Chunks]) -> Chunks:
    names = ("ids", "keys", "values", "spans")
    return Chunks(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})
