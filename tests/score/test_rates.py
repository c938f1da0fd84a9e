"""Rates and repetition against sums made by hand."""

import pytest

from salmonn.records import Caption, Question, Reference, Score
from salmonn.score.rates import Rates, qa_accuracy, rates, repeated_words


def test_rates_are_micro_averages():
    scores = [
        Score("a", num_events=2, missing=1, incorrect=1, hallucinated=0, num_words=10, num_repeated_words=5),
        Score("b", num_events=8, missing=1, incorrect=0, hallucinated=2, num_words=30, num_repeated_words=0),
    ]
    # a mean over clips would give missing (1/2 + 1/8) / 2
    assert rates(scores, qa_accuracy=0.5) == Rates(
        missing=0.2, hallucination=0.3, total=0.5, repetition=0.125, qa_accuracy=0.5, clips=2
    )


def test_an_empty_caption_counts():
    empty = Score("a", num_events=4, missing=4, incorrect=0, hallucinated=0)
    assert rates([empty]) == Rates(1.0, 0.0, 1.0, 0.0, None, 1)


def test_no_scores():
    with pytest.raises(ValueError, match="at least one"):
        rates([])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", (0, 0)),
        ("A dog runs. A cat sleeps.", (0, 6)),
        ("It blinks. It blinks. It blinks.", (4, 6)),
        ("A dog runs. Then, the dog runs!", (4, 7)),
        ("A big dog runs, and a cat sleeps, and then a big dog runs.", (6, 14)),
        ("The big dog runs and the big dog barks and the big dog runs and the big dog barks", (10, 19)),
        # the worked example of the docstring
        ("A red star blinks. It moves up, and then the red star blinks. A red st", (9, 16)),
        # "it" and left-out subjects are another's doing here
        ("A red circle appears and it blinks. A blue star appears and it blinks.", (0, 14)),
        ("A red circle appears, then moves to the left. A blue star appears, then moves to the left.", (0, 18)),
        ("A red circle appears, and it blinks, and it blinks.", (3, 10)),
        # good prose names things again
        ("A man and a woman stand. A man and a woman sit.", (0, 12)),
        ("A red circle, a star and a cross appear. Then a red circle, a star and a cross vanish.", (0, 19)),
        # loops within a clause, said three times or more
        ("the red cat the red cat the red cat", (6, 9)),
        ("It is a very very good day.", (0, 7)),
        ("beep, beep, beep", (2, 3)),
        # a tail is only taken for cut off where the text has no end
        ("The red star moves up. A dog barks. The red star mov", (4, 12)),
        ("The red star moves up. A dog barks. The red star moves.", (0, 12)),
        ("The red star moves up. A dog barks. The r", (0, 10)),
    ],
)
def test_repeated_words(text, expected):
    assert repeated_words(text) == expected


QUESTIONS = (Question("What colour is the circle?", "red", "colour"), Question("What is heard?", "a low tone", "sound"))
REFERENCES = {"v": Reference("v", questions=QUESTIONS), "w": Reference("w", questions=QUESTIONS[:1])}


def test_qa_accuracy():
    answers = [
        Caption("v", " Red.", QUESTIONS[0].question),
        Caption("v", "The low tone", QUESTIONS[1].question),
        Caption("w", "dark red", QUESTIONS[0].question),
    ]
    assert qa_accuracy(REFERENCES, answers) == pytest.approx(2 / 3)
    assert qa_accuracy(REFERENCES, answers[:1]) == pytest.approx(1 / 3)  # what is not answered is wrong


def test_qa_accuracy_refuses():
    with pytest.raises(ValueError, match="no questions"):
        qa_accuracy({"v": Reference("v")}, [])
    with pytest.raises(ValueError, match="not in the references"):
        qa_accuracy(REFERENCES, [Caption("w", "red", QUESTIONS[1].question)])
    with pytest.raises(ValueError, match="answered twice"):
        qa_accuracy(REFERENCES, [Caption("w", "red", QUESTIONS[0].question)] * 2)
