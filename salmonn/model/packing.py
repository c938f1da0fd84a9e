"""Packing: the rows about a clip become one sequence in which their common prefix occurs once.

Most of a row are the tokens of its clip, and all captions and answers about a clip follow the same tokens:

    rows      p p p p a a      sequence   p p p p | a a | b b b | q q q | c c
              p p p p b b b               prefix    suffixes      prefix  suffix
              q q q c c                   |---- group of clip 0 ---|  |- clip 1 -|

`salmonn.model.attention` lets a suffix attend to its group's prefix and to itself, and each token keeps the position
that it has in its row. The log-probabilities therefore equal those of the rows alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PrefixGroup:
    """Rows about one clip, as a prefix and one suffix for each row.

    Args:
        clip: index of the clip.
        rows: indices of the rows.
        prefix_length: number of tokens of the common prefix.
        suffix_lengths: number of further tokens of each row; 0 for a row that equals the prefix.
    """

    clip: int
    rows: tuple[int, ...]
    prefix_length: int
    suffix_lengths: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the sequence."""
        return self.prefix_length + sum(self.suffix_lengths)


@dataclass(frozen=True)
class PackedBatch:
    """B rows of L tokens in one sequence of T tokens; R of the rows belong to `groups`.

    Args:
        source: (T,) index of each packed token in the flattened rows (B * L).
        destination: (B, L) index of each row token in the sequence; 0 for padding.
        groups: the clips' rows, in the order of the sequence.
    """

    source: Tensor
    destination: Tensor
    groups: tuple[PrefixGroup, ...]

    @property
    def row_order(self) -> list[int]:
        """Indices of the R rows in the order of the sequence."""
        return [row for group in self.groups for row in group.rows]

    @property
    def segment_lengths(self) -> list[int]:
        """Number of tokens of each prefix and suffix, in order."""
        return [length for group in self.groups for length in (group.prefix_length, *group.suffix_lengths)]

    @property
    def is_suffix(self) -> list[bool]:
        """Whether each segment is a suffix."""
        return [suffix for group in self.groups for suffix in (False, *[True] * len(group.suffix_lengths))]

    @property
    def row_ends(self) -> Tensor:
        """(R,) index of each row's last token in the sequence; no suffix may be empty."""
        device = self.source.device
        ends = torch.tensor(self.segment_lengths, device=device).cumsum(0) - 1
        return ends[torch.tensor(self.is_suffix, device=device)]

    def chunks(self, max_tokens: int) -> Iterator["PackedBatch"]:
        """Split between groups into chunks of at most `max_tokens`; a group with more is a separate chunk."""
        chunks: list[list[PrefixGroup]] = [[]]
        for group in self.groups:
            filled = sum(other.num_tokens for other in chunks[-1])
            if chunks[-1] and filled + group.num_tokens > max_tokens:
                chunks.append([])
            chunks[-1].append(group)
        start = 0
        for groups in chunks:
            end = start + sum(group.num_tokens for group in groups)
            yield PackedBatch(self.source[start:end], self.destination - start, tuple(groups))
            start = end


def pack(input_ids: Tensor, attention_mask: Tensor, clip_index: Sequence[int], *, min_suffix: int = 0) -> PackedBatch:
    """Pack rows so that the common prefix of each clip's rows occurs once.

    Args:
        input_ids: (B, L), padded on the right.
        attention_mask: (B, L), 0 for padding.
        clip_index: (B,) index of each row's clip.
        min_suffix: number of tokens at the end of each row that are never shared.
    """
    ids, lengths = input_ids.cpu(), attention_mask.sum(1).tolist()
    columns, width = torch.arange(ids.shape[1]), ids.shape[1]
    rows_of: dict[int, list[int]] = {}
    for row, clip in enumerate(clip_index):
        rows_of.setdefault(clip, []).append(row)
    destination = torch.zeros(ids.shape, dtype=torch.long)
    segments: list[Tensor] = []
    groups, filled = [], 0
    for clip, rows in rows_of.items():
        shortest = min(lengths[row] for row in rows)
        agree = (ids[rows, :shortest] == ids[rows[:1], :shortest]).all(0)
        shared = min(int(agree.long().cumprod(0).sum()), shortest - min_suffix)
        segments.append(rows[0] * width + columns[:shared])
        destination[rows, :shared] = filled + columns[:shared]
        filled += shared
        for row in rows:
            suffix = columns[shared : lengths[row]]
            segments.append(row * width + suffix)
            destination[row, suffix] = filled + torch.arange(len(suffix))
            filled += len(suffix)
        groups.append(PrefixGroup(clip, tuple(rows), shared, tuple(lengths[row] - shared for row in rows)))
    device = input_ids.device
    return PackedBatch(torch.cat(segments).to(device), destination.to(device), tuple(groups))
