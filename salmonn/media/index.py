"""First pass over a file: decode the audio, and index when each video frame is due and which frames are keyframes."""

import math
from bisect import bisect_right
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import av
import numpy as np

from salmonn.media.audio import AudioBuffer
from salmonn.media.container import DecodeError, Decoder, MediaFile, cause_of

# Times are compared as floats; a frame this little after the target time counts as due at that time.
SLACK_SECONDS = 1e-6
# Audio decoders need some packets after a seek (Opus 80 ms), and files interleave their streams loosely.
_PREROLL_SECONDS = 2.0
# Audio and video do not both pause for longer than this.
_GAP_SECONDS = 0.5
# A file that ends this much before the end that it declares is truncated.
_SHORTFALL_SECONDS = 0.25
# As many frames as H.264 and HEVC allow a decoder to hold back.
_REORDER_FRAMES = 16
# An audio stream cut in mid-packet gives some errors before it can be decoded; more than this is damage.
_LEADING_AUDIO_ERRORS = 50


@dataclass
class StreamIndex:
    """Result of the first pass; times in seconds from the start of the file.

    Attributes:
        file: the open file.
        audio: the audio of the span, and a little more on both sides.
        frame_times: presentation times of the video frames, rising.
        keyframes: (presentation time, timestamp to seek to) of the keyframes, rising.
        video_end: end of the last video frame.
        file_end: end of the latest packet of any stream.
        complete_until: time up to which no frame can be missing from `frame_times`.
        is_truncated: whether the file breaks off.
        damage: error that stopped the reading, if any.
    """

    file: MediaFile
    audio: AudioBuffer = field(default_factory=AudioBuffer)
    frame_times: list[float] = field(default_factory=list)
    keyframes: list[tuple[float, int]] = field(default_factory=list)
    video_end: float = 0.0
    file_end: float = 0.0
    complete_until: float = 0.0
    is_truncated: bool = False
    damage: str | None = None

    @property
    def end(self) -> float:
        """End of both video and audio."""
        return max(self.video_end, self.audio.end)

    def count_due(self, seconds: float) -> int:
        """Return the number of frames that are due at or before a time."""
        return bisect_right(self.frame_times, seconds + SLACK_SECONDS)


def index_streams(file: MediaFile, stack: ExitStack, *, start: float, end: float) -> StreamIndex:
    """Index the span from `start` to `end`, seeking near its start where seeking can be trusted.

    Returns:
        A `StreamIndex`; its `file` differs from the one passed if that had to be reopened.
    """
    # Audio is fast to decode, and seeks in audio files are often estimates.
    if file.video is not None and not file.counts_frames and start > _PREROLL_SECONDS:
        index = _index_from(file, start, end, seek_seconds=start - _PREROLL_SECONDS)
        if index.frame_times and index.frame_times[0] <= start:
            return index
        file = file.reopen(stack)
    return _index_from(file, start, end, seek_seconds=None)


def _index_from(file: MediaFile, start: float, end: float, *, seek_seconds: float | None) -> StreamIndex:
    index = StreamIndex(file)
    try:
        if seek_seconds is not None:
            file.container.seek(round((seek_seconds + file.origin) * av.time_base))
        _index_packets(index, start, end)
    except (av.error.FFmpegError, DecodeError) as error:
        index.damage, index.is_truncated = cause_of(error), True
    try:
        index.audio.flush()
    except DecodeError as error:
        index.damage = str(error)
    _finalize_video(index, end)
    return index


def _index_packets(index: StreamIndex, start: float, end: float) -> None:
    file = index.file
    open_streams = {stream.index for stream in (file.video, file.audio) if stream is not None}
    decoder = Decoder(max_leading_errors=_LEADING_AUDIO_ERRORS)
    last_is_complete = True
    # All streams, since the end of any of them reveals where a truncated file ends.
    for packet in file.container.demux():
        number = packet.stream.index
        if packet.size:
            last_is_complete = not packet.is_corrupt
            if _update_file_end(index, packet) > end:
                open_streams.discard(number)
        if file.video is not None and number == file.video.index:
            _index_video_packet(index, packet)
        elif file.audio is not None and number in open_streams and number == file.audio.index:
            try:
                for frame in decoder.decode(packet):
                    # A frame without a timestamp follows the one before it.
                    seconds = index.audio.end if frame.pts is None else frame.time - file.origin
                    # Of long audio before the span a little is kept, to fill the resampler's filter.
                    if seconds > start - _PREROLL_SECONDS / 2:
                        index.audio.add(frame, seconds)
            except DecodeError as error:
                open_streams.discard(number)
                index.damage = str(error)
        if not open_streams:
            return
    index.is_truncated = index.is_truncated or not last_is_complete


