"""Undamaged files whose timestamps are unusual: sparse, paused, far apart, restarted, or none at all.

Each test builds files of one kind, after public reports about such files.
"""

from fractions import Fraction
from itertools import pairwise

import av
import pytest

from salmonn.media.frame_sampling import FixedRateSampler, UniformSampler
from salmonn.media.index import measured_seconds
from tests.media.builders import (
    BASE,
    SPARSE,
    TONES,
    assert_colours,
    assert_seconds,
    assert_span,
    assert_tones,
    assert_whole,
    colour_of,
    concatenate,
    is_video,
    read,
    read_clip,
    regular,
    transport_packets,
    with_pts,
    without,
    write_media,
)

B_FRAMES = {"preset": "ultrafast", "bf": "3", "b_strategy": "0"}


def reorder_seconds(packets):
    """Return the longest time that a frame is stored before it is shown."""
    return max(float((packet.pts - packet.dts) * packet.time_base) for packet in packets if is_video(packet))


@pytest.mark.parametrize(
    ("suffix", "video_codec", "codec_options", "rate"),
    [
        ("mkv", "libx264", {"preset": "medium"}, 5),
        ("mkv", "libx264", {"preset": "ultrafast", "bf": "16", "b_strategy": "0"}, 15),
        ("mkv", "libx265", {"preset": "ultrafast"}, 5),
        ("ts", "libx264", {"preset": "medium"}, 5),
        ("mp4", "libx265", {"preset": "ultrafast"}, 5),
    ],
)
def test_b_frames_that_reach_over_more_than_half_a_second(tmp_path, suffix, video_codec, codec_options, rate):
    def check(packets):
        assert reorder_seconds(packets) > 0.5
        return packets

    path = write_media(
        tmp_path / f"slow.{suffix}", frame_times=regular(0, 6, rate), audio=(0, 6), rate=rate, video_codec=video_codec,
        codec_options=codec_options, audio_codec="aac" if suffix == "ts" else "libopus", edit=check,
    )  # fmt: skip
    clip = read(path)
    assert_colours(clip)
    assert_tones(clip)
    assert_seconds(clip, video=6, audio=6)
    assert_whole(clip)
    assert_span(path)


@pytest.mark.parametrize(
    ("suffix", "video_codec", "audio_codec"),
    [("webm", "libvpx", "libopus"), ("mkv", "libx264", "aac"), ("webm", "libvpx-vp9", "libopus")],
)
@pytest.mark.parametrize("edit", [None, without(2, 4, "audio")])
def test_few_frames_and_no_audio(tmp_path, suffix, video_codec, audio_codec, edit):
    heard = {0: 400, 1: 600} | ({} if edit is None else {2: 0, 3: 0, 4: 1200, 5: 1400})
    path = write_media(
        tmp_path / f"screen.{suffix}", frame_times=SPARSE, audio=(0, 2 if edit is None else 6), edit=edit,
        video_codec=video_codec, audio_codec=audio_codec,
    )  # fmt: skip
    clip = read(path)
    assert_colours(clip)
    assert_tones(clip, heard)
    assert 4.99 < clip.video_seconds < 6.1
    assert_whole(clip)


@pytest.mark.parametrize(
    ("suffix", "video_codec", "audio_codec", "sample_rate"),
    [
        ("webm", "libvpx", "libopus", 48_000),
        *[(suffix, "libx264", "aac", 44_100) for suffix in ("mkv", "flv", "mp4", "ts")],
    ],
)
def test_a_paused_recording_shows_the_last_frame_and_is_silent(tmp_path, suffix, video_codec, audio_codec, sample_rate):
    path = write_media(
        tmp_path / f"paused.{suffix}", **BASE, edit=without(2, 4), video_codec=video_codec,
        audio_codec=audio_codec, sample_rate=sample_rate,
    )  # fmt: skip
    clip = read(path)
    assert_colours(clip, {0: "red", 1: "lime", 4: "magenta", 5: "cyan"})
    assert_tones(clip, TONES | {2: 0, 3: 0})
    assert_seconds(clip, video=6, audio=6)
    assert_whole(clip)


