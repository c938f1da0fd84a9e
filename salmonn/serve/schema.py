"""The chat completions of OpenAI's interface, as far as they fit a captioner: requests parsed, answers put into words.

A conversation about one clip, which stands in its first prompt, makes a request. What is asked for and cannot be given
is refused, never passed over.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from salmonn.caption.captioner import Span
from salmonn.caption.generate import Sampling
from salmonn.caption.processor import MAX_CONVERSATION_CHARS, MAX_PROMPT_CHARS
from salmonn.caption.prompt import History
from salmonn.caption.streaming import Completion
from salmonn.records import Modality

# Parameters of OpenAI's interface that change nothing at these values; any other value is refused.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
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
# They tell of whoever asks, and change no answer.
_OF_THE_CALLER = frozenset(["user", "metadata", "safety_identifier", "prompt_cache_key"])
_LEAST_TEMPERATURE = 0.01  # below, float32 runs over
_MOST_PARTS = 64  # of a message, and messages
# Each costs kilobytes once it is parsed, however short it is. A file in base64 has none of these letters.
_MOST_VALUES = 50_000
_ROLES = ("user", "assistant")
_CLIP_KINDS = {"video_url": "video", "image_url": "image", "input_audio": "sound"}


class RequestError(ValueError):
    """A request that cannot be answered; the message is for whoever asked.

    Args:
        message: what is wrong, and what to do.
        param: the parameter that is at fault, where it is one.
        status: of HTTP.
        code: by which programs know it.
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


class _Sound(_Model):
    data: str
    format: Literal["wav", "mp3"]


class _VideoPart(_Model):
    type: Literal["video_url"]
    video_url: _Url


class _ImagePart(_Model):
    type: Literal["image_url"]
    image_url: _ImageUrl


class _SoundPart(_Model):
    type: Literal["input_audio"]
    input_audio: _Sound


class _TextPart(_Model):
    type: Literal["text"]
    text: str


_Clip = _VideoPart | _ImagePart | _SoundPart
_Part = Annotated[_Clip | _TextPart, Field(discriminator="type")]


class _Message(_Model):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False, strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[_Part], Field(max_length=_MOST_PARTS)]
    name: str | None = None

    @model_validator(mode="after")
    def refuse_others(self) -> "_Message":
        """Answers come back with all the fields that they were given with, empty ones."""
        if full := [name for name, value in (self.model_extra or {}).items() if value not in (None, [])]:
            raise ValueError(f"{full[0][:60]} is not taken: leave it out")
        if self.role != "user" and any(not isinstance(part, _TextPart) for part in self.parts):
            raise ValueError("the clip belongs into the first message of the user")
        return self

    @property
    def parts(self) -> list[_Part]:
        """Of the content."""
        return [_TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content

    @property
    def words(self) -> str:
        """Of all parts."""
        return "\n".join(part.text for part in self.parts if isinstance(part, _TextPart)).strip()


class _StreamOptions(_Model):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class _Request(_Model):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False, strict=True)

    messages: list[_Message] = Field(min_length=1, max_length=_MOST_PARTS)
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
    """What a request may ask for.

    Args:
        usual_tokens: in one answer, where the request does not say.
        answer_tokens: in one answer, at most.
        choices: answers to one request.
        prompt_letters: in one message of whoever asks.
        talk_letters: in all messages, earlier answers too.
    """

    default_tokens: int
    max_tokens: int = 4096
    max_choices: int = 16
    max_prompt_chars: int = MAX_PROMPT_CHARS
    max_conversation_chars: int = MAX_CONVERSATION_CHARS


@dataclass(frozen=True)
class ChatRequest:
    """What a request asks for, its file apart.

    Args:
        kind: of the file: video, image or sound.
        model: as the request names it; "" where it does not.
        prompt: the words; None for a full description.
        history: prompts and answers before it; a prompt of no words is "".
        system: what the conversation begins with; None for the model's own.
        sampling: how the answers are drawn.
        span, use: of the file.
        num_choices: answers.
        seed: of the draws; None for any.
        stream, include_usage: how the answers are told.
    """

    kind: str
    model: str
    prompt: str | None
    history: History
    system: str | None
    sampling: Sampling
    span: Span
    modality: Modality
    num_choices: int
    seed: int | None
    stream: bool
    include_usage: bool


