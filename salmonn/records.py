"""Records of what goes on disk, one JSON object a line, written atomically.

Every stage of the loop reads and writes these: references in, captions, scores and pairs out.
Nothing here needs torch, so annotation and scoring run on any machine.
"""

import dataclasses
import json
import math
import os
import shutil
import types
import typing
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

EventModality = Literal["visual", "audio", "speech"]
Modality = Literal["both", "visual", "audio"]
FailureStage = Literal["read", "caption", "write"]
Record = TypeVar("Record")


@dataclass(frozen=True)
class Event:
    """One atomic event: one fact that a caption can tell, miss or get wrong.

    Args:
        text: the fact as a short clause, for example "a red circle moves to the left".
        modality: whether it is seen, heard, or said.
        start_seconds, end_seconds: when it happens, from the start of the video; None where unknown.
    """

    text: str
    modality: EventModality = "visual"
    start_seconds: float | None = None
    end_seconds: float | None = None

    @property
    def is_audible(self) -> bool:
        """Whether it is in the sound: speech is, too."""
        return self.modality != "visual"

    def precedes(self, other: "Event") -> bool:
        """Whether it ended before the other began; one that starts as the other starts never precedes it."""
        if self.start_seconds is None or self.end_seconds is None or other.start_seconds is None:
            return False
        return self.end_seconds <= other.start_seconds and self.start_seconds < other.start_seconds

    def lies_within(self, start_seconds: float | None, end_seconds: float | None) -> bool:
        """Whether at least half of it lies in the span; an open end (None) has no limit, an untimed event no place.

        An event without length lies in the span from its start up to, not including, its end.
        """
        if start_seconds is None and end_seconds is None:
            return True
        if self.start_seconds is None:
            return False
        first = -math.inf if start_seconds is None else start_seconds
        last = math.inf if end_seconds is None else end_seconds
        end = self.start_seconds if self.end_seconds is None else self.end_seconds
        if end <= self.start_seconds:
            return first <= self.start_seconds < last
        return min(end, last) - max(self.start_seconds, first) >= (end - self.start_seconds) / 2


@dataclass(frozen=True)
class Question:
    """A question about a video with its short answer; `kind` groups questions in reports."""

    question: str
    answer: str
    kind: str = "open"


@dataclass(frozen=True)
class Reference:
    """What is known about one video.

    Args:
        video: path of the file, relative to the folder of the JSONL file that holds this record (or absolute).
        events: the atomic events in order of time.
        caption: the full reference caption (the *ground truth* of guided DPO).
        human_caption: an imperfect caption, as an annotator in a hurry would write it.
        visual_caption, audio_caption: what is seen alone, and what is heard alone.
        questions: questions and answers on the video.
    """

    video: str
    events: tuple[Event, ...] = ()
    caption: str = ""
    human_caption: str = ""
    visual_caption: str = ""
    audio_caption: str = ""
    questions: tuple[Question, ...] = ()
    duration_seconds: float | None = None


@dataclass(frozen=True)
class Caption:
    """An answer that a model gave on a video.

    Args:
        video: path of the file, as in the reference.
        text: the answer.
        prompt: what was asked.
        model: folder or hub id of the model.
        sample: number of the sample, where several were drawn for one video.
        finished: False where the answer ran into its token limit.
        start_seconds, end_seconds: the part of the video that it is about; None where that is open.
        size_bytes, modified_ns: of the file when it was captioned, modified in nanoseconds since 1970; None where that
            was not asked. With the path they tell whether a file is the one that was captioned.
        segment: index of the segment that it is about, where the video was cut into `num_segments`.
        num_failed_segments: how many of these could not be captioned.
    """

    video: str
    text: str
    prompt: str = ""
    model: str = ""
    sample: int = 0
    finished: bool = True
    start_seconds: float | None = None
    end_seconds: float | None = None
    size_bytes: int | None = None
    modified_ns: int | None = None
    segment: int = 0
    num_segments: int = 1
    num_failed_segments: int = 0


@dataclass(frozen=True)
class Failure:
    """A video, or a part of one, that could not be captioned.

    Args:
        video: path of the file.
        reason: why, and what to do.
        stage: where it failed: reading the file, in the model, or writing what it said.
        start_seconds, end_seconds: the part of the video; None where that is open.
        size_bytes, modified_ns: of the file, as in `Caption`.
    """

    video: str
    reason: str
    stage: FailureStage = "read"
    start_seconds: float | None = None
    end_seconds: float | None = None
    size_bytes: int | None = None
    modified_ns: int | None = None


