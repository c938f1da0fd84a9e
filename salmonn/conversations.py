"""Training data as the published repositories write it: conversations about clips, for SFT and for DPO.

A file is a JSON list of items, or JSON lines with one item each; docs/data.md shows every kind of item.
Two formats differ in how they name the sound and the answers of a preference, and both are read:
*salmonn2* (video-SALMONN 2) and *2+* (video-SALMONN 2+).
A mistake in the data is refused with the file and the line on which the item begins. The published loaders
swap an item that fails for a random other one instead, so what they were in truth trained on is not known.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from salmonn.records import Modality

MEDIA = ("video", "audio", "image")
FLAGS = ("use_audio", "ce_only", "should_use")
KEYS = (*MEDIA, *FLAGS, "timestamps", "conversations", "id", "num_tokens")  # the last two say nothing to learn from
SPEAKERS = ("system", "human", "gpt", "history_gpt", "reject_gpt", "gt", "chosen", "reject")
# What the answers to the last prompt of a preference are, by format. The same word, gpt, is not the same thing.
SALMONN2_FIELDS = {"gpt": "chosen", "reject_gpt": "rejected", "gt": "ground_truth"}
PLUS_FIELDS = {"chosen": "chosen", "reject": "rejected", "gpt": "ground_truth"}
TAG = re.compile("<(?:image|video|audio)>")
SPACE = re.compile(r"[ \t\r\n]*")

Exchange = tuple[str, list[tuple[str, str]]]  # a prompt, and who answered what


@dataclass(frozen=True)
class Turn:
    """A prompt and the answer to learn, after `history`: prompts and answers that are read and not learnt."""

    prompt: str
    answer: str
    history: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Preference:
    """To `prompt`, `chosen` is a better answer than `rejected`.

    `ground_truth` is for guided DPO's cross-entropy; "" where the data has none, which is enough for plain DPO.
    """

    prompt: str
    chosen: str
    rejected: str
    ground_truth: str = ""
    history: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Conversation:
    """What is to be learnt about one clip: answers (`turns`), or a preference; never both.

    Args:
        video, audio, image: paths as the file has them; see `resolve`. There is a video, an image or a sound file.
            A sound file beside a video takes the place of the video's own sound.
        use: whether picture, sound or both are learnt from. "both" without `audio` is the sound in the video file.
        start_seconds, end_seconds: the part of the clip that is meant; None for the whole.
        turns: each with all that was said before it as its history; none where there is a preference.
        preference: chosen against rejected.
    """

    video: str | None = None
    audio: str | None = None
    image: str | None = None
    modality: Modality = "both"
    start_seconds: float | None = None
    end_seconds: float | None = None
    turns: tuple[Turn, ...] = ()
    preference: Preference | None = None

    def resolve(self, root: Path) -> "Conversation":
        """The same with paths that start from `root`, the folder of the file; absolute paths stay as they are."""
        video, audio, image = (path and str(root / path) for path in (self.video, self.audio, self.image))
        return replace(self, video=video, audio=audio, image=image)


def is_conversation_file(path: Path | str) -> bool:
    """Whether a file holds published conversations, and not our own references; only its first item is looked at.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        first = next((line.lstrip() for line in file if line.strip()), "")
    if first.startswith("["):
        return True  # references are JSON lines, never a list
    try:
        item = json.loads(first)
    except json.JSONDecodeError:
        return path.suffix == ".json"
    return isinstance(item, dict) and "conversations" in item


def read_conversations(path: Path | str) -> list[Conversation]:
    """Read a .json or .jsonl file of published conversations.

    An item with `should_use: false` is left out: the published splitter of test sets fills up shards with such copies.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there is no item, the file is malformed or an item is not as it must be; the message names the
            file, the line (on which the item begins) and what to mend.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: expected a .json or .jsonl file of conversations there")
    if path.suffix not in (".json", ".jsonl"):
        raise ValueError(f"{path} must be named .json (a list of items) or .jsonl (one item a line)")
    conversations = []
    for line, value in _list_items(path) if path.suffix == ".json" else _line_items(path):
        try:
            conversation = parse_conversation(value)
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {error}") from error
        if value.get("should_use") is not False:
            conversations.append(conversation)
    if not conversations:
        raise ValueError(f"{path} holds no conversation: it needs at least one item that is to be used")
    return conversations


def _line_items(path: Path) -> Iterator[tuple[int, Any]]:
    """The items of JSON lines with their line numbers; blank lines are passed over."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line.decode("utf-8-sig").rstrip())
            except json.JSONDecodeError as error:
                hint = "; a file that holds a list is named .json" if line.lstrip().startswith(b"[") else ""
                fault = f"not JSON at column {error.colno}: {error.msg}{hint}"
                raise ValueError(f"{path}, line {number}: {fault}") from error
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: not UTF-8 text: save the file as UTF-8") from error
            yield number, value


