"""Scoring a set of captions, in one or several judging passes, by our protocol or the published one.

Our protocol counts every reference: for a video without a caption all events are missed; a caption without a usable
judgement is listed as unscored and is in no rate. The published protocol omits both; we also report its rates with all
videos counted.

A language model does not judge the same way twice, even at temperature 0. Of several passes the one with the median
Total is reported, as in the published protocol, which uses 7.
"""

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from salmonn.records import Caption, JudgeInfo, Reference, Score, Unscored
from salmonn.score.config import ProtocolName
from salmonn.score.dialogue import count_dialogue
from salmonn.score.judge import Judge, ProgressCallback, ScoringTask, empty_caption_tasks, match_references
from salmonn.score.llm_judge import LLMJudge
from salmonn.score.metrics import compute_rates
from salmonn.score.published import PublishedRates, collapse_task, published_rates
from salmonn.score.repetition import count_repeated_words

SEEDS_PER_PASS = 100  # so that each attempt within a pass can have its own seed

Results = list[Score | Unscored]


@dataclass(frozen=True)
class ScoredSet:
    """A scored set of captions.

    Args:
        judge_info: judge, protocol and passes.
        results: results of all captions, and of all videos without one.
        as_published: rates by the published protocol, if it was used.
        with_all: the same rates with every video counted, those without a score as all missed.
    """

    judge_info: JudgeInfo
    results: Results
    as_published: PublishedRates | None = None
    with_all: PublishedRates | None = None

    @property
    def scores(self) -> list[Score]:
        """Return the scores of the captions that could be judged."""
        return [result for result in self.results if isinstance(result, Score)]

    @property
    def unscored(self) -> list[Unscored]:
        """Return the captions that could not be judged."""
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
        references: references by `Reference.video`.
        captions: captions of their videos.
        judge: judge; for the published protocol a language model from `make_judge(config, published=True)`.
        protocol: salmonn or published.
        passes: number of judging passes; the one with the median Total is reported.
        seed: seed of the first pass.
        progress: called with the number of captions just judged.

    Raises:
        ValueError: captions do not match the references, nothing could be scored, or no further request is possible.
    """
    rejudge = None
    if isinstance(judge, LLMJudge):
        assert judge.as_published == (protocol == "published"), "make the judge for the protocol"
        if protocol == "published":
            rejudge = LLMJudge(judge.client, templates=judge.templates[:1], as_published=True)
    tasks = match_references(references, captions, judge)
    if protocol == "salmonn":
        tasks += empty_caption_tasks(references, captions, judge)
        return judge_passes(tasks, judge, passes=passes, seed=seed, progress=progress)
    collapsed = [collapse_task(task) for task in tasks]
    scored = judge_passes(
        collapsed, judge, protocol=protocol, passes=passes, seed=seed, rejudge=rejudge, progress=progress
    )
    return _add_published_rates(scored, tasks, references)


def _add_published_rates(
    scored: ScoredSet, tasks: Sequence[ScoringTask], references: Mapping[str, Reference]
) -> ScoredSet:
    """Return results with the published rates, and with all references that have no prediction as unscored."""
    judged: Results = []
    for result, task in zip(scored.results, tasks, strict=True):
        if isinstance(result, Score):
            # Repetition and dialogue are measured in the original caption, not in the collapsed one.
            num_repeated, num_words = count_repeated_words(task.caption.text)
            dialogue = count_dialogue(task.caption.text, task.reference)
            judged.append(replace(result, num_words=num_words, num_repeated_words=num_repeated, dialogue=dialogue))
        else:
            judged.append(result)
    scores = [result for result in judged if isinstance(result, Score)]
    failed = [task.reference for result, task in zip(judged, tasks, strict=True) if isinstance(result, Unscored)]
    predicted = {task.reference.video for task in tasks}
    absent = [reference for video, reference in references.items() if video not in predicted]
    has_events = any(score.num_events for score in scores)
    return ScoredSet(
        scored.judge_info,
        [*judged, *(Unscored(reference.video, "it has no prediction") for reference in absent)],
        as_published=published_rates(scores) if has_events else None,
        with_all=published_rates(scores, [*failed, *absent]) if has_events else None,
    )


def judge_passes(
    tasks: Sequence[ScoringTask],
    judge: Judge,
    *,
    protocol: ProtocolName = "salmonn",
    passes: int = 1,
    seed: int = 0,
    rejudge: Judge | None = None,
    progress: ProgressCallback | None = None,
) -> ScoredSet:
    """Judge all captions `passes` times; return the pass with the median Total, in the order of the captions.

    Args:
        tasks: captions with their references.
        judge: judge of the first pass.
        protocol: protocol that defines Total.
        passes: number of passes; of an even number the lower middle one is reported.
        seed: seed of the first pass; each further pass adds `SEEDS_PER_PASS`.
        rejudge: judge of captions that have a score from an earlier pass; if it fails, that score is kept. With None
            all passes are independent, and their Totals are over the captions that every pass could score, so that
            they differ only by the judge.
        progress: called with the number of judgements just made.

    Raises:
        ValueError: passes is below 1, or above 1 for a deterministic judge.
    """
    if passes < 1:
        raise ValueError(f"passes must be at least 1, got {passes}")
    if passes > 1 and judge.is_deterministic:
        raise ValueError(f"the judge {judge.name} gives the same result in every pass: omit --passes")
    seeds = tuple(seed + SEEDS_PER_PASS * number for number in range(passes))
    rounds: list[Results] = []
    for pass_seed in seeds:
        if not rounds or not rejudge:
            rounds.append(judge.judge(tasks, seed=pass_seed, progress=progress))
            continue
        results = list(rounds[-1])
        scored = [place for place, result in enumerate(results) if isinstance(result, Score)]
        unscored = [place for place, result in enumerate(results) if isinstance(result, Unscored)]
        for pass_judge, places in ((rejudge, scored), (judge, unscored)):
            judged = pass_judge.judge([tasks[place] for place in places], seed=pass_seed, progress=progress)
            for place, result in zip(places, judged, strict=True):
                if isinstance(result, Score) or isinstance(results[place], Unscored):
                    results[place] = result
        rounds.append(results)
    totals = _pass_totals(rounds, protocol, in_common=rejudge is None)
    ranked = sorted((value, number) for number, value in enumerate(totals) if value is not None)
    reported = ranked[(len(ranked) - 1) // 2][1] if ranked else 0
    judge_info = make_judge_info(judge, protocol=protocol, seeds=seeds, totals=totals, reported_pass=reported)
    return ScoredSet(judge_info, rounds[reported])


def _pass_totals(rounds: Sequence[Results], protocol: ProtocolName, *, in_common: bool) -> list[float | None]:
    """Return the Total of each pass, over the captions that all passes scored if `in_common` and there are any."""
    used = [results for results in rounds if any(isinstance(result, Score) for result in results)]
    common = {place for place in range(len(rounds[0])) if all(isinstance(results[place], Score) for results in used)}
    totals: list[float | None] = []
    for results in rounds:
        scores = [
            result
            for place, result in enumerate(results)
            if isinstance(result, Score) and (place in common or not (in_common and common))
        ]
        rates = published_rates if protocol == "published" else compute_rates
        totals.append(rates(scores).total if scores else None)
    return totals


def make_judge_info(
    judge: Judge,
    *,
    protocol: ProtocolName = "salmonn",
    seeds: Sequence[int] = (0,),
    totals: Sequence[float | None] = (),
    reported_pass: int = 0,
) -> JudgeInfo:
    """Return the record of a judge, its settings, and the current date and version."""
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
