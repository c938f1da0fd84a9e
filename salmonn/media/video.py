"""The second pass over a file: decodes the frames on screen at the wanted times, seeking between them."""

import logging
import math
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image

from salmonn.media.container import Damage, Decoder, Source, cause_of, reopen
from salmonn.media.frame_sampling import FrameSampler
from salmonn.media.index import SLACK_SECONDS, StreamIndex
from salmonn.media.slices import unreferenced_test

logger = logging.getLogger(__name__)

# Without these two flags, libswscale's colours come out 0.5 (full size) to 1.8 (scaled) levels too dark.
_SCALING = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT

# Threads that convert and scale: so many decoded frames are painted at a time, and one more waits.
_PAINTERS = 2
# A seek must spare so many pictures: at each the decoder's threads run empty.
_WORTH_A_SEEK = 4


class _SeekMissed(Exception):
    """Seeking does not bring the frame it was for."""


def frame_times_in_span(survey: StreamIndex, sampler: FrameSampler, *, start: float, end: float) -> np.ndarray:
    """When to look at the screen.

    Args:
        survey: what the first pass learnt.
        sampler: what chooses.
        start, end: the span, in seconds.

    Returns:
        (F,) float64, rising; F is 0 where the span holds no picture.
    """
    if not survey.times:
        return np.zeros(0)
    first = max(start, survey.times[0])
    length = min(end, survey.picture_end) - first
    if length <= 0:
        return np.zeros(0)
    shown = bisect_left(survey.times, first + length) - bisect_left(survey.times, first)
    return sampler.sample_times(first, length, max(shown, 1))


def decode_frames(
    survey: StreamIndex, wanted: np.ndarray, *, sampler: FrameSampler, stack: ExitStack
) -> list[np.ndarray | None]:
    """Decode the frames on screen at the wanted times; what is damaged is noted in the survey.

    Args:
        survey: what the first pass learnt.
        wanted: (F,) times, rising; at least one.
        sampler: gives the size that they are scaled to.
        stack: closes the file where it must be opened again.

    Returns:
        (H, W, 3) uint8 frames, None where undecodable; fewer than F where the rest is damaged.
    """
    source = survey.source
    ways = (
        [] if source.counts_frames else [_due_frames(survey, wanted), _on_screen(source, survey, wanted, survey.keys)]
    )
    for frames in ways:
        try:
            pictures, damage = _painted(frames, sampler, len(wanted))
        except _SeekMissed as problem:
            logger.debug("%s: reading again, for a seek failed (%s)", source.path, problem)
            continue
        if damage is None:
            return pictures
        # Some files are only hard to seek in: damage is believed when reading straight through finds it.
        logger.debug("%s: reading straight through, for it seems damaged (%s)", source.path, damage)
        break
    source = reopen(source, stack)
    pictures, damage = _painted(_on_screen(source, survey, wanted, []), sampler, len(wanted))
    if damage is not None:
        survey.damage = str(damage)
        survey.picture_end = min(survey.picture_end, damage.seconds)
    return pictures


def _due_frames(survey: StreamIndex, wanted: np.ndarray) -> Iterator[Any]:
    """The decoded frame due at each wanted time by the survey, with the least decoding.

    Raises:
        _SeekMissed: a frame does not come where the survey says, so it cannot be gone by.
    """
    if len(set(survey.times)) < len(survey.times):
        raise _SeekMissed("pictures share a time")
    for key_stamp, run in _runs(survey, [survey.times[max(survey.due_by(time), 1) - 1] for time in wanted]):
        taken = 0
        for seconds, frame in _decode_due(survey.source, key_stamp, set(run)):
            while taken < len(run) and seconds == run[taken]:
                yield frame
                taken += 1
        if taken < len(run):
            raise _SeekMissed(f"no frame at {run[taken]:.3f} s")


def _runs(survey: StreamIndex, due: list[float]) -> Iterator[tuple[int, list[float]]]:
    """Due times in runs, each with the stamp to seek to first."""
    begin = 0
    for place in range(1, len(due) + 1):
        if place < len(due):
            key_seconds = survey.keys[_key_before(survey.keys, due[place])][0]
            spared = survey.due_by(key_seconds) - survey.due_by(due[place - 1]) - 1
            if spared < _WORTH_A_SEEK:
                continue
        yield survey.keys[_key_before(survey.keys, due[begin])][1], due[begin:place]
        begin = place


def _decode_due(source: Source, key_stamp: int, due: set[float]) -> Iterator[tuple[float, Any]]:
    """(seconds, frame) up to the last that is due; others are left out if no picture refers to them."""
    stream = source.video
    decoder, unreferenced = Decoder(forgiven_errors=0), unreferenced_test(stream.codec_context)
    left, begun = set(due), False
    try:
        source.container.seek(key_stamp, stream=stream)
        for packet in source.container.demux(stream):
            begun = begun or packet.is_keyframe
            seconds = math.nan if packet.pts is None else source.seconds(packet.pts, stream)
            if begun and (seconds in due or not unreferenced(packet)):
                yield from _timed(decoder.decode(packet), source)
            left.discard(seconds)
            if not left:
                break
        # Pictures are held back to be put in order, and by threads: drained, they need no later ones to push them out.
        yield from _timed(decoder.drain(stream), source)
    except av.error.FFmpegError as error:
        raise Damage(cause_of(error)) from error


