"""People's feedback on captions: one record for everything that a person does, saved in one file, read for training.

A folder of feedback holds

- feedback.jsonl: records (`Feedback`), in order;
- videos/: the videos that may be used for training, named by the hash of their content.

Folders of earlier versions (votes.jsonl with pairs.jsonl and log.jsonl) are read, too.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from salmonn import system
from salmonn.files import append_record, parse_record, write_text
from salmonn.media.clip import AUDIO_SUFFIXES, VIDEO_SUFFIXES
from salmonn.records import Mark, Modality

logger = logging.getLogger(__name__)

Action = Literal["shown", "vote", "good", "bad", "copy", "accept", "edit", "finish"]
Choice = Literal["first", "second", "tie", "both bad"]
Tab = Literal["caption", "compare", "write", "dataset"]
FEEDBACK_NAME = "feedback.jsonl"
COUNTED_ONLY = ("shown", "copy")  # actions that are not trained on
OLD_NAMES = ("log.jsonl", "pairs.jsonl", "votes.jsonl")
_RATER = re.compile(rb'"rater": "([^"\\]+)"')


@dataclass(frozen=True)
class Candidate:
    """A caption that was shown to a person.

    Args:
        model: name of the model.
        text: text of the caption; "" where only its model is recorded.
        prompt: the prompt.
        finished: False if the caption was cut off at the token limit.
        temperature, seed: sampling parameters.
        total: Total against the reference; None without a reference.
    """

    model: str
    text: str
    prompt: str
    finished: bool = True
    temperature: float = 0.0
    seed: int = 0
    total: float | None = None

    @property
    def name(self) -> str:
        """Name in results: the model, with its temperature if it was sampled."""
        return f"{self.model} (temperature {self.temperature:g})" if self.temperature else self.model


@dataclass(frozen=True)
class Feedback:
    """One action of a person on a caption, or on two.

    Args:
        date: UTC, in ISO format.
        action: a caption was shown; a vote for one of two; a caption was rated good or bad, or copied; a draft was
            accepted as it is, or edited; a caption was written without a draft ("finish").
        video: name of the file; "" where it is not recorded.
        first: the caption, A of a vote, or the draft; without model and text if a person wrote without a draft.
        second: B of a vote, or None.
        choice: the better caption of a vote, or that neither is.
        marks: clauses of the first caption that the person marked as wrong or right.
        missing: what the first caption lacks, in the person's words.
        text: caption written by the person.
        total: Total of this text against the reference; None without a reference.
        seconds: time since the caption, or the empty text box, was shown; None if not recorded.
        tab: tab of the web UI.
        modality: what of the video the captions describe.
        start_seconds, end_seconds: part of the video; None for an open end.
        reference: reference caption of the whole video; "" for none.
        kept_video: file in videos/ that may be used for training; "" for none.
        rater: random id that the person's browser made and keeps, never an address; "" if it has none.
    """

    date: str
    action: Action
    video: str
    first: Candidate
    second: Candidate | None = None
    choice: Choice | None = None
    marks: tuple[Mark, ...] = ()
    missing: str = ""
    text: str = ""
    total: float | None = None
    seconds: float | None = None
    tab: Tab = "compare"
    modality: Modality = "both"
    start_seconds: float | None = None
    end_seconds: float | None = None
    reference: str = ""
    kept_video: str = ""
    rater: str = ""

    @property
    def chosen(self) -> Candidate | None:
        """The better caption of a vote, if one was chosen."""
        return {"first": self.first, "second": self.second}.get(self.choice or "")

    @property
    def rejected(self) -> Candidate | None:
        """The other caption of a vote, if one was chosen."""
        return {"first": self.second, "second": self.first}.get(self.choice or "")

    @property
    def captions(self) -> list[Candidate]:
        """The first caption, and the second if there is one."""
        return [self.first, self.second] if self.second else [self.first]

    @property
    def own_text(self) -> str:
        """The person's caption, without white space at its ends; "" if it is a model's draft, accepted as it is."""
        return "" if self.action == "accept" else self.text.strip()

    @property
    def ground_truth(self) -> str:
        """The person's caption, else the reference caption where the whole video is described; "" for neither."""
        is_whole = self.start_seconds is None and self.end_seconds is None
        return self.own_text or (self.reference.strip() if is_whole else "")


