"""Steps of a round of mrDPO that run on all ranks, and the rules that stop the rounds early."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from salmonn import dist
from salmonn.files import write_records
from salmonn.preference.groups import CaptionGroup
from salmonn.preference.rating import Rating, Reward
from salmonn.preference.repeat_negatives import select_repeat_negatives
from salmonn.preference.repetition_pairs import max_repetition_pairs, select_repetition_pairs
from salmonn.preference.selection import SelectionConfig, make_selector, select_pairs, summarize_pairs
from salmonn.preference.subset import SubsetConfig, rank_pairs
from salmonn.preference.voter_reward import VoterReward
from salmonn.records import Caption, Comparison, Unscored
from salmonn.score.judge import ScoringTask
from salmonn.train.data import ClipSet
from salmonn.train.evaluate import drop_unscored, judge_captions
from salmonn.train.rating_ahead import RatingAhead
from salmonn.train.run_folder import is_missing, load_or_create
from salmonn.train.run_log import STEPS_NAME, RunSummary, read_steps

log = logging.getLogger(__name__)
PAIRS_NAME = "pairs.jsonl"
IMPORTANCE_NAME = "importance.jsonl"
WINS_NAME = "wins.jsonl"


@dataclass(frozen=True)
class EarlyStopConfig:
    """Early stopping. A first round that fails ends the run; after a later one the best model so far is kept.

    Args:
        min_pairs: smallest number of pairs of a round; none for the number in one step.
        min_margin: value that the reward margin, averaged over the last quarter of a round, must exceed: a round below
            it has not learned to prefer the chosen answers. None to accept any margin.
        max_worsening: largest increase of the held-out Total over the best so far, as a fraction.
    """

    min_pairs: int | None = None
    min_margin: float | None = 0.0
    max_worsening: float = 0.05


class RoundFailedError(ValueError):
    """A round that cannot improve the model."""


def rate_captions(
    captions: Sequence[Caption],
    clips: ClipSet,
    *,
    reward: Reward,
    folder: Path,
    ahead: RatingAhead | None = None,
) -> list[Rating]:
    """Rate captions on all ranks, or load the ratings that an earlier run wrote to the folder of the round.

    Unscored captions are left out.

    Args:
        captions: captions of any clips.
        clips: clips with their references.
        reward: reward.
        folder: folder of the round.
        ahead: ratings that were made while captions were sampled.

    Raises:
        ValueError: all captions are unscored.
    """
    path = folder / reward.file_name
    if is_missing(path):
        rated = ahead.gather() if ahead else {}
        missing = [one for one in captions if (one.video, one.sample) not in rated]
        others = iter(judge_captions(missing, clips.by_video, judge=reward.rate))
        keys = [(one.video, one.sample) for one in captions]
        results = [rated[key] if key in rated else next(others) for key in keys]
        drop_unscored(results, name=folder.name)  # before the file is written: a file without scores is not a result
        if dist.is_main():
            reward.save(path, results)
        dist.barrier()
    return reward.load(path)


def rate_against(
    captions: Sequence[Caption], opponents: Sequence[Caption], clips: ClipSet, *, reward: Reward, folder: Path
) -> list[Rating]:
    """Rate captions by their win rates against opponents on all ranks, or load the wins.jsonl of an earlier run.

    Unscored captions are left out.

    Args:
        captions, opponents: captions of the same clips.
        clips: clips with their references.
        reward: reward that compares captions.
        folder: folder of the round.

    Raises:
        ValueError: all captions are unscored.
    """
    assert isinstance(reward, VoterReward)
    references, by_video = clips.by_video, dict[str, list[ScoringTask]]()
    for one in opponents:
        by_video.setdefault(one.video, []).append(ScoringTask(references[one.video], one))

    def judge(tasks: Sequence[ScoringTask]) -> list[Rating | Unscored]:
        videos = dict.fromkeys(task.caption.video for task in tasks)
        return reward.rate_against(tasks, [task for video in videos for task in by_video.get(video, ())])

    def rate() -> list[Rating]:
        return drop_unscored(judge_captions(captions, references, judge=judge), name=folder.name)

    return load_or_create(folder / WINS_NAME, Rating, rate)


def load_or_select(
    captions: Sequence[Caption],
    ratings: Sequence[Rating],
    clips: ClipSet,
    *,
    config: SelectionConfig,
    subset: SubsetConfig,
    source: str,
    folder: Path,
) -> list[Comparison]:
    """Select preference pairs and log what was kept and why, or load the pairs.jsonl of an earlier run.

    `source` is the name of the reward; `folder` is that of the round. Pairs that differ in repetition only are added
    last, as they have no margin that a subset could be chosen by.
    """
    references = clips.by_video

    def select() -> list[Comparison]:
        selection = select_pairs(captions, ratings, references, selector=make_selector(config), source=source)
        log.info("%s: %s", folder.name, selection.describe())
        pairs = keep_subset(selection.pairs, subset, qualities=selection.qualities, folder=folder)
        added: list[Comparison] = []
        if max_added := max_repetition_pairs(len(pairs), config.repetition_fraction):
            added = select_repetition_pairs(captions, ratings, references, max_pairs=max_added, source=source)
            log.info("%s: added %d pairs of a missing event and a repeated clause", folder.name, len(added))
        if config.repeat_negatives:
            negatives = select_repeat_negatives(
                captions,
                ratings,
                references,
                fraction=config.repeat_negatives,
                source=source,
                foreign=config.inserted_clause == "other",
            )
            log.info("%s: added %d pairs with a repeated clause rejected", folder.name, len(negatives))
            added += negatives
        return pairs + added

    return load_or_create(folder / PAIRS_NAME, Comparison, select)


def keep_subset(
    pairs: Sequence[Comparison], config: SubsetConfig, *, folder: Path, qualities: Sequence[float] | None = None
) -> list[Comparison]:
    """Keep the most important pairs, log what they are, and write why each pair was kept or not to importance.jsonl."""
    if config.keep is None:
        return list(pairs)
    importances = rank_pairs(pairs, config, qualities=qualities)
    kept = [pair for pair, importance in zip(pairs, importances, strict=True) if importance.rank]
    if dist.is_main():
        write_records(folder / IMPORTANCE_NAME, importances)
    before, after = summarize_pairs(pairs), summarize_pairs(kept)
    log.info(
        "%s: kept %d of %d pairs from %d videos; mean margin %.3f (%.3f before), mean words %.1f chosen, %.1f rejected",
        folder.name,
        after.num_pairs,
        before.num_pairs,
        len({pair.video for pair in kept}),
        after.mean_margin,
        before.mean_margin,
        after.mean_words_chosen,
        after.mean_words_rejected,
    )
    if num_unknown := sum(pair.margin is None for pair in pairs):
        log.info("%s: %d of %d pairs have no margin; these count as average", folder.name, num_unknown, len(pairs))
    if not any(one.gain or config.quality_weight * one.quality for one in importances):
        log.warning(
            "%s: no pair is kept for its margin or quality, as neither is known or differs: %s",
            folder.name,
            "only diversity, the distance between clips, decides" if config.diversity_weight else "the first are kept",
        )
    return kept


def require_examples(
    examples: Sequence[Comparison] | Sequence[CaptionGroup],
    early_stopping: EarlyStopConfig,
    *,
    batch_size: int,
    name: str,
    are_groups: bool = False,
) -> None:
    """Raise RoundFailedError if a round has too few pairs, or groups."""
    required = max(1, batch_size if early_stopping.min_pairs is None else early_stopping.min_pairs)
    if len(examples) >= required:
        return
    if are_groups:
        found, smaller_gap = "clips whose captions are rated differently", ""
    else:
        found = "pairs of captions that differ enough"
        smaller_gap = f"accept a smaller gap (selection.min_gap) with --redo-from {name}/pairs, or "
    raise RoundFailedError(
        f"{name} has {len(examples)} {found}, fewer than {required} (early_stopping.min_pairs, by default "
        f"fit.batch_size): {smaller_gap}sample more captions (sampling.num_samples) or at a higher temperature with "
        f"--redo-from {name.partition('/')[0]}/captions"
    )


def require_margin(folder: Path, early_stopping: EarlyStopConfig, *, name: str, steps: str = "fit.steps") -> None:
    """Raise RoundFailedError if a trained stage does not prefer the chosen answers, by its log of steps.

    Args:
        folder: folder of the stage.
        early_stopping: smallest margin.
        name: name of the stage.
        steps: name of the setting of its number of steps.
    """
    if early_stopping.min_margin is None:
        return
    margins = [step["margin"] for step in read_steps(folder / STEPS_NAME) if "margin" in step]
    if not margins:  # the loss has no such part
        return
    last_quarter = margins[-max(1, len(margins) // 4) :]
    if (margin := sum(last_quarter) / len(last_quarter)) <= early_stopping.min_margin:
        raise RoundFailedError(
            f"{name} has not learned to prefer the chosen captions: the reward margin averages "
            f"{margin:.4f} over the last quarter of its steps, and early_stopping.min_margin is "
            f"{early_stopping.min_margin}; check {folder / PAIRS_NAME}, or use more steps ({steps}) or a higher "
            f"learning rate (fit.learning_rate) with --redo-from {name}/model"
        )


def stop_reason(summary: RunSummary, early_stopping: EarlyStopConfig) -> str | None:
    """Return why the rounds stop if the last one is too much worse than the best before it."""
    *before, last = [summary.sft.total, *(rates.total for rates in summary.rounds)]
    if last <= min(before) + early_stopping.max_worsening:
        return None
    return (
        f"after round {len(summary.rounds)} the held-out Total is {last:.3f}, up from {min(before):.3f}: more than "
        f"early_stopping.max_worsening {early_stopping.max_worsening}"
    )


def over_optimization(summary: RunSummary) -> str | None:
    """Return why the rounds stop if the policy exploits its reward model; None without one.

    Past some distance from the start, the reward keeps rising while the true objective falls (arXiv 2210.10760): here
    it rises twice by a standard deviation on held-out captions while the judge's Total falls by less than a point, or
    captions are 1.5 times as long as at the start and miss as much.
    """
    totals = [summary.sft.total, *(rates.total for rates in summary.rounds)]
    rewards = list(summary.proxy.values())
    hollow = [
        number
        for number in range(1, len(rewards))
        if rewards[number] - rewards[number - 1] >= 1 and totals[number - 1] - totals[number] < 0.01
    ]
    remedy = (
        "let the judge label more clips each round (reward.refresh_clips), take fewer steps (fit.steps), or rate with "
        "caution (reward.caution)"
    )
    if len(hollow) >= 2:
        return (
            f"the reward rose by a standard deviation in rounds {hollow[0]} and {hollow[-1]}, but the held-out Total "
            f"did not fall by a point: the policy exploits its reward model; {remedy}"
        )
    if not summary.reward or not summary.rounds:
        return None
    start, last = summary.sft, summary.rounds[-1]
    if last.words > 1.5 * start.words and last.missing >= start.missing:
        return (
            f"captions have {last.words:.0f} words, up from {start.words:.0f}, and miss as much as at the start: the "
            f"policy exploits its reward model's liking for length; {remedy}, or set reward.length_penalty"
        )
    return None


def best_round(summary: RunSummary) -> int | None:
    """Return the number of the round with the lowest sum of held-out Total and Repetition.

    Total does not count repeated content, but rebirth would learn it from the captions of that round's model.

    None if the rounds stopped early and no round has a lower Total than the start.
    """
    if summary.stopped and min(rates.total for rates in summary.rounds) >= summary.sft.total:
        return None
    errors = [rates.total + rates.repetition for rates in summary.rounds]
    return errors.index(min(errors)) + 1
