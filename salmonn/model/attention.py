"""Attention over rows with common prefixes, without ever forming a mask of a whole sequence.

The decoder's layers are those of transformers, which call the attention implementation named in their config. The one
registered here passes the work to an `AttentionBackend` where one is given: to `PackedAttention` for a packed batch in
training, to `PrefillAttention` for prompts, and to a `KVCache` for decode steps. Without one it is transformers' SDPA.

The windows of Qwen2.5-VL's vision tower, thousands in a clip, go through SDPA in batches of equal length
(`window_attention`).
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from salmonn.model.kv_cache import KVCache
from salmonn.model.packing import PackedBatch

NAME = "salmonn"  # of this implementation, in a decoder's config
# Of `window_attention`, in the config of a vision tower. Transformers passes the boundaries of the windows to attention
# that has "flash" in its name, and calls any other one for each window.
WINDOW_NAME = "salmonn_flash_windows"
# All but cuDNN, which PyTorch prefers on recent GPUs. It builds a plan, in up to 0.4 s, for each new shape, and each
# clip has its own length. In training, where a step takes seconds, its faster kernels are worth two plans.
BACKENDS_WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class SharedBackends(AbstractContextManager[None]):
    """Chooses kernels of SDPA while any thread is within the context.

    The choice is one of the whole process. If each of two threads restored what it had found, the first choice could
    remain: clips are encoded in a thread while prompts are prefilled.
    """

    def __init__(self, backends: Sequence[SDPBackend]) -> None:
        self._backends = list(backends)
        self._lock, self._num_within, self._choice = threading.Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        """Choose, in the first thread."""
        with self._lock:
            if not self._num_within:
                self._choice.enter_context(sdpa_kernel(self._backends, set_priority=True))
            self._num_within += 1

    def __exit__(self, *_: object) -> None:
        """Restore, in the last thread."""
        with self._lock:
            self._num_within -= 1
            if not self._num_within:
                self._choice.close()


WITHOUT_PLANS = SharedBackends(BACKENDS_WITHOUT_PLANS)


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
    if others := sorted(set(getattr(config, "layer_types", ())) - {"full_attention"}):
        raise ValueError(
            f"the language model has layers with {', '.join(others)}, which are not supported; set use_sliding_window "
            "to false in its config"
        )
    config._attn_implementation = NAME


def window_attention(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    **_others: Any,
) -> tuple[Tensor, None]:
    """Compute attention within windows, with the signature of transformers: one SDPA call per distinct window length.

    Args:
        query, key, value: (1, H, T, d) of consecutive windows.
        scaling: factor of the scores.
        cu_seq_lens_q: (W + 1,) boundaries of the windows, from 0 to T.

    Returns:
        (1, T, H, d) and no weights.
    """
    lengths = cu_seq_lens_q.diff()
    by_length = lengths.argsort(stable=True)
    distinct, counts = (values.tolist() for values in lengths.unique(return_counts=True))
    starts = cu_seq_lens_q[:-1].long()
    outputs, places = [], []
    for length, windows in zip(distinct, by_length.split(counts), strict=True):
        place = (starts[windows, None] + torch.arange(length, device=starts.device)).flatten()
        queries, keys, values = (
            tensor[0].transpose(0, 1)[place].unflatten(0, (-1, length)).transpose(1, 2)  # (W, H, length, d)
            for tensor in (query, key, value)
        )
        with WITHOUT_PLANS:
            output = F.scaled_dot_product_attention(queries, keys, values, scale=scaling)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
        places.append(place)
    order = torch.cat(places).argsort()
    return torch.cat(outputs)[order].unsqueeze(0), None


def use_window_attention(config: Any) -> None:
    """Route the layers of a Qwen2.5-VL vision tower with this config to `window_attention` instead of SDPA."""
    if config._attn_implementation == "sdpa":
        config._attn_implementation = WINDOW_NAME


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
AttentionInterface.register(WINDOW_NAME, window_attention)


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
    with nullcontext() if torch.is_grad_enabled() else WITHOUT_PLANS:
        return F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=scale, enable_gqa=is_grouped
        )
