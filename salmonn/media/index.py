"""The first pass over a file: decodes the sound, and notes when each picture is due and which are keyframes."""

import math
from bisect import bisect_right
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import av
import numpy as np

from salmonn.media.audio import AudioBuffer
from salmonn.media.container import Damage, Decoder, Source, cause_of, reopen

# Times are compared as floats; a frame this little after the wanted time counts as due at that time.
SLACK_SECONDS = 1e-6
# Sound decoders settle some packets after a seek (Opus asks for 80 ms), and files interleave loosely.
_PREROLL_SECONDS = 2.0
# Sound and picture do not both pause for longer than this.
_HOLE_SECONDS = 0.5
# A file that ends this much before it says it will has been cut off.
_SHORTFALL_SECONDS = 0.25
# As many pictures as H.264 and HEVC allow a decoder to hold back.
_HELD_BACK = 16
# A sound stream cut in mid-packet gives some errors before it finds its feet; more than this is damage.
_LEADING_SOUND_ERRORS = 50


@dataclass
class StreamIndex:
    """What the first pass learnt; times in seconds from the start of the file.

    Attributes:
        source: the open file.
        sound: the sound of the span, and a little more on both sides.
        times: when pictures are due, rising.
        keys: the keyframes as (time, stamp to seek to), rising.
        picture_end: when the last picture goes off the screen.
        file_end: the end of the latest packet of any stream.
        known_until: up to here no picture can be missing from `times`.
        cut: whether the file breaks off.
        damage: what stopped the reading, if anything did.
    """

    source: Source
    sound: AudioBuffer = field(default_factory=AudioBuffer)
    times: list[float] = field(default_factory=list)
    keys: list[tuple[float, int]] = field(default_factory=list)
    picture_end: float = 0.0
    file_end: float = 0.0
    known_until: float = 0.0
    cut: bool = False
    damage: str | None = None

    @property
    def end(self) -> float:
        """When both picture and sound have ended."""
        return max(self.picture_end, self.sound.end)

    def due_by(self, seconds: float) -> int:
        """How many pictures are due at or before a time."""
        return bisect_right(self.times, seconds + SLACK_SECONDS)


def index_streams(source: Source, stack: ExitStack, *, start: float, end: float) -> StreamIndex:
    """StreamIndex the span from `start` to `end`, seeking near its start where that can be trusted.

    Returns:
        A `StreamIndex`, whose source is another than the one given where that had to be opened again.
    """
    # Sound is quick to decode, and seeks in sound files are often estimates.
    if source.video is not None and not source.counts_frames and start > _PREROLL_SECONDS:
        survey = _survey(source, start, end, seek_seconds=start - _PREROLL_SECONDS)
        if survey.times and survey.times[0] <= start:
            return survey
        source = reopen(source, stack)
    return _survey(source, start, end, seek_seconds=None)


def _survey(source: Source, start: float, end: float, *, seek_seconds: float | None) -> StreamIndex:
    survey = StreamIndex(source)
    try:
        if seek_seconds is not None:
            source.container.seek(round((seek_seconds + source.origin) * av.time_base))
        _note_packets(survey, start, end)
    except (av.error.FFmpegError, Damage) as error:
        survey.damage, survey.cut = cause_of(error), True
    try:
        survey.sound.finish()
    except Damage as damage:
        survey.damage = str(damage)
    _settle_picture(survey, end)
    return survey


def _settle_picture(survey: StreamIndex, end: float) -> None:
    """Sort the pictures' times and, where the file breaks off, keep those that are certain."""
    survey.times.sort()
    survey.keys.sort()
    times, counted = survey.times, survey.source.counts_frames
    gap = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    if times and survey.picture_end <= times[-1]:
        # No durations in the file: the last picture is held as long as is usual.
        survey.picture_end = times[-1] + gap
    survey.cut = survey.cut or _breaks_off(survey, gap, end)
    if survey.cut and times:
        # Pictures are stored in decoding order: of those due after the last one's turn, some may be cut off.
        # Frames that are told by counting are certain only before all that a decoder may hold back.
        certain = times[max(0, len(times) - _HELD_BACK)] if counted else survey.known_until
        survey.times = times[: survey.due_by(certain)]
        survey.picture_end = min(survey.picture_end, certain)


