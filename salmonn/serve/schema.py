"""OpenAI's chat completions, as far as they fit a captioner: parse requests, build responses.

A request is a conversation about one clip. Unsupported parameters are rejected, never ignored.
"""

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from salmonn.caption.generator import MAX_TOP_LOGPROBS, CaptionRequest, Sampling, Span
from salmonn.caption.processor import MAX_CONVERSATION_CHARS, MAX_PROMPT_CHARS
from salmonn.caption.streaming import Completion, TextDelta
from salmonn.model.layout import ClipInfo
from salmonn.records import Modality
from salmonn.score.structured import SCHEMA_NAME, schema_text
from salmonn.serve.content import MAX_PARTS, ClipPart, check_processor_fields, parse_content, to_frame_options
from salmonn.serve.errors import RequestError
from salmonn.serve.logprobs import LogprobsFormat

# Parameters of OpenAI's and vLLM's APIs that have no effect at these values; other values are rejected.
_NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "verbosity": ("medium",),
    "reasoning_effort": ("none",),
    # vLLM's
    "top_k": (-1, 0),
    "min_p": (0,),
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "echo": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template_kwargs": ({},),
}
_REASONS = {
    "best_of": "only 1 is supported; ask for n choices",
}
# Parameters that describe the caller, and change no answer.
_CALLER_PARAMETERS = frozenset(["user", "metadata", "safety_identifier", "prompt_cache_key"])
_MIN_TEMPERATURE = 0.01  # float32 overflows below, where the most likely token is sampled anyway
_MAX_STOPS, _MAX_STOP_CHARS = 16, 200
_MAX_SCHEMA_CHARS = 20_000
_FORMATS = (
    """`{"type": "text"}`, `{"type": "json_object"}` or `{"type": "json_schema", "json_schema": {"schema": {...}}}`"""
)
JSON_SCHEMA_PARAM = "response_format.json_schema.schema"
# Each value costs kilobytes once it is parsed, however short it is. Base64 contains none of the characters counted.
_MAX_VALUES = 50_000


