"""Rewards: what rates the captions of a clip, and one factory that builds it from configuration.

A reward either rates captions one by one (`Reward`) or says which of two is better (`PairwiseReward`), which
`rate_by_comparison` turns into ratings. To add one, implement either protocol in a file beside this one and name it in
`RewardConfig.kind` and `make_reward`; sampling, selection and training do not change.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Literal, Protocol

from salmonn.records import Reference, Score, Unscored
from salmonn.score.config import JudgeConfig
from salmonn.score.formats import read_scores, write_scores
from salmonn.score.judge import Judge, ScoringTask
from salmonn.score.llm_client import LLMClient
from salmonn.score.llm_judge import EventPrompt, LLMJudge
from salmonn.score.published import TEMPLATES
from salmonn.score.scoring import make_judge_info
from salmonn.synthetic.judge import RuleJudge


@dataclass(frozen=True)
class Rating:
    """A reward's rating of one caption; a higher value is better.

    Args:
        video, sample: identify the caption.
        parts: name -> value of each part. The first is the main part, in which margins are measured; the others are
            penalties or bonuses that only change the order of captions.
        weights: name -> weight of each part, negative where a lower value is better.
        score: the judge's report, where a judge rated the caption.
    """

    video: str
    parts: Mapping[str, float]
    weights: Mapping[str, float]
    sample: int = 0
    score: Score | None = None

    @property
    def value(self) -> float:
        """Weighted sum of the parts."""
        return sum(self.weights[name] * part for name, part in self.parts.items())

    @property
    def main(self) -> float:
        """Weighted main part."""
        name = next(iter(self.parts))
        return self.weights[name] * self.parts[name]


class Reward(Protocol):
    """Rates captions one by one."""

    @property
    def name(self) -> str:
        """Name for records, such as the judge's."""
        ...

    @property
    def file_name(self) -> str:
        """File of a round's folder that `save` writes."""
        ...

    def check(self, reference: Reference) -> None:
        """Raise ValueError, saying what to do, if captions cannot be rated against this reference."""
        ...

    def rate(self, tasks: Sequence[ScoringTask]) -> list[Rating | Unscored]:
        """Rate captions; results in the order of the tasks."""
        ...

    def save(self, path: Path, ratings: Sequence[Rating | Unscored]) -> None:
        """Write ratings to a file that appears whole or not at all."""
        ...

    def load(self, path: Path) -> list[Rating]:
        """Read the ratings that `save` wrote, without the unscored captions."""
        ...


class PairwiseReward(Protocol):
    """Compares two captions of a clip."""

    def compare(self, first: ScoringTask, second: ScoringTask) -> float:
        """Return the probability that the first caption is better than the second."""
        ...


@dataclass(frozen=True)
class RewardConfig:
    """Reward that captions are rated by.

    Args:
        kind: "judge" rates by the judge's event counts, as -(Total + repetition_weight * repetition).
        repetition_weight: penalty for a caption that consists of repeated clauses alone.
    """

    kind: Literal["judge"] = "judge"
    repetition_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.repetition_weight < 0:
            raise ValueError(f"repetition_weight must be at least 0, got {self.repetition_weight}")


class JudgeReward:
    """Rates captions by a judge's event counts: -(Total + repetition_weight * repetition)."""

    file_name = "scores.jsonl"

    def __init__(self, judge: Judge, *, repetition_weight: float) -> None:
        self.judge = judge
        self.repetition_weight = repetition_weight

    @property
    def name(self) -> str:
        """Name of the judge."""
        return self.judge.name

    def check(self, reference: Reference) -> None:
        """Raise ValueError if the judge cannot use this reference."""
        self.judge.check(reference)

    def rate(self, tasks: Sequence[ScoringTask]) -> list[Rating | Unscored]:
        """Judge captions and rate them by their scores."""
        results = self.judge.judge(tasks)
        return [result if isinstance(result, Unscored) else self.to_rating(result) for result in results]

    def save(self, path: Path, ratings: Sequence[Rating | Unscored]) -> None:
        """Write the judge's scores as a score file."""
        results = [result if isinstance(result, Unscored) else result.score for result in ratings]
        write_scores(path, make_judge_info(self.judge), [result for result in results if result])

    def load(self, path: Path) -> list[Rating]:
        """Read a score file and rate its captions by their scores."""
        return [self.to_rating(score) for score in read_scores(path).scores]

    def to_rating(self, score: Score) -> Rating:
        """Convert a judge's score to a rating."""
        return Rating(
            video=score.video,
            parts={"total": score.total, "repetition": score.repetition},
            weights={"total": -1.0, "repetition": -self.repetition_weight},
            sample=score.sample,
            score=score,
        )


def rate_by_comparison(reward: PairwiseReward, tasks: Sequence[ScoringTask]) -> list[Rating]:
    """Rate each caption by its mean probability of being better than the other captions of its clip.

    Every two captions of a clip are compared once; a caption without competitors is rated 0.5.
    """
    by_video: dict[str, list[int]] = {}
    for index, task in enumerate(tasks):
        by_video.setdefault(task.caption.video, []).append(index)
    wins = [0.0] * len(tasks)
    for indices in by_video.values():
        for first, second in combinations(indices, 2):
            probability = reward.compare(tasks[first], tasks[second])
            wins[first] += probability
            wins[second] += 1 - probability
    ratings = []
    for task, won in zip(tasks, wins, strict=True):
        num_others = len(by_video[task.caption.video]) - 1
        parts = {"win_rate": won / num_others if num_others else 0.5}
        ratings.append(Rating(task.caption.video, parts, {"win_rate": 1.0}, sample=task.caption.sample))
    return ratings


def make_reward(config: RewardConfig, *, judge: Judge) -> Reward:
    """Build the reward that the configuration names.

    Args:
        config: kind and weights.
        judge: judge of the run, which the judge reward uses.
    """
    return JudgeReward(judge, repetition_weight=config.repetition_weight)


def make_judge(config: JudgeConfig, *, published: bool = False, processes: int = 1) -> Judge:
    """Build the judge that the configuration names.

    Args:
        config: kind of judge and, for a language model, its server and limits.
        published: ask a language model, and parse its replies, as the published scorer does.
        processes: number of processes that share the request caps and the concurrency.
    """
    if config.kind == "rule":
        return RuleJudge()
    client = make_llm_client(config, processes=processes)
    if published:
        return LLMJudge(client, templates=TEMPLATES, as_published=True)
    return LLMJudge(client, templates=[EventPrompt()] * config.attempts)


def make_llm_client(config: JudgeConfig, *, processes: int = 1) -> LLMClient:
    """Build the client of a language model with one process's share of the caps and the concurrency.

    Raises:
        ValueError: a cap is smaller than the number of processes.
    """

    def share(cap: int | None) -> int | None:
        if cap is not None and cap < processes:
            raise ValueError(f"{processes} processes cannot share a cap of {cap}: raise max_requests or max_tokens")
        return None if cap is None else cap // processes

    return LLMClient(
        replace(
            config,
            concurrency=max(1, config.concurrency // processes),
            max_requests=share(config.max_requests),
            max_tokens=share(config.max_tokens),
        )
    )
