"""`salmonn caption`: describe videos, or ask anything about them."""

import math
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from jsonargparse import Namespace
from tqdm import tqdm

from salmonn.cli.codes import SOME_FAILED
from salmonn.cli.model import add_model, load_captioner
from salmonn.config import FlagParser
from salmonn.records import Modality

if TYPE_CHECKING:
    from salmonn.batch.discovery import VideoFile, VideoListing
    from salmonn.batch.job import CaptionJob, IndexedVideo, JobConfig, RunStats, VideoResult
    from salmonn.batch.ledger import Ledger
    from salmonn.batch.ledger_files import LedgerFiles
    from salmonn.batch.subtitles import SubtitleWriter
    from salmonn.caption.loader import ClipReader
    from salmonn.records import Failure

# What captions depend on: a run that asks otherwise does not go on with them.
ASKED = (
    "model", "adapter", "prompt", "modality", "start", "end", "segment_seconds", "temperature", "top_p",
    "repetition_penalty", "max_new_tokens", "seed", "published_positions", "dtype", "bits",
)  # fmt: skip


MODEL_FILES, ADAPTER_FILES = "model_files", "adapter_files"


def caption_parser() -> FlagParser:
    """Arguments of `salmonn caption`."""
    parser = FlagParser(
        description="Describe videos (files, or folders searched recursively), one JSON line each. What is in --out "
        "already is passed over, so that the same command goes on after whatever stopped it. A file that cannot be "
        "captioned is noted in captions.failed.jsonl and harms no other; then the exit code is 1."
    )
    parser.add_argument("paths", nargs="*", type=str, help="video or sound files, or folders of them")
    parser.add_argument("--out", type=Path, required=True, help="JSONL file for the captions")
    _add_what(parser)
    _add_question(parser)
    _add_outputs(parser)
    _add_work(parser)
    add_model(parser)
    return parser


def _add_what(parser: FlagParser) -> None:
    parser.add_argument("--list", type=str | None, default=None, help="file with one path a line, too; -: stdin")
    globs = "of folders only such files: '*.mp4' 'train/**/*.mp4'"
    parser.add_argument("--glob", nargs="+", action="extend", type=str, default=[], help=globs)
    parser.add_argument(
        "--overwrite", action="store_true", help="begin anew; what is there is moved to names with .old"
    )
    parser.add_argument(
        "--retry-failed", action="store_true", help="try what failed in earlier runs, and nothing else, once more"
    )
    parser.add_argument("--max-failures", type=int, default=20, help="so many videos in a row end the run; 0: never")
    parser.add_argument("--shard", type=str | None, default=None, help="2/8: the second eighth of the videos")


