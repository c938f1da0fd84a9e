"""Second pass over a file: decode the frames that are on screen at the target times, seeking between them.

Three ways to read, from the fastest to the most tolerant; each later one is used where the one before fails:
`_frames_by_index` trusts the index and skips frames that no other refers to, `_frames_on_screen` with keyframes decodes
everything from a keyframe on, and without keyframes it decodes the whole file. Each is tried with a strict decoder; if
that finds damage, the file is read again with one that returns whatever libav decodes.
"""

import logging
import math
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from fractions import Fraction
from typing import Any

import av
import numpy as np

from salmonn.media.container import REORDER_FRAMES, DecodeError, Decoder, MediaFile, cause_of, demux
from salmonn.media.display import display_size, display_warning, to_rgb
from salmonn.media.frame_sampling import FrameSampler
from salmonn.media.index import SLACK_SECONDS, StreamIndex
from salmonn.media.nal_units import non_reference_test
from salmonn.media.readers import ReaderError, find_frame_obstacle, find_obstacle, read_images
from salmonn.media.timeline import Timeline

logger = logging.getLogger(__name__)

# Threads that convert and scale; as many decoded frames are converted at a time, and one more waits.
_CONVERTERS = 2
# Frames are evenly spaced if none is further than this many intervals from its place among as many that are.
_MAX_UNEVENNESS = 0.6
# Muxers round times (Matroska to 1 ms): a frame due this little after a target time is meant by it.
_ROUNDING_SECONDS = 0.0015
# Number of frames that a seek must save: at each, the decoder's threads run empty.
_MIN_FRAMES_SAVED = 4


class _SeekError(Exception):
    """A seek did not lead to the frame that it was for."""


def target_times(index: StreamIndex, sampler: FrameSampler, *, start: float, end: float) -> np.ndarray:
    """Return the times of the frames to decode.

    The published rules count frames and suppose that they are evenly spaced. Where they are not (slides, screen
    recordings), a video is sampled as if each frame were repeated for as long as it is on screen: a frame has as many
    chances to be seen as it has time.

    Args:
        index: result of the first pass.
        sampler: rule that selects the times.
        start, end: the span, in seconds.

    Returns:
        (F,) float64, rising; F is 0 if there is no video in the span.
    """
    if not index.frame_times:
        return np.zeros(0)
    first = max(start, index.frame_times[0])
    duration = min(end, index.video_end) - first
    if duration <= 0:  # a frame may be stated to last for no time
        return np.array([first]) if start <= index.frame_times[0] < end else np.zeros(0)
    inside = index.frame_times[bisect_left(index.frame_times, first) : bisect_left(index.frame_times, first + duration)]
    num_frames = max(len(inside), 1)
    interval = duration / num_frames
    if (
        len(inside) > 1
        and np.abs(np.array(inside) - first - interval * np.arange(num_frames)).max() > _MAX_UNEVENNESS * interval
    ):
        intervals = np.diff([*inside, first + duration])
        # The mean of the short intervals, but for the shortest, which may be an accident.
        short = np.quantile(intervals[intervals > 0], 0.1, method="lower")
        interval = float(intervals[(short <= intervals) & (intervals <= 1.5 * short)].mean())
        num_frames = max(round(duration / interval), 1)
    times = np.array(sampler.sample_times(first, num_frames * interval, num_frames))
    following = np.array([*index.frame_times, math.inf])[[index.count_due(time) for time in times]]
    return np.where(following - times <= min(_ROUNDING_SECONDS, interval / 4), following, times)


