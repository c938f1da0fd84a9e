"""Event handlers of the tabs without a browser, with values that a form would not send."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import gradio as gr
import pytest
from gradio.data_classes import FileData

from salmonn.caption.generator import CaptionRequest, Sampling
from salmonn.caption.streaming import Completion, TextDelta
from salmonn.media.container import ClipError, ClipShape
from salmonn.model.layout import ClipInfo
from salmonn.preference.feedback import FeedbackStore
from salmonn.preference.feedback_pairs import to_comparisons
from salmonn.records import Caption, Mark
from salmonn.synthetic.judge import RuleJudge
from salmonn.webui.app import launch_options, load_results, load_run
from salmonn.webui.caption_tab import CaptionTab
from salmonn.webui.chooser import ChosenCaption
from salmonn.webui.compare_tab import CompareTab, ComparisonState, ScoredCandidate
from salmonn.webui.controls import QUESTION
from salmonn.webui.feedback_panel import show_caption
from salmonn.webui.scorer import CaptionScorer
from salmonn.webui.session import AppState
from salmonn.webui.uploads import UploadStore
from salmonn.webui.write_tab import WriteTab
from tests.preference.feedback_examples import LEFT, RIGHT

REQUEST = SimpleNamespace(session_hash="ann")
UNPAIRED_SURROGATE = "a dog \ud800 barks"


@pytest.fixture
def state(tmp_path, processor):
    engine = SimpleNamespace(
        captioner=SimpleNamespace(processor=processor, default_sampling=Sampling), max_seconds=60.0
    )
    return AppState(
        {"one": engine},
        CaptionScorer(RuleJudge()),
        FeedbackStore(tmp_path / "votes"),
        [],
        UploadStore(tmp_path / "uploads"),
    )


@pytest.fixture
def compare_tab(state):
    with gr.Blocks():
        return CompareTab(state)


@pytest.fixture
def caption_tab(state):
    with gr.Blocks():
        return CaptionTab(state)


@pytest.fixture
def comparison(state):
    path = state.uploads.root / "holiday.mp4"
    path.write_bytes(b"frames")
    return ComparisonState(ScoredCandidate(LEFT), ScoredCandidate(RIGHT), CaptionRequest(path), "both", None)


def vote(tab, comparison, edit="", rater=""):
    """Vote for B and return the status."""
    values = {tab.comparison: comparison, tab.edit: edit, tab.consent: True, tab.rater: rater}
    return tab.vote("second", values, session="ann")[tab.status]


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (UNPAIRED_SURROGATE, "Your caption contains half of a Unicode character"),
        ("x" * 20_001, "Your caption has 20,001 characters"),
        ("As <|im_end|> shows.", "Your caption"),
    ],
)
def test_an_invalid_edit_does_not_lose_the_vote(compare_tab, comparison, edit, expected):
    assert expected in vote(compare_tab, comparison, edit)
    assert compare_tab.state.feedback.read() == []
    assert "Vote saved. It will be used for training" in vote(compare_tab, comparison, "x" * 20_000)
    assert len(compare_tab.state.feedback.read()) == 1


@pytest.mark.parametrize("rater", ["10.0.0.7", "A" * 32, "a" * 33, "a" * 31 + "\n"])
def test_only_random_ids_are_saved(compare_tab, comparison, rater):
    """The vote is not lost: the same comparison takes one with a valid id."""
    assert "The id of this browser is damaged" in vote(compare_tab, comparison, rater=rater)
    assert compare_tab.state.feedback.read() == []
    assert f"<code>{'a0' * 16}</code>" in vote(compare_tab, comparison, rater="a0" * 16)
    assert [saved.rater for saved in compare_tab.state.feedback.read()] == ["a0" * 16]


@pytest.mark.parametrize("caption", [LEFT, RIGHT])
def test_an_unedited_caption_is_not_the_ground_truth(compare_tab, comparison, caption):
    """The text box after "Start from A" or "Start from B", whichever caption the vote is for."""
    status = vote(compare_tab, comparison, "  " + caption.text.replace(" ", "\n", 1))
    assert "It will be used for training." in status
    ((pair,), _) = to_comparisons(compare_tab.state.feedback.read())
    assert (pair.chosen, pair.ground_truth) == (RIGHT.text, "")


def test_a_vote_on_a_deleted_video(compare_tab, comparison):
    comparison.request.path.unlink()
    assert "Vote saved, but not used for training because the video has been deleted." in vote(compare_tab, comparison)
    assert [saved.choice for saved in compare_tab.state.feedback.read()] == ["second"]


def test_the_error_of_a_vote_contains_no_path(compare_tab, comparison, tmp_path):
    (tmp_path / "votes" / "feedback.jsonl").mkdir()
    status = vote(compare_tab, comparison)
    assert "The vote could not be saved: Is a directory" in status and str(tmp_path) not in status


def test_comparing_can_be_stopped(compare_tab, comparison, monkeypatch):
    """The progress counts the words of both captions: separate counts would tell which model wrote which one."""

    def stream_answers(*_):
        yield 0, TextDelta("A red circle ")
        yield 1, TextDelta("A dog")
        yield None
        compare_tab.stop_request(REQUEST)
        yield None

    monkeypatch.setattr(AppState, "stream_answers", stream_answers)
    values = form_values(compare_tab) | {
        compare_tab.video: str(comparison.request.path), compare_tab.matchup: "one vs. itself (two samples)",
        compare_tab.time: 0.0,
    }  # fmt: skip
    reading, progress, stopped, end = compare_tab.compare(values, REQUEST)
    assert reading[compare_tab.stop]["visible"] and not reading[compare_tab.start]["interactive"]
    assert "Writing two captions, 5 words" in progress[compare_tab.status]
    assert "Stopped" in stopped[compare_tab.status]
    assert end[compare_tab.start]["interactive"] and not end[compare_tab.stop]["visible"]


def form_values(tab, **changes):
    """Return the initial values of the form, with changes."""
    return {component: component.value for component in tab.controls.components} | {
        getattr(tab.controls, name): value for name, value in changes.items()
    }


@pytest.mark.parametrize(
    "name", ["start", "end", "temperature", "top_p", "max_new_tokens", "repetition_penalty", "seed"]
)
def test_numbers_are_finite(compare_tab, comparison, name):
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="must be a number, got"):
            compare_tab.controls.to_request(form_values(compare_tab, **{name: value}), comparison.request.path)


def test_the_length_of_a_question_is_limited(compare_tab, comparison):
    values = form_values(compare_tab, modality=QUESTION, question="x" * 20_000)
    assert compare_tab.controls.to_request(values, comparison.request.path).prompt == "x" * 20_000
    with pytest.raises(ValueError, match="the question has 20,001 characters"):
        compare_tab.controls.to_request(
            form_values(compare_tab, modality=QUESTION, question="x" * 20_001), comparison.request.path
        )


@pytest.mark.parametrize(
    ("pasted", "expected"),
    [("x" * 20_001, "The reference has 20,001 characters"), (UNPAIRED_SURROGATE, "The reference contains half")],
)
def test_the_length_of_a_reference_is_limited(caption_tab, comparison, pasted, expected):
    values = form_values(caption_tab) | {
        caption_tab.video: str(comparison.request.path), caption_tab.model: "one", caption_tab.reference: pasted,
        caption_tab.time: 0.0,
    }  # fmt: skip
    updates, button = caption_tab.describe(values, REQUEST)
    assert expected in updates[caption_tab.answer] and button == caption_tab._enable()


def test_a_caption_of_a_damaged_file_has_a_notice(caption_tab, comparison, monkeypatch):
    """Below the caption as it is when it ends, and once it has a score."""

    def stream_answers(*_):
        clip = ClipInfo("visual", is_complete=False, warnings=("lost 1 s of video",))
        yield 0, TextDelta("A red circle appears.", Completion("A red circle appears.", True, clip))

    monkeypatch.setattr(AppState, "stream_answers", stream_answers)
    caption_tab.state.engines["one"].captioner.default_prompt = "Describe {}.".format
    values = form_values(caption_tab) | {
        caption_tab.video: str(comparison.request.path), caption_tab.model: "one",
        caption_tab.reference: "seen: a blue square", caption_tab.time: 0.0,
    }  # fmt: skip
    monkeypatch.setattr(AppState, "measure_seconds", lambda *_, **__: 3.0)
    updates = list(caption_tab.describe(values, REQUEST))
    shown = next(
        update[caption_tab.rating.caption] for update in updates[::-1] if update.get(caption_tab.rating.caption)
    )
    assert shown.shown.reference == ""  # a visitor's reference becomes nobody's ground truth
    answers = [update[caption_tab.answer] for update in updates if caption_tab.answer in update]
    assert len(answers) == 3 and "Lost 1 s of video" not in answers[0]
    assert all("Lost 1 s of video" in answer for answer in answers[1:])


class Chooser:
    """A fake chooser, which takes the last caption and fails to fit votes."""

    is_personal, num_samples, raters = True, 3, ()

    def to_samples(self, request):
        return replace(request, sampling=replace(request.sampling, temperature=0.8))

    def choose(self, captions, request, *, rater):
        self.raters = (rater,)
        return ChosenCaption(captions[-1], 2.0, 1.0, len(captions), 4, (("words +1", 1.0), ("words -1", 0.0)))

    def fit(self, rater):
        raise ClipError("it is damaged")


@pytest.fixture
def for_you(state, comparison, monkeypatch):
    """A tab with a chooser, and a function that describes a video for a visitor and returns the updates."""
    with gr.Blocks():
        tab = CaptionTab(replace(state, chooser=Chooser()))
    asked = []

    def stream_answers(_, request, models):
        asked.append((request.sampling.temperature, len(models)))
        for number in range(len(models)):
            text = f"A dog barks {number} times."
            yield number, TextDelta(text, Completion(text, True))
            yield None

    monkeypatch.setattr(AppState, "stream_answers", stream_answers)
    monkeypatch.setattr(AppState, "measure_seconds", lambda *_, **__: 3.0)
    state.engines["one"].captioner.default_prompt = "Describe {}.".format
    values = {tab.video: str(comparison.request.path), tab.model: "one", tab.reference: "", tab.time: 0.0}

    def describe(**changes):
        chosen = {tab.for_you: True, tab.rater: "a0" * 16}
        return list(tab.describe(form_values(tab, **changes) | values | chosen, REQUEST))

    return tab, asked, describe


def last(updates, component):
    return next(update[component] for update in updates[::-1] if component in update)


def test_the_best_of_several_captions(for_you):
    """It is rated as what it is: a sample with its own seed, chosen among three."""
    tab, asked, describe = for_you
    updates = describe(seed=5)
    assert asked == [(0.8, 3)] and tab.state.chooser.raters == ("a0" * 16,)
    assert "A dog barks 2 times." in last(updates, tab.answer)
    reason = "The best of 3 captions for you</b>, by 4 votes of yours: reward +2.00, mean of all +1.00."
    assert reason in last(updates, tab.reason)
    assert any("Writing 3 captions, 15 words" in update.get(tab.status, "") for update in updates)
    shown = last(updates, tab.rating.caption).shown.first
    assert (shown.model, shown.temperature, shown.seed) == ("one, best of 3", 0.8, 7)
    assert last(updates, tab.chat.conversation).request.sampling.temperature == 0.0  # questions are answered as usual


def test_questions_are_answered_once(for_you):
    tab, asked, describe = for_you
    updates = describe(modality=QUESTION, question="Who barks?")
    assert asked == [(0.0, 1)] and "are not chosen among several" in last(updates, tab.reason)


def test_choosing_can_be_stopped(for_you, monkeypatch):
    tab, _, describe = for_you
    stream_answers = AppState.stream_answers

    def stop_after_one(*arguments):
        for event in stream_answers(*arguments):
            yield event
            tab.stop_request(REQUEST)

    monkeypatch.setattr(AppState, "stream_answers", stop_after_one)
    updates = describe()
    assert last(updates, tab.status) == "stopped" and "No caption yet" in last(updates, tab.answer)
    assert last(updates, tab.start)["interactive"] and not last(updates, tab.stop)["visible"]


def test_a_reward_that_cannot_be_fitted_does_not_disturb_a_vote(state, caplog):
    with gr.Blocks():
        tab = CompareTab(replace(state, chooser=Chooser()))
    for rater, message in (("a0" * 16, "it is damaged"), ("10.0.0.7", "The id of this browser is damaged")):
        tab.fit(rater)
        assert message.lower() in caplog.text.lower()


@pytest.mark.parametrize("seconds", [3.0, 0.0])
def test_downloads(caption_tab, monkeypatch, seconds):
    """A file of unknown duration has no subtitles."""
    monkeypatch.setattr(AppState, "measure_seconds", lambda *_, **__: seconds)
    html = caption_tab._render_downloads([Caption("a.mp4", "A & B <c> 50 %", model="one")], Path('my "a".mp4'))
    links = {name: unquote(url) for url, name in re.findall(r'href="data:[^,]*,([^"]*)" download="([^"]*)"', html)}
    stem = "my &#34;a&#34;"
    assert json.loads(links[f"{stem}.json"])["text"] == "A & B <c> 50 %"
    assert links[f"{stem}.txt"] == "A & B <c> 50 %\n"
    assert len(links) == (4 if seconds else 2)
    if seconds:
        assert links[f"{stem}.srt"] == "1\n00:00:00,000 --> 00:00:03,000\nA & B <c> 50 %\n"
        assert "A &amp; B &lt;c&gt;" in links[f"{stem}.vtt"]


def test_sound_files_are_accepted(caption_tab, tmp_path):
    """Those that the command line finds in folders, and no temporary file is created."""
    assert set(caption_tab.video.file_types) >= {"video", "audio", ".flac", ".opus", ".mkv", ".ts"}
    before = list(tmp_path.rglob("*"))
    assert caption_tab.video.preprocess(FileData(path="talk.flac")) == "talk.flac"
    assert caption_tab.video.preprocess(None) is None and list(tmp_path.rglob("*")) == before


@pytest.fixture
def shown(state, comparison):
    """A caption of an upload that is shown."""
    caption = Caption("holiday.mp4", "A dog barks, and a cat sleeps.", "Describe it.", model="one", end_seconds=2.0)
    return show_caption(state, caption, replace(comparison.request, seed=7), None, tab="caption")


def test_feedback_has_the_prompt_that_made_the_caption(state, comparison):
    """That of its own model, for what was asked: the file may have less."""
    prompts = SimpleNamespace(default_prompt=lambda modality: f"Describe {modality}.")
    state.engines["one"].captioner.default_prompt = lambda _: "Another model's."
    engines = state.engines | {"two": SimpleNamespace(captioner=prompts)}
    caption = Caption("holiday.mp4", "A dog.", model="two", modality="visual")
    shown = show_caption(replace(state, engines=engines), caption, comparison.request, None, tab="write").shown
    assert (shown.first.prompt, shown.modality) == ("Describe both.", "visual")


@pytest.mark.parametrize(
    ("shape", "modality"),
    [(ClipShape(), "both"), (ClipShape(has_audio=False), "visual"), (ClipShape(width=0, height=0), "audio")],
)
def test_an_empty_draft_has_the_streams_of_the_file(state, comparison, monkeypatch, shape, modality):
    """As captions have, so that the text is about the same as votes on them."""
    state.engines["one"].reader = SimpleNamespace(declared_shape=lambda _: shape)
    state.engines["one"].captioner.default_prompt = "Describe {}.".format
    monkeypatch.setattr("random.SystemRandom.choice", lambda self, names: names[0])
    with gr.Blocks():
        tab = WriteTab(state)
    updates = list(tab.begin(str(comparison.request.path), 0.0, REQUEST))
    draft = next(update[tab.draft] for update in updates if update.get(tab.draft))
    assert (draft.shown.modality, draft.shown.first.prompt) == (modality, "Describe both.")


def test_shown_and_copied_captions_are_counted_without_their_text(caption_tab, shown, tmp_path, caplog):
    assert caption_tab.count_copy(None) == ("Copied.", None)
    status, copied = caption_tab.count_copy(shown)
    assert status == "Copied." and caption_tab.count_copy(copied) == ("Copied.", copied)  # once
    feedback = caption_tab.state.feedback.read()
    assert [(one.action, one.first.model, one.tab) for one in feedback] == [
        ("shown", "one", "caption"), ("copy", "one", "caption"),
    ]  # fmt: skip
    saved = (caption_tab.state.feedback.folder / "feedback.jsonl").read_text()
    assert not any(text in saved for text in ("dog", "holiday", "Describe", '"seed": 7'))
    assert all(one.seconds is None and one.end_seconds is None for one in feedback)
    (tmp_path / "votes" / "feedback.jsonl").unlink()
    (tmp_path / "votes" / "feedback.jsonl").mkdir()
    assert caption_tab.count_copy(shown)[0] == "Copied."
    assert "cannot count a caption as copy" in caplog.text


def rate(tab, shown, **changes):
    panel = tab.rating
    values = {"wrong": [], "rest": False, "missing": "", "consent": False, "caption": shown, "rater": ""} | changes
    return panel.rate("bad", {getattr(panel, name): value for name, value in values.items()})


def test_ratings_without_a_browser(caption_tab, shown):
    assert "special token" in rate(caption_tab, shown, missing="As <|im_end|> shows.")
    assert "The id of this browser is damaged" in rate(caption_tab, shown, rater="10.0.0.7")
    assert "no longer available" in rate(caption_tab, None)
    assert "you did not agree to keep the video" in rate(caption_tab, shown, wrong=["13-30"])
    assert "It can be used for training" in rate(caption_tab, shown, wrong=["17-29"], rest=True, consent=True)
    *_, first, second = caption_tab.state.feedback.read()
    assert first.marks == () and first.kept_video == ""  # no clause has this place
    assert second.marks == (Mark(0, 11, is_right=True), Mark(17, 29, is_right=False)) and second.kept_video


def test_texts_without_a_browser(state, comparison, shown):
    """A draft that is left as it is was accepted; the text box is kept after an error."""
    with gr.Blocks():
        tab = WriteTab(state)

    def finish(draft, text):
        update = tab.finish({tab.draft: draft, tab.text: text, tab.consent: True, tab.rater: ""}, REQUEST)
        return update[tab.status], tab.text not in update

    assert "Your description is empty" in finish(shown, " \n")[0] and finish(shown, "<|im_end|>")[1]
    status, is_kept = finish(shown, "A dog barks,\nand a cat sleeps. ")
    assert "it can be used for training. The draft was by one." in status and not is_kept
    empty = replace(shown, shown=replace(shown.shown, first=replace(shown.shown.first, model="", text="")))
    assert "There was no draft." in finish(empty, "A dog sings.")[0]
    assert "no longer available" in finish(None, "A dog.")[0]
    assert [one.action for one in state.feedback.read()] == ["shown", "accept", "finish"]


def test_the_login_page_has_one_background():
    """It has no style sheet of ours, only the theme; its wide column is of this colour, the page around it of that."""
    theme = launch_options()["theme"]
    assert theme.background_fill_primary == theme.body_background_fill == "*neutral_50"
    assert theme.background_fill_primary_dark == theme.body_background_fill_dark == "*neutral_950"


def test_errors_of_folders_contain_only_their_names(tmp_path):
    html = load_run(tmp_path / "my run")
    assert "The run cannot be shown: my run holds no run" in html and str(tmp_path) not in html
    votes = FeedbackStore(tmp_path / "votes")
    (votes.folder / "feedback.jsonl").write_text("{}\n")
    html = load_results(votes)
    assert "feedback.jsonl" in html and str(tmp_path) not in html
    (votes.folder / "feedback.jsonl").unlink()
    (votes.folder / "feedback.jsonl").mkdir()
    html = load_results(votes)
    assert "Is a directory" in html and str(tmp_path) not in html
