"""A null chunk: a trained chunk that is read beside whatever is retrieved, and takes up what any chunks would give."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from memlong.bank import ChunkLayout
from memlong.decoder.config import MemoryConfig
from memlong.decoder.persistence.tensor_file import read_tensors, write_tensors
from memlong.errors import InvalidArgumentError

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
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        if keys.ndim != 4 or keys.shape != values.shape:
            raise InvalidArgumentError(
                "keys and values must be [layers, heads, chunk, width] both, got "
                f"{tuple(keys.shape)} and {tuple(values.shape)}"
            )
        self.keys, self.values = nn.Parameter(keys), nn.Parameter(values)

    def save(self, path: str | Path) -> None:
        """Write it as one safetensors file."""
        write_tensors(path, _FORMAT, (), {"keys": self.keys, "values": self.values})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises
        ------
        InvalidArgumentError
            If the file is missing or holds something else.
        """
        _, tensors = read_tensors(path, _FORMAT, field="null_chunk", command="memlong train")
        try:
            keys, values = tensors["keys"], tensors["values"]
            if not (keys.is_floating_point() and values.is_floating_point()):
                raise TypeError("its numbers are integers")
            return cls(keys, values)
        except (KeyError, ValueError, TypeError) as error:
            raise InvalidArgumentError(
                f"null_chunk names {str(path)!r}, which holds no null chunk: {error}. Make the file with "
                "`memlong train`"
            ) from error


def load_null_chunk(config: MemoryConfig, blocks: ChunkLayout) -> NullChunk | None:
    """Load the null chunk that the configuration names, for blocks of this shape, dtype and device.

    Raises
    ------
    InvalidArgumentError
        If its file cannot be read, was made for other blocks, or takes the place of the only chunk.
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


def null_span(size: int) -> Tensor:
    """Return the span [1, 2] of a null chunk of so many tokens: it lies before the text."""
    return torch.tensor([[-size, 0]], device="cpu")
