"""`salmonn caption`: caption videos, or ask a question about each."""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from functools import partial
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal, TextIO, get_args

from jsonargparse import Namespace
from tqdm import tqdm

from salmonn.caption.generator import SHIPPED_MODEL, CaptionRequest, Sampling, Span
from salmonn.cli.options import (
    SOME_FAILED,
    add_model_options,
    add_subtitle_options,
    garbage_kept,
    load_captioner,
    plural,
)
from salmonn.config import FlagParser
from salmonn.media.frame_sampling import FrameOptions
from salmonn.records import Caption, Modality

if TYPE_CHECKING:
    from salmonn.batch.discovery import VideoListing
    from salmonn.batch.job import CaptionJob, JobConfig, RunStats, VideoResult
    from salmonn.batch.ledger import Ledger
    from salmonn.batch.ledger_files import LedgerFiles
    from salmonn.caption.worker import WorkerLimits

# Settings that the captions depend on; a run with other ones does not resume it.
JOB_SETTINGS = (
    "model", "adapter", "prompt", "modality", "start", "end", "segment_seconds", "temperature", "top_p",
    "repetition_penalty", "stop", "logprobs", "max_new_tokens", "seed", "published_positions",
    "dtype", "bits", "reader", "frames",
)  # fmt: skip
STDOUT = "-"
TABLE_SUFFIXES = (".csv", ".parquet")  # of --out: a table is written at the end, from the JSONL file beside it
SAMPLING_FLAGS = ("temperature", "top_p", "repetition_penalty")
MODEL_FILES, ADAPTER_FILES = "model_files", "adapter_files"


def caption_parser() -> FlagParser:
    """Return the arguments of `salmonn caption`."""
    parser = FlagParser(
        description="Caption videos (files, or folders searched recursively) and write one JSON line for each. Videos "
        "that are already in --out are skipped: after an interruption, run the same command to resume. A file that "
        "cannot be captioned is listed in captions.failed.jsonl and does not stop the run; the exit code is then 1."
    )
    _add_input_options(parser)
    _add_generation_options(parser)
    _add_output_options(parser)
    _add_processing_options(parser)
    add_model_options(parser)
    return parser


def _add_input_options(parser: FlagParser) -> None:
    group = parser.add_argument_group("Input")
    group.add_argument("paths", nargs="*", type=str, help="video or audio files, or folders of them")
    listed = "file with one path per line, or separated by NUL bytes as by find -print0 (-: stdin)"
    group.add_argument("--list", type=str | None, default=None, help=listed)
    globs = "in folders, only files matching one of these patterns, such as '*.mp4' or 'train/**/*.mp4'"
    group.add_argument("--glob", nargs="+", action="extend", type=str, default=[], help=globs)
    group.add_argument("--shard", type=str | None, default=None, help="2/8: the second eighth of the videos")
    group.add_argument("--limit", type=int | None, default=None, help="caption at most N videos in this run")
    group.add_argument("--dry_run", action="store_true", help="only count the videos that would be captioned")
    group.add_argument("--retry_failed", action="store_true", help="only retry videos that failed in earlier runs")
    group.add_argument("--max_failures", type=int, default=20, help="stop after this many failures in a row (0: never)")


def _add_generation_options(parser: FlagParser) -> None:
    group = parser.add_argument_group("Prompt and sampling")
    group.add_argument("--prompt", type=str | None, default=None, help="question (default: ask for a full description)")
    modalities = "what the model is given: " + ", ".join(get_args(Modality))
    group.add_argument("--modality", type=Modality, default="both", help=modalities)
    group.add_argument("--start", type=float | None, default=None, help="start of the part to caption, in seconds")
    group.add_argument("--end", type=float | None, default=None, help="end of the part to caption, in seconds")
    group.add_argument(
        "--segment_seconds", type=float | None, default=None, help="caption every N seconds of a video separately"
    )
    group.add_argument(
        "--max_new_tokens", type=int | None, default=None, help="token limit of a caption (default: the model's own)"
    )
    frames = "sample this many frames, evenly over the video (default: by the model's own frame rate)"
    group.add_argument("--frames", type=int | None, default=None, help=frames)
    group.add_argument("--seed", type=int, default=0, help="random seed (combined with each video's path)")
    group.add_class_arguments(Sampling, as_group=False, skip={"max_new_tokens", "stop", "logprobs", "json_schema"})
    stops = "strings that end a caption; it is cut off before the first of them"
    logprobs = "record the log-probability of each caption (logprob, and num_tokens to divide it by)"
    group.add_argument("--logprobs", action="store_true", help=logprobs)
    group.add_argument("--stop", nargs="+", type=str, default=[], help=stops)


