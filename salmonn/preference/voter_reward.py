"""Rewards without an absolute score: how often a voter prefers a caption to others of its clip. Imports no torch.

Preferences may be cyclic, so that no score explains them; then there is no best caption, but a mixture of captions that
no other beats on average. `exploitability` measures how far a policy is from it, considering only a simulated voter's
preferences among phrases.
"""

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Generic, TypeVar

from salmonn.preference.rating import Rating, Reward
from salmonn.records import Caption, Reference, Score, Unscored
from salmonn.score.judge import Judge, ScoringTask
from salmonn.synthetic.judge import RuleJudge
from salmonn.synthetic.raters import SOUND_FORMS, CaptionTraits, Rater, caption_traits

View = TypeVar("View")


@dataclass(frozen=True)
class Contender(Generic[View]):
    """A caption that a voter compares with others.

    Args:
        video, sample: identify the caption.
        view: what the voter compares it by.
        score: the judge's report, to keep with the rating.
    """

    video: str
    sample: int
    view: View
    score: Score | None = None


@dataclass(frozen=True)
class Exploitability:
    """How much better than a policy the best reply to it is, by a voter.

    Args:
        exploitability: largest mean win rate, minus 0.5, of the policy's own captions with all sounds in one form.
        best_reply: that form.
        forms: form of most sounds of a caption -> share of the policy's captions with sounds.
    """

    exploitability: float
    best_reply: str
    forms: Mapping[str, float]


class VoterReward(Reward, Generic[View]):
    """Rates a caption by its win rate: how often a voter prefers it to the other captions of its clip, on average."""

    @abstractmethod
    def examine(self, tasks: Sequence[ScoringTask]) -> list[Contender[View] | Unscored]:
        """Return what the voter compares captions by, in the order of the tasks."""

    @abstractmethod
    def compare(self, pairs: Sequence[tuple[View, View]]) -> list[float | Unscored]:
        """Return the probability that the voter prefers the first of two captions, averaged over the two orders."""

    def rate(self, tasks: Sequence[ScoringTask]) -> list[Rating | Unscored]:
        """Rate captions by their win rates; a clip's only caption gets 0.5."""
        return self.rate_contenders(self.examine(tasks))

    def rate_against(self, tasks: Sequence[ScoringTask], opponents: Sequence[ScoringTask]) -> list[Rating | Unscored]:
        """Rate captions by their win rates against other captions of their clips, such as those of another policy.

        Captions of a clip whose opponents are all unscored are unscored, too.
        """
        examined = self.examine(opponents)
        videos = {one.video for one in examined if not isinstance(one, Unscored)}
        contenders = [
            one
            if isinstance(one, Unscored) or one.video in videos
            else Unscored(one.video, "there is no scored caption of its clip to compare it with", one.sample)
            for one in self.examine(tasks)
        ]
        return self.rate_contenders(contenders, examined)

    def rate_contenders(
        self,
        contenders: Sequence[Contender[View] | Unscored],
        opponents: Sequence[Contender[View] | Unscored] | None = None,
    ) -> list[Rating | Unscored]:
        """Rate captions by their win rates; one without any comparison that succeeded is unscored.

        Args:
            contenders: the captions.
            opponents: captions that they are compared with; none for one another.
        """
        by_video: dict[str, list[Contender[View]]] = {}
        for one in contenders if opponents is None else opponents:
            if not isinstance(one, Unscored):
                by_video.setdefault(one.video, []).append(one)
        opposed = [
            [] if isinstance(one, Unscored) else [other for other in by_video.get(one.video, ()) if other is not one]
            for one in contenders
        ]
        pairs = [
            (one.view, other.view)
            for one, others in zip(contenders, opposed, strict=True)
            if not isinstance(one, Unscored)
            for other in others
        ]
        verdicts = iter(self.compare(pairs))
        return [
            one if isinstance(one, Unscored) else _rate_one(one, [next(verdicts) for _ in others])
            for one, others in zip(contenders, opposed, strict=True)
        ]


def _rate_one(contender: Contender[View], verdicts: Sequence[float | Unscored]) -> Rating | Unscored:
    failed = [one for one in verdicts if isinstance(one, Unscored)]
    if failed and len(failed) == len(verdicts):
        return replace(failed[0], video=contender.video, sample=contender.sample)
    probabilities = [one for one in verdicts if not isinstance(one, Unscored)]
    wins = fmean(probabilities) if probabilities else 0.5
    return Rating(contender.video, {"wins": wins}, {"wins": 1.0}, contender.sample, contender.score)


