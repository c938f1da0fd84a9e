"""Audio tower: Whisper's encoder, a window Q-Former and a projection to the language model's width."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder


class WindowQFormer(nn.Module):
    """Q-Former over short windows of audio, so that each token has a time.

    Args:
        qformer: BERT-like layers with cross-attention to the audio.
        num_queries: learned queries Q of each window.
        window: audio steps in a window.
        stride: audio steps between the starts of windows.
    """

    def __init__(self, qformer: Blip2QFormerModel, *, num_queries: int, window: int, stride: int) -> None:
        super().__init__()
        self.qformer = qformer
        self.window = window
        self.stride = stride
        self.queries = nn.Parameter(torch.randn(1, num_queries, qformer.config.hidden_size) * 0.02)

    def forward(self, steps: Tensor) -> Tensor:
        """Query each window of each chunk; steps at the end of a chunk that fill no window are ignored.

        Args:
            steps: encoder output, (C, S, D_a), with S at least one window.

        Returns:
            (C, W, Q, D_q) with W = (S - window) // stride + 1.
        """
        windows = steps.unfold(1, self.window, self.stride).transpose(2, 3)
        num_chunks, num_windows = windows.shape[:2]
        queries = self.queries.expand(num_chunks * num_windows, -1, -1)
        hidden = self.qformer(query_embeds=queries, encoder_hidden_states=windows.flatten(0, 1)).last_hidden_state
        return hidden.unflatten(0, (num_chunks, num_windows))


class AudioTower(nn.Module):
    """Encoder of log-mel chunks to Q tokens per window.

    Args:
        encoder: Whisper's encoder; all chunks have the length that it was built for.
        norm: layer between encoder and Q-Former: a LayerNorm in video-SALMONN 2, the identity in 2+.
        qformer: the window Q-Former.
        projector: projection D_q -> D to the language model's width.
        adds_chunk_positions: whether the position of a chunk in the clip is added to its tokens (video-SALMONN 2).
    """

    def __init__(
        self,
        encoder: WhisperEncoder,
        norm: nn.Module,
        qformer: WindowQFormer,
        projector: nn.Module,
        *,
        adds_chunk_positions: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.norm = norm
        self.qformer = qformer
        self.projector = projector
        self.adds_chunk_positions = adds_chunk_positions

    def forward(self, mels: Sequence[Tensor]) -> list[Tensor]:
        """Encode each clip's log-mel chunks (C_i, M, T) to (C_i * W * Q, D)."""
        mel = torch.cat(list(mels)).to(self.encoder.conv1.weight.dtype)
        tokens = self.projector(self.qformer(self.norm(self.encoder(mel).last_hidden_state))).flatten(1, 2)
        parts = tokens.split([len(clip) for clip in mels])
        if self.adds_chunk_positions:
            parts = tuple(part + chunk_positions(len(part), part.shape[-1]).to(part)[:, None] for part in parts)
        return [part.flatten(0, 1) for part in parts]


def chunk_positions(num_chunks: int, width: int) -> Tensor:
    """Compute position embeddings of chunks, (C, D): zeros for the first, then interleaved sines and cosines."""
    rates = torch.exp(torch.arange(0, width, 2, dtype=torch.float32) * -(math.log(10000.0) / width))
    angles = torch.arange(num_chunks - 1, dtype=torch.float32)[:, None] * rates
    positions = torch.zeros(num_chunks, width)
    positions[1:, 0::2], positions[1:, 1::2] = torch.sin(angles), torch.cos(angles)
    return positions
