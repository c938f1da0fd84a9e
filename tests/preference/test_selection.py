"""Selection of pairs, with ratings computed by hand."""

from dataclasses import replace

import pytest

from salmonn.preference.rating import Rating
from salmonn.preference.selection import (
    PairSummary,
    SelectionConfig,
    make_selector,
    select_pairs,
    summarize_pairs,
)
from salmonn.records import Caption, Comparison, Event, Mention, Reference, Score
from salmonn.speech import Dialogue

REFERENCES = {"v": Reference("v", caption="the truth"), "w": Reference("w")}


def rate(video, sample, total, repetition=0.0, *, weight=1.0) -> Rating:
    parts = {"total": total, "repetition": repetition}
    return Rating(video, parts, {"total": -1.0, "repetition": -weight}, sample=sample)


def select(captions, ratings, **options):
    selector = make_selector(SelectionConfig(**{"max_pairs_per_video": 1} | options))
    return select_pairs(captions, ratings, REFERENCES, selector=selector, source="rule")


def choose(*sampled: tuple, weight=1.0, **options) -> list[tuple[str, str]]:
    """Select pairs of texts from (text, errors in 10 events, repeated words of 10, finished)."""
    captions = [
        Caption("v", text, "Tell.", sample=sample, finished=finished)
        for sample, (text, _, _, finished) in enumerate(sampled)
    ]
    ratings = [
        rate("v", sample, wrong / 10, repeated / 10, weight=weight)
        for sample, (_, wrong, repeated, _) in enumerate(sampled)
    ]
    return [(pair.chosen, pair.rejected) for pair in select(captions, ratings, **options).pairs]


def test_best_against_worst():
    captions = [Caption("v", text, "Tell.", sample=sample, finished=sample != 2) for sample, text in enumerate("abc")]
    ratings = [rate("v", sample, total) for sample, total in enumerate((0.4, 0.2, 0.7))]
    (pair,) = select(captions, ratings).pairs
    assert pair == Comparison(
        "v", "Tell.", "b", "c", "the truth", margin=pytest.approx(0.5), source="rule", rejected_finished=False
    )


def test_repetition_weight():
    sampled = [("a", 1, 5, True), ("b", 2, 0, True), ("c", 5, 0, True)]  # Total + repetition: 0.6, 0.2, 0.5
    assert choose(*sampled) == [("b", "c")]  # "a" is the worst, but not in Total
    assert choose(*sampled, weight=0.0) == [("a", "c")]


def test_gap_is_in_total_and_inclusive():
    assert choose(("a", 4, 0, True), ("b", 5, 0, True), min_gap=0.1) == [("a", "b")]
    assert choose(("a", 4, 0, True), ("b", 5, 0, True), min_gap=0.11) == []
    assert choose(("a", 4, 0, True), ("b", 4, 9, True)) == []


def test_never_chosen():
    worse = ("d", 9, 0, True)
    assert choose(("a", 0, 0, False), ("b", 1, 0, True), worse) == [("b", "d")]
    assert choose(("a", 1, 9, True), ("b", 5, 0, False)) == []  # b has the better rating
    assert choose(("", 0, 0, True), ("b", 1, 0, True), worse) == [("b", "d")]
    assert choose(("a", 0, 0, False), worse) == []
    assert choose(("same text", 0, 0, True), ("same  text ", 5, 0, True)) == []


def test_ties_counteract_changes_of_length():
    assert choose(("a", 1, 0, True), ("a b c", 1, 0, True), ("x y z v w", 5, 0, True), ("x y", 5, 0, True)) == [
        ("a b c", "x y")
    ]
    assert choose(("a", 1, 0, True), ("b", 1, 0, True), ("x", 5, 0, True), ("y", 5, 0, True)) == [("a", "x")]


def test_length_ratio_uses_the_next_best_partner():
    sampled = [("a b", 0, 0, True), ("x y z v w", 9, 0, True), ("x y z v", 5, 0, True)]
    assert choose(*sampled) == [("a b", "x y z v w")]
    assert choose(*sampled, max_length_ratio=2.0) == [("a b", "x y z v")]
    assert choose(*sampled, max_length_ratio=1.2) == []


def test_floors_of_the_chosen_caption():
    """By a judge: the best caption has 1 hallucination in 4 claims; the second, none. The rejected has no floor."""
    star, tone = Event("a star"), Event("a tone", "audio")
    told = (Mention(star), Mention(tone), Mention(Event("a circle")))
    scores = [
        Score("v", 4, 1, 0, 1, sample=0, mentions=told),
        Score("v", 4, 2, 0, 0, sample=1, mentions=told[:1]),
        Score("v", 4, 4, 0, 3, sample=2),
    ]
    captions = [Caption("v", text, "Tell.", sample=sample) for sample, text in enumerate("abc")]
    ratings = [Rating("v", {"total": one.total}, {"total": -1.0}, one.sample, one) for one in scores]

    def chosen(**options):
        selection = select(captions, ratings, min_gap=0.01, **options)
        return [(pair.chosen, pair.rejected) for pair in selection.pairs] or selection.without_pair

    assert chosen() == chosen(floors={"faithful": 0.75}) == [("a", "c")]
    assert chosen(floors={"faithful": 0.8}) == [("b", "c")]
    assert chosen(floors={"faithful": 0.8, "length": 0.5}) == {"no caption reaches the floors": 1}
    assert chosen(floors={"ordered": 1.0}) == [("a", "c")]  # undefined, as the events have no times
    # A reward model's objectives are parts of its ratings.
    parts = [{"reward": 2.0, "faithful": 0.7}, {"reward": 1.0, "faithful": 0.9}, {"reward": 0.0, "faithful": 0.1}]
    ratings = [Rating("v", one, {"reward": 1.0, "faithful": 0.0}, sample) for sample, one in enumerate(parts)]
    assert chosen() == [("a", "c")] and chosen(floors={"faithful": 0.8}) == [("b", "c")]


