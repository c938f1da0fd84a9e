"""The ledger of a captioning run: JSONL files from which the next run knows what is done and what failed.

`--out captions.jsonl` comes with these files:

    captions.jsonl             captions; full files are renamed to captions.00001.jsonl, ... (lines_per_file)
    captions-2-of-8.jsonl      captions of the second of eight shards; full files are renamed in the same way
    captions.failed.jsonl      failures; one is outstanding until its part of the video is among the captions
    captions.job.json          settings that the captions depend on
    captions.subtitles.jsonl   subtitle files as they were written
    captions.shots.jsonl       shots of the videos that are split at their cuts
    captions.segments.jsonl    segments of videos that a killed run did not finish
    captions.fused.jsonl       one caption of each video, from those of its segments

A killed run leaves complete lines and at most one torn one, which the next run cuts off.
"""

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from salmonn import system
from salmonn.batch.containers import is_container
from salmonn.batch.discovery import VideoFile, VideoListing, address_of, stat_video
from salmonn.batch.ledger_files import (
    FAILED_SUFFIX,
    VERSION_FIELDS,
    GroupReader,
    HashSet,
    LedgerError,
    LedgerFiles,
    append_records,
    cannot_write,
    hash_key,
    locked,
    move_to_backup,
    read_complete,
    repair,
    repair_last_line,
)
from salmonn.batch.remote import is_url
from salmonn.files import read_json, write_json, write_records
from salmonn.records import Caption, Failure

logger = logging.getLogger(__name__)

Status = Literal["pending", "done", "failed", "failed in part"]
UNFINISHED: tuple[Status, ...] = ("pending", "failed")

FORMAT = 1  # of the files of a run
# Hashes in the job file, which would mean nothing in an error message, and what they are hashes of.
HASHED = {
    "model_files": "files of the model",
    "adapter_files": "files of the adapter",
    "transcripts_job": "settings of the transcripts",
}


