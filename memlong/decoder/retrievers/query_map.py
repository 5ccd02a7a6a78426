"""A trained query map: what a segment is asked with, so that the chunks that help are found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from memlong.decoder.persistence.tensor_file import check_floating, making, read_file, write_file
from memlong.decoder.retrievers.base import Passage, Retriever
from memlong.errors import InvalidArgumentError

_FORMAT = "memlong-query-map-1"
_COMMAND = "memlong train-retriever"
_FACTS = ("class", "retriever", "options", "dim", "metric", "vocabulary")  # as `query_facts` gives them


class QueryMap(nn.Module):
    """Maps the embedding q of a query to scale * q + up (down q); those of chunks, and so banks, stay as they are.

    Parameters
    ----------
    scale
        Factor of each component [dim].
    down, up
        Of low rank: [rank, dim] and [dim, rank].
    made_for
        Describes the retriever that makes the embeddings, as `described` does.

    Raises
    ------
    InvalidArgumentError
        If shapes do not fit together.
    """

    def __init__(self, scale: Tensor, down: Tensor, up: Tensor, made_for: Sequence[object] = ()) -> None:
        super().__init__()
        if scale.ndim != 1 or down.ndim != 2 or down.shape[1] != len(scale) or up.shape != down.T.shape:
            shapes = ", ".join(str(tuple(each.shape)) for each in (scale, down, up))
            raise InvalidArgumentError(
                f"scale, down and up must be [dim], [rank, dim] and [dim, rank], got {shapes}"
            )
        self.scale, self.down, self.up = (nn.Parameter(each) for each in (scale, down, up))
        self.made_for = [*made_for]

    @classmethod
    def identity(cls, dim: int, rank: int, *, made_for: Sequence[object] = (), seed: int = 0) -> Self:
        """Return a map that changes nothing yet, on the CPU; ``down`` is random."""
        generator = torch.Generator("cpu").manual_seed(seed)
        down = torch.randn(rank, dim, generator=generator, dtype=torch.float32, device="cpu") / dim**0.5
        ones = torch.ones(dim, dtype=torch.float32, device="cpu")
        return cls(ones, down, torch.zeros_like(down.T), made_for)

    def forward(self, queries: Tensor) -> Tensor:
        """Map embeddings [..., dim]."""
        return queries * self.scale + (queries @ self.down.T) @ self.up.T

    @torch.no_grad()
    def embed_queries(self, retriever: Retriever, queries: Sequence[Passage]) -> Tensor:
        """Embeddings of the queries [queries, dim], float32, mapped."""
        made = torch.as_tensor(retriever.embed_queries(queries), dtype=torch.float32, device="cpu")
        found: Tensor = self(made)
        return found

    def save(self, path: str | Path) -> None:
        """Write the map as one safetensors file."""
        write_file(path, _FORMAT, dict(self.named_parameters()), {"retriever": json.dumps(self.made_for)})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote, as float32 on the CPU.

        Raises
        ------
        InvalidArgumentError
            If the file is missing or holds something else.
        """
        facts, tensors = read_file(path, _FORMAT, field="query_map", command=_COMMAND)
        with making(path, "query map", field="query_map", command=_COMMAND):
            made_for = json.loads(facts["retriever"])
            if not isinstance(made_for, list):
                raise TypeError("it does not say for which retriever it was made")
            parts = [tensors[name] for name in ("scale", "down", "up")]
            check_floating(*parts)
            scale, down, up = (each.float() for each in parts)
            return cls(scale, down, up, made_for)


def check_mappable(retriever: Retriever) -> None:
    """Raise InvalidArgumentError unless chunks are ranked by their cosine to a query alone."""
    kind = type(retriever).__name__
    if retriever.metric != "cosine":
        raise InvalidArgumentError(
            f"query_map needs a retriever that compares by cosine, got {kind}, which does by {retriever.metric!r}: use "
            "'lm' or 'sentence-transformers', or leave the map out"
        )
    if retriever.candidates:
        raise InvalidArgumentError(
            f"query_map needs a retriever that does not re-rank, as {kind} does: the order that the map makes would be "
            "lost. Use another retriever, or leave the map out"
        )


def load_query_map(path: str, retriever: Retriever, made_by: Sequence[object]) -> QueryMap:
    """Load a map for a retriever that is described by ``made_by``.

    Raises
    ------
    InvalidArgumentError
        If the file cannot be read, or it is for another retriever.
    """
    check_mappable(retriever)
    found = QueryMap.load(path)
    if found.made_for != json.loads(json.dumps(made_by)) or len(found.scale) != retriever.dim:
        theirs, ours = _labelled(found.made_for), _labelled(made_by)
        raise InvalidArgumentError(
            f"query_map names {path!r}, made for the retriever ({theirs:.300}), but the retriever is ({ours:.300}): "
            f"set retriever and retriever_options to those of the map, or make another with `{_COMMAND}`"
        )
    return found


def _labelled(made_for: Sequence[object]) -> str:
    """Return what a map is made for, each fact with its name."""
    if len(made_for) != len(_FACTS):
        return ", ".join(map(str, made_for)) or "not named"
    return ", ".join(f"{name} {each}" for name, each in zip(_FACTS, made_for, strict=True))
