"""The routes of the server, and how a request is answered."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from typing import Annotated, Any, TextIO

from fastapi import APIRouter, Body, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import generate_latest

from common import UserError

from ..batcher import Batcher, QueueFull
from ..pool import ModelCard, ModelPool, UnknownModel
from .choices import Choices
from .description import CHAT_REQUESTS, TEXT_REQUESTS, describe, errors, start_page, swagger_files
from .errors import HANDLED, ApiError, handle_error, to_api_error
from .formats import ChatFormat, CompletionFormat, Format
from .middleware import Limits, Metrics, RequestMiddleware
from .schema import ChatRequest, CompletionRequest

LOG = logging.getLogger("uvicorn.error")
router = APIRouter()
COMPLETION_ERRORS = errors(400, 404, 429, 503)


def create_app(
    pool: ModelPool,
    limits: Limits,
    api_key: str | None = None,
    cors_origins: Sequence[str] = (),
    request_log: TextIO | None = None,
) -> FastAPI:
    """Make the server's application, which closes the pool when it ends.

    Clients must send `api_key`, if there is one; pages of `cors_origins` may call from a browser;
    `request_log` gets a line for each request.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        pool.close()

    handlers = dict.fromkeys(HANDLED, handle_error)
    app = FastAPI(lifespan=lifespan, exception_handlers=handlers, docs_url=None, redoc_url=None)
    app.state.pool, app.state.limits, app.state.metrics = pool, limits, Metrics(pool)
    # Requests that wait for a model to be loaded: as many as could be generated for and wait.
    app.state.loading = asyncio.Semaphore(pool.rows + pool.queue)
    app.state.has_key = api_key is not None
    app.include_router(router)
    add_docs(app)
    app.add_middleware(RequestMiddleware, api_key, limits, app.state.metrics, request_log)
    if cors_origins:
        allowed = {"allow_methods": ["GET", "POST"], "allow_headers": ["*"]}
        app.add_middleware(CORSMiddleware, allow_origins=cors_origins, **allowed)
    return app


def add_docs(app: FastAPI) -> None:
    """Add /docs, whose own files come from here if their package is installed."""
    app.openapi = lambda: describe(app, public_cards(app) or {}, app.state.has_key)
    urls = {"swagger_favicon_url": "data:,"}
    if (folder := swagger_files()) is not None:
        app.mount("/docs/files", StaticFiles(directory=folder))
        urls["swagger_js_url"] = "docs/files/swagger-ui-bundle.js"
        urls["swagger_css_url"] = "docs/files/swagger-ui.css"

    @app.get("/docs", include_in_schema=False)
    async def get_docs() -> HTMLResponse:
        return get_swagger_ui_html(openapi_url="openapi.json", title="MiniMind", **urls)


def public_cards(app: FastAPI) -> Mapping[str, ModelCard] | None:
    """The models, or None where only those who have the key may know them."""
    return None if app.state.has_key else app.state.pool.cards()


@router.get("/", include_in_schema=False)
def get_start_page(request: Request) -> HTMLResponse:
    """Show what this is, the models, and where to go on."""
    return HTMLResponse(start_page(str(request.base_url), public_cards(request.app)))


@router.post("/v1/chat/completions", responses=COMPLETION_ERRORS)
async def create_chat_completion(
    body: Annotated[ChatRequest, Body(openapi_examples=CHAT_REQUESTS)], request: Request
) -> Response:
    """Answer a conversation."""
    return await unless_disconnected(request, complete(request, body, ChatFormat))


@router.post("/v1/completions", responses=COMPLETION_ERRORS)
async def create_completion(
    body: Annotated[CompletionRequest, Body(openapi_examples=TEXT_REQUESTS)], request: Request
) -> Response:
    """Continue a text."""
    return await unless_disconnected(request, complete(request, body, CompletionFormat))


@router.get("/v1/models", responses=errors())
def list_models(request: Request) -> dict[str, Any]:
    """List the models, each with its longest training conversation and questions to ask it."""
    models = [
        {
            "id": name,
            "created": int(card.modified),
            "object": "model",
            "owned_by": "minimind",
            "longest_conversation": card.longest_conversation,
            "examples": card.examples,
        }
        for name, card in request.app.state.pool.cards().items()
    ]
    return {"object": "list", "data": models}


