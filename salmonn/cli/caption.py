"""`salmonn caption`: caption videos, or ask a question about each."""

import math
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing
from functools import partial
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from jsonargparse import Namespace
from tqdm import tqdm

from salmonn.caption.generator import CaptionRequest, Sampling, Span
from salmonn.cli.options import SOME_FAILED, add_model_options, add_subtitle_options, load_captioner, plural
from salmonn.config import FlagParser
from salmonn.records import Modality

if TYPE_CHECKING:
    from salmonn.batch.discovery import VideoListing
    from salmonn.batch.job import CaptionJob, JobConfig, RunStats, VideoResult
    from salmonn.batch.ledger import Ledger
    from salmonn.batch.ledger_files import LedgerFiles
    from salmonn.caption.worker import WorkerLimits

# Settings that the captions depend on; a run with other ones does not resume it.
JOB_SETTINGS = (
    "model", "adapter", "prompt", "modality", "start", "end", "segment_seconds", "temperature", "top_p",
    "repetition_penalty", "max_new_tokens", "seed", "published_positions", "dtype", "bits", "reader",
)  # fmt: skip
SAMPLING_FLAGS = ("temperature", "top_p", "repetition_penalty")
MODEL_FILES, ADAPTER_FILES = "model_files", "adapter_files"


def caption_parser() -> FlagParser:
    """Return the arguments of `salmonn caption`."""
    parser = FlagParser(
        description="Caption videos (files, or folders searched recursively) and write one JSON line for each. Videos "
        "that are already in --out are skipped: after an interruption, run the same command to resume. A file that "
        "cannot be captioned is listed in captions.failed.jsonl and does not stop the run; the exit code is then 1."
    )
    parser.add_argument("paths", nargs="*", type=str, help="video or audio files, or folders of them")
    parser.add_argument("--out", type=Path, required=True, help="JSONL file for the captions")
    _add_input_options(parser)
    _add_generation_options(parser)
    _add_output_options(parser)
    _add_processing_options(parser)
    add_model_options(parser)
    return parser


def _add_input_options(parser: FlagParser) -> None:
    group = parser.add_argument_group("Which videos")
    group.add_argument("--list", type=str | None, default=None, help="file with one path per line (-: stdin)")
    globs = "in folders, only files matching one of these patterns, such as '*.mp4' or 'train/**/*.mp4'"
    group.add_argument("--glob", nargs="+", action="extend", type=str, default=[], help=globs)
    group.add_argument("--shard", type=str | None, default=None, help="2/8: the second eighth of the videos")
    group.add_argument("--retry_failed", action="store_true", help="only retry videos that failed in earlier runs")
    group.add_argument("--max_failures", type=int, default=20, help="stop after this many failures in a row (0: never)")


def _add_generation_options(parser: FlagParser) -> None:
    group = parser.add_argument_group("Prompt and generation")
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
    group.add_argument("--seed", type=int, default=0, help="random seed (combined with each video's path)")
    parser.add_class_arguments(Sampling, skip={"max_new_tokens"})


def _add_output_options(parser: FlagParser) -> None:
    formats = Literal["csv", "parquet", "txt", "srt", "vtt"]
    group = parser.add_argument_group("Output")
    group.add_argument(
        "--export", nargs="+", type=formats, default=[], help="csv, parquet: a table beside --out, written at the end; "
        "txt, srt, vtt: a file beside each video, written with its caption"
    )  # fmt: skip
    add_subtitle_options(group)
    group.add_argument(
        "--lines_per_file", type=int | None, default=None, help="split the output: captions.00001.jsonl, ..."
    )
    group.add_argument("--overwrite", action="store_true", help="start over; old files get the suffix .old")


def _add_processing_options(parser: FlagParser) -> None:
    group = parser.add_argument_group("Processing")
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
    from salmonn import dist

    if dist.world_size() > 1:
        dist.setup()
    try:
        num_failed = _caption(values)
    except (ValueError, OSError) as error:
        if dist.world_size() > 1:
            sys.stderr.write(f"error: {error}\n")
            dist.abort(str(error))
        raise
    # All processes return the same code: torchrun would end the others when the first one fails.
    return SOME_FAILED if dist.all_reduce_sum(num_failed) else 0


