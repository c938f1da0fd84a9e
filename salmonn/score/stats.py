"""Confidence intervals of rates, and paired comparison of two sets of captions.

Intervals of rates are percentile bootstraps over clips (Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
chapter 13): clips are resampled with replacement, and the rates are recomputed from the sums over each resample. All
captions of a video are resampled together, because they share their events.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from salmonn.records import JudgeInfo, Score
from salmonn.score.dialogue import DIALOGUE_MEASURES
from salmonn.score.metrics import MEASURES, Measures

RESAMPLES = 10_000
_Z = 1.959964  # standard deviations of a 95 % interval
_CHUNK_SIZE = 2**20  # sampled clips in memory at once: 8 bytes each, three times

Counts = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A confidence interval. For a single clip its width is 0, which is meaningless."""

    low: float
    high: float


@dataclass(frozen=True)
class MeasureDifference:
    """One measure of two sets of captions of the same clips.

    Args:
        first, second: value of the measure for each set.
        difference: second - first; below 0 the second set is better.
        interval: confidence interval of the difference.
        wins, ties, losses: number of clips where the second set's value is lower, equal, higher.
    """

    first: float
    second: float
    difference: float
    interval: Interval
    wins: int
    ties: int
    losses: int


@dataclass(frozen=True)
class SetComparison:
    """Two sets of captions, compared on the captions that both have.

    Args:
        num_clips: number of clips with captions in both sets.
        only_first, only_second: number of captions in one set only; they are ignored.
        differences: differences by name of measure.
    """

    num_clips: int
    only_first: int
    only_second: int
    differences: dict[str, MeasureDifference]


def wilson_interval(successes: float, total: float) -> Interval:
    """Return the 95 % Wilson score interval of a proportion, which holds for small counts too; (0, 1) for no trials.

    Half successes, such as ties, may be counted; their smaller variance makes the interval conservative. Of dependent
    trials, `total` is the number of independent ones with their variance.
    """
    if not total:
        return Interval(0.0, 1.0)
    share, z2 = successes / total, _Z**2 / total
    centre = share + z2 / 2
    reach = _Z * math.sqrt(share * (1 - share) / total + z2 / (4 * total))
    # Rounding may exceed the range by 1e-16.
    return Interval(max(0.0, (centre - reach) / (1 + z2)), min(1.0, (centre + reach) / (1 + z2)))


def bootstrap_intervals(
    scores: Sequence[Score],
    *,
    measures: Measures = MEASURES,
    resamples: int = RESAMPLES,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, Interval]:
    """Return the interval of each measure of a set of scores.

    Raises:
        ValueError: there are no scores.
    """
    if not scores:
        raise ValueError("no scores: intervals need at least one scored caption")
    numerators, denominators = _sum_by_video(scores, sorted({score.video for score in scores}), measures)
    intervals = bootstrap_ratios(numerators, denominators, resamples=resamples, seed=seed, confidence=confidence)
    return dict(zip(measures, intervals, strict=True))


def bootstrap_ratios(
    numerators: Counts, denominators: Counts, *, resamples: int = RESAMPLES, seed: int = 0, confidence: float = 0.95
) -> list[Interval]:
    """Return the interval of each measure's sum of numerators / sum of denominators.

    Args:
        numerators, denominators: counts of each clip and measure (C, K).
        resamples: number of resamples.
        seed: random seed.
        confidence: confidence level.
    """
    sums = _resample(np.hstack((numerators, denominators)), resamples=resamples, seed=seed)
    return _percentile_intervals(_divide(*np.hsplit(sums, 2)), confidence=confidence)


