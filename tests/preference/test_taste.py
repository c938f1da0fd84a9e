"""Margins of votes by the taste of the voters: values by hand, and votes that have none."""

import math
from dataclasses import replace

import pytest

from salmonn.preference.feedback_pairs import to_comparisons
from salmonn.preference.taste import fit_taste
from tests.preference.feedback_examples import KEPT, LEFT, RIGHT

GOOD, BAD = replace(LEFT, total=None, temperature=0.0), replace(RIGHT, total=None)
assert len(GOOD.text.split()) == len(BAD.text.split())


def vote(number, first, second, choice):
    return replace(KEPT, kept_video=f"{number}.mp4", first=first, second=second, choice=choice)


def test_the_margin_is_fitted_to_votes_on_other_videos():
    """10 videos, two votes each, all for model "one", on either side; each fold is 2 videos, so 16 votes are fitted.

    With the difference m of the two models' ratings, which are m / 2 and -m / 2, the gradient of the likelihood of one
    rating is 16 (1 - sigmoid(m)), and that of the ridge 0.5 m / 2.
    """
    votes = [
        one for number in range(10) for one in (vote(number, GOOD, BAD, "first"), vote(number, BAD, GOOD, "second"))
    ]
    same = vote(0, GOOD, replace(GOOD, text="A dog yawns."), "second")  # its captions differ in nothing that counts
    taste = fit_taste([*votes, same])
    # The videos 0 and 5 are of one fold, for which `same` does not count.
    margins = [taste.margins[one] for one in (*votes[:2], *votes[10:12])]
    assert min(margins) == pytest.approx(max(margins)) and taste.margins[same] == 0.0
    assert 16 / (1 + math.exp(margins[0])) == pytest.approx(0.5 * margins[0] / 2)
    assert (taste.num_decided, taste.num_predicted) == (20, 20)
    # Wilson: from 20 / (20 + 1.96^2) = 0.8389.
    assert "Total in 0 of 21 votes), fitted to votes on other videos, predicts 100.0 % (83.9 to 100.0)" in (
        taste.describe()
    )
    assert taste.describe().endswith("the margin is the difference in this taste")
    against = replace(votes[0], choice="second")  # the margin has no sign
    comparisons, _ = to_comparisons([*votes, against], margins=fit_taste([*votes, against]).margins)
    assert len(comparisons) == 21 and comparisons[-1].margin > 1
    assert {one.margin for one in to_comparisons(votes)[0]} == {None}


def test_margins_grow_with_the_difference_in_total():
    """All votes are for the lower Total, between captions that are alike otherwise; the third has no Total."""
    totals = [(0.2, 0.3), (0.2, 0.6), (None, 0.6), (0.9, 0.1), *[(0.1 * step, 0.5) for step in range(1, 5)]] * 3
    votes = [
        vote(
            number // 2,
            replace(GOOD, total=low),
            replace(GOOD, total=high),
            "first" if low is None or low < high else "second",
        )
        for number, (low, high) in enumerate(totals)
    ]
    taste = fit_taste(votes)
    assert (taste.num_votes, taste.num_totals, taste.num_decided) == (24, 21, 21)
    first, second, third, fourth = [taste.margins[one] for one in votes[:4]]
    # Votes 1 and 2 are of one video, and so are votes 3 and 4: their weights are the same.
    assert second == pytest.approx(4 * first) and third == 0.0 and fourth > second


def test_margins_do_not_depend_on_the_order_of_summation():
    """Processors add in different orders; a resumed run, or another machine of the run, must find the same margins."""
    votes = [
        vote(number // 7, replace(GOOD, total=0.1 + number % 11 / 13), replace(BAD, total=0.3), choice)
        for number, choice in enumerate(["first", "first", "first", "second", "first"] * 14)
    ]
    other_order = [one for start in range(0, 70, 7) for one in reversed(votes[start : start + 7])]
    margins = fit_taste(votes).margins
    assert margins and margins == fit_taste(other_order).margins


@pytest.mark.parametrize("choices", [("first", "second"), ("first", "first")])
def test_votes_that_nothing_predicts_have_no_margin(choices):
    """Either model is preferred as often as the other; or always the caption on the left, which is a matter of side."""
    captions = [(GOOD, BAD), (GOOD, BAD) if choices[1] == "second" else (BAD, GOOD)]
    votes = [
        vote(number, *pair, choice) for number in range(20) for pair, choice in zip(captions, choices, strict=True)
    ]
    taste = fit_taste(votes)
    assert taste.margins == {} and taste.describe().endswith("that may be chance, so votes have no margin")
    assert taste.num_votes == 40


def test_without_votes():
    assert fit_taste([replace(KEPT, action="good", second=None, choice=None)]).describe() == (
        "there are no votes to fit margins to"
    )
