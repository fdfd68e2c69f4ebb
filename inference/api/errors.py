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
    """What is wrong with a request's parameters: the first of all."""
    found = error.errors()[0]
    place = [str(part) for part in found["loc"] if part != "body"]
    name, param = ".".join(place), place[0] if place else None
    if found["type"] == "extra_forbidden":
        return ApiError(400, f"Unknown parameter: '{name}'.", param, "unknown_parameter")
    if found["type"] == "missing":
        message = f"Missing required parameter: '{name}'."
        return ApiError(400, message, param, "missing_required_parameter")
    return ApiError(400, f"Invalid '{name}': {found['msg']}.", param, "invalid_value")