def decode_frames(
    index: StreamIndex, targets: np.ndarray, *, sampler: FrameSampler, stack: ExitStack, reader: str = "pyav"
) -> list[np.ndarray | None]:
    """Decode the frames that are on screen at the target times; note damage in the index.

    Args:
        index: result of the first pass.
        targets: (F,) times, rising; at least one.
        sampler: rule that gives the size that frames are scaled to.
        stack: context that closes the file if it has to be reopened.
        reader: decoder of the frames, see `read_clip`.

    Returns:
        F images of (H, W, 3) uint8. The frame before a damaged one stays on screen; None before the first
        frame that decodes, and after the last one if many are lost there.
    """
    file, keyframes = index.file, index.keyframes
    if reader != "pyav" and (others := _frames_by_reader(reader, index, targets, sampler)):
        return others
    ways: list[Callable[[_FrameSource], Iterator[Any]]] = [
        lambda source: _frames_by_index(source, targets),
        lambda source: _frames_on_screen(source, targets, keyframes),
        lambda source: _frames_on_screen(source, targets, []),
    ]
    # Frames that are counted, whose times have been changed, or whose palette is in the first packet cannot be sought.
    is_readable_only_from_start = file.counts_frames or not index.is_continuous or file.video.pix_fmt == "pal8"
    way = 2 if is_readable_only_from_start or not keyframes else 0
    if way == 2:
        file = file.reopen(stack)
    strict = True
    while True:
        source = _FrameSource(file, index, strict=strict)
        try:
            aspect_ratio = file.video.sample_aspect_ratio
            images, warning = _convert_frames(ways[way](source), sampler, len(targets), aspect_ratio)
        except _SeekError as error:
            logger.debug("%s: reading again, because a seek failed (%s)", file.path, error)
            way += 1
        except DecodeError as error:
            logger.debug("%s: reading again, because it seems damaged (%s)", file.path, error)
            strict = False
        else:
            _cut_lost_end(index, targets, images, source)
            index.video_damage = sorted(index.video_damage + source.decoder.damage)
            index.display_warning = warning
            index.error = index.error if any(image is not None for image in images) else source.decoder.cause
            return images
        file = file.reopen(stack, strict=strict)


def decode_all(index: StreamIndex, stack: ExitStack, *, start: float, end: float) -> Iterator[tuple[float, Any]]:
    """Decode each frame once, from the one on screen at `start` to the last one before `end`.

    After damage, reading resumes at the next frame that decodes.

    Args:
        index: result of the first pass over the whole file.
        stack: context that closes the file.
        start, end: the span, in seconds.

    Yields:
        (seconds, decoded frame), by rising time.
    """
    can_seek = bool(index.keyframes) and index.is_continuous and not index.file.counts_frames
    first = index.frame_times[max(index.count_due(start), 1) - 1] if index.frame_times else start
    strict, latest = True, -math.inf
    while True:
        source = _FrameSource(index.file.reopen(stack, strict=strict), index, strict=strict)
        begin = max(first, latest)
        number = _keyframe_before(index.keyframes, begin) if can_seek else 0
        try:
            for seconds, frame in source.frames(index.keyframes[number][1] if number else None):
                if number and latest < first < seconds - SLACK_SECONDS:
                    raise _SeekError(f"no frame at {first:.3f} s")
                if seconds >= end:
                    return
                if seconds > latest and seconds >= first - SLACK_SECONDS:
                    latest = seconds
                    yield seconds, frame
            return
        except _SeekError as error:
            logger.debug("%s: reading from the start, because a seek failed (%s)", index.file.path, error)
            can_seek = False
        except DecodeError as error:
            logger.debug(
                "%s: reading on with a tolerant decoder, because it seems damaged (%s)", index.file.path, error
            )
            strict = False


def _cut_lost_end(
    index: StreamIndex, targets: np.ndarray, images: list[np.ndarray | None], source: "_FrameSource"
) -> None:
    """Let the video end where its last frames are lost, if they are more than a decoder may lack at the end."""
    next_frame = index.count_due(source.latest_seconds)
    if index.count_due(targets[-1]) - next_frame > REORDER_FRAMES:
        limit = index.frame_times[next_frame]
        source.decoder.damage.append((limit, index.video_end - limit))
        index.video_end = limit
        images[:] = [image if time < limit else None for image, time in zip(images, targets, strict=True)]


