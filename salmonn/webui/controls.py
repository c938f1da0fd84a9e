"""The input components that the tabs share: file, prompt and options."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from salmonn.caption.captioner import Captioner
from salmonn.caption.generator import CaptionRequest, Sampling, Span
from salmonn.caption.segments import FixedSegments, SegmentRule, ShotSegments
from salmonn.media.clip import AUDIO_SUFFIXES, VIDEO_SUFFIXES
from salmonn.records import Modality
from salmonn.webui.session import ActiveRequests, AppState

QUESTION = "Ask a question"
MODALITIES: Mapping[str, Modality] = {"Video and audio": "both", "Video only": "visual", "Audio only": "audio"}
WHOLE_CLIP = "Whole clip"
SEGMENTS: Mapping[str, float] = {"5 s": 5.0, "10 s": 10.0, "30 s": 30.0}
SHOT = "Shot"
MAX_TEXT_CHARS = 20_000
MAX_NEW_TOKENS = 4096
RECORDINGS = {"camera": "Record video", "microphone": "Record sound"}
MAX_RECORDING_SECONDS = 600.0  # if clips may have any duration
Update = dict[Any, Any]
NO_VIDEO = "choose an example, or drop a video or sound file of your own first"

# Options of event listeners that only update the page: no progress bar, and no public API endpoint.
QUIET: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
# Options of event listeners that generate text: any number may run at once, as the engine queues them.
GENERATE: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}

# JavaScript: the inputs of an event, with its time as the last one, since events may arrive in another order.
WITH_TIME = "[...inputs.slice(0, -1), performance.now()]"


@dataclass(frozen=True)
class Controls:
    """The components of one tab that define a request. 0 stands for the default of start, end and penalty."""

    modality: gr.Radio
    question: gr.Textbox
    segments: gr.Radio
    min_shot: gr.Number
    start: gr.Number
    end: gr.Number
    temperature: gr.Slider
    top_p: gr.Slider
    max_new_tokens: gr.Slider
    repetition_penalty: gr.Number
    seed: gr.Number

    @property
    def components(self) -> set[Any]:
        """All components, as inputs of an event listener."""
        return set(vars(self).values())

    def segment_rule(self, values: Mapping[Any, Any]) -> SegmentRule | None:
        """Return how the clip is split into segments that are captioned separately; None for one caption of the clip.

        Raises:
            ValueError: the length of the shortest shot is not a number from 0.
        """
        if values[self.segments] == SHOT:
            return ShotSegments(min_seconds=_to_float(values[self.min_shot], name="the shortest shot"))
        seconds = SEGMENTS.get(values[self.segments])
        return None if seconds is None else FixedSegments(seconds)

    def to_request(self, values: Mapping[Any, Any], path: Path) -> CaptionRequest:
        """Build a request from the components' values.

        Raises:
            ValueError: a value is out of range, or the question is empty.
        """
        prompt = None
        if values[self.modality] == QUESTION:
            prompt = check_text(values[self.question] or "", name="the question").strip()
            if not prompt:
                raise ValueError("enter a question, or choose what to describe")
        max_new_tokens = _to_int(values[self.max_new_tokens], name="max tokens")
        if max_new_tokens > MAX_NEW_TOKENS:
            raise ValueError(f"max tokens must be at most {MAX_NEW_TOKENS}, got {max_new_tokens}")
        sampling = Sampling(
            temperature=_to_float(values[self.temperature], name="temperature"),
            top_p=_to_float(values[self.top_p], name="top_p"),
            max_new_tokens=max_new_tokens,
            repetition_penalty=_to_float(values[self.repetition_penalty] or 0, name="the repetition penalty") or None,
        )
        start = _to_float(values[self.start] or 0, name="start")
        end = _to_float(values[self.end] or 0, name="end")
        return CaptionRequest(
            path,
            prompt=prompt,
            sampling=sampling,
            span=Span(start or None, end or None),
            modality=MODALITIES.get(values[self.modality], "both"),
            seed=_to_int(values[self.seed] or 0, name="the seed"),
        )


def media_input(state: AppState, *, tab: str) -> gr.File:
    """Add a component for uploads, with a player and the examples below it.

    The browser itself chooses examples, shows the player and records, so that none of these waits for the server.

    Args:
        state: the shared state.
        tab: name of the tab; a session uses one file per tab.
    """
    max_seconds = state.engines[state.default_model].max_seconds or MAX_RECORDING_SECONDS
    with gr.Column(elem_id=f"{tab}-video", elem_classes=["media-input"]):
        file = gr.File(
            file_types=["video", "audio", *sorted(VIDEO_SUFFIXES | AUDIO_SUFFIXES)], height=220, show_label=False,
            label="Video or sound file",
        )  # fmt: skip
        # Its own method creates a temporary file whenever the value is read.
        file.preprocess = _file_path  # type: ignore[method-assign]
        player = gr.HTML("", elem_classes=["player"], padding=False)
        with gr.Row(elem_classes=["recording"]):
            for kind, label in RECORDINGS.items():
                button = gr.Button(label, size="sm", elem_classes=[kind])
                record = f"() => window.salmonn.record('{tab}', '{kind}', {max_seconds:g})"
                button.click(None, None, file, js=record, **QUIET)
    with gr.Row(elem_classes=["examples"]):
        for index, example in enumerate(state.examples):
            button = gr.Button(f"Example {index + 1}", icon=str(example.still), size="sm", min_width=64)
            choose = f"() => window.salmonn.example({examples_as_json(state)}[{index}])"
            button.click(None, None, file, js=choose, **QUIET)

    def retain(path: str | None, request: gr.Request) -> None:
        state.uploads.retain(str(request.session_hash), tab, Path(path) if path else None)

    file.change(None, file, player, js=f"(file) => window.salmonn.player('{tab}', file)", **QUIET)
    file.change(retain, file, None, **QUIET)
    return file


def examples_as_json(state: AppState) -> str:
    """Return path, still and size in bytes of the examples, as a JSON list for app.js."""
    return json.dumps([[str(one.path), str(one.still), one.path.stat().st_size] for one in state.examples])


def on_click(tab: str, *, reveal: str = "") -> str:
    """Return JavaScript for a button that starts a request: it returns the inputs, with the time as the last one.

    Args:
        tab: name of the tab.
        reveal: CSS selector of the element that is scrolled into view on a phone; empty for none.
    """
    return f"(...inputs) => window.salmonn.start('{tab}', inputs, '{reveal}')"


def clear_on_change(video: gr.File, time: gr.Number, requests: ActiveRequests, *, tab: str, cleared: Update) -> None:
    """Cancel a tab's request and clear its components when another video is chosen.

    The server decides, and the browser clears what it shows: the decision may arrive after the answer to a click that
    followed the change, and must not replace that answer.

    Args:
        video: file component.
        time: hidden component for the time of an event in the browser.
        requests: active requests of the tab.
        tab: name of the tab.
        cleared: component -> its value or update without an answer.
    """
    states = [component for component in cleared if isinstance(component, gr.State)]
    shown = {component: update for component, update in cleared.items() if component not in states}
    decided = gr.Number(visible=False)  # time of the change that was decided on; 0 if nothing is cleared

    def cancel(path: str | None, changed: float | None, request: gr.Request) -> list[Any]:
        if requests.switch_video(str(request.session_hash), path, changed=changed):
            return [changed, *(cleared[state] for state in states)]
        return [0.0, *(gr.skip() for _ in states)]

    decision = video.change(cancel, [video, time], [decided, *states], js=f"(...inputs) => {WITH_TIME}", **QUIET)
    clear = f"(decided) => window.salmonn.clear('{tab}', decided, {json.dumps(list(shown.values()))})"
    decision.then(None, decided, list(shown), js=clear, **QUIET)


def _file_path(payload: Any) -> str | None:
    return payload.path if payload else None


def prompt_inputs() -> tuple[gr.Radio, gr.Textbox]:
    """Add the choice of what to describe, and a text box for a question."""
    choices = [*MODALITIES, QUESTION]
    modality = gr.Radio(choices, value=choices[0], label="Describe", elem_classes=["pills"])
    question = gr.Textbox(label="Your question", placeholder="What is heard at the end?", lines=2, visible=False)
    # In the browser: an answer of the server may arrive while the user types, and Gradio then drops what is typed.
    show = f"(choice) => ({{__type__: 'update', visible: choice === {json.dumps(QUESTION)}}})"
    modality.change(None, modality, question, js=show, **QUIET)
    return modality, question


def option_inputs(
    prompt: tuple[gr.Radio, gr.Textbox], captioner: Captioner, *, temperature: float, is_comparison: bool = False
) -> Controls:
    """Add the other options, in a closed accordion.

    Args:
        prompt: the components of `prompt_inputs`.
        captioner: model whose default length is the initial value.
        temperature: initial temperature.
        is_comparison: whether two captions are generated: of the whole clip, with a random seed.
    """
    tokens = captioner.default_sampling().max_new_tokens
    with gr.Accordion("Options", open=False, elem_classes=["fold"]):
        shots = [SHOT] if ShotSegments().is_installed else []
        segments = gr.Radio(
            [WHOLE_CLIP, *SEGMENTS, *shots], value=WHOLE_CLIP, label="One caption for each", visible=not is_comparison,
            elem_classes=["pills"],
        )  # fmt: skip
        min_shot = gr.Number(
            ShotSegments.min_seconds, label="Shortest shot (seconds)", minimum=0, step=0.5, min_width=110,
            info="shorter shots are merged with the next one", visible=False,
        )  # fmt: skip
        # In the browser, as for the question.
        show = f"(choice) => ({{__type__: 'update', visible: choice === {json.dumps(SHOT)}}})"
        segments.change(None, segments, min_shot, js=show, **QUIET)
        with gr.Row():
            start = gr.Number(0, label="Start (seconds)", minimum=0, min_width=110)
            end = gr.Number(0, label="End (seconds)", info="0 = end of the video", minimum=0, min_width=110)
        with gr.Row():
            heat = gr.Slider(0, 2, temperature, step=0.05, label="Temperature", info="0 = always the most likely word")
            top_p = gr.Slider(0.05, 1, 0.9, step=0.05, label="top_p", info="nucleus sampling threshold")
        with gr.Row():
            length = gr.Slider(8, max(512, tokens), tokens, step=8, label="Max tokens", info="length limit of answers")
        with gr.Row():
            penalty = gr.Number(0, label="Repetition penalty", info="0 = model default", minimum=0, min_width=110)
            seed = gr.Number(0, label="Random seed", precision=0, min_width=110, visible=not is_comparison)
    return Controls(*prompt, segments, min_shot, start, end, heat, top_p, length, penalty, seed)


def check_text(text: str, *, name: str) -> str:
    """Return a text; raises ValueError if it is too long, or contains an unpaired surrogate, which cannot be saved."""
    if len(text) > MAX_TEXT_CHARS:
        raise ValueError(f"{name} has {len(text):,} characters; the maximum is {MAX_TEXT_CHARS:,}")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{name} contains half of a Unicode character: type it again")
    return text


def _to_float(value: float | None, *, name: str) -> float:
    if value is None:
        raise ValueError(f"{name} is empty: enter a number")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a number, got {value}")
    return float(value)


def _to_int(value: float | None, *, name: str) -> int:
    number = _to_float(value, name=name)
    if number != int(number):
        raise ValueError(f"{name} must be a whole number, got {number}")
    return int(number)
