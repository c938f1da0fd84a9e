"""Frames that the published models sample, and their sizes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as smart_resize_video

from salmonn.media.frame_sampling import (
    BudgetSampler,
    EvenCountSampler,
    FixedRateSampler,
    FrameOptions,
    IntervalBudgetSampler,
    UniformSampler,
)


def published_fixed_rate(num_frames: int, rate: float, *, max_frames: int = 110) -> list[int]:
    """Return the numbers of the frames that the published code of video-SALMONN 2 samples at one per second."""
    places = list(range(0, num_frames, max(round(rate / 1.0), 1)))
    if len(places) > max_frames:
        places = np.linspace(0, num_frames - 1, max_frames, dtype=int).tolist()
    return places


def published_uniform(num_frames: int, rate: float, *, least: int, most: int) -> list[int]:
    """Return the numbers of the frames that the code of 2+ samples, ten per second."""
    count = min(max(round(num_frames / rate / 0.1), least), most)
    return np.unique(np.linspace(0, num_frames - 1, count, dtype=int)).tolist()


VIDEOS = [(1, 25.0), (7, 30.0), (75, 25.0), (301, 29.97), (1530, 30.0), (4000, 23.976), (90_000, 60.0), (3, 0.5)]


@pytest.mark.parametrize(("num_frames", "rate"), VIDEOS)
def test_times_at_a_constant_rate_are_the_published_frames(num_frames, rate):
    def numbers(times):
        # Half a frame on, the frame that is on screen at its own time is surely on screen.
        return np.floor((times - 5.0) * rate + 0.5).astype(int).tolist()

    seconds = num_frames / rate
    assert numbers(FixedRateSampler().sample_times(5.0, seconds, num_frames)) == published_fixed_rate(num_frames, rate)
    assert numbers(UniformSampler().sample_times(5.0, seconds, num_frames)) == published_uniform(
        num_frames, rate, least=16, most=768
    )


@pytest.mark.parametrize("size", [(720, 1280), (1080, 1920), (96, 96), (20, 20), (480, 640), (333, 777), (768, 1024)])
@pytest.mark.parametrize("num_sampled", [16, 100, 190, 767, 768])
def test_sizes_are_those_of_qwens_processor(size, num_sampled):
    most = 61_250 if num_sampled == 768 else 0.95 * 768 / num_sampled * 61_250
    assert UniformSampler().frame_size(*size, num_sampled) == smart_resize(
        *size, factor=28, min_pixels=784, max_pixels=most
    )


@pytest.mark.parametrize(("num_frames", "rate"), [*VIDEOS, (100, 10.0), (25, 29.97)])
def test_qwen3_vl_samples_the_frames_of_transformers(num_frames, rate):
    """The method of its video processor, which needs torchvision to be built."""
    processor = SimpleNamespace(fps=2, min_frames=4, max_frames=768)
    metadata = SimpleNamespace(total_num_frames=num_frames, fps=rate)
    times = BudgetSampler().sample_times(5.0, num_frames / rate, num_frames)
    published = Qwen3VLVideoProcessor.sample_frames(processor, metadata)
    assert np.allclose((times - 5.0) * rate, published, atol=1e-6)


@pytest.mark.parametrize("size", [(720, 1280), (1080, 1920), (96, 96), (20, 20), (480, 640), (333, 777), (24, 2000)])
@pytest.mark.parametrize("num_sampled", [2, 4, 7, 20, 103, 767, 768])
@pytest.mark.parametrize("capped", [True, False])
def test_sizes_are_those_of_qwen3_vls_processor(size, num_sampled, capped):
    """With the published pixel budget, and the limit of a frame's area that Qwen's own preprocessing has."""
    most = 25_165_824
    if capped:  # as `Qwen3VLVideoProcessor.resize` with cap_pixels_per_frame
        most = num_sampled * max(min(768 * 32 * 32, most // num_sampled), int(4096 * 1.05))
    sampler = BudgetSampler() if capped else BudgetSampler(frame_pixels=None)
    assert sampler.frame_size(*size, num_sampled) == smart_resize_video(
        num_sampled, *size, factor=32, min_pixels=4096, max_pixels=most
    )


@pytest.mark.parametrize(("num_frames", "rate"), VIDEOS)
def test_d_orca_samples_the_published_frames(num_frames, rate):
    """Two per second, as `real_torchcodec` of its code selects them, in a budget for all of them together."""
    sampler = IntervalBudgetSampler()
    times = sampler.sample_times(5.0, num_frames / rate, num_frames)
    count = min(max(round(num_frames / rate / 0.5), 1), 128)
    published = np.unique(np.linspace(0, num_frames - 1, count, dtype=int))
    assert np.floor((times - 5.0) * rate + 0.5).astype(int).tolist() == published.tolist()
    assert sampler.frame_size(720, 1280, 90) == smart_resize_video(
        90, 720, 1280, factor=32, min_pixels=784, max_pixels=128 * 176_400
    )


def test_options_of_qwen3_vl():
    sampler = BudgetSampler()
    assert sampler.with_options(FrameOptions(num_frames=3)).sample_times(0.0, 4.0, 41).tolist() == [
        0,
        80 / 41,
        160 / 41,
    ]
    assert len(sampler.with_options(FrameOptions(frames_per_second=0.5)).sample_times(0.0, 4.0, 40)) == 2
    assert sampler.with_options(FrameOptions(max_pixels=96 * 96)).frame_size(720, 720, 4) == (96, 96)
    with pytest.raises(ValueError, match="max_pixels is 1023; the minimum of this model is 1024"):
        sampler.with_options(FrameOptions(max_pixels=1023))


def test_salmonn2_scales_to_squares():
    assert FixedRateSampler().frame_size(720, 1280, 9) == (384, 384)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (FrameOptions(), [0, 1, 2, 3]),
        (FrameOptions(frames_per_second=2), [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]),
        (FrameOptions(frames_per_second=0.5), [0, 2]),
        (FrameOptions(num_frames=3), [0, 1.9, 3.9]),
        (FrameOptions(num_frames=100), np.arange(40) / 10),
        (FrameOptions(num_frames=1), [0]),
    ],
)
def test_options_choose_the_frames_of_salmonn2(options, expected):
    """Four seconds at ten frames per second."""
    assert FixedRateSampler().with_options(options).sample_times(0, 4, 40) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (FrameOptions(frames_per_second=1), [0, 1.3, 2.6, 3.9]),
        (FrameOptions(frames_per_second=0.25), [0]),
        (FrameOptions(num_frames=3), [0, 1.9, 3.9]),
        (FrameOptions(num_frames=100), np.arange(40) / 10),
    ],
)
def test_options_choose_the_frames_of_salmonn2_plus(options, expected):
    """`min_frames` is for the model's own choice."""
    assert UniformSampler().with_options(options).sample_times(0, 4, 40) == pytest.approx(expected)


