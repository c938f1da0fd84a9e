"""Attention over rows with common prefixes, without ever forming a mask of a whole sequence.

The decoder's layers are those of transformers, which call the attention implementation named in their config. The one
registered here passes the work to an `AttentionBackend` where one is given: to `PackedAttention` for a packed batch in
training, to `PrefillAttention` for prompts, and to a `KVCache` for decode steps. Without one it is transformers' SDPA.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from salmonn.model.kv_cache import KVCache
from salmonn.model.packing import PackedBatch

NAME = "salmonn"  # of this implementation, in a decoder's config


class AttentionBackend(Protocol):
    """Attention for one batch, whose rows share keys and values in some way."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
        """Compute the attention of one layer.

        Args:
            layer: index of the layer.
            query: (B, H, L, d).
            key, value: (B, K, L, d); H / K query heads share a key head.
            scale: factor of the scores.

        Returns:
            (B, H, L, d).
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
    backend: AttentionBackend | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute attention with the signature of transformers; returns (B, L, H, d) and no weights."""
    if backend is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    assert isinstance(module.layer_idx, int)
    return backend.attend(module.layer_idx, query, key, value, scale=scaling).transpose(1, 2), None


def use_packed_attention(config: Any) -> None:
    """Route the layers of a decoder with this config to `attention`.

    Raises:
        ValueError: some layers use sliding-window attention.
    """
    if others := sorted(set(config.layer_types) - {"full_attention"}):
        raise ValueError(
            f"the language model has layers with {', '.join(others)}, which are not supported; set use_sliding_window "
            "to false in its config"
        )
    config._attn_implementation = NAME


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


class PackedAttention:
    """Attention of a whole packed batch: each prefix to itself, then each suffix to its prefix and itself."""

    def __init__(self, packed: PackedBatch) -> None:
        self.packed = packed
        self.lengths = packed.segment_lengths
        self._masks: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
        """See `AttentionBackend`; B is 1."""
        # Autocast casts them too, but not everywhere: the rotation leaves queries and keys in float32.
        query, key = query.to(value.dtype), key.to(value.dtype)
        # Split, not sliced: the gradient of a slice is as long as the whole sequence.
        segments = zip(*(tensor.split(self.lengths, dim=2) for tensor in (query, key, value)), strict=True)
        return torch.cat(list(self._attend_segments(segments, scale)), dim=2)

    def _attend_segments(self, segments: Iterator[tuple[Tensor, ...]], scale: float) -> Iterator[Tensor]:
        for group in self.packed.groups:
            query, prefix_keys, prefix_values = next(segments)
            yield _sdpa(query, prefix_keys, prefix_values, None, scale=scale)
            for length in group.suffix_lengths:
                query, key, value = next(segments)
                if length:
                    key, value = torch.cat([prefix_keys, key], dim=2), torch.cat([prefix_values, value], dim=2)
                    mask = self._suffix_mask(query, length=length, prefix_length=group.prefix_length)
                    yield _sdpa(query, key, value, mask, scale=scale)

    def _suffix_mask(self, query: Tensor, *, length: int, prefix_length: int) -> Tensor:
        """Return the mask (length, prefix_length + length): the prefix, and the suffix up to each token itself."""
        if query.device.type == "cuda":
            return causal_lower_right(length, prefix_length + length)  # which CUDA kernels never turn into a tensor
        kind = (query.device, query.dtype)
        if kind not in self._masks:
            # One mask for all segments and layers, each of which takes a corner: autograd would keep every further one.
            longest = max(length for group in self.packed.groups for length in group.suffix_lengths)
            widest = max(group.prefix_length for group in self.packed.groups)
            later = torch.full((longest, longest), -torch.inf, dtype=query.dtype, device=query.device).triu(1)
            self._masks[kind] = F.pad(later, (widest, 0))
        mask = self._masks[kind]
        widest = mask.shape[1] - mask.shape[0]
        return mask[:length, widest - prefix_length : widest + length]


class PrefillAttention(PackedAttention):
    """Packed attention that also stores keys and values in a cache for the decode steps that follow."""

    def __init__(self, packed: PackedBatch, cache: KVCache) -> None:
        super().__init__(packed)
        self._cache = cache

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
        """See `AttentionBackend`; B is 1."""
        segments = (tensor.split(self.lengths, dim=2) for tensor in (key, value))
        self._cache.append(layer, *segments, is_suffix=self.packed.is_suffix)
        return super().attend(layer, query, key, value, scale=scale)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scale: float) -> Tensor:
    """Compute attention with a mask, or causal attention without one."""
    is_grouped = query.shape[1] != key.shape[1]
    if is_grouped and query.device.type == "cuda" and query.dtype == torch.float32:
        # The memory-efficient kernel for float32 takes no groups; the fallback would form all scores.
        key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
        is_grouped = False
    return F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=mask is None, scale=scale, enable_gqa=is_grouped
    )
