"""Splicing: tokens of picture and sound in the order of time, and their place in the text."""

import torch
from torch import Tensor


def time_order(frame_times: Tensor, *, num_windows: int, window_seconds: float) -> Tensor:
    """Order in which frames and sound windows are told to the language model.

    Args:
        frame_times: (F,) seconds from the clip's start, rising.
        num_windows: W, windows of sound; window w begins at w * window_seconds.

    Returns:
        (F + W,) indices: f < F is a frame, F + w a window. A frame comes before a window that begins at the same time.
    """
    times = torch.cat([frame_times.double(), torch.arange(num_windows, dtype=torch.double) * window_seconds])
    return torch.argsort(times, stable=True)


def interleave(frames: Tensor, windows: Tensor, order: Tensor) -> Tensor:
    """One clip's tokens in the order of time.

    Args:
        frames: (F, P, D), P tokens a frame.
        windows: (W, Q, D), Q tokens a window.
        order: (F + W,) as `time_order` gives it.

    Returns:
        (F * P + W * Q, D)
    """
    pieces = [*frames.unbind(), *windows.unbind()]
    if len(pieces) != len(order):
        raise ValueError(f"{len(frames)} frames and {len(windows)} windows do not match an order of {len(order)}")
    return torch.cat([pieces[index] for index in order.tolist()])


def place(embeds: Tensor, is_placeholder: Tensor, tokens: Tensor) -> Tensor:
    """Put clip tokens where the text holds placeholders.

    Args:
        embeds: (B, L, D) embedded text.
        is_placeholder: (B, L) true where a clip's token belongs.
        tokens: (N, D) all rows' clip tokens one after the other.

    Raises:
        ValueError: the number of placeholders is not N.
    """
    count = int(is_placeholder.sum())
    if count != len(tokens):
        raise ValueError(f"the text has {count} placeholders, but the clips gave {len(tokens)} tokens")
    return embeds.masked_scatter(is_placeholder.unsqueeze(-1), tokens.to(embeds.dtype))
