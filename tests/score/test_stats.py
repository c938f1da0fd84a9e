"""Intervals and comparisons against resamples worked out by hand, and their coverage on simulated sets."""

from dataclasses import replace

import numpy as np
import pytest

from salmonn.records import JudgeInfo, Score
from salmonn.score import stats as intervals
from salmonn.score.metrics import compute_rates
from salmonn.score.stats import (
    MEASURES,
    Interval,
    MeasureDifference,
    bootstrap_intervals,
    bootstrap_ratios,
    compare_sets,
    require_same_judge,
    wilson_interval,
)

# docs/metrics.md, "The worked example": its two clips
FIRST = [
    Score("a", 5, missing=2, incorrect=1, hallucinated=1, num_words=25, num_repeated_words=4),
    Score("b", 3, missing=0, incorrect=0, hallucinated=0, num_words=13),
]
SECOND = [
    Score("b", 3, missing=1, incorrect=0, hallucinated=0, num_words=13),
    Score("a", 5, missing=1, incorrect=1, hallucinated=0, num_words=25),
]


def simulate_scores(rng: np.random.Generator, shares: np.ndarray, num_events: int = 20) -> list[Score]:
    """Return a score per clip, where each event is missed with the clip's own probability."""
    missing = rng.binomial(num_events, shares)
    return [Score(f"{clip:05}", num_events, int(count), 0, 0) for clip, count in enumerate(missing)]


def test_interval_of_the_worked_example():
    """Two clips are sampled as aa, ab, ba or bb, a quarter each, so the middle 95 % contains all of them."""
    result = bootstrap_intervals(FIRST)
    assert result["total"] == Interval(0.0, 4 / 5)
    assert result["missing"] == Interval(0.0, 2 / 5)
    assert result["hallucination"] == Interval(0.0, 2 / 5)
    assert result["incorrect"] == result["hallucinated"] == Interval(0.0, 1 / 5)
    assert result["repetition"] == Interval(0.0, 4 / 25)
    # the middle 40 % contains neither end
    assert bootstrap_intervals(FIRST, confidence=0.4)["total"] == Interval(4 / 8, 4 / 8)


def test_comparison_of_the_worked_example():
    """The samples aa, ab, ba, bb differ by 2/5 - 4/5, 3/8 - 4/8 twice, and 1/3 - 0."""
    result = compare_sets(FIRST, SECOND)
    assert (result.num_clips, result.only_first, result.only_second) == (2, 0, 0)
    assert list(result.differences) == list(MEASURES)
    total = result.differences["total"]
    assert (total.first, total.second, total.difference) == (4 / 8, 3 / 8, -1 / 8)
    assert (total.interval.low, total.interval.high) == pytest.approx((-2 / 5, 1 / 3))
    assert (total.wins, total.ties, total.losses) == (1, 0, 1)
    # a is a win; b has no repetition in either
    repetition = result.differences["repetition"]
    assert (repetition.wins, repetition.ties, repetition.losses) == (1, 1, 0)
    assert repetition.difference == pytest.approx(-4 / 38)


def test_captions_of_a_video_are_sampled_together():
    # separately, none, one or both of 0/2 and 2/2 would be sampled
    scores = [Score("a", 2, 0, 0, 0), Score("a", 2, 2, 0, 0, sample=1)]
    assert bootstrap_intervals(scores)["missing"] == Interval(0.5, 0.5)
    # together they are one clip, a win of 2/4 to 1/4
    better = compare_sets(scores, [scores[0], replace(scores[1], missing=1)])
    assert better.differences["missing"] == MeasureDifference(0.5, 0.25, -0.25, Interval(-0.25, -0.25), 1, 0, 0)


def test_errors_count_for_clips_without_events():
    assert bootstrap_intervals([Score("a", 0, 0, 0, 2)])["total"] == Interval(2.0, 2.0)


def test_compared_values_are_those_of_rates():
    rng = np.random.default_rng(0)
    sets = [
        [Score(str(clip), clip + 1, *map(int, rng.integers(1, 9, size=3)), 50, int(rng.integers(9))) for clip in clips]
        for clips in (range(9), range(3, 13))
    ]
    result = compare_sets(*sets)
    # clips 3 to 8 are in both
    assert (result.num_clips, result.only_first, result.only_second) == (6, 3, 4)
    first, second = (compute_rates([score for score in scores if 3 <= int(score.video) < 9]) for scores in sets)
    for name, difference in result.differences.items():
        assert (difference.first, difference.second) == pytest.approx((getattr(first, name), getattr(second, name)))
        assert difference.wins + difference.ties + difference.losses == 6


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [
        # 3 of 4, with z z / n = 0.960365: (0.75 + 0.480182 -+ 1.959964 sqrt((0.1875 + 0.240091) / 4)) / 1.960365
        (3, 4, 0.300642, 0.954412),
        (4, 4, 1 / 1.960365, 1.0),
        (0, 4, 0.0, 0.960365 / 1.960365),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_interval(successes, total, low, high):
    interval = wilson_interval(successes, total)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=1e-6)
    assert type(interval.low) is float  # as JSON needs it


