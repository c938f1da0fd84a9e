"""Simulated people who vote, rate, mark and write captions of synthetic clips; needs no torch.

Their preferences are defined in `raters.py`; this module defines their actions. Like the raters, they are invented to
test the code, and say nothing about real people.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from salmonn.records import Caption, Event, Mark, Reference, Score
from salmonn.score.highlight import Quote, locate_quotes
from salmonn.score.repetition import remove_clauses
from salmonn.score.text_spans import CharSpan, find_quote
from salmonn.synthetic.annotate import OMISSION_RATES
from salmonn.synthetic.parser import parse_claims
from salmonn.synthetic.raters import CaptionTraits, Noise, Rater, SimulatedRater

TIE_MARGIN = 0.05  # who prefers neither by more than this calls it a tie
BAD_LOSS = 0.8  # Total + weighted repetition of a caption that is bad however good the other is
NOTICE_RATE, SLIP_RATE = 0.9, 0.02  # of marking a wrong clause, and a right one, as wrong
WRITE_SECONDS, READ_SECONDS, STRIKE_SECONDS = 6.0, 1.5, 3.0  # for a clause
STRIKE_RATE = 0.7  # of noticing a wrong clause while writing
_SENTENCE = re.compile(r"[^.]+\.?")
_ACCEPTS = SimulatedRater("", {"metric": 1.0}, Noise(0.1))
_ACCEPTED_LOSS = 0.35  # perceived loss of a draft that is accepted as it is half of the time


def cast_vote(
    rater: Rater, first: CaptionTraits, second: CaptionTraits, rng: random.Random
) -> Literal["first", "second", "tie", "both bad"]:
    """Draw a vote between two captions."""
    if min(first.loss, second.loss) > BAD_LOSS:
        return "both bad"
    chance = rater.prefers(first, second)
    if abs(chance - 0.5) < TIE_MARGIN:
        return "tie"
    return "first" if rng.random() < chance else "second"


def rate_caption(score: Score, rng: random.Random) -> Literal["good", "bad"]:
    """Rate a caption by its errors, as a doubter does: bad if it has one that is noticed."""
    return "bad" if score.incorrect + score.hallucinated and rng.random() < NOTICE_RATE else "good"


def mark_clauses(text: str, score: Score, rng: random.Random) -> tuple[Mark, ...]:
    """Mark clauses of a caption as wrong: nearly all wrong ones, and rarely a right one."""
    quotes = [quote for quote in locate_quotes(text, score) if quote.span and quote.kind != "repeated"]
    rates = {quote.span: SLIP_RATE if quote.kind == "correct" else NOTICE_RATE for quote in quotes if quote.span}
    return tuple(Mark(*span) for span, rate in sorted(rates.items()) if rng.random() < rate)


@dataclass(frozen=True)
class WrittenText:
    """What a writer made of a draft, or without one.

    Args:
        text: the text.
        seconds: time that it took.
        accepted: whether the draft was accepted as it is.
    """

    text: str
    seconds: float
    accepted: bool = False


def write_caption(
    reference: Reference,
    draft: tuple[Caption, Score] | None,
    rng: random.Random,
    *,
    max_seconds: float = 60.0,
) -> WrittenText:
    """Describe a clip as a person with limited attention and time would.

    They notice each event with the rates of hasty annotators (`OMISSION_RATES`), and each wrong clause of a draft with
    0.7. A draft that seems good enough is accepted. Else they strike wrong clauses, and add what they have noticed and
    the draft lacks, until the time is over.

    Args:
        reference: the clip.
        draft: draft and its score against the reference; None to write without one.
        rng: random numbers.
        max_seconds: time limit; an action that has been started is completed.
    """
    noticed = [event for event in reference.events if rng.random() >= OMISSION_RATES[parse_claims(event.text)[0].kind]]
    if draft is None:
        return _add_events([], noticed, seconds=0.0, max_seconds=max_seconds)
    caption, score = draft
    quotes = [quote for quote in locate_quotes(caption.text, score) if quote.kind != "repeated"]
    seconds = READ_SECONDS * len(quotes)
    wrong = [quote for quote in quotes if quote.kind != "correct" and rng.random() < STRIKE_RATE]
    told = [quote.event for quote in quotes if quote.event and quote not in wrong]
    lacking = [event for event in noticed if event not in told]
    perceived = (len(lacking) + len(wrong)) / max(len(noticed), 1)
    if rng.random() < _ACCEPTS.prefers(_with_loss(perceived), _with_loss(_ACCEPTED_LOSS)):
        return WrittenText(caption.text, seconds, accepted=True)
    struck: list[CharSpan] = []
    for quote in wrong:
        if quote.span and seconds < max_seconds:
            struck.append(quote.span)
            seconds += STRIKE_SECONDS
    text = remove_clauses(caption.text, struck)
    sentences = [
        (_start_of(sentence, quotes), sentence) for sentence in map(str.strip, _SENTENCE.findall(text)) if sentence
    ]
    return _add_events(sentences, lacking, seconds=seconds, max_seconds=max_seconds)


def _start_of(sentence: str, quotes: Sequence[Quote]) -> float | None:
    """Return when the first event that a sentence mentions starts; None if it mentions none with a time."""
    starts = [
        quote.event.start_seconds
        for quote in quotes
        if quote.event and quote.event.start_seconds is not None and find_quote(quote.text, sentence)
    ]
    return min(starts) if starts else None


def _with_loss(loss: float) -> CaptionTraits:
    return CaptionTraits(seen=0, heard=0, errors=0, repetition=0, length=0, total=loss)


def _add_events(
    sentences: list[tuple[float | None, str]], events: Sequence[Event], *, seconds: float, max_seconds: float
) -> WrittenText:
    """Insert a sentence for each event before the first one about a later event, while there is time."""
    for event in events:
        if seconds >= max_seconds:
            break
        begin = event.start_seconds or 0.0
        later = (place for place, (start, _) in enumerate(sentences) if start is not None and start > begin)
        place = next(later, len(sentences))
        sentences.insert(place, (event.start_seconds, f"{event.text[:1].upper()}{event.text[1:]}."))
        seconds += WRITE_SECONDS
    return WrittenText(" ".join(sentence for _, sentence in sentences), seconds)
