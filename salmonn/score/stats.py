"""How sure rates are: 95 % intervals over clips, and the difference between two sets of captions.

Intervals are percentile bootstraps (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13): clips
are drawn from the set, as many as it has, with repetition, and the rates are taken again from the sums over what was
drawn. All captions of a video are drawn together, since they share their events.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from salmonn.records import JudgeInfo, Score

RESAMPLES = 10_000
# Draws held at once: 8 bytes each, three times over.
_CHUNK = 2**20

Counts = NDArray[np.float64]

# Each measure is a ratio of two sums over captions; of all of them less is better.
MEASURES: Mapping[str, tuple[Callable[[Score], int], Callable[[Score], int]]] = {
    "missing": (lambda score: score.missing, lambda score: score.num_events),
    "hallucination": (lambda score: score.incorrect + score.hallucinated, lambda score: score.num_events),
    "incorrect": (lambda score: score.incorrect, lambda score: score.num_events),
    "hallucinated": (lambda score: score.hallucinated, lambda score: score.num_events),
    "total": (lambda score: score.missing + score.incorrect + score.hallucinated, lambda score: score.num_events),
    "repetition": (lambda score: score.num_repeated_words, lambda score: score.num_words),
}


@dataclass(frozen=True)
class Interval:
    """A confidence interval. Of a single clip it has no width, which says nothing of how sure the rate is."""

    low: float
    high: float


@dataclass(frozen=True)
class MeasureDifference:
    """One measure of two sets of captions of the same clips.

    Args:
        first, second: the measure over each set.
        difference: second - first; below 0 the second set is better.
        interval: of the difference.
        wins, ties, losses: clips where the second set's value is lower, the same, higher.
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
    """Two sets of captions on what both have.

    Args:
        num_clips: clips of which both have captions.
        only_first, only_second: number of captions that one set has alone; they count for nothing.
        differences: by name of measure.
    """

    num_clips: int
    only_first: int
    only_second: int
    differences: dict[str, MeasureDifference]


def bootstrap_intervals(
    scores: Sequence[Score], *, resamples: int = RESAMPLES, seed: int = 0, confidence: float = 0.95
) -> dict[str, Interval]:
    """Intervals of the measures over a set of scores, by name of measure.

    Raises:
        ValueError: there is no score.
    """
    if not scores:
        raise ValueError("no scores: intervals need at least one scored caption")
    tops, bottoms = _sums(scores, sorted({score.video for score in scores}))
    intervals = bootstrap_ratios(tops, bottoms, resamples=resamples, seed=seed, confidence=confidence)
    return dict(zip(MEASURES, intervals, strict=True))


def bootstrap_ratios(
    tops: Counts, bottoms: Counts, *, resamples: int = RESAMPLES, seed: int = 0, confidence: float = 0.95
) -> list[Interval]:
    """The interval of each ratio, sum of a column of `tops` / sum of the same column of `bottoms`.

    Args:
        tops, bottoms: counts (clips, measures).
    """
    drawn = _resample(np.hstack((tops, bottoms)), resamples=resamples, seed=seed)
    return _intervals(_divide(*np.hsplit(drawn, 2)), confidence=confidence)


