"""Sight: SigLIP tower -> pooling -> projection to the language model's width."""

from torch import Tensor, nn
from transformers import SiglipVisionModel


class VisionTower(nn.Module):
    """Turns frames into a square grid of tokens each.

    Args:
        encoder: SigLIP's vision model, without its pooling head.
        projector: D_v -> D, D the language model's width.
        pool: side of the max pooling over the grid of patches, after the projection (1: none).
    """

    def __init__(self, encoder: SiglipVisionModel, projector: nn.Module, *, pool: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.pool = nn.MaxPool2d(pool, stride=pool)

    @property
    def tokens_per_frame(self) -> int:
        """Number of tokens P that each frame becomes."""
        config = self.encoder.config
        return (config.image_size // config.patch_size // self.pool.stride) ** 2

    def forward(self, frames: Tensor) -> Tensor:
        """Encode frames (F, 3, H, W) uint8 into tokens (F, P, D)."""
        pixels = frames.to(self.encoder.dtype) / 127.5 - 1  # SigLIP's mean and deviation are 0.5
        patches = self.projector(self.encoder(pixels).last_hidden_state)
        side = int(patches.shape[1] ** 0.5)
        grid = patches.transpose(1, 2).unflatten(2, (side, side))
        return self.pool(grid).flatten(2).transpose(1, 2)
