"""People's votes on captions: saved as records and as training pairs, and summarized.

A folder of votes holds

- votes.jsonl: every vote (`Vote`);
- pairs.jsonl: the votes that can be used for training, as records (`Comparison`), which
  `recipes/dpo.py --preferences pairs.jsonl` reads;
- videos/: the videos of these pairs, named by the hash of their content;
- log.jsonl: votes, copies and edits in order (`LogEntry`).
"""

import fcntl
import hashlib
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from salmonn.caption.loader import MediaInfo
from salmonn.media.clip import AUDIO_SUFFIXES, VIDEO_SUFFIXES
from salmonn.records import Comparison, Modality, append_record, read_records, write_records
from salmonn.score.stats import Interval, wilson_interval

logger = logging.getLogger(__name__)

Choice = Literal["first", "second", "tie", "both bad"]
Action = Literal["vote", "copy", "edit"]
GroundTruthSource = Literal["edit", "reference", "chosen", ""]
FILES = ("votes.jsonl", "pairs.jsonl", "log.jsonl")


@dataclass(frozen=True)
class Candidate:
    """One of the two captions of a vote.

    Args:
        model: name of the model.
        text: text of the caption.
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
class Vote:
    """A person's choice between two captions, made without knowing their models.

    Args:
        date: UTC, in ISO format.
        video: name of the file.
        first, second: captions as shown, A and B.
        choice: the better caption, or that neither is.
        modality: modality that the captions describe.
        start_seconds, end_seconds: part of the video.
        edit: caption written by the person; "" for none.
        ground_truth: source of the training pair's ground truth; "" without a pair.
        pair: file in videos/ of the training pair; "" without a pair.
        unused_reason: why there is no training pair; "" if there is one.
        rater: random id that the person's browser made and keeps, never an address; "" if it has none.
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
    ground_truth: GroundTruthSource = ""
    pair: str = ""
    unused_reason: str = ""
    rater: str = ""

    @property
    def chosen(self) -> Candidate | None:
        """The better caption, if one was chosen."""
        return {"first": self.first, "second": self.second}.get(self.choice)

    @property
    def rejected(self) -> Candidate | None:
        """The other caption, if one was chosen."""
        return {"first": self.second, "second": self.first}.get(self.choice)


@dataclass(frozen=True)
class LogEntry:
    """An action in the web UI.

    Args:
        date: UTC, in ISO format.
        action: vote, copy or edit.
        video: name of the file.
        model: model of the copied or chosen caption; "" if there is none.
        text: the copied caption, the person's caption, or the choice.
        rater: id of the person who voted or wrote the caption, as in the vote.
    """

    date: str
    action: Action
    video: str
    model: str
    text: str
    rater: str = ""


@dataclass(frozen=True)
class VoteMedia:
    """The video of a vote.

    Args:
        path: video file.
        info: its duration and streams.
        may_keep: whether a copy may be kept for training.
        reference: reference caption; "" for none.
    """

    path: Path
    info: MediaInfo
    may_keep: bool
    reference: str = ""


