"""The OpenAI-compatible chat API as servers really speak it: what they may refuse in a request, and how they reply."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal

ChatMessage = dict[str, Any]  # with "role" and "content", a string or a list of parts
Instead = Literal["", "refusal", "content filter", "tool call", "reasoning"]
# For each optional part of a request, the ways to send it that are left, the current one first; "" omits it.
RequestOptions = Mapping[str, tuple[str, ...]]

ALL_OPTIONS: RequestOptions = {
    "response_format": ("json_schema", "json_object", ""),
    "seed": ("seed", ""),
    "temperature": ("temperature", ""),
    "token limit": ("max_tokens", "max_completion_tokens", ""),
    "n": ("n", ""),
    "logprobs": ("logprobs", ""),
    "stream": ("", "stream"),
}
# How error messages name them. A conversation that is too long is not a reason to omit the token limit.
_NAMED = {
    "response_format": re.compile(r"response_format|schema|json_object|structured", re.IGNORECASE),
    "seed": re.compile(r"\bseed\b", re.IGNORECASE),
    "temperature": re.compile(r"\btemperature\b", re.IGNORECASE),
    "token limit": re.compile(r"\A(?!.*context).*max_(completion_)?tokens", re.IGNORECASE | re.DOTALL),
    "n": re.compile(r"""[`'"]n[`'"]|\bn (must|is|>)|\bnum_choices\b|multiple (choices|completions)"""),
    "logprobs": re.compile(r"log_?prob", re.IGNORECASE),
    "stream": re.compile(r"\bstream", re.IGNORECASE),
}
_NO_REFUSAL = (401, 402, 408, 429)  # wrong key, no money, too slow, too many requests
_UNSPECIFIC_REFUSAL = (400, 422, 500)
_MAX_EXCERPT = 200  # characters of a body that is not a completion


@dataclass(frozen=True)
class ChatRequest:
    """A request for chat completions.

    Args:
        messages: the conversation.
        schema: JSON schema of the reply, for servers with structured outputs; None for free text.
        seed: sampling seed; None sends none.
        seed_limit: modulus of seeds, as many servers take 32 bits; None sends them as they are.
        temperature: sampling temperature; None leaves it to the server.
        token_limit: maximum number of tokens of a reply; None leaves it to the server.
        num_choices: number of replies; a server may send fewer.
        logprobs: None for no log-probabilities; K for those of each token and of the K most likely ones in its place.
        parameters: further parameters, sent as they are.
    """

    messages: Sequence[ChatMessage]
    schema: Mapping[str, Any] | None = None
    seed: int | None = None
    seed_limit: int | None = 1 << 31
    temperature: float | None = None
    token_limit: int | None = None
    num_choices: int = 1
    logprobs: int | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def applicable(self, options: RequestOptions) -> RequestOptions:
        """Return the options with those that this request does not use omitted."""
        is_used = {
            "response_format": self.schema is not None,
            "seed": self.seed is not None,
            "temperature": self.temperature is not None,
            "token limit": self.token_limit is not None,
            "n": self.num_choices > 1,
            "logprobs": self.logprobs is not None,
        }
        return {name: ways if is_used.get(name, True) else ("",) for name, ways in options.items()}

    def body(self, options: RequestOptions) -> dict[str, Any]:
        """Return the parameters, without model and messages, for the first way of each option."""
        json_schema = {"name": "reply", "strict": True, "schema": self.schema}
        parameters: dict[str, dict[str, Any]] = {
            "json_schema": {"response_format": {"type": "json_schema", "json_schema": json_schema}},
            "json_object": {"response_format": {"type": "json_object"}},
            "seed": {"seed": self.seed % self.seed_limit if self.seed and self.seed_limit else self.seed},
            "temperature": {"temperature": self.temperature},
            "max_tokens": {"max_tokens": self.token_limit},
            "max_completion_tokens": {"max_completion_tokens": self.token_limit},
            "n": {"n": self.num_choices},
            "logprobs": {"logprobs": True} | ({"top_logprobs": self.logprobs} if self.logprobs else {}),
            "stream": {"stream": True, "stream_options": {"include_usage": True}},
            "": {},
        }
        sent = {name: value for ways in options.values() for name, value in parameters[ways[0]].items()}
        return {**self.parameters, **sent}


@dataclass(frozen=True)
class Choice:
    """One of the replies to a request.

    Args:
        text: its text; "" if it has none.
        finish_reason: why it ended: stop, length, ...
        instead: what a reply without text has in its place, for example the words of a refusal.
        instead_kind: kind of `instead`.
        logprobs: log-probabilities of the tokens; None if the server sends none.
    """

    text: str
    finish_reason: str | None = "stop"
    instead: str = ""
    instead_kind: Instead = ""
    logprobs: tuple[float, ...] | None = None


