"""One caption of a video from the captions of its segments, with every fact of them.

    fuse(captions)                         # "At 0:00: ... At 0:12: ...": by rule, offline, word for word
    fuse(captions, writer=TextModel(...))  # a coherent text by a model, from the captions alone

A model is asked about as many captions in a row as fit into `MAX_CHARS`, then about the answers, and so on as long as
two neighbours fit. Answers that keep all facts hardly become shorter: then they are the paragraphs of the result. So
the length of a request is bounded, and each level costs as much as the captions are long, however many there are.
With a `FactCheck`, each answer is checked against the facts of its captions and requested once more if it differs.
Nothing here imports torch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from salmonn.caption.generator import BatchCaptioner, CaptionRequest, Span
from salmonn.caption.shape import ONLY_CAPTION
from salmonn.records import Caption, Event, Failure, Fusion, Reference, Score, Unscored
from salmonn.score.judge import Judge, ScoringTask

if TYPE_CHECKING:
    from salmonn.caption.loader import ClipReader

MAX_CHARS = 8000  # of the captions in a request, about 2,000 tokens
RULE_WRITER = "rule"

PROMPT = """\
Below are captions of consecutive parts of one video, each with its time. Write one coherent caption of all of it, in \
the order of time. Keep every fact: who and what is seen, what happens, sounds, music, every spoken word, text on the \
screen. Say when things happen where the time matters. State once what stays the same from part to part, and add \
nothing that the captions do not state. Reply with the caption alone.

{parts}"""
REPAIR = "{faults} Write the whole caption again, with every fact of the captions above and nothing else."


class FusionError(ValueError):
    """The captions of a video cannot be fused; the message has the reason."""


def _raise_if_stopped(error: ValueError) -> None:
    """Raise an error again after which a server takes no further request, for this video or another."""
    from salmonn.score.chat_client import LLMStoppedError  # noqa: PLC0415 - imports openai

    if isinstance(error, LLMStoppedError):
        raise error


class Writer(Protocol):
    """A model that answers prompts; `TextModel` is one."""

    def answer(self, requests: Sequence[CaptionRequest]) -> list[Caption | str]:
        """Return an answer to each request, or why there is none."""
        ...


class CaptionerWriter:
    """The captioning model as a writer: it also sees the part of the video that the captions are of.

    Args:
        captioner: the model.
        template: sampling parameters with a token limit, modality and frames of its requests, as of a caption's.
        reader: reads the videos.
        batch_size: see `Captioner.caption_batches`.
    """

    def __init__(
        self,
        captioner: BatchCaptioner,
        *,
        template: CaptionRequest,
        reader: "ClipReader",
        batch_size: int | None = None,
    ) -> None:
        self._captioner, self._template = captioner, template
        self._reader, self._batch_size = reader, batch_size

    def answer(self, requests: Sequence[CaptionRequest]) -> list[Caption | str]:
        """See `Writer`; raises an LLMStoppedError if the model's server takes no further request."""
        asked = [
            replace(self._template, path=one.path, prompt=one.prompt, span=one.span, history=one.history)
            for one in requests
        ]
        answers: list[Caption | str] = [""] * len(asked)
        try:
            for batch in self._captioner.caption_batches(asked, batch_size=self._batch_size, reader=self._reader):
                for done in batch:
                    answers[done.index] = self._check(done.result)
        except ValueError as error:  # for example of a caption with special tokens, which no prompt may have
            _raise_if_stopped(error)
            return [str(error)] * len(asked)
        return answers

    def _check(self, result: Caption | Failure) -> Caption | str:
        if isinstance(result, Failure):
            return result.reason
        if not result.text.strip():
            return f"{result.model} replied with an empty text; use another model"
        if not result.finished and (sampling := self._template.sampling):
            limit = f"{sampling.max_new_tokens} tokens; increase --fuse-max-new-tokens"
            return f"{result.model}: the fused caption was cut off at {limit}"
        return result


