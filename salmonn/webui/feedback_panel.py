"""The rating of a caption: good or bad, what is wrong or missing; and what all feedback of the web UI shares."""

import logging
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, Literal

import gradio as gr

from salmonn.caption.generator import CaptionRequest
from salmonn.preference.feedback import Candidate, Feedback, find_unused_reason, utc_now
from salmonn.records import Caption, Mark, Reference
from salmonn.score.repetition import find_clauses
from salmonn.webui.controls import GENERATE, Update, check_text
from salmonn.webui.rendering import render_error
from salmonn.webui.scorer import reference_caption
from salmonn.webui.session import AppState, error_message

logger = logging.getLogger(__name__)
CONSENT = "Keep this video on the server, so that my feedback, under this browser's random id, can be used for training"
PRIVACY = (
    "Saved are votes, ratings, marks and texts, with the captions they are about, the name of the file, the time since "
    "these were shown, and a random id that this browser makes the first time and keeps, so that the feedback of one "
    "person is known to belong together. No name and no address is saved. Of captions that are only shown or copied, "
    "only the model and its temperature are counted. Deleting the data of this site ends the id."
)
# JavaScript: the inputs of an event, with the browser's id as the last one.
WITH_RATER = "(...inputs) => [...inputs.slice(0, -1), window.salmonn.rater()]"
RATER_ID = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True)
class ShownCaption:
    """A caption that a person may give feedback on.

    Args:
        shown: what was shown, as feedback with the action "shown".
        path: video file.
        since: monotonic time when it was shown, in seconds.
        is_copied: whether a copy has been counted.
    """

    shown: Feedback
    path: Path
    since: float = field(default_factory=time.monotonic)
    is_copied: bool = False

    def to_feedback(self, **changes: Any) -> Feedback:
        """Return feedback on the caption, with the time since it was shown."""
        return replace(self.shown, date=utc_now(), seconds=time.monotonic() - self.since, **changes)


def show_caption(
    state: AppState,
    caption: Caption,
    request: CaptionRequest,
    reference: Reference | None,
    *,
    tab: Literal["caption", "write"],
    best_of: int = 1,
) -> ShownCaption:
    """Count a caption as shown, and return what feedback on it needs.

    Args:
        state: the shared state.
        caption: the caption; the draft of a person's text, which may be empty, with the streams that the file has.
        request: its request.
        reference: reference of the video, if the operator knows it; never one that a visitor gave.
        tab: tab of the web UI.
        best_of: number of captions that it was chosen from; results distinguish it from a single sample.
    """
    modality = caption.modality or "both"
    prompt = caption.prompt
    if not prompt:  # as generation does
        prompt = state.engines[caption.model or state.default_model].captioner.default_prompt(request.modality)
    temperature = request.sampling.temperature if request.sampling else 0.0
    name = caption.model if best_of == 1 else f"{caption.model}, best of {best_of}"
    shown = ShownCaption(
        Feedback(
            utc_now(),
            "shown",
            caption.video,
            Candidate(name, caption.text, prompt, caption.finished, temperature, request.seed),
            tab=tab,
            modality=modality,
            start_seconds=caption.start_seconds,
            end_seconds=caption.end_seconds,
            reference=reference_caption(reference, modality) if reference and not caption.prompt else "",
        ),
        request.path,
    )
    count(state, shown.shown)
    return shown


def count(state: AppState, feedback: Feedback) -> None:
    """Save that captions were shown or copied, with nothing about them but their models."""
    models = [Candidate(one.model, "", "", temperature=one.temperature) for one in feedback.captions]
    first, second = [*models, None][:2]
    assert first
    try:
        state.feedback.add(Feedback(feedback.date, feedback.action, "", first, second, tab=feedback.tab))
    except OSError as error:  # the caption is shown anyway
        logger.warning("cannot count a caption as %s: %s", feedback.action, error)


def check_own_text(state: AppState, text: str | None, *, name: str) -> str:
    """Return a text that a person wrote, which any model can be trained on; `name` is for the error message.

    Raises:
        ValueError: it is too long, or contains special tokens.
    """
    text = check_text(text or "", name=name).strip()
    try:
        for engine in state.engines.values():
            engine.captioner.processor.check_prompt(text)
    except ValueError as error:
        raise ValueError(str(error).replace("the prompt", name)) from error
    return text


def check_rater(rater: str | None) -> str:
    """Return the browser's id, "" if it stores none; raises ValueError if it is none of ours."""
    if rater and not RATER_ID.fullmatch(rater):
        raise ValueError("the id of this browser is damaged: delete the site's data and try again")
    return rater or ""


