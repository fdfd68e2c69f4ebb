"""The server's routes, and how a request is answered."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TextIO, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException

from common import UserError

from ..batcher import Batcher, Closed, QueueFull, Token
from ..chat_model import ChatModel
from ..pool import ModelCard, ModelPool, UnknownModel
from .choices import Choices, Echo, Piece
from .errors import ApiError, explain_validation
from .formats import ChatFormat, CompletionFormat
from .guard import Guard
from .loading import Loader
from .metrics import Metrics
from .schema import ChatRequest, CompletionRequest

Result = TypeVar("Result")
Form = TypeVar("Form", ChatFormat, CompletionFormat)
LOG = logging.getLogger("uvicorn.error")
DEFAULT_COMPLETION = 16  # OpenAI's limit of new tokens where a completion names none


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        max_prompt, max_tokens: tokens of a prompt, and new tokens of a text.
        max_seconds: that writing may take.
        max_bytes: of the request.
    """

    max_prompt: int
    max_tokens: int
    max_seconds: float
    max_bytes: int


def create_app(
    pool: ModelPool,
    limits: Limits,
    api_key: str | None = None,
    cors_origins: Sequence[str] = (),
    request_log: TextIO | None = None,
) -> FastAPI:
    """The server.

    Args:
        pool: the models; closed with the server.
        limits: of a request.
        api_key: what clients must send, or None.
        cors_origins: pages that may call from a browser.
        request_log: gets a line for each request, or None.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        loader.close()
        pool.close()

    app = FastAPI(title="MiniMind", lifespan=lifespan)
    metrics, loader = Metrics(pool), Loader(pool)
    app.add_middleware(
        Guard,
        api_key=api_key,
        max_bytes=limits.max_bytes,
        max_seconds=limits.max_seconds,
        requests=metrics.requests,
        log=request_log,
    )
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )

    @app.exception_handler(ApiError)
    async def told(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return explain_validation(error).response()

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return ApiError(error.status_code, f"{error.detail}", headers=error.headers).response()

    @app.post("/v1/chat/completions")
    async def chat(request: ChatRequest, raw: Request) -> Any:
        """Answer a conversation."""
        began = time.perf_counter()
        if request.top_logprobs and not request.logprobs:
            raise ApiError(400, "'top_logprobs' needs 'logprobs' to be true.", "top_logprobs")
        limit = request.max_completion_tokens or request.max_tokens or limits.max_tokens
        logprobs = (request.top_logprobs or 0) if request.logprobs else None

        async def begin(batcher: Batcher) -> tuple[Choices, ChatFormat]:
            chat_model = batcher.chat_model
            if chat_model.encoder is None:
                message = f"'{request.model}' continues texts; use /v1/completions."
                raise ApiError(400, message, "model")
            messages = [message.record() for message in request.messages]
            prompts = [await asyncio.to_thread(chat_model.chat_ids, messages)]
            choices = start(batcher, prompts, request, limit, logprobs, limits, "messages")
            return choices, ChatFormat(chat_model, request)

        choices, form = await with_model(loader, request.model, raw, begin)
        return await respond(raw, request, form, choices, metrics.watch(choices, began))

    @app.post("/v1/completions")
    async def complete(request: CompletionRequest, raw: Request) -> Any:
        """Continue a text."""
        began = time.perf_counter()
        limit = request.max_tokens
        if limit is None:
            limit = min(DEFAULT_COMPLETION, limits.max_tokens)

        async def begin(batcher: Batcher) -> tuple[Choices, CompletionFormat]:
            chat_model, given = batcher.chat_model, request.prompts()
            prompts = [await asyncio.to_thread(prompt_ids, chat_model, prompt) for prompt in given]
            echoes = None
            if request.echo:
                echoes = [echo_of(chat_model, prompt) for prompt in given]
            choices = start(
                batcher, prompts, request, limit, request.logprobs, limits, "prompt", echoes
            )
            return choices, CompletionFormat(chat_model, request)

        choices, form = await with_model(loader, request.model, raw, begin)
        return await respond(raw, request, form, choices, metrics.watch(choices, began))

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        """List the models."""
        return {"object": "list", "data": [card(*item) for item in pool.offers().items()]}

    @app.get("/v1/models/{name}")
    def model(name: str) -> dict[str, Any]:
        """Describe a model."""
        offer = pool.offers().get(name)
        if offer is None:
            raise unknown(name)
        return card(name, offer)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Say that the server runs."""
        return {"status": "ok"}

    @app.get("/metrics")
    async def counts() -> PlainTextResponse:
        """Counts, for Prometheus."""
        text = generate_latest(metrics.registry)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    return app