@dataclass(frozen=True)
class Mention:
    """An event that a caption tells.

    Args:
        event: the event.
        quote: the caption's words that tell it; "" where the judge does not say.
        is_correct: False where something that matters is told wrong.
        reason: what is wrong, where it does not show in the quote; "" where the judge does not say.
    """

    event: Event
    quote: str = ""
    is_correct: bool = True
    reason: str = ""


@dataclass(frozen=True)
class Score:
    """The judgement of one caption against N events: N = missing + incorrect + correct.

    Args:
        video, sample: which caption.
        num_events: N.
        missing, incorrect, hallucinated: counts.
        num_words, num_repeated_words: of the caption's words so many stand in repeated clauses.
        finished: False where the caption ran into its token limit.
        missed: texts of the events that are not told.
        mentions: the events that are told, rightly or not, in the order in which the caption tells them.
        hallucinations: the caption's words that tell of no event.
        repeated: the caption's words that say in other words what it says elsewhere, where the judge tells them.
        start_seconds, end_seconds: the part of the video that the caption is about, as in the caption.
    """

    video: str
    num_events: int
    missing: int
    incorrect: int
    hallucinated: int
    num_words: int = 0
    num_repeated_words: int = 0
    sample: int = 0
    finished: bool = True
    missed: tuple[str, ...] = ()
    mentions: tuple[Mention, ...] = ()
    hallucinations: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    start_seconds: float | None = None
    end_seconds: float | None = None

    @property
    def incorrect_events(self) -> tuple[str, ...]:
        """Texts of the events that are told wrong."""
        return tuple(mention.event.text for mention in self.mentions if not mention.is_correct)

    @property
    def total(self) -> float:
        """(missing + incorrect + hallucinated) / N, with N at least 1 so that a video without events counts errors."""
        return (self.missing + self.incorrect + self.hallucinated) / max(self.num_events, 1)

    @property
    def repetition(self) -> float:
        """Share of the caption's words that belong to repeated clauses."""
        return self.num_repeated_words / max(self.num_words, 1)


@dataclass(frozen=True)
class Unscored:
    """A caption that the judge could not judge, and why."""

    video: str
    reason: str
    sample: int = 0
    start_seconds: float | None = None
    end_seconds: float | None = None


@dataclass(frozen=True)
class JudgeInfo:
    """How a set of captions was judged.

    Args:
        judge: who judged: "rule", or a model with its server.
        prompt_hash: of the words that the judge was asked with, or of the rules that it reads by.
        protocol: "salmonn" or "published".
        date: when, UTC, in ISO format.
        version: of salmonn.
        seeds: of each pass over the captions.
        totals: Total of each pass; None of one in which nothing could be scored.
        reported_pass: which pass the scores are from, counted from 0.
    """

    judge: str
    prompt_hash: str
    protocol: str
    date: str
    version: str
    seeds: tuple[int, ...] = (0,)
    totals: tuple[float | None, ...] = ()
    reported_pass: int = 0


@dataclass(frozen=True)
class Comparison:
    """Two answers to one prompt about a video, of which `chosen` is better than `rejected`.

    Selected pairs of mrDPO, votes and published preferences all become comparisons; every recipe reads them.

    Args:
        video: path of the file with the video, or the audio or image alone, as in `Reference.video`.
        prompt: the prompt that both answer.
        chosen, rejected: the better and the worse answer.
        ground_truth: a correct answer, for the cross-entropy term of guided DPO; "" where there is none.
        margin: how much better the chosen answer is, in units of the source's rating; None where it is unknown.
        source: who compared them: the name of a reward, "vote" or "published".
        chosen_finished, rejected_finished: False for an answer that was cut off at the token limit.
        history: earlier turns of the conversation, (prompt, answer) each.
        modality: what of the video the answers are about.
        audio: path of the audio track where it is a file of its own.
        start_seconds, end_seconds: the part of the video that the answers are about; None for an open end.
    """

    video: str
    prompt: str
    chosen: str
    rejected: str
    ground_truth: str = ""
    margin: float | None = None
    source: str = ""
    chosen_finished: bool = True
    rejected_finished: bool = True
    history: tuple[tuple[str, str], ...] = ()
    modality: Modality = "both"
    audio: str | None = None
    start_seconds: float | None = None
    end_seconds: float | None = None


