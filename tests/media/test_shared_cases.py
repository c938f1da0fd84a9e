"""Files of shared/cases/media: each follows a public report of a file that was read wrongly; its README has the values.

The other tests of file kinds build such files themselves; these were written by another program.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from salmonn.batch.discovery import VideoListing
from salmonn.media.clip import ClipError
from salmonn.media.index import measured_seconds
from tests.media.builders import (
    COLOURS,
    TONES,
    assert_colours,
    assert_loss_is_told,
    assert_seconds,
    assert_tones,
    assert_whole,
    colour_of,
    pitch,
    read,
)

CASES = Path(os.environ.get("MEDIA_CASES_DIR", Path(__file__).parents[3] / "shared" / "cases" / "media"))
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason=f"no files in {CASES}: set MEDIA_CASES_DIR")


@dataclass(frozen=True)
class Case:
    """Expected content: colours and tones from each time on, lengths in seconds; None for what is absent."""

    colours: dict[float, str] | None = None
    tones: dict[float, float] | None = None
    video: float | None = None
    audio: float | None = None
    may_warn: bool = False


SLIDES = {0: "red", 8: "lime", 16: "blue"}
WHOLE = Case(COLOURS, TONES, 6, 6)
SILENT = Case(COLOURS, None, 6)
CASES_BY_NAME = {
    "01_low_fps_bframes.mkv": Case(COLOURS, TONES, 6.2, 6),
    "02_screen_sparse_after_sound.webm": Case(COLOURS, {0: 400, 1: 600}, 5.05, 2),
    "03_pause.webm": Case({0: "red", 1: "lime", 4: "magenta", 5: "cyan"}, TONES | {2: 0, 3: 0}, 6, 6),
    "04_h264_bad_sei.mp4": WHOLE,
    "05_joined_ts_segments.ts": WHOLE,
    "06_joined_ts_clock_restarts.ts": Case(COLOURS, TONES, 6, 6, may_warn=True),
    "07_joined_ts_clock_jumps_1h.ts": Case(COLOURS, TONES, 6, 6, may_warn=True),
    "08_chained.ogg": Case(None, TONES, None, 6),
    "09_two_programs.ts": WHOLE,
    "10_iphone_unknown_2nd_audio.mov": WHOLE,
    "13_theora_repeated_frames.ogv": WHOLE,
    "14_joined.mp3": Case(None, TONES, None, 6),
    "16_vfr_bframes_end_cut.mkv": Case(COLOURS, None, 5.05),
    "17_starts_at_3600s.mkv": SILENT,
    "18_one_frame.flv": Case({0: "red"}),
    "18_one_picture_with_sound.mkv": Case({0: "red"}, TONES, None, 6),
    "18_slides.mkv": Case(SLIDES, {0: 400, 8: 600, 16: 800}, None, 24),
    "19_h264_bframes.avi": SILENT,
    "20_piped.wav": Case(None, TONES, None, 6),
    "23_slides_uneven.mp4": Case({0: "red", 1: "lime", 2: "blue", 14: "yellow"}),
    "24_vfr_pause_mp4.mp4": Case({0: "red", 2: "lime", 12: "blue"}, {0: 500, 12: 500}, 13, 13),
}


@pytest.mark.parametrize("name", CASES_BY_NAME)
def test_case(name):
    case, clip = CASES_BY_NAME[name], read(CASES / name)
    if case.colours is not None:
        assert_colours(clip, case.colours)
    if case.tones is not None:
        assert_tones(clip, case.tones)
    assert_seconds(clip, video=case.video, audio=case.audio)
    assert clip.is_complete
    assert clip.warnings == () or case.may_warn


def test_mirrored_frames():
    for frame in read(CASES / "11_mirrored_hflip.mp4").frames:
        parts = [colour_of(part[2:6, 2:6]) for rows in np.split(frame, 2) for part in np.split(rows, 2, axis=1)]
        assert parts == ["lime", "red", "yellow", "blue"]


def test_recording_from_the_middle_of_a_group_of_frames():
    clip = read(CASES / "12_opengop_recording_start.ts")
    # The file begins 0.64 s after the content.
    assert_colours(clip, {second: colour for second, colour in COLOURS.items() if second} | {0: "lime"}, shift=-0.64)
    assert clip.frame_times[0] < 0.5
    assert_tones(clip, {second: tone for second, tone in TONES.items() if second}, shift=-0.64)
    assert_seconds(clip, audio=5.376)
    assert clip.is_complete


def test_bad_frame_of_an_mp3():
    clip = read(CASES / "15_one_bad_frame.mp3")
    assert 4.9 < clip.duration_seconds < 6.1
    assert_tones(clip, {0: 400})
    assert pitch(clip.waveform[-8000:], 0.05, 0.45) == pytest.approx(1400, abs=5)
    assert_loss_is_told(clip)


def test_piped_wav_has_its_exact_length():
    clip = read(CASES / "20_piped.wav")
    assert clip.duration_seconds == pytest.approx(6.0, abs=0.001)


def test_encrypted_file_is_refused_as_such():
    with pytest.raises(ClipError, match="encrypted") as refusal:
        read(CASES / "21_encrypted.mp4")
    assert "download it again" not in str(refusal.value)


def test_all_files_of_a_folder_are_listed():
    folder = CASES / "22_folder_of_other_suffixes"
    listed = {Path(video.path).name for video in VideoListing(paths=[str(folder)]).videos()}
    assert listed == {path.name for path in folder.iterdir()}


def test_no_look_after_the_end_of_a_paused_recording():
    path = CASES / "24_vfr_pause_mp4.mp4"
    assert read(path).frame_times[-1] < 13.05
    assert 13.0 <= measured_seconds(path) <= 13.1
    assert_whole(read(path, start_seconds=11.0))
