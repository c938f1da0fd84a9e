"""Rows about one clip laid out so that what they begin with alike goes through the decoder once.

A clip's tokens are most of a row, and its captions, answers, chosen and rejected ones all follow the same tokens. Laid
out, each row's own part sees the shared beginning and itself, never another row's part, and keeps the positions that it
has in its row: the log-probabilities are those of the rows alone. Short layouts share a sequence, blind to one another,
so that little is padded where clips differ in length.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

PADDING = -1


@dataclass(frozen=True)
class Packed:
    """B rows of L tokens in P sequences of S, each of one clip or several.

    Args:
        source: (P, S) where each token stands in the flattened rows (B * L).
        positions: (P, S) its position in its row.
        segments: (P, S) which part of the sequence it belongs to: a clip's shared beginning, or a row's own part; -1
            where padded.
        beginnings: (P, S) the segment of its clip's shared beginning, which it sees beside its own; -1 where padded.
        places: (B, L) where each token of the rows stands in the flattened sequences (P * S); 0 where padded.
        clips: which clip each shared beginning is about, in the order of the flattened sequences.
    """

    source: Tensor
    positions: Tensor
    segments: Tensor
    beginnings: Tensor
    places: Tensor
    clips: tuple[int, ...]

    @property
    def mask(self) -> Tensor | None:
        """(P, 1, S, S) who sees whom (True), or None where each sequence is one row: there causality alone decides."""
        if int(self.segments.max()) <= 1:
            return None
        keys, queries = self.segments[:, None, None, :], self.segments[:, None, :, None]
        length = self.segments.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.segments.device).tril()
        return causal & ((keys == queries) | (keys == self.beginnings[:, None, :, None]))


@dataclass(frozen=True)
class _Layout:
    """The rows about one clip: for each part its row and its columns there, the shared beginning first."""

    clip: int
    parts: list[tuple[int, Tensor]]

    def __len__(self) -> int:
        return sum(len(columns) for _, columns in self.parts)


def pack(input_ids: Tensor, attention_mask: Tensor, clip_index: Sequence[int]) -> Packed:
    """Find what the rows of each clip begin with alike, and lay it out once.

    Args:
        input_ids: (B, L), padded on the right.
        attention_mask: (B, L), 0 where padded.
        clip_index: (B,) which clip each row is about.
    """
    width = input_ids.shape[1]
    sequences = _fill(_lay_out(input_ids.cpu(), attention_mask.sum(1).tolist(), clip_index))
    longest = max(sum(map(len, layouts)) for layouts in sequences)
    places = torch.zeros(len(clip_index), width, dtype=torch.long)
    rows = []
    for number, layouts in enumerate(sequences):
        filled = number * longest
        parts: list[Tensor] = []
        for layout in layouts:
            beginning = len(parts)
            for row, own in layout.parts:
                places[row, own] = filled + torch.arange(len(own))
                filled += len(own)
                segment = torch.full_like(own, len(parts))
                parts.append(torch.stack([row * width + own, own, segment, torch.full_like(own, beginning)], dim=1))
            first, shared = layout.parts[0]
            for row, _ in layout.parts[1:]:
                places[row, shared] = places[first, shared]
        rows.append(torch.cat(parts))
    table = pad_sequence(rows, batch_first=True, padding_value=PADDING).to(input_ids.device)
    source, positions, segments, beginnings = table.unbind(-1)
    clips = tuple(layout.clip for layouts in sequences for layout in layouts)
    places = places.to(input_ids.device)
    return Packed(source.clamp(min=0), positions.clamp(min=0), segments, beginnings, places, clips)


def _lay_out(ids: Tensor, lengths: Sequence[int], clip_index: Sequence[int]) -> list[_Layout]:
    rows_of: dict[int, list[int]] = {}
    for row, clip in enumerate(clip_index):
        rows_of.setdefault(clip, []).append(row)
    columns = torch.arange(ids.shape[1])
    layouts = []
    for clip, rows in rows_of.items():
        shared = _common_start(ids[rows, : min(lengths[row] for row in rows)])
        own = [(row, columns[shared : lengths[row]]) for row in rows]
        layouts.append(_Layout(clip, [(rows[0], columns[:shared]), *own]))
    return layouts


def _fill(layouts: Sequence[_Layout]) -> list[list[_Layout]]:
    """Sequences no longer than the longest layout: each layout, the longest first, goes where it first fits."""
    longest_first = sorted(layouts, key=len, reverse=True)
    sequences: list[list[_Layout]] = []
    for layout in longest_first:
        room = len(longest_first[0]) - len(layout)
        fitting = (sequence for sequence in sequences if sum(map(len, sequence)) <= room)
        if (sequence := next(fitting, None)) is not None:
            sequence.append(layout)
        else:
            sequences.append([layout])
    return sequences


def _common_start(ids: Tensor) -> int:
    """Number of leading columns in which all rows agree."""
    agree = (ids == ids[:1]).all(0)
    return int(agree.long().cumprod(0).sum())
