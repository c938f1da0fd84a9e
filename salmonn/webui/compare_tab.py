"""The tab Compare: two captions of one clip, without their models; votes become training data."""

import logging
import random
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from salmonn.caption.engine import Overloaded
from salmonn.caption.generator import CaptionRequest
from salmonn.caption.streaming import Completion
from salmonn.preference.feedback import Candidate, Choice, Feedback, utc_now
from salmonn.records import Modality, Reference, Score
from salmonn.webui.controls import (
    GENERATE,
    NO_VIDEO,
    QUIET,
    Update,
    clear_on_change,
    examples_as_json,
    media_input,
    on_click,
    option_inputs,
    prompt_inputs,
)
from salmonn.webui.feedback_panel import (
    CONSENT,
    PRIVACY,
    WITH_RATER,
    check_own_text,
    check_rater,
    count,
    explain_unused,
    render_saved,
)
from salmonn.webui.rendering import render_candidate, render_error, render_placeholder
from salmonn.webui.scorer import reference_caption
from salmonn.webui.session import ActiveRequest, ActiveRequests, AppState, error_message, to_caption

logger = logging.getLogger(__name__)
PLACEHOLDER = render_placeholder(
    "Two captions, side by side", "Choose an example, or drop a video or sound file, then press Compare."
)
# Each has a key of the keyboard, as app.js and app.css know by the ids of the buttons.
KEYS: Mapping[Choice, str] = {"first": "a", "second": "b", "tie": "t", "both bad": "n"}
CHOICES: Mapping[Choice, str] = {
    "first": "A is better",
    "second": "B is better",
    "tie": "Tie",
    "both bad": "Both bad",
}
QUESTION = '<p class="lead">Which caption describes the video better? Models are revealed after you vote.</p>'
READING = '<p class="lead busy">Watching and listening</p>'
STOPPED = render_placeholder("Stopped", "Press Compare to start again.")
ON_CLICK = on_click("compare", reveal="#comparison")


@dataclass(frozen=True)
class ScoredCandidate:
    """A candidate with its score; None without a reference."""

    candidate: Candidate
    score: Score | None = None


@dataclass(eq=False)
class ComparisonState:
    """The comparison that a session votes on; `claim` admits a single vote.

    Args:
        first, second: captions A and B.
        request: request of the captions.
        modality: what of the video they describe: streams that it has.
        reference: reference of the video, if it is known.
        shown: monotonic time, in seconds.
    """

    first: ScoredCandidate
    second: ScoredCandidate
    request: CaptionRequest
    modality: Modality
    reference: Reference | None
    shown: float = field(default_factory=time.monotonic)
    _free: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(1))

    def claim(self) -> bool:
        """Return whether this is the first vote."""
        return self._free.acquire(blocking=False)

    def __deepcopy__(self, memo: object) -> "ComparisonState":
        return self  # Gradio may copy a session's state, but there is one vote only


