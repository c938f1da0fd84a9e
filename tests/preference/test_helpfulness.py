"""Does help follow the metric? Correlations and differences, by hand and against scipy."""

import html
import random
import re
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import spearmanr, ttest_rel

from salmonn.preference.feedback import Candidate, Feedback
from salmonn.preference.helpfulness import NO_DRAFT, summarize_help
from salmonn.preference.ratings import fit_ratings
from salmonn.records import JudgeInfo, Score
from salmonn.score.formats import write_scores
from tests.preference.feedback_examples import VOTE

DRAFT = "A dog barks."


def write(model, rater, *, total=None, final=None, seconds=None, video="a.mp4", text="A cat sleeps."):
    """A text that a person made of a model's draft, or without one."""
    draft = Candidate(model, DRAFT if model else "", "Describe it.", total=total)
    action = "finish" if not model else "accept" if text == DRAFT else "edit"
    return Feedback(
        "2026-12-01", action, video, draft, text=text, total=final, seconds=seconds, tab="write", rater=rater
    )


def find(correlations, measure, metric="total", level="caption"):
    (one,) = [one for one in correlations if (one.measure, one.metric, one.level) == (measure, metric, level)]
    return one


def test_correlation_over_captions_by_hand():
    """Ten drafts; the final Totals have the same order but for two neighbours: 1 - 6 * 2 / (10 * 99)."""
    finals = [0.1, 0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    texts = [
        write("one", f"r{index % 5}", total=index / 10, final=final, seconds=float(100 - index))
        for index, final in enumerate(finals)
    ]
    help_ = summarize_help(texts, None)
    one = find(help_.correlations, "final Total")
    assert one.rho.value == pytest.approx(1 - 12 / 990) and (one.number, one.num_raters) == (10, 5)
    assert one.rho.low < one.rho.value and one.rho.high == 1.0
    # At least the error of independent captions for 0.8 of the correlation, t of 4 degrees of freedom.
    rho = 0.8 * (1 - 12 / 990)
    assert one.rho.value - one.rho.low >= 2.7764 * (1 - rho**2) * np.sqrt((1 + rho**2 / 2) / 7) - 1e-4
    assert find(help_.correlations, "seconds").rho.value == pytest.approx(-1)
    assert help_.metrics == {"one": {"total": pytest.approx(0.9)}}  # of one caption, the last one's
    # No draft was accepted, nine texts are too few, and so is one rater.
    assert find(help_.correlations, "accepted").rho is None
    assert find(summarize_help(texts[:9], None).correlations, "seconds").rho is None
    alone = [replace(one, rater="x") for one in texts]
    assert find(summarize_help(alone, None).correlations, "seconds").rho is None


def test_interval_is_over_raters():
    """The same figures from two people who contradict each other leave nothing certain."""
    up = [write("one", "a", total=index / 10, final=index / 10) for index in range(10)]
    down = [write("one", "b", total=index / 10, final=1 - index / 10) for index in range(10)]
    many = [replace(one, rater=f"{one.rater}{index}") for index, one in enumerate(up + down)]
    few = find(summarize_help(up + down, None).correlations, "final Total").rho
    assert (few.low, few.high) == (-1.0, 1.0)
    spread = find(summarize_help(many, None).correlations, "final Total").rho
    assert spread.value == pytest.approx(few.value) and -1 < spread.low < spread.high < 1


def test_correlation_over_models():
    """Three models in the order of their Totals, by the means of the final Totals; two models are too few."""
    texts = [
        write(model, rater, total=total, final=total / 2 + shift, video=f"{rater}.mp4")
        for model, total in (("one", 0.2), ("two", 0.4), ("three", 0.6))
        for rater, shift in (("a", 0.0), ("b", 0.02), ("c", 0.3))  # the differences of models are larger
    ]
    votes = [
        replace(VOTE, first=Candidate(first, "x", "p"), second=Candidate(second, "y", "p"), choice="first", rater=rater)
        for first, second in (("one", "two"), ("two", "three"), ("one", "three"))
        for rater in "abcdefgh"
    ]
    help_ = summarize_help(texts, fit_ratings(votes))
    over_models = find(help_.correlations, "final Total", level="model")
    assert over_models.rho.value == pytest.approx(1) and (over_models.number, over_models.num_raters) == (3, 3)
    rating = find(help_.correlations, "rating", level="model")
    assert rating.rho.value == pytest.approx(-1) and (rating.number, rating.num_raters) == (3, 8)
    two = summarize_help([one for one in texts if one.first.model != "two"], None)
    assert find(two.correlations, "final Total", level="model").rho is None


def test_scores_replace_recorded_totals():
    """Score files have Missing and Hallucination, too; the caption's score is that of its clip."""
    scores = {
        model: [Score(f"clips/{index}.mp4", 10, missing=index, incorrect=1, hallucinated=offset) for index in range(10)]
        for model, offset in (("one", 0), ("two", 3), ("three", 6))
    }
    texts = [
        write(model, f"r{index}", total=0.99, final=index / 10, video=f"{index}.mp4")
        for model in scores for index in range(10)
    ]  # fmt: skip
    help_ = summarize_help(texts, None, scores=scores)
    # Of 10 events in each of ten clips 4.5 are missing on average.
    assert help_.metrics["two"] == pytest.approx({"total": 0.85, "missing": 0.45, "hallucination": 0.4})
    assert find(help_.correlations, "final Total", "missing").rho.value == pytest.approx(1)
    totals = [(index + 1 + offset) / 10 for offset in (0, 3, 6) for index in range(10)]
    expected = spearmanr(totals, [index / 10 for index in range(10)] * 3).statistic
    assert find(help_.correlations, "final Total").rho.value == pytest.approx(expected)
    assert find(help_.correlations, "final Total", "hallucination", "model").rho is None  # the means are equal


def test_differences_by_least_squares():
    """Slow people mostly had drafts of one: their effect is not the model's. Clip and rater effects are exact."""
    rng = random.Random(0)
    texts = []
    for number, (rater, slowness) in enumerate({"a": 0.0, "b": 5.0, "c": 60.0, "d": 90.0}.items()):
        for clip in range(12):
            model = "one" if clip < 3 * (number + 1) - 2 else "two"
            seconds = 10 + slowness + 2 * clip + 4 * (model == "one")
            texts.append(write(model, rater, seconds=seconds, video=f"{clip}.mp4"))
    rng.shuffle(texts)
    (one,) = [one for one in summarize_help(texts, None).differences if one.measure == "seconds"]
    assert (one.first, one.second, one.effects) == ("one", "two", ("rater", "clip"))
    assert one.value.value == pytest.approx(4) and one.value.low == pytest.approx(4, abs=1e-6)
    assert one.numbers == (22, 26) and one.num_raters == 4 and one.adjusted_p < 1e-6


def test_errors_are_of_the_jackknife_over_raters():
    """Models help people unlike: of raters with unequal numbers of texts, each is left out in turn."""
    rng = np.random.default_rng(1)
    texts = [
        write(model, f"r{rater}", seconds=9 * (model == "one") * (rater % 3) + rng.normal(), video=f"{rater}{n}.mp4")
        for rater in range(6) for n in range(rater + 2) for model in ("one", "two")
    ]  # fmt: skip

    def compare(texts):
        (one,) = [one for one in summarize_help(texts, None).differences if one.measure == "seconds"]
        return one.value

    without = [compare([one for one in texts if one.rater != f"r{rater}"]).value for rater in range(6)]
    one = compare(texts)
    error = np.sqrt(5 / 6 * sum((value - one.value) ** 2 for value in without))
    assert one.high - one.value == pytest.approx(2.5706 * error, rel=1e-4)  # t of 5 degrees of freedom


def test_p_values_by_hand():
    """Each rater has one text of either kind: least squares with effects of raters are the paired t-test."""
    first, second = [10.0, 12, 9, 14, 11, 13], [8.0, 11, 9.5, 10, 12, 9]
    texts = [
        write(model, f"r{rater}", seconds=seconds, video=f"{model}{rater}.mp4", text=text)
        for model, values, text in (("one", first, DRAFT), ("", second, "A cat."))
        for rater, seconds in enumerate(values)
    ]
    help_ = summarize_help(texts, None)
    (one,) = help_.differences  # only seconds are known of both
    test = ttest_rel(second, first)
    assert (one.first, one.second, one.effects) == (NO_DRAFT, "one", ("rater",))
    assert one.value.value == pytest.approx(np.mean(second) - np.mean(first))
    interval = test.confidence_interval()
    assert (one.value.low, one.value.high) == pytest.approx((interval.low, interval.high))
    assert one.p_value == pytest.approx(test.pvalue) and one.adjusted_p == one.p_value


def test_adjusted_p_values():
    """Benjamini and Hochberg: the k-th smallest of m times m / k, made monotonic from the largest."""
    rng = np.random.default_rng(0)
    shifts = {"one": 0.0, "two": 3.0, "three": 0.4}
    texts = [
        write(model, f"r{rater}", seconds=50 + shift + rng.normal(), video=f"{clip}.mp4")
        for rater in range(6) for clip in range(4) for model, shift in shifts.items()
    ]  # fmt: skip
    differences = [one for one in summarize_help(texts, None).differences if one.measure == "seconds"]
    others = [one for one in summarize_help(texts, None).differences if one.measure != "seconds"]
    ranked = sorted([*differences, *others], key=lambda one: one.p_value)
    running = 1.0
    for rank in range(len(ranked), 0, -1):
        running = min(running, ranked[rank - 1].p_value * len(ranked) / rank)
        assert ranked[rank - 1].adjusted_p == pytest.approx(running)
    by_pair = {(one.first, one.second): one.adjusted_p for one in differences}
    assert by_pair["one", "two"] < 0.001 and by_pair["one", "three"] > 0.01


def test_models_that_cannot_be_compared():
    """Each rater had the drafts of one model only, so raters and models cannot be told apart."""
    texts = [write("one" if rater < 3 else "two", f"r{rater}", seconds=5.0 + rater) for rater in range(6)] * 4
    both = write("two", "r0", seconds=9.0)  # nor if one of them had both
    for known in (texts, [*texts, both, both]):
        help_ = summarize_help(known, None)
        assert help_.differences == () and "seconds" in help_.uncompared
    assert summarize_help([], None).correlations == ()


def test_tables_on_the_command_line(store, call, tmp_path):
    for index in range(10):
        text = DRAFT if index < 5 else "A cat sleeps."
        final = index / 20
        store.add(write("one", f"r{index % 5}", total=index / 10, final=final, seconds=5.0 + index, text=text))
        store.add(write("", f"r{index % 5}", final=0.5, seconds=40.0 + index))
    store.add(replace(VOTE, rater="r0"))
    code, out, _ = call("votes", store.folder, "--report", tmp_path / "votes.html")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    by_name = {row[0]: row[1:] for row in rows}
    assert code == 0
    # The error of 0.8 = 1 - 2 / 10, times t of 4 degrees of freedom: 2.7764 * 0.36 * sqrt(1.32 / 7) = 0.434.
    assert by_name["Total and final Total"] == ["captions", "+1.00 (+0.57 to +1.00)", "10", "5"]
    # Five drafts of the lower Totals were accepted: of tied ranks, -5 / sqrt(8.25 * 10 * 2.5).
    assert by_name["Total and accepted"][1].startswith("-0.87 (")
    assert by_name["seconds: (no draft) - one"][0].startswith("+35.0 (")
    assert ["two", "1", "1075"] in [row[:3] for row in rows]  # one vote
    assert "no correlation of Total and rating (2 models of 1 rater)" in out
    page = (tmp_path / "votes.html").read_text()
    assert "<h2>Does help follow the metric?</h2>" in page and "http" not in page.partition("<body>")[2]
    in_page = [
        re.findall("<t[hd][^>]*>(.*?)</t[hd]>", line) for line in page.splitlines() if '<tr><th scope="row">' in line
    ]
    assert [[html.unescape(cell) for cell in row] for row in in_page] == rows
    assert "<p>No correlation of Total and rating (2 models of 1 rater); " in page
    names = [f"{name}={tmp_path / name}.jsonl" for name in ("one", "unknown")]
    write_scores(
        tmp_path / "one.jsonl", JudgeInfo("rule", "x", "salmonn", "0", "2026", seeds=()), [Score("a.mp4", 4, 1, 0, 1)]
    )
    code, out, _ = call("votes", store.folder, "--scores", names[0])
    assert code == 0 and "Hallucination" in out and "50.0" in out
    code, _, err = call("votes", store.folder, "--scores", names[0], "--forget", "r0")
    assert code == 2 and "give them without --forget" in err
    for wrong in (names[1], tmp_path / "one.jsonl"):  # texts without a draft have no model
        code, _, err = call("votes", store.folder, "--scores", wrong)
        assert code == 2 and "a model that has feedback: one" in err
