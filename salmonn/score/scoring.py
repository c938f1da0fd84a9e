"""How a set of captions is scored: our protocol, and the published scorer's.

Ours counts every reference: a video without a caption is all missed, a caption without a usable judgement is unscored,
listed, and in no rate. The published one leaves both out; what the rates are with them counted as all missed stands
beside it.
"""

import importlib.metadata
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from salmonn.records import Caption, JudgeInfo, Reference, Score, Unscored
from salmonn.score.config import ProtocolName
from salmonn.score.judge import Judge, ProgressCallback, ScoringTask, empty_caption_tasks, match_references
from salmonn.score.llm_judge import LLMJudge
from salmonn.score.metrics import compute_rates
from salmonn.score.passes import JudgingPasses, judge_passes
from salmonn.score.published import PublishedRates, collapsed, published_rates
from salmonn.score.repetition import repeated_words

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoredSet:
    """A set of captions with its scores.

    Args:
        judge_info: who judged, and how.
        results: of each caption, and of each video without one.
        as_published: rates by the published protocol, where it was asked for.
        with_all: the same with every video counted, those without a score as all missed.
    """

    judge_info: JudgeInfo
    results: list[Score | Unscored]
    as_published: PublishedRates | None = None
    with_all: PublishedRates | None = None

    @property
    def scores(self) -> list[Score]:
        """Of the captions that could be judged."""
        return [result for result in self.results if isinstance(result, Score)]

    @property
    def unscored(self) -> list[Unscored]:
        """The others."""
        return [result for result in self.results if isinstance(result, Unscored)]


def score_set(
    references: Mapping[str, Reference],
    captions: Sequence[Caption],
    judge: Judge,
    *,
    protocol: ProtocolName = "salmonn",
    passes: int = 1,
    seed: int = 2024,
    progress: ProgressCallback | None = None,
) -> ScoredSet:
    """Score captions by a protocol.

    Args:
        references: by `Reference.video`.
        captions: of their videos.
        judge: who judges; for the published protocol a language model as `make_judge(config, published=True)` gives it.
        protocol: salmonn or published.
        passes: how often all is judged; the pass with the median Total counts.
        seed: of the first pass.
        progress: called with the number of captions just judged.

    Raises:
        ValueError: captions and references do not fit, nothing could be scored, or no question can be asked any more.
    """
    if isinstance(judge, LLMJudge):
        assert judge.as_published == (protocol == "published"), "make the judge for the protocol"
    if protocol == "published":
        return _score_as_published(references, captions, judge, passes=passes, seed=seed, progress=progress)
    tasks = [*match_references(references, captions, judge), *empty_caption_tasks(references, captions, judge)]
    outcome = judge_passes(
        tasks, judge, total=lambda scores: compute_rates(scores).total, passes=passes, seed=seed, progress=progress
    )
    return ScoredSet(_sign(judge, outcome, protocol), outcome.results)


def _score_as_published(
    references: Mapping[str, Reference],
    captions: Sequence[Caption],
    judge: Judge,
    *,
    passes: int,
    seed: int,
    progress: ProgressCallback | None,
) -> ScoredSet:
    tasks = match_references(references, captions, judge)
    outcome = judge_passes(
        [collapsed(task) for task in tasks],
        judge,
        total=lambda scores: published_rates(scores).total,
        passes=passes,
        seed=seed,
        once=LLMJudge(judge.client, templates=judge.templates[:1], as_published=True)
        if isinstance(judge, LLMJudge)
        else None,
        progress=progress,
    )
    judged = [_with_own_words(result, task) for result, task in zip(outcome.results, tasks, strict=True)]
    predicted = {task.reference.video for task in tasks}
    absent = [reference for video, reference in references.items() if video not in predicted]
    failed = [task.reference for result, task in zip(judged, tasks, strict=True) if isinstance(result, Unscored)]
    scores = [result for result in judged if isinstance(result, Score)]
    is_scored = any(score.num_events for score in scores)
    return ScoredSet(
        _sign(judge, outcome, "published"),
        [*judged, *(Unscored(reference.video, "there is no prediction of it") for reference in absent)],
        as_published=published_rates(scores) if is_scored else None,
        with_all=published_rates(scores, [*failed, *absent]) if is_scored else None,
    )


def _with_own_words(result: Score | Unscored, task: ScoringTask) -> Score | Unscored:
    """Repetition is measured in the caption as it is, not in what was left of it for the judge."""
    if isinstance(result, Unscored):
        return result
    repeated, num_words = repeated_words(task.caption.text)
    return replace(result, num_words=num_words, num_repeated_words=repeated)


def make_judge_info(
    judge: Judge,
    *,
    protocol: ProtocolName = "salmonn",
    seeds: Sequence[int] = (0,),
    totals: Sequence[float | None] = (),
    reported_pass: int = 0,
) -> JudgeInfo:
    """Who judged a set of captions now, and how (`salmonn.records.JudgeInfo`)."""
    return JudgeInfo(
        judge=judge.name,
        prompt_hash=judge.prompt_hash,
        protocol=protocol,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        version=importlib.metadata.version("salmonn"),
        seeds=tuple(seeds),
        totals=tuple(totals),
        reported_pass=reported_pass,
    )


def _sign(judge: Judge, outcome: JudgingPasses, protocol: ProtocolName) -> JudgeInfo:
    return make_judge_info(
        judge, protocol=protocol, seeds=outcome.seeds, totals=outcome.totals, reported_pass=outcome.kept
    )