def write_parts(tmp_path, bounds, suffix="ts", shifts=None, **options):
    """Write the content between each two bounds to a file of its own, and all of them joined."""
    parts = []
    for number, (start, end) in enumerate(pairwise(bounds)):
        parts.append(tmp_path / f"part{number}.{suffix}")
        shift = shifts[number] if shifts else 0.0
        write_media(parts[-1], frame_times=regular(start, end), audio=(start, end), shift=shift, **options)
    return concatenate(tmp_path / f"joined.{suffix}", parts)


@pytest.mark.parametrize("bounds", [range(7), (0, 3, 6), (0, 2.4, 6)])
@pytest.mark.parametrize("codec_options", [None, B_FRAMES])
def test_joined_segments_of_a_transport_stream(tmp_path, bounds, codec_options):
    # Continuity counters begin again at each joint; timestamps continue.
    path = write_parts(tmp_path, bounds, codec_options=codec_options)
    clip = read(path)
    assert_colours(clip)
    assert_seconds(clip, video=6, audio=6)
    assert_tones(clip)
    assert_whole(clip)
    assert_span(path)


def test_a_joined_stream_of_one_encoder(tmp_path):
    # As a segmenter writes it: one encoder, a keyframe every second, and a new muxer for each part.
    parts = []
    for second in range(6):

        def keep(packets, second=second):
            return [packet for packet in packets if second <= packet.dts * packet.time_base < second + 1]

        options = {"preset": "ultrafast", "bf": "0", "g": "25"}
        part = tmp_path / f"{second}.ts"
        write_media(part, **BASE, edit=keep, codec_options=options)
        parts.append(part)
    path = concatenate(tmp_path / "joined.ts", parts)
    clip = read(path)
    assert_colours(clip)
    assert_tones(clip)
    assert_whole(clip)
    assert_span(path)


@pytest.mark.parametrize(
    ("bounds", "shifts"),
    [((0, 3, 6), (0, -3)), ((0, 2, 4, 6), (0, -2, -4)), ((0, 3, 6), (50, 7)), ((0, 2, 6), (9, -2))],
)
@pytest.mark.parametrize("suffix", ["ts", "flv"])
def test_a_clock_that_restarts_goes_on_in_step(tmp_path, suffix, bounds, shifts):
    path = write_parts(tmp_path, bounds, suffix, shifts, sample_rate=44_100)
    if suffix == "flv":
        parts = [(tmp_path / f"part{number}.flv").read_bytes() for number in range(len(bounds) - 1)]
        path.write_bytes(parts[0] + b"".join(part[13:] for part in parts[1:]))  # the header is of the first only
    clip = read(path)
    # Audio is up to 50 ms longer than the video in each part, which the next part waits for.
    slack = 0.05 * len(bounds)
    assert_seconds(clip, video=6, audio=6, slack=slack)
    assert_colours(clip, slack=slack)
    assert_tones(clip)
    assert clip.is_complete
    assert_span(path, slack=slack)


def leap(jump):
    """Return an edit that sets the clock ahead in the middle of the content."""

    def add(packets):
        for packet in packets:
            if packet.dts * packet.time_base >= 3 - Fraction(1, 100):
                packet.pts += round(jump / packet.time_base)
                packet.dts += round(jump / packet.time_base)
        return packets

    return add


@pytest.mark.parametrize("jump", [30, 3600, 11 * 3600])
def test_a_clock_of_a_transport_stream_that_jumps_ahead_goes_on_in_step(tmp_path, jump):
    path = write_media(tmp_path / "leap.ts", **BASE, edit=leap(jump))
    clip = read(path)
    assert_seconds(clip, video=6, audio=6)
    assert_colours(clip)
    assert_tones(clip)
    assert clip.is_complete
    assert_span(path)


