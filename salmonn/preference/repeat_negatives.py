"""Preference pairs of the continuation of a good caption and a repetition of one of its clauses.

A preference for captions with more events makes a captioner more likely to add a clause wherever one fits, even if
there is nothing new to say: it then repeats its last clause. In a pair of two sampled captions that decision is a small
part of the difference; here it is the whole difference. After the same start of a caption, its next sentence, or its
end, is chosen over the repetition. Both answers stop there, because further text, although it is right, would become
less likely after a repetition. Imports no torch.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from salmonn.preference.rating import Rating
from salmonn.preference.selection import RatedCaption, to_comparison
from salmonn.records import Caption, Comparison, Reference
from salmonn.score.highlight import locate_quotes
from salmonn.score.repetition import count_repeated_words, find_clauses
from salmonn.score.text_spans import ARTICLES

_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")
_LOWERED = ARTICLES | {"there", "it", "they", "we"}  # words that are not names


@dataclass(frozen=True)
class _Clause:
    """A clause that may be repeated.

    Args:
        text: the clause.
        end: its end in the caption.
        event: text of the event that it mentions; the clause itself where no judge says what it mentions.
        is_audible: whether the event is heard.
    """

    text: str
    end: int
    event: str
    is_audible: bool = False


def select_repeat_negatives(
    captions: Sequence[Caption],
    ratings: Sequence[Rating],
    references: Mapping[str, Reference],
    *,
    fraction: float,
    source: str,
    foreign: bool = False,
) -> list[Comparison]:
    """Return pairs of the continuation of a clip's best caption (chosen) and a repetition of one of its clauses.

    Both follow the same start of the caption, up to the end of a random sentence; after the last one, the end of the
    caption is chosen. The repeated clause is the last correct mention, by the judge's quotes, of an event before that:
    of a sound or of something visible, at random. Without a score it is the last clause. The margin of the pairs is 0,
    since Total does not count repeated clauses.

    Args:
        captions: sampled captions, several of each clip. Of the finished ones without repetition, the best is used.
        ratings: ratings of these captions, matched by video and sample; captions without one are left out.
        references: video -> reference annotation, whose caption becomes the ground truth.
        fraction: share of the clips that get a pair, at equal distances in the list of those that allow one.
        source: name of the reward, for the records.
        foreign: as a control, reject a clause of another clip about an event that this one does not have.
    """
    rating_of = {(rating.video, rating.sample): rating for rating in ratings}
    by_video: dict[str, list[RatedCaption]] = {}
    for caption in captions:
        if rating := rating_of.get((caption.video, caption.sample)):
            by_video.setdefault(caption.video, []).append(RatedCaption(caption, rating))
    found = [one for group in by_video.values() if (one := _find_repeatable(group))]
    count = min(round(fraction * len(by_video)), len(found))
    used = [found[index * len(found) // count] for index in range(count)]
    pairs = []
    for number, (chosen, clauses) in enumerate(used):
        reference = references[chosen.caption.video]
        inserted = clauses
        if foreign:
            known = {event.text for event in reference.events} | {clause.event for clause in clauses}
            others = [clause for _, each in used[number + 1 :] + used[:number] for clause in each]
            inserted = [clause for clause in others if clause.event not in known]
        if inserted:
            texts = _continue_caption(chosen.caption, clauses, inserted, foreign=foreign)
            pair = [replace(chosen, caption=one) for one in texts]
            pairs.append(to_comparison(*pair, reference=reference, source=source))
    return pairs


def _find_repeatable(captions: Sequence[RatedCaption]) -> tuple[RatedCaption, list[_Clause]] | None:
    """Return the best finished caption without repetition, and its clauses that may be repeated after a sentence.

    Ties go to the lower sample number; None if there is no such caption.
    """
    for rated in sorted(captions, key=lambda one: (-one.rating.value, one.caption.sample)):
        text = rated.caption.text
        if not rated.caption.finished or rated.repetition or count_repeated_words(text)[0]:
            continue
        last = max((match.end() for match in _SENTENCE_END.finditer(text)), default=0)
        if clauses := [clause for clause in _list_clauses(rated) if clause.end <= last]:
            return rated, clauses
    return None


def _list_clauses(rated: RatedCaption) -> list[_Clause]:
    """Return the clauses that may be repeated, from left to right."""
    text, score = rated.caption.text, rated.rating.score
    if score is None:
        return [_Clause(text[start:end], end, text[start:end].lower()) for start, end in find_clauses(text)]
    quotes = [
        (quote.span, quote.event)
        for quote in locate_quotes(text, score)
        if quote.kind == "correct" and quote.span and quote.event
    ]
    clauses = [_Clause(text[start:end], end, event.text, event.is_audible) for (start, end), event in quotes]
    return sorted(clauses, key=lambda clause: clause.end)


def _continue_caption(
    caption: Caption, clauses: Sequence[_Clause], others: Sequence[_Clause], *, foreign: bool
) -> tuple[Caption, Caption]:
    """Return the start of a caption up to a random sentence end with its next sentence, and with a clause instead.

    The clause is introduced by the same words as the next sentence ("After that,"); at the end of the caption, by those
    of a sentence chosen at random.
    """
    text = caption.text
    choice = random.Random(f"{caption.video}\n{text}")
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    place = choice.choice([end for end in ends if end >= clauses[0].end])
    is_last = place == ends[-1]
    said = {clause.is_audible: clause for clause in clauses if clause.end <= place}  # the last of each kind
    clause = choice.choice(others if foreign else list(said.values()))
    before = choice.choice(ends[:-1] or [place]) if is_last else place
    lead = text[before : next((start for start, _ in find_clauses(text) if start >= before), before)].strip()
    chosen = text if is_last else text[: ends[ends.index(place) + 1]]
    rejected = f"{text[:place]} {_to_sentence(clause.text, lead)}"
    return replace(caption, text=chosen, finished=is_last), replace(caption, text=rejected, finished=False)


def _to_sentence(clause: str, lead: str) -> str:
    if not lead:
        return f"{clause[0].upper()}{clause[1:]}."
    is_name = clause.split(maxsplit=1)[0].lower() not in _LOWERED
    return f"{lead} {clause if is_name else clause[0].lower() + clause[1:]}."
