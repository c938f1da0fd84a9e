"""Marks on clauses by a judge's quotes."""

import pytest

from salmonn.preference.rating import Rating
from salmonn.preference.selection import mark_clauses
from salmonn.records import Caption, Comparison, Event, Mark, Reference
from salmonn.score.judge import ScoringTask
from salmonn.synthetic.judge import RuleJudge

REFERENCE = Reference("a.mp4", (Event("a red circle appears"), Event("a high tone plays", "audio")), caption="truth")
GOOD, BAD = "A red circle appears. A low tone plays.", "A blue star appears."


def test_marks_by_hand():
    captions = [Caption("a.mp4", text, sample=number) for number, text in enumerate((GOOD, BAD))]
    scores = RuleJudge().judge([ScoringTask(REFERENCE, caption) for caption in captions])
    ratings = [Rating("a.mp4", {"total": 0.0}, {"total": -1.0}, score.sample, score) for score in scores]
    (pair,) = mark_clauses([Comparison("a.mp4", "", GOOD, BAD)], captions, ratings)
    marks = [(text[mark.start : mark.end], mark.is_right) for text, mark in [(GOOD, one) for one in pair.chosen_marks]]
    assert marks == [("A red circle appears", True), ("A low tone plays", False)]
    assert pair.rejected_marks == (Mark(0, len("A blue star appears"), is_right=False),)
    assert pair.chosen == GOOD and pair.rejected == BAD
    with pytest.raises(ValueError, match="the judge quotes none"):
        mark_clauses([pair], captions, [Rating("a.mp4", {"total": 0.0}, {"total": -1.0})])