def _timed(frames: list[Any], source: Source) -> Iterator[tuple[float, Any]]:
    return ((source.seconds(frame.pts, source.video), frame) for frame in frames if frame.pts is not None)


def _on_screen(source: Source, survey: StreamIndex, wanted: np.ndarray, keys: list[tuple[float, int]]) -> Iterator[Any]:
    """The decoded frame on screen at each wanted time, seeking to `keys`; without them, no seeks."""
    taken = 0
    while taken < len(wanted):
        key = _key_before(keys, wanted[taken])
        frames = _decode_from(source, survey, keys[key][1] if keys else None)
        for frame in _run_from(frames, survey, wanted[taken:], keys[key:]):
            yield frame
            taken += 1


def _run_from(
    frames: Iterator[tuple[float, Any]], survey: StreamIndex, wanted: np.ndarray, keys: list[tuple[float, int]]
) -> Iterator[Any]:
    """The frames on screen at wanted times, until the next is better reached from a later keyframe."""
    taken = 0
    shown, shown_seconds = None, survey.times[0] - 1.0
    reason = "the picture ends before the file says it does"
    try:
        for seconds, frame in frames:
            while seconds > wanted[taken] + SLACK_SECONDS:
                if shown is None and keys:
                    raise _SeekMissed(f"no frame at {wanted[taken]:.3f} s")
                yield shown
                taken += 1
                if taken == len(wanted):
                    return
            key = _key_before(keys, wanted[taken])
            if key > 0 and keys[key][0] > seconds:
                return
            shown, shown_seconds = frame, seconds
    except Damage as damage:
        reason = str(damage)
    # The last frame stays on screen, but only until another was due.
    next_due = survey.due_by(shown_seconds)
    limit = survey.times[next_due] if next_due < len(survey.times) else math.inf
    for time in wanted[taken:]:
        if time + SLACK_SECONDS >= limit:
            raise Damage(reason, limit)
        yield shown


def _key_before(keys: list[tuple[float, int]], seconds: float) -> int:
    """Index of the last keyframe at or before a time, 0 where there is none."""
    return max(0, bisect_right(keys, seconds + SLACK_SECONDS, key=lambda key: key[0]) - 1)


def _decode_from(source: Source, survey: StreamIndex, key_stamp: int | None) -> Iterator[tuple[float, Any]]:
    """(seconds, frame) in the order shown, from the keyframe or, without one, from where the file stands."""
    stream = source.video
    decoder = Decoder(forgiven_errors=0)
    count, begun = 0, False
    try:
        if key_stamp is not None:
            source.container.seek(key_stamp, stream=stream)
        for packet in source.container.demux(stream):
            begun = begun or packet.is_keyframe
            for frame in decoder.decode(packet) if begun else []:
                if source.counts_frames and count < len(survey.times):
                    yield survey.times[count], frame
                elif frame.pts is not None and not source.counts_frames:
                    yield source.seconds(frame.pts, stream), frame
                count += 1
    except av.error.FFmpegError as error:
        raise Damage(cause_of(error)) from error


def _painted(
    frames: Iterator[Any], sampler: FrameSampler, num_taken: int
) -> tuple[list[np.ndarray | None], Damage | None]:
    """(H, W, 3) uint8 upright pictures up to the damage, if any; a frame that stays on screen is painted once.

    Other threads paint while this one decodes; few full-size frames wait for them.
    """
    pictures: list[Future[np.ndarray] | None] = []
    waiting: deque[Future[np.ndarray]] = deque()
    before, damage, size = None, None, None
    with ThreadPoolExecutor(_PAINTERS) as pool:
        try:
            for frame in frames:
                if frame is not None and frame is not before:
                    # A stream may change its size; all pictures of a clip get that of the first.
                    size = size or sampler.frame_size(*_upright_size(frame), num_taken)
                    waiting.append(pool.submit(_paint, frame, *size))
                    if len(waiting) > _PAINTERS:
                        wait([waiting.popleft()])
                before = frame
                pictures.append(None if frame is None else waiting[-1])
        except Damage as error:
            damage = error
    return [None if picture is None else picture.result() for picture in pictures], damage


def _upright_size(frame: Any) -> tuple[int, int]:
    turned = round(frame.rotation / 90) % 2 == 1
    return (frame.width, frame.height) if turned else (frame.height, frame.width)


def _paint(frame: Any, height: int, width: int) -> np.ndarray:
    full = VideoReformatter().reformat(frame, format="rgb24", interpolation=_SCALING, threads=1).to_ndarray()
    return _scaled(np.rot90(full, round(frame.rotation / 90)), height, width)


def _scaled(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic with what is finer than the new pixels smoothed away, as the published models' processors scale."""
    if picture.shape[:2] == (height, width):
        return picture
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))
