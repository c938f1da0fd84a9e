"""Rows with a common prefix attend to what they would attend to alone, in one pass and token by token."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from salmonn.caption.processor import PromptRow
from salmonn.model.attention import PackedAttention, PrefillAttention, use_packed_attention
from salmonn.model.kv_cache import KVCache
from salmonn.model.lora import LoraConfig, attach_lora
from salmonn.model.packing import PackedBatch, PrefixGroup

SCALE = 0.3
# Clip 4 has rows 0 and 2: a prefix of 5 tokens, suffixes of 2 and 3; clip 7 has row 1: 4 tokens and 1.
PACKED = PackedBatch(
    source=torch.arange(15),
    destination=torch.zeros(3, 8, dtype=torch.long),
    groups=(PrefixGroup(4, (0, 2), 5, (2, 3)), PrefixGroup(7, (1,), 4, (1,))),
)
ROWS = {0: [0, 1, 2, 3, 4, 5, 6], 2: [0, 1, 2, 3, 4, 7, 8, 9], 1: [10, 11, 12, 13, 14]}  # indices of their tokens


def heads(num_tokens: int, *, num_heads: int, seed: int) -> Tensor:
    return torch.randn(1, num_heads, num_tokens, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def alone(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Plain causal attention of one row, four query heads on two key heads: heads 0 and 1 look at key head 0."""
    key, value = (tensor.repeat_interleave(2, dim=1) for tensor in (key, value))
    scores = SCALE * query @ key.transpose(-1, -2)
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(-1) @ value


def test_one_pass_equals_each_row_alone():
    query, key, value = heads(15, num_heads=4, seed=0), heads(15, num_heads=2, seed=1), heads(15, num_heads=2, seed=2)
    together = PackedAttention(PACKED).attend(0, query, key, value, scale=SCALE)
    for places in ROWS.values():
        expected = alone(*(tensor[:, :, places] for tensor in (query, key, value)))
        assert torch.allclose(together[:, :, places], expected, atol=1e-12)


def prefill(query: Tensor, key: Tensor, value: Tensor) -> KVCache:
    cache = KVCache(PACKED, torch.arange(15).expand(3, 1, 15))
    PrefillAttention(PACKED, cache).attend(0, query, key, value, scale=SCALE)
    cache.finalize()
    return cache


def test_decode_steps_equal_each_row_alone():
    """70 more tokens, more than the cache has columns for at first; rows 2 and then 1 are evicted on the way."""
    tensors = [heads(15, num_heads=number, seed=seed) for seed, number in enumerate((4, 2, 2))]
    cache, order = prefill(*tensors), [0, 2, 1]
    said = {row: [tensor[:, :, places] for tensor in tensors] for row, places in ROWS.items()}
    for step in range(70):
        positions = cache.advance()
        assert positions[0, :, 0].tolist() == [ROWS[row][-1] + step + 1 for row in order]
        new = [torch.cat([heads(1, num_heads=number, seed=1000 * step + 10 * row + at) for row in order])
               for at, number in enumerate((4, 2, 2))]  # fmt: skip
        together = cache.attend(0, *new, scale=SCALE)
        for place, row in enumerate(order):
            said[row] = [
                torch.cat([old, added[place : place + 1]], dim=2) for old, added in zip(said[row], new, strict=True)
            ]
            assert torch.allclose(together[place : place + 1], alone(*said[row])[:, :, -1:], atol=1e-6), (step, row)
        for when, row in ((20, 2), (40, 1)):
            if step == when:
                cache.evict(torch.tensor([one != row for one in order]))
                order.remove(row)


def test_a_prefix_is_stored_once():
    cache = prefill(*(heads(15, num_heads=number, seed=seed) for seed, number in enumerate((4, 2, 2))))
    assert cache._layers[0].keys.shape == (2, 2, 5, 8)  # of two clips, for three rows
    cache.evict(torch.tensor([True, False, False]))
    assert cache._layers[0].keys.shape == (1, 2, 5, 8) and cache._layers[0].suffix_keys.shape[0] == 1


