"""Frames that the published models sample, and their sizes."""

import numpy as np
import pytest
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from salmonn.media.frame_sampling import FixedRateSampler, UniformSampler


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


def test_salmonn2_scales_to_squares():
    assert FixedRateSampler().frame_size(720, 1280, 9) == (384, 384)
