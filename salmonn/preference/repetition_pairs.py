"""Preference pairs of a caption that repeats itself and the same caption without the repeated clauses.

In a pair of two sampled captions a repeated clause is a small part of the difference, so DPO hardly learns to avoid it.
Here the captions agree up to the repetition, and the log-probabilities of what they share cancel out. The model's own
answers, corrected in few places, are the preferences of RLHF-V (arXiv 2312.00849). Imports no torch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from salmonn.preference.rating import Rating
from salmonn.preference.selection import Pair, RatedCaption, to_comparison
from salmonn.records import Caption, Comparison, Reference
from salmonn.score.highlight import locate_quotes
from salmonn.score.repetition import remove_clauses

_ROUNDING = 1e-9  # 90 pairs with a fraction of 0.1 allow 10 more


def select_repetition_pairs(
    captions: Sequence[Caption],
    ratings: Sequence[Rating],
    references: Mapping[str, Reference],
    *,
    max_pairs: int,
    source: str,
) -> list[Comparison]:
    """Return pairs of captions that repeat themselves and corrected ones, which are chosen.

    A clip gives at most one pair, of its caption with the most repetition that can be corrected; of more than
    `max_pairs` clips, ones at equal distances in the list are used. The margin of the pairs is 0: Total does not count
    repeated clauses.

    Args:
        captions: sampled captions, several of each clip.
        ratings: ratings of these captions by a judge, whose scores say what is repeated; others are left out.
        references: video -> reference annotation, whose caption becomes the ground truth.
        max_pairs: number of pairs at most.
        source: name of the reward, for the records.
    """
    rating_of = {(rating.video, rating.sample): rating for rating in ratings if rating.score}
    by_video: dict[str, list[RatedCaption]] = {}
    for caption in captions:
        if rating := rating_of.get((caption.video, caption.sample)):
            by_video.setdefault(caption.video, []).append(RatedCaption(caption, rating))
    pairs = [pair for group in by_video.values() if (pair := _most_repetitive_pair(group))]
    count = min(max_pairs, len(pairs))
    used = [pairs[index * len(pairs) // count] for index in range(count)]
    return [to_comparison(*pair, reference=references[pair[0].caption.video], source=source) for pair in used]


def max_repetition_pairs(num_pairs: int, fraction: float) -> int:
    """Return how many pairs may be added to `num_pairs` so that they are at most `fraction` of all."""
    return math.floor(num_pairs * fraction / (1 - fraction) + _ROUNDING)


def _most_repetitive_pair(captions: Sequence[RatedCaption]) -> Pair | None:
    """Return (corrected, repetitive) of the caption of a clip with the most repetition, None if none can be corrected.

    Ties go to the lower sample number.
    """
    for rejected in sorted(captions, key=lambda one: (-one.repetition, one.caption.sample)):
        if chosen := remove_repetition(rejected):
            return chosen, rejected
    return None


def remove_repetition(rated: RatedCaption) -> RatedCaption | None:
    """Return a caption without its repeated clauses, or None if there are none that can be removed.

    A caption that was cut off is not corrected: without its last clause, it would seem to be complete.
    """
    caption, score = rated.caption, rated.rating.score
    if score is None or not score.num_repeated_words or not caption.finished:
        return None
    spans = [quote.span for quote in locate_quotes(caption.text, score) if quote.kind == "repeated" and quote.span]
    text = remove_clauses(caption.text, spans)
    return None if text in ("", caption.text) else RatedCaption(replace(caption, text=text), rated.rating)