class VoteStore:
    """A folder of votes, which several threads and processes may use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "videos").mkdir(parents=True, exist_ok=True)
        with self._locked():
            for name in FILES:
                truncate_partial_line(folder / name)

    def add(self, vote: Vote, media: VoteMedia) -> Vote:
        """Save a vote, its log entries and, if possible, its training pair; return the vote as saved.

        An edit that equals one of the captions, except for white space, is not saved: it would become the ground truth
        even if the person prefers the other caption.

        Raises:
            OSError: the disk is full or fails; nothing is saved.
        """
        if vote.edit.split() in (vote.first.text.split(), vote.second.text.split()):
            vote = replace(vote, edit="")
        with self._locked(), self._all_or_nothing():
            vote, pair = self._make_pair(vote, media)
            append_record(self.folder / "votes.jsonl", vote)
            if pair:
                append_record(self.folder / "pairs.jsonl", pair)
            model = vote.chosen.model if vote.chosen else ""
            self._log(LogEntry(utc_now(), "vote", vote.video, model, vote.choice, vote.rater))
            if vote.edit:
                self._log(LogEntry(utc_now(), "edit", vote.video, "", vote.edit, vote.rater))
        return vote

    def log_copy(self, *, video: str, model: str, text: str) -> None:
        """Log that a caption was copied; raises OSError as `add` does."""
        with self._locked(), self._all_or_nothing():
            self._log(LogEntry(utc_now(), "copy", video, model, text))

    def read(self) -> list[Vote]:
        """Read all votes, in order."""
        return self._read("votes.jsonl", Vote)

    def read_log(self) -> list[LogEntry]:
        """Read all log entries, in order."""
        return self._read("log.jsonl", LogEntry)

    def forget(self, rater: str) -> int:
        """Delete all votes of a rater, with their pairs, log entries and videos that no other vote uses.

        The votes go last, so that the same call completes what a killed one began.

        Returns:
            Number of votes deleted.

        Raises:
            ValueError: there are no votes of this rater, or the id is empty.
        """
        with self._locked():
            votes = self._read_unlocked("votes.jsonl", Vote)
            kept = [vote for vote in votes if vote.rater != rater]
            if not rater or len(kept) == len(votes):
                raise ValueError(
                    f"{self.folder} has no votes of the rater {rater!r}: `salmonn votes` lists the ids of all raters"
                )
            for name, record_type in (("log.jsonl", LogEntry), ("pairs.jsonl", Comparison)):
                records = self._read_unlocked(name, record_type)
                if any(one.rater == rater for one in records):
                    write_records(self.folder / name, [one for one in records if one.rater != rater])
            for name in {vote.pair for vote in votes} - {vote.pair for vote in kept}:
                (self.folder / "videos" / name).unlink(missing_ok=True)
            write_records(self.folder / "votes.jsonl", kept)
        return len(votes) - len(kept)

    def _read(self, name: str, record_type: type[Any]) -> list[Any]:
        with self._locked():  # another process may be writing a line
            return self._read_unlocked(name, record_type)

    def _read_unlocked(self, name: str, record_type: type[Any]) -> list[Any]:
        path = self.folder / name
        return read_records(path, record_type) if path.exists() else []

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Lock the folder against other threads and processes."""
        lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Undo all writes after an OSError: a full disk writes half a line, which the next line would continue."""
        paths = [self.folder / name for name in FILES]
        sizes = [path.stat().st_size if path.exists() else None for path in paths]
        try:
            yield
        except OSError:
            for path, size in zip(paths, sizes, strict=True):
                if path.exists():
                    os.truncate(path, size or 0)
            raise

    def _log(self, entry: LogEntry) -> None:
        append_record(self.folder / "log.jsonl", entry)

    def _make_pair(self, vote: Vote, media: VoteMedia) -> tuple[Vote, Comparison | None]:
        """Keep the video of a vote that is used for training; return the vote as it is saved, and its pair."""
        if reason := find_unused_reason(vote, media):
            return replace(vote, unused_reason=reason), None
        source, text = choose_ground_truth(vote, media.reference)
        try:
            name = keep_video(media.path, self.folder / "videos")
        except FileNotFoundError:  # the session ended, which deletes its uploads
            return replace(vote, unused_reason="the video has been deleted"), None
        pair = to_comparison(vote, f"videos/{name}", media.info, ground_truth=text)
        return replace(vote, ground_truth=source, pair=name), pair


def find_unused_reason(vote: Vote, media: VoteMedia) -> str:
    """Return why a vote is not used for training; "" if it is."""
    if not vote.chosen or not vote.rejected:
        return "neither caption was preferred"
    if not media.may_keep:
        return "you did not agree to keep the video"
    if not (vote.chosen.finished and vote.rejected.finished):
        return "one of the captions was cut off at the token limit"
    if not vote.chosen.text.strip() or not vote.rejected.text.strip():
        return "one of the captions is empty"
    if vote.chosen.text.split() == vote.rejected.text.split():
        return "both captions are equal"
    return ""


def choose_ground_truth(vote: Vote, reference: str) -> tuple[GroundTruthSource, str]:
    """Return source and text of the ground truth, for the cross-entropy term of guided DPO."""
    assert vote.chosen is not None
    is_part = vote.start_seconds is not None or vote.end_seconds is not None
    if vote.edit.strip():
        return "edit", vote.edit.strip()
    if reference.strip() and not is_part:  # a reference describes the whole video
        return "reference", reference.strip()
    return "chosen", vote.chosen.text


def to_comparison(vote: Vote, video: str, info: MediaInfo, *, ground_truth: str) -> Comparison:
    """Return a vote as a training pair.

    Args:
        vote: vote for A or B.
        video: path of the video, relative to the folder of votes.
        info: duration and streams of the video: a pair only uses streams that exist.
        ground_truth: text of the ground truth.
    """
    chosen, rejected, modality = vote.chosen, vote.rejected, vote.modality
    assert chosen and rejected
    if modality == "both" and not (info.has_video and info.has_audio):
        modality = "visual" if info.has_video else "audio"
    return Comparison(
        video=video,
        prompt=chosen.prompt,
        chosen=chosen.text,
        rejected=rejected.text,
        ground_truth=ground_truth,
        source="vote",
        modality=modality,
        start_seconds=vote.start_seconds,
        end_seconds=vote.end_seconds,
        rater=vote.rater,
    )


def keep_video(path: Path, folder: Path) -> str:
    """Copy a video to a folder, unless its content is there already; return its name there."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:24]
    is_known = path.suffix.lower() in VIDEO_SUFFIXES | AUDIO_SUFFIXES
    kept = folder / f"{digest}{path.suffix.lower() if is_known else '.mp4'}"
    if not kept.exists():
        temporary = kept.with_name(f".{kept.name}.{os.getpid()}.tmp")
        shutil.copyfile(path, temporary)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(kept)
    return kept.name


