"""Attention over rows with a common prefix equals that of separate rows, in one pass and in decode steps."""

import copy
import subprocess
import sys
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from salmonn.caption.processor import PromptRow
from salmonn.model import attention
from salmonn.model.attention import PackedAttention, PrefillAttention, use_packed_attention
from salmonn.model.kv_cache import KVCache
from salmonn.model.lora import LoraConfig, attach_lora
from salmonn.model.packing import PackedBatch, PrefixGroup
from tests.launch import forked

SCALE = 0.3
# Clip 4 has rows 0 and 2: a prefix of 5 tokens, suffixes of 2 and 3; clip 7 has row 1: 4 tokens and 1.
PACKED = PackedBatch(
    source=torch.arange(15),
    destination=torch.zeros(3, 8, dtype=torch.long),
    groups=(PrefixGroup(4, (0, 2), 5, (2, 3)), PrefixGroup(7, (1,), 4, (1,))),
)
ROWS = {0: [0, 1, 2, 3, 4, 5, 6], 2: [0, 1, 2, 3, 4, 7, 8, 9], 1: [10, 11, 12, 13, 14]}  # indices of the rows' tokens


def test_threads_share_the_choice_of_kernels():
    """The first to leave does not restore it for the other, and the last restores what the first found."""
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    assert enabled()
    for leave_first in (False, True):
        with ExitStack() as prefill, ExitStack() as encoding:
            for stack in (prefill, encoding):
                stack.enter_context(attention.WITHOUT_PLANS)
                assert not enabled()
            (prefill if leave_first else encoding).close()
            assert not enabled()
        assert enabled()


