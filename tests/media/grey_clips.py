"""Clips whose frames have a grey level for each tenth of a second, and whose tones rise every second."""

import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from salmonn.media.clip import Clip, read_clip

MEDIA = Path(__file__).parents[3] / "shared" / "media"
needs_media = pytest.mark.skipif(not MEDIA.is_dir(), reason="the shared media folder is not here")
SOUND_HZ = 44_100


@dataclass(frozen=True)
class Middles:
    """Sampler for the tests: the middles of equal parts of the video, so that no target time is a frame's own time."""

    frames_per_second: float
    max_frames: int
    side: int | None

    def sample_times(self, first, seconds, num_frames):
        count = math.ceil(seconds * self.frames_per_second - 0.5 - 1e-6)
        part = 1.0 / self.frames_per_second
        if not 1 <= count <= self.max_frames:
            count = 1 if count < 1 else self.max_frames
            part = seconds / count
        return first + (np.arange(count) + 0.5) * part

    def frame_size(self, height, width, num_taken):
        return self.side or height, self.side or width


def read(path, *, frames_per_second=2.0, max_frames=16, frame_size=None, **asked) -> Clip:
    return read_clip(path, Middles(frames_per_second, max_frames, frame_size), **asked)


def grey(second: float) -> int:
    """Return the brightness of the frame due at a time: different for each tenth of a second, up to 7 s."""
    return 20 + 3 * round(second * 10)


def write_clip(
    path,
    *,
    picture=(),
    sound_seconds=0.0,
    sound_start=0.0,
    container=None,
    gop=250,
    size=64,
    **options,
):
    """Write a video: a frame of `grey(time)` for each time, and one second of 400 Hz, one of 800 Hz, ..."""
    with av.open(str(path), "w", format=container, options=options) as out:
        video = sound = None
        if len(picture):
            video = out.add_stream("libx264", rate=10, options={"g": str(gop), "crf": "10"})
            video.width = video.height = size
            video.pix_fmt, video.time_base = "yuv420p", Fraction(1, 1000)
            video.codec_context.time_base = Fraction(1, 1000)
        if sound_seconds:
            sound = out.add_stream("aac", rate=SOUND_HZ, layout="stereo")
        for second in picture:
            frame = av.VideoFrame.from_ndarray(np.full((size, size, 3), grey(second), np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(second * 1000), Fraction(1, 1000)
            out.mux(video.encode(frame))
        if video:
            out.mux(video.encode(None))
        if sound:
            at = np.arange(round(sound_seconds * SOUND_HZ)) / SOUND_HZ
            samples = (0.5 * np.sin(2 * np.pi * 400 * (np.floor(at) + 1) * at)).astype(np.float32)
            for first in range(0, len(samples), 1024):
                part = np.repeat(samples[None, first : first + 1024], 2, axis=0)
                frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(part), format="fltp", layout="stereo")
                frame.sample_rate, frame.time_base = SOUND_HZ, Fraction(1, SOUND_HZ)
                frame.pts = first + round(sound_start * SOUND_HZ)
                out.mux(sound.encode(frame))
            out.mux(sound.encode(None))
    return path


def tenths(seconds):
    return np.arange(round(seconds * 10)) / 10


def levels(clip):
    return [frame.mean() for frame in clip.frames]


def assert_levels(clip, seconds):
    """Assert grey levels to within 1.4; the next tenth of a second is 3 levels away."""
    np.testing.assert_allclose(levels(clip), [grey(s) for s in seconds], atol=1.4)


def pitch(waveform, first, last):
    """Return the strongest frequency between two times, in Hz."""
    part = waveform[round(first * 16000) : round(last * 16000)]
    strength = np.abs(np.fft.rfft(part * np.hanning(len(part))))
    return np.argmax(strength) * 16000 / len(part)
