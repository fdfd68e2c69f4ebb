"""The routes of the server, and how a request is answered."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TextIO, TypeVar

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import generate_latest

from common import UserError

from ..batcher import Batcher, Closed, QueueFull, Token
from ..pool import ModelCard, ModelPool, UnknownModel
from .choices import Choices, Prompt
from .errors import HANDLED, ApiError, handle_error, to_api_error
from .formats import ChatFormat, CompletionFormat
from .metrics import Metrics
from .middleware import RequestMiddleware
from .schema import ChatRequest, CompletionRequest

Format = ChatFormat | CompletionFormat
Result = TypeVar("Result")
LOG = logging.getLogger("uvicorn.error")
router = APIRouter()


@dataclass(frozen=True)
class Limits:
    """The most that a request may have: in its prompt, in each choice, in all, and in its body."""

    max_prompt: int  # tokens
    max_tokens: int  # new ones
    max_seconds: float
    max_bytes: int


def create_app(
    pool: ModelPool,
    limits: Limits,
    api_key: str | None = None,
    cors_origins: Sequence[str] = (),
    request_log: TextIO | None = None,
) -> FastAPI:
    """Make the server's application.

    Args:
        pool: the models; closed with the server.
        limits: limits of a request.
        api_key: key that clients must send, or None.
        cors_origins: pages that may call from a browser.
        request_log: gets a line for each request, or None.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        pool.close()

    app = FastAPI(
        title="MiniMind", lifespan=lifespan, exception_handlers=dict.fromkeys(HANDLED, handle_error)
    )
    app.state.pool, app.state.limits, app.state.metrics = pool, limits, Metrics(pool)
    # Requests that wait for a model to be loaded: as many as could be generated for and wait.
    app.state.loading = asyncio.Semaphore(pool.rows + pool.queue)
    app.include_router(router)
    app.add_middleware(
        RequestMiddleware,
        api_key=api_key,
        max_bytes=limits.max_bytes,
        max_seconds=limits.max_seconds,
        metrics=app.state.metrics,
        log=request_log,
    )
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    return app


@router.post("/v1/chat/completions")
async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation."""
    return await complete(request, body, ChatFormat)


@router.post("/v1/completions")
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Continue a text."""
    return await complete(request, body, CompletionFormat)


@router.get("/v1/models")
def list_models(request: Request) -> dict[str, Any]:
    """List the models."""
    cards = request.app.state.pool.cards()
    return {"object": "list", "data": [model_object(*item) for item in cards.items()]}


@router.get("/v1/models/{name}")
def retrieve_model(name: str, request: Request) -> dict[str, Any]:
    """Describe a model."""
    card = request.app.state.pool.cards().get(name)
    if card is None:
        raise UnknownModel(name)
    return model_object(name, card)


@router.get("/health")
async def get_health() -> dict[str, str]:
    """Report that the server runs."""
    return {"status": "ok"}


@router.get("/metrics")
async def get_metrics(request: Request) -> PlainTextResponse:
    """Figures for Prometheus."""
    text = generate_latest(request.app.state.metrics.registry)
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


def model_object(name: str, card: ModelCard) -> dict[str, Any]:
    """A model as the API describes it."""
    created = int(card.modified)
    return {"id": name, "object": "model", "created": created, "owned_by": "minimind"}


async def complete(
    request: Request, body: ChatRequest | CompletionRequest, make_format: type[Format]
) -> Response:
    """Generate the choices of a request, and answer with them whole or as a stream.

    Raises:
        ApiError, UnknownModel, QueueFull: errors that clients get.
    """
    limits: Limits = request.app.state.limits
    request.state.model = body.model
    while True:
        batcher = await unless_disconnected(request, load(request, body.model))
        format_ = make_format(batcher.chat_model, body)
        prompts = await asyncio.to_thread(format_.prompts)
        max_tokens = format_.max_tokens(limits.max_tokens)
        check_limits(batcher, prompts, body.n or 1, max_tokens, limits, format_.prompt_param)
        try:
            choices = Choices(batcher, prompts, body, max_tokens, limits.max_seconds)
            break
        except Closed:  # another batcher has taken its place
            continue
    request.state.choices = choices
    if body.stream:
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        events = stream_events(choices, format_, include_usage)
        return StreamingResponse(events, media_type="text/event-stream")
    whole = await unless_disconnected(request, choices.collect())
    objects = [format_.choice(choice) for choice in whole]
    return JSONResponse({**format_.head, "choices": objects, "usage": choices.usage})


