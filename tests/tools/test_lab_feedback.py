"""Texts of simulated people, with expected values derived by hand."""

import random
from collections import Counter

import pytest

from salmonn.records import Caption, Event, Reference
from salmonn.score.judge import ScoringTask
from salmonn.synthetic.judge import RuleJudge
from salmonn.synthetic.raters import CaptionTraits

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


@pytest.fixture(scope="session")
def lab(load_tool):
    return load_tool("lab/feedback")


def traits(total):
    return CaptionTraits(seen=0, heard=0, errors=0, repetition=0, length=0, total=total)


def test_a_text_without_a_draft(lab):
    """The second event is not noticed; two clauses of 6 s each, or one within 5 s."""
    noticed = (0.9, 0.0, 0.9)
    written = lab.write_caption(REFERENCE, None, Draws(*noticed))
    assert (written.text, written.seconds) == ("A red circle appears. A blue star appears.", 12.0)
    assert lab.write_caption(REFERENCE, None, Draws(*noticed), max_seconds=5.0).seconds == 6.0


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
def test_a_draft_is_corrected(lab, draws, text, seconds):
    written = lab.write_caption(REFERENCE, (DRAFT, SCORE), Draws(0.9, 0.9, 0.9, *draws))
    assert (written.text, written.seconds, written.accepted) == (text, seconds, text == TEXT)


def test_worse_drafts_are_accepted_less(lab):
    """At the accepted loss of 0.35 half of the time; a draft that seems perfect, with sigmoid(3.5) = 0.97."""
    perfect = Caption("a.mp4", "A red circle appears. A low tone is heard. A blue star appears.")
    score = RuleJudge().judge_one(ScoringTask(REFERENCE, perfect))
    counts = Counter()
    for seed in range(300):
        rng = random.Random(seed)
        counts["perfect"] += lab.write_caption(REFERENCE, (perfect, score), rng).accepted
        counts["poor"] += lab.write_caption(REFERENCE, (DRAFT, SCORE), rng).accepted
    assert counts["perfect"] > 275 and counts["poor"] < 100
    assert lab._ACCEPTS.prefers(traits(0.35), traits(0.35)) == 0.5
