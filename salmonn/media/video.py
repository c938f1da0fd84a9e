"""Second pass over a file: decode the frames that are on screen at the target times, seeking between them.

Three ways to read, from the fastest to the most tolerant; each later one is used where the one before fails:
`_frames_by_index` trusts the index and skips frames that no other refers to, `_frames_on_screen` with keyframes decodes
everything from a keyframe on, and without keyframes it decodes the whole file.
"""

import logging
import math
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image

from salmonn.media.container import DecodeError, Decoder, MediaFile, cause_of
from salmonn.media.frame_sampling import FrameSampler
from salmonn.media.index import SLACK_SECONDS, StreamIndex

logger = logging.getLogger(__name__)

# Without the last two flags, libswscale's colours come out 0.5 (full size) to 1.8 (scaled) levels too dark.
_INTERPOLATION = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT

# Threads that convert and scale; as many decoded frames are converted at a time, and one more waits.
_CONVERTERS = 2
# Number of frames that a seek must save: at each, the decoder's threads run empty.
_MIN_FRAMES_SAVED = 4

# NAL unit types by their header. H.264, first byte: a slice of a non-reference frame; SEI, delimiter and filler, which
# change no frame. HEVC, first two bytes, in the lowest temporal layer: TRAIL_N, TSA_N, STSA_N, RADL_N and RASL_N;
# delimiter, filler and SEI.
_H264_SLICES = frozenset([0x01])
_H264_OTHERS = frozenset([0x06, 0x09, 0x0C])
_HEVC_SLICES = frozenset([0x0001, 0x0401, 0x0801, 0x0C01, 0x1001])
_HEVC_OTHERS = frozenset([0x4601, 0x4C01, 0x4E01, 0x5001])


class _SeekError(Exception):
    """A seek did not lead to the frame that it was for."""


def target_times(index: StreamIndex, sampler: FrameSampler, *, start: float, end: float) -> np.ndarray:
    """Return the times of the frames to decode.

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
    if duration <= 0:
        return np.zeros(0)
    num_frames = bisect_left(index.frame_times, first + duration) - bisect_left(index.frame_times, first)
    return sampler.sample_times(first, duration, max(num_frames, 1))


def decode_frames(
    index: StreamIndex, targets: np.ndarray, *, sampler: FrameSampler, stack: ExitStack
) -> list[np.ndarray | None]:
    """Decode the frames that are on screen at the target times; note damage in the index.

    Args:
        index: result of the first pass.
        targets: (F,) times, rising; at least one.
        sampler: rule that gives the size that frames are scaled to.
        stack: context that closes the file if it has to be reopened.

    Returns:
        (H, W, 3) uint8 frames, None where undecodable; fewer than F if the rest is damaged.
    """
    file = index.file
    attempts = [_frames_by_index(index, targets), _frames_on_screen(file, index, targets, index.keyframes)]
    for frames in [] if file.counts_frames else attempts:
        try:
            images, damage = _convert_frames(frames, sampler, len(targets))
        except _SeekError as error:
            logger.debug("%s: reading again, because a seek failed (%s)", file.path, error)
            continue
        if damage is None:
            return images
        # Some files are only hard to seek in: damage is confirmed by reading straight through.
        logger.debug("%s: reading straight through, because it seems damaged (%s)", file.path, damage)
        break
    file = file.reopen(stack)
    images, damage = _convert_frames(_frames_on_screen(file, index, targets, []), sampler, len(targets))
    if damage is not None:
        index.damage = str(damage)
        index.video_end = min(index.video_end, damage.seconds)
    return images


def _frames_by_index(index: StreamIndex, targets: np.ndarray) -> Iterator[Any]:
    """Yield the decoded frame that is due at each target time by the index, with the least decoding.

    Raises:
        _SeekError: a frame does not come where the index says, so the index cannot be used.
    """
    if len(set(index.frame_times)) < len(index.frame_times):
        raise _SeekError("two frames have the same time")
    due = [index.frame_times[max(index.count_due(time), 1) - 1] for time in targets]
    for keyframe, run in _plan_seeks(index, due):
        num_found = 0
        for seconds, frame in _decode_due(index.file, keyframe, set(run)):
            while num_found < len(run) and seconds == run[num_found]:
                yield frame
                num_found += 1
        if num_found < len(run):
            raise _SeekError(f"no frame at {run[num_found]:.3f} s")


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


def _decode_due(file: MediaFile, keyframe: int, due: set[float]) -> Iterator[tuple[float, Any]]:
    """Yield (seconds, frame) up to the last due time, skipping other frames that no frame refers to."""
    stream = file.video
    decoder, is_non_reference = Decoder(), non_reference_test(stream.codec_context)
    remaining, has_started = set(due), False
    try:
        file.container.seek(keyframe, stream=stream)
        for packet in file.container.demux(stream):
            has_started = has_started or packet.is_keyframe
            seconds = math.nan if packet.pts is None else file.seconds(packet.pts, stream)
            if has_started and (seconds in due or not is_non_reference(packet)):
                for frame in decoder.decode(packet):
                    if frame.pts is not None:
                        yield file.seconds(frame.pts, stream), frame
            remaining.discard(seconds)
            if not remaining:
                break
        # Decoders hold frames back, to reorder them and for their threads; draining needs no later packets.
        for frame in decoder.drain(stream):
            if frame.pts is not None:
                yield file.seconds(frame.pts, stream), frame
    except av.error.FFmpegError as error:
        raise DecodeError(cause_of(error)) from error


def _frames_on_screen(
    file: MediaFile, index: StreamIndex, targets: np.ndarray, keyframes: list[tuple[float, int]]
) -> Iterator[Any]:
    """Yield the decoded frame that is on screen at each target time, seeking to `keyframes`; without them, no seeks."""
    num_found = 0
    while num_found < len(targets):
        number = _keyframe_before(keyframes, targets[num_found])
        frames = _decode_all(file, index, keyframes[number][1] if keyframes else None)
        for frame in _match_targets(frames, index, targets[num_found:], keyframes[number:]):
            yield frame
            num_found += 1


def _match_targets(
    frames: Iterator[tuple[float, Any]], index: StreamIndex, targets: np.ndarray, keyframes: list[tuple[float, int]]
) -> Iterator[Any]:
    """Yield the frames on screen at the targets, until the next is better reached from a later keyframe."""
    num_found = 0
    shown, shown_seconds = None, index.frame_times[0] - 1.0
    reason = "the video ends before the end that the file declares"
    try:
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
    except DecodeError as error:
        reason = str(error)
    # The last frame stays on screen, but only until another was due.
    next_due = index.count_due(shown_seconds)
    limit = index.frame_times[next_due] if next_due < len(index.frame_times) else math.inf
    for time in targets[num_found:]:
        if time + SLACK_SECONDS >= limit:
            raise DecodeError(reason, limit)
        yield shown


def _keyframe_before(keyframes: list[tuple[float, int]], seconds: float) -> int:
    """Return the index of the last keyframe at or before a time, 0 if there is none."""
    return max(0, bisect_right(keyframes, seconds + SLACK_SECONDS, key=lambda keyframe: keyframe[0]) - 1)


def _decode_all(file: MediaFile, index: StreamIndex, keyframe: int | None) -> Iterator[tuple[float, Any]]:
    """Yield (seconds, frame) in presentation order, from a keyframe's timestamp or from the current position."""
    stream = file.video
    decoder = Decoder()
    count, has_started = 0, False
    try:
        if keyframe is not None:
            file.container.seek(keyframe, stream=stream)
        for packet in file.container.demux(stream):
            has_started = has_started or packet.is_keyframe
            for frame in decoder.decode(packet) if has_started else []:
                if file.counts_frames and count < len(index.frame_times):
                    yield index.frame_times[count], frame
                elif frame.pts is not None and not file.counts_frames:
                    yield file.seconds(frame.pts, stream), frame
                count += 1
    except av.error.FFmpegError as error:
        raise DecodeError(cause_of(error)) from error


