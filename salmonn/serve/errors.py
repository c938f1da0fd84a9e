"""Map exceptions to HTTP errors, in the format of OpenAI's API."""

import logging
from dataclasses import dataclass
from typing import Any

from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from salmonn.caption.engine import SHUTTING_DOWN, ModelFailedError, OutOfMemoryDuringBatch, Overloaded
from salmonn.serve.fetch import TooLargeError

logger = logging.getLogger(__name__)
_RETRY_AFTER_SECONDS = 5
_ERROR_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_STATUSES: dict[type[Exception], tuple[int, str]] = {  # HTTP status, outcome in the metrics
    TooLargeError: (413, "too_large"),
    ValueError: (400, "rejected"),
    ClientDisconnect: (499, "cancelled"),
    TimeoutError: (504, "timed_out"),
    OSError: (507, "no_space"),
    ModelFailedError: (500, "failed"),
}
# Errors that a request can end with; any other is a bug in this program.
EXPECTED_ERRORS: tuple[type[Exception], ...] = (Overloaded, *_STATUSES)


class RequestError(ValueError):
    """A request that cannot be answered; the message is for the client.

    Args:
        message: what is wrong, and what to do.
        param: name of the parameter at fault, if any.
        status: HTTP status.
        code: machine-readable code, if any.
    """

    def __init__(self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.status = status
        self.code = code


@dataclass(frozen=True)
class ApiError:
    """An HTTP error.

    Args:
        status: HTTP status.
        message: explanation for the client.
        outcome: label of the request in the metrics.
        param: name of the request parameter at fault, if any.
        code: machine-readable code, if any.
        may_retry: whether the same request may succeed later.
    """

    status: int
    message: str
    outcome: str
    param: str | None = None
    code: str | None = None
    may_retry: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the body of the response, as OpenAI's API has it."""
        kind = _ERROR_TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def to_response(self) -> JSONResponse:
        """Return the response."""
        # OpenAI's clients retry server errors unless this header says not to.
        headers = {"x-should-retry": str(self.may_retry).lower()}
        if self.may_retry:
            headers["Retry-After"] = str(_RETRY_AFTER_SECONDS)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.to_json(), status_code=self.status, headers=headers)


def to_api_error(error: Exception, *, seconds: float) -> ApiError:
    """Map one of `EXPECTED_ERRORS` to an HTTP error; `seconds` is the time limit of a request."""
    message = str(error)
    if isinstance(error, TimeoutError):
        message = f"the request took more than {seconds:g} s: use a part of the clip (start, end) or a lower max_tokens"
    elif isinstance(error, OSError):
        message = f"the server cannot store the file ({error.strerror}); contact its operator"
        logger.error("cannot store an upload", exc_info=error)
    if isinstance(error, Overloaded):
        is_closing = message == SHUTTING_DOWN
        status = 503 if is_closing or isinstance(error, OutOfMemoryDuringBatch) else 429
        return ApiError(status, message, "shutting_down" if is_closing else "overloaded", may_retry=True)
    if isinstance(error, RequestError):
        return ApiError(error.status, message, "rejected", error.param, error.code)
    status, outcome = next(value for kind, value in _STATUSES.items() if isinstance(error, kind))
    return ApiError(status, message, outcome)
