"""Errors as OpenAI's API gives them: https://platform.openai.com/docs/guides/error-codes."""

from collections.abc import Mapping

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ..batcher import QueueFull
from ..pool import UnknownModel

TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error response; `param` is the parameter that is wrong, `code` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        kind = "server_error" if status >= 500 else "invalid_request_error"
        text = message.encode("utf-8", "replace").decode("utf-8")
        error = {"message": text, "type": TYPES.get(status, kind), "param": param, "code": code}
        self.body = {"error": error}
        self.response = JSONResponse(self.body, status, headers)


def to_api_error(error: Exception) -> ApiError:
    """The error that a client gets for an exception of one of HANDLED."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, f"{error.detail}", headers=error.headers)
    if isinstance(error, RequestValidationError):
        return explain_validation(error)
    if isinstance(error, UnknownModel):
        message = f"The model '{error}' does not exist; GET /v1/models lists those that do."
        return ApiError(404, message, "model", "model_not_found")
    if isinstance(error, QueueFull):
        seconds = f"{max(1, round(error.seconds))}"
        message = f"The queue is full; try again in {seconds} s."
        return ApiError(429, message, code="queue_full", headers={"Retry-After": seconds})
    raise error


HANDLED = (ApiError, HTTPException, RequestValidationError, UnknownModel, QueueFull)


async def handle_error(request: Request, error: Exception) -> JSONResponse:
    """Answer a request with an error of HANDLED."""
    return to_api_error(error).response


def explain_validation(error: RequestValidationError) -> ApiError:
    """The first fault; of a parameter with several types, that of the type it resembles most."""
    fault = max(error.errors(), key=lambda one: len(one["loc"]))
    kind, place, reason = fault["type"], fault["loc"][1:], fault["msg"]
    if kind == "json_invalid":
        return ApiError(400, f"The body is not valid JSON: {fault['ctx']['error']}.")
    if not place:
        return ApiError(400, "Send a JSON object, with 'Content-Type: application/json'.")
    # Pydantic also names the type of a value, which is no part of the parameter's name.
    path = [f"{part}" for part in place[:-1] if is_name(part)]
    if kind in ("extra_forbidden", "missing") or is_name(place[-1]):
        path.append(f"{place[-1]}")
    name = ".".join(path)
    message, code = {
        "extra_forbidden": (f"Unknown parameter: '{name}'.", "unknown_parameter"),
        "missing": (f"Missing required parameter: '{name}'.", "missing_required_parameter"),
        "unsupported": (f"Unsupported value: '{name}' {reason} here.", "unsupported_value"),
    }.get(kind, (f"Invalid '{name}': {reason}.", "invalid_value"))
    return ApiError(400, message, path[0], code)


def is_name(part: str | int) -> bool:
    """Whether a part of a fault's place is a parameter's name or index, not a type's name."""
    types = ("str", "int", "float", "bool")
    return isinstance(part, int) or (part.isidentifier() and part not in types)