def compare_sets(
    first: Sequence[Score],
    second: Sequence[Score],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    confidence: float = 0.95,
) -> SetComparison:
    """Compare two sets of captions clip by clip: the same clips are drawn for both, so that hard clips cancel out.

    Captions go together by video, sample and part of the video.

    Raises:
        ValueError: no caption has its like in the other set, or two that go together were scored against lists of
            events of different length.
    """
    named = [{_name(score): score for score in scores} for scores in (first, second)]
    shared = [name for name in named[0] if name in named[1]]
    if not shared:
        raise ValueError(
            f"the two sets, of {len(named[0])} and {len(named[1])} captions, have none in common: "
            "compare captions of the same videos and parts, named alike"
        )
    unlike = [name for name in shared if named[0][name].num_events != named[1][name].num_events]
    if unlike:
        counts = (str(one[unlike[0]].num_events) for one in named)
        raise ValueError(
            f"{len(unlike)} captions were scored against other events, first {unlike[0][0]} ({' and '.join(counts)} "
            "events): score both sets against the same references"
        )
    common = sorted({str(video) for video, *_ in shared})
    sums = [*_sums([named[0][name] for name in shared], common), *_sums([named[1][name] for name in shared], common)]
    drawn = np.hsplit(_resample(np.hstack(sums), resamples=resamples, seed=seed), 4)
    intervals = _intervals(_divide(*drawn[2:]) - _divide(*drawn[:2]), confidence=confidence)
    before, after = (_divide(tops.sum(0), bottoms.sum(0)) for tops, bottoms in (sums[:2], sums[2:]))
    change = np.sign(_divide(*sums[2:]) - _divide(*sums[:2]))  # (clips, measures)
    differences = {
        name: MeasureDifference(
            first=float(before[place]),
            second=float(after[place]),
            difference=float(after[place] - before[place]),
            interval=intervals[place],
            wins=int((change[:, place] < 0).sum()),
            ties=int((change[:, place] == 0).sum()),
            losses=int((change[:, place] > 0).sum()),
        )
        for place, name in enumerate(MEASURES)
    }
    return SetComparison(len(common), len(named[0]) - len(shared), len(named[1]) - len(shared), differences)


def _name(score: Score) -> tuple[object, ...]:
    return score.video, score.sample, score.start_seconds, score.end_seconds


def require_same_judge(first: JudgeInfo, second: JudgeInfo) -> None:
    """Refuse to compare what two judges said, or one judge asked in other words or scored by another protocol.

    Raises:
        ValueError: naming what differs.
    """
    names = {"judge": "judge", "prompt_hash": "prompt", "protocol": "protocol"}
    values = [(name, getattr(first, key), getattr(second, key)) for key, name in names.items()]
    unlike = [f"{name} {one} and {other}" for name, one, other in values if one != other]
    if unlike:
        raise ValueError(
            f"the two sets were not judged alike ({', '.join(unlike)}): the same captions have been read as 22.9 and "
            "38.8 by two judges. Score both with one judge; --force compares all the same"
        )


def _sums(scores: Sequence[Score], videos: Sequence[str]) -> tuple[Counts, Counts]:
    """The two sums of each measure (videos, measures) over the captions of each of the videos."""
    rows = {video: row for row, video in enumerate(videos)}
    tops, bottoms = (np.zeros((len(videos), len(MEASURES))) for _ in range(2))
    for score in scores:
        if score.video in rows:
            row = rows[score.video]
            tops[row] += [top(score) for top, _ in MEASURES.values()]
            bottoms[row] += [bottom(score) for _, bottom in MEASURES.values()]
    return tops, bottoms


def _divide(tops: Counts, bottoms: Counts) -> Counts:
    # At least 1, as in `rates`, so that errors count where there is nothing to tell.
    return tops / np.maximum(bottoms, 1)


def _resample(counts: Counts, *, resamples: int, seed: int) -> Counts:
    """Sums (resamples, columns) over clips drawn with repetition from counts (clips, columns)."""
    return np.vstack([weights @ counts for weights in _draw(len(counts), resamples=resamples, seed=seed)])


def _draw(num_clips: int, *, resamples: int, seed: int) -> Iterator[Counts]:
    """How often each clip is drawn, (resamples, clips), in chunks: whole it would be 800 MB for 10,000 clips."""
    rng = np.random.default_rng(seed)
    rows = max(_CHUNK // num_clips, 1)
    for done in range(0, resamples, rows):
        num_rows = min(rows, resamples - done)
        drawn = rng.integers(num_clips, size=(num_rows, num_clips))
        drawn += np.arange(num_rows)[:, None] * num_clips
        counts = np.bincount(drawn.ravel(), minlength=num_rows * num_clips)
        yield counts.reshape(num_rows, num_clips).astype(np.float64)


def _intervals(values: Counts, *, confidence: float) -> list[Interval]:
    """The middle `confidence` of each column of values (resamples, measures)."""
    ends = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return [Interval(float(low), float(high)) for low, high in ends.T]
