"""Serve a model with a memory to many users: an endpoint that OpenAI's clients can talk to.

Each session is a conversation with a memory of its own, which goes on with every request that names it; idle ones lie
on disk, within a budget. Requests of different sessions go through the model together. Corpora that `memlong remember`
made are shared by all. Needs fastapi and uvicorn: pip install "memlong[server]".

    python examples/server.py
    python examples/server.py --memory manual=manuals/pump --memory news=news --budget 16GB --rows 16
    curl localhost:8000/v1/chat/completions -H "Content-Type: application/json" -d '{"session": "8f14e45f",
        "memory": ["manual"], "messages": [{"role": "user", "content": "How is the pump started?"}]}'

With the openai client, pass them as extra_body={"session": ..., "memory": [...]}. A session knows what was said: of the
messages, those after the last answer are read, so a client may send the whole conversation or the new message alone.
Without a session, a request is answered from its messages, and nothing is kept. A session names the same corpora each
time. With "sources": true, an answer comes with what it attended to. Session ids are secrets: whoever knows one has
that memory. SIGTERM and Ctrl-C save all sessions.
"""

from __future__ import annotations

import hmac
import json
import secrets
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated, Any, Literal

import torch
import typer
import uvicorn
from fastapi import FastAPI, Header, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from memlong import LayeredBank, MemoryConfig, MemoryDecoder, SessionPool, load_model
from memlong.corpus import Corpus
from memlong.decoder import Source
from memlong.errors import InvalidArgumentError, MemlongError
from memlong.evaluation import chat_prompt, chat_turn
from memlong.evaluation.numbers import checked_logits

# What a template puts between two turns does not depend on what was said before.
_BEFORE = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "a"})


class Message(BaseModel):
    """What someone said."""

    role: Literal["system", "user", "assistant"]
    content: str


