"""Memory of training and captioning by arithmetic: bytes kept for the gradient, and bytes at work for a while.

Formulas count the tensors that the network's modules keep or hold at once, in bytes on one device, with attention that
never forms the whole table of who sees whom (SDPA or flash). In them

    S  tokens of a sequence that goes through the decoder     D, I  width and inner width of a layer
    b  bytes of a number in matrix products (2 or 4)          r     bytes of a number between layers, as weights have

Left out are what a framework keeps for itself (0.5 to 1 GiB on a GPU), gaps between tensors, and the copies of trained
gradients that several processes exchange.
"""

from dataclasses import dataclass
from typing import Any

FLOAT32 = 4
GIB = 1 << 30


@dataclass(frozen=True)
class Stack:
    """Transformer layers.

    Args:
        width, inner: D and I.
        layers: how many.
        heads, kv_heads, head_width: of attention.
        gated: whether the inner part is a product of two (SwiGLU), or one.
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
        """The layers of a transformers model, by its config: a decoder's, Whisper's, SigLIP's or Qwen2.5-VL's."""
        values = config.to_dict()
        first = lambda *names: next(values[name] for name in names if values.get(name))  # noqa: E731
        heads = first("num_attention_heads", "encoder_attention_heads", "num_heads")
        width = first("hidden_size", "d_model")
        return cls(
            width=width,
            inner=first("intermediate_size", "encoder_ffn_dim"),
            layers=first("encoder_layers", "num_hidden_layers", "depth"),
            heads=heads,
            kv_heads=values.get("num_key_value_heads") or heads,
            head_width=values.get("head_dim") or width // heads,
            gated=values["hidden_act"] == "silu" if "hidden_act" in values else False,
        )


@dataclass(frozen=True)
class NumberSizes:
    """How numbers are kept.

    Args:
        stored: bytes of a weight, and of what passes between layers (r).
        computed: bytes in matrix products (b).
    """

    stored: int
    computed: int


@dataclass(frozen=True)
class TrainedParts:
    """What of a stack is trained.

    Args:
        adapted: matrices of a layer that carry an adapter.
        whole: the weights themselves are trained.
    """

    adapted: int = 0
    whole: bool = False


def saved_per_layer(stack: Stack, numbers: NumberSizes, tuning: TrainedParts, *, rows: int) -> int:
    """Bytes a token that one layer keeps for the gradient.

    Two norms keep their float32 input (4 D each); attention its queries, keys and values after the rotation and its
    result (b each; each of several rows that share a sequence looks at a copy of the shared keys and values) with a
    float32 a head; the inner part keeps what the activation takes and gives and the other factor of a gated one (3 b I,
    else 2 b I). Frozen matrices keep nothing. An adapted one keeps what goes into it, and which of it dropout leaves
    ((b + 1) D); one trained as a whole keeps what goes into it: the norms' results (2 b D) and the inner part's (b I,
    but for one that is kept already).
    """
    b = numbers.computed
    key_heads = stack.kv_heads * (1 + rows if rows > 1 else 1)
    attention = b * stack.head_width * 2 * (stack.heads + key_heads) + FLOAT32 * stack.heads
    inner = b * stack.inner * (3 if stack.gated else 2)
    adapters = tuning.adapted * (b + 1) * stack.width
    whole = tuning.whole * b * (2 * stack.width + (stack.inner if stack.gated else 0))
    return 2 * FLOAT32 * stack.width + attention + inner + adapters + whole


def workspace(stack: Stack, numbers: NumberSizes) -> int:
    """Bytes a token of one layer's temporaries, forward or backward.

    The inner part holds three tensors at once (gate, up and product, or the gradients of these: 3 b I; without a gate
    two) beside the layer's input and its gradient (2 r D) and a float32 copy of a norm (4 D).
    """
    inner = numbers.computed * stack.inner * (3 if stack.gated else 2)
    return inner + (2 * numbers.stored + FLOAT32) * stack.width


def saved_by_stack(
    stack: Stack, numbers: NumberSizes, tuning: TrainedParts, *, tokens: int, rows: int, checkpointed: bool
) -> int:
    """Bytes that all layers keep of so many tokens: checkpointed their inputs (r D each) alone."""
    if checkpointed:
        return stack.layers * tokens * stack.width * numbers.stored
    return stack.layers * tokens * saved_per_layer(stack, numbers, tuning, rows=rows)


def embedded(stack: Stack, numbers: NumberSizes, *, tokens: int) -> int:
    """Bytes of the clips' tokens, of the text with them in their places, and of its copy while they are put there."""
    return 3 * tokens * stack.width * numbers.stored


def logits_bytes(vocabulary: int, numbers: NumberSizes, *, tokens: int) -> int:
    """Bytes of the answers' logits at the loss: V a token.

    One float32 copy is kept; its gradient is the sum of two parts, and one temporary makes it (4 V each). In 16 bits
    there is the original beside (b V).
    """
    original = numbers.computed if numbers.computed < FLOAT32 else 0
    return tokens * vocabulary * (4 * FLOAT32 + original)


def kv_cache_bytes(stack: Stack, numbers: NumberSizes, *, tokens: int) -> int:
    """Bytes of the keys and values of so many tokens: 2 r for each layer, head of keys and number in it."""
    return 2 * stack.layers * stack.kv_heads * stack.head_width * tokens * numbers.stored


def projector_saved(width_seen: int, numbers: NumberSizes, *, patches: int, width: int) -> int:
    """Bytes that SigLIP's trained projector keeps: its input, and what its activation takes and gives."""
    return patches * numbers.computed * (width_seen + 2 * width)


def merger_saved(width: int, numbers: NumberSizes, *, patches: int) -> int:
    """Bytes that Qwen2.5-VL's trained merger keeps: float32 input, normed input, the activation's input and result."""
    return patches * width * (FLOAT32 + 3 * numbers.computed)


def chunks_workspace(stack: Stack, numbers: NumberSizes, *, steps: int) -> int:
    """Bytes while Whisper's encoder hears so many steps: convolutions hold twice as many at D, or a layer's own."""
    return steps * max(2 * 2 * numbers.computed * stack.width, workspace(stack, numbers))


def windows_saved(stack: Stack, numbers: NumberSizes, *, steps: int, queries: int, width_heard: int) -> int:
    """Bytes that a trained Q-Former keeps: the heard steps in float32, in each layer their keys and values (2 b D), and
    of its few queries what a layer of two attentions keeps."""
    of_query = saved_per_layer(stack, numbers, TrainedParts(whole=True), rows=1)
    heard = FLOAT32 * width_heard + stack.layers * 2 * numbers.computed * stack.width
    return steps * heard + 2 * stack.layers * queries * of_query
