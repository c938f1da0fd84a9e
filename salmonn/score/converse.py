"""A question to a language model whose reply must be of use: read, or asked for again with its fault.

A reply is data: it is parsed as JSON and nothing else, and whoever asks says what makes it consistent.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from salmonn.score.llm_client import ChatMessage, LLMClient

Result = TypeVar("Result")

AGAIN = """\
That reply cannot be used: {faults}. Check it against what was asked for and reply with the whole JSON object, mended, \
and nothing else."""
# A model that answers at length to no purpose need not read all of it again.
_LONGEST_ECHO = 4000


class InvalidReplyError(ValueError):
    """A reply that cannot be used; the message names its faults as a model can understand them."""


@dataclass(frozen=True)
class Attempt(Generic[Result]):
    """A request for a reply: conversation, JSON schema, and reader of the reply (raises InvalidReplyError)."""

    messages: Sequence[ChatMessage]
    schema: dict[str, Any]
    read: Callable[[str], Result]


def ask_with_retries(
    client: LLMClient, attempts: Sequence[Attempt[Result]], *, seed: int, names_faults: bool = True
) -> Result:
    """What the first reply that can be read says.

    Args:
        client: the model.
        attempts: made in turn until a reply can be read.
        seed: of the first attempt; each further one is 1 on.
        names_faults: whether a further attempt tells what was wrong with the reply before, or asks afresh.

    Raises:
        InvalidReplyError: no reply can be read; the message tells the last one's fault.
        LLMRejectedError: the server refuses the question.
        LLMStoppedError: no question can be asked any more.
    """
    history: list[ChatMessage] = []
    fault = ""
    for number, attempt in enumerate(attempts):
        # A seed of its own, since the same question twice would be answered from the cache.
        reply = client.complete([*attempt.messages, *history], schema=attempt.schema, seed=seed + number)
        try:
            if reply.is_truncated:
                raise InvalidReplyError("it was cut off at its token limit")
            return attempt.read(reply.text)
        except InvalidReplyError as error:
            fault = str(error)
        if names_faults:
            history = [
                {"role": "assistant", "content": _disarm(reply.text[:_LONGEST_ECHO])},
                {"role": "user", "content": AGAIN.format(faults=fault)},
            ]
    raise InvalidReplyError(f"no usable reply in {len(attempts)} attempts; of the last: {fault}")


def object_schema(kinds: dict[str, Any]) -> dict[str, Any]:
    """JSON schema of an object with exactly these keys, each of its kind."""
    return {"type": "object", "properties": kinds, "required": list(kinds), "additionalProperties": False}


def write_data(value: Any) -> str:
    """JSON that a caption can neither end nor turn into another speaker's words."""
    return _disarm(json.dumps(value, ensure_ascii=False))


def _disarm(text: str) -> str:
    """The marks by which chat templates tell speakers apart, as JSON escapes: the same strings to who reads JSON.

    `<|im_end|>`, `<end_of_turn>`, `</s>` and their like begin with "<", Llama 2 and Mistral use [INST] and [/INST].
    """
    return text.replace("<", "\\u003c").replace("[INST", "\\u005bINST").replace("[/INST", "\\u005b/INST")


def parse_object(text: str) -> dict[str, Any]:
    """The JSON object that a reply is, if it is nothing else.

    What a reasoning model thinks before it answers (`<think>...</think>`) and a Markdown fence around the whole are
    taken off.

    Raises:
        InvalidReplyError: it is not one JSON object, or names a key twice.
    """
    text = text.rpartition("</think>")[2].strip()
    if text.startswith("```") and text.endswith("```") and "\n" in text:
        text = text[text.index("\n") : -3]
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise InvalidReplyError(f"it is not one JSON object and nothing else ({error})") from error
    if not isinstance(value, dict):
        raise InvalidReplyError("it is not a JSON object")
    require_text(json.dumps(value, ensure_ascii=False))
    return value


def require_text(text: str) -> None:
    """Raise InvalidReplyError for an unpaired surrogate, which JSON can escape (\\ud83d) but no file can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidReplyError("it holds half of a Unicode character") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key comes twice")
    return value