def parse_chat_request(body: bytes | bytearray, *, limits: ChatLimits) -> tuple[ChatRequest, str]:
    """What a request's body asks for, and the URL of its file.

    Raises:
        RequestError: it cannot be understood, or asks for what cannot be given.
    """
    if sum(body.count(sign) for sign in (b",", b"[", b"{")) > _MOST_VALUES:
        raise RequestError(f"the body has more than {_MOST_VALUES:,} values: one message with a clip has a dozen")
    try:
        request = _Request.model_validate_json(body)
    except ValidationError as error:
        raise _explain(error) from error
    _refuse_unknown(request.model_extra or {})
    system, turns = _split_messages(request.messages)
    clip = _only_clip(turns)
    *before, prompt = [message.words for message in turns]
    _refuse_long([system or "", *before[::2], prompt], [*before[1::2]], limits)
    history = tuple(zip(before[::2], before[1::2], strict=True))
    ask = _to_ask(request, clip, prompt=prompt or None, history=history, system=system, limits=limits)
    return ask, _url(clip)


def _explain(error: ValidationError) -> RequestError:
    """What is wrong, without the value, which may be a video."""
    # Content may be a string or a list: of what each lacks, the deepest tells of what was meant.
    deepest = max(error.errors(), key=lambda one: (len(one["loc"]), one["type"] == "too_long"))
    where = ".".join(str(part) for part in deepest["loc"])[:200]  # names and kinds may be as long as a file
    return RequestError(f"{where or 'the body'}: {deepest['msg'][:400]}", param=where or None)


def _refuse_unknown(extra: dict[str, Any]) -> None:
    for name, value in extra.items():
        if value is None or name in _OF_THE_CALLER or value in _NEUTRAL.get(name, ()):
            continue
        words = "does not do what that asks for" if name in _NEUTRAL else "does not know it"
        raise RequestError(f"{name[:60]}: this server {words}: leave it out", param=name[:60])


def _split_messages(messages: Sequence[_Message]) -> tuple[str | None, Sequence[_Message]]:
    """What the conversation begins with, and its prompts and answers in turn."""
    system = None
    if messages[0].role in ("system", "developer"):
        system, messages = messages[0].words, messages[1:]
    if [message.role for message in messages] != [_ROLES[number % 2] for number in range(len(messages) | 1)]:
        raise RequestError(
            "messages must be one of the system, if any, then the user's and the assistant's in turn; the last is the "
            "user's",
            param="messages",
        )
    return system, messages


def _refuse_long(asked: Sequence[str], answers: Sequence[str], limits: ChatLimits) -> None:
    longest, letters = max(map(len, asked)), sum(map(len, [*asked, *answers]))
    if longest > limits.max_prompt_chars:
        raise RequestError(
            f"a message has {longest} letters: {limits.max_prompt_chars} are taken at most", param="messages"
        )
    if letters > limits.max_conversation_chars:
        raise RequestError(
            f"the messages have {letters} letters, more than {limits.max_conversation_chars}: leave out the "
            "eldest questions and answers",
            param="messages",
        )


def _only_clip(turns: Sequence[_Message]) -> _Clip:
    """The one clip of a conversation, of which all that comes after it is words."""
    clips = [
        (number, part)
        for number, message in enumerate(turns)
        for part in message.parts
        if not isinstance(part, _TextPart)
    ]
    if len(clips) != 1:
        raise RequestError(
            f"the messages have {len(clips) or 'no'} clips: give one video_url, image_url or input_audio, and one only"
            + (" (the sound of a video is taken from the video)" if clips else ""),
            param="messages",
        )
    ((number, clip),) = clips
    if number:
        raise RequestError("the clip belongs into the first message of the user", param="messages")
    for place, message in list(enumerate(turns))[2::2]:
        if not message.words:
            raise RequestError(f"the user's message {place // 2 + 1} has no words: write some", param="messages")
    return clip


def _url(clip: _Clip) -> str:
    if isinstance(clip, _SoundPart):
        return f"data:audio/{clip.input_audio.format};base64,{clip.input_audio.data}"
    return clip.video_url.url if isinstance(clip, _VideoPart) else clip.image_url.url


