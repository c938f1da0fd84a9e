"""What has been captioned and what failed: JSONL files that a killed run leaves whole, and the next one goes on from.

For `--out captions.jsonl` there are

    captions.jsonl             captions; full ones become captions.00001.jsonl, ... (lines_per_file)
    captions-2-of-8.jsonl      those of the second of eight shards, which becomes full in the same way
    captions.failed.jsonl      failures; one is outstanding until its part of the video stands among the captions
    captions.job.json          what the captions were asked with
    captions.sidecars.jsonl    the side-cars that were written, as they were left
"""

import errno
import fcntl
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from salmonn.batch.discovery import VideoFile, VideoListing, stat_video
from salmonn.batch.hash_set import HashSet, hash_key
from salmonn.batch.ledger_files import (
    ENDS,
    ENDS_IN_PART,
    LedgerError,
    LedgerFiles,
    append_group,
    cut,
    cut_tail,
    iter_whole,
    move_to_backup,
    no_room,
    parse_line,
    read_groups,
)
from salmonn.records import Caption, Failure, read_json, write_json, write_records

logger = logging.getLogger(__name__)

# Digests, which tell nobody anything, and what they are of.
SIGNED = {"model_files": "files of the model", "adapter_files": "files of the adapter"}
_LOCKED = (errno.EWOULDBLOCK, errno.EACCES)


def part_key(video: str, *, size_bytes: int | None, modified_ns: int | None, start_seconds: float | None) -> bytes:
    """What a part of a file, as it is, is known by."""
    return hash_key(video, size_bytes, modified_ns, float(start_seconds or 0.0))


def version_key(video: str, *, size_bytes: int | None, modified_ns: int | None) -> bytes:
    """What a file, as it is, is known by."""
    return hash_key(video, size_bytes, modified_ns)