def _add_output_options(parser: FlagParser) -> None:
    formats = Literal["csv", "parquet", "txt", "srt", "vtt"]
    group = parser.add_argument_group("Output")
    outs = "file for the captions: .jsonl; .csv or .parquet, written at the end from the .jsonl beside it; -: stdout"
    group.add_argument("--out", type=Path, required=True, help=outs)
    group.add_argument(
        "--export", nargs="+", type=formats, default=[], help="csv, parquet: a table beside --out, written at the end; "
        "txt, srt, vtt: a file beside each video, written with its caption"
    )  # fmt: skip
    add_subtitle_options(group)
    group.add_argument(
        "--lines_per_file", type=int | None, default=None, help="split the output: captions.00001.jsonl, ..."
    )
    group.add_argument("--overwrite", action="store_true", help="start over; old files get the suffix .old")
    group.add_argument("--quiet", action="store_true", help="print only errors")


def _add_processing_options(parser: FlagParser) -> None:
    group = parser.add_argument_group("Speed and limits")
    group.add_argument("--batch_size", type=int | None, default=None, help="clips per batch (default: the model's own)")
    group.add_argument(
        "--workers", type=int | None, default=None, help="processes that decode files (0: decode in this process)"
    )
    group.add_argument("--read_seconds", type=float, default=900.0, help="time limit for decoding a file")
    group.add_argument("--read_gib", type=float, default=4.0, help="memory limit for decoding a file")
    group.add_argument("--engine", type=Literal["local", "ray"], default="local", help="ray: use a Ray cluster")
    group.add_argument(
        "--ray_actors", type=int | None, default=None, help="models on the Ray cluster (default: one per GPU)"
    )


def run_caption(values: Namespace) -> int:
    """Caption videos into JSONL files."""
    _check(values)  # before torch is imported, which takes seconds
    if values.dry_run:
        return _dry_run(values)
    with garbage_kept():
        from salmonn import dist

    if dist.world_size() > 1:
        dist.setup()
    try:
        with ExitStack() as stack:
            if values.quiet:
                root = logging.getLogger()
                stack.callback(root.setLevel, root.level)
                root.setLevel(logging.ERROR)
            to_stdout = str(values.out) == STDOUT
            if to_stdout:  # the run's other files are of no use once it has ended
                values.out = Path(stack.enter_context(TemporaryDirectory())) / "captions.jsonl"
            num_failed = _caption(values, to_stdout=to_stdout)
    except (ValueError, OSError) as error:
        if dist.world_size() > 1:
            sys.stderr.write(f"error: {error}\n")
            dist.abort(str(error))
        raise
    # All processes return the same code: torchrun would end the others when the first one fails.
    return SOME_FAILED if dist.all_reduce_sum(num_failed) else 0


