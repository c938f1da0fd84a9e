"""Answers that follow a JSON schema, from a model of random weights, which would otherwise write anything."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from salmonn.caption.constraint import Constraints, JsonGrammars
from salmonn.caption.generator import CaptionRequest, Sampling
from tests.completions import complete

SCHEMA = {
    "type": "object",
    "properties": {
        "sound": {"type": "boolean"},
        "colours": {"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 1, "maxItems": 3},
        "count": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["sound", "colours", "count"],
    "additionalProperties": False,
}
TYPED = Sampling(temperature=10.0, top_p=1.0, max_new_tokens=100, json_schema=json.dumps(SCHEMA))


def check(text: str) -> None:
    value = json.loads(text)
    assert list(value) == ["sound", "colours", "count"] and isinstance(value["sound"], bool)
    assert 1 <= len(value["colours"]) <= 3 and set(value["colours"]) <= {"red", "green"}
    assert value["count"] in range(10)


def test_only_tokens_that_can_follow_are_allowed(captioner):
    """By hand, with a schema of two values; a row that has ended is not masked."""
    tokenizer = captioner.processor.tokenizer
    grammars = JsonGrammars(tokenizer, end_id=tokenizer.eos_token_id)
    matchers = [grammars.matcher('{"enum": [true, 12]}') for _ in range(3)]
    constraints, logits = Constraints(matchers), torch.zeros(3, len(tokenizer) + 7)
    masked = constraints.mask(logits, [True, True, False])
    texts = {tokenizer.decode([token]) for token in (masked[0] == 0).nonzero().flatten().tolist()}
    assert {"1", "t"} <= texts <= {"1", "12", "t", "tr", "tru", "true"}
    assert torch.equal(masked[2], logits[2]) and masked[0, -7:].isneginf().all()
    (one,), (letter,) = tokenizer.encode("1"), tokenizer.encode("t")
    constraints.advance([one, letter, 0], [True, True, False])
    assert constraints.mask(logits, [True, True, False])[0, tokenizer.encode("2")[0]] == 0
    constraints.evict([True, False, False])
    constraints.advance(tokenizer.encode("2"), [True])
    assert (constraints.mask(logits[:1], [True]) == 0).nonzero().tolist() == [[0, tokenizer.eos_token_id]]


@pytest.mark.parametrize("sampling", [TYPED, replace(TYPED, temperature=0.0, repetition_penalty=1.3)])
def test_answers_follow_their_schema(captioner, media, sampling):
    """Four different samples, each with a grammar of its own, as rows end at different steps."""
    answers = complete(captioner, media[:2], ["Tell.", "List the events."], sampling=sampling, num_samples=2)
    for answer in answers:
        check(answer.text)
        assert answer.finished
    if sampling.temperature:
        assert len({answer.text for answer in answers}) > 2
    alone = complete(captioner, media[1:2], ["List the events."], sampling=sampling, num_samples=1, seeds=[1])
    assert alone[0] == answers[2]


def test_rows_with_and_without_a_schema_share_a_batch(captioner, media):
    generator = captioner.streaming_generator()
    free = replace(TYPED, json_schema=None)
    generator.add(media[:1], ["Tell."], sampling=free, seeds=[3])
    generator.add(media[:2], ["Tell.", "Tell."], sampling=TYPED, seeds=[4, 5])
    generator.add(media[:1], ["Tell."], sampling=replace(TYPED, json_schema='{"type": "object"}'), seeds=[6])
    texts = {}
    while generator:
        texts |= {row: delta.completion.text for row, delta in generator.step().items() if delta.completion}
    check(texts[1])
    check(texts[2])
    assert texts[0] == complete(captioner, media[:1], ["Tell."], sampling=free, seeds=[3])[0].text


def test_an_answer_that_is_cut_off_is_unfinished(captioner, media):
    (answer,) = complete(captioner, media[:1], ["Tell."], sampling=replace(TYPED, max_new_tokens=3))
    assert not answer.finished


def test_log_probabilities_are_those_of_the_model(captioner, videos):
    """The schema leaves one answer, whose probability for the model is far below 1."""
    sampling = replace(TYPED, json_schema='{"enum": ["a"]}', logprobs=0)
    caption = captioner.caption(videos[0], sampling=sampling)
    assert caption.text == '"a"' and caption.logprob < -2


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ('{"type": "strange"}', "Invalid type: strange"),
        ('{"not": {"type": "string"}}', 'Unimplemented keys: \\["not"\\]'),
        ('{"$ref": "https://example.org/a"}', "not fetch resources"),
        ('{"type": "string", "pattern": "("}', "regex"),
        ("no JSON", "expected ident"),
    ],
)
def test_schemas_that_cannot_be_used(captioner, videos, schema, message):
    with pytest.raises(ValueError, match=f"the JSON schema cannot be used: .*{message}"):
        captioner.generate([CaptionRequest(videos[0], sampling=replace(TYPED, json_schema=schema))])


def test_a_missing_package_is_named(captioner, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match=r"answers in JSON need llguidance: pip install 'salmonn\[json\]'"):
        JsonGrammars(captioner.processor.tokenizer, end_id=0)