class _FrameSource:
    """The decoded frames of a file's video, in presentation order with their times.

    Args:
        file: the open file.
        index: its index.
        strict: raise a DecodeError at the first damage.

    Attributes:
        decoder: the decoder, which knows of damage.
        latest_seconds: time of the latest frame.
    """

    def __init__(self, file: MediaFile, index: StreamIndex, *, strict: bool) -> None:
        self.file = file
        self.index = index
        self.strict = strict
        self.decoder = Decoder(file, file.video, strict=strict)
        self.latest_seconds = -math.inf
        self._is_non_reference = non_reference_test(file.video.codec_context)

    def frames(self, keyframe: int | None, due: set[float] | None = None) -> Iterator[tuple[float, Any]]:
        """Yield (seconds, frame).

        Args:
            keyframe: timestamp to seek to; None reads on from the current position.
            due: times of the frames that are needed: others are skipped if no frame refers to them, and reading ends
                after the last; None yields all frames.

        Raises:
            _SeekError: the file cannot be sought in.
            DecodeError: the source is strict, and the file is damaged.
        """
        if keyframe is not None:
            try:
                self.file.container.seek(keyframe, stream=self.file.video)
            except av.error.FFmpegError as error:
                raise _SeekError(cause_of(error)) from error
            self.decoder.restart()
        try:
            for seconds, frame in self._all_frames() if due is None else self._due_frames(due):
                self.latest_seconds = seconds
                yield seconds, frame
        except av.error.FFmpegError as error:
            if self.strict:
                raise DecodeError(cause_of(error)) from error
            self.decoder.cause = cause_of(error)

    def _packets(self) -> Iterator[Any]:
        if self.index.is_continuous:
            return demux(self.file, self.file.video)
        return (packet for packet in Timeline(self.file).packets() if packet.stream.index == self.file.video.index)

    def _all_frames(self) -> Iterator[tuple[float, Any]]:
        count, has_started = 0, not self.index.keyframes
        for packet in self._packets():
            has_started = has_started or packet.is_keyframe
            for frame in self.decoder.decode(packet) if has_started else []:
                number = count + len(self.decoder.damage)  # frames that do not decode count, too
                count += 1
                if not self.file.counts_frames and frame.pts is not None:
                    yield self.file.seconds(frame.pts, self.file.video), frame
                elif self.file.counts_frames and number < len(self.index.frame_times):
                    yield self.index.frame_times[number], frame

    def _due_frames(self, due: set[float]) -> Iterator[tuple[float, Any]]:
        stream = self.file.video
        remaining, has_started = set(due), False
        for packet in self._packets():
            has_started = has_started or packet.is_keyframe
            seconds = math.nan if packet.pts is None else self.file.seconds(packet.pts, stream)
            if has_started and (seconds in due or not self._is_non_reference(packet)):
                for frame in self.decoder.decode(packet):
                    if frame.pts is not None:
                        yield self.file.seconds(frame.pts, stream), frame
            remaining.discard(seconds)
            if not remaining:
                break
        # Decoders hold frames back, to reorder them and for their threads; draining needs no later packets.
        for frame in self.decoder.drain():
            if frame.pts is not None:
                yield self.file.seconds(frame.pts, stream), frame


def _frames_by_reader(
    reader: str, index: StreamIndex, targets: np.ndarray, sampler: FrameSampler
) -> list[np.ndarray | None]:
    """Decode the due frames with another reader; return nothing, with a line in the log, where only PyAV can."""
    path = index.file.path
    if (obstacle := find_obstacle(index, reader)) is None:
        try:
            frame = next(_frames_by_index(_FrameSource(index.file, index, strict=True), targets[:1]))
        except (_SeekError, DecodeError) as error:
            obstacle = str(error)
        else:
            obstacle = find_frame_obstacle(frame)
    if obstacle is not None:
        logger.debug("%s: decoding with PyAV instead of %s because of %s", path, reader, obstacle)
        return []
    size = sampler.frame_size(frame.height, frame.width, len(targets))
    try:
        return [*read_images(reader, index, _due_times(index, targets), size=size, first_frame=frame)]
    except ReaderError as error:
        logger.warning("%s: decoding with PyAV, because %s cannot (%s)", path, reader, error)
        return []


def _due_times(index: StreamIndex, targets: np.ndarray) -> list[float]:
    """Return the presentation times of the frames that are on screen at the target times."""
    return [index.frame_times[max(index.count_due(time), 1) - 1] for time in targets]


def _frames_by_index(source: _FrameSource, targets: np.ndarray) -> Iterator[Any]:
    """Yield the decoded frame that is due at each target time by the index, with the least decoding.

    Raises:
        _SeekError: a frame does not come where the index says, so the index cannot be used.
    """
    index = source.index
    if len(set(index.frame_times)) < len(index.frame_times):
        raise _SeekError("two frames have the same time")
    due = _due_times(index, targets)
    shown = None
    for keyframe, run in _plan_seeks(index, due):
        num_found = 0
        for seconds, frame in source.frames(keyframe, set(run)):
            while num_found < len(run) and seconds > run[num_found] and source.decoder.damage:
                yield shown
                num_found += 1
            while num_found < len(run) and seconds == run[num_found]:
                yield frame
                num_found += 1
            shown = frame
        if num_found < len(run) and not source.decoder.damage:
            raise _SeekError(f"no frame at {run[num_found]:.3f} s")
        for _ in run[num_found:]:
            yield shown


