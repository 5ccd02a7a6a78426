"""A retriever that fuses the rankings of others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from memlong.bank.metric import Metric
from memlong.bank.snapshot.options import SavedOptions
from memlong.bank.validate import whole_number
from memlong.decoder.retrievers.base import Candidates, Passage, Retriever
from memlong.errors import InvalidArgumentError
from memlong.plugins.names import brief, quoted

_DAMPING = 60
_MOST = 2**16
_LEAST, _LARGEST = 0.001, 1000
_DEFAULT = "lm,sentence-transformers"


class HybridRetriever(Retriever):
    """Ranks chunks by each of several retrievers, and fuses the ranks (reciprocal rank fusion).

    An embedding is those of all retrievers one after another, each scaled to length 1 and, in a query, multiplied by
    the weight w of its retriever. So a bank finds the ``candidates`` chunks of the largest sum of w cos, by one search
    and whatever its index. Of these, each retriever ranks all by its cosine, from 1, equal ones in the order of ids,
    and chunks are retrieved by the largest sum of w / (60 + rank). With as many candidates as the bank has chunks, that
    is the fusion of complete rankings.

    Its options by name are ``retrievers``, names of two or more, such as ``"lm,sentence-transformers"``; ``weights``,
    such as ``"2,1"``; ``candidates``; and those of each retriever after its name and a dot, such as ``lm.dim``.

    Parameters
    ----------
    retrievers
        Two or more that compare by cosine and do not re-rank.
    weights
        One for each, from 0.001 to 1000; by default 1.
    candidates
        How many chunks the ranks are of, at least; if ``top_k`` is larger, that many.

    Raises
    ------
    InvalidArgumentError
        If they cannot be fused, or an option is invalid.

    Notes
    -----
    Cormack, Clarke and Büttcher, "Reciprocal rank fusion outperforms Condorcet and individual rank learning methods",
    SIGIR 2009; the 60 is theirs.
    """

    metric: ClassVar[Metric] = "inner_product"

    saved_options: ClassVar[SavedOptions] = {"retrievers": None, "weights": None, "candidates": _MOST}

    query_options: ClassVar[tuple[str, ...]] = ("weights", "candidates")

    def __init__(
        self,
        retrievers: Sequence[Retriever],
        *,
        weights: Sequence[float] | None = None,
        candidates: int = 64,
    ) -> None:
        if len(retrievers) < 2:
            raise InvalidArgumentError(f"retrievers must be two or more, got {len(retrievers)}")
        for each in retrievers:
            kind = type(each).__name__
            if each.metric != "cosine":
                raise InvalidArgumentError(
                    f"retrievers must compare by cosine, got {kind}, which does by {each.metric!r}: candidates are "
                    "found by a sum of cosines"
                )
            if each.candidates:
                raise InvalidArgumentError(
                    f"retrievers must not re-rank themselves, as {kind} does: the order that it makes would be lost"
                )
        models = {id(each.model): each for each in retrievers if each.model is not None}
        if len(models) > 1:
            raise InvalidArgumentError(
                f"retrievers must be for one model, got {len(models)}: make all of them with the model whose memory "
                "they search"
            )
        first = next(iter(models.values()), retrievers[0])
        super().__init__(first.model, first.tokenizer)
        self._retrievers = tuple(retrievers)
        self._weights = tuple([1.0] * len(retrievers) if weights is None else weights)
        if len(self._weights) != len(retrievers) or not all(_LEAST <= w <= _LARGEST for w in self._weights):
            raise InvalidArgumentError(
                f"weights must be {len(retrievers)} numbers from {_LEAST} to {_LARGEST}, one for each retriever, got "
                f"{', '.join(map(str, self._weights))}"
            )
        self.candidates = whole_number("candidates", candidates, at_least=1, at_most=_MOST)
        self._widths = [each.dim for each in retrievers]

    @property
    def dim(self) -> int:
        """Width of all embeddings together."""
        return sum(self._widths)

    def embed_chunks(self, chunks: Sequence[Passage]) -> Tensor:
        """Embeddings of the chunks [chunks, dim]."""
        return self._joined(lambda each, _: each.embed_chunks(chunks), [1.0] * len(self._weights))

    def embed_queries(self, queries: Sequence[Passage]) -> Tensor:
        """Embeddings of the queries [queries, dim]."""
        return self._joined(lambda each, _: each.embed_queries(queries), self._weights)

    def embed_focus(self, queries: Sequence[Passage], means: Tensor, sizes: Sequence[int]) -> Tensor:
        """Embeddings [queries, dim] of the last tokens of texts, as each retriever makes them."""
        parts = means.split(self._widths, dim=1)

        def focused(retriever: Retriever, number: int) -> Tensor:
            found = _rows(retriever.embed_focus(queries, parts[number], sizes))
            is_left = found.any(dim=1, keepdim=True)
            if is_left.all():
                return found
            return found.where(is_left, _rows(retriever.embed_queries([each.latest for each in queries])))

        return self._joined(focused, self._weights)

    def rerank(self, found: Candidates) -> Tensor:
        """Sum of w / (60 + rank) over the retrievers, float64 [n]."""
        shares = []
        embeddings = found.embeddings.double().split(self._widths, dim=1)
        queries = found.query_embedding.double().split(self._widths)
        for chunks, query, weight in zip(embeddings, queries, self._weights, strict=True):
            # Rounded, so that chunks that are alike are equal.
            order = (chunks * query).sum(dim=1).float().sort(descending=True, stable=True).indices
            share = torch.empty(len(order), dtype=torch.float64, device="cpu")
            share[order] = weight / (
                _DAMPING + torch.arange(1, len(order) + 1, dtype=torch.float64, device="cpu")
            )
            shares.append(share)
        # In one order, so that ranks of 1 and 2 are worth what 2 and 1 are.
        return torch.stack(shares).sort(dim=0).values.sum(dim=0)

    def _joined(self, embed: Callable[[Retriever, int], Tensor], weights: Sequence[float]) -> Tensor:
        made = [_rows(embed(each, number)) for number, each in enumerate(self._retrievers)]
        return torch.cat(
            [weight * normalize(each, dim=1) for weight, each in zip(weights, made, strict=True)], dim=1
        ).float()


def retrievers_named(options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the names that a hybrid's options by name give, each with the options of that retriever.

    Raises
    ------
    InvalidArgumentError
        If they are not two or more names of retrievers, or an option is of none of them.
    """
    given = options.get("retrievers", _DEFAULT)
    names = [each.strip() for each in given.split(",")] if isinstance(given, str) else []
    if len(set(names)) < max(2, len(names)) or not all(names):
        raise InvalidArgumentError(
            f"retrievers must be the names of two or more different ones, such as {_DEFAULT!r}, got {brief(given)}"
        )
    for name in names:
        if "/" in name:
            raise InvalidArgumentError(
                f"retrievers must be names of retrievers, got {name!r}: name 'sentence-transformers', and set the "
                f"option sentence-transformers.name to {name!r}"
            )
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    for option, value in options.items():
        name, _, own = str(option).rpartition(".")
        if name in found:
            found[name][own] = value
        elif option not in HybridRetriever.saved_options:
            raise InvalidArgumentError(
                f"There is no option {brief(option)} of retriever 'hybrid'. It accepts: "
                f"{quoted(list(HybridRetriever.saved_options))}, and those of {quoted(names)}, each after the name and "
                f"a dot, such as '{names[0]}.dim'"
            )
    return found


def numbers_named(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return weights and candidates, where a hybrid's options by name give them, as its constructor takes them.

    Raises
    ------
    InvalidArgumentError
        If the weights are not numbers.
    """
    found = {name: options[name] for name in ("weights", "candidates") if name in options}
    if "weights" in found:
        try:
            found["weights"] = [float(each) for each in found["weights"].split(",")]
        except (AttributeError, ValueError) as error:
            raise InvalidArgumentError(
                "weights must be text with a number for each retriever, such as '2,1', got "
                f"{brief(options['weights'])}"
            ) from error
    return found


def _rows(made: Any) -> Tensor:
    """Return what a retriever made, which may be an array, as float64 on the CPU, where the bank takes it."""
    return torch.as_tensor(made, device="cpu").detach().double()
