"""Figures of the server, as Prometheus reads them."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ..pool import ModelPool
from .choices import Choices

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics")


class Metrics:
    """The figures of one server, in a registry of their own."""

    def __init__(self, pool: ModelPool):
        self.registry = registry = CollectorRegistry()
        labels = ["path", "status"]
        self._requests = Counter(
            "minimind_requests", "Requests by path and status", labels, registry=registry
        )
        self._tokens = Counter("minimind_tokens", "Tokens by kind", ["kind"], registry=registry)
        self._first_token = Histogram(
            "minimind_first_token_seconds",
            "From a request to its first token",
            buckets=SECONDS,
            registry=registry,
        )
        for name, text, count in (
            ("active", "Texts being generated", lambda b: len(b.active)),
            ("waiting", "Texts that wait", lambda b: b.load - len(b.active)),
            ("models", "Models in memory", lambda b: 1),
        ):
            gauge = Gauge(f"minimind_{name}", text, registry=registry)
            gauge.set_function(lambda count=count: sum(map(count, pool.batchers())))

    def observe(self, path: str, status: int, start: float, choices: Choices | None) -> None:
        """Count a request that has ended.

        Args:
            path: its path; those without a route are counted together.
            status: HTTP status of the response.
            start: `time.perf_counter()` when it came.
            choices: what was generated for it, if anything.
        """
        if path.startswith("/v1/models/"):
            path = "/v1/models/{name}"
        elif path not in PATHS:
            path = "other"
        self._requests.labels(path, status).inc()
        if choices is not None:
            self._tokens.labels("prompt").inc(choices.prompt_tokens)
            self._tokens.labels("completion").inc(choices.completion_tokens)
            if choices.first_token_time is not None:
                self._first_token.observe(choices.first_token_time - start)