@dataclass(frozen=True)
class FactCheck:
    """A judge that compares a fused caption with the facts of the captions that it is made of.

    Args:
        judge: judge of captions against events.
        split: returns the events of captions, given as references; those that cannot be split have none.
        name: name of the judge in records, without the address of its server.
    """

    judge: Judge
    split: Callable[[Sequence[Reference]], Sequence[Reference]]
    name: str = "rule"

    def events_of(self, captions: Sequence[Caption]) -> list[tuple[Event, ...]]:
        """Return the events of each caption, with the times of its segment.

        Raises:
            FusionError: a caption cannot be split into events.
            LLMStoppedError: the judge's server takes no further request.
        """
        named = [Reference(f"{one.video} {number}", caption=bare_text(one)) for number, one in enumerate(captions)]
        try:
            split = self.split([one for one in named if one.caption.strip()])
        except ValueError as error:
            _raise_if_stopped(error)
            raise FusionError(str(error)) from error
        events = {one.video: one.events for one in split}
        if missing := [name for name, found in events.items() if not found]:
            raise FusionError(f"the judge {self.judge.name} cannot split the caption of {missing[0]} into events")
        return [
            tuple(
                replace(event, start_seconds=one.start_seconds, end_seconds=one.end_seconds)
                for event in events.get(reference.video, ())
            )
            for one, reference in zip(captions, named, strict=True)
        ]

    def compare(self, text: str, events: Sequence[Event]) -> Score:
        """Judge a text; raises a FusionError if the judge fails."""
        task = ScoringTask(Reference("", events=tuple(events)), Caption("", text))
        (score,) = self.judge.judge([task])
        if isinstance(score, Unscored):
            raise FusionError(f"the judge {self.judge.name} failed: {score.reason}")
        return score


@dataclass(frozen=True)
class _Part:
    """A caption of one or more segments in a row: its span, its text, the facts that it should have, and its score."""

    start_seconds: float
    end_seconds: float
    text: str
    events: tuple[Event, ...] = ()
    score: Score | None = None
    num_requests: int = 0

    @property
    def line(self) -> str:
        """Return the part as it is given to a model."""
        return f"[{clock(self.start_seconds)} - {clock(self.end_seconds)}] {self.text}"


def fuse(
    captions: Sequence[Caption],
    *,
    writer: Writer | None = None,
    check: FactCheck | None = None,
    path: Path | None = None,
    max_chars: int = MAX_CHARS,
) -> Caption:
    """Return one caption of a video.

    Args:
        captions: captions of its segments, in order of time and with their times; one alone is returned as it is.
        writer: model that writes the caption; None puts the captions one after the other with their times.
        check: counts the facts that are lost, changed or added, and makes a model correct them; None does not.
        path: local copy of the video, for a writer that sees it; None: the captions have its path.
        max_chars: maximum length of the captions in a request to the model.

    Raises:
        FusionError: a segment has no times, the model gives no answer, or the check is not possible.
    """
    parts, name = _to_parts(captions, check), ""
    if writer is not None:
        path = path or Path(captions[0].video)
        parts, name = _write(path, parts, writer, check=check, max_chars=max_chars)
    if name:
        text = "\n\n".join(part.text for part in parts)
    else:
        text, name = join_by_rule(parts), RULE_WRITER
        parts = [_merge(group, join_by_rule(group), check) for group in _groups(parts, max_chars)]
    first, last = captions[0], captions[-1]
    return replace(
        first,
        text=text,
        prompt="",
        finished=all(one.finished for one in captions),
        complete=all(one.complete for one in captions),
        warnings=tuple(dict.fromkeys(chain.from_iterable(one.warnings for one in captions))),
        end_seconds=last.end_seconds,
        segment=0,
        num_segments=1,
        num_failed_segments=0,
        logprob=None,
        num_tokens=None,
        captions={},
        shaping={},
        structure=None,
        fusion=_report(captions, parts, name, check),
    )


def bare_text(caption: Caption) -> str:
    """Return a caption without trigger and templates, which a fused caption gets once."""
    bare = caption.shaping[ONLY_CAPTION].bare if ONLY_CAPTION in caption.shaping else None
    return (caption.text if bare is None else bare).strip()


def join_by_rule(parts: "Sequence[_Part]") -> str:
    """Return the texts one after the other with their times, those of equal neighbours once."""
    if len(parts) == 1:
        return parts[0].text
    return "\n".join(f"At {clock(part.start_seconds)}: {part.text}" for part in parts)


