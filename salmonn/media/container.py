"""Opens a video or sound file: which of its streams to read, their times in seconds, their packets decoded."""

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
# They read other files, which whoever sent this one may not be meant to see.
_LISTS = frozenset(["concat", "dash", "hls", "imf", "sdp"])


class ClipError(ValueError):
    """A video that cannot be read; the message names the file, the cause and what to do."""


class Damage(Exception):
    """A stream cannot be decoded from `seconds` on; inside `salmonn.media` only, `read_clip` lets none out."""

    def __init__(self, cause: str, seconds: float = math.inf) -> None:
        super().__init__(cause)
        self.seconds = seconds


@dataclass(frozen=True)
class Source:
    """An open file.

    Attributes:
        path: the file.
        container: what libav opened.
        video, audio: the streams to read, None for those that are not wanted or not there.
        origin: the container's time at the start of the file, in seconds.
        tick_seconds: for each stream of the file, the length of one tick of its time stamps.
    """

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

    @property
    def skips_damage(self) -> bool:
        """Whether libav leaves out what it cannot read without a word; a hole in all streams tells of it."""
        streams = self.container.streams
        return "matroska" in self.container.format.name and bool(streams.video and streams.audio)

    @property
    def declared_end(self) -> float:
        """The end that the file states, in seconds from its start; 0 where it states none."""
        return (self.container.duration or 0) / av.time_base

    def seconds(self, pts: int, stream: Any) -> float:
        """A stream's time stamp in seconds from the start of the file."""
        return pts * self.tick_seconds[stream.index] - self.origin


def open_source(path: str | os.PathLike[str], stack: ExitStack, *, video: bool, audio: bool) -> Source:
    """Open a local file; `stack` closes it.

    Args:
        path: a local video or sound file.
        stack: what closes the file.
        video, audio: whether the picture and the sound are wanted.

    Raises:
        ClipError: it cannot be opened, or has neither of what is wanted.
    """
    _check_file(Path(path))
    # A playlist may name addresses: only local files are opened, whatever a stranger's upload says.
    # An absolute path keeps libav from taking a name such as "take:1.mp4" for an address.
    local = {"protocol_whitelist": "file"}
    try:
        container = av.open(str(Path(path).absolute()), options=local, metadata_errors="replace")
    except (av.error.FFmpegError, ValueError) as error:
        raise ClipError(
            f"{path}: is not a video or is damaged at its start ({cause_of(error)}); "
            "check that it plays, or copy or convert it again"
        ) from error
    stack.enter_context(container)
    # libav plays text files as ANSI art.
    if container.format.name == "tty":
        raise ClipError(f"{path}: is a text file; give a video or sound file")
    if _LISTS & set(container.format.name.split(",")):
        raise ClipError(f"{path}: is a list of other files; give a video or sound file itself")
    source = Source(
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


def reopen(source: Source, stack: ExitStack) -> Source:
    """Open the same file again, to read from its start."""
    return open_source(source.path, stack, video=source.video is not None, audio=source.audio is not None)


def declared_seconds(path: str | os.PathLike[str]) -> float:
    """The length in seconds that a file states at its start, which alone is read; 0 where it states none.

    Raises:
        ClipError: it cannot be opened, or holds neither picture nor sound.
    """
    with ExitStack() as stack:
        return open_source(path, stack, video=True, audio=True).declared_end


def measured_seconds(path: str | os.PathLike[str]) -> float:
    """The length in seconds of what a file holds, by all of its packets, none of which is decoded; 0 without times.

    What a file states at its start may be a guess from its bit rate, or of what it held before it was cut off.

    Raises:
        ClipError: as `declared_seconds`.
    """
    end = 0.0
    with ExitStack() as stack:
        source = open_source(path, stack, video=True, audio=True)
        streams = [stream for stream in (source.video, source.audio) if stream is not None]
        try:
            for packet in source.container.demux(streams):
                if packet.pts is not None:
                    end = max(end, source.seconds(packet.pts + (packet.duration or 0), packet.stream))
        except av.error.FFmpegError:
            pass  # from here on it is damaged, which whoever reads it is told
    return end


def _check_file(path: Path) -> None:
    # Python's own errors name the cause; libav's for the same cases do not.
    try:
        if path.is_dir():
            raise ClipError(f"{path}: is a folder; give a file, or one of the videos in it")
        if path.exists() and not path.is_file():
            raise ClipError(f"{path}: is not a regular file; copy the video to one")
        with path.open("rb") as file:
            empty = not file.read(1)
    except FileNotFoundError as error:
        raise ClipError(f"{path}: there is no such file; check the path") from error
    except PermissionError as error:
        raise ClipError(f"{path}: permission denied; give this user the right to read it") from error
    except OSError as error:
        raise ClipError(f"{path}: cannot be opened ({error.strerror}); check path and disk") from error
    if empty:
        raise ClipError(f"{path}: the file is empty; copy or download it again")


def _stream(container: InputContainer, kind: Any) -> Any:
    """The stream of the kind that a player would choose, ready to decode, or None."""
    stream: Any = container.streams.best(kind)
    if stream is None or stream.codec_context is None or stream.disposition & Disposition.attached_pic:
        return None
    if kind == "video":
        codec = stream.codec_context
        # Without this, some damaged pictures are filled in from their neighbours and handed out unmarked.
        codec.options = {"err_detect": "explode"}
        codec.thread_type = "AUTO"
        codec.thread_count = 1 if codec.width * codec.height <= _SINGLE_THREAD_PIXELS else 0
    return stream


def cause_of(error: Exception) -> str:
    """What an error says in words, without libav's number and file name."""
    return getattr(error, "strerror", None) or str(error)


class Decoder:
    """Decodes the packets of one stream up to the first damage."""

    def __init__(self, *, forgiven_errors: int) -> None:
        self._forgiven = forgiven_errors

    def decode(self, packet: Any) -> list[Any]:
        """The frames that a packet brings out, in the order shown.

        Raises:
            Damage: at the first error, but for `forgiven_errors` before the first frame.
        """
        return self._checked(packet.stream, packet)

    def drain(self, stream: Any) -> list[Any]:
        """The frames that the decoder still holds; a seek makes it take packets again. Raises as `decode`."""
        return self._checked(stream, None)

    def _checked(self, stream: Any, packet: Any) -> list[Any]:
        try:
            if packet is not None and packet.is_corrupt:
                raise av.error.InvalidDataError(0, "the file says that this part is damaged")
            frames = stream.decode(packet)
        except av.error.EOFError:
            return []
        except av.error.FFmpegError as error:
            if self._forgiven == 0:
                raise Damage(cause_of(error)) from error
            self._forgiven -= 1
            return []
        if any(frame.is_corrupt for frame in frames):
            raise Damage("a frame is marked as damaged")
        if frames:
            self._forgiven = 0
        return frames
