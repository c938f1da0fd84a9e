"""The conversation below an answer: further questions about the same clip, and their answers."""

import json
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gradio as gr

from salmonn.caption.engine import Overloaded
from salmonn.caption.generator import CaptionRequest, History
from salmonn.webui.controls import GENERATE, QUIET, WITH_TIME, Update, check_text
from salmonn.webui.rendering import render_error, render_thread
from salmonn.webui.session import ActiveRequests, AppState, error_message

CLIP_CHANGED = "the clip has changed: press Describe first"
REMEMBER = "(entry) => window.salmonn.remember(entry)"


@dataclass(frozen=True)
class Conversation:
    """An answer about a clip, and the questions since.

    Args:
        request: request of the first answer.
        model: name of the model.
        text: the first answer.
        shown: the same as HTML, with its downloads.
        turns: further (question, answer) pairs.
        id: identifies the conversation in the browser's history.
    """

    request: CaptionRequest
    model: str
    text: str
    shown: str
    turns: History = ()
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def history(self) -> History:
        """All turns, as the model receives them."""
        return ((self.request.prompt or "", self.text), *self.turns)

    def to_json(self) -> str:
        """Return what the browser remembers; it contains no part of the clip."""
        path = self.request.path
        html = self.shown + render_thread(self.turns)
        return json.dumps(
            {"id": self.id, "name": path.name, "path": str(path), "model": self.model, "text": self.text, "html": html}
        )


class ChatPanel:
    """Lays out the conversation and handles its events.

    Args:
        state: the shared state.
        requests: active requests of the tab.
    """

    def __init__(self, state: AppState, requests: ActiveRequests) -> None:
        self.state = state
        self.requests = requests
        with gr.Column(visible=False, elem_id="chat") as self.panel:
            self.thread = gr.HTML("", elem_id="thread")
            self.question = gr.Textbox(
                label="Ask about this clip", show_label=False, placeholder="Ask about this clip", lines=1, max_lines=5,
                submit_btn="Ask", elem_id="follow-up",
            )  # fmt: skip
            self.restart = gr.Button("New conversation", size="sm", elem_id="new-conversation", visible=False)
        self.conversation = gr.State(None)
        self.entry = gr.Textbox(visible=False)  # of the browser's history

    @property
    def outputs(self) -> list[Any]:
        """The components that change with an answer."""
        return [self.panel, self.thread, self.question, self.restart, self.conversation, self.entry]

    def connect(self, *, time: gr.Number, history: gr.HTML) -> None:
        """Connect the events.

        Args:
            time: component for the time of an event in the browser, created after the others.
            history: list of earlier answers.
        """
        self.time = time
        inputs: set[Any] = {self.question, self.conversation, self.time}
        asked = self.question.submit(self.ask, inputs, self.outputs, js=f"(...inputs) => {WITH_TIME}", **GENERATE)
        asked.then(None, self.entry, history, js=REMEMBER, **QUIET)
        self.question.stop(self.stop_request, None, None, **QUIET)
        self.restart.click(self.start_again, self.conversation, self.outputs, **QUIET)

    def open(self, conversation: Conversation) -> Update:
        """Offer to ask about a new answer."""
        return self.close() | {
            self.panel: gr.update(visible=True),
            self.conversation: conversation,
            self.entry: conversation.to_json(),
        }

    def close(self) -> Update:
        """Hide the conversation."""
        return {
            self.panel: gr.update(visible=False),
            self.thread: "",
            self.question: gr.update(value="", submit_btn="Ask", stop_btn=False),
            self.restart: gr.update(visible=False),
            self.conversation: None,
            self.entry: "",
        }

    def start_again(self, conversation: Conversation | None, request: gr.Request) -> Update:
        """Drop the questions, and keep the answer that they are about."""
        self.requests.cancel(str(request.session_hash))
        return self.open(replace(conversation, turns=(), id=uuid.uuid4().hex)) if conversation else self.close()

    def stop_request(self, request: gr.Request) -> None:
        """Stop the session's request; the text so far is kept."""
        self.requests.stop(str(request.session_hash))

    def ask(self, values: Mapping[Any, Any], request: gr.Request) -> Iterator[Update]:
        """Stream the answer to a question."""
        conversation: Conversation | None = values[self.conversation]
        typed = values[self.question] or ""
        if conversation is None:
            yield {self.thread: render_error(CLIP_CHANGED)}
            return
        if not typed.strip():
            yield {self.thread: gr.skip()}
            return
        path: Path = conversation.request.path
        active = self.requests.start(str(request.session_hash), path, clicked=values[self.time])
        text = ""
        try:
            question = check_text(typed, name="the question").strip()
            caption_request = replace(conversation.request, prompt=question, history=conversation.history)
            growing = (*conversation.turns, (question, ""))
            yield {
                self.thread: render_thread(growing, is_growing=True),
                self.question: gr.update(value="", submit_btn=False, stop_btn="Stop"),
                self.entry: "",
            }
            for progress in self.state.stream_progress(caption_request, conversation.model, active):
                text = progress.completion.text if progress.completion else progress.text
                if progress.completion is None and not active.is_cancelled:
                    turns = (*conversation.turns, (question, text))
                    yield {self.thread: render_thread(turns, is_growing=True)}
        except (ValueError, Overloaded, RuntimeError) as error:
            if not active.is_cancelled:
                message = render_error(error_message(error, path).replace("the prompt", "the question"))
                yield self._enable() | {
                    self.thread: render_thread(conversation.turns) + message,
                    self.question: gr.update(value=typed, submit_btn="Ask", stop_btn=False),
                }
            return
        if active.is_cancelled:
            return
        if text.strip():
            conversation = replace(conversation, turns=(*conversation.turns, (question, text.strip())))
        yield self._enable() | {
            self.thread: render_thread(conversation.turns),
            self.restart: gr.update(visible=bool(conversation.turns)),
            self.conversation: conversation,
            self.entry: conversation.to_json(),
        }

    def _enable(self) -> Update:
        return {self.question: gr.update(submit_btn="Ask", stop_btn=False)}
