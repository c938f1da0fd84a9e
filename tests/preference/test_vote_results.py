"""What votes are summed up to, by hand."""

from dataclasses import replace

import pytest

from salmonn.preference.vote_results import Matchup, summarize_votes, wilson
from salmonn.preference.votes import LogEntry
from tests.preference.test_votes import LEFT, RIGHT, VOTE

DRAW = replace(LEFT, model="one", temperature=0.8)


@pytest.mark.parametrize(
    ("count", "of", "low", "high"),
    [
        # z = 1.96: z^2 / n = 0.38415; (0.8 + 0.19207 -+ 1.96 * sqrt(0.16 / 10 + 0.0096036)) / 1.38415.
        (8, 10, 0.4902, 0.9433),
        # From 0 to z^2 / (n + z^2) = 3.84146 / 13.84146.
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson(count, of, low, high):
    interval = wilson(count, of)
    assert interval.low == pytest.approx(low, abs=5e-5) and interval.high == pytest.approx(high, abs=5e-5)


def test_votes_summed_up():
    """One wins as A and as B, two once; LEFT has the lower Total, 0.25 against 0.75."""
    votes = [
        replace(VOTE, choice="first", pair="a.mp4"),  # one wins, and agrees with the score
        replace(VOTE, first=RIGHT, second=LEFT, choice="second", pair="b.mp4"),  # one wins, and agrees
        replace(VOTE, choice="second"),  # two wins, against the score
        replace(VOTE, choice="tie"),
        replace(VOTE, choice="both bad"),
        replace(VOTE, choice="first", first=replace(LEFT, total=0.75)),  # one wins, of equal Totals
        replace(VOTE, choice="first", first=DRAW, second=replace(DRAW, total=None)),  # a model against itself
    ]
    log = [LogEntry("", action, "v", "", "") for action in ("vote", "edit", "copy", "copy")]
    summary = summarize_votes(votes, log)
    assert summary.num_votes == 7
    assert summary.matches == (Matchup("one, temperature 0.8", "two", wins=3, losses=1, ties=1, both_bad=1),)
    assert (summary.matches[0].share.count, summary.matches[0].share.of) == (3, 4)
    # Of five votes for one of the two, A got the first, the sixth and the last.
    assert (summary.left.count, summary.left.of) == (3, 5)
    assert (summary.agreement.count, summary.agreement.of, summary.equal_totals) == (2, 3, 1)
    assert (summary.num_pairs, summary.num_edits, summary.num_copies) == (2, 1, 2)


def test_no_votes():
    summary = summarize_votes([], [])
    assert summary.matches == () and summary.agreement.of == 0 and summary.left.value == 0.0