def _check(values: Namespace) -> None:
    """Raise a ValueError for values that make no sense, and complete those that follow from others."""
    from salmonn.batch.discovery import Shard, VideoListing

    if str(values.out) == STDOUT:
        needs_file = {"--retry-failed": values.retry_failed, "--lines-per-file": values.lines_per_file}
        needs_file |= {f"--export {name}": name in values.export for name in ("csv", "parquet")}
        if wrong := [flag for flag, is_set in needs_file.items() if is_set]:
            raise ValueError(f"{wrong[0]} needs a file; use --out captions.jsonl instead of --out -")
    elif values.out.suffix in TABLE_SUFFIXES:
        values.export = [*values.export, values.out.suffix.removeprefix(".")]
        values.out = values.out.with_suffix(".jsonl")
    elif values.out.suffix != ".jsonl" and not values.out.is_dir():
        raise ValueError(
            f"--out {values.out} must end in .jsonl, .csv or .parquet, or be - for stdout (for subtitles, use --export)"
        )
    if values.limit is not None and values.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {values.limit}")
    if values.limit is not None and values.retry_failed:
        raise ValueError("--retry-failed retries all failed videos; use it without --limit")
    if values.workers is not None and values.workers < 0:
        raise ValueError(f"--workers must be at least 0, got {values.workers}")
    _job_config(values)
    shard = Shard.parse(values.shard) if values.shard else Shard()
    if not values.retry_failed:
        VideoListing(values.paths, list_path=values.list, globs=values.glob, shard=shard).require_any()
    folder = next(parent for parent in (values.out.parent, *values.out.absolute().parents) if parent.exists())
    if str(values.out) != STDOUT and not values.dry_run and not os.access(folder, os.W_OK):
        raise ValueError(f"the folder {folder} is read-only; choose another one for the captions with --out")


def _dry_run(values: Namespace) -> int:
    """Print how many videos a run would caption; nothing is written and no model is loaded."""
    from salmonn.batch.job import CaptionJob
    from salmonn.batch.ledger_files import LedgerFiles

    listing = _listing(values)
    with _open_ledger(values, LedgerFiles(values.out, listing.shard), read_only=True) as ledger:
        # Without a limit on failures: folders that cannot be listed are counted as they are in a run.
        job = CaptionJob(ledger, is_retry=values.retry_failed, max_failures=0)
        found = ledger.to_retry(globs=values.glob) if values.retry_failed else listing.videos()
        sizes = [video.size_bytes or 0 for _, video in job.pending(found)]
    chosen = sizes[: values.limit]
    videos, gib = plural(len(chosen), "video"), sum(chosen) / (1 << 30)
    total = len(sizes) + job.stats.done_before + job.stats.failed_before + job.stats.failed
    sys.stdout.write(f"would caption {videos} ({gib:.2f} GiB) of {total}\n")
    _report_skipped(job.stats, listing, LedgerFiles(values.out, listing.shard), sys.stdout)
    return 0


def _open_ledger(values: Namespace, files: "LedgerFiles", *, read_only: bool = False) -> "Ledger":
    from salmonn.batch.ledger import Ledger

    return Ledger(
        files,
        job={name: values[name] for name in JOB_SETTINGS} | fingerprint_model(values),
        start_seconds=values.start,
        lines_per_file=values.lines_per_file,
        overwrite=values.overwrite,
        read_only=read_only,
    )


def _print_captions(captions: Sequence[Caption]) -> None:
    sys.stdout.writelines(json.dumps(asdict(caption), ensure_ascii=False) + "\n" for caption in captions)
    sys.stdout.flush()