@pytest.mark.parametrize("suffix", ["flv", "mkv", "mp4"])
def test_a_long_pause_is_a_gap_in_video_and_audio(tmp_path, suffix):
    path = write_media(tmp_path / f"pause.{suffix}", **BASE, sample_rate=44_100, edit=leap(30))
    clip = read(path)
    assert_seconds(clip, video=36, audio=36)
    assert_colours(clip, {0: "red", 1: "lime", 2: "blue", 33: "yellow", 34: "magenta", 35: "cyan"})
    assert_tones(clip, {0: 400, 1: 600, 2: 800, 3: 0, 32: 0, 33: 1000, 34: 1200, 35: 1400})
    assert_whole(clip)


@pytest.mark.parametrize("kind", ["audio", "video"])
@pytest.mark.parametrize("seconds", [20.0, 50_000.0])
def test_one_bogus_timestamp_of_a_transport_stream(tmp_path, kind, seconds):
    path = write_media(tmp_path / "bogus.ts", **BASE)
    with av.open(str(path)) as file:
        pid = file.streams.best(kind).id
    path.write_bytes(b"".join(with_pts(transport_packets(path), pid, 10, seconds)))
    clip = read(path)
    assert_seconds(clip, video=6, audio=6)
    assert_colours(clip)
    assert_tones(clip, {0: 400, 1: 600, 4: 1200, 5: 1400})  # 100 ms of audio have no time of their own


