"""Audio files that are joined, written to a pipe, or damaged.

Each test builds files of one kind, after public reports about such files.
"""

import random
import struct
import wave
from itertools import pairwise

import numpy as np
import pytest

from tests.media.builders import (
    assert_loss_is_told,
    assert_seconds,
    assert_span,
    assert_tones,
    assert_whole,
    concatenate,
    pitch,
    read,
    write_media,
)


def write_chain(tmp_path, codec, bounds, rates):
    """Write the content between each two bounds as a link of a chained Ogg file; each link's time begins at 0."""
    parts = []
    for number, (start, end) in enumerate(pairwise(bounds)):
        part = tmp_path / f"{number}.ogg"
        # libav's encoder of Vorbis needs stereo.
        rate = rates[number]
        write_media(part, audio=(start, end), audio_codec=codec, shift=-start, sample_rate=rate, layout="stereo")
        parts.append(part)
    return concatenate(tmp_path / "chain.ogg", parts)


@pytest.mark.parametrize("codec", ["vorbis", "libopus", "flac"])
@pytest.mark.parametrize("bounds", [(0, 3, 6), (0, 2, 4, 6)])
def test_chained_ogg(tmp_path, codec, bounds):
    path = write_chain(tmp_path, codec, bounds, [48_000] * 3)
    clip = read(path)
    assert_seconds(clip, audio=6)
    assert_tones(clip)
    assert_whole(clip)
    assert_span(path, video=False)


def test_chained_vorbis_of_another_rate_is_told(tmp_path):
    # libav does not read on.
    clip = read(write_chain(tmp_path, "vorbis", (0, 3, 6), (48_000, 24_000)))
    assert_tones(clip, {0: 400, 1: 600})
    assert_loss_is_told(clip)


@pytest.mark.parametrize(
    ("suffix", "codec", "rates"),
    [
        ("mp3", "libmp3lame", (44_100, 44_100)),
        ("mp3", "libmp3lame", (44_100, 48_000)),
        ("mp3", "libmp3lame", (22_050, 44_100)),
        ("aac", "aac", (44_100, 44_100)),
        ("aac", "aac", (44_100, 48_000)),
        ("ac3", "ac3", (48_000, 48_000)),
    ],
)
def test_joined_audio_files(tmp_path, suffix, codec, rates):
    parts = [
        write_media(tmp_path / f"{start}.{suffix}", audio=(start, start + 3), audio_codec=codec, sample_rate=rate,
                    shift=-start, container="adts" if suffix == "aac" else None)
        for start, rate in zip((0, 3), rates, strict=True)
    ]  # fmt: skip
    clip = read(concatenate(tmp_path / f"joined.{suffix}", parts))
    # Encoders add up to 50 ms in front of each part.
    assert 5.95 < clip.duration_seconds < 6.2
    assert_tones(clip, shift=0.05)
    assert_whole(clip)


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [
        ("wav", "pcm_s16le"),
        ("flac", "flac"),
        ("mp3", "libmp3lame"),
        ("wav", "adpcm_ima_wav"),
        ("wav", "adpcm_ms"),
    ],
)
def test_a_span_of_an_audio_file(tmp_path, suffix, codec):
    path = write_media(tmp_path / f"voice.{suffix}", audio=(0, 6), audio_codec=codec)
    if codec.startswith("adpcm"):  # a byte rate that is too low, as ffmpeg 5 writes it
        data = path.read_bytes()
        path.write_bytes(data[:28] + struct.pack("<I", 16_000) + data[32:])
    assert_span(path, video=False)
    assert_seconds(read(path, start_seconds=4.25), audio=1.75)


@pytest.mark.parametrize("sizes", [(0xFFFFFFFF, 0xFFFFFFFF), (0, 0), (0x7FFFFFFF, 0x7FFFFFDB)])
@pytest.mark.parametrize("num_samples", [96_000, 95_999])
def test_wav_written_to_a_pipe(tmp_path, sizes, num_samples):
    path = tmp_path / "piped.wav"
    with wave.open(str(path), "wb") as out:
        out.setparams((1, 2, 16_000, 0, "NONE", ""))
        samples = 10_000 * np.sin(2 * np.pi * 400 / 16_000 * np.arange(num_samples))
        out.writeframes(samples.astype("<i2").tobytes())
    data = bytearray(path.read_bytes())
    data[4:8], data[40:44] = (struct.pack("<I", size) for size in sizes)
    path.write_bytes(data)
    clip = read(path)
    assert len(clip.waveform) == num_samples
    assert clip.duration_seconds == num_samples / 16_000
    assert pitch(clip.waveform, 5.0, num_samples / 16_000) == pytest.approx(400, abs=5)
    assert_whole(clip)


@pytest.mark.parametrize(
    ("suffix", "codec", "container"), [("mp3", "libmp3lame", None), ("aac", "aac", "adts"), ("ac3", "ac3", None)]
)
@pytest.mark.parametrize("layout", ["mono", "stereo"])
def test_audio_goes_on_after_a_bad_frame(tmp_path, suffix, codec, container, layout):
    path = write_media(
        tmp_path / f"bad.{suffix}",
        audio=(0, 6),
        audio_codec=codec,
        container=container,
        layout=layout,
        sample_rate=44_100,
    )
    data = bytearray(path.read_bytes())
    place = len(data) // 3
    data[place : place + 400] = random.Random(1).randbytes(400)
    path.write_bytes(data)
    clip = read(path)
    assert 4.9 < clip.duration_seconds < 6.15
    assert_tones(clip, {0: 400})
    end = clip.duration_seconds
    assert [pitch(clip.waveform, end - back - 0.8, end - back - 0.15) for back in (2, 1, 0)] == [
        pytest.approx(tone, abs=6) for tone in (1000, 1200, 1400)
    ]
    assert_loss_is_told(clip)