def _plan_seeks(index: StreamIndex, due: list[float]) -> Iterator[tuple[int, list[float]]]:
    """Yield the due times in runs, each with the keyframe timestamp to seek to first."""
    first = 0
    for place in range(1, len(due) + 1):
        if place < len(due):
            keyframe_seconds = index.keyframes[_keyframe_before(index.keyframes, due[place])][0]
            num_saved = index.count_due(keyframe_seconds) - index.count_due(due[place - 1]) - 1
            if num_saved < _MIN_FRAMES_SAVED:
                continue
        yield index.keyframes[_keyframe_before(index.keyframes, due[first])][1], due[first:place]
        first = place


def _frames_on_screen(source: _FrameSource, targets: np.ndarray, keyframes: list[tuple[float, int]]) -> Iterator[Any]:
    """Yield the decoded frame that is on screen at each target time, seeking to `keyframes`; without them, no seeks."""
    num_found = 0
    while num_found < len(targets):
        number = _keyframe_before(keyframes, targets[num_found])
        frames = source.frames(keyframes[number][1] if keyframes else None)
        for frame in _match_targets(source, frames, targets[num_found:], keyframes[number:]):
            yield frame
            num_found += 1


def _match_targets(
    source: _FrameSource,
    frames: Iterator[tuple[float, Any]],
    targets: np.ndarray,
    keyframes: list[tuple[float, int]],
) -> Iterator[Any]:
    """Yield the frames on screen at the targets, until the next is better reached from a later keyframe."""
    index = source.index
    num_found = 0
    shown, shown_seconds = None, index.frame_times[0] - 1.0
    for seconds, frame in frames:
        while seconds > targets[num_found] + SLACK_SECONDS:
            if shown is None and keyframes:
                raise _SeekError(f"no frame at {targets[num_found]:.3f} s")
            yield shown
            num_found += 1
            if num_found == len(targets):
                return
        number = _keyframe_before(keyframes, targets[num_found])
        if number > 0 and keyframes[number][0] > seconds:
            return
        shown, shown_seconds = frame, seconds
    if shown is None and keyframes:
        raise _SeekError(f"no frame at {targets[num_found]:.3f} s or later")
    if source.strict and index.count_due(shown_seconds) < len(index.frame_times):
        raise DecodeError("the video ends before the end that the file declares")
    for _ in targets[num_found:]:  # the last frame stays on screen
        yield shown


def _keyframe_before(keyframes: list[tuple[float, int]], seconds: float) -> int:
    """Return the index of the last keyframe at or before a time, 0 if there is none."""
    return max(0, bisect_right(keyframes, seconds + SLACK_SECONDS, key=lambda keyframe: keyframe[0]) - 1)


def _convert_frames(
    frames: Iterator[Any], sampler: FrameSampler, num_targets: int, sample_aspect_ratio: Fraction | None = None
) -> tuple[list[np.ndarray | None], str | None]:
    """Convert decoded frames to (H, W, 3) uint8 images as they are displayed; also return the first one's warning.

    A frame that stays on screen is converted once. Other threads convert while this one decodes; few full-size frames
    wait for them.
    """
    images: list[Future[np.ndarray] | None] = []
    waiting: deque[Future[np.ndarray]] = deque()
    previous, size, warning = None, None, None
    with ThreadPoolExecutor(_CONVERTERS) as pool:
        for frame in frames:
            if frame is not None and frame is not previous:
                if size is None:  # a stream may change its size; all images of a clip get that of the first
                    size = sampler.frame_size(*display_size(frame, sample_aspect_ratio), num_targets)
                    warning = display_warning(frame)
                waiting.append(pool.submit(to_rgb, frame, *size))
                if len(waiting) > _CONVERTERS:
                    wait([waiting.popleft()])
            previous = frame
            images.append(None if frame is None else waiting[-1])
    return [None if image is None else image.result() for image in images], warning
