"""The loop of `salmonn caption`: caption the listed videos that are not done yet, and save the captions of each.

A `CaptionJob` decides which videos are pending and saves their results; `caption_videos` makes the results with a
model in this process, `ray_cluster.caption_on_cluster` with models on a cluster.
"""

import itertools
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from tqdm import tqdm

from salmonn.batch.containers import source_path
from salmonn.batch.discovery import VideoFile, path_number
from salmonn.batch.export import LatestCaptions
from salmonn.batch.fetch import Fetcher
from salmonn.batch.ledger import Ledger
from salmonn.batch.ledger_files import HashSet, hash_key
from salmonn.batch.segment_logs import SegmentLog
from salmonn.batch.subtitles import SubtitleWriter
from salmonn.batch.transcripts import NO_TRANSCRIPT, SpeechContext
from salmonn.caption.generator import BatchCaptioner, CaptionRequest, Sampling
from salmonn.caption.loader import ClipReader
from salmonn.caption.segments import BoundsStore, SegmentRule
from salmonn.caption.shape import Shape
from salmonn.records import Caption, Failure
from salmonn.speech import MAX_CONTEXT_CHARS, SpeechEvent, describe_speech

IndexedVideo = tuple[int, VideoFile]  # a video with its number among the pending ones

_LOG_SECONDS = 30.0  # between two lines of progress in a log file
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
_BAR_WITHOUT_TOTAL = "{desc}: {n_fmt} videos [{elapsed}{postfix}]"


@dataclass(frozen=True)
class JobConfig:
    """How each video of a job is captioned.

    Args:
        request: template of each video's request. Its path is replaced, and a number derived from the path is added to
            the seed, so that samples do not depend on the order of videos.
        max_new_tokens: token limit of a caption, instead of the one in the request; None: the model's default.
        segments: see `Captioner.caption_batches`.
        batch_size: clips per batch; None: the model's default.
        shape: shape of the captions; None for the answers as they are.
        context: source of the speech that is added to a video's prompts; None: no speech is added.
    """

    request: CaptionRequest
    max_new_tokens: int | None = None
    segments: SegmentRule | None = None
    batch_size: int | None = None
    shape: Shape | None = None
    context: SpeechContext | None = None

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"--batch-size must be at least 1, got {self.batch_size}")


@dataclass(frozen=True)
class VideoResult:
    """The captions of a video, or why there are none.

    Args:
        index: number of the video among the pending ones.
        video: the file.
        results: one result per segment, in order of time.
    """

    index: int
    video: VideoFile
    results: tuple[Caption | Failure, ...]


class TooManyFailures(ValueError):
    """Too many videos failed in a row; something other than the files must be wrong."""


@dataclass
class RunStats:
    """Counts of a run so far.

    Args:
        captions: captions written.
        incomplete: those of them whose video, or segment, could not be read completely.
        misshapen: those of them without the requested length or words.
        without_transcript: those of them made without the transcript that was to be their context.
        videos: videos finished, with or without success.
        failed: videos that failed, at least in part: a segment or a subtitle file counts, too.
        done_before, failed_before: videos skipped because an earlier run finished them; the latter with a failure.
    """

    captions: int = 0
    incomplete: int = 0
    misshapen: int = 0
    without_transcript: int = 0
    videos: int = 0
    failed: int = 0
    done_before: int = 0
    failed_before: int = 0


def caption_videos(
    captioner: BatchCaptioner,
    videos: Iterable[IndexedVideo],
    *,
    config: JobConfig,
    reader: ClipReader,
    store: BoundsStore | None = None,
    fetcher: Fetcher | None = None,
    log: SegmentLog | None = None,
) -> Generator[VideoResult]:
    """Caption videos, and yield each once its last segment is done.

    Args:
        captioner: local model, or client of a server.
        videos: any number of videos.
        config: how they are captioned.
        reader: reads clips ahead of the model.
        store: keeps the bounds of segments.
        fetcher: fetches remote files ahead of the reader; needed if there are any.
        log: keeps the captions of segments until their video is finished.
    """
    fetcher = fetcher or Fetcher()
    started: dict[int, _StartedVideo] = {}
    limit = captioner.default_sampling().max_new_tokens if config.max_new_tokens is None else config.max_new_tokens
    sampling = replace(config.request.sampling or Sampling(), max_new_tokens=limit)

    def requests() -> Iterator[CaptionRequest]:
        for number, (index, video, path) in enumerate(fetcher.ahead(videos)):
            speech, missing = config.context.find(video) if config.context else (None, "")
            finished = log.take(video) if log else []
            started[number] = _StartedVideo(index, video, speech, missing, [*finished])
            yield replace(
                config.request,
                path=path,
                sampling=sampling,
                seed=config.request.seed + path_number(video.path),
                speech=speech,
                source=source_path(video.path),
                finished_starts=frozenset(one.start_seconds or 0.0 for one in finished),
            )

    batches = captioner.caption_batches(
        requests(),
        segments=config.segments,
        store=store,
        batch_size=config.batch_size,
        reader=reader,
        shape=config.shape,
    )
    for done in itertools.chain.from_iterable(batches):
        one = started[done.index]
        result = stamp(done.result, one.video, fetcher)
        if one.add(result, num_segments=done.num_segments):
            del started[done.index]
            fetcher.release(one.video)
            yield one.finish()
        elif log and isinstance(result, Caption):  # the last one is written with its video
            log.put(result)
    if log:
        log.finish()


