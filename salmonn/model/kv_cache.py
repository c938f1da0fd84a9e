"""KV cache of rows with common prefixes, and attention of decode steps to it.

A prefix is stored once for all rows that continue it, and the queries of all these rows attend to it in one product.
The attention to the prefix and that to a row's own tokens are combined by their log-sum-exp.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from salmonn.model.packing import PackedBatch

GROWTH = 64  # columns that are added when the cache of generated tokens is full


@dataclass
class _LayerCache:
    """Keys and values of one layer: prefixes of G groups (G, K, P, d), further tokens of R rows (R, K, C, d)."""

    keys: Tensor
    values: Tensor
    suffix_keys: Tensor
    suffix_values: Tensor


class KVCache:
    """Keys and values of R rows that were prefilled together, in the order of the packed sequence.

    `PrefillAttention` appends all segments layer by layer; after `finalize`, each decode step calls `advance` once and
    `attend` for each layer.

    Args:
        packed: the packed batch; no suffix is empty.
        positions: (3, 1, T) rotary positions of its tokens.
    """

    def __init__(self, packed: PackedBatch, positions: Tensor) -> None:
        device = positions.device
        suffixes = [length for group in packed.groups for length in group.suffix_lengths]
        groups = [number for number, group in enumerate(packed.groups) for _ in group.rows]
        self._positions = positions[:, 0, packed.row_ends].unsqueeze(-1)
        self._groups = torch.tensor(groups, device=device)
        self._prefix_mask = _length_mask([group.prefix_length for group in packed.groups], device=device)
        self._suffix_mask = _length_mask(suffixes, device=device).flip(1)  # aligned on the right
        self._filled = max(suffixes)
        self._layers: dict[int, _LayerCache] = {}
        self._pending: dict[int, dict[bool, list[tuple[Tensor, Tensor]]]] = {}  # by layer and is_suffix
        self._assign_slots()

    def __len__(self) -> int:
        return len(self._groups)

    def append(
        self, layer: int, keys: Sequence[Tensor], values: Sequence[Tensor], *, is_suffix: Sequence[bool]
    ) -> None:
        """Store a layer's keys and values (1, K, length, d) of the next segments of the sequence."""
        pending = self._pending.setdefault(layer, {False: [], True: []})
        for key, value, suffix in zip(keys, values, is_suffix, strict=True):
            # Copied, since a view would keep the keys of the whole sequence alive.
            pending[suffix].append((key[0].transpose(0, 1).clone(), value[0].transpose(0, 1).clone()))

    def finalize(self) -> None:
        """Arrange the stored segments for decoding, once all are appended."""
        for layer in list(self._pending):
            pending = self._pending.pop(layer)
            tensors = [
                pad_sequence(list(segments), batch_first=True, padding_side=side).transpose(1, 2).contiguous()
                for suffix, side in ((False, "right"), (True, "left"))
                for segments in zip(*pending[suffix], strict=True)
            ]
            self._layers[layer] = _LayerCache(*tensors)

    def advance(self) -> Tensor:
        """Make room for one more token of each row and return the positions of these tokens, (3, R, 1)."""
        if self._filled == self._suffix_mask.shape[1]:
            self._suffix_mask = F.pad(self._suffix_mask, (0, GROWTH))
            for cache in self._layers.values():
                cache.suffix_keys = F.pad(cache.suffix_keys, (0, 0, 0, GROWTH))
                cache.suffix_values = F.pad(cache.suffix_values, (0, 0, 0, GROWTH))
        self._suffix_mask[:, self._filled] = True
        self._filled += 1
        self._positions = self._positions + 1
        return self._positions

    def evict(self, is_active: Tensor) -> None:
        """Remove the rows where `is_active` (R,) is false, and prefixes that no row continues any more."""
        # Computed from logits, `is_active` may be on another device in a model that is split over devices.
        rows = is_active.nonzero().flatten().to(self._groups.device)
        groups, self._groups = self._groups[rows].unique(return_inverse=True)
        has_unused_prefix = len(groups) < len(self._prefix_mask)
        for cache in self._layers.values():
            if has_unused_prefix:
                cache.keys, cache.values = (tensor[groups.to(tensor.device)] for tensor in (cache.keys, cache.values))
            cache.suffix_keys, cache.suffix_values = (
                tensor[rows.to(tensor.device)] for tensor in (cache.suffix_keys, cache.suffix_values)
            )
        self._prefix_mask, self._suffix_mask = self._prefix_mask[groups], self._suffix_mask[rows]
        self._positions = self._positions[:, rows]
        self._assign_slots()

    def _assign_slots(self) -> None:
        """Assign each row a slot (G * M) in its prefix group; M is the size of the largest group."""
        counts = self._groups.bincount()
        first = counts.cumsum(0) - counts
        self._max_rows = int(counts.max())
        index = torch.arange(len(self._groups), device=first.device)
        self._slots = self._groups * self._max_rows + index - first[self._groups]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
        """See `AttentionBackend`; B is R, L is 1."""
        cache, column, device = self._layers[layer], self._filled - 1, query.device
        cache.suffix_keys[:, :, column], cache.suffix_values[:, :, column] = key[:, :, 0], value[:, :, 0]
        heads = query.shape[1] // key.shape[1]  # query heads that share a key head
        queries = query.unflatten(1, (-1, heads)).squeeze(3)  # (R, K, H / K, d)
        slots, prefix_mask, suffix_mask = (
            tensor.to(device) for tensor in (self._slots, self._prefix_mask, self._suffix_mask)
        )
        num_groups, max_rows = len(prefix_mask), self._max_rows
        by_slot = queries.new_zeros(num_groups * max_rows, *queries.shape[1:]).index_copy(0, slots, queries)
        by_group = by_slot.unflatten(0, (num_groups, max_rows)).transpose(1, 2).flatten(2, 3)  # (G, K, M H / K, d)
        prefix, prefix_total = (
            tensor.unflatten(2, (max_rows, heads)).transpose(1, 2).flatten(0, 1)[slots]
            for tensor in _attend(by_group, cache.keys, cache.values, prefix_mask, scale=scale)
        )
        filled = slice(self._filled)
        suffix, suffix_total = _attend(
            queries,
            cache.suffix_keys[:, :, filled],
            cache.suffix_values[:, :, filled],
            suffix_mask[:, filled],
            scale=scale,
        )
        # The softmax over the keys of both, from the log-sum-exp of each.
        share = (prefix_total - suffix_total).sigmoid()
        output = share * prefix + (1 - share) * suffix
        return output.to(value.dtype).flatten(1, 2).unsqueeze(2)


