"""Choice of a subset of preference pairs by gain, quality and diversity. Imports no torch.

Few clear pairs train better than all pairs (FiFA, arXiv 2410.10166). FiFA adds a margin, a quality and a term for the
diversity of prompts, and keeps the pairs with the largest sums. All pairs of a clip have the same prompt here, so
diversity is measured between clips, and relative to the pairs already kept: the pairs are chosen one by one. Pairs of
one clip are at distance 0; the distance of two clips is that of their words.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from salmonn.records import Comparison

_MAX_DISTANCE = math.sqrt(2)  # of two unit vectors without a common word
_MIN_DISTANCE = 0.05  # two pairs of a clip are at distance 0, whose logarithm is minus infinity


@dataclass(frozen=True)
class SubsetConfig:
    """Subset of the preference pairs that is trained on.

    Args:
        keep: pairs to keep: a fraction if below 1, else a number; none to keep all.
        quality_weight: weight of the quality of the chosen caption, where a judge scored it.
        diversity_weight: weight of the distance to the clips of the pairs already kept, measured on the words of their
            ground truths or, where there are none, of all their answers.
    """

    keep: float | None = None
    quality_weight: float = 0.5
    diversity_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.keep is not None and (not 0 < self.keep < math.inf or (self.keep > 1 and self.keep % 1)):
            raise ValueError(
                f"subset.keep must be a fraction between 0 and 1 or a whole number of pairs, got {self.keep}"
            )
        if not (0 <= self.quality_weight < math.inf and 0 <= self.diversity_weight < math.inf):
            raise ValueError(
                "subset.quality_weight and subset.diversity_weight must be at least 0, got "
                f"{self.quality_weight} and {self.diversity_weight}"
            )

    def num_pairs(self, total: int) -> int:
        """Return how many of `total` pairs are kept; a fraction keeps at least one."""
        if self.keep is None:
            return total
        return min(total, int(self.keep) if self.keep >= 1 else max(1, round(self.keep * total)))


@dataclass(frozen=True)
class PairImportance:
    """Why a pair was kept or not, for importance.jsonl.

    Args:
        video, chosen, rejected: the pair.
        margin: difference of the ratings; None where it is unknown.
        gain, quality: the margin and the chosen caption's quality as z-scores, in standard deviations above the mean.
        diversity: logarithm of the distance to the nearest kept pair's clip, when the pair was kept, or at the end.
        rank: place in the order of choice, from 1; None for a pair that was not kept.
    """

    video: str
    chosen: str
    rejected: str
    margin: float | None
    gain: float
    quality: float
    diversity: float
    rank: int | None


def rank_pairs(
    pairs: Sequence[Comparison], config: SubsetConfig, *, qualities: Sequence[float] | None = None
) -> list[PairImportance]:
    """Choose pairs one by one, each with the largest gain + quality + diversity.

    Args:
        pairs: all pairs. Pairs without a margin count as average.
        config: number of pairs to keep, and weights.
        qualities: quality of each chosen caption; None where no judge scored them.

    Returns:
        For each pair its terms, and its rank if it was kept. Ties go to the earlier pair.
    """
    if not pairs:
        return []
    gains = _z_scores([math.nan if pair.margin is None else pair.margin for pair in pairs])
    quality = _z_scores(qualities or [math.nan] * len(pairs))
    clips: dict[object, int] = {}
    clip = np.array([clips.setdefault(_clip_key(pair), len(clips)) for pair in pairs])
    vectors = _word_vectors(_clip_texts(pairs))
    fixed = gains + config.quality_weight * quality
    nearest = np.full(len(pairs), _MAX_DISTANCE)  # to the clips of the kept pairs
    at_choice = np.zeros(len(pairs))
    ranks: dict[int, int] = {}
    for rank in range(1, config.num_pairs(len(pairs)) + 1):
        diversity = np.log(np.maximum(nearest, _MIN_DISTANCE)) - math.log(_MAX_DISTANCE)
        importance = fixed + config.diversity_weight * diversity
        importance[list(ranks)] = -np.inf
        best = int(importance.argmax())
        ranks[best], at_choice[best] = rank, diversity[best]
        cosines = (vectors @ vectors[[best]].T).toarray()[:, 0]
        nearest = np.minimum(nearest, np.sqrt(np.maximum(2 - 2 * cosines, 0)))
        nearest[clip == clip[best]] = 0.0
    at_end = np.log(np.maximum(nearest, _MIN_DISTANCE)) - math.log(_MAX_DISTANCE)
    return [
        PairImportance(
            pair.video,
            pair.chosen,
            pair.rejected,
            pair.margin,
            float(gains[index]),
            float(quality[index]),
            float(at_choice[index] if index in ranks else at_end[index]),
            ranks.get(index),
        )
        for index, pair in enumerate(pairs)
    ]


def _clip_key(pair: Comparison) -> tuple[object, ...]:
    return pair.video, pair.modality, pair.audio, pair.start_seconds, pair.end_seconds


def _clip_texts(pairs: Sequence[Comparison]) -> list[str]:
    """Return the text of each pair's clip: its ground truths or, where it has none, all answers about it."""
    truths: dict[object, dict[str, None]] = {}
    answers: dict[object, dict[str, None]] = {}
    for pair in pairs:
        if truth := pair.ground_truth.strip():
            truths.setdefault(_clip_key(pair), {})[truth] = None
        answers.setdefault(_clip_key(pair), {}).update(dict.fromkeys((pair.chosen, pair.rejected)))
    return [" ".join(truths.get(_clip_key(pair)) or answers[_clip_key(pair)]) for pair in pairs]


def _z_scores(values: Sequence[float]) -> np.ndarray:
    """Return values in standard deviations above their mean; 0 for a missing one (NaN), or if all are equal."""
    array = np.asarray(values, dtype=np.float64)
    known = array[~np.isnan(array)]
    deviation = known.std() if len(known) else 0.0
    if deviation == 0:
        return np.zeros(len(array))
    return np.nan_to_num((array - known.mean()) / deviation)


def _word_vectors(texts: Sequence[str]) -> sparse.csr_array:
    """Return tf-idf vectors of length 1, (number of texts, number of words); a word in all texts has weight 0."""
    words = [text.lower().split() for text in texts]
    columns = {word: column for column, word in enumerate(sorted({word for text in words for word in text}))}
    rows = [row for row, text in enumerate(words) for _ in text]
    places = [columns[word] for text in words for word in text]
    counts = sparse.csr_array((np.ones(len(rows)), (rows, places)), shape=(len(texts), max(len(columns), 1)))
    frequency = np.asarray((counts > 0).sum(axis=0)).ravel()
    weighted = counts.multiply(np.log(len(texts) / np.maximum(frequency, 1))).tocsr()
    lengths = np.sqrt(np.asarray(weighted.multiply(weighted).sum(axis=1)).ravel())
    return sparse.csr_array(weighted.multiply(1 / np.maximum(lengths, 1e-12)[:, None]))
