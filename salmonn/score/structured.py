"""Captions in the form of events: their JSON schema, what is checked beyond it, and their text.

`schema_text` is for constrained decoding (`Sampling.json_schema`), servers (`response_format`) and other programs;
`parse_structure` reads an answer; `structure_text` is what is scored, exported as text and trained on.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

from pydantic import TypeAdapter

from salmonn.files import parse_json
from salmonn.records import Event, EventCaption, SpokenLine

SCHEMA_NAME = "events"  # of response_format in `salmonn serve`
MAX_REPORTED_FAULTS = 8
# Times up to this much after the end of a clip are rounded ones, and are taken for the end.
_SLACK_SECONDS = 0.5
_MAX_CHARS, _MAX_ITEMS = 600, 200
# Limited, so that no number has digits without end.
_TIME = {"type": "number", "minimum": 0, "maximum": 360_000, "multipleOf": 0.01}


class StructureError(ValueError):
    """An answer is not a valid caption in the form of events; the message says what is wrong with it."""


@cache
def schema_text(max_chars: int = _MAX_CHARS, max_items: int = _MAX_ITEMS) -> str:
    """Return the JSON schema of `EventCaption`: all fields are required, and no times are open.

    Args:
        max_chars, max_items: maximum length of a text and of a list, so that each answer ends.
    """
    schema = TypeAdapter(EventCaption).json_schema()
    limits = (max_chars, max_items)
    strict: dict[str, Any] = _strict(schema, limits) | {
        "$defs": {name: _strict(part, limits) for name, part in schema["$defs"].items()}
    }
    strict["$defs"]["Event"]["properties"] |= {"start_seconds": _TIME, "end_seconds": _TIME}
    return json.dumps(strict)


def _strict(schema: dict[str, Any], limits: tuple[int, int]) -> dict[str, Any]:
    """Return an object's schema without docstrings and defaults, with all properties required and limited."""
    properties = {name: _limited(part, limits) for name, part in schema["properties"].items()}
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _limited(schema: dict[str, Any], limits: tuple[int, int]) -> dict[str, Any]:
    kept = {name: value for name, value in schema.items() if name not in ("default", "title", "description")}
    if kept.get("type") == "string" and "enum" not in kept:
        return kept | {"maxLength": limits[0]}
    if kept.get("type") == "array":
        return kept | {"maxItems": limits[1], "items": _limited(kept["items"], limits)}
    return _TIME if kept.get("type") == "number" else kept


def parse_structure(text: str, *, start_seconds: float = 0.0, seconds: float) -> EventCaption:
    """Parse and check an answer.

    Args:
        text: JSON, with times from the start of the clip; it may be in a code block.
        start_seconds: start of the clip in its video, which is added to the times.
        seconds: length of the clip.

    Raises:
        StructureError: it is not JSON of the schema, has an empty text, or has a time outside the clip or an end that
            is not after its start; with up to `MAX_REPORTED_FAULTS` faults.
    """
    bare = text.strip()
    if bare.startswith("```"):
        bare = bare.removeprefix("```json").strip("`").strip()
    try:
        found = parse_json(bare, EventCaption)
    except ValueError as error:
        raise StructureError(f"it is not JSON of the schema: {error}") from error
    if faults := list(_faults(found, seconds))[:MAX_REPORTED_FAULTS]:
        raise StructureError("; ".join(faults))

    def place(one: Any) -> Any:
        first, last = (min(time, seconds) + start_seconds for time in (one.start_seconds, one.end_seconds))
        return replace(one, start_seconds=round(first, 3), end_seconds=round(last, 3))

    def by_time(one: Event | SpokenLine) -> float:
        return one.start_seconds or 0.0

    events, speech = (tuple(sorted(map(place, ones), key=by_time)) for ones in (found.events, found.speech))
    return replace(found, events=events, speech=speech)


def _faults(found: EventCaption, seconds: float) -> Iterator[str]:
    if not found.scene.strip() and not found.events and not found.speech:
        yield "it has neither a scene nor events"
    entries = [
        (f"event {number}", event.text, event.start_seconds, event.end_seconds)
        for number, event in enumerate(found.events, start=1)
    ] + [
        (f"speech {number}", line.words, line.start_seconds, line.end_seconds)
        for number, line in enumerate(found.speech, start=1)
    ]
    for name, text, start, end in entries:
        if not text.strip():
            yield f"{name} has no text"
        if start is None or end is None:
            yield f"{name} has no start or no end"
        elif not 0 <= start < end:
            yield f"{name} starts at {start:g} s and ends at {end:g} s, which must be later"
        elif end > seconds + _SLACK_SECONDS or start >= seconds:
            yield f"{name} ends at {end:g} s, but the clip ends at {seconds:.1f} s"


def structure_text(structure: EventCaption) -> str:
    """Return the structure as a caption: the scene, events and speech in order of time, text, camera and sound."""
    sentences = [structure.scene, *(event.text for event in structure.all_events())]
    sentences += [f'On the screen: "{text}"' for text in structure.on_screen_text if text.strip()]
    sentences += [
        f"{name}: {text}" for name, text in (("Camera", structure.camera), ("Sound", structure.sound)) if text
    ]
    return " ".join(_sentence(one) for one in map(str.strip, sentences) if one)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + ("" if text.endswith((".", "!", "?", '."', '!"', '?"')) else ".")
