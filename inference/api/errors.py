"""Errors as OpenAI's API gives them: https://platform.openai.com/docs/guides/error-codes."""

from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from ..batcher import QueueFull
from ..pool import UnknownModel

TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(HTTPException):
    """An error response.

    Args:
        status_code: HTTP status.
        message: explanation for the user.
        param: name of the parameter that is wrong, or None.
        code: identifier for programs, or None.
        headers: headers of the response.
    """

    def __init__(
        self,
        status_code: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(status_code, message, headers)
        self.param = param
        self.code = code

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON object."""
        kind = "server_error" if self.status_code >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.detail.encode("utf-8", "replace").decode("utf-8"),
                "type": TYPES.get(self.status_code, kind),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """The response."""
        return JSONResponse(self.body, self.status_code, self.headers)


def to_api_error(error: Exception) -> ApiError:
    """The error that a client gets for an exception of one of HANDLED."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, StarletteHTTPException):
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


HANDLED = (StarletteHTTPException, RequestValidationError, UnknownModel, QueueFull)


async def handle_error(request: Request, error: Exception) -> JSONResponse:
    """Answer a request with an error; a handler for FastAPI."""
    return to_api_error(error).response()


def explain_validation(error: RequestValidationError) -> ApiError:
    """The first fault of a request's parameters.

    Of a parameter with several types, the fault of the type that the value resembles most.
    """
    fault = max(error.errors(), key=lambda one: len(one["loc"]))
    if fault["type"] == "json_invalid":
        return ApiError(400, f"The body is not valid JSON: {fault['ctx']['error']}.")
    if fault["loc"] == ("body",):
        return ApiError(400, "Send a JSON object, with 'Content-Type: application/json'.")
    *before, last = fault["loc"][1:]
    # Pydantic also names the type of a value, which is no part of the parameter's name.
    path = [f"{part}" for part in before if is_name(part)]
    if fault["type"] in ("extra_forbidden", "missing") or is_name(last):
        path.append(f"{last}")
    name, param = ".".join(path), path[0]
    message, code = {
        "extra_forbidden": (f"Unknown parameter: '{name}'.", "unknown_parameter"),
        "missing": (f"Missing required parameter: '{name}'.", "missing_required_parameter"),
        "unsupported": (f"Unsupported value: '{name}' {fault['msg']} here.", "unsupported_value"),
    }.get(fault["type"], (f"Invalid '{name}': {fault['msg']}.", "invalid_value"))
    return ApiError(400, message, param, code)


def is_name(part: str | int) -> bool:
    """Whether a part of a fault's place is a parameter's name or index, not a type's name."""
    return isinstance(part, int) or (
        part.isidentifier() and part not in ("str", "int", "float", "bool")
    )
