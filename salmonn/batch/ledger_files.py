"""The files of a captioning run: their names, appending to them, and reading what a killed run left behind.

All captions of a video are appended together once its last segment is done: they are a *group*. Each line says which
segment it is about (`segment` of `num_segments`) and how many segments failed, so an incomplete group is recognized
from the lines themselves, regardless of the white space around them.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from salmonn import system
from salmonn.batch.discovery import Shard
from salmonn.files import Record, parse_record

FAILED_SUFFIX = ".failed.jsonl"
SUBTITLES_SUFFIX = ".subtitles.jsonl"
SHOTS_SUFFIX = ".shots.jsonl"
SEGMENTS_SUFFIX = ".segments.jsonl"
FUSED_SUFFIX = ".fused.jsonl"
JOB_SUFFIX = ".job.json"
SIDE_SUFFIXES = (FAILED_SUFFIX, SUBTITLES_SUFFIX, SHOTS_SUFFIX, SEGMENTS_SUFFIX, FUSED_SUFFIX, JOB_SUFFIX)
KEY_BYTES = 16
VERSION_FIELDS = ("size_bytes", "modified_ns", "etag")  # of captions and failures: the state of the file
MAX_FULL_FILES = 99_999
_NUMBER = r"\.\d{5}"  # of a full file; a date has more digits
_MIN_RECENT_KEYS = 1 << 16


class LedgerError(ValueError):
    """A run's files are inconsistent or cannot be written; the message says what to do."""


def hash_key(*parts: str | float | None) -> bytes:
    """Hash values into 16 bytes; two of ten million keys collide with a probability of 10^-24."""
    return blake2b(repr(parts).encode(errors="surrogateescape"), digest_size=KEY_BYTES).digest()


def keys_to_array(keys: bytes | bytearray) -> np.ndarray:
    """View concatenated keys as an array (N,) that shares a bytearray's memory."""
    return np.frombuffer(keys, f"S{KEY_BYTES}")


