"""Decode steps through the layers of Qwen decoders, with fewer kernels than transformers launches.

A step reads all weights, which takes a GPU a few milliseconds, and launches more than a thousand kernels, most of
which do next to nothing. Here the pointwise parts between matrix products are one function each: the sum with the
residual and the norm after it, the rotation of queries and keys, and the gate of the MLP. On a GPU these are compiled.
The weights stay where they are, in the modules of transformers, adapters included.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from salmonn.model.attention import AttentionBackend
from salmonn.model.network import Network

logger = logging.getLogger(__name__)
# Layers that do what this module does; others are left to transformers.
LAYERS = ("Qwen2DecoderLayer", "Qwen2_5_VLDecoderLayer", "Qwen2_5OmniDecoderLayer", "Qwen3VLTextDecoderLayer")
MAX_DIFFERENCE = 0.05  # between compiled and plain functions, on values of about 1, in 16 bits


def norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the RMS norm of (..., D)."""
    return F.rms_norm(hidden, weight.shape, weight, eps)


def add_norm(hidden: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the RMS norm of hidden + residual (R, D), and the sum."""
    total = residual + hidden
    return norm(total, weight, eps), total


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries (R, H, d) and keys (R, K, d) by the angles of cos and sin (R, 1, d)."""
    rotated = []
    for one in (query, key):
        first, second = one.chunk(2, dim=-1)
        rotated.append(one * cos + torch.cat([-second, first], dim=-1) * sin)
    return rotated[0], rotated[1]


def gate(gates: Tensor, values: Tensor) -> Tensor:
    """Return silu(gates) * values, (R, I)."""
    return F.silu(gates) * values


class Pointwise(NamedTuple):
    """Implementations of the functions with these names."""

    norm: Callable[[Tensor, Tensor, float], Tensor] = norm
    add_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] = add_norm
    rotate: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = rotate
    gate: Callable[[Tensor, Tensor], Tensor] = gate


class LayerSizes(NamedTuple):
    """Sizes of a layer: hidden and intermediate size, heads, key/value heads and head dimension."""

    width: int
    inner: int
    heads: int
    kv_heads: int
    head_width: int


class DecodeLayers:
    """Runs decode steps.

    Args:
        network: network whose layers are supported, see `make_decode_layers`.
        pointwise: functions between matrix products.
    """

    def __init__(self, network: Network, pointwise: Pointwise) -> None:
        self._decoder: Any = network.lm.get_decoder()
        self._rotary_positions = network.family.rotary_positions
        self._pointwise = pointwise

    def __call__(self, embeds: Tensor, positions: Tensor, backend: AttentionBackend) -> Tensor:
        """Run embedded tokens (R, D) at positions (3, R, 1) through the decoder, (R, D)."""
        decoder, pointwise = self._decoder, self._pointwise
        angles = decoder.rotary_emb(embeds.unsqueeze(1), self._rotary_positions(positions))  # two of (R, 1, d)
        layers = decoder.layers
        first = layers[0].input_layernorm
        residual, normed = embeds, pointwise.norm(embeds, first.weight, first.variance_epsilon)
        for layer, following in zip(layers, [*(one.input_layernorm for one in layers[1:]), decoder.norm], strict=True):
            attended = self._attend(layer.self_attn, normed, angles, backend)
            after = layer.post_attention_layernorm
            normed, residual = pointwise.add_norm(attended, residual, after.weight, after.variance_epsilon)
            mlp = layer.mlp
            hidden = mlp.down_proj(pointwise.gate(mlp.gate_proj(normed), mlp.up_proj(normed)))
            normed, residual = pointwise.add_norm(hidden, residual, following.weight, following.variance_epsilon)
        return normed

    def _attend(self, module: Any, hidden: Tensor, angles: tuple[Tensor, Tensor], backend: AttentionBackend) -> Tensor:
        query, key, value = (
            project(hidden).unflatten(-1, (-1, module.head_dim))
            for project in (module.q_proj, module.k_proj, module.v_proj)
        )
        if hasattr(module, "q_norm"):
            query, key = (
                self._pointwise.norm(one, of.weight, of.variance_epsilon)
                for one, of in ((query, module.q_norm), (key, module.k_norm))
            )
        query, key = self._pointwise.rotate(query, key, *angles)
        output = backend.attend(
            module.layer_idx, *(one.unsqueeze(2) for one in (query, key, value)), scale=module.scaling
        )
        projected: Tensor = module.o_proj(output.flatten(1))
        return projected