def test_identical_sets_tie():
    scores = simulate_scores(np.random.default_rng(0), np.full(30, 0.3))
    result = compare_sets(scores, scores[::-1])
    share = compute_rates(scores).missing
    assert result.differences["missing"] == MeasureDifference(share, share, 0.0, Interval(0.0, 0.0), 0, 30, 0)


def test_coverage_of_a_known_rate():
    """Clips differ in difficulty: 95 % of the intervals should contain the true rate."""
    rng = np.random.default_rng(0)
    shares = rng.beta(2, 4, size=(2000, 100))  # 2,000 sets of 100 clips; the mean of beta(2, 4) is 1/3
    tops = rng.binomial(20, shares).astype(float)
    bottoms = np.full((100, 1), 20.0)
    intervals_found = [
        bootstrap_ratios(row[:, None], bottoms, resamples=300, seed=seed)[0] for seed, row in enumerate(tops)
    ]
    assert 0.93 <= np.mean([interval.low <= 1 / 3 <= interval.high for interval in intervals_found]) <= 0.97


def test_paired_comparison_detects_a_shift_where_intervals_overlap():
    rng = np.random.default_rng(1)
    first = simulate_scores(rng, rng.beta(2, 4, size=100))
    # on every other clip one missing event less, if there is one: 2 % of all events
    second = [replace(score, missing=max(score.missing - clip % 2, 0)) for clip, score in enumerate(first)]
    before, after = bootstrap_intervals(first)["missing"], bootstrap_intervals(second)["missing"]
    assert after.high > before.low
    result = compare_sets(first, second).differences["missing"]
    assert -0.03 < result.interval.low < result.interval.high < -0.015
    assert (result.losses, result.wins) == (0, sum(score.missing > 0 for score in first[1::2]))


def test_resamples_are_seeded_and_independent_of_chunks(monkeypatch):
    scores = simulate_scores(np.random.default_rng(0), np.linspace(0, 1, 20))
    result = bootstrap_intervals(scores, resamples=1000)
    assert result == bootstrap_intervals(scores, resamples=1000) != bootstrap_intervals(scores, resamples=1000, seed=1)
    # 5 resamples of 20 clips at once
    monkeypatch.setattr(intervals, "_CHUNK_SIZE", 100)
    assert bootstrap_intervals(scores, resamples=1000) == result


def test_captions_are_matched_by_sample_and_part():
    """One sample and one part of a are in both sets: 1 and 2 errors of 4 against 0 and 1."""
    first = [Score("a", 4, 1, 0, 0), Score("a", 4, 4, 0, 0, sample=1), Score("a", 4, 2, 0, 0, end_seconds=3.0)]
    second = [Score("a", 4, 0, 0, 0), Score("a", 4, 1, 0, 0, end_seconds=3.0), Score("a", 9, 9, 0, 0, end_seconds=5.0)]
    result = compare_sets(first, second)
    assert (result.num_clips, result.only_first, result.only_second) == (1, 1, 1)
    assert (result.differences["total"].first, result.differences["total"].second) == (3 / 8, 1 / 8)
    with pytest.raises(
        ValueError, match=r"1 captions were scored against different events, first a \(4 and 5 events\)"
    ):
        compare_sets(first, [Score("a", 5, 0, 0, 0)])
    with pytest.raises(ValueError, match=r"\(4 and 3 events\): only one set was captioned with video and audio"):
        compare_sets(first, [Score("a", 3, 0, 0, 0, num_excluded=1)])


def test_rejects_sets_without_common_captions():
    with pytest.raises(ValueError, match="of 2 and 1 captions, have none in common"):
        compare_sets(FIRST, [replace(FIRST[0], video="c")])
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_intervals([])


JUDGE_INFO = JudgeInfo("rule", "abc", "salmonn", "2026-11-22T10:00:00+00:00", "0.1.0")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"judge": "gpt at server"}, r"\(judge rule and gpt at server\)"),
        ({"prompt_hash": "xyz"}, r"\(prompt abc and xyz\)"),
        ({"judge": "x", "protocol": "published"}, r"\(judge rule and x, protocol salmonn and published\).*--force"),
    ],
)
def test_rejects_different_judges(other, message):
    with pytest.raises(ValueError, match=message):
        require_same_judge(JUDGE_INFO, replace(JUDGE_INFO, **other))


def test_the_same_judge_at_two_times_can_be_compared():
    require_same_judge(JUDGE_INFO, replace(JUDGE_INFO, date="2027-01-01T00:00:00+00:00", version="0.2.0", seeds=(1, 2)))
