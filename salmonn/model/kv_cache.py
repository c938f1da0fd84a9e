"""KV cache of rows with common prefixes, and attention of decode steps to it.

A prefix is stored once for all rows that continue it, cut into pages of equal length:

    prefix 0   [page][page][tail]      rows 0, 1, 2    own tokens [..........] each
    prefix 1   [page][tail]            rows 3, 4       own tokens [....]

The full pages of all prefixes are one batch for a flash-attention kernel, in which the queries of all rows of a page's
prefix attend to it together: no prefix is padded to the longest, and no scores are written to memory. The tails and the
tokens of the rows themselves are two further batches. The parts of each row are merged by their log-sum-exp.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from salmonn.model.packing import PackedBatch
from salmonn.model.partial_attention import float32_product, length_bias, partial_attention

PAGE_LENGTH = 512  # tokens; a page is a block of work for a GPU, and costs it an output and a log-sum-exp per query
# Columns that are added when the own tokens of some row fill theirs; a static cache attends to all of them, but each
# change costs a recorded step.
GROWTH, GROWTH_STATIC = 64, 256


@dataclass
class _Pool:
    """Keys and values (N, K, S, d) of N equal parts of the cache; the first ones are in use."""

    keys: Tensor
    values: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace keys and values."""
        self.keys, self.values = change(self.keys), change(self.values)

    def part(self, count: int, columns: int) -> tuple[Tensor, Tensor]:
        """Return the first columns of the first parts."""
        return self.keys[:count, :, :columns], self.values[:count, :, :columns]

    def move(self, moves: Mapping[int, int], *, used: int) -> None:
        """Copy parts to other places, {source: target}, then release memory if most of it is unused."""
        if moves:
            sources, targets = (torch.tensor(list(one), device=self.keys.device) for one in (moves, moves.values()))
            for tensor in (self.keys, self.values):
                tensor[targets] = tensor[sources]
        if 2 * used <= len(self.keys):
            self.map(lambda tensor: tensor[:used].clone())

    def extend(self, other: "_Pool", *, used: int, added: int) -> None:
        """Append the first parts of another pool after those in use, with more columns if it has more."""

        def extended(own: Tensor, others: Tensor) -> Tensor:
            rows, columns = max(len(own), used + added), max(own.shape[2], others.shape[2])
            if (rows, columns) != (len(own), own.shape[2]):
                grown = own.new_zeros(rows, own.shape[1], columns, own.shape[3])  # what is masked must be finite
                grown[:used, :, : own.shape[2]] = own[:used]
                own = grown
            own[used : used + added, :, : others.shape[2]] = others[:added]
            return own

        self.keys, self.values = extended(self.keys, other.keys), extended(self.values, other.values)


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


@dataclass
class _Prefix:
    """Places of a prefix: indices of its full pages and of its tail, if its length is no multiple of a page's."""

    pages: list[int]
    tail: int | None
    tail_length: int

    def placed(self, page: Callable[[int], int], tail: Callable[[int], int]) -> "_Prefix":
        """Return the prefix with other places."""
        return _Prefix(
            [page(place) for place in self.pages], None if self.tail is None else tail(self.tail), self.tail_length
        )


