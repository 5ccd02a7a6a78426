"""A null chunk: a trained chunk that is read beside whatever is retrieved, and takes up what any chunks would give."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from memlong.bank import ChunkLayout
from memlong.decoder.config import MemoryConfig
from memlong.decoder.persistence.tensor_file import check_floating, making, read_file, write_file
from memlong.errors import InvalidArgumentError

if TYPE_CHECKING:
    from memlong.decoder.kv.sources import KvSource

_FORMAT = "memlong-null-chunk-1"


class NullChunk(nn.Module):
    """Keys and values of a chunk that no text has, in the form in which chunks are stored.

    Wherever chunks are retrieved, it stands before them, in place of one of the ``top_k``; where none are, it is not
    read either. A memory that is trained on text learns first what helps whatever chunks hold. With a null chunk that
    has a place of its own, and what is left to learn is to read content.

    Parameters
    ----------
    keys, values
        [layers, heads, chunk, width] each, as a bank's block.
    made_for
        What it was trained with, as `null_chunk_facts` says it; empty if that is not known.
    """

    def __init__(self, keys: Tensor, values: Tensor, made_for: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        if keys.ndim != 4 or keys.shape != values.shape:
            raise InvalidArgumentError(
                "keys and values must be [layers, heads, chunk, width] both, got "
                f"{tuple(keys.shape)} and {tuple(values.shape)}"
            )
        self.keys, self.values = nn.Parameter(keys), nn.Parameter(values)
        self.made_for = dict(made_for or {})

    def save(self, path: str | Path) -> None:
        """Write it as one safetensors file."""
        facts = {"made_for": json.dumps(self.made_for)}
        write_file(path, _FORMAT, {"keys": self.keys, "values": self.values}, facts)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises
        ------
        InvalidArgumentError
            If the file is missing or holds something else.
        """
        facts, tensors = read_file(path, _FORMAT, field="null_chunk", command="memlong train")
        with making(path, "null chunk", field="null_chunk", command="memlong train"):
            made_for = json.loads(facts["made_for"])
            if not isinstance(made_for, dict):
                raise TypeError("it does not say what it was trained with")
            check_floating(tensors["keys"], tensors["values"])
            return cls(tensors["keys"], tensors["values"], made_for)


def null_chunk_facts(config: MemoryConfig, source: KvSource) -> dict[str, Any]:
    """Describe, as JSON can hold it, what a null chunk is trained with and its shape does not tell."""
    return {
        "kv_source": config.kv_source,
        "retrieval_layers": list(source.retrieval_layers),
        "stored_layers": list(source.stored_layers),
    }


def load_null_chunk(config: MemoryConfig, source: KvSource, blocks: ChunkLayout) -> NullChunk | None:
    """Load the null chunk that the configuration names, for a source's blocks of this shape, dtype and device.

    Raises
    ------
    InvalidArgumentError
        If its file cannot be read, was made for other blocks or layers, or takes the place of the only chunk.
    """
    if config.null_chunk is None:
        return None
    check_top_k(config)
    chunk = NullChunk.load(config.null_chunk)
    if tuple(chunk.keys.shape) != tuple(blocks.shape):
        raise InvalidArgumentError(
            f"null_chunk names {config.null_chunk!r}, of shape {tuple(chunk.keys.shape)}, but chunks are stored as "
            f"{tuple(blocks.shape)}: use it with the settings that it was trained with"
        )
    ours = null_chunk_facts(config, source)
    differing = [name for name in ours if chunk.made_for and chunk.made_for.get(name) != ours[name]]
    if differing:
        theirs = ", ".join(f"{name} {chunk.made_for.get(name)!r:.80}" for name in differing)
        mine = ", ".join(f"{name} {ours[name]!r:.80}" for name in differing)
        raise InvalidArgumentError(
            f"null_chunk names {config.null_chunk!r}, trained with {theirs}, but this memory has {mine}: use it with "
            "the settings that it was trained with"
        )
    return chunk.to(device=blocks.device, dtype=blocks.dtype).requires_grad_(False)


def check_top_k(config: MemoryConfig) -> None:
    """Refuse a null chunk where a single chunk is read.

    Raises
    ------
    InvalidArgumentError
        If ``top_k`` is 1.
    """
    if config.top_k < 2:
        raise InvalidArgumentError(
            f"top_k must be at least 2 with a null chunk, which takes the place of one, got {config.top_k}"
        )


def retrieved_chunks(config: MemoryConfig, *, beside_null_chunk: bool) -> int:
    """Return how many chunks are retrieved for a segment: ``top_k``, one of which a null chunk takes the place of."""
    return config.top_k - beside_null_chunk


def null_span(size: int) -> Tensor:
    """Return the span [1, 2] of a null chunk of so many tokens: it lies before the text."""
    return torch.tensor([[-size, 0]], device="cpu")
