"""A set of captions judged several times over: the pass with the median Total counts, the others show the spread.

A language model does not judge twice alike, even at temperature 0. The published protocol takes the median of 7 passes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from salmonn.records import Score, Unscored
from salmonn.score.judge import Judge, ProgressCallback, ScoringTask

# Attempts within a pass may each have a seed of their own.
SEEDS_OF_A_PASS = 100


@dataclass(frozen=True)
class JudgingPasses:
    """What several passes over the same captions gave.

    Args:
        results: of the pass that counts, in the captions' order.
        totals: each pass's Total; None of a pass in which nothing could be scored.
        kept: which pass counts, from 0.
        seeds: each pass's.
    """

    results: list[Score | Unscored]
    totals: tuple[float | None, ...]
    kept: int
    seeds: tuple[int, ...]


def judge_passes(
    tasks: Sequence[ScoringTask],
    judge: Judge,
    *,
    total: Callable[[Sequence[Score]], float],
    passes: int = 1,
    seed: int = 0,
    once: Judge | None = None,
    progress: ProgressCallback | None = None,
) -> JudgingPasses:
    """Judge all captions `passes` times.

    Args:
        tasks: captions with their references.
        judge: who judges.
        total: a pass's Total from its scores.
        passes: how often; of an even number the lower middle one counts.
        seed: of the first pass; each further one is 100 on.
        once: judges a caption that has a score of an earlier pass; where it cannot, that score stands. None judges each
            pass for itself, and takes the Totals over the captions that all passes could score, so that they differ by
            the judge alone.
        progress: called with the number of judgements just made.

    Raises:
        ValueError: passes is below 1, or above it for a judge that always says the same.
    """
    if passes < 1 or (passes > 1 and judge.is_exact):
        raise ValueError(
            f"passes must be at least 1, got {passes}"
            if passes < 1
            else f"the judge {judge.name} says the same in every pass: leave out --passes"
        )
    seeds = tuple(seed + SEEDS_OF_A_PASS * number for number in range(passes))
    rounds: list[list[Score | Unscored]] = []
    for number, pass_seed in enumerate(seeds):
        if number and once:
            rounds.append(_judge_over(tasks, rounds[-1], judge, once, seed=pass_seed, progress=progress))
        else:
            rounds.append(judge.judge(tasks, seed=pass_seed, progress=progress))
    totals = _totals(rounds, total, is_common=once is None)
    ranked = sorted((value, place) for place, value in enumerate(totals) if value is not None)
    kept = ranked[(len(ranked) - 1) // 2][1] if ranked else 0
    return JudgingPasses(rounds[kept], tuple(totals), kept, seeds)


def _totals(
    rounds: Sequence[Sequence[Score | Unscored]], total: Callable[[Sequence[Score]], float], *, is_common: bool
) -> list[float | None]:
    used = [results for results in rounds if any(isinstance(result, Score) for result in results)]
    common = {place for place in range(len(rounds[0])) if all(isinstance(results[place], Score) for results in used)}
    totals: list[float | None] = []
    for results in rounds:
        scores = {place: result for place, result in enumerate(results) if isinstance(result, Score)}
        chosen = [score for place, score in scores.items() if place in common or not (is_common and common)]
        totals.append(total(chosen) if chosen else None)
    return totals


def _judge_over(
    tasks: Sequence[ScoringTask],
    before: Sequence[Score | Unscored],
    judge: Judge,
    once: Judge,
    *,
    seed: int,
    progress: ProgressCallback | None,
) -> list[Score | Unscored]:
    places: dict[bool, list[int]] = {True: [], False: []}
    for place, result in enumerate(before):
        places[isinstance(result, Score)].append(place)
    results = list(before)
    for who, chosen in ((once, places[True]), (judge, places[False])):
        judged = who.judge([tasks[place] for place in chosen], seed=seed, progress=progress)
        for place, result in zip(chosen, judged, strict=True):
            if isinstance(result, Score) or not isinstance(before[place], Score):
                results[place] = result
    return results
