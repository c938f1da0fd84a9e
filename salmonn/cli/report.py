"""`salmonn report`: an HTML page to look through the captions of a run."""

import logging
import sys
from pathlib import Path

from jsonargparse import Namespace
from tqdm import tqdm

from salmonn.cli.options import plural
from salmonn.config import FlagParser


def report_parser() -> FlagParser:
    """Return the arguments of `salmonn report`."""
    parser = FlagParser(
        description="Write an HTML page of captions with a picture of each clip, lengths and failures, with search and "
        "filters. The page works offline. If a video was captioned several times, its latest captions are shown."
    )
    parser.add_argument("captions", nargs="+", type=Path, help="JSONL files from `salmonn caption`, of all shards")
    parser.add_argument("--out", type=Path, required=True, help="file for the page, such as report.html")
    parser.add_argument("--root", type=Path, default=Path(), help="folder that the paths of the videos start from")
    parser.add_argument("--title", type=str | None, default=None, help="heading (default: name of the captions file)")
    parser.add_argument("--thumbnails", type=int, default=10_000, help="maximum number of pictures (0: none)")
    parser.add_argument("--workers", type=int | None, default=None, help="processes that decode files (default: cores)")
    parser.add_argument("--read_seconds", type=float, default=60.0, help="time limit for the picture of a file")
    parser.add_argument("--read_gib", type=float, default=4.0, help="memory limit for decoding a file")
    return parser


def run_report(values: Namespace) -> int:
    """Write the page; files without a picture are counted, and named on the page."""
    from salmonn.batch.report import make_thumbnails, write_report
    from salmonn.batch.review import read_rows
    from salmonn.caption.loader import ClipReader, default_num_workers
    from salmonn.caption.worker import WorkerLimits

    if values.thumbnails < 0:
        raise ValueError(f"--thumbnails must be 0 (none) or more, got {values.thumbnails}")
    if values.workers is not None and values.workers < 1:
        raise ValueError(f"--workers must be at least 1, got {values.workers}")
    if values.out.resolve() in {path.resolve() for path in values.captions}:
        raise ValueError(f"--out {values.out} is one of the captions files; choose another name")
    limits = WorkerLimits(values.read_seconds, values.read_gib)
    rows = read_rows(values.captions)
    media_log = logging.getLogger("salmonn.media")
    level = media_log.level
    media_log.setLevel(logging.ERROR)  # the captions have the warnings of each file
    parts = {(row.record.video, row.record.start_seconds, row.record.end_seconds) for row in rows}
    count = min(len(parts), values.thumbnails)
    workers = (values.workers or default_num_workers(count)) if count else 0
    with ClipReader(workers=workers, limits=limits) as reader, tqdm(total=count, desc="pictures", unit="clip") as bar:
        thumbnails = make_thumbnails(
            rows, reader=reader, page=values.out, root=values.root, captions_dir=values.captions[0].parent,
            limit=values.thumbnails, progress=bar.update,
        )  # fmt: skip
    media_log.setLevel(level)
    write_report(values.out, rows, thumbnails, title=values.title or values.captions[0].name)
    without = sum(isinstance(number, str) for number in thumbnails.numbers)
    said = f"; {without} without a picture, for reasons on the page" if without else ""
    sys.stderr.write(f"wrote {plural(len(rows), 'row')} to {values.out}{said}\n")
    return 0