def make_decode_layers(network: Network) -> DecodeLayers | None:
    """Return what runs decode steps of a network with fewer kernels; None where its layers are of other kinds."""
    decoder = network.lm.get_decoder()
    kinds = {type(layer).__name__ for layer in decoder.layers}
    config = network.lm.config.get_text_config()
    if not kinds <= set(LAYERS) or config.hidden_act != "silu":
        return None
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    sizes = LayerSizes(config.hidden_size, config.intermediate_size, heads, kv_heads, head_width)
    is_on_gpu = network.device.type == "cuda"
    return DecodeLayers(network, pointwise_functions(network.device, network.dtype, sizes, can_compile=is_on_gpu))


@cache
def pointwise_functions(device: torch.device, dtype: torch.dtype, sizes: LayerSizes, *, can_compile: bool) -> Pointwise:
    """Return compiled functions, if there is a compiler and they are found to work, else plain ones."""
    if not can_compile:
        return Pointwise()
    compiled = compile_functions()
    try:
        difference = largest_difference(compiled, device, dtype, sizes)
    except Exception as error:  # noqa: BLE001, whatever the compiler reports, plain functions work
        logger.warning("parts of decode steps cannot be compiled on %s (%s); captions take longer", device, error)
        return Pointwise()
    if not difference < MAX_DIFFERENCE:  # NaN is not
        logger.warning("compiled parts of decode steps are off by %.3g on %s; using plain ones", difference, device)
        return Pointwise()
    return compiled


def compile_functions(backend: str = "inductor") -> Pointwise:
    """Return compiled functions, each compiled at its first use for one row and at that for more.

    The norm alone is one kernel of PyTorch.
    """
    return Pointwise(norm, *(_compile(function, backend=backend) for function in Pointwise()[1:]))


def _compile(function: Callable[..., Any], *, backend: str) -> Callable[..., Any]:
    compiled = torch.compile(function, backend=backend, fullgraph=True)

    def call(*arguments: Any) -> Any:
        for one in arguments:
            if isinstance(one, Tensor) and one.dim() > 1:
                torch._dynamo.maybe_mark_dynamic(one, 0)  # the number of rows
        return compiled(*arguments)

    return call


def largest_difference(
    compiled: Pointwise, device: torch.device, dtype: torch.dtype, sizes: LayerSizes, *, num_rows: int = 2
) -> float:
    """Return how much compiled functions differ from the plain ones, for rows of random numbers."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    query, key, cos, sin = (random(num_rows, heads, sizes.head_width) for heads in (sizes.heads, sizes.kv_heads, 1, 1))
    arguments: tuple[tuple[Any, ...], ...] = (
        (random(num_rows, sizes.width), random(sizes.width), 1e-6),
        (random(num_rows, sizes.width), random(num_rows, sizes.width), random(sizes.width), 1e-6),
        (query, key, cos, sin),
        (random(num_rows, sizes.inner), random(num_rows, sizes.inner)),
    )
    differences = []
    with torch.no_grad():
        for one, plain, values in zip(compiled, Pointwise(), arguments, strict=True):
            found, expected = (function(*values) for function in (one, plain))  # type: ignore[operator]
            for left, right in zip(
                *((of if isinstance(of, tuple) else (of,)) for of in (found, expected)), strict=True
            ):
                differences.append(((left.float() - right.float()).abs() / (1 + right.float().abs())).max())
    return float(torch.stack(differences).max())
