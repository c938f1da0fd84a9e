"""Rows about one clip laid out so that what they begin with alike goes through the decoder once.

A clip's tokens are most of a row, and its captions, answers, chosen and rejected ones all follow the same tokens. All
rows of a batch become one sequence without padding: of each clip the shared beginning, then what each of its rows has
of its own. `salmonn.model.attention` lets an own part see the beginning and itself, and nothing else; every token keeps
the position that it has in its row. So the log-probabilities are those of the rows alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PrefixGroup:
    """The rows about one clip, as they stand in the sequence: their shared beginning, then their own parts.

    Args:
        clip: which clip.
        rows: which rows.
        beginning: tokens that they share.
        own: tokens that each row has beside; 0 where a row is all beginning.
    """

    clip: int
    rows: tuple[int, ...]
    prefix_length: int
    own: tuple[int, ...]


@dataclass(frozen=True)
class PackedBatch:
    """B rows of L tokens in one sequence of T.

    Args:
        source: (T,) where each token stands in the flattened rows (B * L).
        places: (B, L) where each token of the rows stands in the sequence; 0 where padded.
        groups: the clips' rows, in the order of the sequence.
    """

    source: Tensor
    places: Tensor
    groups: tuple[PrefixGroup, ...]

    @property
    def lengths(self) -> list[int]:
        """Of all parts: each group's beginning, then its own parts."""
        return [length for group in self.groups for length in (group.prefix_length, *group.own)]

    @property
    def is_own(self) -> list[bool]:
        """Which of all parts are a row's own."""
        return [own for group in self.groups for own in (False, *[True] * len(group.own))]

    @property
    def ends(self) -> Tensor:
        """(R,) where the rows' last tokens stand; each row has a token of its own."""
        device = self.source.device
        ends = torch.tensor(self.lengths, device=device).cumsum(0) - 1
        return ends[torch.tensor(self.is_own, device=device)]

    def pieces(self, most: int) -> Iterator["PackedBatch"]:
        """Whole groups, as many of them as have `most` tokens, or one that has more."""
        start, filled = 0, 0
        chosen: list[PrefixGroup] = []
        for group in self.groups:
            size = group.prefix_length + sum(group.own)
            if chosen and filled + size > most:
                yield self._piece(chosen, start, filled)
                start, chosen, filled = start + filled, [], 0
            chosen, filled = [*chosen, group], filled + size
        yield self._piece(chosen, start, filled)

    def _piece(self, groups: Sequence[PrefixGroup], start: int, size: int) -> "PackedBatch":
        return PackedBatch(self.source[start : start + size], self.places - start, tuple(groups))

    @property
    def rows(self) -> list[int]:
        """The rows in the order of the sequence."""
        return [row for group in self.groups for row in group.rows]


def pack(input_ids: Tensor, attention_mask: Tensor, clip_index: Sequence[int], *, own: int = 0) -> PackedBatch:
    """Find what the rows of each clip begin with alike, and lay it out once.

    Args:
        input_ids: (B, L), padded on the right.
        attention_mask: (B, L), 0 where padded.
        clip_index: (B,) which clip each row is about.
        own: tokens at its end that each row keeps for itself, shared or not.
    """
    ids, lengths = input_ids.cpu(), attention_mask.sum(1).tolist()
    columns, width = torch.arange(ids.shape[1]), ids.shape[1]
    places = torch.zeros(ids.shape, dtype=torch.long)
    parts: list[Tensor] = []
    groups, filled = [], 0
    for clip, rows in _by_clip(clip_index).items():
        shortest = min(lengths[row] for row in rows)
        shared = min(_common_start(ids[rows, :shortest]), shortest - own)
        parts.append(rows[0] * width + columns[:shared])
        places[rows, :shared] = filled + columns[:shared]
        filled += shared
        for row in rows:
            rest = columns[shared : lengths[row]]
            parts.append(row * width + rest)
            places[row, rest] = filled + torch.arange(len(rest))
            filled += len(rest)
        groups.append(PrefixGroup(clip, tuple(rows), shared, tuple(lengths[row] - shared for row in rows)))
    device = input_ids.device
    return PackedBatch(torch.cat(parts).to(device), places.to(device), tuple(groups))


def _by_clip(clip_index: Sequence[int]) -> dict[int, list[int]]:
    rows_of: dict[int, list[int]] = {}
    for row, clip in enumerate(clip_index):
        rows_of.setdefault(clip, []).append(row)
    return rows_of


def _common_start(ids: Tensor) -> int:
    """Number of leading columns in which all rows agree."""
    agree = (ids == ids[:1]).all(0)
    return int(agree.long().cumprod(0).sum())
