"""The loop of `salmonn caption`: what is listed and not done yet is captioned, and each file's captions are kept."""

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from salmonn.batch.discovery import VideoFile, path_number
from salmonn.batch.export import LatestCaptions
from salmonn.batch.hash_set import HashSet, hash_key
from salmonn.batch.ledger import Ledger
from salmonn.batch.subtitles import SubtitleWriter
from salmonn.caption.captioner import Captioner, PendingRequest, Span
from salmonn.caption.generate import Sampling
from salmonn.caption.loader import ClipReader
from salmonn.records import Caption, Failure, Modality

IndexedVideo = tuple[int, VideoFile]  # a video with its place among those that are tried


@dataclass(frozen=True)
class JobConfig:
    """What is asked of each video.

    Args:
        prompt: None: a full description.
        sampling: how words are drawn.
        max_new_tokens: limit of an answer in place of `sampling`'s; None: the model's.
        span: the part of each video.
        use: picture, sound or both.
        seed: a video's draws come from this plus a number that its path gives: no order matters.
        segment_seconds: see `Captioner.caption_batches`.
        batch_size: clips side by side; None: the model's.
    """

    prompt: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int | None = None
    span: Span = field(default_factory=Span)
    modality: Modality = "both"
    seed: int = 0
    segment_seconds: float | None = None
    batch_size: int | None = None


@dataclass(frozen=True)
class VideoResult:
    """What became of a video.

    Args:
        place: among those that were tried.
        video: the file.
        results: of its segments, in order of time.
    """

    place: int
    video: VideoFile
    results: tuple[Caption | Failure, ...]


class TooManyFailures(ValueError):
    """So many videos failed one after the other that something else must be wrong."""


@dataclass
class RunStats:
    """What a run has counted so far.

    Args:
        captions: lines that were written.
        videos: that came to their end, well or not.
        failed: videos that failed, or a segment of them, or their side-car.
        done_before, failed_before: videos that earlier runs were done with, and that are passed over; the latter those
            of which something failed.
    """

    captions: int = 0
    videos: int = 0
    failed: int = 0
    done_before: int = 0
    failed_before: int = 0


def caption_videos(
    captioner: Captioner, videos: Iterable[IndexedVideo], *, task: JobConfig, reader: ClipReader
) -> Generator[VideoResult]:
    """Caption videos, and tell of each once the last of its segments is done.

    Args:
        captioner: the model.
        videos: any number of them.
        task: what is asked.
        reader: what reads ahead.
    """
    started: dict[int, IndexedVideo] = {}
    parts: dict[int, list[Caption | Failure]] = {}

    def asked() -> Iterator[PendingRequest]:
        for number, (place, video) in enumerate(videos):
            started[number] = (place, video)
            yield PendingRequest(Path(video.path), task.span, task.seed + path_number(video.path))

    limit = captioner.default_sampling().max_new_tokens if task.max_new_tokens is None else task.max_new_tokens
    batches = captioner.caption_batches(
        asked(),
        prompt=task.prompt,
        sampling=replace(task.sampling, max_new_tokens=limit),
        modality=task.modality,
        segment_seconds=task.segment_seconds,
        batch_size=task.batch_size,
        reader=reader,
    )
    for batch in batches:
        for done in batch:
            results = parts.setdefault(done.place, [])
            results.append(done.result)
            if len(results) == done.num_segments:
                place, video = started.pop(done.place)
                yield VideoResult(place, video, _sign(parts.pop(done.place), video))


def _sign(results: list[Caption | Failure], video: VideoFile) -> tuple[Caption | Failure, ...]:
    ordered = sorted(results, key=lambda result: result.start_seconds or 0.0)
    return tuple(replace(result, size_bytes=video.size_bytes, modified_ns=video.modified_ns) for result in ordered)


