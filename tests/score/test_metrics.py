"""Metrics against sums computed by hand, and against the worked example of docs/metrics.md."""

import re
from pathlib import Path

import pytest

from salmonn.records import Caption, Event, Mention, Question, Reference, Score
from salmonn.score.judge import match_references
from salmonn.score.metrics import Rates, audio_share, compute_rates, qa_accuracy, temporal_order_tau
from salmonn.synthetic.judge import RuleJudge

DOCS = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")


def mentioning(*spans: tuple[float, float] | None, modality="visual") -> Score:
    """Return a score that mentions events of these times, in this order."""
    events = [Event("it happens", modality, *(span or (None, None))) for span in spans]
    return Score("v", len(events), 0, 0, 0, mentions=tuple(Mention(event) for event in events))


def test_rates_are_micro_averages():
    scores = [
        Score("a", num_events=2, missing=1, incorrect=1, hallucinated=0, num_words=10, num_repeated_words=5),
        Score("b", num_events=6, missing=1, incorrect=0, hallucinated=1, num_words=20, finished=False),
        Score("b", num_events=2, missing=0, incorrect=0, hallucinated=1, num_words=15, sample=1),
    ]
    # a mean over captions would give missing (1/2 + 1/6 + 0) / 3
    assert compute_rates(scores, qa_accuracy=0.5) == Rates(
        missing=0.2,
        hallucination=pytest.approx(0.3),
        total=0.5,
        repetition=pytest.approx(5 / 45),
        qa_accuracy=0.5,
        clips=2,
        incorrect=0.1,
        hallucinated=0.2,
        words=15.0,
        cut_off=pytest.approx(1 / 3),
        audio_share=None,
        order=None,
        captions=3,
    )


def test_an_empty_caption_counts():
    empty = Score("a", num_events=4, missing=4, incorrect=0, hallucinated=0)
    assert compute_rates([empty]) == Rates(1.0, 0.0, 1.0, 0.0, None, 1, captions=1)


def test_no_scores():
    with pytest.raises(ValueError, match="at least one"):
        compute_rates([])


def test_rates_of_an_earlier_version_are_accepted():
    old = {"missing": 0.5, "hallucination": 0.25, "total": 0.75, "repetition": 0.0, "qa_accuracy": None, "clips": 2}
    assert Rates(**old) == Rates(0.5, 0.25, 0.75, 0.0, None, 2)


def test_audio_share_is_over_the_events_of_all_captions():
    # 1 sound and 1 spoken of 5 events; a mean over captions would give (0 + 2/2) / 2
    scores = [mentioning(None, None, None), mentioning(None, modality="audio"), mentioning(None, modality="speech")]
    assert audio_share(scores) == pytest.approx(2 / 5)
    assert audio_share([mentioning()]) is None


@pytest.mark.parametrize(
    ("captions", "tau"),
    [
        ([mentioning((0, 1), (1, 2), (2, 3))], 1.0),
        ([mentioning((2, 3), (1, 2), (0, 1))], -1.0),
        # of three pairs two are in order
        ([mentioning((0, 1), (2, 3), (1, 2))], 1 / 3),
        # the first two overlap and make no pair: 2 in order, and 1 discordant in the other caption
        ([mentioning((1, 3), (2, 4), (5, 6)), mentioning((5, 6), (2, 4))], 1 / 3),
        # pooled: 3 in order and 1 discordant; a mean over captions would give (1 - 1) / 2
        ([mentioning((0, 1), (1, 2), (2, 3)), mentioning((1, 2), (0, 1))], 0.5),
        # overlapping, starting together, without times, a single event
        (
            [
                mentioning((0, 2), (1, 3)),
                mentioning((0, 0), (0, 1)),
                mentioning(None, (0, 1)),
                mentioning((0, 1)),
                mentioning(),
            ],
            None,
        ),
    ],
)
def test_temporal_order_tau(captions, tau):
    assert temporal_order_tau(captions) == (None if tau is None else pytest.approx(tau))


def test_worked_example():
    """docs/metrics.md, "The worked example": judged by the rule judge, with all values as documented."""
    references = {
        "a.mp4": Reference(
            "a.mp4",
            (
                Event("a red circle appears", "visual", 0, 1),
                Event("a low tone is heard", "audio", 0.5, 2),
                Event("the red circle moves to the left", "visual", 1.5, 2.5),
                Event("a series of beeps is heard", "audio", 3, 4),
                Event("the red circle turns blue", "visual", 4.5, 5),
            ),
        ),
        "b.mp4": Reference(
            "b.mp4",
            (
                Event("a blue square appears", "visual", 0, 1),
                Event("white noise is heard", "audio", 1, 3),
                Event("the blue square blinks", "visual", 2, 3),
            ),
        ),
    }
    rows = dict(re.findall(r"^\| (\w+\.mp4) \| .* \| (.*) \|$", DOCS, re.MULTILINE))
    captions = [Caption(video, text, finished=video != "b.mp4") for video, text in rows.items()]
    rates = compute_rates(
        [
            score
            for score in RuleJudge().judge(match_references(references, captions, RuleJudge()))
            if isinstance(score, Score)
        ]
    )
    values = {
        "Missing": rates.missing,
        "Incorrect": rates.incorrect,
        "Hallucinated": rates.hallucinated,
        "Hallucination": rates.hallucination,
        "Total": rates.total,
        "Repetition": rates.repetition,
        "Cut off": rates.cut_off,
        "Audio share": rates.audio_share,
        "Order": rates.order,
    }
    assert values == pytest.approx(
        dict(zip(values, (2 / 8, 1 / 8, 1 / 8, 2 / 8, 4 / 8, 4 / 38, 1 / 2, 2 / 6, 3 / 5), strict=True))
    )
    assert rates.words == 19
    documented = {name: f"{100 * value:.1f} %" for name, value in values.items()}
    documented |= {"Order": f"{rates.order:.2f}", "Words": f"{rates.words:.1f}"}
    assert dict(re.findall(r"^\| ([A-Z][a-z ]+) \| [^|]+ \| ([\d.]+(?: %)?) \|$", DOCS, re.MULTILINE)) == documented


QUESTIONS = (Question("What colour is the circle?", "red", "colour"), Question("What is heard?", "a low tone", "sound"))
REFERENCES = {"v": Reference("v", questions=QUESTIONS), "w": Reference("w", questions=QUESTIONS[:1])}


def test_qa_accuracy():
    answers = [
        Caption("v", " Red.", QUESTIONS[0].question),
        Caption("v", "The low tone", QUESTIONS[1].question),
        Caption("w", "dark red", QUESTIONS[0].question),
    ]
    assert qa_accuracy(REFERENCES, answers) == pytest.approx(2 / 3)
    assert qa_accuracy(REFERENCES, answers[:1]) == pytest.approx(1 / 3)  # unanswered questions are wrong


def test_qa_accuracy_rejects_invalid_answers():
    with pytest.raises(ValueError, match="no questions"):
        qa_accuracy({"v": Reference("v")}, [])
    with pytest.raises(ValueError, match="not in the references"):
        qa_accuracy(REFERENCES, [Caption("w", "red", QUESTIONS[1].question)])
    with pytest.raises(ValueError, match="answered twice"):
        qa_accuracy(REFERENCES, [Caption("w", "red", QUESTIONS[0].question)] * 2)
