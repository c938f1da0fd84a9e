"""The number of operators of a decode step has a bound, and its attention writes no table of scores."""

import pytest

from tests.tools.benches import load

SCORE_BYTES = 4 * 28 * 1100 * 4  # of 4 rows with 28 heads and a prefix of 1,100 tokens, in float32


@pytest.fixture(scope="module")
def decode_ops():
    return load("decode_ops")


@pytest.mark.parametrize(("is_fused", "per_layer", "others"), [(False, 57, 44), (True, 36, 38)])
def test_operators_of_a_decode_step(decode_ops, is_fused, per_layer, others):
    """Operators in each layer, where there were 65 before prefixes had pages, and beside the layers."""
    two, three = (
        decode_ops.count_step(layers=layers, num_clips=2, num_samples=2, is_fused=is_fused) for layers in (2, 3)
    )
    assert two.counts["aten._scaled_dot_product_flash_attention_for_cpu.default"] == 2 * 3  # pages, tails, own tokens
    assert three.counts.total() - two.counts.total() <= per_layer
    assert two.counts.total() <= 2 * per_layer + others


def test_attention_writes_no_scores(decode_ops):
    """The largest results are the outputs of the pages: 4 pages, 2 rows, 28 heads."""
    counter = decode_ops.count_attention(prefix=1100, num_clips=2, num_samples=2)
    assert counter.largest == 4 * 2 * 28 * 128 * 4 < SCORE_BYTES / 4
