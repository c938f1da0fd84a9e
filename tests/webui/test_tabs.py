"""Event handlers of the tabs, without a browser: values that a form would not send."""

import math
from types import SimpleNamespace

import gradio as gr
import pytest

from salmonn.caption.generator import CaptionRequest, Sampling
from salmonn.caption.loader import MediaInfo
from salmonn.preference.votes import VoteStore
from salmonn.records import Caption
from salmonn.synthetic.judge import RuleJudge
from salmonn.webui.caption_tab import CaptionTab
from salmonn.webui.compare_tab import CompareTab, ComparisonState, ScoredCandidate
from salmonn.webui.controls import QUESTION
from salmonn.webui.results_tab import load_results, load_run
from salmonn.webui.scorer import CaptionScorer
from salmonn.webui.session import AppState
from salmonn.webui.uploads import UploadStore
from tests.preference.test_votes import LEFT, RIGHT

REQUEST = SimpleNamespace(session_hash="ann")
HALF = "a dog \ud800 barks"


@pytest.fixture
def state(tmp_path, processor):
    engine = SimpleNamespace(captioner=SimpleNamespace(processor=processor, default_sampling=Sampling))
    return AppState(
        {"one": engine},
        CaptionScorer(RuleJudge()),
        VoteStore(tmp_path / "votes"),
        [],
        UploadStore(tmp_path / "uploads"),
    )


@pytest.fixture
def comparing(state):
    with gr.Blocks():
        return CompareTab(state)


@pytest.fixture
def captioning(state):
    with gr.Blocks():
        return CaptionTab(state)


@pytest.fixture
def comparison(state):
    path = state.uploads.root / "holiday.mp4"
    path.write_bytes(b"pictures")
    return ComparisonState(ScoredCandidate(LEFT), ScoredCandidate(RIGHT), CaptionRequest(path), MediaInfo(3.0), None)


def vote(tab, comparison, edit=""):
    """What the page says to a vote for B."""
    told = tab.vote("second", {tab.comparison: comparison, tab.edit: edit, tab.consent: True}, session="ann")
    return told[tab.status]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (HALF, "Your caption contains half of a Unicode character"),
        ("x" * 20_001, "Your caption has 20,001 characters"),
        ("As <|im_end|> shows.", "Your caption"),
    ],
)
def test_an_edit_that_cannot_be_kept_costs_no_vote(comparing, comparison, edit, words):
    assert words in vote(comparing, comparison, edit)
    assert comparing.state.votes.read() == [] and comparing.state.votes.read_log() == []
    assert "Vote saved. It will be used for training" in vote(comparing, comparison, "x" * 20_000)
    assert len(comparing.state.votes.read()) == 1


def test_a_vote_outlives_its_video(comparing, comparison):
    comparison.request.path.unlink()
    assert "Vote saved, but not used for training because the video has been deleted." in vote(comparing, comparison)
    assert [kept.choice for kept in comparing.state.votes.read()] == ["second"]


def test_a_vote_that_cannot_be_written_tells_no_path(comparing, comparison, tmp_path):
    (tmp_path / "votes" / "votes.jsonl").mkdir()
    told = vote(comparing, comparison)
    assert "The vote could not be saved: Is a directory" in told and str(tmp_path) not in told


def values_of(tab, **changes):
    """The form as it stands at first, with changes."""
    return {part: part.value for part in tab.controls.components} | {
        getattr(tab.controls, name): value for name, value in changes.items()
    }


@pytest.mark.parametrize(
    "name", ["start", "end", "temperature", "top_p", "max_new_tokens", "repetition_penalty", "seed"]
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_are_finite(comparing, comparison, name, value):
    with pytest.raises(ValueError, match="must be a number, got"):
        comparing.controls.to_request(values_of(comparing, **{name: value}), comparison.request.path)


def test_a_question_has_a_length(comparing, comparison):
    asked = values_of(comparing, modality=QUESTION, question="x" * 20_000)
    assert comparing.controls.to_request(asked, comparison.request.path).prompt == "x" * 20_000
    with pytest.raises(ValueError, match="the question has 20,001 characters"):
        comparing.controls.to_request(
            values_of(comparing, modality=QUESTION, question="x" * 20_001), comparison.request.path
        )


@pytest.mark.parametrize(
    ("pasted", "words"), [("x" * 20_001, "The reference has 20,001 characters"), (HALF, "The reference contains half")]
)
def test_a_reference_has_a_length(captioning, comparison, pasted, words):
    values = values_of(captioning) | {
        captioning.video: str(comparison.request.path), captioning.model: "one", captioning.reference: pasted
    }  # fmt: skip
    told, ready = captioning.describe(values, REQUEST)
    assert words in told[captioning.answer] and ready == captioning._enable()


def test_a_copy_that_cannot_be_logged_is_a_copy(captioning, tmp_path, caplog):
    (tmp_path / "votes" / "log.jsonl").mkdir()
    assert captioning.log_copy(Caption("holiday.mp4", "A dog barks.", model="one")) == "Copied."
    assert "cannot log" in caplog.text


def test_troubles_of_folders_tell_their_names_alone(tmp_path):
    told = load_run(tmp_path / "my run")
    assert "My run holds no run" in told and str(tmp_path) not in told
    votes = VoteStore(tmp_path / "votes")
    (votes.folder / "votes.jsonl").write_text("{}\n")
    told = load_results(votes)
    assert "votes.jsonl" in told and str(tmp_path) not in told
    (votes.folder / "votes.jsonl").unlink()
    (votes.folder / "votes.jsonl").mkdir()
    told = load_results(votes)
    assert "FileNotFoundError" in told and str(tmp_path) not in told
