"""What the tabs take from visitors and tell them, without a browser: values that a page's form would not send."""

import math
from types import SimpleNamespace

import gradio as gr
import pytest

from salmonn.caption.engine import CaptionRequest
from salmonn.caption.generate import Sampling
from salmonn.caption.probe import MediaInfo
from salmonn.preference.votes import VoteStore
from salmonn.records import Caption
from salmonn.synthetic.judge import RuleJudge
from salmonn.webui.caption_tab import CaptionTab
from salmonn.webui.compare_tab import CompareTab, ComparisonState, ScoredCandidate
from salmonn.webui.controls import OWN_WORDS
from salmonn.webui.results_tab import draw_results, draw_run
from salmonn.webui.scorer import CaptionScorer
from salmonn.webui.session import AppState, UploadStore
from tests.preference.test_votes import LEFT, RIGHT

SOMEBODY = SimpleNamespace(session_hash="ann")
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
def describing(state):
    with gr.Blocks():
        return CaptionTab(state)


@pytest.fixture
def duel(state):
    path = state.uploads.root / "holiday.mp4"
    path.write_bytes(b"pictures")
    return ComparisonState(ScoredCandidate(LEFT), ScoredCandidate(RIGHT), CaptionRequest(path), MediaInfo(3.0), None)


def vote(tab, duel, edit=""):
    """What the page says to a vote for B."""
    told = tab.vote("second", {tab.duel: duel, tab.edit: edit, tab.consent: True}, visitor="ann")
    return told[tab.status]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (HALF, "What you wrote holds half of a Unicode character"),
        ("x" * 20_001, "What you wrote has 20,001 letters"),
        ("As <|im_end|> shows.", "What you wrote"),
    ],
)
def test_an_edit_that_cannot_be_kept_costs_no_vote(comparing, duel, edit, words):
    assert words in vote(comparing, duel, edit)
    assert comparing.state.votes.read() == [] and comparing.state.votes.read_log() == []
    assert "Your vote is kept" in vote(comparing, duel, "x" * 20_000)
    assert len(comparing.state.votes.read()) == 1


def test_a_vote_outlives_its_video(comparing, duel):
    duel.query.path.unlink()
    assert "Your vote is kept. No model is trained on it: the video is gone." in vote(comparing, duel)
    assert [kept.choice for kept in comparing.state.votes.read()] == ["second"]


def test_a_vote_that_cannot_be_written_tells_no_path(comparing, duel, tmp_path):
    (tmp_path / "votes" / "votes.jsonl").mkdir()
    told = vote(comparing, duel)
    assert "The vote could not be kept: Is a directory" in told and str(tmp_path) not in told


def values_of(tab, **changes):
    """The form as it stands at first, with changes."""
    return {part: part.value for part in tab.controls.components} | {
        getattr(tab.controls, name): value for name, value in changes.items()
    }


@pytest.mark.parametrize("name", ["start", "end", "temperature", "top_p", "longest", "penalty", "seed"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_are_finite(comparing, duel, name, value):
    with pytest.raises(ValueError, match="must be a number, got"):
        comparing.controls.query(values_of(comparing, **{name: value}), duel.query.path)


def test_a_question_has_a_length(comparing, duel):
    asked = values_of(comparing, wanted=OWN_WORDS, words="x" * 20_000)
    assert comparing.controls.query(asked, duel.query.path).prompt == "x" * 20_000
    with pytest.raises(ValueError, match="your question has 20,001 letters"):
        comparing.controls.query(values_of(comparing, wanted=OWN_WORDS, words="x" * 20_001), duel.query.path)


@pytest.mark.parametrize(
    ("pasted", "words"), [("x" * 20_001, "The reference has 20,001 letters"), (HALF, "The reference holds half")]
)
def test_a_reference_has_a_length(describing, duel, pasted, words):
    values = values_of(describing) | {
        describing.video: str(duel.query.path), describing.model: "one", describing.reference: pasted
    }  # fmt: skip
    told, ready = describing.describe(values, SOMEBODY)
    assert words in told[describing.answer] and ready == describing._ready()


def test_a_copy_that_cannot_be_logged_is_a_copy(describing, tmp_path, caplog):
    (tmp_path / "votes" / "log.jsonl").mkdir()
    assert describing.log_copy(Caption("holiday.mp4", "A dog barks.", model="one")) == "Copied."
    assert "could not be logged" in caplog.text


def test_troubles_of_folders_tell_their_names_alone(tmp_path):
    told = draw_run(tmp_path / "my run")
    assert "My run holds no run" in told and str(tmp_path) not in told
    votes = VoteStore(tmp_path / "votes")
    (votes.folder / "votes.jsonl").write_text("{}\n")
    told = draw_results(votes)
    assert "votes.jsonl" in told and str(tmp_path) not in told
    (votes.folder / "votes.jsonl").unlink()
    (votes.folder / "votes.jsonl").mkdir()
    told = draw_results(votes)
    assert "FileNotFoundError" in told and str(tmp_path) not in told