class Ledger:
    """The files that one process of a run writes; to be used in a `with` statement.

    Args:
        files: their names.
        job: what is asked, as JSON holds it: what was captioned otherwise is not mixed with it.
        start_seconds: of the first part of each video.
        lines_per_file: after so many lines another file is begun; never within a group.
        overwrite: whether what is there is moved aside.

    Attributes:
        moved: what was moved aside, by its new names.
        num_cut_bytes: at the end of the captions that a killed run left unfinished, and that were cut off.
    """

    def __init__(
        self,
        files: LedgerFiles,
        *,
        job: Mapping[str, Any],
        start_seconds: float | None = None,
        lines_per_file: int | None = None,
        overwrite: bool = False,
    ) -> None:
        if lines_per_file is not None and lines_per_file < 1:
            raise ValueError(f"--lines-per-file must be at least 1, got {lines_per_file}")
        if files.out.is_dir():
            raise LedgerError(f"{files.out} is a folder: give --out the name of a file")
        self.files = files
        self.num_cut_bytes = 0
        self.moved: list[Path] = []
        self._is_redo = overwrite
        self._job = dict(job)
        self._start_seconds = start_seconds
        self._lines_per_file = lines_per_file
        self._num_lines = 0
        self._is_begun = False
        self._stack = ExitStack()
        self._failed: set[bytes] = set()  # parts
        self._failed_in_part: set[bytes] = set()  # versions of files
        self._torn: set[bytes] = set()  # too, of which a part is neither among the captions nor among the failures
        self._done = HashSet()
        if not overwrite:
            _require_same_job(files, self._job)

    def __enter__(self) -> "Ledger":
        self.files.out.parent.mkdir(parents=True, exist_ok=True)
        with self._stack:
            self._open()
            self._stack = self._stack.pop_all()  # what was locked stays so, unless there is something wrong
        return self

    def _open(self) -> None:
        self._lock()
        if self._is_redo:
            self.moved = move_to_backup(self.files)
        while True:
            try:
                self._read_all()
                return
            except FileNotFoundError:  # another shard's file became full just now, and has another name
                continue

    def _read_all(self) -> None:
        self._failed = {_failure_key(failure) for failure in self._failures() if failure.stage != "write"}
        self._torn = set()
        keys = bytearray()
        for path in self.files.all_captions():
            self._read(path, keys)
        self._done = HashSet(keys)
        self._failed_in_part = set()
        for failure in self._failures():
            version = _version_of(failure)
            self._torn.discard(version)
            is_outstanding = failure.stage == "write" or _failure_key(failure) in self._failed
            if (
                is_outstanding
                and self._key(VideoFile(failure.video, failure.size_bytes, failure.modified_ns)) in self._done
            ):
                self._failed_in_part.add(version)

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def is_done(self, video: VideoFile) -> bool:
        """Whether the file, as it is, stands among the captions that were there before."""
        return self._key(video) in self._done and not (self._torn and _version_of(video) in self._torn)

    def has_failed_in_part(self, video: VideoFile) -> bool:
        """Whether a segment of a file that is done, as it is, or its side-car, failed before and did not come out."""
        return _version_of(video) in self._failed_in_part

    def has_failed(self, found: VideoFile | Failure) -> bool:
        """Whether the file, as it is, could not be captioned before, or the folder not be listed."""
        return (self._key(found) if isinstance(found, VideoFile) else _failure_key(found)) in self._failed

    def is_known(self, found: VideoFile | Failure) -> bool:
        """Whether an ordinary run passes over it."""
        return self.has_failed(found) or (isinstance(found, VideoFile) and self.is_done(found))

    def to_retry(self, *, globs: Sequence[str] = ()) -> Iterator[VideoFile | Failure]:
        """This shard's videos that failed in earlier runs and did not come out since, as they are now.

        Args:
            globs: for what is in a folder that could not be listed; see `VideoListing`.
        """
        told: set[str] = set()
        for failure in self._failures():
            if failure.video in told or not self.files.shard.holds(failure.video):
                continue
            now = stat_video(failure.video)
            if os.path.lexists(_unescape(failure.video)):
                yield failure  # its name is still one that no record can hold
            elif os.path.isdir(failure.video):  # noqa: PTH112 - as in `walk_paths`
                found = VideoListing([failure.video], globs=globs, shard=self.files.shard).videos()
                yield from (one for one in found if isinstance(one, Failure) or not self.is_done(one))
            elif isinstance(now, Failure) or self._is_outstanding(failure, now):
                yield now
            else:
                continue
            told.add(failure.video)

    def unwritten(self) -> list[Failure]:
        """Failures to write a side-car, of this shard's videos."""
        return [one for one in self._failures() if one.stage == "write" and self.files.shard.holds(one.video)]

    def _is_outstanding(self, failure: Failure, now: VideoFile) -> bool:
        if (failure.size_bytes, failure.modified_ns) == (now.size_bytes, now.modified_ns):
            return _failure_key(failure) in self._failed
        return not self.is_done(now)

    def write(self, captions: Sequence[Caption], *, is_in_part: bool = False) -> None:
        """Put a file's captions on disk, all of them or none.

        Args:
            captions: of its parts, in order of time.
            is_in_part: whether failures of other parts follow: without those the file does not count as done.

        Raises:
            LedgerError: the disk does not take them; what was there before is whole.
        """
        self._begin()
        path = self.files.captions
        most = self._lines_per_file
        if most is not None and self._num_lines and self._num_lines + len(captions) > most:
            path.rename(self.files.next_full())
            self._num_lines = 0
        append_group(path, captions, ends=ENDS_IN_PART if is_in_part else ENDS)
        self._num_lines += len(captions)

    def fail(self, failures: Sequence[Failure]) -> None:
        """Put failures on disk; raises as `write`."""
        append_group(self.files.failed, failures)

    def replace_failures(self, failures: Iterable[Failure]) -> None:
        """Put these in place of all that stand in the lists, once every one of those was tried again."""
        own = self.files.failed
        failures = list(failures)
        if failures:
            write_records(own, failures)
        else:
            own.unlink(missing_ok=True)
        if self.files.shard.count == 1:
            for path in self.files.all_failed():
                if path != own:
                    path.unlink()

    def _key(self, video: VideoFile) -> bytes:
        return part_key(
            video.path,
            size_bytes=video.size_bytes,
            modified_ns=video.modified_ns,
            start_seconds=self._start_seconds,
        )

    def _failures(self) -> Iterator[Failure]:
        for path in self.files.all_failed():
            yield from iter_whole(path, Failure)

    def _read(self, path: Path, keys: bytearray) -> None:
        """Learn what a file of captions holds; this process's own is cut off where it is not whole."""
        num_bytes = num_lines = 0
        first = float(self._start_seconds or 0.0)
        for group in read_groups(path):
            for line in group:
                values = parse_line(line, path)
                start = float(values.get("start_seconds") or 0.0)
                key = hash_key(values["video"], values.get("size_bytes"), values.get("modified_ns"), start)
                self._failed.discard(key)
                if start == first:
                    keys += key
            is_in_part = group[-1].endswith(ENDS_IN_PART)
            if is_in_part or self._torn:
                version = version_key(
                    values["video"], size_bytes=values.get("size_bytes"), modified_ns=values.get("modified_ns")
                )
                (self._torn.add if is_in_part else self._torn.discard)(version)
            num_lines += len(group)
            num_bytes += sum(map(len, group))
        if path == self.files.captions:
            self._num_lines = num_lines
            self.num_cut_bytes = cut(path, num_bytes)

    def _begin(self) -> None:
        """Sign what is asked, not before there is something to keep: a mistake in it leaves nothing behind."""
        if not self._is_begun:
            _require_same_job(self.files, self._job)  # another shard may have signed meanwhile
            try:
                write_json(self.files.job, self._job)
            except OSError as error:
                raise LedgerError(no_room(self.files.job, error)) from error
            self._is_begun = True

    def _lock(self) -> None:
        path = self.files.lock
        file = self._stack.enter_context(path.open("a"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _LOCKED:
                raise LedgerError(
                    f"{self.files.captions}: another process is writing it; wait for its end, or choose another --out"
                ) from error
            logger.warning("%s cannot be locked (%s): see to it that no other process writes there", path, error)
        # After its own: of two that begin at once one at least sees the other.
        for other in self.files.other_locks():
            if _is_held(other):
                raise LedgerError(
                    f"{self.files.captions}: a process that shares the videos out in another way is at work on the "
                    f"same --out ({other.name} is held), and would do the same videos: wait for its end, or start "
                    "all with the same number of shards"
                )
        cut_tail(self.files.failed)


def _is_held(lock: Path) -> bool:
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in _LOCKED
    return False


def _require_same_job(files: LedgerFiles, job: Mapping[str, Any]) -> None:
    """See that what is there was asked with the same words; raises LedgerError."""
    what_to_do = "choose another --out, or give --overwrite, which moves the old files aside and begins anew"
    if not files.job.exists():
        if found := files.all_captions():
            raise LedgerError(
                f"{found[0]} exists, and no {files.job.name} beside it says what it was asked with: {what_to_do}"
            )
        return
    before = read_json(files.job)
    names = [name for name in sorted({*before, *job}) if before.get(name) != job.get(name)]
    differing = [
        f"other {SIGNED[name]} (they have changed since)"
        if name in SIGNED
        else f"{name} {_show(before.get(name))} (now {_show(job.get(name))})"
        for name in names
    ]
    if differing:
        raise LedgerError(f"{files.out} was made with {', '.join(differing)}: ask as before, {what_to_do}")


def _show(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _failure_key(failure: Failure) -> bytes:
    return part_key(
        failure.video,
        size_bytes=failure.size_bytes,
        modified_ns=failure.modified_ns,
        start_seconds=failure.start_seconds,
    )


def _version_of(one: VideoFile | Failure) -> bytes:
    name = one.video if isinstance(one, Failure) else one.path
    return version_key(name, size_bytes=one.size_bytes, modified_ns=one.modified_ns)


def _unescape(name: str) -> str:
    """The name of a file whose name is not in UTF-8, of what `stat_video` made of it; "" for any other name."""
    raw = re.sub(rb"\\x([0-9a-f]{2})", lambda match: bytes.fromhex(match[1].decode()), os.fsencode(name))
    try:
        raw.decode()
    except UnicodeDecodeError:
        return os.fsdecode(raw)
    return ""
