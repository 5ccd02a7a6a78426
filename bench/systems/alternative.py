"""What all alternatives to a memory have of `MemoryDecoder`'s interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from memlong import MemoryConfig, MemoryDecoder, Segment
from memlong.decoder import Likelihood
from memlong.errors import InvalidArgumentError, MemlongError

ABILITIES = frozenset({"stream", "generate", "score", "be timed"})
"""What benches ask of systems; those that work in another process cannot be timed in this one."""


class Alternative(ABC):
    """A system that benchmarks run as they run a `MemoryDecoder`; streams have one row.

    Attributes
    ----------
    abilities
        What it can do, of `ABILITIES`.
    reads_whole
        Whether the model reads whole texts at their own positions, of which it must have as many.

    Parameters
    ----------
    model, tokenizer, config
        As for `MemoryDecoder`.
    """

    banks = ()
    abilities: ClassVar[frozenset[str]] = ABILITIES
    reads_whole: ClassVar[bool] = False

    def __init__(self, model: PreTrainedModel, tokenizer: Any, config: MemoryConfig) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.model_layout = MemoryDecoder(model, tokenizer, config).model_layout
        self.reset()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the model as it was."""
        return

    @abstractmethod
    def reset(self) -> None:
        """Begin a new stream."""

    @abstractmethod
    def read(self, input_ids: Tensor) -> None:
        """Read more of the text [1, tokens]."""

    @abstractmethod
    def stream(self, input_ids: Tensor, *, logits: Literal["all", "last"] = "all") -> Iterator[Segment]:
        """Read more of the text segment by segment; of segments whose logits nobody asks for, only the last."""

    @abstractmethod
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """Answer a prompt [1, tokens]; the stream stays where it is."""

    def score(self, input_ids: Tensor, continuations: Sequence[Sequence[int]], **_: Any) -> list[Likelihood]:  # noqa: ARG002
        """Return how likely continuations of a prompt [1, tokens] are; the prompt is read for each."""
        raise MemlongError(
            f"{type(self).__name__} does not score continuations: leave it out of tasks that do"
        )

    def check_positions(self, tokens: int) -> None:
        """Raise InvalidArgumentError if the model was not trained on so many positions."""
        positions = self.model_layout.max_positions
        if positions is not None and tokens > positions:
            raise InvalidArgumentError(
                f"{type(self).__name__} reads a whole text at its own positions, of which the model has {positions:,}, "
                f"got {tokens:,} tokens: take a shorter text, or leave the system out"
            )

    @property
    def device_kv_bytes(self) -> int:
        """Bytes of K-V on the device between questions."""
        return 0

    def kv_read_bytes(self, tokens: int, size: int) -> int:
        """Return the bytes of K-V that attention reads for token ``tokens``, for numbers of ``size`` bytes."""
        room = self.attended_tokens
        found = 0
        for layer in self.model_layout.layers.values():
            found += min(tokens, room, layer.sliding_window or tokens) * layer.shape.numbers * size
        return found

    @property
    def attended_tokens(self) -> int:
        """Tokens that a token attends to at most."""
        config = self.config
        return config.sink_tokens + config.local_window + config.top_k * config.chunk_size

    def _continued(self, input_ids: Tensor, tokens: Sequence[int], options: Mapping[str, Any]) -> Tensor:
        """Have the model continue tokens, and return what it says after the prompt [1, tokens] that this answers.

        Processors and criteria see the prompt and the answer, whatever the model has read instead of the prompt.
        """
        read = torch.tensor([list(tokens)], device=self.model.device)
        prompt = input_ids.to(read.device)

        def answering(judge: Any) -> Any:
            return lambda ids, scores: judge(torch.cat([prompt, ids[:, read.shape[1] :]], dim=1), scores)

        judges = {
            name: [answering(each) for each in options[name]]
            for name in ("logits_processor", "stopping_criteria")
            if options.get(name)
        }
        said: Any = self.model.generate(read, attention_mask=torch.ones_like(read), **{**options, **judges})
        return torch.cat([prompt, said[:, read.shape[1] :]], dim=1)

    @torch.no_grad()
    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Return the model's logits [1, tokens, vocabulary] of a prompt."""
        found: Tensor = self.model(
            torch.tensor([list(tokens)], device=self.model.device), use_cache=False
        ).logits
        return found
