"""What stands before every request: the key, the limit of its size, the count, and the log."""

import asyncio
import hmac
import json
import time
from datetime import datetime
from typing import Any, TextIO

from prometheus_client import Counter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError

LOGGED = 100  # characters of a path or a name
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics")


class Guard:
    """An ASGI layer: it refuses requests that are too large or lack the key, and counts all.

    A HEAD is a GET whose body is not sent.

    Args:
        app: what is behind it.
        api_key: what clients must send, or None.
        max_bytes: of a request.
        max_seconds: that its body may take to arrive.
        requests: counts by path and status.
        log: gets a line for each request, or None.
    """

    def __init__(
        self,
        app: ASGIApp,
        api_key: str | None,
        max_bytes: int,
        max_seconds: float,
        requests: Counter,
        log: TextIO | None,
    ):
        self.app = app
        self.api_key = api_key
        self.max_bytes = max_bytes
        self.max_seconds = max_seconds
        self.requests = requests
        self.log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in PATHS else "other"
        if scope["path"].startswith("/v1/models/"):
            path = "/v1/models/{name}"
        answered: int | None = None
        began, is_head = time.perf_counter(), scope["method"] == "HEAD"
        state = dict(scope.get("state", {}))  # in which the app notes what the log tells

        async def counted(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = message["status"]
                self.requests.labels(path, answered).inc()
            elif is_head:
                message = {**message, "body": b""}
            await send(message)

        try:
            headers = dict(scope["headers"])
            self.check_key(scope["path"], headers)
            body = await self.read_in_time(receive, headers)
            inner = {**scope, "state": state}
            if is_head:
                inner["method"] = "GET"
            await self.app(inner, replay(body, receive), counted)
        except ApiError as error:
            await error.response()(scope, receive, counted)
        except Exception:  # a bug, which the log tells of
            if answered is None:
                await ApiError(500, "The server failed.").response()(scope, receive, counted)
            raise
        finally:
            if self.log is not None:
                seconds = time.perf_counter() - began
                print(log_line(scope, answered, state, seconds), file=self.log, flush=True)

    def check_key(self, path: str, headers: dict[bytes, bytes]) -> None:
        """Raise ApiError unless the request has the key, where one is asked for."""
        if self.api_key is None or path == "/health":
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        # Compared in constant time: how long it takes tells nothing about the key.
        fits = hmac.compare_digest(given.strip(b" "), self.api_key.encode())
        if scheme.lower() != b"bearer" or not fits:
            raise ApiError(401, "Incorrect API key provided.", code="invalid_api_key")

    async def read_in_time(self, receive: Receive, headers: dict[bytes, bytes]) -> bytes:
        """The body. Raises ApiError if it is too large, or takes too long to arrive."""
        try:
            return await asyncio.wait_for(self.read(receive, headers), self.max_seconds)
        except asyncio.TimeoutError:  # an alias of TimeoutError from Python 3.11 on
            message = f"A request may take {self.max_seconds:g} s to arrive."
            raise ApiError(408, message) from None

    async def read(self, receive: Receive, headers: dict[bytes, bytes]) -> bytes:
        """The body. Raises ApiError if it is too large, whatever its headers say."""
        declared = headers.get(b"content-length", b"0")
        size, received = int(declared) if declared.isdigit() else 0, 0
        parts, more = [], True
        while more and size <= self.max_bytes:
            message = await receive()
            parts.append(message.get("body", b""))
            more = message.get("more_body", False)
            received += len(parts[-1])
            size = max(size, received)
        if size > self.max_bytes:
            message = f"A request may have {self.max_bytes} bytes."
            raise ApiError(413, message, code="request_too_large")
        return b"".join(parts)


def log_line(scope: Scope, status: int | None, state: dict[str, Any], seconds: float) -> str:
    """What the log tells of a request: no part of its texts."""
    now = datetime.now().astimezone().isoformat(timespec="milliseconds")
    model, prompt, completion = state.get("model"), "-", "-"
    if (choices := state.get("choices")) is not None:
        prompt, completion = choices.prompt_tokens, choices.written
    return (
        f"{now} {scope['method']} {printable(scope['path'])} {status or '-'} "
        f"model={'-' if model is None else printable(model)} prompt_tokens={prompt} "
        f"completion_tokens={completion} seconds={seconds:.3f}"
    )


def printable(text: str) -> str:
    """A client's text as one word of a line, whatever it holds."""
    text = json.dumps(text[:LOGGED])[1:-1]
    return text.replace(" ", "\\u0020") or "-"


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body first, and then what comes: the client's leaving."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return messages.pop() if messages else await receive()

    return next_message
