"""Limits on the sequences that are decoded together, by number and by the memory of their KV cache."""

from dataclasses import dataclass

import torch

from salmonn.model.memory import NumberSizes, Stack, kv_cache_bytes
from salmonn.model.network import Network

GPU_BATCH_SIZE = 64  # default number of sequences on a GPU, where a step of 64 takes little longer than one of 8
KV_CACHE_SHARE = 0.6  # of the free memory of a GPU; prefill and decode steps need the rest


@dataclass(frozen=True)
class BatchLimits:
    """Limits of a batch.

    Args:
        num_rows: maximum number of sequences.
        num_tokens: maximum number of tokens in the KV cache, those that are yet to be generated included; None for any.
    """

    num_rows: int
    num_tokens: int | None = None


def measure_limits(network: Network, *, batch_size: int | None, default: int) -> BatchLimits:
    """Return what fits into the memory of the GPU that is free now; on a CPU, only the number of sequences is limited.

    Args:
        network: network on its device.
        batch_size: maximum number of sequences; None for the default.
        default: default of the model, which on a GPU is raised to 64.
    """
    device = network.device
    if device.type != "cuda":
        return BatchLimits(default if batch_size is None else batch_size)
    numbers = NumberSizes(network.dtype.itemsize, network.dtype.itemsize)
    token_bytes = kv_cache_bytes(Stack.of(network.lm.config.get_text_config()), numbers, tokens=1)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by PyTorch, for reuse
    free = torch.cuda.mem_get_info(device)[0] + cached
    num_rows = max(default, GPU_BATCH_SIZE) if batch_size is None else batch_size
    return BatchLimits(num_rows, int(KV_CACHE_SHARE * free / token_bytes))
