"""`salmonn caption`: caption videos, or ask a question about each."""

import json
import logging
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from functools import cache, partial
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TextIO

from jsonargparse import Namespace
from tqdm import tqdm

from salmonn.caption.generator import SHIPPED_MODEL
from salmonn.cli.caption_options import (
    JOB_SETTINGS,
    STDOUT,
    check_options,
    column_setting,
    fetch_config,
    fingerprint_transcripts,
    job_config,
)
from salmonn.cli.caption_outputs import remote_output, report_unwritten, write_folders
from salmonn.cli.caption_server import (
    keep_server_input,
    load_server,
    report_spending,
    require_one_process,
    server_settings,
)
from salmonn.cli.fuse_options import run_fusion
from salmonn.cli.options import SOME_FAILED, garbage_kept, load_batch_captioner, plural
from salmonn.cli.vllm_options import load_vllm_captioner
from salmonn.files import fingerprint_folder
from salmonn.records import Caption

if TYPE_CHECKING:
    from salmonn.batch.dataset import DatasetWriter
    from salmonn.batch.discovery import VideoListing
    from salmonn.batch.export import LatestCaptions
    from salmonn.batch.job import CaptionJob, JobConfig, RunStats, VideoResult
    from salmonn.batch.ledger import Ledger
    from salmonn.batch.ledger_files import LedgerFiles
    from salmonn.batch.subtitles import SubtitleFormat, SubtitleWriter
    from salmonn.caption.generator import BatchCaptioner
    from salmonn.caption.worker import WorkerLimits

MODEL_FILES, ADAPTER_FILES = "model_files", "adapter_files"


def run_caption(values: Namespace) -> int:
    """Caption videos into JSONL files."""
    check_options(values)  # before torch is imported, which takes seconds
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
            if not values.quiet:
                # On every ending, because what was sent is paid for.
                stack.push(lambda kind, *_: report_spending(values, is_failed=kind is not None))
            stack.enter_context(remote_output(values, list_videos(values).shard))
            num_failed = _caption(values, to_stdout=to_stdout)
    except (ValueError, OSError) as error:
        if dist.world_size() > 1:
            sys.stderr.write(f"error: {error}\n")
            dist.abort(str(error))
        raise
    # All processes return the same code: torchrun would end the others when the first one fails.
    return SOME_FAILED if dist.all_reduce_sum(num_failed) else 0


def _dry_run(values: Namespace) -> int:
    """Print how many videos a run would caption; nothing is written and no model is loaded."""
    from salmonn.batch.job import CaptionJob
    from salmonn.batch.ledger_files import LedgerFiles

    listing = list_videos(values)
    files = LedgerFiles(values.out, listing.shard)
    with remote_output(values, listing.shard), _open_ledger(values, files, read_only=True) as ledger:
        # Without a limit on failures: folders that cannot be listed are counted as they are in a run.
        job = CaptionJob(ledger, is_retry=values.retry_failed, max_failures=0)
        found = ledger.to_retry(listing) if values.retry_failed else listing.videos()
        sizes = [video.size_bytes or 0 for _, video in job.pending(found)]
    chosen = sizes[: values.limit]
    videos, gib = plural(len(chosen), "video"), sum(chosen) / (1 << 30)
    total = len(sizes) + job.stats.done_before + job.stats.failed_before + job.stats.failed
    sys.stdout.write(f"would caption {videos} ({gib:.2f} GiB) of {total}\n")
    report_skipped(job.stats, listing, LedgerFiles(values.out, listing.shard), sys.stdout)
    return 0


