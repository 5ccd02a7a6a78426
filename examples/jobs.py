"""Requests on their way through the model of examples/server.py, and how the next token of each is chosen."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from copy import deepcopy
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from memlong import SessionPool
from memlong.decoder.model.layout import ModelLayout
from memlong.errors import InvalidArgumentError, MemlongError
from memlong.evaluation import chat_prompt, following_turn
from memlong.evaluation.numbers import checked_logits

_GREEDY = 1e-3  # temperatures below that choose the most likely token
_LOG = logging.getLogger("uvicorn.error")


class StoppingError(MemlongError):
    """The server is stopping.

    Attributes
    ----------
    is_unread : bool
        Whether nothing of the request was read, so that it can be sent again.
    """

    def __init__(self, *, is_unread: bool) -> None:
        self.is_unread = is_unread
        super().__init__(
            "The server is stopping, and has read nothing of the request: send it again when the server is back"
            if is_unread
            else "The server is stopping, and has ended the request, of which its session may have read a part"
        )


def log_failure(error: BaseException) -> None:
    """Log what requests have failed of, once for all of them, unless it is their fault."""
    if not isinstance(error, InvalidArgumentError | StoppingError):
        _LOG.error("A request has failed", exc_info=error)


class Prompts:
    """Makes token ids of messages, in any thread.

    Parameters
    ----------
    tokenizer
        The model's.
    layout
        The model's, which says what tokens it reads.
    most
        The most tokens of a prompt.
    """

    def __init__(self, tokenizer: Any, layout: ModelLayout, most: int) -> None:
        # A call with control tokens and one without change what a tokenizer does, which others must not notice.
        self._tokenizer, self._alone = deepcopy(tokenizer), threading.Lock()
        self._stopped = False
        self._layout, self._most = layout, most
        self._most_characters = most * (
            1 + max(map(len, tokenizer.get_vocab()))
        )  # with a space between words

    def stop(self) -> None:
        """Make no more, also of messages that wait for their turn."""
        self._stopped = True

    def of(self, messages: Sequence[Mapping[str, str]], *, begins: bool) -> list[int]:
        """Return what a session, which begins or goes on, has not read yet."""
        new = list(messages) if begins else _since_the_last_answer(messages)
        if len(new) > self._most:
            raise self._too_long(f"{len(new):,} messages")
        characters = sum(len(each["content"]) for each in new)
        if characters > self._most_characters:  # tokenizing those would take long
            raise self._too_long(f"{characters:,} characters")
        try:
            with self._alone:
                if self._stopped:
                    raise StoppingError(is_unread=True)
                if begins:
                    found = chat_prompt(self._tokenizer, new)
                else:
                    found = following_turn(self._tokenizer, "\n\n".join(each["content"] for each in new))
        except TemplateError as error:
            raise InvalidArgumentError(f"messages do not fit the model's chat template: {error}") from error
        if found.shape[1] > self._most:
            raise self._too_long(f"{found.shape[1]:,}")
        prompt: list[int] = found[0].tolist()
        self._check(prompt)
        return prompt

    def _check(self, prompt: Sequence[int]) -> None:
        """Refuse what the model would not read, of which a whole batch would fail."""
        for token in prompt:
            kind = self._layout.placeholders.get(token)
            if kind is not None or token >= self._layout.vocabulary:
                why = "is none of the model's" if kind is None else f"stands for {kind}"
                raise InvalidArgumentError(
                    f"messages must be text, got {self._tokenizer.convert_ids_to_tokens(token)!r}, which {why}: leave "
                    "it out"
                )

    def _too_long(self, what: str) -> InvalidArgumentError:
        return InvalidArgumentError(
            f"messages must have at most {self._most:,} tokens, got {what}: send less, or let the server remember a "
            "document as a corpus"
        )


@dataclass(eq=False)
class Job:
    """A request on its way through the model; pieces of its answer come out of ``said``, and None at the end."""

    session: str
    is_kept: bool
    memory: tuple[str, ...]
    messages: list[dict[str, str]]
    most: int
    temperature: float
    top_p: float
    random: torch.Generator | None
    stops: tuple[str, ...]
    wants_sources: bool
    said: SimpleQueue[str | BaseException | None] = field(default_factory=SimpleQueue)
    prompt: list[int] = field(default_factory=list)
    begins: bool = True  # what the prompt is made for
    tokens: int = 0
    sources: list[dict[str, Any]] = field(default_factory=list)
    ended: Literal["", "stop", "length", "cancelled"] = ""
    is_cut: bool = True  # the session has read no end of the turn
    is_over: bool = False  # the client has been told its end, or has gone
    _ending: threading.Lock = field(default_factory=threading.Lock)
    _ids: list[int] = field(default_factory=list)
    _first: int = 0  # token of those that may still change the text, and of those that have not been told
    _next: int = 0
    _text: str = ""
    _told: int = 0

    def tokenize(self, prompts: Prompts, *, begins: bool) -> None:
        """Set the prompt, for a session that begins or goes on."""
        self.prompt, self.begins = prompts.of(self.messages, begins=begins), begins

    def choose(self, logits: Tensor) -> int:
        """Choose the next token by the request's own settings and random seed."""
        if self.temperature < _GREEDY:
            return int(logits.argmax())
        scores = TemperatureLogitsWarper(self.temperature)(None, logits.float().cpu()[None])
        if self.top_p < 1:
            scores = TopPLogitsWarper(self.top_p)(None, scores)
        return int(torch.multinomial(scores.softmax(dim=-1), 1, generator=self.random))

    def take(self, token: int, tokenizer: Any, ends: Sequence[int]) -> None:
        """Note a token of the answer, and say what it adds for certain to the text."""
        self.tokens += 1
        if token in ends:
            self.ended = "stop"
        else:
            self._ids.append(token)
            if self.tokens == self.most:
                self.ended = "length"
            self._decode(tokenizer)
        # What comes next may complete a text to stop at.
        held = max((len(stop) - 1 for stop in self.stops), default=0)
        sure = len(self._text) - (0 if self.ended else held)
        if sure > self._told:
            self.said.put(self._text[self._told : sure])
            self._told = sure
        if self.ended and not self.wants_sources:
            self._end()

    def _decode(self, tokenizer: Any) -> None:
        """Add the text of the latest tokens, once they are whole characters, up to a text to stop at."""
        before, now = (
            tokenizer.decode(self._ids[self._first : end], skip_special_tokens=True)
            for end in (self._next, len(self._ids))
        )
        if now == before or (now.endswith("\N{REPLACEMENT CHARACTER}") and not self.ended):
            return
        begin = max(0, len(self._text) - max(map(len, self.stops), default=0))
        self._text += now[len(before) :]
        self._first, self._next = self._next, len(self._ids)
        found = [at for at in (self._text.find(stop, begin) for stop in self.stops) if at >= 0]
        if found:
            self.ended, self._text = "stop", self._text[: min(found)]

    def cite(self, sources: list[dict[str, Any]]) -> None:
        """Note what the answer attended to, which is known when all of the batch have ended."""
        self.sources = sources
        self._end()

    def fail(self, error: BaseException) -> None:
        """Let the request fail, unless it is over."""
        self._end(error)  # first: what the answer says from now on is told to nobody
        self.ended = self.ended or "cancelled"

    def cancel(self) -> None:
        """Note that nobody waits for the answer."""
        self.ended, self.is_over = self.ended or "cancelled", True

    def _end(self, error: BaseException | None = None) -> None:
        with self._ending:
            if not self.is_over:
                self.is_over = True
                self.said.put(error)


