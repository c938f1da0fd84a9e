"""Reads a video file into a `Clip`: a few frames with their times, and the sound at 16 kHz.

    clip = read_clip("talk.mp4", FixedRateSampler(frames_per_second=1.0))

A file is passed over twice. The first pass (`survey.py`) decodes the sound and only notes when each picture is due
and which are keyframes. So the second (`pictures.py`) knows before it decodes anything which frames are wanted and
where each can be reached from. It seeks past stretches between keyframes in which nothing is wanted, leaves out
pictures that no other refers to (`slices.py`), and stops at the last that is wanted. Other threads scale frames while
the next are decoded. A file that is not as the survey says is read more plainly.
"""

import logging
import math
import os
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from salmonn.media.audio import SAMPLE_RATE_HZ
from salmonn.media.container import ClipError, open_source
from salmonn.media.frame_sampling import FrameSampler
from salmonn.media.index import StreamIndex, index_streams
from salmonn.media.video import decode_frames, frame_times_in_span

logger = logging.getLogger(__name__)

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
AUDIO_SUFFIXES = frozenset([".aac", ".aif", ".aiff", ".flac", ".m4a", ".mp3", ".oga", ".ogg", ".opus", ".wav", ".wma"])


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
        video_seconds: for how long the picture lasts within the span; 0 without.
        duration_seconds: from there to the later of the picture's and the sound's ends within the span.
    """

    path: str
    frames: np.ndarray
    frame_times: np.ndarray
    waveform: np.ndarray | None
    start_seconds: float
    video_seconds: float
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
    sampler: FrameSampler,
    *,
    start_seconds: float | None = None,
    end_seconds: float | None = None,
    video: bool = True,
    audio: bool = True,
) -> Clip:
    """Read frames and sound of a video, or of the part of it between two times.

    A damaged file gives what decodes before the damage, with a warning in the log; damage in a stretch that
    is sought past is not noticed, nor is damage that leaves no trace (bits that nothing checks).

    Args:
        path: a local video or sound file.
        sampler: which frames are taken, and at what size.
        start_seconds, end_seconds: the span, from the start of the file; None is the file's own start or end.
        video, audio: whether to read the picture and the sound. With both, a file with one of them will do.

    Returns:
        A `Clip`; times are measured from the earliest of the file's streams.

    Raises:
        ClipError: the file cannot be read, has nothing of what was asked for, or ends before `start_seconds`.
        ValueError: an argument makes no sense.
    """
    _check_arguments(start_seconds, end_seconds)
    if not (video or audio):
        raise ValueError("video and audio are both False, which leaves nothing to read; set one to True")
    start, end = start_seconds or 0.0, math.inf if end_seconds is None else end_seconds
    with ExitStack() as stack:
        source = open_source(path, stack, video=video, audio=audio)
        survey = index_streams(source, stack, start=start, end=end)
        wanted = frame_times_in_span(survey, sampler, start=start, end=end)
        frames = decode_frames(survey, wanted, sampler=sampler, stack=stack) if len(wanted) else []
        return _assemble(survey, wanted, frames, start, end)


def _check_arguments(start: float | None, end: float | None) -> None:
    # Written so that NaN, which compares false with everything, is refused too.
    if start is not None and not 0 <= start < math.inf:
        raise ValueError(f"start_seconds is {start}; it must be 0 or more")
    if end is not None and not end > (start or 0.0):
        raise ValueError(f"end_seconds is {end}; it must be greater than start_seconds ({start or 0.0})")


def _assemble(
    survey: StreamIndex, wanted: np.ndarray, frames: list[np.ndarray | None], start: float, end: float
) -> Clip:
    waveform = survey.sound.waveform(start=start, end=end)
    taken = [(time, frame) for time, frame in zip(wanted, frames, strict=False) if frame is not None]
    if not taken and waveform is None:
        raise ClipError(_why_nothing(survey, start))
    _warn_of_losses(survey, len(wanted) - len(taken), end)
    picture_end = min(survey.picture_end, end)
    sound_seconds = 0.0 if waveform is None else len(waveform) / SAMPLE_RATE_HZ
    return Clip(
        path=survey.source.path,
        frames=np.stack([frame for _, frame in taken]) if taken else np.zeros((0, 0, 0, 3), np.uint8),
        frame_times=np.array([time for time, _ in taken], np.float64),
        waveform=waveform,
        start_seconds=start,
        video_seconds=picture_end - max(start, survey.times[0]) if taken else 0.0,
        duration_seconds=max(picture_end - start, sound_seconds),
    )


def _why_nothing(survey: StreamIndex, start: float) -> str:
    path = survey.source.path
    if survey.damage is not None:
        return f"{path}: is damaged and nothing decodes ({survey.damage}); copy or download it again"
    if 0 < survey.end <= start:
        return f"{path}: start_seconds is {start}, but the file ends at {survey.end:.2f} s; start earlier"
    return f"{path}: nothing with a time stamp decodes in the span; check that it plays there, or convert it"


def _warn_of_losses(survey: StreamIndex, frames_lost: int, end: float) -> None:
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
    if survey.cut:
        logger.warning(
            "%s: breaks off; of %.2f s, %.2f s of picture and %.2f s of sound were read",
            path,
            min(end, survey.source.declared_end),
            survey.picture_end,
            survey.sound.end,
        )
