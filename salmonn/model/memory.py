"""Memory estimates by arithmetic: bytes saved for the backward pass, and temporary workspace.

Formulas count the tensors that the network's modules save or hold at the same time, in bytes on one device, for
attention that never materializes the score matrix (SDPA or flash attention). Symbols:

    S  tokens of a sequence in the decoder                 D, I  hidden and intermediate size of a layer
    b  bytes per number in matrix products (2 or 4)        r     bytes per number between layers, as of the weights

What a GPU needs besides (libraries, communication, temporaries of kernels, fragmentation) is in `gpu_training`.
"""

from dataclasses import dataclass
from typing import Any

FLOAT32 = 4
GIB = 1 << 30
NCCL_BYTES = GIB  # buffers and contexts of communication


@dataclass(frozen=True)
class Stack:
    """Sizes of a stack of transformer layers.

    Args:
        width, inner: hidden size D and intermediate size I.
        layers: number of layers.
        heads, kv_heads, head_width: attention heads, key/value heads and head dimension.
        gated: whether the MLP is gated (SwiGLU).
    """

    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    gated: bool

    @classmethod
    def of(cls, config: Any) -> "Stack":
        """Read the sizes from a transformers config: a decoder's, Whisper's, SigLIP's or Qwen2.5-VL's."""
        values = config.to_dict()
        first = lambda *names: next(values[name] for name in names if values.get(name))  # noqa: E731
        heads = first("num_attention_heads", "encoder_attention_heads", "num_heads")
        width = first("hidden_size", "d_model")
        # Of a mixture of experts, the sizes of those that a token passes through.
        experts = values.get("num_experts_per_tok", 1)
        return cls(
            width=width,
            inner=experts * first("moe_intermediate_size", "intermediate_size", "encoder_ffn_dim"),
            layers=first("encoder_layers", "num_hidden_layers", "depth"),
            heads=heads,
            kv_heads=values.get("num_key_value_heads") or heads,
            head_width=values.get("head_dim") or width // heads,
            gated=values["hidden_act"] == "silu" if "hidden_act" in values else False,
        )


@dataclass(frozen=True)
class NumberSizes:
    """Bytes per number.

    Args:
        stored: bytes of a weight and of activations between layers (r).
        computed: bytes in matrix products (b).
    """

    stored: int
    computed: int


@dataclass(frozen=True)
class TrainedParts:
    """Trained parts of a stack.

    Args:
        adapted: number of matrices per layer that carry an adapter.
        whole: whether the weights themselves are trained.
    """

    adapted: int = 0
    whole: bool = False


def saved_per_layer(stack: Stack, numbers: NumberSizes, tuning: TrainedParts, *, rows: int) -> int:
    """Return the bytes per token that one layer saves for the backward pass.

    Two norms save their float32 input (4 D each). Attention saves queries, keys and values after the rotary embedding
    and its output (b each; each of several rows that share a sequence attends to a copy of the shared keys and values),
    and one float32 per head. The MLP saves the input and output of its activation and the other factor of a gated one
    (3 b I, else 2 b I). Frozen matrices save nothing. An adapted matrix saves its input and the dropout mask
    ((b + 1) D). A fully trained one saves its input: the outputs of the norms (2 b D) and of the MLP's product (b I,
    unless it is saved already).
    """
    b = numbers.computed
    key_heads = stack.kv_heads * (1 + rows if rows > 1 else 1)
    attention = b * stack.head_width * 2 * (stack.heads + key_heads) + FLOAT32 * stack.heads
    inner = b * stack.inner * (3 if stack.gated else 2)
    adapters = tuning.adapted * (b + 1) * stack.width
    whole = tuning.whole * b * (2 * stack.width + (stack.inner if stack.gated else 0))
    return 2 * FLOAT32 * stack.width + attention + inner + adapters + whole


def workspace(stack: Stack, numbers: NumberSizes) -> int:
    """Return the bytes per token of one layer's temporaries in the forward or backward pass.

    The MLP holds three tensors at once (gate, up and product, or their gradients: 3 b I; two without a gate) besides
    the layer's input and its gradient (2 r D) and a float32 copy in a norm (4 D).
    """
    inner = numbers.computed * stack.inner * (3 if stack.gated else 2)
    return inner + (2 * numbers.stored + FLOAT32) * stack.width


def saved_by_stack(
    stack: Stack, numbers: NumberSizes, tuning: TrainedParts, *, tokens: int, rows: int, checkpointed: int
) -> int:
    """Return the bytes that all layers save; those with gradient checkpointing only their inputs (r D per token)."""
    inputs = checkpointed * stack.width * numbers.stored
    return tokens * (inputs + (stack.layers - checkpointed) * saved_per_layer(stack, numbers, tuning, rows=rows))


def gpu_training(stack: Stack, numbers: NumberSizes, *, tokens: int, is_adapted: bool) -> dict[str, int]:
    """Return the bytes of a training step that only a GPU needs, by purpose.

    In the backward pass, flash attention and cuDNN add up the gradient of the queries in float32 (4 H d), and write
    those of keys and values for each query head before these are summed (2 b H d). PEFT copies the input of an adapted
    matrix to float32 (4 D), one matrix at a time.
    """
    heads = stack.heads * stack.head_width
    return {
        "attention backward (dQ, dK, dV)": tokens * heads * (FLOAT32 + 2 * numbers.computed),
        "adapter's float32 input": tokens * FLOAT32 * stack.width if is_adapted and numbers.computed < FLOAT32 else 0,
        "NCCL, for several GPUs": NCCL_BYTES,
    }


def embedded(stack: Stack, numbers: NumberSizes, *, tokens: int, deep_tokens: int = 0) -> int:
    """Return the bytes of the clip features, of the text with them inserted, and of its copy during insertion.

    Args:
        stack, numbers: sizes.
        tokens: tokens of the sequence.
        deep_tokens: deep features of the clip, N for each of the layers that add some; held in the clip's features and
            in their concatenation.
    """
    return (3 * tokens + 2 * deep_tokens) * stack.width * numbers.stored


def encoder_workspace(network: Any, clip: Any, numbers: NumberSizes) -> int:
    """Return the bytes of temporaries of the larger of a network's two encoders, for the `ClipInputs` of one clip.

    Of the audio encoder, those of its convolutions, at twice the steps, or of a layer.
    """
    family, vision = network.family, Stack.of(network.get_submodule("vision.encoder").config)
    visual: int = family.vision_peak_bytes(
        clip,
        patch_bytes=workspace(vision, numbers),
        weight_bytes=numbers.stored,
        matmul_bytes=numbers.computed,
    )
    if not family.hears:
        return visual
    audio = Stack.of(network.get_submodule("audio.encoder").config)
    per_step = max(2 * 2 * numbers.computed * audio.width, workspace(audio, numbers))
    return max(family.count_audio_steps(clip) * per_step, visual)


def logits_bytes(vocabulary: int, numbers: NumberSizes, *, tokens: int) -> int:
    """Return the bytes of the answers' logits at the loss, V per token.

    One float32 copy is saved; its gradient is the sum of two parts and needs one temporary (4 V each). In 16 bits the
    original (b V) is held as well.
    """
    original = numbers.computed if numbers.computed < FLOAT32 else 0
    return tokens * vocabulary * (4 * FLOAT32 + original)


def kv_cache_bytes(stack: Stack, numbers: NumberSizes, *, tokens: int) -> int:
    """Return the bytes of the KV cache: 2 r per token, layer, key/value head and head dimension."""
    return 2 * stack.layers * stack.kv_heads * stack.head_width * tokens * numbers.stored
