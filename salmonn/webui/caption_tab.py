"""The tab Caption: a video beside its caption, which is streamed, with its events and its score."""

import json
import logging
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from salmonn.batch.subtitles import SUBTITLE_FORMATS, format_text
from salmonn.caption.engine import Overloaded
from salmonn.caption.generator import CaptionRequest
from salmonn.caption.streaming import Completion
from salmonn.media.container import ClipError
from salmonn.records import Caption
from salmonn.webui.controls import (
    GENERATE,
    NO_VIDEO,
    QUIET,
    WITH_TIME,
    check_text,
    media_input,
    option_inputs,
    prompt_inputs,
)
from salmonn.webui.rendering import (
    render_analysis,
    render_caption,
    render_downloads,
    render_error,
    render_file_notice,
    render_placeholder,
    render_scored_caption,
)
from salmonn.webui.scorer import parse_reference
from salmonn.webui.session import ActiveRequest, ActiveRequests, AppState, error_message, to_caption

logger = logging.getLogger(__name__)
READING, WRITING = "Watching and listening", "Writing"
UPDATE_SECONDS = 0.05  # between two updates of a growing caption
PLACEHOLDER = render_placeholder(
    "No caption yet",
    "Choose an example, or drop a video or sound file, then press Describe. Formats your browser can't play work too.",
)
REFERENCE_INFO = (
    "What happens in the video, one event per line; a line may begin with “seen:”, “heard:” or “said:”. Or a reference "
    "as JSON."
)
REVEAL = f"(...inputs) => {{ window.salmonn.reveal('.card'); return {WITH_TIME}; }}"
COPY = "(shown) => { window.salmonn.copy('#answer .caption'); return [shown]; }"

Update = dict[Any, Any]


