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
    """A model's captions of clips and answers to their questions, what the judge said, and the rates over it all."""

    captions: list[Caption]
    answers: list[Caption]
    results: list[Score | Unscored]
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


def judge_captions(
    captions: Sequence[Caption], references: Mapping[str, Reference], *, judge: Judge
) -> list[Score | Unscored]:
    """What the judge says, in the captions' order. Ranks share out the clips: equal captions of one are asked once."""
    groups: dict[str, list[int]] = {}
    for place, caption in enumerate(captions):
        groups.setdefault(caption.video, []).append(place)
    mine = dist.share(list(groups.values()))
    tasks = [Task(references[captions[place].video], captions[place]) for group in mine for place in group]
    results = iter(judge.judge(tasks))
    judged = dist.gather([[next(results) for _ in group] for group in mine])
    placed = {
        place: result
        for group, part in zip(groups.values(), judged, strict=True)
        for place, result in zip(group, part, strict=True)
    }
    return [placed[place] for place in range(len(captions))]


def require_scores(results: Sequence[Score | Unscored], *, name: str) -> list[Score]:
    """The scores among the results; what could not be scored is told, and left out.

    Raises:
        ValueError: there is no score.
    """
    unscored = [result for result in results if isinstance(result, Unscored)]
    if unscored:
        first = unscored[0]
        words = f"{name}: {len(unscored)} of {len(results)} captions are unscored, first {first.video}: {first.reason}"
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
    """Captions (one a clip), their scores and rates, and the accuracy of answers to the clips' questions, if any."""
    captions = caption_clips(
        captioner, references, blocks, sampling=sampling, seed=0, name=f"{name}: captions", side_by_side=side_by_side
    )
    answers = answer_questions(captioner, references, blocks, name=f"{name}: questions", side_by_side=side_by_side)
    by_video = {reference.video: reference for reference in references}
    results = judge_captions(captions, by_video, judge=judge)
    scores = require_scores(results, name=name)
    accuracy = qa_accuracy(by_video, answers) if any(reference.questions for reference in references) else None
    return Evaluation(captions, answers, results, rates(scores, qa_accuracy=accuracy))
