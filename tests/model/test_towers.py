"""The towers' shapes, and that each token keeps to its own place and time."""

import pytest
import torch
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from salmonn.model.qformer import WindowQFormer


@pytest.fixture(scope="module")
def qformer():
    torch.manual_seed(0)
    config = Blip2QFormerConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, cross_attention_frequency=1,
        encoder_hidden_size=12,
    )  # fmt: skip
    return WindowQFormer(Blip2QFormerModel(config), num_queries=3, steps_per_window=5).eval()


@torch.no_grad()
def test_qformer_shape(qformer):
    assert qformer(torch.randn(2, 20, 12)).shape == (2, 4, 3, 16)  # 20 steps are 4 windows of 5


@torch.no_grad()
def test_a_window_depends_on_its_own_steps(qformer):
    steps = torch.randn(2, 20, 12)
    before = qformer(steps)
    steps[1, 10:15] += torch.randn(5, 12)  # chunk 1, window 2
    difference = (qformer(steps) - before).abs().amax((2, 3))
    assert difference[1, 2] > 1e-3
    difference[1, 2] = 0
    assert difference.max() < 1e-6


@torch.no_grad()
def test_queries_of_a_window_differ(qformer):
    hidden = qformer(torch.randn(1, 5, 12))[0, 0]
    assert (hidden[0] - hidden[1]).abs().max() > 1e-4


def test_windows_must_be_whole(qformer):
    with pytest.raises(ValueError, match="22 audio steps do not divide into windows of 5"):
        qformer(torch.randn(1, 22, 12))


@torch.no_grad()
def test_audio_tower(captioner):
    audio = captioner.network.audio
    # 8 s chunks of 800 mel frames are 400 steps of 20 ms, 25 to a window of half a second.
    assert audio(torch.randn(3, 40, 800)).shape == (3, 16, 1, 128)


@torch.no_grad()
def test_vision_tower(captioner):
    vision = captioner.network.vision
    frames = torch.randint(0, 256, (3, 3, 48, 48), dtype=torch.uint8)
    tokens = vision(frames)
    # 48 / 8 = 6 patches a side, pooled by 3 to 2 a side.
    assert vision.tokens_per_frame == 4 and tokens.shape == (3, 4, 128)
    assert torch.allclose(tokens[1], vision(frames[1:2])[0], atol=1e-5)


@torch.no_grad()
def test_pooling_takes_neighbouring_patches(captioner):
    vision = captioner.network.vision
    grid = torch.zeros(6, 6)
    grid[1, 2], grid[2, 3], grid[5, 0], grid[3, 5] = 1.0, 2.0, 3.0, 4.0  # one in each quarter
    vision.projector.register_forward_hook(lambda *_: grid.reshape(1, 36, 1))
    pooled = vision(torch.zeros(1, 3, 48, 48, dtype=torch.uint8))
    assert pooled.flatten().tolist() == [1, 2, 3, 4]  # upper left, upper right, lower left, lower right


@torch.no_grad()
def test_pixels_are_scaled_to_minus_one_to_one(captioner):
    seen = []
    captioner.network.vision.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    frames = torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1).expand(2, 3, 48, 48)
    captioner.network.vision(frames)
    assert seen[0][0].unique().tolist() == [-1] and seen[0][1].unique().tolist() == [1]