def _open_ledger(values: Namespace, files: "LedgerFiles", *, read_only: bool = False) -> "Ledger":
    from salmonn.batch.ledger import Ledger

    keep_server_input(values, files.job)
    return Ledger(
        files,
        job={name: values[name] for name in JOB_SETTINGS}
        | ({"caption_format": values.format} if values.format == "events" else {})  # "format" is that of the ledger
        | (server_settings(values) if values.server else fingerprint_model(values))
        | ({"engine": "vllm"} if values.engine == "vllm" else {})  # it samples and rounds in its own way
        | fingerprint_transcripts(values)
        | column_setting(values),
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
    from salmonn.batch.export import LatestCaptions
    from salmonn.batch.job import CaptionJob
    from salmonn.batch.ledger_files import LedgerFiles
    from salmonn.caption.worker import WorkerLimits

    require_one_process(values)
    listing = list_videos(values)
    files = LedgerFiles(values.out, listing.shard)
    ledger = _open_ledger(values, files)
    config, limits = job_config(values), WorkerLimits(values.read_seconds, values.read_gib)
    load = cache(partial(_load, values, ledger))
    with ledger, ExitStack() as stack:
        dataset = _open_dataset(values, files)
        report_state(ledger)
        subtitles = subtitle_writer(values, files, limits)
        if subtitles:
            stack.enter_context(subtitles)
        job = CaptionJob(
            ledger,
            is_retry=values.retry_failed,
            max_failures=values.max_failures,
            subtitles=subtitles,
            on_failure=lambda reason: tqdm.write(f"failed: {reason}", file=sys.stderr),
            on_captions=_print_captions if to_stdout else lambda captions: None,
        )
        speed = _run(job, ledger, listing, values=values, config=config, limits=limits, load=load)
        job.finish()
        write_tables(values, files)
        num_unwritten = write_folders(values, files)
        num_unfused, fused = 0, None
        if values.fuse:
            fetch = fetch_config(values)
            num_unfused = run_fusion(values, files, config=config, limits=limits, fetch=fetch, load=load)
            fused = LatestCaptions([files.fused]) if files.fused.exists() else None
            num_unwritten += _write_fused_texts(values, files, fused, limits)
        if dataset and not (values.fuse and fused is None):
            num_written = dataset.write(fused)
            if not values.quiet:
                sys.stderr.write(f"{plural(num_written, 'clip')} listed in {dataset.path}\n")
    if not values.quiet:
        report_results(job.stats, "stdout" if to_stdout else str(files.captions), speed, may_export=values.export)
        report_skipped(job.stats, listing, files, sys.stderr)
    return job.stats.failed + job.stats.failed_before + num_unwritten + num_unfused


def _load(values: Namespace, ledger: "Ledger") -> "BatchCaptioner":
    if values.engine == "vllm":
        return load_vllm_captioner(values)
    return load_server(values, ledger) if values.server else load_batch_captioner(values)


def _open_dataset(values: Namespace, files: "LedgerFiles") -> "DatasetWriter | None":
    """Return what writes the dataset file, if there is to be one; raises a ValueError if it may not be written."""
    from salmonn.batch.dataset import DatasetWriter, shard_path

    if values.dataset_layout is None:
        return None
    path = shard_path(Path(values.dataset_layout.file), files.shard)
    return DatasetWriter(path, values.dataset_layout, files=files, replace=values.replace_subtitles)


def subtitle_writer(values: Namespace, files: "LedgerFiles", limits: "WorkerLimits") -> "SubtitleWriter | None":
    """Return what writes the files that --export asks for next to the videos."""
    from salmonn.batch.subtitles import SUBTITLE_FORMATS

    # A text file next to a video has its fused caption, which is written later.
    later = ["txt"] if values.get("fuse") else []
    formats = [name for name in SUBTITLE_FORMATS if name in values.export and name not in later]
    return _open_subtitles(values, files, limits, formats) if formats else None


def _write_fused_texts(
    values: Namespace, files: "LedgerFiles", fused: "LatestCaptions | None", limits: "WorkerLimits"
) -> int:
    """Write the text files that --export asks for with fused captions; return the number of those that failed."""
    if fused is None or "txt" not in values.export:
        return 0
    with _open_subtitles(values, files, limits, ["txt"]) as texts:
        return report_unwritten([failure for caption in fused for failure in texts.write([caption])])


def _open_subtitles(
    values: Namespace, files: "LedgerFiles", limits: "WorkerLimits", formats: "Sequence[SubtitleFormat]"
) -> "SubtitleWriter":
    from salmonn.batch.ledger_files import SUBTITLES_SUFFIX
    from salmonn.batch.subtitles import SubtitleWriter

    return SubtitleWriter(
        formats,
        log=files.subtitles,
        logs=files.find(SUBTITLES_SUFFIX),
        folder=values.subtitle_dir,
        replace=values.replace_subtitles,
        limits=limits,
    )


def write_tables(values: Namespace, files: "LedgerFiles") -> None:
    """Write the tables that --export asks for next to --out."""
    from salmonn.batch.export import TABLES, LatestCaptions, export_table

    if tables := [suffix for suffix in TABLES if suffix.removeprefix(".") in values.export]:
        latest = LatestCaptions(files.own_captions() if files.shard.count > 1 else files.all_captions())
        for suffix in tables:
            export_table(latest, files.captions.with_suffix(suffix))
            if not values.quiet:
                sys.stderr.write(f"wrote {files.captions.with_suffix(suffix)}\n")


def _run(
    job: "CaptionJob",
    ledger: "Ledger",
    listing: "VideoListing",
    *,
    values: Namespace,
    config: "JobConfig",
    limits: "WorkerLimits",
    load: "Callable[[], BatchCaptioner]",
) -> str:
    """Caption the pending videos; return the speed, as it goes into the summary."""
    from salmonn import dist
    from salmonn.batch.fetch import Fetcher
    from salmonn.batch.job import caption_videos, show_progress
    from salmonn.batch.segment_logs import SegmentLog, ShotLog
    from salmonn.caption.loader import MAX_WORKERS, ClipReader, default_num_workers

    retried = ledger.to_retry(listing) if values.retry_failed else None
    pending = job.pending(retried or listing.videos())
    pending = islice(pending, values.limit)
    # Before anything is started: without pending videos, no model is needed.
    first = list(islice(pending, MAX_WORKERS))
    if not first:
        return ""
    reader = None
    results: Generator[VideoResult]
    with ExitStack() as stack:
        if values.engine == "ray":
            from salmonn.batch.ray_cluster import RayConfig, caption_on_cluster

            ray_config = RayConfig(values.ray_actors, values.workers, limits, fetch_config(values))
            load_local = partial(load_batch_captioner, values)
            results = caption_on_cluster(chain(first, pending), load=load_local, config=config, ray_config=ray_config)
        else:
            workers = default_num_workers(len(first)) if values.workers is None else values.workers
            fetcher = stack.enter_context(Fetcher(fetch_config(values)))
            # They start while the model loads.
            reader = stack.enter_context(ClipReader(workers=workers, limits=limits, bucket_share=fetcher.bucket_share))
            store = ShotLog(ledger, fetcher.video_of) if values.segments == "shots" else None
            log = SegmentLog(ledger) if values.segments else None
            videos = chain(first, pending)
            results = caption_videos(
                load(), videos, config=config, reader=reader, fetcher=fetcher, store=store, log=log
            )
        stack.enter_context(closing(results))
        update = stack.enter_context(
            show_progress(
                job.stats, count=_counter(ledger, listing, values), is_shown=dist.is_main() and not values.quiet
            )
        )
        start = time.perf_counter()
        for result in results:
            job.save(result)
            update()
        seconds = time.perf_counter() - start
    speed = f"; {60 * job.stats.videos / seconds:.1f} clips per minute"
    return speed + (f" ({reader.waited_seconds / seconds:.0%} of the time waiting for files)" if reader else "")


def _counter(ledger: "Ledger", listing: "VideoListing", values: Namespace) -> "Callable[[], Iterator[object]] | None":
    """Return what lists the pending videos once more, to count them; None if they can be listed only once."""
    if values.retry_failed:
        return ledger.to_retry
    if listing.is_read_once:
        return None
    listed = (one for one in listing.videos(quiet=True) if ledger.status(one) == "pending")
    return lambda: islice(listed, values.limit)


def list_videos(values: Namespace) -> "VideoListing":
    """Return the listing of this process's videos."""
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
    return VideoListing(values.paths, list_path=values.list, globs=values.glob, shard=shard, column=values.column)


def fingerprint_model(values: Namespace) -> dict[str, str]:
    """Identify a model and its adapter by name and files: a folder may hold other weights after further training."""
    if values.model is None:  # by its config alone: the times of its files depend on the installation
        config = (SHIPPED_MODEL / "config.json").read_bytes()
        found = {"model": "built-in toy model", MODEL_FILES: blake2b(config, digest_size=16).hexdigest()}
    else:
        found = {"model": values.model} | _fingerprint_folder(Path(values.model), MODEL_FILES)
    return found | (_fingerprint_folder(Path(values.adapter), ADAPTER_FILES) if values.adapter else {})


def _fingerprint_folder(folder: Path, name: str) -> dict[str, str]:
    """Return the fingerprint of a folder by a name; nothing for a Hub id."""
    return {name: fingerprint_folder(folder)} if folder.is_dir() else {}


def report_state(ledger: "Ledger") -> None:
    """Print what was renamed or repaired before the run."""
    if ledger.moved:
        sys.stderr.write(f"old files renamed to {', '.join(str(path) for path in ledger.moved)}\n")
    if ledger.num_cut_bytes:
        sys.stderr.write(
            f"{ledger.files.captions}: a run was killed while writing; cut off the last {ledger.num_cut_bytes} bytes "
            "(an unfinished video, which is captioned again)\n"
        )


def report_results(
    stats: "RunStats", out: str, speed: str, *, may_export: Sequence[str], noun: str = "caption", verb: str = "caption"
) -> None:
    """Print how much was written, with a noun and a verb for it."""
    captions, failed = plural(stats.captions, noun), plural(stats.failed, "video")
    if stats.videos or stats.failed:
        sys.stderr.write(f"{captions} written to {out}, {failed} failed{speed}\n")
    else:
        sys.stderr.write(("" if may_export else "nothing to do: ") + f"no videos left to {verb}\n")
    if stats.incomplete:
        sys.stderr.write(f"{plural(stats.incomplete, noun)} of damaged or truncated files (complete: false)\n")
    if stats.misshapen:
        sys.stderr.write(f"{plural(stats.misshapen, 'caption')} without the requested length or words (see shaping)\n")
    if stats.without_transcript:
        sys.stderr.write(f"{plural(stats.without_transcript, 'caption')} made without a transcript (see warnings)\n")


def report_skipped(stats: "RunStats", listing: "VideoListing", files: "LedgerFiles", stream: TextIO) -> None:
    """Print which videos and files were skipped."""
    if stats.done_before:
        stream.write(f"{plural(stats.done_before, 'video')} already done, skipped\n")
    if stats.failed_before:
        stream.write(
            f"{plural(stats.failed_before, 'video')} skipped: failed in earlier runs, at least in part; see "
            f"{files.failed}, and retry with --retry-failed\n"
        )
    if listing.skipped.total:
        stream.write(f"{plural(listing.skipped.total, 'file')} skipped because of the suffix: {listing.skipped}\n")