def _list_items(path: Path) -> Iterator[tuple[int, Any]]:
    """The items of a JSON list with the numbers of the lines that they begin on.

    They are decoded one by one, since a list decoded whole no longer knows where its items stood.
    """
    text = _read_text(path)
    position = _skip_space(text, 0)
    if not text.startswith("[", position):
        fault = "expected a list of items: put [ ] around them, or name a file with one item a line .jsonl"
        raise ValueError(f"{path}, line {_line_of(text, position)}: {fault}")
    decoder = json.JSONDecoder()
    position = _skip_space(text, position + 1)
    if text.startswith("]", position):
        return
    line, counted, separator = 1, 0, ","
    while separator == ",":
        # Counted from one item to the next: from the start each time, a long file would take for ever.
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {error.lineno}: not JSON at column {error.colno}: {error.msg}") from error
        yield line, value
        end = _skip_space(text, position)
        separator = text[end : end + 1]
        position = _skip_space(text, end + 1)
    if separator != "]":
        fault = "the list does not go on: expected a comma and an item, or ] at its end"
        raise ValueError(f"{path}, line {_line_of(text, end)}: {fault}")
    if position < len(text):
        raise ValueError(f"{path}, line {_line_of(text, position)}: take out what stands after the list's end")


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 text: save the file as UTF-8") from error


def _skip_space(text: str, position: int) -> int:
    """Where the next JSON token begins."""
    match = SPACE.match(text, position)
    assert match is not None, "the pattern matches nothing, too"
    return match.end()


