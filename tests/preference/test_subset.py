"""Choice of a subset of pairs, with values derived by hand."""

import math
from dataclasses import replace

import pytest

from salmonn.preference.subset import SubsetConfig, rank_pairs
from salmonn.records import Comparison


def pair(video, margin, truth=""):
    return Comparison(video, "describe", f"good {video} {margin}", "bad", truth or f"words of {video}", margin=margin)


def ranks(pairs, *, qualities=None, **options):
    return [one.rank for one in rank_pairs(pairs, SubsetConfig(**options), qualities=qualities)]


def test_by_hand():
    """Two pairs of clip a and one of clip b; the texts share no word that is not in all of them.

    Margins 3, 2, 1: mean 2, deviation sqrt(2/3): z-scores 1.2247449, 0, -1.2247449. At first every distance is sqrt 2,
    whose term is log 1 = 0, and the first pair is chosen. The second pair of its clip is then at distance 0, counted as
    0.05: log(0.05 / 1.4142136) = -3.3423060. Clip b is still at sqrt 2: 0 - 1.22 is above 0 - 3.34.
    """
    pairs = [pair("a", 3.0, "star rises"), pair("a", 2.0, "star rises"), pair("b", 1.0, "bell rings")]
    first, second, third = rank_pairs(pairs, SubsetConfig(keep=2))
    assert (first.rank, second.rank, third.rank) == (1, None, 2)
    assert [first.gain, second.gain, third.gain] == pytest.approx([1.2247449, 0.0, -1.2247449])
    assert [first.diversity, second.diversity, third.diversity] == pytest.approx([0.0, -3.3423060, 0.0], abs=1e-6)
    assert ranks(pairs, keep=2, diversity_weight=0.0) == [1, 2, None]  # the margin alone
    # 3.3423060 w = 1.2247449 at w = 0.3664: below it the second pair of the clip comes first.
    assert ranks(pairs, keep=2, diversity_weight=0.36) == [1, 2, None]
    assert ranks(pairs, keep=2, diversity_weight=0.37) == [1, None, 2]


def test_distance_is_that_of_tf_idf_vectors():
    """Four texts; "red" is in two of them (log 2), the other words in one (log 4)."""
    texts = ["red star", "red moon", "blue sun", "green sea"]
    pairs = [pair(str(number), 4.0 - number, text) for number, text in enumerate(texts)]
    values = rank_pairs(pairs, SubsetConfig(keep=1))
    cosine = math.log(2) ** 2 / (math.log(2) ** 2 + math.log(4) ** 2)  # 0.2
    expected = 0.5 * math.log(2 - 2 * cosine) - 0.5 * math.log(2)
    assert values[1].diversity == pytest.approx(expected) and expected == pytest.approx(0.5 * math.log(0.8))
    assert values[2].diversity == values[3].diversity == pytest.approx(0.0)


def test_votes_on_one_clip_are_at_distance_0():
    """Without a ground truth, as votes often are; the words of a clip are those of all answers about it.

    The clips: "red star blue moon", twice, "red moon" and the same words again in another video. "red" and "moon" are
    in all four texts and count 0, "star" and "blue" are in those of clip a only.
    """
    votes = [
        Comparison("a", "describe", "red star", "blue moon"),
        Comparison("a", "describe", "blue moon", "star red moon"),
        Comparison("b", "describe", "red", "moon"),
        Comparison("c", "describe", "moon", "red"),
    ]
    first, second, third, fourth = rank_pairs(votes, SubsetConfig(keep=2))
    assert [first.rank, second.rank, third.rank, fourth.rank] == [1, None, 2, None]
    assert second.diversity == pytest.approx(math.log(0.05 / math.sqrt(2)))
    assert third.diversity == fourth.diversity == 0.0  # no word in common that counts
    part = Comparison("a", "describe", "green", "sun", start_seconds=3.0)
    assert ranks([votes[0], part, votes[2]], keep=2) == [1, 2, None]  # parts of a video are different clips
    for other in ({"modality": "audio"}, {"audio": "other.wav"}):  # and so is what is only heard, or heard with it
        assert ranks([votes[0], votes[1], replace(part, start_seconds=None, **other)], keep=2) == [1, None, 2]
    # Equal words elsewhere are at distance 0 too.
    elsewhere = [replace(votes[0], video="x"), replace(votes[0], video="y"), votes[2]]
    assert ranks(elsewhere, keep=2) == [1, None, 2]


def test_quality_decides_between_equal_margins():
    pairs = [pair("a", 1.0), pair("b", 1.0), pair("c", 1.0)]
    assert ranks(pairs, keep=1, qualities=[-0.3, 0.0, -0.1]) == [None, 1, None]
    assert ranks(pairs, keep=1, qualities=[-0.3, 0.0, -0.1], quality_weight=0.0) == [1, None, None]  # the first
    assert ranks(pairs, keep=1) == [1, None, None]


def test_unknown_margins_count_as_average():
    # Margins 3 and 1 have z-scores 1 and -1, the unknown one 0.
    assert ranks([pair("a", 1.0), pair("b", None), pair("c", 3.0)], keep=2) == [None, 2, 1]


@pytest.mark.parametrize(("keep", "number"), [(None, 10), (0.25, 2), (0.01, 1), (0.99, 10), (1, 1), (4, 4), (50, 10)])
def test_number_of_pairs(keep, number):
    assert SubsetConfig(keep=keep).num_pairs(10) == number
    assert (
        sum(one.rank is not None for one in rank_pairs([pair(str(i), i) for i in range(10)], SubsetConfig(keep)))
        == number
    )


def test_no_pairs():
    assert rank_pairs([], SubsetConfig(keep=3)) == []


@pytest.mark.parametrize("keep", [0, -1, 1.5, math.inf, math.nan])
def test_keep_is_a_fraction_or_a_number(keep):
    with pytest.raises(ValueError, match=r"subset\.keep must be a fraction between 0 and 1 or a whole number"):
        SubsetConfig(keep=keep)
