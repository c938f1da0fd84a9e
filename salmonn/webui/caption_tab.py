"""The tab Caption: a video beside its caption, which comes word by word, with its events and its score."""

import logging
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from salmonn.caption.engine import CaptionRequest, Overloaded
from salmonn.caption.streaming import Completion
from salmonn.records import Caption, Reference
from salmonn.webui.controls import QUIET, add_controls, add_wanted, require_words
from salmonn.webui.rendering import show_caption, show_empty, show_findings, show_marked, show_trouble
from salmonn.webui.scorer import read_reference
from salmonn.webui.session import ActiveRequest, ActiveRequests, AppState, tell, to_caption
from salmonn.webui.sight import video_input

logger = logging.getLogger(__name__)
READING, WRITING = "Watching and listening", "Writing"
TELLING_SECONDS = 0.05  # between two updates of a growing caption
EMPTY = show_empty(
    "No caption yet",
    "Choose an example or drop a video of your own, then press Describe. A format that your browser does not play is "
    "read all the same.",
)
REFERENCE_HINT = (
    "What happens in the video, one event a line; a line may begin with “seen:”, “heard:” or “said:”. Or a reference "
    "as JSON."
)

REVEAL = "(...inputs) => { window.salmonn.reveal('.paper'); return inputs; }"
COPY = "(shown) => { window.salmonn.copy('#answer .caption'); return [shown]; }"

Update = dict[Any, Any]


