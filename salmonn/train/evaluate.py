"""Judging of captions on all ranks, and evaluation on held-out clips."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from salmonn import dist
from salmonn.caption.captioner import Captioner
from salmonn.files import write_json, write_records
from salmonn.preference.voter_reward import find_exploitability
from salmonn.records import Caption, Reference, Score, Unscored
from salmonn.score.formats import write_scores
from salmonn.score.judge import Judge, ScoringTask
from salmonn.score.metrics import Rates, compute_rates, qa_accuracy
from salmonn.score.scoring import make_judge_info
from salmonn.synthetic.raters import Rater
from salmonn.train.data import ClipSet
from salmonn.train.sampling import CAPTIONS_NAME, SampleConfig, answer_questions, sample_captions

log = logging.getLogger(__name__)
T = TypeVar("T")

ANSWERS_NAME = "answers.jsonl"
SCORES_NAME = "scores.jsonl"
RATES_NAME = "rates.json"


@dataclass(frozen=True)
class Evaluation:
    """Captions of held-out clips with their scores, answers to the clips' questions, and the rates of both."""

    captions: list[Caption]
    answers: list[Caption]
    results: list[Score | Unscored]
    rates: Rates


def judge_captions(
    captions: Sequence[Caption],
    references: Mapping[str, Reference],
    *,
    judge: Callable[[Sequence[ScoringTask]], Sequence[T]],
) -> list[T]:
    """Judge captions on all ranks; results in the order of the captions.

    The clips are balanced over the ranks by the number of words to read. All captions of a clip are judged by one rank,
    so that equal ones are judged once.

    Args:
        captions: captions of any clips.
        references: annotations by video.
        judge: tasks -> a result for each; a judge's or a reward's method.
    """
    by_video: dict[str, list[int]] = {}
    for index, caption in enumerate(captions):
        by_video.setdefault(caption.video, []).append(index)
    groups = list(by_video.values())

    def count_words(index: int) -> int:
        """Return the words that a judge reads: the caption, and the events with it."""
        events = references[captions[index].video].events
        return sum(len(text.split()) for text in (captions[index].text, *(event.text for event in events)))

    shares = dist.balance([sum(map(count_words, group)) for group in groups])
    mine = [groups[number] for number in shares[dist.rank()]]
    tasks = [ScoringTask(references[captions[index].video], captions[index]) for group in mine for index in group]
    results = iter(judge(tasks))
    return dist.ungroup(dist.gather_balanced([[next(results) for _ in group] for group in mine], shares), groups)


def drop_unscored(results: Sequence[T | Unscored], *, name: str) -> list[T]:
    """Return the results other than `Unscored`, and log how many captions are unscored and why.

    Raises:
        ValueError: all captions are unscored.
    """
    unscored = [result for result in results if isinstance(result, Unscored)]
    if unscored:
        first = unscored[0]
        text = f"{name}: {len(unscored)} of {len(results)} captions are unscored, first {first.video}: {first.reason}"
        if len(unscored) == len(results):
            raise ValueError(text)
        log.warning(text)
    return [result for result in results if not isinstance(result, Unscored)]


def evaluate(captioner: Captioner, clips: ClipSet, *, judge: Judge, sampling: SampleConfig, name: str) -> Evaluation:
    """Evaluate a model on held-out clips: one greedy caption of each, judged, and answers to the clips' questions.

    Raises:
        ValueError: no caption could be judged.
    """
    captions = sample_captions(captioner, clips, sampling.greedy(), name=f"{name}: captions")
    answers = answer_questions(captioner, clips, name=f"{name}: questions", batch_size=sampling.batch_size)
    return evaluate_captions(captions, answers, clips, judge=judge, name=name)


def evaluate_captions(
    captions: list[Caption], answers: list[Caption], clips: ClipSet, *, judge: Judge, name: str
) -> Evaluation:
    """Judge one caption of each clip, and compare the answers to the clips' questions, if there are any.

    Raises:
        ValueError: no caption could be judged.
    """
    results = judge_captions(captions, clips.by_video, judge=judge.judge)
    scores: list[Score] = drop_unscored(results, name=name)
    has_questions = bool(answers) and any(reference.questions for reference in clips.references)
    accuracy = qa_accuracy(clips.by_video, answers) if has_questions else None
    return Evaluation(captions, answers, results, compute_rates(scores, qa_accuracy=accuracy))


def write_evaluation(folder: Path, result: Evaluation, *, judge: Judge) -> None:
    """Write captions.jsonl, answers.jsonl, scores.jsonl and, last of all, rates.json; only rank 0 calls it."""
    write_records(folder / CAPTIONS_NAME, result.captions)
    write_records(folder / ANSWERS_NAME, result.answers)
    write_scores(folder / SCORES_NAME, make_judge_info(judge, totals=[result.rates.total]), result.results)
    write_json(folder / RATES_NAME, asdict(result.rates))


def write_exploitability(folder: Path, voter: Rater, result: Evaluation, clips: ClipSet) -> None:
    """Log how far held-out captions are from those that no others beat, and write exploitability.json."""
    found = find_exploitability(voter, result.captions, result.results, clips.by_video)
    write_json(folder / "exploitability.json", asdict(found) if found else None)
    log.info("%s: %s", folder.parent.name, found)