def _to_int(value: Any) -> Any:
    """Return a whole number as an int: some clients write 32.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


_Int = Annotated[int, BeforeValidator(_to_int)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)


class _Message(_Model):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False, strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Any
    name: str | None = None


@dataclass(frozen=True)
class _Turn:
    """A message, or several of the user in a row.

    Args:
        role: system, user or assistant.
        parts: texts and clips.
    """

    role: str
    parts: list[str | ClipPart]

    @property
    def text(self) -> str:
        return "\n".join(part for part in self.parts if isinstance(part, str)).strip()

    @property
    def clips(self) -> list[ClipPart]:
        return [part for part in self.parts if isinstance(part, ClipPart)]


class _StreamOptions(_Model):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class ChatCompletion(_Model):
    """The body of a chat completion request, whose `model_extra` are the parameters that need neutral values."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False, strict=True)

    messages: list[_Message] = Field(min_length=1, max_length=MAX_PARTS)
    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: Annotated[_Int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[_Int, Field(ge=1)] | None = None
    n: Annotated[_Int, Field(ge=1)] | None = None
    seed: _Int | None = None
    stop: Any = Field(None, description=f"a string that ends the answer, or a list of up to {_MAX_STOPS}")
    response_format: Any = Field(None, description=_FORMATS)
    logprobs: bool | None = None
    top_logprobs: Annotated[_Int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    mm_processor_kwargs: Any = Field(None, description="`num_frames` or `fps`, and `max_pixels`, of the clip")
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    start: float | None = Field(None, ge=0, description="start of the part of the clip, in seconds")
    end: float | None = Field(None, gt=0, description="its end, in seconds")
    modality: Modality | None = Field(None, description="what the model is given of the clip")
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
        clip: the part of a message that has the clip.
        model: name of the model in the request, possibly empty.
        request: caption request; its path is to be set.
        stream: whether to send the answer as a stream of events.
        include_usage: whether to end the stream with the usage.
    """

    clip: ClipPart
    model: str
    request: CaptionRequest
    stream: bool
    include_usage: bool


def parse_chat_request(body: bytes, *, limits: ChatLimits) -> ChatRequest:
    """Parse the body of a request.

    Raises:
        RequestError: the body is malformed, or asks for something unsupported.
    """
    if sum(body.count(char) for char in (b",", b"[", b"{")) > _MAX_VALUES:
        raise RequestError(f"the body has more than {_MAX_VALUES:,} JSON values; send fewer messages")
    try:
        chat = ChatCompletion.model_validate_json(body)
    except ValidationError as error:
        # The invalid value is not repeated, since it may be a video; names may be as long as one.
        first = error.errors()[0]
        where = _to_path(first["loc"])
        raise RequestError(f"{where or 'the body'}: {first['msg'][:400]}", param=where or None) from error
    _check_parameters(chat)
    system, turns = _to_turns(chat.messages)
    clip_turn, clip = _only_clip(turns)
    *before, prompt = [turn.text for turn in turns]
    _check_lengths([system or "", *before[::2], prompt], before[1::2], limits)
    if chat.stream_options is not None and not chat.stream:
        raise RequestError("stream_options requires stream: true", param="stream_options")
    frames = {**check_processor_fields(chat.mm_processor_kwargs or {}), **clip.frames}
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
        frames=to_frame_options(frames, "messages" if clip.frames else "mm_processor_kwargs"),
        clip_turn=clip_turn,
    )
    include_usage = bool(chat.stream_options and chat.stream_options.include_usage)
    return ChatRequest(clip, chat.model or "", request, bool(chat.stream), include_usage)


def _to_path(location: Sequence[str | int]) -> str:
    """Return a location as clients write it, such as messages[0].role."""
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part[:60]}" for part in location)
    return path.removeprefix(".")[:200]


def _check_parameters(chat: ChatCompletion) -> None:
    for name, value in (chat.model_extra or {}).items():
        if value is not None and name not in _CALLER_PARAMETERS and value not in _NEUTRAL_VALUES.get(name, ()):
            reason = "this value is not supported; leave it out" if name in _NEUTRAL_VALUES else "unsupported parameter"
            raise RequestError(f"{name[:60]}: {_REASONS.get(name, reason)}", param=name[:60])


def _to_turns(messages: Sequence[_Message]) -> tuple[str | None, list[_Turn]]:
    """Return the system prompt, if any, and the alternating turns of user and assistant."""
    turns: list[_Turn] = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        # Unknown fields may be empty, as in answers that clients send back unchanged.
        if unknown := [name for name, value in (message.model_extra or {}).items() if value not in (None, [])]:
            param = f"{where}.{unknown[0][:60]}"
            raise RequestError(f"{param} is not supported", param=param)
        turn = _Turn(message.role, parse_content(message.content, f"{where}.content"))
        if message.role != "user" and turn.clips:
            raise RequestError(f"{where}: a clip belongs in a message of the user", param=f"{where}.content")
        if turns and message.role == turns[-1].role == "user":
            turns[-1] = _Turn("user", turns[-1].parts + turn.parts)
        else:
            turns.append(turn)
    system = turns.pop(0).text if turns[0].role in ("system", "developer") else None
    if [turn.role for turn in turns] != [("user", "assistant")[number % 2] for number in range(len(turns) | 1)]:
        raise RequestError(
            "messages must start (after an optional system message) and end with user, and alternate user/assistant",
            param="messages",
        )
    return system, turns


def _only_clip(turns: Sequence[_Turn]) -> tuple[int, ClipPart]:
    """Return the one clip of a conversation and the number of the question that it belongs to.

    The user's other messages need text.
    """
    clips = [(number // 2, clip) for number, turn in enumerate(turns) for clip in turn.clips]
    if not clips:
        raise RequestError(
            "the messages have no clip; send one video, image or audio file, such as a video_url", param="messages"
        )
    if len(clips) > 1:
        where = clips[1][1].where
        raise RequestError(
            f"{where}: the messages have {len(clips)} clips, and the model takes one: ask about each in a request "
            "of its own, or join them to one video (the audio of a video is read from the video)",
            param=where,
        )
    for number, turn in enumerate(turns[::2]):
        if not turn.text and number not in (0, clips[0][0]):
            raise RequestError(f"the user's message {number + 1} has no text", param="messages")
    if clips[0][0] and not turns[0].text:
        raise RequestError("the user's message 1 has neither a clip nor text", param="messages")
    return clips[0]


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


def _to_span(chat: ChatCompletion) -> Span:
    try:
        return Span(chat.start, chat.end)
    except ValueError as error:
        raise RequestError(str(error), param="end") from error


def _to_sampling(chat: ChatCompletion, limits: ChatLimits) -> Sampling:
    temperature = chat.temperature or 0.0
    if (chat.n or 1) > limits.max_choices:
        raise RequestError(f"n: the maximum is {limits.max_choices}", param="n")
    older, newer = chat.max_tokens, chat.max_completion_tokens  # two names of the same parameter
    if older is not None and newer is not None and older != newer:
        raise RequestError("max_tokens and max_completion_tokens differ: give one", param="max_tokens")
    max_tokens = older if newer is None else newer
    if max_tokens is not None and max_tokens > limits.max_tokens:
        raise RequestError(f"max_tokens: the maximum is {limits.max_tokens}", param="max_tokens")
    if chat.top_logprobs and not chat.logprobs:
        raise RequestError("top_logprobs requires logprobs: true", param="top_logprobs")
    return Sampling(
        temperature=temperature if temperature >= _MIN_TEMPERATURE else 0.0,
        top_p=chat.top_p or Sampling.top_p,
        max_new_tokens=limits.default_tokens if max_tokens is None else max_tokens,
        repetition_penalty=chat.repetition_penalty,
        stop=_to_stop(chat.stop),
        logprobs=chat.top_logprobs or 0 if chat.logprobs else None,
        json_schema=_to_json_schema(chat.response_format),
    )


def _to_json_schema(value: Any) -> str | None:
    """Return the JSON schema that an answer has to follow, None for free text."""
    where = "response_format"
    kind = value.get("type") if isinstance(value, dict) else value
    if kind in (None, "text"):
        return None
    if kind == "json_object":
        return '{"type": "object"}'
    if kind != "json_schema":
        raise RequestError(f"{where}.type must be text, json_object or json_schema", param=f"{where}.type")
    inner = value.get("json_schema")
    schema = inner.get("schema") if isinstance(inner, dict) else None
    if isinstance(inner, dict) and "schema" not in inner and inner.get("name") == SCHEMA_NAME:
        return schema_text()
    if not isinstance(schema, dict):
        raise RequestError(f"{JSON_SCHEMA_PARAM} must be an object", param=JSON_SCHEMA_PARAM)
    text = json.dumps(schema)  # in the order of the request, which is the order of properties in the answer
    if len(text) > _MAX_SCHEMA_CHARS:
        limit = f"the maximum is {_MAX_SCHEMA_CHARS:,} characters"
        raise RequestError(f"{JSON_SCHEMA_PARAM} is too long; {limit}", param=JSON_SCHEMA_PARAM)
    return text


def _to_stop(value: Any) -> tuple[str, ...]:
    stop = [value] if isinstance(value, str) else value or []
    is_valid = isinstance(stop, list) and all(isinstance(one, str) and 0 < len(one) <= _MAX_STOP_CHARS for one in stop)
    if not is_valid or len(stop) > _MAX_STOPS:
        raise RequestError(
            f"stop must be a string or a list of up to {_MAX_STOPS}, each of 1 to {_MAX_STOP_CHARS} characters",
            param="stop",
        )
    return tuple(stop)


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
        logprobs: format of log-probabilities.
        include_usage: whether each chunk of a stream has a `usage` field.
    """

    request_id: str
    model: str
    created: int
    logprobs: LogprobsFormat
    include_usage: bool = False

    def response(self, completions: Sequence[Completion], *, usage: Usage) -> dict[str, Any]:
        """Return the response to a request without streaming."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": completion.text, "refusal": None},
                "logprobs": self.logprobs.to_json(completion.tokens),
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
        """Return the events for a text delta: one with its text or log-probabilities, and one that ends the choice."""
        logprobs = self.logprobs.to_json(delta.tokens)
        has_content = delta.text or logprobs
        events = [self._chunk(index, {"content": delta.text}, None, logprobs=logprobs)] if has_content else []
        if delta.completion is not None:
            clip = {"clip": _clip_to_json(delta.completion.clip)}
            events.append(self._chunk(index, {}, _finish_reason(delta.completion), **clip))
        return events

    def usage(self, usage: Usage) -> str:
        """Return the event with the usage."""
        return to_event({**self._head("chat.completion.chunk"), "choices": [], "usage": usage.to_json()})

    def _chunk(
        self,
        index: int,
        delta: dict[str, str],
        finish_reason: str | None,
        *,
        logprobs: dict[str, Any] | None = None,
        **extra: object,
    ) -> str:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
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
