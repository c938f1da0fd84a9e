"""Splicing: where picture, sound and time stand in one clip's block of tokens, and in the text around it.

A block is gathered from the tokens that the towers gave: seen ones first, then heard ones, then those that tell the
time. A `Layout` says which of them stands where, and at which rotary position; it needs no weights, so the number of
placeholders in the text is known before anything is encoded.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The order of one clip's block.

    Args:
        order: (N,) which of the S = seen + heard + told tokens stands at each place; S itself stands for zeros.
        positions: (3, N) time, row and column from the block's start, as 3-D rotary embeddings take them; decoders of
            plain rotary embeddings have the same number in all three.
        num_seen: how many of the S tokens are seen ones.
        told_ids: (T,) ids of the text tokens that tell the time.
    """

    order: Tensor
    positions: Tensor
    num_visual: int
    timestamp_ids: tuple[int, ...] = ()

    @property
    def next_position(self) -> int:
        """Where the text goes on, counted from the block's start.

        After the greatest time, or where nothing is heard after the greatest of all positions, as published.
        """
        counted = self.positions if self.num_visual == len(self) else self.positions[0]
        return int(counted.max()) + 1

    @property
    def is_visual(self) -> Tensor:
        """(N,) whether each token is of the picture."""
        return self.order < self.num_visual

    def __len__(self) -> int:
        return len(self.order)


def interleave_by_frame(
    num_frames: int, frame_tokens: int, *, num_audio: int, num_during_video: int, told: Sequence[Sequence[int]] = ()
) -> Layout:
    """video-SALMONN 2: each frame, then what is heard (or told of the time) by then; positions simply count.

    The first `num_front` heard tokens are stretched to a multiple of the number of frames by repeating the nearest, and
    dealt out evenly; the others follow at the end. Without sound the time of each frame follows it, padded with zeros
    to the longest.

    Args:
        num_frames: F.
        frame_tokens: P tokens of each frame.
        num_heard: A tokens of sound.
        num_front: how many of them belong to the picture's time.
        told: for each frame the ids of the tokens that tell its time.
    """
    seen = torch.arange(num_frames * frame_tokens).reshape(num_frames, frame_tokens)
    heard = torch.arange(num_audio) + seen.numel()
    if not num_frames:
        order = heard
    else:
        front = min(num_during_video, num_audio)
        per_frame = -(-front // num_frames)
        order = torch.cat([seen, _stretch(heard[:front], per_frame * num_frames).reshape(num_frames, per_frame)], dim=1)
        if told:
            order = torch.cat([order, _pad_told([len(ids) for ids in told], start=seen.numel() + num_audio)], dim=1)
        order = torch.cat([order.flatten(), heard[front:]])
    timestamp_ids = tuple(token for ids in told for token in ids)
    return Layout(order, torch.arange(len(order)).expand(3, -1), seen.numel(), timestamp_ids)


def _stretch(tokens: Tensor, length: int) -> Tensor:
    """Repeat the nearest to a greater length, rounded in float32 as the published code does."""
    if not length:
        return tokens
    return F.interpolate(tokens[None, None].float(), size=length, mode="nearest")[0, 0].long()


def _pad_told(told: Sequence[int], *, start: int) -> Tensor:
    zeros = start + sum(told)
    rows = torch.full((len(told), max(told)), zeros)
    for row, count in enumerate(told):
        rows[row, :count] = torch.arange(count) + start + sum(told[:row])
    return rows


def interleave_by_time(
    grid: tuple[int, int, int] | None, *, num_audio: int, second_per_grid: float, published_positions: bool = False
) -> Layout:
    """video-SALMONN 2+: each grid step, then what is heard until the next one; positions are time, row and column.

    With u_k = floor(second_per_grid * 2 k), grid step k is followed by u_(k+1) - u_k heard tokens (two stand for a
    second), the last by all that are left. A seen token is at (u_k, row, column), the j-th heard one at (j, 0, j), or
    (j, j, 0) where there is no picture.

    Args:
        grid: steps, rows and columns of seen tokens; none without picture.
        num_heard: A tokens of sound.
        second_per_grid: seconds that a grid step spans.
        released: the positions of the published inference code in place of those of training; see `_released`.
    """
    when = torch.arange(num_audio)
    if grid is None:
        row = torch.zeros_like(when) if not published_positions else when
        return Layout(when, torch.stack([when, when, row]), num_visual=0)
    steps, rows, columns = grid
    starts = (torch.arange(steps) * second_per_grid * 2).long()
    seen = torch.arange(steps * rows * columns).reshape(steps, -1)
    heard = when + seen.numel()
    # Sound that ends before the picture does leaves the last steps without any.
    cuts = [0, *starts[1:].clamp(max=num_audio).tolist(), num_audio]
    order = torch.cat([piece for step in range(steps) for piece in (seen[step], heard[cuts[step] : cuts[step + 1]])])
    cells = torch.arange(rows * columns).repeat(steps)
    where = torch.stack([starts.repeat_interleave(rows * columns), cells // columns, cells % columns])
    heard_at = torch.stack([when, torch.zeros_like(when), when])
    if published_positions:
        return Layout(order, _released(grid, num_audio=num_audio), seen.numel())
    return Layout(order, torch.cat([where, heard_at], dim=1)[:, order], seen.numel())


def _released(grid: tuple[int, int, int], *, num_audio: int) -> Tensor:
    """Positions that the published generate() computes of picture and sound, (3, N).

    It is not told of the sound nor of the seconds: it takes the first tokens of the block for the whole picture, a
    step for a second, and all that follow for text.
    """
    steps, rows, columns = grid
    cells = torch.arange(rows * columns).repeat(steps)
    starts = (torch.arange(steps) * 2).repeat_interleave(rows * columns)
    seen = torch.stack([starts, cells // columns, cells % columns])
    return torch.cat([seen, (torch.arange(num_audio) + seen.max() + 1).expand(3, -1)], dim=1)


def text_positions(is_clip: Tensor, mask: Tensor, layouts: Sequence[Layout]) -> Tensor:
    """Rotary positions of rows of text, each with one block in it.

    Args:
        is_clip: (B, L) where the block's placeholders stand.
        mask: (B, L) 0 where padded, on either side.
        layouts: (B,) of the rows' blocks.

    Returns:
        (3, B, L); 0 where padded.
    """
    positions = torch.zeros(3, *mask.shape, dtype=torch.long)
    for row, layout in enumerate(layouts):
        real = mask[row].bool().nonzero().flatten()
        block = is_clip[row].nonzero().flatten()
        if len(block) != len(layout):
            raise ValueError(f"the text has {len(block)} placeholders, but the clip gives {len(layout)} tokens")
        if not len(block):
            positions[:, row, real] = torch.arange(len(real))
            continue
        before = real[real < block[0]]
        after = real[real > block[-1]]
        positions[:, row, before] = torch.arange(len(before))
        positions[:, row, block] = layout.positions + len(before)
        positions[:, row, after] = torch.arange(len(after)) + len(before) + layout.next_position
    return positions


def insert_clip_tokens(embeds: Tensor, is_placeholder: Tensor, tokens: Tensor) -> Tensor:
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
