"""Selection of preference pairs from the rated captions of a clip, and marks on their clauses. Imports no torch.

To add a selector, write a class with the methods of `Selector`, and name it in `SelectionConfig.kind` and
`make_selector`. A choice among the pairs of all clips is a subset instead (salmonn/preference/subset.py).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, assert_never

from salmonn.preference.objectives import DIALOGUE, OBJECTIVES, objectives_of
from salmonn.preference.rating import Rating
from salmonn.records import Caption, Comparison, Mark, Reference, Score
from salmonn.score.highlight import locate_quotes
from salmonn.score.judge import restrict_to_caption

# Margins are differences of fractions: 0.5 - 0.4 must pass a min_gap of 0.1.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class RatedCaption:
    """A caption with its rating and, where a judge gave it, the reference that it is about."""

    caption: Caption
    rating: Rating
    reference: Reference | None = None

    @property
    def num_words(self) -> int:
        """Length in words."""
        return len(self.caption.text.split())

    @property
    def repetition(self) -> float:
        """Fraction of the words that are in repeated clauses, by a judge's score; 0 without one."""
        return self.rating.score.repetition if self.rating.score else 0.0

    @property
    def objectives(self) -> Mapping[str, float | None]:
        """Named objectives by a judge's score, or else the parts of the rating."""
        if self.rating.score and self.reference:
            reference = restrict_to_caption(self.reference, self.caption)
            dialogue = self.rating.score.dialogue
            return {
                **dict(zip(OBJECTIVES, objectives_of(self.rating.score, reference), strict=True)),
                DIALOGUE: dialogue.accuracy if dialogue else None,
            }
        return self.rating.parts

    @property
    def quality(self) -> float | None:
        """-(repetition + hallucinated events / N), by a judge's score; None without one."""
        score = self.rating.score
        return -(score.repetition + score.hallucinated / max(score.num_events, 1)) if score else None


Pair = tuple[RatedCaption, RatedCaption]  # chosen, rejected


class Selector(Protocol):
    """Selects preference pairs from the captions of one clip."""

    def select(self, captions: Sequence[RatedCaption]) -> tuple[list[Pair], str]:
        """Return (chosen, rejected) pairs and, if there are none, the reason."""
        ...


@dataclass(frozen=True)
class SelectionConfig:
    """Selection of preference pairs.

    Args:
        kind: "best_worst" pairs the best caption of a clip with the worst, the second best with the second worst, and
            so on.
        min_gap: smallest difference between chosen and rejected in the main part of the rating; Total for a judge.
        max_pairs_per_video: maximum number of pairs of a clip; each caption is used once.
        max_length_ratio: largest ratio of their lengths in words, in either direction; none for no limit. It and
            `floors` cannot be combined with the pairs of the last three settings, which they do not bound.
        floors: objective -> smallest value that the chosen caption must have, such as {"faithful": 0.8}; see
            `salmonn.preference.objectives`. A judge's scores have objectives, and reward models of that kind.
        min_spreads: smallest difference in multiples of the larger spread of the two ratings, where a reward model with
            an ensemble gave them; none for any.
        repetition_fraction: largest fraction of a round's pairs that are added to discourage repetition: the start of a
            caption followed by a missing event is chosen over the same start followed by a repeated clause.
        repeat_negatives: share of the clips that get one more pair: the continuation of the best caption over a
            repetition of one of its clauses (`salmonn.preference.repeat_negatives`).
        inserted_clause: rejected clause of these pairs: the caption's "own", or as a control one of "other" clips.
    """

    kind: Literal["best_worst"] = "best_worst"
    min_gap: float = 0.1
    max_pairs_per_video: int = 2
    max_length_ratio: float | None = None
    floors: dict[str, float] | None = None
    min_spreads: float | None = None
    repetition_fraction: float = 0.0
    repeat_negatives: float = 0.0
    inserted_clause: Literal["own", "other"] = "own"

    def __post_init__(self) -> None:
        if self.min_gap <= 0 or self.max_pairs_per_video < 1:
            raise ValueError(
                "min_gap must be above 0 and max_pairs_per_video at least 1, got "
                f"{self.min_gap} and {self.max_pairs_per_video}"
            )
        if not 0 <= self.repetition_fraction < 1:
            raise ValueError(f"repetition_fraction must be from 0 to below 1, got {self.repetition_fraction}")
        if not 0 <= self.repeat_negatives <= 1:
            raise ValueError(f"repeat_negatives is a share of the clips from 0 to 1, got {self.repeat_negatives}")
        if unknown := sorted((self.floors or {}).keys() - {*OBJECTIVES, DIALOGUE}):
            raise ValueError(
                f"floors has no objective {', '.join(unknown)}; the objectives are {', '.join((*OBJECTIVES, DIALOGUE))}"
            )
        if not all(0 <= floor <= 1 for floor in (self.floors or {}).values()) or (self.min_spreads or 0) < 0:
            raise ValueError(
                f"floors must be from 0 to 1 and min_spreads at least 0, got {self.floors} and {self.min_spreads}"
            )
        if self.max_length_ratio is not None and self.max_length_ratio < 1:
            raise ValueError(
                f"max_length_ratio is longer / shorter and must be at least 1, got {self.max_length_ratio}"
            )


