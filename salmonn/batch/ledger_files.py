"""The files of a run: their names, how they are added to, and how what a killed run left in them is told apart.

All captions of a video are written at once, when the last of its segments is done: its *group*. Each line of a group
but its last ends in a blank, so that a group that is not whole shows, wherever a killed run broke off. The last one
ends in a tab where a segment is missing, whose failure is written next: without that the video is done again.
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from salmonn.batch.discovery import LogFunction, Shard
from salmonn.records import Record, parse_record

GOES_ON = b" \n"  # ends a line that others of its group follow
ENDS = b"\n"
ENDS_IN_PART = b"\t\n"
FAILED = ".failed.jsonl"
SIDECARS = ".subtitles.jsonl"
JOB = ".job.json"
_NUMBER = r"\.\d{5}"  # of a full file; a date has more digits
_MOST_FULL = 99_999


class LedgerError(ValueError):
    """The files of a run are not as they must be, or cannot be written; the message says what to do."""


@dataclass(frozen=True)
class LedgerFiles:
    """Names of a run's files.

    Args:
        out: as the user gave it.
        shard: which of its parts this process writes.
    """

    out: Path
    shard: Shard = field(default_factory=Shard)

    @classmethod
    def of(cls, captions: Path) -> "LedgerFiles":
        """Of the run that a file of captions, of whatever shard, is from."""
        bare = re.sub(rf"{_NUMBER}$", "", captions.stem)
        stems = (captions.stem, bare, re.sub(r"-\d+-of-\d+$", "", bare))
        signed = (stem for stem in stems if captions.with_name(stem + JOB).exists())
        return cls(captions.with_name(next(signed, stems[-1]) + captions.suffix))

    @property
    def captions(self) -> Path:
        """What this process writes."""
        return self._own(self.out.suffix)

    @property
    def failed(self) -> Path:
        """What this process could not caption."""
        return self._own(FAILED)

    @property
    def subtitles(self) -> Path:
        """The side-cars that this process wrote."""
        return self._own(SIDECARS)

    @property
    def lock(self) -> Path:
        """Held by the process that writes them."""
        return self.captions.with_name(f".{self.captions.name}.lock")

    @property
    def job(self) -> Path:
        """What was asked; the same for all shards."""
        return self.out.with_name(self.out.stem + JOB)

    def other_locks(self) -> list[Path]:
        """Locks of the processes that share the videos out among another number of shards."""
        found = self._all(re.escape(self.out.suffix) + r"\.lock", before=".")
        own = f"-of-{self.shard.count}{self.out.suffix}.lock" if self.shard.count > 1 else self.lock.name
        return [path for path in found if not path.name.endswith(own)]

    def all_captions(self) -> list[Path]:
        """Captions of all shards, and the full files; see `in_order`."""
        while True:
            try:
                return in_order(self._all(rf"({_NUMBER})?" + re.escape(self.out.suffix)))
            except FileNotFoundError:  # became full just now, and has another name
                continue

    def own_captions(self) -> list[Path]:
        """Captions of this shard, in the order in which they were written."""
        full = re.compile(re.escape(self.captions.stem) + rf"({_NUMBER})?" + re.escape(self.out.suffix))
        return [path for path in self.all_captions() if full.fullmatch(path.name)]

    def all_failed(self) -> list[Path]:
        """Failures of all shards."""
        return self._all(re.escape(FAILED))

    def all_subtitles(self) -> list[Path]:
        """Side-cars of all shards."""
        return self._all(re.escape(SIDECARS))

    def next_full(self) -> Path:
        """The name that a full file gets; raises LedgerError where there are too many of them."""
        number = 1 + max((int(path.stem[-5:]) for path in self.own_captions() if path != self.captions), default=0)
        if number > _MOST_FULL:
            raise LedgerError(f"{self.captions}: {_MOST_FULL} files are full; give a greater --lines-per-file")
        return self._own(f".{number:05d}{self.out.suffix}")

    def _own(self, ending: str) -> Path:
        part = f"-{self.shard.number}-of-{self.shard.count}" if self.shard.count > 1 else ""
        return self.out.with_name(self.out.stem + part + ending)

    def _all(self, ending: str, *, before: str = "") -> list[Path]:
        stem = rf"(?P<stem>{re.escape(self.out.stem)}(-\d+-of-\d+)?)"
        pattern = re.compile(re.escape(before) + stem + ending)
        folder = self.out.parent
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        found = []
        for name in sorted(names):
            if match := pattern.fullmatch(name):
                # A run over --out captions-1-of-2.jsonl, or captions.00001.jsonl, is another one.
                stems = {match["stem"], name.removesuffix(self.out.suffix)} - {self.out.stem}
                if not any(stem + JOB in names for stem in stems):
                    found.append(folder / name)
        return found


def is_full(path: Path) -> bool:
    """Whether a file of captions became full, by its name: nothing is added to it, nor is it renamed."""
    return re.search(rf"{_NUMBER}$", path.stem) is not None


def in_order(paths: Iterable[Path]) -> list[Path]:
    """Files of captions in the order in which they were written: a shard's by their numbers, those of several by time.

    Times alone tell no order: a full file that is copied back, or touched, is still older than the next one.

    Raises:
        FileNotFoundError: one is not there.
    """
    newest: dict[str, int] = {}
    keys = {}
    # In a shard's order of names the numbers come first: without one is the file that is being written.
    for path in sorted(paths, key=lambda path: (not is_full(path), path.name)):
        shard = str(path.with_name(re.sub(rf"{_NUMBER}$", "", path.stem)))
        newest[shard] = max(newest.get(shard, 0), path.stat().st_mtime_ns)
        keys[path] = (newest[shard], shard, not is_full(path), path.name)
    return sorted(keys, key=lambda path: keys[path])


def move_to_backup(files: LedgerFiles) -> list[Path]:
    """Move all that earlier runs wrote to names that end in .old, and a number where those are taken.

    Returns:
        The new names.
    """
    moved = []
    for path in [*files.all_captions(), *files.all_failed(), files.job]:
        if path.exists():
            names = chain([f"{path.name}.old"], (f"{path.name}.old.{number}" for number in range(1, 1_000_000)))
            moved.append(path.rename(next(new for name in names if not (new := path.with_name(name)).exists())))
    return moved


def read_groups(path: Path, *, file: BinaryIO | None = None, log: LogFunction | None = None) -> Iterator[list[bytes]]:
    """The lines of each file that was captioned, one group after the other; one that is not whole is left out.

    Args:
        path: of a file of captions.
        file: the same, opened, which is read from its start and stays open.
        tell: of what is left out.
    """
    group: list[bytes] = []
    with nullcontext(file) if file else path.open("rb") as lines:
        lines.seek(0)
        for line in lines:
            group.append(line)
            if line.endswith(ENDS) and not line.endswith(GOES_ON):
                yield group
                group = []
    if group and log:
        log("%s breaks off in the middle of a video's captions, which are left out: a run was killed there", path)


def parse_line(line: bytes, path: Path) -> dict[str, Any]:
    """A line's values.

    Raises:
        LedgerError: it is no JSON object.
    """
    try:
        values = json.loads(line)
    except ValueError as error:  # UnicodeDecodeError is one
        raise LedgerError(f"{path}: a line is no JSON ({error}): {line[:60]!r}; mend it or take it out") from error
    if not isinstance(values, dict) or "video" not in values:
        raise LedgerError(f"{path}: a line is no caption: {line[:60]!r}; take it out, or choose another --out")
    return values


def iter_whole(path: Path, record_type: type[Record]) -> Iterator[Record]:
    """The records of a list but for a last one that is not whole: a killed process left it, or one is writing it.

    Raises:
        LedgerError: a line is no JSON object.
        ValueError: it is no such record.
    """
    with path.open("rb") as file:
        for line in file:
            if line.endswith(ENDS):
                yield parse_record(parse_line(line, path), record_type)


def cut(path: Path, num_bytes: int) -> int:
    """Cut off what follows the first so many bytes, and say how much that was."""
    more = path.stat().st_size - num_bytes
    if more:
        os.truncate(path, num_bytes)
    return more


def cut_tail(path: Path) -> None:
    """Cut off what a killed process left of a file's last line."""
    if path.exists():
        with path.open("rb") as file:
            whole = sum(len(line) for line in file if line.endswith(ENDS))
        cut(path, whole)


def append_group(path: Path, records: Sequence[Any], *, ends: bytes = ENDS) -> None:
    """Add records to a JSONL file, flushed; where the disk does not take them, none of them.

    Args:
        path: of the file.
        records: of one video.
        ends: what stands after the last of them.

    Raises:
        LedgerError: it does not.
    """
    lines = [json.dumps(dataclasses.asdict(record), ensure_ascii=False).encode() for record in records]
    try:
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    except OSError as error:
        raise LedgerError(no_room(path, error)) from error
    try:
        before = os.lseek(handle, 0, os.SEEK_END)
        left = memoryview(GOES_ON.join(lines) + ends)
        try:
            while left:
                left = left[os.write(handle, left) :]
            os.fsync(handle)
        except OSError as error:
            os.ftruncate(handle, before)
            raise LedgerError(no_room(path, error)) from error
    finally:
        os.close(handle)


def no_room(path: Path, error: OSError) -> str:
    return (
        f"{path} cannot be written ({error.strerror}): what was finished is kept; see to the disk, and the same "
        "command goes on from there"
    )
