"""Captions in the form of events: schema, checks, text and subtitles."""

import json

import pytest

from salmonn.batch.subtitles import format_text
from salmonn.files import parse_record, read_records, write_records
from salmonn.records import Caption, Event, EventCaption, SpokenLine
from salmonn.score.structured import StructureError, parse_structure, schema_text, structure_text

ANSWER = {
    "scene": "A kitchen at night",
    "events": [
        {"text": "a kettle whistles", "modality": "audio", "start_seconds": 6.0, "end_seconds": 8.2},
        {"text": "a woman enters", "modality": "visual", "start_seconds": 0, "end_seconds": 2.5},
    ],
    "speech": [{"speaker": "the woman", "words": "Is anybody there?", "start_seconds": 3.0, "end_seconds": 4.0}],
    "on_screen_text": ["EXIT"],
    "camera": "a static wide shot",
    "sound": "a fridge hums",
}


def changed(part, number, **values):
    """The answer with other values in an event or a spoken line."""
    answer = json.loads(json.dumps(ANSWER))
    answer[part][number] |= values
    return json.dumps(answer)


def test_an_answer_is_placed_in_its_video():
    """The clip is from 10 to 18 s: times are moved, events sorted, and an end that was rounded up is the clip's."""
    found = parse_structure(json.dumps(ANSWER), start_seconds=10.0, seconds=8.0)
    assert found.events == (
        Event("a woman enters", "visual", 10.0, 12.5),
        Event("a kettle whistles", "audio", 16.0, 18.0),
    )
    assert found.speech == (SpokenLine("the woman", "Is anybody there?", 13.0, 14.0),)
    assert [event.text for event in found.all_events()] == [
        "a woman enters", 'the woman says: "Is anybody there?"', "a kettle whistles",
    ]  # fmt: skip
    assert found.all_events()[1] == Event('the woman says: "Is anybody there?"', "speech", 13.0, 14.0)
    assert parse_structure(f"```json\n{json.dumps(ANSWER)}\n```", seconds=9.0).scene == "A kitchen at night"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("A kitchen.", "it is not JSON of the schema"),
        ('{"scene": "x", "mood": "dark"}', "it is not JSON of the schema"),
        (changed("events", 0, modality="smell"), "it is not JSON of the schema"),
        (changed("events", 1, start_seconds=2.5), "event 2 starts at 2.5 s and ends at 2.5 s, which must be later"),
        (changed("speech", 0, start_seconds=5.0), "speech 1 starts at 5 s and ends at 4 s"),
        (changed("events", 0, start_seconds=-1), "event 1 starts at -1 s"),
        (changed("events", 0, end_seconds=31), "event 1 ends at 31 s, but the clip ends at 8.0 s"),
        (changed("events", 0, end_seconds=None), "event 1 has no start or no end"),
        (changed("events", 0, text=" "), "event 1 has no text"),
        ('{"scene": ""}', "it has neither a scene nor events"),
    ],
)
def test_faults_are_named(text, fault):
    with pytest.raises(StructureError, match=fault):
        parse_structure(text, seconds=8.0)


def test_the_schema_has_the_fields_of_the_records():
    """All of them are required; times are numbers, not null; texts and lists end."""
    schema = json.loads(schema_text())
    assert list(schema["properties"]) == schema["required"] == list(EventCaption.__dataclass_fields__)
    event = schema["$defs"]["Event"]
    assert event["required"] == list(Event.__dataclass_fields__) and event["additionalProperties"] is False
    assert event["properties"]["modality"]["enum"] == ["visual", "audio", "speech"]
    assert event["properties"]["end_seconds"] == {
        "type": "number",
        "minimum": 0,
        "maximum": 360_000,
        "multipleOf": 0.01,
    }
    assert schema["$defs"]["SpokenLine"]["properties"]["words"] == {"type": "string", "maxLength": 600}
    assert schema["properties"]["on_screen_text"]["maxItems"] == 200
    assert "default" not in schema_text() and "description" not in schema_text()


def test_the_text_has_everything_in_order():
    text = structure_text(parse_structure(json.dumps(ANSWER), seconds=9.0))
    assert text == (
        'A kitchen at night. A woman enters. The woman says: "Is anybody there?" A kettle whistles. On the screen: '
        '"EXIT". Camera: a static wide shot. Sound: a fridge hums.'
    )


def test_subtitles_have_a_cue_for_each_event(tmp_path):
    structure = parse_structure(json.dumps(ANSWER), start_seconds=10.0, seconds=9.0)
    caption = Caption("a.mp4", structure_text(structure), start_seconds=10.0, end_seconds=19.0, structure=structure)
    subtitles = format_text([caption], "srt", seconds_of=lambda video: 0.0)
    assert subtitles == (
        "1\n00:00:10,000 --> 00:00:12,500\na woman enters\n\n"
        '2\n00:00:13,000 --> 00:00:14,000\nthe woman says: "Is anybody there?"\n\n'
        "3\n00:00:16,000 --> 00:00:18,200\na kettle whistles\n"
    )
    assert format_text([caption], "txt", seconds_of=lambda video: 0.0) == caption.text + "\n"
    write_records(tmp_path / "captions.jsonl", [caption])
    assert read_records(tmp_path / "captions.jsonl", Caption) == [caption]
    assert parse_record(json.loads((tmp_path / "captions.jsonl").read_text()), Caption).structure == structure