class CaptionTab:
    """Lays out the tab and handles its events.

    Args:
        state: the shared state.
    """

    def __init__(self, state: AppState) -> None:
        self.state = state
        self.requests = ActiveRequests()
        with gr.Row(elem_classes=["columns"], equal_height=False):
            with gr.Column(scale=5, min_width=320):
                self._add_inputs()
            with gr.Column(scale=6, min_width=320):
                with gr.Column(elem_classes=["card"]):
                    self.answer = gr.HTML(PLACEHOLDER, elem_id="answer")
                    with gr.Row(elem_classes=["card-footer"]):
                        self.status = gr.HTML("", elem_id="status")
                        self.copy = gr.Button("Copy", elem_id="copy", size="sm", visible=False, scale=0, min_width=90)
                    self.downloads = gr.HTML("", elem_id="downloads")
                self.findings = gr.HTML("", elem_id="findings")
        self.shown = gr.State(None)
        self.time = gr.Number(visible=False)  # of an event in the browser
        self._connect()

    def _add_inputs(self) -> None:
        state = self.state
        self.video = media_input(state, tab="caption")
        self.model = gr.Radio(
            list(state.engines), value=state.default_model, label="Model", visible=len(state.engines) > 1,
            elem_classes=["pills"],
        )  # fmt: skip
        prompt = prompt_inputs()
        with gr.Row(elem_classes=["actions"]):
            self.start = gr.Button("Describe", variant="primary", elem_id="describe", scale=3)
            self.stop = gr.Button("Stop", elem_id="stop", visible=False, scale=1)
        self.controls = option_inputs(prompt, state.engines[state.default_model].captioner, temperature=0.0)
        with gr.Accordion("Score against a reference", open=False, elem_classes=["fold"]):
            self.reference = gr.Textbox(
                label="Reference", info=REFERENCE_INFO, lines=4, max_lines=12, elem_id="reference"
            )

    def _connect(self) -> None:
        inputs = {self.video, self.model, self.reference, *self.controls.components, self.time}
        outputs = [
            self.answer, self.status, self.findings, self.start, self.stop, self.copy, self.downloads, self.shown,
        ]  # fmt: skip
        self.start.click(self.describe, inputs, outputs, js=REVEAL, **GENERATE)
        self.stop.click(self.stop_request, None, None, **QUIET)
        self.video.change(self.reset, [self.video, self.time], outputs, js=f"(...inputs) => {WITH_TIME}", **QUIET)
        self.copy.click(self.log_copy, self.shown, self.status, js=COPY, **QUIET)

    def describe(self, values: Mapping[Any, Any], request: gr.Request) -> Iterator[Update]:
        """Stream a caption, then show its events and its score."""
        if not values[self.video]:
            yield self._show_error(NO_VIDEO)
            return
        path, model = Path(values[self.video]), values[self.model]
        active = self.requests.start(str(request.session_hash), path, clicked=values[self.time])
        try:
            caption_request = self.controls.to_request(values, path)
            pasted = check_text(values[self.reference] or "", name="the reference")
            reference = parse_reference(pasted, video=path.name) or self.state.reference_of(path)
            caption = yield from self._stream(caption_request, model, active)
            if caption and caption.text:
                yield {self.downloads: self._render_downloads(caption, path)}
            # Answers to questions are not descriptions of events.
            if caption and not active.is_stopped and caption_request.prompt is None:
                scorer = self.state.scorer
                analysis = scorer.analyze(caption, reference, modality=caption_request.modality)
                if not active.is_cancelled:
                    yield {
                        self.answer: render_scored_caption(analysis) + render_file_notice(caption),
                        self.findings: render_analysis(analysis, judge=scorer.judge.name),
                    }
        except (ValueError, Overloaded, RuntimeError) as error:
            if not active.is_cancelled:
                yield self._show_error(error_message(error, path))
        # In an update of its own, so that it happens in any case.
        yield self._enable()

    def _stream(
        self, caption_request: CaptionRequest, model: str, active: ActiveRequest
    ) -> Generator[Update, None, Caption | None]:
        """Show the growing caption; return the caption, incomplete if it was stopped, or None if it was cancelled."""
        text, answer, updated, seconds, begin = "", None, 0.0, 0.0, time.monotonic()
        yield {
            self.answer: render_caption("", is_growing=True),
            self.status: _busy(READING),
            self.findings: "",
            self.downloads: "",
            self.start: gr.update(interactive=False),
            self.stop: gr.update(visible=True),
            self.copy: gr.update(visible=False),
            self.shown: None,
        }
        with closing(self.state.stream_answers(caption_request, [model])) as events:
            for event in events:
                seconds = time.monotonic() - begin
                if active.is_stopped or active.is_cancelled:
                    break
                if event is None:
                    yield {self.status: _busy(f"{WRITING if text else READING}, {seconds:.0f} s")}
                    continue
                text, answer = text + event[1].text, event[1].completion
                if answer is None and seconds - updated > UPDATE_SECONDS:
                    updated = seconds
                    yield {self.answer: render_caption(text, is_growing=True), self.status: _busy(WRITING)}
        if active.is_cancelled:
            return None
        caption = to_caption(caption_request, answer or Completion(text.strip(), finished=False), model)
        num_words = len(caption.text.split())
        status = [f"{num_words} word{'s' * (num_words != 1)}", escape(model), *([] if answer else ["stopped"])]
        yield {
            self.answer: render_caption(caption.text, finished=caption.finished or answer is None)
            + render_file_notice(caption),
            self.status: " · ".join([*status, f"{seconds:.1f} s"]),
            self.shown: caption,
            self.copy: gr.update(visible=bool(caption.text)),
        } | self._enable()
        return caption

    def _render_downloads(self, caption: Caption, path: Path) -> str:
        """Render links to the caption as files; without subtitles if the duration of the video is unknown."""
        files = {"json": json.dumps(asdict(caption), ensure_ascii=False, indent=2) + "\n"}
        try:
            for name in SUBTITLE_FORMATS:
                files[name] = format_text([caption], name, seconds_of=lambda _: self._seconds(path, caption.model))
        except ClipError as error:
            logger.warning("no subtitles of a caption: %s", error)
        return render_downloads(files, stem=path.stem)

    def _seconds(self, path: Path, model: str) -> float:
        return self.state.probe_media(path, model=model).seconds

    def _enable(self) -> Update:
        return {self.start: gr.update(interactive=True), self.stop: gr.update(visible=False)}

    def _show_error(self, message: str) -> Update:
        return {
            self.answer: render_error(message), self.status: "", self.findings: "", self.downloads: "",
        } | self._enable()  # fmt: skip

    def stop_request(self, request: gr.Request) -> None:
        """Stop the session's request; the text so far is kept."""
        self.requests.stop(str(request.session_hash))

    def reset(self, path: str | None, changed: float | None, request: gr.Request) -> Update:
        """Clear the results after a change of the video, at the given time in the browser."""
        if not self.requests.switch_video(str(request.session_hash), path, changed=changed):
            return {self.status: gr.skip()}
        return {
            self.answer: PLACEHOLDER, self.status: "", self.findings: "", self.downloads: "", self.shown: None,
            self.copy: gr.update(visible=False),
        } | self._enable()  # fmt: skip

    def log_copy(self, shown: Caption | None) -> str:
        """Log that the caption was copied."""
        if shown is None:
            return ""
        try:
            self.state.votes.log_copy(video=shown.video, model=shown.model, text=shown.text)
        except OSError as error:  # the browser has copied it nevertheless
            logger.warning("cannot log that a caption was copied: %s", error)
        return "Copied."


def _busy(text: str) -> str:
    return f'<span class="busy">{text}</span>'
