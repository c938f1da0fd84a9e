"""Window Q-Former: a few learned queries look at each short window of sound, so that tokens keep their time."""

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerModel


class WindowQFormer(nn.Module):
    """Turns S audio steps into W windows of Q tokens each.

    Args:
        qformer: BERT-like layers with cross-attention to the sound.
        num_queries: learned queries Q for each window.
        steps_per_window: audio steps that one window spans.
    """

    def __init__(self, qformer: Blip2QFormerModel, *, num_queries: int, steps_per_window: int) -> None:
        super().__init__()
        self.qformer = qformer
        self.steps_per_window = steps_per_window
        self.queries = nn.Parameter(torch.randn(1, num_queries, qformer.config.hidden_size) * 0.02)

    def forward(self, steps: Tensor) -> Tensor:
        """Query the windows of each chunk.

        Args:
            steps: encoder output, (C, S, D_a); S must hold whole windows, as all-chunk encoders give.

        Returns:
            (C, W, Q, D_q) with W = S / steps_per_window.
        """
        num_chunks, num_steps, width = steps.shape
        if num_steps % self.steps_per_window:
            raise ValueError(f"{num_steps} audio steps do not divide into windows of {self.steps_per_window} steps")
        windows = steps.reshape(-1, self.steps_per_window, width)
        queries = self.queries.expand(len(windows), -1, -1)
        hidden = self.qformer(query_embeds=queries, encoder_hidden_states=windows).last_hidden_state
        return hidden.reshape(num_chunks, num_steps // self.steps_per_window, *hidden.shape[1:])
