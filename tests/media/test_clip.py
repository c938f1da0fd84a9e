"""Clips written at test time with known colours and tones at known times, and real files of shared/media."""

import logging
import math
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from salmonn.media import container as container_module
from salmonn.media import index as index_module
from salmonn.media.clip import ClipError
from salmonn.media.container import Decoder, MediaFile
from tests.launch import forked
from tests.media.grey_clips import MEDIA, SOUND_HZ, assert_levels, levels, needs_media, pitch, read, tenths, write_clip


def test_frames_are_those_on_screen_at_the_middles(whole):
    clip = read(whole, frames_per_second=2)
    np.testing.assert_allclose(clip.frame_times, [0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.25, 3.75])
    assert_levels(clip, [0.2, 0.7, 1.2, 1.7, 2.2, 2.7, 3.2, 3.7])
    assert clip.frames.shape == (8, 64, 64, 3) and clip.frames.dtype == np.uint8
    assert clip.has_video and clip.has_audio and clip.path == str(whole) and clip.start_seconds == 0


def test_a_frame_is_on_screen_from_its_own_time_on(whole):
    # Middles of 1 s parts are 0.5, 1.5, ...: exactly when the frames of those times are due.
    assert_levels(read(whole, frames_per_second=1), [0.5, 1.5, 2.5, 3.5])


def test_max_frames_spreads_evenly(whole):
    clip = read(whole, frames_per_second=10, max_frames=5)
    np.testing.assert_allclose(clip.frame_times, [0.4, 1.2, 2.0, 2.8, 3.6])
    assert_levels(clip, [0.4, 1.2, 2.0, 2.8, 3.6])


@pytest.mark.parametrize(("rate", "expected"), [(0.4, [1.25, 3.75]), (0.3, [5 / 3]), (0.1, [2.0])])
def test_rates_that_do_not_divide_the_length(whole, rate, expected):
    np.testing.assert_allclose(read(whole, frames_per_second=rate).frame_times, expected)


def test_audio_is_16_khz_mono_with_each_tone_at_its_time(whole):
    clip = read(whole)
    assert clip.waveform.dtype == np.float32 and clip.waveform.ndim == 1
    assert abs(len(clip.waveform) - 64000) <= 16000 * 1024 / SOUND_HZ  # AAC ends on a whole packet
    assert clip.duration_seconds == len(clip.waveform) / 16000
    for second in range(4):
        assert abs(pitch(clip.waveform, second + 0.02, second + 0.98) - 400 * (second + 1)) < 2
    # Two equal channels mix to the same strength: a sine of 0.5 has 0.3536 root mean square.
    assert abs(np.sqrt(np.mean(clip.waveform[1600:14400] ** 2)) - 0.3536) < 0.01


def test_a_span_cuts_video_and_audio(whole):
    clip = read(whole, start_seconds=1.5, end_seconds=3.5, frames_per_second=2)
    np.testing.assert_allclose(clip.frame_times, [1.75, 2.25, 2.75, 3.25])
    assert_levels(clip, [1.7, 2.2, 2.7, 3.2])
    assert (clip.start_seconds, clip.duration_seconds, len(clip.waveform)) == (1.5, 2.0, 32000)
    assert abs(pitch(clip.waveform, 0.02, 0.48) - 800) < 4
    assert abs(pitch(clip.waveform, 0.52, 1.48) - 1200) < 4


def test_span_reached_by_a_seek_equals_the_same_part_of_the_whole(whole):
    part, full = (
        read(whole, start_seconds=3.25, frames_per_second=4),
        read(whole, frames_per_second=4),
    )
    np.testing.assert_allclose(part.frame_times, [3.375, 3.625, 3.875])
    np.testing.assert_array_equal(part.frames, full.frames[13:])
    # Audio is placed to the nearest sample: for 1600 Hz at 0.5, half a sample is 0.157, a whole one 0.31.
    np.testing.assert_allclose(part.waveform, full.waveform[52000:], atol=0.16)


