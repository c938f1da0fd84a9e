"""Attention to a part of the keys, with the log-sum-exp of its scores, from which several parts are merged.

Decode steps attend to prefixes page by page and to a row's own tokens. PyTorch's public attention function returns no
log-sum-exp, so the kernels behind it are called here, in one place. They keep scores in registers, in float32.
"""

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
MAX_KERNEL_DIFFERENCE = 0.02  # between a kernel and the plain computation, on values of about 1, in 16 bits

Attention = Callable[..., tuple[Tensor, Tensor]]


def partial_attention(
    query: Tensor, keys: Tensor, values: Tensor, *, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute attention and the log-sum-exp of its scores.

    Args:
        query: (B, K, Q, d); query heads that share a key head are further queries of it.
        keys, values: (B, K, S, d).
        scale: factor of the scores.
        bias: (B, S) added to the scores, in the dtype of the query, as `length_bias` makes it; minus infinity for
            columns to ignore. A row without any other column gives an arbitrary result.

    Returns:
        (B, K, Q, d), stored as (B, Q, K, d) by the kernels, and (B, K, Q) in float32.
    """
    attend = attention_kernel(query.device, query.dtype, query.shape[-1])
    return attend(query, keys, values, scale=scale, bias=bias)


@cache
def attention_kernel(device: torch.device, dtype: torch.dtype, width: int) -> Attention:
    """Return the implementation for a device, dtype and head width: a kernel that was found to work, or plain products.

    Private operators may change between versions of PyTorch, and silently wrong captions would be worse than slow
    ones. So the kernels are compared once with the plain computation, on a small case.
    """
    if device.type == "cpu":
        kernel = _cpu_kernel
    elif device.type == "cuda" and width % 8 == 0 and dtype != torch.float64:
        kernel = _cuda_kernel
    else:
        return plain_attention
    try:
        difference = _largest_difference(kernel, device, dtype, width)
    except (RuntimeError, TypeError, AttributeError) as error:
        logger.warning("PyTorch's attention kernels fail on %s in %s (%s); using plain products", device, dtype, error)
        return plain_attention
    if not difference < MAX_KERNEL_DIFFERENCE:  # NaN is not
        logger.warning(
            "PyTorch's attention kernels are off by %.3g on %s in %s; using plain products", difference, device, dtype
        )
        return plain_attention
    return kernel


def _largest_difference(kernel: Attention, device: torch.device, dtype: torch.dtype, width: int) -> float:
    """Return how much a kernel differs from the plain computation, with and without a bias."""
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (
        torch.randn(2, 2, count, width, generator=generator).to(device, dtype) for count in (9, 80, 80)
    )
    lengths = torch.tensor([[80], [33]], device=device)
    bias = length_bias(lengths, num_columns=80, dtype=dtype)
    differences = [
        (found.float() - expected.float()).abs().max()
        for one in (None, bias)
        for found, expected in zip(
            kernel(query, keys, values, scale=width**-0.5, bias=one),
            plain_attention(query, keys, values, scale=width**-0.5, bias=one),
            strict=True,
        )
    ]
    return float(torch.stack(differences).max())


def length_bias(lengths: Tensor, *, num_columns: int, dtype: torch.dtype) -> Tensor:
    """Return the bias (B, num_columns) of B rows whose first columns, `lengths` (B, 1), are filled.

    It is a view of a tensor whose number of columns is a multiple of 16, as the kernels require.
    """
    is_empty = torch.arange(num_columns + -num_columns % 16, device=lengths.device) >= lengths
    bias = torch.zeros(is_empty.shape, dtype=dtype, device=lengths.device).masked_fill_(is_empty, -torch.inf)
    return bias[:, :num_columns]


def _cpu_kernel(
    query: Tensor, keys: Tensor, values: Tensor, *, scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    mask = None if bias is None else bias[:, None, None]
    output, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, keys, values, attn_mask=mask, scale=scale
    )
    return output, total


def _cuda_kernel(
    query: Tensor, keys: Tensor, values: Tensor, *, scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    if bias is None and query.dtype != torch.float32:
        output, total, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, keys, values, scale=scale)
        return output, total
    # The memory-efficient kernel takes a bias and float32.
    if bias is not None:
        bias = bias[:, None, None].expand(*query.shape[:3], -1)
    output, total, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, keys, values, bias, compute_log_sumexp=True, scale=scale
    )
    return output, total[..., : query.shape[2]]  # stored for a multiple of 32 queries


def plain_attention(
    query: Tensor, keys: Tensor, values: Tensor, *, scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute the same as `partial_attention` by products, with all scores in memory."""
    scores = float32_product(query, keys.transpose(-1, -2)) * scale
    if bias is not None:
        scores = scores + bias[:, None, None]
    total = scores.logsumexp(-1, keepdim=True)
    return (scores - total).exp().to(values.dtype) @ values, total.squeeze(-1)


def float32_product(left: Tensor, right: Tensor) -> Tensor:
    """Return left (..., n, k) @ right (..., k, m), accumulated and kept in float32 (or float64).

    The keys of Qwen2 have biases of several hundred. Scores rounded to 16 bits then differ by whole units, and the
    softmax by several percent.
    """
    if left.dtype in (torch.float32, torch.float64):
        return left @ right
    if left.device.type == "cuda":  # converted keys would be a copy of the cache
        product = torch.bmm(left.flatten(0, -3), right.flatten(0, -3), out_dtype=torch.float32)
        return product.unflatten(0, left.shape[:-2])
    return left.float() @ right.float()
