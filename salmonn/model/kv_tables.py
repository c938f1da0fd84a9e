"""Tables that say which cache entries each row attends to, shaped for a decode step and possibly padded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

MAX_POWER = 128  # padded numbers of rows are powers of two up to this one, and multiples of it beyond
MIN_GROUPS = 8  # padded number of groups, which costs next to nothing
FIRST_COLUMNS = 16  # padded columns in addition to steps of growth: a limit of 1,024 tokens stays below 5 x 256


class StepShape(NamedTuple):
    """Numbers that a decode step computes with; in a static cache they are padded.

    Args:
        rows, groups: numbers of rows, and of groups that share a prefix.
        slots: rows of the largest group.
        pages, tails: pages and tails of all prefixes.
        longest: pages of the longest prefix.
        tail_columns: tokens of the longest tail.
    """

    rows: int
    groups: int
    slots: int
    pages: int
    tails: int
    longest: int
    tail_columns: int

    def pad(self, *, page_length: int) -> "StepShape":
        """Round up to a few sizes; pages, which take most memory, by at most 1/8."""
        return StepShape(
            rows=padded_rows(self.rows),
            groups=padded_rows(max(MIN_GROUPS, self.groups)),
            slots=padded_rows(self.slots),
            pages=padded_pages(self.pages),
            tails=padded_rows(self.tails),
            longest=padded_pages(self.longest),
            tail_columns=page_length if self.tails else 0,
        )


def padded_rows(count: int) -> int:
    """Return the next of 0, 1, 2, 4 ... 128, 256, 384 ..."""
    return -(-count // MAX_POWER) * MAX_POWER if count > MAX_POWER else (1 << (count - 1).bit_length()) * (count > 0)


def padded_columns(count: int, *, growth: int) -> int:
    """Return the next of 16 + growth, 16 + 2 growth ..."""
    return FIRST_COLUMNS + max(1, -(-(count - FIRST_COLUMNS) // growth)) * growth


def padded_pages(count: int) -> int:
    """Round up to a multiple of an eighth of the power of two below."""
    unit = max(1, (1 << count.bit_length()) >> 4)
    return -(-count // unit) * unit


@dataclass
class Prefix:
    """Places of a prefix: indices of its full pages and of its tail, if its length is not a multiple of a page's."""

    pages: list[int]
    tail: int | None
    tail_length: int

    def placed(self, page: Callable[[int], int], tail: Callable[[int], int]) -> "Prefix":
        """Return the prefix with other places."""
        return Prefix(
            [page(place) for place in self.pages], None if self.tail is None else tail(self.tail), self.tail_length
        )


@dataclass(frozen=True)
class Tables:
    """Which row attends to what, for R rows, M rows of the largest of G groups, P pages and T tails.

    All numbers may be padded: further rows attend to a column of their own and to group 0, and no row to further pages.

    Args:
        rows: (R,) indices from 0.
        slots, groups: (R,) number of each row in its group, and of the group.
        page_rows, tail_rows: (P, M), (T, M) the rows that attend to each page or tail, filled up with row 0.
        row_pages: (R, N) the pages of each row, filled up with page 0; N is the number of the longest prefix.
        page_numbers: (P,) number of each page in its prefix.
        page_groups: (G, P) true where a page belongs to a group.
        row_tails: (R,) the tail of each row, or 0.
        is_absent: (R, parts, 1, 1) false where a row has own tokens, N pages, a tail (only if there are tails).
        tail_lengths: (T, 1).
    """

    rows: Tensor
    slots: Tensor
    groups: Tensor
    page_rows: Tensor
    tail_rows: Tensor
    row_pages: Tensor
    page_numbers: Tensor
    page_groups: Tensor
    row_tails: Tensor
    is_absent: Tensor
    tail_lengths: Tensor

    def to(self, device: torch.device) -> "Tables":
        """Copy to a device."""
        return Tables(*(getattr(self, one.name).to(device, non_blocking=True) for one in fields(self)))

    def copy_(self, other: "Tables") -> None:
        """Copy other tables of the same shape into these."""
        for one in fields(self):
            getattr(self, one.name).copy_(getattr(other, one.name), non_blocking=True)


def make_tables(row_groups: Sequence[int], prefixes: Sequence[Prefix], shape: StepShape) -> Tables:
    """Make the tables of a step.

    Args:
        row_groups: group of each row.
        prefixes: prefix of each group.
        shape: shape of the step, padded or not.
    """
    members: list[list[int]] = [[] for _ in prefixes]
    slots, groups = _zeros(shape.rows), _zeros(shape.rows)
    for row, group in enumerate(row_groups):
        slots[row], groups[row] = len(members[group]), group
        members[group].append(row)
    page_rows, tail_rows = _zeros(shape.pages, shape.slots), _zeros(shape.tails, shape.slots)
    page_numbers, tail_lengths = _zeros(shape.pages), _zeros(shape.tails, 1) + 1  # finite results of unused tails
    group_pages, group_tails = _zeros(shape.groups, shape.longest), _zeros(shape.groups)
    page_groups = _zeros(shape.groups, shape.pages).bool()
    is_part = _zeros(shape.groups, shape.longest + 2).bool()
    is_part[:, 0] = True
    for group, prefix in enumerate(prefixes):
        count, rows = len(prefix.pages), torch.tensor(members[group])
        pages = torch.tensor(prefix.pages, dtype=torch.long)
        page_rows[pages, : len(rows)] = rows
        page_numbers[pages] = torch.arange(count)
        group_pages[group, :count] = pages
        page_groups[group, pages] = is_part[group, 1 : 1 + count] = True
        if prefix.tail is not None:
            tail_rows[prefix.tail, : len(rows)] = rows
            tail_lengths[prefix.tail] = prefix.tail_length
            group_tails[group] = prefix.tail
            is_part[group, -1] = True
    return Tables(
        rows=torch.arange(shape.rows),
        slots=slots,
        groups=groups,
        page_rows=page_rows,
        tail_rows=tail_rows,
        row_pages=group_pages[groups],
        page_numbers=page_numbers,
        page_groups=page_groups,
        row_tails=group_tails[groups],
        is_absent=~is_part[groups, : None if shape.tails else -1, None, None],
        tail_lengths=tail_lengths,
    )


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.long)
