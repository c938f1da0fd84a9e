"""Options of `salmonn caption`: its flags, what is checked before a model is loaded, and the job they describe."""

import math
import os
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from jsonargparse import Namespace

from salmonn.caption.generator import CaptionRequest, Sampling, Span
from salmonn.caption.presets import ExportFormat
from salmonn.caption.segments import FixedSegments, SegmentRule, ShotDetectorName, ShotSegments
from salmonn.cli.caption_outputs import out_path, resolve_out
from salmonn.cli.caption_server import add_budget, add_server_options, server_options
from salmonn.cli.fuse_options import add_fuse_options, check_fuse_options
from salmonn.cli.options import add_batch_size, add_model_options, add_subtitle_options
from salmonn.cli.shape_options import SHAPE_SETTINGS, add_shape_options, resolve_shape
from salmonn.cli.vllm_options import add_vllm_options, check_vllm_options
from salmonn.config import FlagParser
from salmonn.media.frame_sampling import FrameOptions
from salmonn.records import Modality

if TYPE_CHECKING:
    from salmonn.batch.fetch import FetchConfig
    from salmonn.batch.job import JobConfig
    from salmonn.batch.transcripts import SpeechContext

# Settings that the captions depend on; a run with other ones does not resume it.
JOB_SETTINGS = (
    "model", "adapter", "prompt", "modality", "start", "end", "segments", "min_shot", "shot_detector",
    "temperature", "top_p", "repetition_penalty", "stop", "logprobs", "max_new_tokens", "seed", "published_positions",
    "dtype", "bits", "reader", "frames", *SHAPE_SETTINGS, "context", "transcripts",
)  # fmt: skip
STDOUT = "-"
VIDEO_COLUMN = "video"  # of Parquet files
TABLE_SUFFIXES = (".csv", ".parquet")  # of --out: a table is written at the end, from the JSONL file next to it
SAMPLING_FLAGS = ("temperature", "top_p", "repetition_penalty")


def caption_parser() -> FlagParser:
    """Return the arguments of `salmonn caption`."""
    parser = FlagParser(
        description="Caption videos (files, or folders searched recursively) and write one JSON line for each. Videos "
        "that are already in --out are skipped: after an interruption, run the same command to resume. A file that "
        "cannot be captioned is listed in captions.failed.jsonl and does not stop the run; the exit code is then 1."
    )
    add_input_options(parser)
    _add_generation_options(parser)
    _add_context_options(parser)
    add_shape_options(parser)
    add_fuse_options(parser)
    _add_output_options(parser)
    _add_processing_options(parser)
    add_model_options(parser)
    add_server_options(parser)
    return parser


def add_input_options(parser: FlagParser, *, verb: str = "caption") -> None:
    """Add the choice of videos; the verb says what is done with them."""
    group = parser.add_argument_group("Input")
    paths = "video or audio files, folders of them, tar archives or Parquet files; also URLs (hf://, s3://, gs://, https://)"
    group.add_argument("paths", nargs="*", type=str, help=paths)
    listed = "file with one path per line, or separated by NUL bytes as by find -print0 (-: stdin)"
    group.add_argument("--list", type=str | None, default=None, help=listed)
    globs = "in folders, only files matching one of these patterns, such as '*.mp4' or 'train/**/*.mp4'"
    group.add_argument("--glob", nargs="+", action="extend", type=str, default=[], help=globs)
    columns = "column of the videos in Parquet files: paths, URLs, bytes, or structs of bytes and path"
    group.add_argument("--column", type=str, default=VIDEO_COLUMN, help=columns)
    group.add_argument("--shard", type=str | None, default=None, help="2/8: the second eighth of the videos")
    group.add_argument("--limit", type=int | None, default=None, help=f"{verb} at most N videos in this run")
    group.add_argument("--dry_run", action="store_true", help="only count the videos that are left to do")
    group.add_argument("--retry_failed", action="store_true", help="only retry videos that failed in earlier runs")
    group.add_argument("--max_failures", type=int, default=20, help="stop after this many failures in a row (0: never)")


def _add_generation_options(parser: FlagParser) -> None:
    group = parser.add_argument_group("Prompt and sampling")
    group.add_argument("--prompt", type=str, default=None, help="question (default: ask for a full description)")
    modalities = "what the model is given: " + ", ".join(get_args(Modality))
    group.add_argument("--modality", type=Modality | None, default=None, help=f"{modalities} (default: both)")
    group.add_argument("--start", type=float | None, default=None, help="start of the part to caption, in seconds")
    group.add_argument("--end", type=float | None, default=None, help="end of the part to caption, in seconds")
    segments = "caption parts of each video separately: every N seconds, or its shots"
    group.add_argument("--segments", type=float | Literal["shots"] | None, default=None, help=segments)
    shortest = "with --segments shots, merge shots shorter than this many seconds with the next one (default: 1)"
    group.add_argument("--min_shot", type=float | None, default=None, help=shortest)
    detectors = "with --segments shots, how cuts are found (default: pyscenedetect)"
    group.add_argument("--shot_detector", type=ShotDetectorName | None, default=None, help=detectors)
    forms = "events: scene, events with times, speech with speakers, text, camera and sound, as JSON (default: text)"
    group.add_argument("--format", type=Literal["text", "events"] | None, default=None, help=forms)
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


