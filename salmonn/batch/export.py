"""Export captions to one CSV, Parquet or JSONL file, or to subtitle files, without holding them in memory.

    export_table(LatestCaptions([Path("captions.jsonl")]), Path("captions.csv"))

A video that was captioned several times, because it changed or was retried, is in the captions files several times.
Only its latest captions count: the last line for each segment, among the lines about the same version of the file as
the video's last line. Finding them takes two passes, and the first one keeps 48 bytes per line.
"""

import csv
import json
import logging
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np

from salmonn.batch.ledger_files import (
    VERSION_FIELDS,
    GroupReader,
    LedgerError,
    LedgerFiles,
    cannot_write,
    hash_key,
    is_full,
    keys_to_array,
)
from salmonn.batch.subtitles import SubtitleWriter
from salmonn.batch.transcripts import Transcript
from salmonn.files import parse_record, temporary_path
from salmonn.records import Caption, EventCaption, Failure, Fusion, Modality, Shaping

logger = logging.getLogger(__name__)

COLUMNS = tuple(field.name for field in fields(Caption))
ROW_GROUP_SIZE = 10_000


class LatestCaptions:
    """The captions that count, of one or more captions files.

    Args:
        paths: captions files in the order in which they were written. A run may be appending to them; what it appends
            from now on is ignored.

    Raises:
        LedgerError: a line is not a caption.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        # Kept open: once a file is full, a run gives its name to another one. Full files keep their names, and may be
        # thousands.
        self._files = {path: path.open("rb") for path in paths if not is_full(path)}
        for file in self._files.values():
            weakref.finalize(self, file.close)
        self._ends: dict[Path, int] = {}
        videos, versions, segments = bytearray(), bytearray(), bytearray()
        for path in paths:
            reader = GroupReader(path, file=self._files.get(path))
            for values in (line for group in reader for line in group):
                video = values["video"]
                videos += hash_key(video)
                versions += hash_key(*(values.get(name) for name in VERSION_FIELDS))
                span = (values.get(name) for name in ("start_seconds", "end_seconds"))
                times = (None if time is None else float(time) for time in span)
                segments += hash_key(video, values.get("sample", 0), *times)
            self._ends[path] = reader.end
            if reader.is_unfinished:
                logger.warning("%s: skipping the last video, whose captions are not completely written", path)
        self._videos = keys_to_array(videos)
        self._counts = _is_last(keys_to_array(segments)) & _is_latest_version(self._videos, keys_to_array(versions))

    def __len__(self) -> int:
        return int(np.count_nonzero(self._counts))

    def __iter__(self) -> Iterator[Caption]:
        lines = (
            (path, values)
            for path, end in self._ends.items()
            for group in GroupReader(path, file=self._files.get(path), end=end)
            for values in group
        )
        for (path, values), counts in zip(lines, self._counts, strict=True):
            if counts:
                try:
                    yield parse_record(values, Transcript if "speech" in values else Caption)
                except ValueError as error:
                    raise LedgerError(f"{path}: {error}") from error

    def by_video(self) -> Iterator[list[Caption]]:
        """Yield the captions of each video in order of time.

        Captions of a video that are not consecutive, because a retry added some, are held until the last one has been
        read.
        """
        videos = self._videos[self._counts]
        is_run_start = np.ones(len(videos), bool)
        is_run_start[1:] = videos[1:] != videos[:-1]
        keys, num_runs = np.unique(videos[is_run_start], return_counts=True)
        missing_runs = dict(zip(keys[num_runs > 1].tolist(), num_runs[num_runs > 1].tolist(), strict=True))
        held: dict[str, list[Caption]] = {}
        for video, run in groupby(self, key=lambda caption: caption.video):
            captions = [*held.pop(video, []), *run]
            key = hash_key(video).rstrip(b"\0")  # as numpy returns it
            missing_runs[key] = missing_runs.get(key, 1) - 1
            if missing_runs[key]:
                held[video] = captions
            else:
                del missing_runs[key]
                yield sorted(captions, key=lambda caption: caption.start_seconds or 0.0)


def _is_last(keys: np.ndarray) -> np.ndarray:
    """Return a mask (N,) of the keys (N,) that are not repeated later."""
    order, ends = _sort_into_runs(keys)
    is_last = np.zeros(len(keys), bool)
    is_last[order[ends]] = True
    return is_last


def _is_latest_version(videos: np.ndarray, versions: np.ndarray) -> np.ndarray:
    """Return a mask (N,) of the lines about the same version (N,) of a video (N,) as the last line about that video."""
    order, ends = _sort_into_runs(videos)
    run = np.cumsum(ends) - ends
    is_latest = np.zeros(len(videos), bool)
    is_latest[order] = versions[order] == versions[order[ends]][run]
    return is_latest


def _sort_into_runs(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a stable sorting order (N,) of keys (N,), and a mask (N,) of the last key of each run of equal ones."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    ends = np.ones(len(keys), bool)
    ends[:-1] = ordered[1:] != ordered[:-1]
    return order, ends


def export_table(captions: LatestCaptions, out: Path) -> None:
    """Write captions to one file, which appears when it is complete.

    Args:
        captions: captions to write.
        out: output file; its suffix selects the format: .csv, .parquet or .jsonl.

    Raises:
        ValueError: the suffix is none of these, or `out` is a file of the run that made the captions.
    """
    if out.suffix not in TABLES:
        raise ValueError(f"{out}: unknown format; choose a name that ends in {', '.join(TABLES)}")
    require_no_run_file(out, {LedgerFiles.of(path) for path in captions.paths})
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(out) as temporary:
        TABLES[out.suffix](captions, temporary)


def require_no_run_file(out: Path, runs: Iterable[LedgerFiles]) -> None:
    """Raise a ValueError if a file to be written is one of the captions files of a run, or lies next to one."""
    if any(files.owns(out) for files in runs):
        raise ValueError(f"{out} is one of the captions files, or of the files next to them; choose another name")


def export_subtitles(captions: LatestCaptions, subtitles: SubtitleWriter) -> tuple[int, list[Failure]]:
    """Write subtitle files.

    Args:
        captions: captions to write.
        subtitles: how they are written.

    Returns:
        The number of videos, and why some files could not be written.
    """
    num_videos, failures = 0, []
    for group in captions.by_video():
        failures += subtitles.write(group)
        num_videos += 1
    return num_videos, failures


def _to_row(caption: Caption) -> dict[str, Any]:
    """Return the columns of a table; mappings by name of the prompt become JSON, or "" if they are empty."""
    row = asdict(caption)
    return row | {
        name: json.dumps(row[name], ensure_ascii=False) if row[name] else ""
        for name in ("captions", "shaping", "fusion", "structure")
    }


def _write_csv(captions: LatestCaptions, path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")  # the words of transcripts
        writer.writeheader()
        for caption in captions:
            writer.writerow(_to_row(caption) | {"warnings": "\n".join(caption.warnings)})


def _write_jsonl(captions: LatestCaptions, path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(caption), ensure_ascii=False) + "\n" for caption in captions)


def write_parquet(captions: Iterable[Caption], path: Path) -> None:
    """Write captions to a Parquet file; raises a ValueError if pyarrow is missing."""
    try:
        import pyarrow  # noqa: PLC0415 - an extra
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError as error:
        raise ValueError("Parquet needs pyarrow: pip install 'salmonn[parquet]', or export to .csv") from error
    types: dict[Any, Any] = {
        str: pyarrow.string(),
        bool: pyarrow.bool_(),
        int: pyarrow.int64(),
        int | None: pyarrow.int64(),
        str | None: pyarrow.string(),
        float | None: pyarrow.float64(),
        Modality | None: pyarrow.string(),
        tuple[str, ...]: pyarrow.list_(pyarrow.string()),
        dict[str, str]: pyarrow.string(),
        dict[str, Shaping]: pyarrow.string(),
        Fusion | None: pyarrow.string(),
        EventCaption | None: pyarrow.string(),
    }
    schema = pyarrow.schema([(field.name, types[field.type]) for field in fields(Caption)])
    rows = map(_to_row, captions)
    with parquet.ParquetWriter(path, schema) as writer:
        while group := list(islice(rows, ROW_GROUP_SIZE)):
            writer.write_table(pyarrow.Table.from_pylist(group, schema))


TABLES: dict[str, Callable[[LatestCaptions, Path], None]] = {
    ".csv": _write_csv,
    ".parquet": write_parquet,
    ".jsonl": _write_jsonl,
}


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Provide a temporary file that is renamed to `path` on success."""
    temporary = temporary_path(path)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise LedgerError(cannot_write(path, error)) from error
    finally:
        temporary.unlink(missing_ok=True)
