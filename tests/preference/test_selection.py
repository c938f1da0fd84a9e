"""Which captions are paired, with badness reckoned by hand."""

import pytest

from salmonn.preference.selection import PairReport, choose_pairs, summarise_pairs
from salmonn.records import Caption, Comparison, Reference, Score

REFERENCES = {"v": Reference("v", caption="the truth"), "w": Reference("w")}


def choose(*drawn: tuple, **options) -> list[tuple[str, str]]:
    """Pairs of texts from (text, errors of 10 events, repeated words of 10, finished)."""
    captions = [
        Caption("v", text, "Tell.", sample=sample, finished=finished)
        for sample, (text, _, _, finished) in enumerate(drawn)
    ]
    scores = [
        Score("v", 10, wrong, 0, 0, num_words=10, num_repeated_words=repeated, sample=sample)
        for sample, (_, wrong, repeated, _) in enumerate(drawn)
    ]
    return [(pair.chosen, pair.rejected) for pair in choose_pairs({"v": captions}, scores, REFERENCES, **options)]


def test_best_against_worst():
    captions = [Caption("v", text, "Tell.", sample=sample, finished=sample != 2) for sample, text in enumerate("abc")]
    scores = [Score("v", 10, missing, 0, 1, sample=sample) for sample, missing in enumerate((3, 1, 6))]
    (pair,) = choose_pairs({"v": captions}, scores, REFERENCES)
    assert pair == Comparison("v", "Tell.", "b", "c", "the truth", margin=pytest.approx(0.5), rejected_finished=False)


def test_repetition_weighs():
    drawn = [("a", 1, 5, True), ("b", 2, 0, True), ("c", 5, 0, True)]  # badness 0.6, 0.2, 0.5
    assert choose(*drawn) == [("b", "c")]  # "a" is worst in badness, but not in Total
    assert choose(*drawn, repetition_weight=0.0) == [("a", "c")]


def test_gap_is_in_total_and_inclusive():
    assert choose(("a", 4, 0, True), ("b", 5, 0, True), min_gap=0.1) == [("a", "b")]
    assert choose(("a", 4, 0, True), ("b", 5, 0, True), min_gap=0.11) == []
    assert choose(("a", 4, 0, True), ("b", 4, 9, True)) == []


def test_never_chosen():
    worse = ("d", 9, 0, True)
    assert choose(("a", 0, 0, False), ("b", 1, 0, True), worse) == [("b", "d")]
    assert choose(("a", 1, 9, True), ("b", 5, 0, False)) == []  # b is better in badness
    assert choose(("", 0, 0, True), ("b", 1, 0, True), worse) == [("b", "d")]
    assert choose(("a", 0, 0, False), worse) == []
    assert choose(("same text", 0, 0, True), ("same  text ", 5, 0, True)) == []


def test_ties_lean_to_length():
    assert choose(("a", 1, 0, True), ("a b c", 1, 0, True), ("x y z v w", 5, 0, True), ("x y", 5, 0, True)) == [
        ("a b c", "x y")
    ]
    assert choose(("a", 1, 0, True), ("b", 1, 0, True), ("x", 5, 0, True), ("y", 5, 0, True)) == [("a", "x")]


def test_length_ratio_takes_the_next_best_partner():
    drawn = [("a b", 0, 0, True), ("x y z v w", 9, 0, True), ("x y z v", 5, 0, True)]
    assert choose(*drawn) == [("a b", "x y z v w")]
    assert choose(*drawn, max_length_ratio=2.0) == [("a b", "x y z v")]
    assert choose(*drawn, max_length_ratio=1.2) == []


def test_more_pairs_use_other_captions():
    drawn = [("a", 0, 0, True), ("b", 1, 0, True), ("c", 5, 0, True), ("d", 6, 0, True), ("e", 3, 0, True)]
    assert choose(*drawn, max_pairs_per_video=2) == [("a", "d"), ("b", "c")]
    assert choose(*drawn, max_pairs_per_video=9) == [("a", "d"), ("b", "c")]


def test_every_video_by_itself():
    captions = {video: [Caption(video, text, sample=sample) for sample, text in enumerate("ab")] for video in "vw"}
    scores = [
        Score("v", 10, 0, 0, 0),
        Score("v", 10, 5, 0, 0, sample=1),
        Score("w", 10, 9, 0, 0),
        Score("w", 10, 8, 0, 0, sample=1),
    ]
    pairs = choose_pairs(captions, scores, REFERENCES)
    assert [(pair.video, pair.chosen) for pair in pairs] == [("v", "a"), ("w", "b")]


def test_refuses():
    caption = Caption("v", "a")
    score = Score("v", 10, 0, 0, 0)
    with pytest.raises(ValueError, match="no score for sample 0"):
        choose_pairs({"v": [caption]}, [], REFERENCES)
    with pytest.raises(ValueError, match="no reference for x"):
        choose_pairs({"x": [caption]}, [score], REFERENCES)
    with pytest.raises(ValueError, match="different sample numbers"):
        choose_pairs({"v": [caption, caption]}, [score], REFERENCES)
    with pytest.raises(ValueError, match="one prompt"):
        choose_pairs({"v": [caption, Caption("v", "b", "Tell.", sample=1)]}, [score], REFERENCES)
    for options in (
        {"min_gap": 0.0},
        {"max_pairs_per_video": 0},
        {"repetition_weight": -1.0},
        {"max_length_ratio": 0.9},
    ):
        with pytest.raises(ValueError, match="got"):
            choose_pairs({"v": [caption]}, [score], REFERENCES, **options)


def test_summary():
    pairs = [Comparison("v", "", "a b", "a b c d", "", margin=0.2), Comparison("w", "", "a", "b", "", margin=0.4)]
    assert summarise_pairs(pairs) == PairReport(2, pytest.approx(0.3), 1.5, 2.5)
    assert summarise_pairs([]) == PairReport(0, 0.0, 0.0, 0.0)
