"""The judge interface, and the tasks that captions and references make for it.

A judge sorts the N events of a reference into correct, incorrect and missing, and lists a caption's hallucinations.
There are two: `salmonn.synthetic.judge.RuleJudge` parses captions of synthetic clips without any model, and
`llm_judge.LLMJudge` calls a language model on any OpenAI-compatible server. Classes of errors: arXiv 2410.06682
(video-SALMONN 2), section on atomic events.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from salmonn.records import Caption, Event, Mention, Modality, Reference, Score, Unscored
from salmonn.score.dialogue import count_dialogue
from salmonn.score.repetition import count_repeated_words
from salmonn.speech import Dialogue

logger = logging.getLogger(__name__)

ProgressCallback = Callable[[int], object]


@dataclass(frozen=True)
class ScoringTask:
    """One caption and the reference that it is judged against."""

    reference: Reference
    caption: Caption


class Judge(Protocol):
    """A judge of captions.

    Args:
        name: "rule", or the model with its server.
        prompt_hash: hash of the prompts, or version of the rules. Scores with the same name and hash are comparable.
        is_deterministic: whether judging again gives the same result.
    """

    name: str
    prompt_hash: str
    is_deterministic: bool

    def check(self, reference: Reference) -> None:
        """Raise a ValueError with a remedy if the judge cannot use the reference."""
        ...

    def judge(
        self, tasks: Sequence[ScoringTask], *, seed: int = 0, progress: ProgressCallback | None = None
    ) -> list[Score | Unscored]:
        """Judge captions and return results in the order of the tasks.

        Args:
            tasks: captions with their references.
            seed: random seed of the judge's sampling.
            progress: called with the number of captions just finished.
        """
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
    """Build the score of a judged caption.

    Events that the caption's modality excludes do not count (`is_expected`): neither as missing nor as mentioned. What
    the caption says wrongly about one of them is hallucinated, since the model was not given it.

    Args:
        task: caption and reference.
        missed: events that the caption does not mention.
        mentions: events that it mentions, correctly or not, in the caption's order.
        hallucinations: quotes of claims that match no event.
        repeated: quotes of claims that repeat another claim in other words.
        num_repeated_words: words in repeated claims by the judge's count; the larger of this and the number of
            literally repeated words is stored, because both counts include the literal repetitions.
    """
    num_verbatim, num_words = count_repeated_words(task.caption.text)
    modality = task.caption.modality
    expected = [event for event in missed if is_expected(event, modality)]
    counted = [mention for mention in mentions if is_expected(mention.event, modality)]
    others = [mention for mention in mentions if not is_expected(mention.event, modality)]
    false_claims = [mention.quote or mention.event.text for mention in others if not mention.is_correct]
    num_events, num_hallucinated = len(expected) + len(counted), len(hallucinations) + len(false_claims)
    return Score(
        video=task.reference.video,
        sample=task.caption.sample,
        num_events=num_events,
        missing=len(expected),
        incorrect=sum(not mention.is_correct for mention in counted),
        hallucinated=num_hallucinated,
        num_words=num_words,
        num_repeated_words=max(num_verbatim, num_repeated_words),
        finished=task.caption.finished,
        missed=tuple(event.text for event in expected),
        mentions=tuple(counted),
        hallucinations=(*hallucinations, *false_claims),
        repeated=tuple(repeated),
        start_seconds=task.caption.start_seconds,
        end_seconds=task.caption.end_seconds,
        dialogue=_count_expected_dialogue(task),
        num_excluded=len(missed) + len(mentions) - num_events,
    )


def is_expected(event: Event, modality: Modality | None) -> bool:
    """Return whether a caption made from this modality can be expected to mention an event; None expects all.

    Without audio, sounds and speech are not expected; without frames, what can be seen is not.
    """
    return modality in (None, "both") or event.is_audible == (modality == "audio")


def _count_expected_dialogue(task: ScoringTask) -> Dialogue | None:
    """Return how the caption quotes speech; None if the reference has speech that the model was not given."""
    events = task.reference.events
    if any(one.modality == "speech" and not is_expected(one, task.caption.modality) for one in events):
        return None
    return count_dialogue(task.caption.text, task.reference)


def match_references(
    references: Mapping[str, Reference], captions: Sequence[Caption], judge: Judge
) -> list[ScoringTask]:
    """Pair captions with their references; captions of part of a video get only the events of that part.

    Captions of videos without a reference are skipped with a warning.

    Args:
        references: references by `Reference.video`.
        captions: captions to score.
        judge: judge that has to accept every reference used.

    Raises:
        ValueError: no caption matches a reference, a caption occurs twice, or the judge cannot use a reference.
    """
    known = [caption for caption in captions if caption.video in references]
    if len(known) < len(captions):
        unknown = sorted({caption.video for caption in captions} - set(references))
        message = f"{len(unknown)} captioned videos have no reference, first {unknown[0]}"
        if not known:
            raise ValueError(
                f"{message}; the first reference is for {next(iter(references), 'no video')}. Score against the "
                "references of the same videos; relative paths in captions start at the current folder"
            )
        logger.warning("%s; they are skipped", message)
    counts = Counter((caption.video, caption.sample, caption.start_seconds, caption.end_seconds) for caption in known)
    if duplicates := [key for key, count in counts.items() if count > 1]:
        raise ValueError(
            f"{len(duplicates)} captions occur twice, first {duplicates[0][0]} (sample {duplicates[0][1]}): give "
            "several captions of a video different sample numbers"
        )
    # Check all references before judging any caption, so that an error in the last one costs no paid replies.
    for caption in known:
        judge.check(references[caption.video])
    return [ScoringTask(restrict_to_span(references[caption.video], caption), caption) for caption in known]


def empty_caption_tasks(
    references: Mapping[str, Reference], captions: Sequence[Caption], judge: Judge
) -> list[ScoringTask]:
    """Make a task with an empty caption for each reference without one, so that all its events count as missing.

    If all captions are of one modality, the events that it excludes do not count here, either.

    Raises:
        ValueError: the judge cannot use one of these references.
    """
    captioned = {caption.video for caption in captions}
    modalities = {caption.modality for caption in captions}
    modality = modalities.pop() if len(modalities) == 1 else None  # a model without audio would have heard nothing here
    uncaptioned = [video for video in references if video not in captioned]
    if uncaptioned:
        logger.warning(
            "%d of %d references have no caption, first %s; all their events count as missing",
            len(uncaptioned),
            len(references),
            uncaptioned[0],
        )
    for video in uncaptioned:
        judge.check(references[video])
    return [ScoringTask(references[video], Caption(video, "", modality=modality)) for video in uncaptioned]


def restrict_to_caption(reference: Reference, caption: Caption) -> Reference:
    """Return the reference with only the events that count in the caption's score: of its part, and its modality.

    Raises:
        ValueError: see `restrict_to_span`.
    """
    part = restrict_to_span(reference, caption)
    return replace(part, events=tuple(event for event in part.events if is_expected(event, caption.modality)))


def restrict_to_span(reference: Reference, caption: Caption) -> Reference:
    """Return the reference with only the events inside the caption's part of the video (`Event.lies_within`).

    Raises:
        ValueError: the part ends before it starts; or no event has a time, so every claim would be a hallucination.
    """
    start, end = caption.start_seconds, caption.end_seconds
    if start is None and end is None:
        return reference
    if start is not None and end is not None and end <= start:
        raise ValueError(f"the caption of {caption.video} covers {start} to {end} seconds: end must be after start")
    if reference.events and all(event.start_seconds is None for event in reference.events):
        raise ValueError(
            f"a caption covers part of {caption.video}, but the events of its reference have no times: add "
            "start_seconds and end_seconds to them, or caption the whole video"
        )
    return replace(reference, events=tuple(event for event in reference.events if event.lies_within(start, end)))
