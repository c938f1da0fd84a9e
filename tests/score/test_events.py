"""Splitting captions into events: parsed and rejected replies of a fake server, and rules for synthetic clips."""

import json
import random

import pytest

from salmonn.records import Caption, Event, Reference
from salmonn.score.events import list_events, parse_events
from salmonn.score.judge import restrict_to_span
from salmonn.score.llm_judge import InvalidReplyError
from salmonn.synthetic.annotate import write_reference
from salmonn.synthetic.parser import split_caption
from salmonn.synthetic.scene import SynthConfig, sample_scene
from tests.score.fake_llm_server import Answer

CAPTION = "At two seconds a brown dog runs in and barks twice. A man shouts: come here!"
REFERENCE = Reference("v", caption=CAPTION, duration_seconds=10.0)
DOG = {
    "text": "a brown dog runs in",
    "kind": "visual",
    "start_seconds": 2,
    "end_seconds": None,
    "quote": "brown dog runs in",
}
BARK = {
    "text": "a dog barks twice",
    "kind": "audio",
    "start_seconds": None,
    "end_seconds": None,
    "quote": "barks twice",
}
SHOUT = BARK | {"text": 'a man shouts "come here"', "kind": "speech", "quote": "A man shouts: come here"}


def reply(*entries: object) -> str:
    return json.dumps({"events": entries})


def test_parses_events():
    assert parse_events(reply(DOG, BARK, SHOUT), REFERENCE) == (
        Event("a brown dog runs in", "visual", 2.0),
        Event("a dog barks twice", "audio"),
        Event('a man shouts "come here"', "speech"),
    )


def test_reads_types_that_mean_the_same():
    entry = DOG | {"kind": "Visual", "start_seconds": "2", "end_seconds": "3.5"}
    assert parse_events(f"The events:\n{reply(entry)}", REFERENCE) == (
        Event("a brown dog runs in", "visual", 2.0, 3.5),
    )


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "no list of"),
        (["a dog runs"], "event 1 has no text"),
        ([DOG, {"text": "x", "kind": "visual"}], "event 2 has no text"),
        ([DOG | {"kind": "smell"}], "kind other than visual, audio, speech"),
        ([DOG | {"text": " "}], "an empty text"),
        ([DOG | {"quote": "a cat runs in"}], "'a cat runs in', which is not in the description"),
        ([DOG | {"start_seconds": "two"}], "not a number"),
        ([DOG | {"start_seconds": True}], "not a number"),
        ([DOG | {"start_seconds": None, "end_seconds": 3}], "end without a start"),
        ([DOG | {"end_seconds": 1}], "ends before it starts"),
        ([DOG | {"start_seconds": -1}], "starts before the video"),
        ([DOG | {"end_seconds": 11}], r"after the end of the video \(10\.0 seconds\)"),
        ([DOG, BARK, DOG], "occurs twice"),
    ],
)
def test_reports_errors_of_a_reply(entries, message):
    with pytest.raises(InvalidReplyError, match=message):
        parse_events(reply(*entries), REFERENCE)


def test_infinite_times():
    with pytest.raises(InvalidReplyError, match="ends before"):
        parse_events(reply(DOG).replace("null", "Infinity"), Reference("v", caption=CAPTION))


def test_splits_only_references_without_events(serve, open_client):
    server = serve(lambda request, number: Answer(reply(DOG) if number else "Sorry, I cannot."))
    edited = Reference("w", (Event("edited by hand"),), CAPTION)
    (first, second), failed = list_events([REFERENCE, edited], client=open_client(server))
    assert first.events == (Event("a brown dog runs in", "visual", 2.0),) and first.caption == CAPTION
    assert second is edited and not failed
    assert len(server.requests) == 2 and "no JSON object with events" in server.requests[1]["messages"][-1]["content"]
    assert json.loads(server.requests[0]["messages"][1]["content"]) == {"description": CAPTION}


def test_reports_a_caption_that_cannot_be_split(serve, open_client):
    server = serve(lambda request, number: Answer("no"))
    (reference,), (failed,) = list_events([REFERENCE], client=open_client(server), attempts=2)
    assert reference == REFERENCE
    assert failed.video == "v" and "no usable reply in 2 attempts" in failed.reason


def test_a_reference_with_nothing_to_split_does_not_affect_others():
    star = Reference("s", caption="A red star blinks.")
    (first, second), (failed,) = list_events([Reference("x"), star], client=None, rules=split_caption)
    assert first == Reference("x") and second.events == (Event("the red star blinks", "visual"),)
    assert failed.video == "x" and "neither events nor a caption" in failed.reason


def test_rules_find_the_events_of_synthetic_captions():
    for index in range(200):
        rng = random.Random(index)
        scene = sample_scene(rng, config=SynthConfig())
        expected = write_reference(scene, rng, video="v", index=index)
        (parsed,), _ = list_events([Reference("v", caption=expected.caption)], client=None, rules=split_caption)
        assert [(event.text, event.modality) for event in parsed.events] == [
            (event.text, event.modality) for event in expected.events
        ]


def test_rules_reject_text_that_they_cannot_parse():
    with pytest.raises(ValueError, match=r"a dog barks.*--judge openai"):
        list_events([Reference("v", caption="A red star blinks while a dog barks.")], client=None, rules=split_caption)


EVENTS = (
    Event("early", "visual", 0.0, 4.0),
    Event("across", "visual", 3.0, 7.0),  # 1 of its 4 seconds before 4.0, 3 after
    Event("half", "visual", 3.0, 5.0),  # half on each side
    Event("moment", "audio", 4.0, 4.0),
    Event("open", "audio", 6.0),
    Event("untimed"),
)


@pytest.mark.parametrize(
    ("start", "end", "texts"),
    [
        (None, None, ["early", "across", "half", "moment", "open", "untimed"]),
        (None, 4.0, ["early", "half"]),
        (4.0, None, ["across", "half", "moment", "open"]),
        (4.0, 6.0, ["across", "half", "moment"]),
        (0.0, 2.0, ["early"]),
        (8.0, 9.0, []),
    ],
)
def test_restricts_events_to_a_span(start, end, texts):
    part = restrict_to_span(Reference("v", EVENTS), Caption("v", "", start_seconds=start, end_seconds=end))
    assert [event.text for event in part.events] == texts