def truncate_partial_line(path: Path) -> None:
    """Remove a last line without a line end, as left by a killed process: the next line would continue it."""
    if not path.exists():
        return
    content = path.read_bytes()
    partial = content.rpartition(b"\n")[2]
    if partial:
        logger.warning("%s ends with a partial line, as left by a killed process; removed it", path)
        os.truncate(path, len(content) - len(partial))


def utc_now() -> str:
    """Return the time in UTC, in ISO format."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Proportion:
    """`count` of `total` votes, with the 95 % interval of the true proportion."""

    count: int
    total: int

    @property
    def value(self) -> float:
        """The proportion; 0 without votes."""
        return self.count / max(self.total, 1)

    @property
    def interval(self) -> Interval:
        """Wilson's interval; from 0 to 1 without votes."""
        return wilson_interval(self.count, self.total)


@dataclass(frozen=True)
class Matchup:
    """The votes between two models, or between two temperatures of one.

    Args:
        first, second: names of the candidates, sorted.
        wins, losses: votes for the first and for the second.
        ties: votes that both are equally good.
        both_bad: votes that neither is good.
    """

    first: str
    second: str
    wins: int
    losses: int
    ties: int
    both_bad: int

    @property
    def win_rate(self) -> Proportion:
        """Votes for the first candidate, among the votes for one of the two."""
        return Proportion(self.wins, self.wins + self.losses)


@dataclass(frozen=True)
class VoteSummary:
    """Summary of all votes.

    Args:
        num_votes: number of votes.
        matchups: matchups, most votes first.
        first_preferred: votes for caption A among the votes for A or B; far from one half, there is position bias.
        agreement: votes for the caption with the lower Total, among the votes for A or B with different Totals.
        num_equal_totals: votes for A or B with equal Totals.
        num_pairs: votes that are used for training.
        num_edits, num_copies: logged edits and copies.
    """

    num_votes: int
    matchups: tuple[Matchup, ...]
    first_preferred: Proportion
    agreement: Proportion
    num_equal_totals: int
    num_pairs: int
    num_edits: int
    num_copies: int


def summarize_votes(votes: Sequence[Vote], log: Iterable[LogEntry]) -> VoteSummary:
    """Summarize votes and log entries."""
    decided = [(vote.chosen, vote.rejected) for vote in votes if vote.chosen and vote.rejected]
    totals = [
        (chosen.total, rejected.total)
        for chosen, rejected in decided
        if chosen.total is not None and rejected.total is not None
    ]
    different = [(chosen, rejected) for chosen, rejected in totals if chosen != rejected]
    actions = Counter(entry.action for entry in log)
    return VoteSummary(
        num_votes=len(votes),
        matchups=_count_matchups(votes),
        first_preferred=Proportion(sum(vote.choice == "first" for vote in votes), len(decided)),
        agreement=Proportion(sum(chosen < rejected for chosen, rejected in different), len(different)),
        num_equal_totals=len(totals) - len(different),
        num_pairs=sum(bool(vote.pair) for vote in votes),
        num_edits=actions["edit"],
        num_copies=actions["copy"],
    )


def _count_matchups(votes: Iterable[Vote]) -> tuple[Matchup, ...]:
    counts: dict[tuple[str, str], Counter[str]] = {}
    for vote in votes:
        first, second = sorted([vote.first.name, vote.second.name])
        if first != second:  # two samples of one candidate have no winner
            outcome = vote.chosen.name if vote.chosen else vote.choice
            counts.setdefault((first, second), Counter())[outcome] += 1
    ordered = sorted(counts.items(), key=lambda item: (-item[1].total(), item[0]))
    return tuple(
        Matchup(first, second, count[first], count[second], count["tie"], count["both bad"])
        for (first, second), count in ordered
    )
