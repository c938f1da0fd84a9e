"""Damaged and truncated files, files that are not videos, and real files of shared/media."""

import math
import os
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from salmonn.media.clip import ClipError
from tests.media.grey_clips import MEDIA, assert_levels, needs_media, read, tenths, write_clip

MEDIA_NAMES = sorted(p.name for p in MEDIA.iterdir()) if MEDIA.is_dir() else []


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


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A file of 7 s whose header comes first."""
    path = tmp_path_factory.mktemp("full") / "f.mp4"
    return write_clip(path, picture=tenths(7), sound_seconds=7, movflags="faststart")


@pytest.mark.parametrize("share", [0.0005, 0.02, 0.2, 0.5, 0.8, 0.95])
def test_a_truncated_file_gives_a_correct_beginning_or_an_error(full, tmp_path, caplog, share):
    data = full.read_bytes()
    header = data.index(b"mdat")
    path = tmp_path / "cut.mp4"
    path.write_bytes(data[: round(header + share * (len(data) - header))])
    began = time.process_time()
    try:
        clip = read(path)
    except ClipError as error:
        assert str(path) in str(error)
        assert share < 0.1
        return
    assert time.process_time() - began < 2
    assert clip.duration_seconds < 6.95 and "cut.mp4: the file is truncated" in caplog.text
    assert_levels(clip, clip.frame_times - 0.05)
    if clip.has_audio:
        expected = read(full).waveform
        # The last packet of the truncated audio has no successor to overlap with.
        np.testing.assert_allclose(clip.waveform[:-1024], expected[: len(clip.waveform) - 1024], atol=1e-3)


@cache
def read_whole(name, **asked):
    return read(MEDIA / name, **asked)


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
    clip, whole = read(tmp_path / name, **asked), read_whole(name, **asked)
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
    offset = read(full, audio=False).frame_times[0] - 0.25  # MPEG-TS starts with the audio's priming
    for part in range(3, 20, 2):
        path.write_bytes(data[: len(data) * part // 20 + 7])
        clip = read(path, audio=False)
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
