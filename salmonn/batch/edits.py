"""Edits of captions by people, while a run may be writing to the same files.

An edit is appended to the captions file as later captions of the video, so nothing is overwritten: the original line
stays, and everything that reads the latest captions (`LatestCaptions`, the ledger of the next run) reads the edit.
All segments of the video are appended with it, since a run captions a video again if a part of it is missing.

Edits and runs append under one lock (`ledger_files.locked`).
"""

import os
import re
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from salmonn.batch.ledger_files import (
    FAILED_SUFFIX,
    VERSION_FIELDS,
    GroupReader,
    LedgerFiles,
    append_records,
    is_full,
    locked,
    repair_last_line,
)
from salmonn.batch.review import ReviewRow, read_rows
from salmonn.batch.transcripts import Transcript
from salmonn.records import Caption, Failure, Shaping

_Signature = tuple[tuple[Path, int, int, int], ...]


@dataclass(frozen=True)
class Edit:
    """A change of a caption.

    Args:
        row: number of the row.
        before: text that the person saw; the edit is refused if it is no longer the caption's.
        text: new text.
    """

    row: int
    before: str
    text: str


class EditableCaptions:
    """The latest captions and failures of a run, which several threads and processes may edit.

    Args:
        captions: a captions file of the run.

    Attributes:
        files: names of the run's files.

    Raises:
        ValueError: there are no captions, or a line is invalid.
    """

    def __init__(self, captions: Path) -> None:
        if not captions.is_file():
            raise ValueError(f"{captions}: there is no such file; name a JSONL file from `salmonn caption`")
        self.files = LedgerFiles.of(captions)
        self._lock = threading.RLock()
        self._numbers: dict[tuple[object, ...], int] = {}
        self._rows: dict[int, ReviewRow] = {}
        self._signature: _Signature = ()
        self._refresh()

    def rows(self) -> dict[int, ReviewRow]:
        """Return the rows by number, in the order in which they were first seen; a row's number never changes."""
        with self._lock:
            self._refresh()
            return dict(self._rows)

    def apply(self, edits: Sequence[Edit]) -> tuple[list[Caption], list[int]]:
        """Write edits.

        Returns:
            The previous captions of the rows that were edited, and the rows whose text another person has changed,
            which are left unchanged.

        Raises:
            ValueError: a row has no caption that can be edited, or the disk does not take the edits.
        """
        with self._lock, ExitStack() as stack:
            self._refresh()
            targets = self._targets([edit.row for edit in edits])
            for path in sorted(set(targets.values())):  # always in the same order, so that two editors cannot deadlock
                stack.enter_context(locked(path))
            self._refresh()  # what was appended before the files were locked
            captions = {edit.row: self._caption(edit.row) for edit in edits}
            made = [edit for edit in edits if captions[edit.row].text == edit.before]
            conflicts = [edit.row for edit in edits if captions[edit.row].text != edit.before]
            for path in sorted({targets[edit.row] for edit in made}):
                here = {edit.row: edit.text for edit in made if targets[edit.row] == path}
                self._append(path, here)
            self._refresh()
        return [captions[edit.row] for edit in made], conflicts

    def _caption(self, row: int) -> Caption:
        record = self._rows[row].record if row in self._rows else None
        if not isinstance(record, Caption):
            raise ValueError("there is no caption to edit: the video failed, or is no longer in the file")
        if isinstance(record, Transcript):
            raise ValueError("this is a transcript with the time of each word, which cannot be edited here")
        return record

    def _append(self, path: Path, texts: Mapping[int, str]) -> None:
        """Append edited captions, each with the other segments of its video; the file is locked."""
        own = [one for one in self.files.all_captions() if _unnumbered(one) == path]
        newest = max((one.stat().st_mtime_ns for one in own), default=None)
        repair_last_line(path)  # a killed run may have left a torn line
        edited = {id(self._caption(row)): text for row, text in texts.items()}
        segments: dict[tuple[object, ...], list[Caption]] = {}
        for row in self._rows.values():
            if isinstance(row.record, Caption):
                segments.setdefault(_group(row.record), []).append(row.record)
        groups = {_group(self._caption(row)): None for row in texts}
        records = [
            _with_text(one, edited[id(one)]) if id(one) in edited else one
            for group in groups
            for one in sorted(segments[group], key=lambda one: one.segment)
        ]
        append_records(path, records, is_locked=True)
        if newest is not None and len({_unnumbered(one) for one in self.files.all_captions()}) > 1:
            # Files of shards are read in the order of their times, which an edit must not change.
            os.utime(path, ns=(newest, newest))

    def _targets(self, rows: Sequence[int]) -> dict[int, Path]:
        """Return the file that edits of each row are appended to: that of the shard that has its caption."""
        paths = self.files.all_captions()
        unnumbered = {_unnumbered(path) for path in paths}
        if len(unnumbered) == 1:
            return dict.fromkeys(rows, unnumbered.pop())
        by_video = {
            values["video"]: _unnumbered(path) for path in paths for group in GroupReader(path) for values in group
        }
        return {row: by_video[self._caption(row).video] for row in rows}

    def _refresh(self) -> None:
        """Read the files again if they have changed."""
        while True:
            try:
                signature = self._sign()
                if signature == self._signature:
                    return
                rows = read_rows(self.files.all_captions())
                # A file that a run has found full, and renamed meanwhile, may have been read twice or not at all.
                if [one[:2] for one in self._sign()] == [one[:2] for one in signature]:
                    break
            except FileNotFoundError:  # renamed
                continue
        for row in rows:
            self._numbers.setdefault(_key(row.record), len(self._numbers))
        numbered = ((self._numbers[_key(row.record)], row) for row in rows)
        self._rows = dict(sorted(numbered, key=lambda one: one[0]))
        self._signature = signature

    def _sign(self) -> _Signature:
        """Return path, inode, size and time of each file; raises FileNotFoundError."""
        paths = sorted([*self.files.all_captions(), *self.files.find(FAILED_SUFFIX)])
        status = [path.stat() for path in paths]
        return tuple((path, one.st_ino, one.st_size, one.st_mtime_ns) for path, one in zip(paths, status, strict=True))


