"""Conversations about clips, as the published repositories write them: training data for SFT and DPO.

A file is a JSON list of items, or JSON lines with one item each; docs/data.md shows every kind of item.
The two formats name the audio and the answers of a preference differently, and both are read:
*salmonn2* (video-SALMONN 2) and *2+* (video-SALMONN 2+).
A mistake in the data is an error with the file and the line on which the item starts. The published loaders replace an
item that fails by a random other one, so that it is unknown what they trained on.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from salmonn.records import Modality

MEDIA = ("video", "audio", "image")
FLAGS = ("use_audio", "ce_only", "should_use")
KEYS = (*MEDIA, *FLAGS, "timestamps", "conversations", "id", "num_tokens")  # the last two are ignored
SPEAKERS = ("system", "human", "gpt", "history_gpt", "reject_gpt", "gt", "chosen", "reject")
# Roles of the answers to the last prompt of a preference, by format. Note that gpt means different things.
SALMONN2_FIELDS = {"gpt": "chosen", "reject_gpt": "rejected", "gt": "ground_truth"}
PLUS_FIELDS = {"chosen": "chosen", "reject": "rejected", "gpt": "ground_truth"}
TAG = re.compile("<(?:image|video|audio)>")
SPACE = re.compile(r"[ \t\r\n]*")
UNREADABLE = "not readable JSON: brackets are nested too deeply, or a number has thousands of digits"

Exchange = tuple[str, list[tuple[str, str]]]  # a prompt, and its answers as (speaker, text)


@dataclass(frozen=True)
class Turn:
    """A prompt and the answer to learn. `history` holds earlier prompts and answers, which are input only."""

    prompt: str
    answer: str
    history: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Preference:
    """Two answers to `prompt`; `chosen` is better than `rejected`.

    `ground_truth` is for the cross-entropy term of guided DPO; "" if the data has none, which suffices for plain DPO.
    """

    prompt: str
    chosen: str
    rejected: str
    ground_truth: str = ""
    history: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Conversation:
    """Training example about one clip: answers to learn (`turns`) or a preference, never both.

    Args:
        video, audio, image: paths as in the file, from whose folder relative ones start. At least one of them is given.
            An audio file next to a video replaces the video's own audio.
        modality: what of the clip is input. "both" without `audio` uses the audio in the video file.
        start_seconds, end_seconds: the part of the clip that is input; None for an open end.
        turns: answers to learn, each with all earlier turns as its history; empty if there is a preference.
        preference: a chosen and a rejected answer.
    """

    video: str | None = None
    audio: str | None = None
    image: str | None = None
    modality: Modality = "both"
    start_seconds: float | None = None
    end_seconds: float | None = None
    turns: tuple[Turn, ...] = ()
    preference: Preference | None = None


def is_conversation_file(path: Path | str) -> bool:
    """Return whether a file holds published conversations rather than references, by its first item.

    Raises:
        FileNotFoundError: the file does not exist.
    """
    path = Path(path)
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        first = next((line.lstrip() for line in file if line.strip()), "")
    if first.startswith("["):
        return True  # references are JSON lines, never a list
    try:
        item = json.loads(first)
    except (ValueError, RecursionError):
        return path.suffix == ".json"
    return isinstance(item, dict) and "conversations" in item


def read_conversations(path: Path | str, *, check: Callable[[Conversation], None] | None = None) -> list[Conversation]:
    """Read a .json or .jsonl file of published conversations.

    Items with `should_use: false` are skipped: the published script that splits test sets pads shards with such copies.

    Args:
        path: the file.
        check: raises a ValueError for a conversation that cannot be used; the message gets file and line.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file has no item or is malformed, or an item is invalid; the message names the file, the line on
            which the item starts, and what to correct.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: expected a .json or .jsonl file of conversations there")
    if path.suffix not in (".json", ".jsonl"):
        raise ValueError(f"{path} must be named .json (a list of items) or .jsonl (one item a line)")
    conversations = []
    for line, value in list_items(path) if path.suffix == ".json" else line_items(path):
        try:
            conversation = parse_conversation(value)
            if check and value.get("should_use") is not False:
                check(conversation)
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {error}") from error
        if value.get("should_use") is not False:
            conversations.append(conversation)
    if not conversations:
        raise ValueError(f"{path} holds no conversation: add at least one item without should_use: false")
    return conversations