def _convert_frames(
    frames: Iterator[Any], sampler: FrameSampler, num_targets: int
) -> tuple[list[np.ndarray | None], DecodeError | None]:
    """Convert decoded frames to (H, W, 3) uint8 upright images, up to the damage, if any.

    A frame that stays on screen is converted once. Other threads convert while this one decodes; few full-size frames
    wait for them.
    """
    images: list[Future[np.ndarray] | None] = []
    waiting: deque[Future[np.ndarray]] = deque()
    previous, damage, size = None, None, None
    with ThreadPoolExecutor(_CONVERTERS) as pool:
        try:
            for frame in frames:
                if frame is not None and frame is not previous:
                    if size is None:  # a stream may change its size; all images of a clip get that of the first
                        is_sideways = round(frame.rotation / 90) % 2 == 1
                        upright = (frame.width, frame.height) if is_sideways else (frame.height, frame.width)
                        size = sampler.frame_size(*upright, num_targets)
                    waiting.append(pool.submit(_to_image, frame, *size))
                    if len(waiting) > _CONVERTERS:
                        wait([waiting.popleft()])
                previous = frame
                images.append(None if frame is None else waiting[-1])
        except DecodeError as error:
            damage = error
    return [None if image is None else image.result() for image in images], damage


def _to_image(frame: Any, height: int, width: int) -> np.ndarray:
    """Convert a decoded frame to upright RGB of this size.

    Bicubic with antialiasing, as the processors of the published models scale.
    """
    full = VideoReformatter().reformat(frame, format="rgb24", interpolation=_INTERPOLATION, threads=1).to_ndarray()
    image = np.rot90(full, round(frame.rotation / 90))
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def non_reference_test(codec: Any) -> Callable[[Any], bool]:
    """Return a test of packets: whether a packet holds nothing but a frame that no other frame refers to.

    Such frames need not be decoded. The test reads the headers of NAL units in H.264 and HEVC streams of MP4, MOV and
    Matroska, where units are stored with their lengths. It is false whenever that is not certain, so that damaged
    packets are decoded and noticed.

    Args:
        codec: the codec context of a stream.
    """
    setup = codec.extradata or b""  # avcC or hvcC
    if codec.name == "h264" and len(setup) > 4 and setup[0] == 1:
        length_byte, header_bytes, slices, others = setup[4], 1, _H264_SLICES, _H264_OTHERS
    # In HEVC, "not referred to" holds within a temporal layer only, so there must be only one.
    elif codec.name == "hevc" and len(setup) > 21 and setup[0] == 1 and setup[21] >> 3 & 7 == 1:
        length_byte, header_bytes, slices, others = setup[21], 2, _HEVC_SLICES, _HEVC_OTHERS
    else:
        return lambda packet: False
    length_bytes = (length_byte & 3) + 1

    def is_non_reference(packet: Any) -> bool:
        data, position, headers = memoryview(packet), 0, set[int]()
        while position < len(data):
            start = position + length_bytes
            headers.add(int.from_bytes(data[start : start + header_bytes]))
            position = start + int.from_bytes(data[position:start])
        return not headers.isdisjoint(slices) and headers <= slices | others

    return is_non_reference
