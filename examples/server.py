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
that memory. SIGTERM and Ctrl-C save all sessions. A corpus is served as it was at the start.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import secrets
import socket
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Annotated, Any, Literal

import torch
import typer
import uvicorn
from fastapi import Depends, FastAPI, Header, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from memlong import LayeredBank, MemoryConfig, MemoryDecoder, SessionPool, load_model
from memlong.cli.corpora import load_corpora, needed_notes
from memlong.corpus import Corpus
from memlong.decoder import Source
from memlong.decoder.persistence.strangers import chosen_config
from memlong.errors import InvalidArgumentError, MemlongError
from memlong.evaluation import chat_prompt, end_of_turn, following_turn
from memlong.evaluation.numbers import checked_logits

_GREEDY = 1e-3  # temperatures below that choose the most likely token
_POLL = 0.02  # seconds
_PATIENCE = 5  # seconds for requests that are being answered when the server is told to stop
_FAILED = "The request failed, and the server's log says why. Its session may have read the message"
_LOG = logging.getLogger("uvicorn.error")


class _WrongKeyError(Exception):
    pass


class Strict(BaseModel):
    """Fields that this server does not know are refused, not ignored."""

    model_config = ConfigDict(extra="forbid")


class Message(Strict):
    """What someone said."""

    role: Literal["system", "user", "assistant"]
    content: str


class StreamOptions(Strict):
    """What a stream tells besides the answer."""

    include_usage: bool = False