class BestWorstSelector:
    """Pairs the best caption of a clip with the worst.

    The chosen caption is the best one that has a partner. Its partner is the worst caption whose rating is lower,
    whose main part is lower by at least `min_gap`, whose text differs, and whose length is within `max_length_ratio`.
    Further pairs of a clip use other captions.

    Empty captions and captions cut off at the token limit are never chosen: they would teach the model to be silent or
    not to stop. DPO tends to change the length of answers (in trials the best of 8 was shorter than the worst, and
    training shortened the captions), so ties counteract that: among equally good captions the longest is chosen, among
    equally bad ones the one closest to it in length is rejected. Remaining ties go to the lower sample number.
    """

    def __init__(self, config: SelectionConfig) -> None:
        self.config = config

    def select(self, captions: Sequence[RatedCaption]) -> tuple[list[Pair], str]:
        """Return (chosen, rejected) pairs and, if there are none, the reason."""
        remaining, pairs = list(captions), list[Pair]()
        while len(pairs) < self.config.max_pairs_per_video and (pair := self._best_pair(remaining)):
            pairs.append(pair)
            remaining = [one for one in remaining if one not in pair]
        if pairs:
            return pairs, ""
        if len(captions) < 2:
            return [], "fewer than two rated captions"
        if not any(one.num_words and one.caption.finished for one in captions):
            return [], "every caption is empty or cut off"
        if not any(self._may_be_chosen(one) for one in captions):
            return [], "no caption reaches the floors"
        return [], "no two captions differ enough"

    def _best_pair(self, captions: Sequence[RatedCaption]) -> Pair | None:
        best_first = sorted(captions, key=lambda one: (-one.rating.value, -one.num_words, one.caption.sample))
        for chosen in best_first:
            if not self._may_be_chosen(chosen):
                continue
            # The worst rating first, then the closest length, then the lower sample number.
            partners = [
                (one.rating.value, abs(one.num_words - chosen.num_words), one.caption.sample, index)
                for index, one in enumerate(captions)
                if self._is_partner(one, chosen)
            ]
            if partners:
                *_, index = min(partners)
                return chosen, captions[index]
        return None

    def _may_be_chosen(self, one: RatedCaption) -> bool:
        if not one.num_words or not one.caption.finished:
            return False
        values = one.objectives if self.config.floors else {}
        return all(
            (value := values.get(name)) is None or value >= floor - _ROUNDING
            for name, floor in (self.config.floors or {}).items()
        )

    def _is_partner(self, one: RatedCaption, chosen: RatedCaption) -> bool:
        shorter, longer = sorted((one.num_words, chosen.num_words))
        limit = self.config.max_length_ratio
        spread = max(each.rating.parts.get("spread", 0.0) for each in (one, chosen))
        min_gap = max(self.config.min_gap, (self.config.min_spreads or 0.0) * spread)
        return (
            one.rating.value < chosen.rating.value
            and chosen.rating.main - one.rating.main >= min_gap - _ROUNDING
            and one.caption.text.split() != chosen.caption.text.split()
            and (limit is None or longer / max(shorter, 1) <= limit)
        )


def make_selector(config: SelectionConfig) -> Selector:
    """Build the selector that the configuration names."""
    match config.kind:
        case "best_worst":
            return BestWorstSelector(config)
        case _:
            assert_never(config.kind)


