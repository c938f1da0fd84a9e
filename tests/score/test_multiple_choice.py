"""Choices of responses, labelled by hand, and accuracy over files of each format."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from salmonn.score.multiple_choice import MultipleChoiceQuestion, parse_choice, read_questions, score_questions
from salmonn.score.stats import Interval

FRUIT = ("Apples.", "Candles.", "Berries.", "The three kinds are of the same number.")
AMBIGUOUS = ("A dog runs.", "A man walks.", "Vitamin A", "Plan B")
DOCS = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        # a letter, bare or marked
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("**B**", "B"),
        ("B.", "B"),
        ("B. Candles.", "B"),
        ("B Candles", "B"),
        ("b) candles", "B"),
        ("C.Berries", "C"),
        ("A\nThe apples hang.", "A"),
        ("A - apples", "A"),
        # stated
        ("The best answer is: B", "B"),
        ("The answer is option B, since A and C are wrong.", "B"),
        ("the answer is b.", "B"),
        ("Answer: B. Because A is wrong", "B"),
        ("**Answer:** C", "C"),
        ("<answer>A</answer>", "A"),
        ("The correct option is (C) because A and B are wrong.", "C"),
        ("The answer could be A or C. It shows berries, so the answer is C.", "C"),
        ("I choose D", "D"),
        # all options repeated, then one chosen, or none
        ("A. Apples.\nB. Candles.\nC. Berries.\nAnswer: B", "B"),
        ("A or B? The answer is B.", "B"),
        ("A. Apples. B. Candles. C. Berries.", None),
        # mentioned anywhere
        ("I think B", "B"),
        ("It's C", "C"),
        ("Berries (C)", "C"),
        ("Yes, A is right", "A"),
        (r"\boxed{B}", "B"),
        # the text
        ("candles", "B"),
        ("The answer is berries. They hang.", "C"),
        ("the three kinds are of the same number", "D"),
        ("A Apples.", "A"),
        # several
        ("A or B", None),
        ("(A) or (B)", None),
        ("A/B", None),
        ("Answer: A or B", None),
        ("The answer is: A, B, or C", None),
        ("A and C are both right", None),
        ("B. Candles. So the answer is C.", None),
        # none
        ("", None),
        ("E", None),
        ("I", None),
        ("A man walks", None),
        ("The answer is A man", None),
        ("it is a", None),
        ("Not A", None),
        ("A-frame", None),
        ("A's colour", None),
        ("D.C. is shown", None),
        ("apples or candles", None),
    ],
)
def test_choice(response, letter):
    assert parse_choice(response, FRUIT) == letter


@pytest.mark.parametrize(
    ("response", "options", "letter"),
    [
        # an option that looks like letters
        ("A man walks", AMBIGUOUS, "B"),
        ("Answer: A man walks", AMBIGUOUS, "B"),
        ("C. Vitamin A.", AMBIGUOUS, "C"),
        ("Vitamin A", AMBIGUOUS, "C"),
        ("Plan B", AMBIGUOUS, "D"),
        ("A 4", ("4.", "9."), "A"),
        # a single letter is a letter, even if it is an option's text
        ("B", ("B", "A"), "B"),
        # two equal options
        ("red", ("Red", "red."), None),
        # as many letters as options; A to H if they are unknown
        ("E", (*FRUIT, "None"), "E"),
        ("H", (), "H"),
        ("I", (), None),
    ],
)
def test_choice_by_options(response, options, letter):
    assert parse_choice(response, options) == letter


@given(st.text(st.sampled_from("ABIab .,:()\norandswer")))
def test_choice_is_an_option_or_none(response):
    assert parse_choice(response, FRUIT) in {None, "A", "B", "C", "D"}


# docs/metrics.md, "The worked example": its four questions
EXAMPLE = [
    MultipleChoiceQuestion("?", FRUIT[:3], "B", "The best answer is: B", "a", {"duration": "short"}),
    MultipleChoiceQuestion("?", FRUIT[:3], "C", "berries", "a", {"duration": "short"}),
    MultipleChoiceQuestion("?", FRUIT[:3], "A", "A man lights them.", "b", {"duration": "short", "domain": "Life"}),
    MultipleChoiceQuestion("?", FRUIT[:3], "A", None, "b"),
]


def test_worked_example():
    result = score_questions(EXAMPLE)
    assert (result.accuracy, result.num_questions, result.unanswered, result.unreadable) == (0.5, 4, 1, 1)
    # the sampled videos are aa, ab, ba or bb: 4/4, 2/4 or 0/4
    assert result.interval == Interval(0.0, 1.0)
    assert result.by_group == {"duration": {"short": (pytest.approx(2 / 3), 3)}, "domain": {"Life": (0.0, 1)}}
    documented = re.findall(r"^\| ([ab]) \| ([A-D]) \| (.*?) ?\| .+ \|$", DOCS, re.MULTILINE)
    assert documented == [(choice.video, choice.answer, choice.response or "") for choice in EXAMPLE]


def test_questions_of_a_video_are_sampled_together_and_of_unknown_ones_separately():
    choices = [
        MultipleChoiceQuestion("?", FRUIT, "B", "AB"[number % 2], video="vw"[number % 2]) for number in range(100)
    ]
    assert score_questions(choices).interval == Interval(0.0, 1.0)
    # 50 of 100 right: the interval of a coin, 0.5 +- 1.96 * sqrt(0.25 / 100)
    interval = score_questions([replace(choice, video=None) for choice in choices]).interval
    assert (interval.low, interval.high) == pytest.approx((0.402, 0.598), abs=0.015)


def test_no_questions():
    with pytest.raises(ValueError, match="at least one"):
        score_questions([])


VIDEO = {
    "video_id": "001",
    "duration": "short",
    "domain": "Knowledge",
    "sub_category": "Humanity & History",
    "questions": [
        {
            "question_id": "001-1",
            "task_type": "Counting Problem",
            "question": "Which?",
            "options": ["A. Apples.", "B. Candles."],
            "answer": "B",
            "response": "B. Candles.",
        },
        {"question": "Who?", "options": ["A. I.", "B. You."], "answer": "A", "response": " ", "domain": "Film"},
    ],
}


def test_reads_video_mme(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps([VIDEO]))
    groups = {"duration": "short", "domain": "Knowledge", "sub_category": "Humanity & History"}
    assert read_questions(tmp_path / "r.json") == [
        MultipleChoiceQuestion(
            "Which?",
            ("Apples.", "Candles."),
            "B",
            "B. Candles.",
            "001",
            groups | {"task_type": "Counting Problem"},
        ),
        MultipleChoiceQuestion("Who?", ("I.", "You."), "A", None, "001", groups | {"domain": "Film"}),
    ]


def test_reads_flat_lists(tmp_path):
    items = [
        {"question": "Which?", "options": ["Apples", "A. B."], "answer": "(b)", "response": None, "video": "v.mp4"},
        {"question": "Which?", "options": ["Apples", "Pears"], "answer": "pears", "task_type": "x", "duration": 12.5},
    ]
    expected = [
        MultipleChoiceQuestion("Which?", ("Apples", "A. B."), "B", None, "v.mp4"),
        # seconds are not a group
        MultipleChoiceQuestion("Which?", ("Apples", "Pears"), "B", None, None, {"task_type": "x"}),
    ]
    (tmp_path / "r.json").write_text(json.dumps(items))
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(item) + "\n\n" for item in items))
    assert read_questions(tmp_path / "r.json") == read_questions(tmp_path / "r.jsonl") == expected


def test_reads_output_of_the_published_code(tmp_path):
    prompt = "<video>\nWhich?\nA. Apples.\nB. Candles.\nAnswer with a letter."
    items = [
        {"video": "a.mp4", "image": None, "prompt": {"from": "human", "value": prompt}, "ref": "B", "pred": "Candles"},
        {"id": ["b.mp4"], "prompt": "Which?", "ref": "C<|im_end|>", "pred": "C<|im_end|>"},
    ]
    (tmp_path / "r.json").write_text(json.dumps(items))
    first, second = read_questions(tmp_path / "r.json")
    assert first == MultipleChoiceQuestion(prompt, ("Apples.", "Candles."), "B", "Candles", "a.mp4")
    assert second == MultipleChoiceQuestion("Which?", (), "C", "C", "b.mp4")
    assert score_questions([first, second]).accuracy == 1.0


GOOD = VIDEO["questions"][0]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("r.json", "{", "r.json: Expecting"),
        ("r.json", "{}", "JSON list of objects; JSON lines"),
        ("r.json", "[1]", "r.json, item 1: expected a JSON object, got int"),
        ("r.jsonl", json.dumps(GOOD) + "\n{", "r.jsonl, line 2: Expecting"),
        ("r.json", json.dumps([GOOD, GOOD | {"answer": "C"}]), "item 2: the correct answer 'C' is not"),
        ("r.json", json.dumps([GOOD | {"answer": 1}]), "item 1: the correct answer 1 is not"),
        ("r.json", json.dumps([GOOD | {"options": []}]), "item 1: expected .*got the keys question_id, task_type"),
        ("r.json", json.dumps([GOOD | {"options": "AB"}]), "item 1: expected"),
        ("r.json", json.dumps([GOOD | {"response": ["A", "B"]}]), "item 1: the response must be one text, got list"),
        ("r.json", json.dumps([VIDEO, VIDEO | {"questions": [GOOD, {}]}]), "item 2, question 2: expected"),
        ("r.json", json.dumps([VIDEO | {"questions": [1]}]), "item 1: questions must be a list of objects"),
    ],
)
def test_reports_errors_in_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_questions(tmp_path / name)


def test_reports_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="multiple-choice"):
        read_questions(tmp_path / "r.json")