def write_records(path: Path | str, records: Iterable[Any]) -> None:
    """Write dataclass records as JSONL; the file appears whole or not at all."""
    lines = (json.dumps(dataclasses.asdict(record), ensure_ascii=False) for record in records)
    write_text(path, "".join(line + "\n" for line in lines))


def append_record(path: Path | str, record: Any) -> None:
    """Add one record to a JSONL file and flush it to disk."""
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps(dataclasses.asdict(record), ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path | str, value: Any) -> None:
    """Write one JSON value, indented; the file appears whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path | str) -> Any:
    """Read one JSON value."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_text(path: Path | str, text: str) -> None:
    """Write a text file through a temporary name, flushed, so that a kill leaves the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """A folder to be filled under a temporary name; it takes its own, flushed, when the context ends without an error.

    Raises:
        ValueError: there is something of that name already, other than an empty folder.
    """
    path = Path(path).resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is not empty: choose another folder, or delete that one")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process of that number that was killed
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already where all went well


def read_records(path: Path | str, record_type: type[Record]) -> list[Record]:
    """Read a JSONL file of `record_type`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not JSON, or lacks or misnames a field; the message names file and line.
    """
    return list(iter_records(path, record_type))


def iter_records(path: Path | str, record_type: type[Record]) -> Iterator[Record]:
    """Like `read_records`, one record at a time."""
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is not there"
        raise FileNotFoundError(f"{path} {what}: expected a file with JSON lines of {record_type.__name__} records")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                # Some tools begin a file with a mark of its byte order.
                yield parse_record(json.loads(line.decode("utf-8-sig").rstrip()), record_type)
            except json.JSONDecodeError as error:
                words = f"{path}, line {number}: no JSON, or cut off: {error.msg}, column {error.colno}"
                raise ValueError(words) from error
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error


def parse_record(value: Any, record_type: type[Record]) -> Record:
    """Build a record from parsed JSON, checking field names and types all the way down.

    Raises:
        ValueError: naming the field that is missing, unknown or of the wrong type.
    """
    name = record_type.__name__
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object for {name}, got {type(value).__name__}")
    fields = {field.name: field for field in dataclasses.fields(record_type)}  # type: ignore[arg-type]
    unknown = sorted(set(value) - set(fields))
    if unknown:
        raise ValueError(f"unknown field {', '.join(unknown)} for {name}; it has {', '.join(fields)}{_guess(value)}")
    missing = [key for key, field in fields.items() if field.default is dataclasses.MISSING and key not in value]
    if missing:
        raise ValueError(f"{name} lacks {', '.join(missing)}")
    hints = typing.get_type_hints(record_type)
    return record_type(**{key: _parse_value(item, hints[key], where=f"{name}.{key}") for key, item in value.items()})


def _guess(value: dict[str, Any]) -> str:
    """What a record of the wrong kind may be, for messages."""
    for other, plural in ((Caption, "captions"), (Reference, "references"), (Comparison, "comparisons")):
        names = {field.name for field in dataclasses.fields(other)}
        required = {field.name for field in dataclasses.fields(other) if field.default is dataclasses.MISSING}
        if required <= set(value) <= names:
            return f". These are {plural}: is it the right file?"
    return ". This is a score file: is it the right one?" if "judge_info" in value else ""


def _parse_value(value: Any, hint: Any, *, where: str) -> Any:
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        return parse_record(value, hint)  # type: ignore[arg-type]
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list, got {value!r}")
        item_hint = typing.get_args(hint)[0]
        return tuple(_parse_value(item, item_hint, where=where) for item in value)
    if origin is Literal:
        allowed, kinds = typing.get_args(hint), (str,)
        if value not in allowed:
            raise ValueError(f"{where} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    elif origin is types.UnionType:
        kinds = typing.get_args(hint)
    else:
        kinds = (hint,)
    # JSON writes 2.0 as 2 in some tools, so whole numbers are welcome where a float is; true is not a number.
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    _require_writable(value, where=where)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise ValueError(f"{where} must be {' or '.join(kind.__name__ for kind in kinds)}, got {value!r}")
    return value


def _require_writable(value: Any, *, where: str) -> None:
    """Refuse what JSON can hold and files or sums cannot."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} must be a number, got {value}")
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"{where} holds half of a Unicode character, which cannot be written: {value!r}")
