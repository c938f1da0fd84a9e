"""Margins of people's votes, by which a subset is chosen: how much more the voters like one caption than the other.

A vote says which caption is better, not by how much. So a taste is fitted to all votes by Bradley and Terry's model,

    P(A wins) = sigmoid(w . (x_A - x_B) + side)

where x is the model of a caption, its length, the share of its words that are repeated and, where the vote recorded it
for both captions, its Total. The margin is |w . (x_A - x_B)| in logits, without the side. Like FiFA's margin (arXiv
2410.10166), it has no sign: the vote alone says which caption is better, even where it contradicts the taste.

The w of a vote is fitted to votes on other videos. If the tastes do not predict votes better than chance,
votes have no margin. No reward model or judge is needed. Imports no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from salmonn.preference.feedback import Candidate, Feedback
from salmonn.preference.ratings import SIDE, encode_votes, find_votes, fit_logits
from salmonn.score.repetition import count_repeated_words
from salmonn.score.stats import wilson_interval

NUM_FOLDS = 5
DIGITS = 6  # of a margin: the last bits of the fit differ between processors, but all ranks must choose the same pairs


@dataclass(frozen=True)
class Taste:
    """Margins of votes, and how many votes those on other videos predict.

    Args:
        margins: vote -> margin in logits; empty if votes are not predicted better than chance.
        num_votes: votes that the taste is fitted to.
        num_totals: those of them with the Total of both captions.
        num_decided: votes for A or B whose captions differ in taste.
        num_predicted: those of them that votes on other videos predict.
    """

    margins: Mapping[Feedback, float] = field(default_factory=dict)
    num_votes: int = 0
    num_totals: int = 0
    num_decided: int = 0
    num_predicted: int = 0

    def describe(self) -> str:
        """Return the source of the margins as a sentence, or why there are none."""
        if not self.num_votes:
            return "there are no votes to fit margins to"
        share = self.num_predicted / max(self.num_decided, 1)
        interval = wilson_interval(self.num_predicted, self.num_decided)
        source = (
            "the margin is the difference in this taste"
            if self.margins
            else "that may be chance, so votes have no margin"
        )
        return (
            f"the voters' taste (model, length and repetition of captions; Total in {self.num_totals} of "
            f"{self.num_votes} votes), fitted to votes on other videos, predicts {100 * share:.1f} % "
            f"({100 * interval.low:.1f} to {100 * interval.high:.1f}) of {self.num_decided} votes: {source}"
        )


def fit_taste(feedback: Sequence[Feedback]) -> Taste:
    """Fit a taste to the votes on whole captions; videos are divided into folds in order of appearance."""
    votes = find_votes(feedback)
    if not votes:
        return Taste()
    _, inputs, outcome = encode_votes(votes)
    traits = np.array([_compare(vote.first, second) for vote, second in votes])
    scale = np.maximum(traits.std(axis=0), 1e-9)  # for the ridge
    inputs = np.hstack([traits / scale, inputs])
    videos: dict[str, int] = {}
    fold = np.array([videos.setdefault(vote.kept_video or vote.video, len(videos)) % NUM_FOLDS for vote, _ in votes])
    others = (fold != np.arange(NUM_FOLDS)[:, None]).astype(np.float64)
    fitted = fit_logits(inputs, outcome, others, start=np.zeros(inputs.shape[1]))
    fitted[:, SIDE] = 0.0
    logits = (inputs * fitted[fold]).sum(axis=1)
    decided = (outcome != 0.5) & (logits != 0)
    num_decided = int(decided.sum())
    num_predicted = int(((logits > 0) == (outcome > 0.5))[decided].sum())
    is_predictive = wilson_interval(num_predicted, num_decided).low > 0.5
    margins = {vote: round(abs(float(logit)), DIGITS) for (vote, _), logit in zip(votes, logits, strict=True)}
    num_totals = sum(all(one.total is not None for one in vote.captions) for vote, _ in votes)
    return Taste(margins if is_predictive else {}, len(votes), num_totals, num_decided, num_predicted)


def _compare(first: Candidate, second: Candidate) -> tuple[float, float]:
    """Return how much more of its words the first caption repeats, and how much higher its Total is; 0 if unknown."""
    total = first.total - second.total if first.total is not None and second.total is not None else 0.0
    return _repetition(first) - _repetition(second), total


def _repetition(caption: Candidate) -> float:
    repeated, words = count_repeated_words(caption.text)
    return repeated / max(words, 1)
