"""Votes on captions: kept as records, and as preference pairs that a recipe trains on.

A folder of votes holds

- votes.jsonl: every vote (`Vote`);
- pairs.jsonl: those that can be trained on, as published conversations of 2+ (data/README.md), which
  `recipes/dpo.py --preferences pairs.jsonl` reads;
- videos/: the videos of these pairs, named by the hash of their bytes;
- log.jsonl: votes, copies and edits (`LogEntry`), as they came.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from salmonn.caption.probe import MediaInfo
from salmonn.conversations import parse_conversation
from salmonn.media.clip import AUDIO_SUFFIXES, VIDEO_SUFFIXES
from salmonn.records import Modality, append_record, read_records

logger = logging.getLogger(__name__)

Choice = Literal["first", "second", "tie", "both bad"]
Action = Literal["vote", "copy", "edit"]
Source = Literal["edit", "reference", "chosen", ""]
FILES = ("votes.jsonl", "pairs.jsonl", "log.jsonl")


@dataclass(frozen=True)
class Candidate:
    """One of the two captions that a vote is between.

    Args:
        model: that gave it.
        text: of the caption.
        prompt: that was asked.
        finished: False where it ran into the token limit.
        temperature, seed: of the draw.
        total: its score against the reference; None where there is none.
    """

    model: str
    text: str
    prompt: str
    finished: bool = True
    temperature: float = 0.0
    seed: int = 0
    total: float | None = None


@dataclass(frozen=True)
class Vote:
    """What somebody preferred, without knowing whose captions they are.

    Args:
        date: UTC, in ISO format.
        video: name of the file.
        first, second: the captions, as they stood on the page: A and B.
        choice: the better one, or that neither is.
        use: what of the video was asked about.
        start_seconds, end_seconds: the part of the video.
        edit: what the visitor wrote that it should say; "" for nothing.
        ground_truth: whose words the pair has for the ground truth; "" where there is no pair.
        pair: the file below videos/ that the pair is about; "" where there is no pair.
        why_no_pair: the reason, where there is none.
    """

    date: str
    video: str
    first: Candidate
    second: Candidate
    choice: Choice
    modality: Modality = "both"
    start_seconds: float | None = None
    end_seconds: float | None = None
    edit: str = ""
    ground_truth: Source = ""
    pair: str = ""
    why_no_pair: str = ""

    @property
    def chosen(self) -> Candidate | None:
        """The better caption, where one is."""
        return {"first": self.first, "second": self.second}.get(self.choice)

    @property
    def rejected(self) -> Candidate | None:
        """The other one, where one is better."""
        return {"first": self.second, "second": self.first}.get(self.choice)


@dataclass(frozen=True)
class LogEntry:
    """Something that a visitor did.

    Args:
        date: UTC, in ISO format.
        action: vote, copy or edit.
        video: name of the file.
        model: whose caption was copied or chosen; "" where that says nothing.
        text: the caption that was copied, the words that were written, or the choice.
    """

    date: str
    action: Action
    video: str
    model: str
    text: str


@dataclass(frozen=True)
class VoteMedia:
    """The video that a vote is about.

    Args:
        path: of the file.
        outline: what it holds.
        may_keep: whether a copy of it may be kept for training.
        reference: a caption that is known to be right; "" for none.
    """

    path: Path
    outline: MediaInfo
    may_keep: bool
    reference: str = ""


class VoteStore:
    """A folder of votes; several threads, and several pages, may use it.

    Args:
        folder: made where it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "videos").mkdir(parents=True, exist_ok=True)
        with self._alone():
            for name in FILES:
                mend_end(folder / name)

    def add(self, vote: Vote, footage: VoteMedia) -> Vote:
        """Keep a vote, its pair where it makes one, and the visitor's words; returns it with what became of it.

        Raises:
            OSError: the disk takes no more; nothing of the vote is kept then.
        """
        with self._alone(), self._whole():
            vote, pair = self._pair_up(vote, footage)
            append_record(self.folder / "votes.jsonl", vote)
            if pair:
                append_line(self.folder / "pairs.jsonl", pair)
            chosen = vote.chosen
            self._log("vote", vote.video, chosen.model if chosen else "", vote.choice)
            if vote.edit:
                self._log("edit", vote.video, "", vote.edit)
        return vote

    def log_copy(self, *, video: str, model: str, text: str) -> None:
        """Keep that a caption was copied; raises as `cast`."""
        with self._alone(), self._whole():
            self._log("copy", video, model, text)

    def read(self) -> list[Vote]:
        """All votes, in order."""
        return self._read("votes.jsonl", Vote)

    def read_log(self) -> list[LogEntry]:
        """All that was done, in order."""
        return self._read("log.jsonl", LogEntry)

    def _read(self, name: str, record_type: type[Any]) -> list[Any]:
        path = self.folder / name
        with self._alone():  # a line that is being written is not whole
            return read_records(path, record_type) if path.exists() else []

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """While no other thread, and no other page, uses the folder."""
        lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """All that is written, or none of it: a full disk takes half a line, and the next would go on from it."""
        paths = [self.folder / name for name in FILES]
        sizes = [path.stat().st_size if path.exists() else None for path in paths]
        try:
            yield
        except OSError:
            for path, size in zip(paths, sizes, strict=True):
                if path.exists():
                    os.truncate(path, size or 0)
            raise

    def _log(self, action: Action, video: str, model: str, text: str) -> None:
        append_record(self.folder / "log.jsonl", LogEntry(now(), action, video, model, text))

    def _pair_up(self, vote: Vote, footage: VoteMedia) -> tuple[Vote, dict[str, Any] | None]:
        """Keep the video of a vote that makes a pair; returns the vote with what becomes of it, and the pair."""
        if reason := why_no_pair(vote, footage):
            return replace(vote, why_no_pair=reason), None
        source, words = ground_truth(vote, footage.reference)
        try:
            name = keep_video(footage.path, self.folder / "videos")
        except FileNotFoundError:  # who votes and leaves at once takes it along
            return replace(vote, why_no_pair="the video is gone"), None
        item = to_preference(vote, f"videos/{name}", footage.outline, ground_truth=words)
        try:
            parse_conversation(item)  # as the recipe will: one line that it refuses would spoil the whole file
        except ValueError as error:
            return replace(vote, why_no_pair=f"it cannot be trained on: {error}"), None
        return replace(vote, ground_truth=source, pair=name), item