def _with_text(caption: Caption, text: str) -> Caption:
    """Return a caption with a person's text: it is not cut off, and its probability is not known."""
    named = {name: text if said == caption.text else said for name, said in caption.captions.items()}
    shaping = {name: _with_bare(one, caption, text) for name, one in caption.shaping.items()}
    return replace(caption, text=text, shaping=shaping, captions=named, finished=True, logprob=None, num_tokens=None)


def _with_bare(shaping: Shaping, caption: Caption, text: str) -> Shaping:
    """Return the shaping of an edited text; it has the templates of the previous text if the edit kept them."""
    if shaping.bare is None or shaping.bare not in caption.text:
        return shaping
    head, _, tail = caption.text.partition(shaping.bare)
    is_kept = text.startswith(head) and text.endswith(tail) and len(text) >= len(head) + len(tail)
    return replace(shaping, bare=text[len(head) : len(text) - len(tail)] if is_kept else None)


def _key(record: Caption | Failure) -> tuple[object, ...]:
    sample = record.sample if isinstance(record, Caption) else record.stage
    return type(record) is Failure, record.video, sample, record.start_seconds, record.end_seconds


def _group(caption: Caption) -> tuple[object, ...]:
    """Return what the segments of a video that were written together have in common."""
    own = (caption.start_seconds, caption.end_seconds) if caption.num_segments == 1 else ()
    version = (getattr(caption, name) for name in VERSION_FIELDS)
    return caption.video, caption.sample, *version, caption.num_segments, caption.num_failed_segments, own


def _unnumbered(path: Path) -> Path:
    return path.with_name(re.sub(r"\.\d{5}$", "", path.stem) + path.suffix) if is_full(path) else path
