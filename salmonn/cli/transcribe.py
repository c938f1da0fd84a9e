"""`salmonn transcribe`: recognize speech in videos, and add it to references."""

import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import fields
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import Namespace
from tqdm import tqdm

from salmonn.caption.transcribe import WhisperConfig
from salmonn.cli.caption import (
    list_videos,
    report_results,
    report_skipped,
    report_state,
    subtitle_writer,
    write_tables,
)
from salmonn.cli.caption_options import add_input_options, add_reading_options, column_setting, fetch_config
from salmonn.cli.caption_outputs import out_path, require_local
from salmonn.cli.options import SOME_FAILED, add_subtitle_options, garbage_kept, plural
from salmonn.config import FlagParser
from salmonn.files import read_records, write_records
from salmonn.records import Reference

if TYPE_CHECKING:
    from salmonn.batch.discovery import VideoListing
    from salmonn.batch.job import CaptionJob
    from salmonn.batch.ledger import Ledger
    from salmonn.batch.ledger_files import LedgerFiles
    from salmonn.caption.transcribe import Transcriber
    from salmonn.caption.worker import WorkerLimits

# Settings that transcripts depend on; a run with other ones does not resume it.
JOB_SETTINGS = ("whisper_model", "language", "dtype", "word_times", "no_speech_threshold")


def transcribe_parser() -> FlagParser:
    """Return the arguments of `salmonn transcribe`."""
    parser = FlagParser(
        description="Transcribe the speech of videos (files, or folders searched recursively) with Whisper, with the "
        "time of each word, and write one JSON line for each video. Runs are resumed, and failures listed, as by "
        "`salmonn caption`. A video without audio or without speech gets an empty transcript. Needs the extra speech."
    )
    add_input_options(parser, verb="transcribe")
    group = parser.add_argument_group("References")
    group.add_argument(
        "--references", type=Path | None, default=None, help="JSONL of references: add speech events that quote the "
        "transcripts of their videos (without paths, all of these are transcribed); the old file gets the suffix .old"
    )  # fmt: skip
    replaces = "with --references, replace the speech events that already quote words"
    group.add_argument("--replace_speech", action="store_true", help=replaces)
    group = parser.add_argument_group("Output")
    group.add_argument("--out", type=out_path, required=True, help="JSONL file for the transcripts")
    formats = Literal["csv", "parquet", "txt", "srt", "vtt", "json"]
    group.add_argument(
        "--export", nargs="+", type=formats, default=[], help="csv, parquet: a table next to --out, written last; "
        "txt, srt, vtt, json: a file next to each video, written with its transcript"
    )  # fmt: skip
    add_subtitle_options(group)
    lines = "split the output: transcripts.00001.jsonl, ..."
    group.add_argument("--lines_per_file", type=int | None, default=None, help=lines)
    group.add_argument("--overwrite", action="store_true", help="start over; old files get the suffix .old")
    group.add_argument("--quiet", action="store_true", help="print only errors")
    add_reading_options(parser.add_argument_group("Speed and limits"))
    parser.add_argument_group("Speech recognition").add_class_arguments(WhisperConfig, as_group=False)
    return parser


def run_transcribe(values: Namespace) -> int:
    """Transcribe videos into JSONL files."""
    from salmonn.batch.ledger import Ledger
    from salmonn.batch.ledger_files import LedgerFiles
    from salmonn.caption.transcribe import check_config
    from salmonn.caption.worker import WorkerLimits

    values.engine = "local"
    config = WhisperConfig(**{field.name: values[field.name] for field in fields(WhisperConfig)})
    references = _check(values)
    if not values.dry_run:
        check_config(config)
    listing, limits = list_videos(values), WorkerLimits(values.read_seconds, values.read_gib)
    if not values.retry_failed:
        listing.require_any()
    files = LedgerFiles(values.out, listing.shard)
    ledger = Ledger(
        files,
        job={name: values[name] for name in JOB_SETTINGS} | _fingerprint(config) | column_setting(values),
        lines_per_file=values.lines_per_file,
        overwrite=values.overwrite,
        read_only=values.dry_run,
    )
    with ledger:
        if values.dry_run:
            return _count(values, ledger, listing)
        num_failed = _transcribe(values, ledger, listing, config=config, limits=limits)
    if references is not None:
        _add_speech(values, files, references)
    return SOME_FAILED if num_failed else 0


def _check(values: Namespace) -> list[Reference] | None:
    """Raise a ValueError for values that make no sense; return the references, whose videos are the default paths."""
    require_local(values.out)
    if values.out.suffix != ".jsonl":
        raise ValueError(f"--out {values.out} must end in .jsonl (for tables and subtitles, use --export)")
    if values.limit is not None and (values.limit < 1 or values.retry_failed):
        raise ValueError("--limit must be at least 1, and is not used with --retry-failed")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("salmonn transcribe does not run under torchrun; start a process with --shard on each GPU")
    if values.replace_speech and values.references is None:
        raise ValueError("--replace-speech needs --references")
    if values.references is None:
        return None
    if values.shard:
        raise ValueError("--references needs the transcripts of all shards: run it without --shard at the end")
    if values.references.suffix != ".jsonl":
        raise ValueError(f"--references {values.references} must be JSON lines, and end in .jsonl")
    if values.references.resolve() == values.out.resolve():
        raise ValueError(f"--out would overwrite the references, {values.references}; choose another name")
    references = read_records(values.references, Reference)
    if not values.paths and values.list is None:
        values.paths = [str(values.references.parent / one.video) for one in references]
    return references


