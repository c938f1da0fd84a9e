"""OpenAI's chat completions, as far as they fit a captioner: parse requests, build responses.

A request is a conversation about one clip, which its first user message contains. Unsupported parameters are rejected,
never ignored.
"""

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from salmonn.caption.generator import CaptionRequest, Sampling, Span
from salmonn.caption.processor import MAX_CONVERSATION_CHARS, MAX_PROMPT_CHARS
from salmonn.caption.streaming import Completion, TextDelta
from salmonn.model.layout import ClipInfo
from salmonn.records import Modality

# Parameters of OpenAI's API that have no effect at these values; other values are rejected.
_NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "stop": ([],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "verbosity": ("medium",),
}
# Parameters that describe the caller, and change no answer.
_CALLER_PARAMETERS = frozenset(["user", "metadata", "safety_identifier", "prompt_cache_key"])
_MIN_TEMPERATURE = 0.01  # float32 overflows below
_MAX_PARTS = 64  # parts of a message, and messages
# Each value costs kilobytes once it is parsed, however short it is. Base64 contains none of the characters counted.
_MAX_VALUES = 50_000
_ROLES = ("user", "assistant")
_CLIP_KINDS = {"video_url": "video", "image_url": "image", "input_audio": "audio"}


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


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)


class _Url(_Model):
    url: str


class _ImageUrl(_Url):
    detail: Literal["auto"] | None = None


class _Audio(_Model):
    data: str
    format: Literal["wav", "mp3"]


class _VideoPart(_Model):
    type: Literal["video_url"]
    video_url: _Url


class _ImagePart(_Model):
    type: Literal["image_url"]
    image_url: _ImageUrl


class _AudioPart(_Model):
    type: Literal["input_audio"]
    input_audio: _Audio


class _TextPart(_Model):
    type: Literal["text"]
    text: str


_Clip = _VideoPart | _ImagePart | _AudioPart
_Part = Annotated[_Clip | _TextPart, Field(discriminator="type")]


class _Message(_Model):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False, strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[_Part], Field(max_length=_MAX_PARTS)]
    name: str | None = None

    @model_validator(mode="after")
    def check(self) -> "_Message":
        """Reject unknown fields, unless they are empty, as in answers that clients send back unchanged."""
        if unknown := [name for name, value in (self.model_extra or {}).items() if value not in (None, [])]:
            raise ValueError(f"{unknown[0][:60]} is not supported")
        if self.role != "user" and any(not isinstance(part, _TextPart) for part in self.parts):
            raise ValueError("the clip belongs in the user's first message")
        return self

    @property
    def parts(self) -> list[_Part]:
        """The content as a list of parts."""
        return [_TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content

    @property
    def text(self) -> str:
        """The text of all parts."""
        return "\n".join(part.text for part in self.parts if isinstance(part, _TextPart)).strip()


class _StreamOptions(_Model):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class _ChatCompletion(_Model):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False, strict=True)

    messages: list[_Message] = Field(min_length=1, max_length=_MAX_PARTS)
    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1)
    seed: int | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    start: float | None = Field(None, ge=0)
    end: float | None = Field(None, gt=0)
    modality: Modality | None = None
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)


@dataclass(frozen=True)
class ChatLimits:
    """Limits of a chat request.

    Args:
        default_tokens: token limit of an answer, if the request sets none.
        max_tokens: highest token limit that a request may set.
        max_choices: maximum number of answers to a request.
        max_prompt_chars: maximum length of a message of the user.
        max_conversation_chars: maximum length of all messages together.
    """

    default_tokens: int
    max_tokens: int = 4096
    max_choices: int = 16
    max_prompt_chars: int = MAX_PROMPT_CHARS
    max_conversation_chars: int = MAX_CONVERSATION_CHARS


@dataclass(frozen=True)
class ChatRequest:
    """A parsed request, without its file.

    Args:
        kind: kind of the file: video, image or audio.
        model: name of the model in the request, possibly empty.
        request: caption request; its path is to be set.
        stream: whether to send the answer as a stream of events.
        include_usage: whether to end the stream with the usage.
    """

    kind: str
    model: str
    request: CaptionRequest
    stream: bool
    include_usage: bool


