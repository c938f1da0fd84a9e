"""The OpenAI-compatible chat API as servers really speak it: what they may refuse in a request, and how they reply."""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

# For each optional part of a request, the ways to send it that are left, the current one first; "" omits it.
RequestOptions = Mapping[str, tuple[str, ...]]

ALL_OPTIONS: RequestOptions = {
    "response_format": ("json_schema", "json_object", ""),
    "seed": ("seed", ""),
    "temperature": ("temperature", ""),
    "token limit": ("max_tokens", "max_completion_tokens", ""),
    "stream": ("", "stream"),
}
# How error messages name them. A conversation that is too long is no reason to omit the token limit.
_NAMED = {
    "response_format": re.compile(r"response_format|schema|json_object|structured", re.IGNORECASE),
    "seed": re.compile(r"\bseed\b", re.IGNORECASE),
    "temperature": re.compile(r"\btemperature\b", re.IGNORECASE),
    "token limit": re.compile(r"\A(?!.*context).*max_(completion_)?tokens", re.IGNORECASE | re.DOTALL),
    "stream": re.compile(r"\bstream", re.IGNORECASE),
}
_NO_REFUSAL = (401, 402, 408, 429)  # wrong key, no money, too slow, too many requests
_UNSPECIFIC_REFUSAL = (400, 422, 500)
_MAX_EXCERPT = 200  # characters of a body that is not a completion


@dataclass(frozen=True)
class LLMResponse:
    """A reply of a language model.

    Args:
        text: text of the reply.
        is_truncated: whether it reached its token limit.
        num_tokens: tokens of prompt and reply by the server's count; None if the server sends no usage.
    """

    text: str
    is_truncated: bool = False
    num_tokens: int | None = None


class ErrorBody(ValueError):
    """An error that a server sends with status 200.

    Args:
        message: the server's words.
        status: the HTTP status that the error should have had.
        details: the error as the server sends it.
    """

    def __init__(self, message: str, *, status: int, details: object) -> None:
        super().__init__(message)
        self.status, self.details = status, details


def refused_option(options: RequestOptions, message: str, status: int) -> str:
    """Return the option that an error message names as refused and that can be sent in another way, or ""."""
    if status < 400 or status in _NO_REFUSAL:
        return ""
    return next((name for name, ways in options.items() if ways[1:] and _NAMED[name].search(message)), "")


def suspected_option(options: RequestOptions, status: int, accepted: Collection[str]) -> str:
    """Return "response_format" if an error that names nothing, or an empty reply, may be due to it, else "".

    Args:
        options: what was sent.
        status: HTTP status; 200 for an empty reply.
        accepted: response formats with which the server has replied before.
    """
    first, *others = options["response_format"]
    is_suspect = others and first not in accepted and (status == 200 or status in _UNSPECIFIC_REFUSAL)
    return "response_format" if is_suspect else ""


def request_parameters(
    options: RequestOptions, *, schema: object, seed: int, temperature: float | None, token_limit: int | None
) -> dict[str, Any]:
    """Return the request parameters for the first way of each option."""
    json_schema = {"name": "reply", "strict": True, "schema": schema}
    parameters: dict[str, dict[str, Any]] = {
        "json_schema": {"response_format": {"type": "json_schema", "json_schema": json_schema}},
        "json_object": {"response_format": {"type": "json_object"}},
        "seed": {"seed": seed},
        "temperature": {"temperature": temperature},
        "max_tokens": {"max_tokens": token_limit},
        "max_completion_tokens": {"max_completion_tokens": token_limit},
        "stream": {"stream": True, "stream_options": {"include_usage": True}},
        "": {},
    }
    return {name: value for ways in options.values() for name, value in parameters[ways[0]].items()}


def read_completion(body: bytes) -> LLMResponse:
    """Read the reply in an HTTP body, a completion or a stream of its chunks.

    The text of a reply without content is its tool call, its refusal, or else its reasoning, in which some servers put
    all of a reply.

    Raises:
        ErrorBody: the server reports an error.
        ValueError: the body is something else; the message has its first words.
    """
    try:
        text = body.decode("utf-8-sig").strip()
        value = _join_chunks(text) if text.startswith(("data:", "event:", ":")) else json.loads(text)
        if not isinstance(value, dict) or not value.get("choices"):
            raise _error_body(value)
        choice = value["choices"][0]
        if choice.get("error"):
            raise _error_body(choice)
        finish_reason = choice.get("finish_reason")
        text = _read_message(choice["message"], finish_reason)
    except ErrorBody:
        raise
    except (TypeError, LookupError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"the response is not a completion: {_excerpt(body)}") from error
    usage = value.get("usage")
    return LLMResponse(
        # An unpaired surrogate, which a model can write, can be neither saved nor sent.
        text.encode("utf-8", "replace").decode(),
        finish_reason == "length",
        read_integer(usage.get("total_tokens")) if isinstance(usage, dict) else None,
    )


