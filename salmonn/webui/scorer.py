"""List the events of a caption, and score it if there is a reference."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any

from salmonn.files import parse_record
from salmonn.records import Caption, Event, EventModality, Modality, Reference, Score, Unscored
from salmonn.score.events import list_events
from salmonn.score.judge import Judge, ScoringTask, restrict_to_caption, restrict_to_span
from salmonn.score.llm_client import LLMClient
from salmonn.synthetic.parser import split_caption

PREFIXES: Mapping[str, EventModality] = {"seen": "visual", "heard": "audio", "said": "speech"}
HINT = 'write {"events": [{"text": "a dog barks", "modality": "audio"}]}, or one event per line'


@dataclass(frozen=True)
class CaptionAnalysis:
    """The events and the score of a caption.

    Args:
        caption: the caption.
        events: events that the caption describes.
        score: score against the reference; None without one, or if scoring failed.
        reference: the reference, with the events that the caption was scored against.
        notes: sentences that explain missing events or a missing score.
    """

    caption: Caption
    events: tuple[Event, ...] = ()
    score: Score | None = None
    reference: Reference | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class CaptionScorer:
    """Lists events and scores captions.

    Args:
        judge: judge of captions.
        client: language model that splits captions into events; None uses the rules for synthetic clips.
        attempts: maximum number of requests per caption to the language model.
        references: references of known videos, by file name.
    """

    judge: Judge
    _: KW_ONLY
    client: LLMClient | None = None
    attempts: int = 3
    references: Mapping[str, Reference] = field(default_factory=dict)

    def analyze(self, caption: Caption, reference: Reference | None, *, modality: Modality = "both") -> CaptionAnalysis:
        """List the events of a caption, and score it if there is a reference."""
        analysis = CaptionAnalysis(caption)
        if not caption.text.strip():
            return replace(analysis, notes=("The caption is empty.",))
        try:
            split = self._add_events(Reference(caption.video, caption=caption.text))
            analysis = replace(analysis, events=split.events)
        except ValueError as error:  # the rules cannot parse it, or the language model failed
            analysis = replace(analysis, notes=(f"No list of events: {error}.",))
        if reference is None:
            return analysis
        try:
            part, score = self.score(caption, reference, modality=modality)
        except ValueError as error:
            return replace(analysis, notes=(*analysis.notes, f"No score: {error}."))
        return replace(analysis, score=score, reference=part)

    def score(self, caption: Caption, reference: Reference, *, modality: Modality = "both") -> tuple[Reference, Score]:
        """Return the reference with the events that count for a caption, and the score.

        Raises:
            ValueError: the caption cannot be scored; the message gives the reason.
        """
        complete = reference if reference.events else self._add_events(reference)
        caption = replace(caption, video=complete.video)
        if modality != "both":
            caption = replace(caption, modality=modality)
        part, counted = restrict_to_span(complete, caption), restrict_to_caption(complete, caption)
        if not counted.events:
            raise ValueError("the reference has no events for this part of the video and this choice of video or audio")
        self.judge.check(part)
        (result,) = self.judge.judge([ScoringTask(part, caption)])
        if isinstance(result, Unscored):
            raise ValueError(result.reason)
        return counted, result

    def _add_events(self, reference: Reference) -> Reference:
        """Split the caption of a reference into events."""
        (split,), failed = list_events([reference], client=self.client, rules=split_caption, attempts=self.attempts)
        if failed:
            raise ValueError(failed[0].reason)
        return split


def reference_caption(reference: Reference, modality: Modality) -> str:
    """Return the reference caption for a modality."""
    captions = {"both": reference.caption, "visual": reference.visual_caption, "audio": reference.audio_caption}
    return captions[modality]


def references_by_file_name(references: Iterable[Reference]) -> dict[str, Reference]:
    """Map file names to references, without names that occur in several folders."""
    named: dict[str, list[Reference]] = {}
    for reference in references:
        named.setdefault(Path(reference.video).name, []).append(reference)
    return {name: found[0] for name, found in named.items() if len(found) == 1}


def parse_reference(text: str, *, video: str) -> Reference | None:
    """Parse a reference as typed or pasted by a user; return None for an empty text.

    Args:
        text: a reference as a JSON object, a JSON list of events, or one event per line, each with an optional prefix
            "seen:", "heard:" or "said:". A single line without a prefix is a description, to be split into events.
        video: name of the video file.

    Raises:
        ValueError: the JSON is invalid, or contains neither events nor a caption.
    """
    text = text.strip()
    if not text:
        return None
    if text[0] in "{[":
        return _parse_json(text, video=video)
    lines = [line.strip().lstrip("-*\N{BULLET}").strip() for line in text.splitlines()]
    lines = [line for line in lines if line]
    if len(lines) == 1 and lines[0].partition(":")[0].lower() not in PREFIXES:
        return Reference(video, caption=lines[0])
    events = []
    for line in lines:
        prefix, _, event = line.partition(":")
        modality = PREFIXES.get(prefix.strip().lower())
        events.append(Event(event.strip(), modality) if modality and event.strip() else Event(line))
    return Reference(video, events=tuple(events))


def _parse_json(text: str, *, video: str) -> Reference:
    try:
        value: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"the reference is not valid JSON (line {error.lineno}: {error.msg}); {HINT}") from error
    if isinstance(value, list):
        value = {"events": [{"text": item} if isinstance(item, str) else item for item in value]}
    try:
        reference = parse_record({"video": video} | value, Reference)
    except ValueError as error:
        raise ValueError(f"the reference is invalid: {error}; {HINT}") from error
    if not reference.events and not reference.caption.strip():
        raise ValueError(f"the reference contains neither events nor a caption; {HINT}")
    return replace(reference, video=video)