def card(name: str, offer: ModelCard) -> dict[str, Any]:
    """A model's entry in the list."""
    created = int(offer.modified)
    return {"id": name, "object": "model", "created": created, "owned_by": "minimind"}


def unknown(name: str) -> ApiError:
    """There is no such model."""
    message = f"The model '{name}' does not exist; GET /v1/models lists those that do."
    return ApiError(404, message, "model", "model_not_found")


def busy(error: QueueFull) -> ApiError:
    """There is no place in the queue."""
    seconds = max(1, round(error.seconds))
    message = f"The queue is full; try again in {seconds} s."
    return ApiError(429, message, code="queue_full", headers={"Retry-After": f"{seconds}"})


async def find(loader: Loader, name: str, raw: Request) -> Batcher:
    """The batcher of a model, loaded if need be, for a request. Raises ApiError."""
    try:
        return await until_left(raw, loader.get(name))
    except UnknownModel:
        raise unknown(name) from None
    except QueueFull as error:
        raise busy(error) from None
    except UserError as error:
        LOG.error("%s: %s", name, error)  # it names files, which are no client's business
        message = f"The model '{name}' cannot be loaded; the server's log says why."
        raise ApiError(503, message, "model") from None


async def with_model(
    loader: Loader,
    name: str,
    raw: Request,
    begin: Callable[[Batcher], Awaitable[tuple[Choices, Form]]],
) -> tuple[Choices, Form]:
    """Begin a request with the batcher of a model, again if that ends meanwhile.

    Args:
        loader: of the model.
        name: of it.
        raw: the request as it came.
        begin: gives the texts, and how they are told.

    Raises:
        ApiError: if there is no such model or no place.
    """
    raw.state.model = name
    while True:
        batcher = await find(loader, name, raw)
        try:
            choices, form = await begin(batcher)
        except Closed:
            continue
        raw.state.choices = choices
        return choices, form


def prompt_ids(chat_model: ChatModel, prompt: str | list[int]) -> list[int]:
    """Ids of a prompt. Raises ApiError for those that the model does not have."""
    if isinstance(prompt, str):
        return chat_model.text_ids(prompt)
    size = chat_model.model.config.vocab_size
    if max(prompt) >= size:
        message = f"Invalid 'prompt': {max(prompt)} is no token; there are {size}."
        raise ApiError(400, message, "prompt", "invalid_value")
    return prompt


def echo_of(chat_model: ChatModel, prompt: str | list[int]) -> Echo:
    """What a text begins with that goes on from a prompt."""
    if isinstance(prompt, str):
        return Echo(prompt, 1)  # without the token that begins a document
    return Echo(chat_model.tokenizer.backend_tokenizer.decode(prompt, skip_special_tokens=True), 0)


