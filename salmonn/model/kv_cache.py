"""KV cache of rows with common prefixes, and attention of decode steps to it.

A prefix is stored once for all rows that continue it, cut into pages of equal length:

    prefix 0   [page][page][tail]      rows 0, 1, 2    own tokens [..........] each
    prefix 1   [page][tail]            rows 3, 4       own tokens [....]

The full pages of all prefixes are one batch for a flash-attention kernel, in which the queries of all rows of a page's
prefix attend to it together: no prefix is padded to the longest, and no scores are written to memory. The tails and the
tokens of the rows themselves are two further batches. The parts of each row are merged by their log-sum-exp.

A static cache pads the numbers of rows, pages, tails, groups and columns to a few sizes, and changes its tables in
place, so that recorded decode steps can be replayed after rows have joined or ended. Its tensors outlive its rows.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor

from salmonn.model.kv_tables import (
    Prefix,
    StepShape,
    Tables,
    make_tables,
    padded_columns,
    padded_pages,
    padded_rows,
)
from salmonn.model.packing import PackedBatch
from salmonn.model.partial_attention import float32_product, length_bias, partial_attention

PAGE_LENGTH = 512  # tokens; a page is a block of work for a GPU, and costs it an output and a log-sum-exp per query
# Columns that are added when the own tokens of some row fill theirs; a static cache attends to all of them, but each
# change costs the recorded steps.
GROWTH, GROWTH_STATIC = 64, 256
RELEASE = 2  # memory is released once it is this many times what is in use


@dataclass
class _Pool:
    """Keys and values (N, K, S, d) of N equal parts of the cache; the first ones are in use."""

    keys: Tensor
    values: Tensor

    def has_room(self, count: int, columns: int) -> bool:
        """Return whether there are at least `count` parts with `columns` columns each."""
        return len(self.keys) >= count and self.keys.shape[2] >= columns

    def make_room(self, count: int, columns: int) -> None:
        """Add empty parts and columns; what is masked must be finite."""
        parts, columns = max(0, count - len(self.keys)), max(0, columns - self.keys.shape[2])
        self.keys, self.values = (F.pad(one, (0, 0, 0, columns, 0, 0, 0, parts)) for one in (self.keys, self.values))

    def part(self, count: int, columns: int) -> tuple[Tensor, Tensor]:
        """Return the first columns of the first parts."""
        return self.keys[:count, :, :columns], self.values[:count, :, :columns]

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Copy parts to other places."""
        if len(sources):
            for tensor in (self.keys, self.values):
                tensor[targets] = tensor[sources]

    def release(self, used: int) -> None:
        """Release the memory of all but the first parts."""
        self.keys, self.values = self.keys[:used].clone(), self.values[:used].clone()

    def clear(self) -> None:
        """Set all parts to zeros, as in a new pool: what is masked must be finite, and NaN would outlive its row."""
        self.keys.zero_()
        self.values.zero_()

    def put(self, other: "_Pool", *, used: int, count: int) -> None:
        """Put the first parts of another pool, which has no more columns, after those in use."""
        for own, others in ((self.keys, other.keys), (self.values, other.values)):
            own[used : used + count, :, : others.shape[2]] = others[:count]


@dataclass
class _LayerCache:
    """Keys and values of one layer: full pages of prefixes, their tails, and the rows' own tokens."""

    pages: _Pool
    tails: _Pool
    own: _Pool

    @property
    def pools(self) -> tuple[_Pool, _Pool, _Pool]:
        """All three."""
        return self.pages, self.tails, self.own


@dataclass(frozen=True)
class _Step:
    """Tensors of one decode step on one device.

    Args:
        tables: which row attends to what.
        columns: (R,) column of each row's new token among its own tokens.
        own_bias: (R, C) bias of the own tokens, see `partial_attention`.
        tail_bias: (T, S) bias of the tails.
    """

    tables: Tables
    columns: Tensor
    own_bias: Tensor
    tail_bias: Tensor


