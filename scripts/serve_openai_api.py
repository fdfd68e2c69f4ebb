"""Serve models by OpenAI's API: any of its clients can talk to them.

    python scripts/serve_openai_api.py                    (http://127.0.0.1:8000/v1)
    python scripts/serve_openai_api.py --quantize int8 --api_key secret --host 0.0.0.0

It offers every weight in out/ and every adapter in out/lora/; a request's `model` says which.
Requests are written together, each as if it were alone. /docs describes the API, /metrics counts.
"""

import argparse
import asyncio
import hmac
import json
import os
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers.convert_slow_tokenizer import bytes_to_unicode

from inference import Choice, Talker, TextStream
from inference.batcher import Batcher, Job, QueueFull, Token
from inference.openai_schema import ChatRequest, CompletionRequest
from inference.pool import ModelPool
from training import (
    ROOT,
    UserError,
    count,
    count_or_zero,
    find_processes,
    make_parser,
    positive,
    report_user_errors,
)

BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser("Serve MiniMind by OpenAI's API.")
    models = parser.add_argument_group("models")
    models.add_argument("--out_dir", type=Path, default=Path("out"), help="where weights are")
    models.add_argument("--weight", help="a .pth file: offer it alone")
    models.add_argument("--quantize", choices=("int8",), help="weights of 8 bits, on a CPU")
    models.add_argument("--device", help="cuda, cuda:N, mps or cpu; default: the first there")
    models.add_argument("--max_models", type=count, default=2, help="that stay in memory")
    models.add_argument(
        "--tokenizer_path", type=Path, default=ROOT / "model" / "minimind_tokenizer", help="folder"
    )
    network = parser.add_argument_group("network")
    network.add_argument("--host", default="127.0.0.1", help="0.0.0.0: also other machines")
    network.add_argument("--port", type=count_or_zero, default=8000, help="0: any that is free")
    network.add_argument(
        "--api_key",
        default=os.environ.get("MINIMIND_API_KEY"),
        help="what clients must send; also by MINIMIND_API_KEY, which other users cannot read",
    )
    network.add_argument(
        "--cors_origin", action="append", default=[], help="a page that may call from a browser"
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max_batch", type=count, default=32, help="texts written together")
    limits.add_argument("--max_queue", type=count_or_zero, default=64, help="texts that may wait")
    limits.add_argument("--max_prompt", type=count, default=2048, help="tokens of a prompt")
    limits.add_argument("--max_tokens", type=count, default=2048, help="new tokens of a text")
    limits.add_argument("--max_seconds", type=positive, default=300.0, help="of a request")
    limits.add_argument("--max_bytes", type=count, default=1_000_000, help="of a request")
    args = parser.parse_args()
    if args.port > 65535:
        raise UserError(f"--port {args.port}: must be at most 65535")
    return args


class ApiError(Exception):
    """What a client is told instead of an answer, as OpenAI tells it."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.headers = headers
        kinds = {429: "rate_limit_error", 401: "authentication_error"}
        kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
        message = message.encode("utf-8", "replace").decode("utf-8")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body, self.status, self.headers)


class Limits:
    """An ASGI layer: it refuses requests that are too large or lack the key, and counts all.

    Args:
        app: what is behind it.
        args: the flags.
        requests: counts by path and status.
    """

    def __init__(self, app: ASGIApp, args: argparse.Namespace, requests: Counter):
        self.app = app
        self.args = args
        self.requests = requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        path = scope["path"] if scope["path"] in PATHS else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.requests.labels(path, message["status"]).inc()
            await send(message)

        try:
            self.check_key(scope, headers)
            body = await self.read(receive, headers)
        except ApiError as error:
            await error.response()(scope, receive, counted)
            return

        async def replay() -> Message:
            nonlocal body
            if body is None:
                return await receive()  # the client's leaving
            message = {"type": "http.request", "body": body, "more_body": False}
            body = None
            return message

        await self.app(scope, replay, counted)

    def check_key(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        """Raise ApiError unless the request has the key, where one is asked for."""
        key = self.args.api_key
        open_to_all = scope["path"] == "/health" or scope["method"] == "OPTIONS"
        if key is None or open_to_all:
            return
        given = headers.get(b"authorization", b"")
        # Compared in constant time: how long it takes tells nothing about the key.
        if not hmac.compare_digest(given, b"Bearer " + key.encode()):
            raise ApiError(401, "Incorrect API key provided.", code="invalid_api_key")

    async def read(self, receive: Receive, headers: dict[bytes, bytes]) -> bytes:
        """The body. Raises ApiError if it is too large, whatever its headers say."""
        limit = self.args.max_bytes
        declared = headers.get(b"content-length", b"0")
        too_large = ApiError(413, f"A request may have {limit} bytes.", code="request_too_large")
        if declared.isdigit() and int(declared) > limit:
            raise too_large
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > limit:
                raise too_large
            if not message.get("more_body"):
                return body


PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics")


class Choices:
    """The texts that a request asked for, as they are written.

    Args:
        batcher: writes them.
        prompts: ids of each.
        request: how.
        limit: new tokens of each.
        seconds: until they end.
        logprobs: as of Job.
    """

    def __init__(
        self,
        batcher: Batcher,
        prompts: Sequence[Sequence[int]],
        request: ChatRequest | CompletionRequest,
        limit: int,
        seconds: float,
        logprobs: int | None,
    ):
        loop = asyncio.get_running_loop()
        self.talker = batcher.talker
        self.events: asyncio.Queue[tuple[int, Token | str | Exception]] = asyncio.Queue()
        self.written = 0

        def emit(index: int) -> Callable[[Token | str | Exception], None]:
            def tell(event: Token | str | Exception) -> None:
                with suppress(RuntimeError):  # the loop is closed: the server ends
                    loop.call_soon_threadsafe(self.events.put_nowait, (index, event))

            return tell

        deadline = time.monotonic() + seconds
        seeds = [None] * len(prompts)
        if request.seed is not None:
            # Far apart: the second choice of a seed must not be the first one of the next seed.
            seeds = [(request.seed + i * 0x9E3779B97F4A7C15) % 2**63 for i in range(len(prompts))]
        self.jobs = [
            Job(
                ids=ids,
                max_new_tokens=limit,
                sampling=request.sampling(),
                seed=seeds[i],
                ends=frozenset({self.talker.tokenizer.eos_token_id}),
                emit=emit(i),
                logprobs=logprobs,
                deadline=deadline,
            )
            for i, ids in enumerate(prompts)
        ]
        self.texts = [TextStream(self.talker.tokenizer, request.stops()) for _ in prompts]
        batcher.submit(self.jobs)

    async def pieces(self) -> AsyncIterator[tuple[int, str, Token | None, str | None]]:
        """Number of a text, a further piece of it, its token, and at its end how it ended.

        However this ends, the places of the texts are free within one step.
        """
        going = set(range(len(self.jobs)))
        try:
            while going:
                index, event = await self.events.get()
                if index not in going:
                    continue
                text = self.texts[index]
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, str):
                    going.remove(index)
                    yield index, text.finish(), None, event
                    continue
                self.written += 1
                yield index, text.add(event.token), event, None
                if text.stopped:
                    self.jobs[index].cancelled = True
                    going.remove(index)
                    yield index, "", None, "stop"
        finally:
            for job in self.jobs:
                job.cancelled = True


def token_text(talker: Talker, token: int) -> tuple[str, list[int]]:
    """A token as text (with � for parts of characters) and as bytes."""
    name = talker.tokenizer.convert_ids_to_tokens(token)
    if all(character in BYTE_OF for character in name):
        raw = bytes(BYTE_OF[character] for character in name)
        return raw.decode("utf-8", "replace"), list(raw)
    return name, list(name.encode("utf-8"))


def chat_logprobs(talker: Talker, token: Token) -> dict[str, Any]:
    """A token's entry in a chat's logprobs."""

    def entry(number: int, logprob: float) -> dict[str, Any]:
        text, raw = token_text(talker, number)
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": raw}

    likeliest = [entry(number, logprob) for number, logprob in token.likeliest]
    return {**entry(token.token, token.logprob), "top_logprobs": likeliest}


def text_logprobs(talker: Talker, tokens: Sequence[Token], offset: int) -> dict[str, Any]:
    """The logprobs of a completion's tokens; `offset` is where the first begins in its text."""
    texts = [token_text(talker, token.token)[0] for token in tokens]
    offsets = [offset + sum(map(len, texts[:i])) for i in range(len(texts))]
    return {
        "tokens": texts,
        "token_logprobs": [max(token.logprob, -9999.0) for token in tokens],
        "top_logprobs": [
            {token_text(talker, number)[0]: max(p, -9999.0) for number, p in token.likeliest}
            for token in tokens
        ],
        "text_offset": offsets,
    }


def create_app(args: argparse.Namespace, pool: ModelPool) -> FastAPI:
    """The server.

    Args:
        args: the flags.
        pool: the models.
    """
    registry = CollectorRegistry()
    requests = Counter(
        "minimind_requests", "Requests by path and status", ["path", "status"], registry=registry
    )
    tokens = Counter("minimind_tokens", "Tokens by kind", ["kind"], registry=registry)
    first = Histogram(
        "minimind_first_token_seconds",
        "From a request to its first token",
        buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
        registry=registry,
    )
    gauges = {
        "minimind_active": Gauge("minimind_active", "Texts being written", registry=registry),
        "minimind_waiting": Gauge("minimind_waiting", "Texts that wait", registry=registry),
        "minimind_models": Gauge("minimind_models", "Models in memory", registry=registry),
    }

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        pool.close()

    app = FastAPI(title="MiniMind", lifespan=lifespan)
    app.add_middleware(Limits, args=args, requests=requests)
    if args.cors_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=args.cors_origin,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )

    @app.exception_handler(ApiError)
    async def told(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        found = error.errors()[0]
        place = [str(part) for part in found["loc"] if part != "body"]
        param = place[0] if place else None
        if found["type"] == "extra_forbidden":
            message, code = f"Unknown parameter: '{'.'.join(place)}'.", "unknown_parameter"
        elif found["type"] == "missing":
            message = f"Missing required parameter: '{'.'.join(place)}'."
            code = "missing_required_parameter"
        else:
            message, code = f"Invalid '{'.'.join(place)}': {found['msg']}.", "invalid_value"
        return ApiError(400, message, param, code).response()

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return ApiError(error.status_code, f"{error.detail}", headers=error.headers).response()

    async def find(name: str) -> Batcher:
        try:
            return await asyncio.to_thread(pool.get, name)
        except KeyError:
            message = f"The model '{name}' does not exist; GET /v1/models lists those that do."
            raise ApiError(404, message, "model", "model_not_found") from None
        except QueueFull as error:
            raise busy(error) from None
        except UserError as error:
            raise ApiError(500, f"{error}", "model") from None

    def busy(error: QueueFull) -> ApiError:
        seconds = max(1, round(error.seconds))
        message = f"The queue is full; try again in {seconds} s."
        return ApiError(429, message, code="queue_full", headers={"Retry-After": f"{seconds}"})

    def start(
        batcher: Batcher,
        prompts: list[list[int]],
        request: ChatRequest | CompletionRequest,
        limit: int | None,
        logprobs: int | None,
    ) -> Choices:
        context = batcher.talker.context
        longest = max(map(len, prompts))
        if longest > min(args.max_prompt, context - 1):
            raise ApiError(
                400,
                f"A prompt may have {min(args.max_prompt, context - 1)} tokens, this one has "
                f"{longest}.",
                "messages" if isinstance(request, ChatRequest) else "prompt",
                "context_length_exceeded",
            )
        if limit is not None and limit > args.max_tokens:
            raise ApiError(400, f"At most {args.max_tokens} new tokens.", "max_tokens")
        limit = args.max_tokens if limit is None else limit
        repeated = [ids for ids in prompts for _ in range(request.n or 1)]
        if len(repeated) > args.max_batch + args.max_queue:
            raise ApiError(400, f"So many texts at a time ({len(repeated)}) never fit.", "n")
        try:
            choices = Choices(batcher, repeated, request, limit, args.max_seconds, logprobs)
        except QueueFull as error:
            raise busy(error) from None
        tokens.labels("prompt").inc(sum(map(len, prompts)))
        return choices

    def usage(prompts: list[list[int]], choices: Choices) -> dict[str, int]:
        asked = sum(map(len, prompts))
        return {
            "prompt_tokens": asked,
            "completion_tokens": choices.written,
            "total_tokens": asked + choices.written,
        }

    async def measured(choices: Choices, began: float) -> AsyncIterator[tuple]:
        """The pieces, with the metrics of them."""
        waiting = True
        try:
            async for piece in choices.pieces():
                if waiting:
                    first.observe(time.perf_counter() - began)
                    waiting = False
                yield piece
        finally:
            tokens.labels("completion").inc(choices.written)

    async def respond(
        raw: Request,
        head: dict[str, Any],
        request: ChatRequest | CompletionRequest,
        prompts: list[list[int]],
        choices: Choices,
        chunk: Callable[[int, str, list[Token], str | None], dict[str, Any]],
        whole: Callable[[int, str, list[Token], str], dict[str, Any]],
        opening: Sequence[dict[str, Any]] = (),
    ) -> Any:
        """A stream of `chunk`s, or the `whole` texts.

        Args:
            raw: the request as it came, which tells when the client leaves.
            head: what every answer begins with.
            request, prompts, choices: what was asked for, and how it is written.
            chunk: of a stream: number, piece, its tokens, how the text ended.
            whole: of an answer: number, text, its tokens, how it ended.
            opening: choices that a stream begins with.
        """
        began = time.perf_counter()
        pieces = measured(choices, began)
        if request.stream:
            with_usage = request.stream_options and request.stream_options.include_usage

            async def events() -> AsyncIterator[str]:
                def event(choices_: list[dict[str, Any]], **more: Any) -> str:
                    body = {**head, "choices": choices_, **more}
                    if with_usage:
                        body.setdefault("usage", None)
                    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

                held: dict[int, list[Token]] = {}
                try:
                    for choice in opening:
                        yield event([choice])
                    async for index, text, token, ending in pieces:
                        if token is not None:
                            held.setdefault(index, []).append(token)
                        if text or ending:
                            yield event([chunk(index, text, held.pop(index, []), ending)])
                    if with_usage:
                        yield event([], usage=usage(prompts, choices))
                    yield "data: [DONE]\n\n"
                except Exception as error:  # the status was sent long ago
                    body = ApiError(500, f"Writing failed: {type(error).__name__}").body
                    yield f"data: {json.dumps(body)}\n\n"
                    raise
                finally:
                    await pieces.aclose()

            return StreamingResponse(events(), media_type="text/event-stream")

        async def collect() -> list[dict[str, Any]]:
            texts = [""] * len(choices.jobs)
            tokens_of: list[list[Token]] = [[] for _ in texts]
            endings = ["length"] * len(texts)
            async for index, text, token, ending in pieces:
                texts[index] += text
                if token is not None:
                    tokens_of[index].append(token)
                if ending is not None:
                    endings[index] = ending
            return [whole(i, text, tokens_of[i], endings[i]) for i, text in enumerate(texts)]

        found = await until_left(raw, collect())
        return JSONResponse({**head, "choices": found, "usage": usage(prompts, choices)})

    @app.post("/v1/chat/completions")
    async def chat(request: ChatRequest, raw: Request) -> Any:
        """Answer a conversation."""
        if request.top_logprobs is not None and not request.logprobs:
            raise ApiError(400, "'top_logprobs' needs 'logprobs' to be true.", "top_logprobs")
        batcher = await find(request.model)
        talker = batcher.talker
        if talker.encoder is None:
            message = f"'{request.model}' is not trained on conversations; use /v1/completions."
            raise ApiError(400, message, "model")
        prompts = [talker.chat_ids([message.record() for message in request.messages])]
        limit = request.max_completion_tokens or request.max_tokens
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        choices = start(batcher, prompts, request, limit, logprobs)

        def told(tokens_: list[Token]) -> dict[str, Any] | None:
            if logprobs is None:
                return None
            return {"content": [chat_logprobs(talker, t) for t in tokens_], "refusal": None}

        def part(index: int, delta: dict[str, Any], tokens_: list[Token], ending: str | None):
            return {
                "index": index,
                "delta": delta,
                "logprobs": told(tokens_),
                "finish_reason": ending,
            }

        def chunk(index: int, text: str, tokens_: list[Token], ending: str | None):
            return part(index, {"content": text} if text else {}, tokens_, ending)

        def whole(index: int, text: str, tokens_: list[Token], ending: str) -> dict[str, Any]:
            return {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": told(tokens_),
                "finish_reason": ending,
            }

        kind = "chat.completion.chunk" if request.stream else "chat.completion"
        head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": request.model,
        }
        opening = [
            part(i, {"role": "assistant", "content": ""}, [], None)
            for i in range(len(choices.jobs))
        ]
        return await respond(raw, head, request, prompts, choices, chunk, whole, opening)

    @app.post("/v1/completions")
    async def complete(request: CompletionRequest, raw: Request) -> Any:
        """Continue a text."""
        batcher = await find(request.model)
        talker = batcher.talker
        texts = request.prompts()
        prompts = [talker.text_ids(text) for text in texts]
        limit = 16 if request.max_tokens is None else request.max_tokens  # OpenAI's default
        choices = start(batcher, prompts, request, limit, request.logprobs)
        echoed = [t if request.echo else "" for t in texts for _ in range(request.n or 1)]
        ends = [len(text) for text in echoed]  # of the text so far

        def choice(index: int, text: str, tokens_: list[Token], ending: str | None):
            told = None
            if request.logprobs is not None:
                told = text_logprobs(talker, tokens_, ends[index])
            ends[index] += sum(len(token_text(talker, token.token)[0]) for token in tokens_)
            return {"index": index, "text": text, "logprobs": told, "finish_reason": ending}

        def whole(index: int, text: str, tokens_: list[Token], ending: str) -> dict[str, Any]:
            return choice(index, echoed[index] + text, tokens_, ending)

        head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": request.model,
        }
        opening = [choice(i, text, [], None) for i, text in enumerate(echoed) if text]
        return await respond(raw, head, request, prompts, choices, choice, whole, opening)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """List the models."""
        return {"object": "list", "data": [card(*item) for item in pool.names().items()]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        """Describe a model."""
        names = pool.names()
        if name not in names:
            raise ApiError(404, f"The model '{name}' does not exist.", "model", "model_not_found")
        return card(name, names[name])

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Say that the server runs."""
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        """Counts, for Prometheus."""
        batchers = list(pool.batchers.values())
        gauges["minimind_active"].set(sum(len(b.active) for b in batchers))
        gauges["minimind_waiting"].set(sum(b.load - len(b.active) for b in batchers))
        gauges["minimind_models"].set(len(batchers))
        return PlainTextResponse(generate_latest(registry), media_type="text/plain; version=0.0.4")

    return app


def card(name: str, path: Path) -> dict[str, Any]:
    """A model's entry in the list."""
    created = int(path.stat().st_mtime)
    return {"id": name, "object": "model", "created": created, "owned_by": "minimind"}


async def until_left(raw: Request, work: Awaitable[Any]) -> Any:
    """What `work` gives, unless the client leaves before: then it is cancelled."""
    task = asyncio.ensure_future(work)

    async def watch() -> None:
        while (await raw.receive())["type"] != "http.disconnect":
            pass
        task.cancel()

    watcher = asyncio.ensure_future(watch())
    try:
        return await task
    except asyncio.CancelledError:
        raise ApiError(499, "The client left.") from None
    finally:
        watcher.cancel()


def main() -> None:
    """Serve until a signal comes."""
    args = parse_args()
    device = find_processes(args.device, ddp=False).device
    choice = Choice(args.weight, None, args.out_dir, None, None, None, args.tokenizer_path)
    pool = ModelPool(choice, device, args.quantize, args.max_batch, args.max_queue, args.max_models)
    names = list(pool.names())
    if not names:
        raise UserError(f"--out_dir {args.out_dir}: no weights of this tokenizer there")
    pool.get(names[0])  # what is wrong with it shows now
    print(f"{', '.join(names)} at http://{args.host}:{args.port}/v1", flush=True)
    uvicorn.run(create_app(args, pool), host=args.host, port=args.port, log_level="warning")


if __name__ == "__main__":
    with report_user_errors():
        main()