def explain_unused(feedback: Feedback, *, may_keep: bool) -> str:
    """Return why saved feedback is not used for training; "" if it is."""
    reason = find_unused_reason(feedback)
    if reason and not find_unused_reason(replace(feedback, kept_video="any")):
        return "the video has been deleted" if may_keep else "you did not agree to keep the video"
    return reason


def render_saved(feedback: Feedback, message: str) -> str:
    """Render what became of feedback, with the browser's id."""
    saved = f'<p class="verdict">{escape(message)}</p>'
    if not feedback.rater:
        return saved
    return (
        f'{saved}<p class="note">To have your feedback deleted, give this id to the operator of this page: '
        f"<code>{feedback.rater}</code></p>"
    )


class FeedbackPanel:
    """Lays out the rating of a caption and handles its events.

    Args:
        state: the shared state.
    """

    def __init__(self, state: AppState) -> None:
        self.state = state
        with gr.Column(visible=False, elem_id="rating", elem_classes=["voting"]) as self.panel:
            with gr.Accordion("What is wrong or missing? (optional)", open=False, elem_classes=["fold"]):
                self.wrong = gr.CheckboxGroup([], label="These parts are wrong", elem_id="wrong")
                self.rest = gr.Checkbox(False, label="All other parts are right")
                self.missing = gr.Textbox(
                    label="What is missing, in sentences", lines=2, max_lines=8, elem_id="missing",
                    placeholder="A dog barks in the background.",
                )  # fmt: skip
            self.consent = gr.Checkbox(False, label=CONSENT, visible=False)
            with gr.Row(elem_classes=["votes"]):
                self.good = gr.Button("Good caption", elem_id="rate-good", min_width=120)
                self.bad = gr.Button("Bad caption", elem_id="rate-bad", min_width=120)
            self.status = gr.HTML("", elem_id="rating-status")
            gr.HTML(f'<p class="note">{PRIVACY}</p>')
        self.caption = gr.State(None)

    @property
    def outputs(self) -> list[Any]:
        """Components that `open` and `close` update."""
        return [self.panel, self.wrong, self.rest, self.missing, self.consent, self.status, self.caption]

    def connect(self) -> None:
        """Connect the buttons; called when all other components of the tab exist, as inputs are sorted by creation."""
        self.rater = gr.Textbox(visible=False)  # the browser's id
        inputs: set[Any] = {self.wrong, self.rest, self.missing, self.consent, self.caption, self.rater}
        actions: Mapping[Literal["good", "bad"], gr.Button] = {"good": self.good, "bad": self.bad}
        for action, button in actions.items():
            button.click(partial(self.rate, action), inputs, self.status, js=WITH_RATER, **GENERATE)

    def open(self, shown: ShownCaption) -> Update:
        """Offer to rate a caption."""
        text = shown.shown.first.text
        clauses = [(text[start:end], f"{start}-{end}") for start, end in find_clauses(text)]
        is_upload = self.state.example_of(shown.path) is None
        return self.close() | {
            self.panel: gr.update(visible=True),
            self.wrong: gr.update(choices=clauses, value=[]),
            self.consent: gr.update(visible=is_upload, value=False),
            self.caption: shown,
        }

    def close(self) -> Update:
        """Remove the rating."""
        return {
            self.panel: gr.update(visible=False),
            self.wrong: gr.update(choices=[], value=[]),
            self.rest: False,
            self.missing: "",
            self.consent: gr.update(visible=False, value=False),
            self.status: "",
            self.caption: None,
        }

    def rate(self, action: Literal["good", "bad"], values: Mapping[Any, Any]) -> str:
        """Save a rating with its marks, and return what became of it; a later rating replaces it."""
        shown: ShownCaption | None = values[self.caption]
        if shown is None:
            return render_error("the caption is no longer available: press Describe again")
        try:
            missing = check_own_text(self.state, values[self.missing], name="your text")
            rater = check_rater(values[self.rater])
        except ValueError as error:
            return render_error(str(error))
        wrong = set(values[self.wrong] or [])
        marks = [Mark(*span, is_right=False) for span in find_clauses(shown.shown.first.text)]
        marks = [replace(mark, is_right=f"{mark.start}-{mark.end}" not in wrong) for mark in marks]
        kept = tuple(mark for mark in marks if values[self.rest] or not mark.is_right)
        rating = shown.to_feedback(action=action, marks=kept, missing=missing, rater=rater)
        may_keep = bool(values[self.consent]) or self.state.example_of(shown.path) is not None
        try:
            rating = self.state.feedback.add(rating, shown.path if may_keep else None)
        except OSError as error:
            return render_error(f"the rating could not be saved: {error_message(error, shown.path)}")
        if reason := explain_unused(rating, may_keep=may_keep):
            return render_saved(rating, f"Rating saved, but not used for training because {reason}.")
        return render_saved(rating, "Rating saved. It can be used for training.")