def line_items(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the items of a JSONL file with their line numbers; blank lines are skipped."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line.decode("utf-8-sig").rstrip())
            except json.JSONDecodeError as error:
                hint = "; a file that holds a list must be named .json" if line.lstrip().startswith(b"[") else ""
                fault = f"not JSON at column {error.colno}: {error.msg}{hint}"
                raise ValueError(f"{path}, line {number}: {fault}") from error
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: not UTF-8 text: save the file as UTF-8") from error
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: {UNREADABLE}") from error
            yield number, value


def list_items(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the items of a JSON list with the numbers of the lines on which they start.

    They are decoded one by one, because decoding the whole list would lose their positions.
    """
    text = _read_text(path)
    line, counted = 1, 0

    def fail(position: int, fault: str) -> ValueError:
        at_line = line + text.count("\n", counted, position)
        return ValueError(f"{path}, line {at_line}: {fault}")

    position = _skip_space(text, 0)
    if not text.startswith("[", position):
        raise fail(position, "expected a list of items: put [ ] around them, or name a file of JSON lines .jsonl")
    decoder = json.JSONDecoder()
    position = _skip_space(text, position + 1)
    if text.startswith("]", position):
        return
    separator = ","
    while separator == ",":
        # Counted from item to item: counting from the start of the file each time takes quadratic time.
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {error.lineno}: not JSON at column {error.colno}: {error.msg}") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {line}: {UNREADABLE}") from error
        yield line, value
        end = _skip_space(text, position)
        separator = text[end : end + 1]
        position = _skip_space(text, end + 1)
    if separator != "]":
        raise fail(end, "unfinished list: expected a comma and an item, or ] at its end")
    if position < len(text):
        raise fail(position, "remove the text after the end of the list")


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 text: save the file as UTF-8") from error


def _skip_space(text: str, position: int) -> int:
    """Return the position of the next JSON token."""
    match = SPACE.match(text, position)
    assert match is not None, "the pattern also matches an empty string"
    return match.end()


def parse_conversation(item: Any) -> Conversation:
    """Build a conversation from the parsed JSON of one item; a null value counts as absent.

    Raises:
        ValueError: the item is invalid; the message says what to correct.
    """
    if not isinstance(item, dict):
        raise ValueError(f"expected a JSON object with conversations, got {type(item).__name__}")
    if unknown := sorted(item.keys() - KEYS):
        raise ValueError(f"unknown key {', '.join(unknown)}; an item has {', '.join(KEYS)}")
    for key in FLAGS:
        if not isinstance(item.get(key), bool | None):
            raise ValueError(f"{key} must be true or false, got {item[key]!r}")
    paths = {key: _parse_path(item[key], key) for key in MEDIA if item.get(key) is not None}
    modality = _parse_modality(paths, item.get("use_audio"))
    start, end = _parse_timestamps(item.get("timestamps"), paths)
    messages = _parse_messages(item.get("conversations"))
    messages[0] = ("human", _remove_tag(messages[0][1], paths))
    turns, preference = _parse_exchanges(_group_by_prompt(messages), ce_only=bool(item.get("ce_only")))
    return Conversation(
        **paths, modality=modality, start_seconds=start, end_seconds=end, turns=turns, preference=preference
    )


def _parse_path(value: Any, key: str) -> str:
    """Return a path, given by itself or as a list of one."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, list):
        raise ValueError(f"{key} lists {len(value)} paths: several clips in one conversation are not supported")
    if not isinstance(value, str) or not value:
        raise ValueError(f"{key} must be a path, got {value!r}")
    return value


def _parse_modality(paths: dict[str, str], use_audio: bool | None) -> Modality:
    """Return what of a clip is input: of a video only the frames, unless `use_audio` or an audio file adds audio."""
    if not paths:
        raise ValueError("there is no clip: add a video, an audio or an image; text alone is not supported")
    if "image" in paths and len(paths) > 1:
        others = " and ".join(key for key in paths if key != "image")
        raise ValueError(f"an image together with {others}: several clips in one conversation are not supported")
    if use_audio is False and "audio" in paths:
        raise ValueError("use_audio is false although audio names a file: remove one of them")
    if use_audio and "image" in paths:
        raise ValueError("use_audio is true, but an image has no audio: remove it")
    if "video" in paths:
        return "both" if use_audio or "audio" in paths else "visual"
    return "audio" if "audio" in paths else "visual"


def _parse_timestamps(value: Any, paths: dict[str, str]) -> tuple[float | None, float | None]:
    if value is None:
        return None, None
    if "image" in paths:
        raise ValueError("an image has no timestamps: remove them")
    if not isinstance(value, list) or len(value) != 2 or any(type(time) not in (int, float) for time in value):
        raise ValueError(f"timestamps must be [start, end] in seconds, got {value!r}")
    start, end = value
    if not 0 <= start < end <= sys.float_info.max:
        raise ValueError(f"timestamps must start at 0 or later and end after their start, got {value!r:.80}")
    return float(start), float(end)


def _parse_messages(value: Any) -> list[tuple[str, str]]:
    """Return (speaker, text) of each turn, from the first prompt on."""
    if value is None:
        raise ValueError('conversations is missing: add a list of {"from": "human", "value": ...} and answers')
    if not isinstance(value, list):
        raise ValueError(f"conversations must be a list of turns, got {type(value).__name__}")
    messages = [_parse_message(turn, place) for place, turn in enumerate(value, start=1)]
    # The code of both published models drops a first turn that is a system prompt or a greeting, and starts with a
    # system prompt of its own.
    if messages and messages[0][0] in ("system", "gpt"):
        messages = messages[1:]
    if all(speaker != "human" for speaker, _ in messages):
        raise ValueError("conversations has no human turn: write the prompt as one")
    if messages[0][0] != "human":
        raise ValueError(f"conversations must start with a human turn, not {messages[0][0]}")
    return messages


def _parse_message(turn: Any, place: int) -> tuple[str, str]:
    """Return speaker and text of one turn. `prefix` (start of the answer in published tests) is ignored."""
    if not isinstance(turn, dict):
        raise ValueError(f"turn {place} must be a JSON object, got {type(turn).__name__}")
    keys = turn.keys() - {"prefix"}
    if keys not in ({"from", "value"}, {"role", "content"}):
        raise ValueError(f"turn {place} must have from and value (or role and content), got {', '.join(turn)}")
    speaker, text = (turn["from"], turn["value"]) if "from" in keys else (turn["role"], turn["content"])
    if speaker not in SPEAKERS:
        raise ValueError(f"turn {place} has an unknown speaker {speaker!r}; known are {', '.join(SPEAKERS)}")
    if not isinstance(text, str):
        raise ValueError(f"turn {place} must be text, got {text!r}")
    if not text.strip():
        raise ValueError(f"turn {place} ({speaker}) is empty: add its text, or remove the item")
    return speaker, text


def _remove_tag(prompt: str, paths: dict[str, str]) -> str:
    """Return the first prompt without the placeholder of the clip, which always comes before the prompt.

    For a tag within the text, this is also what salmonn2 does; 2+ leaves the clip within the text.
    """
    tags = TAG.findall(prompt)
    if len(tags) > 1:
        raise ValueError(f"the first prompt has {len(tags)} tags ({', '.join(tags)}): use one for the whole clip")
    if not tags:
        return prompt
    # In salmonn2, <image> is the placeholder of any clip. A video with audio is one clip, so <audio> is for audio only.
    expected = f"<{next(key for key in MEDIA if key in paths)}>"
    if tags[0] not in ("<image>", expected):
        raise ValueError(f"the first prompt has the tag {tags[0]}, but the clip is {expected[1:-1]}: write {expected}")
    without = prompt.removeprefix(tags[0] + "\n")
    if tags[0] in without:
        without = without.replace(tags[0], "").strip()
    if not without.strip():
        raise ValueError(f"the first prompt has only the tag {tags[0]}: add the prompt")
    return without


def _group_by_prompt(messages: Sequence[tuple[str, str]]) -> list[Exchange]:
    """Group each prompt with its answers."""
    exchanges: list[Exchange] = []
    for place, (speaker, text) in enumerate(messages):
        if place and TAG.search(text):
            raise ValueError(f"a later turn ({speaker}) has a tag: only the first prompt may have one")
        if speaker == "system":
            raise ValueError("a system turn may only come first (where it is ignored): remove it")
        if speaker == "human":
            exchanges.append((text, []))
        else:
            exchanges[-1][1].append((speaker, text))
    return exchanges


def _parse_exchanges(exchanges: list[Exchange], *, ce_only: bool) -> tuple[tuple[Turn, ...], Preference | None]:
    """Return the turns to learn, or the preference between answers to the last prompt."""
    speakers = {speaker for _, answers in exchanges for speaker, _ in answers}
    salmonn2, plus = sorted(speakers & {"reject_gpt", "gt"}), sorted(speakers & {"chosen", "reject"})
    if salmonn2 and plus:
        raise ValueError(
            f"{', '.join(salmonn2)} of the salmonn2 format together with {', '.join(plus)} of the 2+ format: "
            "use gpt, reject_gpt, gt or chosen, reject, gpt"
        )
    if not (salmonn2 or plus):
        return _to_turns(exchanges), None
    preference = _to_preference(exchanges, SALMONN2_FIELDS if salmonn2 else PLUS_FIELDS)
    if not ce_only:
        return (), preference
    # Published DPO learns only the ground truth of such an item.
    if not preference.ground_truth:
        raise ValueError(f"ce_only learns the ground truth, which is missing: add {'gt' if salmonn2 else 'gpt'}")
    return (Turn(preference.prompt, preference.ground_truth, preference.history),), None


def _to_turns(exchanges: Sequence[Exchange]) -> tuple[Turn, ...]:
    history = _to_history(exchanges)
    turns = tuple(
        Turn(prompt, answer, history[:place])
        for place, (prompt, answer) in enumerate(history)
        if exchanges[place][1][0][0] == "gpt"
    )
    if not turns:
        raise ValueError("there is no gpt turn, so there is nothing to learn (history_gpt is input only)")
    return turns


def _to_preference(exchanges: Sequence[Exchange], fields: dict[str, str]) -> Preference:
    *earlier, (prompt, answers) = exchanges
    found: dict[str, str] = {}
    for speaker, text in answers:
        if speaker not in fields:
            raise ValueError(f"{speaker} may not answer the last prompt of a preference; {', '.join(fields)} may")
        if fields[speaker] in found:
            raise ValueError(f"{speaker} answers the last prompt twice: remove one")
        found[fields[speaker]] = text
    if missing := [speaker for speaker, field in fields.items() if field not in (*found, "ground_truth")]:
        raise ValueError(f"a preference needs {' and '.join(missing)} after the last prompt")
    return Preference(prompt, **found, history=_to_history(earlier))


def _to_history(exchanges: Iterable[Exchange]) -> tuple[tuple[str, str], ...]:
    """Return (prompt, answer) pairs; raise ValueError unless each prompt has exactly one answer."""
    for prompt, answers in exchanges:
        names = [speaker for speaker, _ in answers]
        if names not in (["gpt"], ["history_gpt"]):
            got = ", ".join(names) or "none"
            raise ValueError(f"the prompt {prompt[:40]!r} needs one answer, gpt or history_gpt; it has {got}")
    return tuple((prompt, answers[0][1]) for prompt, answers in exchanges)
