"""Attention of rows that share what they begin with; no table of who sees whom is ever made of a whole sequence.

The decoder's layers are transformers' own. They call the attention that their config names: it is registered here, and
given `rows` it leaves the work to them: to `PackedAttention` where all rows are read at once, and to `KVCache` where
rows that were read go on token by token. Without `rows` it is transformers' SDPA.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from salmonn.model.packing import PackedBatch

NAME = "salmonn"  # of this attention, in a decoder's config
_MORE_COLUMNS = 64  # that the memory of own tokens grows by


class AttentionBackend(Protocol):
    """What a batch's rows are to each other."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
        """Attention of one layer.

        Args:
            layer: its number.
            query: (B, H, T, d).
            key, value: (B, K, T, d), K heads that H / K query heads share.
            scale: of the products.

        Returns:
            (B, H, T, d).
        """
        ...


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    rows: AttentionBackend | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """As transformers' layers call it; (B, T, H, d) and no weights."""
    if rows is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    assert isinstance(module.layer_idx, int)
    return rows.attend(module.layer_idx, query, key, value, scale=scaling).transpose(1, 2), None


def use_packed_attention(config: Any) -> None:
    """Let the layers of a decoder with this config call the attention that stands here.

    Raises:
        ValueError: some of them see a sliding window.
    """
    if others := sorted(set(config.layer_types) - {"full_attention"}):
        raise ValueError(f"the language model has layers of {', '.join(others)}: set use_sliding_window to false")
    config._attn_implementation = NAME


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


class PackedAttention:
    """All rows of a packed sequence at once: each beginning by itself, then each own part after it.

    Args:
        packed: the sequence.
    """

    def __init__(self, packed: PackedBatch) -> None:
        self.packed = packed
        self.lengths = packed.lengths
        self._masks: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
        """See `Rows`; B is 1."""
        # Autocast would do it, but not everywhere: the rotation leaves queries and keys in float32.
        query, key = query.to(value.dtype), key.to(value.dtype)
        # Split and not sliced: the gradient of a slice is as long as the whole.
        parts = zip(*(tensor.split(self.lengths, dim=2) for tensor in (query, key, value)), strict=True)
        return torch.cat(list(self._parts(parts, scale)), dim=2)

    def _parts(self, parts: Iterator[tuple[Tensor, ...]], scale: float) -> Iterator[Tensor]:
        for group in self.packed.groups:
            query, keys, values = next(parts)
            yield _sdpa(query, keys, values, None, scale=scale)
            for length in group.own:
                query, key, value = next(parts)
                if length:
                    key, value = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
                    mask = self._mask(query, length=length, before=group.prefix_length)
                    yield _sdpa(query, key, value, mask, scale=scale)

    def _mask(self, query: Tensor, *, length: int, before: int) -> Tensor:
        """(length, before + length): an own token sees what is before its row's part, and the part up to itself."""
        if query.device.type == "cuda":
            return causal_lower_right(length, before + length)  # of which the GPU's kernels make no tensor
        kind = (query.device, query.dtype)
        if kind not in self._masks:
            # One for all parts and layers, each of which takes its corner: made anew, each would be kept for backward.
            most = max(length for group in self.packed.groups for length in group.own)
            widest = max(group.prefix_length for group in self.packed.groups)
            later = torch.full((most, most), -torch.inf, dtype=query.dtype, device=query.device).triu(1)
            self._masks[kind] = F.pad(later, (widest, 0))
        mask = self._masks[kind]
        widest = mask.shape[1] - mask.shape[0]
        return mask[:length, widest - before : widest + length]


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scale: float) -> Tensor:
    """Attention under a mask, or causal without one."""
    grouped = query.shape[1] != key.shape[1]
    if grouped and query.device.type == "cuda" and query.dtype == torch.float32:
        # The kernel for 32 bits takes no groups, and the one that does would make the whole table.
        key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
        grouped = False
    return F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )


@dataclass
class _Kept:
    """Keys and values of one layer: of G beginnings (G, K, P, d), of R rows' own tokens (R, K, C, d)."""

    keys: Tensor
    values: Tensor
    own_keys: Tensor
    own_values: Tensor


