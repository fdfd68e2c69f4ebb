"""How the server describes itself: the page at /, and what /docs shows of each route."""

import html
from collections.abc import Iterable, Mapping
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from ..pool import ModelCard

# A package with the files of swagger-ui, so that /docs works without the network.
FILES_PACKAGE = "fastapi_offline"
ABOUT = (
    "Models trained with MiniMind, by OpenAI's API: every client of it can use them. "
    "The base URL ends in `/v1`."
)


class ErrorDetails(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None  # the parameter that is wrong
    code: str | None  # for programs


class ErrorBody(BaseModel):
    """The body of every error."""

    error: ErrorDetails


ERRORS = {
    400: "The request is not valid, its prompt is too long, or it asks for what is not offered",
    401: "The key is missing or wrong",
    404: "There is no such model",
    408: "The request took too long to arrive",
    413: "The request has too many bytes",
    429: "The queue is full; Retry-After says when to try again",
    500: "The server failed",
    503: "The model cannot be loaded",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that may fail in these ways, and in those that every route may."""
    always = (408, 413, 500)
    return {
        status: {"model": ErrorBody, "description": ERRORS[status]}
        for status in sorted({*statuses, *always})
    }


CHAT_MODEL, TEXT_MODEL = "full_sft_512", "pretrain_512"
HEAD = {"created": 1795771795, "model": CHAT_MODEL}
USAGE = {"prompt_tokens": 13, "completion_tokens": 9, "total_tokens": 22}
QUESTION = {"role": "user", "content": "Who are you?"}
CHAT_REQUESTS = {
    "question": {"value": {"model": CHAT_MODEL, "messages": [QUESTION], "temperature": 0}},
    "stream": {
        "value": {
            "model": CHAT_MODEL,
            "messages": [{"role": "system", "content": "Answer briefly."}, QUESTION],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    },
    "sampling": {
        "value": {
            "model": CHAT_MODEL,
            "messages": [{"role": "user", "content": "你是谁？"}],
            "max_tokens": 64,
            "temperature": 0.8,
            "top_p": 0.9,
            "seed": 1,
            "n": 2,
        }
    },
}
TEXT_REQUESTS = {
    "text": {"value": {"model": TEXT_MODEL, "prompt": "春天来了", "max_tokens": 32}},
    "score": {
        "value": {
            "model": TEXT_MODEL,
            "prompt": "The sky is blue.",
            "max_tokens": 0,
            "echo": True,
            "logprobs": 1,
        }
    },
}
MESSAGE = {
    "role": "assistant",
    "content": "I am MiniMind, a small language model.",
    "refusal": None,
}
CHAT_ANSWER = {
    "id": "chatcmpl-f7b53b240ed84fa1975591fe3f2b1edf",
    "object": "chat.completion",
    **HEAD,
    "choices": [{"index": 0, "message": MESSAGE, "logprobs": None, "finish_reason": "stop"}],
    "usage": USAGE,
}
CHAT_STREAM = (
    'data: {"id":"chatcmpl-…","object":"chat.completion.chunk",…,"choices":[{"index":0,'
    '"delta":{"role":"assistant","content":"I am"},…}]}\n\ndata: [DONE]\n\n'
)
TEXT_CHOICE = {"index": 0, "text": "，山上的雪化了。", "logprobs": None, "finish_reason": "stop"}
TEXT_ANSWER = {
    "id": "cmpl-0d8c5c7cf7f94ae7b64ac57c4a3a1d0e",
    "object": "text_completion",
    **HEAD,
    "model": TEXT_MODEL,
    "choices": [TEXT_CHOICE],
    "usage": USAGE,
}
TEXT_STREAM = (
    'data: {"id":"cmpl-…","object":"text_completion",…,"choices":[{"index":0,'
    '"text":"，山上",…}]}\n\ndata: [DONE]\n\n'
)
MODEL = {
    **{"id": CHAT_MODEL, "created": 1795771795, "object": "model", "owned_by": "minimind"},
    "longest_conversation": {"exchanges": 10, "tokens": 380},
    "examples": ["Where does Mira live?", "你是谁？"],
}
ANSWERS: dict[str, dict[str, Any]] = {  # by path and media type
    "/v1/chat/completions": {"application/json": CHAT_ANSWER, "text/event-stream": CHAT_STREAM},
    "/v1/completions": {"application/json": TEXT_ANSWER, "text/event-stream": TEXT_STREAM},
    "/v1/models": {"application/json": {"object": "list", "data": [MODEL]}},
    "/v1/models/{name}": {"application/json": MODEL},
    "/health": {"application/json": {"status": "ok"}},
    "/metrics": {"text/plain": 'minimind_tokens_total{kind="completion"} 9.0\n'},
}


def describe(app: FastAPI, cards: Mapping[str, ModelCard], has_key: bool) -> dict[str, Any]:
    """Make the OpenAPI description; the examples name models of `cards`, so that they can be sent.

    It has the errors that the server gives instead of those that FastAPI assumes.
    """
    schema = get_openapi(
        title="MiniMind",
        version="1",
        description=ABOUT,
        routes=app.routes,
        separate_input_output_schemas=False,
    )
    names = {
        CHAT_MODEL: next((name for name, card in cards.items() if card.chats), CHAT_MODEL),
        TEXT_MODEL: next((name for name, card in cards.items() if not card.chats), None)
        or next(iter(cards), TEXT_MODEL),
    }
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            # Not in the routes' `responses`: FastAPI leaves the nulls of an example out.
            operation["responses"]["200"]["content"] = {
                media_type: {"example": example} for media_type, example in ANSWERS[path].items()
            }
            needs_key = has_key and path != "/health"
            operation["security"] = [{"key": []}] if needs_key else []
            if needs_key:
                error = deepcopy(operation["responses"]["500"])
                operation["responses"]["401"] = error | {"description": ERRORS[401]}
            for content in operation.get("requestBody", {}).get("content", {}).values():
                for example in content["examples"].values():
                    value = example["value"]
                    example["value"] = {**value, "model": names[value["model"]]}
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)
    if has_key:
        schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return schema


def swagger_files() -> Path | None:
    """The folder of swagger-ui's files, if their package is installed."""
    spec = find_spec(FILES_PACKAGE)
    return None if spec is None else Path(spec.submodule_search_locations[0]) / "static"


def start_page(base_url: str, cards: Mapping[str, ModelCard] | None) -> str:
    """The page at `/`, as HTML; `cards` is None where a key is needed to see the models."""

    def rows() -> Iterable[str]:
        for name, card in cards.items():
            kind = "answers conversations" if card.chats else "continues texts"
            kind += " (an adapter)" if card.is_adapter else ""
            yield f"<tr><td><code>{html.escape(name)}</code></td><td>{kind}</td></tr>"

    models = "<p>The models are listed for those who send the key.</p>"
    if cards is not None:
        models = f"<table>{''.join(rows())}</table>"
    links = "".join(
        f'<li><a href="{link}">/{link}</a>: {what}</li>'
        for link, what in (
            ("docs", "every route, with examples to try"),
            ("v1/models", "the models as clients see them"),
            ("health", "whether the server runs"),
            ("metrics", "figures for Prometheus"),
        )
    )
    key = "any" if cards is not None else "the one that the server was started with"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>MiniMind</title>'
        '<link rel="icon" href="data:,"><meta name="viewport" content="width=device-width">'
        "<style>body{font-family:sans-serif;max-width:42em;margin:2em auto;padding:0 1em}"
        "td{padding-right:2em}</style></head><body><h1>MiniMind</h1>"
        "<p>This server offers language models trained with MiniMind by OpenAI's API.</p>"
        f"<p>In a client, set the base URL <code>{html.escape(base_url)}v1</code>, the key ({key}) "
        f"and the name of a model.</p><h2>Models</h2>{models}<h2>Links</h2><ul>{links}</ul>"
        "</body></html>"
    )
