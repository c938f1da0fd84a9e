"""One caption of a video from those of its segments, with facts counted by the rule judge."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from jsonargparse import Namespace

from salmonn.caption.fusion import REPAIR, CaptionerWriter, FactCheck, FusionError, clock, fuse
from salmonn.caption.generator import CaptionRequest, SegmentResult
from salmonn.cli.fuse_options import _fact_check
from salmonn.records import Caption, Event
from salmonn.score.budget import Budget
from salmonn.score.events import list_events
from salmonn.synthetic.judge import RuleJudge
from salmonn.synthetic.parser import split_caption

TEXTS = [
    "A red circle appears. A low tone is heard.",
    "The red circle moves to the left.",
    "A low tone is heard. The red circle turns blue.",
    "The blue circle disappears.",
]
CHECK = FactCheck(RuleJudge(), lambda references: list_events(references, client=None, rules=split_caption)[0])


def segments(texts=TEXTS, seconds=10.0):
    return [
        Caption("film.mp4", text, "Describe.", "toy", start_seconds=seconds * n, end_seconds=seconds * (n + 1))
        for n, text in enumerate(texts)
    ]


class ScriptedWriter:
    """Answers with a function of the captions in the prompt; keeps the requests."""

    def __init__(self, write, repaired=None):
        self.requests = []
        self._write, self._repaired = write, repaired or write

    def answer(self, requests):
        self.requests += requests
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        prompt, write = (request.history[0][0], self._repaired) if request.history else (request.prompt, self._write)
        texts = re.findall(r"^\[\S+ - \S+\] (.*(?:\n(?!\[).*)*)", prompt, re.MULTILINE)
        text = write(texts)
        return text if isinstance(text, Caption) else Caption(str(request.path), text, model="scripted")


@pytest.mark.parametrize(("kind", "model", "name"), [("openai", "m", "m"), ("rule", None, "rule")])
def test_the_address_of_a_judge_is_not_recorded(kind, model, name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = {"fuse_server": "http://localhost:9/v1", "fuse_api_key_env": None, "budget": Budget()}
    check = _fact_check(Namespace(fuse_judge=kind, fuse_model=model, **flags))
    assert check.name == name
    fused = fuse(segments(), writer=None, check=replace(CHECK, name=check.name))
    assert fused.fusion.judge == name


class SilentCaptioner:
    """Replies to each request with an empty text."""

    def caption_batches(self, requests, **_):
        yield [SegmentResult(number, 1, Caption(str(one.path), "")) for number, one in enumerate(requests)]


def test_by_rule_each_fact_is_kept_with_its_time():
    fused = fuse(segments(), check=CHECK)
    assert fused.text == "\n".join(f"At 0:{10 * n:02}: {text}" for n, text in enumerate(TEXTS))
    assert (fused.start_seconds, fused.end_seconds, fused.segment, fused.num_segments) == (0.0, 40.0, 0, 1)
    fusion = fused.fusion
    assert (fusion.writer, fusion.num_segments, fusion.num_requests, fusion.judge) == ("rule", 4, 0, "rule")
    # Six facts: the low tone sounds twice, 10 s apart.
    assert (fusion.num_facts, fusion.lost, fusion.changed, fusion.added) == (6, (), (), ())
    assert fuse(segments()).fusion == replace(fusion, judge=None, num_facts=None)


def test_by_rule_equal_neighbours_are_one():
    fused = fuse(segments(["A red circle appears."] * 3 + ["A low tone is heard."]), check=CHECK)
    assert fused.text == "At 0:00: A red circle appears.\nAt 0:30: A low tone is heard."
    assert fused.fusion.num_segments == 4 and fused.fusion.num_facts == 2


def test_a_caption_alone_is_as_it_is():
    for writer in (None, ScriptedWriter(" ".join)):
        fused = fuse(segments(TEXTS[:1]), writer=writer)
        assert fused.text == TEXTS[0] and fused.fusion.num_requests == 0 and fused.fusion.writer == "rule"


def test_a_model_that_keeps_all_facts():
    writer = ScriptedWriter(" ".join)
    fused = fuse(segments(), writer=writer, check=CHECK)
    assert fused.text == " ".join(TEXTS)
    (request,) = writer.requests
    assert "\n[0:20 - 0:30] A low tone is heard. The red circle turns blue.\n" in request.prompt
    assert (request.span.start_seconds, request.span.end_seconds) == (0, 40)
    fusion = fused.fusion
    assert (fusion.writer, fusion.num_requests, fusion.num_facts) == ("scripted", 1, 6)
    assert not (fusion.lost or fusion.changed or fusion.added)


def test_what_a_model_loses_changes_and_adds_is_noticed():
    """It drops the turn to blue, takes left for right, and adds a star; the second answer repeats that."""

    def write(texts):
        return " ".join(texts).replace("The red circle turns blue.", "").replace("left", "right") + " A star appears."

    writer = ScriptedWriter(write)
    fusion = fuse(segments(), writer=writer, check=CHECK).fusion
    assert (fusion.num_requests, fusion.num_facts) == (2, 6)
    assert fusion.lost == ("the red circle turns blue",)
    assert fusion.changed == ("the red circle moves to the left",)
    assert fusion.added == ("A star appears",)
    faults = writer.requests[1].prompt
    assert faults.startswith("These facts of the captions are missing: the red circle turns blue.")
    assert "wrong or out of order: the red circle moves to the left." in faults and "A star appears." in faults
    assert faults.endswith(REPAIR.removeprefix("{faults} ")) and writer.requests[1].history[0][1] == write(TEXTS)


def test_an_event_that_is_told_too_early_is_noticed():
    fusion = fuse(segments(), writer=ScriptedWriter(lambda texts: " ".join(texts[::-1])), check=CHECK).fusion
    assert not fusion.lost and len(fusion.changed) >= 2


def test_a_model_is_asked_once_more_and_the_better_text_is_kept():
    def lossy(texts):
        return " ".join(texts[1:])

    better = fuse(segments(), writer=ScriptedWriter(lossy, repaired=" ".join), check=CHECK)
    assert better.text == " ".join(TEXTS) and better.fusion.num_requests == 2 and not better.fusion.lost
    worse = fuse(segments(), writer=ScriptedWriter(lossy, repaired=lambda texts: "Nothing."), check=CHECK)
    assert worse.text == " ".join(TEXTS[1:]) and worse.fusion.lost == ("a red circle appears", "a low tone is heard")


def make_texts(count):
    shapes, colours = ("circle", "square", "triangle", "star"), ("red", "green", "blue", "yellow")
    return [f"A {colours[n % 4]} {shapes[n // 4 % 4]} appears." for n in range(count)]


@pytest.mark.parametrize("count", [50, 400])
def test_cost_is_linear_and_context_bounded(count):
    """A model that keeps all facts: one request for each ten segments, and none grows beyond the limit."""
    writer = ScriptedWriter(" ".join)
    fused = fuse(segments(make_texts(count)), writer=writer, check=CHECK, max_chars=500)
    sizes = [sum(len(line) + 1 for line in one.prompt.splitlines() if line.startswith("[")) for one in writer.requests]
    assert max(sizes) <= 500
    assert sum(sizes) <= 1.5 * sum(len(text) + 18 for text in make_texts(count))
    assert fused.fusion.num_requests == len(writer.requests) and fused.text.count("appears") == count
    assert fused.fusion.num_facts == count and not fused.fusion.lost and not fused.fusion.added


def test_a_model_that_shortens_is_asked_level_by_level():
    """Of 100 segments, ten and more to a request: the answers are fused in turn, until one is left."""
    writer = ScriptedWriter(lambda texts: f"{len(texts)} parts.")
    fused = fuse(segments(make_texts(100)), writer=writer, max_chars=500)
    first_level = [one for one in writer.requests if "appears" in one.prompt]
    assert len(writer.requests) == len(first_level) + 1 and fused.text == f"{len(first_level)} parts."
    assert 7 <= len(first_level) <= 10


@pytest.mark.parametrize(
    ("writer", "message"),
    [
        (ScriptedWriter(lambda texts: Caption("", "A red", model="m", finished=False)), "cut off at the token limit"),
        (CaptionerWriter(SilentCaptioner(), template=CaptionRequest(Path()), reader=None), "empty text"),
    ],
)
def test_a_model_without_an_answer_is_an_error(writer, message):
    with pytest.raises(FusionError, match=message):
        fuse(segments(), writer=writer)


def test_captions_that_cannot_be_fused():
    with pytest.raises(FusionError, match="has no end time"):
        fuse([replace(one, end_seconds=None) for one in segments()])
    with pytest.raises(FusionError, match="cannot read"):
        fuse(segments(["A man in a grey coat walks his three small dogs along the river.", "A dog."]), check=CHECK)


def test_events_get_the_times_of_their_segment():
    (events, _, _, _) = CHECK.events_of(segments())
    assert events == (
        Event("a red circle appears", "visual", 0.0, 10.0), Event("a low tone is heard", "audio", 0.0, 10.0),
    )  # fmt: skip


def test_clock():
    assert [clock(seconds) for seconds in (0, 59.9, 61, 3723.5)] == ["0:00", "0:59", "1:01", "1:02:03"]
