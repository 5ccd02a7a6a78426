"""What clients of examples/server.py are told instead of an answer, in OpenAI's form."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi.responses import JSONResponse
from jobs import StoppingError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from memlong.errors import InvalidArgumentError

FAILED = "The request failed, and the server's log says why"


class RefusalError(Exception):
    """What a client is told instead of an answer; whether it may send the same again by itself."""

    def __init__(self, status: int, message: str, *, may_retry: bool = False) -> None:
        super().__init__(message)
        self.status, self.may_retry = status, may_retry

    def body(self) -> dict[str, Any]:
        """Return it in OpenAI's form."""
        kind = "server_error" if self.status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
        kind = "authentication_error" if self.status == HTTPStatus.UNAUTHORIZED else kind
        return {"error": {"message": str(self), "type": kind, "param": None, "code": None}}

    def response(self) -> JSONResponse:
        """Return it as an answer."""
        retry = "true" if self.may_retry else "false"
        return JSONResponse(self.body(), self.status, {"x-should-retry": retry})


def refusal_of(error: BaseException, otherwise: str = FAILED) -> RefusalError:
    """Say what a client is told of an error."""
    if isinstance(error, InvalidArgumentError):
        return RefusalError(400, str(error))
    if isinstance(error, StoppingError):
        return RefusalError(503, str(error), may_retry=error.is_unread)
    return RefusalError(500, otherwise)


def problem_of(problem: Mapping[str, Any]) -> str:
    """Say what is wrong with a body, of which fastapi says where."""
    if problem["type"] == "json_invalid":
        return f"The body must be JSON, got: {problem['ctx']['error']} at character {problem['loc'][-1]}"
    where = ".".join(str(each) for each in problem["loc"][1:])
    return f"{where or 'The body'}: {problem['msg']}"


class LimitedBody:
    """Refuses a request of too many bytes, of which it reads no more.

    Parameters
    ----------
    app
        What the others go to.
    most
        The most bytes.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        announced = dict(scope.get("headers", ())).get(b"content-length", b"0")
        read = 0

        async def limited() -> Message:
            nonlocal read
            message = {} if int(announced) > self._most else await receive()
            read += len(message.get("body", b""))
            if not message or read > self._most:
                raise HTTPException(413, f"The body must have at most {self._most:,} bytes: send less")
            return message

        await self._app(scope, limited, send)
