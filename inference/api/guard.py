"""What stands before every request: the key, the limit of its size, and the count."""

import asyncio
import hmac

from prometheus_client import Counter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics")


class Guard:
    """An ASGI layer: it refuses requests that are too large or lack the key, and counts all.

    Args:
        app: what is behind it.
        api_key: what clients must send, or None.
        max_bytes: of a request.
        max_seconds: that its body may take to arrive.
        requests: counts by path and status.
    """

    def __init__(
        self,
        app: ASGIApp,
        api_key: str | None,
        max_bytes: int,
        max_seconds: float,
        requests: Counter,
    ):
        self.app = app
        self.api_key = api_key
        self.max_bytes = max_bytes
        self.max_seconds = max_seconds
        self.requests = requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in PATHS else "other"
        if scope["path"].startswith("/v1/models/"):
            path = "/v1/models/{name}"
        answered = False

        async def counted(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = True
                self.requests.labels(path, message["status"]).inc()
            await send(message)

        try:
            headers = dict(scope["headers"])
            self.check_key(scope["path"], headers)
            body = await self.read_in_time(receive, headers)
            await self.app(scope, replay(body, receive), counted)
        except ApiError as error:
            await error.response()(scope, receive, counted)
        except Exception:  # a bug, which the log tells of
            if not answered:
                await ApiError(500, "The server failed.").response()(scope, receive, counted)
            raise

    def check_key(self, path: str, headers: dict[bytes, bytes]) -> None:
        """Raise ApiError unless the request has the key, where one is asked for."""
        if self.api_key is None or path == "/health":
            return
        given = headers.get(b"authorization", b"")
        # Compared in constant time: how long it takes tells nothing about the key.
        if not hmac.compare_digest(given, b"Bearer " + self.api_key.encode()):
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


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body first, and then what comes: the client's leaving."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return messages.pop() if messages else await receive()

    return next_message
