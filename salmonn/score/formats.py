"""File formats of scoring: score files, and captions and references in our format (JSONL) or the published one (JSON).

A score file is JSONL. Its first line, `{"format": 1, "judge_info": {...}}`, holds judge, protocol and date
(`records.JudgeInfo`); each further line is a `Score`, or an `Unscored` with its reason.

The published test set (video-SALMONN 2) is a JSON list of `{"video", "events": [text, ...]}`; predictions on it are a
list of `{"id": [video], "pred": text}`, where a text with `<|im_end|>` is complete.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from salmonn.files import Record, parse_record, read_records, write_text
from salmonn.records import Caption, JudgeInfo, Reference, Score, Unscored

logger = logging.getLogger(__name__)

END_OF_ANSWER = "<|im_end|>"
SCORE_FORMAT = 1


@dataclass(frozen=True)
class ScoreFile:
    """Contents of a score file."""

    judge_info: JudgeInfo
    scores: list[Score]
    unscored: list[Unscored]


def write_scores(path: Path | str, judge_info: JudgeInfo, results: Sequence[Score | Unscored]) -> None:
    """Write a score file atomically."""
    lines = [{"format": SCORE_FORMAT, "judge_info": asdict(judge_info)}, *map(_score_line, results)]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _score_line(result: Score | Unscored) -> dict[str, Any]:
    values = asdict(result)
    absent = {"dialogue": None, "num_excluded": 0}
    return {name: value for name, value in values.items() if name not in absent or value != absent[name]}


def read_scores(path: Path | str) -> ScoreFile:
    """Read a score file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file does not start with its judge, has another format version, or a line is not a score; the
            message has the file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: expected a score file written by `salmonn score --out`")
    judge_info: JudgeInfo | None = None
    scores, unscored = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), start=1):
        try:
            value = json.loads(line)
            if judge_info is None:
                judge_info = _parse_header(value)
            elif isinstance(value, dict) and "reason" in value:
                unscored.append(parse_record(value, Unscored))
            else:
                scores.append(parse_record(value, Score))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    assert judge_info is not None  # an empty file has one empty line, which is not JSON
    return ScoreFile(judge_info, scores, unscored)


def _parse_header(value: Any) -> JudgeInfo:
    if not isinstance(value, dict) or not {"judge_info"} <= set(value) <= {"format", "judge_info"}:
        raise ValueError('a score file starts with {"format": ..., "judge_info": ...}: write it with `salmonn score`')
    if value.get("format") != SCORE_FORMAT:
        raise ValueError(
            f"score file of format {value.get('format')}, but this version of salmonn reads format {SCORE_FORMAT}: "
            "score the captions again"
        )
    return parse_record(value["judge_info"], JudgeInfo)


def read_references(path: Path) -> dict[str, Reference]:
    """Read references by video name, from JSONL or from JSON in the format of the published test set.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line or item is invalid, or a video has two references.
    """
    items = _read_published(path, _published_reference) if path.suffix == ".json" else read_records(path, Reference)
    references = {reference.video: reference for reference in items}
    if len(references) < len(items):
        videos = [reference.video for reference in items]
        duplicate = next(video for video in videos if videos.count(video) > 1)
        raise ValueError(f"{path} has two references of {duplicate}: delete one")
    return references


def read_captions(path: Path) -> list[Caption]:
    """Read captions from JSONL, or published predictions from JSON, where the last one of each video counts.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line or item is invalid.
    """
    if path.suffix != ".json":
        return read_records(path, Caption)
    items = _read_published(path, _published_prediction)
    captions = {caption.video: caption for caption in items}
    if len(captions) < len(items):
        num_duplicates = len(items) - len(captions)
        logger.warning("%s: %d videos are predicted more than once; the last counts", path, num_duplicates)
    if items and not any(caption.finished for caption in items):
        logger.warning("%s: no prediction contains %s, so all count as cut off", path, END_OF_ANSWER)
    return list(captions.values())


def match_video_names(captions: Sequence[Caption], references: Mapping[str, Reference], path: Path) -> list[Caption]:
    """Rename the videos of captions to the names in the references, if they are the same files.

    Captions have paths relative to the current folder, references relative to their own file `path`.
    """
    by_path = {(path.parent / video).resolve(): video for video in references}
    return [
        caption
        if caption.video in references
        else replace(caption, video=by_path.get(Path(caption.video).resolve(), caption.video))
        for caption in captions
    ]


def read_objects(path: Path, *, expected: str) -> list[tuple[dict[str, Any], str]]:
    """Read the objects of a JSON list (`.json`) or of JSON lines, each with its location for error messages.

    Args:
        path: file to read.
        expected: expected content, for error messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not JSON, not a list, or has items that are not objects.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: expected {expected}")
    content = path.read_bytes()
    if path.suffix == ".json":
        items = _parse_json(content, where=str(path))
        if not isinstance(items, list):
            raise ValueError(f"{path} must contain a JSON list of objects; JSON lines need a name ending in .jsonl")
        located = [(item, f"{path}, item {number}") for number, item in enumerate(items, start=1)]
    else:
        lines = [(line, f"{path}, line {number}") for number, line in enumerate(content.split(b"\n"), start=1)]
        located = [(_parse_json(line, where=where), where) for line, where in lines if line.strip()]
    for item, where in located:
        if not isinstance(item, dict):
            raise ValueError(f"{where}: expected a JSON object, got {type(item).__name__}")
    return located


def _parse_json(content: bytes, *, where: str) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _read_published(path: Path, parse: Callable[[dict[str, Any]], Record]) -> list[Record]:
    records = []
    for item, where in read_objects(path, expected="a JSON list in the format of the published test set"):
        try:
            records.append(parse(item))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    return records


def _published_reference(item: dict[str, Any]) -> Reference:
    video, events = item.get("video"), item.get("events")
    if not isinstance(video, str) or not isinstance(events, list) or not all(isinstance(text, str) for text in events):
        raise ValueError(f'expected {{"video": text, "events": [text, ...]}}, got the keys {", ".join(item)}')
    caption = item.get("caption")
    record = {"video": video, "events": [{"text": text} for text in events]}
    return parse_record(record | ({"caption": caption} if isinstance(caption, str) else {}), Reference)


def _published_prediction(item: dict[str, Any]) -> Caption:
    video, text = (
        value[0] if isinstance(value, list) and value else value for value in (item.get("id"), item.get("pred"))
    )
    if not isinstance(video, str) or not isinstance(text, str):
        raise ValueError(f'expected {{"id": [video], "pred": text}}, got the keys {", ".join(item)}')
    record = {"video": video, "text": text.replace(END_OF_ANSWER, ""), "finished": END_OF_ANSWER in text}
    return parse_record(record, Caption)
