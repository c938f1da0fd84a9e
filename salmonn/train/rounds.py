"""From a model to its preference pairs: captions of the training clips are sampled, judged and paired.

Each step's records are kept in the round's folder; a run that goes on reads what is there.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from salmonn import dist
from salmonn.caption.captioner import Captioner
from salmonn.caption.generator import Sampling
from salmonn.model.layout import ClipFeatures
from salmonn.preference.selection import choose_pairs, summarise_pairs
from salmonn.records import Caption, Comparison, Reference, Score
from salmonn.score.formats import read_scores, write_scores
from salmonn.score.judge import Judge
from salmonn.score.scoring import make_judge_info
from salmonn.train.evaluate import SIDE_BY_SIDE, SampleConfig, judge_captions, require_scores, sample_captions
from salmonn.train.run_folder import is_missing, load_or_create, load_or_create_captions

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PairConfig:
    """Choice of preference pairs.

    Args:
        num_samples: captions sampled of each training clip.
        sampling: how they are drawn.
        min_gap: least difference in Total between chosen and rejected.
        max_pairs_per_video: best with worst, second best with second worst, and so on.
        repetition_weight: what repetition counts against a caption, beside Total.
        max_length_ratio: pairs whose lengths differ by more are left out; none keeps them.
    """

    num_samples: int = 8
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.8, top_p=0.95))
    min_gap: float = 0.1
    max_pairs_per_video: int = 2
    repetition_weight: float = 1.0
    max_length_ratio: float | None = None


def make_pairs(
    captioner: Captioner,
    references: Sequence[Reference],
    blocks: Sequence[ClipFeatures],
    *,
    judge: Judge,
    config: PairConfig,
    folder: Path,
    seed: int,
    side_by_side: int = SIDE_BY_SIDE,
) -> list[Comparison]:
    """Sample, judge and pair captions of clips; shared over ranks.

    Args:
        captioner: the policy.
        references: of the clips.
        blocks: of the clips, as `encode_clips` gives them.
        judge: of the captions.
        config: of sampling and choice.
        folder: of the round: captions.jsonl, scores.jsonl and pairs.jsonl are written there.
        seed: of sampling.
        side_by_side: captions that are generated at once.
    """
    draw = SampleConfig(config.sampling, seed=seed, num_samples=config.num_samples)
    sample = partial(sample_captions, captioner, references, blocks, draw=draw, name=f"{folder.name}: sampling")
    captions = load_or_create_captions(folder, partial(sample, side_by_side=side_by_side))
    by_video = {reference.video: reference for reference in references}
    scores = _judged(folder / "scores.jsonl", captions, by_video, judge=judge)
    pairs = load_or_create(
        folder / "pairs.jsonl", Comparison, lambda: pair_captions(captions, scores, by_video, config=config)
    )
    report = summarise_pairs(pairs)
    log.info(
        "%s: %d pairs, mean gap %.3f; mean words %.1f chosen, %.1f rejected",
        folder.name,
        report.num_pairs,
        report.mean_margin,
        report.mean_words_chosen,
        report.mean_words_rejected,
    )
    return pairs


def _judged(
    path: Path, captions: Sequence[Caption], references: Mapping[str, Reference], *, judge: Judge
) -> list[Score]:
    """Scores of captions, from the score file where a run before wrote it; the unscored ones stay in it."""
    if is_missing(path):
        results = judge_captions(captions, references, judge=judge)
        require_scores(results, name=path.parent.name)  # before it is written: a run without any score is no result
        if dist.is_main():
            write_scores(path, make_judge_info(judge), results)
        dist.barrier()
    return read_scores(path).scores


def pair_captions(
    captions: Sequence[Caption], scores: Sequence[Score], references: Mapping[str, Reference], *, config: PairConfig
) -> list[Comparison]:
    """Best against worst, clip by clip, of the captions that have a score."""
    scored = {(score.video, score.sample) for score in scores}
    by_video: dict[str, list[Caption]] = {}
    for caption in captions:
        if (caption.video, caption.sample) in scored:
            by_video.setdefault(caption.video, []).append(caption)
    return choose_pairs(
        by_video,
        scores,
        references,
        min_gap=config.min_gap,
        max_pairs_per_video=config.max_pairs_per_video,
        repetition_weight=config.repetition_weight,
        max_length_ratio=config.max_length_ratio,
    )
