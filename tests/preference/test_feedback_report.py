"""The report on people's feedback: win rates, agreement, use of captions, and ratings of models."""

import math
from dataclasses import replace

import numpy as np
import pytest

from salmonn.preference.feedback import Candidate
from salmonn.preference.feedback_report import Matchup, Proportion, summarize_feedback, summarize_raters
from salmonn.preference.ratings import fit_ratings
from tests.preference.feedback_examples import KEPT, LEFT, RIGHT, VOTE, rate


def test_the_report_on_the_command_line(votes, call, tmp_path):
    code, out, _ = call("votes", votes.folder)
    rows = [line.split() for line in out.splitlines()]
    assert code == 0 and "3 votes of 2 raters" in out
    assert [[cell for cell in row if cell != "│"][:4] for row in rows if "ann" in row or "bob" in row] == [
        ["ann", "2", "0", "0"],
        ["bob", "1", "0", "0"],
    ]
    assert "same two captions: 100.0 % of 1 (20.7 to 100.0)" in out  # Wilson: n / (n + 1.96^2) = 1 / 4.8415
    code, _, err = call("votes", tmp_path)
    assert code == 2 and "has no feedback.jsonl" in err


def test_agreement_of_raters():
    """Ann and Bob decided two common pairs and agree on one; Cy shares one with each, and agrees with Ann."""
    ann, bob, cy = (replace(VOTE, rater=name) for name in ("ann", "bob", "cy"))
    swapped = {"first": RIGHT, "second": LEFT}
    votes = [
        replace(ann, choice="first"),
        replace(bob, choice="second", **swapped),  # LEFT again, on the other side
        replace(ann, video="b.mp4", choice="second"),
        replace(ann, video="b.mp4", choice="first"),  # changed her mind: the last vote counts
        replace(bob, video="b.mp4", choice="second"),
        replace(cy, video="b.mp4", choice="first"),
        replace(cy, choice="tie"),
        *[replace(one, second=LEFT, choice="first") for one in (ann, bob)],  # equal captions
        replace(cy, choice="both bad", start_seconds=1.0),
        replace(VOTE, choice="first"),  # without an id
    ]
    summary = summarize_raters(votes)
    assert [(one.rater, one.num_votes, one.num_ties, one.num_both_bad) for one in summary.raters] == [
        ("ann", 4, 0, 0), ("bob", 3, 0, 0), ("cy", 3, 1, 1), ("", 1, 0, 0),
    ]  # fmt: skip
    agreement = {one.rater: (one.agreement.count, one.agreement.total) for one in summary.raters}
    assert agreement == {"ann": (2, 3), "bob": (1, 3), "cy": (1, 2), "": (0, 0)}
    assert (summary.agreement.count, summary.agreement.total) == (2, 4)


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    [
        # z = 1.96: z^2 / n = 0.38415; (0.8 + 0.19207 -+ 1.96 * sqrt(0.16 / 10 + 0.0096036)) / 1.38415.
        (8, 10, 0.4902, 0.9433),
        # From 0 to z^2 / (n + z^2) = 3.84146 / 13.84146.
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_interval(count, total, low, high):
    interval = Proportion(count, total).interval
    assert interval.low == pytest.approx(low, abs=5e-5) and interval.high == pytest.approx(high, abs=5e-5)


ONE_SAMPLED = replace(LEFT, model="one", temperature=0.8)


def test_summary():
    """One wins as A and as B, two once; LEFT has the lower Total, 0.25 against 0.75."""
    feedback = [
        replace(VOTE, choice="first", kept_video="a.mp4"),  # one wins, and agrees with the Totals
        replace(VOTE, first=RIGHT, second=LEFT, choice="second", kept_video="b.mp4"),  # one wins, and agrees
        replace(VOTE, choice="second"),  # two wins, against the Totals
        replace(VOTE, choice="tie"),
        replace(VOTE, choice="both bad"),
        replace(VOTE, choice="first", first=replace(LEFT, total=0.75)),  # one wins, of equal Totals
        replace(
            VOTE, choice="first", first=ONE_SAMPLED, second=replace(ONE_SAMPLED, total=None)
        ),  # two samples of one model
        rate("good", "a"), rate("bad", "b"), rate("edit", "a", text="c"), rate("copy", "a"), rate("copy", "b"),
        replace(VOTE, action="shown"), replace(VOTE, action="shown"), replace(VOTE, action="shown", tab="write"),
    ]  # fmt: skip
    summary = summarize_feedback(feedback)
    assert (summary.num_votes, summary.num_compared) == (7, 2)
    assert summary.matchups == (Matchup("one (temperature 0.8)", "two", wins=3, losses=1, ties=1, both_bad=1),)
    assert (summary.matchups[0].win_rate.count, summary.matchups[0].win_rate.total) == (3, 4)
    # Of five votes for one of the two, A got the first, the sixth and the last.
    assert (summary.first_preferred.count, summary.first_preferred.total) == (3, 5)
    assert (summary.agreement.count, summary.agreement.total, summary.num_equal_totals) == (2, 3, 1)
    assert summary.num_comparisons == 2 + 1 + 1  # votes, ratings, the edit
    assert (summary.num_ratings, summary.num_edits, summary.num_copies) == (2, 1, 2)


def test_no_feedback():
    summary = summarize_feedback([])
    assert summary.matchups == () and summary.agreement.total == 0 and summary.first_preferred.value == 0.0


def test_use_of_captions():
    """Of four captions shown, one was copied; of three drafts, one was taken as it is, one edited and one left."""
    draft = "A dog barks, and a cat sleeps."
    written = {"tab": "write", "seconds": 8.0}
    no_draft = Candidate("", "", "Describe it.")
    feedback = [
        *[rate("shown", "", tab="caption")] * 4, rate("copy", "", tab="caption"),
        rate("good", "a", tab="caption"), rate("good", "b", tab="caption"), rate("bad", "c", tab="caption"),
        *[rate("shown", "", tab="write")] * 3,
        replace(rate("accept", draft, **written), text=draft, total=0.5),
        replace(rate("edit", draft, **written), text="A dog barks. A bird sings.", total=0.25, seconds=20.0),
        replace(rate("shown", "", tab="write"), first=no_draft),
        replace(rate("finish", "", **written), first=no_draft, text="A dog."),
        KEPT,
    ]  # fmt: skip
    nothing, model = summarize_feedback(feedback).models
    assert (nothing.name, nothing.num_texts, nothing.seconds) == ("(no draft)", 1, 8.0)
    assert nothing.persistence is None and nothing.total is None and nothing.accepted.total == 0
    counts = [(one.count, one.total) for one in (model.copied, model.rated_good, model.accepted, model.edited)]
    assert counts == [(1, 4), (2, 3), (1, 3), (1, 3)]
    # One of two clauses is left after the edit, and both without one.
    assert (model.persistence, model.seconds, model.total, model.num_texts) == (0.75, 14.0, 0.375, 2)


def test_ratings_by_hand():
    """Two models, one rater each: A wins 3 of 4 on either side, at equal lengths; the ridge pulls the logit to 0."""
    one, two = Candidate("one", "a b", "p"), Candidate("two", "c d", "p")
    wins = ["first", "first", "first", "second"]
    votes = [replace(VOTE, first=one, second=two, choice=choice, rater=str(n)) for n, choice in enumerate(wins)]
    swapped = {"first": "second", "second": "first"}
    votes += [replace(one_, first=two, second=one, choice=swapped[one_.choice], rater="x") for one_ in votes]
    ratings = fit_ratings(votes)
    # theta and -theta: 8 (6 / 8 - sigmoid(2 theta)) = 0.5 theta.
    theta = (ratings.models["one"].value - 1000) * math.log(10) / 400
    assert 8 * (0.75 - 1 / (1 + math.exp(-2 * theta))) == pytest.approx(0.5 * theta, abs=1e-6)
    assert list(ratings.models) == ["one", "two"] and ratings.models["two"].value == pytest.approx(
        2000 - ratings.models["one"].value
    )
    assert ratings.side.value == pytest.approx(0, abs=1e-9) and ratings.length.value == pytest.approx(0, abs=1e-9)
    assert (ratings.num_votes, ratings.num_raters) == (8, 5)
    assert ratings.models["one"].low < ratings.models["one"].value < ratings.models["one"].high
    assert fit_ratings(votes[4:]).side.high == math.inf  # of one rater
    assert fit_ratings([replace(VOTE, first=replace(one, finished=False))]) is None


def test_few_raters_have_wide_intervals():
    """Of those who agree by chance, too. A model that only met itself has no rating; no id is one rater."""
    one, two = Candidate("one", "a b", "p"), Candidate("two", "c d", "p")
    twin = fit_ratings([replace(VOTE, first=one, second=two, choice="first", rater=name) for name in "ab"])
    # Independent votes: 1 / sqrt(0.5 + 2 p (1 - p)) at most, for side; t of one degree of freedom is 12.7062.
    chance = 1 / (1 + math.exp(-twin.side.value - 2 * (twin.models["one"].value - 1000) * math.log(10) / 400))
    fisher = 2 * chance * (1 - chance)  # of side, "one" and minus "two", which are equal
    curvature = np.full((3, 3), fisher) + 0.5 * np.eye(3)
    error = math.sqrt(np.linalg.inv(curvature)[0, 0])
    assert twin.side.high - twin.side.value == pytest.approx(12.7062 * error, rel=1e-4)
    itself = [replace(VOTE, first=one, second=one, choice=choice) for choice in ("first", "first", "second")]
    ratings = fit_ratings(itself)
    assert ratings.models == {} and ratings.side.value > 0
    assert ratings.num_raters == 1 and ratings.side.high == math.inf


def test_effects_of_side_and_length():
    """One model against another of equal captions but for a word: ties are half a win, and words are preferred."""
    short, long = (Candidate(model, text, "p", total=0.5) for model, text in (("one", "a b"), ("two", "c d e")))
    ties = [replace(VOTE, first=short, second=long, choice=choice) for choice in ("tie", "both bad")]
    tied = fit_ratings(ties)
    assert tied.side.value == tied.length.value == 0 and tied.models["one"].value == 1000
    votes = [replace(VOTE, first=short, second=long, choice="first")] * 3
    first = fit_ratings([*votes, *(replace(one, first=long, second=short) for one in votes)])  # always A
    # 6 (1 - sigmoid(side)) = 0.5 side.
    assert 6 / (1 + math.exp(first.side.value)) == pytest.approx(0.5 * first.side.value, abs=1e-6)
    assert first.length.value == pytest.approx(0, abs=1e-9)
    same = [replace(one, second=replace(long, model="one"), choice="second") for one in votes]
    longer = fit_ratings([*same, *(replace(one, first=one.second, second=one.first, choice="first") for one in same)])
    # Of 10 words a tenth: 6 * 0.1 (1 - sigmoid(0.1 length)) = 0.5 length.
    assert 0.6 / (1 + math.exp(0.1 * longer.length.value)) == pytest.approx(0.5 * longer.length.value, abs=1e-6)
    # At equal Total, the votes for the lower one say nothing about length.
    better = [replace(one, first=replace(one.first, total=0.9), second=replace(one.second, total=0.1)) for one in same]
    at_equal = fit_ratings(
        [*better, *(replace(one, first=one.second, second=one.first, choice="first") for one in better)]
    )
    assert at_equal.length.value < longer.length.value / 2
