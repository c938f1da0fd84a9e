"""Specifications of what is read of a file, which reader processes receive; so nothing here imports torch."""

from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np

from salmonn.media.clip import Clip, read_clip
from salmonn.media.container import ClipError, NoAudioError, declared_seconds, open_media
from salmonn.media.frame_sampling import FixedRateSampler, FrameSampler
from salmonn.media.index import measured_seconds


@dataclass(frozen=True)
class ReadSpec:
    """What to read of a file; the fields are arguments of `read_clip`."""

    sampler: FrameSampler
    start_seconds: float | None = None
    end_seconds: float | None = None
    video: bool = True
    audio: bool = True
    reader: str = "pyav"

    def read(self, path: Path | str) -> Clip:
        """Read a file; raises what `read_clip` raises."""
        return read_clip(path, **{field.name: getattr(self, field.name) for field in fields(ReadSpec)})

    def seconds(self, path: Path, *, exact: bool = False) -> float:
        """Return the length of the span; 0 or less if the file does not state it or cannot be read.

        Args:
            path: video or audio file.
            exact: measure the length from all packets instead of trusting the header.
        """
        try:
            whole = measured_seconds(path) if exact else declared_seconds(path)
        except ClipError:
            return 0.0
        return self.span_seconds(whole)

    def span_seconds(self, whole: float) -> float:
        """Return the length of the span within a file of the given length."""
        return min(whole, self.end_seconds or whole) - (self.start_seconds or 0.0)


@dataclass(frozen=True)
class LimitedReadSpec(ReadSpec):
    """A `ReadSpec` for untrusted files that rejects spans above a maximum length.

    Args:
        max_seconds: maximum length of the span.
    """

    max_seconds: float = 3600.0

    def read(self, path: Path | str) -> Clip:
        """Read a file; raises what `read_clip` raises, and a ClipError if the span is too long."""
        with ExitStack() as stack:
            source = open_media(path, stack, video=self.video, audio=self.audio)
            declared = self.span_seconds(source.declared_end)
        if declared > self.max_seconds:  # the header may be wrong
            check_duration(path, self.span_seconds(measured_seconds(path)), max_seconds=self.max_seconds)
        # A file may also state less than it holds, or nothing: reading stops a second after the limit.
        limit = (self.start_seconds or 0.0) + self.max_seconds + 1
        clip = ReadSpec.read(replace(self, end_seconds=min(limit, self.end_seconds or limit)), path)
        check_duration(path, clip.duration_seconds, max_seconds=self.max_seconds)
        return clip


@dataclass(frozen=True)
class AudioReadSpec(ReadSpec):
    """A `ReadSpec` for audio alone, in which a video without audio is a clip without a waveform."""

    sampler: FrameSampler = field(default_factory=lambda: FixedRateSampler(frames_per_second=1.0))  # not used
    video: bool = False

    def read(self, path: Path | str) -> Clip:
        """Read a file; raises what `read_clip` raises."""
        try:
            return super().read(path)
        except NoAudioError:
            return Clip(str(path), np.zeros((0, 0, 0, 3), np.uint8), np.zeros(0), None, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class SeparateAudioSpec(ReadSpec):
    """A `ReadSpec` for a video with its audio in another file.

    Args:
        sound: audio file.
    """

    sound: Path | None = None

    def read(self, path: Path | str) -> Clip:
        """Read the files; raises what `read_clip` raises."""
        assert self.sound is not None, "without a sound file, a ReadSpec reads the clip"
        if not self.video:
            return ReadSpec.read(self, self.sound)
        clip = ReadSpec.read(replace(self, audio=False), path)
        if not self.audio:
            return clip
        audio = ReadSpec.read(replace(self, video=False), self.sound)
        warnings = (*clip.warnings, *audio.warnings)
        is_complete = clip.is_complete and audio.is_complete
        return replace(clip, waveform=audio.waveform, warnings=warnings, is_complete=is_complete)


def check_duration(path: Path | str, seconds: float, *, max_seconds: float) -> None:
    """Raise a ClipError if a clip is too long."""
    if seconds > max_seconds:
        raise ClipError(
            f"{path}: the clip has {seconds:.0f} s or more, and the maximum is {max_seconds:g} s: choose a part of it "
            "with start and end"
        )
