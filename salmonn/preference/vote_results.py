"""What votes say: who wins how often, with intervals, and whether the score agrees."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from salmonn.preference.votes import Candidate, LogEntry, Vote
from salmonn.score.stats import Interval

_Z95 = 1.959964  # of the normal distribution, two-sided 95 %


@dataclass(frozen=True)
class Proportion:
    """A part of a whole, with the interval that the true share lies in 95 times of 100."""

    count: int
    of: int

    @property
    def value(self) -> float:
        """The fraction; 0 of nothing."""
        return self.count / max(self.of, 1)

    @property
    def interval(self) -> Interval:
        """Wilson's, which is sound for few votes and for all or none (Wilson, J. Am. Stat. Assoc. 22, 1927)."""
        return wilson(self.count, self.of)


@dataclass(frozen=True)
class Matchup:
    """Two models, or two draws of one, and the votes between them.

    Args:
        first, second: their names, sorted.
        wins, losses: votes for the first, and for the second.
        ties: votes that both are alike good.
        both_bad: votes that neither is good.
    """

    first: str
    second: str
    wins: int
    losses: int
    ties: int
    both_bad: int

    @property
    def share(self) -> Proportion:
        """Of the votes for one of the two, those for the first."""
        return Proportion(self.wins, self.wins + self.losses)

    @property
    def num_votes(self) -> int:
        """All of them."""
        return self.wins + self.losses + self.ties + self.both_bad


@dataclass(frozen=True)
class VoteSummary:
    """What votes say.

    Args:
        num_votes: all of them.
        matches: between models, those with the most votes first.
        left: of the votes for one of the two, those for the caption that stood first: far from a half, the place
            decides, not the caption.
        agreement: of the votes for one of two captions whose Totals differ, those for the lower Total.
        equal_totals: votes for one of two captions of the same Total.
        num_pairs: votes that are trained on.
        num_edits, num_copies: in the log.
    """

    num_votes: int
    matches: tuple[Matchup, ...]
    left: Proportion
    agreement: Proportion
    equal_totals: int
    num_pairs: int
    num_edits: int
    num_copies: int


def summarize_votes(votes: Sequence[Vote], log: Iterable[LogEntry]) -> VoteSummary:
    """Sum up votes."""
    decided = [(vote.chosen, vote.rejected) for vote in votes if vote.chosen and vote.rejected]
    totals = [
        (chosen.total, rejected.total)
        for chosen, rejected in decided
        if chosen.total is not None and rejected.total is not None
    ]
    unlike = [(chosen, rejected) for chosen, rejected in totals if chosen != rejected]
    actions = Counter(entry.action for entry in log)
    return VoteSummary(
        num_votes=len(votes),
        matches=_list_matches(votes),
        left=Proportion(sum(vote.choice == "first" for vote in votes), len(decided)),
        agreement=Proportion(sum(chosen < rejected for chosen, rejected in unlike), len(unlike)),
        equal_totals=len(totals) - len(unlike),
        num_pairs=sum(bool(vote.pair) for vote in votes),
        num_edits=actions["edit"],
        num_copies=actions["copy"],
    )


def _list_matches(votes: Iterable[Vote]) -> tuple[Matchup, ...]:
    counts: dict[tuple[str, str], Counter[str]] = {}
    for vote in votes:
        names = sorted([name_of(vote.first), name_of(vote.second)])
        if names[0] == names[1]:
            continue  # two draws that were made alike: there is nothing to win
        outcome = name_of(vote.chosen) if vote.chosen else vote.choice
        counts.setdefault((names[0], names[1]), Counter())[outcome] += 1
    matches = [
        Matchup(first, second, count[first], count[second], count["tie"], count["both bad"])
        for (first, second), count in counts.items()
    ]
    return tuple(sorted(matches, key=lambda match: (-match.num_votes, match.first, match.second)))


def name_of(candidate: Candidate) -> str:
    """Who is compared: a model, as it was drawn from."""
    return f"{candidate.model}, temperature {candidate.temperature:g}" if candidate.temperature else candidate.model


def wilson(count: int, of: int) -> Interval:
    """The 95 % interval of a share; all from 0 to 1 where nothing was counted."""
    if not of:
        return Interval(0.0, 1.0)
    share, weight = count / of, _Z95**2 / of
    middle = (share + weight / 2) / (1 + weight)
    half = _Z95 * math.sqrt(share * (1 - share) / of + weight / (4 * of)) / (1 + weight)
    return Interval(max(0.0, middle - half), min(1.0, middle + half))