class Ledger:
    """The files that one process of a run writes; use it in a `with` statement.

    Args:
        files: their names.
        job: JSON values that the captions depend on; captions of another job are not mixed with them.
        start_seconds: start of the first segment of each video.
        lines_per_file: number of lines after which another captions file is begun, never within a video.
        overwrite: start over; existing files are renamed to backups.
        read_only: only look up what earlier runs did: nothing is locked, repaired, renamed or written.

    Attributes:
        moved: backups of existing files.
        num_cut_bytes: bytes of an unfinished video that a killed run left at the end of the captions.
    """

    def __init__(
        self,
        files: LedgerFiles,
        *,
        job: Mapping[str, Any],
        start_seconds: float | None = None,
        lines_per_file: int | None = None,
        overwrite: bool = False,
        read_only: bool = False,
    ) -> None:
        if lines_per_file is not None and lines_per_file < 1:
            raise ValueError(f"--lines-per-file must be at least 1, got {lines_per_file}")
        if files.out.is_dir():
            raise LedgerError(f"{files.out} is a folder; --out must be the name of a file")
        self.files = files
        self.num_cut_bytes = 0
        self.moved: list[Path] = []
        self._overwrite = overwrite
        self._read_only = read_only
        self._job = json.loads(json.dumps({"format": FORMAT, **job}))  # as it is read back: tuples become lists
        self._start_seconds = float(start_seconds or 0.0)
        self._lines_per_file = lines_per_file
        self._num_lines = 0
        self._has_job_file = False
        self._stack = ExitStack()
        self._done = HashSet()  # first segments
        self._failed: set[bytes] = set()  # segments
        self._failed_in_part: set[bytes] = set()  # versions of files
        # Versions of files that also have a segment which is neither among the captions nor among the failures.
        self._partial: set[bytes] = set()
        if not overwrite:
            _require_same_job(files, self._job)

    def __enter__(self) -> "Ledger":
        if self._read_only:
            if not self._overwrite:
                self._read_all()
            return self
        self.files.out.parent.mkdir(parents=True, exist_ok=True)
        with self._stack:
            self._lock()
            if self._overwrite:
                self.moved = move_to_backup(self.files)
            while True:
                try:
                    self._read_all()
                    break
                except FileNotFoundError:  # another shard's file was full, and has just been renamed
                    continue
            self._stack = self._stack.pop_all()  # keep the lock unless an error was raised above
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def update_job(self, settings: Mapping[str, Any]) -> None:
        """Replace settings that were not known before, such as what a server accepts; nothing may be written yet.

        Raises:
            LedgerError: earlier captions were made with others.
        """
        assert not self._has_job_file
        self._job |= json.loads(json.dumps(settings))
        _require_same_job(self.files, self._job)

    def status(self, found: VideoFile | Failure) -> Status:
        """Look up what earlier runs did with a file as it is now, or with a folder that cannot be listed.

        Returns:
            "failed in part" if a segment or a subtitle file of a captioned file failed, and has not succeeded since.
        """
        version = version_key(found)
        start = self._start_seconds if isinstance(found, VideoFile) else float(found.start_seconds or 0.0)
        segment = version_key(found, start)
        if segment in self._failed:
            return "failed"
        if isinstance(found, Failure) or segment not in self._done or version in self._partial:
            return "pending"
        return "failed in part" if version in self._failed_in_part else "done"

    def to_retry(self, listing: VideoListing | None = None) -> Iterator[VideoFile | Failure]:
        """List this shard's videos that failed in earlier runs and have not succeeded since, as they are now.

        Args:
            listing: its globs and column, for a folder or container that could not be listed; and the passwords and
                signatures of its URLs, which are not recorded.
        """
        listing = listing or VideoListing()
        addresses = listing.addresses()
        listed: set[str] = set()
        for failure in self._failures():
            name = failure.video
            if name in listed or not self.files.shard.holds(name):
                continue
            address = address_of(name, addresses)
            now = stat_video(address)
            if os.path.lexists(_unescape(name)):
                yield failure  # the file still has a name that no record can hold
            elif _is_collection(failure):
                found = replace(listing, paths=[address], list_path=None, shard=self.files.shard).videos()
                yield from (one for one in found if isinstance(one, Failure) or self.status(one) in UNFINISHED)
            elif isinstance(now, Failure) or (
                _segment_key(failure) in self._failed
                if version_key(failure) == version_key(now)
                else self.status(now) in UNFINISHED
            ):
                yield now
            else:
                continue
            listed.add(name)

    def unwritten(self) -> list[Failure]:
        """List the subtitle files of this shard's videos that could not be written."""
        return [one for one in self._failures() if one.stage == "write" and self.files.shard.holds(one.video)]

    def write(self, captions: Sequence[Caption]) -> None:
        """Append the captions of a video, all of them or none.

        Args:
            captions: captions of its segments in order of time. Where others failed (`num_failed_segments`), the video
                counts as done once their failures are written, too.

        Raises:
            LedgerError: the disk does not take them; the lines before them are intact.
        """
        self.write_job()
        path, limit = self.files.captions, self._lines_per_file
        if limit is not None and self._num_lines and self._num_lines + len(captions) > limit:
            path.rename(self.files.next_full())
            self._num_lines = 0
        append_records(path, captions)
        self._num_lines += len(captions)

    def write_job(self) -> None:
        """Write the settings; called once there is a caption, so that a mistake in them leaves no file behind.

        Raises:
            LedgerError: earlier captions were made with others, or the disk does not take the file.
        """
        if self._has_job_file:
            return
        _require_same_job(self.files, self._job)  # another shard may have written it by now
        try:
            write_json(self.files.job, self._job)
        except OSError as error:
            raise LedgerError(cannot_write(self.files.job, error)) from error
        self._has_job_file = True

    def fail(self, failures: Sequence[Failure]) -> None:
        """Append failures; raises like `write`."""
        append_records(self.files.failed, failures)

    def replace_failures(self, failures: Iterable[Failure]) -> None:
        """Replace all listed failures once every one of them has been retried."""
        own = self.files.failed
        if failures := list(failures):
            write_records(own, failures)
        else:
            own.unlink(missing_ok=True)
        if self.files.shard.count == 1:
            for path in self.files.find(FAILED_SUFFIX):
                if path != own:
                    path.unlink()

    def _failures(self) -> Iterator[Failure]:
        for path in self.files.find(FAILED_SUFFIX):
            yield from read_complete(path, Failure)

    def _read_all(self) -> None:
        self._failed = {_segment_key(failure) for failure in self._failures() if failure.stage != "write"}
        self._partial = set()
        keys = bytearray()
        for path in self.files.all_captions():
            self._read(path, keys)
        self._done = HashSet(keys)
        self._failed_in_part = set()
        for failure in self._failures():
            version = version_key(failure)
            self._partial.discard(version)
            is_outstanding = failure.stage == "write" or _segment_key(failure) in self._failed
            if is_outstanding and version_key(failure, self._start_seconds) in self._done:
                self._failed_in_part.add(version)

    def _read(self, path: Path, keys: bytearray) -> None:
        """Add the keys of a captions file; cut off what is unfinished at the end of this process's own."""
        if path != self.files.captions:
            self._read_groups(GroupReader(path), keys)
            return
        reader = GroupReader(path)
        with nullcontext() if self._read_only else locked(path):  # an edit may be appended at any time
            self._read_groups(reader, keys)
            if not self._read_only:
                self.num_cut_bytes = repair(path, reader.end)
        self._num_lines = reader.num_lines

    def _read_groups(self, reader: GroupReader, keys: bytearray) -> None:
        for group in reader:
            for values in group:
                start = float(values.get("start_seconds") or 0.0)
                key = hash_key(values["video"], *map(values.get, VERSION_FIELDS), start)
                self._failed.discard(key)
                if start == self._start_seconds:
                    keys += key
            is_partial = len(group) < group[0].get("num_segments", 1)
            if is_partial or self._partial:
                version = hash_key(group[0]["video"], *map(group[0].get, VERSION_FIELDS))
                (self._partial.add if is_partial else self._partial.discard)(version)

    def _lock(self) -> None:
        path = self.files.lock
        while True:
            file = self._stack.enter_context(path.open("a"))
            try:
                if not system.try_lock(file.fileno()):
                    raise LedgerError(
                        f"{self.files.captions}: another process is writing this file; wait until it ends or choose "
                        "another --out"
                    )
            except OSError as error:
                logger.warning("%s cannot be locked (%s); make sure that no other process writes there", path, error)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    break
            # The process that held the lock has deleted the file between our opening and locking it.
        self._stack.callback(system.remove_locked, path)  # while the lock is still held
        # After taking our own lock: of two processes that start at once, at least one sees the other.
        for other in self.files.other_locks():
            if _is_held(other):
                raise LedgerError(
                    f"{self.files.captions}: a process with another number of shards is writing to the same --out "
                    f"({other.name} is held) and would caption the same videos; wait until it ends, or start all "
                    "processes with the same number of shards"
                )
        repair_last_line(self.files.failed)


