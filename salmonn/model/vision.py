"""Sight: SigLIP (video-SALMONN 2) or Qwen2.5-VL's vision transformer (2+) -> tokens of the language model's width.

Pretrained encoders are transformers' own; here is what the published models put around them.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SiglipVisionModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

Grid = tuple[int, int, int]  # steps, rows and columns of patches


class SiglipTower(nn.Module):
    """Turns each frame into a square of pooled tokens, each row closed by a learned one (LLaVA-OneVision's "grid").

    Args:
        encoder: SigLIP's vision model without its last layer, pooling head and final norm; N patches.
        projector: D_v -> D, D the language model's width.
        pool: side of the squares of patches of which the greatest values are kept.
    """

    def __init__(self, encoder: SiglipVisionModel, projector: nn.Module, *, width: int, pool: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.encoder.post_layernorm = nn.Identity()  # the published features come before it
        self.projector = projector
        self.newline = nn.Parameter(torch.zeros(width))
        self.pool = pool

    def forward(self, frames: Sequence[Tensor], _grids: Sequence[Grid]) -> list[Tensor]:
        """Encode each clip's frames (F_i, 3, H, W) uint8 into (F_i * P, D), P = n (n + 1) with n = sqrt(N) / pool."""
        # SigLIP's mean and deviation are 0.5; in 16 bits greys would be rounded before the encoder sees them.
        pixels = (torch.cat(list(frames)).float() / 127.5 - 1).to(self.newline.dtype)
        patches = self.projector(self.encoder(pixels).last_hidden_state)
        side = int(patches.shape[1] ** 0.5)
        square = F.max_pool2d(patches.transpose(1, 2).unflatten(2, (side, side)), self.pool)
        rows = torch.cat([square, self.newline[:, None, None].expand(len(square), -1, square.shape[2], 1)], dim=3)
        tokens = rows.flatten(2).transpose(1, 2)
        return [part.flatten(0, 1) for part in tokens.split([len(clip) for clip in frames])]


class QwenTower(nn.Module):
    """Turns patches of pairs of frames into one token for each square of them.

    Args:
        encoder: Qwen2.5-VL's vision transformer with its merger, which gives the language model's width D.
    """

    def __init__(self, encoder: Qwen2_5_VisionTransformerPretrainedModel) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, patches: Sequence[Tensor], grids: Sequence[Grid]) -> list[Tensor]:
        """Encode each clip's patches (T h w, C * 2 * p * p) uint8 of a grid (T, h, w) into (T h w / merge^2, D)."""
        lengths = [len(clip) // self.encoder.spatial_merge_unit for clip in patches]
        return list(self.encode(normalise(torch.cat(list(patches))), grids).split(lengths))

    def encode(self, pixels: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Normalised patches of all clips, one after the other -> their tokens."""
        grid = torch.tensor(grids, device=pixels.device)
        return self.encoder(pixels.to(self.encoder.dtype), grid_thw=grid).pooler_output


def normalise(patches: Tensor) -> Tensor:
    """Patches (S, C * 2 * p * p) uint8 as the encoder was trained on: by each channel's mean and deviation."""
    mean, deviation = (
        torch.tensor(values, device=patches.device).repeat_interleave(patches.shape[1] // 3)
        for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    )
    return (patches / 255 - mean) / deviation


def to_patches(frames: Tensor, *, patch: int, merge: int) -> tuple[Tensor, Grid]:
    """Cut frames into the patches of Qwen2.5-VL, squares of `merge` x `merge` together, two frames deep.

    Args:
        frames: (F, C, H, W), H and W multiples of patch * merge; of an odd number the last is doubled.

    Returns:
        (T h w, C * 2 * patch * patch) and the grid (T, h, w).
    """
    if len(frames) % 2:
        frames = torch.cat([frames, frames[-1:]])
    steps, channels, rows, columns = (
        len(frames) // 2,
        frames.shape[1],
        frames.shape[2] // patch,
        frames.shape[3] // patch,
    )
    cut = frames.reshape(steps, 2, channels, rows // merge, merge, patch, columns // merge, merge, patch).permute(
        0, 3, 6, 4, 7, 2, 1, 5, 8
    )
    return cut.reshape(steps * rows * columns, channels * 2 * patch * patch), (steps, rows, columns)
