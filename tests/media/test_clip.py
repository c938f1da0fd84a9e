"""Clips written at test time with known colours and tones at known times, and real files of shared/media."""

import logging
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from salmonn.media import container as container_module
from salmonn.media import index as index_module
from salmonn.media.clip import Clip, ClipError, read_clip
from salmonn.media.container import Decoder, MediaFile

MEDIA = Path(__file__).parents[3] / "shared" / "media"
needs_media = pytest.mark.skipif(not MEDIA.is_dir(), reason="the shared media folder is not here")
MEDIA_NAMES = sorted(p.name for p in MEDIA.iterdir()) if MEDIA.is_dir() else []
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


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Write 4 s at 10 frames per second, with a keyframe every second and audio of the same length."""
    path = tmp_path_factory.mktemp("whole") / "whole.mp4"
    return write_clip(path, picture=tenths(4), sound_seconds=4, gop=10, movflags="faststart")


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


@needs_media
@pytest.mark.parametrize("name", MEDIA_NAMES)
def test_shared_media_is_read_or_the_error_names_it(name):
    try:
        clip = read(MEDIA / name, frame_size=48)
    except ClipError as error:
        assert name in str(error)
        return
    assert clip.has_video or clip.has_audio
    assert clip.frames.shape[1:] == ((48, 48, 3) if clip.has_video else (0, 0, 3))
    assert np.all(np.diff(clip.frame_times) > 0) and len(clip.frames) == len(clip.frame_times)


@needs_media
def test_a_corrupted_file_is_read_past_the_damage(caplog):
    # Packet 30 of 50 (10 a second) is damaged, with frames 28 and 29 still inside the decoder then.
    clip = read(MEDIA / "corrupted.mp4")
    np.testing.assert_allclose(clip.frame_times, np.arange(10) / 2 + 0.25)
    assert clip.duration_seconds == pytest.approx(5.0)
    assert clip.warnings == ("2 damaged video frames at 3.0 s",) and not clip.is_complete
    assert "corrupted.mp4: 2 damaged video frames" in caplog.text
    later = read(MEDIA / "corrupted.mp4", start_seconds=4.0)
    assert len(later.frames) == 2


@pytest.mark.parametrize("share", [0.0005, 0.02, 0.2, 0.5, 0.8, 0.95])
def test_a_truncated_file_gives_a_correct_beginning_or_an_error(tmp_path, caplog, share):
    full = write_clip(tmp_path / "f.mp4", picture=tenths(7), sound_seconds=7, movflags="faststart")
    data = full.read_bytes()
    header = data.index(b"mdat")
    path = tmp_path / "cut.mp4"
    path.write_bytes(data[: round(header + share * (len(data) - header))])
    began = time.monotonic()
    try:
        clip = read(path)
    except ClipError as error:
        assert str(path) in str(error)
        assert share < 0.1
        return
    assert time.monotonic() - began < 2
    assert clip.duration_seconds < 6.95 and "cut.mp4: the file is truncated" in caplog.text
    assert_levels(clip, clip.frame_times - 0.05)
    if clip.has_audio:
        expected = read(full).waveform
        # The last packet of the truncated audio has no successor to overlap with.
        np.testing.assert_allclose(clip.waveform[:-1024], expected[: len(clip.waveform) - 1024], atol=1e-3)


@needs_media
@pytest.mark.parametrize(
    ("name", "share", "warning", "damaged"),
    [
        ("flipping_a_pancake.mkv", 0.2, "1 damaged video frame at 1.7 s", range(17, 50)),
        # The container is damaged: libav silently skips two seconds.
        ("flipping_a_pancake.mkv", 0.3, "2.14 s are missing at 2.8 s, where the container is damaged", range(28, 50)),
        ("flipping_a_pancake.mkv", 0.5, "4 damaged video frames at 5.0 s", range(50, 100)),
        ("flipping_a_pancake.mkv", 0.8, "1 damaged video frame at 8.3 s", range(83, 100)),
        # libav conceals the damage without marking the frames.
        ("corrupted.mp4", 0.6, "13 damaged video frames from 2.8 to 4.9 s", range(25, 50)),
    ],
)
def test_damage_is_noticed_and_reading_resumes_after_it(tmp_path, name, share, warning, damaged):
    data = bytearray((MEDIA / name).read_bytes())
    at = round(share * len(data))
    data[at : at + 60] = bytes(60)
    (tmp_path / name).write_bytes(data)
    asked = {"frames_per_second": 10, "max_frames": 999, "frame_size": 96, "audio": False}
    clip, whole = read(tmp_path / name, **asked), read(MEDIA / name, **asked)
    assert clip.warnings == (warning,) and not clip.is_complete
    assert len(clip.frames) == len(whole.frames)
    # Only frames up to the next keyframe depend on what is damaged.
    differing = [k for k, pair in enumerate(zip(clip.frames, whole.frames, strict=True)) if not np.array_equal(*pair)]
    assert differing and set(differing) <= set(damaged)


@pytest.mark.parametrize("suffix", ["mkv", "ts"])
def test_frames_lost_at_the_end_of_a_stream_are_not_replaced_by_earlier_ones(tmp_path, suffix):
    # B-frames are stored after the frame that follows them, so a cut leaves gaps before the last frame.
    full = write_clip(tmp_path / f"f.{suffix}", picture=tenths(7), sound_seconds=7, gop=25)
    data, path = full.read_bytes(), tmp_path / f"cut.{suffix}"
    for part in range(3, 20):
        path.write_bytes(data[: len(data) * part // 20 + 7])
        clip = read(path, audio=False)
        offset = read(full, audio=False).frame_times[0] - 0.25  # MPEG-TS starts with the audio's priming
        assert 0 < len(clip.frames) <= 14
        assert len(clip.frames) < 14 or part == 19  # where the index at the end is cut off
        np.testing.assert_allclose(clip.frame_times[1:], clip.frame_times[:-1] + 0.5)
        assert_levels(clip, [math.floor((t - offset) * 10 + 1e-3) / 10 for t in clip.frame_times])


def test_in_place_of_damaged_frames_the_one_before_stays_on_screen(tmp_path):
    full = write_clip(tmp_path / "f.mp4", picture=tenths(7), movflags="faststart", gop=20)
    data = bytearray(full.read_bytes())
    middle = (data.index(b"mdat") + len(data)) // 2
    data[middle : middle + 400] = bytes(255 - b for b in data[middle : middle + 400])
    path = tmp_path / "bad.mp4"
    path.write_bytes(data)
    clip = read(path)
    assert clip.warnings == ("16 damaged video frames from 2.1 to 3.9 s",)
    # A keyframe every 2 s: frames 2.4 to 3.9 are damaged.
    assert_levels(clip, [2.4 if 2.4 < time < 4 else time - 0.05 for time in clip.frame_times])


@pytest.mark.parametrize(("name", "content"), [("empty.mp4", b""), ("text.mp4", b"not a video\n" * 99)])
def test_files_that_are_not_videos(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ClipError, match=name + ": .*; .*copy"):
        read(path)


def test_text_is_not_shown_as_ansi_art(tmp_path):
    (tmp_path / "notes.txt").write_text("hello world this is text\n" * 100)
    with pytest.raises(ClipError, match=r"notes\.txt: is a text file"):
        read(tmp_path / "notes.txt")


def test_missing_file_folder_and_pipe(tmp_path):
    with pytest.raises(ClipError, match=r"gone\.mp4: there is no such file"):
        read(tmp_path / "gone.mp4")
    with pytest.raises(ClipError, match="is a folder"):
        read(tmp_path)
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(ClipError, match="not a regular file"):
        read(tmp_path / "pipe.mp4")


def test_file_without_permission(whole, monkeypatch):
    # Root may read anything, so the error is simulated.
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ClipError, match=r"whole\.mp4: permission denied; grant"):
        read(whole)


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
    """Sample 240 frames of 120 s at 1280 x 720, which would be 0.66 GB at full size."""
    path = tmp_path / "long.mp4"
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=10, options={"preset": "ultrafast"})
        video.width, video.height, video.pix_fmt = 1280, 720, "yuv420p"
        for number in range(1200):
            shade = np.full((720, 1280, 3), 20 + number // 10, np.uint8)
            out.mux(video.encode(av.VideoFrame.from_ndarray(shade, format="rgb24")))
        out.mux(video.encode(None))
    code = f"""
import resource
from salmonn.media.clip import read_clip
from salmonn.media.frame_sampling import FixedRateSampler
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
frames = read_clip({str(path)!r}, FixedRateSampler(frames_per_second=2.0, max_frames=240, side=48)).frames
print(*frames.shape, peak() - before)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *shape, bytes_more = map(int, result.stdout.split())
    assert shape == [240, 48, 48, 3] and bytes_more < 200e6
