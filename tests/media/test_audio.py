"""Audio assembled by hand, and audio that cannot be mixed down."""

import math
import wave

import av
import numpy as np
import pytest

from salmonn.media.audio import AudioBuffer
from salmonn.media.clip import ClipError, read_clip
from salmonn.media.frame_sampling import FixedRateSampler


def test_gap_in_the_audio_is_silence():
    audio = AudioBuffer()
    for first in (0.0, 1.0):
        frame = av.AudioFrame.from_ndarray(np.full((1, 8000), 0.5, np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        audio.add(frame, first)
    audio.flush()
    expected = np.repeat(np.array([0.5, 0.0, 0.5], np.float32), 8000)
    np.testing.assert_allclose(audio.waveform(start=0.0, end=math.inf), expected)
    np.testing.assert_allclose(audio.waveform(start=0.25, end=1.25), expected[4000:20000])
    assert audio.waveform(start=1.5, end=math.inf) is None


def test_audio_that_cannot_be_mixed_down_is_reported(tmp_path):
    with wave.open(str(tmp_path / "nine.wav"), "wb") as out:
        out.setnchannels(9)
        out.setsampwidth(2)
        out.setframerate(16000)
        out.writeframes(bytes(18 * 1600))
    with pytest.raises(ClipError, match=r"nine\.wav: .*9 channels.*cannot be mixed down"):
        read_clip(tmp_path / "nine.wav", FixedRateSampler())
