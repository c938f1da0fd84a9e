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


def write_wav(path, samples):
    """Write (C, S) samples, without names of the channels."""
    with wave.open(str(path), "wb") as out:
        out.setnchannels(len(samples))
        out.setsampwidth(2)
        out.setframerate(16000)
        out.writeframes(np.round(samples.T * 32767).astype("<i2").tobytes())
    return path


def test_audio_that_cannot_be_mixed_down_is_reported(tmp_path):
    path = write_wav(tmp_path / "hundred.wav", np.zeros((100, 1600)))
    with pytest.raises(ClipError, match=r"hundred\.wav: .*100 channels.*cannot be mixed down"):
        read_clip(path, FixedRateSampler())


SIDE = math.sqrt(0.5) / 2
LEVELS = {
    "mono": {"FC": 1},
    "stereo": {"FL": 0.5, "FR": 0.5},
    "3.0": {"FL": 0.5, "FR": 0.5, "FC": 1},
    "quad": {"FL": 0.5, "FR": 0.5, "BL": SIDE, "BR": SIDE},
    "5.1": {"FL": 0.5, "FR": 0.5, "FC": 1, "LFE": 0, "BL": SIDE, "BR": SIDE},
    "5.1(side)": {"FL": 0.5, "FR": 0.5, "FC": 1, "LFE": 0, "SL": SIDE, "SR": SIDE},
    "7.1": {"FL": 0.5, "FR": 0.5, "FC": 1, "LFE": 0, "BL": SIDE, "BR": SIDE, "SL": SIDE, "SR": SIDE},
}


@pytest.mark.parametrize("sample_format", ["s16", "s32", "flt", "fltp"])
@pytest.mark.parametrize("layout", LEVELS)
def test_each_channel_has_its_level_in_the_mix(layout, sample_format):
    names = [channel.name for channel in av.AudioLayout(layout).channels]
    assert names == list(LEVELS[layout])
    # A second of each channel alone, then one of all.
    values = np.concatenate([np.eye(len(names)), np.ones((len(names), 1))], axis=1) * 0.25
    samples = values.repeat(16000, axis=1).astype(np.float32)
    packed = av.AudioFrame.from_ndarray(samples.T.reshape(1, -1), format="flt", layout=layout)
    packed.sample_rate = 16000
    (frame,) = av.AudioResampler(format=sample_format).resample(packed)
    audio = AudioBuffer()
    audio.add(frame, 0.0)
    audio.flush()
    levels = audio.waveform(start=0.0, end=math.inf).reshape(-1, 16000)[:, 8000] / 0.25
    expected = list(LEVELS[layout].values())
    np.testing.assert_allclose(levels, [*expected, sum(expected)], atol=2e-4)


@pytest.mark.parametrize("suffix", ["m4a", "opus"])
def test_planar_audio_of_eight_channels_is_read(tmp_path, suffix):
    tone = 0.25 * np.sin(np.arange(48000) * 0.05).astype(np.float32)
    samples = np.zeros((48000, 8), np.float32)
    samples[:, 2] = tone  # center
    with av.open(str(tmp_path / f"surround.{suffix}"), "w") as out:
        codec, options = ("aac", {}) if suffix == "m4a" else ("libopus", {"mapping_family": "1"})
        stream = out.add_stream(codec, rate=48000, layout="7.1", options=options)
        frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), format="flt", layout="7.1")
        frame.sample_rate, frame.pts = 48000, 0
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    waveform = read_clip(tmp_path / f"surround.{suffix}", FixedRateSampler()).waveform
    assert waveform[2000:14000].std() == pytest.approx(tone.std(), rel=0.05)


@pytest.mark.parametrize("num_channels", [3, 4, 6, 8, 9, 12, 16, 24, 60, 64])
def test_unnamed_channels_are_mixed(tmp_path, num_channels):
    samples = np.full((num_channels, 8000), 0.25)
    samples[2] = 0.5
    waveform = read_clip(write_wav(tmp_path / "many.wav", samples), FixedRateSampler()).waveform
    # Six are taken for 5.1 and eight for 7.1, whose third channel is the center; others are averaged.
    surround = {6: 0.25 * (1 + 2 * SIDE) + 0.5, 8: 0.25 * (1 + 4 * SIDE) + 0.5}
    assert waveform[4000] == pytest.approx(surround.get(num_channels, 0.25 + 0.25 / num_channels), abs=1e-3)


@pytest.mark.parametrize(
    ("suffix", "codec"), [("wav", "pcm_s16le"), ("flac", "flac"), ("m4a", "aac"), ("mka", "aac"), ("mp3", "mp3")]
)
def test_a_span_of_long_audio_is_read_without_decoding_what_precedes_it(tmp_path, monkeypatch, suffix, codec):
    path, rate = tmp_path / f"long.{suffix}", 32_000
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate, layout="mono")
        at = np.arange(30 * rate) / rate
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
    span = read_clip(path, FixedRateSampler(), start_seconds=20, end_seconds=25).waveform
    assert sum(decoded_seconds) < 10
    # MP3 has a delay that is no multiple of the sampling interval, so that the resampler's phase differs.
    np.testing.assert_allclose(span, whole[20 * 16000 : 25 * 16000], atol=0.1 if suffix == "mp3" else 1e-3)
