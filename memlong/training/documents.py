"""What is trained on: texts from files, folders and datasets, cut into episodes that come in a shuffled order."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from memlong.errors import InvalidArgumentError, InvalidTextError, MissingDependencyError
from memlong.evaluation import read_text

SUFFIXES = (".txt", ".md", ".py")
"""Files of a folder that are read."""


def read_documents(sources: Sequence[str | Path]) -> Iterator[str]:
    """Yield the text of files, and of all files of folders that hold UTF-8 text, in the order of their names.

    A warning tells of files of a folder that hold none, and are left out.

    Raises
    ------
    InvalidTextError
        If a file that is named cannot be read, or a folder holds no text.
    """
    for source in map(Path, sources):
        if not source.is_dir():
            yield read_text(source)
            continue
        found, left_out = 0, []
        for path in sorted(path for path in source.rglob("*") if path.suffix in SUFFIXES and path.is_file()):
            try:
                text = read_text(path)
            except (
                InvalidTextError
            ) as error:  # empty, or in an old encoding: a folder is taken for what it has
                left_out.append(str(error))
                continue
            found += 1
            yield text
        if left_out:
            warnings.warn(
                f"{len(left_out)} files of {str(source)!r} are left out. The first: {left_out[0]}",
                stacklevel=2,
            )
        if not found:
            raise InvalidTextError(
                f"The folder {str(source)!r} holds no text in files named *{', *'.join(SUFFIXES)}. Name another, or "
                "the files themselves."
            )


def read_dataset(name: str, *, split: str = "train", column: str = "text") -> Iterator[str]:
    """Yield the texts of a dataset, by its hub id or the folder that ``save_to_disk`` wrote.

    Raises
    ------
    MissingDependencyError
        If ``datasets`` is not installed.
    InvalidArgumentError
        If the dataset cannot be loaded, has no such column, or one that holds other things than text.
    """
    if find_spec("datasets") is None:
        raise MissingDependencyError(
            f"Reading the dataset {name!r} needs the package datasets: pip install datasets. Text files and folders "
            "need nothing more."
        )
    datasets = import_module("datasets")
    try:
        data = (
            datasets.load_from_disk(name) if Path(name).is_dir() else datasets.load_dataset(name, split=split)
        )
        data = data[split] if isinstance(data, dict) else data
    except (OSError, ValueError, KeyError) as error:
        raise InvalidArgumentError(
            f"The dataset {name!r} could not be loaded: {error}. Name one of the hub, or a folder that save_to_disk "
            "wrote."
        ) from error
    if column not in data.column_names:
        raise InvalidArgumentError(
            f"The dataset {name!r} has no column {column!r}, but {', '.join(map(repr, data.column_names))}."
        )
    for number, row in enumerate(data):
        if not isinstance(row[column], str):
            raise InvalidArgumentError(
                f"Row {number} of the dataset {name!r} holds a {type(row[column]).__name__} in the column {column!r}, "
                "and no text: name another column, or filter such rows out and save_to_disk."
            )
        yield row[column]


class Episodes:
    """Documents, cut into episodes, in an endless order that the seed determines.

    Parameters
    ----------
    documents
        Token ids [tokens] of each.
    tokens
        Tokens of an episode, at most.
    least
        Pieces of a document that are shorter are left out.
    seed
        Of the order, which is another one in each epoch.

    Raises
    ------
    InvalidTextError
        If no piece is long enough.
    """

    def __init__(self, documents: Sequence[Tensor], tokens: int, least: int, seed: int) -> None:
        cut = [piece for document in documents for piece in torch.split(document, tokens)]
        self._pieces: list[Tensor] = [piece for piece in cut if len(piece) >= least]
        self._seed = seed
        self._order: tuple[int, list[int]] = (-1, [])
        if not self._pieces:
            raise InvalidTextError(
                f"None of the {len(documents)} documents has {least} tokens, so that any would come to need a "
                "memory. Give longer texts, or a smaller local_window."
            )

    def __len__(self) -> int:
        return len(self._pieces)

    @property
    def tokens(self) -> int:
        """Tokens of all episodes."""
        return sum(map(len, self._pieces))

    @property
    def digest(self) -> str:
        """A fingerprint of all tokens and of where they are cut."""
        digest = hashlib.sha256()
        for piece in self._pieces:
            digest.update(len(piece).to_bytes(8, "little"))
            digest.update(piece.to(torch.int64).numpy().tobytes())
        return digest.hexdigest()

    def __getitem__(self, number: int) -> Tensor:
        """The episode with this number, from 0 without an end: token ids [tokens]."""
        epoch, place = divmod(number, len(self._pieces))
        if self._order[0] != epoch:
            shuffled = np.random.default_rng((self._seed, epoch)).permutation(len(self._pieces))
            self._order = (epoch, shuffled.tolist())
        return self._pieces[self._order[1][place]]