class KVCache:
    """Keys and values of R rows.

    `PrefillAttention` appends all segments of a packed batch layer by layer; after `finalize`, each decode step calls
    `advance` once and `attend` for each layer. Rows that were prefilled at another time join with `extend`.

    Args:
        packed: the packed batch; no suffix is empty.
        positions: (3, 1, T) rotary positions of its tokens.

    Attributes:
        num_columns: number of own tokens of each row that a step attends to.
        expected_tokens: tokens that rows of a static cache may generate; there is room for them from the start, so that
            no tensor is replaced as they come.
        storage_version: number that changes whenever tensors are replaced that steps refer to.
    """

    def __init__(self, packed: PackedBatch, positions: Tensor) -> None:
        self._positions = positions[:, 0, packed.row_ends].unsqueeze(-1)
        self._layers: dict[int, _LayerCache] = {}
        self._pending: dict[int, dict[bool, list[tuple[Tensor, Tensor]]]] = {}  # by layer and is_suffix
        # The layout is kept on the host: reading it from the device would wait for the device.
        self._groups = [number for number, group in enumerate(packed.groups) for _ in group.rows]
        self._lengths = [length for group in packed.groups for length in group.suffix_lengths]
        self._columns = torch.tensor(self._lengths, device=positions.device) - 1  # (R,) of the last own tokens
        self._prefixes: list[Prefix] = []
        for group in packed.groups:
            count, rest = divmod(group.prefix_length, PAGE_LENGTH)
            pages = list(range(self._num_pages, self._num_pages + count))
            self._prefixes.append(Prefix(pages, self._num_tails if rest else None, rest))
        self._tables: dict[tuple[StepShape, torch.device], Tables] = {}
        self._stale: set[tuple[StepShape, torch.device]] = set()  # tables of another layout
        self._steps: dict[torch.device, _Step] = {}
        self._shape: StepShape | None = None
        # What each row's column and position grow by in a step: 1, and 0 where there is no row.
        self._increments = torch.ones_like(self._columns)
        self._counters: tuple[tuple[Tensor, Tensor], ...] = ()  # columns and positions of a step's rows, and increments
        self._step_columns = self._columns
        self._is_static = self._is_reserved = False
        self._num_started = 0  # rows at the start that the last step has added a token to
        self.num_columns = max(self._lengths)
        self.expected_tokens = self.storage_version = 0

    def __len__(self) -> int:
        return len(self._groups)

    @property
    def _num_pages(self) -> int:
        return sum(len(prefix.pages) for prefix in self._prefixes)

    @property
    def _num_tails(self) -> int:
        return sum(prefix.tail is not None for prefix in self._prefixes)

    @property
    def is_static(self) -> bool:
        """Whether shapes are padded and tables are changed in place, so that recorded steps can be replayed."""
        return self._is_static

    @is_static.setter
    def is_static(self, value: bool) -> None:
        if value != self._is_static:
            self._is_static = value
            self._change_layout()

    @property
    def num_stored_tokens(self) -> int:
        """Number of tokens that there is memory for, in use or not."""
        pools = next(iter(self._layers.values())).pools
        return sum(pool.keys.shape[0] * pool.keys.shape[2] for pool in pools)

    @property
    def shape(self) -> StepShape:
        """Shape of the next step."""
        if self._shape is None:
            sizes = Counter(self._groups)
            shape = StepShape(
                rows=len(self),
                groups=len(self._prefixes),
                slots=max(sizes.values(), default=0),
                pages=self._num_pages,
                tails=self._num_tails,
                longest=max((len(prefix.pages) for prefix in self._prefixes), default=0),
                tail_columns=max((prefix.tail_length for prefix in self._prefixes), default=0),
            )
            self._shape = shape.pad(page_length=PAGE_LENGTH) if self.is_static else shape
        return self._shape

    def append(
        self, layer: int, keys: Sequence[Tensor], values: Sequence[Tensor], *, is_suffix: Sequence[bool]
    ) -> None:
        """Store a layer's keys and values (1, K, length, d) of the next segments of the sequence."""
        pending = self._pending.setdefault(layer, {False: [], True: []})
        for key, value, suffix in zip(keys, values, is_suffix, strict=True):
            # Copied, since a view would keep the keys of the whole sequence alive.
            pending[suffix].append((key[0].to(value.dtype, copy=True), value[0].clone()))

    def finalize(self) -> None:
        """Arrange the stored segments for decoding, once all are appended."""
        for layer in list(self._pending):
            pending = self._pending.pop(layer)
            pages, tails = zip(*(_cut_pages(segments) for segments in zip(*pending[False], strict=True)), strict=True)
            own = [_stack(segments) for segments in zip(*pending[True], strict=True)]
            self._layers[layer] = _LayerCache(_Pool(*pages), _Pool(*tails), _Pool(*own))

    def extend(self, other: "KVCache") -> None:
        """Add the rows of another cache, which is used up; if that fails, this cache has the same rows as before."""
        own, added, num_groups = self._counts(), other._counts(), len(self._prefixes)
        counts = [used + count for used, count in zip(own, added, strict=True)]
        if self.is_static:
            counts = [padded_pages(counts[0]), *map(padded_rows, counts[1:])]
        tail_columns = max(self.shape.tail_columns, other.shape.tail_columns)
        columns = max(self.num_columns, other.num_columns)
        self._make_room(counts, (PAGE_LENGTH, tail_columns, columns))
        for layer, cache in self._layers.items():
            others = other._layers.pop(layer)
            for pool, joining, used, count in zip(cache.pools, others.pools, own, added, strict=True):
                pool.put(joining, used=used, count=count)
        rows = slice(len(self), len(self) + len(other))
        self._columns[rows], self._positions[:, rows] = other._columns, other._positions
        self._prefixes += [prefix.placed(own[0].__add__, own[1].__add__) for prefix in other._prefixes]
        self._groups += [num_groups + group for group in other._groups]
        self._lengths += other._lengths
        self.num_columns = columns
        self._change_layout()

    def evict(self, is_active: Tensor) -> None:
        """Remove the rows where `is_active` (R,) is false, and prefixes that no row continues any more."""
        rows = [row for row, active in enumerate(is_active.tolist()) if active]
        groups = sorted({self._groups[row] for row in rows})
        prefixes = [self._prefixes[group] for group in groups]
        page_moves = _fill_gaps([page for prefix in prefixes for page in prefix.pages])
        tail_moves = _fill_gaps([prefix.tail for prefix in prefixes if prefix.tail is not None])
        row_moves = {row: place for place, row in enumerate(rows) if row != place}
        self._prefixes = [
            prefix.placed(lambda place: page_moves.get(place, place), lambda place: tail_moves.get(place, place))
            for prefix in prefixes
        ]
        self._groups = [groups.index(self._groups[row]) for row in rows]
        self._lengths = [self._lengths[row] for row in rows]
        self._change_layout()
        moves = [torch.tensor([list(one), list(one.values())]).long() for one in (page_moves, tail_moves, row_moves)]
        by_device = dict[torch.device, list[Tensor]]()  # copied once for all layers, without waiting for the device
        for cache in self._layers.values():
            device = cache.own.keys.device
            if device not in by_device:
                by_device[device] = [one.to(device, non_blocking=True) for one in moves]
            for pool, (sources, targets) in zip(cache.pools, by_device[device], strict=True):
                pool.move(sources, targets)
        if not self.is_static:
            self.release_unused()
        index = torch.tensor(rows).to(self._columns.device, non_blocking=True)
        self._positions[:, : len(rows)], self._columns[: len(rows)] = self._positions[:, index], self._columns[index]

    def release_unused(self) -> None:
        """Release memory if at most half of it is in use; recorded steps become void."""
        used = (self.shape.pages, self.shape.tails, self.shape.rows)
        for cache in self._layers.values():
            for pool, count in zip(cache.pools, used, strict=True):
                if count < len(pool.keys) >= RELEASE * count:
                    self._replace_storage()
                    pool.release(count)

    def clear(self) -> None:
        """Remove all rows, but keep the memory for others."""
        if not len(self):
            return
        for cache in self._layers.values():
            for pool in cache.pools:
                pool.clear()
        for counter in (self._columns, self._positions):
            counter.zero_()
        self._groups, self._lengths, self._prefixes = [], [], []
        self.num_columns = self.expected_tokens = 0
        self._steps.clear()
        self._change_layout()

    def keep_tables(self, shapes: Collection[StepShape]) -> None:
        """Drop the tables of steps of other shapes than these and the current one."""
        kept = {*shapes, self.shape}
        self._tables = {key: tables for key, tables in self._tables.items() if key[0] in kept}
        self._stale &= set(self._tables)

    def _counts(self) -> tuple[int, int, int]:
        """Return the numbers of pages, tails and rows."""
        return self._num_pages, self._num_tails, len(self)

    def _make_room(self, counts: Sequence[int], columns: Sequence[int]) -> None:
        """Make room for pages, tails and rows of some lengths in each layer."""
        if self.is_static:
            columns = (*columns[:-1], max(columns[-1], padded_columns(self.expected_tokens, growth=GROWTH_STATIC)))
        rooms = list(zip(counts, columns, strict=True))
        pools = [pool for cache in self._layers.values() for pool in cache.pools]
        lacking = [(pool, room) for pool, room in zip(pools, cycle(rooms), strict=False) if not pool.has_room(*room)]
        missing = max(0, counts[-1] - len(self._columns))
        if lacking or missing:
            self._replace_storage()  # first: even if memory runs out below, some tensors are others than before
        for pool, room in lacking:
            pool.make_room(*room)
        if missing:
            self._columns, self._increments = (F.pad(one, (0, missing)) for one in (self._columns, self._increments))
            self._positions = F.pad(self._positions, (0, 0, 0, missing))

    def reserve(self) -> None:
        """Make room for one more token of each row."""
        longest = max(self._lengths)
        if self._is_reserved and longest < self.num_columns:
            return
        shape, columns = self.shape, self.num_columns
        if self.is_static:
            columns = max(columns, padded_columns(longest + 1, growth=GROWTH_STATIC))
        elif longest >= columns:
            columns += GROWTH
        self._make_room((shape.pages, shape.tails, shape.rows), (PAGE_LENGTH, shape.tail_columns, columns))
        self._increments[: len(self)] = 1
        self._increments[len(self) :] = 0
        increments = self._increments[: shape.rows]
        self._counters = (
            (self._columns[: shape.rows], increments),
            (self._positions[:, : shape.rows], increments[:, None]),
        )
        for key in [key for key in self._stale if key[0] == shape]:
            self._tables[key].copy_(make_tables(self._groups, self._prefixes, self.shape))
            self._stale.remove(key)
        self._is_reserved, self.num_columns = True, columns

    def advance(self, *, num_waiting: int = 0) -> Tensor:
        """Make room for one more token of each row and start a decode step.

        Args:
            num_waiting: number of rows at the end whose token is a placeholder; the next one takes its place.

        Returns:
            (3, R, 1) positions of the tokens; in a static cache R is padded.
        """
        self.reserve()
        self.count_step(num_waiting=num_waiting)
        return self.start_step(num_waiting=num_waiting)

    def start_step(self, *, num_waiting: int = 0) -> Tensor:
        """Do the part of `advance` that is on the device.

        It changes tensors in place, so that a recorded step can be replayed; the host's part depends on the step.
        """
        self._steps.clear()
        (columns, column_increments), (positions, position_increments) = self._counters
        if not num_waiting:
            self._step_columns = columns.add_(column_increments)
            return positions.add_(position_increments)
        started = len(self) - num_waiting
        self._step_columns, step_positions = columns + column_increments, positions + position_increments
        columns[:started] += 1
        positions[:, :started] += 1
        return step_positions

    def count_step(self, *, num_waiting: int = 0) -> None:
        """Count the tokens of a step on the host."""
        started = self._num_started = len(self) - num_waiting
        self._lengths = [length + (row < started) for row, length in enumerate(self._lengths)]

    def rewind(self) -> None:
        """Undo the last step, before rows come or go; the next one takes its place."""
        started = self._num_started
        self._columns[:started] -= 1
        self._positions[:, :started] -= 1
        self._lengths = [length - (row < started) for row, length in enumerate(self._lengths)]

    def _change_layout(self) -> None:
        """Note that rows came or went."""
        self._shape, self._is_reserved = None, False
        if self.is_static:
            self._stale = set(self._tables)
        else:
            self._tables.clear()

    def _replace_storage(self) -> None:
        """Note that steps will refer to other tensors."""
        self.storage_version += 1
        self._tables.clear()
        self._stale.clear()

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
        """See `AttentionBackend`; B is R, L is 1."""
        cache, dtype = self._layers[layer], value.dtype
        step = self._step_on(query.device, dtype)
        tables, num_heads = step.tables, query.shape[1] // key.shape[1]  # query heads that share a key head
        for tensor, new in ((cache.own.keys, key), (cache.own.values, value)):
            tensor[tables.rows, :, step.columns] = new[:, :, 0].to(dtype)
        queries = query.to(dtype).squeeze(2).unflatten(1, (-1, num_heads))  # (R, K, H / K, d)
        own, own_total = partial_attention(
            queries, *cache.own.part(*step.own_bias.shape), scale=scale, bias=step.own_bias
        )
        queries = queries.transpose(1, 2)  # (R, H / K, K, d), as the kernels store outputs

        outputs, totals = [own.transpose(1, 2)], [own_total.transpose(1, 2).unsqueeze(1)]
        pages = tails = None
        if len(tables.page_rows):
            pages, page_totals = _attend_together(queries, tables.page_rows, cache.pages, None, scale=scale)
            totals.append(page_totals[tables.row_pages, tables.slots[:, None]])
        if len(tables.tail_rows):
            tails, tail_totals = _attend_together(queries, tables.tail_rows, cache.tails, step.tail_bias, scale=scale)
            totals.append(tail_totals[tables.row_tails, tables.slots].unsqueeze(1))
        total = torch.cat(totals, dim=1)  # (R, parts, H / K, K)
        shares = total.masked_fill(tables.is_absent, -torch.inf).softmax(1)

        output = shares[:, 0, ..., None] * outputs[0]
        if tails is not None:
            output = output + shares[:, -1, ..., None] * tails[tables.row_tails, tables.slots]
        if pages is not None:
            output = output + _sum_pages(pages, shares, tables)
        return output.transpose(1, 2).flatten(1, 2).unsqueeze(2).to(dtype)

    def _step_on(self, device: torch.device, dtype: torch.dtype) -> _Step:
        """Return the tensors of this step on a device; a model may be split over several."""
        if device not in self._steps:
            key = (self.shape, device)
            if key not in self._tables:
                self._tables[key] = make_tables(self._groups, self._prefixes, self.shape).to(device)
            tables, columns = self._tables[key], self._step_columns.to(device)
            own_columns = self.num_columns if self.is_static else max(self._lengths)
            self._steps[device] = _Step(
                tables,
                columns,
                length_bias(columns[:, None] + 1, num_columns=own_columns, dtype=dtype),
                length_bias(tables.tail_lengths, num_columns=self.shape.tail_columns, dtype=dtype),
            )
        return self._steps[device]


