"""Hearing: Whisper encoder -> window Q-Former -> projection to the language model's width."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from salmonn.model.qformer import WindowQFormer


class AudioTower(nn.Module):
    """Turns log-mel chunks into one run of tokens a window.

    Args:
        encoder: Whisper's encoder; each chunk must have the length that it was built for.
        norm: between encoder and Q-Former; video-SALMONN 2 has one of its own, 2+ none.
        qformer: the window Q-Former.
        projector: D_q -> D, D the language model's width.
        tell_chunk: add to each chunk's tokens which chunk of the clip it is (video-SALMONN 2).
    """

    def __init__(
        self,
        encoder: WhisperEncoder,
        norm: nn.Module,
        qformer: WindowQFormer,
        projector: nn.Module,
        *,
        tell_chunk: bool,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.norm = norm
        self.qformer = qformer
        self.projector = projector
        self.tell_chunk = tell_chunk

    def forward(self, mels: Sequence[Tensor]) -> list[Tensor]:
        """Encode each clip's chunks (C_i, M, T) of log-mel features into (C_i * W * Q, D)."""
        mel = torch.cat(list(mels)).to(self.encoder.conv1.weight.dtype)
        tokens = self.projector(self.qformer(self.norm(self.encoder(mel).last_hidden_state))).flatten(1, 2)
        parts = tokens.split([len(clip) for clip in mels])
        if self.tell_chunk:
            parts = tuple(part + chunk_positions(len(part), part.shape[-1]).to(part)[:, None] for part in parts)
        return [part.flatten(0, 1) for part in parts]


def chunk_positions(num_chunks: int, width: int) -> Tensor:
    """What is added to the tokens of each chunk, (C, D): nothing to the first, then interleaved sines and cosines."""
    rates = torch.exp(torch.arange(0, width, 2, dtype=torch.float32) * -(math.log(10000.0) / width))
    angles = torch.arange(num_chunks - 1, dtype=torch.float32)[:, None] * rates
    positions = torch.zeros(num_chunks, width)
    positions[1:, 0::2], positions[1:, 1::2] = torch.sin(angles), torch.cos(angles)
    return positions