def test_variable_frame_rate_follows_the_timestamps(tmp_path):
    path = write_clip(tmp_path / "uneven.mp4", picture=[0.0, 0.1, 0.2, 1.9, 2.0, 3.9])
    clip = read(path, frames_per_second=2, end_seconds=3.5)
    np.testing.assert_allclose(clip.frame_times, [0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.25])
    assert_levels(clip, [0.2, 0.2, 0.2, 0.2, 2.0, 2.0, 2.0])


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "ts", "mov"])
@pytest.mark.parametrize("start", [None, 3.0])
def test_every_container_gives_the_same_clip(tmp_path, suffix, start):
    path = write_clip(tmp_path / f"clip.{suffix}", picture=tenths(4), gop=10)
    clip = read(path, frames_per_second=2, start_seconds=start)
    expected = np.arange(start or 0, 4, 0.5) + 0.25
    np.testing.assert_allclose(clip.frame_times, expected, atol=1e-6)
    assert_levels(clip, expected - 0.05)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_audio_that_starts_late_stays_in_sync(tmp_path, suffix):
    path = write_clip(tmp_path / f"late.{suffix}", picture=tenths(3), sound_seconds=1, sound_start=1.5)
    clip = read(path)
    assert np.abs(clip.waveform[: round(1.4 * 16000)]).max() == 0
    assert abs(pitch(clip.waveform, 1.55, 2.45) - 400) < 4
    onset = np.argmax(np.abs(clip.waveform) > 0.1) / 16000
    assert abs(onset - 1.5) < 0.03
    assert_levels(clip, [0.2, 0.7, 1.2, 1.7, 2.2, 2.7])
    cut = read(path, start_seconds=1.0, end_seconds=2.0)
    assert abs(np.argmax(np.abs(cut.waveform) > 0.1) / 16000 - 0.5) < 0.03


def test_video_that_starts_late_has_no_earlier_frames(tmp_path):
    path = write_clip(tmp_path / "late.mp4", picture=tenths(3)[10:], sound_seconds=3)
    clip = read(path)
    np.testing.assert_allclose(clip.frame_times, [1.25, 1.75, 2.25, 2.75], atol=1e-3)
    assert_levels(clip, [1.2, 1.7, 2.2, 2.7])
    assert abs(pitch(clip.waveform, 1.05, 1.95) - 800) < 4


@pytest.mark.parametrize(("picture", "sound"), [(2, 4), (4, 2)])
def test_audio_and_video_of_different_lengths(tmp_path, picture, sound):
    clip = read(write_clip(tmp_path / "uneven.mp4", picture=tenths(picture), sound_seconds=sound))
    assert len(clip.frames) == 2 * picture and clip.frame_times[-1] == picture - 0.25
    assert abs(len(clip.waveform) / 16000 - sound) < 0.03
    assert abs(clip.duration_seconds - 4) < 0.03


def test_a_span_after_the_video_has_audio_only(tmp_path):
    path = write_clip(tmp_path / "long.mp4", picture=tenths(1), sound_seconds=4)
    clip = read(path, start_seconds=2.0, end_seconds=3.0)
    assert not clip.has_video and clip.frames.shape[0] == 0 and clip.duration_seconds == 1.0
    assert abs(pitch(clip.waveform, 0.02, 0.98) - 1200) < 4


def test_video_without_audio_and_audio_without_video(tmp_path):
    silent = write_clip(tmp_path / "silent.mp4", picture=tenths(1))
    assert read(silent).waveform is None and not read(silent).has_audio
    heard = read(write_clip(tmp_path / "heard.m4a", sound_seconds=1.5, container="mp4"))
    assert len(heard.frames) == len(heard.frame_times) == 0 and not heard.has_video
    assert abs(heard.duration_seconds - 1.5) < 0.03
    with pytest.raises(ClipError, match=r"silent\.mp4: has no audio; caption the rest of it \(--modality visual\)"):
        read(silent, video=False)


def test_video_or_audio_alone_on_request(whole):
    assert read(whole, audio=False).waveform is None
    assert len(read(whole, video=False).frames) == 0
    np.testing.assert_array_equal(read(whole, audio=False).frames, read(whole).frames)
    np.testing.assert_array_equal(read(whole, video=False).waveform, read(whole).waveform)


def test_cover_art_is_not_video(tmp_path):
    path = tmp_path / "song.mp3"
    with av.open(str(path), "w") as out:
        sound, cover = out.add_stream("libmp3lame", rate=SOUND_HZ), out.add_stream("mjpeg", rate=1)
        cover.width = cover.height = 32
        cover.pix_fmt = "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(np.zeros((1, SOUND_HZ), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = SOUND_HZ, 0
        picture = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        out.mux(cover.encode(picture) + cover.encode(None))
        out.mux(sound.encode(frame) + sound.encode(None))
    with av.open(str(path)) as made:
        assert len(made.streams.video) == 1
    clip = read(path)
    assert not clip.has_video and clip.has_audio
    with pytest.raises(ClipError, match="has no video; caption the rest of it"):
        read(path, audio=False)


def test_frame_size_gives_squares_of_the_same_colours(whole):
    small = read(whole, frame_size=16)
    assert small.frames.shape == (8, 16, 16, 3)
    np.testing.assert_allclose(levels(small), levels(read(whole)), atol=0.5)