@dataclass(frozen=True)
class ChatResponse:
    """A response to a request.

    Args:
        choices: replies, at least one.
        num_tokens: tokens of prompt and replies by the server's count; None if the server sends no usage.
        model: name of the model according to the server; "" if it sends none.
        clip: what this project's server reports about the clip; {} from others.
    """

    choices: tuple[Choice, ...]
    num_tokens: int | None = None
    model: str = ""
    clip: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether the first reply has neither text nor anything in its place, although it was not cut off."""
        first = self.choices[0]
        return not (first.text or first.instead or first.finish_reason == "length")

    def first_reply(self) -> "LLMResponse":
        """Return the first reply; the text of one without content is what it has instead."""
        first = self.choices[0]
        return LLMResponse(first.text or first.instead, first.finish_reason == "length", self.num_tokens)


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


def read_response(body: bytes) -> ChatResponse:
    """Read the response in an HTTP body, a completion or a stream of its chunks.

    Raises:
        ErrorBody: the server reports an error.
        ValueError: the body is something else; the message has its first words.
    """
    try:
        text = body.decode("utf-8-sig").strip()
        value = _join_chunks(text) if text.startswith(("data:", "event:", ":")) else json.loads(text)
        if not isinstance(value, dict) or not value.get("choices"):
            raise _error_body(value)
        choices = tuple(_read_choice(choice) for choice in value["choices"])
    except ErrorBody:
        raise
    except (TypeError, LookupError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"the response is not a completion: {excerpt(body)}") from error
    usage, model, clip = value.get("usage"), value.get("model"), value.get("clip")
    return ChatResponse(
        choices,
        num_tokens=read_integer(usage.get("total_tokens")) if isinstance(usage, dict) else None,
        model=model if isinstance(model, str) else "",
        clip=clip if isinstance(clip, dict) else {},
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


def _read_choice(choice: Mapping[str, Any]) -> Choice:
    if choice.get("error"):
        raise _error_body(choice)
    finish_reason = choice.get("finish_reason")
    text, instead, kind = _read_message(choice["message"], finish_reason)
    logprobs = choice.get("logprobs")
    tokens = logprobs.get("content") if isinstance(logprobs, dict) else None
    return Choice(
        # An unpaired surrogate, which a model can write, can be neither saved nor sent.
        text.encode("utf-8", "replace").decode(),
        finish_reason,
        instead.encode("utf-8", "replace").decode(),
        kind,
        None if tokens is None else tuple(float(token["logprob"]) for token in tokens),
    )


def _read_message(message: Mapping[str, Any], finish_reason: object) -> tuple[str, str, Instead]:
    """Return the text of a message, and what it has instead with its kind: some servers put all into the reasoning."""
    text, calls = _read_content(message.get("content")), message.get("tool_calls") or []
    if text:
        return text, "", ""
    if message.get("refusal"):
        return "", f"(refusal) {message['refusal']}", "refusal"
    if finish_reason == "content_filter":
        return "", "(the server's content filter withheld the reply)", "content filter"
    if len(calls) == 1:
        return "", str(calls[0]["function"]["arguments"]), "tool call"
    reasoning = _read_content(message.get("reasoning_content") or message.get("reasoning"))
    return "", reasoning, "reasoning" if reasoning else ""


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
    choices: dict[int, dict[str, Any]] = {}
    head: dict[str, Any] = {}
    lines = [line[5:].strip() for line in text.split("\n") if line.startswith("data:")]
    for line in lines:
        if line == "[DONE]":
            continue
        chunk: dict[str, Any] = json.loads(line)
        if chunk.get("error"):
            return chunk
        head |= {name: chunk[name] for name in ("usage", "model", "clip") if chunk.get(name)}
        for part in chunk.get("choices") or []:
            _add_part(choices.setdefault(part.get("index") or 0, {"message": {}, "finish_reason": None}), part)
    choices = choices or {0: {"message": {}, "finish_reason": None}}
    if "[DONE]" not in lines and any(choice["finish_reason"] is None for choice in choices.values()):
        raise ValueError("the stream ended early")
    return {"choices": [choices[index] for index in sorted(choices)], **head}


def _add_part(choice: dict[str, Any], part: Mapping[str, Any]) -> None:
    """Add the part of a choice that a chunk has."""
    choice["finish_reason"] = part.get("finish_reason") or choice["finish_reason"]
    message = choice["message"]
    for name, value in (part.get("delta") or {}).items():
        if isinstance(value, str):
            message[name] = message.get(name, "") + value
    if isinstance(part.get("logprobs"), dict):
        tokens = choice.setdefault("logprobs", {"content": []})["content"]
        tokens += part["logprobs"].get("content") or []


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


def excerpt(body: bytes) -> str:
    """Return the first words of a body, without the markup of a web page."""
    text = body.decode("utf-8", "replace").strip()
    if text.startswith("<"):
        text = re.sub(r"(?is)<(script|style)\b.*?</\1>|<[^>]*>", " ", text)
    text = " ".join(text.split())
    return (repr(text[:_MAX_EXCERPT]) + (" ..." if text[_MAX_EXCERPT:] else "")) if text else "it is empty"
