"""Records as HTML: the content, and that all text is escaped."""

import re
from dataclasses import replace

import pytest

from salmonn.preference.agreement import OrderedVotes
from salmonn.preference.feedback_report import summarize_feedback
from salmonn.preference.mixture import RaterGroup
from salmonn.records import Caption, Event, Mention, Reference, Score
from salmonn.webui.rendering import (
    render_analysis,
    render_candidate,
    render_caption,
    render_error,
    render_file_notice,
    render_placeholder,
    render_results,
    render_run,
    render_scored_caption,
)  # fmt: skip
from salmonn.webui.scorer import CaptionAnalysis
from tests.preference.feedback_examples import VOTE

HOSTILE = "<img src=x onerror=alert(1)>"
VISUAL, AUDIO = Event("a red circle appears", "visual", 1.0, 2.0), Event("a low tone", "audio", 3.0)
SPEECH = Event("come here", "speech")
SCORE = Score(
    "v", 3, 1, 1, 1, num_words=10, num_repeated_words=1, missed=("come here",), hallucinations=("a star " + HOSTILE,),
    mentions=(
        Mention(VISUAL, "A red circle appears"),
        Mention(AUDIO, "a high tone", is_correct=False, reason="it is low"),
    ),
)  # fmt: skip
ANALYSIS = CaptionAnalysis(
    Caption("v", f"A red circle appears, a high tone, a star {HOSTILE}"), (VISUAL, AUDIO, SPEECH), SCORE,
    Reference("v", (VISUAL, AUDIO, SPEECH)),
)  # fmt: skip


def visible_text(html: str) -> str:
    """Return the text without markup, as a browser would show it."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html)).strip()


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("choose an example", "Choose an example"),
        ("clip.mp4 is damaged", "clip.mp4 is damaged"),
        ("run/votes/feedback.jsonl, line 1: unknown field", "run/votes/feedback.jsonl, line 1: unknown field"),
        ("LLM judges need a model", "LLM judges need a model"),
        ("", ""),
    ],
)
def test_errors_are_sentences_and_names_stay_as_they_are(message, shown):
    assert visible_text(render_error(message)) == f"That did not work. {shown}".strip()


@pytest.mark.parametrize(
    "html",
    [
        render_caption(HOSTILE),
        render_caption(HOSTILE, is_growing=True),
        render_error(HOSTILE),
        render_placeholder(HOSTILE, HOSTILE),
        render_scored_caption(ANALYSIS),
        render_analysis(ANALYSIS, judge=HOSTILE),
        render_candidate("A", HOSTILE, model=HOSTILE),
        render_run(HOSTILE),
    ],
)
def test_text_is_escaped(html):
    assert "<img" not in html and "&lt;img" in html


def test_a_highlighted_caption():
    html = render_scored_caption(ANALYSIS)
    marks = re.findall(r'<mark class="([^"]*)"([^>]*)>(.*?)</mark>', html.split('class="legend"')[0])
    assert [(kinds, text) for kinds, _, text in marks][:2] == [
        ("correct", "A red circle appears"),
        ("incorrect", "a high tone"),
    ]
    assert 'data-seek="1.0"' in marks[0][1] and 'data-seek="3.0"' in marks[1][1]
    assert visible_text(html.split('class="legend"')[1]).split(">")[-1].split() == [
        "correct",
        "incorrect",
        "hallucinated",
        "repeated",
    ]


def test_an_analysis():
    text = visible_text(render_analysis(ANALYSIS, judge="rule"))
    # (1 + 1 + 1) / 3 events; one of ten words is repeated.
    assert "100.0 % Total" in text.replace("Total 100.0 %", "100.0 % Total") and "10.0 %" in text
    for expected in (
        "against 3 reference events, by the rule-based judge",
        "Missing said come here",
        "described as a high tone ; it is low",
        "Hallucinated a star",
    ):
        assert expected in text
    assert "Events found 3" in text


def test_an_analysis_without_a_score():
    text = visible_text(
        render_analysis(CaptionAnalysis(ANALYSIS.caption, (VISUAL,), notes=("No score: why.",)), judge="rule")
    )
    assert text.startswith("No score: why.") and "Events found 1" in text and "Total" not in text


def test_a_caption_that_was_cut_off():
    assert "cut off at the token limit" in render_caption("A", finished=False)
    assert "cut off at the token limit" not in render_caption("A", is_growing=True, finished=False)
    assert "cut off at the token limit" not in render_caption("A")


def test_a_notice_of_what_was_lost():
    assert render_file_notice(Caption("v", "A dog.")) == ""
    damaged = Caption("v", "A dog.", complete=False, warnings=("lost 0.1 s of audio at 2.0 s", HOSTILE))
    html = render_file_notice(damaged)
    assert visible_text(html).startswith(
        "The file is damaged or incomplete: the caption covers only what could be read. Lost 0.1 s of audio at 2.0 s"
    )
    assert "<img" not in html
    guessed = Caption("v", "A dog.", warnings=("timestamps are guessed",))
    assert visible_text(render_file_notice(guessed)) == "The file was read with assumptions. Timestamps are guessed"


def test_candidates_are_anonymous_before_the_vote():
    assert visible_text(render_candidate("A", "A dog.")) == "A A dog."
    revealed = visible_text(render_candidate("B", "A dog.", model="toy", score=SCORE, is_choice=True))
    assert "toy" in revealed and "your choice" in revealed and "Total" in revealed


def test_results(tmp_path):
    html = render_results(summarize_feedback([VOTE]), folder=tmp_path / "votes")
    assert "<code>votes</code>" in html and str(tmp_path) not in html
    text = visible_text(html)
    # One of one: Wilson's interval reaches from 1 / (1 + z^2) = 20.7 % to 100 %.
    assert "one (temperature 0.8) wins 0.0 %" in text and "0 of 1" in text
    assert "0.0 % to 79.3 %" in text and "0 to 1; 0 ties, 0 both bad" in text
    assert "preferred 0.0 %" in text  # RIGHT was chosen, whose Total is the higher one
    assert "Groups of raters" not in text
    groups = [RaterGroup("words +0.6", 0.7, 3, 8, 0.75), RaterGroup("words -0.9", 0.3, 1, 0, None)]
    text = visible_text(render_results(summarize_feedback([VOTE]), folder=tmp_path, groups=groups))
    assert "1: words +0.6 70.0 % 3 75.0 % of 8" in text and "2: words -0.9 30.0 % 1 \N{EN DASH}" in text
    assert "votes of group" not in text and "one group" not in text  # not measured, as by earlier versions


def test_agreement_of_rewards_and_groups(tmp_path):
    """A matrix; or a sentence for a single group."""
    rows = [(OrderedVotes(8, share, 0.2, 0.9), OrderedVotes(0, None, 0.0, 1.0)) for share in (0.75, 0.5)]
    first, second = (RaterGroup(name, 0.5, 2, 8, 0.7, row) for name, row in zip("xy", rows, strict=True))

    def shown(*groups):
        return visible_text(render_results(summarize_feedback([VOTE]), folder=tmp_path, groups=groups))

    text = shown(first, second)
    assert "reward votes of group 1 8 votes of group 2 0 1: x" in text
    assert "1: x 75.0 % 20.0 % to 90.0 % \N{EN DASH} 2: y 50.0 % 20.0 % to 90.0 % \N{EN DASH} Share of" in text
    text = shown(replace(first, ordered=rows[0][:1]))
    assert "The raters are one group, whose reward orders 75.0 % 20.0 % to 90.0 % of 8 held-out votes right" in text
    assert "votes of group" not in text