def _caption(values: Namespace) -> int:
    """Run this process's share; return the number of videos without a caption, or with a failed part."""
    from salmonn.batch.export import TABLES, LatestCaptions, export_table
    from salmonn.batch.job import CaptionJob
    from salmonn.batch.ledger import Ledger
    from salmonn.batch.ledger_files import SUBTITLES_SUFFIX, LedgerFiles
    from salmonn.batch.subtitles import SUBTITLE_FORMATS, SubtitleWriter
    from salmonn.caption.worker import WorkerLimits

    listing = _listing(values)
    files = LedgerFiles(values.out, listing.shard)
    ledger = Ledger(
        files,
        job={name: values[name] for name in JOB_SETTINGS} | fingerprint_model(values),
        start_seconds=values.start,
        lines_per_file=values.lines_per_file,
        overwrite=values.overwrite,
    )
    config, limits = _job_config(values), WorkerLimits(values.read_seconds, values.read_gib)
    if not values.retry_failed:
        listing.require_any()
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
        )
        speed = _run(job, ledger, listing, values=values, config=config, limits=limits)
        job.finish()
        if tables := [suffix for suffix in TABLES if suffix.removeprefix(".") in values.export]:
            latest = LatestCaptions(files.own_captions() if files.shard.count > 1 else files.all_captions())
            for suffix in tables:
                export_table(latest, files.captions.with_suffix(suffix))
    _report_results(job.stats, listing, files, speed)
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
    from salmonn.batch.ray_cluster import RayConfig, caption_on_cluster
    from salmonn.caption.loader import MAX_WORKERS, ClipReader, default_num_workers

    pending = job.pending(ledger.to_retry(globs=values.glob) if values.retry_failed else listing.videos())
    # Before anything is started: without pending videos, no model is needed.
    first = list(islice(pending, MAX_WORKERS))
    if not first:
        return ""
    count: Callable[[], Iterator[object]] | None = None
    if values.retry_failed:
        count = ledger.to_retry
    elif not listing.is_read_once:
        count = lambda: (one for one in listing.videos(quiet=True) if ledger.status(one) == "pending")  # noqa: E731
    reader = None
    results: Generator[VideoResult]
    with ExitStack() as stack:
        if values.engine == "ray":
            ray_config = RayConfig(values.ray_actors, values.workers, limits)
            load = partial(load_captioner, values)
            results = caption_on_cluster(chain(first, pending), load=load, config=config, ray_config=ray_config)
        else:
            workers = default_num_workers(len(first)) if values.workers is None else values.workers
            reader = stack.enter_context(ClipReader(workers=workers, limits=limits))  # they start while the model loads
            results = caption_videos(load_captioner(values), chain(first, pending), config=config, reader=reader)
        stack.enter_context(closing(results))
        update = stack.enter_context(show_progress(job.stats, count=count, is_shown=dist.is_main()))
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
    sampling = Sampling(**{name: values[name] for name in SAMPLING_FLAGS}, **limit)
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
        ),
        max_new_tokens=values.max_new_tokens,
        segment_seconds=math.inf if needs_ends and values.segment_seconds is None else values.segment_seconds,
        batch_size=values.batch_size,
    )


def fingerprint_model(values: Namespace) -> dict[str, str]:
    """Identify a model and its adapter by name and files: a folder may hold other weights after further training."""
    from salmonn.caption.captioner import SHIPPED_MODEL

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


def _report_results(stats: "RunStats", listing: "VideoListing", files: "LedgerFiles", speed: str) -> None:
    captions, failed = plural(stats.captions, "caption"), plural(stats.failed, "video")
    sys.stderr.write(f"{captions} written to {files.captions}, {failed} failed{speed}\n")
    if stats.incomplete:
        sys.stderr.write(f"{plural(stats.incomplete, 'caption')} of damaged or truncated files (complete: false)\n")
    if stats.done_before:
        sys.stderr.write(f"{plural(stats.done_before, 'video')} already done, skipped\n")
    if stats.failed_before:
        sys.stderr.write(
            f"{plural(stats.failed_before, 'video')} skipped: failed in earlier runs, at least in part; see "
            f"{files.failed}, and retry with --retry-failed\n"
        )
    if listing.skipped.total:
        sys.stderr.write(f"{plural(listing.skipped.total, 'file')} skipped because of the suffix: {listing.skipped}\n")
