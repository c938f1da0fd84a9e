"""Caption highlighting: text that mentions an event correctly or not, is hallucinated, or is repeated."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from salmonn.records import Event, Score
from salmonn.score.repetition import find_repeated_spans
from salmonn.score.text_spans import CharSpan, find_all_quotes

HighlightKind = Literal["correct", "incorrect", "hallucinated", "repeated"]
KINDS: tuple[HighlightKind, ...] = ("correct", "incorrect", "hallucinated", "repeated")


@dataclass(frozen=True)
class Quote:
    """Text that a judge quoted from a caption.

    Args:
        kind: judgement of the text.
        text: text as the judge wrote it.
        event: event that the text mentions; None if it mentions none, or repeats a mention.
        span: place in the caption; None if the text was not found there.
    """

    kind: HighlightKind
    text: str
    event: Event | None = None
    span: CharSpan | None = None


@dataclass(frozen=True)
class Highlight:
    """A part of a caption with the kinds that apply to it (none, or several) and the events that it mentions."""

    text: str
    kinds: tuple[HighlightKind, ...] = ()
    events: tuple[Event, ...] = ()


def highlight_caption(text: str, score: Score) -> list[Highlight]:
    """Split a caption where highlights start and end; the joined texts of the parts are the caption."""
    quotes = [(quote, quote.span) for quote in locate_quotes(text, score) if quote.span]
    cuts = sorted({0, len(text), *(place for _, span in quotes for place in span)})
    highlights = []
    for start, end in pairwise(cuts):
        covering = [quote for quote, span in quotes if span[0] <= start and end <= span[1]]
        kinds = tuple(kind for kind in KINDS if any(quote.kind == kind for quote in covering))
        events = tuple(dict.fromkeys(quote.event for quote in covering if quote.event))
        highlights.append(Highlight(text[start:end], kinds, events))
    return highlights


def locate_quotes(text: str, score: Score) -> list[Quote]:
    """Return a judge's quotes with their places in the caption, followed by literal repetitions in the caption.

    A quote gets the earliest place that no other quote has, a repetition the latest. If none is free it shares one: in
    "a circle and a star appear" the same words mention two events. Empty quotes are dropped.
    """
    taken = bytearray(len(text))
    places: dict[str, list[CharSpan]] = {}  # repetitive captions have many quotes with the same text
    quotes = []
    for quote in _list_quotes(score):
        if quote.text not in places:
            places[quote.text] = list(find_all_quotes(quote.text, text))
        spans = places[quote.text][:: -1 if quote.kind == "repeated" else 1]
        span = next((span for span in spans if not any(taken[slice(*span)])), spans[0] if spans else None)
        if span:
            taken[slice(*span)] = b"\1" * (span[1] - span[0])
        quotes.append(Quote(quote.kind, quote.text, quote.event, span))
    return quotes + [Quote("repeated", text[start:end], None, (start, end)) for start, end in find_repeated_spans(text)]


def find_missed_events(score: Score, events: Sequence[Event]) -> list[tuple[str, Event | None]]:
    """Return the texts of missed events, each with its event among those that are not mentioned, if there is one.

    Args:
        score: score, which has only the texts of the missed events.
        events: events of the reference.
    """
    remaining = list(events)
    for mention in score.mentions:
        if mention.event in remaining:
            remaining.remove(mention.event)
    missed: list[tuple[str, Event | None]] = []
    for text in score.missed:
        event = next((event for event in remaining if event.text == text), None)
        if event:
            remaining.remove(event)
        missed.append((text, event))
    return missed


def _list_quotes(score: Score) -> Iterator[Quote]:
    for mention in score.mentions:
        if mention.quote.strip():
            yield Quote("correct" if mention.is_correct else "incorrect", mention.quote, mention.event)
    yield from (Quote("hallucinated", quote) for quote in score.hallucinations if quote.strip())
    yield from (Quote("repeated", quote) for quote in score.repeated if quote.strip())