class FeedbackStore:
    """A folder of feedback, which several threads and processes may use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "videos").mkdir(parents=True, exist_ok=True)
        with self._locked():
            self._repair()

    def add(self, feedback: Feedback, video: Path | None = None) -> Feedback:
        """Save feedback, with a copy of the video if training can use it; return the feedback as saved.

        The text of a vote that equals one of the captions, except for white space, is not saved: it would become the
        ground truth even if the person prefers the other caption.

        Args:
            feedback: the feedback.
            video: video file that may be kept; None to keep none.

        Raises:
            OSError: the disk is full or fails; nothing is saved.
        """
        captions = [one.text.split() for one in feedback.captions]
        if feedback.action == "vote" and feedback.text.split() in captions:
            feedback = replace(feedback, text="")
        with self._locked(), self._all_or_nothing():
            is_usable = feedback.action not in COUNTED_ONLY and not _find_flaw(feedback)
            if video and is_usable:
                try:
                    feedback = replace(feedback, kept_video=keep_video(video, self.folder / "videos"))
                except FileNotFoundError:  # the session ended, which deletes its uploads
                    logger.info("%s was deleted before it could be kept", video.name)
            append_record(self.folder / FEEDBACK_NAME, feedback)
        return feedback

    def read(self) -> list[Feedback]:
        """Read all feedback, in order."""
        with self._locked():  # another process may be writing a line
            return read_feedback(self.folder) if holds_feedback(self.folder) else []

    def forget(self, rater: str) -> int:
        """Delete all data of a rater, with videos that no other feedback uses and parts of lines that may be theirs.

        Feedback is deleted last, so that the same call completes an interrupted one.

        Returns:
            Number of records deleted.

        Raises:
            ValueError: there is nothing of this rater, or the id is empty.
        """
        with self._locked():
            self._repair()
            feedback = read_feedback(self.folder) if holds_feedback(self.folder) else []
            kept = [one for one in feedback if one.rater != rater]
            if not rater or len(kept) == len(feedback):
                raise ValueError(
                    f"{self.folder} has no feedback of the rater {rater!r}: `salmonn votes` lists the ids of all raters"
                )
            for name in {one.kept_video for one in feedback} - {one.kept_video for one in kept} - {""}:
                (self.folder / "videos" / name).unlink(missing_ok=True)
            for name in (*OLD_NAMES, FEEDBACK_NAME):
                path = self.folder / name
                if path.exists():
                    lines = (line for _, line, row in _read_lines(path) if row.get("rater") != rater)
                    write_text(path, "".join(lines))
                if (partial := partial_path(path)).exists():
                    # A part that was cut off before its rater's id may be of this one.
                    parts = ((part, _RATER.search(part)) for part in partial.read_bytes().split(b"\n"))
                    kept_parts = (part for part, found in parts if found and found[1] != rater.encode())
                    write_text(partial, "".join(f"{part.decode(errors='replace')}\n" for part in kept_parts))
        return len(feedback) - len(kept)

    def _repair(self) -> None:
        for name in (*OLD_NAMES, FEEDBACK_NAME):
            repair_last_line(self.folder / name)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Lock the folder against other threads and processes."""
        lock = system.open_folder(self.folder)
        try:
            system.lock(lock)
            yield
        finally:
            os.close(lock)

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Undo writes after an OSError: on a full disk, half a line is written, which the next line would continue."""
        self._repair()
        path, videos = self.folder / FEEDBACK_NAME, self.folder / "videos"
        size = path.stat().st_size if path.exists() else None
        before = set(videos.iterdir())
        try:
            yield
        except OSError:
            if path.is_file():
                os.truncate(path, size or 0)
            for new in set(videos.iterdir()) - before:
                new.unlink()
            raise


def holds_feedback(folder: Path) -> bool:
    """Return whether a folder has feedback, of this or an earlier version."""
    return any((folder / name).exists() for name in (FEEDBACK_NAME, "votes.jsonl"))


def read_feedback(path: Path) -> list[Feedback]:
    """Read the feedback of a folder, or of one file, of this or an earlier version.

    Raises:
        FileNotFoundError: the folder has no feedback, or the file does not exist.
        ValueError: a line is invalid; the message names file and line.
    """
    if not path.is_dir():
        return _read_file(path)
    if not holds_feedback(path):
        raise FileNotFoundError(f"{path} has no {FEEDBACK_NAME}: name the folder that `salmonn demo --votes` writes")
    names = [name for name in ("votes.jsonl", "log.jsonl", FEEDBACK_NAME) if (path / name).exists()]
    feedback = [one for name in names for one in _read_file(path / name)]
    if not (path / "pairs.jsonl").is_file():
        return feedback
    # Earlier versions saved the reference caption in the training pair of a vote only, which a kill may have lost.
    truths: dict[tuple[object, ...], list[str]] = {}
    for _, _, pair in _read_lines(path / "pairs.jsonl"):
        key = (pair["video"], pair.get("modality", "both"), pair.get("start_seconds"), pair["chosen"], pair["rejected"])
        truths.setdefault(key, []).append(pair["ground_truth"])
    return [_add_reference(one, truths) for one in feedback]


def _add_reference(one: Feedback, truths: Mapping[tuple[object, ...], list[str]]) -> Feedback:
    """Return a vote of an earlier version with its reference caption, removed from the ground truths of its pairs."""
    if not (one.chosen and one.rejected and one.kept_video):
        return one
    key = (f"videos/{one.kept_video}", one.modality, one.start_seconds, one.chosen.text, one.rejected.text)
    texts = truths.get(key)
    truth = texts.pop(0) if texts else ""
    return one if truth in ("", one.own_text, one.chosen.text) else replace(one, reference=truth)


def _read_lines(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yield number, text and JSON object of each line. Blank lines and a last one that is being written are skipped.

    Raises:
        ValueError: a line is not a JSON object; the message names file and line.
    """
    with path.open("rb") as file:  # lines end at "\n" only, unlike those of str.splitlines
        for number, content in enumerate(file, start=1):
            if not content.strip():
                continue
            try:
                line = content.decode("utf-8-sig")
                row = json.loads(line)
            except ValueError as error:
                if not content.endswith(b"\n"):
                    logger.warning("%s ends with a partial line, as while it is being written; skipped it", path)
                    return
                raise ValueError(f"{path}, line {number}: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}")
            yield number, line, row


