"""Memories whose chunks something other than a search of their own bank chooses: controls and bounds."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, NoReturn, Self

from torch import Tensor
from transformers import PreTrainedModel

from memlong import MemoryBank, MemoryConfig, MemoryDecoder, Segment
from memlong.bank import Chunks
from memlong.decoder import Choice, Retrieval, Search
from memlong.errors import MemlongError
from systems.alternative import Alternative


class ChosenMemory(Alternative):
    """A memory that reads as `MemoryDecoder` does, but attends to the chunks that `choose` returns.

    Window, sinks, positions and queries are those of a memory with the same configuration. It only reads: what
    generates continues in drafts, which no choice reaches.

    Attributes
    ----------
    memory
        What reads.
    """

    abilities = frozenset({"stream"})

    def __init__(self, model: PreTrainedModel, tokenizer: Any, config: MemoryConfig) -> None:
        self.memory = MemoryDecoder(model, tokenizer, config)
        super().__init__(model, tokenizer, config)

    def __enter__(self) -> Self:
        self.memory.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.memory.__exit__(kind, error, trace)

    @abstractmethod
    def choose(self, bank: MemoryBank, query: Tensor) -> tuple[MemoryBank, Tensor, Tensor]:
        """Return the bank that has the chunks to retrieve, their ids [chosen], best first, and their scores.

        Parameters
        ----------
        bank
            The stream's own, which holds what has left its window.
        query
            The embedding [dim] of the text before the segment.
        """

    def reset(self) -> None:
        """Begin a new stream."""
        self.memory.reset(choice=_Chosen(self.choose))

    def read(self, input_ids: Tensor) -> None:
        """Read more of the text [1, tokens]."""
        for _ in self.stream(input_ids, logits="last"):
            pass

    def stream(self, input_ids: Tensor, *, logits: Literal["all", "last"] = "all") -> Iterator[Segment]:
        """Read more of the text [1, tokens] segment by segment."""
        return self.memory.stream(input_ids, logits=logits)

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> NoReturn:  # noqa: ARG002
        """Raise MemlongError."""
        self._refuse("generate")

    def score(self, input_ids: Tensor, continuations: Sequence[Sequence[int]], **_: Any) -> NoReturn:  # noqa: ARG002
        """Raise MemlongError."""
        self._refuse("score continuations")

    def _refuse(self, what: str) -> NoReturn:
        raise MemlongError(
            f"{type(self).__name__} does not {what}, it only reads: leave the system out, or measure losses of reading "
            "alone (front.py --no-times --reading segment)"
        )


@dataclass(frozen=True)
class _Chosen(Choice):
    """Retrieves what a function chooses, each time."""

    function: Callable[[MemoryBank, Tensor], tuple[MemoryBank, Tensor, Tensor]]

    def choose(self, search: Search) -> tuple[Retrieval, Chunks]:
        """Take the chosen chunks, in the order of the text."""
        assert isinstance(search.bank, MemoryBank)  # noqa: S101 - such a memory is never forked
        source, ids, scores = self.function(search.bank, search.query)
        return Retrieval(search.query, ids, scores), source.fetch(ids.sort().values)
