"""A reward without an absolute score: how often a voter prefers a caption to others of its clip. Imports no torch.

Preferences may be cyclic, so that no score explains them; then there is no best caption, but a mixture of captions that
no other beats on average. `exploitability` measures how far a policy is from it, considering only the voter's
preferences among phrases.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from salmonn.preference.rating import Rating, Reward
from salmonn.records import Caption, Reference, Score, Unscored
from salmonn.score.judge import Judge, ScoringTask
from salmonn.synthetic.judge import RuleJudge
from salmonn.synthetic.raters import SOUND_FORMS, CaptionTraits, Rater, caption_traits


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


class VoterReward(Reward):
    """Rates a caption by its win rate among the samples of its clip, which are judged first: voters look at scores."""

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
            raise ValueError(f"reward.kind voter is for synthetic clips only: {error}") from error

    def rate(self, tasks: Sequence[ScoringTask]) -> list[Rating | Unscored]:
        """Judge captions and rate them by their win rates against the other captions of their clip."""
        results = self.judge.judge(tasks)
        traits = {
            index: caption_traits(task.caption, result, task.reference)
            for index, (task, result) in enumerate(zip(tasks, results, strict=True))
            if isinstance(result, Score)
        }
        by_video: dict[str, list[int]] = {}
        for index in traits:
            by_video.setdefault(tasks[index].caption.video, []).append(index)
        ratings: list[Rating | Unscored] = []
        for index, (task, result) in enumerate(zip(tasks, results, strict=True)):
            if isinstance(result, Unscored):
                ratings.append(result)
                continue
            others = [traits[other] for other in by_video[task.caption.video] if other != index]
            wins = fmean(win_probability(self.voter, traits[index], other) for other in others) if others else 0.5
            ratings.append(Rating(result.video, {"wins": wins}, {"wins": 1.0}, result.sample))
        return ratings


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
