"""The file from which a trainer of video generators reads its clips and captions, in the trainer's own columns.

It is written at the end of a run, from the captions files, so it holds what all runs have captioned so far. An existing
file is overwritten only as long as it is exactly as this tool wrote it, as for subtitles.
"""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from salmonn.batch.containers import split_member
from salmonn.batch.discovery import Shard
from salmonn.batch.export import LatestCaptions, atomic_file
from salmonn.batch.ledger_files import (
    SUBTITLES_SUFFIX,
    HashSet,
    LedgerError,
    LedgerFiles,
    append_records,
    read_complete,
    repair_last_line,
)
from salmonn.batch.remote import is_url
from salmonn.batch.subtitles import SubtitleFile
from salmonn.caption.fields import check_template, fill
from salmonn.caption.presets import DatasetLayout
from salmonn.records import Caption

DATASET_SUFFIXES = (".json", ".jsonl", ".csv")
DATASET_FIELDS = ("path", "caption", "name", "folder")
DEFAULT_COLUMNS = {"video": "{path}", "caption": "{caption}"}
_NO_VIDEO = ""  # in the log of written files: the file belongs to all videos


def check_layout(layout: DatasetLayout, *, names: Sequence[str] = ()) -> None:
    """Raise a ValueError for a layout that cannot be written.

    Args:
        layout: the layout.
        names: names of the prompts, which are fields, too.
    """
    if Path(layout.file).suffix not in DATASET_SUFFIXES:
        raise ValueError(f"--dataset {layout.file} must end in {', '.join(DATASET_SUFFIXES)}")
    if not layout.columns:
        raise ValueError("the dataset has no columns; name some, such as video: '{path}'")
    if clash := sorted(set(names) & set(DATASET_FIELDS)):
        raise ValueError(f"the prompt {clash[0]!r} has the name of a field of datasets; rename it")
    for column, template in layout.columns.items():
        check_template(template, what=f"the column {column} of the dataset", known=(*DATASET_FIELDS, *names))


def shard_path(path: Path, shard: Shard) -> Path:
    """Return the path of the file that one process writes: with the number of its shard, if there are several."""
    if shard.count == 1:
        return path
    return path.with_name(f"{path.stem}-{shard.number}-of-{shard.count}{path.suffix}")


def check_dataset(path: Path, files: LedgerFiles, *, replace: bool) -> None:
    """Raise a ValueError if a dataset file exists that this tool did not write, or that has been changed since.

    Args:
        path: dataset file.
        files: files of the run, which log what it wrote.
        replace: whether it may be overwritten anyway.
    """
    if replace or not path.exists():
        return
    logs = files.find(SUBTITLES_SUFFIX)
    ours = HashSet(b"".join(one.key for log in logs for one in read_complete(log, SubtitleFile)))
    if _written(path, path).key not in ours:
        raise ValueError(
            f"{path} exists and was not written by this run, or has been changed since; use --replace-subtitles to "
            "overwrite it or --dataset to choose another file"
        )


def write_dataset(files: LedgerFiles, layout: DatasetLayout, path: Path) -> int:
    """Write the dataset file of a run, which appears when it is complete; return the number of clips in it.

    Args:
        files: files of the run.
        layout: columns.
        path: dataset file; the suffix selects the format.

    Raises:
        ValueError: a video lies outside the folder of the file, where trainers do not find it.
    """
    latest = LatestCaptions(files.own_captions() if files.shard.count > 1 else files.all_captions())
    repair_last_line(files.subtitles)

    def log(temporary: Path) -> None:  # before it gets its name, so that every file under that name is known
        append_records(files.subtitles, [_written(path, temporary)])

    return export_dataset(latest, layout, path, on_written=log)


def export_dataset(
    captions: LatestCaptions,
    layout: DatasetLayout,
    path: Path,
    *,
    on_written: Callable[[Path], object] = lambda temporary: None,
) -> int:
    """Write captions as a dataset file; see `write_dataset`.

    Args:
        captions: captions to write.
        layout, path: see `write_dataset`.
        on_written: called with the complete file before it gets its name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = _rows(captions, layout, path.parent)
    with atomic_file(path) as temporary:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            _write_rows(file, rows, layout, path.suffix)
        on_written(temporary)
    return len(captions)


def _written(path: Path, place: Path) -> SubtitleFile:
    """Return the record of a dataset file by its path, and by where it lies now."""
    found = place.stat()
    return SubtitleFile(str(path.absolute()), _NO_VIDEO, found.st_size, found.st_mtime_ns)


def _rows(captions: LatestCaptions, layout: DatasetLayout, folder: Path) -> Iterator[dict[str, str]]:
    root = folder.absolute().resolve()
    for caption in captions:
        values = _values(caption, root)
        try:
            yield {column: fill(template, values) for column, template in layout.columns.items()}
        except KeyError as error:
            raise LedgerError(
                f"{caption.video} has no caption named {error}, which the dataset has a column for"
            ) from None


def _values(caption: Caption, root: Path) -> dict[str, str]:
    if is_url(caption.video) or split_member(caption.video):
        raise LedgerError(f"{caption.video} is not a local file, and a dataset file lists those; download the videos")
    video = Path(caption.video)
    if caption.num_segments > 1:
        raise LedgerError(
            f"{video} was captioned in segments, and a dataset has one caption for each file; cut the clips"
        )
    # The file itself may be a link to elsewhere, and still be listed in its folder.
    place = video.parent.absolute().resolve() / video.name
    if not place.is_relative_to(root):
        raise LedgerError(
            f"{video} lies outside {root}, the folder of the dataset file, where trainers look for videos; choose a "
            "file above all videos with --dataset (finished work is saved)"
        )
    return {
        **caption.captions,
        "path": place.relative_to(root).as_posix(),
        "caption": caption.text,
        "name": video.stem,
        "folder": place.parent.name,
    }


def _write_rows(file: TextIO, rows: Iterator[dict[str, str]], layout: DatasetLayout, suffix: str) -> None:
    if suffix == ".csv":
        writer = csv.DictWriter(file, list(layout.columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return
    lines = (json.dumps(row, ensure_ascii=False) for row in rows)
    if suffix == ".jsonl":
        file.writelines(line + "\n" for line in lines)
        return
    file.write("[")
    for number, line in enumerate(lines):
        file.write(("," if number else "") + "\n  " + line)
    file.write("\n]\n")
