"""A tiny Qwen3-VL with random weights, in the published layout, and what transformers makes of a clip and a prompt."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from salmonn.model.families.base import CLIP_END, CLIP_START, VIDEO_PAD

# Two deep layers of three, 4 x 4 positions for grids of other sizes; 16-pixel tokens.
TEXT = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, hidden_act="silu", max_position_embeddings=4096, rms_norm_eps=1e-6, rope_theta=10_000,
    initializer_range=0.2,
    rope_scaling=dict(rope_type="default", mrope_interleaved=True, mrope_section=[4, 2, 2]),
)  # fmt: skip
VISION = dict(
    depth=3, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=8, spatial_merge_size=2,
    temporal_patch_size=2, out_hidden_size=64, num_position_embeddings=16, deepstack_visual_indexes=[0, 1],
    hidden_act="gelu_pytorch_tanh", initializer_range=0.2,
)  # fmt: skip
IMAGE_ID = 0  # the padding token, which no prompt contains


def save_tiny(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Save the model and the tokenizer to a folder, as transformers does."""
    tokenizer.save_pretrained(str(folder))
    start, end, video = tokenizer.convert_tokens_to_ids([CLIP_START, CLIP_END, VIDEO_PAD])
    config = Qwen3VLConfig(
        text_config=TEXT | dict(vocab_size=len(tokenizer)),
        vision_config=VISION,
        image_token_id=IMAGE_ID,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(config)
    with torch.no_grad():  # fresh norms and biases are ones and zeros
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(str(folder))
    return folder


def expected_inputs(
    model: Qwen3VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    pixels: Tensor,
    *,
    frames_indices: list[int],
    rate: float,
    prompt: str,
) -> dict[str, Tensor]:
    """Return what transformers' processor makes of frames and a prompt; its video processor needs torchvision.

    Its methods are called one by one instead, with what `__call__` would pass them.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        pixels: (F, 3, H, W) uint8, of the final size.
        frames_indices: numbers of the frames in the video.
        rate: frames per second of the video.
        prompt: user message.
    """
    vision = model.config.vision_config
    patches, *grid = Qwen3VLVideoProcessor.patchify(
        None,
        ((pixels / 255 - 0.5) / 0.5)[None],
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
    )
    sizes = SimpleNamespace(merge_size=vision.spatial_merge_size, temporal_patch_size=vision.temporal_patch_size)
    processor = SimpleNamespace(
        video_processor=sizes, vision_start_token=CLIP_START, vision_end_token=CLIP_END, video_token=VIDEO_PAD
    )
    processor._calculate_timestamps = partial(Qwen3VLProcessor._calculate_timestamps, processor)
    metadata = SimpleNamespace(fps=rate, frames_indices=list(frames_indices))
    video = {"video_grid_thw": torch.tensor([grid]), "video_metadata": [metadata]}
    clip = Qwen3VLProcessor.replace_video_token(processor, video, 0)
    # The published chat template, without a system message.
    text = f"<|im_start|>user\n{clip}{prompt}<|im_end|>\n<|im_start|>assistant\n"
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": 2 * (ids == model.config.video_token_id).long(),
        "pixel_values_videos": patches[0],
        "video_grid_thw": video["video_grid_thw"],
    }
