"""Captions in the form of events, from a scripted generator and by constrained decoding of the toy model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from salmonn.caption.captioner import SHIPPED_MODEL, Captioner
from salmonn.caption.event_shape import events_shape
from salmonn.caption.generator import CaptionRequest, Sampling
from salmonn.caption.shape import generate_shaped
from salmonn.records import Caption, EventCaption, Failure, Reference
from salmonn.score.judge import ScoringTask
from salmonn.score.structured import parse_structure, schema_text
from salmonn.synthetic.judge import RuleJudge


def answer_of(*events, scene=""):
    names = ("text", "modality", "start_seconds", "end_seconds")
    return json.dumps({"scene": scene, "events": [dict(zip(names, event, strict=True)) for event in events]})


RIGHT = answer_of(("a red circle appears", "visual", 0.5, 1), ("a low tone is heard", "audio", 1, 2.5))
LATE = answer_of(("a red circle appears", "visual", 0.5, 99))


class Scripted:
    """Answers in turn; keeps the requests."""

    name = "scripted"

    def __init__(self, *answers):
        self.answers, self.requests = list(answers), []

    def generate(self, requests):
        self.requests += requests
        captions = []
        for request in requests:
            answer = self.answers.pop(0)
            caption = answer if isinstance(answer, Caption) else Caption(str(request.path), answer)
            captions.append([replace(caption, video=str(request.path), model=self.name)])
        return captions


def run(video, *answers):
    generator = Scripted(*answers)
    request = CaptionRequest(video, "Describe the video.", Sampling(max_new_tokens=99))
    (result,) = generate_shaped(generator, [request], events_shape())
    return result, generator.requests


def test_a_valid_answer(videos):
    """It follows the schema, its times are those of the video, and the rule judge reads its text."""
    result, (request,) = run(videos[0], RIGHT)
    assert request.sampling == Sampling(max_new_tokens=99, json_schema=schema_text())
    assert request.prompt.startswith("Describe the video.\nReply with one JSON object") and " s long." in request.prompt
    assert isinstance(result.structure, EventCaption) and result.structure.events[1].end_seconds == 2.5
    assert result.text == "A red circle appears. A low tone is heard." and result.shaping["caption"].num_answers == 1
    score = RuleJudge().judge_one(ScoringTask(Reference("", events=result.structure.events), result))
    assert (score.num_events, score.missing, score.incorrect, score.hallucinated) == (2, 0, 0, 0)


def test_an_invalid_answer_is_asked_for_once_more_with_the_fault(videos):
    result, (first, second) = run(videos[0], LATE, RIGHT)
    assert "event 1 ends at 99 s, but the clip ends at" in second.prompt
    assert second.history == ((first.prompt, LATE),) and second.sampling == first.sampling
    assert result.structure.events[0].end_seconds == 1.0 and result.shaping["caption"].num_answers == 2


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ((LATE, LATE), "its events are not valid after 2 answers: event 1 ends at 99 s, but the clip ends at"),
        ((LATE, "no"), "its events are not valid after 2 answers: it is not JSON of the schema"),
        ((Caption("", RIGHT[:30], finished=False),), "its events were cut off at the token limit; increase it"),
    ],
)
def test_a_clip_without_a_valid_answer_fails(videos, answers, reason):
    result, requests = run(videos[0], *answers)
    assert isinstance(result, Failure) and reason in result.reason and len(requests) == len(answers)


def test_constrained_decoding_makes_the_answer_valid(videos):
    """The toy model knows no JSON: the schema alone, with short texts, makes its sampled answers parse."""
    pytest.importorskip("llguidance")
    captioner = Captioner.load(SHIPPED_MODEL)
    schema = schema_text(max_chars=8, max_items=1)
    sampling = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=400, json_schema=schema)
    requests = [CaptionRequest(Path(videos[0]), sampling=sampling, seed=seed) for seed in range(2)]
    answers = [caption for (caption,) in captioner.generate(requests)]
    assert [caption.finished for caption in answers] == [True, True]
    for caption in answers:
        assert list(json.loads(caption.text)) == list(EventCaption.__dataclass_fields__)


def test_the_fault_of_a_real_model_fails_only_its_clip(videos):
    """In a batch: the toy model's times mean nothing, so a clip fails with the reason or has times within it."""
    pytest.importorskip("llguidance")
    captioner = Captioner.load(SHIPPED_MODEL)
    sampling = Sampling(max_new_tokens=300)
    requests = [CaptionRequest(video, sampling=sampling) for video in videos[:2]]
    for result in captioner.caption_many(requests, shape=events_shape(schema_text(max_chars=8, max_items=1))):
        if isinstance(result, Failure):
            assert "its events" in result.reason and result.stage == "caption"
        else:
            assert parse_structure(json.dumps({"scene": result.structure.scene or "x"}), seconds=1.0)