class CompareTab:
    """Lays out the tab and handles its events."""

    def __init__(self, state: AppState) -> None:
        self.state = state
        models = list(state.engines)
        # Label -> models of both captions.
        self.matchups = {f"{models[0]} vs. {models[1]}": (models[0], models[1])} if len(models) == 2 else {}
        self.matchups |= {f"{model} vs. itself (two samples)": (model, model) for model in models}
        self.requests = ActiveRequests()
        with gr.Row(elem_classes=["columns"], equal_height=False):
            with gr.Column(scale=5, min_width=320):
                self.video = media_input(state, tab="compare")
                self.matchup = gr.Radio(
                    list(self.matchups), value=next(iter(self.matchups)), label="Compare",
                    visible=len(self.matchups) > 1, elem_classes=["pills"],
                )  # fmt: skip
                prompt = prompt_inputs()
                with gr.Row(elem_classes=["actions"]):
                    self.start = gr.Button("Compare", variant="primary", elem_id="compare", scale=3)
                    self.stop = gr.Button("Stop", elem_id="stop-comparing", visible=False, scale=1)
                captioner = state.engines[state.default_model].captioner
                self.controls = option_inputs(prompt, captioner, temperature=0.8, is_comparison=True)
            with gr.Column(scale=6, min_width=320, elem_id="comparison"):
                self._add_voting()
        self.comparison = gr.State(None)
        self.time = gr.Number(visible=False)  # of an event in the browser
        self.rater = gr.Textbox(visible=False)  # the browser's id
        self._connect()

    def _add_voting(self) -> None:
        self.status = gr.HTML(PLACEHOLDER, elem_id="comparison-status")
        with gr.Row(elem_classes=["candidates"], equal_height=True):
            self.first = gr.HTML("", elem_id="first", visible=False)
            self.second = gr.HTML("", elem_id="second", visible=False)
        with gr.Column(visible=False, elem_classes=["voting"]) as self.voting:
            with gr.Accordion("Write a correct caption (optional)", open=False, elem_classes=["fold"]):
                self.edit = gr.Textbox(
                    label="Your caption", show_label=False, lines=4, max_lines=12, elem_id="edit",
                    info="Your text is used as the ground truth when training.",
                )  # fmt: skip
                with gr.Row(elem_classes=["actions"]):
                    self.from_first = gr.Button("Start from A", size="sm")
                    self.from_second = gr.Button("Start from B", size="sm")
            self.consent = gr.Checkbox(False, label=CONSENT, elem_id="consent", visible=False)
            with gr.Row(elem_classes=["votes"]):
                self.votes = {
                    choice: gr.Button(label, elem_id=f"vote-{KEYS[choice]}", min_width=120)
                    for choice, label in CHOICES.items()
                }
            gr.HTML(f'<p class="note">{PRIVACY}</p>')
        self.next = gr.Button("Next pair", elem_id="next-pair", visible=False)

    def _connect(self) -> None:
        inputs = {self.video, self.matchup, *self.controls.components, self.time}
        outputs = [
            self.status, self.first, self.second, self.voting, self.comparison, self.start, self.stop, self.next,
            self.edit,
        ]  # fmt: skip
        started = self.start.click(self.compare, inputs, [*outputs, self.consent], js=ON_CLICK, **GENERATE)
        self.stop.click(self.stop_request, None, None, **QUIET)
        choose_next = f"(file) => window.salmonn.nextExample(file, {examples_as_json(self.state)})"
        continued = self.next.click(None, self.video, self.video, js=choose_next, **QUIET).then(
            self.compare, inputs, [*outputs, self.consent], js=ON_CLICK, **GENERATE
        )
        for event in (started, continued):  # before the captions are there, the page may be too short to scroll
            event.then(None, None, None, js="() => window.salmonn.reveal('#comparison')", **QUIET)
        clear_on_change(self.video, self.time, self.requests, tab="compare", cleared=self._clear())
        for choice, button in self.votes.items():
            given: set[Any] = {self.comparison, self.edit, self.consent, self.rater}
            voted = button.click(self._on_vote(choice), given, outputs, js=WITH_RATER, **GENERATE)
            if self.state.chooser and self.state.chooser.is_personal:  # so that the next caption need not wait for it
                voted.then(self.fit, self.rater, None, js="() => [window.salmonn.rater()]", **GENERATE)
        for button, side in ((self.from_first, "first"), (self.from_second, "second")):
            button.click(partial(_candidate_text, side), self.comparison, self.edit, **QUIET)

    def compare(self, values: Mapping[Any, Any], request: gr.Request) -> Iterator[Update]:
        """Generate two captions and show them in random order."""
        if not values[self.video]:
            yield self._show_error(NO_VIDEO)
            return
        path, session = Path(values[self.video]), str(request.session_hash)
        active = self.requests.start(session, path, clicked=values[self.time])
        comparison = None
        try:
            models = self.matchups[values[self.matchup]]
            seed = random.SystemRandom().randrange(1 << 31)
            caption_request = replace(self.controls.to_request(values, path), seed=seed)
            if models[0] == models[1] and caption_request.sampling and not caption_request.sampling.temperature:
                raise ValueError("two samples of one model are equal at temperature 0: increase it under Options")
            yield self._clear() | {
                self.status: READING,
                self.start: gr.update(interactive=False),
                self.stop: gr.update(visible=True),
            }
            comparison = yield from self._generate(caption_request, models, active)
        except (ValueError, Overloaded, RuntimeError) as error:
            if not active.is_cancelled:
                yield self._show_error(error_message(error, path))
        if comparison and not active.is_cancelled:
            # The file is needed until the vote, even if another one is chosen meanwhile.
            self.state.uploads.retain(session, "comparison", path)
            first, second = comparison.first.candidate, comparison.second.candidate
            count(self.state, Feedback(utc_now(), "shown", path.name, first, second))
            yield {
                self.status: QUESTION,
                self.first: gr.update(value=render_candidate("A", comparison.first.candidate.text), visible=True),
                self.second: gr.update(value=render_candidate("B", comparison.second.candidate.text), visible=True),
                self.voting: gr.update(visible=True),
                self.consent: gr.update(visible=self.state.example_of(path) is None, value=False),
                self.comparison: comparison,
            }
        elif active.is_stopped and not active.is_cancelled:
            yield {self.status: STOPPED}
        # In a separate update, so that it happens in any case.
        yield {self.start: gr.update(interactive=True), self.stop: gr.update(visible=False)}

    def _generate(
        self, caption_request: CaptionRequest, models: tuple[str, str], active: ActiveRequest
    ) -> Generator[Update, None, ComparisonState | None]:
        """Show the progress; return the comparison, or None if it was stopped or cancelled."""

        def show(num_words: int, seconds: float) -> Update:
            # The number of words of both: that of each would tell which model wrote which caption.
            progress = f"Writing two captions, {num_words} words" if num_words else "Watching and listening"
            return {self.status: f'<p class="lead busy">{progress}, {seconds:.0f} s</p>'}

        answers = yield from self.state.collect_answers(caption_request, models, active, show)
        if not answers:
            return None
        reference = None if caption_request.prompt else self.state.reference_of(caption_request.path)
        candidates = []
        for index, model in enumerate(models):
            # A second sample of a request has the next seed.
            sample_seed = caption_request.seed + index * (models[0] == models[1])
            sampled = replace(caption_request, seed=sample_seed)
            candidates.append(self._score(model, answers[index], sampled, reference))
        random.SystemRandom().shuffle(candidates)
        modality = answers[0].clip.modality or caption_request.modality
        return ComparisonState(candidates[0], candidates[1], caption_request, modality, reference)

    def _score(
        self, model: str, answer: Completion, caption_request: CaptionRequest, reference: Reference | None
    ) -> ScoredCandidate:
        """Return an answer as a candidate, with its score if there is a reference."""
        assert caption_request.sampling is not None
        candidate = Candidate(
            model,
            answer.text,
            caption_request.prompt or self.state.engines[model].captioner.default_prompt(caption_request.modality),
            answer.finished,
            caption_request.sampling.temperature,
            caption_request.seed,
        )
        if reference is None:
            return ScoredCandidate(candidate)
        caption = to_caption(caption_request, answer, model)
        try:
            _, score = self.state.scorer.score(caption, reference, modality=caption_request.modality)
        except ValueError:  # votes do not need scores
            return ScoredCandidate(candidate)
        return ScoredCandidate(replace(candidate, total=score.total), score)

    def stop_request(self, request: gr.Request) -> None:
        """Stop the session's request. Incomplete captions are not shown, since votes on them could not be used."""
        self.requests.stop(str(request.session_hash))

    def _on_vote(self, choice: Choice) -> Callable[..., Update]:
        # Gradio passes the request only to functions with such a parameter, and does not find it in a partial.
        def vote(values: Mapping[Any, Any], request: gr.Request) -> Update:
            return self.vote(choice, values, session=str(request.session_hash))

        return vote

    def vote(self, choice: Choice, values: Mapping[Any, Any], *, session: str) -> Update:
        """Save a vote, then reveal the models."""
        comparison: ComparisonState | None = values[self.comparison]
        if comparison is None:
            return self._show_error("the captions are no longer available: press Compare again")
        try:
            edit = check_own_text(self.state, values[self.edit], name="your caption")
            rater = check_rater(values[self.rater])
        except ValueError as error:
            return {self.status: render_error(str(error))}
        if not comparison.claim():
            return {self.status: '<p class="lead">You have already voted.</p>'}
        caption_request, reference = comparison.request, comparison.reference
        span, path = caption_request.span, caption_request.path
        may_keep = bool(values[self.consent]) or self.state.example_of(path) is not None
        vote = Feedback(
            date=utc_now(),
            action="vote",
            video=path.name,
            first=comparison.first.candidate,
            second=comparison.second.candidate,
            choice=choice,
            text=edit,
            seconds=time.monotonic() - comparison.shown,
            tab="compare",
            modality=comparison.modality,
            start_seconds=span.start_seconds if span else None,
            end_seconds=span.end_seconds if span else None,
            reference=reference_caption(reference, caption_request.modality) if reference else "",
            rater=rater,
        )
        try:
            vote = self.state.feedback.add(vote, path if may_keep else None)
        except OSError as error:
            return self._show_error(f"the vote could not be saved: {error_message(error, path)}")
        finally:
            self.state.uploads.retain(session, "comparison", None)
        return self._reveal(comparison, vote, may_keep=may_keep)

    def fit(self, rater: str | None) -> None:
        """Read the clip of a new vote and fit the reward to it, for captions for the rater."""
        try:
            if self.state.chooser:
                self.state.chooser.fit(check_rater(rater))
        except (ValueError, OSError, RuntimeError) as error:  # the vote is saved
            logger.warning("a reward could not be fitted to votes: %s", error)

    def _reveal(self, comparison: ComparisonState, vote: Feedback, *, may_keep: bool) -> Update:
        """Show the models, the scores and what became of the vote."""
        update: Update = {
            self.status: render_saved(vote, vote_message(vote, may_keep=may_keep)),
            self.voting: gr.update(visible=False),
            self.comparison: None,
            self.start: gr.update(value="Compare again", interactive=True),
            self.next: gr.update(visible=bool(self.state.examples)),
            self.edit: "",
        }
        for letter, side, component in (("A", "first", self.first), ("B", "second", self.second)):
            scored: ScoredCandidate = getattr(comparison, side)
            model = f"{scored.candidate.model} (temperature {scored.candidate.temperature:g})"
            update[component] = render_candidate(
                letter, scored.candidate.text, model=model, score=scored.score, is_choice=vote.choice == side
            )
        return update

    def _show_error(self, message: str) -> Update:
        return self._clear() | {self.status: render_error(message)}

    def _clear(self) -> Update:
        return {
            self.status: PLACEHOLDER,
            self.first: gr.update(value="", visible=False),
            self.second: gr.update(value="", visible=False),
            self.voting: gr.update(visible=False),
            self.comparison: None,
            self.start: gr.update(value="Compare", interactive=True),
            self.stop: gr.update(visible=False),
            self.next: gr.update(visible=False),
            self.edit: "",
        }


def vote_message(vote: Feedback, *, may_keep: bool) -> str:
    """Describe what became of a vote."""
    if reason := explain_unused(vote, may_keep=may_keep):
        return f"Vote saved, but not used for training because {reason}."
    if vote.choice == "both bad":
        return "Vote saved. Training on ratings counts both captions as bad."
    truth = "your text" if vote.text else "the reference caption" if vote.ground_truth else ""
    return f"Vote saved. It will be used for training{f', with {truth} as ground truth' * bool(truth)}."


def _candidate_text(side: str, comparison: ComparisonState | None) -> str:
    return getattr(comparison, side).candidate.text if comparison else ""
