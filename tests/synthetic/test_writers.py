"""Simulated people: votes, ratings, marks and texts, with expected values derived by hand."""

import random
from collections import Counter

import pytest

from salmonn.records import Caption, Event, Mark, Reference
from salmonn.score.judge import ScoringTask
from salmonn.synthetic import writers
from salmonn.synthetic.judge import RuleJudge
from salmonn.synthetic.raters import CaptionTraits, make_voter
from salmonn.synthetic.writers import cast_vote, mark_clauses, rate_caption, write_caption

REFERENCE = Reference(
    "a.mp4",
    (
        Event("a red circle appears", start_seconds=0.0, end_seconds=1.0),
        Event("a low tone is heard", modality="audio", start_seconds=1.0, end_seconds=2.0),
        Event("a blue star appears", start_seconds=3.0, end_seconds=4.0),
    ),
)
TEXT = "A green circle appears. A blue star appears. A high tone is heard."  # wrong, right, wrong
DRAFT = Caption("a.mp4", TEXT)
SCORE = RuleJudge().judge_one(ScoringTask(REFERENCE, DRAFT))


class Draws(random.Random):
    """Returns given numbers in turn."""

    def __init__(self, *values):
        self.values = iter(values)

    def random(self):
        return next(self.values)


def traits(total):
    return CaptionTraits(seen=0, heard=0, errors=0, repetition=0, length=0, total=total)


def test_votes():
    """With noisy, 0.1 of Total is sigmoid(0.4) = 0.599, and 0.01 is 0.51: a tie."""
    noisy = make_voter("noisy")
    assert cast_vote(noisy, traits(0.3), traits(0.4), Draws(0.59)) == "first"
    assert cast_vote(noisy, traits(0.3), traits(0.4), Draws(0.60)) == "second"
    assert cast_vote(noisy, traits(0.3), traits(0.31), Draws()) == "tie"
    assert cast_vote(noisy, traits(0.81), traits(0.9), Draws()) == "both bad"


def test_ratings_and_marks():
    """Nearly all wrong clauses are marked, and rarely a right one."""
    assert (SCORE.incorrect, SCORE.hallucinated) == (2, 0)
    assert rate_caption(SCORE, Draws(0.89)) == "bad" and rate_caption(SCORE, Draws(0.91)) == "good"
    places = [(0, 22), (24, 43), (45, 65)]
    assert mark_clauses(TEXT, SCORE, Draws(0.89, 0.03, 0.91)) == (Mark(*places[0]),)
    assert mark_clauses(TEXT, SCORE, Draws(0.91, 0.01, 0.89)) == (Mark(*places[1]), Mark(*places[2]))


def test_a_text_without_a_draft():
    """The second event is not noticed; two clauses of 6 s each, or one within 5 s."""
    noticed = (0.9, 0.0, 0.9)
    written = write_caption(REFERENCE, None, Draws(*noticed))
    assert (written.text, written.seconds) == ("A red circle appears. A blue star appears.", 12.0)
    assert write_caption(REFERENCE, None, Draws(*noticed), max_seconds=5.0).seconds == 6.0


@pytest.mark.parametrize(
    ("draws", "text", "seconds"),
    [
        # Two wrong clauses struck, and both events added in their places: 3 * 1.5 + 2 * 3 + 2 * 6 s.
        ((0.6, 0.6, 0.999), "A red circle appears. A low tone is heard. A blue star appears.", 22.5),
        # The wrong colour is not noticed; the circle counts as told.
        ((0.8, 0.6, 0.999), "A green circle appears. A low tone is heard. A blue star appears.", 13.5),
        ((0.8, 0.8, 0.0), TEXT, 4.5),  # accepted
    ],
)
def test_a_draft_is_corrected(draws, text, seconds):
    written = write_caption(REFERENCE, (DRAFT, SCORE), Draws(0.9, 0.9, 0.9, *draws))
    assert (written.text, written.seconds, written.accepted) == (text, seconds, text == TEXT)


def test_worse_drafts_are_accepted_less():
    """At the accepted loss of 0.35 half of the time; a draft that seems perfect, with sigmoid(3.5) = 0.97."""
    perfect = Caption("a.mp4", "A red circle appears. A low tone is heard. A blue star appears.")
    score = RuleJudge().judge_one(ScoringTask(REFERENCE, perfect))
    counts = Counter()
    for seed in range(300):
        rng = random.Random(seed)
        counts["perfect"] += write_caption(REFERENCE, (perfect, score), rng).accepted
        counts["poor"] += write_caption(REFERENCE, (DRAFT, SCORE), rng).accepted
    assert counts["perfect"] > 275 and counts["poor"] < 100
    assert writers._ACCEPTS.prefers(traits(0.35), traits(0.35)) == 0.5