def test_gaps_below_the_spread_are_dropped():
    """Gaps 1.0 and 0.4 between captions whose larger spread is 0.5: the first is 2 spreads, the second 0.8."""
    captions = [Caption("v", text, "Tell.", sample=sample) for sample, text in enumerate("abc")]
    figures = [(1.4, 0.5), (1.0, 0.5), (0.4, 0.1)]
    ratings = [
        Rating("v", {"reward": reward, "spread": spread}, {"reward": 1.0, "spread": 0.0}, sample)
        for sample, (reward, spread) in enumerate(figures)
    ]
    assert [len(select(captions, ratings, min_spreads=number).pairs) for number in (None, 2.0, 2.1)] == [1, 1, 0]
    assert len(select(captions[:2], ratings, min_spreads=0.8).pairs) == 1
    assert select(captions[:2], ratings, min_spreads=0.9).pairs == []


def test_floor_of_the_dialogue():
    """The better caption by Total quotes 1 of 4 words wrongly, the other none; one without dialogue has no value."""
    captions = [Caption("v", text, "Tell.", sample=sample) for sample, text in enumerate("abc")]
    dialogues = (Dialogue(4, 4, 3, 1), Dialogue(4, 4, 4, 0), None)
    ratings = [
        replace(rate("v", sample, sample / 2), score=Score("v", 4, sample, 0, 0, sample=sample, dialogue=dialogue))
        for sample, dialogue in enumerate(dialogues)
    ]

    def chosen(floor):
        return [pair.chosen for pair in select(captions, ratings, floors={"dialogue": floor}).pairs]

    assert (chosen(0.75), chosen(0.8)) == (["a"], ["b"])


@pytest.mark.parametrize("options", [{"floors": {"kind": 0.5}}, {"floors": {"seen": 2}}, {"min_spreads": -1}])
def test_impossible_floors(options):
    with pytest.raises(ValueError, match="floors"):
        SelectionConfig(**options)


def test_more_pairs_use_other_captions():
    sampled = [("a", 0, 0, True), ("b", 1, 0, True), ("c", 5, 0, True), ("d", 6, 0, True), ("e", 3, 0, True)]
    assert choose(*sampled, max_pairs_per_video=2) == [("a", "d"), ("b", "c")]
    assert choose(*sampled, max_pairs_per_video=9) == [("a", "d"), ("b", "c")]


def test_videos_are_independent():
    captions = [Caption(video, text, sample=sample) for video in "vw" for sample, text in enumerate("ab")]
    ratings = [rate("v", 0, 0.0), rate("v", 1, 0.5), rate("w", 0, 0.9), rate("w", 1, 0.8)]
    assert [(pair.video, pair.chosen) for pair in select(captions, ratings).pairs] == [("v", "a"), ("w", "b")]


def test_the_summary_of_a_selection():
    """v gives a pair; w has one caption with a rating, x two that are cut off, y two that are equally good."""
    references = {video: Reference(video) for video in "vwxy"}
    captions = [
        Caption(video, text, sample=sample, finished=video != "x")
        for video in "vwxy"
        for sample, text in enumerate("ab")
    ]
    ratings = [rate("v", 0, 0.0), rate("v", 1, 0.5), rate("w", 1, 0.0)]
    ratings += [rate(video, sample, 0.5) for video in "xy" for sample in (0, 1)]
    selector = make_selector(SelectionConfig())
    selection = select_pairs(captions, ratings, references, selector=selector, source="rule")
    assert selection.describe() == (
        "1 pairs from 1 of 4 videos; mean margin 0.500; mean words 1.0 chosen, 1.0 rejected; without a pair: "
        "every caption is empty or cut off (1), fewer than two rated captions (1), no two captions differ enough (1)"
    )


def test_errors():
    caption = Caption("v", "a")
    with pytest.raises(ValueError, match="no reference for x"):
        select([Caption("x", "a")], [rate("x", 0, 0.0)])
    with pytest.raises(ValueError, match="different sample numbers"):
        select([caption, caption], [rate("v", 0, 0.0)])
    with pytest.raises(ValueError, match="one prompt"):
        select([caption, Caption("v", "b", "Tell.", sample=1)], [rate("v", 0, 0.0)])
    for options in ({"min_gap": 0.0}, {"max_pairs_per_video": 0}, {"max_length_ratio": 0.9}):
        with pytest.raises(ValueError, match="got"):
            SelectionConfig(**options)


def test_summary():
    pairs = [Comparison("v", "", "a b", "a b c d", margin=0.2), Comparison("w", "", "a", "b", margin=0.4)]
    assert summarize_pairs(pairs) == PairSummary(2, pytest.approx(0.3), 1.5, 2.5)
    assert summarize_pairs([*pairs, Comparison("x", "", "a b", "a b")]).mean_margin == pytest.approx(0.3)
    assert summarize_pairs([]) == PairSummary(0, 0.0, 0.0, 0.0)
