"""Preference pairs of a caption's start followed by a repeated clause (rejected), or by a missing event (chosen).

A captioner that knows that something happens, but not what, mentions an earlier event again, which Total does not
count. In a pair of two sampled captions the repeated clause is a small part of the difference. Here both texts are the
same up to that clause and end after it, so that nothing else is learned: neither to stop nor to be brief. Correcting
the first wrong step after the same prefix is Step-DPO (arXiv 2406.18629). Imports no torch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from salmonn.preference.rating import Rating
from salmonn.preference.selection import Pair, RatedCaption, to_comparison
from salmonn.records import Caption, Comparison, Event, Reference
from salmonn.score.highlight import find_missed_events, locate_quotes

_ROUNDING = 1e-9  # 90 pairs with a fraction of 0.1 allow 10 more


def select_repetition_pairs(
    captions: Sequence[Caption],
    ratings: Sequence[Rating],
    references: Mapping[str, Reference],
    *,
    max_pairs: int,
    source: str,
) -> list[Comparison]:
    """Return pairs of a missing event (chosen) and a repeated clause (rejected) after the same start of a caption.

    A clip gives at most one pair, of its caption with the most repetition that can be corrected; if there are more than
    `max_pairs` clips, evenly spaced ones are used. The margin of the pairs is 0: Total does not count repeated clauses.

    Args:
        captions: sampled captions, several of each clip.
        ratings: ratings of these captions by a judge, whose scores say what is repeated; others are left out.
        references: video -> reference annotation, whose events replace repeated clauses.
        max_pairs: maximum number of pairs.
        source: name of the reward, for the records.
    """
    rating_of = {(rating.video, rating.sample): rating for rating in ratings if rating.score}
    by_video: dict[str, list[RatedCaption]] = {}
    for caption in captions:
        if rating := rating_of.get((caption.video, caption.sample)):
            by_video.setdefault(caption.video, []).append(RatedCaption(caption, rating))
    found = [_most_repetitive_pair(group, references[video].events) for video, group in by_video.items()]
    pairs = [pair for pair in found if pair]
    count = min(max_pairs, len(pairs))
    used = [pairs[index * len(pairs) // count] for index in range(count)]
    return [to_comparison(*pair, reference=references[pair[0].caption.video], source=source) for pair in used]


def max_repetition_pairs(num_pairs: int, fraction: float) -> int:
    """Return how many pairs may be added to `num_pairs` so that they are at most `fraction` of all."""
    return math.floor(num_pairs * fraction / (1 - fraction) + _ROUNDING)


def _most_repetitive_pair(captions: Sequence[RatedCaption], events: Sequence[Event]) -> Pair | None:
    """Return (corrected, repetitive) of the caption of a clip with the most repetition, None if none can be corrected.

    Ties go to the lower sample number.
    """
    for rated in sorted(captions, key=lambda one: (-one.repetition, one.caption.sample)):
        if rated.repetition and (pair := replace_repetition(rated, events)):
            return pair
    return None


def replace_repetition(rated: RatedCaption, events: Sequence[Event]) -> Pair | None:
    """Return the start of a caption with a missing event instead of its first repeated clause, and with that clause.

    The event must not precede the event that is mentioned before the clause, nor follow the one that is mentioned after
    it. If there are several, the one whose text has most words in common with the clause is used: probably it was
    confused with it. Both texts count as cut off: the caption continues after them.

    Args:
        rated: caption with a judge's score.
        events: events of its clip.
    """
    caption, score = rated.caption, rated.rating.score
    assert score is not None
    quotes = [(quote, quote.span) for quote in locate_quotes(caption.text, score) if quote.span]
    mentions = sorted(((span, quote.event) for quote, span in quotes if quote.event), key=lambda one: one[0])
    missed = [event for _, event in find_missed_events(score, events) if event]
    repeated = [span for quote, span in quotes if quote.kind == "repeated"]
    # Of two places that end together, the shorter one: the other has the words that introduce the clause too.
    for start, end in sorted(repeated, key=lambda span: (span[1], -span[0])):
        before = [event for span, event in mentions if span[1] <= start][-1:]
        after = [event for span, event in mentions if span[0] >= end][:1]
        fitting = [
            event
            for event in missed
            if not any(event.precedes(one) for one in before) and not any(one.precedes(event) for one in after)
        ]
        if fitting:
            words = set(caption.text[start:end].lower().split())
            text = max(fitting, key=lambda event: len(words & set(event.text.lower().split()))).text
            if caption.text[start].isupper():
                text = text[0].upper() + text[1:]
            chosen, rejected = (
                replace(caption, text=one, finished=False) for one in (caption.text[:start] + text, caption.text[:end])
            )
            return RatedCaption(chosen, rated.rating), RatedCaption(rejected, rated.rating)
    return None
