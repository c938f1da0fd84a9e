"""Reads a video file into a `Clip`: a few frames with their times, and the sound at 16 kHz.

    clip = read_clip("talk.mp4", frames_per_second=2.0, max_frames=16, frame_size=384)

A file is passed over twice. The first pass decodes the sound and only notes when each picture is due and
which are keyframes. So the second knows before it decodes anything which frames are wanted and where each
can be reached from, and it seeks whenever the next wanted frame has a keyframe ahead of the place reached:
a stretch between keyframes in which nothing is wanted is never decoded, and nothing is decoded twice.
"""

import logging
import math
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.reformatter import Interpolation, VideoReformatter

logger = logging.getLogger(__name__)

SAMPLE_RATE_HZ = 16_000
VIDEO_SUFFIXES = frozenset(
    [
        ".3gp",
        ".avi",
        ".flv",
        ".m2ts",
        ".m4v",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpeg",
        ".mpg",
        ".mts",
        ".ogv",
        ".ts",
        ".webm",
        ".wmv",
    ]
)
AUDIO_SUFFIXES = frozenset(
    [".aac", ".aif", ".aiff", ".flac", ".m4a", ".mp3", ".oga", ".ogg", ".opus", ".wav", ".wma"]
)

# Times are compared as floats; a frame this little after the wanted time counts as due at that time.
_SLACK_SECONDS = 1e-6
# Muxers round sound times (Matroska to 1 ms, AVI to a frame); only a larger step is a real gap or overlap.
_GAP_SECONDS = 0.05
# Sound decoders settle some packets after a seek (Opus asks for 80 ms), and files interleave loosely.
_PREROLL_SECONDS = 2.0
# A file that ends this much before it says it will has been cut off.
_SHORTFALL_SECONDS = 0.25
# A sound stream cut in mid-packet gives some errors before it finds its feet; more than this is damage.
_LEADING_SOUND_ERRORS = 50
# The resampler costs more for each call than for each sample, so sound goes through it in blocks.
_BLOCK_SAMPLES = 1 << 17
# Starting decoder threads costs more than they save up to about this many pixels a frame.
_SINGLE_THREAD_PIXELS = 320 * 240

# Without these two flags, libswscale's colours come out 0.5 (full size) to 1.8 (scaled) levels too dark.
_SCALING = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


class ClipError(ValueError):
    """A video that cannot be read; the message names the file, the cause and what to do."""


class _Damage(Exception):
    """The stream cannot be decoded from `seconds` on."""

    def __init__(self, cause: str, seconds: float = math.inf) -> None:
        super().__init__(cause)
        self.seconds = seconds


class _SeekMissed(Exception):
    """A seek landed after the frame it was for."""


@dataclass(frozen=True)
class Clip:
    """What was read of a video.

    Attributes:
        path: the file.
        frames: (F, H, W, 3) uint8 RGB, upright; F is 0 where there is no picture in the span.
        frame_times: (F,) float64, rising; the times at which the screen was looked at, in seconds from the
            start of the file (not of the span). The frame's own time stamp is at or before it.
        waveform: (S,) float32 mono at 16 kHz, or None where there is no sound in the span. Sample 0 is the
            start of the span; S ends with the sound or the span, so before or after the picture does.
        start_seconds: start of the span, from the start of the file.
        duration_seconds: from there to the later of the picture's and the sound's ends within the span.
    """

    path: str
    frames: np.ndarray
    frame_times: np.ndarray
    waveform: np.ndarray | None
    start_seconds: float
    duration_seconds: float

    @property
    def has_video(self) -> bool:
        """Whether there is at least one frame."""
        return len(self.frames) > 0

    @property
    def has_audio(self) -> bool:
        """Whether there is sound."""
        return self.waveform is not None


