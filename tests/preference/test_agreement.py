"""Agreement with held-out comparisons: those of one clip are not independent."""

import pytest
import torch

from salmonn.preference.agreement import effective_number, measure_agreement
from salmonn.preference.comparisons import group_comparisons
from salmonn.records import Comparison
from salmonn.score.stats import wilson_interval


def test_the_interval_counts_independent_comparisons():
    """Two clips with four comparisons each, all right or all wrong: the variance is 2 / 1 (2^2 + 2^2) / 8^2 = 0.25."""
    margins, clips = torch.tensor([1.0] * 4 + [-1.0] * 4), ["a"] * 4 + ["b"] * 4
    assert effective_number(margins, clips) == 0.25 / 0.25
    assert effective_number(margins, [str(number) for number in range(8)]) == pytest.approx(
        7
    )  # the variance over N - 1
    assert effective_number(margins, clips[::2] * 2) == 8  # half of each clip: never more than there are
    assert effective_number(margins.abs(), clips) == 2  # all alike: a clip counts once
    assert effective_number(margins, ["a"] * 8) == 1
    pairs = [Comparison(video, "Tell.", "x", f"y{number}") for video in "ab" for number in range(4)]
    agreement = measure_agreement(group_comparisons(pairs), margins, None)
    expected = wilson_interval(0.5, 1)
    assert (agreement.low, agreement.high, agreement.num_comparisons) == (expected.low, expected.high, 8)