class KVCache:
    """R rows that are read once (`PrefillAttention`) and go on token by token, in the order of the packed sequence.

    A beginning is kept once, however many rows follow it: the queries of all of them look at it together.

    Args:
        packed: the sequence; each of its rows has a token of its own.
        positions: (3, 1, T) of its tokens.
    """

    def __init__(self, packed: PackedBatch, positions: Tensor) -> None:
        device = positions.device
        own = [length for group in packed.groups for length in group.own]
        parts = [number for number, group in enumerate(packed.groups) for _ in group.rows]
        self._positions = positions[:, 0, packed.ends].unsqueeze(-1)
        self._groups = torch.tensor(parts, device=device)
        self._begun = _are_filled([group.prefix_length for group in packed.groups], device=device)
        self._own = _are_filled(own, device=device).flip(1)  # their ends stand together
        self._filled = max(own)
        self._layers: dict[int, _Kept] = {}
        self._read: dict[int, dict[bool, list[tuple[Tensor, Tensor]]]] = {}  # by layer, shared and own
        self._seat()

    def __len__(self) -> int:
        return len(self._groups)

    def keep(self, layer: int, keys: Sequence[Tensor], values: Sequence[Tensor], *, is_own: Sequence[bool]) -> None:
        """Take a layer's keys and values (1, K, length, d) of the next parts of the sequence."""
        read = self._read.setdefault(layer, {False: [], True: []})
        for key, value, own in zip(keys, values, is_own, strict=True):
            # Copied: a part of what was made in one piece would hold all of it.
            read[own].append((key[0].transpose(0, 1).clone(), value[0].transpose(0, 1).clone()))

    def settle(self) -> None:
        """Lay out what was kept, once all parts are."""
        for layer in list(self._read):
            read = self._read.pop(layer)
            tensors = [
                pad_sequence(list(parts), batch_first=True, padding_side=side).transpose(1, 2).contiguous()
                for own, side in ((False, "right"), (True, "left"))
                for parts in zip(*read[own], strict=True)
            ]
            self._layers[layer] = _Kept(*tensors)

    def advance(self) -> Tensor:
        """Make room for one more token of each row; its positions, (3, R, 1)."""
        if self._filled == self._own.shape[1]:
            self._own = F.pad(self._own, (0, _MORE_COLUMNS))
            for kept in self._layers.values():
                kept.own_keys = F.pad(kept.own_keys, (0, 0, 0, _MORE_COLUMNS))
                kept.own_values = F.pad(kept.own_values, (0, 0, 0, _MORE_COLUMNS))
        self._own[:, self._filled] = True
        self._filled += 1
        self._positions = self._positions + 1
        return self._positions

    def leave(self, going_on: Tensor) -> None:
        """Forget the rows that do not go on, (R,) true for those that do, and beginnings that none follows any more."""
        # Logits are where the model ends, which may be on another device than where it begins.
        rows = going_on.nonzero().flatten().to(self._groups.device)
        groups, self._groups = self._groups[rows].unique(return_inverse=True)
        some_ended = len(groups) < len(self._begun)
        for kept in self._layers.values():
            if some_ended:
                kept.keys, kept.values = (tensor[groups.to(tensor.device)] for tensor in (kept.keys, kept.values))
            kept.own_keys, kept.own_values = (
                tensor[rows.to(tensor.device)] for tensor in (kept.own_keys, kept.own_values)
            )
        self._begun, self._own, self._positions = self._begun[groups], self._own[rows], self._positions[:, rows]
        self._seat()

    def _seat(self) -> None:
        """Give each row a seat (G * M) among those of its beginning, M the most rows that follow one."""
        counts = self._groups.bincount()
        first = counts.cumsum(0) - counts
        self._most = int(counts.max())
        place = torch.arange(len(self._groups), device=first.device)
        self._seats = self._groups * self._most + place - first[self._groups]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
        """See `Rows`; B is R, T is 1."""
        kept, column, device = self._layers[layer], self._filled - 1, query.device
        kept.own_keys[:, :, column], kept.own_values[:, :, column] = key[:, :, 0], value[:, :, 0]
        shared = query.shape[1] // key.shape[1]
        asked = query.unflatten(1, (-1, shared)).squeeze(3)  # (R, K, H / K, d)
        seats, begun, own = (tensor.to(device) for tensor in (self._seats, self._begun, self._own))
        seated = asked.new_zeros(len(begun) * self._most, *asked.shape[1:]).index_copy(0, seats, asked)
        together = seated.unflatten(0, (len(begun), self._most)).transpose(1, 2).flatten(2, 3)  # (G, K, M H / K, d)
        before = [
            part.unflatten(2, (self._most, shared)).transpose(1, 2).flatten(0, 1)[seats]
            for part in _look(together, kept.keys, kept.values, begun, scale=scale)
        ]
        filled = slice(self._filled)
        after = _look(asked, kept.own_keys[:, :, filled], kept.own_values[:, :, filled], own[:, filled], scale=scale)
        # As though the keys of both had stood in one row.
        share = (before[1] - after[1]).sigmoid()
        said = share * before[0] + (1 - share) * after[0]
        return said.to(value.dtype).flatten(1, 2).unsqueeze(2)


class BatchedKVCache:
    """Rows of several memories, one memory after the other, that go on side by side: all but attention is shared.

    Args:
        memories: of rows that were read at different times.
    """

    def __init__(self, memories: Sequence[KVCache]) -> None:
        self._memories = memories
        self._sizes = [len(memory) for memory in memories]

    def advance(self) -> Tensor:
        """See `Memory`."""
        return torch.cat([memory.advance() for memory in self._memories], dim=1)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
        """See `Rows`; B is the rows of all memories."""
        parts = zip(self._memories, *(tensor.split(self._sizes) for tensor in (query, key, value)), strict=True)
        return torch.cat([memory.attend(layer, *part, scale=scale) for memory, *part in parts])


class PrefillAttention(PackedAttention):
    """One pass over rows that will go on: `memory` keeps what they will look back at."""

    def __init__(self, packed: PackedBatch, memory: KVCache) -> None:
        super().__init__(packed)
        self._memory = memory

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
        """See `Rows`; B is 1."""
        parts = (tensor.split(self.lengths, dim=2) for tensor in (key, value))
        self._memory.keep(layer, *parts, is_own=self.packed.is_own)
        return super().attend(layer, query, key, value, scale=scale)


def _look(query: Tensor, keys: Tensor, values: Tensor, filled: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of (B, K, Q, d) to (B, K, S, d), (B, S) where filled, and the logarithm of what its weights add up to.

    Both in float32: (B, K, Q, d) and (B, K, Q, 1).
    """
    scores = (query @ keys.transpose(-1, -2)).float() * scale
    # Not to minus infinity: where nothing at all is filled, what comes out must be a number, which weighs nothing.
    scores = scores.masked_fill(~filled[:, None, None], torch.finfo(scores.dtype).min)
    total = scores.logsumexp(-1, keepdim=True)
    return ((scores - total).exp().to(values.dtype) @ values).float(), total


def _are_filled(lengths: Sequence[int], *, device: torch.device) -> Tensor:
    """(N, longest) true in as many first places as each is long."""
    return torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]