def _breaks_off(survey: StreamIndex, gap: float, end: float) -> bool:
    """Whether the file ends before it should; `gap` is the usual time between two pictures."""
    source = survey.source
    if min(end, source.declared_end) - survey.file_end > _SHORTFALL_SECONDS:
        return True
    if not survey.times or survey.known_until > end:
        return False
    if source.video.duration is not None:
        first = source.seconds(source.video.start_time or 0, source.video)
        declared = min(end, first + source.video.duration * source.tick_seconds[source.video.index])
        if declared - survey.picture_end > (gap / 2 if source.counts_frames else _SHORTFALL_SECONDS):
            return True
    # MPEG-TS and the like declare nothing. But pictures stored last fill the holes between those due last.
    last = survey.due_by(survey.known_until)
    indexed = "mp4" in source.container.format.name
    return not indexed and bool(np.any(np.diff(survey.times[max(0, last - 1) :]) > 1.5 * gap))


def _note_packets(survey: StreamIndex, start: float, end: float) -> None:
    source = survey.source
    going = {stream.index for stream in (source.video, source.audio) if stream is not None}
    sound_decoder = Decoder(forgiven_errors=_LEADING_SOUND_ERRORS)
    last_is_whole = True
    # All streams, so that a file cut off is told by where any of them ends.
    for packet in source.container.demux():
        index = packet.stream.index
        if packet.size:
            last_is_whole = not packet.is_corrupt
            if _note_end(survey, packet) > end:
                going.discard(index)
        if source.video is not None and index == source.video.index:
            _note_picture(survey, packet)
        elif source.audio is not None and index == source.audio.index and index in going:
            try:
                _hear(survey, sound_decoder.decode(packet), start)
            except Damage as damage:
                going.discard(index)
                survey.damage = str(damage)
        if not going:
            return
    survey.cut = survey.cut or not last_is_whole


def _note_end(survey: StreamIndex, packet: Any) -> float:
    """Note where the packet ends; returns the time that no later packet of its stream is shown before.

    Raises:
        Damage: between this packet and all those before it, a stretch of the file is missing.
    """
    source = survey.source
    stamp = packet.dts if packet.pts is None else packet.pts
    if stamp is not None:
        seconds = source.seconds(stamp, packet.stream)
        missing = seconds - survey.file_end
        if survey.file_end and missing > _HOLE_SECONDS and source.skips_damage:
            raise Damage(f"{missing:.2f} s are missing after {survey.file_end:.2f} s")
        length = (packet.duration or 0) * source.tick_seconds[packet.stream.index]
        survey.file_end = max(survey.file_end, seconds + length)
    return -math.inf if packet.dts is None else source.seconds(packet.dts, packet.stream)


def _note_picture(survey: StreamIndex, packet: Any) -> None:
    source = survey.source
    pts = packet.dts if source.counts_frames else packet.pts
    survey.cut = survey.cut or (packet.is_corrupt and bool(survey.keys))
    if pts is None or survey.cut:
        return
    seconds = source.seconds(pts, source.video)
    if packet.dts is not None:
        survey.known_until = source.seconds(packet.dts, source.video)
    if packet.is_keyframe:
        # MPEG-TS is searched by decoding time, the others by presentation time.
        by_dts = source.container.format.name == "mpegts" and packet.dts is not None
        survey.keys.append((seconds, packet.dts if by_dts else pts))
    # A file may begin amid pictures that refer to others before it: the first to be shown is a keyframe.
    # Discarded packets lie outside the file's edit list: they are decoded but never shown.
    if survey.keys and not packet.is_discard:
        survey.times.append(seconds)
        length = (packet.duration or 0) * source.tick_seconds[source.video.index]
        survey.picture_end = max(survey.picture_end, seconds + length)


def _hear(survey: StreamIndex, frames: list[Any], start: float) -> None:
    for frame in frames:
        # A frame without a time follows the one before it.
        seconds = survey.sound.end if frame.pts is None else frame.time - survey.source.origin
        # Long sound before the span need not be kept; a little is, for the resampler's filter to be full.
        if seconds > start - _PREROLL_SECONDS / 2:
            survey.sound.add(frame, seconds)
