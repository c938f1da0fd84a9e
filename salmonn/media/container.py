"""Access to a video or audio file: choice of streams, timestamps in seconds, decoding of packets."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
from av.bitstream import BitStreamFilterContext
from av.container import InputContainer
from av.format import Flags
from av.stream import Disposition

from salmonn.media.nal_units import is_recovery_point

# Starting decoder threads costs more than they save up to about this many pixels a frame.
_SINGLE_THREAD_PIXELS = 160 * 120
# Playlists open other files, which the sender of an upload may not be allowed to read.
_PLAYLIST_FORMATS = frozenset(["concat", "dash", "hls", "imf", "sdp"])
# These state the time at which they end, not their duration; both differ where timestamps do not start at 0.
_END_TIME_FORMATS = frozenset(["matroska", "flv"])
# These remove supplemental information (SEI), which many cameras write incorrectly. Their output has start codes: a
# decoder of H.264 accepts these with any extradata, a decoder of HEVC only if the parameter sets have them, too.
_SEI_FILTERS = {
    "h264": "filter_units=remove_types=6",
    "hevc": "hevc_mp4toannexb,filter_units=remove_types=39-40",
}
# As many frames as H.264 and HEVC allow a decoder to hold back.
REORDER_FRAMES = 16
# These can be decoded from packets and extradata alone, and libav conceals damage in them.
_VERIFIABLE_CODECS = frozenset(["h264", "hevc", "mpeg1video", "mpeg2video", "mpeg4", "vp8", "vp9"])
_MARKED = "a frame is marked as damaged"


class ClipError(ValueError):
    """A video that cannot be read; the message names the file, the cause and what to do."""


class NoAudioError(ClipError):
    """Only the audio of a video was requested, and it has none."""


class DecodeError(Exception):
    """A stream cannot be decoded. Used inside `salmonn.media` only; `read_clip` catches it."""


@dataclass(frozen=True)
class MediaFile:
    """An open video or audio file.

    Attributes:
        path: the file.
        container: libav's handle.
        video, audio: the streams to read; None for those that are absent or not requested.
        origin: the container's time at the start of the file, in seconds.
        tick_seconds: length of one timestamp tick, for each stream of the file.
        format_name: libav's name of the format, or several names separated by commas.
        counts_frames: whether frames are identified by counting from the first, because their timestamps cannot be
            trusted (AVI holds no presentation times, and libav's guesses come out of order where there are B-frames),
            or do not exist (raw streams).
        may_restart: whether the clock of this format may restart or jump within a file, as in joined MPEG-TS or chained
            Ogg.
    """

    path: str
    container: InputContainer
    video: Any
    audio: Any
    origin: float
    tick_seconds: tuple[float, ...]
    format_name: str
    counts_frames: bool
    may_restart: bool

    @property
    def declared_end(self) -> float:
        """End of the file according to its header, in seconds from its start; 0 if the header has none."""
        seconds = (self.container.duration or 0) / av.time_base
        states_end = not _END_TIME_FORMATS.isdisjoint(self.format_name.split(","))
        return seconds - self.origin if states_end and seconds > self.origin else seconds

    def seconds(self, pts: int, stream: Any) -> float:
        """Convert a timestamp of a stream to seconds from the start of the file."""
        return pts * self.tick_seconds[stream.index] - self.origin

    def reopen(self, stack: ExitStack, *, strict: bool = True) -> "MediaFile":
        """Open the same file again, to read it from its start."""
        return open_media(self.path, stack, video=self.video is not None, audio=self.audio is not None, strict=strict)


def open_media(
    path: str | os.PathLike[str], stack: ExitStack, *, video: bool, audio: bool, strict: bool = True
) -> MediaFile:
    """Open a local file and select its streams.

    Args:
        path: a local video or audio file.
        stack: context that closes the file.
        video, audio: whether to select a video and an audio stream.
        strict: make the video decoder report damage that it would otherwise conceal.

    Raises:
        ClipError: the file cannot be opened, or has none of the requested streams (NoAudioError: it is a silent video).
    """
    _check_file(Path(path))
    # A playlist may contain URLs: libav may open local files only.
    # An absolute path keeps libav from taking a name such as "take:1.mp4" for a URL.
    local_only = {"protocol_whitelist": "file"}
    try:
        container = av.open(str(Path(path).absolute()), options=local_only, metadata_errors="replace")
    except (av.error.FFmpegError, ValueError) as error:
        raise ClipError(
            f"{path}: is not a video or is damaged at its start ({cause_of(error)}); "
            "check that it plays, or copy or convert it again"
        ) from error
    stack.enter_context(container)
    if container.format.name == "tty":  # libav plays text files as ANSI art
        raise ClipError(f"{path}: is a text file; pass a video or audio file")
    if _PLAYLIST_FORMATS & set(container.format.name.split(",")):
        raise ClipError(f"{path}: is a playlist; pass a video or audio file")
    video_stream = _select_stream(container, "video") if video else None
    audio_stream = _select_stream(container, "audio", related=video_stream) if audio else None
    if video_stream is not None:
        _configure_video(video_stream.codec_context, strict=strict)
    if video and video_stream is None and _candidates(container, "video"):
        raise ClipError(
            f"{path}: there is no decoder for its video; convert it to H.264, or caption its audio (--modality audio)"
        )
    if video_stream is None and audio_stream is None:
        is_silent = not video and not _candidates(container, "audio") and bool(_candidates(container, "video"))
        error_type = NoAudioError if is_silent else ClipError
        raise error_type(f"{path}: {_explain_missing(container, video=video, audio=audio)}")
    flags = Flags(container.format.flags)
    return MediaFile(
        path=str(path),
        container=container,
        video=video_stream,
        audio=audio_stream,
        origin=(container.start_time or 0) / av.time_base,
        tick_seconds=tuple(float(stream.time_base or 0) for stream in container.streams),
        format_name=container.format.name,
        counts_frames=container.format.name == "avi" or Flags.no_timestamps in flags,
        may_restart=Flags.ts_discont in flags,
    )


def _explain_missing(container: InputContainer, *, video: bool, audio: bool) -> str:
    """Return why none of the requested streams can be decoded, and what to do."""
    if _candidates(container, "audio") and audio:
        return "there is no decoder for its audio; convert it to AAC"
    if _candidates(container, "audio") or _candidates(container, "video"):
        kind, other = ("video", "audio") if video else ("audio", "visual")
        return f"has no {kind}; caption the rest of it (--modality {other})"
    if container.streams.video:
        return "has no video or audio but a cover image; pass a video or audio file"
    if container.streams.subtitles:
        return "has no video or audio but subtitles; pass the video that they belong to"
    return "has no video or audio stream; check that it plays, or convert it"


def _check_file(path: Path) -> None:
    """Raise a `ClipError` with the cause for a path that is not a readable file; libav's own errors do not name it."""
    try:
        if path.is_dir():
            raise ClipError(f"{path}: is a folder; pass a file, such as one of the videos in it")
        if path.exists() and not path.is_file():
            raise ClipError(f"{path}: is not a regular file; copy the video to one")
        with path.open("rb") as file:
            empty = not file.read(1)
    except FileNotFoundError as error:
        raise ClipError(f"{path}: there is no such file; check the path") from error
    except PermissionError as error:
        raise ClipError(f"{path}: permission denied; grant this user read permission") from error
    except OSError as error:
        raise ClipError(f"{path}: cannot be opened ({error.strerror}); check path and disk") from error
    if empty:
        raise ClipError(f"{path}: the file is empty; copy or download it again")


def _candidates(container: InputContainer, kind: Any) -> list[Any]:
    """Return the streams of this kind that are to be played, which excludes cover images."""
    streams = getattr(container.streams, kind)
    return [stream for stream in streams if not stream.disposition & Disposition.attached_pic]


def _select_stream(container: InputContainer, kind: Any, *, related: Any = None) -> Any:
    """Return the stream of this kind that a player would choose among those with a decoder, or None.

    Args:
        container: an open file.
        kind: video or audio.
        related: a stream whose program is preferred, so that video and audio are of the same one.
    """
    decodable = [stream for stream in _candidates(container, kind) if stream.codec_context is not None]
    best = container.streams.best(kind, related=related)
    return best if best in decodable else next(iter(decodable), None)


def _configure_video(codec: Any, *, strict: bool) -> None:
    if strict:
        codec.options = {"err_detect": "explode"}
    codec.thread_type = "AUTO"
    # Threads report errors late, and conceal damage differently from one time to the next.
    codec.thread_count = 1 if not strict or codec.width * codec.height <= _SINGLE_THREAD_PIXELS else 0


def declared_seconds(path: str | os.PathLike[str]) -> float:
    """Return a file's duration according to its header, without reading further; 0 if the header has none.

    Raises:
        ClipError: the file cannot be opened, or has neither video nor audio.
    """
    with ExitStack() as stack:
        return open_media(path, stack, video=True, audio=True).declared_end


@dataclass(frozen=True)
class ClipShape:
    """Length and format of a clip; width and height are 0 without video."""

    seconds: float = 51.0
    width: int = 1280
    height: int = 720
    frames_per_second: float = 30.0
    has_audio: bool = True


def declared_shape(path: str | os.PathLike[str]) -> ClipShape:
    """Return length and format of a file according to its header; see `declared_seconds`."""
    with ExitStack() as stack:
        file = open_media(path, stack, video=True, audio=True)
        if file.video is None:
            return ClipShape(file.declared_end, 0, 0, 0.0)
        codec, rate = file.video.codec_context, file.video.average_rate
        return ClipShape(file.declared_end, codec.width, codec.height, float(rate or 25), file.audio is not None)


def demux(file: MediaFile, *streams: Any) -> Iterator[Any]:
    """Yield the packets of a file, of all its streams or of some, and a packet without data for each at the end."""
    # At the end, PyAV 18 looks in its list for streams that the file did not have when it was opened.
    with suppress(IndexError):
        yield from file.container.demux(*streams)


def cause_of(error: Exception) -> str:
    """Return an error's message without libav's number and file name."""
    return getattr(error, "strerror", None) or str(error)


class Decoder:
    """Decoder of one stream's packets, which resumes after damage or, if it is strict, reports it.

    A strict decoder is for video streams that were opened as strict: it raises errors that libav would only log. Some
    of them do not matter, so they only decide whether to read again with a decoder that is not strict. That one returns
    whatever libav decodes, and verifies each packet with additional decoders.

    Attributes:
        damage: (time, duration) of the damaged packets, in seconds. Packets at the start of a recording that depend on
            earlier ones are not damaged.
        cause: message of the latest error.
        has_started: whether a frame has been decoded.
    """

    def __init__(self, file: MediaFile, stream: Any, *, strict: bool = False) -> None:
        self.damage: list[tuple[float, float]] = []
        self.cause: str | None = None
        self.has_started = False
        self._file = file
        self._stream = stream
        self._strict = strict
        self.restart()

    def restart(self) -> None:
        """Prepare for packets from another part of the file, after a seek."""
        self._num_packets, self._enters_open_gop = 0, False
        is_verified = not self._strict and self._stream.codec_context.name in _VERIFIABLE_CODECS
        self._verifier = _Verifier(self._stream) if is_verified else None

    def decode(self, packet: Any) -> list[Any]:
        """Return the frames that a packet makes available, in presentation order.

        Raises:
            DecodeError: the decoder is strict, and the packet or a frame is damaged.
        """
        if packet.size == 0 and packet.pts is not None:
            return []  # repeats the frame before it, as in Theora; libav would take it for the end of the stream
        self._num_packets += 1
        if self._num_packets == 1:
            self._enters_open_gop = self._stream.type == "video" and is_recovery_point(
                packet, self._stream.codec_context
            )
        frames, error = self._frames(packet)
        if self._verifier is not None:
            error = self._verifier.find_error(packet) or error
        self.has_started = self.has_started or bool(frames)
        if error is not None:
            self.cause = error
            if not self._is_expected(packet, error):
                if self._strict:
                    raise DecodeError(error)
                if packet.pts is not None:
                    duration = (packet.duration or 0) * self._file.tick_seconds[self._stream.index]
                    self.damage.append((self._file.seconds(packet.pts, self._stream), duration))
        return frames

    def drain(self) -> list[Any]:
        """Return the frames that the decoder still holds; it accepts packets again after a seek. Raises as `decode`."""
        frames, error = self._frames(None)
        if error is not None and self._strict:
            raise DecodeError(error)
        return frames

    def _is_expected(self, packet: Any, error: str) -> bool:
        """Return whether an intact file may give this error."""
        if self._stream.type == "audio":
            # A recording may start in the middle of a packet; joined MP3 files have tags between them.
            return not self.has_started or bytes(packet)[:3] in (b"ID3", b"TAG")
        if error == _MARKED and not self.has_started:
            return True  # intra refresh: frames are damaged until all of it has been refreshed
        # The frames of an open GOP that precede its keyframe in time refer to frames before it, and frame numbers have
        # a gap there.
        return self._enters_open_gop and self._num_packets <= REORDER_FRAMES

    def _frames(self, packet: Any) -> tuple[list[Any], str | None]:
        try:
            frames = self._stream.decode(packet)
        except av.error.EOFError:
            return [], None
        except av.error.FFmpegError as error:
            return [], cause_of(error)
        intact = [frame for frame in frames if not frame.is_corrupt]
        return intact, None if len(intact) == len(frames) else _MARKED


class _Verifier:
    """Additional strict decoders of the same packets, one of them without supplemental information (SEI).

    SEI may be malformed in intact video, but may also be needed: it marks where an open GOP can be entered. A packet is
    damaged if both decoders fail on it.
    """

    def __init__(self, stream: Any) -> None:
        source = stream.codec_context
        name = _SEI_FILTERS.get(source.name)
        self._filter = None
        # The filter refuses damaged parameter sets.
        with suppress(av.error.FFmpegError):
            self._filter = None if name is None else BitStreamFilterContext(name, stream)
        self._codecs = []
        for number in range(1 if self._filter is None else 2):
            codec: Any = av.CodecContext.create(source.codec, "r")
            if not (number == 1 and source.name == "hevc"):
                codec.extradata = source.extradata
            codec.width, codec.height = source.width, source.height
            codec.options = {"err_detect": "explode"}
            codec.thread_count = 1
            self._codecs.append(codec)

    def find_error(self, packet: Any) -> str | None:
        """Return the cause if a packet is damaged."""
        if packet.size == 0:
            return None
        errors = [_decoding_error(self._codecs[0], packet)]
        if self._filter is not None:
            copy = av.Packet(packet.size)  # the filter takes what it is given; made of bytes, it would lack padding
            copy.update(bytes(packet))
            copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
            copy.is_keyframe = packet.is_keyframe
            try:
                filtered = self._filter.filter(copy)
            except av.error.FFmpegError as error:
                errors.append(cause_of(error))
            else:
                errors += [_decoding_error(self._codecs[1], part) for part in filtered]
        return errors[-1] if None not in errors else None


def _decoding_error(codec: Any, packet: Any) -> str | None:
    try:
        codec.decode(packet)
    except av.error.FFmpegError as error:
        return cause_of(error)
    return None