def parse_chat_request(body: bytes | bytearray, *, limits: ChatLimits) -> tuple[ChatRequest, str]:
    """Parse the body of a request; returns the request and the URL of its file.

    Raises:
        RequestError: the body is malformed, or asks for something unsupported.
    """
    if sum(body.count(char) for char in (b",", b"[", b"{")) > _MAX_VALUES:
        raise RequestError(f"the body has more than {_MAX_VALUES:,} JSON values; send fewer messages")
    try:
        chat = _ChatCompletion.model_validate_json(body)
    except ValidationError as error:
        # Content may be a string or a list; of the errors for each, the deepest is about the one that was meant. The
        # invalid value is not repeated, since it may be a video; names and kinds may be as long as one.
        deepest = max(error.errors(), key=lambda one: (len(one["loc"]), one["type"] == "too_long"))
        where = ".".join(str(part) for part in deepest["loc"])[:200]
        raise RequestError(f"{where or 'the body'}: {deepest['msg'][:400]}", param=where or None) from error
    for name, value in (chat.model_extra or {}).items():
        if value is not None and name not in _CALLER_PARAMETERS and value not in _NEUTRAL_VALUES.get(name, ()):
            reason = "this value is not supported" if name in _NEUTRAL_VALUES else "unsupported parameter"
            raise RequestError(f"{name[:60]}: {reason}", param=name[:60])
    system, messages = _split_messages(chat.messages)
    clip = _only_clip(messages)
    *before, prompt = [message.text for message in messages]
    _check_lengths([system or "", *before[::2], prompt], before[1::2], limits)
    if chat.stream_options is not None and not chat.stream:
        raise RequestError("stream_options requires stream: true", param="stream_options")
    request = CaptionRequest(
        Path(),
        prompt=prompt or None,
        sampling=_to_sampling(chat, limits),
        span=_to_span(chat),
        modality=chat.modality or "both",
        seed=secrets.randbits(32) if chat.seed is None else chat.seed,
        num_samples=chat.n or 1,
        history=tuple(zip(before[::2], before[1::2], strict=True)),
        system=system,
    )
    include_usage = bool(chat.stream_options and chat.stream_options.include_usage)
    return ChatRequest(_CLIP_KINDS[clip.type], chat.model or "", request, bool(chat.stream), include_usage), _url(clip)


def _split_messages(messages: Sequence[_Message]) -> tuple[str | None, Sequence[_Message]]:
    """Return the system prompt, if any, and the alternating messages of user and assistant."""
    system = None
    if messages[0].role in ("system", "developer"):
        system, messages = messages[0].text, messages[1:]
    if [message.role for message in messages] != [_ROLES[number % 2] for number in range(len(messages) | 1)]:
        raise RequestError(
            "messages must start (after an optional system message) and end with user, and alternate user/assistant",
            param="messages",
        )
    return system, messages


def _only_clip(messages: Sequence[_Message]) -> _Clip:
    """Return the one clip of a conversation, which must be in the first message; later ones of the user need text."""
    clips = [
        (number, part)
        for number, message in enumerate(messages)
        for part in message.parts
        if not isinstance(part, _TextPart)
    ]
    if len(clips) != 1:
        raise RequestError(
            f"the messages have {len(clips) or 'no'} clips: give exactly one video_url, image_url or input_audio"
            + (" (the audio of a video is read from the video)" if clips else ""),
            param="messages",
        )
    ((number, clip),) = clips
    if number:
        raise RequestError("the clip belongs in the user's first message", param="messages")
    for number, message in list(enumerate(messages))[2::2]:
        if not message.text:
            raise RequestError(f"the user's message {number // 2 + 1} has no text", param="messages")
    return clip


def _url(clip: _Clip) -> str:
    if isinstance(clip, _AudioPart):
        return f"data:audio/{clip.input_audio.format};base64,{clip.input_audio.data}"
    return clip.video_url.url if isinstance(clip, _VideoPart) else clip.image_url.url


def _check_lengths(prompts: Sequence[str], answers: Sequence[str], limits: ChatLimits) -> None:
    longest, total = max(map(len, prompts)), sum(map(len, [*prompts, *answers]))
    if longest > limits.max_prompt_chars:
        raise RequestError(
            f"a message has {longest} characters; the maximum is {limits.max_prompt_chars}", param="messages"
        )
    if total > limits.max_conversation_chars:
        raise RequestError(
            f"the messages have {total} characters; the maximum is {limits.max_conversation_chars}: drop the oldest "
            "messages",
            param="messages",
        )