def read_clip(
    path: str | os.PathLike[str],
    *,
    frames_per_second: float = 2.0,
    max_frames: int = 16,
    start_seconds: float | None = None,
    end_seconds: float | None = None,
    frame_size: int | None = None,
    video: bool = True,
    audio: bool = True,
) -> Clip:
    """Read frames and sound of a video, or of the part of it between two times.

    The picture's part of the span is cut into pieces of `1 / frames_per_second` seconds and the frame on
    screen at the middle of each is taken; a last piece whose middle lies outside gives none. A span too short
    for any gives the frame at its middle. Where that would be more than `max_frames`, it is cut into
    `max_frames` equal pieces. Frames go by their time stamps, so a variable frame rate comes out right.

    A damaged file gives what decodes before the damage, with a warning in the log; damage in a stretch that
    is sought past is not noticed.

    Args:
        path: a local video or sound file.
        frames_per_second: frames taken for each second of picture.
        max_frames: the most frames taken.
        start_seconds, end_seconds: the span, from the start of the file; None is the file's own start or end.
        frame_size: height and width to scale frames to (bicubic, aspect not kept); None keeps their size.
        video, audio: whether to read the picture and the sound. With both, a file with one of them will do.

    Returns:
        A `Clip`; times are measured from the earliest of the file's streams.

    Raises:
        ClipError: the file cannot be read, has nothing of what was asked for, or ends before `start_seconds`.
        ValueError: an argument makes no sense.
    """
    _check_arguments(frames_per_second, max_frames, start_seconds, end_seconds, frame_size)
    if not (video or audio):
        raise ValueError("video and audio are both False, which leaves nothing to read; set one to True")
    start, end = start_seconds or 0.0, math.inf if end_seconds is None else end_seconds
    _check_file(Path(path))
    with ExitStack() as stack:
        source = _open(path, stack, video=video, audio=audio)
        survey = _survey_span(source, stack, start, end)
        wanted = _wanted_times(survey, start, end, frames_per_second, max_frames)
        frames = _take_frames(survey, wanted, frame_size, stack) if len(wanted) else []
        return _assemble(survey, wanted, frames, start, end)


