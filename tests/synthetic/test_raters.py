"""Simulated raters: utilities derived by hand, preferences, mixtures and drawn votes."""

import math
from collections import Counter

import pytest

from salmonn.records import Caption, Event, Reference
from salmonn.score.judge import ScoringTask
from salmonn.synthetic.judge import RuleJudge
from salmonn.synthetic.raters import (
    GROUPS,
    NOISE,
    CaptionTraits,
    Noise,
    SimulatedRater,
    caption_traits,
    draw_votes,
    group_utility,
    make_raters,
)  # fmt: skip

EVENTS = (
    Event("a red circle appears", start_seconds=0.0, end_seconds=1.0),
    Event("the red circle moves to the left", start_seconds=1.0, end_seconds=2.0),
    Event("a low tone is heard", modality="audio", start_seconds=0.0, end_seconds=1.0),
)
FULL = CaptionTraits(seen=1.0, heard=1.0, errors=0.5, repetition=0.5, length=0.25)


def test_traits_of_a_caption():
    """One of two visual events, the tone, and a star that is not there; 15 words."""
    text = "A red circle appears. A low tone is heard. A blue star appears and then blinks."
    reference = Reference("a.mp4", EVENTS)
    score = RuleJudge().judge_one(ScoringTask(reference, Caption("a.mp4", text)))
    assert (score.incorrect, score.hallucinated) == (0, 2)
    assert caption_traits(score, reference) == CaptionTraits(0.5, 1.0, errors=2 / 3, repetition=0.0, length=16 / 60)


@pytest.mark.parametrize(
    ("group", "utility"),
    [
        ("complete", 2 + 2 - 0.5 - 0.5),
        ("short", 0.7 + 0.7 - 0.25 - 1.0),
        ("sound", 0.3 + 4 - 0.25),
        ("careful", 0.4 + 0.4 - 2.0),
        ("picture", 4 + 0.3 - 0.25),
    ],
)
def test_utility_of_each_group(group, utility):
    assert group_utility(group, FULL) == pytest.approx(utility) and group in GROUPS


def test_preference_is_a_sigmoid_with_lapses():
    """Utilities 3 and 2.4 differ by 0.6, twice the temperature."""
    rater = SimulatedRater("r", {"complete": 1.0}, Noise(temperature=0.3, lapses=0.1))
    other = CaptionTraits(seen=0.7, heard=1.0, errors=0.5, repetition=0.5, length=0.25)
    assert rater.preference(FULL, other) == pytest.approx(0.05 + 0.9 / (1 + math.exp(-2)))
    assert rater.preference(other, FULL) == pytest.approx(1 - rater.preference(FULL, other))
    hot = SimulatedRater("r", {"complete": 1.0}, Noise(temperature=1e-9, lapses=0.0))
    assert (hot.preference(FULL, other), hot.preference(other, FULL)) == (1.0, 0.0)


def test_raters_of_groups_and_mixtures():
    raters = make_raters(5, groups=("short", "sound"), noise="clean")
    assert [rater.name for rater in raters] == ["short-0", "sound-1", "short-2", "sound-3", "short-4"]
    assert all(rater.shares == {rater.name.split("-")[0]: 1.0} and rater.noise is NOISE["clean"] for rater in raters)
    mixed = make_raters(200, groups=tuple(GROUPS), mixed=True)
    assert all(sum(rater.shares.values()) == pytest.approx(1) for rater in mixed)
    # A Dirichlet distribution has equal means, 1/5 here; the largest share of this one is 0.66 on average.
    assert sum(rater.shares["short"] for rater in mixed) / 200 == pytest.approx(0.2, abs=0.06)
    assert 0.55 < sum(max(rater.shares.values()) for rater in mixed) / 200 < 0.77
    assert mixed[:3] == make_raters(3, groups=tuple(GROUPS), mixed=True)  # by index, not by number
    with pytest.raises(ValueError, match="unknown group 'loud': choose from complete, short"):
        make_raters(1, groups=("loud",))


def test_votes_follow_the_rater():
    """Without noise, the better of two captions always wins, on either side; clips with one caption have no votes."""
    best, worst = FULL, CaptionTraits(seen=0.0, heard=0.0, errors=1.0, repetition=0.0, length=0.25)
    clips = [{"one": best}, {"good": best, "bad": worst}, {"bad": worst, "good": best, "good too": best}]
    (rater,) = make_raters(1, groups=("complete",), noise="clean")
    votes = draw_votes(rater, clips, number=300)
    assert votes == draw_votes(rater, clips, number=300) != draw_votes(rater, clips, number=300, seed=1)
    assert {vote.clip for vote in votes} == {1, 2}
    traits = [list(captions.values()) for captions in clips]
    decided = [vote for vote in votes if traits[vote.clip][vote.first] != traits[vote.clip][vote.second]]
    assert all(vote.prefers_first == (traits[vote.clip][vote.first] is best) for vote in decided)
    sides = Counter(vote.prefers_first for vote in decided)
    assert min(sides.values()) > 80
    with pytest.raises(ValueError, match="no clip has two different captions"):
        draw_votes(rater, clips[:1], number=1)