def _to_ask(
    request: _Request, clip: _Clip, *, prompt: str | None, history: History, system: str | None, limits: ChatLimits
) -> ChatRequest:
    temperature, num_choices = request.temperature or 0.0, request.n or 1
    if 0 < temperature < _LEAST_TEMPERATURE:
        raise RequestError(f"temperature must be 0, or {_LEAST_TEMPERATURE} and above", param="temperature")
    if num_choices > limits.max_choices:
        raise RequestError(f"n: {limits.max_choices} choices are given at most", param="n")
    if num_choices > 1 and not temperature:
        raise RequestError("n: at temperature 0 all choices are the same: set a temperature", param="n")
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options go with stream: true only", param="stream_options")
    try:
        span = Span(request.start, request.end)
    except ValueError as error:
        raise RequestError(str(error), param="end") from error
    return ChatRequest(
        kind=_CLIP_KINDS[clip.type],
        model=request.model or "",
        prompt=prompt,
        history=history,
        system=system,
        sampling=Sampling(
            temperature=temperature,
            top_p=request.top_p or Sampling.top_p,
            max_new_tokens=_limit(request, limits),
            repetition_penalty=request.repetition_penalty,
        ),
        span=span,
        modality=request.modality or "both",
        num_choices=num_choices,
        seed=request.seed,
        stream=bool(request.stream),
        include_usage=bool(request.stream_options and request.stream_options.include_usage),
    )


def _limit(request: _Request, limits: ChatLimits) -> int:
    """Tokens that an answer may have; where a request gives both names of the limit, they must agree."""
    older, newer = request.max_tokens, request.max_completion_tokens
    if older is not None and newer is not None and older != newer:
        raise RequestError("max_tokens and max_completion_tokens differ: give one", param="max_tokens")
    limit = older if newer is None else newer
    if limit is not None and limit > limits.max_tokens:
        raise RequestError(f"max_tokens: {limits.max_tokens} are given at most", param="max_tokens")
    return limits.default_tokens if limit is None else limit


@dataclass(frozen=True)
class Usage:
    """Tokens that a request cost: of the clip and the words, and of all its answers."""

    num_prompt_tokens: int
    num_answer_tokens: int

    def to_json(self) -> dict[str, int]:
        """As OpenAI's interface tells it."""
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_answer_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_answer_tokens,
        }


@dataclass(frozen=True)
class ResponseBuilder:
    """Puts the answers to one request into JSON.

    Args:
        request_id: of the request.
        model: as it is listed.
        created: when, in seconds since 1970.
        include_usage: whether the chunks of a stream have a place for the usage.
    """

    request_id: str
    model: str
    created: int
    include_usage: bool = False

    def whole(self, answers: Sequence[Completion], *, usage: Usage) -> dict[str, Any]:
        """The reply that is not streamed."""
        choices = [
            {
                "index": number,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": None,
                "finish_reason": _finish_reason(answer),
            }
            for number, answer in enumerate(answers)
        ]
        return {**self._head("chat.completion"), "choices": choices, "usage": usage.to_json()}

    def begin(self, number: int) -> str:
        """The event that begins an answer of a stream."""
        return self._chunk(number, {"role": "assistant", "content": ""}, None)

    def piece(self, number: int, text: str) -> str:
        """The event with a piece of an answer."""
        return self._chunk(number, {"content": text}, None)

    def end(self, number: int, answer: Completion) -> str:
        """The event that ends an answer."""
        return self._chunk(number, {}, _finish_reason(answer))

    def usage(self, usage: Usage) -> str:
        """The event that tells the usage."""
        return to_event({**self._head("chat.completion.chunk"), "choices": [], "usage": usage.to_json()})

    def _chunk(self, number: int, delta: dict[str, str], finish_reason: str | None) -> str:
        choice = {"index": number, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        place = {"usage": None} if self.include_usage else {}
        return to_event({**self._head("chat.completion.chunk"), "choices": [choice], **place})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.request_id, "object": kind, "created": self.created, "model": self.model}


def _finish_reason(answer: Completion) -> str:
    return "stop" if answer.finished else "length"


def to_event(value: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


DONE = "data: [DONE]\n\n"
