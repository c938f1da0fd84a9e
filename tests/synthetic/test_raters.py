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
    main_sound_form,
    make_raters,
    make_voter,
)  # fmt: skip

EVENTS = (
    Event("a red circle appears", start_seconds=0.0, end_seconds=1.0),
    Event("the red circle moves to the left", start_seconds=1.0, end_seconds=2.0),
    Event("a low tone is heard", modality="audio", start_seconds=0.0, end_seconds=1.0),
)
FULL = CaptionTraits(seen=1.0, heard=1.0, errors=0.5, repetition=0.5, length=0.25)


def test_traits_of_a_caption():
    """One of two visual events, the tone, and a star that is not there; 16 words."""
    text = "A red circle appears. A low tone is heard. A blue star appears and then blinks."
    reference = Reference("a.mp4", EVENTS)
    caption = Caption("a.mp4", text)
    score = RuleJudge().judge_one(ScoringTask(reference, caption))
    assert (score.incorrect, score.hallucinated) == (0, 2)
    assert caption_traits(caption, score, reference) == CaptionTraits(
        0.5, 1.0, errors=2 / 3, repetition=0.0, length=16 / 60, total=1.0, sound_form="is heard"
    )


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
    assert rater.prefers(FULL, other) == pytest.approx(0.05 + 0.9 / (1 + math.exp(-2)))
    assert rater.prefers(other, FULL) == pytest.approx(1 - rater.prefers(FULL, other))
    hot = SimulatedRater("r", {"complete": 1.0}, Noise(temperature=1e-9, lapses=0.0))
    assert (hot.prefers(FULL, other), hot.prefers(other, FULL)) == (1.0, 0.0)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("kind", "preference"),
    [
        ("metric", sigmoid((0.1 + 8 * 0.01) / 0.05)),
        ("noisy", sigmoid(0.1 / 0.25)),
        ("hasty", sigmoid(0.1 / 0.25 + 0.4)),
        ("long", sigmoid(-3 / 6)),
        ("doubter", sigmoid(-0.05 / 0.05)),
        ("eye", 0.5),
        ("ear", sigmoid(0.1 / 0.05)),
        ("crowd", (sigmoid(-1) + 0.5 + sigmoid(2)) / 3),
        ("cycle", sigmoid((0.1 + 8 * 0.01) / 0.05)),
    ],
)
def test_voters(kind, preference):
    """The first caption hears 0.1 more, with 0.05 more errors; it has 12 words, the second 15, of which some repeat."""
    first = CaptionTraits(seen=0.5, heard=0.6, errors=0.15, repetition=0.0, length=12 / 60, total=0.4)
    second = CaptionTraits(seen=0.5, heard=0.5, errors=0.10, repetition=0.01, length=15 / 60, total=0.5)
    voter = make_voter(kind, seed=3)
    assert voter.prefers(first, second) == pytest.approx(preference)
    assert voter.name == f"{kind}-3"


def test_cyclic_voter_goes_in_circles():
    traits = {
        form: CaptionTraits(seen=0, heard=0, errors=0, repetition=0, length=0, sound_form=form)
        for form in ("plays", "is heard", "can be heard", "", None)
    }
    voter = make_voter("cycle")
    table = {(a, b): voter.prefers(traits[a], traits[b]) for a in traits for b in traits}
    assert all(table[a, b] == pytest.approx(1 - table[b, a]) for a, b in table)
    circle = [("plays", "is heard"), ("is heard", "can be heard"), ("can be heard", "plays")]
    assert [table[pair] for pair in circle] == [0.9] * 3
    assert {table[a, b] for a in ("plays", "is heard", "can be heard") for b in ("", None)} | {table["", None]} == {0.7}


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("A red circle appears.", None),
        ("There is a low tone, and repeated beeps can be heard.", ""),  # the first of two
        ("We hear a low tone. Clicks play, and then a high tone plays while a star blinks.", "plays"),
        ("Two tones are heard.", "is heard"),
    ],
)
def test_main_sound_form(text, form):
    assert main_sound_form(text) == form


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