class BatchedKVCache:
    """Several caches in one decode step, which shares everything but attention.

    Args:
        caches: caches of rows that were prefilled at different times; their rows are concatenated.
    """

    def __init__(self, caches: Sequence[KVCache]) -> None:
        self._caches = caches
        self._sizes = [len(cache) for cache in caches]

    def advance(self) -> Tensor:
        """See `KVCache`."""
        return torch.cat([cache.advance() for cache in self._caches], dim=1)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
        """See `AttentionBackend`; B is the number of rows of all caches, L is 1."""
        parts = zip(self._caches, *(tensor.split(self._sizes) for tensor in (query, key, value)), strict=True)
        return torch.cat([cache.attend(layer, *part, scale=scale) for cache, *part in parts])


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """Compute attention and the log-sum-exp of its scores, both in float32.

    Args:
        query: (B, K, Q, d).
        keys, values: (B, K, S, d).
        mask: (B, S) true for filled columns.
        scale: factor of the scores.

    Returns:
        (B, K, Q, d) and (B, K, Q, 1).
    """
    scores = _float32_product(query, keys) * scale
    # Not minus infinity: without any filled column the result must be a number, which then has no weight.
    scores = scores.masked_fill(~mask[:, None, None], torch.finfo(scores.dtype).min)
    total = scores.logsumexp(-1, keepdim=True)
    return ((scores - total).exp().to(values.dtype) @ values).float(), total


def _float32_product(query: Tensor, keys: Tensor) -> Tensor:
    """Return query @ keys^T, (B, K, Q, S), accumulated and kept in float32.

    The keys of Qwen2 have biases of several hundred. Products rounded to 16 bits then differ by whole units, and the
    softmax by several percent.
    """
    if query.dtype in (torch.float32, torch.float64):
        return query @ keys.transpose(-1, -2)
    if query.device.type == "cuda":  # converted keys would be a copy of the cache
        product = torch.bmm(query.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2), out_dtype=torch.float32)
        return product.unflatten(0, query.shape[:2])
    return query.float() @ keys.float().transpose(-1, -2)


def _length_mask(lengths: Sequence[int], *, device: torch.device) -> Tensor:
    """Return (N, longest), true in the first columns of each row, as many as its length."""
    return torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]
