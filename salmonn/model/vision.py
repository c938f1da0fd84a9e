"""Sight: SigLIP tower -> projections to the language model's width."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import SiglipVisionModel


class VisionTower(nn.Module):
    """Turns each frame into a token for every patch, and one of the whole frame.

    Patches tell what a thing is, the last token tells where: it sees all patches side by side, each through weights of
    its own. From the patches' tokens alone a small decoder, which at first averages over them, does not learn places.

    The encoder sees each frame together with the one before it in its clip (the first one twice), so that a patch tells
    what changes in it, as the patches of Qwen2.5-VL (arXiv 2502.13923) span two frames.

    Args:
        encoder: SigLIP's vision model of 6 channels and N patches, without its pooling head.
        projector: D_v -> D, D the language model's width.
        whole: N * D_v -> D.
    """

    def __init__(self, encoder: SiglipVisionModel, projector: nn.Module, whole: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.whole = whole

    @property
    def tokens_per_frame(self) -> int:
        """Number of tokens P = N + 1 that each frame becomes."""
        return int(self.encoder.embeddings.num_patches) + 1

    def forward(self, frames: Tensor, lengths: Sequence[int]) -> Tensor:
        """Encode frames.

        Args:
            frames: (F, 3, H, W) uint8, of all clips one after the other.
            lengths: number of frames of each clip; they sum to F.

        Returns:
            (F, P, D)
        """
        pixels = frames.to(self.encoder.dtype) / 127.5 - 1  # SigLIP's mean and deviation are 0.5
        before = torch.cat([torch.cat([clip[:1], clip[:-1]]) for clip in pixels.split(list(lengths))])
        patches = self.encoder(torch.cat([before, pixels], dim=1)).last_hidden_state
        return torch.cat([self.projector(patches), self.whole(patches.flatten(1))[:, None]], dim=1)
