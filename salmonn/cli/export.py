"""`salmonn export`: write captions as a table or as subtitles, and preferences as rows for other libraries."""

import sys
from pathlib import Path
from typing import Literal

from jsonargparse import Namespace

from salmonn.cli.caption_outputs import report_unwritten, require_local
from salmonn.cli.options import SOME_FAILED, add_subtitle_options, plural
from salmonn.config import FlagParser


def export_parser() -> FlagParser:
    """Return the arguments of `salmonn export`."""
    parser = FlagParser(
        description="Export captions to a table, or to subtitle files next to the videos. If a video was captioned "
        "several times, its latest captions count; files are read in the order in which they were written. With "
        "--rows, export preferences instead (docs/reward.md)."
    )
    parser.add_argument(
        "captions",
        nargs="+",
        type=Path,
        help="JSONL files from `salmonn caption`, of all shards; with --rows a folder or file of preferences",
    )
    parser.add_argument(
        "--to", nargs="+", type=str, required=True, help="file names that end in .csv (in a spreadsheet, import as "
        "text), .parquet or .jsonl; folders of shards that end in .datasets or .webdataset; or txt, srt, vtt, json for "
        "files next to the videos"
    )  # fmt: skip
    preset_help = (
        "list videos and captions in the columns of this preset (see salmonn caption --preset list), in a file "
    )
    preset_help += "that ends in .json, .jsonl or .csv"
    parser.add_argument("--preset", type=str | None, default=None, help=preset_help)
    add_subtitle_options(parser)
    group = parser.add_argument_group("Preferences as rows for other libraries")
    rows_help = (
        "trl: prompt, chosen and rejected messages of each comparison; helpsteer: prompt, response and grades of "
    )
    rows_help += "each judged caption"
    group.add_argument("--rows", type=Literal["trl", "helpsteer"] | None, default=None, help=rows_help)
    group.add_argument("--root", type=Path | None, default=None, help="folder that the paths of the videos start from")
    references_help = "for helpsteer: JSONL of the references that the captions were judged against"
    group.add_argument("--references", type=Path | None, default=None, help=references_help)
    gap_help = (
        "for trl, of judged captions or ratings of `salmonn reward`: smallest difference of the captions of a pair"
    )
    group.add_argument("--min_gap", type=float, default=0.1, help=gap_help)
    margin_help = "for trl: add the margins, which TRL's RewardTrainer subtracts in its loss"
    group.add_argument("--margin", action="store_true", help=margin_help)
    return parser


def run_export(values: Namespace) -> int:
    """Write captions or preferences in other formats."""
    require_local(*values.to)
    _check_subtitle_options(values)
    if values.rows:
        return _export_rows(values)
    from salmonn.batch.export import TABLES, LatestCaptions, export_subtitles, export_table
    from salmonn.batch.folders import FOLDERS, export_folder
    from salmonn.batch.ledger_files import SUBTITLES_SUFFIX, LedgerFiles, in_order
    from salmonn.batch.subtitles import SUBTITLE_FORMATS, SubtitleWriter

    if values.preset:
        return _export_dataset(values)
    formats = [name for name in SUBTITLE_FORMATS if name in values.to]
    tables = [Path(name) for name in values.to if name not in SUBTITLE_FORMATS]
    if unknown := [str(path) for path in tables if path.suffix not in (*TABLES, *FOLDERS)]:
        raise ValueError(
            f"--to {' '.join(unknown)}: unknown format; use file names that end in {', '.join(TABLES)}, folders that "
            f"end in {', '.join(FOLDERS)}, or one of {', '.join(SUBTITLE_FORMATS)}"
        )
    paths = _require_captions(values.captions)
    _warn_about_others(paths)
    latest = LatestCaptions(in_order(paths))
    num_unwritten = 0
    for path in tables:
        if path.suffix in FOLDERS:
            num_unwritten += report_unwritten(export_folder(latest, path))
        else:
            export_table(latest, path)
        sys.stderr.write(f"{plural(len(latest), 'caption')} written to {path}\n")
    if not formats:
        return SOME_FAILED if num_unwritten else 0
    files = LedgerFiles.of(paths[0])
    with SubtitleWriter(
        formats,
        log=files.subtitles,
        logs=files.find(SUBTITLES_SUFFIX),
        folder=values.subtitle_dir,
        replace=values.replace_subtitles,
    ) as subtitles:
        num_videos, failures = export_subtitles(latest, subtitles)
    for failure in failures:
        sys.stderr.write(f"failed: {failure.reason}\n")
    names, videos, failed = ", ".join(formats), plural(num_videos, "video"), plural(len(failures), "file")
    sys.stderr.write(f"{names} files written for {videos}, {failed} failed\n")
    return SOME_FAILED if failures or num_unwritten else 0


