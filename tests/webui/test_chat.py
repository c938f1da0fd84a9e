"""Questions about an answer, without a browser."""

import json
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest

from salmonn.caption.generator import CaptionRequest
from salmonn.caption.streaming import Completion, TextDelta
from salmonn.webui.chat import ChatPanel, Conversation
from salmonn.webui.session import ActiveRequests, AppState
from tests.webui.test_session import make_state

REQUEST = SimpleNamespace(session_hash="ann")
CONVERSATION = Conversation(CaptionRequest(Path("/tmp/a.mp4"), seed=3), "toy", "A dog barks.", "<p>A dog barks.</p>")


@pytest.fixture
def panel(tmp_path):
    with gr.Blocks():
        panel = ChatPanel(make_state(tmp_path), ActiveRequests())
        panel.connect(time=gr.Number(visible=False), history=gr.HTML())
        return panel


def ask(panel, question, conversation=CONVERSATION):
    return panel.ask({panel.question: question, panel.conversation: conversation, panel.time: 0.0}, REQUEST)


def test_an_answer_joins_the_conversation(panel, monkeypatch):
    requests = []

    def stream_answers(_, request, models):
        requests.append((request.prompt, request.history, request.seed, models))
        yield 0, TextDelta("A cat. ", Completion("A cat.", True))

    monkeypatch.setattr(AppState, "stream_answers", stream_answers)
    *_, first = ask(panel, " What is seen? ")
    *_, second = ask(panel, "And heard?", first[panel.conversation])
    assert requests == [
        ("What is seen?", (("", "A dog barks."),), 3, ["toy"]),
        ("And heard?", (("", "A dog barks."), ("What is seen?", "A cat.")), 3, ["toy"]),
    ]
    conversation = second[panel.conversation]
    assert conversation.turns == (("What is seen?", "A cat."), ("And heard?", "A cat."))
    entry = json.loads(second[panel.entry])
    assert (entry["id"], entry["text"]) == (CONVERSATION.id, "A dog barks.") and "And heard?" in entry["html"]
    restarted = panel.start_again(conversation, REQUEST)[panel.conversation]
    assert restarted.turns == () and restarted.text == "A dog barks." and restarted.id != conversation.id


@pytest.mark.parametrize("action", ["stop", "switch"])
def test_an_answer_that_is_stopped_or_cancelled(panel, monkeypatch, action):
    """What is stopped is kept; once another clip is chosen, nothing more is shown."""

    def stream_answers(*_):
        yield 0, TextDelta("A red ")
        if action == "stop":
            panel.stop_request(REQUEST)
        else:
            panel.requests.switch_video("ann", "other.mp4", changed=1.0)
        yield None

    monkeypatch.setattr(AppState, "stream_answers", stream_answers)
    *growing, last = ask(panel, "What is seen?")
    if action == "stop":
        assert last[panel.conversation].turns == (("What is seen?", "A red"),)
    else:
        assert panel.conversation not in last and not any(panel.conversation in update for update in growing)


@pytest.mark.parametrize(("question", "conversation"), [("  ", CONVERSATION), ("What?", None)])
def test_nothing_to_answer(panel, question, conversation):
    (update,) = ask(panel, question, conversation)
    assert panel.question not in update
    assert conversation or "The clip has changed" in update[panel.thread]