def clock(seconds: float) -> str:
    """Return a time as 1:02:03, or 2:03."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _to_parts(captions: Sequence[Caption], check: FactCheck | None) -> list[_Part]:
    """Return the segments; neighbours with the same text are one."""
    events = check.events_of(captions) if check else [()] * len(captions)
    parts: list[_Part] = []
    for caption, facts in zip(captions, events, strict=True):
        start, end = caption.start_seconds or 0.0, caption.end_seconds
        if end is None and len(captions) > 1:
            raise FusionError(f"{caption.video}: a caption has no end time; caption it with --segments")
        text = bare_text(caption)
        if parts and parts[-1].text == text:
            parts[-1] = replace(parts[-1], end_seconds=end or start)
        else:
            parts.append(_Part(start, end or start, text, facts))
    return parts


def _groups(parts: Sequence[_Part], max_chars: int) -> Iterator[list[_Part]]:
    """Yield as many parts in a row as fit into a request; a part that is too long is alone."""
    group: list[_Part] = []
    length = 0
    for part in parts:
        if group and length + len(part.line) + 1 > max_chars:
            yield group
            group, length = [], 0
        group.append(part)
        length += len(part.line) + 1
    if group:
        yield group


def _write(
    path: Path, parts: list[_Part], writer: Writer, *, check: FactCheck | None, max_chars: int
) -> tuple[list[_Part], str]:
    """Let a model write paragraphs; return them with its name, "" if no two captions fit into a request."""
    name = ""
    while len(groups := list(_groups(parts, max_chars))) < len(parts):
        requests = {
            number: CaptionRequest(
                path,
                PROMPT.format(parts="\n".join(part.line for part in group)),
                span=Span(group[0].start_seconds, group[-1].end_seconds),
            )
            for number, group in enumerate(groups)
            if len(group) > 1
        }
        answers = dict(zip(requests, _answer(writer, list(requests.values())), strict=True))
        name = next(iter(answers.values())).model
        parts = [
            _merge(
                group, answers[number].text if number in answers else group[0].text, check, num_requests=len(group) > 1
            )
            for number, group in enumerate(groups)
        ]
        if check is not None:
            parts = _repair(parts, requests, writer, check)
    return parts, name


def _repair(
    parts: Sequence[_Part], requests: dict[int, CaptionRequest], writer: Writer, check: FactCheck
) -> list[_Part]:
    """Ask once more for texts with lost, changed or added facts; the better text is kept."""
    faulty = {
        number: replace(
            request, prompt=REPAIR.format(faults=faults), history=[(request.prompt or "", parts[number].text)]
        )
        for number, request in requests.items()
        if (faults := _describe_faults(parts[number].score))
    }
    repaired = list(parts)
    for number, answer in zip(faulty, _answer(writer, list(faulty.values())), strict=True):
        before = parts[number]
        after = replace(before, text=answer.text.strip(), score=check.compare(answer.text, before.events))
        better = after if _num_faults(after.score) < _num_faults(before.score) else before
        repaired[number] = replace(better, num_requests=before.num_requests + 1)
    return repaired


def _answer(writer: Writer, requests: Sequence[CaptionRequest]) -> list[Caption]:
    answers = []
    for answer in writer.answer(requests):
        if isinstance(answer, str):
            raise FusionError(answer)
        if not answer.finished:
            raise FusionError(f"{answer.model}: the fused caption was cut off at the token limit; use another model")
        answers.append(answer)
    return answers


def _merge(group: Sequence[_Part], text: str, check: FactCheck | None, *, num_requests: int = 0) -> _Part:
    """Return the parts as one with this text. A fact that neighbours share is one fact."""
    events: list[Event] = []
    latest: dict[tuple[str, str], int] = {}  # of the facts of the part before
    for part in group:
        current: dict[tuple[str, str], int] = {}
        for event in part.events:
            key = (event.text, event.modality)
            if key in latest and key not in current:
                events[latest[key]] = replace(events[latest[key]], end_seconds=event.end_seconds)
                current[key] = latest[key]
            else:
                current[key] = len(events)
                events.append(event)
        latest = current
    score = check.compare(text, events) if check and events else None
    total = num_requests + sum(part.num_requests for part in group)
    return _Part(group[0].start_seconds, group[-1].end_seconds, text.strip(), tuple(events), score, total)


def _num_faults(score: Score | None) -> int:
    return 0 if score is None else score.missing + score.incorrect + score.hallucinated


def _describe_faults(score: Score | None) -> str:
    """Return what is wrong with a fused text in sentences for the model; "" if nothing is."""
    if score is None:
        return ""
    faults = {
        "These facts of the captions are missing:": score.missed,
        "These facts are wrong or out of order:": score.incorrect_events,
        "These statements are not in the captions:": score.hallucinations,
    }
    return " ".join(f"{what} {'; '.join(texts)}." for what, texts in faults.items() if texts)


def _report(captions: Sequence[Caption], parts: Sequence[_Part], name: str, check: FactCheck | None) -> Fusion:
    scores = [part.score for part in parts if part.score is not None]
    report = Fusion(
        writer=name,
        num_segments=len(captions),
        num_missing_segments=captions[0].num_failed_segments,
        num_requests=sum(part.num_requests for part in parts),
    )
    if check is None:
        return report
    return replace(
        report,
        judge=check.name,
        num_facts=sum(score.num_events for score in scores),
        lost=tuple(chain.from_iterable(score.missed for score in scores)),
        changed=tuple(chain.from_iterable(score.incorrect_events for score in scores)),
        added=tuple(chain.from_iterable(score.hallucinations for score in scores)),
    )
