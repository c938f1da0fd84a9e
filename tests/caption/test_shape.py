"""The shape of captions, with answers that a script gives: asking again, cutting, templates, words, stages, names."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from salmonn.caption.generator import CaptionRequest
from salmonn.caption.length import WordRange
from salmonn.caption.shape import CaptionShape, Shape, generate_shaped, shape_captions
from salmonn.caption.text_model import text_model_config
from salmonn.records import Caption, Failure, Shaping
from tests.score.fake_llm_server import Answer

CLIP = Path("clips/harbour.mp4")
THREE, FIVE, NINE = "One two three.", "One two three. Four five.", "One two three. Four five. Six seven eight nine."


class Script:
    """A generator that gives one answer after another; `requests` are those that it got."""

    name = "script"

    def __init__(self, *answers: str | tuple[str, bool]) -> None:
        self.answers = list(answers)
        self.requests: list[CaptionRequest] = []

    def generate(self, requests):
        self.requests += requests
        return [[self.answer(request)] for request in requests]

    def answer(self, request: CaptionRequest) -> Caption:
        given = self.answers.pop(0)
        text, finished = given if isinstance(given, tuple) else (given, True)
        return Caption(str(request.path), text, request.prompt, "script", finished=finished, modality="both")


def shaped(script: Script, shape: CaptionShape | Shape, *, prompt: str = "Describe the clip.") -> Caption:
    """The caption of one clip."""
    shape = Shape({"caption": shape}) if isinstance(shape, CaptionShape) else shape
    (caption,) = generate_shaped(script, [CaptionRequest(CLIP, prompt, seed=3)], shape)
    assert not script.answers, "the script has answers left"
    assert isinstance(caption, Caption), caption
    return caption


def test_what_is_asked():
    """The prompt, with sentences on all that is requested."""
    shape = CaptionShape(words=WordRange(2, 9), include=("two",), avoid=("red hair", "Anna"), language="de")
    script = Script(THREE)
    caption = shaped(script, shape)
    asked = (
        "Describe the clip.\nAnswer in German. Write 2 to 9 words. Use these words: two. "
        "Do not use these words: red hair, Anna."
    )
    assert script.requests == [CaptionRequest(CLIP, asked, seed=3)]
    assert (caption.text, caption.prompt, caption.video) == (THREE, asked, str(CLIP))
    assert caption.shaping == {"caption": Shaping("ok", language="de")} and caption.captions == {}


@pytest.mark.parametrize(
    ("answers", "text", "expected"),
    [
        ((FIVE,), FIVE, Shaping("ok")),
        ((NINE, FIVE), FIVE, Shaping("asked_again", num_answers=2)),
        (("One.", NINE, FIVE), FIVE, Shaping("asked_again", num_answers=3)),
        ((NINE, NINE, NINE), FIVE, Shaping("cut", num_answers=3)),
        # The cut text of the first answer would be too short, that of the second is not.
        (("One two three four five six seven eight.", NINE, "One."), FIVE, Shaping("cut", num_answers=3)),
        (("One.", "One two.", "One."), "One two.", Shaping("too_short", num_answers=3)),
        # One sentence only: it is not cut.
        (("A b c d e f g h.",) * 3, "A b c d e f g h.", Shaping("too_long", num_answers=3)),
        # Cut, it would have 2 words too few; as it is, 1 too many.
        (
            ("A. B c d e f.", "A b c d e f g h.", "A b c d e f g h."),
            "A. B c d e f.",
            Shaping("too_long", num_answers=3),
        ),
        # Cut off at the token limit: the whole sentences are enough.
        (((FIVE + " Six se", False),), FIVE, Shaping("cut")),
        ((("One two three fo", False), FIVE), FIVE, Shaping("asked_again", num_answers=2)),
        ((("One two three fo", False),) * 3, "One two three fo", Shaping("too_long", num_answers=3)),
    ],
)
def test_lengths(answers, text, expected):
    """From 3 to 5 words."""
    caption = shaped(Script(*answers), CaptionShape(words=WordRange(3, 5)))
    assert (caption.text, caption.shaping["caption"]) == (text, expected)


def test_asking_again_continues_the_conversation():
    script = Script(NINE, ("One t", False), FIVE)
    shaped(script, CaptionShape(words=WordRange(3, 5), include=("five", "tide"), avoid=("nine",)))
    first, second, third = script.requests
    again = (
        "Your text has 9 words; it must have 3 to 5. It must contain: tide. "
        "Write it again, and reply with the text alone."
    )
    assert second == replace(first, prompt=again, history=((first.prompt, NINE),))
    # Words are asked for once more only, the length twice.
    again = "Your text has 2 words and breaks off; it must have 3 to 5. Write it again, and reply with the text alone."
    assert third == replace(second, prompt=again, history=(*second.history, (second.prompt, "One t")))


@pytest.mark.parametrize(
    ("answers", "text", "missing", "unwanted"),
    [
        (("A tall ship.",), "A tall ship.", (), ()),
        (("A boat.", "A TALL ship!"), "A TALL ship!", (), ()),
        (("A ship.", "A boat."), "A ship.", ("tall ship",), ()),
        # The one with fewer wrong words; the first of two that are equally wrong.
        (("A captain's boat.", "A boat."), "A boat.", ("tall ship",), ()),
        (
            ("The captain.", "A tall ship, its captain, a harbour."),
            "A tall ship, its captain, a harbour.",
            (),
            ("captain",),
        ),
        (("A shipment, taller.", "Nothing."), "A shipment, taller.", ("tall ship",), ()),
    ],
)
def test_words_to_include_and_to_avoid(answers, text, missing, unwanted):
    """They are whole words, in upper or lower case."""
    caption = shaped(Script(*answers), CaptionShape(include=("tall ship",), avoid=("captain",)))
    expected = Shaping(None, missing, unwanted, num_answers=len(answers))
    assert (caption.text, caption.shaping["caption"]) == (text, expected)
    assert expected.is_met == (not missing and not unwanted)


def test_cutting_may_cost_a_word_to_include():
    caption = shaped(Script(NINE, NINE, NINE), CaptionShape(words=WordRange(3, 5), include=("nine",)))
    assert caption.text == FIVE
    assert caption.shaping["caption"] == Shaping("cut", ("nine",), num_answers=3)


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        (CaptionShape(trigger="ohwx"), "ohwx, A ship."),
        (
            CaptionShape(trigger="ohwx", template="{caption} ({trigger}, {folder}/{name})"),
            "A ship. (ohwx, clips/harbour)",
        ),
        (CaptionShape(trigger="ohwx", prefix="{trigger} man. ", suffix=" 4K"), "ohwx man. A ship. 4K"),
        (CaptionShape(prefix="{{name}} {", suffix="}"), "{name} {A ship.}"),
        (CaptionShape(template='{"text": "{caption}"}'), '{"text": "A ship."}'),
    ],
)
def test_templates(shape, text):
    assert shaped(Script("A ship."), shape).text == text


def test_braces_in_an_answer_are_no_fields():
    assert shaped(Script("A {trigger} and {unknown}."), CaptionShape(trigger="ohwx")).text == (
        "ohwx, A {trigger} and {unknown}."
    )


def test_fields_in_prompts(tmp_path, clips, videos):
    """Each clip has its own values; clip.mp4.txt comes before clip.txt."""
    for name, text in (("a.txt", " A tug. \n"), ("b.txt", "not this"), ("b.mp4.txt", "\ufeffA {name}.")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).symlink_to(videos[0])
    script = Script("1.", "2.")
    shape = CaptionShape(prompt="{name} in {folder} lasts {duration} s. Notes: {sidecar}")
    requests = [CaptionRequest(tmp_path / name, "unused") for name in ("a.mp4", "b.mp4")]
    captions = generate_shaped(script, requests, Shape({"caption": shape}))
    assert clips.references[0].duration_seconds == 7.6
    assert [request.prompt for request in script.requests] == [
        f"a in {tmp_path.name} lasts 7.6 s. Notes: A tug.",
        f"b in {tmp_path.name} lasts 7.6 s. Notes: A {{name}}.",
    ]
    assert [caption.text for caption in captions] == ["1.", "2."]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, r"needs c.txt next to the clip, and there is none"),
        (b" \n", "is empty"),
        (b"\xff\xfe", "is not UTF-8 text"),
    ],
)
def test_a_clip_without_a_usable_sidecar_fails_alone(tmp_path, content, reason):
    (tmp_path / "good.txt").write_text("fine")
    if content is not None:
        (tmp_path / "c.txt").write_bytes(content)
    requests = [CaptionRequest(tmp_path / name) for name in ("c.mp4", "good.mp4")]
    script = Script("A ship.")
    bad, good = generate_shaped(script, requests, Shape({"caption": CaptionShape(prompt="See {sidecar}")}))
    assert isinstance(bad, Failure) and reason in bad.reason and bad.video.endswith("c.mp4")
    assert good.text == "A ship." and [one.prompt for one in script.requests] == ["See fine"]


def test_a_second_stage_refines_the_first():
    """Length and words are asked for and checked in the second stage."""
    script = Script("Draft.", NINE, FIVE)
    shape = CaptionShape(refine="Improve: {caption}", words=WordRange(3, 5), language="fr", trigger="ohwx")
    caption = shaped(script, shape)
    assert [request.prompt for request in script.requests[:2]] == [
        "Describe the clip.\nAnswer in French.",
        "Improve: Draft.\nAnswer in French. Write 3 to 5 words.",
    ]
    assert [len(request.history) for request in script.requests] == [0, 0, 1]
    assert caption.text == f"ohwx, {FIVE}" and caption.prompt == "Describe the clip.\nAnswer in French."
    assert caption.shaping["caption"] == Shaping("asked_again", num_answers=2, language="fr", draft="Draft.", bare=FIVE)


def test_a_text_model_refines(serve, monkeypatch, tmp_path):
    """It gets the text alone, and its earlier answers when it is asked again."""
    monkeypatch.setenv("HOME", str(tmp_path))
    server = serve(lambda request, number: Answer((NINE, FIVE)[number]))
    script = Script("Draft.")
    shape = CaptionShape(refine="Improve: {caption}", words=WordRange(3, 5), by_text_model=True)
    caption = shaped(script, Shape({"caption": shape}, text_model=text_model_config(url=server.url, model="m")))
    assert (caption.text, caption.model, caption.modality) == (FIVE, "script", "both")
    assert caption.shaping["caption"] == Shaping("asked_again", num_answers=2, draft="Draft.")
    first, second = server.requests
    assert first["messages"] == [{"role": "user", "content": "Improve: Draft.\nWrite 3 to 5 words."}]
    assert second["messages"][:2] == [*first["messages"], {"role": "assistant", "content": NINE}]
    assert "response_format" not in first and first["model"] == "m" and not shape.may_ask_again


def test_a_text_model_that_refuses_a_text_or_is_gone(serve, monkeypatch, tmp_path):
    """The first concerns that clip alone, the second ends the run."""
    monkeypatch.setenv("HOME", str(tmp_path))

    def script(request, number):
        text = request["messages"][0]["content"]
        return Answer("too long", status=400) if "Bad" in text else Answer("" if "Mute" in text else "Good.")

    server = serve(script)
    shape = CaptionShape(refine="{caption}", by_text_model=True)
    config = text_model_config(url=server.url, model="m")
    requests = [CaptionRequest(Path(f"{name}.mp4"), "?") for name in "abc"]
    results = generate_shaped(Script("Bad", "Fine", "Mute"), requests, Shape({"caption": shape}, text_model=config))
    assert [isinstance(result, Failure) for result in results] == [True, False, True]
    assert "the server rejects the request: " in results[0].reason and "the reply has no text" in results[2].reason
    assert results[1].text == "Good."
    server.close()
    gone = text_model_config(url="http://127.0.0.1:9/v1", model="gone")
    monkeypatch.setattr("salmonn.score.chat_client._FIRST_CONTACT_SECONDS", 0.0)
    with pytest.raises(ValueError, match=r"gone at http://127.0.0.1:9/v1 is unavailable.*is the server running"):
        generate_shaped(Script("Fine"), requests[:1], Shape({"caption": shape}, text_model=gone))


@pytest.mark.parametrize(
    ("message", "finish_reason", "reason"),
    [
        (
            {"content": None, "refusal": "I can't help."},
            "stop",
            r"m at http.*the reply has no text \(refusal: .\(refusal\) I can't help",
        ),
        ({"content": None}, "content_filter", r"no text \(content filter: .\(the server"),
        (
            {"content": None, "reasoning": "The user"},
            "length",
            r"no text \(token limit reached, reasoning: 'The user'\)",
        ),
    ],
)
def test_a_reply_without_text_is_no_caption(serve, monkeypatch, tmp_path, message, finish_reason, reason):
    """The clip fails; the reply is not kept, so that a retry may succeed."""
    monkeypatch.setenv("HOME", str(tmp_path))
    refused = {"choices": [{"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish_reason}]}
    answers = (Answer(body=json.dumps(refused).encode()), Answer("Good."))
    server = serve(lambda request, number: answers[number])
    shape = Shape(
        {"caption": CaptionShape(refine="{caption}", by_text_model=True)},
        text_model=text_model_config(url=server.url, model="m"),
    )
    failed, good = (generate_shaped(Script("Draft."), [CaptionRequest(Path("a.mp4"), "?")], shape)[0] for _ in range(2))
    assert isinstance(failed, Failure) and re.search(reason, failed.reason)
    assert good.text == "Good." and len(server.requests) == 2


def test_named_captions():
    """Those of all clips are asked for together, and again together; the first is the text."""
    shape = Shape(
        {
            "short": CaptionShape(prompt="Briefly.", words=WordRange(1, 3)),
            "long": CaptionShape(prompt="At length.", words=WordRange(9, 9), trigger="ohwx"),
        },
        is_named=True,
    )
    rounds = []
    answers = iter([THREE, FIVE, NINE, NINE, NINE, THREE])

    def answer(asked):
        rounds.append([(index, request.prompt.split("\n")[0]) for index, request in asked])
        return [Caption(str(request.path), next(answers), request.prompt) for _, request in asked]

    clips = [(CaptionRequest(Path(f"{name}.mp4"), "unused"), 1.0) for name in "ab"]
    first, second = shape_captions(shape, clips, answer=answer)
    assert rounds[0] == [(0, "Briefly."), (0, "At length."), (1, "Briefly."), (1, "At length.")]
    assert [index for index, _ in rounds[1]] == [0, 1] and len(rounds) == 2
    assert first.captions == {"short": THREE, "long": f"ohwx, {NINE}"} and first.text == THREE
    assert first.shaping == {"short": Shaping("ok"), "long": Shaping("asked_again", num_answers=2, bare=NINE)}
    assert second.captions == {"short": THREE, "long": f"ohwx, {NINE}"} and second.video == "b.mp4"
    assert first.prompt == "Briefly.\nWrite 1 to 3 words."


def test_a_clip_of_which_one_caption_fails_has_none():
    """So it is captioned again as a whole; its other questions are not asked any further."""
    shape = Shape(
        {"a": CaptionShape(prompt="a?"), "b": CaptionShape(prompt="b?", words=WordRange(3, 3))}, is_named=True
    )
    asked_about = []

    def answer(asked):
        asked_about.extend(index for index, _ in asked)
        fails = lambda index, request: index == 0 and request.prompt == "a?"  # noqa: E731
        return ["no memory" if fails(index, request) else Caption("v", NINE) for index, request in asked]

    clips = [(CaptionRequest(Path(f"{name}.mp4")), 1.0) for name in "ab"]
    failed, captioned = shape_captions(shape, clips, answer=answer)
    assert failed == "no memory" and captioned.shaping["b"].length == "cut"
    assert asked_about == [0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": " "}, "template is empty"),
        ({"template": "{trigger}", "trigger": "x"}, "template lacks {caption}"),
        ({"template": "{caption} {nme}"}, "template has the unknown field {nme}; the fields are {trigger}, {caption}"),
        ({"prefix": "{caption}: "}, "prefix has the unknown field {caption}"),
        ({"prompt": "  "}, "the prompt is empty"),
        ({"prompt": "What is {caption}?"}, "the prompt has the unknown field {caption}"),
        ({"refine": "Improve it."}, "refine lacks {caption}"),
        ({"template": "{trigger} {caption}"}, "the template uses {trigger}, but no trigger is given"),
        ({"template": "{caption}", "trigger": "x"}, "the trigger 'x' is used nowhere"),
        ({"include": ("",)}, "include has '', which contains no word"),
        ({"include": ("a red car",), "avoid": ("Red",)}, "'a red car' is to be included and 'Red' to be avoided"),
        ({"include": ("a b c", "d"), "words": WordRange(1, 3)}, "the words to include are 4, and the caption may"),
        ({"language": "xx"}, "language 'xx' is not a known code; use one of ar, bn"),
    ],
)  # fmt: skip
def test_shapes_that_make_no_sense(settings, message):
    with pytest.raises(ValueError) as caught:
        CaptionShape(**settings)
    assert message in str(caught.value)


def test_languages_by_name():
    script = Script("A.")
    shaped(script, CaptionShape(language="Swiss German"))
    assert script.requests[0].prompt.endswith("Answer in Swiss German.")
