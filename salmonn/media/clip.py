"""Reading of a video file into a `Clip`: a few frames with their times, and the audio at 16 kHz.

    clip = read_clip("talk.mp4", FixedRateSampler(frames_per_second=1.0))

A file is read in two passes. The first (`index.py`) decodes the audio and only notes when each video frame is due and
which frames are keyframes. The second (`video.py`) therefore knows before decoding which frames are needed and how each
can be reached: it seeks past parts without any, skips frames that no other refers to, and stops after the last one.
Other threads scale frames while the next are decoded. A file that differs from its index is read without shortcuts.
"""

import logging
import math
import os
from contextlib import ExitStack
from dataclasses import dataclass

import av
import numpy as np

from salmonn.media.audio import SAMPLE_RATE_HZ
from salmonn.media.container import ClipError, cause_of, open_media
from salmonn.media.frame_sampling import FrameSampler
from salmonn.media.index import StreamIndex, index_streams
from salmonn.media.video import decode_frames, target_times
from salmonn.records import Modality

logger = logging.getLogger(__name__)

# Suffixes by which files are found in folders; a file that is named itself is read whatever its suffix. GIF and APNG
# are mostly animated. Pictures are left out, also WebP (libav reads no animated ones), AVIF and HEIC.
VIDEO_SUFFIXES = frozenset([
    ".264", ".265", ".3g2", ".3gp", ".3gpp", ".amv", ".apng", ".asf", ".avc", ".avi", ".dav", ".divx", ".dv", ".dvr-ms",
    ".f4v", ".flv", ".gif", ".h264", ".h265", ".hevc", ".ismv", ".ivf", ".m1v", ".m2p", ".m2t", ".m2ts", ".m2v", ".m4v",
    ".mjpeg", ".mjpg", ".mk3d", ".mkv", ".mod", ".mov", ".mp4", ".mp4v", ".mpe", ".mpeg", ".mpeg4", ".mpg", ".mpv",
    ".mts", ".mxf", ".nut", ".ogm", ".ogv", ".ogx", ".qt", ".rm", ".rmvb", ".tod", ".trp", ".ts", ".vob", ".webm",
    ".wmv", ".wtv", ".y4m",
])  # fmt: skip
AUDIO_SUFFIXES = frozenset([
    ".aac", ".ac3", ".adts", ".aif", ".aifc", ".aiff", ".amr", ".ape", ".au", ".awb", ".bwf", ".caf", ".dts", ".eac3",
    ".ec3", ".f4a", ".flac", ".m2a", ".m4a", ".m4b", ".m4r", ".mka", ".mp2", ".mp3", ".mpa", ".mpc", ".mpga", ".oga",
    ".ogg", ".opus", ".ra", ".rf64", ".snd", ".spx", ".tta", ".voc", ".w64", ".wav", ".weba", ".wma", ".wv",
])  # fmt: skip


@dataclass(frozen=True)
class Clip:
    """Frames and audio of a video, or of a span of it.

    Attributes:
        path: the file.
        frames: (F, H, W, 3) uint8 RGB, upright; F is 0 if there is no video in the span.
        frame_times: (F,) float64, rising; the sampled times, in seconds from the start of the file (not of the span).
            A frame's own timestamp is at or before its time.
        waveform: (S,) float32 mono at 16 kHz, or None if there is no audio in the span. Sample 0 is the
            start of the span; S ends with the audio or the span, so before or after the video does.
        start_seconds: start of the span, from the start of the file.
        video_seconds: duration of the video within the span; 0 without video.
        duration_seconds: time from the start of the span to the later end of video and audio within it.
        warnings: what was lost or had to be guessed, one sentence each without the file's name.
        is_complete: False if a part of the span is missing, because the file is damaged or truncated.
    """

    path: str
    frames: np.ndarray
    frame_times: np.ndarray
    waveform: np.ndarray | None
    start_seconds: float
    video_seconds: float
    duration_seconds: float
    warnings: tuple[str, ...] = ()
    is_complete: bool = True

    @property
    def has_video(self) -> bool:
        """Whether there is at least one frame."""
        return len(self.frames) > 0

    @property
    def has_audio(self) -> bool:
        """Whether there is audio."""
        return self.waveform is not None

    @property
    def modality(self) -> Modality:
        """What there is of frames and audio."""
        return "audio" if not self.has_video else "both" if self.has_audio else "visual"


