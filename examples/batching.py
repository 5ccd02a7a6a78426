"""Requests of many sessions in batches: what examples/server.py puts between HTTP and the model."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from memlong import LayeredBank, MemoryDecoder, SessionPool
from memlong.corpus import Corpus
from memlong.decoder import Source
from memlong.errors import InvalidArgumentError, MemlongError
from memlong.evaluation import chat_prompt, end_of_turn, following_turn
from memlong.evaluation.numbers import checked_logits

_GREEDY = 1e-3  # temperatures below that choose the most likely token
_LOG = logging.getLogger("uvicorn.error")


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
    tokens: int = 0
    sources: list[dict[str, Any]] = field(default_factory=list)
    ended: Literal["", "stop", "length", "cancelled"] = ""
    is_cut: bool = True  # the model has not ended the turn
    _ids: list[int] = field(default_factory=list)
    _first: int = 0  # token of those that may still change the text, and of those that have not been told
    _next: int = 0
    _text: str = ""
    _told: int = 0

    def tokenize(self, tokenizer: Any, most: int, *, begins: bool) -> None:
        """Set the prompt: what the session, which begins or goes on, has not read yet."""
        try:
            if begins:
                found = chat_prompt(tokenizer, self.messages)
            else:
                found = following_turn(tokenizer, "\n\n".join(_since_the_last_answer(self.messages)))
        except TemplateError as error:
            raise InvalidArgumentError(f"messages do not fit the model's chat template: {error}") from error
        if found.shape[1] > most:
            raise InvalidArgumentError(
                f"messages must have at most {most:,} tokens, got {found.shape[1]:,}: send less, or let the server "
                "remember a document as a corpus"
            )
        self.prompt = found[0].tolist()

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
            self.ended, self.is_cut = "stop", False
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
            self.said.put(None)

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
        self.said.put(None)

    def fail(self, error: BaseException) -> None:
        """Let the request fail, and log what is no fault of the request."""
        if not isinstance(error, InvalidArgumentError):
            _LOG.error("A request has failed", exc_info=error)
        if not self.ended or self.wants_sources:
            self.ended = "cancelled"
            self.said.put(error)


class Turns:
    """Chooses the next token of each request; a logits processor and a stopping criterion of generate()."""

    def __init__(self, jobs: Sequence[Job], tokenizer: Any, ends: Sequence[int]) -> None:
        self._jobs, self._tokenizer, self._ends = jobs, tokenizer, ends

    def __call__(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        """Return logits [rows, vocabulary] that leave each row its choice alone."""
        checked_logits(input_ids, logits)
        only = torch.full_like(logits, -torch.inf)
        for row, job in enumerate(self._jobs):
            token = self._ends[0]
            if not job.ended:
                try:
                    token = job.choose(logits[row])
                    job.take(token, self._tokenizer, self._ends)
                except Exception as error:  # noqa: BLE001 - of this request alone
                    job.fail(error)
            only[row, token] = 0
        return only

    def ended(self, input_ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        """Return which rows [rows] have ended."""
        return torch.tensor([bool(job.ended) for job in self._jobs], device=input_ids.device)


class Worker:
    """The thread that reads and answers: as many waiting requests at a time as ``rows``, each of another session."""

    def __init__(
        self,
        decoder: MemoryDecoder,
        pool: SessionPool,
        corpora: Mapping[str, Corpus],
        *,
        rows: int,
        prompt_tokens: int,
        save_seconds: float,
    ) -> None:
        self.decoder, self.pool, self.corpora = decoder, pool, corpora
        self._rows, self._prompt_tokens, self._save_seconds = rows, prompt_tokens, save_seconds
        self._save_at: float | None = None
        self._waiting: list[Job] = []
        self._jobs: list[Job] = []
        self._change = threading.Condition()
        self._stopped = self._closed = False
        self._reading = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="memlong")
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Let a request wait for its turn."""
        with self._change:
            if self._stopped:
                job.fail(MemlongError("The server is stopping"))
                return
            self._waiting.append(job)
            self._change.notify()

    def delete(self, session: str) -> bool:
        """Delete a session, when what is being answered has been; return whether there was one."""
        with self._reading:
            return self.pool.delete(session)

    def stop(self) -> None:
        """End what is being answered, refuse the rest, and save all sessions."""
        with self._change:
            self._stopped = True
            self._change.notify()
        for job in self._jobs:
            job.ended = job.ended or "cancelled"
        self._thread.join()
        if not self._closed:
            self.pool.close()
            self._closed = True

    def _run(self) -> None:
        try:
            with self.decoder:
                while not self._stopped:
                    self._jobs = self._next()
                    with self._reading:
                        self._answer_or_fail(self._jobs)
        finally:
            with self._change:
                self._stopped = True
            for job in self._waiting:
                job.fail(MemlongError("The server is stopping"))

    def _answer_or_fail(self, jobs: Sequence[Job]) -> None:
        try:
            self._answer(jobs)
        except Exception as error:  # noqa: BLE001 - it is the requests that fail, not the server
            for job in jobs:
                job.fail(error)
        try:
            self._save()
        except MemlongError:
            _LOG.exception("Sessions could not be saved; the server tries again after the next answer")

    def _next(self) -> list[Job]:
        """Wait for requests, or until sessions are to be saved; take the first request of each session."""
        with self._change:
            left = None if self._save_at is None else max(0.0, self._save_at - time.monotonic())
            self._change.wait_for(lambda: self._waiting or self._stopped, left)
            chosen: dict[str, Job] = {}
            for job in [] if self._stopped else self._waiting:
                if len(chosen) < self._rows and not job.ended:
                    chosen.setdefault(job.session, job)
            self._waiting = [
                job for job in self._waiting if not job.ended and chosen.get(job.session) is not job
            ]
        return list(chosen.values())

    def _save(self) -> None:
        if self._save_at is not None and time.monotonic() >= self._save_at:
            self._save_at = None
            self.pool.flush()

    def _answer(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            try:
                begins = job.session not in self.pool
                job.tokenize(self.decoder.tokenizer, self._prompt_tokens, begins=begins)
            except Exception as error:  # noqa: BLE001 - as above
                job.fail(error)
        jobs = [job for job in jobs if not job.ended]
        if not jobs:
            return
        if self._save_at is None:
            self._save_at = time.monotonic() + self._save_seconds
        bases = {job.session: [self.corpora[name].bank for name in job.memory] for job in jobs}
        begun = False
        try:
            with self.pool.sessions(*bases, bases=bases):
                begun = True
                self._hide_expired(jobs)
                wanting = [row for row, job in enumerate(jobs) if job.wants_sources]
                with self.decoder.sources() if wanting else nullcontext() as recorded:
                    self._generate(jobs)
                for row in wanting:
                    jobs[row].cite(self._told(jobs[row], row, recorded.chunks))
        except MemlongError:
            if begun or len(jobs) == 1:
                raise
            for job in jobs:  # one of the sessions cannot go on, and the others can
                try:
                    self._answer([job])
                except Exception as error:  # noqa: BLE001 - as above
                    job.fail(error)
        finally:
            for job in jobs:
                if not job.is_kept:
                    self.pool.delete(job.session)

    def _hide_expired(self, jobs: Sequence[Job]) -> None:
        """Let sessions find no document whose time is over."""
        banks = []
        for job, bank in zip(jobs, self.decoder.banks, strict=True):
            corpora = [self.corpora[name] for name in job.memory]
            if any(document.expires is not None for corpus in corpora for document in corpus.documents):
                bank = LayeredBank(bank.top, bank.bases, among=[corpus.ids() for corpus in corpora])
            banks.append(bank)
        self.decoder.use_banks(banks)

    def _told(self, job: Job, row: int, sources: Sequence[Source]) -> list[dict[str, Any]]:
        """Say what an answer attended to, most attended first: documents of corpora, and what the session has read."""
        found, bank = [], self.decoder.banks[row]
        for each in sources:
            if each.row != row or each.id is None:
                continue
            told: dict[str, Any] = {"attention": each.mass, "memory": None}
            layer = int(bank.layer_of([each.id])) if isinstance(bank, LayeredBank) else len(job.memory)
            if layer < len(job.memory):
                corpus = self.corpora[job.memory[layer]]
                told["memory"] = job.memory[layer]
                if document := corpus.document_of(int(bank.own_ids([each.id]))):
                    first, last = document.span_in_text(*each.span)
                    tokens = corpus.tokens_of(document.source)[first:last]
                    told |= {"source": document.source, "title": document.title, "first_token": first}
                    told["text"] = self.decoder.tokenizer.decode(tokens, skip_special_tokens=True)
            found.append(told)
        return found

    def _generate(self, jobs: Sequence[Job]) -> None:
        tokenizer, model = self.decoder.tokenizer, self.decoder.model
        width = max(len(job.prompt) for job in jobs)
        missing = [width - len(job.prompt) for job in jobs]
        padded = {
            "input_ids": [[0] * pad + job.prompt for pad, job in zip(missing, jobs, strict=True)],
            "attention_mask": [[0] * pad + [1] * (width - pad) for pad in missing],
        }
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [tokenizer.eos_token_id if ends is None else ends]
        turns = Turns(jobs, tokenizer, ends)
        self.decoder.generate(
            **{name: torch.tensor(rows, device=model.device) for name, rows in padded.items()},
            max_new_tokens=max(job.most for job in jobs),
            do_sample=False,
            num_beams=1,
            pad_token_id=ends[0],
            logits_processor=[turns],
            stopping_criteria=[turns.ended],
        )
        cut = [job.is_cut for job in jobs]
        ending = end_of_turn(tokenizer)
        if ending and any(cut):  # the next turn begins where a whole one has ended
            end = torch.tensor([ending] * len(jobs))
            mask = torch.tensor(cut)[:, None].expand(end.shape).long()
            for _ in self.decoder.stream(end, mask, logits="last"):
                pass


def _since_the_last_answer(messages: Sequence[Mapping[str, str]]) -> list[str]:
    last = max((at for at, each in enumerate(messages) if each["role"] == "assistant"), default=-1)
    new = messages[last + 1 :]
    if any(each["role"] != "user" for each in new):
        raise InvalidArgumentError(
            "messages must have what the system says at the beginning of a session, and none after: leave it out, or "
            "begin another session"
        )
    return [each["content"] for each in new]