@router.get("/v1/models/{name:path}", responses=errors(404))
def retrieve_model(name: str, request: Request) -> dict[str, Any]:
    """Describe a model."""
    for model in list_models(request)["data"]:
        if model["id"] == name:
            return model
    raise UnknownModel(name)


@router.get("/health", responses=errors())
async def get_health() -> dict[str, str]:
    """Report that the server runs."""
    return {"status": "ok"}


@router.get("/metrics", responses=errors(), response_class=PlainTextResponse)
async def get_metrics(request: Request) -> PlainTextResponse:
    """Figures for Prometheus."""
    text = generate_latest(request.app.state.metrics.registry)
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


async def complete(
    request: Request, body: ChatRequest | CompletionRequest, make_format: type[Format]
) -> Response:
    """Generate the choices of a request, and answer with them whole or as a stream.

    Raises errors that clients get: ApiError, UnknownModel, QueueFull.
    """
    limits: Limits = request.app.state.limits
    request.state.model = body.model
    batcher = await load(request, body.model)
    format_ = make_format(batcher.chat_model, body)
    prompts = await asyncio.to_thread(format_.prompts)
    max_tokens = body.max_new_tokens(limits.max_tokens)
    longest = max(len(prompt.ids) for prompt in prompts)
    allowed = min(limits.max_prompt, batcher.chat_model.context - min(max_tokens, 1))
    if longest > allowed:
        message = f"A prompt may have {allowed} tokens, this one has {longest}."
        raise ApiError(400, message, format_.prompt_param, "context_length_exceeded")
    if max_tokens > limits.max_tokens:
        raise ApiError(400, f"At most {limits.max_tokens} new tokens.", "max_tokens")
    number = len(prompts) * (body.n or 1)
    if number > batcher.rows + batcher.queue:
        message = f"{number} texts are more than this server takes at a time."
        raise ApiError(400, message, format_.prompt_param if len(prompts) > 1 else "n")
    choices = Choices(batcher, prompts, body, limits, format_.decode)
    request.state.choices = choices
    if body.stream:
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        events = stream_events(choices, format_, include_usage)
        return StreamingResponse(events, media_type="text/event-stream")
    whole = await choices.collect()
    return JSONResponse(format_.body(whole, usage=choices.usage))


async def load(request: Request, name: str) -> Batcher:
    """The batcher of a model, which is loaded if it is not in memory."""
    pool: ModelPool = request.app.state.pool
    waiting: asyncio.Semaphore = request.app.state.loading
    is_loaded = name in pool.models
    if not is_loaded and waiting.locked():
        raise QueueFull(10.0)
    async with nullcontext() if is_loaded else waiting:
        try:
            # Others may wait for the same load: it goes on if this request ends.
            return await asyncio.shield(asyncio.wrap_future(pool.load(name)))
        except UserError as error:
            LOG.error("%s: %s", name, error)  # it names files, which clients must not see
            message = f"The model '{name}' cannot be loaded; see the server's log."
            raise ApiError(503, message, "model") from None


async def stream_events(
    choices: Choices, format_: Format, include_usage: bool
) -> AsyncIterator[str]:
    """Stream choices as server-sent events, with a last one for the usage if it is included."""

    def event(body: dict[str, Any]) -> str:
        return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

    no_usage = {"usage": None} if include_usage else {}
    try:
        async for chunk in choices.stream():
            yield event(format_.body([chunk], **no_usage))
        if include_usage:
            yield event(format_.body([], usage=choices.usage))
        yield "data: [DONE]\n\n"
    except QueueFull as error:
        yield event(to_api_error(error).body)
    except Exception as error:  # the status was sent before
        yield event(ApiError(500, f"Generation failed: {type(error).__name__}.").body)
        raise


async def unless_disconnected(request: Request, work: Awaitable[Response]) -> Response:
    """Await `work`; if the client disconnects before, cancel it and raise ApiError."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "The client disconnected.")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