class Deletion:
    """A session that is to be deleted; ``done`` says whether there was one."""

    def __init__(self, session: str) -> None:
        self.session = session
        self.done: Future[bool] = Future()

    @property
    def ended(self) -> bool:
        """Whether nobody waits for it."""
        return self.done.done()

    def run(self, pool: SessionPool) -> None:
        """Delete the session."""
        if self.done.set_running_or_notify_cancel():
            try:
                self.done.set_result(pool.delete(self.session))
            except Exception as error:  # noqa: BLE001 - the waiting client is told
                self.done.set_exception(error)

    def fail(self, error: BaseException) -> None:
        """Leave the session as it is."""
        if self.done.set_running_or_notify_cancel():
            self.done.set_exception(error)


class Turns:
    """Chooses the next token of each request; a logits processor and a stopping criterion of generate().

    Attributes
    ----------
    are_cut
        Which answers have no end among their tokens.
    """

    def __init__(self, jobs: Sequence[Job], tokenizer: Any, ends: Sequence[int]) -> None:
        self._jobs, self._tokenizer, self._ends = jobs, tokenizer, ends
        self.are_cut = [True] * len(jobs)
        self._done = [False] * len(jobs)  # as generate() knows: what follows is in no session

    def __call__(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        """Return logits [rows, vocabulary] that leave each row its choice alone."""
        only = torch.full_like(logits, -torch.inf)
        for row, job in enumerate(self._jobs):
            token = self._ends[0]
            if not job.ended:
                try:
                    token = job.choose(checked_logits(input_ids, logits[row]))
                    job.take(token, self._tokenizer, self._ends)
                except Exception as error:  # noqa: BLE001 - of this request alone
                    log_failure(error)
                    job.fail(error)
            if not self._done[row]:
                self.are_cut[row] = token not in self._ends
            only[row, token] = 0
        return only

    def ended(self, input_ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        """Return which rows [rows] have ended."""
        self._done = [bool(job.ended) for job in self._jobs]
        return torch.tensor(self._done, device=input_ids.device)


def _since_the_last_answer(messages: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    last = max((at for at, each in enumerate(messages) if each["role"] == "assistant"), default=-1)
    new = messages[last + 1 :]
    if any(each["role"] != "user" for each in new):
        raise InvalidArgumentError(
            "messages must have what the system says at the beginning of a session, and none after: leave it out, or "
            "begin another session"
        )
    return list(new)