class CaptionTab:
    """Lays the tab out and answers its visitors.

    Args:
        desk: what it works with.
    """

    def __init__(self, state: AppState) -> None:
        self.state = state
        self.turns = ActiveRequests()
        with gr.Row(elem_classes=["bench"], equal_height=False):
            with gr.Column(scale=5, min_width=320):
                self._add_question()
            with gr.Column(scale=6, min_width=320):
                with gr.Column(elem_classes=["paper"]):
                    self.answer = gr.HTML(EMPTY, elem_id="answer")
                    with gr.Row(elem_classes=["foot"]):
                        self.status = gr.HTML("", elem_id="status")
                        self.copy = gr.Button("Copy", elem_id="copy", size="sm", visible=False, scale=0, min_width=90)
                self.findings = gr.HTML("", elem_id="findings")
        self.shown = gr.State(None)
        self._wire()

    def _add_question(self) -> None:
        """The video, and what is asked of it."""
        state = self.state
        self.video = video_input(state, place="describe")
        several = len(state.engines) > 1
        self.model = gr.Radio(
            list(state.engines), value=state.first, label="Model", visible=several, elem_classes=["pills"]
        )
        asked = add_wanted()
        with gr.Row(elem_classes=["deeds"]):
            self.start = gr.Button("Describe", variant="primary", elem_id="describe", scale=3)
            self.stop = gr.Button("Stop", elem_id="stop", visible=False, scale=1)
        self.controls = add_controls(asked, state.engines[state.first].captioner, temperature=0.0)
        with gr.Accordion("Reference, to score against", open=False, elem_classes=["fold"]):
            self.reference = gr.Textbox(
                label="Reference", info=REFERENCE_HINT, lines=4, max_lines=12, elem_id="reference"
            )

    def _wire(self) -> None:
        inputs = {self.video, self.model, self.reference, *self.controls.components}
        outputs = [self.answer, self.status, self.findings, self.start, self.stop, self.copy, self.shown]
        self.start.click(
            self.describe, inputs, outputs, show_progress="hidden", concurrency_limit=None,
            api_visibility="private", js=REVEAL,
        )  # fmt: skip
        self.stop.click(self.end_early, None, None, **QUIET)
        self.video.change(self.forget, self.video, outputs, **QUIET)
        self.copy.click(self.log_copy, self.shown, self.status, js=COPY, **QUIET)

    def describe(self, values: Mapping[Any, Any], request: gr.Request) -> Iterator[Update]:
        """Answer word by word, then tell what is in the answer."""
        if not values[self.video]:
            yield self._fail("choose an example, or drop a video of your own first")
            return
        path, model = Path(values[self.video]), values[self.model]
        turn = self.turns.begin(str(request.session_hash), path)
        try:
            query = self.controls.query(values, path)
            pasted = require_words(values[self.reference] or "", name="the reference")
            reference = read_reference(pasted, video=path.name) or self.state.reference_of(path)
            caption = yield from self._stream(query, model, turn)
            if caption and not turn.is_stopped and query.prompt is None:  # of own questions there are no events
                yield self._tell(caption, reference, query, turn)
        except (ValueError, Overloaded, RuntimeError) as error:
            if not turn.is_over:
                yield self._fail(tell(error, path))
        # By itself and last: whatever else became of it, the visitor can go on.
        yield self._ready()

    def _tell(
        self, caption: Caption, reference: Reference | None, query: CaptionRequest, turn: ActiveRequest
    ) -> Update:
        """What is found in a caption."""
        found = self.state.scorer.analyze(caption, reference, modality=query.modality)
        if turn.is_over:
            return self._ready()
        return {
            self.answer: show_marked(found),
            self.findings: show_findings(found, judge=self.state.scorer.judge.name),
        }

    def _stream(
        self, query: CaptionRequest, model: str, turn: ActiveRequest
    ) -> Generator[Update, None, Caption | None]:
        """The caption as it grows; returns it as far as it came, None where nobody looks at it any more."""
        text, answer, told_at, seconds, begin = "", None, 0.0, 0.0, time.monotonic()
        yield self._begin()
        with closing(self.state.stream_answers(query, [model])) as coming:
            for come in coming:
                seconds = time.monotonic() - begin
                if turn.is_stopped or turn.is_over:
                    break
                if come is None:
                    yield {self.status: _state(f"{WRITING if text else READING}, {seconds:.0f} s")}
                    continue
                text, answer = text + come[1].text, come[1].answer
                if answer is None and seconds - told_at > TELLING_SECONDS:
                    told_at = seconds
                    yield {self.answer: show_caption(text, growing=True), self.status: _state(WRITING)}
        if turn.is_over:
            return None
        caption = to_caption(query, answer or Completion(text.strip(), finished=False), model)
        yield self._whole(caption, f"{'' if answer else 'stopped, '}{seconds:.1f} s", is_whole=answer is not None)
        return caption

    def _begin(self) -> Update:
        return {
            self.answer: show_caption("", growing=True),
            self.status: _state(READING),
            self.findings: "",
            self.start: gr.update(interactive=False),
            self.stop: gr.update(visible=True),
            self.copy: gr.update(visible=False),
            self.shown: None,
        }

    def _whole(self, caption: Caption, how: str, *, is_whole: bool) -> Update:
        """The answer, before anybody has judged it."""
        return {
            self.answer: show_caption(caption.text, finished=caption.finished or not is_whole),
            self.status: f"{len(caption.text.split())} words by {escape(caption.model)}, {how}",
            self.shown: caption,
            self.copy: gr.update(visible=bool(caption.text)),
        } | self._ready()

    def _ready(self) -> Update:
        return {self.start: gr.update(interactive=True), self.stop: gr.update(visible=False)}

    def _fail(self, words: str) -> Update:
        return {self.answer: show_trouble(words), self.status: "", self.findings: ""} | self._ready()

    def end_early(self, request: gr.Request) -> None:
        """After Stop: what has come stays."""
        self.turns.stop(str(request.session_hash))

    def forget(self, path: str | None, request: gr.Request) -> Update:
        """After another video was chosen: nothing is known of it."""
        if not self.turns.turn_to(str(request.session_hash), path):
            return {self.status: gr.skip()}
        return {
            self.answer: EMPTY, self.status: "", self.findings: "", self.shown: None,
            self.copy: gr.update(visible=False),
        } | self._ready()  # fmt: skip

    def log_copy(self, shown: Caption | None) -> str:
        """Keep that the caption was copied."""
        if shown is None:
            return ""
        try:
            self.state.votes.log_copy(video=shown.video, model=shown.model, text=shown.text)
        except OSError as error:  # the browser has copied it all the same
            logger.warning("a copy could not be logged: %s", error)
        return "Copied."


def _state(words: str) -> str:
    return f'<span class="busy">{words}</span>'