def read_integer(value: object) -> int | None:
    """Return the integer that a value means (2, 2.0 or "2"), or None."""
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d{1,18}(\.0+)?\s*", value, re.ASCII):
        value = float(value) if "." in value else int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if type(value) is int else None


def retry_after_seconds(headers: Mapping[str, str]) -> float:
    """Return how long a server asks to wait, in its headers `retry-after-ms` or `retry-after`; 0 if it does not."""
    milliseconds, after = headers.get("retry-after-ms", ""), headers.get("retry-after", "")
    for value, scale in ((milliseconds, 1000.0), (after, 1.0)):
        if re.fullmatch(r"\s*\d+(\.\d*)?\s*", value, re.ASCII):
            return float(value) / scale
    try:
        until = parsedate_to_datetime(after)
        # The server's clock may differ from ours.
        now = parsedate_to_datetime(headers["date"]) if "date" in headers else datetime.now(UTC)
        return max((until - now).total_seconds(), 0.0)
    except (TypeError, ValueError):
        return 0.0


def _read_message(message: Mapping[str, Any], finish_reason: object) -> str:
    text, calls = _read_content(message.get("content")), message.get("tool_calls") or []
    if text:
        return text
    if message.get("refusal"):
        return f"(refusal) {message['refusal']}"
    if finish_reason == "content_filter":
        return "(the server's content filter withheld the reply)"
    if len(calls) == 1:
        return str(calls[0]["function"]["arguments"])
    return _read_content(message.get("reasoning_content") or message.get("reasoning"))


def _read_content(content: object) -> str:
    """Return text that is a string, null, or a list of parts; a part without "text" (thinking, an image) has none."""
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) else part for part in content]
        return "".join(text for text in texts if isinstance(text, str))
    if not isinstance(content, str | None):
        raise TypeError(f"content is {type(content).__name__}")
    return content or ""


def _join_chunks(text: str) -> dict[str, Any]:
    """Join the chunks of a stream of server-sent events into a completion; return a chunk that is an error as it is."""
    message: dict[str, str] = {}
    finish_reason = usage = None
    lines = [line[5:].strip() for line in text.split("\n") if line.startswith("data:")]
    for line in lines:
        if line == "[DONE]":
            continue
        chunk: dict[str, Any] = json.loads(line)
        if chunk.get("error"):
            return chunk
        usage = chunk.get("usage") or usage
        for choice in chunk.get("choices") or []:
            finish_reason = choice.get("finish_reason") or finish_reason
            for name, value in (choice.get("delta") or {}).items():
                if isinstance(value, str):
                    message[name] = message.get(name, "") + value
    if finish_reason is None and "[DONE]" not in lines:
        raise ValueError("the stream ended early")
    return {"choices": [{"message": message, "finish_reason": finish_reason}], "usage": usage}


def _error_body(value: object) -> ValueError:
    """Return the error in a body without a completion."""
    error = value.get("error") if isinstance(value, dict) else None
    if not error:
        return ValueError("it has neither choices nor an error")
    words = json.dumps(error, ensure_ascii=False)
    message = error.get("message") if isinstance(error, dict) else error
    status = read_integer(error.get("code") or error.get("status")) if isinstance(error, dict) else None
    if status is None or not 400 <= status < 600:
        # Without a status, the words decide; an unknown error may pass, like a failing upstream server's.
        kinds = ((401, r"api.?key|authenti|unauthori[sz]ed"), (429, r"rate.?limit|quota"), (400, r"invalid.?request"))
        status = next((number for number, words_ in kinds if re.search(words_, words, re.IGNORECASE)), 502)
    return ErrorBody(message if isinstance(message, str) and message else words, status=status, details=error)


def _excerpt(body: bytes) -> str:
    """Return the first words of a body, without the markup of a web page."""
    text = body.decode("utf-8", "replace").strip()
    if text.startswith("<"):
        text = re.sub(r"(?is)<(script|style)\b.*?</\1>|<[^>]*>", " ", text)
    text = " ".join(text.split())
    return (repr(text[:_MAX_EXCERPT]) + (" ..." if text[_MAX_EXCERPT:] else "")) if text else "it is empty"
