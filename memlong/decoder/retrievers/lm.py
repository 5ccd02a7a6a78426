"""A retriever by shared tokens, weighted by the language model itself: no second model, and almost no cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from memlong.bank.snapshot.options import SavedOptions
from memlong.bank.validate import whole_number
from memlong.decoder.arrays import Floats, Ints
from memlong.decoder.model.attention import evaluating
from memlong.decoder.retrievers.base import Passage, Retriever
from memlong.decoder.retrievers.recency import RecencyPrior
from memlong.errors import InvalidArgumentError

_HASHES = 8
_LARGEST = 8
_WIDEST = 2**20
_FARTHEST = 2**40
_TINY = 1e-12


class LanguageModelRetriever(Retriever):
    """Finds chunks that share informative tokens with the query, and prefers recent ones.

    Each distinct token of a passage, and each distinct bigram unless ``pairs`` is 0, adds its own random directions (a
    count sketch), so that similarity measures overlap. A token's weight is its information content under the language
    model: its surprisal ``-log p`` at the start of a text, to the power of ``sharpness``. Random directions agree
    better with a sentence encoder on which chunks to retrieve than the model's token embeddings do.

    While text is generated, a token of the query counts for more the fewer chunks hold it, and for less the farther it
    is from the end, and recency does not count. Roughly how many chunks do, the mean of the bank's embeddings tells,
    which is a count sketch itself.

    Parameters
    ----------
    dim
        Width of the token part of embeddings. Chance similarity between passages falls with its square root.
    sharpness
        Exponent of the surprisal; 0 weights all tokens equally. Beyond 4, the heaviest tokens decide alone, however
        many chunks hold them.
    pairs
        Weight of a bigram, relative to the sum of its tokens' weights; 0 disables bigrams.
    recency
        Bonus of the most recent chunk, added to the cosine similarity of tokens; 0 disables it. It adds 256 dimensions
        to embeddings.
    recency_scale
        Distance in tokens at which the bonus falls to 0.61 of that; at twice the distance, to 0.14.

    Notes
    -----
    Count sketch: Charikar, Chen and Farach-Colton, "Finding frequent items in data streams", 2002.
    """

    saved_options: ClassVar[SavedOptions] = {
        "dim": _WIDEST,
        "sharpness": _LARGEST,
        "pairs": _LARGEST,
        "recency": _LARGEST,
        "recency_scale": None,
    }

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        dim: int = 4096,
        sharpness: float = 1.0,
        pairs: float = 0.5,
        recency: float = 0.3,
        recency_scale: int = 6000,
    ) -> None:
        super().__init__(model, tokenizer)
        self._tokens_dim = whole_number("dim", dim, at_least=1, at_most=_WIDEST)
        for name, value in (("sharpness", sharpness), ("pairs", pairs), ("recency", recency)):
            if not isinstance(value, int | float) or not 0 <= value <= _LARGEST:
                raise InvalidArgumentError(f"{name} must be a number from 0 to {_LARGEST}, got {value!r}")
        self._pairs = pairs
        scale = whole_number("recency_scale", recency_scale, at_least=1, at_most=_FARTHEST)
        self._recency = RecencyPrior(recency, scale)
        embeddings = model.get_input_embeddings().weight
        start, device = _beginning(model.config, embeddings.shape[0]), embeddings.device
        with torch.no_grad(), evaluating(model):
            logits = model(torch.tensor([[start]], dtype=torch.long, device=device)).logits[0, -1]
        self._weights = (-logits.float().log_softmax(dim=0)).to("cpu") ** sharpness
        self._heavy = float(self._weights.median()) / 4
        generator = torch.Generator("cpu").manual_seed(0)
        shape = (len(self._weights), _HASHES)
        self._places = torch.randint(dim, shape, generator=generator, dtype=torch.long, device="cpu")
        signs = torch.randint(2, shape, generator=generator, dtype=torch.long, device="cpu")
        self._signs = signs.float() * 2 - 1

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        return self._tokens_dim + self._recency.width

    def embed_chunks(self, chunks: Sequence[Passage]) -> Tensor:
        """Embeddings of the chunks [chunks, dim]."""
        return self._recency.extend(self._sketches(chunks), chunks)

    def embed_queries(self, queries: Sequence[Passage]) -> Tensor:
        """Embeddings of the queries [queries, dim]."""
        return self.embed_chunks(queries)

    def embed_focus(self, queries: Sequence[Passage], means: Tensor, sizes: Sequence[int]) -> Tensor:
        """Embeddings [queries, dim] that measure overlap alone, most of all in what few chunks hold."""
        frequencies = [
            self._frequencies_in(mean, size) for mean, size in zip(means.float(), sizes, strict=True)
        ]
        return torch.nn.functional.pad(self._sketches(queries, frequencies), (0, self._recency.width))

    def _frequencies_in(self, mean: Tensor, size: int) -> _DocumentFrequencies:
        mean = mean[: self._tokens_dim]
        sums = (mean[self._places] * self._signs).mean(dim=1)
        # The most frequent token is in nearly every chunk. What is found of a light one is mostly chance.
        return _DocumentFrequencies(mean, float((sums / self._weights.clamp(min=self._heavy)).max()), size)

    def _sketches(
        self, passages: Sequence[Passage], frequencies: Sequence[_DocumentFrequencies] | None = None
    ) -> Tensor:
        """Sketches of passages [passages, dim], each a sum in ascending order of its tokens and then of its bigrams.

        With the ``frequencies`` in the bank that each asks, terms count by how few chunks hold them. Of a passage with
        a half-life, a term counts as where it stands last.
        """
        tokens = np.fromiter(chain.from_iterable(each.token_ids for each in passages), dtype=np.int64)
        owners = np.repeat(np.arange(len(passages)), [len(each.token_ids) for each in passages])
        decays = None if all(each.half_life is None for each in passages) else _decays(passages)
        sketches = torch.zeros(len(passages), self._tokens_dim, dtype=torch.float32, device="cpu")
        above = int(tokens.max(initial=0)) + 1
        distinct, decay = _distinct(owners * above + tokens, decays)
        of, token = _unpacked(distinct, above)
        self._add(sketches, of, *self._directions(token), self._weights[token], frequencies, decay)
        if self._pairs:
            couples = (owners[1:] * above + tokens[:-1]) * above + tokens[1:]
            inside = owners[1:] == owners[:-1]
            distinct, decay = _distinct(couples[inside], None if decays is None else decays[1:][inside])
            rest, second = _unpacked(distinct, above)
            of, first = rest // above, rest % above
            (places, signs), (others, other_signs) = self._directions(first), self._directions(second)
            places = (places + 3 * others + 1) % self._tokens_dim  # "a b" differs from "b a"
            weights = self._pairs * (self._weights[first] + self._weights[second])
            self._add(sketches, of, places, signs * other_signs, weights, frequencies, decay)
        return sketches

    def _directions(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the places, and the signs there, of tokens [tokens, hashes]."""
        return self._places.index_select(0, tokens), self._signs.index_select(0, tokens)

    def _add(
        self,
        sketches: Tensor,
        of: Tensor,
        places: Tensor,
        signs: Tensor,
        weights: Tensor,
        frequencies: Sequence[_DocumentFrequencies] | None,
        decay: Floats | None,
    ) -> None:
        """Add terms [terms] of some of the sketches, each in all its places [terms, hashes]."""
        if frequencies is not None:
            rarity = [
                bank.rarity(places[of == row], signs[of == row], weights[of == row])
                for row, bank in enumerate(frequencies)
            ]
            weights = weights * torch.cat(rarity)
        if decay is not None:
            weights = weights * torch.from_numpy(decay)
        where = of[:, None] * self._tokens_dim + places
        sketches.view(-1).index_add_(0, where.flatten(), (weights[:, None] * signs).flatten())


