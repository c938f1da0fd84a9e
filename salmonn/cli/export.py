"""`salmonn export`: captions as a table, or as texts beside the videos."""

import sys
from pathlib import Path

from jsonargparse import Namespace

from salmonn.cli.codes import SOME_FAILED
from salmonn.config import FlagParser


def export_parser() -> FlagParser:
    """Arguments of `salmonn export`."""
    parser = FlagParser(
        description="Turn captions into one table, or into side-cars beside the videos. Of a video that was captioned "
        "several times the latest counts; the files are taken in the order in which they were written."
    )
    parser.add_argument("captions", nargs="+", type=Path, help="JSONL files of `salmonn caption`, shards and all")
    parser.add_argument(
        "--to", nargs="+", type=str, required=True, help="names that end in .csv (to be opened in a "
        "spreadsheet as text), .parquet or .jsonl; or txt, srt, vtt"
    )  # fmt: skip
    parser.add_argument("--subtitle-dir", type=Path | None, default=None, help="folder for txt, srt and vtt")
    parser.add_argument("--replace-subtitles", action="store_true", help="also files of those names that are not ours")
    return parser


def run_export(values: Namespace) -> int:
    """Write captions in other forms."""
    from salmonn.batch.export import TABLES, LatestCaptions, export_subtitles, export_table
    from salmonn.batch.ledger_files import FAILED, SIDECARS, LedgerFiles, in_order
    from salmonn.batch.subtitles import FORMATS, SubtitleWriter

    formats = [name for name in FORMATS if name in values.to]
    tables = [Path(name) for name in values.to if name not in FORMATS]
    if wrong := [str(path) for path in tables if path.suffix not in TABLES]:
        raise ValueError(
            f"--to {' '.join(wrong)}: give names that end in {', '.join(TABLES)}, or one of {', '.join(FORMATS)}"
        )
    # `captions*.jsonl` finds the lists that stand beside them, too.
    paths = [path for path in values.captions if not path.name.endswith((FAILED, SIDECARS))]
    for path in values.captions:
        if not path.is_file():
            raise ValueError(f"{path}: there is no such file; give JSONL files of `salmonn caption`")
    if not paths:
        raise ValueError(f"{values.captions[0]} holds no captions; give JSONL files of `salmonn caption`")
    _tell_others(paths)
    latest = LatestCaptions(in_order(paths))
    for path in tables:
        export_table(latest, path)
        sys.stderr.write(f"{len(latest)} captions in {path}\n")
    if not formats:
        return 0
    files = LedgerFiles.of(paths[0])
    with SubtitleWriter(
        formats,
        log=files.subtitles,
        logs=files.all_subtitles(),
        folder=values.subtitle_dir,
        replace=values.replace_subtitles,
    ) as subtitles:
        num_videos, failures = export_subtitles(latest, subtitles)
    for failure in failures:
        sys.stderr.write(f"failed: {failure.reason}\n")
    sys.stderr.write(f"{', '.join(formats)} of {num_videos} videos, {len(failures)} could not be written\n")
    return SOME_FAILED if failures else 0


def _tell_others(paths: list[Path]) -> None:
    """Say where files of the same run, full ones or other shards', are not among those that are named."""
    from salmonn.batch.ledger_files import LedgerFiles

    named = {path.resolve() for path in paths}
    for files in {LedgerFiles.of(path) for path in paths}:
        if others := [path for path in files.all_captions() if path.resolve() not in named]:
            sys.stderr.write(
                f"{len(others)} more of the same run, as {others[0]}, are left out: to have all its captions name "
                f"{files.out.with_name(files.out.stem)}*{files.out.suffix}\n"
            )