def _fingerprint(config: WhisperConfig) -> dict[str, str]:
    """Identify a checkpoint that is a file; a published name stands for the same weights everywhere."""
    path = Path(config.whisper_model)
    if not path.is_file():
        return {}
    found = path.stat()
    return {"model_files": f"{found.st_size} bytes of {found.st_mtime_ns}"}


def _count(values: Namespace, ledger: "Ledger", listing: "VideoListing") -> int:
    """Print how many videos a run would transcribe."""
    from salmonn.batch.job import CaptionJob

    job = CaptionJob(ledger, is_retry=values.retry_failed, max_failures=0)
    found = ledger.to_retry(listing) if values.retry_failed else listing.videos()
    videos = [video for _, video in islice(job.pending(found), values.limit)]
    sys.stdout.write(f"would transcribe {plural(len(videos), 'video')}\n")
    report_skipped(job.stats, listing, ledger.files, sys.stdout)
    return 0


def _transcribe(
    values: Namespace, ledger: "Ledger", listing: "VideoListing", *, config: WhisperConfig, limits: "WorkerLimits"
) -> int:
    """Transcribe what is left; return the number of failures, those of earlier runs included."""
    from salmonn.batch.job import CaptionJob

    report_state(ledger)
    with ExitStack() as stack:
        subtitles = subtitle_writer(values, ledger.files, limits)
        if subtitles:
            stack.enter_context(subtitles)
        job = CaptionJob(
            ledger,
            is_retry=values.retry_failed,
            max_failures=values.max_failures,
            subtitles=subtitles,
            on_failure=lambda reason: tqdm.write(f"failed: {reason}", file=sys.stderr),
        )
        found = ledger.to_retry(listing) if values.retry_failed else listing.videos()
        pending = islice(job.pending(found), values.limit)
        speed = _run(job, pending, values=values, config=config, limits=limits)
        job.finish()
        write_tables(values, ledger.files)
    if not values.quiet:
        out = str(ledger.files.captions)
        report_results(job.stats, out, speed, may_export=values.export, noun="transcript", verb="transcribe")
        report_skipped(job.stats, listing, ledger.files, sys.stderr)
    return job.stats.failed + job.stats.failed_before


def _run(
    job: "CaptionJob", pending: Iterator, *, values: Namespace, config: WhisperConfig, limits: "WorkerLimits"
) -> str:
    """Transcribe the pending videos; return the speed, as it goes into the summary."""
    from salmonn.batch.fetch import Fetcher
    from salmonn.batch.job import show_progress
    from salmonn.batch.transcribe import transcribe_videos
    from salmonn.caption.loader import MAX_WORKERS, ClipReader, default_num_workers

    first = list(islice(pending, MAX_WORKERS))
    if not first:  # no model is needed
        return ""
    workers = default_num_workers(len(first)) if values.workers is None else values.workers
    with ExitStack() as stack:
        fetcher = stack.enter_context(Fetcher(fetch_config(values)))
        reader = stack.enter_context(ClipReader(workers=workers, limits=limits, bucket_share=fetcher.bucket_share))
        videos = chain(first, pending)
        results = transcribe_videos(load_transcriber(config), videos, reader=reader, fetcher=fetcher)
        stack.enter_context(closing(results))
        update = stack.enter_context(
            show_progress(job.stats, count=None, is_shown=not values.quiet, title="transcribing")
        )
        start = time.perf_counter()
        for result in results:
            job.save(result)
            update()
        seconds = time.perf_counter() - start
    return f"; {60 * job.stats.videos / seconds:.1f} files per minute"


def load_transcriber(config: WhisperConfig) -> "Transcriber":
    """Load the speech recognizer."""
    from salmonn.caption.transcribe import WhisperTranscriber

    with garbage_kept():
        return WhisperTranscriber.load(config)


def _add_speech(values: Namespace, files: "LedgerFiles", references: list[Reference]) -> None:
    """Add the transcripts to the references; keep the old file under a name that ends in .old."""
    from salmonn.batch.ledger_files import backup_path
    from salmonn.batch.transcripts import TranscriptFiles, add_speech

    path: Path = values.references
    transcripts = TranscriptFiles(files.all_captions())
    changed, counts = add_speech(references, transcripts, root=path.parent, replace_quoted=values.replace_speech)
    if changed != references:
        backup = backup_path(path)
        shutil.copy2(path, backup)
        write_records(path, changed)
        if not values.quiet:
            sys.stderr.write(f"{path}: the old file is {backup}\n")
    if values.quiet:
        return
    shown = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
    sys.stderr.write(f"speech of {plural(len(references), 'reference')}: {shown or 'none'}\n")
    if counts["quoted before"]:
        sys.stderr.write("references that quoted speech before are unchanged; use --replace-speech to replace it\n")