def find_videos(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """List video and sound files: files as they are given, folders searched through for known suffixes.

    Args:
        paths: files and folders. Hidden files and folders inside a given folder are passed over.

    Returns:
        Paths in the order given, each folder's files sorted.

    Raises:
        ClipError: a path does not exist, or a folder holds no video or sound.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            if not path.exists():
                raise ClipError(f"{path}: there is no such file or folder; check the path")
            found.append(path)
            continue
        inside = sorted(p for p in path.rglob("*") if _is_media(p.relative_to(path)) and p.is_file())
        if not inside:
            known = " ".join(sorted(VIDEO_SUFFIXES | AUDIO_SUFFIXES))
            raise ClipError(f"{path}: the folder holds no video or sound file; known suffixes are {known}")
        found += inside
    return found


def _is_media(inside: Path) -> bool:
    hidden = any(part.startswith(".") for part in inside.parts)
    return not hidden and inside.suffix.lower() in VIDEO_SUFFIXES | AUDIO_SUFFIXES


def _check_arguments(
    rate: float, max_frames: int, start: float | None, end: float | None, frame_size: int | None
) -> None:
    # Written so that NaN, which compares false with everything, is refused too.
    if not 0 < rate < math.inf:
        raise ValueError(f"frames_per_second is {rate}; it must be a number above 0")
    if max_frames < 1:
        raise ValueError(f"max_frames is {max_frames}; it must be at least 1 (video=False reads no frames)")
    if frame_size is not None and frame_size < 1:
        raise ValueError(f"frame_size is {frame_size}; it must be at least 1, or None for the video's size")
    if start is not None and not 0 <= start < math.inf:
        raise ValueError(f"start_seconds is {start}; it must be 0 or more")
    if end is not None and not end > (start or 0.0):
        raise ValueError(f"end_seconds is {end}; it must be greater than start_seconds ({start or 0.0})")


# Opening


@dataclass(frozen=True)
class _Source:
    """An open file with the streams to read; `origin` is the container's time at the start of the file."""

    path: str
    container: InputContainer
    video: Any
    audio: Any
    origin: float
    tick_seconds: tuple[float, ...]

    @property
    def counts_frames(self) -> bool:
        """Whether frames are told by counting from the first, for want of true time stamps."""
        # AVI holds no presentation times, and libav's guesses come out of order where there are B-frames.
        return self.container.format.name == "avi"

    def seconds(self, pts: int, stream: Any) -> float:
        """A stream's time stamp in seconds from the start of the file."""
        return pts * self.tick_seconds[stream.index] - self.origin


def _check_file(path: Path) -> None:
    # Python's own errors name the cause; libav's for the same cases do not.
    try:
        if path.is_dir():
            raise ClipError(f"{path}: is a folder; give a file, or list the folder with find_videos")
        if path.exists() and not path.is_file():
            raise ClipError(f"{path}: is not a regular file; copy the video to one")
        with open(path, "rb") as file:
            empty = not file.read(1)
    except FileNotFoundError as error:
        raise ClipError(f"{path}: there is no such file; check the path") from error
    except PermissionError as error:
        raise ClipError(f"{path}: permission denied; give this user the right to read it") from error
    except OSError as error:
        raise ClipError(f"{path}: cannot be opened ({error.strerror}); check path and disk") from error
    if empty:
        raise ClipError(f"{path}: the file is empty; copy or download it again")


def _open(path: str | os.PathLike[str], stack: ExitStack, *, video: bool, audio: bool) -> _Source:
    # A playlist may name addresses: only local files are opened, whatever a stranger's upload says.
    # An absolute path keeps libav from taking a name such as "take:1.mp4" for an address.
    local = {"protocol_whitelist": "file"}
    try:
        container = av.open(os.path.abspath(path), options=local, metadata_errors="replace")
    except (av.error.FFmpegError, ValueError) as error:
        raise ClipError(
            f"{path}: is not a video or is damaged at its start ({_words(error)}); "
            "check that it plays, or copy or convert it again"
        ) from error
    stack.enter_context(container)
    # libav plays text files as ANSI art.
    if container.format.name == "tty":
        raise ClipError(f"{path}: is a text file; give a video or sound file")
    source = _Source(
        path=str(path),
        container=container,
        video=_stream(container, "video") if video else None,
        audio=_stream(container, "audio") if audio else None,
        origin=(container.start_time or 0) / av.time_base,
        tick_seconds=tuple(float(stream.time_base or 0) for stream in container.streams),
    )
    if source.video is None and source.audio is None:
        asked = " or ".join([name for name, on in (("picture", video), ("sound", audio)) if on])
        raise ClipError(f"{path}: holds no {asked} that can be decoded; check that it plays, or convert it")
    return source


def _reopen(source: _Source, stack: ExitStack) -> _Source:
    return _open(source.path, stack, video=source.video is not None, audio=source.audio is not None)


def _stream(container: InputContainer, kind: Any) -> Any:
    """The stream of the kind that a player would choose, ready to decode, or None."""
    stream: Any = container.streams.best(kind)
    if stream is None or stream.codec_context is None or stream.disposition & Disposition.attached_pic:
        return None
    if kind == "video":
        codec = stream.codec_context
        # Without this, damaged pictures are filled in from their neighbours and handed out as good.
        codec.options = {"err_detect": "explode"}
        codec.thread_type = "AUTO"
        codec.thread_count = 1 if codec.width * codec.height <= _SINGLE_THREAD_PIXELS else 0
    return stream


def _words(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


# First pass: sound, and when each picture is due


@dataclass
class _Survey:
    """What the first pass learnt; times in seconds from the start of the file.

    `times` are when pictures are due, rising; `keys` are the keyframes as (time, stamp to seek
    to), rising. Up to
    `known_until` no picture can be missing from `times`; `cut` says that the file breaks off.
    """

    source: _Source
    sound: "_Sound"
    times: list[float] = field(default_factory=list)
    keys: list[tuple[float, int]] = field(default_factory=list)
    picture_end: float = 0.0
    file_end: float = 0.0
    known_until: float = 0.0
    cut: bool = False
    damage: str | None = None

    @property
    def end(self) -> float:
        return max(self.picture_end, self.sound.end)


class _Decoder:
    """Decodes the packets of one stream up to the first damage."""

    def __init__(self, forgiven_errors: int) -> None:
        self._forgiven = forgiven_errors

    def decode(self, packet: Any) -> list[Any]:
        """Raises `_Damage` at the first error, but for a number of errors before the first frame."""
        try:
            if packet.is_corrupt:
                raise av.error.InvalidDataError(0, "the file says that this part is damaged")
            frames = packet.decode()
        except av.error.EOFError:
            return []
        except av.error.FFmpegError as error:
            if self._forgiven == 0:
                raise _Damage(_words(error)) from error
            self._forgiven -= 1
            return []
        if any(frame.is_corrupt for frame in frames):
            raise _Damage("a frame is marked as damaged")
        if frames:
            self._forgiven = 0
        return frames


class _Sound:
    """Collects decoded sound as runs of 16 kHz mono samples, each with the time of its first sample."""

    def __init__(self) -> None:
        self.end = 0.0
        self._runs: list[tuple[float, list[np.ndarray]]] = []
        self._setup: tuple[str, str, int] | None = None
        self._resampler = av.AudioResampler()
        self._pending: list[np.ndarray] = []
        self._pending_samples = 0
        self._run_samples = 0

    def add(self, frame: Any, seconds: float) -> None:
        """Take in a frame that sounds at `seconds`; a gap, overlap or change of format begins a new run."""
        setup = (frame.format.name, frame.layout.name, frame.sample_rate)
        if setup != self._setup or abs(seconds - self.end) > _GAP_SECONDS:
            self.finish()
            self._setup, self._run_samples = setup, 0
            # Float sound is mixed down unscaled unless told: equal channels would come out 1.41 times louder.
            self._resampler = av.AudioResampler(
                format="flt", layout="mono", rate=SAMPLE_RATE_HZ, options={"rematrix_maxval": "1.0"}
            )
            self._runs.append((seconds, []))
        self._pending.append(frame.to_ndarray())
        self._pending_samples += frame.samples
        self._run_samples += frame.samples
        self.end = self._runs[-1][0] + self._run_samples / frame.sample_rate
        if self._pending_samples >= _BLOCK_SAMPLES:
            self._resample()

    def finish(self) -> None:
        """Bring out what the resampler still holds; what is added next begins a new run."""
        if self._setup is not None:
            self._resample()
            self._keep(self._resampler.resample(None))
            self._setup = None

    def _resample(self) -> None:
        if self._pending and self._setup is not None:
            name, layout, rate = self._setup
            samples = np.concatenate(self._pending, axis=1)
            block = av.AudioFrame.from_ndarray(samples, format=name, layout=layout)
            block.sample_rate = rate
            self._pending, self._pending_samples = [], 0
            self._keep(self._resampler.resample(block))

    def _keep(self, frames: list[Any]) -> None:
        self._runs[-1][1].extend(frame.to_ndarray()[0] for frame in frames)

    def waveform(self, start: float, end: float) -> np.ndarray | None:
        """(S,) float32 from `start` to `end` or the sound's end, gaps silent; None without sound there."""
        runs = [
            (round((at - start) * SAMPLE_RATE_HZ), np.concatenate(parts)) for at, parts in self._runs if parts
        ]
        last = max((offset + len(samples) for offset, samples in runs), default=0)
        length = last if end == math.inf else min(last, round((end - start) * SAMPLE_RATE_HZ))
        if length <= 0:
            return None
        waveform = np.zeros(length, np.float32)
        for offset, samples in runs:
            piece = samples[max(0, -offset) : max(0, length - offset)]
            waveform[max(0, offset) : max(0, offset) + len(piece)] = piece
        return waveform


def _survey_span(source: _Source, stack: ExitStack, start: float, end: float) -> _Survey:
    """Survey the span, seeking near its start where that can be trusted."""
    # Sound is quick to decode, and seeks in sound files are often estimates.
    if source.video is not None and not source.counts_frames and start > _PREROLL_SECONDS:
        survey = _survey(source, start, end, seek_seconds=start - _PREROLL_SECONDS)
        if survey.times and survey.times[0] <= start:
            return survey
        source = _reopen(source, stack)
    return _survey(source, start, end, seek_seconds=None)


def _survey(source: _Source, start: float, end: float, *, seek_seconds: float | None) -> _Survey:
    survey = _Survey(source, _Sound())
    try:
        if seek_seconds is not None:
            source.container.seek(round((seek_seconds + source.origin) * av.time_base))
        _note_packets(survey, start, end)
    except av.error.FFmpegError as error:
        survey.damage, survey.cut = _words(error), True
    survey.sound.finish()
    survey.times.sort()
    survey.keys.sort()
    survey.cut = survey.cut or _declared_end(source, end) - survey.file_end > _SHORTFALL_SECONDS
    if survey.cut:
        # Pictures are stored in decoding order: one due between the last two read may have been cut off.
        survey.times = survey.times[: bisect_right(survey.times, survey.known_until + _SLACK_SECONDS)]
        survey.picture_end = min(survey.picture_end, survey.known_until)
    elif len(survey.times) > 1 and survey.picture_end <= survey.times[-1]:
        # No durations in the file: the last picture is held as long as the one before it.
        survey.picture_end = 2 * survey.times[-1] - survey.times[-2]
    return survey


def _declared_end(source: _Source, end: float) -> float:
    return min(end, (source.container.duration or 0) / av.time_base)


def _note_packets(survey: _Survey, start: float, end: float) -> None:
    source = survey.source
    going = {stream.index for stream in (source.video, source.audio) if stream is not None}
    sound_decoder = _Decoder(_LEADING_SOUND_ERRORS)
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
            except _Damage as damage:
                going.discard(index)
                survey.damage = str(damage)
        if not going:
            return
    survey.cut = survey.cut or not last_is_whole


def _note_end(survey: _Survey, packet: Any) -> float:
    """Note where the packet ends; returns the time that no later packet of its stream is shown before."""
    source = survey.source
    stamp = packet.dts if packet.pts is None else packet.pts
    if stamp is not None:
        length = (packet.duration or 0) * source.tick_seconds[packet.stream.index]
        survey.file_end = max(survey.file_end, source.seconds(stamp, packet.stream) + length)
    return -math.inf if packet.dts is None else source.seconds(packet.dts, packet.stream)


def _note_picture(survey: _Survey, packet: Any) -> None:
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


def _hear(survey: _Survey, frames: list[Any], start: float) -> None:
    for frame in frames:
        # A frame without a time follows the one before it.
        seconds = survey.sound.end if frame.pts is None else frame.time - survey.source.origin
        # Long sound before the span need not be kept; a little is, for the resampler's filter to be full.
        if seconds > start - _PREROLL_SECONDS / 2:
            survey.sound.add(frame, seconds)


# Second pass: the frames wanted


def _wanted_times(survey: _Survey, start: float, end: float, rate: float, max_frames: int) -> np.ndarray:
    """(F,) float64: the middles of equal pieces of the picture's part of the span."""
    if not survey.times:
        return np.zeros(0)
    first = max(start, survey.times[0])
    length = min(end, survey.picture_end) - first
    if length <= 0:
        return np.zeros(0)
    # A piece counts where its middle lies inside, hence the half.
    count = math.ceil(length * rate - 0.5 - _SLACK_SECONDS)
    piece = 1.0 / rate
    if not 1 <= count <= max_frames:
        count = 1 if count < 1 else max_frames
        piece = length / count
    return first + (np.arange(count) + 0.5) * piece


def _take_frames(
    survey: _Survey, wanted: np.ndarray, frame_size: int | None, stack: ExitStack
) -> list[np.ndarray | None]:
    """Frames for the wanted times, None where undecodable; fewer where the rest is damaged."""
    source = survey.source
    if not source.counts_frames:
        try:
            return list(_painted(_on_screen(source, survey, wanted, survey.keys), frame_size))
        except (_SeekMissed, _Damage) as problem:
            # Some files are only hard to seek in: damage is believed when reading straight through finds it.
            logger.debug("%s: reading straight through, for a seek failed (%s)", source.path, problem)
    source = _reopen(source, stack)
    frames: list[np.ndarray | None] = []
    try:
        for frame in _painted(_on_screen(source, survey, wanted, []), frame_size):
            frames.append(frame)
    except _Damage as damage:
        survey.damage = str(damage)
        survey.picture_end = min(survey.picture_end, damage.seconds)
    return frames


def _on_screen(
    source: _Source, survey: _Survey, wanted: np.ndarray, keys: list[tuple[float, int]]
) -> Iterator[Any]:
    """The decoded frame on screen at each wanted time, seeking to `keys`; without them, no seeks."""
    taken = 0
    while taken < len(wanted):
        key = _key_before(keys, wanted[taken])
        frames = _decode_from(source, survey, keys[key][1] if keys else None)
        for frame in _run_from(frames, survey, wanted[taken:], keys[key:]):
            yield frame
            taken += 1


def _run_from(
    frames: Iterator[tuple[float, Any]], survey: _Survey, wanted: np.ndarray, keys: list[tuple[float, int]]
) -> Iterator[Any]:
    """The frames on screen at wanted times, until the next is better reached from a later keyframe."""
    taken = 0
    shown, shown_seconds = None, survey.times[0] - 1.0
    reason = "the picture ends before the file says it does"
    try:
        for seconds, frame in frames:
            while seconds > wanted[taken] + _SLACK_SECONDS:
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
    except _Damage as damage:
        reason = str(damage)
    # The last frame stays on screen, but only until another was due.
    next_due = bisect_right(survey.times, shown_seconds + _SLACK_SECONDS)
    limit = survey.times[next_due] if next_due < len(survey.times) else math.inf
    for time in wanted[taken:]:
        if time + _SLACK_SECONDS >= limit:
            raise _Damage(reason, limit)
        yield shown


def _key_before(keys: list[tuple[float, int]], seconds: float) -> int:
    """Index of the last keyframe at or before a time, 0 where there is none."""
    return max(0, bisect_right(keys, seconds + _SLACK_SECONDS, key=lambda key: key[0]) - 1)


def _decode_from(source: _Source, survey: _Survey, key_stamp: int | None) -> Iterator[tuple[float, Any]]:
    """(seconds, frame) in the order shown, from the keyframe or, without one, from where the file stands."""
    stream = source.video
    decoder = _Decoder(forgiven_errors=0)
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
        raise _Damage(_words(error)) from error


def _painted(frames: Iterator[Any], frame_size: int | None) -> Iterator[np.ndarray | None]:
    """(H, W, 3) uint8 upright pictures; a frame that stays on screen is converted once."""
    reformatter = VideoReformatter()
    before, picture = None, None
    width = height = frame_size
    for frame in frames:
        if frame is not None and frame is not before:
            # A stream may change its size; all pictures of a clip get that of the first.
            width, height = width or frame.width, height or frame.height
            small = reformatter.reformat(
                frame, width, height, format="rgb24", interpolation=_SCALING, threads=1
            )
            picture = np.rot90(small.to_ndarray(), round(frame.rotation / 90))
        before = frame
        yield None if frame is None else picture


def _assemble(
    survey: _Survey, wanted: np.ndarray, frames: list[np.ndarray | None], start: float, end: float
) -> Clip:
    waveform = survey.sound.waveform(start, end)
    taken = [(time, frame) for time, frame in zip(wanted, frames, strict=False) if frame is not None]
    if not taken and waveform is None:
        raise ClipError(_why_nothing(survey, start))
    _warn_of_losses(survey, len(wanted) - len(taken), end)
    sound_seconds = 0.0 if waveform is None else len(waveform) / SAMPLE_RATE_HZ
    return Clip(
        path=survey.source.path,
        frames=np.stack([frame for _, frame in taken]) if taken else np.zeros((0, 0, 0, 3), np.uint8),
        frame_times=np.array([time for time, _ in taken], np.float64),
        waveform=waveform,
        start_seconds=start,
        duration_seconds=max(min(survey.picture_end, end) - start, sound_seconds),
    )


def _why_nothing(survey: _Survey, start: float) -> str:
    path = survey.source.path
    if survey.damage is not None:
        return f"{path}: is damaged and nothing decodes ({survey.damage}); copy or download it again"
    if 0 < survey.end <= start:
        return f"{path}: start_seconds is {start}, but the file ends at {survey.end:.2f} s; start earlier"
    return f"{path}: nothing with a time stamp decodes in the span; check that it plays there, or convert it"


def _warn_of_losses(survey: _Survey, frames_lost: int, end: float) -> None:
    path = survey.source.path
    if survey.damage is not None or frames_lost:
        logger.warning(
            "%s: damaged (%s); %d wanted frames lost, picture kept up to %.2f s and sound up to %.2f s",
            path,
            survey.damage or "some pictures do not decode",
            frames_lost,
            survey.picture_end,
            survey.sound.end,
        )
    declared = _declared_end(survey.source, end)
    if survey.cut:
        logger.warning(
            "%s: breaks off; of %.2f s, %.2f s of picture and %.2f s of sound were read",
            path,
            declared,
            survey.picture_end,
            survey.sound.end,
        )
