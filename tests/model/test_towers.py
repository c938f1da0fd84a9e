"""The towers' shapes, and that each token keeps to its own place and time."""

import pytest
import torch
from transformers import Blip2QFormerConfig, Blip2QFormerModel
from transformers.modeling_outputs import BaseModelOutput

from salmonn.model.qformer import WindowQFormer
from salmonn.model.vision import VisionTower


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
    frames = torch.randint(0, 256, (5, 3, 48, 48), dtype=torch.uint8)
    tokens = vision(frames, [3, 2])
    # 48 / 16 = 3 patches a side, and the token of the whole.
    assert vision.tokens_per_frame == 10 and tokens.shape == (5, 10, 128)
    assert torch.allclose(tokens[3:], vision(frames[3:], [2]), atol=1e-5)  # a clip sees nothing of the clip before


@torch.no_grad()
def test_a_frame_is_seen_with_the_one_before_it(captioner):
    seen = []
    vision = captioner.network.vision
    vision.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    frames = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1).expand(5, 3, 48, 48) * 50
    vision(frames, [3, 0, 2])
    before, now = ((seen[0][:, channel, 0, 0] + 1) * 127.5 / 50 for channel in (2, 3))
    assert now.round().tolist() == [0, 1, 2, 3, 4]
    assert before.round().tolist() == [0, 0, 1, 3, 3]


@torch.no_grad()
def test_a_token_for_each_patch_and_one_of_all_side_by_side(captioner):
    vision = captioner.network.vision
    patches = torch.arange(9.0).reshape(1, 9, 1)
    vision.encoder.register_forward_hook(lambda *_: BaseModelOutput(last_hidden_state=patches))
    tower = VisionTower(vision.encoder, torch.nn.Identity(), torch.nn.Linear(9, 1, bias=False))
    tower.whole.weight[:] = 10.0 ** -torch.arange(9)
    tokens = tower(torch.zeros(1, 3, 48, 48, dtype=torch.uint8), [1])
    assert tokens.flatten().tolist() == pytest.approx([*range(9), 0.12345678])


@torch.no_grad()
def test_pixels_are_scaled_to_minus_one_to_one(captioner):
    seen = []
    captioner.network.vision.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    frames = torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1).expand(2, 3, 48, 48)
    captioner.network.vision(frames, [1, 1])
    assert seen[0][0].unique().tolist() == [-1] and seen[0][1].unique().tolist() == [1]
