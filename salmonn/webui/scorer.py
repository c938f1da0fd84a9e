"""What a caption tells, and how good it is: its events, and its score where a reference is there."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from salmonn.records import Caption, Event, EventModality, Modality, Reference, Score, Unscored, parse_record
from salmonn.score.events import list_events
from salmonn.score.judge import Judge, ScoringTask, restrict_to_span
from salmonn.score.llm_client import LLMClient
from salmonn.synthetic.parser import split_caption

KINDS: Mapping[str, EventModality] = {"seen": "visual", "heard": "audio", "said": "speech"}
HINT = 'write {"events": [{"text": "a dog barks", "modality": "audio"}]}, or one event a line'


@dataclass(frozen=True)
class CaptionAnalysis:
    """What was found in a caption.

    Args:
        caption: the caption.
        events: that it tells.
        score: None where there is no reference, or it could not be judged.
        reference: that it was scored against.
        notes: why there are no events or no score, in sentences.
    """

    caption: Caption
    events: tuple[Event, ...] = ()
    score: Score | None = None
    reference: Reference | None = None
    notes: tuple[str, ...] = ()


class CaptionScorer:
    """Lists events and scores captions by one judge.

    Args:
        judge: who scores.
        chat: who splits captions into events; None reads those of synthetic clips by rules.
        attempts: how often it is asked.
        references: of known videos, by the names of their files.
    """

    def __init__(
        self,
        judge: Judge,
        *,
        client: LLMClient | None = None,
        attempts: int = 3,
        references: Mapping[str, Reference] | None = None,
    ) -> None:
        self.judge = judge
        self.references = references or {}
        self._client = client
        self._attempts = attempts

    def analyze(self, caption: Caption, reference: Reference | None, *, modality: Modality = "both") -> CaptionAnalysis:
        """List the events of a caption; score it where there is a reference."""
        found = CaptionAnalysis(caption)
        if not caption.text.strip():
            return replace(found, notes=("The caption is empty: there is nothing to find in it.",))
        try:
            found = replace(found, events=self._split(Reference(caption.video, caption=caption.text)).events)
        except ValueError as error:  # of a judge that cannot read this, or cannot be asked
            found = replace(found, notes=(f"No list of events: {error}.",))
        if reference is None:
            return found
        try:
            known, score = self.score(caption, reference, modality=modality)
        except ValueError as error:
            return replace(found, notes=(*found.notes, f"No score: {error}."))
        return replace(found, score=score, reference=known)

    def score(self, caption: Caption, reference: Reference, *, modality: Modality = "both") -> tuple[Reference, Score]:
        """The events that a caption is scored against, and its score.

        Raises:
            ValueError: it cannot be judged; the message says why.
        """
        known = restrict(reference if reference.events else self._split(reference), modality)
        part = restrict_to_span(known, caption)
        if not part.events:
            raise ValueError("the reference has no event in this part and kind of the video")
        self.judge.check(part)
        (result,) = self.judge.judge([ScoringTask(part, replace(caption, video=part.video))])
        if isinstance(result, Unscored):
            raise ValueError(result.reason)
        return part, result

    def _split(self, reference: Reference) -> Reference:
        (found,), failed = list_events([reference], client=self._client, rules=split_caption, attempts=self._attempts)
        if failed:
            raise ValueError(failed[0].reason)
        return found


def restrict(reference: Reference, modality: Modality) -> Reference:
    """The events alone that are in what was asked about: of the picture those that are seen, of the sound the rest."""
    if modality == "both":
        return reference
    return replace(
        reference, events=tuple(event for event in reference.events if event.is_audible == (modality == "audio"))
    )


def right_caption(reference: Reference, modality: Modality) -> str:
    """The reference's words on what was asked about."""
    return {
        "both": reference.caption,
        "visual": reference.visual_caption,
        "audio": reference.audio_caption,
    }[modality]


def references_by_file_name(references: Iterable[Reference]) -> dict[str, Reference]:
    """References by the names of their files; a name that two folders have stands for neither."""
    named: dict[str, list[Reference]] = {}
    for reference in references:
        named.setdefault(Path(reference.video).name, []).append(reference)
    return {name: found[0] for name, found in named.items() if len(found) == 1}


def read_reference(text: str, *, video: str) -> Reference | None:
    """A reference as it was typed or pasted; None of nothing.

    Args:
        text: a JSON object of a reference, or a JSON list of events; else one event a line, which may begin with
            "seen:", "heard:" or "said:". A single line is a description that is to be split into events.
        video: the name of the file.

    Raises:
        ValueError: it is none of these.
    """
    text = text.strip()
    if not text:
        return None
    if text[0] in "{[":
        return _parse(text, video=video)
    lines = [line.strip().lstrip("-*\N{BULLET}").strip() for line in text.splitlines()]
    lines = [line for line in lines if line]
    if len(lines) == 1 and lines[0].partition(":")[0].lower() not in KINDS:
        return Reference(video, caption=lines[0])
    return Reference(video, events=tuple(_read_line(line) for line in lines))


def _read_line(line: str) -> Event:
    kind, _, words = line.partition(":")
    if kind.strip().lower() in KINDS and words.strip():
        return Event(words.strip(), KINDS[kind.strip().lower()])
    return Event(line)


def _parse(text: str, *, video: str) -> Reference:
    try:
        value: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"the reference is no JSON (line {error.lineno}: {error.msg}): {HINT}") from error
    if isinstance(value, list):
        value = {"events": [{"text": one} if isinstance(one, str) else one for one in value]}
    try:
        reference = parse_record({"video": video} | value, Reference)
    except ValueError as error:
        raise ValueError(f"the reference cannot be read: {error}; {HINT}") from error
    if not reference.events and not reference.caption.strip():
        raise ValueError(f"the reference holds neither events nor a caption: {HINT}")
    return replace(reference, video=video)
