"""What kvpress and InfiniRetri keep of a prompt, in an environment of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from memlong import MemoryConfig, Segment
from memlong.errors import InvalidArgumentError, MissingDependencyError
from systems.alternative import Alternative
from systems.worker import Worker

PYTHON = "MEMLONG_KVPRESS_PYTHON"
QUESTION = 64
"""Least tokens that are read after compression."""

_SCRIPT = Path(__file__).with_name("kvpress_worker.py")


class Elsewhere(Alternative):
    """A prompt of which a method keeps as many tokens as a memory attends to, in another process.

    The question is the last tokens of a prompt, those that are a memory's query but no fewer than `QUESTION`, and is
    attended to besides. A prompt that fits is read as it is. It answers prompts greedily, and does nothing else.

    Raises
    ------
    MissingDependencyError
        If the variable `PYTHON` does not name a Python that has the packages.
    """

    kind: str
    method: str
    packages: str
    abilities = frozenset({"generate"})

    def __init__(self, model: PreTrainedModel, tokenizer: Any, config: MemoryConfig) -> None:
        super().__init__(model, tokenizer, config)
        self._worker: Worker | None = None
        self._python = os.environ.get(PYTHON, "")
        if not self._python:
            raise MissingDependencyError(
                f"kind={self.kind!r} needs an environment of its own, as kvpress needs an older transformers: "
                f"python -m venv kvpress-env && kvpress-env/bin/pip install {self.packages}, then set {PYTHON} to "
                "kvpress-env/bin/python"
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process; the next question begins another."""
        self.close()

    def close(self) -> None:
        """End the process."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def reset(self) -> None:
        """Begin a new stream."""
        self._read: list[int] = []

    def read(self, input_ids: Tensor) -> None:
        """Note more of the text [1, tokens]; it is read again for each question."""
        self._read += input_ids[0].tolist()

    def stream(self, input_ids: Tensor, *, logits: Literal["all", "last"] = "all") -> Iterator[Segment]:  # noqa: ARG002
        """Refuse: what is kept is chosen once, when all has been read."""
        raise InvalidArgumentError(
            f"kind={self.kind!r} only answers prompts, as it chooses what to keep when it has read all of one: leave "
            "it out where perplexity is measured"
        )

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:  # noqa: ARG002
        """Answer a prompt [1, tokens] greedily; the stream stays where it is.

        Logits processors are told which token was chosen, and may not choose another.
        """
        options.pop("remember", None)
        most, least, ends, judges = self._checked(options)
        if self._worker is None:
            self._worker = Worker(self._python, _SCRIPT, self.model, self.tokenizer)
        tokens, said = self._read + input_ids[0].tolist(), input_ids.cpu()
        if self.reads_whole:
            self.check_positions(len(tokens) + most)
        end = max(0, len(tokens) - self._question_length)
        told: dict[str, Any] = {"context": tokens[:end], "question": tokens[end:]}
        told |= {"method": self.method, "kept": self.attended_tokens}
        for number in range(most):
            token = self._worker.ask({**told, "never": ends if number < least else []})["token"]
            scores = self._scores(token, said, judges["logits_processor"])
            said = torch.cat([said, torch.tensor([[token]])], dim=1)
            if token in ends or any(bool(each(said, scores).all()) for each in judges["stopping_criteria"]):
                break
            told = {}
        return said.to(self.model.device)

    @property
    def _question_length(self) -> int:
        return max(QUESTION, self.config.answer_query_length)

    def _checked(self, options: dict[str, Any]) -> tuple[int, int, list[int], dict[str, list[Any]]]:
        """Return the most and least tokens of an answer, those that end it, and what judges it."""
        usual = self.model.generation_config
        given = dict(options)
        is_sampled = given.pop("do_sample", False)
        given.pop("pad_token_id", None)
        ends = given.pop("eos_token_id", usual.eos_token_id)
        most, least = given.pop("max_new_tokens", None), given.pop("min_new_tokens", None)
        judges = {
            name: list(given.pop(name, None) or []) for name in ("logits_processor", "stopping_criteria")
        }
        if is_sampled or given or most is None:
            raise InvalidArgumentError(
                f"kind={self.kind!r} answers greedily with max_new_tokens, min_new_tokens, eos_token_id, "
                f"logits_processor and stopping_criteria, got {', '.join(options) or 'no options'}"
            )
        return (
            most,
            least or 0,
            ends if isinstance(ends, list) else [ends] if ends is not None else [],
            judges,
        )

    def _scores(self, token: int, said: Tensor, processors: list[Any]) -> Tensor:
        """Return scores [1, vocabulary] that allow the token that was chosen alone."""
        scores = torch.full((1, self.model.config.get_text_config().vocab_size), float("-inf"))
        scores[0, token] = 0
        for each in processors:
            scores = each(said, scores)
        if int(scores.argmax()) != token:
            raise InvalidArgumentError(
                f"kind={self.kind!r} chooses tokens in another process, so that logits processors cannot: "
                "leave it out where text is forced"
            )
        return scores


class Kvpress(Elsewhere):
    """K-V of which a press keeps so many tokens in each layer.

    The question is read after the press has chosen, which does not see it. A context is read whole, so that the most
    K-V is that of full attention.
    """

    reads_whole = True

    packages = "torch kvpress"


class SnapKv(Kvpress):
    """SnapKV (https://arxiv.org/abs/2404.14469): what the last tokens before the question attend to."""

    kind, method = "kvpress-snapkv", "snapkv"


class ExpectedAttention(Kvpress):
    """Expected attention (https://arxiv.org/abs/2510.00636): what queries of this distribution would attend to."""

    kind, method = "kvpress-expected", "expected"


class KvZip(Kvpress):
    """KVzip (https://arxiv.org/abs/2505.23416): what the model attends to when it repeats the prompt.

    Heads and layers keep different numbers of tokens, in the mean as many as the others.
    """

    kind, method = "kvpress-kvzip", "kvzip"


class InfiniRetri(Elsewhere):
    """InfiniRetri (https://arxiv.org/abs/2502.12962): sentences that the question attends to in the last layer.

    The context is read in windows of half the tokens, each after the sentences kept so far and before the question, and
    what is kept in the end is the prompt, at most as many tokens. Text is cut and joined at empty lines and sentences.
    """

    kind, method = "infini-retri", "infini-retri"
    packages = "torch kvpress infini-retri tiktoken scipy seaborn"