def _read_file(path: Path) -> list[Feedback]:
    feedback = []
    for number, _, row in _read_lines(path):
        try:
            upgraded = _upgrade(row)
            feedback += [] if upgraded is None else [parse_record(upgraded, Feedback)]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return feedback


def _upgrade(row: dict[str, Any]) -> dict[str, Any] | None:
    """Return a line of any version as one of this version; None if another file has it, too."""
    if "choice" in row and "action" not in row:  # votes.jsonl
        others = {name: value for name, value in row.items() if name not in ("ground_truth", "unused_reason")}
        text, kept_video = others.pop("edit", ""), others.pop("pair", "")
        return others | {"action": "vote", "text": text, "kept_video": kept_video}
    if "model" in row:  # log.jsonl
        if row["action"] != "copy":
            return None
        caption = {"model": row["model"], "text": row["text"], "prompt": ""}
        return {"date": row["date"], "action": "copy", "video": row["video"], "first": caption, "tab": "caption"}
    return row


def find_unused_reason(feedback: Feedback) -> str:
    """Return why feedback is not used for training; "" if it is, or is not meant for it."""
    if feedback.action in COUNTED_ONLY:
        return ""
    reason = _find_flaw(feedback)
    return reason if reason or feedback.kept_video else "the video was not kept"


def _find_flaw(feedback: Feedback) -> str:
    if feedback.action in ("edit", "finish"):
        return "" if feedback.own_text else "the text is empty"
    captions, second = feedback.captions, feedback.second
    if not all(one.text.strip() for one in captions):
        return "one of the captions is empty" if second else "the caption is empty"
    if not all(one.finished for one in captions):
        return f"{'one of the captions' if second else 'the caption'} was cut off at the token limit"
    if second and feedback.choice != "both bad" and not feedback.chosen:
        return "neither caption was preferred"
    if second and feedback.chosen and captions[0].text.split() == captions[1].text.split():
        return "both captions are equal"
    return ""


def kept_name(path: Path) -> str:
    """Return the name by which a video is kept, which depends on its content."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:24]
    is_known = path.suffix.lower() in VIDEO_SUFFIXES | AUDIO_SUFFIXES
    return f"{digest}{path.suffix.lower() if is_known else '.mp4'}"


def keep_video(path: Path, folder: Path) -> str:
    """Copy a video to a folder, unless its content is there already; return its name there."""
    kept = folder / kept_name(path)
    if not kept.exists():
        temporary = kept.with_name(f".{kept.name}.{os.getpid()}.tmp")
        shutil.copyfile(path, temporary)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(kept)
    return kept.name


def repair_last_line(path: Path) -> None:
    """Complete a last line without a line end, which the next line would continue; nothing is deleted.

    A whole record gets its line end. A part of one, as a killed process leaves it, is moved to a file next to it.
    """
    if not path.is_file():
        return
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
        if not size or file.read(1) == b"\n":
            return
        file.seek(0)
        last = file.read().rpartition(b"\n")[2]
        try:
            is_whole = isinstance(json.loads(last), dict)
        except ValueError:
            is_whole = False
        if is_whole:
            file.write(b"\n")
            return
        aside = partial_path(path)
        with aside.open("ab") as kept:
            kept.write(last + b"\n")
            kept.flush()
            os.fsync(kept.fileno())
        file.truncate(size - len(last))
    logger.warning("%s ended with a part of a line, as left by a killed process; moved it to %s", path, aside)


def partial_path(path: Path) -> Path:
    """Return the file that keeps parts of lines which a killed process has left in another one."""
    return path.with_name(f"{path.name}.partial")


def utc_now() -> str:
    """Return the time in UTC, in ISO format."""
    return datetime.now(UTC).isoformat(timespec="seconds")
