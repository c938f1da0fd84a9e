"""Access to a video or audio file: choice of streams, timestamps in seconds, decoding of packets."""

import math
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
from av.container import InputContainer
from av.stream import Disposition

# Starting decoder threads costs more than they save up to about this many pixels a frame.
_SINGLE_THREAD_PIXELS = 160 * 120
# Playlists open other files, which the sender of an upload may not be allowed to read.
_PLAYLIST_FORMATS = frozenset(["concat", "dash", "hls", "imf", "sdp"])


class ClipError(ValueError):
    """A video that cannot be read; the message names the file, the cause and what to do."""


class DecodeError(Exception):
    """A stream cannot be decoded from `seconds` on. Used inside `salmonn.media` only; `read_clip` catches it."""

    def __init__(self, cause: str, seconds: float = math.inf) -> None:
        super().__init__(cause)
        self.seconds = seconds


@dataclass(frozen=True)
class MediaFile:
    """An open video or audio file.

    Attributes:
        path: the file.
        container: libav's handle.
        video, audio: the streams to read; None for those that are absent or not requested.
        origin: the container's time at the start of the file, in seconds.
        tick_seconds: length of one timestamp tick, for each stream of the file.
    """

    path: str
    container: InputContainer
    video: Any
    audio: Any
    origin: float
    tick_seconds: tuple[float, ...]

    @property
    def counts_frames(self) -> bool:
        """Whether frames are identified by counting from the first, because their timestamps cannot be trusted."""
        # AVI holds no presentation times, and libav's guesses come out of order where there are B-frames.
        return self.container.format.name == "avi"

    @property
    def skips_damage(self) -> bool:
        """Whether libav silently skips what it cannot read; a gap in all streams reveals it."""
        streams = self.container.streams
        return "matroska" in self.container.format.name and bool(streams.video and streams.audio)

    @property
    def declared_end(self) -> float:
        """End of the file according to its header, in seconds from its start; 0 if the header has none."""
        return (self.container.duration or 0) / av.time_base

    def seconds(self, pts: int, stream: Any) -> float:
        """Convert a timestamp of a stream to seconds from the start of the file."""
        return pts * self.tick_seconds[stream.index] - self.origin

    def reopen(self, stack: ExitStack) -> "MediaFile":
        """Open the same file again, to read it from its start."""
        return open_media(self.path, stack, video=self.video is not None, audio=self.audio is not None)


def open_media(path: str | os.PathLike[str], stack: ExitStack, *, video: bool, audio: bool) -> MediaFile:
    """Open a local file and select its streams.

    Args:
        path: a local video or audio file.
        stack: context that closes the file.
        video, audio: whether to select a video and an audio stream.

    Raises:
        ClipError: the file cannot be opened, or has none of the requested streams.
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
    file = MediaFile(
        path=str(path),
        container=container,
        video=_select_stream(container, "video") if video else None,
        audio=_select_stream(container, "audio") if audio else None,
        origin=(container.start_time or 0) / av.time_base,
        tick_seconds=tuple(float(stream.time_base or 0) for stream in container.streams),
    )
    if file.video is None and file.audio is None:
        requested = " or ".join([name for name, on in (("video", video), ("audio", audio)) if on])
        raise ClipError(f"{path}: has no {requested} stream that can be decoded; check that it plays, or convert it")
    return file


def _check_file(path: Path) -> None:
    """Raise a `ClipError` with the cause for a path that is no readable file; libav's own errors do not name it."""
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


def _select_stream(container: InputContainer, kind: Any) -> Any:
    """Return the stream of this kind that a player would choose, ready to decode, or None."""
    stream: Any = container.streams.best(kind)
    if stream is None or stream.codec_context is None or stream.disposition & Disposition.attached_pic:
        return None
    if kind == "video":
        codec = stream.codec_context
        # Without this, some damaged frames are concealed with pixels of their neighbours and not marked as corrupt.
        codec.options = {"err_detect": "explode"}
        codec.thread_type = "AUTO"
        codec.thread_count = 1 if codec.width * codec.height <= _SINGLE_THREAD_PIXELS else 0
    return stream


def declared_seconds(path: str | os.PathLike[str]) -> float:
    """Return a file's duration according to its header, without reading further; 0 if the header has none.

    Raises:
        ClipError: the file cannot be opened, or has neither video nor audio.
    """
    with ExitStack() as stack:
        return open_media(path, stack, video=True, audio=True).declared_end


def measured_seconds(path: str | os.PathLike[str]) -> float:
    """Return a file's duration by the timestamps of all its packets, without decoding them; 0 if they have none.

    The header may hold an estimate from the bit rate, or the duration before the file was truncated.

    Raises:
        ClipError: as `declared_seconds`.
    """
    end = 0.0
    with ExitStack() as stack:
        file = open_media(path, stack, video=True, audio=True)
        streams = [stream for stream in (file.video, file.audio) if stream is not None]
        try:
            for packet in file.container.demux(streams):
                if packet.pts is not None:
                    end = max(end, file.seconds(packet.pts + (packet.duration or 0), packet.stream))
        except av.error.FFmpegError:
            pass  # damaged from here on, which `read_clip` reports
    return end


def cause_of(error: Exception) -> str:
    """Return an error's message without libav's number and file name."""
    return getattr(error, "strerror", None) or str(error)


class Decoder:
    """Decoder of one stream's packets up to the first damage.

    Args:
        max_leading_errors: number of errors that are ignored before the first frame.
    """

    def __init__(self, *, max_leading_errors: int = 0) -> None:
        self._ignorable_errors = max_leading_errors

    def decode(self, packet: Any) -> list[Any]:
        """Return the frames that a packet makes available, in presentation order.

        Raises:
            DecodeError: the packet or a frame is damaged.
        """
        return self._decode(packet.stream, packet)

    def drain(self, stream: Any) -> list[Any]:
        """Return the frames that the decoder still holds; it accepts packets again after a seek. Raises as `decode`."""
        return self._decode(stream, None)

    def _decode(self, stream: Any, packet: Any) -> list[Any]:
        try:
            if packet is not None and packet.is_corrupt:
                raise av.error.InvalidDataError(0, "the container marks this part as damaged")
            frames = stream.decode(packet)
        except av.error.EOFError:
            return []
        except av.error.FFmpegError as error:
            if self._ignorable_errors == 0:
                raise DecodeError(cause_of(error)) from error
            self._ignorable_errors -= 1
            return []
        if any(frame.is_corrupt for frame in frames):
            raise DecodeError("a frame is marked as damaged")
        if frames:
            self._ignorable_errors = 0
        return frames