def count_decoded(monkeypatch):
    """Record the packets passed to decoders."""
    seen = []
    real = Decoder.decode
    monkeypatch.setattr(Decoder, "decode", lambda self, packet: seen.append(packet.pts) or real(self, packet))
    return seen


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("rate", [0.25, 0.7, 5.0])
def test_seeking_and_reading_straight_through_give_identical_frames(tmp_path, monkeypatch, suffix, rate):
    path = write_clip(tmp_path / f"long.{suffix}", picture=tenths(7), gop=7)
    sought = read(path, frames_per_second=rate, max_frames=99, audio=False)
    # Counted frames are read without seeking.
    monkeypatch.setattr(container_module, "MediaFile", lambda **fields: MediaFile(**fields | {"counts_frames": True}))
    monkeypatch.setattr(index_module._VideoPass, "add", _index_by_pts)
    straight = read(path, frames_per_second=rate, max_frames=99, audio=False)
    np.testing.assert_array_equal(sought.frame_times, straight.frame_times)
    np.testing.assert_array_equal(sought.frames, straight.frames)


def _index_by_pts(self, packet, is_joint):
    if packet.pts is not None:
        self._index.frame_times.append(self._index.file.seconds(packet.pts, self._index.file.video))
        self._index.video_end = max(self._index.video_end, self._index.frame_times[-1] + 0.1)


def test_parts_without_target_times_are_not_decoded(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "long.mp4", picture=tenths(7), gop=5)
    seen = count_decoded(monkeypatch)
    clip = read(path, max_frames=2, audio=False)
    assert_levels(clip, [1.7, 5.2])
    # Two keyframe intervals of 5 frames, and a few more for the decoder to reorder them, of 70.
    assert len(seen) < 25


@needs_media
def test_rotation_is_applied():
    upright, turned = read(MEDIA / "video_0.mov"), read(MEDIA / "video_90.mov")
    assert upright.frames.shape[1:3] == turned.frames.shape[2:0:-1]
    with av.open(str(MEDIA / "video_90.mov")) as container:
        stored = next(container.decode(video=0))
        assert stored.rotation == -90
        expected = np.rot90(stored.to_ndarray(format="rgb24"), -1)
    difference = np.abs(turned.frames[0].astype(int) - expected)
    # PyAV's own conversion is about 2 levels darker; upside down, the frames differ by far more.
    assert difference.mean() < 4 < np.abs(np.rot90(turned.frames[0].astype(int), 2) - expected).mean() / 3


def test_a_name_like_a_url(whole, tmp_path, monkeypatch):
    (tmp_path / "take:1.mp4").write_bytes(whole.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert len(read("take:1.mp4").frames) == 8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"start_seconds": -1}, "start_seconds is -1"),
        ({"start_seconds": math.nan}, "start_seconds is nan"),
        ({"start_seconds": 2, "end_seconds": 2}, "end_seconds is 2; it must be greater"),
        ({"start_seconds": 9.0}, r"the start is at 9\.0 s, but the file ends at 4\.0"),
        ({"video": False, "audio": False}, "leaves nothing to read"),
    ],
)
def test_invalid_arguments(whole, arguments, words):
    with pytest.raises(ValueError, match=words):
        read(whole, **arguments)


def test_containers_are_closed(whole, tmp_path):
    (tmp_path / "bad.mp4").write_bytes(whole.read_bytes()[:3000])
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        read(whole, max_frames=2)
        with pytest.raises(ClipError):
            read(tmp_path / "bad.mp4")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_undamaged_file_gives_no_warning(whole, caplog):
    with caplog.at_level(logging.WARNING):
        read(whole)
    assert caplog.text == ""


def test_frames_of_a_long_video_are_not_kept_at_full_size(tmp_path):
    """Sample 60 frames of 30 s at 1280 x 720, which would be 0.17 GB at full size."""
    path = tmp_path / "long.mp4"
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=2, options={"preset": "ultrafast"})
        video.width, video.height, video.pix_fmt = 1280, 720, "yuv420p"
        for number in range(60):
            shade = np.full((720, 1280, 3), 20 + number, np.uint8)
            out.mux(video.encode(av.VideoFrame.from_ndarray(shade, format="rgb24")))
        out.mux(video.encode(None))
    code = f"""
from pathlib import Path
from salmonn.media.clip import read_clip
from salmonn.media.frame_sampling import FixedRateSampler
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
read = lambda count: read_clip({str(path)!r}, FixedRateSampler(frames_per_second=2.0, max_frames=count, side=48)).frames
read(4)  # libraries that a forked process shares with its parent count when they are first used
before = peak()
frames = read(60)
print(*frames.shape, peak() - before)
"""
    result = subprocess.run(forked(sys.executable, "-c", code), capture_output=True, text=True, check=True)
    *shape, bytes_more = map(int, result.stdout.split())
    assert shape == [60, 48, 48, 3] and bytes_more < 100e6