def _caption(values: Namespace, *, to_stdout: bool) -> int:
    """Run this process's share; return the number of videos without a caption, or with a failed part."""
    from salmonn.batch.export import TABLES, LatestCaptions, export_table
    from salmonn.batch.job import CaptionJob
    from salmonn.batch.ledger_files import SUBTITLES_SUFFIX, LedgerFiles
    from salmonn.batch.subtitles import SUBTITLE_FORMATS, SubtitleWriter
    from salmonn.caption.worker import WorkerLimits

    listing = _listing(values)
    files = LedgerFiles(values.out, listing.shard)
    ledger = _open_ledger(values, files)
    config, limits = _job_config(values), WorkerLimits(values.read_seconds, values.read_gib)
    with ledger, ExitStack() as stack:
        _report_state(ledger)
        subtitles = None
        if formats := [name for name in SUBTITLE_FORMATS if name in values.export]:
            subtitles = stack.enter_context(
                SubtitleWriter(
                    formats,
                    log=files.subtitles,
                    logs=files.find(SUBTITLES_SUFFIX),
                    folder=values.subtitle_dir,
                    replace=values.replace_subtitles,
                    limits=limits,
                )
            )
        job = CaptionJob(
            ledger,
            is_retry=values.retry_failed,
            max_failures=values.max_failures,
            subtitles=subtitles,
            on_failure=lambda reason: tqdm.write(f"failed: {reason}", file=sys.stderr),
            on_captions=_print_captions if to_stdout else lambda captions: None,
        )
        speed = _run(job, ledger, listing, values=values, config=config, limits=limits)
        job.finish()
        if tables := [suffix for suffix in TABLES if suffix.removeprefix(".") in values.export]:
            latest = LatestCaptions(files.own_captions() if files.shard.count > 1 else files.all_captions())
            for suffix in tables:
                export_table(latest, files.captions.with_suffix(suffix))
                if not values.quiet:
                    sys.stderr.write(f"wrote {files.captions.with_suffix(suffix)}\n")
    if not values.quiet:
        _report_results(job.stats, "stdout" if to_stdout else str(files.captions), speed, may_export=values.export)
        _report_skipped(job.stats, listing, files, sys.stderr)
    return job.stats.failed + job.stats.failed_before


def _run(
    job: "CaptionJob",
    ledger: "Ledger",
    listing: "VideoListing",
    *,
    values: Namespace,
    config: "JobConfig",
    limits: "WorkerLimits",
) -> str:
    """Caption the pending videos; return the speed, as it goes into the summary."""
    from salmonn import dist
    from salmonn.batch.job import caption_videos, show_progress
    from salmonn.caption.loader import MAX_WORKERS, ClipReader, default_num_workers

    pending = job.pending(ledger.to_retry(globs=values.glob) if values.retry_failed else listing.videos())
    pending = islice(pending, values.limit)
    # Before anything is started: without pending videos, no model is needed.
    first = list(islice(pending, MAX_WORKERS))
    if not first:
        return ""
    count: Callable[[], Iterator[object]] | None = None
    if values.retry_failed:
        count = ledger.to_retry
    elif not listing.is_read_once:
        listed = (one for one in listing.videos(quiet=True) if ledger.status(one) == "pending")
        count = lambda: islice(listed, values.limit)  # noqa: E731
    reader = None
    results: Generator[VideoResult]
    with ExitStack() as stack:
        if values.engine == "ray":
            from salmonn.batch.ray_cluster import RayConfig, caption_on_cluster

            ray_config = RayConfig(values.ray_actors, values.workers, limits)
            load = partial(load_captioner, values)
            results = caption_on_cluster(chain(first, pending), load=load, config=config, ray_config=ray_config)
        else:
            workers = default_num_workers(len(first)) if values.workers is None else values.workers
            reader = stack.enter_context(ClipReader(workers=workers, limits=limits))  # they start while the model loads
            results = caption_videos(load_captioner(values), chain(first, pending), config=config, reader=reader)
        stack.enter_context(closing(results))
        update = stack.enter_context(
            show_progress(job.stats, count=count, is_shown=dist.is_main() and not values.quiet)
        )
        start = time.perf_counter()
        for result in results:
            job.save(result)
            update()
        seconds = time.perf_counter() - start
    speed = f"; {60 * job.stats.videos / seconds:.1f} clips per minute"
    return speed + (f" ({reader.waited_seconds / seconds:.0%} of the time waiting for files)" if reader else "")


def _listing(values: Namespace) -> "VideoListing":
    from salmonn import dist
    from salmonn.batch.discovery import Shard, VideoListing

    shard = Shard.parse(values.shard) if values.shard else Shard()
    if dist.world_size() > 1:
        if values.shard or values.engine == "ray":
            raise ValueError("under torchrun each process has its own shard; remove --shard and --engine ray")
        shard = Shard(dist.rank() + 1, dist.world_size())
    if values.overwrite and shard.count > 1:
        raise ValueError(
            f"--overwrite would rename files that other shards are writing; move or delete {values.out.stem}*.jsonl "
            f"and {values.out.stem}.job.json yourself, then start all shards without it"
        )
    if values.overwrite and values.retry_failed:
        raise ValueError("--overwrite starts over, failures included; use it without --retry-failed")
    return VideoListing(values.paths, list_path=values.list, globs=values.glob, shard=shard)


