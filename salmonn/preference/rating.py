"""Ratings of captions, and the interface of everything that rates them; needs no torch."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from salmonn.files import read_records, write_records
from salmonn.records import Caption, Reference, Score, Unscored
from salmonn.score.judge import ScoringTask


@dataclass(frozen=True)
class Rating:
    """A reward's rating of one caption; a higher value is better.

    Args:
        video, sample: identify the caption.
        parts: name -> value of each part. The first is the main part, in which margins are measured; the others are
            penalties or bonuses that only change the order of captions, or notes without weight. "spread" is the
            standard deviation of the main part, where an ensemble of reward models gave it.
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


def rewards_by_sample(ratings: Sequence[Rating]) -> dict[tuple[str, int], float]:
    """Return the reward of each (video, sample).

    Raises:
        ValueError: two ratings are of the same sample, as of the segments of a video.
    """
    rewards: dict[tuple[str, int], float] = {}
    for one in ratings:
        if (one.video, one.sample) in rewards:
            raise ValueError(f"there are two rewards of {one.video}: rewards of segments cannot be distinguished")
        rewards[one.video, one.sample] = one.value
    return rewards


def best_captions(captions: Sequence[Caption], ratings: Sequence[Rating | None]) -> list[Caption]:
    """Return the caption of each clip with the highest rating, the first of equal ones; an empty one only if alone."""
    best: dict[tuple[object, ...], tuple[tuple[bool, float], Caption]] = {}
    for caption, rating in zip(captions, ratings, strict=True):
        if rating:
            key = (caption.video, caption.prompt, caption.start_seconds, caption.end_seconds)
            rank = (bool(caption.text.strip()), rating.value)
            if key not in best or rank > best[key][0]:
                best[key] = (rank, caption)
    return [caption for _, caption in best.values()]


class Reward(ABC):
    """Rates captions. A subclass needs a name and `rate`; its ratings are saved as JSONL.

    Attributes:
        file_name: file of a round's folder that `save` writes.
    """

    file_name: ClassVar[str] = "ratings.jsonl"

    @property
    @abstractmethod
    def name(self) -> str:
        """Name for records, such as the judge's."""

    @abstractmethod
    def rate(self, tasks: Sequence[ScoringTask]) -> list[Rating | Unscored]:
        """Rate captions; results in the order of the tasks.

        A call has all captions of its clips, so that a reward can also compare them with one another.
        """

    def check(self, reference: Reference) -> None:  # noqa: B027 - most rewards take any reference
        """Raise ValueError, saying what to do, if captions cannot be rated against this reference."""

    def save(self, path: Path, ratings: Sequence[Rating | Unscored]) -> None:
        """Write ratings to a file that appears whole or not at all."""
        write_records(path, [one for one in ratings if isinstance(one, Rating)])

    def load(self, path: Path) -> list[Rating]:
        """Read the ratings that `save` wrote, without the unscored captions."""
        return read_records(path, Rating)
