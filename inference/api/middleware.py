"""What happens to every request: key, limits of the body, metrics, and a line in the log."""

import asyncio
import hmac
import json
import time
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TextIO

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .metrics import Metrics

LOGGED = 100  # characters of a path or a model's name


@dataclass
class RequestMiddleware:
    """An ASGI middleware that checks requests and notes what became of them.

    It passes HEAD on as GET: the server leaves out the body.

    Args:
        app: the application.
        api_key: key that clients must send, or None.
        max_bytes: the largest body.
        max_seconds: the longest time that a body may take to arrive.
        metrics: count each request.
        log: gets a line for each request, or None.
    """

    app: ASGIApp
    api_key: str | None
    max_bytes: int
    max_seconds: float
    metrics: Metrics
    log: TextIO | None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), None
        state = scope.setdefault("state", {})  # in which the route notes `model` and `choices`

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self.check_key(scope)
            method = "GET" if scope["method"] == "HEAD" else scope["method"]
            await self.app({**scope, "method": method}, self.limit(receive), send_and_note)
        except ApiError as error:
            await error.response()(scope, receive, send_and_note)
        except Exception:  # a bug, whose traceback the server logs
            if status is None:
                await ApiError(500, "The server failed.").response()(scope, receive, send_and_note)
            raise
        finally:
            choices = state.get("choices")
            if choices is not None:  # nothing waits for them any more
                choices.cancel()
            if status is not None:
                self.metrics.observe(scope["path"], status, start, choices)
            if self.log is not None:
                print(log_line(scope, status, start, state), file=self.log, flush=True)

    def check_key(self, scope: Scope) -> None:
        """Raise ApiError unless the request has the key, if one is needed."""
        if self.api_key is None or scope["path"] == "/health":
            return
        header = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = header.partition(b" ")
        # In constant time: how long the comparison takes tells nothing about the key.
        is_right = hmac.compare_digest(key.strip(b" "), self.api_key.encode())
        if scheme.lower() != b"bearer" or not is_right:
            raise ApiError(401, "Incorrect API key provided.", code="invalid_api_key")

    def limit(self, receive: Receive) -> Receive:
        """Wrap `receive` so that it raises ApiError if the body is too large or too slow."""
        deadline = time.monotonic() + self.max_seconds
        size, is_complete = 0, False

        async def receive_limited() -> Message:
            nonlocal size, is_complete
            if is_complete:  # what follows is that the client leaves
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), deadline - time.monotonic())
            except asyncio.TimeoutError:  # an alias of TimeoutError from Python 3.11 on
                reason = f"A request may take {self.max_seconds:g} s to arrive."
                raise ApiError(408, reason) from None
            size += len(message.get("body", b""))
            is_complete = not message.get("more_body", False)
            if size > self.max_bytes:
                reason = f"A request may have {self.max_bytes} bytes."
                raise ApiError(413, reason, code="request_too_large")
            return message

        return receive_limited


def log_line(scope: Scope, status: int | None, start: float, state: dict[str, Any]) -> str:
    """The log's line for a request, without any of its texts."""
    now = datetime.now().astimezone().isoformat(timespec="milliseconds")
    choices = state.get("choices")
    return (
        f"{now} {scope['method']} {printable(scope['path'])} {status or '-'} "
        f"model={printable(state.get('model', ''))} "
        f"prompt_tokens={choices.prompt_tokens if choices else '-'} "
        f"completion_tokens={choices.completion_tokens if choices else '-'} "
        f"seconds={time.perf_counter() - start:.3f}"
    )


def printable(text: str) -> str:
    """A client's text as one word of a line, whatever it contains."""
    return json.dumps(text[:LOGGED])[1:-1].replace(" ", "\\u0020") or "-"
