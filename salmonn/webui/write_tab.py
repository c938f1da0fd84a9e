"""The tab Write: a person describes a clip, with or without a model's draft, to measure whether it helps."""

import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from salmonn.caption.engine import Overloaded
from salmonn.caption.generator import CaptionRequest
from salmonn.preference.feedback import Action
from salmonn.records import Caption
from salmonn.webui.controls import GENERATE, NO_VIDEO, Update, clear_on_change, media_input, on_click
from salmonn.webui.feedback_panel import (
    CONSENT,
    PRIVACY,
    WITH_RATER,
    ShownCaption,
    check_own_text,
    check_rater,
    explain_unused,
    render_saved,
    show_caption,
)
from salmonn.webui.rendering import render_error, render_placeholder, render_score, render_scored_caption
from salmonn.webui.scorer import CaptionAnalysis
from salmonn.webui.session import ActiveRequests, AppState, error_message, to_caption

PLACEHOLDER = render_placeholder(
    "Describe a clip", "Choose an example, or drop a video or sound file, then press Start. Take the time you need."
)
READING = '<p class="lead busy">Watching and listening</p>'
EMPTY = '<p class="lead">Describe everything that is seen and heard, then press Done.</p>'
DRAFT = '<p class="lead">Correct and complete this draft until it describes everything that is seen and heard.</p>'


class WriteTab:
    """Lays out the tab and handles its events.

    Args:
        state: the shared state.
    """

    def __init__(self, state: AppState) -> None:
        self.state = state
        self.requests = ActiveRequests()
        with gr.Row(elem_classes=["columns"], equal_height=False):
            with gr.Column(scale=5, min_width=320):
                self.video = media_input(state, tab="write")
                self.start = gr.Button("Start", variant="primary", elem_id="start-writing")
            with gr.Column(scale=6, min_width=320):
                self.status = gr.HTML(PLACEHOLDER, elem_id="writing-status")
                with gr.Column(visible=False, elem_classes=["voting"]) as self.writing:
                    self.text = gr.Textbox(label="Your description", lines=6, max_lines=20, elem_id="own-text")
                    self.consent = gr.Checkbox(False, label=CONSENT, visible=False)
                    with gr.Row(elem_classes=["votes"]):
                        self.done = gr.Button("Done", elem_id="done-writing", min_width=120)
                    gr.HTML(f'<p class="note">{PRIVACY}</p>')
        self.draft = gr.State(None)
        self.time = gr.Number(visible=False)  # of an event in the browser
        self.rater = gr.Textbox(visible=False)  # the browser's id
        outputs = [self.status, self.writing, self.text, self.consent, self.draft, self.start]
        self.start.click(self.begin, [self.video, self.time], outputs, js=on_click("write"), **GENERATE)
        clear_on_change(self.video, self.time, self.requests, tab="write", cleared=self._clear(PLACEHOLDER))
        self.done.click(
            self.finish, {self.text, self.consent, self.draft, self.rater}, outputs, js=WITH_RATER, **GENERATE
        )

    def begin(self, video: str | None, clicked: float | None, request: gr.Request) -> Iterator[Update]:
        """Draw at random which model writes the draft, or that there is none, and show the text box."""
        if not video:
            yield self._clear(render_error(NO_VIDEO))
            return
        path, session = Path(video), str(request.session_hash)
        active = self.requests.start(session, path, clicked=clicked)
        model = random.SystemRandom().choice(["", *self.state.engines])
        caption_request, caption = CaptionRequest(path), Caption(path.name, "")
        update: Update = {}
        try:
            if model:
                # Without a draft, hiding and showing the column at once would leave it hidden in the browser.
                yield self._clear(READING) | {self.start: gr.update(interactive=False)}
                for progress in self.state.stream_progress(caption_request, model, active):
                    if progress.completion:
                        caption = to_caption(caption_request, progress.completion, model)
            else:
                caption = replace(caption, modality=self.state.probe_modality(path))
            reference = self.state.reference_of(path)
            draft = show_caption(self.state, caption, caption_request, reference, tab="write")
        except (ValueError, Overloaded, RuntimeError) as error:
            draft = None
            if not active.is_cancelled:
                update = self._clear(render_error(error_message(error, path)))
        if draft and not active.is_cancelled:
            self.state.uploads.retain(session, "draft", path)  # needed until the text is done
            update = {
                self.status: DRAFT if caption.text else EMPTY,
                self.writing: gr.update(visible=True),
                self.text: caption.text,
                self.consent: gr.update(visible=self.state.example_of(path) is None, value=False),
                self.draft: draft,
            }
        yield update | {self.start: gr.update(interactive=True)}

    def finish(self, values: Mapping[Any, Any], request: gr.Request) -> Update:
        """Save the text, then show its score and who wrote the draft."""
        draft: ShownCaption | None = values[self.draft]
        if draft is None:
            return self._clear(render_error("the clip is no longer available: press Start again"))
        try:
            text = check_own_text(self.state, values[self.text], name="your description")
            rater = check_rater(values[self.rater])
            if not text:
                raise ValueError("your description is empty: write what is seen and heard")
        except ValueError as error:
            return {self.status: render_error(str(error))}
        action: Action = "edit" if draft.shown.first.text else "finish"
        if text.split() == draft.shown.first.text.split():
            action = "accept"
        analysis = self._analyze(text, draft)
        total = analysis.score.total if analysis.score else None
        first = replace(draft.shown.first, total=total)
        if action != "accept":
            of_draft = self._analyze(first.text, draft).score  # None of an empty one
            first = replace(first, total=of_draft.total if of_draft else None)
        written = draft.to_feedback(action=action, first=first, text=text, total=total, rater=rater)
        may_keep = bool(values[self.consent]) or self.state.example_of(draft.path) is not None
        try:
            written = self.state.feedback.add(written, draft.path if may_keep else None)
        except OSError as error:
            return {self.status: render_error(f"your text could not be saved: {error_message(error, draft.path)}")}
        self.state.uploads.retain(str(request.session_hash), "draft", None)
        reason = explain_unused(written, may_keep=may_keep)
        use = f"not used for training because {reason}" if reason else "it can be used for training"
        author = f"The draft was by {draft.shown.first.model}." if action != "finish" else "There was no draft."
        message = f"Saved after {written.seconds:.0f} s; {use}. {author}"
        result = render_scored_caption(analysis) + (render_score(analysis.score) if analysis.score else "")
        return self._clear(f"{render_saved(written, message)}<article class='candidate'>{result}</article>")

    def _analyze(self, text: str, draft: ShownCaption) -> CaptionAnalysis:
        caption = Caption(draft.path.name, text, modality=draft.shown.modality)
        reference = self.state.reference_of(draft.path)
        return self.state.scorer.analyze(caption, reference, modality=draft.shown.modality)

    def _clear(self, status: str) -> Update:
        return {
            self.status: status,
            self.writing: gr.update(visible=False),
            self.text: "",
            self.consent: gr.update(visible=False, value=False),
            self.draft: None,
            self.start: gr.update(interactive=True),
        }
