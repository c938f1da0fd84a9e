"""decord and torchcodec decode the same frames as PyAV, and PyAV steps in where they would not."""

import logging
import sys
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import Interpolation, VideoReformatter

from salmonn.caption.loader import ClipReader
from salmonn.caption.read_spec import ReadSpec
from salmonn.media import display
from salmonn.media.clip import ClipError, read_clip
from salmonn.media.container import declared_shape
from salmonn.media.frame_sampling import FixedRateSampler
from salmonn.media.readers import load_reader

FPS, WIDTH, HEIGHT = 10, 128, 64
SAMPLER = FixedRateSampler(frames_per_second=5, side=48)
CODECS = {
    "libx264": {"bf": "2", "sc_threshold": "0"},
    "libx265": {"x265-params": "bframes=2:open-gop=0:keyint=15:log-level=none"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "lag-in-frames": "8"},
    "libsvtav1": {"preset": "12"},
}
FALLS_BACK = "decoding with PyAV"


def write_video(path, codec="libx264", *, times=range(0, 4000, 100), options=None, **attributes):
    """Write a sliding texture, with times in ms; each frame differs from the others everywhere."""
    texture = np.random.default_rng(0).integers(0, 256, (HEIGHT // 8, 64, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=FPS, options={"g": "15"} | CODECS[codec] | (options or {}))
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for name, value in attributes.items():
            setattr(stream.codec_context, name, value)
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, time in enumerate(times):
            picture = np.ascontiguousarray(texture[:, 4 * number : 4 * number + WIDTH])
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


@pytest.fixture(params=["decord", "torchcodec"])
def reader(request):
    try:
        load_reader(request.param)
    except ValueError as error:
        pytest.skip(str(error))  # of torchcodec also where decord is installed: they crash in the same process
    return request.param


@pytest.fixture
def fast_conversion(monkeypatch):
    """PyAV converts to RGB as fast and imprecisely as the readers do."""
    monkeypatch.setattr(display, "_INTERPOLATION", Interpolation.BILINEAR)


def read(path, reader="pyav", **span):
    return read_clip(path, SAMPLER, audio=False, reader=reader, **span)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_frames_equal_those_of_pyav(tmp_path, fast_conversion, caplog, reader, codec, suffix):
    path = write_video(tmp_path / f"clip.{suffix}", codec)
    caplog.set_level(logging.DEBUG)
    spans = [{}, {"start_seconds": 0.9, "end_seconds": 3.3}, {"start_seconds": 3.0}]
    for span in spans:
        expected, clip = read(path, **span), read(path, reader, **span)
        np.testing.assert_array_equal(clip.frames, expected.frames)
        np.testing.assert_array_equal(clip.frame_times, expected.frame_times)
    # decord 3.4 fails on some HEVC files, and then PyAV decodes them.
    assert FALLS_BACK not in caplog.text or (reader, codec) == ("decord", "libx265")


def test_only_the_conversion_to_rgb_differs(tmp_path, reader):
    path = write_video(tmp_path / "clip.mp4")
    difference = np.abs(read(path, reader).frames.astype(int) - read(path).frames)
    # The texture has the strongest colours at the sharpest edges; a neighbouring frame differs by 40 and more.
    assert 0 < difference.mean() < 10


def test_times_may_start_late_and_vary(tmp_path, fast_conversion, caplog, reader):
    late = write_video(tmp_path / "late.mp4", times=range(700, 3000, 100))
    varied = write_video(tmp_path / "varied.mkv", times=[5 * number**2 // 2 for number in range(40)])
    caplog.set_level(logging.DEBUG)
    for path in (late, varied):
        np.testing.assert_array_equal(read(path, reader).frames, read(path).frames)
    assert FALLS_BACK not in caplog.text


def test_a_frame_that_stays_on_screen_is_repeated(tmp_path, fast_conversion, reader):
    class Twice(FixedRateSampler):
        def sample_times(self, first, seconds, num_frames):
            return np.array([0.0, 0.05, 0.3, 0.31, 0.38, 2.0])

    path = write_video(tmp_path / "clip.mp4")
    clip = read_clip(path, Twice(side=48), reader=reader)
    np.testing.assert_array_equal(clip.frames, read_clip(path, Twice(side=48)).frames)
    np.testing.assert_array_equal(clip.frames[0], clip.frames[1])
    assert (clip.frames[1] != clip.frames[2]).any()


def test_worker_processes_read_with_it(tmp_path, reader):
    path = write_video(tmp_path / "clip.mp4")
    with ClipReader(workers=1) as clips:
        clip = clips.submit(path, ReadSpec(SAMPLER, reader=reader), lambda clip: clip).result()
        assert clips.declared_shape(path) == declared_shape(path)
    np.testing.assert_array_equal(clip.frames, read(path, reader).frames)


# Files that are left to PyAV.


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("clip.ts", {}, "its container"),
        ("wide.mp4", {"sample_aspect_ratio": Fraction(4, 3)}, "its pixel aspect ratio"),
        ("hd.mp4", {"width": 1280, "height": 720}, "its unknown colour space"),
        ("hdr.mp4", {"color_trc": 16, "color_primaries": 9, "colorspace": 9}, "its dynamic range"),
    ],
)
@pytest.mark.parametrize("other", ["decord", "torchcodec"])
def test_unusual_files_are_left_to_pyav(tmp_path, caplog, other, name, changes, reason):
    path = write_video(tmp_path / name, **changes)
    caplog.set_level(logging.DEBUG)
    np.testing.assert_array_equal(read(path, other).frames, read(path).frames)
    fallbacks = [record for record in caplog.records if FALLS_BACK in record.getMessage()]
    assert [record.levelname for record in fallbacks] == ["DEBUG"]
    assert fallbacks[0].getMessage() == f"{path}: decoding with PyAV instead of {other} because of {reason}"


def test_rotated_files_are_left_to_pyav(tmp_path, caplog):
    source, path = write_video(tmp_path / "flat.mp4"), tmp_path / "rotated.mp4"
    with av.open(str(source)) as container, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(container.streams.video[0], opaque=True)
        stream.set_display_rotation(90)
        for packet in container.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    caplog.set_level(logging.DEBUG)
    np.testing.assert_array_equal(read(path, "decord").frames, read(path).frames)
    assert "because of its display matrix" in caplog.text


def test_a_truncated_file_is_left_to_pyav(tmp_path, caplog):
    path = write_video(tmp_path / "clip.mkv")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    caplog.set_level(logging.DEBUG)
    np.testing.assert_array_equal(read(path, "decord").frames, read(path).frames)
    assert "because of damage" in caplog.text


def test_decord_does_not_decode_an_open_gop(tmp_path, caplog, reader):
    options = {"x265-params": "bframes=2:open-gop=1:keyint=15:min-keyint=15:scenecut=0:log-level=none"}
    path = write_video(tmp_path / "open.mp4", "libx265", options=options)
    clip, expected = read(path, reader), read(path)
    if reader == "decord":  # which would return frames of other times
        assert f"{path}: {FALLS_BACK}, because decord cannot (its keyframes have other times)" in caplog.text
        np.testing.assert_array_equal(clip.frames, expected.frames)
    else:
        assert FALLS_BACK not in caplog.text


def test_a_playlist_is_refused_before_a_reader_sees_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "decord", SimpleNamespace(DECORDError=OSError))  # any use raises AttributeError
    secret = write_video(tmp_path / "secret.mp4")
    for name, text in (
        ("list.m3u8", f"#EXTM3U\n#EXTINF:1,\n{secret}\n"),
        ("list.mp4", f"ffconcat version 1.0\nfile {secret}\n"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ClipError):
            read(tmp_path / name, "decord")


# A stand-in for torchcodec, so that its use is tested where FFmpeg is missing.


class FakeDecoder:
    """torchcodec's VideoDecoder on top of PyAV."""

    late_seconds, offset, error = 0.0, 0, ""
    metadata = SimpleNamespace(end_stream_seconds=3.9)  # as if the last frame had no duration
    opened: list[dict] = []  # noqa: RUF012

    def __init__(self, path, **options):
        if self.error:
            raise RuntimeError(self.error)
        self.opened.append(options)
        convert = VideoReformatter().reformat
        with av.open(path) as container:
            self.frames = [
                (float(frame.pts * frame.time_base), convert(frame, format="rgb24").to_ndarray())
                for frame in container.decode(video=0)
            ]

    def __len__(self):
        return len(self.frames)

    def get_frames_at(self, indices):
        return self.get_frames_played_at([self.frames[index][0] for index in indices])

    def get_frames_played_at(self, seconds):
        times = np.array([time for time, _ in self.frames])
        numbers = np.searchsorted(times, seconds, side="right") - 1
        images = np.stack([self.frames[min(number + self.offset, len(times) - 1)][1] for number in numbers])
        return SimpleNamespace(
            data=torch.from_numpy(images), pts_seconds=torch.from_numpy(times[numbers]) + self.late_seconds
        )


@pytest.fixture
def fake(monkeypatch):
    kind = type("Fake", (FakeDecoder,), {"opened": []})
    monkeypatch.delitem(sys.modules, "decord", raising=False)
    monkeypatch.setitem(sys.modules, "torchcodec", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", SimpleNamespace(VideoDecoder=kind))
    return kind


def test_the_device_is_passed_on(tmp_path, fast_conversion, caplog, fake):
    path = write_video(tmp_path / "clip.mp4")
    caplog.set_level(logging.DEBUG)
    all_frames = FixedRateSampler(frames_per_second=FPS, side=48)
    clip = read_clip(path, all_frames, reader="torchcodec:cuda:1")
    np.testing.assert_array_equal(clip.frames, read_clip(path, all_frames).frames)
    assert len(clip.frames) == 40
    assert [options["device"] for options in fake.opened] == ["cuda:1"]
    assert FALLS_BACK not in caplog.text


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"late_seconds": 0.1}, "its frames have other times"),
        ({"offset": 1}, "its first frame differs by"),
        ({"error": "Unsupported device\nmore"}, "(Unsupported device)"),
    ],
)
def test_wrong_frames_are_noticed(tmp_path, caplog, fake, fault, reason):
    for name, value in fault.items():
        setattr(fake, name, value)
    path = write_video(tmp_path / "clip.mp4")
    np.testing.assert_array_equal(read(path, "torchcodec").frames, read(path).frames)
    (message,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert message.startswith(f"{path}: {FALLS_BACK}, because torchcodec cannot") and reason in message


# Choice of the reader.


def test_missing_packages_and_unknown_readers(tmp_path, monkeypatch):
    path = write_video(tmp_path / "clip.mp4")
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(ValueError, match=r"reader decord cannot be loaded .*pip install 'salmonn\[decord\]'"):
        read(path, "decord")
    for name in ("opencv", "decord:tpu", "pyav:cuda"):
        with pytest.raises(ValueError, match=f"there is no reader '{name}'; use pyav, decord"):
            read(path, name)


def test_a_captioner_has_the_reader_of_its_flags(tmp_path, captioner, random_model, fake, monkeypatch, call):
    from salmonn.caption.captioner import Captioner
    from salmonn.caption.generator import CaptionRequest

    chosen = Captioner.load(random_model, reader="torchcodec:cuda")
    request = CaptionRequest(tmp_path / "clip.mp4")
    assert captioner.read_spec(request).reader == "pyav"
    assert chosen.read_spec(request).reader == "torchcodec:cuda"
    # On the GPU of the model, since a worker process would use the first.
    monkeypatch.setattr(type(chosen.network), "device", torch.device("cuda", 3))
    assert chosen.read_spec(request).reader == "torchcodec:cuda:3"
    video = write_video(tmp_path / "clip.mp4")
    code, _, error = call("caption", video, "--reader", "opencv", "--out", tmp_path / "captions.jsonl")
    assert code == 2 and "there is no reader 'opencv'" in error
