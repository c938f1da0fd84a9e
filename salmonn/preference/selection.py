"""Preference pairs: of several captions of one video, a good one against a bad one. Needs records only, no torch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from salmonn.records import Caption, Comparison, Reference, Score

# Gaps are differences of fractions: 0.5 - 0.4 must pass a min_gap of 0.1.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class PairReport:
    """What a set of pairs teaches besides content: mean lengths in words, and the mean margin. Zeros if empty."""

    num_pairs: int
    mean_margin: float
    mean_words_chosen: float
    mean_words_rejected: float


def choose_pairs(
    captions_by_video: Mapping[str, Sequence[Caption]],
    scores: Iterable[Score],
    references: Mapping[str, Reference],
    *,
    min_gap: float = 0.1,
    max_pairs_per_video: int = 1,
    repetition_weight: float = 1.0,
    max_length_ratio: float | None = None,
) -> list[Comparison]:
    """Pair the best caption of each video with the worst, by badness = Total + repetition_weight * repetition.

    Scores belong to captions by (video, sample). The chosen one is the best for which there is a partner, its partner
    the worst that is worse in badness, at least `min_gap` worse in Total, of another text, and where
    `max_length_ratio` is given, within that ratio of words either way. Further pairs of a video use other captions.

    An empty caption and one that ran into its token limit are never chosen: they would teach silence, or not to stop.
    DPO tends to change the length of answers (in trials the best of 8 was shorter than the worst, and training
    shortened the captions), so ties lean against that: of equally good captions the longer is chosen, of equally bad
    ones the one nearest to it in length is rejected. Then the lower sample number decides.

    Raises:
        ValueError: a caption without score or two of one sample number, a video without reference, captions of one
            video on different prompts, or an option out of range.
    """
    _check(
        min_gap=min_gap,
        max_pairs_per_video=max_pairs_per_video,
        repetition_weight=repetition_weight,
        max_length_ratio=max_length_ratio,
    )
    score_of = {(score.video, score.sample): score for score in scores}
    pairs = []
    for video, captions in captions_by_video.items():
        if video not in references:
            raise ValueError(f"no reference for {video}: give the references that its captions were scored against")
        rated = _rate(video, captions, score_of=score_of, repetition_weight=repetition_weight)
        for _ in range(max_pairs_per_video):
            pair = _best_pair(rated, min_gap=min_gap, max_length_ratio=max_length_ratio)
            if pair is None:
                break
            pairs.append(_to_pair(*pair, reference=references[video]))
            rated = [one for one in rated if one not in pair]
    return pairs


def summarise_pairs(pairs: Sequence[Comparison]) -> PairReport:
    """Count, mean gap and mean lengths; look at the lengths before training on the pairs."""
    count = max(len(pairs), 1)
    margins = [pair.margin for pair in pairs if pair.margin is not None]
    return PairReport(
        num_pairs=len(pairs),
        mean_margin=sum(margins) / max(len(margins), 1),
        mean_words_chosen=sum(len(pair.chosen.split()) for pair in pairs) / count,
        mean_words_rejected=sum(len(pair.rejected.split()) for pair in pairs) / count,
    )


def _check(
    *,
    min_gap: float,
    max_pairs_per_video: int,
    repetition_weight: float,
    max_length_ratio: float | None,
) -> None:
    if min_gap <= 0 or max_pairs_per_video < 1 or repetition_weight < 0:
        raise ValueError(
            "min_gap must be > 0, max_pairs_per_video >= 1 and repetition_weight >= 0, got "
            f"{min_gap}, {max_pairs_per_video} and {repetition_weight}"
        )
    if max_length_ratio is not None and max_length_ratio < 1:
        raise ValueError(f"max_length_ratio is longer / shorter and must be at least 1, got {max_length_ratio}")


@dataclass(frozen=True)
class _Rated:
    caption: Caption
    total: float
    badness: float
    num_words: int


def _rate(
    video: str,
    captions: Sequence[Caption],
    *,
    score_of: Mapping[tuple[str, int], Score],
    repetition_weight: float,
) -> list[_Rated]:
    samples = [caption.sample for caption in captions]
    if len(set(samples)) < len(samples) or len({caption.prompt for caption in captions}) > 1:
        raise ValueError(f"the captions of {video} must have one prompt and different sample numbers, got {samples}")
    rated = []
    for caption in captions:
        score = score_of.get((video, caption.sample))
        if score is None or caption.video != video:
            raise ValueError(f"no score for sample {caption.sample} of {caption.video}, listed under {video}")
        badness = score.total + repetition_weight * score.repetition
        rated.append(_Rated(caption, score.total, badness, len(caption.text.split())))
    return rated


def _best_pair(
    rated: Sequence[_Rated],
    *,
    min_gap: float,
    max_length_ratio: float | None,
) -> tuple[_Rated, _Rated] | None:
    best_first = sorted(rated, key=lambda one: (one.badness, -one.num_words, one.caption.sample))
    for chosen in best_first:
        if not chosen.num_words or not chosen.caption.finished:
            continue
        partners = [
            one
            for one in rated
            if one.badness > chosen.badness
            and one.total - chosen.total >= min_gap - _ROUNDING
            and one.caption.text.split() != chosen.caption.text.split()
            and (max_length_ratio is None or _length_ratio(one, chosen) <= max_length_ratio)
        ]
        if partners:
            return chosen, min(
                partners,
                key=lambda one, best=chosen: (  # type: ignore[misc]
                    -one.badness,
                    abs(one.num_words - best.num_words),
                    one.caption.sample,
                ),
            )
    return None


def _length_ratio(one: _Rated, other: _Rated) -> float:
    shorter, longer = sorted((one.num_words, other.num_words))
    return longer / max(shorter, 1)


def _to_pair(chosen: _Rated, rejected: _Rated, *, reference: Reference) -> Comparison:
    return Comparison(
        video=chosen.caption.video,
        prompt=chosen.caption.prompt,
        chosen=chosen.caption.text,
        rejected=rejected.caption.text,
        ground_truth=reference.caption,
        margin=rejected.total - chosen.total,
        chosen_finished=chosen.caption.finished,
        rejected_finished=rejected.caption.finished,
    )
