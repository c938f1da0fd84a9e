"""The files of scoring: score files; captions and references in our format (JSONL) or the published one (JSON).

A score file is JSONL. Its first line, `{"judge_info": {...}}`, holds judge, settings and date (`records.JudgeInfo`);
each further line is a `Score`, or an `Unscored` with its reason.

The published test set (video-SALMONN 2) is a JSON list of `{"video", "events": [text, ...]}`, predictions on it one of
`{"id": [video], "pred": text}`, where a text that holds `<|im_end|>` has come to its end.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from salmonn.records import (
    Caption,
    JudgeInfo,
    Record,
    Reference,
    Score,
    Unscored,
    parse_record,
    read_records,
    write_text,
)

logger = logging.getLogger(__name__)

END_OF_ANSWER = "<|im_end|>"
_PUBLISHED = "a JSON list, as the published test set has it,"


@dataclass(frozen=True)
class ScoreFile:
    """What a score file holds."""

    judge_info: JudgeInfo
    scores: list[Score]
    unscored: list[Unscored]


def write_scores(path: Path | str, judge_info: JudgeInfo, results: Sequence[Score | Unscored]) -> None:
    """Write a score file; it appears whole or not at all."""
    lines = [{"judge_info": asdict(judge_info)}, *map(asdict, results)]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_scores(path: Path | str) -> ScoreFile:
    """Read a score file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not begin with who judged, or a line is no score; the message names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: expected a score file, as `salmonn score --out` writes it")
    judge_info: JudgeInfo | None = None
    scores, unscored = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), start=1):
        try:
            value = json.loads(line)
            if judge_info is None:
                if not isinstance(value, dict) or set(value) != {"judge_info"}:
                    raise ValueError(
                        'a score file begins with {"judge_info": ...}: write it with `salmonn score --out`'
                    )
                judge_info = parse_record(value["judge_info"], JudgeInfo)
            elif isinstance(value, dict) and "reason" in value:
                unscored.append(parse_record(value, Unscored))
            else:
                scores.append(parse_record(value, Score))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if judge_info is None:
        raise ValueError(f"{path} is empty: expected a score file, as `salmonn score --out` writes it")
    return ScoreFile(judge_info, scores, unscored)


def read_references(path: Path) -> dict[str, Reference]:
    """References by the name of their video, from JSONL, or from JSON as the published test set has it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: naming what is wrong and where; two references of one video are.
    """
    if path.suffix == ".json":
        items = [_published_reference(item, where=where) for item, where in read_objects(path, expected=_PUBLISHED)]
    else:
        items = read_records(path, Reference)
    references = {reference.video: reference for reference in items}
    if len(references) < len(items):
        videos = [reference.video for reference in items]
        twice = next(video for video in videos if videos.count(video) > 1)
        raise ValueError(f"{path} has two references of {twice}: delete one")
    return references


def read_captions(path: Path) -> list[Caption]:
    """Captions from JSONL, or predictions from JSON as the published scorer reads them, the last of each video.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: naming what is wrong and where.
    """
    if path.suffix != ".json":
        return read_records(path, Caption)
    items = [_published_prediction(item, where=where) for item, where in read_objects(path, expected=_PUBLISHED)]
    captions = {caption.video: caption for caption in items}
    if len(captions) < len(items):
        logger.warning("%s: %d videos are predicted more than once, the last counts", path, len(items) - len(captions))
    if items and not any(caption.finished for caption in items):
        logger.warning(
            "%s: no prediction holds %s, so that all count as cut off at their token limit", path, END_OF_ANSWER
        )
    return list(captions.values())


def match_video_names(captions: Sequence[Caption], references: Mapping[str, Reference], path: Path) -> list[Caption]:
    """Captions under the references' names of their videos; `path` is the file of the references.

    Captions name videos as they were typed, references relative to their own file: both are meant.
    """
    by_path = {(path.parent / video).resolve(): video for video in references}
    return [
        caption
        if caption.video in references
        else replace(caption, video=by_path.get(Path(caption.video).resolve(), caption.video))
        for caption in captions
    ]


def read_objects(path: Path, *, expected: str) -> list[tuple[dict[str, Any], str]]:
    """The objects of a JSON list (`.json`), or of JSON lines, each with its place for messages.

    Args:
        path: the file.
        expected: what should be in it, for messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON, no list, or holds something other than objects; naming the place.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: expected {expected} there")
    content = path.read_bytes()
    if path.suffix == ".json":
        items = _parse(content, where=str(path))
        if not isinstance(items, list):
            raise ValueError(f"{path} must hold a JSON list of objects; JSON lines go by the name .jsonl")
        placed = [(item, f"{path}, item {number}") for number, item in enumerate(items, start=1)]
    else:
        lines = [(line, f"{path}, line {number}") for number, line in enumerate(content.split(b"\n"), start=1)]
        placed = [(_parse(line, where=where), where) for line, where in lines if line.strip()]
    for item, where in placed:
        if not isinstance(item, dict):
            raise ValueError(f"{where}: expected a JSON object, got {type(item).__name__}")
    return placed


def _parse(content: bytes, *, where: str) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _published_reference(item: dict[str, Any], *, where: str) -> Reference:
    video, events = item.get("video"), item.get("events")
    if not isinstance(video, str) or not isinstance(events, list) or not all(isinstance(text, str) for text in events):
        raise ValueError(f'{where}: expected {{"video": text, "events": [text, ...]}}, got the keys {", ".join(item)}')
    caption = item.get("caption")
    record = {"video": video, "events": [{"text": text} for text in events]}
    return _checked(record | ({"caption": caption} if isinstance(caption, str) else {}), Reference, where=where)


def _published_prediction(item: dict[str, Any], *, where: str) -> Caption:
    video, text = (
        value[0] if isinstance(value, list) and value else value for value in (item.get("id"), item.get("pred"))
    )
    if not isinstance(video, str) or not isinstance(text, str):
        raise ValueError(f'{where}: expected {{"id": [video], "pred": text}}, got the keys {", ".join(item)}')
    finished = END_OF_ANSWER in text
    return _checked(
        {"video": video, "text": text.replace(END_OF_ANSWER, ""), "finished": finished}, Caption, where=where
    )


def _checked(value: dict[str, Any], record_type: type[Record], *, where: str) -> Record:
    try:
        return parse_record(value, record_type)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
