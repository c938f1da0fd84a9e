"""Rows of preferences in published formats: RewardBench, RewardBench 2, RAG-RewardBench, and TRL's two.

    {"prompt": text, "chosen": text, "rejected": text}     TRL, RewardBench; each may be a list of messages, and the
                                                           prompt the messages before both answers
    {"prompt": text, "chosen": [text], "rejected": [text, text]}                                         RewardBench 2
    {"prompt": text, "chosen": text, "reject": text}                                                   RAG-RewardBench

Further columns are the reader's own. A clip is named by `video`, by `videos` with one path, or by `video_path`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from salmonn.conversations import line_items, list_items

EXPECTED = (
    '{"prompt": text, "chosen": text, "rejected": text}, with lists of messages as in TRL, lists of texts as in '
    'RewardBench 2, or "reject" as in RAG-RewardBench'
)


@dataclass(frozen=True)
class PreferenceRow:
    """A prompt with better and worse answers.

    Args:
        messages: (role, text) of the prompt and of what comes before it.
        chosen: better, or correct, answers.
        rejected: worse, or wrong, ones.
        video: path of the clip; "" for none.
        columns: all columns of the row.
    """

    messages: tuple[tuple[str, str], ...]
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    video: str
    columns: Mapping[str, Any]

    @property
    def conversation(self) -> tuple[tuple[tuple[str, str], ...], str]:
        """Earlier (prompt, answer) turns and the last prompt; raises ValueError if the roles do not alternate."""
        texts = [(role, text) for role, text in self.messages if role != "system"]
        if [role for role, _ in texts] != ["user", "assistant"] * (len(texts) // 2) + ["user"]:
            raise ValueError("messages of prompt must alternate between user and assistant and end with user")
        turns = tuple((texts[place][1], texts[place + 1][1]) for place in range(0, len(texts) - 1, 2))
        return turns, texts[-1][1]

    @property
    def prompt(self) -> str:
        """The prompt as one text; several messages follow each other, each with its role."""
        if len(self.messages) == 1:
            return self.messages[0][1]
        return "\n\n".join(f"{role}: {text}" for role, text in self.messages)


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the JSON values of a file with their line numbers: lines of a JSONL file, or items of a JSON list.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not JSON; the message names file and line.
    """
    if path.suffix == ".parquet":
        raise ValueError(f"{path} is a Parquet file: convert it to JSON lines, for example by pandas' to_json")
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        first = next((line.lstrip() for line in file if line.strip()), "")
    yield from list_items(path) if first.startswith("[") else line_items(path)


def parse_row(value: Any) -> PreferenceRow:
    """Parse one row.

    Raises:
        ValueError: a column is missing or of the wrong type.
    """
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}: {EXPECTED}")
    chosen, rejected = value.get("chosen"), value.get("reject", value.get("rejected"))
    prompt = value.get("prompt", value.get("question"))
    if prompt is None:  # TRL treats the messages before both answers as the prompt, if they are the same
        before, other = (one[:-1] if isinstance(one, list) else [] for one in (chosen, rejected))
        if before and before == other and all(isinstance(one, dict) for one in before):
            prompt = before
    named = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    if missing := [name for name, one in named.items() if one is None]:
        raise ValueError(f"{' and '.join(missing)} missing: expected {EXPECTED}")
    answers = _parse_answers(chosen, "chosen"), _parse_answers(rejected, "rejected")
    return PreferenceRow(_parse_messages(prompt), *answers, video=_parse_video(value), columns=value)


def _parse_messages(value: Any) -> tuple[tuple[str, str], ...]:
    if isinstance(value, str):
        return (("user", value),)
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise ValueError(f"prompt must be a text or a list of messages, got {value!r:.80}")
    return tuple((str(message.get("role")), _text_of(message)) for message in value)


def _parse_answers(value: Any, name: str) -> tuple[str, ...]:
    """Return the answers in a column: a text, a list of texts, or a conversation that ends with one."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        return tuple(value)
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        return (_text_of(value[-1]),)
    raise ValueError(f"{name} must be a text, a list of texts or a list of messages, got {value!r:.80}")


def _text_of(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content if part.get("type") == "text")
    if not isinstance(content, str):
        raise ValueError(f"a message has no text: {message!r:.80}")
    return content


def _parse_video(value: Mapping[str, Any]) -> str:
    videos = value.get("videos") or []
    if not isinstance(videos, list) or len(videos) > 1:
        raise ValueError(f"videos must be a list of one path, got {videos!r:.80}")
    video = value.get("video") or value.get("video_path") or (videos[0] if videos else "")
    if not isinstance(video, str):
        raise ValueError(f"video must be a path, got {video!r:.80}")
    return video
