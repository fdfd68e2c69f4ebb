"""What a client is told instead of an answer."""

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse


class ApiError(Exception):
    """An error as OpenAI tells it: https://platform.openai.com/docs/guides/error-codes.

    Args:
        status: of HTTP.
        message: for the user.
        param: the parameter to blame, or None.
        code: for programs, or None.
        headers: of the answer.
    """

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


def explain_validation(error: RequestValidationError) -> ApiError:
    """What is wrong with a request's parameters: the first of all.

    Of a parameter of several kinds, what is wrong with it as the one that it resembles most.
    """
    found = max(error.errors(), key=lambda one: len(one["loc"]))
    if found["type"] == "json_invalid":
        return ApiError(400, f"The body is not valid JSON: {found['ctx']['error']}.")
    if found["loc"] == ("body",):
        return ApiError(400, "Send a JSON object, with 'Content-Type: application/json'.")
    *before, last = found["loc"][1:]
    # Pydantic also names the kinds that a parameter may have: they are no part of its name.
    place = [f"{part}" for part in before if isinstance(part, int) or is_name(part)]
    if found["type"] in ("extra_forbidden", "missing") or isinstance(last, int) or is_name(last):
        place.append(f"{last}")
    name, param = ".".join(place), place[0]
    if found["type"] == "extra_forbidden":
        return ApiError(400, f"Unknown parameter: '{name}'.", param, "unknown_parameter")
    if found["type"] == "missing":
        message = f"Missing required parameter: '{name}'."
        return ApiError(400, message, param, "missing_required_parameter")
    if found["type"] == "unsupported":
        message = f"Unsupported value: '{name}' {found['msg']} here."
        return ApiError(400, message, param, "unsupported_value")
    return ApiError(400, f"Invalid '{name}': {found['msg']}.", param, "invalid_value")


def is_name(part: str) -> bool:
    """Whether a part of an error's place is a parameter's name, not that of a kind of value."""
    return part.isidentifier() and part not in ("str", "int", "float", "bool")
