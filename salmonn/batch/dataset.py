"""The file from which a trainer of video generators reads its clips and captions, in the trainer's own columns.

It is written at the end of a run, from the captions files, so it holds what all runs have captioned so far. An existing
file is overwritten only as long as it is exactly as this tool wrote it, as for subtitles.
"""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from salmonn.batch.containers import split_member
from salmonn.batch.discovery import Shard
from salmonn.batch.export import LatestCaptions, atomic_file, require_no_run_file
from salmonn.batch.ledger_files import SUBTITLES_SUFFIX, LedgerError, LedgerFiles
from salmonn.batch.remote import is_url
from salmonn.batch.subtitles import WrittenFiles
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


class DatasetWriter:
    """Writes the dataset file of a run.

    Args:
        path: dataset file; the suffix selects the format.
        layout: columns.
        files: files of the run, which log what it wrote.
        replace: overwrite a file that the run did not write, too.

    Raises:
        ValueError: there is such a file, or `path` is that of a file of the run itself.
    """

    def __init__(self, path: Path, layout: DatasetLayout, *, files: LedgerFiles, replace: bool = False) -> None:
        self.path = path
        self._layout = layout
        self._files = files
        self._written = WrittenFiles(files.subtitles, logs=files.find(SUBTITLES_SUFFIX), replace=replace)
        self._require_own()

    def write(self, captions: LatestCaptions | None = None) -> int:
        """Write the file, which appears when it is complete; return the number of clips in it.

        Args:
            captions: captions to write; None: those of the run.

        Raises:
            ValueError: a video lies outside the folder of the file, where trainers do not find it, or the file was
                changed in the meantime.
        """
        if captions is None:
            files = self._files
            captions = LatestCaptions(files.own_captions() if files.shard.count > 1 else files.all_captions())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = _rows(captions, self._layout, self.path.parent)
        with atomic_file(self.path) as temporary:
            with temporary.open("w", encoding="utf-8", newline="") as file:
                _write_rows(file, rows, self._layout, self.path.suffix)
            self._require_own()  # once more: captioning may have taken days
            self._written.add(self.path.absolute(), _NO_VIDEO, temporary)
        return len(captions)

    def _require_own(self) -> None:
        require_no_run_file(self.path, [self._files])
        remedy = "choose another file (finished captions are saved)"
        self._written.require_own(self.path.absolute(), _NO_VIDEO, remedy=remedy)


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
