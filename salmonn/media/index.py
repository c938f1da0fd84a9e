"""First pass over a file: decode the audio, and index when each video frame is due and which frames are keyframes."""

import math
import os
from bisect import bisect_right
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import av
import numpy as np

from salmonn.media.audio import AudioBuffer
from salmonn.media.container import (
    REORDER_FRAMES,
    ClipError,
    DecodeError,
    Decoder,
    MediaFile,
    cause_of,
    open_media,
)
from salmonn.media.timeline import Timeline

# Times are compared as floats; a frame this little after the target time counts as due at that time.
SLACK_SECONDS = 1e-6
# Audio decoders need some packets after a seek (Opus 80 ms), and files interleave their streams loosely.
_PREROLL_SECONDS = 2.0
# Muxers round timestamps; a longer gap is one.
_ROUNDING_SECONDS = 0.005
# Gaps longer than the first and shorter than the second number of audio frames are lost packets; Ogg loses whole pages.
_LOSS_FRAMES = {"mpegts": (0.9, 4.0), "ogg": (3.0, math.inf)}
# libav marks a packet of MPEG-TS up to two packets before what is missing.
_SUSPECT_PACKETS = 3
# Packets that are checked for encryption, besides keyframes: parts of a file may be in the clear.
_CHECKED_PACKETS = 50
# Where libav finds nothing that it can read in a Matroska file, it skips ahead without a word. More bytes than headers
# take, left out together with some time in all streams, reveal it.
_SKIPPED_BYTES, _SKIPPED_SECONDS = 4096, 0.5
# What follows the last packet, if more than both of these (bytes, and share of what precedes), is in other streams.
_UNREAD_BYTES, _UNREAD_SHARE = 1 << 16, 0.05
# Frames this far apart are slides, each shown until the next, or until the sound ends.
_SPARSE_SECONDS = 0.5
_UNSEEKABLE_CODECS = ("adpcm", "speex")
# A file that ends this much before the end that it declares is truncated.
_SHORTFALL_SECONDS = 0.25
# Headers of these formats declare no duration; libav estimates it from the bit rate or the last timestamps.
_ESTIMATED_FORMATS = frozenset(["aac", "ac3", "amr", "dts", "eac3", "h264", "hevc", "m4v", "mp3", "mpeg", "mpegvideo"])


@dataclass
class StreamIndex:
    """Result of the first pass; times in seconds from the start of the file.

    Attributes:
        file: the open file.
        audio: the audio of the span, and a little more on both sides.
        frame_times: presentation times of the video frames, rising.
        keyframes: (presentation time, timestamp to seek to) of the keyframes, rising.
        video_end: end of the last video frame.
        audio_begin, audio_end: start of the first packet of audio, and end of the latest.
        file_end: end of the latest packet of any stream.
        is_continuous: whether the file has a single clock, so that seeking leads where its timestamps say.
        has_new_streams: whether the file continues in streams that are absent at its start, which are not read.
        audio_damage, video_damage: (time, duration) of the damaged packets, in order.
        missing: (time, duration) of what libav skipped in the container.
        is_truncated: whether the file breaks off.
        error: error that stopped the reading or kept a stream from being decoded, if any.
        display_warning: why the frames do not look as they should, if so.
    """

    file: MediaFile
    audio: AudioBuffer = field(default_factory=AudioBuffer)
    frame_times: list[float] = field(default_factory=list)
    keyframes: list[tuple[float, int]] = field(default_factory=list)
    video_end: float = 0.0
    audio_begin: float = math.inf
    audio_end: float = 0.0
    file_end: float = 0.0
    is_continuous: bool = True
    has_new_streams: bool = False
    audio_damage: list[tuple[float, float]] = field(default_factory=list)
    video_damage: list[tuple[float, float]] = field(default_factory=list)
    missing: list[tuple[float, float]] = field(default_factory=list)
    is_truncated: bool = False
    error: str | None = None
    display_warning: str | None = None

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
    # Some audio is found by an average bit rate, or is decoded by all that precedes.
    is_exact = file.video is not None or not file.audio.codec_context.name.startswith(_UNSEEKABLE_CODECS)
    can_seek = is_exact and not file.counts_frames and file.format_name not in _ESTIMATED_FORMATS
    if can_seek and start > _PREROLL_SECONDS and _has_one_clock(file):
        index = _index_from(file, start, end, seek_seconds=start - _PREROLL_SECONDS)
        begins = [] if file.video is None else [next(iter(index.frame_times), math.inf)]
        begins += [] if file.audio is None else [index.audio_begin]
        if max(begins) <= start:
            return index
        file = file.reopen(stack)
    index = _index_from(file, start, end, seek_seconds=None)
    if index.keyframes and index.frame_times and index.frame_times[0] < index.keyframes[0][0] - SLACK_SECONDS:
        _drop_undecodable_start(index, stack)
    return index


