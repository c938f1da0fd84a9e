"""One continuous time line for a file whose clock restarts or jumps: joined MPEG-TS recordings, chained Ogg.

    for packet in Timeline(file).packets(): ...

Pauses, sparse frames and late starts are ordinary and kept. Timestamps are changed only where they are implausible.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any

from salmonn.media.container import MediaFile, demux

# Within a stream, decoding times rise. Muxers round them; in some formats they are guessed.
_MAX_STEP_BACK_SECONDS = {True: 0.1, False: 1.0}  # by `MediaFile.may_restart`
# A longer step ahead of all streams is a change of clock where clocks may restart (ffmpeg's limit). In other formats a
# recorder may have been paused, but hours of silence are useless.
_MAX_STEP_AHEAD_SECONDS = {True: 10.0, False: 3600.0}
# A step ahead of this length is a single bad stamp if the stream's next packet is back in place.
_SUSPECT_STEP_SECONDS = 10.0
_MAX_PACKETS_AHEAD = 2000
# After a joint, a stream continues where it ended, or where the file ended if that is later by more than this.
_MAX_STREAM_LAG_SECONDS = 0.5


class Timeline:
    """Packets of a file with timestamps that continue where its clock restarts or jumps.

    Each stretch of the file with one clock has an offset that is added to its timestamps, the same for all streams, so
    that they stay in sync. At a joint the streams change to the next clock one by one, since files interleave loosely.

    Args:
        file: an open file, at its start or after a seek.

    Attributes:
        is_continuous: whether no timestamp has been changed so far.
        is_joint: whether the latest packet is the first one of its stream with another clock.
    """

    def __init__(self, file: MediaFile) -> None:
        self.is_continuous = True
        self.is_joint = False
        self._file = file
        self._max_back = _MAX_STEP_BACK_SECONDS[file.may_restart]
        self._max_ahead = _MAX_STEP_AHEAD_SECONDS[file.may_restart]
        self._numbers = {stream.index for stream in (file.video, file.audio) if stream is not None}
        self._newest_offset = 0.0
        self._offsets: dict[int, float] = {}  # by stream
        self._latest: dict[int, float] = {}  # decoding time of each stream's latest packet
        self._stream_ends: dict[int, float] = {}  # latest end of a packet of each stream, in presentation time
        self._discarded_from: dict[int, float] = {}  # start of a run of packets to be discarded, by stream
        self._end = 0.0  # latest of them
        self._ahead: deque[Any] = deque()

    def packets(self) -> Iterator[Any]:
        """Yield the packets of all streams; those of the selected ones have their timestamps on the time line."""
        source = demux(self._file)
        while (packet := self._ahead.popleft() if self._ahead else next(source, None)) is not None:
            self.is_joint = False
            if packet.stream_index in self._numbers and packet.pts is not None:
                # In Matroska the packets at the start have no decoding time, which is early for a keyframe.
                if packet.dts is not None or (packet.is_keyframe and packet.size):
                    self._place(packet, source)
                else:
                    self._shift(packet, self._offsets.get(packet.stream_index, self._newest_offset))
            yield packet

    def _place(self, packet: Any, source: Iterator[Any]) -> None:
        number, is_discard = packet.stream_index, packet.is_discard
        tick, origin = self._file.tick_seconds[number], self._file.origin
        start = packet.pts * tick - origin
        raw = start if packet.dts is None else packet.dts * tick - origin
        offset = self._offsets.get(number, self._newest_offset)
        previous = self._latest.get(number)
        step = 0.0 if previous is None else raw + offset - previous
        if previous is not None and not -self._max_back <= step <= _MAX_STREAM_LAG_SECONDS:
            # While streams change to a new clock one by one, a packet's clock is the one that fits in with the others.
            offset = min(offset, self._newest_offset, key=lambda candidate: abs(raw + candidate - self._end))
            # A packet to be discarded leads up to an edit: it may lie before the one that precedes it.
            if not is_discard:
                is_back = raw + offset < previous - self._max_back
                ahead = raw + offset - max(self._end, previous)
                if (is_back or ahead > _SUSPECT_STEP_SECONDS) and self._is_single(packet, source, offset, previous):
                    self._shift(packet, self._stream_ends[number] - raw)
                    return
                if is_back or ahead > self._max_ahead:
                    stream_end = self._stream_ends[number]
                    is_sparse = self._end - stream_end > _MAX_STREAM_LAG_SECONDS
                    begin = min(start, self._discarded_from.get(number, start))
                    offset = self._newest_offset = (self._end if is_sparse else stream_end) - begin
            step = raw + offset - previous
        if offset:
            self._shift(packet, offset)
        if is_discard:
            self._discarded_from.setdefault(number, start)
            if previous is not None:
                return
        else:
            self._discarded_from.pop(number, None)
        self.is_joint = offset != self._offsets.get(number, offset)
        self._offsets[number] = offset
        self._latest[number] = raw + offset
        duration = (packet.duration or 0) * tick or min(max(step, 0.0), 1.0)
        end = max(self._stream_ends.get(number, 0.0), start + offset + duration)
        self._stream_ends[number] = end
        self._end = max(self._end, end)

    def _is_single(self, packet: Any, source: Iterator[Any], offset: float, previous: float) -> bool:
        """Return whether the stream's next packet fits in with the `previous` one: then only this one is bad."""
        for position in range(_MAX_PACKETS_AHEAD):
            if position == len(self._ahead):
                if (following := next(source, None)) is None:
                    return False
                self._ahead.append(following)
            following = self._ahead[position]
            if following.stream_index == packet.stream_index and following.dts is not None:
                seconds = self._file.seconds(following.dts, following.stream) + offset
                return previous - self._max_back <= seconds <= previous + _SUSPECT_STEP_SECONDS
        return False

    def _shift(self, packet: Any, seconds: float) -> None:
        ticks = round(seconds / self._file.tick_seconds[packet.stream_index])
        if ticks:
            self.is_continuous = False
        packet.dts = None if packet.dts is None else packet.dts + ticks
        packet.pts = None if packet.pts is None else packet.pts + ticks