@pytest.mark.parametrize("kind", ["audio", "video"])
def test_one_bogus_timestamp_of_matroska(tmp_path, kind):
    def mistake(packets):
        chosen = [packet for packet in packets if packet.stream.type == kind]
        chosen[len(chosen) // 2].pts += round(50_000 / chosen[0].time_base)
        return packets

    path = write_media(tmp_path / "bogus.mkv", **BASE, edit=mistake)
    clip = read(path)
    assert_seconds(clip, video=6, audio=6)
    assert_colours(clip)
    assert_tones(clip)


@pytest.mark.parametrize("suffix", ["mkv", "ts", "flv", "mp4", "mov"])
@pytest.mark.parametrize("codec_options", [B_FRAMES, {"preset": "medium"}])
def test_last_frames_far_apart(tmp_path, suffix, codec_options):
    path = write_media(tmp_path / f"slides.{suffix}", frame_times=SPARSE, codec_options=codec_options)
    clip = read(path)
    assert_colours(clip)
    assert 4.99 < clip.video_seconds < 6.1
    assert_whole(clip)


@pytest.mark.parametrize(
    ("suffix", "codec", "codec_options"),
    [("webm", "libvpx", {}), *[(suffix, "libx264", B_FRAMES) for suffix in ("mkv", "flv", "ts")]],
)
@pytest.mark.parametrize(("shift", "audio"), [(0.4, (0, 6)), (3600.0, (0, 6)), (0.4, None)])
def test_timestamps_that_do_not_start_at_zero(tmp_path, suffix, codec, codec_options, shift, audio):
    audio_codec = "libopus" if suffix == "webm" else "aac"
    path = write_media(
        tmp_path / f"late.{suffix}", frame_times=regular(0, 6), audio=audio, shift=shift, video_codec=codec,
        codec_options=codec_options, audio_codec=audio_codec, sample_rate=48_000 if suffix == "webm" else 44_100,
    )  # fmt: skip
    clip = read(path)
    assert clip.frame_times[0] < 0.05
    assert_colours(clip)
    assert_seconds(clip, video=6)
    assert_whole(clip)
    assert_span(path, audio=audio is not None)
    assert_whole(read(path, start_seconds=4.5))


@pytest.mark.parametrize(
    ("suffix", "codec", "audio_codec"),
    [
        ("webm", "libvpx", "libopus"),
        ("mkv", "mjpeg", "aac"),
        *[(suffix, "libx264", "aac") for suffix in ("mkv", "flv", "mp4", "ts")],
    ],
)
@pytest.mark.parametrize("audio", [None, (0, 6)])
def test_a_single_frame(tmp_path, suffix, codec, audio_codec, audio):
    path = write_media(
        tmp_path / f"one.{suffix}", frame_times=[0.0], audio=audio, video_codec=codec, audio_codec=audio_codec,
        sample_rate=48_000 if suffix == "webm" else 44_100,
    )  # fmt: skip
    clip = read(path)
    assert {colour_of(frame) for frame in clip.frames} == {"red"}
    if audio is not None:
        assert_tones(clip)
        assert_seconds(clip, audio=6)
    assert_whole(clip)


@pytest.mark.parametrize(
    ("suffix", "codec", "audio_codec"),
    [("mkv", "libx264", "aac"), ("webm", "libvpx", "libopus"), ("flv", "libx264", "aac"), ("ts", "libx264", "aac")],
)
def test_slides_with_audio(tmp_path, suffix, codec, audio_codec):
    colours, tones = {0: "red", 8: "lime", 16: "blue"}, {0: 400, 8: 600, 16: 800}
    path = write_media(
        tmp_path / f"slides.{suffix}", frame_times=colours, audio=(0, 24), colours=colours, tones=tones,
        video_codec=codec, audio_codec=audio_codec, sample_rate=48_000 if suffix == "webm" else 44_100,
    )  # fmt: skip
    clip = read(path, frames_per_second=1.0)
    assert_colours(clip, colours)
    assert_tones(clip, tones)
    assert_seconds(clip, audio=24)
    assert_whole(clip)


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
@pytest.mark.parametrize(("b_frames", "audio"), [(0, None), (2, (0, 6)), (5, None)])
def test_b_frames_in_avi(tmp_path, audio, codec, b_frames):
    options = {"bf": str(b_frames)} | ({"preset": "ultrafast", "b_strategy": "0"} if codec == "libx264" else {})
    path = write_media(
        tmp_path / "old.avi", frame_times=regular(0, 6), audio=audio, video_codec=codec, codec_options=options,
        audio_codec="libmp3lame",
    )  # fmt: skip
    clip = read(path)
    assert_colours(clip)
    assert_seconds(clip, video=6)
    assert_whole(clip)
    assert_span(path, audio=audio is not None)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("b_frames", [{"preset": "ultrafast", "bf": "0"}, B_FRAMES])
def test_each_of_a_few_uneven_slides_is_sampled(tmp_path, suffix, b_frames):
    slides = {0: "red", 1: "lime", 2: "blue", 14: "yellow"}
    path = write_media(
        tmp_path / f"slides.{suffix}", frame_times=slides, audio=(0, 19), colours=slides, tones={0: 400},
        codec_options=b_frames,
    )  # fmt: skip
    for sampler in (FixedRateSampler(side=16), UniformSampler(interval_seconds=1.0, min_frames=4, max_pixels=784)):
        clip = read_clip(path, sampler)
        assert_colours(clip, slides)
        assert_whole(clip)


@pytest.mark.parametrize("audio", [None, (0, 13)])
@pytest.mark.parametrize(
    ("suffix", "options"),
    [("mp4", {}), ("mov", {}), ("mp4", {"movflags": "frag_keyframe+empty_moov"}), ("mp4", {"movflags": "faststart"})],
)
def test_a_pause_does_not_make_the_file_longer(tmp_path, suffix, audio, options):
    colours = {0: "red", 2: "lime", 12: "blue"}
    path = write_media(
        tmp_path / f"pause.{suffix}", frame_times=[*regular(0, 2), 2.0, *regular(12, 13)], audio=audio, colours=colours,
        tones={0: 500}, codec_options=B_FRAMES, **options,
    )  # fmt: skip
    clip = read(path, frames_per_second=2.0)
    assert_seconds(clip, video=13)
    assert clip.duration_seconds == pytest.approx(13, abs=0.1)
    assert clip.frame_times[-1] < clip.frame_times[0] + 13
    # Without an edit list, the video of these fragments begins 0.08 s late.
    assert_colours(clip, colours, shift=clip.frame_times[0])
    assert measured_seconds(path) == pytest.approx(13, abs=0.1)
    assert_whole(clip)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "flv", "ts"])
def test_a_span_with_b_frames_is_whole(tmp_path, suffix):
    path = write_media(tmp_path / f"talk.{suffix}", **BASE, codec_options=B_FRAMES, sample_rate=44_100)
    assert_span(path)
    assert_whole(read(path, start_seconds=2.5, end_seconds=4.5))
