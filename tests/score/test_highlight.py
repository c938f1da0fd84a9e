"""Highlights of captions against hand-made expectations."""

from hypothesis import given, settings
from hypothesis import strategies as st

from salmonn.records import Event, Mention, Score
from salmonn.score.highlight import Highlight, Quote, find_missed_events, highlight_caption, locate_quotes

CIRCLE = Event("a red circle appears", "visual", 1.0, 2.0)
BEEP = Event("a beep is heard", "audio", 2.0, 3.0)


def score(**lists) -> Score:
    return Score("v", num_events=2, missing=0, incorrect=0, hallucinated=0, **lists)


def test_each_kind_is_highlighted_at_its_position():
    text = "First, a RED\n circle appears; a  dog-like beep. Rain! Then it rains."
    scored = score(
        mentions=(Mention(CIRCLE, "A red circle appears."), Mention(BEEP, "a dog like beep", is_correct=False)),
        hallucinations=("rain",),
        repeated=("it rains",),
    )
    assert highlight_caption(text, scored) == [
        Highlight("First, "),
        Highlight("a RED\n circle appears", ("correct",), (CIRCLE,)),
        Highlight("; "),
        Highlight("a  dog-like beep", ("incorrect",), (BEEP,)),
        Highlight(". "),
        Highlight("Rain", ("hallucinated",)),  # not "rains": quotes are whole words
        Highlight("! Then "),
        Highlight("it rains", ("repeated",)),
        Highlight("."),
    ]


def test_quotes_use_the_earliest_free_span_and_repetition_the_latest():
    text = "It blinks, it blinks, it blinks, and it blinks."
    #       0          11         22              37
    scored = score(
        mentions=(Mention(CIRCLE, "it blinks"), Mention(BEEP, "it blinks")), repeated=("it blinks", "it blinks")
    )
    assert [quote.span for quote in locate_quotes(text, scored)[:4]] == [(0, 9), (11, 20), (37, 46), (22, 31)]


def test_the_same_text_can_mention_two_events():
    text = "A circle and a beep."
    scored = score(
        mentions=(Mention(CIRCLE, "a circle and a beep"), Mention(BEEP, "a circle and a beep", is_correct=False))
    )
    assert highlight_caption(text, scored) == [
        Highlight("A circle and a beep", ("correct", "incorrect"), (CIRCLE, BEEP)),
        Highlight("."),
    ]


def test_overlapping_quotes_are_split():
    scored = score(mentions=(Mention(CIRCLE, "a circle moves"),), hallucinations=("moves left",))
    assert highlight_caption("A circle moves left", scored) == [
        Highlight("A circle ", ("correct",), (CIRCLE,)),
        Highlight("moves", ("correct", "hallucinated"), (CIRCLE,)),
        Highlight(" left", ("hallucinated",)),
    ]


def test_literal_repetition_is_highlighted_without_a_judge():
    highlights = highlight_caption("A dog runs. A cat sleeps. A dog runs.", score())
    assert [part.text for part in highlights if part.kinds == ("repeated",)] == ["A dog runs"]
    assert highlights[0] == Highlight("A dog runs. A cat sleeps. ")


def test_a_quote_that_is_not_in_the_caption_has_no_span():
    scored = score(mentions=(Mention(CIRCLE, "a green circle"), Mention(BEEP, "")), hallucinations=("a cat",))
    assert locate_quotes("A red circle.", scored) == [
        Quote("correct", "a green circle", CIRCLE),
        Quote("hallucinated", "a cat"),
    ]
    assert highlight_caption("A red circle.", scored) == [Highlight("A red circle.")]
    assert highlight_caption("", scored) == []


CHARS = "aB ,.\u00e9\u4e00\n-"
QUOTES = st.lists(st.text(CHARS, max_size=12), max_size=4)


@settings(max_examples=100, deadline=None)
@given(text=st.text(CHARS, max_size=60), quotes=QUOTES, other=QUOTES)
def test_joined_highlights_are_the_caption(text, quotes, other):
    scored = score(
        mentions=tuple(Mention(CIRCLE, quote) for quote in quotes), hallucinations=tuple(other), repeated=tuple(quotes)
    )
    highlights = highlight_caption(text, scored)
    assert "".join(part.text for part in highlights) == text
    assert all(part.text for part in highlights)


def test_missed_events_with_equal_texts():
    second = Event("a beep", "audio", 5.0, 6.0)
    first = Event("a beep", "audio", 1.0, 2.0)
    score = Score("v", 3, 2, 0, 0, missed=("a beep", "unlisted"), mentions=(Mention(first),))
    assert find_missed_events(score, [first, second]) == [("a beep", second), ("unlisted", None)]