async def load(request: Request, name: str) -> Batcher:
    """The batcher of a model, which is loaded if it is not in memory."""
    pool: ModelPool = request.app.state.pool
    waiting: asyncio.Semaphore = request.app.state.loading
    is_loaded = pool.find_loaded(name) is not None
    if not is_loaded and waiting.locked():
        raise QueueFull(10.0)
    async with nullcontext() if is_loaded else waiting:
        try:
            future = await asyncio.to_thread(pool.load, name)
            return await asyncio.shield(asyncio.wrap_future(future))  # others may wait for it too
        except UserError as error:
            LOG.error("%s: %s", name, error)  # it names files, which clients must not see
            message = f"The model '{name}' cannot be loaded; see the server's log."
            raise ApiError(503, message, "model") from None


def check_limits(
    batcher: Batcher, prompts: Sequence[Prompt], n: int, max_tokens: int, limits: Limits, param: str
) -> None:
    """Raise ApiError if a request for `n` choices of each prompt is more than is allowed."""
    longest = max(len(prompt.ids) for prompt in prompts)
    allowed = min(limits.max_prompt, batcher.chat_model.context - min(max_tokens, 1))
    if longest > allowed:
        message = f"A prompt may have {allowed} tokens, this one has {longest}."
        raise ApiError(400, message, param, "context_length_exceeded")
    if max_tokens > limits.max_tokens:
        raise ApiError(400, f"At most {limits.max_tokens} new tokens.", "max_tokens")
    number = len(prompts) * n
    if number > batcher.rows + batcher.queue:
        message = f"{number} texts are more than this server takes at a time."
        raise ApiError(400, message, param if len(prompts) > 1 else "n")


async def stream_events(
    choices: Choices, format_: Format, include_usage: bool
) -> AsyncIterator[str]:
    """Stream choices as server-sent events, with a last one for the usage if it is included."""

    def event(objects: list[dict[str, Any]], usage: dict[str, int] | None = None) -> str:
        body = {**format_.head, "choices": objects}
        if include_usage:
            body["usage"] = usage
        return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

    held: list[list[Token]] = [[] for _ in range(len(choices))]  # not yet a whole character
    try:
        for index in range(len(choices)):
            if (first := format_.first_delta(index)) is not None:
                yield event([first])
        async for chunk in choices.stream():
            held[chunk.index] += chunk.tokens
            if chunk.text or chunk.finish_reason:
                chunk.tokens, held[chunk.index] = held[chunk.index], []
                yield event([format_.delta(chunk)])
        if include_usage:
            yield event([], choices.usage)
        yield "data: [DONE]\n\n"
    except QueueFull as error:
        yield f"data: {json.dumps(to_api_error(error).body)}\n\n"
    except Exception as error:  # the status was sent before
        body = ApiError(500, f"Generation failed: {type(error).__name__}.").body
        yield f"data: {json.dumps(body)}\n\n"
        raise


async def unless_disconnected(request: Request, work: Awaitable[Result]) -> Result:
    """Await `work`; if the client disconnects before, cancel it and raise ApiError."""
    task = asyncio.ensure_future(work)

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        task.cancel()

    watcher = asyncio.ensure_future(watch())
    try:
        return await task
    except asyncio.CancelledError:
        raise ApiError(499, "The client disconnected.") from None
    finally:
        watcher.cancel()