def random_heads(num_tokens: int, *, num_heads: int, seed: int) -> Tensor:
    return torch.randn(1, num_heads, num_tokens, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attend_one_row(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute plain causal attention of one row: four query heads share two key heads, 0 and 1 the first."""
    key, value = (tensor.repeat_interleave(2, dim=1) for tensor in (key, value))
    scores = SCALE * query @ key.transpose(-1, -2)
    is_future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(is_future, -torch.inf).softmax(-1) @ value


def test_one_pass_equals_separate_rows():
    query, key, value = (
        random_heads(15, num_heads=4, seed=0),
        random_heads(15, num_heads=2, seed=1),
        random_heads(15, num_heads=2, seed=2),
    )
    packed_output = PackedAttention(PACKED).attend(0, query, key, value, scale=SCALE)
    for indices in ROWS.values():
        expected = attend_one_row(*(tensor[:, :, indices] for tensor in (query, key, value)))
        assert torch.allclose(packed_output[:, :, indices], expected, atol=1e-12)


def prefill(query: Tensor, key: Tensor, value: Tensor) -> KVCache:
    cache = KVCache(PACKED, torch.arange(15).expand(3, 1, 15))
    PrefillAttention(PACKED, cache).attend(0, query, key, value, scale=SCALE)
    cache.finalize()
    return cache


def test_decode_steps_equal_separate_rows():
    """70 more tokens, more than the cache's initial capacity; rows 2 and then 1 are evicted in between."""
    tensors = [random_heads(15, num_heads=number, seed=seed) for seed, number in enumerate((4, 2, 2))]
    cache, order = prefill(*tensors), [0, 2, 1]
    expected = {row: [tensor[:, :, indices] for tensor in tensors] for row, indices in ROWS.items()}
    for step in range(70):
        positions = cache.advance()
        assert positions[0, :, 0].tolist() == [ROWS[row][-1] + step + 1 for row in order]
        new = [torch.cat([random_heads(1, num_heads=number, seed=1000 * step + 10 * row + at) for row in order])
               for at, number in enumerate((4, 2, 2))]  # fmt: skip
        packed_output = cache.attend(0, *new, scale=SCALE)
        for index, row in enumerate(order):
            expected[row] = [
                torch.cat([old, added[index : index + 1]], dim=2) for old, added in zip(expected[row], new, strict=True)
            ]
            assert torch.allclose(
                packed_output[index : index + 1], attend_one_row(*expected[row])[:, :, -1:], atol=1e-6
            ), (step, row)
        for evict_step, row in ((20, 2), (40, 1)):
            if step == evict_step:
                cache.evict(torch.tensor([other != row for other in order]))
                order.remove(row)


def test_a_prefix_is_stored_once():
    cache = prefill(*(random_heads(15, num_heads=number, seed=seed) for seed, number in enumerate((4, 2, 2))))
    assert cache._layers[0].tails.keys.shape == (2, 2, 5, 8)  # two clips, for three rows
    cache.evict(torch.tensor([True, False, False]))
    assert cache._layers[0].tails.keys.shape == (1, 2, 5, 8) and cache._layers[0].own.keys.shape[0] == 1


@pytest.mark.parametrize(
    ("model", "checkpointed"), [("captioner", False), ("captioner", True), ("plus", False), ("plus", 1)]
)
def test_gradients_of_an_adapter_equal_those_of_separate_rows(request, videos, model, checkpointed):
    """Chosen, rejected and ground truth of two clips, in one pass and in six; positions of both families."""
    captioner = request.getfixturevalue(model)
    network, processor = copy.deepcopy(captioner.network), captioner.processor
    for parameter in network.parameters():
        parameter.data.div_(4)  # with the large random weights, rounding errors would dominate
    attach_lora(network, LoraConfig(dropout=0.0), seed=1)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    network.checkpoint_layers(checkpointed)
    layers = [layer.gradient_checkpointing for layer in network.lm.get_decoder().layers]
    assert layers == [number < checkpointed or checkpointed is True for number in range(len(layers))]
    network.train()
    features = captioner.encode([processor.read(videos[0]), processor.read(videos[1], end_seconds=4)])
    texts = ["a red circle appears and blinks", "beeps", "a low tone is heard, then a blue star moves"]
    rows = [PromptRow(clip, "Tell.", text) for text in texts for clip in (0, 1)]
    weights = torch.tensor([1.0, 2.0, -0.5, -1.5, 0.1, 0.2])

    def gradients(losses) -> dict[str, Tensor]:
        network.zero_grad()
        for loss in losses():
            loss.backward()
        return {name: value.grad.clone() for name, value in network.named_parameters() if value.grad is not None}

    packed = gradients(lambda: [(network(processor.collate(rows, features)).sum(1) * weights).sum()])
    separate = gradients(
        lambda: (
            network(processor.collate([PromptRow(0, row.prompt, row.answer)], [features[row.clip]])).sum() * weight
            for row, weight in zip(rows, weights, strict=True)
        )
    )
    assert packed.keys() == separate.keys() and all("lora" in name for name in packed)
    largest = max(value.abs().max() for value in separate.values())
    assert largest > 1e-2
    for name, value in separate.items():
        assert (packed[name] - value).abs().max() < 1e-5 * largest, name


MEASURE_MEMORY = """
import torch
from pathlib import Path
from salmonn.model import attention
from salmonn.model.attention import PackedAttention
from salmonn.model.packing import PrefixGroup, PackedBatch
torch.set_num_threads(1)
length, suffixes = 10_000, (200, 200, 200)
packed = PackedBatch(torch.arange(0), torch.zeros(0), (PrefixGroup(0, (0, 1, 2), length, suffixes),))
tensors = [torch.randn(1, 1, length + 600, 8).requires_grad_() for _ in range(3)]
small = PackedAttention(PackedBatch(torch.arange(0), torch.zeros(0), (PrefixGroup(0, (0,), 40, (0,)),)))
small.attend(0, *(tensor[:, :, :40] for tensor in tensors), scale=1.0).sum().backward()
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
before = peak()
PackedAttention(packed).attend(0, *tensors, scale=1.0).sum().backward()
print(peak() - before)
"""


def test_long_sequences_need_no_full_mask():
    """10,600 tokens: a boolean mask would need 112 MB, a float mask 449; the suffixes' mask needs 8."""
    result = subprocess.run(forked(sys.executable, "-c", MEASURE_MEMORY), capture_output=True, text=True, check=True)
    assert int(result.stdout) < 60e6


def test_prefill_does_not_use_cudnn(monkeypatch):
    """It would build a plan for the length of each clip; in training its kernels are worth it."""
    chosen = []
    sdpa = attention.F.scaled_dot_product_attention

    def record(*args, **options):
        chosen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return sdpa(*args, **options)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", record)
    tensors = [random_heads(15, num_heads=number, seed=number) for number in (4, 2, 2)]
    trained = PackedAttention(PACKED).attend(0, *tensors, scale=SCALE)
    with torch.no_grad():
        prefilled = PackedAttention(PACKED).attend(0, *tensors, scale=SCALE)
    assert chosen == [True] * 5 + [False] * 5 and torch.equal(trained, prefilled)


def test_a_sliding_window_is_rejected(captioner):
    config = captioner.network.lm.get_decoder().config
    config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(ValueError, match=r"layers with sliding_attention.*set use_sliding_window to false"):
        use_packed_attention(config)


def test_types_of_autocast_and_16_bits(monkeypatch):
    """Rotary embeddings leave queries and keys in float32 while values are bfloat16; a GPU's mask rejects that.

    With seven significant bits, the output is within 2 % of the largest value of that in float64.
    """
    monkeypatch.setattr(
        PackedAttention,
        "_suffix_mask",
        lambda self, query, *, length, prefix_length: causal_lower_right(length, prefix_length + length),
    )
    query, key, value = (random_heads(15, num_heads=number, seed=seed) for seed, number in enumerate((4, 2, 2)))
    packed_output = PackedAttention(PACKED).attend(0, query.float(), key.float(), value.bfloat16(), scale=SCALE)
    assert packed_output.dtype == torch.bfloat16
    for indices in ROWS.values():
        expected = attend_one_row(*(tensor[:, :, indices] for tensor in (query, key, value)))
        assert (packed_output[:, :, indices].double() - expected).abs().max() < 0.02 * value.abs().max()


def test_large_key_biases_in_16_bits():
    """The keys of Qwen2's first and last layers share a component of several hundred (norms of 605 and 921).

    Scores are some thousands then, where bfloat16 has steps of 16; their differences, which decide, are of order 1.
    """
    query, key, value = (random_heads(15, num_heads=number, seed=seed) for seed, number in enumerate((4, 2, 2)))
    bias = torch.zeros(8, dtype=torch.float64)
    bias[3] = 640.0
    query[..., 3] = 8.0  # exactly representable, as is the sum of bias and key
    key = (key + bias).bfloat16().double()
    query, value = query.bfloat16().double(), value.bfloat16().double()
    rows = [ROWS[number] for number in (0, 2, 1)]  # by clip, as in the cache
    cache = prefill(query.bfloat16(), key.bfloat16(), value.bfloat16())
    cache.advance()
    last = [indices[-1] for indices in rows]
    step = (tensor[0, :, last].transpose(0, 1).unsqueeze(2).bfloat16() for tensor in (query, key, value))
    output = cache.attend(0, *step, scale=SCALE)
    for indices, found in zip(rows, output[:, :, 0].double(), strict=True):
        repeated = [*indices, indices[-1]]  # the token of the decode step equals the last one
        expected = attend_one_row(*(tensor[:, :, repeated] for tensor in (query, key, value)))[0, :, -1]
        assert (found - expected).abs().max() < 0.01 * value.abs().max()


def test_long_caches_do_not_overflow_in_16_bits():
    """20,000 values near 4 with equal weights: their sum, 80,000, exceeds the range of float16; their mean is 4."""
    length = 20_000
    packed = PackedBatch(torch.arange(0), torch.zeros(0), (PrefixGroup(0, (0,), length, (1,)),))
    cache = KVCache(packed, torch.arange(length + 1).expand(3, 1, length + 1))
    zeros = torch.zeros(1, 1, length + 1, 8, dtype=torch.float16)
    parts = [tensor.split(packed.segment_lengths, dim=2) for tensor in (zeros, zeros + 4)]
    cache.append(0, *parts, is_suffix=packed.is_suffix)
    cache.finalize()
    cache.advance()
    one = torch.zeros(1, 1, 1, 8, dtype=torch.float16)
    output = cache.attend(0, one, one, one + 4, scale=1.0)
    assert torch.allclose(output.float(), torch.tensor(4.0), atol=0.01)