@dataclass(frozen=True)
class _StartedVideo:
    index: int
    video: VideoFile
    speech: tuple[SpeechEvent, ...] | None
    missing: str
    parts: list[Caption | Failure]

    def add(self, result: Caption | Failure, *, num_segments: int) -> bool:
        """Add the result of a segment, and return whether all are there."""
        if num_segments == 1:  # also where a file with finished segments cannot be split again
            self.parts.clear()
        self.parts.append(result)
        return len(self.parts) == num_segments

    def finish(self) -> VideoResult:
        ordered = sorted(self.parts, key=lambda result: result.start_seconds or 0.0)
        return VideoResult(
            self.index, self.video, tuple(_note_context(one, self.speech, self.missing) for one in ordered)
        )


def _note_context(result: Caption | Failure, speech: tuple[SpeechEvent, ...] | None, missing: str) -> Caption | Failure:
    """Add a warning to a caption whose context is missing, for this reason, or was cut off."""
    if isinstance(result, Failure):
        return result
    if speech is not None and describe_speech(speech, result.start_seconds, result.end_seconds)[1]:
        missing = f"the transcript in the prompt was cut off after {MAX_CONTEXT_CHARS} characters"
    return replace(result, warnings=(*result.warnings, missing)) if missing else result


def stamp(result: Caption | Failure, video: VideoFile, fetcher: Fetcher) -> Caption | Failure:
    """Record the video and its version in a result, which may be about a scratch file."""
    if isinstance(result, Failure):
        result = replace(result, reason=fetcher.explain(video, result.reason))
    return replace(
        result, video=video.path, size_bytes=video.size_bytes, modified_ns=video.modified_ns, etag=video.etag
    )


