"""Few packets are decoded for sparse frames, and the frames are the same."""

import logging
from fractions import Fraction

import av
import numpy as np
import pytest

from salmonn.media import video as video_module
from salmonn.media.clip import read_clip
from salmonn.media.container import Decoder
from salmonn.media.frame_sampling import FixedRateSampler
from salmonn.media.index import StreamIndex

FPS, SIDE = 10, 64
# I P B B P B B ...: no frame refers to the B-frames.
ENCODERS = {
    "libx264": {"bf": "2", "b_strategy": "0", "b-pyramid": "none", "sc_threshold": "0"},
    "libx265": {"x265-params": "bframes=2:b-adapt=0:b-pyramid=0:scenecut=0:open-gop=0:log-level=none"},
}


def write_moving(path, *, encoder="libx264", num_frames=31, gop=250):
    """Write a video of a sliding texture, so that each frame differs from the others everywhere."""
    texture = np.random.default_rng(0).integers(0, 256, (SIDE // 4, SIDE, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    options = ENCODERS[encoder] | {"g": str(gop)}
    if encoder == "libx265":
        options["x265-params"] += f":keyint={gop}:min-keyint={gop}"
    with av.open(str(path), "w") as out:
        video = out.add_stream(encoder, rate=FPS, options=options)
        video.width, video.height, video.pix_fmt = SIDE, SIDE, "yuv420p"
        for number in range(num_frames):
            picture = np.ascontiguousarray(texture[:, 2 * number : 2 * number + SIDE])
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
    return path


@pytest.fixture
def fed(monkeypatch):
    """Timestamps of the packets passed to decoders."""
    seen = []
    real = Decoder.decode
    monkeypatch.setattr(Decoder, "decode", lambda self, packet: seen.append(packet.pts) or real(self, packet))
    return seen


def read(path, sampler):
    return read_clip(path, sampler, audio=False)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_non_reference_frames_are_skipped(tmp_path, monkeypatch, fed, encoder, suffix):
    path = write_moving(tmp_path / f"moving.{suffix}", encoder=encoder)
    ends = FixedRateSampler(frames_per_second=FPS, max_frames=2, side=SIDE)
    few = read(path, ends)
    np.testing.assert_allclose(few.frame_times, [0, 3])
    # Frames 0, 3, 6, ... 30 are the I-frame and the P-frames: 11 of 31.
    assert len(fed) == 11
    fed.clear()
    # 0, 10, 20, 30: 10 and 20 are B-frames (no multiples of 3), so two more.
    some = read(path, FixedRateSampler(side=SIDE))
    np.testing.assert_allclose(some.frame_times, [0, 1, 2, 3])
    assert len(fed) == 13
    fed.clear()
    monkeypatch.setattr(video_module, "non_reference_test", lambda codec: lambda packet: False)
    np.testing.assert_array_equal(read(path, FixedRateSampler(side=SIDE)).frames, some.frames)
    np.testing.assert_array_equal(some.frames[[0, 3]], few.frames)
    # All but 28 and 29, which are stored after 30.
    assert len(fed) == 29


def test_keyframes_are_decoded_alone(tmp_path, fed):
    path = write_moving(tmp_path / "moving.mp4", gop=10)
    clip = read(path, FixedRateSampler(side=SIDE))
    assert len(clip.frames) == 4 and len(fed) == 4
    apart = np.abs(np.diff(clip.frames.astype(int), axis=0)).mean(axis=(1, 2, 3))
    assert np.all(apart > 20)


def test_a_short_gap_is_decoded_rather_than_skipped():
    # 40 frames, a tenth of a second apart, and a keyframe each second, whose timestamp is its number.
    index = StreamIndex(
        None, frame_times=[n / 10 for n in range(40)], keyframes=[(0.0, 0), (1.0, 10), (2.0, 20), (3.0, 30)]
    )
    # 0.6, 0.7, 0.8, 0.9 lie between 0.5 and the keyframe 1.0; between 1.6 and 2.0 lie 3 only.
    due = [0.2, 0.5, 1.0, 1.6, 2.1, 2.9, 3.0, 3.9]
    assert list(video_module._plan_seeks(index, due)) == [(0, [0.2, 0.5]), (10, [1.0, 1.6, 2.1, 2.9, 3.0, 3.9])]
    assert list(video_module._plan_seeks(index, [0.5, 3.5])) == [(0, [0.5]), (30, [3.5])]


@pytest.mark.parametrize("broken", ["_due_frames", "_plan_seeks"])
def test_frames_that_do_not_match_the_index_are_read_without_shortcuts(tmp_path, monkeypatch, caplog, broken):
    path = write_moving(tmp_path / "moving.mp4", gop=10)
    expected = read(path, FixedRateSampler(side=SIDE)).frames
    if broken == "_due_frames":
        monkeypatch.setattr(video_module._FrameSource, "_due_frames", lambda *arguments: iter(()))
    else:
        real = video_module._plan_seeks
        # Sought to the last keyframe, frames before it never come.
        monkeypatch.setattr(
            video_module,
            "_plan_seeks",
            lambda index, due: ((index.keyframes[-1][1], run) for _, run in real(index, due)),
        )
    with caplog.at_level(logging.DEBUG):
        np.testing.assert_array_equal(read(path, FixedRateSampler(side=SIDE)).frames, expected)
    assert "reading again, because a seek failed (no frame at 0.000 s)" in caplog.text


def test_few_decoded_frames_are_alive_at_a_time(monkeypatch):
    alive, most = set(), 0

    def paint(frame, height, width):
        alive.discard(frame)
        return np.zeros((height, width, 3), np.uint8)

    def frames():
        nonlocal most
        for number in range(40):
            frame = av.VideoFrame(SIDE, SIDE, "rgb24")
            frame.pts = number
            alive.add(frame)
            most = max(most, len(alive))
            yield frame

    monkeypatch.setattr(video_module, "to_rgb", paint)
    painted, _ = video_module._convert_frames(frames(), FixedRateSampler(side=SIDE), 40)
    # Two are painted, one waits, one has just come.
    assert len(painted) == 40 and most <= 4
