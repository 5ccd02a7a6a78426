"""The sources of an answer: which retrieved chunks its tokens attended to, and how much."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from memlong.decoder.stream.attention_record import AttentionRecord
from memlong.errors import InvalidArgumentError, MissingDependencyError, StorageError

_THIN = 0.5  # points: what is seen of a chunk of a very long text


@dataclass(frozen=True)
class Source:
    """A retrieved chunk, and how much attention it got.

    Attributes
    ----------
    row
        Row of the batch whose tokens attended to it.
    id
        The chunk's id in the bank of the row; None if no bank has it: it left the window while the answer was
        generated.
    span
        Its first token in the stream that it was stored from, and that after its last.
    mass
        Share of all attention, from 0 to 1, that the recorded tokens of the row gave to it: the mean over tokens and
        heads, and over the retrieval layers.
    by_layer
        The same by retrieval layer.
    """

    row: int
    id: int | None
    span: tuple[int, int]
    mass: float
    by_layer: Mapping[int, float]


class Sources:
    """What `MemoryDecoder.sources` has recorded so far.

    Parameters
    ----------
    find
        Returns the chunks.
    """

    def __init__(self, find: Callable[[], list[Source]]) -> None:
        self._find = find

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.chunks)} chunks)"

    @property
    def chunks(self) -> tuple[Source, ...]:
        """The chunks of all rows, most attended first."""
        return tuple(sorted(self._find(), key=lambda source: (-source.mass, source.row, source.span)))

    def save_picture(self, path: str | Path, *, row: int = 0, tokens: int | None = None) -> None:
        """Draw how much attention each part of the text got, by layer and in all.

        Parameters
        ----------
        path
            A file, of a format that matplotlib knows by its ending.
        row
            Row of the batch.
        tokens
            Length of the text; by default up to the last chunk.

        Raises
        ------
        InvalidArgumentError
            If no chunk of the row was recorded.
        MissingDependencyError
            If matplotlib is not installed.
        StorageError
            If the file cannot be written.
        """
        chunks = sorted((each for each in self.chunks if each.row == row), key=lambda each: each.span)
        if not chunks:
            raise InvalidArgumentError(
                f"row must be a row whose tokens attended to memory inside `with decoder.sources():`, got {row!r}"
            )
        if find_spec("matplotlib") is None:
            raise MissingDependencyError("save_picture() requires matplotlib: pip install 'memlong[plot]'")
        from matplotlib.figure import Figure

        layers = [*chunks[0].by_layer]
        end = max(each.span[1] for each in chunks) if tokens is None else tokens
        figure = Figure(figsize=(9, 2.5 + 0.12 * len(layers)), layout="constrained")
        by_layer, total = figure.subplots(2, sharex=True, height_ratios=(len(layers) + 4, 6))
        edges = np.arange(len(layers) + 1) - 0.5
        most = max(max(each.by_layer.values()) for each in chunks)
        for each in chunks:
            column = [[each.by_layer[layer]] for layer in layers]
            picture = by_layer.pcolormesh(
                each.span, edges, column, vmin=0, vmax=most, edgecolors="face", linewidth=_THIN
            )
            width = each.span[1] - each.span[0]
            total.bar(
                each.span[0], each.mass, width, align="edge", color="C0", edgecolor="C0", linewidth=_THIN
            )
        figure.colorbar(picture, ax=by_layer, label="share of attention")
        step = max(1, len(layers) // 8)
        by_layer.set_yticks(range(0, len(layers), step), layers[::step])
        by_layer.set_ylabel("layer")
        total.set(xlim=(0, end), xlabel="token of the text", ylabel="all layers")
        try:
            figure.savefig(path, dpi=130)
        except OSError as error:
            raise StorageError(f"Cannot write {str(path)!r}: {error.strerror or error}") from error


def sources_of(record: AttentionRecord) -> list[Source]:
    """Return the chunks that a record has, in any order."""
    found = []
    for (row, chunk), given in list(record.given.items()):
        if chunk.span[1] <= 0:  # a null chunk, which no text has
            continue
        shares = given / np.maximum(record.asked[row], 1.0)
        by_layer = dict(zip(record.layers, shares.tolist(), strict=True))
        found.append(Source(row, chunk.id, chunk.span, float(shares.mean()), by_layer))
    return found