@pytest.mark.parametrize("model", ["captioner", "plus"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_of_an_adapter_are_those_of_rows_alone(request, videos, model, checkpointed):
    """Chosen, rejected and ground truth of two clips, in one pass and in six; positions of both families."""
    captioner = request.getfixturevalue(model)
    network, processor = copy.deepcopy(captioner.network), captioner.processor
    for parameter in network.parameters():
        parameter.data.div_(4)  # the large random weights would drown the comparison in rounding
    attach_lora(network, LoraConfig(dropout=0.0), seed=1)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    network.checkpoint_layers(checkpointed)
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

    together = gradients(lambda: [(network(processor.collate(rows, features)).sum(1) * weights).sum()])
    one_by_one = gradients(
        lambda: (
            network(processor.collate([PromptRow(0, row.prompt, row.answer)], [features[row.clip]])).sum() * weight
            for row, weight in zip(rows, weights, strict=True)
        )
    )
    assert together.keys() == one_by_one.keys() and all("lora" in name for name in together)
    largest = max(value.abs().max() for value in one_by_one.values())
    assert largest > 1e-2
    for name, value in one_by_one.items():
        assert (together[name] - value).abs().max() < 1e-5 * largest, name


MEASURE = """
import resource, torch
from salmonn.model.attention import PackedAttention
from salmonn.model.packing import PrefixGroup, PackedBatch
torch.set_num_threads(1)
length, suffixes = 20_000, (200, 200, 200)
packed = PackedBatch(torch.arange(0), torch.zeros(0), (PrefixGroup(0, (0, 1, 2), length, suffixes),))
tensors = [torch.randn(1, 1, length + 600, 8).requires_grad_() for _ in range(3)]
small = PackedAttention(PackedBatch(torch.arange(0), torch.zeros(0), (PrefixGroup(0, (0,), 40, (0,)),)))
small.attend(0, *(tensor[:, :, :40] for tensor in tensors), scale=1.0).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
PackedAttention(packed).attend(0, *tensors, scale=1.0).sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_no_mask_of_a_long_sequence_is_made():
    """20,600 tokens: a boolean mask would take 424 MB, one of numbers 1,697; the suffixes' mask takes 16."""
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 150e6


def test_a_sliding_window_is_refused(captioner):
    config = captioner.network.lm.get_decoder().config
    config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(ValueError, match=r"layers with sliding_attention.*set use_sliding_window to false"):
        use_packed_attention(config)


def test_types_of_autocast_and_16_bits(monkeypatch):
    """The rotation leaves queries and keys in float32 where values are bfloat16; a GPU's mask does not take that.

    Seven significant bits: what both passes give is within 2 % of the largest value of what float64 gives.
    """
    monkeypatch.setattr(
        PackedAttention,
        "_suffix_mask",
        lambda self, query, *, length, prefix_length: causal_lower_right(length, prefix_length + length),
    )
    query, key, value = (heads(15, num_heads=number, seed=seed) for seed, number in enumerate((4, 2, 2)))
    together = PackedAttention(PACKED).attend(0, query.float(), key.float(), value.bfloat16(), scale=SCALE)
    assert together.dtype == torch.bfloat16
    for places in ROWS.values():
        expected = alone(*(tensor[:, :, places] for tensor in (query, key, value)))
        assert (together[:, :, places].double() - expected).abs().max() < 0.02 * value.abs().max()


def test_long_caches_do_not_overflow_in_16_bits():
    """20,000 values near 4 with equal weights: their sum, 80,000, is beyond what float16 holds; their mean is 4."""
    length = 20_000
    packed = PackedBatch(torch.arange(0), torch.zeros(0), (PrefixGroup(0, (0,), length, (1,)),))
    cache = KVCache(packed, torch.arange(length + 1).expand(3, 1, length + 1))
    zeros = torch.zeros(1, 1, length + 1, 8, dtype=torch.float16)
    parts = [tensor.split(packed.segment_lengths, dim=2) for tensor in (zeros, zeros + 4)]
    cache.append(0, *parts, is_suffix=packed.is_suffix)
    cache.finalize()
    cache.advance()
    one = torch.zeros(1, 1, 1, 8, dtype=torch.float16)
    said = cache.attend(0, one, one, one + 4, scale=1.0)
    assert torch.allclose(said.float(), torch.tensor(4.0), atol=0.01)
