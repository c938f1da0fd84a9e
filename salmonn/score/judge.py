"""What a judge is, and how a set of captions is scored by one.

A judge sorts the N events of a reference into correct, incorrect and missing, and lists what a caption invents. There
are two: `rule.RuleJudge` reads captions of synthetic clips without any model, `llm.LLMJudge` asks a language model on
any OpenAI-compatible server. Classes of errors: arXiv 2410.06682 (video-SALMONN 2), section on atomic events.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from salmonn.records import Caption, Event, Mention, Reference, Score, Unscored
from salmonn.score.repetition import repeated_words

logger = logging.getLogger(__name__)

ProgressCallback = Callable[[int], object]


@dataclass(frozen=True)
class ScoringTask:
    """One caption and the reference that it is judged against."""

    reference: Reference
    caption: Caption


class Judge(Protocol):
    """Judges captions. Scores of the same `name` and `prompt_hash` may be compared."""

    @property
    def name(self) -> str:
        """Who judges: "rule", or a model with its server."""
        ...

    @property
    def prompt_hash(self) -> str:
        """Of the words, or rules, that it judges by."""
        ...

    @property
    def is_exact(self) -> bool:
        """Whether a further pass would say the same again."""
        ...

    def check(self, reference: Reference) -> None:
        """Raise ValueError, with what to do, where it cannot judge against the reference."""
        ...

    def judge(
        self, tasks: Sequence[ScoringTask], *, seed: int = 0, progress: ProgressCallback | None = None
    ) -> list[Score | Unscored]:
        """Judge captions; results in the tasks' order. `progress` is called with the number just finished."""
        ...


def make_score(
    task: ScoringTask,
    *,
    missed: Sequence[Event],
    mentions: Sequence[Mention],
    hallucinations: Sequence[str],
    repeated: Sequence[str] = (),
    num_repeated_words: int = 0,
) -> Score:
    """The score of a sorted caption; `num_repeated_words` counts where it is more than what is said word for word."""
    num_verbatim, num_words = repeated_words(task.caption.text)
    return Score(
        video=task.reference.video,
        sample=task.caption.sample,
        num_events=len(missed) + len(mentions),
        missing=len(missed),
        incorrect=sum(not one.is_correct for one in mentions),
        hallucinated=len(hallucinations),
        num_words=num_words,
        # What is said again word for word is found both ways: the greater count is nearest to all that is repeated.
        num_repeated_words=max(num_verbatim, num_repeated_words),
        finished=task.caption.finished,
        missed=tuple(event.text for event in missed),
        mentions=tuple(mentions),
        hallucinations=tuple(hallucinations),
        repeated=tuple(repeated),
        start_seconds=task.caption.start_seconds,
        end_seconds=task.caption.end_seconds,
    )


def make_unscored(task: ScoringTask, reason: str) -> Unscored:
    """The record of a caption that cannot be judged."""
    caption = task.caption
    return Unscored(task.reference.video, reason, caption.sample, caption.start_seconds, caption.end_seconds)


def match_references(
    references: Mapping[str, Reference], captions: Sequence[Caption], judge: Judge
) -> list[ScoringTask]:
    """The captions with their references; those of a part of a video with the events of that part.

    Captions of other videos are left out, and told.

    Raises:
        ValueError: no caption's video is among the references (keyed by `Reference.video`), a caption stands there
            twice, or the judge cannot judge against a reference.
    """
    known = [caption for caption in captions if caption.video in references]
    if len(known) < len(captions):
        strangers = sorted({caption.video for caption in captions} - set(references))
        words = f"{len(strangers)} captioned videos have no reference, first {strangers[0]}"
        if not known:
            raise ValueError(
                f"{words}, while the first reference is of {next(iter(references), 'none')}: score against the "
                "references of the same set; paths of captions are taken from the current folder"
            )
        logger.warning("%s; they are left out", words)
    named = Counter((caption.video, caption.sample, caption.start_seconds, caption.end_seconds) for caption in known)
    if twice := [name for name, count in named.items() if count > 1]:
        raise ValueError(
            f"{len(twice)} captions stand there twice, first of {twice[0][0]} (sample {twice[0][1]}): several captions "
            "of a video need sample numbers of their own"
        )
    _check_all([references[caption.video] for caption in known], judge)
    return [ScoringTask(restrict_to_span(references[caption.video], caption), caption) for caption in known]


def empty_caption_tasks(
    references: Mapping[str, Reference], captions: Sequence[Caption], judge: Judge
) -> list[ScoringTask]:
    """An empty caption for each reference that has none, so that none is lost: all its events count as missing.

    Raises:
        ValueError: the judge cannot judge against one of them.
    """
    captioned = {caption.video for caption in captions}
    uncaptioned = [video for video in references if video not in captioned]
    if uncaptioned:
        logger.warning(
            "%d of %d references have no caption and count as all missing, first %s",
            len(uncaptioned),
            len(references),
            uncaptioned[0],
        )
    _check_all([references[video] for video in uncaptioned], judge)
    return [ScoringTask(references[video], Caption(video, "")) for video in uncaptioned]


def _check_all(references: Sequence[Reference], judge: Judge) -> None:
    """All are checked before any is asked about: a mistake in the last should not cost the replies before it."""
    for reference in references:
        judge.check(reference)


def restrict_to_span(reference: Reference, caption: Caption) -> Reference:
    """The reference with the events alone that lie in the caption's part of the video (`Event.lies_within`).

    Raises:
        ValueError: the part ends before it begins; or no event has a time, so that all that is told would be invented.
    """
    start, end = caption.start_seconds, caption.end_seconds
    if start is None and end is None:
        return reference
    if start is not None and end is not None and end <= start:
        raise ValueError(
            f"the caption of {caption.video} is about {start} to {end} seconds: a part ends after its start"
        )
    if reference.events and all(event.start_seconds is None for event in reference.events):
        raise ValueError(
            f"a caption is about a part of {caption.video}, but the events of its reference have no times: add "
            "start_seconds and end_seconds to them, or caption the whole video"
        )
    events = [event for event in reference.events if event.lies_within(start, end)]
    return replace(reference, events=tuple(events))