def read_clip(
    path: str | os.PathLike[str],
    sampler: FrameSampler,
    *,
    start_seconds: float | None = None,
    end_seconds: float | None = None,
    video: bool = True,
    audio: bool = True,
    reader: str = "pyav",
) -> Clip:
    """Read frames and audio of a video, or of the span between two times.

    What libav decodes is returned. After damage, reading resumes at the next frame that decodes; `warnings` report what
    was lost. Damage in a part that is skipped by seeking is not noticed, nor is damage that leaves no trace (bits
    without a checksum). Where the clock restarts or jumps, as in joined recordings, times continue.

    Args:
        path: a local video or audio file.
        sampler: rule that selects the frames and their size.
        start_seconds, end_seconds: the span, from the start of the file; None for the file's own start or end.
        video, audio: whether to read video and audio. With both, a file that has one of them is read as well.
        reader: decoder of the frames: pyav, decord or torchcodec, the latter two with :cuda for a GPU. Whatever it
            is, PyAV decodes the audio and the files that the others read wrongly, and checks the first frame.

    Returns:
        A `Clip`; times are measured from the earliest of the file's streams.

    Raises:
        ClipError: the file cannot be read, has nothing of what was requested, ends before `start_seconds`, or has video
            without a frame that decodes.
        ValueError: an argument is invalid.
    """
    # The conditions are false for NaN, which compares false with everything.
    if start_seconds is not None and not 0 <= start_seconds < math.inf:
        raise ValueError(f"start_seconds is {start_seconds}; it must be 0 or more")
    if end_seconds is not None and not end_seconds > (start_seconds or 0.0):
        raise ValueError(
            f"end_seconds is {end_seconds}; it must be greater than start_seconds ({start_seconds or 0.0})"
        )
    if not (video or audio):
        raise ValueError("video and audio are both False, which leaves nothing to read; set one to True")
    start, end = start_seconds or 0.0, math.inf if end_seconds is None else end_seconds
    with ExitStack() as stack:
        file = open_media(path, stack, video=video, audio=audio)
        try:
            index = index_streams(file, stack, start=start, end=end)
            targets = target_times(index, sampler, start=start, end=end)
            frames: list[np.ndarray | None] = []
            if len(targets):
                frames = decode_frames(index, targets, sampler=sampler, stack=stack, reader=reader)
        except av.error.FFmpegError as error:  # of a file that misleads libav
            raise ClipError(f"{path}: is damaged ({cause_of(error)}); copy or download it again") from error
        return _make_clip(index, targets, frames, start, end)


def _make_clip(
    index: StreamIndex, targets: np.ndarray, frames: list[np.ndarray | None], start: float, end: float
) -> Clip:
    path = index.file.path
    waveform = index.audio.waveform(start=start, end=end)
    decoded = [(time, frame) for time, frame in zip(targets, frames, strict=True) if frame is not None]
    if not decoded and (waveform is None or len(targets)):
        raise ClipError(f"{path}: {_explain_empty(index, start, has_audio=waveform is not None)}")
    losses = _describe_losses(index, start, end)
    warnings = losses + ([index.display_warning] if index.display_warning else [])
    if warnings:
        logger.warning("%s: %s", path, "; ".join(warnings))
    video_end = min(index.video_end, end)
    audio_seconds = 0.0 if waveform is None else len(waveform) / SAMPLE_RATE_HZ
    return Clip(
        path=path,
        frames=np.stack([frame for _, frame in decoded]) if decoded else np.zeros((0, 0, 0, 3), np.uint8),
        frame_times=np.array([time for time, _ in decoded], np.float64),
        waveform=waveform,
        start_seconds=start,
        video_seconds=video_end - max(start, index.frame_times[0]) if decoded else 0.0,
        duration_seconds=max(video_end - start, audio_seconds),
        warnings=tuple(warnings),
        is_complete=not losses,
    )


def _explain_empty(index: StreamIndex, start: float, *, has_audio: bool) -> str:
    """Return why there is nothing to return, and what to do."""
    if index.file.format_name.startswith("webp"):
        return "is a WebP image that libav cannot decode, such as an animation; convert it to GIF or MP4"
    if has_audio:
        reason = f" ({index.error})" if index.error else ""
        return f"none of its video frames decodes{reason}; convert it, or caption its audio (--modality audio)"
    if index.error is not None:
        return f"is damaged and nothing decodes ({index.error}); copy or download it again"
    if 0 < index.end <= start:
        return f"the start is at {start} s, but the file ends at {index.end:.2f} s; start earlier"
    return "nothing decodes in the span; check that it plays there, or convert it"


def _describe_losses(index: StreamIndex, start: float, end: float) -> list[str]:
    """Return what of the span is lost, one sentence each."""
    warnings = []
    for seconds, duration in _merge(index.missing, start, end):
        warnings.append(f"{duration:.2f} s are missing at {seconds:.1f} s, where the container is damaged")
    frames = [seconds for seconds, _ in index.video_damage if start <= seconds < end]
    if frames:
        place = f"at {frames[0]:.1f} s" if frames[-1] - frames[0] < 1 else f"from {frames[0]:.1f} to {frames[-1]:.1f} s"
        warnings.append(f"{len(frames)} damaged video frame{'s' if len(frames) > 1 else ''} {place}")
    # The last packet of a truncated file is incomplete.
    losses = _merge(index.audio_damage[: -1 if index.is_truncated else None], start, end)
    if losses:
        places = "" if len(losses) == 1 else f" in {len(losses)} places, the first"
        lost = sum(duration for _, duration in losses)
        warnings.append(f"lost {lost:.2f} s of audio{places} at {losses[0][0]:.1f} s")
    if index.file.audio is not None and index.error is not None and index.audio.end == 0:
        warnings.append(f"none of the audio decodes ({index.error})")
    if index.has_new_streams:
        warnings.append(f"after {index.file_end:.1f} s, the file continues in new streams; split it there to read them")
    if index.is_truncated and index.error:
        warnings.append(f"reading stopped at {index.file_end:.1f} s ({index.error})")
    elif index.is_truncated:
        declared = max(min(end, index.file.declared_end), index.file_end)
        warnings.append(f"the file is truncated: it ends at {index.file_end:.1f} s of {declared:.1f} s")
    return warnings


def _merge(losses: list[tuple[float, float]], start: float, end: float) -> list[tuple[float, float]]:
    """Merge the (time, duration) of losses in the span that follow each other."""
    merged: list[tuple[float, float]] = []
    for seconds, duration in losses:
        if start - duration <= seconds < end:
            if merged and seconds - sum(merged[-1]) < 0.01:
                merged[-1] = (merged[-1][0], seconds + duration - merged[-1][0])
            else:
                merged.append((seconds, duration))
    return merged
