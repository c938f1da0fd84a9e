"""Raters: how many votes each person gave, and how far people agree on the same captions."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from salmonn.preference.votes import Proportion, Vote


@dataclass(frozen=True)
class RaterSummary:
    """The votes of one rater.

    Args:
        rater: id; "" for all votes without one.
        num_votes: number of votes.
        num_ties: votes that both captions are equally good.
        num_both_bad: votes that neither caption is good.
        agreement: same preferences among the captions that both this rater and another one preferred one of; each
            other rater counts.
    """

    rater: str
    num_votes: int
    num_ties: int
    num_both_bad: int
    agreement: Proportion


@dataclass(frozen=True)
class RatersSummary:
    """All raters, most votes first, and the agreement of any two of them.

    Args:
        raters: raters.
        agreement: same preferences among all cases in which two raters preferred one of the same two captions.
    """

    raters: tuple[RaterSummary, ...]
    agreement: Proportion


def summarize_raters(votes: Sequence[Vote]) -> RatersSummary:
    """Count votes by rater, and compare the preferences of each two raters for the same two captions of a clip.

    Of several votes of a rater on the same captions, the last counts. Votes without an id are compared with none.
    """
    # Two captions of a clip -> rater -> preferred text.
    preferences: dict[tuple[object, ...], dict[str, str]] = {}
    choices: dict[str, Counter[str]] = {}
    for vote in votes:
        choices.setdefault(vote.rater, Counter())[vote.choice] += 1
        if vote.rater and vote.chosen:
            texts = frozenset((vote.first.text, vote.second.text))
            key = (vote.pair or vote.video, vote.start_seconds, vote.end_seconds, texts)
            preferences.setdefault(key, {})[vote.rater] = vote.chosen.text
    same, shared = Counter[str](), Counter[str]()
    for by_rater in preferences.values():
        for (one, its), (other, theirs) in combinations(by_rater.items(), 2):
            shared.update((one, other))
            same.update((one, other) if its == theirs else ())
    raters = [
        RaterSummary(rater, count.total(), count["tie"], count["both bad"], Proportion(same[rater], shared[rater]))
        for rater, count in choices.items()
    ]
    return RatersSummary(
        tuple(sorted(raters, key=lambda one: (-one.num_votes, one.rater))),
        Proportion(same.total() // 2, shared.total() // 2),  # each case counted for both raters
    )
