"""Named objectives of captions in [0, 1], from a judge's score, which explain a reward. Imports no torch.

    seen, heard   share of the visual events, and of the audible ones, that the caption mentions correctly
    correct       1 - incorrect mentions / mentions
    faithful      1 - hallucinations / claims
    ordered       share of pairs of mentions, within picture or sound, that follow each other in the order of time
    unrepeated    1 - share of words in repeated clauses
    length        words / 60, at most 1: not a goal; the others are corrected for it. Where the 95th percentile of the
                  captions' numbers of words is above 60, it replaces 60

    dialogue      dialogue accuracy (docs/metrics.md): only in floors and the judge's reward, not in reward models

After ArmoRM (arXiv 2406.12845), whose objectives are ratings of people and models. Where an objective is not defined
(no audible event, fewer than two mentions with times), it is None.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations, islice
from typing import Literal

import numpy as np

from salmonn.preference.comparisons import AnswerGroup, attach_values
from salmonn.records import Caption, Reference, Score
from salmonn.score.judge import Judge, ScoringTask, restrict_to_caption, restrict_to_span

Debias = Literal["gold", "published", "none"]
OBJECTIVES = ("seen", "heard", "correct", "faithful", "ordered", "unrepeated", "length")
DIALOGUE = "dialogue"
MAX_WORDS = 60.0
LONG_PERCENTILE = 95


def find_max_words(scores: Sequence[Score]) -> float:
    """Return the number of words from which `length` is 1 for captions like these: 60, or more if many are longer."""
    if not scores:
        return MAX_WORDS
    return max(MAX_WORDS, float(np.percentile([score.num_words for score in scores], LONG_PERCENTILE)))


def objectives_of(score: Score, reference: Reference, *, max_words: float = MAX_WORDS) -> tuple[float | None, ...]:
    """Return the values of `OBJECTIVES` for a judged caption.

    Args:
        score: the judge's score.
        reference: reference with the events that it was judged against.
        max_words: number of words from which `length` is 1.
    """
    right = [mention.event for mention in score.mentions if mention.is_correct]
    num_told, num_claims = len(score.mentions), len(score.mentions) + score.hallucinated
    return (
        _share(sum(not event.is_audible for event in right), sum(not event.is_audible for event in reference.events)),
        _share(sum(event.is_audible for event in right), sum(event.is_audible for event in reference.events)),
        1 - score.incorrect / max(num_told, 1),
        1 - score.hallucinated / max(num_claims, 1),
        _order(score),
        1 - score.repetition,
        min(score.num_words / max_words, 1.0),
    )


def _share(part: int, whole: int) -> float | None:
    return min(part / whole, 1.0) if whole else None


def _order(score: Score) -> float | None:
    """Return the share of pairs of mentions in the order of time; events that overlap have none."""
    events = [mention.event for mention in score.mentions]
    pairs = [(one, other) for one, other in combinations(events, 2) if one.is_audible == other.is_audible]
    in_order = sum(one.precedes(other) for one, other in pairs)
    reversed_ = sum(other.precedes(one) for one, other in pairs)
    return _share(in_order, in_order + reversed_)


def judged_objectives(
    captions: Sequence[Caption], scores: Sequence[Score], references: Mapping[str, Reference]
) -> list[tuple[Caption, tuple[float | None, ...]]]:
    """Return judged captions with the values of `OBJECTIVES`, in the order of the scores.

    `length` is 1 from `find_max_words(scores)` words on.

    Args:
        captions, scores: judged captions, matched by video, sample and part of the video.
        references: references by video.

    Raises:
        ValueError: a video has no reference.
    """
    caption_of = {(one.video, one.sample, one.start_seconds, one.end_seconds): one for one in captions}
    if missing := sorted({score.video for score in scores} - set(references)):
        raise ValueError(
            f"{len(missing)} judged videos have no reference, first {missing[0]}; pass the references "
            "that their captions were judged against"
        )
    judged, max_words = [], find_max_words(scores)
    for score in scores:
        if caption := caption_of.get((score.video, score.sample, score.start_seconds, score.end_seconds)):
            reference = restrict_to_caption(references[score.video], caption)
            judged.append((caption, objectives_of(score, reference, max_words=max_words)))
    return judged


def judge_objectives(
    groups: Sequence[AnswerGroup], judge: Judge, references: Mapping[str, Reference]
) -> list[AnswerGroup]:
    """Judge the answers of groups, and return the groups with their objectives.

    Groups whose video has no reference, or with an answer that the judge cannot score, have none.

    Args:
        groups: groups of captions.
        judge: judge of the captions.
        references: references by video.

    Raises:
        ValueError: the judge cannot use a reference.
    """
    tasks = []
    for group in groups:
        one, reference = group.example, references.get(group.example.video)
        if reference is None:
            continue
        judge.check(reference)
        for text, finished in group.answers:
            caption = Caption(
                one.video, text, one.prompt, finished=finished, modality=one.modality,
                start_seconds=one.start_seconds, end_seconds=one.end_seconds,
            )  # fmt: skip
            tasks.append(ScoringTask(restrict_to_span(reference, caption), caption))
    results = judge.judge(tasks)
    max_words = find_max_words([result for result in results if isinstance(result, Score)])
    judged, attached = iter(zip(tasks, results, strict=True)), list[AnswerGroup]()
    for group in groups:
        own = islice(judged, len(group.answers) if group.example.video in references else 0)
        objectives = tuple(
            objectives_of(result, restrict_to_caption(task.reference, task.caption), max_words=max_words)
            for task, result in own
            if isinstance(result, Score)
        )
        attached.append(replace(group, objectives=objectives if len(objectives) == len(group.answers) else ()))
    return attached


def attach_objectives(
    groups: Sequence[AnswerGroup],
    captions: Sequence[Caption],
    scores: Sequence[Score],
    references: Mapping[str, Reference],
) -> list[AnswerGroup]:
    """Return groups of judged captions with the objectives of each answer; see `judged_objectives`."""
    values = {
        (one.video, one.start_seconds, one.end_seconds, one.text, one.finished): objectives
        for one, objectives in judged_objectives(captions, scores, references)
    }
    return attach_values(groups, values, name="objectives")
