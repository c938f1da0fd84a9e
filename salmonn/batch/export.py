"""Captions in other forms: one CSV, Parquet or JSONL file of them all, or side-cars; ten million are never held.

    export_table(Latest([Path("captions.jsonl")]), Path("captions.csv"))

A file that was captioned several times, as it changed or was tried again, stands in the JSONL files several times.
What counts is the latest: of the lines on a video those that are about the file as the last of them found it, and of
these the last for each part. This takes two passes, of which the first keeps 48 bytes a line.
"""

import csv
import json
import logging
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np

from salmonn.batch.discovery import LogFunction
from salmonn.batch.hash_set import hash_key, to_array
from salmonn.batch.ledger_files import LedgerError, is_full, no_room, parse_line, read_groups
from salmonn.batch.subtitles import SubtitleWriter
from salmonn.records import Caption, Failure, parse_record

logger = logging.getLogger(__name__)

COLUMNS = tuple(field.name for field in fields(Caption))
ROW_GROUP = 10_000


class LatestCaptions:
    """The captions that count, of some files of them.

    Args:
        paths: JSONL files of captions, in the order in which they were written. A run may be adding to them: what
            counts is what is there now.

    Raises:
        LedgerError: a line is no caption.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        # Held, since the name will be another file's where a run finds it full; of full ones there may be thousands.
        self._files = {path: path.open("rb") for path in paths if not is_full(path)}
        for file in self._files.values():
            weakref.finalize(self, file.close)
        videos, versions, parts = bytearray(), bytearray(), bytearray()
        for _, values in self._lines(log=logger.warning):
            video = values["video"]
            videos += hash_key(video)
            versions += hash_key(values.get("size_bytes"), values.get("modified_ns"))
            span = (values.get(name) for name in ("start_seconds", "end_seconds"))
            parts += hash_key(video, values.get("sample", 0), *(None if time is None else float(time) for time in span))
        self._videos = to_array(videos)
        self._counts = _is_last(to_array(parts)) & _is_of_last(self._videos, to_array(versions))

    def __len__(self) -> int:
        return int(np.count_nonzero(self._counts))

    def __iter__(self) -> Iterator[Caption]:
        for (path, values), counts in zip(self._lines(), self._counts, strict=False):  # more may have come since
            if counts:
                try:
                    yield parse_record(values, Caption)
                except ValueError as error:
                    raise LedgerError(f"{path}: {error}") from error

    def by_video(self) -> Iterator[list[Caption]]:
        """The captions of each video, in order of time.

        Those that do not all stand together, since a retry added to them, are held until the last has come.
        """
        videos = self._videos[self._counts]
        begins = np.ones(len(videos), bool)
        begins[1:] = videos[1:] != videos[:-1]
        keys, num_runs = np.unique(videos[begins], return_counts=True)
        left = dict(zip(keys[num_runs > 1].tolist(), num_runs[num_runs > 1].tolist(), strict=True))
        held: dict[str, list[Caption]] = {}
        for video, run in groupby(self, key=lambda caption: caption.video):
            captions = [*held.pop(video, []), *run]
            key = hash_key(video).rstrip(b"\0")  # as numpy gives it back
            left[key] = left.get(key, 1) - 1
            if left[key]:
                held[video] = captions
            else:
                del left[key]
                yield sorted(captions, key=lambda caption: caption.start_seconds or 0.0)

    def _lines(self, *, log: LogFunction | None = None) -> Iterator[tuple[Path, dict[str, Any]]]:
        for path in self.paths:
            for group in read_groups(path, file=self._files.get(path), log=log):
                for line in group:
                    yield path, parse_line(line, path)


def _is_last(keys: np.ndarray) -> np.ndarray:
    """Which of some keys, (N,), no equal one follows, (N,) bool."""
    order, ends = _runs(keys)
    last = np.zeros(len(keys), bool)
    last[order[ends]] = True
    return last


def _is_of_last(videos: np.ndarray, versions: np.ndarray) -> np.ndarray:
    """Which lines, (N,) bool, are about the version, (N,), that the last line on their video, (N,), is about."""
    order, ends = _runs(videos)
    run = np.cumsum(ends) - ends
    of_last = np.zeros(len(videos), bool)
    of_last[order] = versions[order] == versions[order[ends]][run]
    return of_last


def _runs(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An order in which equal keys stand together, as they came; and where each run of them ends, (N,) bool."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    ends = np.ones(len(keys), bool)
    ends[:-1] = ordered[1:] != ordered[:-1]
    return order, ends


def export_table(captions: LatestCaptions, out: Path) -> None:
    """Write captions to one file, which appears whole or not at all.

    Args:
        captions: the ones.
        out: its suffix says what it becomes: .csv, .parquet or .jsonl.

    Raises:
        ValueError: of another suffix, or one of the files that are read.
    """
    if out.suffix not in TABLES:
        raise ValueError(f"{out}: cannot be written as that; choose a name that ends in {', '.join(TABLES)}")
    if out.resolve() in {path.resolve() for path in captions.paths}:
        raise ValueError(f"{out} is one of the files that are read: choose another name")
    out.parent.mkdir(parents=True, exist_ok=True)
    with _whole_file(out) as temporary:
        TABLES[out.suffix](captions, temporary)


def export_subtitles(captions: LatestCaptions, subtitles: SubtitleWriter) -> tuple[int, list[Failure]]:
    """Write side-cars of captions.

    Args:
        captions: the ones.
        sidecars: how they are written.

    Returns:
        Of how many videos, and why some could not be written.
    """
    count, failures = 0, []
    for group in captions.by_video():
        failures += subtitles.write(group)
        count += 1
    return count, failures


def _write_csv(captions: LatestCaptions, path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(map(asdict, captions))


def _write_jsonl(captions: LatestCaptions, path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(caption), ensure_ascii=False) + "\n" for caption in captions)


def _write_parquet(captions: LatestCaptions, path: Path) -> None:
    try:
        import pyarrow  # noqa: PLC0415 - an extra
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError as error:
        raise ValueError("Parquet needs pyarrow: pip install 'salmonn[parquet]', or export to .csv") from error
    whole, fraction = pyarrow.int64(), pyarrow.float64()
    kinds: dict[Any, Any] = {
        str: pyarrow.string(),
        bool: pyarrow.bool_(),
        int: whole,
        int | None: whole,
        float | None: fraction,
    }
    schema = pyarrow.schema([(field.name, kinds[field.type]) for field in fields(Caption)])
    rows = map(asdict, captions)
    with parquet.ParquetWriter(path, schema) as writer:
        while group := list(islice(rows, ROW_GROUP)):
            writer.write_table(pyarrow.Table.from_pylist(group, schema))


TABLES: dict[str, Callable[[LatestCaptions, Path], None]] = {
    ".csv": _write_csv,
    ".parquet": _write_parquet,
    ".jsonl": _write_jsonl,
}


@contextmanager
def _whole_file(path: Path) -> Iterator[Path]:
    """A temporary file that takes its name when all went well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise LedgerError(no_room(path, error)) from error
    finally:
        temporary.unlink(missing_ok=True)
