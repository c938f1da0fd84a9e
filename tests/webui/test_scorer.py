"""The events and the score of a caption, and references that users type."""

import pytest

from salmonn.records import Caption, Event, Reference
from salmonn.synthetic.judge import RuleJudge
from salmonn.webui.scorer import (
    CaptionScorer,
    parse_reference,
    reference_caption,
    references_by_file_name,
)

APPEARS = Event("a red circle appears", "visual", 1.0, 2.0)
TONE = Event("a low tone is heard", "audio", 3.0, 4.0)
DISAPPEARS = Event("the red circle disappears", "visual", 5.0, 6.0)
REFERENCE = Reference(
    "clip.mp4", (APPEARS, TONE, DISAPPEARS), caption="Both.", visual_caption="Seen.", audio_caption="Heard."
)
TEXT = "A red circle appears. A high tone is heard. A blue star appears."


@pytest.fixture
def scorer():
    return CaptionScorer(RuleJudge())


def test_events_and_score(scorer):
    """The circle is correct, the low tone is described as high, leaving is missing, the star is hallucinated."""
    analysis = scorer.analyze(Caption("upload.mp4", TEXT), REFERENCE)
    assert [(event.text, event.modality) for event in analysis.events] == [
        ("a red circle appears", "visual"),
        ("a high tone is heard", "audio"),
        ("a blue star appears", "visual"),
    ]
    score = analysis.score
    assert (score.num_events, score.missing, score.incorrect, score.hallucinated) == (3, 1, 1, 1)
    assert (
        score.missed == (DISAPPEARS.text,)
        and score.incorrect_events == (TONE.text,)
        and score.hallucinations == ("A blue star appears",)
    )
    assert analysis.notes == ()


def test_without_a_reference_there_is_no_score(scorer):
    analysis = scorer.analyze(Caption("upload.mp4", TEXT), None)
    assert len(analysis.events) == 3 and analysis.score is None and analysis.reference is None


@pytest.mark.parametrize(("modality", "num_events"), [("visual", 2), ("audio", 1)])
def test_a_modality_is_scored_against_its_events(scorer, modality, num_events):
    analysis = scorer.analyze(Caption("upload.mp4", TEXT), REFERENCE, modality=modality)
    assert analysis.score.num_events == num_events == len(analysis.reference.events)


def test_a_part_is_scored_against_its_events(scorer):
    analysis = scorer.analyze(Caption("upload.mp4", TEXT, start_seconds=4.5), REFERENCE)
    assert analysis.reference.events == (DISAPPEARS,) and analysis.score.missing == 1


def test_a_reference_without_events_is_split(scorer):
    analysis = scorer.analyze(Caption("upload.mp4", TEXT), Reference("clip.mp4", caption="A red circle appears."))
    assert analysis.score.num_events == 1 and analysis.score.missing == 0


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("  ", None, ["caption is empty"]),
        ("Seagulls quarrel.", None, ["No list of events", "only know synthetic clips"]),
        (TEXT, Reference("clip.mp4", (Event("seagulls quarrel"),)), ["No score", "cannot read the event"]),
        (TEXT, Reference("clip.mp4", (Event("a dog barks"),), caption="x"), ["No score"]),
    ],
)
def test_failures_are_noted(scorer, text, reference, expected):
    analysis = scorer.analyze(Caption("upload.mp4", text), reference)
    assert analysis.score is None and all(word in " ".join(analysis.notes) for word in expected)


def test_no_event_in_the_part_is_noted(scorer):
    analysis = scorer.analyze(Caption("upload.mp4", TEXT, start_seconds=9.0), REFERENCE)
    assert analysis.score is None and "no events for this part" in analysis.notes[0] and len(analysis.events) == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        (" \n", None),
        ("A dog barks at a cat.", Reference("v", caption="A dog barks at a cat.")),
        ("heard: a dog barks", Reference("v", (Event("a dog barks", "audio"),))),
        (
            "- a dog runs\n\n• Heard: a dog barks\nsaid: come here",
            Reference("v", (Event("a dog runs"), Event("a dog barks", "audio"), Event("come here", "speech"))),
        ),
        ("at noon: a bell\na dog runs", Reference("v", (Event("at noon: a bell"), Event("a dog runs")))),
        (
            '["a dog runs", {"text": "a bell", "modality": "audio"}]',
            Reference("v", (Event("a dog runs"), Event("a bell", "audio"))),
        ),
        ('{"video": "other.mp4", "caption": "A dog."}', Reference("v", caption="A dog.")),
    ],
)
def test_parse_reference(text, expected):
    assert parse_reference(text, video="v") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"events": [', "not valid JSON"),
        ('{"evens": []}', "unknown field evens"),
        ('[{"words": "a"}]', "unknown field words"),
        ("{}", "neither events nor a caption"),
        ("[3]", "must be a JSON object, got 3"),
    ],
)
def test_invalid_references(text, expected):
    with pytest.raises(ValueError, match=expected) as caught:
        parse_reference(text, video="v")
    assert "one event per line" in str(caught.value)


def test_the_reference_caption_of_a_modality():
    assert [reference_caption(REFERENCE, modality) for modality in ("both", "visual", "audio")] == [
        "Both.",
        "Seen.",
        "Heard.",
    ]


def test_ambiguous_file_names_are_omitted():
    one, two, three = (Reference(video) for video in ("a/clip.mp4", "b/clip.mp4", "b/other.mp4"))
    assert references_by_file_name([one, two, three]) == {"other.mp4": three}