def why_no_pair(vote: Vote, footage: VoteMedia) -> str:
    """Why a vote is not trained on, in words; "" where it is."""
    if not vote.chosen or not vote.rejected:
        return "neither of the two was preferred"
    if not footage.may_keep:
        return "the video may not be kept"
    if not (vote.chosen.finished and vote.rejected.finished):
        # A pair of this format cannot say so, and training would teach to end in the middle of a sentence.
        return "one of the two ran into its limit of length"
    if not vote.chosen.text.strip() or not vote.rejected.text.strip():
        return "one of the two is empty"
    if vote.chosen.text.split() == vote.rejected.text.split():
        return "both say the same"
    return ""


def ground_truth(vote: Vote, reference: str) -> tuple[Source, str]:
    """What guided DPO's cross-entropy learns beside the pair, and where it is from."""
    assert vote.chosen is not None
    is_part = vote.start_seconds is not None or vote.end_seconds is not None
    if vote.edit.strip():
        return "edit", vote.edit.strip()
    if reference.strip() and not is_part:  # a reference is about the whole video
        return "reference", reference.strip()
    return "chosen", vote.chosen.text


def to_preference(vote: Vote, video: str, outline: MediaInfo, *, ground_truth: str) -> dict[str, Any]:
    """A vote as a published conversation of 2+, where `gpt` is the ground truth.

    Args:
        vote: with a choice of A or B.
        video: path of the video from the folder of votes.
        outline: what the video holds: a pair that asks for a sound that is not there would be refused.
        ground_truth: the words.
    """
    chosen, rejected = vote.chosen, vote.rejected
    assert chosen and rejected
    sees, hears = vote.modality != "audio" and outline.has_video, vote.modality != "visual" and outline.has_audio
    kind = "video" if sees else "audio"
    item: dict[str, Any] = {kind: video} | ({"use_audio": True} if sees and hears else {})
    if vote.start_seconds is not None or vote.end_seconds is not None:
        end = outline.seconds if vote.end_seconds is None else vote.end_seconds
        item["timestamps"] = [vote.start_seconds or 0.0, end]
    answers = {"gpt": ground_truth, "chosen": chosen.text, "reject": rejected.text}
    said = [{"from": "human", "value": f"<{kind}>\n{chosen.prompt}"}]
    return item | {"conversations": said + [{"from": name, "value": words} for name, words in answers.items()]}


def keep_video(path: Path, folder: Path) -> str:
    """Copy a video to a folder, once whatever its name; returns its name there."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:24]
    known = path.suffix.lower() in VIDEO_SUFFIXES | AUDIO_SUFFIXES
    kept = folder / f"{digest}{path.suffix.lower() if known else '.mp4'}"
    if not kept.exists():
        half = kept.with_name(f".{kept.name}.{os.getpid()}.tmp")
        shutil.copyfile(path, half)
        with half.open("rb") as written:
            os.fsync(written.fileno())
        half.replace(kept)
    return kept.name


def append_line(path: Path, value: Any) -> None:
    """Add one JSON value to a file of JSON lines and flush it to disk."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def mend_end(path: Path) -> None:
    """Cut off a last line that a kill left without its end, so that the next one does not go on from it."""
    if not path.exists():
        return
    content = path.read_bytes()
    torn = content.rpartition(b"\n")[2]
    if torn:
        logger.warning("%s ends within a line, as a kill leaves it: that line is cut off", path)
        os.truncate(path, len(content) - len(torn))


def now() -> str:
    """UTC, in ISO format."""
    return datetime.now(UTC).isoformat(timespec="seconds")
