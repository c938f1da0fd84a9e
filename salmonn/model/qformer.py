"""Window Q-Former: a few learned queries look at each short window of sound, so that tokens keep their time."""

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerModel


class WindowQFormer(nn.Module):
    """Turns S audio steps into W windows of Q tokens each.

    Args:
        qformer: BERT-like layers with cross-attention to the sound.
        num_queries: learned queries Q for each window.
        window: audio steps that one window spans.
        stride: audio steps from one window's beginning to the next one's.
    """

    def __init__(self, qformer: Blip2QFormerModel, *, num_queries: int, window: int, stride: int) -> None:
        super().__init__()
        self.qformer = qformer
        self.window = window
        self.stride = stride
        self.queries = nn.Parameter(torch.randn(1, num_queries, qformer.config.hidden_size) * 0.02)

    def forward(self, steps: Tensor) -> Tensor:
        """Query the windows of each chunk; steps at its end that fill no window are left out.

        Args:
            steps: encoder output, (C, S, D_a), S at least one window.

        Returns:
            (C, W, Q, D_q) with W = (S - window) // stride + 1.
        """
        windows = steps.unfold(1, self.window, self.stride).transpose(2, 3)
        num_chunks, num_windows = windows.shape[:2]
        queries = self.queries.expand(num_chunks * num_windows, -1, -1)
        hidden = self.qformer(query_embeds=queries, encoder_hidden_states=windows.flatten(0, 1)).last_hidden_state
        return hidden.unflatten(0, (num_chunks, num_windows))
