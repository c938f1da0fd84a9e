"""Audio assembled by hand, and audio that cannot be mixed down."""

import math
import wave

import av
import numpy as np
import pytest

from salmonn.media.audio import AudioBuffer
from salmonn.media.clip import ClipError, read_clip
from salmonn.media.container import Decoder
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


@pytest.mark.parametrize(
    ("suffix", "codec"), [("wav", "pcm_s16le"), ("flac", "flac"), ("m4a", "aac"), ("mka", "aac"), ("mp3", "mp3")]
)
def test_a_span_of_long_audio_is_read_without_decoding_what_precedes_it(tmp_path, monkeypatch, suffix, codec):
    path, rate = tmp_path / f"long.{suffix}", 32_000
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate, layout="mono")
        at = np.arange(60 * rate) / rate
        samples = (0.3 * np.sin(2 * np.pi * at * (200 + 10 * at))).astype(np.float32)
        for first in range(0, len(samples), rate):
            frame = av.AudioFrame.from_ndarray(samples[None, first : first + rate], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = rate, first
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    whole = read_clip(path, FixedRateSampler()).waveform
    decoded_seconds = []
    decode = Decoder.decode

    def count(self, packet):
        frames = decode(self, packet)
        decoded_seconds.extend(frame.samples / rate for frame in frames)
        return frames

    monkeypatch.setattr(Decoder, "decode", count)
    span = read_clip(path, FixedRateSampler(), start_seconds=40, end_seconds=45).waveform
    assert sum(decoded_seconds) < 10
    # MP3 has a delay that is no multiple of the sampling interval, so that the resampler's phase differs.
    np.testing.assert_allclose(span, whole[40 * 16000 : 45 * 16000], atol=0.1 if suffix == "mp3" else 1e-3)