class CaptionJob:
    """One process's run over its videos.

    Args:
        ledger: what it writes.
        is_retry: whether it tries again what failed in earlier runs: then nothing is passed over, failures are told
            at the end alone (`failed_again`), and any number of them may follow one another.
        max_failures: after so many videos in a row of which nothing came out it stops; 0: never.
        sidecars: where a text beside each video is wanted.
        tell: called with the reason of each failure.

    Attributes:
        tally: how many videos so far.
        failed_again: what failed, in a retry.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        is_retry: bool = False,
        max_failures: int = 20,
        subtitles: SubtitleWriter | None = None,
        tell: Callable[[str], object] = lambda words: None,
    ) -> None:
        if max_failures < 0:
            raise ValueError(f"--max-failures must be 0 (no limit) or more, got {max_failures}")
        self.stats = RunStats()
        self.failed_again: list[Failure] = []
        self._ledger = ledger
        self._is_retry = is_retry
        self._row = _Row(0 if is_retry else max_failures)
        self._sidecars = subtitles
        self._tell = tell
        self._taken = HashSet()
        self._num_placed = 0

    def pending(self, found: Iterable[VideoFile | Failure]) -> Iterator[IndexedVideo]:
        """What is to be done of what was listed; a folder that cannot be listed fails here.

        Raises:
            TooManyFailures: as `keep`.
        """
        for one in found:
            if isinstance(one, VideoFile) and self._is_taken(one):
                continue
            if not self._is_retry and self._ledger.has_failed(one):
                self.stats.failed_before += 1
            elif isinstance(one, Failure):
                self._fail([one])
                self.stats.failed += 1
                self.stats.videos += 1
                self._row.add(self._place(), one.reason)
            elif not self._is_retry and self._ledger.is_done(one):
                if self._ledger.has_failed_in_part(one):
                    self.stats.failed_before += 1
                else:
                    self.stats.done_before += 1
            else:
                yield self._place(), one

    def save(self, group: VideoResult) -> None:
        """Put on disk what became of a video.

        Raises:
            TooManyFailures: it is the last of too many in a row.
            LedgerError: the disk does not take it.
        """
        if self._row.has_ended(group.place):  # a cluster may do a block twice, where one of its machines is lost
            return
        captions = [result for result in group.results if isinstance(result, Caption)]
        failures = [result for result in group.results if isinstance(result, Failure)]
        unwritten = self._sidecars.write(captions) if captions and self._sidecars else []
        # A kill between any two of these costs nothing but captioning that file once more: failures of side-cars count
        # for nothing without captions, and captions that failures follow for nothing without those.
        self._fail(unwritten)
        if captions:
            self._ledger.write(captions, is_in_part=bool(failures))
        self._fail(failures)
        self.stats.captions += len(captions)
        self.stats.failed += bool(failures or unwritten)
        self.stats.videos += 1
        self._row.add(group.place, None if captions else failures[0].reason)

    @property
    def has_missing_subtitles(self) -> bool:
        """Whether there may be captions of earlier runs whose side-cars are missing."""
        return self._sidecars is not None and (
            self._is_retry or self.stats.done_before > 0 or self.stats.failed_before > 0
        )

    def write_missing_subtitles(self, latest: LatestCaptions) -> None:
        """Write side-cars that are missing of what was captioned before, without them or by a run that was killed.

        Where one could not be written, that is tried again in a retry alone.

        Args:
            latest: all captions.
        """
        assert self._sidecars is not None, "there is something to write"
        before = {failure.video for failure in self._ledger.unwritten()}
        now = {failure.video for failure in self.failed_again}
        for captions in latest.by_video():
            video = captions[0].video
            if video in now or (video in before and not self._is_retry):
                continue
            if not self._ledger.files.shard.holds(video):  # that shard's process writes it
                continue
            failures = self._sidecars.write(captions, only_missing=video not in before)
            self._fail(failures)
            self.stats.failed += bool(failures)

    def end_retry(self) -> None:
        """Put what failed again in place of the lists of failures."""
        kept = [] if self._sidecars else self._ledger.unwritten()
        self._ledger.replace_failures([*kept, *self.failed_again])

    def _place(self) -> int:
        self._num_placed += 1
        return self._num_placed - 1

    def _is_taken(self, video: VideoFile) -> bool:
        """Whether it came before: a file may be named several times."""
        key = hash_key(video.path)
        is_taken = key in self._taken
        self._taken.add(key)
        return is_taken

    def _fail(self, failures: list[Failure]) -> None:
        for failure in failures:
            self._tell(failure.reason)
        if self._is_retry:
            self.failed_again += failures
        elif failures:
            self._ledger.fail(failures)


class _Row:
    """Counts failures in a row, in the order in which videos were listed: they end in that of batches of like length,
    which brings those that cannot be read together.

    Args:
        most: that is borne; 0: any number.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._length = 0
        self._next = 0
        self._ended: dict[int, str | None] = {}

    def has_ended(self, place: int) -> bool:
        """Whether the video of that place came to its end."""
        return place < self._next or place in self._ended

    def add(self, place: int, reason: str | None) -> None:
        """Note how the video of that place ended; None: well."""
        self._ended[place] = reason
        while self._next in self._ended:
            reason = self._ended.pop(self._next)
            self._next += 1
            self._length = 0 if reason is None else self._length + 1
            if reason is not None and self._length == self._most:
                raise TooManyFailures(
                    f"{self._most} videos failed one after the other, the last for this reason: {reason}. What was "
                    "finished is kept. If the disk or the model is at fault, mend it and give --retry-failed; if those "
                    "files are, give the same command, which goes on after them (--max-failures 0: without a limit)"
                )