def _update_file_end(index: StreamIndex, packet: Any) -> float:
    """Note the end of a packet; return the time before which no later packet of its stream is presented.

    Raises:
        DecodeError: between this packet and all those before it, a part of the file is missing.
    """
    file = index.file
    timestamp = packet.dts if packet.pts is None else packet.pts
    if timestamp is not None:
        seconds = file.seconds(timestamp, packet.stream)
        missing = seconds - index.file_end
        if index.file_end and missing > _GAP_SECONDS and file.skips_damage:
            raise DecodeError(f"{missing:.2f} s are missing after {index.file_end:.2f} s")
        duration = (packet.duration or 0) * file.tick_seconds[packet.stream.index]
        index.file_end = max(index.file_end, seconds + duration)
    return -math.inf if packet.dts is None else file.seconds(packet.dts, packet.stream)


def _index_video_packet(index: StreamIndex, packet: Any) -> None:
    file = index.file
    pts = packet.dts if file.counts_frames else packet.pts
    index.is_truncated = index.is_truncated or (packet.is_corrupt and bool(index.keyframes))
    if pts is None or index.is_truncated:
        return
    seconds = file.seconds(pts, file.video)
    if packet.dts is not None:
        index.complete_until = file.seconds(packet.dts, file.video)
    if packet.is_keyframe:
        # libav seeks by decoding time in MPEG-TS, by presentation time elsewhere.
        by_dts = file.container.format.name == "mpegts" and packet.dts is not None
        index.keyframes.append((seconds, packet.dts if by_dts else pts))
    # A file may start with frames that depend on earlier ones: the first to be shown is a keyframe.
    # Discarded packets lie outside the file's edit list: they are decoded but never shown.
    if index.keyframes and not packet.is_discard:
        index.frame_times.append(seconds)
        duration = (packet.duration or 0) * file.tick_seconds[file.video.index]
        index.video_end = max(index.video_end, seconds + duration)


def _finalize_video(index: StreamIndex, end: float) -> None:
    """Sort the frames by time and, if the file is truncated, drop those that are uncertain."""
    index.frame_times.sort()
    index.keyframes.sort()
    times = index.frame_times
    interval = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    if times and index.video_end <= times[-1]:
        # No durations in the file: the last frame is shown as long as is usual.
        index.video_end = times[-1] + interval
    index.is_truncated = index.is_truncated or _breaks_off(index, interval, end)
    if index.is_truncated and times:
        # Frames are stored in decoding order: of those due after the last one's decoding time, some may be missing.
        # Frames identified by counting are certain only before all that a decoder may hold back.
        certain = times[max(0, len(times) - _REORDER_FRAMES)] if index.file.counts_frames else index.complete_until
        index.frame_times = times[: index.count_due(certain)]
        index.video_end = min(index.video_end, certain)


def _breaks_off(index: StreamIndex, interval: float, end: float) -> bool:
    """Return whether the file ends before it should; `interval` is the usual time between two frames."""
    file = index.file
    if min(end, file.declared_end) - index.file_end > _SHORTFALL_SECONDS:
        return True
    if not index.frame_times or index.complete_until > end:
        return False
    if file.video.duration is not None:
        first = file.seconds(file.video.start_time or 0, file.video)
        declared = min(end, first + file.video.duration * file.tick_seconds[file.video.index])
        if declared - index.video_end > (interval / 2 if file.counts_frames else _SHORTFALL_SECONDS):
            return True
    # MPEG-TS and others declare no duration, but frames stored last fill the gaps between those due last.
    last = index.count_due(index.complete_until)
    has_table = "mp4" in file.container.format.name
    return not has_table and bool(np.any(np.diff(index.frame_times[max(0, last - 1) :]) > 1.5 * interval))