@dataclass(frozen=True, eq=False)
class _DocumentFrequencies:
    """How many chunks of a bank hold a term, as its mean embedding tells.

    Attributes
    ----------
    mean
        Of the sketches of its chunks [dim], each scaled to length 1: itself a sketch of how often each term is held.
    top
        What the mean gives for a term that nearly every chunk holds, relative to the term's weight.
    size
        How many chunks it holds.
    """

    mean: Tensor
    top: float
    size: int

    def rarity(self, places: Tensor, signs: Tensor, weights: Tensor) -> Tensor:
        """Return log² of roughly the share of chunks that hold each term [terms], relative to the most frequent one.

        As in the cosine of two tf-idf vectors, where the factor stands on both sides; that of the chunks was not known
        when they were stored. A share is at least that of one chunk.
        """
        found = (self.mean[places] * signs).mean(dim=1)
        shares = found / (weights * self.top).clamp(min=_TINY)
        return shares.clamp(1 / max(1, self.size), 1).log().square()


def _decays(passages: Sequence[Passage]) -> Floats:
    """Return by how much each token [tokens] of the passages counts less than its passage's last, if it does."""
    before = [np.arange(len(each.token_ids) - 1, -1, -1) / (each.half_life or np.inf) for each in passages]
    return np.exp2(-np.concatenate(before)).astype(np.float32)


def _distinct(numbers: Ints, decays: Floats | None) -> tuple[Ints, Floats | None]:
    """Return distinct numbers, ascending, with the ``decays`` of where each stands last."""
    if decays is None:
        ordered = np.sort(numbers)
        return ordered[np.diff(ordered, prepend=-1) != 0], None
    order = np.argsort(numbers, kind="stable")
    last = order[np.diff(numbers[order], append=-1) != 0]
    return numbers[last], decays[last]


def _unpacked(numbers: Ints, base: int) -> tuple[Tensor, Tensor]:
    """Return quotients and remainders."""
    quotients, remainders = np.divmod(numbers, base)
    return torch.from_numpy(quotients), torch.from_numpy(remainders)


def _beginning(config: Any, vocabulary: int) -> int:
    start = getattr(config, "bos_token_id", None) or 0
    if not isinstance(start, int) or not 0 <= start < vocabulary:
        raise InvalidArgumentError(
            f"model.config.bos_token_id must be a token id from 0 to {vocabulary - 1}, got {start!r}: set it to the "
            "token that starts a text, or to None"
        )
    return start