def compare_sets(first: Sequence[Score], second: Sequence[Score]) -> SetComparison:
    """Compare two sets of captions clip by clip; each resample has the same clips of both, so hard clips cancel out.

    Captions are matched by video, sample and part of the video. Dialogue is compared if both sets have spoken words.

    Raises:
        ValueError: the sets have no caption in common, or a matched pair was scored against event lists of different
            length.
    """
    before, after = (
        {(score.video, score.sample, score.start_seconds, score.end_seconds): score for score in scores}
        for scores in (first, second)
    )
    common = [key for key in before if key in after]
    if not common:
        raise ValueError(
            f"the two sets, of {len(before)} and {len(after)} captions, have none in common: compare captions of the "
            "same videos and parts, under the same names"
        )
    videos = sorted({video for video, *_ in common})
    pairs = [(before[key], after[key]) for key in common]
    _require_same_events(pairs)
    has_speech = any(one.dialogue and one.dialogue.num_spoken for pair in pairs for one in pair)
    measures = {**MEASURES, **(DIALOGUE_MEASURES if has_speech else {})}
    sums = [
        *_sum_by_video([one for one, _ in pairs], videos, measures),
        *_sum_by_video([other for _, other in pairs], videos, measures),
    ]
    resampled = np.hsplit(_resample(np.hstack(sums)), 4)
    intervals = _percentile_intervals(_divide(*resampled[2:]) - _divide(*resampled[:2]))
    first_values, second_values = (_divide(top.sum(0), bottom.sum(0)) for top, bottom in (sums[:2], sums[2:]))
    change = np.sign(_divide(*sums[2:]) - _divide(*sums[:2]))  # (C, K)
    differences = {
        name: MeasureDifference(
            first=float(first_values[column]),
            second=float(second_values[column]),
            difference=float(second_values[column] - first_values[column]),
            interval=intervals[column],
            wins=int((change[:, column] < 0).sum()),
            ties=int((change[:, column] == 0).sum()),
            losses=int((change[:, column] > 0).sum()),
        )
        for column, name in enumerate(measures)
    }
    return SetComparison(len(videos), len(before) - len(common), len(after) - len(common), differences)


def _require_same_events(pairs: Sequence[tuple[Score, Score]]) -> None:
    """Raise ValueError if the scores of a pair count events of lists of different length."""
    unequal = [(one, other) for one, other in pairs if one.num_events != other.num_events]
    if unequal:
        one, other = unequal[0]
        remedy = "score both sets against the same references"
        if one.num_events + one.num_excluded == other.num_events + other.num_excluded:
            remedy = "only one set was captioned with video and audio; caption both with the same --modality"
        raise ValueError(
            f"{len(unequal)} captions were scored against different events, first {one.video} "
            f"({one.num_events} and {other.num_events} events): {remedy}"
        )


def require_same_judge(first: JudgeInfo, second: JudgeInfo) -> None:
    """Raise ValueError if two score files differ in judge, prompt or protocol, naming the differences."""
    labels = {"judge": "judge", "prompt_hash": "prompt", "protocol": "protocol"}
    values = [(label, getattr(first, key), getattr(second, key)) for key, label in labels.items()]
    unequal = [f"{label} {one} and {other}" for label, one, other in values if one != other]
    if unequal:
        raise ValueError(
            f"the two sets were judged differently ({', '.join(unequal)}), and scores by different judges are not "
            "comparable: two judges gave the same captions 22.9 and 38.8. Score both sets with one judge, or compare "
            "anyway with --force"
        )


def _sum_by_video(scores: Sequence[Score], videos: Sequence[str], measures: Measures) -> tuple[Counts, Counts]:
    """Return the numerator and denominator of each measure (C, K), summed over the captions of each video."""
    rows = {video: row for row, video in enumerate(videos)}
    numerators, denominators = (np.zeros((len(videos), len(measures))) for _ in range(2))
    for score in scores:
        row = rows[score.video]
        numerators[row] += [numerator(score) for numerator, _ in measures.values()]
        denominators[row] += [denominator(score) for _, denominator in measures.values()]
    return numerators, denominators


def _divide(numerators: Counts, denominators: Counts) -> Counts:
    # At least 1, as in `compute_rates`, so that errors count for clips without events.
    return numerators / np.maximum(denominators, 1)


def _resample(counts: Counts, *, resamples: int = RESAMPLES, seed: int = 0) -> Counts:
    """Return the sums (R, K) over R resamples of the clips in counts (C, K).

    `scipy.stats.bootstrap` gathers R * C * K values; counting how often each clip is sampled and multiplying by the
    counts needs R * C, one matrix product, and no more memory than a chunk (R * C is 800 MB for 10,000 clips).
    """
    num_clips = len(counts)
    rng = np.random.default_rng(seed)
    chunk = max(_CHUNK_SIZE // num_clips, 1)
    sums = []
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        sampled = rng.integers(num_clips, size=(rows, num_clips))
        sampled += np.arange(rows)[:, None] * num_clips
        weights = np.bincount(sampled.ravel(), minlength=rows * num_clips).reshape(rows, num_clips)
        sums.append(weights.astype(np.float64) @ counts)
    return np.vstack(sums)


def _percentile_intervals(values: Counts, *, confidence: float = 0.95) -> list[Interval]:
    """Return the middle `confidence` of each column of values (R, K)."""
    ends = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return [Interval(float(low), float(high)) for low, high in ends.T]
