"""Reports on people's feedback: votes between models, agreement with the metric, and raters."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from salmonn.preference.feedback import Feedback
from salmonn.preference.feedback_pairs import to_comparisons
from salmonn.score.stats import Interval, wilson_interval


@dataclass(frozen=True)
class Proportion:
    """`count` of `total` votes, with the 95 % interval of the true proportion."""

    count: int
    total: int

    @property
    def value(self) -> float:
        """The proportion; 0 without votes."""
        return self.count / max(self.total, 1)

    @property
    def interval(self) -> Interval:
        """Wilson's interval; from 0 to 1 without votes."""
        return wilson_interval(self.count, self.total)


@dataclass(frozen=True)
class Matchup:
    """The votes between two models, or between two temperatures of one.

    Args:
        first, second: names of the candidates, sorted.
        wins, losses: votes for the first and for the second.
        ties: votes that both are equally good.
        both_bad: votes that neither is good.
    """

    first: str
    second: str
    wins: int
    losses: int
    ties: int
    both_bad: int

    @property
    def win_rate(self) -> Proportion:
        """Votes for the first candidate, among the votes for one of the two."""
        return Proportion(self.wins, self.wins + self.losses)


@dataclass(frozen=True)
class FeedbackSummary:
    """Summary of all feedback.

    Args:
        num_votes: number of votes.
        matchups: matchups, most votes first.
        first_preferred: votes for caption A among the votes for A or B; far from one half, there is position bias.
        agreement: votes for the caption with the lower Total, among the votes for A or B with different Totals.
        num_equal_totals: votes for A or B with equal Totals.
        num_comparisons: comparisons to train on that all feedback makes.
        num_ratings, num_edits, num_copies: captions rated good or bad, texts of people, and copies.
        raters: votes by person.
    """

    num_votes: int
    matchups: tuple[Matchup, ...]
    first_preferred: Proportion
    agreement: Proportion
    num_equal_totals: int
    num_comparisons: int
    num_ratings: int
    num_edits: int
    num_copies: int
    raters: "RatersSummary"


def summarize_feedback(feedback: Sequence[Feedback]) -> FeedbackSummary:
    """Summarize feedback."""
    votes = [one for one in feedback if one.action == "vote"]
    decided = [(vote.chosen, vote.rejected) for vote in votes if vote.chosen and vote.rejected]
    totals = [
        (chosen.total, rejected.total)
        for chosen, rejected in decided
        if chosen.total is not None and rejected.total is not None
    ]
    different = [(chosen, rejected) for chosen, rejected in totals if chosen != rejected]
    actions = Counter(one.action for one in feedback)
    return FeedbackSummary(
        num_votes=len(votes),
        matchups=_count_matchups(votes),
        first_preferred=Proportion(sum(vote.choice == "first" for vote in votes), len(decided)),
        agreement=Proportion(sum(chosen < rejected for chosen, rejected in different), len(different)),
        num_equal_totals=len(totals) - len(different),
        num_comparisons=len(to_comparisons(feedback)[0]),
        num_ratings=actions["good"] + actions["bad"],
        num_edits=sum(bool(one.own_text) for one in feedback),
        num_copies=actions["copy"],
        raters=summarize_raters(votes),
    )


def _count_matchups(votes: Sequence[Feedback]) -> tuple[Matchup, ...]:
    counts: dict[tuple[str, str], Counter[str]] = {}
    for vote in votes:
        first, second = sorted(one.name for one in vote.captions)
        if first != second:  # two samples of one candidate have no winner
            outcome = vote.chosen.name if vote.chosen else vote.choice or ""
            counts.setdefault((first, second), Counter())[outcome] += 1
    ordered = sorted(counts.items(), key=lambda item: (-item[1].total(), item[0]))
    return tuple(
        Matchup(first, second, count[first], count[second], count["tie"], count["both bad"])
        for (first, second), count in ordered
    )


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


def summarize_raters(votes: Sequence[Feedback]) -> RatersSummary:
    """Count votes by rater, and compare the preferences of each two raters for the same two captions of a clip.

    Of several votes of a rater on the same captions, the last counts. Votes without an id are compared with none.
    """
    # Two captions of a clip -> rater -> preferred text.
    preferences: dict[tuple[object, ...], dict[str, str]] = {}
    choices: dict[str, Counter[str]] = {}
    for vote in votes:
        choices.setdefault(vote.rater, Counter())[vote.choice or ""] += 1
        if vote.rater and vote.chosen:
            texts = frozenset(one.text for one in vote.captions)
            key = (vote.kept_video or vote.video, vote.start_seconds, vote.end_seconds, texts)
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
