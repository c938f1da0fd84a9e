"""Clips for benchmarks, of any size and length: a moving texture that compresses badly, with a tone."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

FPS = 30
SAMPLE_RATE_HZ = 44_100


def render(path: Path, *, seconds: int, width: int = 1280, height: int = 720, seed: int = 0) -> None:
    """Write an H.264/AAC clip that pans over a texture; colour and pitch depend on the seed."""
    rng = np.random.default_rng(seed)
    brightest, pitch_hz = rng.integers(32, 256, 3), int(rng.integers(110, 1760))
    features = rng.integers(0, brightest, (height // 4, width // 4, 3), dtype=np.uint8)
    texture = features.repeat(8, axis=0).repeat(8, axis=1)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=FPS, options={"preset": "ultrafast"})
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        audio = container.add_stream("aac", rate=SAMPLE_RATE_HZ, layout="mono")
        sounds = _tone(seconds, pitch_hz)
        for number in range(seconds * FPS):
            top, left = 2 * number % height, 3 * number % width
            picture = np.ascontiguousarray(texture[top : top + height, left : left + width])
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(video.encode(frame))
            if number % FPS == 0:
                container.mux(audio.encode(next(sounds)))
        for stream in (video, audio):
            container.mux(stream.encode(None))


def _tone(seconds: int, pitch_hz: int) -> Iterator[av.AudioFrame]:
    """Yield the tone one second at a time."""
    wave = (8000 * np.sin(2 * np.pi * pitch_hz * np.arange(SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ)).astype(np.int16)
    for second in range(seconds):
        sound = av.AudioFrame.from_ndarray(wave[None], format="s16", layout="mono")
        sound.sample_rate, sound.time_base = SAMPLE_RATE_HZ, Fraction(1, SAMPLE_RATE_HZ)
        sound.pts = second * SAMPLE_RATE_HZ
        yield sound
