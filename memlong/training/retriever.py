"""Train a retriever: a query map that learns to choose the chunks that helped the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import kl_div, normalize

from memlong.bank.validate import whole_number
from memlong.decoder.decoder import MemoryDecoder
from memlong.decoder.persistence.fingerprint import query_facts
from memlong.decoder.retrievers.query_map import QueryMap
from memlong.errors import InvalidArgumentError
from memlong.training.tries import Tries, try_chunks

_BATCH = 64
_HELD = 5  # one in how many segments
_SPREADS = [0.001 * 2**step for step in range(12)]  # of similarities, where their softmax is taken


@dataclass(frozen=True, eq=False)
class TrainedRetriever:
    """A query map, and what it gives on segments that it was not trained on.

    Attributes
    ----------
    query_map
        The map, after the epoch in which it did best on the held-out segments.
    epochs
        How many that were; 0 if it never did better than no map, and so is none.
    segments, held_out
        How many segments it was trained on, and how many were held out.
    share, base_share
        `gain_share` of the held-out segments with the map and without it. They also chose the epoch, so ``share`` is
        optimistic: measure on other text.
    """

    query_map: QueryMap
    epochs: int
    segments: int
    held_out: int
    share: float
    base_share: float


def train_retriever(
    decoder: MemoryDecoder,
    passages: Sequence[Tensor],
    *,
    candidates: int = 8,
    rank: int = 8,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> TrainedRetriever:
    """Let the model try chunks for the segments of some passages, and train a query map to choose as it does.

    Parameters
    ----------
    decoder
        An attached decoder, whose memory and retriever are those that the map will be used with; its streams are
        reset.
    passages
        Token ids [1, tokens] of each passage. The last fifth of its segments is held out.
    candidates
        Chunks tried for a segment, as for `try_chunks`.
    rank
        Rank of the map's low-rank part; 0 for a factor of each component alone.
    seed
        Random seed.
    progress
        Called with the number of tokens in each segment.

    Raises
    ------
    InvalidArgumentError
        As `try_chunks`, or if ``rank`` is out of range.
    """
    check_rank(rank)
    tries = try_chunks(decoder, passages, candidates=candidates, seed=seed, progress=progress)
    assert decoder.retriever is not None  # noqa: S101 - it was tried
    made_for = query_facts(decoder.config, decoder.retriever, decoder.model)
    return fit_query_map(tries, made_for=made_for, rank=rank, seed=seed)


def check_rank(rank: int) -> int:
    """Return the rank of a map; InvalidArgumentError if it is none."""
    return whole_number("rank", rank, at_least=0, at_most=1024)


def gain_share(tries: Tries, query_map: QueryMap | None = None) -> float:
    """Return how much of what the best chunk gives over random ones is given by the chunk most similar to the query.

    1 is a choice that knows the losses, 0 is no better than random.
    """
    gained, possible = gains(tries, query_map).sum(dim=0)
    return float(gained / possible.clamp_min(1e-12))


@torch.no_grad()
def gains(tries: Tries, query_map: QueryMap | None = None) -> Tensor:
    """Return by how much the loss is lower than with random chunks [segments, 2], in nats per token, float64.

    With the chunk most similar to the query, and with the best one.
    """
    losses = tries.losses.double()
    chosen = _similarities(tries, query_map).argmax(dim=1, keepdim=True)
    by_chance = losses[:, losses.shape[1] // 2 :].mean(dim=1)
    return torch.stack(
        [by_chance - losses.gather(1, chosen)[:, 0], by_chance - losses.min(dim=1).values], dim=1
    )


def fit_query_map(
    tries: Tries,
    *,
    made_for: Sequence[object] = (),
    rank: int = 8,
    temperature: float = 1.0,
    lr: float = 1e-2,
    weight_decay: float = 0.1,
    epochs: int = 200,
    patience: int = 20,
    seed: int = 0,
) -> TrainedRetriever:
    """Train a map so that similarities to the query say which of the chunks that were tried help.

    The softmax of similarities is to be near that of losses (Kullback-Leibler divergence), as in LSR of REPLUG (arXiv
    2301.12652). Training ends when the held-out segments have no longer gained from it.

    Parameters
    ----------
    tries
        Segments in the order of their passages.
    made_for
        Describes the retriever.
    rank
        Rank of the map's low-rank part.
    temperature
        Of losses, in their mean standard deviation among the chunks of a segment.
    lr, weight_decay
        Of AdamW; what decays is the difference to no map.
    epochs
        At most.
    patience
        Epochs without gain after which training ends.
    seed
        Decides where ``down`` begins, and the order of segments.

    Raises
    ------
    InvalidArgumentError
        If there are too few segments to hold any out, or ``rank`` is out of range.
    """
    check_rank(rank)
    generator = torch.Generator("cpu").manual_seed(seed)
    train, held = _split(tries)
    spread = float(train.losses.std(dim=1).mean()) * temperature
    goals = [(-each.losses / max(spread, 1e-9)).log_softmax(dim=1) for each in (train, held)]
    change = QueryMap.identity(tries.queries.shape[1], rank, made_for=made_for, seed=seed)
    with torch.no_grad():
        change.scale.zero_()
    log_spread = torch.tensor(_SPREADS, dtype=torch.float32, device="cpu").log()

    def divergence(some: Tries, goal: Tensor, log_spread: Tensor) -> Tensor:
        logits = _similarities(some, change, added=True) / log_spread.exp()
        return kl_div(logits.log_softmax(dim=1), goal, reduction="batchmean", log_target=True)

    @torch.no_grad()
    def measured(log_spread: Tensor, which: int = 1) -> float:
        return float(divergence((train, held)[which], goals[which], log_spread))

    log_spread = min(log_spread, key=lambda each: measured(each, 0)).clone().requires_grad_()
    optimizer = torch.optim.AdamW(
        [
            {"params": list(change.parameters()), "weight_decay": weight_decay},
            {"params": [log_spread], "weight_decay": 0.0},
        ],
        lr=lr,
    )
    best, kept, at = measured(log_spread), _copy(change), 0
    for epoch in range(1, epochs + 1):
        for rows in _batches(len(train), generator):
            optimizer.zero_grad()
            divergence(train.of(rows), goals[0][rows], log_spread).backward()
            optimizer.step()
        now = measured(log_spread)
        if now < best:
            best, kept, at = now, _copy(change), epoch
        elif epoch - at >= patience:
            break
    found = QueryMap(1 + kept["scale"], kept["down"], kept["up"], made_for)
    return TrainedRetriever(found, at, len(train), len(held), gain_share(held, found), gain_share(held))


def _similarities(tries: Tries, query_map: QueryMap | None, *, added: bool = False) -> Tensor:
    """Cosines [segments, candidates] of chunks to mapped queries; with ``added``, the map is what is added to them."""
    asked = tries.queries
    if query_map is not None:
        asked = asked + query_map(asked) if added else query_map(asked)
    return torch.einsum("sd,scd->sc", normalize(asked, dim=1), tries.chunks)


def _split(tries: Tries) -> tuple[Tries, Tries]:
    """Return the segments to train on, and the last of each passage, which are held out."""
    is_held = torch.zeros(len(tries), dtype=torch.bool, device="cpu")
    for number in tries.passages.unique():
        rows = (tries.passages == number).nonzero()[:, 0]
        is_held[rows[len(rows) - len(rows) // _HELD :]] = True
    if not is_held.any():
        raise InvalidArgumentError(
            f"tries must hold {_HELD} segments of a passage or more, as a {_HELD}th of each is held out, got "
            f"{len(tries)} in all: give longer passages"
        )
    return tries.of(~is_held), tries.of(is_held)


def _batches(count: int, generator: torch.Generator) -> Iterator[Tensor]:
    return iter(torch.randperm(count, generator=generator, device="cpu").split(_BATCH))


def _copy(change: QueryMap) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in change.named_parameters()}