class ChatRequest(Strict):
    """A request for /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    model: str | None = None
    session: str | None = None
    memory: list[str] | None = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int | None, Field(ge=0, lt=2**63)] = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    sources: bool = False
    n: Literal[1] = 1
    user: str | None = None  # for the caller's own books


@dataclass(frozen=True)
class Limits:
    """What requests may ask for, and what those get that do not say."""

    new_tokens: int
    prompt_tokens: int
    temperature: float


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
            self.ended = "length" if self.tokens == self.most else ""
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
        """End what is being answered, refuse the rest, and save all sessions."""
        with self._change:
            if self._stopped:
                return
            self._stopped = True
            self._change.notify()
        for job in self._jobs:
            job.ended = job.ended or "cancelled"
        self._thread.join()
        self.pool.close()

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
            self._save()
        except Exception as error:  # noqa: BLE001 - it is the requests that fail, not the server
            _LOG.exception("Requests have failed")
            for job in jobs:
                job.fail(error)

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


def make_app(worker: Worker, *, name: str, limits: Limits, api_key: str | None) -> FastAPI:
    """Make the web application.

    Parameters
    ----------
    worker
        Answers.
    name
        Of the model, as clients see it.
    limits
        Of requests.
    api_key
        What clients must send as a bearer token; None for no check.
    """

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        worker.stop()

    # A dependency and no middleware, which would hide from a request that its client has gone.
    async def check_key(authorization: Annotated[str, Header()] = "") -> None:
        sent = authorization.removeprefix("Bearer ")
        if api_key is not None and not hmac.compare_digest(sent.encode(), api_key.encode()):
            raise _WrongKeyError

    app = FastAPI(title="memlong", lifespan=life, dependencies=[Depends(check_key)])

    @app.exception_handler(_WrongKeyError)
    async def unknown(_: Request, __: _WrongKeyError) -> JSONResponse:
        return _refusal(401, "The API key is wrong or missing")

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(each) for each in first["loc"][1:]) or "the request"
        return _refusal(400, f"{where}: {first['msg']}")

    @app.exception_handler(InvalidArgumentError)
    async def refused(_: Request, error: InvalidArgumentError) -> JSONResponse:
        return _refusal(400, str(error))

    @app.exception_handler(MemlongError)
    async def failed(_: Request, __: MemlongError) -> JSONResponse:
        return _refusal(500, _FAILED)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        about = {"id": name, "object": "model", "created": 0, "owned_by": "memlong"}
        return {"object": "list", "data": [about]}

    @app.get("/health")
    def health() -> dict[str, Any]:
        pool = worker.pool
        sizes = {"sessions": len(pool), "in_memory": pool.in_memory, "bytes": pool.nbytes}
        return {**sizes, "memory": list(worker.corpora)}

    @app.delete("/v1/sessions/{session:path}")
    def forget(session: str) -> dict[str, Any]:
        return {"id": session, "object": "session", "deleted": worker.delete(session)}

    @app.post("/v1/chat/completions")
    async def complete(
        request: Request, asked: ChatRequest, x_session: Annotated[str | None, Header()] = None
    ) -> Any:
        job = _job_of(asked, x_session, worker.corpora, name, limits)
        worker.submit(job)
        about = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": name}
        pieces = _pieces(job, request)
        if asked.stream:
            first = await anext(pieces, None)  # so that an error has its status
            with_usage = asked.stream_options is not None and asked.stream_options.include_usage
            return StreamingResponse(
                _events(job, first, pieces, about, with_usage), media_type="text/event-stream"
            )
        text = "".join([piece async for piece in pieces])
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": job.ended}
        cited = {"sources": job.sources} if asked.sources else {}
        return {**about, "object": "chat.completion", "choices": [choice], "usage": _usage(job), **cited}

    return app


def _job_of(
    request: ChatRequest, header: str | None, corpora: Mapping[str, Corpus], name: str, limits: Limits
) -> Job:
    messages = [each.model_dump() for each in request.messages]
    if messages[-1]["role"] != "user":
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
    wanted = request.max_completion_tokens or request.max_tokens or limits.new_tokens
    return Job(
        session=f"once {secrets.token_hex(16)}" if session is None else session,
        is_kept=session is not None,
        memory=tuple(dict.fromkeys(request.memory or ())),
        messages=messages,
        most=min(wanted, limits.new_tokens),
        temperature=limits.temperature if request.temperature is None else request.temperature,
        top_p=request.top_p,
        random=None if request.seed is None else torch.Generator().manual_seed(request.seed),
        stops=tuple(stop for stop in stops if stop),
        wants_sources=request.sources,
    )


async def _pieces(job: Job, request: Request) -> AsyncIterator[str]:
    """Yield the pieces of an answer; if the client goes away, the request ends."""
    try:
        while True:
            try:
                piece = job.said.get_nowait()
            except Empty:
                if await request.is_disconnected():
                    return
                await asyncio.sleep(_POLL)
                continue
            if isinstance(piece, InvalidArgumentError):
                raise piece
            if isinstance(piece, BaseException):
                raise MemlongError(_FAILED) from piece
            if piece is None:
                return
            yield piece
    finally:
        job.ended = job.ended or "cancelled"


async def _events(
    job: Job, first: str | None, pieces: AsyncIterator[str], about: Mapping[str, Any], with_usage: bool
) -> AsyncIterator[str]:
    def event(delta: Mapping[str, str], ended: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": ended}
        told = {**about, "object": "chat.completion.chunk", "choices": [choice], **more}
        return f"data: {json.dumps(told)}\n\n"

    yield event({"role": "assistant", "content": first or ""})
    try:
        async for piece in pieces:
            yield event({"content": piece})
    except Exception:  # noqa: BLE001 - it is in the log, and the status is sent already
        yield f"data: {json.dumps(_problem(_FAILED, 'server_error'))}\n\n"
        return
    yield event({}, job.ended, **({"sources": job.sources} if job.wants_sources else {}))
    if with_usage:
        usage = {**about, "object": "chat.completion.chunk", "choices": [], "usage": _usage(job)}
        yield f"data: {json.dumps(usage)}\n\n"
    yield "data: [DONE]\n\n"


def _usage(job: Job) -> dict[str, int]:
    return {
        "prompt_tokens": len(job.prompt),
        "completion_tokens": job.tokens,
        "total_tokens": len(job.prompt) + job.tokens,
    }


def _problem(message: str, kind: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def _refusal(status: int, message: str) -> JSONResponse:
    kinds = {400: "invalid_request_error", 401: "authentication_error", 500: "server_error"}
    # A session may have read a message whose answer failed: clients must not send it again by themselves.
    return JSONResponse(_problem(message, kinds[status]), status, {"x-should-retry": "false"})


def _folders(given: Sequence[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for text in given:
        name, _, folder = text.partition("=")
        if not name or not folder or name in found:
            raise InvalidArgumentError(
                f"--memory must be NAME=DIR, such as manual=manuals/pump, each name once, got {text!r}"
            )
        found[name] = Path(folder)
    return found


def _listening(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port))
    except OSError as error:
        raise InvalidArgumentError(
            f"--host {host} --port {port} cannot be listened on: {error.strerror or error}"
        ) from error


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
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most of an answer.")] = 256,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="The most that a request reads.")] = 16_384,
    save_seconds: Annotated[
        float, typer.Option(min=0, help="Save sessions that have changed so often; 0 after each answer.")
    ] = 60,
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
    if api_key is not None and not api_key:
        raise InvalidArgumentError(
            "--api-key must not be empty: name a key, or leave it out to let everyone in"
        )
    folders = _folders(memory or [])
    changes = {} if retriever is None else {"retriever": retriever}
    config, name = MemoryConfig(**changes), model or "demo"
    if folders:  # which may come from a stranger
        notes = needed_notes(list(folders.values()))
        name = model or notes.known_model()
        config = chosen_config(notes.where.parent, str(notes.where), notes.settings, changes)
        dtype = notes.dtype if notes.dtype is not None and dtype == "auto" else dtype
    with _listening(host, port) as listening:
        language_model, tokenizer = load_model(name, dtype=dtype, device=device)
        if not getattr(tokenizer, "chat_template", None):
            raise InvalidArgumentError(
                f"--model must have a chat template, and {name!r} has none: name an instruct model"
            )
        decoder = MemoryDecoder(language_model, tokenizer, config)
        corpora = dict(zip(folders, load_corpora(list(folders.values()), decoder), strict=True))
        for corpus in corpora.values():
            decoder.reset(bases=[corpus.bank])  # refuses those of other models
        decoder.reset()
        limits = Limits(max_new_tokens, max_prompt_tokens, temperature)
        pool = SessionPool(decoder, sessions, budget=budget)
        worker = Worker(
            decoder, pool, corpora, rows=rows, prompt_tokens=max_prompt_tokens, save_seconds=save_seconds
        )
        app = make_app(worker, name=name, limits=limits, api_key=api_key)
        try:
            server = uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=_PATIENCE))
            server.run(sockets=[listening])
        finally:
            worker.stop()  # a second Ctrl-C ends the server without a word


if __name__ == "__main__":
    try:
        typer.run(main)
    except MemlongError as error:
        raise SystemExit(f"server: {error}") from error