def _is_held(lock: Path) -> bool:
    try:
        with lock.open() as file:
            return not system.try_lock(file.fileno(), shared=True)
    except OSError:  # one that has just been deleted is not held
        return False


def _require_same_job(files: LedgerFiles, job: Mapping[str, Any]) -> None:
    """Raise a LedgerError if the existing files were made with other settings."""
    remedy = "choose another --out, or start over with --overwrite (existing files are renamed to *.old)"
    if not files.job.exists():
        if found := files.all_captions():
            raise LedgerError(f"{found[0]} exists, but {files.job.name}, which has its settings, is missing: {remedy}")
        return
    before = read_json(files.job)
    if before.get("format") != FORMAT:
        raise LedgerError(f"{files.job} has format {before.get('format')}, and this version reads {FORMAT}: {remedy}")
    differing = [
        f"other {HASHED[name]} (they have changed since)"
        if name in HASHED
        else f"{name} {json.dumps(before.get(name), ensure_ascii=False)} "
        f"(now {json.dumps(job.get(name), ensure_ascii=False)})"
        for name in sorted({*before, *job})
        if (before.get(name) or None) != (job.get(name) or None)  # an older version may lack one, and then it was off
    ]
    if differing:
        raise LedgerError(f"{files.out} was made with {', '.join(differing)}: use the same settings, {remedy}")


def version_key(one: VideoFile | Failure, start_seconds: float | None = None) -> bytes:
    """Return the key of this version of a file, or of its segment that starts at a time."""
    version = (one.path if isinstance(one, VideoFile) else one.video, one.size_bytes, one.modified_ns, one.etag)
    return hash_key(*version) if start_seconds is None else hash_key(*version, start_seconds)


def _is_collection(failure: Failure) -> bool:
    """Return whether a failure may be about a folder or container, whose contents are found out by listing it."""
    name = failure.video
    is_unknown = is_url(name) and (failure.size_bytes, failure.modified_ns, failure.etag) == (None, None, None)
    return is_unknown or is_container(name) or os.path.isdir(name)  # noqa: PTH112 - as in `walk_paths`


def _segment_key(failure: Failure) -> bytes:
    return version_key(failure, float(failure.start_seconds or 0.0))


def _unescape(name: str) -> str:
    """Return the file name that `stat_video` escaped because it is not UTF-8; "" for any other name."""
    raw = re.sub(rb"\\x([0-9a-f]{2})", lambda match: bytes.fromhex(match[1].decode()), os.fsencode(name))
    try:
        raw.decode()
    except UnicodeDecodeError:
        return os.fsdecode(raw)
    return ""
