"""Rows about one clip in one sequence, so that what they begin with alike goes through the decoder once.

A clip's tokens are most of a row, and its captions, answers, chosen and rejected ones all follow the same tokens. In
the packed sequence each row's own part sees the shared beginning and itself, never another row's part, and keeps the
positions that it has in its row: the log-probabilities are those of the rows alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PADDING = -1


@dataclass(frozen=True)
class Packed:
    """B rows of L tokens in P sequences of S, one for each clip.

    Args:
        source: (P, S) where each token stands in the flattened rows (B * L).
        positions: (P, S) its position in its row.
        segments: (P, S) 0 in the shared beginning, k in the own part of the clip's k-th row, -1 where padded.
        places: (B, L) where each token of the rows stands in the flattened sequences (P * S); 0 where padded.
        clips: (P,) which clip each sequence is about.
    """

    source: Tensor
    positions: Tensor
    segments: Tensor
    places: Tensor
    clips: tuple[int, ...]

    @property
    def mask(self) -> Tensor | None:
        """(P, 1, S, S) who sees whom (True), or None where each clip has one row: there causality alone decides."""
        if int(self.segments.max()) <= 1:
            return None
        keys, queries = self.segments[:, None, None, :], self.segments[:, None, :, None]
        length = self.segments.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.segments.device).tril()
        return causal & ((keys == 0) | (keys == queries))


def pack(input_ids: Tensor, attention_mask: Tensor, clip_index: Sequence[int]) -> Packed:
    """Find what the rows of each clip begin with alike, and lay it out once.

    Args:
        input_ids: (B, L), padded on the right.
        attention_mask: (B, L), 0 where padded.
        clip_index: (B,) which clip each row is about.
    """
    width = input_ids.shape[1]
    ids, lengths = input_ids.cpu(), attention_mask.sum(1).tolist()
    rows_of: dict[int, list[int]] = {}
    for row, clip in enumerate(clip_index):
        rows_of.setdefault(clip, []).append(row)
    columns = torch.arange(width)
    sequences: list[tuple[Tensor, Tensor, Tensor]] = []
    places = torch.zeros(len(clip_index), width, dtype=torch.long)
    for rows in rows_of.values():
        shared = _common_start(ids[rows, : min(lengths[row] for row in rows)])
        parts = [(rows[0], 0, columns[:shared])]
        parts += [(row, number, columns[shared : lengths[row]]) for number, row in enumerate(rows, start=1)]
        filled = shared
        for row, _, own in parts[1:]:
            places[row, :shared] = columns[:shared]
            places[row, shared : lengths[row]] = filled + torch.arange(len(own))
            filled += len(own)
        source = torch.cat([row * width + own for row, _, own in parts])
        segments = torch.cat([torch.full_like(own, number) for _, number, own in parts])
        sequences.append((source, torch.cat([own for _, _, own in parts]), segments))
    longest = max(len(source) for source, _, _ in sequences)
    for number, rows in enumerate(rows_of.values()):
        for row in rows:
            places[row, : lengths[row]] += number * longest
    source, positions, segments = (
        torch.nn.utils.rnn.pad_sequence(column, batch_first=True, padding_value=padding).to(input_ids.device)
        for column, padding in zip(map(list, zip(*sequences, strict=True)), (0, 0, PADDING), strict=True)
    )
    return Packed(source, positions, segments, places.to(input_ids.device), tuple(rows_of))


def _common_start(ids: Tensor) -> int:
    """Number of leading columns in which all rows agree."""
    agree = (ids == ids[:1]).all(0)
    return int(agree.long().cumprod(0).sum())