def _to_span(chat: _ChatCompletion) -> Span:
    try:
        return Span(chat.start, chat.end)
    except ValueError as error:
        raise RequestError(str(error), param="end") from error


def _to_sampling(chat: _ChatCompletion, limits: ChatLimits) -> Sampling:
    temperature, num_choices = chat.temperature or 0.0, chat.n or 1
    if 0 < temperature < _MIN_TEMPERATURE:
        raise RequestError(f"temperature must be 0, or {_MIN_TEMPERATURE} and above", param="temperature")
    if num_choices > limits.max_choices:
        raise RequestError(f"n: the maximum is {limits.max_choices}", param="n")
    if num_choices > 1 and not temperature:
        raise RequestError("n: at temperature 0 all choices are the same; set a temperature", param="n")
    older, newer = chat.max_tokens, chat.max_completion_tokens  # two names of the same parameter
    if older is not None and newer is not None and older != newer:
        raise RequestError("max_tokens and max_completion_tokens differ: give one", param="max_tokens")
    max_tokens = older if newer is None else newer
    if max_tokens is not None and max_tokens > limits.max_tokens:
        raise RequestError(f"max_tokens: the maximum is {limits.max_tokens}", param="max_tokens")
    return Sampling(
        temperature=temperature,
        top_p=chat.top_p or Sampling.top_p,
        max_new_tokens=limits.default_tokens if max_tokens is None else max_tokens,
        repetition_penalty=chat.repetition_penalty,
    )


@dataclass(frozen=True)
class Usage:
    """Tokens of a request: of clip and prompt, and of all its completions."""

    num_prompt_tokens: int
    num_completion_tokens: int

    def to_json(self) -> dict[str, int]:
        """Return the usage as OpenAI's API has it."""
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_completion_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_completion_tokens,
        }


@dataclass(frozen=True)
class ResponseBuilder:
    """Builds the JSON responses to one request.

    Args:
        request_id: id of the request.
        model: name of the model.
        created: time in seconds since 1970.
        include_usage: whether each chunk of a stream has a `usage` field.
    """

    request_id: str
    model: str
    created: int
    include_usage: bool = False

    def response(self, completions: Sequence[Completion], *, usage: Usage) -> dict[str, Any]:
        """Return the response to a request without streaming."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": completion.text, "refusal": None},
                "logprobs": None,
                "finish_reason": _finish_reason(completion),
            }
            for index, completion in enumerate(completions)
        ]
        clip = {"clip": _clip_to_json(completions[0].clip)}
        return {**self._head("chat.completion"), "choices": choices, "usage": usage.to_json(), **clip}

    def start(self, index: int) -> str:
        """Return the event that starts choice `index` of a stream."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None)

    def deltas(self, index: int, delta: TextDelta) -> list[str]:
        """Return the events for a text delta: one with its text, if any, and one that ends the choice."""
        events = [self._chunk(index, {"content": delta.text}, None)] if delta.text else []
        if delta.completion is not None:
            clip = {"clip": _clip_to_json(delta.completion.clip)}
            events.append(self._chunk(index, {}, _finish_reason(delta.completion), **clip))
        return events

    def usage(self, usage: Usage) -> str:
        """Return the event with the usage."""
        return to_event({**self._head("chat.completion.chunk"), "choices": [], "usage": usage.to_json()})

    def _chunk(self, index: int, delta: dict[str, str], finish_reason: str | None, **extra: object) -> str:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        usage = {"usage": None} if self.include_usage else {}
        return to_event({**self._head("chat.completion.chunk"), "choices": [choice], **usage, **extra})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.request_id, "object": kind, "created": self.created, "model": self.model}


def _finish_reason(completion: Completion) -> str:
    return "stop" if completion.finished else "length"


def _clip_to_json(clip: ClipInfo) -> dict[str, Any]:
    """Return what is known about the clip, in the words of a caption record; OpenAI's API has no such field."""
    return {"complete": clip.is_complete, "modality": clip.modality, "warnings": clip.warnings}


def to_event(value: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


DONE = "data: [DONE]\n\n"
