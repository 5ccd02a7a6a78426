"""HeardBank: a bank over corpora that tells what was found in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from memlong.bank import MemoryBank
from memlong.bank.layers import LayeredBank
from memlong.decoder import MemoryDecoder

if TYPE_CHECKING:
    from memlong.bank.arrays import FloatInput, IntInput
    from memlong.bank.results import SearchResult
    from memlong.corpus import Corpus

_PER_LAYER = 1 << 40  # ids of a LayeredBank


@dataclass(frozen=True)
class Found:
    """A chunk of a base: the base's number, the chunk's id there, and its score."""

    base: int
    chunk: int
    score: float


class HeardBank(LayeredBank):
    """A layered bank that knows what the latest search found in its bases.

    Attributes
    ----------
    found
        The chunks, best first.
    """

    found: Sequence[Found] = ()

    @classmethod
    def over(
        cls,
        decoder: MemoryDecoder,
        corpora: Sequence[Corpus],
        among: Sequence[IntInput | None],
        top: MemoryBank | None = None,
    ) -> Self:
        """Make a bank over corpora: a new one of the decoder, or this top."""
        top = top or decoder.new_bank()
        assert top is not None  # noqa: S101 - a command about corpora has a backend
        return cls(top, [each.bank for each in corpora], among=among)

    def search(self, queries: FloatInput, k: int, *, among: IntInput | None = None) -> SearchResult:
        """Find the k best chunks of each query in all layers; as `LayeredBank.search`."""
        best = super().search(queries, k, among=among)
        ids, scores = best.ids.flatten().tolist(), best.scores.flatten().tolist()
        layers = self.layer_of(ids).tolist()
        self.found = [
            Found(layer, own - layer * _PER_LAYER, score)
            for layer, own, score in zip(layers, ids, scores, strict=True)
            if own >= 0 and layer >= 0
        ]
        return best
