"""Ratings of captions, and the interfaces of everything that rates them; needs no torch.

A reward either rates captions one by one (`Reward`) or compares two of a clip (`PairwiseReward`), which
`rate_by_comparison` turns into ratings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Protocol

from salmonn.records import Reference, Score, Unscored
from salmonn.score.judge import ScoringTask


@dataclass(frozen=True)
class Rating:
    """A reward's rating of one caption; a higher value is better.

    Args:
        video, sample: identify the caption.
        parts: name -> value of each part. The first is the main part, in which margins are measured; the others are
            penalties or bonuses that only change the order of captions.
        weights: name -> weight of each part, negative where a lower value is better.
        score: the judge's report, where a judge rated the caption.
    """

    video: str
    parts: Mapping[str, float]
    weights: Mapping[str, float]
    sample: int = 0
    score: Score | None = None

    @property
    def value(self) -> float:
        """Weighted sum of the parts."""
        return sum(self.weights[name] * part for name, part in self.parts.items())

    @property
    def main(self) -> float:
        """Weighted main part."""
        name = next(iter(self.parts))
        return self.weights[name] * self.parts[name]


class Reward(Protocol):
    """Rates captions one by one."""

    @property
    def name(self) -> str:
        """Name for records, such as the judge's."""
        ...

    @property
    def file_name(self) -> str:
        """File of a round's folder that `save` writes."""
        ...

    def check(self, reference: Reference) -> None:
        """Raise ValueError, saying what to do, if captions cannot be rated against this reference."""
        ...

    def rate(self, tasks: Sequence[ScoringTask]) -> list[Rating | Unscored]:
        """Rate captions; results in the order of the tasks."""
        ...

    def save(self, path: Path, ratings: Sequence[Rating | Unscored]) -> None:
        """Write ratings to a file that appears whole or not at all."""
        ...

    def load(self, path: Path) -> list[Rating]:
        """Read the ratings that `save` wrote, without the unscored captions."""
        ...


class PairwiseReward(Protocol):
    """Compares two captions of a clip."""

    def compare(self, first: ScoringTask, second: ScoringTask) -> float:
        """Return the probability that the first caption is better than the second."""
        ...


def rate_by_comparison(reward: PairwiseReward, tasks: Sequence[ScoringTask]) -> list[Rating]:
    """Rate each caption by its mean probability of being better than the other captions of its clip.

    Every two captions of a clip are compared once; a caption without competitors is rated 0.5.
    """
    by_video: dict[str, list[int]] = {}
    for index, task in enumerate(tasks):
        by_video.setdefault(task.caption.video, []).append(index)
    wins = [0.0] * len(tasks)
    for indices in by_video.values():
        for first, second in combinations(indices, 2):
            probability = reward.compare(tasks[first], tasks[second])
            wins[first] += probability
            wins[second] += 1 - probability
    ratings = []
    for task, won in zip(tasks, wins, strict=True):
        num_others = len(by_video[task.caption.video]) - 1
        parts = {"win_rate": won / num_others if num_others else 0.5}
        ratings.append(Rating(task.caption.video, parts, {"win_rate": 1.0}, sample=task.caption.sample))
    return ratings
