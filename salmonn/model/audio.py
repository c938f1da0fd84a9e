"""Hearing: Whisper encoder -> window Q-Former -> projection to the language model's width."""

from torch import Tensor, nn
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from salmonn.model.qformer import WindowQFormer


class AudioTower(nn.Module):
    """Turns log-mel chunks into one run of tokens a window.

    Args:
        encoder: Whisper's encoder; each chunk must have the length that it was built for.
        qformer: the window Q-Former.
        projector: D_q -> D, D the language model's width.
    """

    def __init__(self, encoder: WhisperEncoder, qformer: WindowQFormer, projector: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.norm = nn.LayerNorm(encoder.config.d_model)
        self.qformer = qformer
        self.projector = projector

    def forward(self, mel: Tensor) -> Tensor:
        """Encode chunks (C, M, T) of log-mel features into tokens (C, W, Q, D)."""
        steps = self.encoder(mel).last_hidden_state
        return self.projector(self.qformer(self.norm(steps)))