def _attend_together(
    queries: Tensor, rows: Tensor, pool: _Pool, bias: Tensor | None, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Let rows attend together to what they share.

    Args:
        queries: (R, H / K, K, d).
        rows: (N, M) rows that attend to each part of the pool.
        pool: N parts or more.
        bias: see `partial_attention`.
        scale: factor of the scores.

    Returns:
        (N, M, H / K, K, d) and the log-sum-exp (N, M, H / K, K).
    """
    gathered = queries.index_select(0, rows.flatten()).unflatten(0, rows.shape).flatten(1, 2)  # (N, M H / K, K, d)
    keys, values = pool.part(len(rows), PAGE_LENGTH if bias is None else bias.shape[1])
    output, total = partial_attention(gathered.transpose(1, 2), keys, values, scale=scale, bias=bias)
    num_slots = rows.shape[1]
    return output.transpose(1, 2).unflatten(1, (num_slots, -1)), total.transpose(1, 2).unflatten(1, (num_slots, -1))


def _sum_pages(outputs: Tensor, shares: Tensor, tables: Tables) -> Tensor:
    """Sum the outputs (P, M, H / K, K, d) of each row's pages with their shares (R, parts, H / K, K) of the softmax.

    One product over all pages, with zeros for those of other groups, reads each output once; gathering the outputs of
    each row first would copy them. Slots without a row get any numbers, which are not read.
    """
    weights = shares[tables.page_rows, 1 + tables.page_numbers[:, None]].flatten(1).t().to(outputs.dtype)
    by_group = weights.unsqueeze(1) * tables.page_groups  # (M H / K K, G, P)
    sums = float32_product(by_group, outputs.flatten(1, 3).transpose(0, 1))  # (M H / K K, G, d)
    return sums.unflatten(0, outputs.shape[1:4])[tables.slots, :, :, tables.groups]


def _fill_gaps(places: Sequence[int]) -> dict[int, int]:
    """Return the moves {source: target} after which the used places are the first ones; no other part is copied."""
    gaps = sorted(set(range(len(places))) - set(places))
    return dict(zip((place for place in sorted(places) if place >= len(places)), gaps, strict=True))


def _cut_pages(prefixes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Cut prefixes (K, length, d) into full pages (P, K, PAGE_LENGTH, d) and tails (T, K, longest, d)."""
    pages, tails = [], [prefixes[0][:, :0]]
    for prefix in prefixes:
        count, rest = divmod(prefix.shape[1], PAGE_LENGTH)
        full, tail = prefix.split([count * PAGE_LENGTH, rest], dim=1)
        pages.append(full.unflatten(1, (count, PAGE_LENGTH)).transpose(0, 1))
        if rest:
            tails.append(tail)
    return torch.cat(pages), _stack(tails)[1:]


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """Stack tensors (K, length, d), padded with zeros on the right, to (N, K, longest, d)."""
    longest = max(tensor.shape[1] for tensor in tensors)
    return torch.stack([F.pad(tensor, (0, 0, 0, longest - tensor.shape[1])) for tensor in tensors])
