"""What the server counts, as Prometheus reads it."""

import time
from collections.abc import AsyncIterator
from contextlib import aclosing

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ..pool import ModelPool
from .choices import Choices, Piece

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The counts of one server.

    Args:
        pool: whose models are counted.

    Attributes:
        registry: all of them.
        requests: by path and status.
    """

    def __init__(self, pool: ModelPool):
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "minimind_requests",
            "Requests by path and status",
            ["path", "status"],
            registry=self.registry,
        )
        self._tokens = Counter(
            "minimind_tokens", "Tokens by kind", ["kind"], registry=self.registry
        )
        self._first = Histogram(
            "minimind_first_token_seconds",
            "From a request to its first token",
            buckets=SECONDS,
            registry=self.registry,
        )
        for name, text, count in (
            ("active", "Texts being written", lambda b: len(b.active)),
            ("waiting", "Texts that wait", lambda b: b.load - len(b.active)),
            ("models", "Models in memory", lambda b: 1),
        ):
            gauge = Gauge(f"minimind_{name}", text, registry=self.registry)
            gauge.set_function(lambda count=count: sum(map(count, pool.batchers())))

    async def watch(self, choices: Choices, began: float) -> AsyncIterator[Piece]:
        """The pieces of a request that came at `began`, by `time.perf_counter`, counted."""
        self._tokens.labels("prompt").inc(choices.prompt_tokens)
        first = True
        try:
            async with aclosing(choices.pieces()) as pieces:
                async for piece in pieces:
                    if first and (choices.written or piece.ending):  # not a prompt's
                        self._first.observe(time.perf_counter() - began)
                        first = False
                    yield piece
        finally:
            self._tokens.labels("completion").inc(choices.written)
