"""What whoever asked is told where there is no answer: an HTTP status and a sentence, in the form that OpenAI's has."""

import logging
from dataclasses import dataclass
from typing import Any

from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from salmonn.caption.engine import SHUTTING_DOWN, ModelFailedError, OutOfMemoryDuringBatch, Overloaded
from salmonn.serve.fetch import TooLargeError
from salmonn.serve.schema import RequestError

logger = logging.getLogger(__name__)
_RETRY_SECONDS = 5
_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_MEANINGS: dict[type[Exception], tuple[int, str]] = {
    TooLargeError: (413, "too_large"),
    ValueError: (400, "refused"),
    ClientDisconnect: (499, "dropped"),
    TimeoutError: (504, "timed_out"),
    OSError: (507, "no_room"),
    ModelFailedError: (500, "failed"),
}
# What an answer may end with; any other error is a mistake in this program.
EXPECTED_ERRORS: tuple[type[Exception], ...] = (Overloaded, *_MEANINGS)


@dataclass(frozen=True)
class ApiError:
    """Why there is no answer.

    Args:
        status: of HTTP.
        message: in words.
        outcome: by which it is counted.
        param: the parameter at fault, where it is one.
        code: by which programs know it.
        may_retry: whether the same request may go well in a while.
    """

    status: int
    message: str
    outcome: str
    param: str | None = None
    code: str | None = None
    may_retry: bool = False

    def to_json(self) -> dict[str, Any]:
        """As OpenAI's interface tells it."""
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def respond(self) -> JSONResponse:
        """The response with it."""
        # OpenAI's clients ask again where a server fails, unless they are told not to.
        headers = {"x-should-retry": str(self.may_retry).lower()}
        if self.may_retry:
            headers["Retry-After"] = str(_RETRY_SECONDS)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.to_json(), status_code=self.status, headers=headers)


def to_api_error(error: Exception, *, seconds: float) -> ApiError:
    """What an error of `ENDS` means to whoever asked; `seconds` is what a request may take."""
    words = str(error)
    if isinstance(error, TimeoutError):
        words = f"the answer took more than {seconds:g} s: ask for a part of the clip (start, end) or fewer words"
    elif isinstance(error, OSError):
        words = f"the server has no place for the file ({error.strerror}): tell whoever runs it"
        logger.error("no place for what was sent", exc_info=error)
    if isinstance(error, Overloaded):
        is_closing = words == SHUTTING_DOWN
        status = 503 if is_closing or isinstance(error, OutOfMemoryDuringBatch) else 429
        return ApiError(status, words, "closing" if is_closing else "busy", may_retry=True)
    if isinstance(error, RequestError):
        return ApiError(error.status, words, "refused", error.param, error.code)
    status, outcome = next(value for kind, value in _MEANINGS.items() if isinstance(error, kind))
    return ApiError(status, words, outcome)