class CaptionJob:
    """One process's run over its videos. A thread may list pending videos while another saves results.

    Args:
        ledger: where results are saved.
        is_retry: retry the failures of earlier runs. Nothing is skipped, any number may fail in a row, and failures are
            written only at the end (`failed_again`).
        max_failures: number of videos failing in a row at which the run stops; 0: never.
        subtitles: writes subtitle files for each video.
        on_failure: called with the reason of each failure.
        on_captions: called with the captions of each video once they are written.

    Attributes:
        stats: counts so far.
        failed_again: failures of a retry.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        is_retry: bool = False,
        max_failures: int = 20,
        subtitles: SubtitleWriter | None = None,
        on_failure: Callable[[str], object] = lambda reason: None,
        on_captions: Callable[[list[Caption]], object] = lambda captions: None,
    ) -> None:
        if max_failures < 0:
            raise ValueError(f"--max-failures must be 0 (no limit) or more, got {max_failures}")
        self.stats = RunStats()
        self.failed_again: list[Failure] = []
        self._ledger = ledger
        self._is_retry = is_retry
        self._streak = _FailureStreak(0 if is_retry else max_failures)
        self._subtitles = subtitles
        self._on_failure = on_failure
        self._on_captions = on_captions
        self._seen = HashSet()
        self._indices = itertools.count()
        self._lock = threading.Lock()

    def pending(self, found: Iterable[VideoFile | Failure]) -> Iterator[IndexedVideo]:
        """Yield the listed videos that have to be captioned; a folder that cannot be listed fails here.

        Raises:
            TooManyFailures: as in `save`.
        """
        for one in found:
            with self._lock:
                index = self._index_if_pending(one)
            if index is not None:
                assert isinstance(one, VideoFile)
                yield index, one

    def _index_if_pending(self, found: VideoFile | Failure) -> int | None:
        """Return a number for a video that has to be captioned; count or record anything else that was listed."""
        if isinstance(found, VideoFile):
            key = hash_key(found.path)
            if key in self._seen:  # it was named several times
                return None
            self._seen.add(key)
        status = "pending" if self._is_retry else self._ledger.status(found)
        if status == "done":
            self.stats.done_before += 1
        elif status != "pending":
            self.stats.failed_before += 1
        elif isinstance(found, Failure):
            self._fail([found])
            self.stats.failed += 1
            self.stats.videos += 1
            self._streak.add(next(self._indices), found.reason)
        else:
            return next(self._indices)
        return None

    def save(self, result: VideoResult) -> None:
        """Write the captions and failures of a video to the disk.

        Raises:
            TooManyFailures: too many videos failed in a row.
            LedgerError: the disk does not take them.
        """
        with self._lock:
            self._save(result)

    def _save(self, result: VideoResult) -> None:
        if self._streak.has_finished(result.index):  # a cluster that loses a machine may caption a block twice
            return
        failures = [one for one in result.results if isinstance(one, Failure)]
        captions = [
            replace(one, segment=segment, num_segments=len(result.results), num_failed_segments=len(failures))
            for segment, one in enumerate(result.results)
            if isinstance(one, Caption)
        ]
        unwritten = self._subtitles.write(captions) if captions and self._subtitles else []
        # A kill between any two of these only means that this video is captioned again: failed subtitles count only
        # together with captions, and captions of a part of a video only together with the failures of the rest.
        self._fail(unwritten)
        if captions:
            self._ledger.write(captions)
            self._on_captions(captions)
        self._fail(failures)
        self.stats.captions += len(captions)
        self.stats.incomplete += sum(not caption.complete for caption in captions)
        self.stats.misshapen += sum(any(not s.is_met for s in caption.shaping.values()) for caption in captions)
        self.stats.without_transcript += sum(
            any(warning.startswith(NO_TRANSCRIPT) for warning in caption.warnings) for caption in captions
        )
        self.stats.failed += bool(failures or unwritten)
        self.stats.videos += 1
        self._streak.add(result.index, None if captions else failures[0].reason)

    def _fail(self, failures: list[Failure]) -> None:
        for failure in failures:
            self._on_failure(failure.reason)
        if self._is_retry:
            self.failed_again += failures
        elif failures:
            self._ledger.fail(failures)

    def finish(self) -> None:
        """Write subtitle files that are still missing; after a retry, replace the lists of failures."""
        may_lack_subtitles = self._is_retry or self.stats.done_before or self.stats.failed_before
        if self._subtitles and may_lack_subtitles:
            self._write_missing_subtitles(self._subtitles)
        if self._is_retry:
            untouched = [] if self._subtitles else self._ledger.unwritten()
            self._ledger.replace_failures([*untouched, *self.failed_again])

    def _write_missing_subtitles(self, subtitles: SubtitleWriter) -> None:
        """Write subtitle files for captions of earlier runs that ran without them or were killed.

        One that could not be written is attempted again only by a retry.
        """
        files = self._ledger.files
        failed_before = {failure.video for failure in self._ledger.unwritten()}
        failed_now = {failure.video for failure in self.failed_again}
        for captions in LatestCaptions(files.all_captions()).by_video():  # whichever shards captioned the videos
            video = captions[0].video
            if not files.shard.holds(video) or video in failed_now or (video in failed_before and not self._is_retry):
                continue
            failures = subtitles.write(captions, only_missing=video not in failed_before)
            self._fail(failures)
            self.stats.failed += bool(failures)


class _FailureStreak:
    """Counts failures in a row, in the order in which videos were listed.

    They finish in the order of batches, which have clips of similar length and so bring unreadable files together.

    Args:
        limit: number of failures in a row that ends the run; 0: none.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._length = 0
        self._next = 0  # all videos before this index have finished
        self._finished: dict[int, str | None] = {}

    def has_finished(self, index: int) -> bool:
        return index < self._next or index in self._finished

    def add(self, index: int, reason: str | None) -> None:
        """Note that a video failed for a reason, or succeeded (None); raises TooManyFailures."""
        self._finished[index] = reason
        while self._next in self._finished:
            reason = self._finished.pop(self._next)
            self._next += 1
            self._length = 0 if reason is None else self._length + 1
            if reason is not None and self._length == self._limit:
                raise TooManyFailures(
                    f"{self._limit} videos failed in a row, the last with: {reason}. Finished work is saved. If the "
                    "disk or the model is at fault, fix it and run again with --retry-failed; if the files are, run "
                    "the same command to continue after them (--max-failures 0 removes the limit)"
                )


@contextmanager
def show_progress(
    stats: RunStats,
    *,
    count: Callable[[], Iterable[object]] | None,
    is_shown: bool = True,
    title: str = "captioning",
) -> Iterator[Callable[[], None]]:
    """Show a progress bar with clips per minute, time left and failures.

    Args:
        stats: counts of the run.
        count: lists the pending videos once more, to count them in a thread; None where that is not possible.
        is_shown: False in all processes but one.
        title: what is done.

    Returns:
        A function that updates the bar from `stats`.
    """
    is_over = threading.Event()
    start = time.perf_counter()
    bar = tqdm(
        desc=title,
        unit="video",
        disable=not is_shown,
        bar_format=_BAR_WITHOUT_TOTAL,
        mininterval=0.1 if sys.stderr.isatty() else _LOG_SECONDS,
    )
    totals: list[int] = []

    def count_all() -> None:
        assert count is not None
        total = 0
        for _ in count():
            total += 1
            if is_over.is_set():
                return
        totals.append(total)

    def update() -> None:
        if totals and bar.total is None:
            bar.total, bar.bar_format = totals[0], _BAR
        minutes = (time.perf_counter() - start) / 60
        text = f"{stats.videos / minutes:.1f} clips/min"
        if stats.failed:
            text += f", {stats.failed} failed"
        bar.set_postfix_str(text, refresh=False)
        bar.update(stats.videos - bar.n)

    if count and is_shown:
        threading.Thread(target=count_all, name="counting", daemon=True).start()
    try:
        yield update
    finally:
        is_over.set()
        bar.close()
