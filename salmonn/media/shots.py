"""Shots of a video: find the cuts in one pass over all of its frames, scaled down.

    bounds = find_shots("film.mp4", SceneDetector())

A detector sees each frame at its presentation time. Where a frame stays on screen for longer than usual (slides, screen
recordings), it is shown to the detector several times, since detectors compare a frame with the few around it.
"""

import math
import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from salmonn.media.container import ClipError, cause_of
from salmonn.media.index import StreamIndex, index_times
from salmonn.media.video import decode_all

# As many frames as PySceneDetect's rolling average takes: further repetitions of a frame change nothing.
_MAX_REPEATS = 4
# A frame is repeated at least this often while it is on screen: frames half a second apart are slides.
_MAX_INTERVAL_SECONDS = 0.1
_MAX_SIDE = 256  # of a frame for PySceneDetect, as PySceneDetect itself scales it down
_FADE_LEVEL = 12  # mean of a black frame, PySceneDetect's default


class ShotDetector(Protocol):
    """A detector of cuts, for one video."""

    def frame_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width that frames are to be scaled to."""
        ...

    def add(self, seconds: float, image: np.ndarray) -> Sequence[float]:
        """Take the next frame, (H, W, 3) uint8 RGB; return the times of the cuts that have become certain."""
        ...

    def finish(self) -> Sequence[float]:
        """Return the times of the other cuts after the last frame."""
        ...


class SceneDetector:
    """PySceneDetect: cuts by a rolling average of content changes, and fades from black.

    A cut is at the first frame of the new shot; after a fade, at the first one that is no longer black.
    """

    def __init__(self) -> None:
        import scenedetect  # noqa: PLC0415 - an extra

        self._timecode = scenedetect.FrameTimecode
        # Short shots are merged by `merge_short`. At a fade_bias of 1, the cut is where the picture comes back.
        self._detectors = [
            scenedetect.AdaptiveDetector(min_scene_len=0),
            scenedetect.ThresholdDetector(threshold=_FADE_LEVEL, min_scene_len=0, fade_bias=1.0),
        ]
        self._times = array("d")

    def frame_size(self, height: int, width: int) -> tuple[int, int]:
        """See `ShotDetector`."""
        scale = min(1.0, _MAX_SIDE / max(height, width))
        return max(round(height * scale), 1), max(round(width * scale), 1)

    def add(self, seconds: float, image: np.ndarray) -> list[float]:
        """See `ShotDetector`."""
        # Frames are identified by their number: their rate may vary, so no rate is right.
        timecode = self._timecode(len(self._times), fps=25.0)
        self._times.append(seconds)
        bgr = np.ascontiguousarray(image[..., ::-1])
        return [
            self._times[cut.frame_num] for detector in self._detectors for cut in detector.process_frame(timecode, bgr)
        ]

    def finish(self) -> list[float]:
        """See `ShotDetector`."""
        return []


def find_shots(
    path: str | os.PathLike[str],
    detector: ShotDetector,
    *,
    start_seconds: float | None = None,
    end_seconds: float | None = None,
    min_seconds: float = 0.0,
) -> list[float]:
    """Return the times at which the shots of a video begin, and the end of the last one.

    Args:
        path: a local video file.
        detector: a new detector.
        start_seconds, end_seconds: the span to search, from the start of the file; None for the file's own.
        min_seconds: shortest shot, see `merge_short`.

    Returns:
        Start of the span, cuts, end of the span: rising, at least two times; none if the span is empty.

    Raises:
        ClipError: the file cannot be read or has no video.
    """
    with ExitStack() as stack:
        index = index_times(path, stack)
        if index.file.video is None:
            raise ClipError(
                f"{path}: has no video and so no shots; caption audio files in a separate run, with "
                "--segments SECONDS or without"
            )
        whole = max(index.video_end, index.audio_end)
        start, end = start_seconds or 0.0, min(whole, end_seconds or whole)
        if end <= start:
            return []
        try:
            cuts = sorted({*_find_cuts(index, stack, detector, start=start, end=end)})
        except av.error.FFmpegError as error:  # of a file that misleads libav
            raise ClipError(f"{path}: is damaged ({cause_of(error)}); copy or download it again") from error
    return merge_short([start, *(cut for cut in cuts if start < cut < end), end], min_seconds=min_seconds)


def merge_short(bounds: Sequence[float], *, min_seconds: float) -> list[float]:
    """Merge shots below a minimum length with the one after them, or the last with the one before it.

    Args:
        bounds: start of each shot and end of the last, rising; at least two.
        min_seconds: minimum length of a shot, unless there is only one.
    """
    start, *cuts, end = bounds
    merged = [start]
    for cut in cuts:
        if cut - merged[-1] >= min_seconds:
            merged.append(cut)
    if len(merged) > 1 and end - merged[-1] < min_seconds:
        merged.pop()
    return [*merged, end]


def _find_cuts(
    index: StreamIndex, stack: ExitStack, detector: ShotDetector, *, start: float, end: float
) -> Iterator[float]:
    """Yield the times of the cuts, in any order, perhaps repeatedly."""
    intervals = np.diff(index.frame_times)
    usual = min(float(np.median(intervals)) if len(intervals) else math.inf, _MAX_INTERVAL_SECONDS)
    shown: tuple[float, np.ndarray] | None = None
    for seconds, image in _small_frames(index, stack, detector, start=start, end=end):
        yield from _repeat(detector, shown, until=seconds, interval=usual)
        yield from detector.add(seconds, image)
        shown = seconds, image
    yield from _repeat(detector, shown, until=math.inf, interval=usual)
    yield from detector.finish()


def _repeat(
    detector: ShotDetector, shown: tuple[float, np.ndarray] | None, *, until: float, interval: float
) -> Iterator[float]:
    """Show a frame again while it is on screen; yield the cuts that have become certain."""
    if shown is not None and interval > 0:
        seconds, image = shown
        for number in range(1, round(min((until - seconds) / interval - 1, _MAX_REPEATS)) + 1):
            yield from detector.add(seconds + number * interval, image)


def _small_frames(
    index: StreamIndex, stack: ExitStack, detector: ShotDetector, *, start: float, end: float
) -> Iterator[tuple[float, np.ndarray]]:
    """Yield (seconds, image) of each frame as it is stored: neither its orientation nor its pixel shape matters."""
    reformatter, size = VideoReformatter(), (0, 0)
    for seconds, frame in decode_all(index, stack, start=start, end=end):
        size = size if all(size) else detector.frame_size(frame.height, frame.width)
        small: Any = reformatter.reformat(frame, size[1], size[0], "rgb24", interpolation=Interpolation.AREA)
        yield seconds, small.to_ndarray()