def start(
    batcher: Batcher,
    prompts: list[list[int]],
    request: ChatRequest | CompletionRequest,
    limit: int,
    logprobs: int | None,
    limits: Limits,
    param: str,
    echoes: Sequence[Echo] | None = None,
) -> Choices:
    """Have the texts of a request written.

    Args:
        batcher: writes them.
        prompts: ids of each.
        request: what was asked for.
        limit: new tokens of each.
        logprobs: as of GenerationRequest.
        limits: of a request.
        param: where the prompts came from.
        echoes: as of Choices.

    Raises:
        ApiError: if it asks for too much, or there is no place.
        Closed: if the batcher has ended.
    """
    room = batcher.chat_model.context - min(limit, 1)
    longest, most = max(map(len, prompts)), min(limits.max_prompt, room)
    if longest > most:
        message = f"A prompt may have {most} tokens, this one has {longest}."
        raise ApiError(400, message, param, "context_length_exceeded")
    if limit > limits.max_tokens:
        raise ApiError(400, f"At most {limits.max_tokens} new tokens.", "max_tokens")
    number = len(prompts) * (request.n or 1)
    if number > batcher.rows + batcher.queue:
        blamed = param if len(prompts) > 1 else "n"
        raise ApiError(400, f"So many texts at a time ({number}) never fit.", blamed)
    try:
        return Choices(batcher, prompts, request, limit, limits.max_seconds, logprobs, echoes)
    except QueueFull as error:
        raise busy(error) from None


def usage(choices: Choices) -> dict[str, int]:
    """Tokens of a request: each prompt counts once, however many texts go on from it."""
    return {
        "prompt_tokens": choices.prompt_tokens,
        "completion_tokens": choices.written,
        "total_tokens": choices.prompt_tokens + choices.written,
    }


async def respond(
    raw: Request,
    request: ChatRequest | CompletionRequest,
    form: ChatFormat | CompletionFormat,
    choices: Choices,
    pieces: AsyncIterator[Piece],
) -> Any:
    """The answer: a stream of server-sent events, or one object.

    Args:
        raw: the request as it came, which tells when the client leaves.
        request: what was asked for.
        form: how texts are told.
        choices, pieces: the texts.
    """
    if request.stream:
        events = stream(request, form, choices, pieces)
        return StreamingResponse(events, media_type="text/event-stream")
    number = choices.number
    texts, endings = [""] * number, [""] * number
    tokens: list[list[Token]] = [[] for _ in range(number)]

    async def collect() -> None:
        async with aclosing(pieces):
            async for index, text, new, ending in pieces:
                texts[index] += text
                tokens[index] += new
                if ending is not None:
                    endings[index] = ending

    try:
        await until_left(raw, collect())
    except QueueFull as error:  # its time was over before there was a place
        raise busy(error) from None
    told = [form.whole(i, texts[i], tokens[i], endings[i]) for i in range(number)]
    return JSONResponse({**form.head, "choices": told, "usage": usage(choices)})


async def stream(
    request: ChatRequest | CompletionRequest,
    form: ChatFormat | CompletionFormat,
    choices: Choices,
    pieces: AsyncIterator[Piece],
) -> AsyncIterator[str]:
    """The events of an answer; arguments as for `respond`."""
    options = request.stream_options
    with_usage = options is not None and options.include_usage

    def event(told: list[dict[str, Any]], **more: Any) -> str:
        body = {**form.head, "choices": told, **more}
        if with_usage:
            body.setdefault("usage", None)
        return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

    held: list[list[Token]] = [[] for _ in range(choices.number)]  # that are no whole character yet
    try:
        async with aclosing(pieces):
            for choice in form.opening(choices.number):
                yield event([choice])
            async for index, text, new, ending in pieces:
                held[index] += new
                if text or ending:
                    yield event([form.chunk(index, text, held[index], ending)])
                    held[index] = []
        if with_usage:
            yield event([], usage=usage(choices))
        yield "data: [DONE]\n\n"
    except QueueFull as error:
        yield f"data: {json.dumps(busy(error).body)}\n\n"
    except Exception as error:  # the status was sent long ago
        body = ApiError(500, f"Writing failed: {type(error).__name__}.").body
        yield f"data: {json.dumps(body)}\n\n"
        raise


async def until_left(raw: Request, work: Awaitable[Result]) -> Result:
    """What `work` gives, unless the client leaves before: it is cancelled then. Raises ApiError."""
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