def _add_question(parser: FlagParser) -> None:
    parser.add_argument("--prompt", type=str | None, default=None, help="what to ask (default: a full description)")
    parser.add_argument(
        "--modality", type=Modality, default="both", help="picture, sound or both: " + ", ".join(get_args(Modality))
    )
    parser.add_argument("--start", type=float | None, default=None, help="seconds from which on the video is taken")
    parser.add_argument("--end", type=float | None, default=None, help="seconds up to which the video is taken")
    parser.add_argument(
        "--segment-seconds", type=float | None, default=None, help="seconds: a caption for each such span"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest words, 1 draws freely")
    parser.add_argument("--top-p", type=float, default=0.9, help="nucleus that words are drawn from")
    parser.add_argument("--repetition-penalty", type=float | None, default=None, help="1: none (default: the model's)")
    parser.add_argument("--max-new-tokens", type=int | None, default=None, help="limit (default: the model's)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws; a video's follow from this and its path")


def _add_outputs(parser: FlagParser) -> None:
    kinds = Literal["csv", "parquet", "txt", "srt", "vtt"]
    parser.add_argument(
        "--export", nargs="+", type=kinds, default=[], help="csv, parquet: beside --out, at the end; txt, srt, vtt: "
        "beside each video, at once"
    )  # fmt: skip
    parser.add_argument("--subtitle-dir", type=Path | None, default=None, help="folder for txt, srt and vtt instead")
    parser.add_argument("--replace-subtitles", action="store_true", help="also files of those names that are not ours")
    parser.add_argument("--lines-per-file", type=int | None, default=None, help="then captions.00001.jsonl, ...")


def _add_work(parser: FlagParser) -> None:
    parser.add_argument("--batch-size", type=int | None, default=None, help="clips side by side (default: the model's)")
    parser.add_argument("--workers", type=int | None, default=None, help="processes that decode; 0: none but this one")
    parser.add_argument("--read-seconds", type=float, default=900.0, help="limit of reading one file, by the clock")
    parser.add_argument("--read-gib", type=float, default=4.0, help="limit of memory for reading one file")
    parser.add_argument("--engine", type=Literal["local", "ray"], default="local", help="ray: on a Ray cluster")
    parser.add_argument("--ray-actors", type=int | None, default=None, help="models at work there (default: one a GPU)")


def run_caption(values: Namespace) -> int:
    """Caption videos into JSONL files, group by group."""
    from salmonn import dist

    if dist.world_size() > 1:
        dist.setup()
    try:
        num_missing = _caption(values)
    except (ValueError, OSError) as error:
        if dist.world_size() > 1:
            sys.stderr.write(f"error: {error}\n")
            dist.abort(str(error))
        raise
    # The launcher would end the other processes at the first one's exit code.
    return SOME_FAILED if dist.all_reduce_sum(num_missing) else 0


def _caption(values: Namespace) -> int:
    """Do it, and say how many videos have no caption, or not all that was asked for."""
    from salmonn.batch.job import CaptionJob
    from salmonn.batch.ledger import Ledger
    from salmonn.batch.ledger_files import LedgerFiles

    listing = _listing(values)
    files = LedgerFiles(values.out, listing.shard)
    job = {name: values[name] for name in ASKED} | _sign_model(values)
    ledger = Ledger(
        files, job=job, start_seconds=values.start, lines_per_file=values.lines_per_file, overwrite=values.overwrite
    )
    work = _Work(values, listing)
    if not values.retry_failed:
        listing.require_some()
    with ledger, ExitStack() as stack:
        _tell_state(ledger)
        run = CaptionJob(
            ledger,
            is_retry=values.retry_failed,
            max_failures=values.max_failures,
            subtitles=_sidecars(values, files, stack),
            tell=_tell_failure,
        )
        speed = work.do(run, ledger)
        _finish(values, run, files)
    _summarise(run.stats, files, speed)
    return run.stats.failed + run.stats.failed_before


class _Work:
    """What is done by which engine.

    Args:
        values: of the command line.
        listing: of the videos.
    """

    def __init__(self, values: Namespace, listing: "VideoListing") -> None:
        from salmonn.caption.worker import WorkerLimits

        self._values = values
        self._listing = listing
        self._task = _task(values)
        self._limits = WorkerLimits(values.read_seconds, values.read_gib)

    def do(self, run: "CaptionJob", ledger: "Ledger") -> str:
        """Caption what is to be captioned, and say how fast that went."""
        from salmonn import dist
        from salmonn.batch.progress import JobProgress
        from salmonn.caption.loader import MAX_WORKERS

        pending = run.pending(self._found(ledger))
        # Some are looked for before anything is started: without any, no model is needed.
        first = list(islice(pending, MAX_WORKERS))
        if not first:
            return ""
        with ExitStack() as stack:
            reader = self._reader(len(first), stack)
            groups = stack.enter_context(closing(self._groups(chain(first, pending), reader)))
            bar = stack.enter_context(JobProgress(run.stats, count=self._count(ledger), is_shown=dist.is_main()))
            begin = time.perf_counter()
            for group in groups:
                run.save(group)
                bar.step()
            seconds = time.perf_counter() - begin
        words = f"; {60 * run.stats.videos / seconds:.1f} clips a minute"
        return words + (
            f", and the model waited {reader.waited_seconds / seconds:.0%} of the time for them" if reader else ""
        )

    def _found(self, ledger: "Ledger") -> "Iterable[VideoFile | Failure]":
        return ledger.to_retry(globs=self._values.glob) if self._values.retry_failed else self._listing.videos()

    def _count(self, ledger: "Ledger") -> "Callable[[], Iterator[object]] | None":
        """What lists once more all that is to be done; None where that is not possible."""
        if self._values.retry_failed:
            return ledger.to_retry
        if self._listing.is_read_once:
            return None
        return lambda: (one for one in self._listing.videos(quiet=True) if not ledger.is_known(one))

    def _reader(self, num_videos: int, stack: ExitStack) -> "ClipReader | None":
        """What reads ahead; a cluster's actors have their own."""
        from salmonn.caption.loader import ClipReader, default_num_workers

        if self._values.engine == "ray":
            return None
        workers = default_num_workers(num_videos) if self._values.workers is None else self._values.workers
        return stack.enter_context(ClipReader(workers=workers, limits=self._limits))

    def _groups(self, videos: "Iterator[IndexedVideo]", reader: "ClipReader | None") -> "Generator[VideoResult]":
        from salmonn.batch.job import caption_videos

        if reader:
            # Its workers start while the model is loaded.
            return caption_videos(load_captioner(self._values), videos, task=self._task, reader=reader)
        from salmonn.batch.ray_cluster import RayConfig, caption_on_cluster

        cluster = RayConfig(self._values.ray_actors, self._values.workers, self._limits)
        return caption_on_cluster(videos, load=partial(load_captioner, self._values), task=self._task, cluster=cluster)


def _listing(values: Namespace) -> "VideoListing":
    from salmonn import dist
    from salmonn.batch.discovery import Shard, VideoListing

    shard = Shard.parse(values.shard) if values.shard else Shard()
    if dist.world_size() > 1:
        if values.shard or values.engine == "ray":
            raise ValueError("under torchrun each process takes its shard: give no --shard and no --engine ray")
        shard = Shard(dist.rank() + 1, dist.world_size())
    if values.overwrite and shard.count > 1:
        raise ValueError(
            f"--overwrite would move aside what other shards are writing: move or delete {values.out.stem}*.jsonl and "
            f"{values.out.stem}.job.json yourself, then start all shards without it"
        )
    if values.overwrite and values.retry_failed:
        raise ValueError("--overwrite does everything anew, failures too: give it without --retry-failed")
    return VideoListing(values.paths, list_path=values.list, globs=values.glob, shard=shard)


def _task(values: Namespace) -> "JobConfig":
    from salmonn.batch.job import JobConfig
    from salmonn.caption.captioner import Span
    from salmonn.caption.generate import Sampling

    limit = {} if values.max_new_tokens is None else {"max_new_tokens": values.max_new_tokens}
    sampling = Sampling(
        temperature=values.temperature, top_p=values.top_p, repetition_penalty=values.repetition_penalty, **limit
    )
    # A cue has an end; one of them is the whole video where no segments are asked for.
    needs_ends = {"srt", "vtt"} & set(values.export)
    return JobConfig(
        prompt=values.prompt,
        sampling=sampling,
        max_new_tokens=values.max_new_tokens,
        span=Span(values.start, values.end),
        modality=values.modality,
        seed=values.seed,
        segment_seconds=math.inf if needs_ends and values.segment_seconds is None else values.segment_seconds,
        batch_size=values.batch_size,
    )


def _sign_model(values: Namespace) -> dict[str, str]:
    """What tells a model from another one, that of the same folder before it was trained on too."""
    from salmonn.caption.captioner import SHIPPED_MODEL

    if values.model is None:
        config = (SHIPPED_MODEL / "config.json").read_bytes()
        signed = {"model": "the toy model that is shipped", MODEL_FILES: blake2b(config, digest_size=16).hexdigest()}
    else:
        signed = {"model": values.model} | _sign_folder(Path(values.model), MODEL_FILES)
    return signed | (_sign_folder(Path(values.adapter), ADAPTER_FILES) if values.adapter else {})


def _sign_folder(folder: Path, name: str) -> dict[str, str]:
    """A digest of a folder's config, and of its weights' names, sizes and times; of no folder, as of a hub id, none."""
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


def _sidecars(values: Namespace, files: "LedgerFiles", stack: ExitStack) -> "SubtitleWriter | None":
    from salmonn.batch.subtitles import FORMATS, SubtitleWriter
    from salmonn.caption.worker import WorkerLimits

    formats = [name for name in FORMATS if name in values.export]
    if not formats:
        return None
    return stack.enter_context(
        SubtitleWriter(
            formats,
            log=files.subtitles,
            logs=files.all_subtitles(),
            folder=values.subtitle_dir,
            replace=values.replace_subtitles,
            limits=WorkerLimits(values.read_seconds, values.read_gib),
        )
    )


def _finish(values: Namespace, run: "CaptionJob", files: "LedgerFiles") -> None:
    """Write what can be written at the end alone."""
    from salmonn.batch.export import TABLES, LatestCaptions, export_table

    tables = [suffix for suffix in TABLES if suffix.removeprefix(".") in values.export]
    if run.has_missing_subtitles:  # by whatever shard, of whatever number of them, it was captioned
        run.write_missing_subtitles(LatestCaptions(files.all_captions()))
    if tables:
        latest = LatestCaptions(files.own_captions() if files.shard.count > 1 else files.all_captions())
        for suffix in tables:
            export_table(latest, files.captions.with_suffix(suffix))
    if values.retry_failed:
        run.end_retry()


def _tell_state(ledger: "Ledger") -> None:
    if ledger.moved:
        sys.stderr.write(f"moved aside: {', '.join(str(path) for path in ledger.moved)}\n")
    if ledger.num_cut_bytes:
        sys.stderr.write(
            f"{ledger.files.captions}: a run was killed while it wrote; the last {ledger.num_cut_bytes} bytes, which "
            "are not whole, are cut off, and that video is captioned again\n"
        )


def _tell_failure(words: str) -> None:
    tqdm.write(f"failed: {words}", file=sys.stderr)


def _summarise(stats: "RunStats", files: "LedgerFiles", speed: str) -> None:
    sys.stderr.write(f"{stats.captions} captions in {files.captions}, {stats.failed} videos failed{speed}\n")
    if stats.done_before:
        sys.stderr.write(f"{stats.done_before} videos were there already\n")
    if stats.failed_before:
        sys.stderr.write(
            f"{stats.failed_before} failed in earlier runs, or a part of them, and are passed over: "
            f"{files.failed} says why, and --retry-failed tries them again\n"
        )
