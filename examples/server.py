"""Serve a model with a memory to many users: an endpoint that OpenAI's clients can talk to.

Each session is a conversation with a memory of its own, which every request that names it continues; idle ones lie
on disk, within a budget. Requests of different sessions go through the model together. Corpora that `memlong remember`
made are shared by all. Needs fastapi and uvicorn: pip install "memlong[server]".

    python examples/server.py
    python examples/server.py --memory manual=manuals/pump --memory news=news --budget 16GB --rows 16
    curl localhost:8000/v1/chat/completions -H "Content-Type: application/json" -d '{"session": "8f14e45f",
        "memory": ["manual"], "messages": [{"role": "user", "content": "How is the pump started?"}]}'

With the openai client, pass them as extra_body={"session": ..., "memory": [...]}, and max_retries=0: a session may have
read a message that got no answer. A session knows what was said: of the messages, those after the last answer are read,
so a client may send the whole conversation or the new message alone. Without a session, a request is answered from its
messages, and nothing is kept. A session names the same corpora each time. With "sources": true, an answer comes with
what it attended to. Session ids are secrets: anyone who knows one has that memory. SIGTERM and Ctrl-C save all
sessions. A corpus is served as it was at the start.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Empty
from typing import Annotated, Any, Literal

import torch
import typer
import uvicorn
from batching import Worker
from fastapi import Depends, FastAPI, Header, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from jobs import Deletion, Job, StoppingError
from pydantic import BaseModel, ConfigDict, Field
from refusals import FAILED, LimitedBody, RefusalError, problem_of, refusal_of
from starlette.exceptions import HTTPException

from memlong import MemoryConfig, MemoryDecoder, SessionPool, load_model
from memlong.cli.corpora import load_corpora, needed_notes
from memlong.corpus import Corpus
from memlong.decoder.persistence.strangers import chosen_config
from memlong.errors import InvalidArgumentError, MemlongError

_POLL = 0.02  # seconds
_PATIENCE = 5  # seconds for requests that are being answered when the server is told to stop
_MOST_BYTES = 16 * 2**20  # of a request
_MOST_MESSAGES = 10_000
_LOG = logging.getLogger("uvicorn.error")


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

    messages: Annotated[list[Message], Field(min_length=1, max_length=_MOST_MESSAGES)]
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


class Server(uvicorn.Server):
    """A web server that ends what is being answered when it is told to stop, and has all sessions saved.

    Parameters
    ----------
    app
        What `make_app` makes.
    worker
        Its worker.
    patience
        Seconds for what is being answered to end by itself; a second Ctrl-C ends it at once.
    options
        Of `uvicorn.Config`.
    """

    def __init__(self, app: FastAPI, worker: Worker, *, patience: float = _PATIENCE, **options: Any) -> None:
        super().__init__(uvicorn.Config(app, timeout_graceful_shutdown=_PATIENCE, lifespan="off", **options))
        self._worker, self._patience = worker, patience

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop the worker while its clients are still connected, and then the server."""
        self._worker.refuse()
        ends = time.monotonic() + self._patience
        while self._worker.is_answering and not self.force_exit and time.monotonic() < ends:
            await asyncio.sleep(_POLL)
        with ThreadPoolExecutor(1) as alone:  # others may be busy with messages that are tokenized
            try:
                await asyncio.get_running_loop().run_in_executor(alone, self._worker.stop)
            except MemlongError:
                _LOG.exception("Not all sessions could be saved")
        await super().shutdown(sockets)


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

    # A dependency and no middleware, which would hide from a request that its client has gone.
    async def check_key(authorization: Annotated[str, Header()] = "") -> None:
        sent = authorization.encode("latin-1").removeprefix(b"Bearer ")
        if api_key is not None and not hmac.compare_digest(sent, api_key.encode()):
            raise RefusalError(401, "The API key is wrong or missing")

    app = FastAPI(title="memlong", dependencies=[Depends(check_key)])
    app.add_middleware(LimitedBody, most=_MOST_BYTES)

    @app.exception_handler(RefusalError)
    async def refused(_: Request, error: RefusalError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return RefusalError(400, problem_of(error.errors()[0])).response()

    @app.exception_handler(HTTPException)
    async def unknown(_: Request, error: HTTPException) -> JSONResponse:
        return RefusalError(error.status_code, error.detail).response()

    @app.exception_handler(MemlongError)
    async def failed(request: Request, error: MemlongError) -> JSONResponse:
        if not isinstance(error, InvalidArgumentError | StoppingError):
            _LOG.error("%s %s has failed", request.method, request.url.path, exc_info=error)
        return refusal_of(error).response()

    @app.exception_handler(Exception)
    async def broken(_: Request, __: Exception) -> JSONResponse:  # uvicorn logs it
        return RefusalError(500, FAILED).response()

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
    async def forget(session: str) -> dict[str, Any]:
        deletion = Deletion(session)
        worker.submit(deletion)
        found = await asyncio.wrap_future(deletion.done)
        return {"id": session, "object": "session", "deleted": found}

    @app.post("/v1/chat/completions")
    async def complete(
        request: Request, asked: ChatRequest, x_session: Annotated[str | None, Header()] = None
    ) -> Any:
        job = _job_of(asked, x_session, worker.corpora, name, limits)
        await asyncio.to_thread(worker.tokenize, job)
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
    named = None if header is None else _decoded(header)
    if None not in (request.session, named) and request.session != named:
        raise InvalidArgumentError("The field session and the header X-Session name different sessions")
    unknown = sorted(set(request.memory or ()) - set(corpora))
    if unknown:
        raise InvalidArgumentError(
            f"memory must name some of {', '.join(corpora) or 'none'}, got {unknown[0]!r}"
        )
    session = request.session if request.session is not None else named
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    wanted = request.max_completion_tokens or request.max_tokens or limits.new_tokens
    return Job(
        session=f"once {secrets.token_hex(16)}" if session is None else session,
        is_kept=session is not None,
        memory=tuple(sorted(set(request.memory or ()))),
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
            if isinstance(piece, BaseException):  # the worker has logged it
                raise refusal_of(piece, f"{FAILED}. Its session may have read the message") from piece
            if piece is None:
                return
            yield piece
    finally:
        job.cancel()


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
    except RefusalError as error:  # the status is sent already
        yield f"data: {json.dumps(error.body())}\n\n"
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


def _decoded(header: str) -> str:
    try:
        return header.encode("latin-1").decode()
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(
            "The header X-Session must be UTF-8: use the field session, or plain ASCII"
        ) from error


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
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        # Of a socket's own errors, the text names the address once more.
        why = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
        raise InvalidArgumentError(f"--host {host} --port {port} cannot be listened on: {why}") from error


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
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for one that is free.")
    ] = 8000,
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
        try:
            app = make_app(worker, name=name, limits=limits, api_key=api_key)
            where = f"[{host}]" if ":" in host else host
            place = f"http://{where}:{listening.getsockname()[1]}/v1"
            print(f"{name} answers at {place}, and its sessions lie in {sessions.absolute()}", flush=True)
            Server(app, worker).run(sockets=[listening])
        finally:
            worker.stop()


if __name__ == "__main__":
    try:
        typer.run(main)
    except MemlongError as error:
        raise SystemExit(f"server: {error}") from error
