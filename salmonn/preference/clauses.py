"""Marks on clauses from a judge's quotes, as a person would make them. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from salmonn.preference.rating import Rating
from salmonn.records import Caption, Comparison, Mark, Score
from salmonn.score.highlight import locate_quotes


def mark_clauses(
    pairs: Sequence[Comparison], captions: Sequence[Caption], ratings: Sequence[Rating]
) -> list[Comparison]:
    """Mark the clauses of both captions of pairs as right or wrong, by the judge's scores.

    Captions without a score, or that are not among the rated ones, get no marks.

    Raises:
        ValueError: no clause can be marked.
    """
    text_of = {(caption.video, caption.sample): caption.text for caption in captions}
    score_of = {
        (rating.video, text_of[rating.video, rating.sample]): rating.score
        for rating in ratings
        if rating.score and (rating.video, rating.sample) in text_of
    }
    marked = [
        replace(
            pair,
            chosen_marks=_find_marks(pair.video, pair.chosen, score_of),
            rejected_marks=_find_marks(pair.video, pair.rejected, score_of),
        )
        for pair in pairs
    ]
    if pairs and not any(pair.chosen_marks or pair.rejected_marks for pair in marked):
        raise ValueError(
            "loss.per clause needs quotes, and the judge quotes none of the captions; set loss.per caption"
        )
    return marked


def _find_marks(video: str, text: str, score_of: Mapping[tuple[str, str], Score]) -> tuple[Mark, ...]:
    """Mark correct mentions of events as right, and incorrect, hallucinated or repeated content as wrong.

    If quotes share a place, the first one counts: a clause that mentions two events is right if the first mention is.
    """
    score = score_of.get((video, text))
    marks: dict[tuple[int, int], Mark] = {}
    for quote in locate_quotes(text, score) if score else ():
        if quote.span:
            marks.setdefault(quote.span, Mark(*quote.span, is_right=quote.kind == "correct"))
    return tuple(marks.values())