class ChatRequest(BaseModel):
    """A request for /v1/chat/completions; fields that this server does not know are refused, not ignored."""

    model_config = ConfigDict(extra="forbid")

    messages: Annotated[list[Message], Field(min_length=1)]
    model: str | None = None
    session: str | None = None
    memory: list[str] | None = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict[str, bool] | None = None
    sources: bool = False
    n: Literal[1] = 1
    user: str | None = None  # for the caller's own books


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
    _ids: list[int] = field(default_factory=list)
    _text: str = ""
    _told: int = 0

    def tokenize(self, tokenizer: Any, *, begins: bool) -> None:
        """Set the prompt: what the session, which begins or goes on, has not read yet."""
        if begins:
            found = chat_prompt(tokenizer, self.messages)
        else:
            words = "\n\n".join(_since_the_last_answer(self.messages))
            found = chat_turn(tokenizer, words, begins=False, history=_BEFORE)
        self.prompt = found[0].tolist()

    def choose(self, logits: Tensor) -> int:
        """Choose the next token by the request's own settings and random seed."""
        if not self.temperature:
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
            text = tokenizer.decode(self._ids, skip_special_tokens=True)
            stops = [at for at in (text.find(stop) for stop in self.stops) if at >= 0]
            self._text = text[: min(stops, default=None)]
            self.ended = "stop" if stops else "length" if self.tokens == self.most else ""
        # What comes next may complete a character, or a text to stop at.
        held = max((len(stop) - 1 for stop in self.stops), default=0)
        sure = len(self._text) if self.ended else len(self._text.rstrip("\N{REPLACEMENT CHARACTER}")) - held
        if sure > self._told:
            self.said.put(self._text[self._told : sure])
            self._told = sure
        if self.ended and not self.wants_sources:
            self.said.put(None)

    def cite(self, sources: list[dict[str, Any]]) -> None:
        """Note what the answer attended to, which is known when all of the batch have ended."""
        self.sources = sources
        self.said.put(None)

    def fail(self, error: BaseException) -> None:
        """Let the request fail."""
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
            token = self._ends[0] if job.ended else job.choose(logits[row])
            only[row, token] = 0
            if not job.ended:
                job.take(token, self._tokenizer, self._ends)
        return only

    def ended(self, input_ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        """Return which rows [rows] have ended."""
        return torch.tensor([bool(job.ended) for job in self._jobs], device=input_ids.device)


class Worker:
    """The thread that reads and answers: as many waiting requests at a time as ``rows``, each of another session."""

    def __init__(
        self, decoder: MemoryDecoder, pool: SessionPool, corpora: Mapping[str, Corpus], rows: int
    ) -> None:
        self.decoder, self.pool, self.corpora = decoder, pool, corpora
        self._rows = rows
        self._waiting: list[Job] = []
        self._change = threading.Condition()
        self._stopped = False
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
        """Answer what is being answered, refuse the rest, and save all sessions."""
        with self._change:
            self._stopped = True
            self._change.notify()
        self._thread.join()
        self.pool.close()

    def _run(self) -> None:
        with self.decoder:
            while jobs := self._next():
                try:
                    with self._reading:
                        self._answer(jobs)
                except Exception as error:  # noqa: BLE001 - it is the requests that fail, not the server
                    for job in jobs:
                        job.fail(error)
        for job in self._waiting:
            job.fail(MemlongError("The server is stopping"))

    def _next(self) -> list[Job]:
        """Wait for requests, and take the first of each session."""
        with self._change:
            self._change.wait_for(lambda: self._waiting or self._stopped)
            chosen: dict[str, Job] = {}
            for job in [] if self._stopped else self._waiting:
                if len(chosen) < self._rows:
                    chosen.setdefault(job.session, job)
            self._waiting = [job for job in self._waiting if chosen.get(job.session) is not job]
        return list(chosen.values())

    def _answer(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            try:
                job.tokenize(self.decoder.tokenizer, begins=job.session not in self.pool)
            except Exception as error:  # noqa: BLE001 - as above
                job.fail(error)
        jobs = [job for job in jobs if not job.ended]
        if not jobs:
            return
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
            if any(document.expires for corpus in corpora for document in corpus.documents):
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


def _since_the_last_answer(messages: Sequence[Mapping[str, str]]) -> list[str]:
    last = max((at for at, each in enumerate(messages) if each["role"] == "assistant"), default=-1)
    return [each["content"] for each in messages[last + 1 :] if each["role"] == "user"]


def make_app(worker: Worker, *, name: str, most: int, temperature: float, api_key: str | None) -> FastAPI:
    """Make the web application.

    Parameters
    ----------
    worker
        Answers.
    name
        Of the model, as clients see it.
    most, temperature
        Maximum of new tokens, and temperature, of requests that say none.
    api_key
        What clients must send as a bearer token; None for no check.
    """

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        worker.stop()

    app = FastAPI(title="memlong", lifespan=life)

    @app.middleware("http")
    async def check_key(request: Request, go_on: Any) -> Any:
        sent = request.headers.get("authorization", "").removeprefix("Bearer ")
        if api_key is None or hmac.compare_digest(sent.encode(), api_key.encode()):
            return await go_on(request)
        return _refusal(401, "The API key is wrong or missing", "authentication_error")

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(each) for each in first["loc"][1:])
        return _refusal(400, f"{where}: {first['msg']}", "invalid_request_error", where)

    @app.exception_handler(MemlongError)
    async def refused(_: Request, error: MemlongError) -> JSONResponse:
        is_theirs = isinstance(error, InvalidArgumentError)
        return _refusal(
            400 if is_theirs else 500, str(error), "invalid_request_error" if is_theirs else "server_error"
        )

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {
            "object": "list",
            "data": [{"id": name, "object": "model", "created": 0, "owned_by": "memlong"}],
        }

    @app.get("/health")
    def health() -> dict[str, Any]:
        pool = worker.pool
        return {
            "sessions": len(pool),
            "in_memory": pool.in_memory,
            "bytes": pool.nbytes,
            "memory": list(worker.corpora),
        }

    @app.delete("/v1/sessions/{session}")
    def forget(session: str) -> dict[str, Any]:
        return {"id": session, "object": "session", "deleted": worker.delete(session)}

    @app.post("/v1/chat/completions")
    def complete(request: ChatRequest, x_session: Annotated[str | None, Header()] = None) -> Any:
        job = _job_of(request, x_session, worker.corpora, name, most, temperature)
        worker.submit(job)
        about = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": name}
        if request.stream:
            with_usage = bool((request.stream_options or {}).get("include_usage"))
            first = job.said.get()  # so that an error has its status
            if isinstance(first, BaseException):
                raise first
            return StreamingResponse(_events(job, first, about, with_usage), media_type="text/event-stream")
        text = "".join(_pieces(job))
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": job.ended}
        cited = {"sources": job.sources} if request.sources else {}
        return {**about, "object": "chat.completion", "choices": [choice], "usage": _usage(job), **cited}

    return app


def _job_of(
    request: ChatRequest,
    header: str | None,
    corpora: Mapping[str, Corpus],
    name: str,
    most: int,
    temperature: float,
) -> Job:
    messages = [each.model_dump() for each in request.messages]
    if not _since_the_last_answer(messages):
        raise InvalidArgumentError("messages must end with what the user says")
    if request.model not in (None, name):
        raise InvalidArgumentError(f"model must be {name!r}, got {request.model!r}")
    if None not in (request.session, header) and request.session != header:
        raise InvalidArgumentError("The field session and the header X-Session name different sessions")
    unknown = sorted(set(request.memory or ()) - set(corpora))
    if unknown:
        raise InvalidArgumentError(
            f"memory must name some of {', '.join(corpora) or 'none'}, got {unknown[0]!r}"
        )
    session = request.session if request.session is not None else header
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    return Job(
        session=f"once {secrets.token_hex(16)}" if session is None else session,
        is_kept=session is not None,
        memory=tuple(dict.fromkeys(request.memory or ())),
        messages=messages,
        most=request.max_completion_tokens or request.max_tokens or most,
        temperature=temperature if request.temperature is None else request.temperature,
        top_p=request.top_p,
        random=None if request.seed is None else torch.Generator().manual_seed(request.seed),
        stops=tuple(stop for stop in stops if stop),
        wants_sources=request.sources,
    )


def _pieces(job: Job) -> Iterator[str]:
    while (piece := job.said.get()) is not None:
        if isinstance(piece, BaseException):
            raise piece
        yield piece


def _events(job: Job, first: str | None, about: Mapping[str, Any], with_usage: bool) -> Iterator[str]:
    def event(delta: Mapping[str, str], ended: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": ended}
        told = {**about, "object": "chat.completion.chunk", "choices": [choice], **more}
        return f"data: {json.dumps(told)}\n\n"

    try:
        yield event({"role": "assistant", "content": first or ""})
        try:
            for piece in _pieces(job) if first is not None else ():
                yield event({"content": piece})
        except Exception as error:  # noqa: BLE001 - the status is sent already
            yield f"data: {json.dumps(_problem(str(error), 'server_error'))}\n\n"
            return
        yield event({}, job.ended, **({"sources": job.sources} if job.wants_sources else {}))
        if with_usage:
            usage = {**about, "object": "chat.completion.chunk", "choices": [], "usage": _usage(job)}
            yield f"data: {json.dumps(usage)}\n\n"
        yield "data: [DONE]\n\n"
    finally:
        job.ended = job.ended or "cancelled"  # the client has gone


def _usage(job: Job) -> dict[str, int]:
    return {
        "prompt_tokens": len(job.prompt),
        "completion_tokens": job.tokens,
        "total_tokens": len(job.prompt) + job.tokens,
    }


def _problem(message: str, kind: str, parameter: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": parameter, "code": None}}


def _refusal(status: int, message: str, kind: str, parameter: str | None = None) -> JSONResponse:
    return JSONResponse(_problem(message, kind, parameter), status)


def _folders(given: Sequence[str]) -> Iterator[tuple[str, str]]:
    for text in given:
        name, _, folder = text.partition("=")
        if not name or not folder:
            raise InvalidArgumentError(
                f"--memory must be NAME=DIR, such as manual=manuals/pump, got {text!r}"
            )
        yield name, folder


def main(
    memory: Annotated[
        list[str] | None, typer.Option(metavar="NAME=DIR", help="Corpus that sessions may read; repeatable.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Hub id, folder, GGUF file or 'demo'.  [default: the corpora's, else demo]"),
    ] = None,
    sessions: Annotated[Path, typer.Option(help="Folder for idle sessions.")] = Path("sessions"),
    budget: Annotated[str, typer.Option(help="Memory for windows and memories of sessions.")] = "4GB",
    rows: Annotated[int, typer.Option(min=1, help="Requests that go through the model together.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer, unless the request says.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0, max=2, help="Unless the request says; 0 is greedy.")
    ] = 0,
    retriever: Annotated[str | None, typer.Option(help="Retriever by name, if no corpus says.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="MEMLONG_API_KEY", help="Refuse clients that do not send this key.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="'float32', 'bfloat16', 'float16' or 'auto'.")] = "auto",
    device: Annotated[str, typer.Option(help="'cpu', 'cuda', 'cuda:N', 'mps' or 'auto'.")] = "auto",
) -> None:
    """Serve a model with a memory to many users."""
    corpora = {name: Corpus.load(folder) for name, folder in _folders(memory or [])}
    notes: Mapping[str, Any] = next((each.notes for each in corpora.values()), {})
    settings = dict(notes.get("settings", {})) | ({} if retriever is None else {"retriever": retriever})
    name = model or notes.get("model") or "demo"
    language_model, tokenizer = load_model(name, dtype=dtype, device=device)
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidArgumentError(
            f"--model must have a chat template, and {name!r} has none: name an instruct model"
        )
    decoder = MemoryDecoder(language_model, tokenizer, MemoryConfig(**settings))
    for corpus in corpora.values():
        decoder.reset(bases=[corpus.bank])  # refuses those of other models
    decoder.reset()
    worker = Worker(decoder, SessionPool(decoder, sessions, budget=budget), corpora, rows)
    app = make_app(worker, name=name, most=max_new_tokens, temperature=temperature, api_key=api_key)
    uvicorn.run(app, host=host, port=port, log_level="info")


if __name__ == "__main__":
    try:
        typer.run(main)
    except MemlongError as error:
        raise SystemExit(f"server: {error}") from error