def test_max_pixels_limits_each_frame():
    sampler = UniformSampler().with_options(FrameOptions(max_pixels=28 * 28 * 12))
    for num_sampled in (1, 16, 768):
        assert sampler.frame_size(720, 960, num_sampled) == (3 * 28, 4 * 28)
    assert UniformSampler().with_options(FrameOptions(max_pixels=10**9)).frame_size(720, 960, 768) == (
        UniformSampler().frame_size(720, 960, 768)
    )


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        (FixedRateSampler(), {"num_frames": 111}, "num_frames is 111; the maximum of this model is 110"),
        (UniformSampler(), {"num_frames": 769}, "the maximum of this model is 768"),
        (FixedRateSampler(), {"max_pixels": 10**6}, "this model scales all frames to 384 x 384"),
        (UniformSampler(), {"max_pixels": 783}, "the minimum of this model is 784"),
        (UniformSampler(), {"frames_per_second": float("nan")}, "fps must be from 0.01 to 1000, got nan"),
        (UniformSampler(), {"num_frames": 0}, "num_frames must be at least 1"),
        (UniformSampler(), {"num_frames": 2, "frames_per_second": 1}, "exclude each other"),
    ],
)
def test_impossible_options_are_refused(sampler, options, message):
    with pytest.raises(ValueError, match=message):
        sampler.with_options(FrameOptions(**options))


def published_even_count(num_frames: int, rate: float) -> list[int]:
    """Return the numbers of the frames that qwen-omni-utils samples, two per second."""
    count = min(max(num_frames / rate * 2.0, 4), 2 * (min(768, num_frames) // 2), num_frames)
    return torch.linspace(0, num_frames - 1, 2 * int(count // 2)).round().long().tolist()


@pytest.mark.parametrize(("num_frames", "rate"), [*VIDEOS[1:], (5, 25.0), (9_999, 29.97), (301, 10.0), (100_000, 24.0)])
def test_even_counts_are_the_published_frames(num_frames, rate):
    times = EvenCountSampler().sample_times(3.0, num_frames / rate, num_frames)
    assert np.rint((times - 3.0) * rate).astype(int).tolist() == published_even_count(num_frames, rate)
    assert len(times) % 2 == 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (FrameOptions(), [0, 4, 9, 13, 17, 22, 26, 30, 35, 39]),
        (FrameOptions(frames_per_second=0.5), [0, 39]),
        (FrameOptions(num_frames=3), [0, 20, 39]),
        (FrameOptions(num_frames=100), list(range(40))),
    ],
)
def test_even_counts_follow_a_request(options, expected):
    """A video of 40 frames in 5 s; 39 / 2 is rounded to the even number."""
    times = EvenCountSampler().with_options(options).sample_times(0.0, 5.0, 40)
    assert np.rint(times * 8).astype(int).tolist() == expected


def test_a_requested_rate_overrides_a_configured_count():
    sampler = EvenCountSampler(num_frames=3)
    assert len(sampler.with_options(FrameOptions()).sample_times(0.0, 5.0, 40)) == 3
    assert len(sampler.with_options(FrameOptions(frames_per_second=2.0)).sample_times(0.0, 5.0, 40)) == 10


def test_even_counts_of_a_single_frame():
    assert EvenCountSampler().sample_times(0.0, 0.04, 1).tolist() == [0.0]


@pytest.mark.parametrize("size", [(720, 1280), (1080, 1920), (96, 96), (480, 640), (333, 777)])
@pytest.mark.parametrize("num_sampled", [4, 120, 400, 768])
def test_sizes_of_even_counts_are_those_of_qwen(size, num_sampled):
    """Of all options of a captioner: 512 tokens in two frames, and 25,600 in all, but not much below 128."""
    sampler = EvenCountSampler(max_pixels=512 * 784, total_pixels=25_600 * 784)
    most = min(max(min(512 * 784, 25_600 * 784 / num_sampled * 2), int(128 * 784 * 1.05)), 512 * 784)
    assert sampler.frame_size(*size, num_sampled) == smart_resize(
        *size, factor=28, min_pixels=128 * 784, max_pixels=most
    )
    smaller = sampler.with_options(FrameOptions(max_pixels=200_000))
    assert np.prod(smaller.frame_size(*size, 4)) <= 200_000