def _add_context_options(parser: FlagParser) -> None:
    """Add the context that the model gets in addition to the clip."""
    group = parser.add_argument_group("Context")
    contexts = "transcript: add the speech of the video, or of its part, to the prompt"
    group.add_argument("--context", type=Literal["transcript"] | None, default=None, help=contexts)
    files = "JSONL files of `salmonn transcribe` (default: film.json, film.vtt or film.srt next to film.mp4)"
    group.add_argument("--transcripts", nargs="+", type=str, default=[], help=files)


def _add_output_options(parser: FlagParser) -> None:
    group = parser.add_argument_group("Output")
    outs = "file for the captions: .jsonl; .csv or .parquet, written at the end from the .jsonl next to it; -: stdout"
    outs += "; a URL (s3://, gs://, hf://): uploaded at intervals and at the end"
    group.add_argument("--out", type=out_path, required=True, help=outs)
    group.add_argument("--upload_seconds", type=float, default=600.0, help="time between uploads, if --out is a URL")
    exports = "csv, parquet: a table next to --out, written at the end; "
    exports += "datasets, webdataset: a folder of shards, of captions alone or with their videos, written at the end; "
    exports += "txt, srt, vtt: a file next to each video, written with its caption"
    group.add_argument("--export", nargs="+", type=ExportFormat, default=[], help=exports)
    add_subtitle_options(group)
    group.add_argument(
        "--lines_per_file", type=int | None, default=None, help="split the output: captions.00001.jsonl, ..."
    )
    group.add_argument("--overwrite", action="store_true", help="start over; old files get the suffix .old")
    group.add_argument("--quiet", action="store_true", help="print only errors")


def _add_processing_options(parser: FlagParser) -> None:
    group = parser.add_argument_group("Speed and limits")
    add_batch_size(group)
    add_reading_options(group)
    engines = "ray: use a Ray cluster; vllm: run the language model of a video-SALMONN 2 or 2+ in vLLM"
    group.add_argument("--engine", type=Literal["local", "ray", "vllm"], default="local", help=engines)
    add_vllm_options(group)
    group.add_argument(
        "--ray_actors", type=int | None, default=None, help="models on the Ray cluster (default: one per GPU)"
    )


def add_reading_options(group: Any) -> None:
    """Add the processes that read files, and their limits, to an argument group."""
    group.add_argument(
        "--workers", type=int | None, default=None, help="processes that decode files (0: decode in this process)"
    )
    group.add_argument("--read_seconds", type=float, default=900.0, help="time limit for decoding a file")
    group.add_argument("--read_gib", type=float, default=4.0, help="memory limit for decoding a file")
    scratch = "folder for remote files, which are fetched ahead and deleted once read (default: the system's)"
    group.add_argument("--scratch_dir", type=Path | None, default=None, help=scratch)
    size = "size of the fetched files at which no more are fetched ahead, and maximum size of a file"
    group.add_argument("--scratch_gib", type=float, default=16.0, help=size)
    group.add_argument("--fetch_seconds", type=float, default=900.0, help="time limit for fetching a file")


def check_options(values: Namespace) -> None:
    """Raise a ValueError for values that make no sense, and complete those that follow from others."""
    from salmonn.batch.discovery import Shard, VideoListing

    resolve_out(values)
    resolve_shape(values)
    _resolve_events(values)
    if str(values.out) == STDOUT:
        needs_file = {"--retry-failed": values.retry_failed, "--lines-per-file": values.lines_per_file}
        needs_file |= {
            f"--export {name}": name in values.export for name in ("csv", "parquet", "datasets", "webdataset")
        }
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
    job_config(values)
    server_options(values)
    check_vllm_options(values)
    check_fuse_options(values)
    add_budget(values)
    fetch_config(values)
    _check_remote(values)
    shard = Shard.parse(values.shard) if values.shard else Shard()
    if not values.retry_failed:
        named = dict(list_path=values.list, globs=values.glob, shard=shard, column=values.column)
        VideoListing(values.paths, **named).require_any()
    folder = next(parent for parent in (values.out.parent, *values.out.absolute().parents) if parent.exists())
    if str(values.out) != STDOUT and not values.dry_run and not os.access(folder, os.W_OK):
        raise ValueError(f"the folder {folder} is read-only; choose another one for the captions with --out")