class SimulatedVoterReward(VoterReward[CaptionTraits]):
    """A simulated voter, which looks at the judge's scores of captions of synthetic clips."""

    def __init__(self, judge: Judge, voter: Rater) -> None:
        self.judge = judge
        self.voter = voter

    @property
    def name(self) -> str:
        """Id of the voter."""
        return self.voter.name

    def check(self, reference: Reference) -> None:
        """Raise ValueError if the judge cannot use this reference, or it is not to a synthetic clip."""
        self.judge.check(reference)
        try:
            RuleJudge().check(reference)
        except ValueError as error:
            raise ValueError(
                f"simulated voters are for synthetic clips only; use --reward.voter judge or llm: {error}"
            ) from error

    def examine(self, tasks: Sequence[ScoringTask]) -> list[Contender[CaptionTraits] | Unscored]:
        """Judge captions and return their traits."""
        return [
            result
            if isinstance(result, Unscored)
            else Contender(result.video, result.sample, caption_traits(task.caption, result, task.reference))
            for task, result in zip(tasks, self.judge.judge(tasks), strict=True)
        ]

    def compare(self, pairs: Sequence[tuple[CaptionTraits, CaptionTraits]]) -> list[float | Unscored]:
        """Return the probability that the voter prefers the first of two captions, averaged over the two orders."""
        return [win_probability(self.voter, one, other) for one, other in pairs]


class JudgeVoterReward(VoterReward[float]):
    """The judge as a voter: it prefers the caption with the higher rating, and neither of two with the same.

    Its file has the judge's scores, so a run rates captions that were judged before without judging them again.

    Args:
        judge: reward that rates each caption separately.
    """

    file_name = "scores.jsonl"

    def __init__(self, judge: Reward) -> None:
        self.judge = judge

    @property
    def name(self) -> str:
        """Name of the judge."""
        return self.judge.name

    def check(self, reference: Reference) -> None:
        """Raise ValueError if the judge cannot use this reference."""
        self.judge.check(reference)

    def examine(self, tasks: Sequence[ScoringTask]) -> list[Contender[float] | Unscored]:
        """Judge captions and return their ratings."""
        return [one if isinstance(one, Unscored) else _by_rating(one) for one in self.judge.rate(tasks)]

    def compare(self, pairs: Sequence[tuple[float, float]]) -> list[float | Unscored]:
        """Return 1 if the first rating is higher than the second, 0.5 if it is the same, and 0 otherwise."""
        return [0.5 if one == other else float(one > other) for one, other in pairs]

    def save(self, path: Path, ratings: Sequence[Rating | Unscored]) -> None:
        """Write the judge's scores as a score file."""
        self.judge.save(path, ratings)

    def load(self, path: Path) -> list[Rating]:
        """Read a score file and rate its captions by their win rates."""
        ratings = self.rate_contenders([_by_rating(one) for one in self.judge.load(path)])
        return [one for one in ratings if isinstance(one, Rating)]


def _by_rating(rating: Rating) -> Contender[float]:
    return Contender(rating.video, rating.sample, rating.value, rating.score)


def win_probability(voter: Rater, one: CaptionTraits, other: CaptionTraits) -> float:
    """Return the probability that a voter prefers a caption, averaged over the two orders of showing."""
    return (voter.prefers(one, other) + 1 - voter.prefers(other, one)) / 2


def find_exploitability(
    voter: Rater, captions: Sequence[Caption], results: Sequence[Score | Unscored], references: Mapping[str, Reference]
) -> Exploitability | None:
    """Compare a policy's captions with the same captions with all sounds in one form; None if none has a sound.

    The form is the same for all clips: the best one of each clip would also exploit chance.
    """
    traits = [
        caption_traits(caption, result, references[caption.video])
        for caption, result in zip(captions, results, strict=True)
        if isinstance(result, Score)
    ]
    traits = [one for one in traits if one.sound_form is not None]
    if not traits:
        return None
    forms = (*SOUND_FORMS, "")
    wins = {form: fmean(win_probability(voter, replace(one, sound_form=form), one) for one in traits) for form in forms}
    best, counts = max(forms, key=lambda form: wins[form]), Counter(one.sound_form for one in traits)
    return Exploitability(wins[best] - 0.5, best, {form: counts[form] / len(traits) for form in forms})
