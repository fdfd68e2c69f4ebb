"""What happens to every request: key, limits of the body, metrics, and a line in the log."""

import asyncio
import hmac
import json
import time
from dataclasses import dataclass
from datetime import datetime
from typing import TextIO

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..pool import ModelPool
from .errors import ApiError

LOGGED = 100  # characters of a path or a model's name
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
PUBLIC = ("/", "/health", "/docs", "/openapi.json")  # without a key
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics")


@dataclass(frozen=True)
class Limits:
    """The most that a request may have: tokens of its prompt and of each choice, seconds, bytes."""

    max_prompt: int
    max_tokens: int
    max_seconds: float
    max_bytes: int


class Metrics:
    """The figures of one server, in a registry of their own, as Prometheus reads them."""

    def __init__(self, pool: ModelPool):
        self.registry = registry = CollectorRegistry()
        labels, text = ["path", "status"], "Requests by path and status"
        self.requests = Counter("minimind_requests", text, labels, registry=registry)
        self.tokens = Counter("minimind_tokens", "Tokens by kind", ["kind"], registry=registry)
        name, text = "minimind_first_token_seconds", "From a request to its first token"
        self.first_token = Histogram(name, text, registry=registry, buckets=SECONDS)
        for name, text, count in (
            ("active", "Texts being generated", lambda b: len(b.active)),
            ("waiting", "Texts that wait", lambda b: b.load - len(b.active)),
            ("models", "Models in memory", lambda b: 1),
        ):
            gauge = Gauge(f"minimind_{name}", text, registry=registry)
            gauge.set_function(lambda count=count: sum(map(count, pool.batchers())))


@dataclass
class RequestMiddleware:
    """An ASGI middleware that checks requests, counts them, and logs a line for each.

    It passes HEAD on as GET: the server leaves out the body.
    """

    app: ASGIApp
    api_key: str | None
    limits: Limits
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
            status = message.get("status", status)
            await send(message)

        try:
            self.check_key(scope)
            method = "GET" if scope["method"] == "HEAD" else scope["method"]
            await self.app({**scope, "method": method}, await self.read(receive), send_and_note)
        except ApiError as error:
            await error.response(scope, receive, send_and_note)
        except Exception:  # a bug, whose traceback the server logs
            if status is None:
                await ApiError(500, "The server failed.").response(scope, receive, send_and_note)
            raise
        finally:
            if choices := state.get("choices"):
                choices.cancel()  # nothing waits for them any more
            self.note(scope, status, start)

    def check_key(self, scope: Scope) -> None:
        """Raise ApiError unless the request has the key, if one is needed."""
        path = scope["path"]
        if self.api_key is None or path in PUBLIC or path.startswith("/docs/files/"):
            return
        header = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = header.partition(b" ")
        # In constant time: how long the comparison takes tells nothing about the key.
        is_right = hmac.compare_digest(key.strip(b" "), self.api_key.encode())
        if scheme.lower() != b"bearer" or not is_right:
            raise ApiError(401, "Incorrect API key provided.", code="invalid_api_key")

    async def read(self, receive: Receive) -> Receive:
        """Read the body and return a `receive` that gives it whole.

        Raises ApiError if it is too large or too slow.
        """
        body, more_body, deadline = b"", True, time.monotonic() + self.limits.max_seconds
        while more_body:
            try:
                message = await asyncio.wait_for(receive(), deadline - time.monotonic())
            except asyncio.TimeoutError:  # an alias of TimeoutError from Python 3.11 on
                reason = f"A request may take {self.limits.max_seconds:g} s to arrive."
                raise ApiError(408, reason) from None
            body += message.get("body", b"")
            more_body = message.get("more_body", False)
            if len(body) > self.limits.max_bytes:
                reason = f"A request may have {self.limits.max_bytes} bytes."
                raise ApiError(413, reason, code="request_too_large")
        messages = [{"type": "http.request", "body": body}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        return replay

    def note(self, scope: Scope, status: int | None, start: float) -> None:
        """Count a request that has ended, and log it without any of its texts."""
        path, choices = scope["path"], scope["state"].get("choices")
        if self.log is not None:
            now = datetime.now().astimezone().isoformat(timespec="milliseconds")
            line = f"{now} {scope['method']} {printable(path)} {status or '-'}"
            line += f" model={printable(scope['state'].get('model', ''))}"
            for name in ("prompt_tokens", "completion_tokens"):
                line += f" {name}={getattr(choices, name, '-')}"
            line += f" seconds={time.perf_counter() - start:.3f}"
            print(line, file=self.log, flush=True)
        if path.startswith("/v1/models/"):
            path = "/v1/models/{name}"
        elif path not in PATHS:
            path = "other"
        if status is not None:
            self.metrics.requests.labels(path, status).inc()
        if choices is not None:
            self.metrics.tokens.labels("prompt").inc(choices.prompt_tokens)
            self.metrics.tokens.labels("completion").inc(choices.completion_tokens)
            if choices.first_token_time is not None:
                self.metrics.first_token.observe(choices.first_token_time - start)


def printable(text: str) -> str:
    """A client's text as one word of a line, whatever it contains."""
    return json.dumps(text[:LOGGED])[1:-1].replace(" ", "\\u0020") or "-"
