"""Marking a caption by event: which of its words tell an event rightly or wrong, tell of none, or say a thing again."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from salmonn.records import Event, Score
from salmonn.score.repetition import repeated_spans
from salmonn.score.text_spans import find_all

HighlightKind = Literal["correct", "incorrect", "hallucinated", "repeated"]
KINDS: tuple[HighlightKind, ...] = ("correct", "incorrect", "hallucinated", "repeated")
Span = tuple[int, int]


@dataclass(frozen=True)
class Quote:
    """Words that a judge took from a caption.

    Args:
        kind: what they do.
        text: the words as the judge gave them.
        event: the event that they tell; None where they tell of none, or tell it again.
        span: where they stand in the caption, (start, end) in characters; None where they were not found.
    """

    kind: HighlightKind
    text: str
    event: Event | None = None
    span: Span | None = None


@dataclass(frozen=True)
class Highlight:
    """A stretch of a caption: its text, what it does (several kinds may apply, or none), and the events it tells."""

    text: str
    kinds: tuple[HighlightKind, ...] = ()
    events: tuple[Event, ...] = ()


def highlight_caption(text: str, score: Score) -> list[Highlight]:
    """Cut a caption where marks begin and end; the texts of the stretches, joined, are the caption again."""
    quotes = [(quote, quote.span) for quote in locate_quotes(text, score) if quote.span]
    cuts = sorted({0, len(text), *(place for _, span in quotes for place in span)})
    marks = []
    for start, end in pairwise(cuts):
        over = [quote for quote, span in quotes if span[0] <= start and end <= span[1]]
        kinds = tuple(kind for kind in KINDS if any(quote.kind == kind for quote in over))
        events = tuple(dict.fromkeys(quote.event for quote in over if quote.event))
        marks.append(Highlight(text[start:end], kinds, events))
    return marks


def locate_quotes(text: str, score: Score) -> list[Quote]:
    """The judge's quotes with their places in the caption, and what is said again there word for word.

    A quote takes the earliest place that no other has taken, what is said again the latest. Where all are taken it
    shares one: "a circle and a star appear" tells two events by the same words. A quote without words is left out.
    """
    taken = bytearray(len(text))
    places: dict[str, list[Span]] = {}  # a caption that runs in circles has many quotes of few words
    quotes = []
    for quote in _list_quotes(score):
        if quote.text not in places:
            places[quote.text] = list(find_all(quote.text, text))
        spans = places[quote.text][:: -1 if quote.kind == "repeated" else 1]
        span = next((span for span in spans if not any(taken[slice(*span)])), spans[0] if spans else None)
        if span:
            taken[slice(*span)] = b"\1" * (span[1] - span[0])
        quotes.append(Quote(quote.kind, quote.text, quote.event, span))
    return quotes + [Quote("repeated", text[start:end], None, (start, end)) for start, end in repeated_spans(text)]


def _list_quotes(score: Score) -> Iterator[Quote]:
    for mention in score.mentions:
        if mention.quote.strip():
            yield Quote("correct" if mention.is_correct else "incorrect", mention.quote, mention.event)
    yield from (Quote("hallucinated", quote) for quote in score.hallucinations if quote.strip())
    yield from (Quote("repeated", quote) for quote in score.repeated if quote.strip())
