"""Training texts from files, folders and datasets, split into episodes in shuffled order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from memlong.bank.warn import warn_caller
from memlong.errors import InvalidArgumentError, InvalidTextError, MissingDependencyError
from memlong.evaluation import read_text

SUFFIXES = (".txt", ".md", ".py")
"""Suffixes of the files that are read from a folder."""


def read_documents(sources: Sequence[str | Path], *, join: bool = False) -> Iterator[str]:
    """Yield the text of files, and of all text files in folders, sorted by path.

    Unreadable files in a folder are skipped with a warning.

    Parameters
    ----------
    sources
        Files and folders.
    join
        Whether the files of a folder are one document, so that one memory holds all of a repository. Each is then
        preceded by a line with its path in the folder.

    Raises
    ------
    InvalidTextError
        If a file given by name cannot be read, or a folder has no text.
    """
    for source in map(Path, sources):
        if not source.is_dir():
            yield read_text(source)
            continue
        found: list[str] = []
        left_out = []
        for path in sorted(path for path in source.rglob("*") if path.suffix in SUFFIXES and path.is_file()):
            try:
                text = read_text(path)
            except InvalidTextError as error:  # empty or in a legacy encoding: no reason to reject the folder
                left_out.append(str(error))
                continue
            found.append(f"{path.relative_to(source).as_posix()}\n{text.rstrip()}\n" if join else text)
        if left_out:
            warn_caller(
                f"Skipped {len(left_out)} files in {str(source)!r}. The first: {left_out[0]}",
            )
        if not found:
            raise InvalidTextError(
                f"The folder {str(source)!r} has no text in files named *{', *'.join(SUFFIXES)}: give another folder, "
                "or the files themselves"
            )
        yield from ["\n".join(found)] if join else found


def read_dataset(name: str, *, split: str = "train", column: str = "text") -> Iterator[str]:
    """Yield the texts of a dataset, given by hub id or a folder written by ``save_to_disk``.

    Raises
    ------
    MissingDependencyError
        If ``datasets`` is not installed.
    InvalidArgumentError
        If the dataset cannot be loaded, or the column is missing or not text.
    """
    if find_spec("datasets") is None:
        raise MissingDependencyError(
            f"Reading the dataset {name!r} needs the package datasets: pip install datasets. Text files and folders "
            "work without it"
        )
    datasets = import_module("datasets")
    try:
        data = (
            datasets.load_from_disk(name) if Path(name).is_dir() else datasets.load_dataset(name, split=split)
        )
        data = data[split] if isinstance(data, dict) else data
    except (OSError, ValueError, KeyError) as error:
        raise InvalidArgumentError(
            f"Cannot load the dataset {name!r}: {error}. Give a hub id, or a folder written by save_to_disk"
        ) from error
    if column not in data.column_names:
        raise InvalidArgumentError(
            f"column must be one of {', '.join(map(repr, data.column_names))} for the dataset {name!r}, got {column!r}"
        )
    for number, row in enumerate(data):
        if not isinstance(row[column], str):
            raise InvalidArgumentError(
                f"The column {column!r} of the dataset {name!r} must be text, got {type(row[column]).__name__} in row "
                f"{number}: give another column, or filter out such rows and use save_to_disk"
            )
        yield row[column]


@dataclass(frozen=True)
class Episode:
    """What a row reads with one memory.

    Attributes
    ----------
    tokens
        Token ids [tokens].
    weights
        The loss weight of each token [tokens], float32; None if all count.
    queries
        By the number of the token that begins a segment, the token ids to retrieve with for it; where there are none, a
        segment retrieves with the text before it.
    told
        By the number of the token that begins a segment, where each fact that it asks for was last told: the number of
        the token after it.
    """

    tokens: Tensor
    weights: Tensor | None = None
    queries: Mapping[int, Sequence[int]] = field(default_factory=dict)
    told: Mapping[int, Sequence[int]] = field(default_factory=dict)


class Source(Protocol):
    """Gives episodes by their number, counted from 0 and unbounded."""

    def __getitem__(self, number: int) -> Episode:
        """Return the episode with this number; the same each time."""


class Mixture:
    """Episodes of several sources, at random in the given shares.

    Parameters
    ----------
    sources
        The sources by name.
    shares
        Of each source, relative to the others.
    seed
        Random seed of the choice.
    """

    def __init__(self, sources: Mapping[str, Source], shares: Mapping[str, float], seed: int) -> None:
        self._sources = tuple(sources.values())
        given = np.array([shares[name] for name in sources], dtype=np.float64)
        self._until = given.cumsum() / given.sum()
        self._seed = seed

    def __getitem__(self, number: int) -> Episode:
        """Return the episode with this number, counted from 0 and unbounded."""
        drawn = np.random.default_rng((self._seed, number, 1)).random()
        return self._sources[int(self._until.searchsorted(drawn, side="right"))][number]


class Episodes:
    """Documents split into episodes, in an endless shuffled order, in which no batch has the same one twice.

    Parameters
    ----------
    documents
        Token ids [tokens] of each document, on any device.
    tokens
        Maximum length of an episode, in tokens.
    least
        Minimum length; shorter pieces are dropped.
    seed
        Random seed of the order, which differs in each epoch.
    together
        Episodes of a batch. Those that do not fill one are left out of an epoch. If there are fewer, they come again
        in a batch.

    Raises
    ------
    InvalidArgumentError
        If a document is not token ids [tokens].
    InvalidTextError
        If no episode is long enough.
    """

    def __init__(
        self, documents: Sequence[Tensor], tokens: int, least: int, seed: int, together: int = 1
    ) -> None:
        for document in documents:
            if not isinstance(document, Tensor) or document.ndim != 1 or document.is_floating_point():
                kind = type(document).__name__
                given = (
                    f"{tuple(document.shape)} of {document.dtype}" if isinstance(document, Tensor) else kind
                )
                raise InvalidArgumentError(
                    f"documents must be a list of integer tensors of token ids [tokens], one per document, got {given}"
                )
        self._cut = [piece for document in documents for piece in torch.split(document.cpu(), tokens)]
        self._pieces: list[Tensor] = [piece for piece in self._cut if len(piece) >= least]
        self._epoch = len(self._pieces) - len(self._pieces) % together or len(self._pieces)
        self._seed = seed
        self._order: tuple[int, list[int]] = (-1, [])
        if not self._pieces:
            raise InvalidTextError(
                f"At least one document must have {least} tokens to need a memory, got {len(documents)} shorter ones: "
                "give longer texts, or a smaller local_window"
            )

    def __len__(self) -> int:
        return len(self._pieces)

    @property
    def tokens(self) -> int:
        """Total number of tokens."""
        return sum(map(len, self._pieces))

    @property
    def digest(self) -> str:
        """A hash of all documents and of how they are split; those too short for an episode are filler of others."""
        digest = hashlib.sha256()
        for piece in self._cut:
            digest.update(len(piece).to_bytes(8, "little"))
            digest.update(piece.to(torch.int64).numpy().tobytes())
        return digest.hexdigest()

    def __getitem__(self, number: int) -> Episode:
        """Return the episode with this number, counted from 0 and unbounded."""
        epoch, place = divmod(number, self._epoch)
        if self._order[0] != epoch:
            shuffled = np.random.default_rng((self._seed, epoch)).permutation(len(self._pieces))
            self._order = (epoch, shuffled.tolist())
        return Episode(self._pieces[self._order[1][place]])