def _job_config(values: Namespace) -> "JobConfig":
    from salmonn.batch.job import JobConfig

    limit = {} if values.max_new_tokens is None else {"max_new_tokens": values.max_new_tokens}
    sampling = Sampling(
        **{name: values[name] for name in SAMPLING_FLAGS},
        stop=tuple(values.stop),
        logprobs=0 if values.logprobs else None,
        **limit,
    )
    # Subtitles need end times; an infinite segment is the whole video with its end.
    needs_ends = {"srt", "vtt"} & set(values.export)
    return JobConfig(
        CaptionRequest(
            Path(),
            values.prompt,
            sampling,
            Span(values.start, values.end),
            modality=values.modality,
            seed=values.seed,
            frames=None if values.frames is None else FrameOptions(num_frames=values.frames),
        ),
        max_new_tokens=values.max_new_tokens,
        segment_seconds=math.inf if needs_ends and values.segment_seconds is None else values.segment_seconds,
        batch_size=values.batch_size,
    )


def fingerprint_model(values: Namespace) -> dict[str, str]:
    """Identify a model and its adapter by name and files: a folder may hold other weights after further training."""
    if values.model is None:  # by its config alone: the times of its files depend on the installation
        config = (SHIPPED_MODEL / "config.json").read_bytes()
        found = {"model": "built-in toy model", MODEL_FILES: blake2b(config, digest_size=16).hexdigest()}
    else:
        found = {"model": values.model} | _fingerprint_folder(Path(values.model), MODEL_FILES)
    return found | (_fingerprint_folder(Path(values.adapter), ADAPTER_FILES) if values.adapter else {})


def _fingerprint_folder(folder: Path, name: str) -> dict[str, str]:
    """Hash a folder's config and the names, sizes and times of its weights; return nothing for a Hub id."""
    if not folder.is_dir():
        return {}
    state = blake2b(digest_size=16)
    for path in sorted(folder.iterdir()):
        if path.name in ("config.json", "adapter_config.json"):
            state.update(path.read_bytes())
        elif path.suffix in (".safetensors", ".bin", ".pt"):
            found = path.stat()
            state.update(repr((path.name, found.st_size, found.st_mtime_ns)).encode())
    return {name: state.hexdigest()}


def _report_state(ledger: "Ledger") -> None:
    if ledger.moved:
        sys.stderr.write(f"old files renamed to {', '.join(str(path) for path in ledger.moved)}\n")
    if ledger.num_cut_bytes:
        sys.stderr.write(
            f"{ledger.files.captions}: a run was killed while writing; cut off the last {ledger.num_cut_bytes} bytes "
            "(an unfinished video, which is captioned again)\n"
        )


def _report_results(stats: "RunStats", out: str, speed: str, *, may_export: Sequence[str]) -> None:
    captions, failed = plural(stats.captions, "caption"), plural(stats.failed, "video")
    if stats.videos or stats.failed:
        sys.stderr.write(f"{captions} written to {out}, {failed} failed{speed}\n")
    else:
        sys.stderr.write(("" if may_export else "nothing to do: ") + "no videos left to caption\n")
    if stats.incomplete:
        sys.stderr.write(f"{plural(stats.incomplete, 'caption')} of damaged or truncated files (complete: false)\n")


def _report_skipped(stats: "RunStats", listing: "VideoListing", files: "LedgerFiles", stream: TextIO) -> None:
    if stats.done_before:
        stream.write(f"{plural(stats.done_before, 'video')} already done, skipped\n")
    if stats.failed_before:
        stream.write(
            f"{plural(stats.failed_before, 'video')} skipped: failed in earlier runs, at least in part; see "
            f"{files.failed}, and retry with --retry-failed\n"
        )
    if listing.skipped.total:
        stream.write(f"{plural(listing.skipped.total, 'file')} skipped because of the suffix: {listing.skipped}\n")
