"""A set of captions judged several times over: the pass with the median Total counts, the others show the spread.

A language model does not judge twice alike, even at temperature 0. The published protocol takes the median of 7 passes.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from salmonn.records import Score, Unscored
from salmonn.score.judge import Judge, Progress, Task

# Attempts within a pass may each have a seed of their own.
SEEDS_OF_A_PASS = 100


@dataclass(frozen=True)
class Passes:
    """What several passes over the same captions gave.

    Args:
        results: of the pass that counts, in the captions' order.
        totals: each pass's Total.
        kept: which pass counts, from 0.
        seeds: each pass's.
    """

    results: list[Score | Unscored]
    totals: tuple[float, ...]
    kept: int
    seeds: tuple[int, ...]

    @property
    def deviation(self) -> float:
        """Standard deviation of the Totals, 0 for one pass."""
        return statistics.stdev(self.totals) if len(self.totals) > 1 else 0.0


def judge_passes(
    tasks: Sequence[Task],
    judge: Judge,
    *,
    total: Callable[[Sequence[Score]], float],
    passes: int = 1,
    seed: int = 0,
    once: Judge | None = None,
    progress: Progress | None = None,
) -> Passes:
    """Judge all captions `passes` times.

    Args:
        tasks: captions with their references.
        judge: who judges.
        total: a pass's Total from its scores.
        passes: how often; of an even number the lower middle one counts.
        seed: of the first pass; each further one is 100 on.
        once: judges a caption that has a score of an earlier pass; where it cannot, that score stands. None judges each
            pass for itself.
        progress: called with the number of judgements just made.

    Raises:
        ValueError: passes is below 1, or above it for a judge that always says the same; or nothing could be scored.
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
    totals = [total(_require_scores(results)) for results in rounds]
    kept = sorted(range(passes), key=totals.__getitem__)[(passes - 1) // 2]
    return Passes(rounds[kept], tuple(totals), kept, seeds)


def _judge_over(
    tasks: Sequence[Task],
    before: Sequence[Score | Unscored],
    judge: Judge,
    once: Judge,
    *,
    seed: int,
    progress: Progress | None,
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


def _require_scores(results: Sequence[Score | Unscored]) -> list[Score]:
    scores = [result for result in results if isinstance(result, Score)]
    unscored = [result for result in results if isinstance(result, Unscored)]
    if not scores:
        reason = f", first {unscored[0].video}: {unscored[0].reason}" if unscored else ""
        raise ValueError(f"none of {len(results)} captions could be scored{reason}")
    return scores