def measured_seconds(path: str | os.PathLike[str]) -> float:
    """Return a file's duration by the timestamps of all its packets, without decoding them; 0 if they have none.

    The header may hold an estimate from the bit rate, or the duration before the file was truncated.

    Raises:
        ClipError: the file cannot be opened, or has neither video nor audio.
    """
    with ExitStack() as stack:
        index = index_times(path, stack)
        return max(index.video_end, index.audio_end)


def index_times(path: str | os.PathLike[str], stack: ExitStack) -> StreamIndex:
    """Index a whole file without its audio, so that nothing is decoded.

    Args:
        path: a local video or audio file.
        stack: context that closes the file.

    Raises:
        ClipError: the file cannot be opened, or has neither video nor audio.
    """
    return _index_from(open_media(path, stack, video=True, audio=True), math.inf, math.inf, seek_seconds=None)


def _has_one_clock(file: MediaFile) -> bool:
    """Return whether no timestamp of a file has to be changed, for which all of it is read where that is uncertain."""
    if not (file.may_restart or file.format_name == "flv"):
        return True
    status = os.stat(file.path)  # noqa: PTH116
    return _is_continuous(file.path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _is_continuous(path: str, size_bytes: int, modified_ns: int) -> bool:
    with ExitStack() as stack:
        timeline = Timeline(open_media(path, stack, video=True, audio=True))
        try:
            for _ in timeline.packets():
                pass
        except av.error.FFmpegError:
            pass  # damaged from here on, which the reader of the span reports
        return timeline.is_continuous


def _index_from(file: MediaFile, start: float, end: float, *, seek_seconds: float | None) -> StreamIndex:
    index = StreamIndex(file)
    timeline = Timeline(file)
    audio = None if file.audio is None else _AudioPass(index, start)
    video = None if file.video is None else _VideoPass(index)
    try:
        if seek_seconds is not None:
            file.container.seek(round((seek_seconds + file.origin) * av.time_base))
        _index_packets(index, timeline, audio, video, end)
        index.audio.flush()
    except (av.error.FFmpegError, DecodeError) as error:
        index.error, index.is_truncated = cause_of(error), True
    index.is_continuous = timeline.is_continuous
    if audio is not None:
        audio.finish()
    if video is not None:
        video.finish(end)
    else:
        index.is_truncated = index.is_truncated or _misses_declared_end(index, end)
    if index.frame_times and _is_sparse(index) and not index.is_truncated and "mp4" not in file.format_name:
        # A picture with sound, or slides: nothing but MP4 states for how long the last frame is shown.
        index.video_end = max(index.video_end, index.audio_end)
    return index


def _is_sparse(index: StreamIndex) -> bool:
    times = index.frame_times
    return len(times) == 1 or float(np.median(np.diff(times))) > _SPARSE_SECONDS


def _index_packets(
    index: StreamIndex, timeline: Timeline, audio: "_AudioPass | None", video: "_VideoPass | None", end: float
) -> None:
    file = index.file
    passes = {stream.index: one for stream, one in ((file.audio, audio), (file.video, video)) if one is not None}
    open_streams = set(passes)
    position = None  # in the file, after the packet before
    last_position = 0
    # All streams, since the end of any of them reveals where a truncated file ends.
    for num_packets, packet in enumerate(timeline.packets()):
        number = packet.stream_index
        if (num_packets < _CHECKED_PACKETS or packet.is_keyframe) and packet.has_sidedata("encryption_info"):
            raise ClipError(f"{file.path}: is encrypted (DRM) and cannot be decoded; pass a file without encryption")
        # The first packet after the end counts, too: it shows that none before it is missing.
        if number in open_streams or (not packet.size and number in passes):
            passes[number].add(packet, is_joint=timeline.is_joint)
        if packet.size:
            position = _note_skipped(index, packet, position)
            last_position = max(packet.pos or 0, last_position)
            if _update_file_end(index, packet) > end:
                open_streams.discard(number)
        if not open_streams:
            return
    # PyAV leaves out packets of streams that appear later, as where recordings of different stations are joined.
    unread = file.container.size - last_position
    index.has_new_streams = file.format_name == "mpegts" and unread > max(_UNREAD_BYTES, _UNREAD_SHARE * last_position)


def _note_skipped(index: StreamIndex, packet: Any, position: int | None) -> int | None:
    """Note what libav skipped before a packet of Matroska; return the position in the file after this packet."""
    if "matroska" not in index.file.format_name or packet.pos is None or packet.pos < 0:
        return None
    if position is not None and packet.pos - position > _SKIPPED_BYTES and packet.dts is not None:
        seconds = index.file.seconds(packet.dts, packet.stream) - index.file_end
        if seconds > _SKIPPED_SECONDS:
            index.missing.append((index.file_end, seconds))
    return int(packet.pos + packet.size)


def _update_file_end(index: StreamIndex, packet: Any) -> float:
    """Note the end of a packet; return the time before which no later packet of its stream is presented."""
    file = index.file
    timestamp = packet.dts if packet.pts is None else packet.pts
    if timestamp is not None:
        duration = (packet.duration or 0) * file.tick_seconds[packet.stream.index]
        index.file_end = max(index.file_end, file.seconds(timestamp, packet.stream) + duration)
    return -math.inf if packet.dts is None else file.seconds(packet.dts, packet.stream)


class _AudioPass:
    """Decoding of the audio near the span, with account of what is lost."""

    def __init__(self, index: StreamIndex, start: float) -> None:
        self._index = index
        self._start = start
        self._decoder = Decoder(index.file, index.file.audio)
        self._is_suspect = False  # whether the container marked damage since the latest frame
        self._rate_hz = 0  # of the first frame
        self._lag = 0.0  # by how much packets' times are ahead

    def add(self, packet: Any, *, is_joint: bool) -> None:
        """Decode a packet."""
        index, file = self._index, self._index.file
        self._is_suspect = (self._is_suspect or packet.is_corrupt) and not is_joint
        # Of long audio before the span a little is decoded, and less is kept, to fill the filters of decoder and
        # resampler.
        if packet.pts is not None:
            index.audio_begin = min(index.audio_begin, file.seconds(packet.pts, packet.stream))
            index.audio_end = file.seconds(packet.pts + (packet.duration or 0), packet.stream)
            if index.audio_end < self._start - _PREROLL_SECONDS:
                return
        for frame in self._decoder.decode(packet):
            # A frame without a timestamp follows the one before it.
            seconds = index.audio.end if frame.pts is None else frame.time - file.origin - self._lag
            gap = seconds - index.audio.end if index.audio.end else 0.0
            frame_seconds = frame.samples / frame.sample_rate
            self._rate_hz = self._rate_hz or frame.sample_rate
            has_new_rate = file.format_name in _ESTIMATED_FORMATS and frame.sample_rate != self._rate_hz
            if has_new_rate and abs(gap) < frame_seconds:
                # Times are counted in packets of the first sample rate; the frames follow each other.
                self._lag += gap
                seconds, gap = index.audio.end, 0.0
            # Where the container marks damage, a gap is a loss. Without a mark, so is one of some frames in MPEG-TS,
            # and any in Ogg, which knows no pauses.
            least, most = _LOSS_FRAMES.get(file.format_name, (0.0, 0.0))
            is_loss = least * frame_seconds < gap < most * frame_seconds and not is_joint
            if is_loss or (self._is_suspect and gap > _ROUNDING_SECONDS):
                self._decoder.damage.append((index.audio.end, gap))
            self._is_suspect = False
            if seconds > self._start - _PREROLL_SECONDS / 2:
                index.audio.add(frame, seconds)

    def finish(self) -> None:
        """Note in the index what was lost."""
        self._index.audio_damage = self._decoder.damage
        if self._decoder.cause is not None and not self._decoder.has_started:
            self._index.error = self._decoder.cause


class _VideoPass:
    """Collection of the times of frames and keyframes from packets, without decoding them."""

    def __init__(self, index: StreamIndex) -> None:
        self._index = index
        self._stream = index.file.video
        # Time between two frames by the stream's nominal frame rate, for frames of unknown time or duration.
        self._interval = 1 / float(self._stream.guessed_rate or self._stream.average_rate or 25)
        self._decoding_time = 0.0  # of the latest packet: no frame due before it can be missing
        self._last_duration = 0.0  # of the packet stored last
        self._num_leading = 0  # frames stored before the first keyframe
        self._num_suspect = 0  # further packets before which some may be missing
        self._suspect_gaps: list[tuple[float, float]] = []  # (decoding time, time to the next) there

    def add(self, packet: Any, *, is_joint: bool) -> None:
        """Note when the frame of a packet is due."""
        index, file, stream = self._index, self._index.file, self._stream
        pts = packet.dts if file.counts_frames else packet.pts
        if pts is None and not (file.counts_frames and packet.size):
            return
        # Raw streams have no timestamps at all; their frames follow each other at the stream's rate.
        seconds = len(index.frame_times) * self._interval if pts is None else file.seconds(pts, stream)
        self._last_duration = (packet.duration or 0) * file.tick_seconds[stream.index]
        if packet.size == 0:  # repeats the frame before it
            index.video_end = max(index.video_end, seconds + self._last_duration)
            return
        if packet.dts is not None:
            decoding_time = file.seconds(packet.dts, stream)
            self._num_suspect = _SUSPECT_PACKETS if packet.is_corrupt else self._num_suspect - 1
            if self._num_suspect > 0 and index.frame_times and not is_joint:
                self._suspect_gaps.append((self._decoding_time, decoding_time - self._decoding_time))
            self._decoding_time = decoding_time
        if packet.is_keyframe:
            # libav seeks by decoding time in MPEG-TS, by presentation time elsewhere.
            by_dts = file.format_name == "mpegts" and packet.dts is not None
            index.keyframes.append((seconds, packet.dts if by_dts else pts or 0))
        # Discarded packets lie outside the file's edit list: they are decoded but never shown.
        if not packet.is_discard:
            self._num_leading += not index.keyframes
            index.frame_times.append(seconds)

    def finish(self, end: float) -> None:
        """Sort the frames by time; if the file breaks off, drop those that are uncertain."""
        index, times = self._index, self._index.frame_times
        if index.keyframes:  # frames before the first keyframe depend on others that the file does not have
            del times[: self._num_leading]
        times.sort()
        index.keyframes.sort()
        if not times:
            return
        interval = float(np.median(np.diff(times))) if len(times) > 1 else self._interval
        # Where frames are reordered, packets state the time to the one stored next, not to the one presented next:
        # only the packet stored last states the duration of a frame that is shown last.
        duration = self._interval if index.file.counts_frames else self._last_duration or interval
        index.video_end = max(index.video_end, times[-1] + duration)
        # Lost packets may leave no trace but a gap where the container marks damage.
        index.video_damage = [(time + interval, gap) for time, gap in self._suspect_gaps if gap > 1.5 * interval]
        index.is_truncated = index.is_truncated or _misses_declared_end(index, end) or self._lacks_frames(end)
        if index.is_truncated:
            # Frames are stored in decoding order: of those due after the last one's decoding time, some may be missing.
            # Frames identified by counting are certain only before all that a decoder may hold back.
            certain = times[max(0, len(times) - REORDER_FRAMES)] if index.file.counts_frames else self._decoding_time
            index.frame_times = times[: index.count_due(certain)]
            index.video_end = min(index.video_end, certain)

    def _lacks_frames(self, end: float) -> bool:
        """Return whether the frames stored last leave gaps between those due last, which evenly spaced frames fill.

        For files that do not declare where they end.
        """
        index = self._index
        intervals = np.diff(index.frame_times)
        num_certain = max(index.count_due(self._decoding_time) - 1, 0)
        before, after = intervals[:num_certain], intervals[num_certain:]
        is_evident = not _declares_end(index.file) and not index.file.counts_frames and len(before) >= REORDER_FRAMES
        if not is_evident or self._decoding_time > end:
            return False
        usual = float(np.median(before))
        return bool(before.max() < 1.5 * usual < after.max(initial=0.0) <= REORDER_FRAMES * usual)


def _declares_end(file: MediaFile) -> bool:
    return bool(file.declared_end) and not file.may_restart and file.format_name not in _ESTIMATED_FORMATS


def _misses_declared_end(index: StreamIndex, end: float) -> bool:
    """Return whether the file, or one of the streams, ends before the end that the header declares."""
    file = index.file
    if not index.is_continuous or not _declares_end(file):
        return False
    # The last frame may be shown as long as any other, without a packet that says so.
    slack = max(_SHORTFALL_SECONDS, 1.5 * np.diff(index.frame_times).max(initial=0.0))
    if min(end, file.declared_end) - index.file_end > slack:
        return True
    if not ("mp4" in file.format_name or file.format_name == "avi"):
        return False
    for stream, stream_end in ((file.video, index.video_end), (file.audio, index.audio_end)):
        if stream is not None and stream.duration is not None and stream_end > 0:
            first = file.seconds(stream.start_time or 0, stream)
            declared = first + stream.duration * file.tick_seconds[stream.index]
            if min(end, declared) - stream_end > _SHORTFALL_SECONDS:
                return True
    return False


def _drop_undecodable_start(index: StreamIndex, stack: ExitStack) -> None:
    """Drop the frames that precede the first keyframe in time and refer to frames that the file does not have."""
    file = index.file.reopen(stack, strict=False)
    has_started = False
    try:
        for packet in Timeline(file).packets():
            if packet.stream.index != file.video.index or not packet.size:
                continue
            has_started = has_started or packet.is_keyframe
            frames = file.video.decode(packet) if has_started else []
            if frames and frames[0].pts is not None:
                first = file.seconds(frames[0].pts, file.video)
                index.frame_times = [time for time in index.frame_times if time >= first - SLACK_SECONDS]
                return
    except av.error.FFmpegError:
        pass  # reported by the second pass