class HashSet:
    """A set of `hash_key` keys that is compact enough for ten million of them.

    New keys go to a Python set (100 bytes each) and are merged now and then into one sorted array (16 bytes each),
    where a lookup takes a microsecond or two.

    Args:
        keys: the first keys, concatenated; a bytearray's memory is taken over.
    """

    def __init__(self, keys: bytes | bytearray = b"") -> None:
        self._sorted = keys_to_array(bytearray(keys) if isinstance(keys, bytes) else keys)
        self._sorted.sort()
        self._recent: set[bytes] = set()

    def __contains__(self, key: bytes) -> bool:
        if key in self._recent:
            return True
        # numpy takes trailing zeros of a byte string for padding, both in its arrays and in what it returns.
        stripped = key.rstrip(b"\0")
        index = int(np.searchsorted(self._sorted, np.bytes_(stripped)))
        return index < len(self._sorted) and self._sorted[index] == stripped

    def add(self, key: bytes) -> None:
        """Add a key."""
        self._recent.add(key)
        if len(self._recent) > max(_MIN_RECENT_KEYS, len(self._sorted) // 8):
            self._sorted = np.concatenate([self._sorted, keys_to_array(b"".join(self._recent))])
            self._sorted.sort()
            self._recent = set()


@dataclass(unsafe_hash=True)
class LedgerFiles:
    """The names of a run's files.

    Args:
        out: captions file as the user named it.
        shard: part of the videos that this process captions.

    Attributes:
        captions: captions of this process.
        failed: failures of this process.
        subtitles: log of the subtitle files that this process wrote.
        shots: log of the shots that this process found.
        segments: captions of finished segments of videos that this process has not finished.
        fused: captions of whole videos, made from those of their segments.
        lock: lock that the writing process holds.
        job: settings of the run, shared by all shards.
    """

    out: Path
    shard: Shard = field(default_factory=Shard)
    captions: Path = field(init=False, compare=False)
    failed: Path = field(init=False, compare=False)
    subtitles: Path = field(init=False, compare=False)
    shots: Path = field(init=False, compare=False)
    segments: Path = field(init=False, compare=False)
    fused: Path = field(init=False, compare=False)
    lock: Path = field(init=False, compare=False)
    job: Path = field(init=False, compare=False)

    def __post_init__(self) -> None:
        stem = self.out.stem + (f"-{self.shard.number}-of-{self.shard.count}" if self.shard.count > 1 else "")
        self.captions = self.out.with_name(stem + self.out.suffix)
        self.failed = self.out.with_name(stem + FAILED_SUFFIX)
        self.subtitles = self.out.with_name(stem + SUBTITLES_SUFFIX)
        self.shots = self.out.with_name(stem + SHOTS_SUFFIX)
        self.segments = self.out.with_name(stem + SEGMENTS_SUFFIX)
        self.fused = self.out.with_name(stem + FUSED_SUFFIX)
        self.lock = self.out.with_name(f".{stem}{self.out.suffix}.lock")
        self.job = self.out.with_name(self.out.stem + JOB_SUFFIX)

    @classmethod
    def of(cls, captions: Path) -> "LedgerFiles":
        """Find the run that a captions file, of any shard, belongs to."""
        unnumbered = re.sub(rf"{_NUMBER}$", "", captions.stem)
        stems = (captions.stem, unnumbered, re.sub(r"-\d+-of-\d+$", "", unnumbered))
        with_job = (stem for stem in stems if captions.with_name(stem + JOB_SUFFIX).exists())
        return cls(captions.with_name(next(with_job, stems[-1]) + captions.suffix))

    def find(self, suffix: str, *, prefix: str = "", pattern: str = "") -> list[Path]:
        """List this run's files, of all shards, by prefix and suffix; a regular expression may precede the latter."""
        stem = re.escape(prefix) + rf"(?P<stem>{re.escape(self.out.stem)}(-\d+-of-\d+)?)"
        names = {path.name for path in self.out.parent.iterdir()} if self.out.parent.is_dir() else set()
        found = []
        for name in sorted(names):
            if match := re.fullmatch(stem + pattern + re.escape(suffix), name):
                # A run with --out captions-1-of-2.jsonl, or captions.00001.jsonl, has a job file of its own.
                stems = {match["stem"], name.removesuffix(self.out.suffix)} - {self.out.stem}
                if not any(stem + JOB_SUFFIX in names for stem in stems):
                    found.append(self.out.with_name(name))
        return found

    def owns(self, path: Path) -> bool:
        """Return whether a path is that of an existing captions file of this run, or of a file next to one."""
        if path.absolute().parent.resolve() == self.out.absolute().parent.resolve():
            suffixes = "|".join(map(re.escape, SIDE_SUFFIXES))
            if re.fullmatch(rf"{re.escape(self.out.stem)}(-\d+-of-\d+)?({suffixes})", path.name):
                return True
        return path.resolve() in {one.resolve() for one in self.all_captions()}

    def other_locks(self) -> list[Path]:
        """List the lock files of runs with another number of shards."""
        own = f"-of-{self.shard.count}{self.out.suffix}.lock" if self.shard.count > 1 else self.lock.name
        return [path for path in self.find(self.out.suffix + ".lock", prefix=".") if not path.name.endswith(own)]

    def all_captions(self) -> list[Path]:
        """List the captions files of all shards, full ones included, in the order of `in_order`."""
        while True:
            try:
                return in_order(self.find(self.out.suffix, pattern=rf"({_NUMBER})?"))
            except FileNotFoundError:  # it was full, and has just been renamed by another shard
                continue

    def own_captions(self) -> list[Path]:
        """List the captions files of this shard in the order in which they were written."""
        pattern = re.compile(re.escape(self.captions.stem) + rf"({_NUMBER})?" + re.escape(self.out.suffix))
        return [path for path in self.all_captions() if pattern.fullmatch(path.name)]

    def next_full(self) -> Path:
        """Return the name for the next full file; raises LedgerError where the numbers are used up."""
        number = 1 + max((int(path.stem[-5:]) for path in self.own_captions() if path != self.captions), default=0)
        if number > MAX_FULL_FILES:
            raise LedgerError(f"{self.captions}: {MAX_FULL_FILES} files are full; increase --lines-per-file")
        return self.captions.with_name(f"{self.captions.stem}.{number:05d}{self.out.suffix}")


def is_full(path: Path) -> bool:
    """Return by its name whether a captions file is full: it is no longer appended to or renamed."""
    return re.search(rf"{_NUMBER}$", path.stem) is not None


def in_order(paths: Iterable[Path]) -> list[Path]:
    """Sort captions files into the order in which they were written: each shard's by number, the shards by time.

    Times alone are not enough: a full file that was copied back, or touched, is still older than the next one.

    Raises:
        FileNotFoundError: a file does not exist.
    """
    newest: dict[str, int] = {}
    keys = {}
    # Full files come first: the file without a number is the one being written.
    for path in sorted(paths, key=lambda path: (not is_full(path), path.name)):
        shard = str(path.with_name(re.sub(rf"{_NUMBER}$", "", path.stem)))
        newest[shard] = max(newest.get(shard, 0), path.stat().st_mtime_ns)
        keys[path] = (newest[shard], shard, not is_full(path), path.name)
    return sorted(keys, key=lambda path: keys[path])


def captions_among(paths: Sequence[Path]) -> list[Path]:
    """Return the captions files among those that a pattern such as `captions*.jsonl` matches.

    Fused captions count unless the captions that they were made from are there, too.
    """
    kept = [path for path in paths if not path.name.endswith(tuple({*SIDE_SUFFIXES} - {FUSED_SUFFIX}))]
    return [
        path
        for path in kept
        if not path.name.endswith(FUSED_SUFFIX)
        or path.with_name(path.name.removesuffix(FUSED_SUFFIX) + ".jsonl") not in kept
    ]


def move_to_backup(files: LedgerFiles) -> list[Path]:
    """Rename the files of earlier runs; see `backup_path`.

    Returns:
        The new names.
    """
    moved = []
    for path in [
        *files.all_captions(),
        *files.find(FAILED_SUFFIX),
        *files.find(SHOTS_SUFFIX),
        *files.find(SEGMENTS_SUFFIX),
        *files.find(FUSED_SUFFIX),
        files.job,
    ]:
        if path.exists():
            moved.append(path.rename(backup_path(path)))
    return moved


def backup_path(path: Path) -> Path:
    """Return a name for a backup of a file: `NAME.old`, or `NAME.old.1` and so on where that exists."""
    backup = path.with_name(f"{path.name}.old")
    numbers = count(1)
    while backup.exists():
        backup = path.with_name(f"{path.name}.old.{next(numbers)}")
    return backup


SegmentGroup = list[dict[str, Any]]  # the parsed lines of one video that were written together


class GroupReader:
    """Iterates over the groups of a captions file; an unfinished group at its end is left out.

    Args:
        path: captions file.
        file: the same file, opened; it is read from the start and stays open.
        end: offset in bytes at which to stop; None: the end of the file.

    Attributes:
        end: offset behind the last group read.
        num_lines: number of lines in the groups read.
        is_unfinished: whether an unfinished group follows: a run was killed while writing it, or is writing it now.
    """

    def __init__(self, path: Path, *, file: BinaryIO | None = None, end: int | None = None) -> None:
        self.end = 0
        self.num_lines = 0
        self.is_unfinished = False
        self._path = path
        self._file = file
        self._stop = math.inf if end is None else end

    def __iter__(self) -> Iterator[SegmentGroup]:
        group: SegmentGroup = []
        start = end = 0  # of the current line
        with nullcontext(self._file) if self._file else self._path.open("rb") as lines:
            lines.seek(0)
            for line in lines:
                start, end = end, end + len(line)
                if end > self._stop:
                    if group:  # the line that showed it to be finished is behind the stop
                        yield self._finish(group, end=start)
                    return
                if not line.strip():
                    self.end = self.end if group else end
                    continue
                if (values := parse_last_line(line, self._path)) is None:
                    self.is_unfinished = True
                    return
                if group and not _continues(group, values):  # somebody deleted a line
                    yield self._finish(group, end=start)
                    group = []
                group.append(values)
                if len(group) >= values.get("num_segments", 1) - values.get("num_failed_segments", 0):
                    yield self._finish(group, end=end)
                    group = []
        self.is_unfinished = bool(group)

    def _finish(self, group: SegmentGroup, *, end: int) -> SegmentGroup:
        self.end = end
        self.num_lines += len(group)
        return group


def _continues(group: SegmentGroup, values: dict[str, Any]) -> bool:
    """Return whether a line continues a group: it is a later segment of the same version of the video."""
    names = ("video", *VERSION_FIELDS, "num_segments", "num_failed_segments")
    last = group[-1]
    return values.get("segment", 0) > last.get("segment", 0) and all(
        values.get(name) == last.get(name) for name in names
    )


def parse_line(line: bytes, path: Path) -> dict[str, Any]:
    """Parse a line of a JSONL file of captions or failures.

    Raises:
        LedgerError: the line is not a JSON object, is not about a video, or has a wrong number of segments.
    """
    try:
        values = json.loads(line)
    except ValueError as error:  # includes UnicodeDecodeError
        raise LedgerError(f"{path}: a line is not valid JSON ({error}): {line[:60]!r}; correct or delete it") from error
    if not isinstance(values, dict) or "video" not in values:
        raise LedgerError(f"{path}: a line is not a caption: {line[:60]!r}; delete it or choose another --out")
    for name in ("segment", "num_segments", "num_failed_segments"):
        if not isinstance(values.get(name, 0), int):
            raise LedgerError(f"{path}: {name} of {values['video']} must be a whole number, got {values[name]!r}")
    return values


def parse_last_line(line: bytes, path: Path) -> dict[str, Any] | None:
    """Parse a line like `parse_line`; return None if it is torn: without a newline, it may be cut off anywhere.

    A whole JSON object without a newline is a complete line: no prefix of an object is valid JSON.
    """
    try:
        return parse_line(line, path)
    except LedgerError:
        if line.endswith(b"\n"):
            raise
        return None


def read_complete(path: Path, record_type: type[Record]) -> Iterator[Record]:
    """Read the records of a JSONL file except for a torn last line, left by a killed process or still being written.

    Raises:
        LedgerError: a line is not a JSON object.
        ValueError: a line is not such a record.
    """
    with path.open("rb") as file:
        for line in file:
            if line.strip() and (values := parse_last_line(line, path)) is not None:
                yield parse_record(values, record_type)


def repair(path: Path, end: int) -> int:
    """Truncate a JSONL file to `end` bytes, add the newline that is missing there, and return how much was cut off."""
    cut = path.stat().st_size - end
    if cut:
        os.truncate(path, end)
    with path.open("rb+") as file:
        if end and file.seek(end - 1) >= 0 and file.read(1) != b"\n":
            file.write(b"\n")
    return cut


def repair_last_line(path: Path) -> None:
    """Cut off the last line of a JSONL file where a killed process left it torn."""
    if path.exists():
        with path.open("rb") as file:
            end = sum(len(line) for line in file if line.endswith(b"\n") or parse_last_line(line, path) is not None)
        repair(path, end)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep others from appending to a captions file for a short time; it is created if it does not exist.

    A run holds `LedgerFiles.lock` until it ends. This lock is held for each append, so that people can edit captions
    while a run is writing. Where the file system has no locks, there is no protection.

    Raises:
        LedgerError: the file cannot be opened.
    """
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | system.O_BINARY, 0o666)
        except OSError as error:
            raise LedgerError(cannot_write(path, error)) from error
        try:
            with suppress(OSError):
                system.lock(handle)
            is_same = False
            with suppress(FileNotFoundError):  # a full file may have been renamed between opening and locking it
                is_same = os.path.samestat(os.fstat(handle), path.stat())
            if is_same:
                yield
                return
        finally:
            os.close(handle)


def append_records(path: Path, records: Sequence[Any], *, is_locked: bool = False) -> None:
    """Append the records of one video to a JSONL file and flush it to the disk; on an error, append none of them.

    Args:
        path: the file.
        records: records of a video, or of several.
        is_locked: whether the caller holds the lock of the file (`locked`).

    Raises:
        LedgerError: the disk does not take them.
    """
    with nullcontext() if is_locked else locked(path):
        _append(path, records)


def _append(path: Path, records: Sequence[Any]) -> None:
    lines = (json.dumps(dataclasses.asdict(record), ensure_ascii=False) + "\n" for record in records)
    rest = memoryview("".join(lines).encode())
    try:
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | system.O_BINARY, 0o666)
    except OSError as error:
        raise LedgerError(cannot_write(path, error)) from error
    try:
        size = os.lseek(handle, 0, os.SEEK_END)
        try:
            while rest:
                rest = rest[os.write(handle, rest) :]
            os.fsync(handle)
        except OSError as error:
            os.ftruncate(handle, size)
            raise LedgerError(cannot_write(path, error)) from error
    finally:
        os.close(handle)


def cannot_write(path: Path, error: OSError) -> str:
    """Return the message for a file that cannot be written."""
    return (
        f"{path} cannot be written ({error.strerror}). Finished work is saved; check the disk and run the same command "
        "to resume"
    )
