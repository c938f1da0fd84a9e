"""Rates and repetition against sums made by hand."""

import pytest

from salmonn.records import Caption, Question, Reference, Score
from salmonn.score.rates import Rates, qa_accuracy, rates


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