@dataclass(frozen=True)
class _Tables:
    """Which row attends to what, for R rows, M rows of the largest of G groups, P pages and T tails.

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

    def to(self, device: torch.device) -> "_Tables":
        """Copy to a device."""
        return _Tables(*(getattr(self, one.name).to(device, non_blocking=True) for one in fields(self)))


@dataclass(frozen=True)
class _Step:
    """Tensors of one decode step on one device.

    Args:
        tables: which row attends to what.
        columns: (R,) column of each row's new token among its own tokens.
        own_bias: (R, C) bias of the own tokens, see `partial_attention`.
        tail_bias: (T, S) bias of the tails.
    """

    tables: _Tables
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
        is_static: let decode steps attend to all columns that there is room for, with those without a token masked,
            so that steps do not differ in shape (default: on a GPU, where they can be recorded).
        layout_version: number that changes whenever tensors are replaced or rows come and go.
    """

    def __init__(self, packed: PackedBatch, positions: Tensor) -> None:
        self._positions = positions[:, 0, packed.row_ends].unsqueeze(-1)
        self._layers: dict[int, _LayerCache] = {}
        self._pending: dict[int, dict[bool, list[tuple[Tensor, Tensor]]]] = {}  # by layer and is_suffix
        # The layout is kept on the host: reading it from the device would wait for the device.
        self._groups = [number for number, group in enumerate(packed.groups) for _ in group.rows]
        self._lengths = [length for group in packed.groups for length in group.suffix_lengths]
        self._columns = torch.tensor(self._lengths, device=positions.device) - 1  # (R,) of the last own tokens
        self._prefixes: list[_Prefix] = []
        for group in packed.groups:
            count, rest = divmod(group.prefix_length, PAGE_LENGTH)
            pages = list(range(self._num_pages, self._num_pages + count))
            self._prefixes.append(_Prefix(pages, self._num_tails if rest else None, rest))
        self._tables: dict[torch.device, _Tables] = {}
        self._steps: dict[torch.device, _Step] = {}
        self._step_columns = self._columns
        self.is_static = positions.device.type == "cuda"
        self.layout_version = 0

    def __len__(self) -> int:
        return len(self._groups)

    @property
    def _num_pages(self) -> int:
        return sum(len(prefix.pages) for prefix in self._prefixes)

    @property
    def _num_tails(self) -> int:
        return sum(prefix.tail is not None for prefix in self._prefixes)

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
        self._change_layout()  # first: even if memory runs out below, some tensors are others than in recorded steps
        num_pages, num_tails, num_groups = self._num_pages, self._num_tails, len(self._prefixes)
        counts = ((num_pages, other._num_pages), (num_tails, other._num_tails), (len(self), len(other)))
        for layer, cache in self._layers.items():
            others = other._layers.pop(layer)
            for pool, added, (used, count) in zip(cache.pools, others.pools, counts, strict=True):
                pool.extend(added, used=used, added=count)
        self._prefixes += [prefix.placed(num_pages.__add__, num_tails.__add__) for prefix in other._prefixes]
        self._groups += [num_groups + group for group in other._groups]
        self._lengths += other._lengths
        self._positions = torch.cat([self._positions, other._positions], dim=1)
        self._columns = torch.cat([self._columns, other._columns])

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
        for cache in self._layers.values():
            cache.pages.move(page_moves, used=self._num_pages)
            cache.tails.move(tail_moves, used=self._num_tails)
            cache.own.move(row_moves, used=len(rows))
        index = torch.tensor(rows, device=self._columns.device)
        self._positions, self._columns = self._positions[:, index], self._columns[index]
        self._change_layout()

    def reserve(self) -> None:
        """Make room for one more token of each row."""
        for cache in self._layers.values():
            if max(self._lengths) == cache.own.keys.shape[2]:
                growth = GROWTH_STATIC if self.is_static else GROWTH
                cache.own.map(partial(F.pad, pad=(0, 0, 0, growth)))
                self._change_layout()

    def advance(self, *, num_waiting: int = 0) -> Tensor:
        """Make room for one more token of each row and start a decode step.

        Args:
            num_waiting: number of rows at the end whose token is a placeholder; the next one takes its place.

        Returns:
            (3, R, 1) positions of the tokens.
        """
        self.reserve()
        self.count_step(num_waiting=num_waiting)
        return self.start_step(num_waiting=num_waiting)

    def start_step(self, *, num_waiting: int = 0) -> Tensor:
        """Do the part of `advance` that is on the device.

        It changes tensors in place, so that a recorded step can be replayed; the host's part depends on the step.
        """
        self._steps.clear()
        if not num_waiting:
            self._step_columns = self._columns.add_(1)
            return self._positions.add_(1)
        self._step_columns, positions = self._columns + 1, self._positions + 1
        self._columns[:-num_waiting] += 1
        self._positions[:, :-num_waiting] += 1
        return positions

    def count_step(self, *, num_waiting: int = 0) -> None:
        """Count the tokens of a step on the host."""
        started = len(self) - num_waiting
        self._lengths = [length + (row < started) for row, length in enumerate(self._lengths)]

    def _change_layout(self) -> None:
        self._tables.clear()
        self.layout_version += 1

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
        """See `AttentionBackend`; B is R, L is 1."""
        cache, dtype = self._layers[layer], value.dtype
        step = self._step_on(query.device, dtype)
        tables, num_heads = step.tables, query.shape[1] // key.shape[1]  # query heads that share a key head
        for tensor, new in ((cache.own.keys, key), (cache.own.values, value)):
            tensor[tables.rows, :, step.columns] = new[:, :, 0].to(dtype)
        queries = query.to(dtype).squeeze(2).unflatten(1, (-1, num_heads))  # (R, K, H / K, d)
        own, own_total = partial_attention(
            queries, *cache.own.part(len(self), step.own_bias.shape[1]), scale=scale, bias=step.own_bias
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
            if device not in self._tables:
                self._tables[device] = self._make_tables().to(device)
            tables, columns = self._tables[device], self._step_columns.to(device)
            tail_columns = max((prefix.tail_length for prefix in self._prefixes), default=0)
            columns_of_layers = [
                layer.own.keys.shape[2] for layer in self._layers.values()
            ]  # equal, unless `extend` fails
            own_columns = min(columns_of_layers) if self.is_static else max(self._lengths)
            self._steps[device] = _Step(
                tables,
                columns,
                length_bias(columns[:, None] + 1, num_columns=own_columns, dtype=dtype),
                length_bias(tables.tail_lengths, num_columns=tail_columns, dtype=dtype),
            )
        return self._steps[device]

    def _make_tables(self) -> _Tables:
        members: list[list[int]] = [[] for _ in self._prefixes]
        slots = []
        for row, group in enumerate(self._groups):
            slots.append(len(members[group]))
            members[group].append(row)
        num_slots, longest = max(map(len, members)), max(len(prefix.pages) for prefix in self._prefixes)
        num_groups, num_pages, num_tails = len(members), self._num_pages, self._num_tails
        page_rows, tail_rows = _zeros(num_pages, num_slots), _zeros(num_tails, num_slots)
        page_numbers, tail_lengths = _zeros(num_pages), _zeros(num_tails, 1)
        group_pages, group_tails = _zeros(num_groups, longest), _zeros(num_groups)
        page_groups, is_part = _zeros(num_groups, num_pages).bool(), _zeros(num_groups, longest + 2).bool()
        is_part[:, 0] = True
        for group, prefix in enumerate(self._prefixes):
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
        groups = torch.tensor(self._groups)
        return _Tables(
            rows=torch.arange(len(groups)),
            slots=torch.tensor(slots),
            groups=groups,
            page_rows=page_rows,
            tail_rows=tail_rows,
            row_pages=group_pages[groups],
            page_numbers=page_numbers,
            page_groups=page_groups,
            row_tails=group_tails[groups],
            is_absent=~is_part[groups, : None if num_tails else -1, None, None],
            tail_lengths=tail_lengths,
        )


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


def _sum_pages(outputs: Tensor, shares: Tensor, tables: _Tables) -> Tensor:
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


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.long)
