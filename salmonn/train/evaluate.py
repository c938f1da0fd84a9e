"""Measuring a model on held-out clips: captions judged against events, questions against answers, shared over ranks."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from salmonn import dist
from salmonn.caption.captioner import Captioner
from salmonn.caption.generate import Sampling
from salmonn.model.network import Block
from salmonn.records import Caption, Reference, Score, Unscored
from salmonn.score.judge import Judge, Task
from salmonn.score.rates import Rates, qa_accuracy, rates
from salmonn.train.references import ClipSet

log = logging.getLogger(__name__)

SIDE_BY_SIDE = 128  # sequences that a toy model generates at once


@dataclass(frozen=True)
class Evaluation:
    """A model's captions of clips and answers to their questions, the captions' scores, and the rates over them all."""

    captions: list[Caption]
    answers: list[Caption]
    scores: list[Score]
    rates: Rates


def encode_clips(captioner: Captioner, clips: ClipSet, *, name: str, side_by_side: int = SIDE_BY_SIDE) -> list[Block]:
    """The clips' blocks from the frozen towers, each rank its share.

    A quarter as many clips are read at once as captions are made side by side, an eighth as many encoded.
    """
    step = max(1, side_by_side // 4)
    mine = dist.share(clips.references)
    blocks: list[Block] = []
    with tqdm(total=len(mine), desc=f"reading {name}", unit="clip", disable=not dist.is_main()) as bar:
        for start in range(0, len(mine), step):
            media = [captioner.processor.read(clips.root / reference.video) for reference in mine[start : start + step]]
            blocks += captioner.encode(media, batch_size=max(1, side_by_side // 8))
            bar.update(len(media))
    return dist.gather(blocks)


def caption_clips(
    captioner: Captioner,
    references: Sequence[Reference],
    blocks: Sequence[Block],
    *,
    sampling: Sampling,
    seed: int,
    name: str,
    num_samples: int = 1,
    side_by_side: int = SIDE_BY_SIDE,
) -> list[Caption]:
    """`num_samples` captions of each clip, a clip's captions one after the other; the clips are shared over ranks."""
    prompt = captioner.describe()
    mine = dist.share(list(zip(references, blocks, strict=True)))
    with tqdm(total=len(mine), desc=name, unit="clip", disable=not dist.is_main()) as bar:
        answers = captioner.answer(
            [block for _, block in mine],
            [prompt] * len(mine),
            sampling=sampling,
            num_samples=num_samples,
            seed=seed * 1_000_003 + dist.rank() * 100_003,
            batch_size=side_by_side,
            progress=bar.update,
        )
    captions = [
        Caption(
            mine[index // num_samples][0].video,
            answer.text,
            prompt=prompt,
            model=captioner.name,
            sample=index % num_samples,
            finished=answer.finished,
        )
        for index, answer in enumerate(answers)
    ]
    groups = [captions[start : start + num_samples] for start in range(0, len(captions), num_samples)]
    return [caption for group in dist.gather(groups) for caption in group]


def judge_captions(captions: Sequence[Caption], references: Mapping[str, Reference], *, judge: Judge) -> list[Score]:
    """Scores in the captions' order, the work shared over ranks. What the judge could not score is left out, told.

    Raises:
        ValueError: none could be scored.
    """
    tasks = [Task(references[caption.video], caption) for caption in dist.share(captions)]
    results = dist.gather(judge.judge(tasks))
    unscored = [result for result in results if isinstance(result, Unscored)]
    if unscored:
        words = (
            f"{len(unscored)} of {len(results)} captions are unscored, first {unscored[0].video}: {unscored[0].reason}"
        )
        if len(unscored) == len(results):
            raise ValueError(words)
        log.warning(words)
    return [result for result in results if isinstance(result, Score)]


def answer_questions(
    captioner: Captioner,
    references: Sequence[Reference],
    blocks: Sequence[Block],
    *,
    name: str,
    side_by_side: int = 2 * SIDE_BY_SIDE,
) -> list[Caption]:
    """The model's answers to all the references' questions, each with its question as prompt."""
    asked = [
        (reference.video, item.question, block)
        for reference, block in zip(references, blocks, strict=True)
        for item in reference.questions
    ]
    mine = dist.share(asked)
    with tqdm(total=len(mine), desc=name, unit="question", disable=not dist.is_main()) as bar:
        answers = captioner.answer(
            [block for _, _, block in mine],
            [question for _, question, _ in mine],
            sampling=Sampling(max_new_tokens=16),
            batch_size=side_by_side,
            progress=bar.update,
        )
    return dist.gather(
        [
            Caption(video, answer.text, prompt=question, model=captioner.name, finished=answer.finished)
            for (video, question, _), answer in zip(mine, answers, strict=True)
        ]
    )


def evaluate(
    captioner: Captioner,
    references: Sequence[Reference],
    blocks: Sequence[Block],
    *,
    judge: Judge,
    sampling: Sampling,
    name: str,
    side_by_side: int = SIDE_BY_SIDE,
) -> Evaluation:
    """Captions (one a clip), their scores and rates, with the accuracy of the answers to the clips' questions."""
    captions = caption_clips(
        captioner, references, blocks, sampling=sampling, seed=0, name=f"{name}: captions", side_by_side=side_by_side
    )
    answers = answer_questions(captioner, references, blocks, name=f"{name}: questions", side_by_side=side_by_side)
    by_video = {reference.video: reference for reference in references}
    scores = judge_captions(captions, by_video, judge=judge)
    return Evaluation(captions, answers, scores, rates(scores, qa_accuracy=qa_accuracy(by_video, answers)))