def _check_subtitle_options(values: Namespace) -> None:
    """Raise ValueError for options of subtitles that would have no effect."""
    from salmonn.batch.subtitles import SUBTITLE_FORMATS

    has_subtitles = not (values.rows or values.preset) and any(name in SUBTITLE_FORMATS for name in values.to)
    if values.subtitle_dir is not None and not has_subtitles:
        raise ValueError(
            f"--subtitle-dir {values.subtitle_dir} is for subtitles, which --to {' '.join(values.to)} does not write; "
            f"omit it, or add {', '.join(SUBTITLE_FORMATS)} to --to"
            if not values.preset
            else "--subtitle-dir is for subtitles; with --preset, --to names the folder and the file"
        )
    # A file of --preset next to the videos is replaced as subtitles are.
    if values.replace_subtitles and not (has_subtitles or values.preset):
        raise ValueError(
            f"--replace-subtitles is for subtitles, which --to {' '.join(values.to)} does not write; other files are "
            "always replaced; omit it"
        )


def _export_dataset(values: Namespace) -> int:
    """List videos and captions as a trainer of video generators reads them."""
    from salmonn.batch.dataset import DATASET_SUFFIXES, DatasetWriter
    from salmonn.batch.export import LatestCaptions, require_no_run_file
    from salmonn.batch.ledger_files import LedgerFiles, in_order
    from salmonn.caption.presets import load_preset

    layout = load_preset(values.preset).dataset
    if layout is None:
        raise ValueError(f"--preset {values.preset} has no file that lists videos; its files are --to txt or the like")
    if len(values.to) > 1 or Path(values.to[0]).suffix not in DATASET_SUFFIXES:
        raise ValueError(f"with --preset, --to names one file that ends in {', '.join(DATASET_SUFFIXES)}")
    paths = _require_captions(values.captions)
    _warn_about_others(paths)
    require_no_run_file(Path(values.to[0]), {LedgerFiles.of(path) for path in paths})
    files = LedgerFiles.of(paths[0])
    dataset = DatasetWriter(Path(values.to[0]), layout, files=files, replace=values.replace_subtitles)
    number = dataset.write(LatestCaptions(in_order(paths)))
    sys.stderr.write(f"{plural(number, 'clip')} listed in {values.to[0]}\n")
    return 0


def _export_rows(values: Namespace) -> int:
    """Write preferences or judged captions as rows, and say what they cannot hold."""
    from salmonn.preference.export import export_rows

    if len(values.captions) > 1 or len(values.to) > 1 or Path(values.to[0]).suffix != ".jsonl":
        raise ValueError("--rows reads one folder or file of preferences, and --to names one file that ends in .jsonl")
    (source,), out = values.captions, Path(values.to[0])
    number, left_out = export_rows(
        source, out, kind=values.rows, root=values.root, references=values.references, min_gap=values.min_gap,
        with_margin=values.margin,
    )  # fmt: skip
    reasons = "".join(f"; left out: {reason} ({count})" for reason, count in left_out.items())
    sys.stderr.write(f"{plural(number, 'row')} written to {out}{reasons}\n")
    return 0


def _require_captions(named: list[Path]) -> list[Path]:
    """Return the captions files; `captions*.jsonl` also matches the files next to them."""
    from salmonn.batch.ledger_files import captions_among

    for path in named:
        if not path.is_file():
            raise ValueError(f"{path}: there is no such file; name JSONL files from `salmonn caption`")
    paths = captions_among(named)
    if not paths:
        raise ValueError(f"{named[0]} contains no captions; name JSONL files from `salmonn caption`")
    return paths


def _warn_about_others(paths: list[Path]) -> None:
    """Warn if the same run has more captions files, full ones or other shards', than are named."""
    from salmonn.batch.ledger_files import LedgerFiles

    named = {path.resolve() for path in paths}
    for files in {LedgerFiles.of(path) for path in paths}:
        if others := [path for path in files.all_captions() if path.resolve() not in named]:
            sys.stderr.write(
                f"{plural(len(others), 'more file')} of the same run, such as {others[0]}, not exported; to export all "
                f"of its captions, name {files.out.with_name(files.out.stem)}*{files.out.suffix}\n"
            )
