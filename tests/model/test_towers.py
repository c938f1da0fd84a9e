"""The towers' shapes, and the independence of tokens of other positions and times."""

import math

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import Blip2QFormerConfig, Blip2QFormerModel, SiglipVisionConfig, SiglipVisionModel
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from salmonn.model.attention import use_window_attention
from salmonn.model.towers import QwenTower, SiglipTower, WindowQFormer, chunk_positions, normalize, to_patches


@pytest.fixture(scope="module")
def qformer():
    torch.manual_seed(0)
    config = Blip2QFormerConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, cross_attention_frequency=1,
        encoder_hidden_size=12,
    )  # fmt: skip
    return WindowQFormer(Blip2QFormerModel(config), num_queries=3, window=5, stride=5).eval()


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


@pytest.mark.parametrize(("window", "stride", "num_windows"), [(5, 5, 4), (6, 4, 5), (4, 7, 3), (22, 1, 1)])
def test_windows_equal_those_of_unfold(qformer, window, stride, num_windows):
    """The published code uses `unfold`, which ignores a remainder shorter than a window."""
    qformer.window, qformer.stride = window, stride
    steps = torch.randn(2, 22, 12)
    unfolded = torch.nn.functional.unfold(steps.transpose(1, 2).unsqueeze(2), (1, window), stride=(1, stride))
    windows = unfolded.unflatten(1, (12, window)).permute(0, 3, 2, 1)
    assert windows.shape == (2, num_windows, window, 12)
    expected = [
        qformer.qformer(query_embeds=qformer.queries, encoder_hidden_states=steps[None]).last_hidden_state[0]
        for chunk in windows
        for steps in chunk
    ]
    assert torch.allclose(qformer(steps).flatten(0, 1), torch.stack(expected), atol=1e-6)


@torch.no_grad()
def test_audio_tower(captioner):
    audio = captioner.network.audio
    # 8 s chunks of 800 mel frames are 400 steps of 20 ms, 25 to a window of half a second.
    long, short = audio([torch.randn(2, 40, 800), torch.randn(1, 40, 800)])
    assert long.shape == (32, 128) and short.shape == (16, 128)


def test_chunk_positions():
    positions = chunk_positions(3, 4)
    assert positions[0].tolist() == [0, 0, 0, 0]
    assert positions[1].tolist() == [0, 1, 0, 1]  # sines and cosines of 0
    expected = [math.sin(1), math.cos(1), math.sin(0.01), math.cos(0.01)]  # 10000 ** -(2 / 4) = 0.01
    assert positions[2].tolist() == pytest.approx(expected, abs=1e-6)


@torch.no_grad()
def test_qwen_tower(plus):
    vision = plus.network.vision
    frames = torch.randint(0, 256, (8, 3, 48, 48), dtype=torch.uint8)
    clips = [to_patches(part, patch=8, merge=3) for part in frames.split([6, 2])]
    first, second = vision([patches for patches, _ in clips], [grid for _, grid in clips])
    # 48 / 8 = 6 patches a side, 3 x 3 of them a token, two frames a step.
    assert clips[0][1] == (3, 6, 6) and first.shape == (12, 128) and second.shape == (4, 128)
    (separate,) = vision([clips[1][0]], [clips[1][1]])
    assert torch.allclose(second, separate, atol=1e-5)


def test_patches_equal_those_of_transformers():
    """Compared with Qwen2-VL's own image processor, which treats an image as two equal frames."""
    image = np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    processor = Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, do_resize=False)
    published = processor(image, return_tensors="pt")
    frames = torch.from_numpy(image).permute(2, 0, 1)[None]
    patches, grid = to_patches(frames, patch=14, merge=2)
    assert [list(grid)] == published["image_grid_thw"].tolist()
    assert torch.allclose(normalize(patches), published["pixel_values"], atol=1e-5)


def test_two_frames_are_one_step_and_an_odd_one_is_repeated():
    frames = torch.arange(3, dtype=torch.uint8).reshape(3, 1, 1, 1).expand(3, 3, 4, 4)
    patches, grid = to_patches(frames, patch=2, merge=2)
    assert grid == (2, 2, 2)
    by_frame = patches.reshape(8, 3, 2, 2, 2)  # patch, channel, frame, row, column
    assert by_frame[:4, :, 0].unique().tolist() == [0] and by_frame[:4, :, 1].unique().tolist() == [1]
    assert by_frame[4:].unique().tolist() == [2]


@torch.no_grad()
def test_siglip_tower():
    """Pooled features of frames, each row followed by the learned token."""
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=20, patch_size=4,
        vision_use_head=False,
    )  # fmt: skip
    tower = SiglipTower(SiglipVisionModel(config), torch.nn.Linear(8, 6), width=6, pool=2).eval()
    tower.newline.data.fill_(7.0)
    frames = torch.randint(0, 256, (3, 3, 20, 20), dtype=torch.uint8)
    first, second = tower([frames[:2], frames[2:]], [])
    # 5 x 5 patches are pooled to 2 x 2, and each of the two rows ends with the learned token.
    assert first.shape == (12, 6) and second.shape == (6, 6)
    assert first[2].eq(7).all() and first[5].eq(7).all() and not first[3].eq(7).any()
    patches = tower.projector(tower.encoder(frames[2:] / 127.5 - 1).last_hidden_state)[0]
    assert torch.allclose(second[0], patches[[0, 1, 5, 6]].amax(0), atol=1e-5)


@torch.no_grad()
def test_windows_go_through_attention_in_batches():
    """The features equal those of transformers' SDPA, which calls a kernel for each window of each layer."""
    torch.manual_seed(0)
    config = Qwen2_5_VLVisionConfig(
        depth=3, hidden_size=32, num_heads=2, intermediate_size=48, out_hidden_size=24, patch_size=2, window_size=16,
        fullatt_block_indexes=[1],
    )  # fmt: skip
    tower = QwenTower(Qwen2_5_VisionTransformerPretrainedModel._from_config(config, attn_implementation="sdpa")).eval()
    grids = [(4, 20, 12), (3, 8, 8)]  # windows of 64, 32 and 16 patches
    patches = [torch.randint(256, (math.prod(grid), 3 * 2 * 2 * 2), dtype=torch.uint8) for grid in grids]
    features, kernels = {}, {}
    for name in ("transformers", "ours"):
        if name == "ours":
            use_window_attention(tower.encoder.config)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            features[name] = tower(patches, grids)
        events = profiler.key_averages()
        kernels[name] = sum(event.count for event in events if event.key == "aten::scaled_dot_product_attention")
    for expected, ours in zip(features["transformers"], features["ours"], strict=True):
        assert (ours - expected).abs().max() < 1e-5 < expected.abs().max()
    # Two layers of 4 x 6 and 3 x 1 windows, and one with a window for each of the 7 steps.
    assert kernels == {"transformers": 2 * 27 + 7, "ours": 2 * 3 + 2}
