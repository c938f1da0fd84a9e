"""Shots of clips with cuts at known times."""

from contextlib import ExitStack

import numpy as np
import pytest

from salmonn.media.container import ClipError
from salmonn.media.index import index_times
from salmonn.media.shots import SceneDetector, find_shots, merge_short
from salmonn.media.video import decode_all
from tests.media.builders import BASE, SPARSE, concatenate, is_video, regular, replaced, seconds_of, write_media
from tests.truncated import write_truncated

pytest.importorskip("scenedetect")
BASE_SHOTS = [0, 1, 2, 3, 4, 5, 6]


def shots_of(path, **options):
    return find_shots(path, SceneDetector(), **options)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm", "avi", "ts"])
def test_cuts_are_at_the_first_frame_of_each_shot(tmp_path, suffix):
    """The base has a cut at each second. AVI has no presentation times; MPEG-TS starts at 1.4 s and hides it."""
    codecs = {"webm": {"video_codec": "libvpx", "audio_codec": "libopus"}, "avi": {"audio_codec": "mp3"}}
    path = write_media(tmp_path / f"a.{suffix}", **BASE, **codecs.get(suffix, {}))
    assert shots_of(path) == pytest.approx(BASE_SHOTS, abs=0.06)


def test_cuts_are_exact(tmp_path):
    path = write_media(tmp_path / "a.mp4", frame_times=BASE["frame_times"])
    assert shots_of(path) == pytest.approx(BASE_SHOTS, abs=1e-6)


def test_times_start_with_the_file(tmp_path):
    """The streams start at 70 s, and the sound half a second before the video."""
    path = write_media(tmp_path / "a.mkv", frame_times=regular(0.5, 6), audio=(0, 6), shift=70.0)
    assert shots_of(path) == pytest.approx(BASE_SHOTS, abs=0.03)


@pytest.mark.parametrize("times", [SPARSE, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [0.0, 0.9, 1.0, 2.0, 2.1, 3.0, 4.4, 5.0]])
def test_a_varying_frame_rate(tmp_path, times):
    """Slides, and frames that stay on screen for long between others: cuts are where the colour changes."""
    path = write_media(tmp_path / "a.mkv", frame_times=times, audio=(0, 6))
    changes = [seconds for seconds, before in zip(times[1:], times, strict=False) if int(seconds) != int(before)]
    assert shots_of(path) == pytest.approx([0, *changes, 6], abs=0.03)


def test_a_fade_through_black_is_one_cut(tmp_path):
    """Grey fades out from 2 to 3 s, and from black at 3.5 s to another grey at 4.5 s.

    The mean of a frame is 120 * (t - 3.5) there, and 12 at 3.6 s.
    """
    steps = np.arange(0, 1, 0.04)
    fade_out = {2 + step: (round(200 * (1 - step)),) * 3 for step in steps}
    fade_in = {3.5 + step: (round(120 * step),) * 3 for step in steps}
    colours = {0: (200,) * 3, **fade_out, 3: "black", **fade_in, 4.5: (120,) * 3}
    path = write_media(tmp_path / "a.mp4", frame_times=regular(0, 6), colours=colours)
    start, cut, end = shots_of(path)
    assert (start, end) == (0, pytest.approx(6)) and cut == pytest.approx(3.62, abs=0.03)


@pytest.mark.parametrize("times", [[0.0], regular(0, 6)])
def test_one_frame_or_no_cut_is_one_shot(tmp_path, times):
    path = write_media(tmp_path / "a.mp4", frame_times=times, audio=(0, 6), colours={0: "red"})
    assert shots_of(path) == pytest.approx([0, 6], abs=0.06)


def test_a_span(tmp_path):
    path = write_media(tmp_path / "a.mp4", **BASE)
    assert shots_of(path, start_seconds=2.5, end_seconds=4.5) == pytest.approx([2.5, 3, 4, 4.5], abs=1e-3)
    assert shots_of(path, start_seconds=20.0) == []


def test_audio_has_no_shots(tmp_path):
    path = write_media(tmp_path / "a.m4a", audio=(0, 2))
    with pytest.raises(ClipError, match=r"a\.m4a: has no video and so no shots; caption audio files in a separate run"):
        shots_of(path)


def test_a_damaged_file_has_the_shots_that_decode(tmp_path):
    """The packets from 2.2 to 2.8 s are overwritten; each colour begins with a keyframe."""

    def overwrite(packets):
        return [
            replaced(packet, bytes(packet)[:8] + b"\x5a" * (packet.size - 8))
            if is_video(packet) and 2.2 <= seconds_of(packet) < 2.8
            else packet
            for packet in packets
        ]

    path = write_media(tmp_path / "a.mp4", **BASE, codec_options={"preset": "ultrafast", "bf": "0"}, edit=overwrite)
    assert shots_of(path) == pytest.approx(BASE_SHOTS, abs=0.06)
    with ExitStack() as stack:
        times = [seconds for seconds, _ in decode_all(index_times(path, stack), stack, start=0.0, end=6.0)]
    assert times == sorted(set(times)) and 0 < len(BASE["frame_times"]) - len(times) <= 20


def test_a_truncated_file(tmp_path):
    path = write_truncated(write_media(tmp_path / "a.mkv", **BASE), tmp_path / "b.mkv")
    *bounds, end = shots_of(path)
    assert 1 < end < 6 and bounds == pytest.approx(list(range(len(bounds))), abs=0.03)


def test_joined_recordings(tmp_path):
    """The clock of the second one starts again; between cyan and red is a cut, too."""
    part = write_media(tmp_path / "a.ts", frame_times=regular(0, 6))
    bounds = shots_of(concatenate(tmp_path / "b.ts", [part, part]))
    assert bounds == pytest.approx(list(range(13)), abs=0.1)


def test_all_frames_of_a_span_are_decoded_once(tmp_path):
    """Also from between two keyframes on; there is one every 2 s."""
    options = {"preset": "ultrafast", "g": "50", "sc_threshold": "0", "bf": "2"}
    path = write_media(tmp_path / "a.mp4", frame_times=BASE["frame_times"], codec_options=options)
    for start, end in [(0.0, 6.0), (2.51, 3.4), (5.97, 9.0)]:
        with ExitStack() as stack:
            times = [seconds for seconds, _ in decode_all(index_times(path, stack), stack, start=start, end=end)]
        shown = [time for time in BASE["frame_times"] if start - 0.04 < time < end]
        assert times == pytest.approx(shown, abs=1e-6)


@pytest.mark.parametrize(
    ("bounds", "shortest", "expected"),
    [
        ([0, 10], 1, [0, 10]),
        ([0, 0.5], 1, [0, 0.5]),
        ([0, 10, 10.3, 18], 1, [0, 10, 18]),  # merged with the next one
        ([0, 0.4, 5], 1, [0, 5]),
        ([0, 4, 9.5, 10], 1, [0, 4, 10]),  # the last one, with the one before it
        ([2, 2.5, 3, 3.5, 4], 1, [2, 3, 4]),
        ([0, 1, 2, 3], 1, [0, 1, 2, 3]),
        ([0, 0.1, 0.2], 0, [0, 0.1, 0.2]),
    ],
)
def test_short_shots_are_merged(bounds, shortest, expected):
    assert merge_short(bounds, min_seconds=shortest) == expected