def _check_remote(values: Namespace) -> None:
    """Refuse files next to the videos, where those are remote or in archives."""
    from salmonn.batch.containers import holds_videos
    from salmonn.batch.remote import is_url

    remote = next((path for path in values.paths if is_url(path) or holds_videos(path, column=values.column)), None)
    if remote is None:
        return
    what = f"{remote} is {'remote' if is_url(remote) else 'an archive'}"
    if values.dataset_layout is not None:
        raise ValueError(
            f"the dataset {values.dataset_layout.file} lists local files, and {what}; download or unpack the videos"
        )
    if {"txt", "srt", "vtt"} & set(values.export) and values.subtitle_dir is None:
        raise ValueError(f"subtitles are written next to local videos only, and {what}; choose a --subtitle-dir")
    if values.shape is not None and "sidecar" in values.shape.fields:
        raise ValueError(f"{{sidecar}} is a text file next to a local video, and {what}; leave out {{sidecar}}")


def column_setting(values: Namespace) -> dict[str, str]:
    """Return the column for the job file; rows are named by numbers, so those of two columns have the same names."""
    return {} if values.column == VIDEO_COLUMN else {"column": values.column}


def fetch_config(values: Namespace) -> "FetchConfig":
    from salmonn.batch.fetch import FetchConfig

    return FetchConfig(values.scratch_dir, values.scratch_gib, values.fetch_seconds, values.column)


def job_config(values: Namespace) -> "JobConfig":
    from salmonn.batch.job import JobConfig

    limit = {} if values.max_new_tokens is None else {"max_new_tokens": values.max_new_tokens}
    sampling = Sampling(
        **{name: values[name] for name in SAMPLING_FLAGS},
        stop=tuple(values.stop),
        logprobs=0 if values.logprobs else None,
        **limit,
    )
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
        segments=_segment_rule(values),
        batch_size=values.batch_size,
        shape=values.shape,
        context=_speech_context(values),
    )


def _resolve_events(values: Namespace) -> None:
    """Let captions have the form of events; raises a ValueError where that is not possible."""
    from salmonn.caption.event_shape import events_shape

    if values.format != "events":
        return
    if values.shape is not None:
        raise ValueError("--format events has its own form; use it without flags for words, templates or prompts")
    if values.server is None and find_spec("llguidance") is None:
        raise ValueError("--format events needs llguidance: pip install 'salmonn[json]'")
    values.shape = events_shape()


def _segment_rule(values: Namespace) -> SegmentRule | None:
    """Return how videos are split into segments."""
    shot_flags = {name: values[name] for name in ("min_shot", "shot_detector") if values[name] is not None}
    if values.segments == "shots":
        names = {"min_shot": "min_seconds", "shot_detector": "detector"}
        shots = ShotSegments(**{names[flag]: value for flag, value in shot_flags.items()})
        shots.require_installed()
        return shots
    if shot_flags:
        raise ValueError(f"--{next(iter(shot_flags)).replace('_', '-')} needs --segments shots")
    if values.segments is not None:
        if not values.segments > 0:
            raise ValueError(f"--segments must be above 0 s, got {values.segments:g}; or use --segments shots")
        return FixedSegments(values.segments)
    # Subtitles need end times; an infinite segment is the whole video with its end.
    return FixedSegments(math.inf) if {"srt", "vtt"} & set(values.export) else None


def _speech_context(values: Namespace) -> "SpeechContext | None":
    """Return where the speech of videos is found, if it is to be added to the prompts."""
    from salmonn.batch.subtitles import written_captions
    from salmonn.batch.transcripts import SpeechContext, TranscriptFiles

    if values.context is None:
        if values.transcripts:
            raise ValueError("--transcripts needs --context transcript")
        return None
    if values.transcripts:
        return SpeechContext(TranscriptFiles([Path(path) for path in values.transcripts]))
    if {"srt", "vtt"} & set(values.export) and values.subtitle_dir is None:
        raise ValueError(
            "--export srt or vtt would write captions next to the videos, where --context transcript takes subtitles "
            "for speech; name --transcripts, or another folder with --subtitle-dir"
        )
    return SpeechContext(captions=written_captions(values.out.parent))


def fingerprint_transcripts(values: Namespace) -> dict[str, str]:
    """Identify how the transcripts were made by the settings next to them; more of the same kind may be added."""
    from salmonn.batch.ledger_files import LedgerFiles

    state = blake2b(digest_size=16)
    jobs = {LedgerFiles.of(Path(path)).job for path in values.transcripts}
    found = sorted(path for path in jobs if path.is_file())
    for path in found:
        state.update(path.read_bytes())
    return {"transcripts_job": state.hexdigest()} if found else {}
