"""Vision and audio towers: the pretrained encoders of transformers, with the parts around them.

SigLIP (video-SALMONN 2) or the vision transformer of Qwen2.5-VL (2+) or Qwen3-VL for frames; Whisper, a window
Q-Former and a projection to the language model's width for audio, or the audio encoder of Qwen-Omni alone.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Blip2QFormerModel, SiglipVisionModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

Grid = tuple[int, int, int]  # steps, rows and columns of patches


class SiglipTower(nn.Module):
    """Encoder of frames to squares of pooled tokens, each row followed by a learned token (LLaVA-OneVision's "grid").

    Args:
        encoder: SigLIP's vision model without last layer, pooling head and final norm.
        projector: projection D_v -> D to the language model's width.
        width: D.
        pool: side length of the squares of patches for max pooling.
    """

    def __init__(self, encoder: SiglipVisionModel, projector: nn.Module, *, width: int, pool: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.encoder.post_layernorm = nn.Identity()  # the published features are taken before it
        self.projector = projector
        self.newline = nn.Parameter(torch.zeros(width))
        self.pool = pool

    def forward(self, frames: Sequence[Tensor], _grids: Sequence[Grid]) -> list[Tensor]:
        """Encode each clip's frames.

        Args:
            frames: (F_i, 3, H, W) uint8 of each clip.
            _grids: unused.

        Returns:
            (F_i * n (n + 1), D) for each clip, with n = sqrt(P) / pool.
        """
        # SigLIP's mean and standard deviation are 0.5. Scaled in 16 bits, gray levels would be rounded.
        pixels = (torch.cat(list(frames)).float() / 127.5 - 1).to(self.newline.dtype)
        patches = self.projector(self.encoder(pixels).last_hidden_state)
        side = int(patches.shape[1] ** 0.5)
        square = F.max_pool2d(patches.transpose(1, 2).unflatten(2, (side, side)), self.pool)
        rows = torch.cat([square, self.newline[:, None, None].expand(len(square), -1, square.shape[2], 1)], dim=3)
        tokens = rows.flatten(2).transpose(1, 2)
        return [part.flatten(0, 1) for part in tokens.split([len(clip) for clip in frames])]


class QwenTower(nn.Module):
    """Encoder of patches of two frames each (Qwen2.5-VL, Qwen3-VL); squares of patches are merged to one token.

    Args:
        encoder: Qwen2.5-VL's vision transformer with its merger, whose output has the language model's width D, or
            Qwen3-VL's, which also outputs features of K inner layers.
        mean, std: mean and standard deviation of each color channel, of pixels from 0 to 1.
    """

    def __init__(
        self,
        encoder: Qwen2_5_VisionTransformerPretrainedModel | Qwen3VLVisionModel,
        *,
        mean: Sequence[float] = OPENAI_CLIP_MEAN,
        std: Sequence[float] = OPENAI_CLIP_STD,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.mean = tuple(mean)
        self.std = tuple(std)

    def forward(self, patches: Sequence[Tensor], grids: Sequence[Grid]) -> list[Tensor]:
        """Encode each clip's patches.

        Args:
            patches: (T h w, C * 2 * p * p) uint8 of each clip.
            grids: (T, h, w) of each clip.

        Returns:
            (T h w / merge^2, (1 + K) D) for each clip: the merged output, then the K deep features; K is 0 for
            Qwen2.5-VL.
        """
        lengths = [len(clip) // self.encoder.spatial_merge_unit for clip in patches]
        pixels = normalize(torch.cat(list(patches)), mean=self.mean, std=self.std)
        return list(self.encode(pixels, grids).split(lengths))

    def encode(self, pixels: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Encode the normalized patches of all clips, concatenated."""
        grid = torch.tensor(grids, device=pixels.device)
        output = self.encoder(pixels.to(self.encoder.dtype), grid_thw=grid)
        deep = getattr(output, "deepstack_features", None) or []
        return torch.cat([output.pooler_output, *deep], dim=-1)


def normalize(
    patches: Tensor, *, mean: Sequence[float] = OPENAI_CLIP_MEAN, std: Sequence[float] = OPENAI_CLIP_STD
) -> Tensor:
    """Normalize patches (P, C * 2 * p * p) uint8 by the mean and standard deviation of each color channel."""
    mean_of_value, std_of_value = (
        torch.tensor(values, device=patches.device).repeat_interleave(patches.shape[1] // 3) for values in (mean, std)
    )
    return (patches / 255 - mean_of_value) / std_of_value


def to_patches(frames: Tensor, *, patch: int, merge: int) -> tuple[Tensor, Grid]:
    """Cut frames into the patches of Qwen2.5-VL and its successors: two frames deep, squares of patches together.

    Args:
        frames: (F, C, H, W), with H and W multiples of patch * merge; the last of an odd number is repeated.
        patch: side length of a patch in pixels.
        merge: side length of a square in patches.

    Returns:
        (T h w, C * 2 * patch * patch) and the grid (T, h, w).
    """
    if len(frames) % 2:
        frames = torch.cat([frames, frames[-1:]])
    steps, channels = len(frames) // 2, frames.shape[1]
    rows, columns = frames.shape[2] // patch, frames.shape[3] // patch
    cut = frames.reshape(steps, 2, channels, rows // merge, merge, patch, columns // merge, merge, patch)
    cut = cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return cut.reshape(steps * rows * columns, channels * 2 * patch * patch), (steps, rows, columns)


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
        qformer: the window Q-Former.
        projector: projection D_q -> D to the language model's width.

    Attributes:
        norm: layer between encoder and Q-Former, the identity unless a family replaces it.
        adds_chunk_positions: whether the position of a chunk in the clip is added to its tokens.
    """

    def __init__(self, encoder: WhisperEncoder, qformer: WindowQFormer, projector: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.norm: nn.Module = nn.Identity()
        self.qformer = qformer
        self.projector = projector
        self.adds_chunk_positions = False

    def forward(self, mels: Sequence[Tensor]) -> list[Tensor]:
        """Encode each clip's log-mel chunks (C_i, M, T) to (C_i * W * Q, D)."""
        mel = torch.cat(list(mels)).to(self.encoder.conv1.weight.dtype)
        tokens = self.projector(self.qformer(self.norm(self.encoder(mel).last_hidden_state))).flatten(1, 2)
        parts = tokens.split([len(clip) for clip in mels])
        if self.adds_chunk_positions:
            parts = tuple(part + chunk_positions(len(part), part.shape[-1]).to(part)[:, None] for part in parts)
        return [part.flatten(0, 1) for part in parts]


class UnpaddedAudioTower(nn.Module):
    """Encoder of log-mel features of any length (Qwen-Omni), which it cuts into chunks and projects to width D itself.

    Args:
        encoder: audio encoder of transformers.
        count_tokens: number of tokens of a number of mel frames.
    """

    def __init__(self, encoder: Any, *, count_tokens: Callable[[int], int]) -> None:
        super().__init__()
        self.encoder = encoder
        self.count_tokens = count_tokens

    def forward(self, mels: Sequence[Tensor]) -> list[Tensor]:
        """Encode each clip's log-mel features (1, M, T_i) to (count_tokens(T_i), D)."""
        lengths = [mel.shape[-1] for mel in mels]
        features = torch.cat([mel[0] for mel in mels], dim=1).to(self.encoder.dtype)
        tokens = self.encoder(features, feature_lens=torch.tensor(lengths, device=features.device)).last_hidden_state
        return list(tokens.split([self.count_tokens(length) for length in lengths]))


def chunk_positions(num_chunks: int, width: int) -> Tensor:
    """Compute position embeddings of chunks, (C, D): zeros for the first, then interleaved sines and cosines."""
    rates = torch.exp(torch.arange(0, width, 2, dtype=torch.float32) * -(math.log(10000.0) / width))
    angles = torch.arange(num_chunks - 1, dtype=torch.float32)[:, None] * rates
    positions = torch.zeros(num_chunks, width)
    positions[1:, 0::2], positions[1:, 1::2] = torch.sin(angles), torch.cos(angles)
    return positions