@dataclass(frozen=True)
class Selection:
    """Selected pairs of all clips, and an account of what was not selected.

    Args:
        pairs: the pairs, clip by clip.
        qualities: quality of each pair's chosen caption, -(repetition + share of hallucinated events); None where no
            judge scored it.
        num_videos: number of clips with captions.
        without_pair: reason -> number of clips without a pair.
    """

    pairs: list[Comparison]
    num_videos: int
    qualities: list[float] | None = None
    without_pair: Mapping[str, int] = field(default_factory=dict)

    def describe(self) -> str:
        """Return the account as text: number, margins and lengths of the pairs, and why clips have none."""
        summary = summarize_pairs(self.pairs)
        num_without = sum(self.without_pair.values())
        text = (
            f"{summary.num_pairs} pairs from {self.num_videos - num_without} of {self.num_videos} videos; "
            f"mean margin {summary.mean_margin:.3f}; mean words {summary.mean_words_chosen:.1f} chosen, "
            f"{summary.mean_words_rejected:.1f} rejected"
        )
        reasons = ", ".join(f"{reason} ({count})" for reason, count in sorted(self.without_pair.items()))
        return f"{text}; without a pair: {reasons}" if reasons else text


def select_pairs(
    captions: Sequence[Caption],
    ratings: Sequence[Rating],
    references: Mapping[str, Reference],
    *,
    selector: Selector,
    source: str,
) -> Selection:
    """Select preference pairs of all clips.

    Args:
        captions: sampled captions, several of each clip; those without a rating are left out.
        ratings: ratings of these captions, matched by video and sample.
        references: video -> reference annotation, whose caption becomes the ground truth.
        selector: strategy that pairs the captions of one clip.
        source: name of the reward, for the records.

    Raises:
        ValueError: a video has no reference, or its captions have different prompts or equal sample numbers.
    """
    rating_of = {(rating.video, rating.sample): rating for rating in ratings}
    by_video: dict[str, list[Caption]] = {}
    for caption in captions:
        by_video.setdefault(caption.video, []).append(caption)
    pairs: list[Comparison] = []
    qualities: list[float | None] = []
    without_pair = Counter[str]()
    for video, group in by_video.items():
        if video not in references:
            raise ValueError(f"no reference for {video}; use the references that its captions were rated against")
        samples = [caption.sample for caption in group]
        if len(set(samples)) < len(samples) or len({caption.prompt for caption in group}) > 1:
            raise ValueError(f"captions of {video} must have one prompt and different sample numbers, got {samples}")
        rated = [
            RatedCaption(one, rating_of[video, one.sample], references[video])
            for one in group
            if (video, one.sample) in rating_of
        ]
        selected, reason = selector.select(rated)
        pairs += [to_comparison(*pair, reference=references[video], source=source) for pair in selected]
        qualities += [chosen.quality for chosen, _ in selected]
        without_pair.update([reason] if reason else [])
    known = [quality for quality in qualities if quality is not None]
    return Selection(pairs, len(by_video), known if len(known) == len(pairs) else None, dict(without_pair))


def to_comparison(chosen: RatedCaption, rejected: RatedCaption, *, reference: Reference, source: str) -> Comparison:
    """Convert a selected pair to a record."""
    return Comparison(
        video=chosen.caption.video,
        prompt=chosen.caption.prompt,
        chosen=chosen.caption.text,
        rejected=rejected.caption.text,
        ground_truth=reference.caption,
        margin=chosen.rating.main - rejected.rating.main,
        source=source,
        chosen_finished=chosen.caption.finished,
        rejected_finished=rejected.caption.finished,
    )


@dataclass(frozen=True)
class PairSummary:
    """Number of pairs, mean margin of those with one, and mean lengths in words; zeros if there are none."""

    num_pairs: int
    mean_margin: float
    mean_words_chosen: float
    mean_words_rejected: float


def summarize_pairs(pairs: Sequence[Comparison]) -> PairSummary:
    """Return number, mean margin and mean lengths of pairs; a difference in length is learned too."""
    count = max(len(pairs), 1)
    margins = [pair.margin for pair in pairs if pair.margin is not None]
    return PairSummary(
        num_pairs=len(pairs),
        mean_margin=sum(margins) / max(len(margins), 1),
        mean_words_chosen=sum(len(pair.chosen.split()) for pair in pairs) / count,
        mean_words_rejected=sum(len(pair.rejected.split()) for pair in pairs) / count,
    )


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