def _line_of(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def parse_conversation(item: Any) -> Conversation:
    """Build a conversation from the parsed JSON of one item, where null is as good as absent.

    Raises:
        ValueError: saying what is wrong with the item, and what to mend.
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
    spoken = _parse_spoken(item.get("conversations"))
    spoken[0] = ("human", _take_out_tag(spoken[0][1], paths))
    turns, preference = _parse_exchanges(_group(spoken), ce_only=bool(item.get("ce_only")))
    return Conversation(
        **paths, modality=modality, start_seconds=start, end_seconds=end, turns=turns, preference=preference
    )


def _parse_path(value: Any, key: str) -> str:
    """A path, which may stand in a list of its own."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, list):
        raise ValueError(f"{key} lists {len(value)} paths: several clips in one conversation are not supported")
    if not isinstance(value, str) or not value:
        raise ValueError(f"{key} must be a path, got {value!r}")
    return value


def _parse_modality(paths: dict[str, str], use_audio: bool | None) -> Modality:
    """What an item is learnt from: a video alone is its picture, unless `use_audio` or a sound file says otherwise."""
    if not paths:
        raise ValueError("there is no clip: give a video, an audio or an image; text alone is not supported")
    if "image" in paths and len(paths) > 1:
        others = " and ".join(key for key in paths if key != "image")
        raise ValueError(f"an image beside {others}: several clips in one conversation are not supported")
    if use_audio is False and "audio" in paths:
        raise ValueError("use_audio is false although audio names a file: leave one of them out")
    if use_audio and "image" in paths:
        raise ValueError("use_audio is true, but an image has no sound: leave it out")
    if "video" in paths:
        return "both" if use_audio or "audio" in paths else "visual"
    return "audio" if "audio" in paths else "visual"


def _parse_timestamps(value: Any, paths: dict[str, str]) -> tuple[float | None, float | None]:
    if value is None:
        return None, None
    if "image" in paths:
        raise ValueError("an image has no timestamps: leave them out")
    if not isinstance(value, list) or len(value) != 2 or any(type(time) not in (int, float) for time in value):
        raise ValueError(f"timestamps must be [start, end] in seconds, got {value!r}")
    start, end = value
    if not 0 <= start < end or math.isinf(end):
        raise ValueError(f"timestamps must begin at 0 or later and end after they begin, got {value!r}")
    return float(start), float(end)


def _parse_spoken(value: Any) -> list[tuple[str, str]]:
    """Who says what, from the first prompt on."""
    if value is None:
        raise ValueError('the item lacks conversations: a list of {"from": "human", "value": ...} and answers')
    if not isinstance(value, list):
        raise ValueError(f"conversations must be a list of turns, got {type(value).__name__}")
    spoken = [_parse_turn(turn, place) for place, turn in enumerate(value, start=1)]
    # Both published codes drop a first turn that is not the human's, be it a system's words or a greeting, and
    # begin with a system's words of their own.
    if spoken and spoken[0][0] in ("system", "gpt"):
        spoken = spoken[1:]
    if all(speaker != "human" for speaker, _ in spoken):
        raise ValueError("conversations has no human turn: write the prompt as one")
    if spoken[0][0] != "human":
        raise ValueError(f"conversations must begin with a human turn, not {spoken[0][0]}")
    return spoken


def _parse_turn(turn: Any, place: int) -> tuple[str, str]:
    """Speaker and words of one turn. `prefix`, how the answer begins when the published code is tested, is not read."""
    if not isinstance(turn, dict):
        raise ValueError(f"turn {place} must be a JSON object, got {type(turn).__name__}")
    keys = turn.keys() - {"prefix"}
    if keys not in ({"from", "value"}, {"role", "content"}):
        raise ValueError(f"turn {place} must have from and value (or role and content), got {', '.join(turn)}")
    speaker, words = (turn["from"], turn["value"]) if "from" in keys else (turn["role"], turn["content"])
    if speaker not in SPEAKERS:
        raise ValueError(f"turn {place} is of an unknown speaker {speaker!r}; known are {', '.join(SPEAKERS)}")
    if not isinstance(words, str):
        raise ValueError(f"turn {place} must be text, got {words!r}")
    if not words.strip():
        raise ValueError(f"turn {place} ({speaker}) is empty: write what is said, or leave the item out")
    return speaker, words


def _take_out_tag(prompt: str, paths: dict[str, str]) -> str:
    """The first prompt without the tag that stands for the clip, which is put before the prompt in any case.

    salmonn2 moves a tag within the words to their front in this way, too; 2+ leaves the clip among the words.
    """
    tags = TAG.findall(prompt)
    if len(tags) > 1:
        raise ValueError(f"the first prompt has {len(tags)} tags ({', '.join(tags)}): one stands for the whole clip")
    if not tags:
        return prompt
    # <image> stands for any clip in salmonn2; a video with sound is one clip, so <audio> is for sound alone.
    wanted = f"<{next(key for key in MEDIA if key in paths)}>"
    if tags[0] not in ("<image>", wanted):
        raise ValueError(f"the first prompt has the tag {tags[0]}, but the clip is {wanted[1:-1]}: write {wanted}")
    without = prompt.removeprefix(tags[0] + "\n")
    if tags[0] in without:
        without = without.replace(tags[0], "").strip()
    if not without.strip():
        raise ValueError(f"the first prompt is empty but for {tags[0]}: write what is asked")
    return without


def _group(spoken: Sequence[tuple[str, str]]) -> list[Exchange]:
    """Each prompt with its answers."""
    exchanges: list[Exchange] = []
    for place, (speaker, words) in enumerate(spoken):
        if place and TAG.search(words):
            raise ValueError(
                f"a later turn ({speaker}) has a tag: only the first prompt may have one, for the one clip"
            )
        if speaker == "system":
            raise ValueError("a system turn may only stand first, where it is dropped: take it out")
        if speaker == "human":
            exchanges.append((words, []))
        else:
            exchanges[-1][1].append((speaker, words))
    return exchanges


def _parse_exchanges(exchanges: list[Exchange], *, ce_only: bool) -> tuple[tuple[Turn, ...], Preference | None]:
    """What is learnt: turns, or a preference between answers to the last prompt."""
    speakers = {speaker for _, answers in exchanges for speaker, _ in answers}
    salmonn2, plus = sorted(speakers & {"reject_gpt", "gt"}), sorted(speakers & {"chosen", "reject"})
    if salmonn2 and plus:
        raise ValueError(
            f"{', '.join(salmonn2)} of the salmonn2 format stands with {', '.join(plus)} of the 2+ format: "
            "use gpt, reject_gpt, gt or chosen, reject, gpt"
        )
    if not (salmonn2 or plus):
        return _learn_turns(exchanges), None
    preference = _learn_preference(exchanges, SALMONN2_FIELDS if salmonn2 else PLUS_FIELDS)
    if not ce_only:
        return (), preference
    # Published DPO learns nothing but the ground truth of such an item.
    if not preference.ground_truth:
        raise ValueError(f"ce_only learns the ground truth, and there is none: add {'gt' if salmonn2 else 'gpt'}")
    return (Turn(preference.prompt, preference.ground_truth, preference.history),), None


def _learn_turns(exchanges: Sequence[Exchange]) -> tuple[Turn, ...]:
    history = _tell_history(exchanges)
    turns = tuple(
        Turn(prompt, answer, history[:place])
        for place, (prompt, answer) in enumerate(history)
        if exchanges[place][1][0][0] == "gpt"
    )
    if not turns:
        raise ValueError("there is no gpt turn: history_gpt is read and not learnt, so nothing would be")
    return turns


def _learn_preference(exchanges: Sequence[Exchange], fields: dict[str, str]) -> Preference:
    *earlier, (prompt, answers) = exchanges
    found: dict[str, str] = {}
    for speaker, words in answers:
        if speaker not in fields:
            raise ValueError(f"{speaker} answers the last prompt of a preference, where {', '.join(fields)} may")
        if fields[speaker] in found:
            raise ValueError(f"{speaker} answers the last prompt twice: leave one out")
        found[fields[speaker]] = words
    if lacking := [speaker for speaker, field in fields.items() if field not in (*found, "ground_truth")]:
        raise ValueError(f"a preference needs {' and '.join(lacking)} after the last prompt")
    return Preference(prompt, **found, history=_tell_history(earlier))


def _tell_history(exchanges: Iterable[Exchange]) -> tuple[tuple[str, str], ...]:
    """Prompts and answers, where each prompt has one answer."""
    for prompt, answers in exchanges:
        names = [speaker for speaker, _ in answers]
        if names not in (["gpt"], ["history_gpt"]):
            got = ", ".join(names) or "none"
            raise ValueError(f"the prompt {prompt[:40]!r} needs one answer, gpt or history_gpt; it has {got}")
    return tuple((prompt, answers[0][1]) for prompt, answers in exchanges)
