"""Requests of many sessions in batches: what examples/server.py puts between HTTP and the model."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import Any

import torch
from jobs import Deletion, Job, Prompts, StoppingError, Turns, log_failure
from torch import Tensor

from memlong import LayeredBank, MemoryDecoder, SessionPool
from memlong.corpus import Corpus
from memlong.decoder import Segment, Source
from memlong.errors import InvalidArgumentError, MemlongError, OtherBasesError
from memlong.evaluation import end_of_turn

_SOON = 10  # seconds until sessions that could not be saved are saved again
_LOG = logging.getLogger("uvicorn.error")


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
        if decoder.config.backend is None:
            raise InvalidArgumentError(
                "backend must be one that stores, such as 'torch', as what a session has read is served, got None"
            )
        self.decoder, self.pool, self.corpora = decoder, pool, corpora
        self._rows, self._save_seconds = rows, save_seconds
        self._prompts = Prompts(decoder.tokenizer, decoder.model_layout, prompt_tokens)
        self._save_at: float | None = None
        self._waiting: list[Job | Deletion] = []
        self._jobs: list[Job] = []  # the latest batch
        self._change = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="memlong")
        self._thread.start()

    @property
    def is_answering(self) -> bool:
        """Whether somebody waits for what is being answered."""
        return not all(job.is_over for job in self._jobs)

    def tokenize(self, job: Job) -> None:
        """Make the prompt of a request, which takes long if there is much to read; any thread may do that."""
        job.tokenize(self._prompts, begins=job.session not in self.pool)

    def submit(self, what: Job | Deletion) -> None:
        """Let a request or a deletion wait for its turn; those of a session come one after the other."""
        with self._change:
            if not self._stopped:
                self._waiting.append(what)
                self._change.notify()
                return
        what.fail(StoppingError(is_unread=True))

    def refuse(self) -> None:
        """Refuse what waits, and what comes from now on."""
        self._prompts.stop()
        with self._change:
            self._stopped = True
            waiting, self._waiting = self._waiting, []
            self._change.notify()
        for each in waiting:
            each.fail(StoppingError(is_unread=True))

    def stop(self) -> None:
        """End what is being answered, refuse the rest, and save all sessions."""
        self.refuse()
        self._end_jobs()
        with suppress(MemlongError):  # sessions in use, or what the second call raises again
            self.pool.close()  # saves idle sessions while the model still computes
        self._thread.join()
        self.pool.close()

    def _end_jobs(self) -> None:
        with self._change:
            jobs = self._jobs
        for job in jobs:
            if not job.is_over:
                job.fail(StoppingError(is_unread=False))

    def _run(self) -> None:
        try:
            with self.decoder:
                while not self._stopped:
                    for each in self._next():
                        each.run(self.pool)
                    self._answer_or_fail(self._jobs)
                    self._save()
        finally:
            self.refuse()
            self._end_jobs()

    def _next(self) -> list[Deletion]:
        """Wait until there is something to do; take the first request of each session, and return deletions."""
        with self._change:
            left = None if self._save_at is None else max(0.0, self._save_at - time.monotonic())
            self._change.wait_for(lambda: self._waiting or self._stopped, left)
            chosen: dict[str, Job | Deletion] = {}
            for each in self._waiting:
                if len(chosen) < self._rows and not each.ended:
                    chosen.setdefault(each.session, each)
            self._waiting = [
                each for each in self._waiting if not each.ended and chosen.get(each.session) is not each
            ]
            self._jobs = [each for each in chosen.values() if isinstance(each, Job)]
        return [each for each in chosen.values() if isinstance(each, Deletion)]

    def _save(self) -> None:
        if self._save_at is None or time.monotonic() < self._save_at:
            return
        try:
            self.pool.flush()
            self._save_at = None
        except MemlongError:
            _LOG.exception("Sessions could not be saved; the server tries again")
            self._save_at = time.monotonic() + max(self._save_seconds, _SOON)

    def _answer_or_fail(self, jobs: Sequence[Job]) -> None:
        try:
            self._answer(jobs)
        except Exception as error:  # noqa: BLE001 - it is the requests that fail, not the server
            log_failure(error)
            for job in jobs:
                job.fail(error)

    def _answer(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            try:
                if job.begins == (job.session in self.pool):  # it has begun since, or was deleted
                    self.tokenize(job)
            except Exception as error:  # noqa: BLE001 - as above
                log_failure(error)
                job.fail(error)
        jobs = [job for job in jobs if not job.ended]
        if not jobs:
            return
        if self._save_at is None:
            self._save_at = time.monotonic() + self._save_seconds
        bases = {job.session: [self.corpora[name].bank for name in job.memory] for job in jobs}
        temporary = {job.session for job in jobs if job.begins or not job.is_kept}
        begun = False
        try:
            with self.pool.sessions(*bases, bases=bases, temporary=temporary):
                begun = True
                self._hide_expired(jobs)
                before = self.decoder.tokens_read
                wanting = [row for row, job in enumerate(jobs) if job.wants_sources]
                try:
                    asked = self._read(jobs)
                    with self.decoder.sources() if wanting else nullcontext() as recorded:
                        self._generate(jobs, asked)
                finally:
                    # Half a message begins no conversation.
                    temporary -= {job.session for job in jobs if job.is_kept and job.tokens}
                    self._end_turns(jobs, before)
                for row in wanting:
                    jobs[row].cite(self._told(jobs[row], row, recorded.chunks))
        except MemlongError as error:
            if begun:  # whatever it says, no request is at fault, and none has been left unread
                raise MemlongError(str(error)) from error
            if len(jobs) == 1:
                raise self._as_names(error, jobs[0]) from error
            for job in jobs:  # one of the sessions cannot go on, and the others can
                self._answer_or_fail([job])

    def _as_names(self, error: MemlongError, job: Job) -> MemlongError:
        """Say what is wrong with bases by the names of corpora."""
        if not isinstance(error, OtherBasesError):
            return error
        names = {corpus.bank.identity: name for name, corpus in self.corpora.items()}
        began = [names.get(each, "a corpus that is not served") for each in error.bases]
        return InvalidArgumentError(
            f"memory must be {began}, as when session {job.session!r} began, got {list(job.memory)}"
        )

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

    def _read(self, jobs: Sequence[Job]) -> list[list[int]]:
        """Let each session read its prompt up to the last segment, which is returned, or until all jobs have ended."""
        size, first, last = self.decoder.config.segment_size, [], []
        for job, read in zip(jobs, self.decoder.tokens_read, strict=True):
            split = max(0, (read + len(job.prompt) - 1) // size * size - read)
            first.append(job.prompt[:split])
            last.append(job.prompt[split:])
        for _ in self._segments(first):
            if all(job.ended for job in jobs):
                break
        return last

    def _generate(self, jobs: Sequence[Job], asked: Sequence[list[int]]) -> None:
        if all(job.ended for job in jobs):
            return
        tokenizer, model = self.decoder.tokenizer, self.decoder.model
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [tokenizer.eos_token_id if ends is None else ends]
        turns = Turns(jobs, tokenizer, ends)
        self.decoder.generate(
            *self._padded(asked),
            max_new_tokens=max(job.most for job in jobs),
            do_sample=False,
            num_beams=1,
            pad_token_id=ends[0],
            logits_processor=[turns],
            stopping_criteria=[turns.ended],
        )
        # Not if generate() fails: no session has read what was said until then.
        for job, is_cut in zip(jobs, turns.are_cut, strict=True):
            job.is_cut = is_cut

    def _end_turns(self, jobs: Sequence[Job], before: Sequence[int]) -> None:
        """End turns that have begun, and have no end yet: the next ones begin after whole ones."""
        read = zip(before, self.decoder.tokens_read, strict=True)
        is_cut = [job.is_cut and then < now for job, (then, now) in zip(jobs, read, strict=True)]
        ending = end_of_turn(self.decoder.tokenizer) if any(is_cut) else []
        for _ in self._segments([ending if each else [] for each in is_cut]):
            pass

    def _segments(self, rows: Sequence[list[int]]) -> Iterator[Segment]:
        """Let each session read its tokens, segment by segment."""
        if any(rows):
            yield from self.decoder.stream(*self._padded(rows), logits="last")

    def _padded(self, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        width, device = max(map(len, rows)), self.decoder.model.device
        ids = [[0] * (width - len(row)) + row for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
