"""Limits on the sequences that are decoded together, by number and by the memory of their KV cache."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import torch

from salmonn.model.decode_graph import is_on_one_gpu
from salmonn.model.kv_cache import GROWTH, GROWTH_STATIC, PAGE_LENGTH
from salmonn.model.kv_tables import padded_columns, padded_pages, padded_rows
from salmonn.model.memory import NumberSizes, Stack, kv_cache_bytes
from salmonn.model.network import Network

GPU_BATCH_SIZE = 64  # default number of sequences on a GPU, where a step of 64 takes little longer than one of 8
KV_CACHE_SHARE = 0.6  # of the free memory of a GPU; prefill and decode steps need the rest


@dataclass(frozen=True)
class BatchLimits:
    """Limits of a batch.

    Args:
        num_rows: maximum number of sequences.
        num_tokens: maximum number of tokens that the KV cache can hold; None for no limit.
        growth: columns for generated tokens are added in steps of this number.
        is_padded: whether pages of prefixes and rows are padded, as in a static `KVCache`.
        token_bytes: bytes of a token in the KV cache.
        reserved_bytes: part of the memory of the KV cache that clips need which are encoded ahead.
    """

    num_rows: int
    num_tokens: int | None = None
    growth: int = 1
    is_padded: bool = False
    token_bytes: int = 1
    reserved_bytes: int = 0

    @property
    def max_tokens(self) -> int | None:
        """Maximum number of tokens that the KV cache can hold beside the reserved memory; None for no limit."""
        return None if self.num_tokens is None else self.num_tokens - -(-self.reserved_bytes // self.token_bytes)

    def have_room(self, prefixes: Collection[int], new_tokens: Collection[int]) -> bool:
        """Return whether the KV cache has room.

        Args:
            prefixes: number of tokens of each prefix.
            new_tokens: largest number of generated tokens of each sequence.
        """
        if (max_tokens := self.max_tokens) is None:
            return True
        # All rows have as many columns as the longest.
        num_rows, longest = len(new_tokens), max(new_tokens, default=0)
        if not self.is_padded:
            return sum(prefixes) + num_rows * -(-longest // self.growth) * self.growth <= max_tokens
        columns = padded_columns(longest, growth=self.growth)
        num_pages = padded_pages(sum(length // PAGE_LENGTH for length in prefixes))
        num_tails = padded_rows(sum(length % PAGE_LENGTH > 0 for length in prefixes))
        return (num_pages + num_tails) * PAGE_LENGTH + padded_rows(num_rows) * columns <= max_tokens


def check_batch_size(batch_size: int | None) -> None:
    """Raise a ValueError if a batch size is below 1."""
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")


def measure_limits(network: Network, *, batch_size: int | None, default: int) -> BatchLimits:
    """Return the limits that fit into the free memory of the GPUs; on a CPU, only the number of sequences is limited.

    Args:
        network: network on its devices.
        batch_size: maximum number of sequences; None for the default.
        default: default of the model, which on a GPU is raised to 64.
    """
    if network.device.type != "cuda":
        return BatchLimits(default if batch_size is None else batch_size)
    numbers, config = NumberSizes(network.dtype.itemsize, network.dtype.itemsize), network.lm.config.get_text_config()
    stack = Stack.of(config)
    layer_bytes = kv_cache_bytes(stack, numbers, tokens=1) // stack.layers
    # The cache of each layer is on its device; the fullest decides.
    num_tokens, token_bytes = min(
        (int(KV_CACHE_SHARE * free_bytes(device) / (layer_bytes * num_layers)), layer_bytes * num_layers)
        for device, num_layers in layer_devices(network).items()
    )
    num_rows = max(default, GPU_BATCH_SIZE) if batch_size is None else batch_size
    is_static = is_on_one_gpu(network)  # decode steps are then recorded
    return BatchLimits(num_rows, num_tokens, GROWTH_STATIC if is_static else GROWTH, is_static, token_bytes)


def layer_devices(network: Network) -> Counter[torch.device]:
    """Return the number of the language model's layers that each GPU computes."""
    devices: Counter[torch.device] = Counter()
    for layer in network.lm.get_decoder().layers:
        device = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)  # of offloaded layers, too
        if device is None:
            device = next(layer.parameters()).device
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        devices[device if device.type == "cuda" else network.device] += 1
    return devices


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a GPU, with what PyTorch has reserved for reuse."""
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + cached)
