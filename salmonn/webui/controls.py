"""How a model is asked: the controls that the tabs share, and what visitors have set there."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from salmonn.caption.captioner import Captioner, Span
from salmonn.caption.engine import CaptionRequest
from salmonn.caption.generate import Sampling
from salmonn.records import Modality

OWN_WORDS = "Own words"
WANTED: Mapping[str, Modality] = {"Picture and sound": "both", "Picture": "visual", "Sound": "audio"}
MAX_PROMPT_CHARS = 20_000  # of what they may write
MOST_TOKENS = 4096  # that a visitor may ask for: the draws of an answer are made before it begins


@dataclass(frozen=True)
class Controls:
    """Of one tab. An end of the span, or a penalty, of 0 or none at all is the video's and the model's own."""

    wanted: gr.Radio
    words: gr.Textbox
    start: gr.Number
    end: gr.Number
    temperature: gr.Slider
    top_p: gr.Slider
    longest: gr.Slider
    penalty: gr.Number
    seed: gr.Number

    @property
    def components(self) -> set[Any]:
        """All of them, as inputs."""
        return set(vars(self).values())

    def query(self, values: Mapping[Any, Any], path: Path) -> CaptionRequest:
        """What a visitor asks of a file.

        Raises:
            ValueError: a value is out of range, or there are no words.
        """
        prompt = None
        if values[self.wanted] == OWN_WORDS:
            prompt = require_words(values[self.words] or "", name="your question").strip()
        if prompt == "":
            raise ValueError("write what you want to know under Own words, or choose a description")
        longest = _whole(values[self.longest], name="the longest answer")
        if longest > MOST_TOKENS:
            raise ValueError(f"the longest answer may be {MOST_TOKENS} tokens, got {longest}")
        sampling = Sampling(
            temperature=_number(values[self.temperature], name="temperature"),
            top_p=_number(values[self.top_p], name="top_p"),
            max_new_tokens=longest,
            repetition_penalty=_number(values[self.penalty] or 0, name="the repetition penalty") or None,
        )
        return CaptionRequest(
            path,
            prompt=prompt,
            sampling=sampling,
            span=Span(
                _number(values[self.start] or 0, name="From second") or None,
                _number(values[self.end] or 0, name="To second") or None,
            ),
            modality=WANTED.get(values[self.wanted], "both"),
            seed=_whole(values[self.seed] or 0, name="the seed"),
        )


def add_wanted() -> tuple[gr.Radio, gr.Textbox]:
    """What is asked: a choice, and a place for a visitor's own words."""
    wanted = gr.Radio([*WANTED, OWN_WORDS], value=next(iter(WANTED)), label="Describe", elem_classes=["pills"])
    words = gr.Textbox(label="Your question", placeholder="What is heard at the end?", lines=2, visible=False)
    wanted.change(lambda choice: gr.update(visible=choice == OWN_WORDS), wanted, words, **QUIET)
    return wanted, words


def add_controls(
    asked: tuple[gr.Radio, gr.Textbox], captioner: Captioner, *, temperature: float, is_seeded: bool = True
) -> Controls:
    """Lay out the other controls, folded.

    Args:
        asked: what `add_wanted` gave.
        captioner: whose limit of length is taken at first.
        temperature: at first.
        is_seeded: whether visitors choose the seed.
    """
    with gr.Accordion("Span and sampling", open=False, elem_classes=["fold"]):
        with gr.Row():
            start = gr.Number(0, label="From second", info="of the video", minimum=0, min_width=110)
            end = gr.Number(0, label="To second", info="0: to its end", minimum=0, min_width=110)
        with gr.Row():
            heat = gr.Slider(0, 2, temperature, step=0.05, label="Temperature", info="0: the likeliest words")
            top_p = gr.Slider(0.05, 1, 0.9, step=0.05, label="Nucleus (top_p)", info="share of words to draw from")
        with gr.Row():
            longest = captioner.default_sampling().max_new_tokens
            most = gr.Slider(8, max(512, longest), longest, step=8, label="Longest answer", info="in tokens")
        with gr.Row():
            penalty = gr.Number(0, label="Repetition penalty", info="0: the model's own", minimum=0, min_width=110)
            seed = gr.Number(0, label="Seed", info="of the draw", precision=0, min_width=110, visible=is_seeded)
    return Controls(*asked, start, end, heat, top_p, most, penalty, seed)


# Of events that are no answers: without a bar of progress, and not offered to programs.
QUIET: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}


def _number(value: float | None, *, name: str) -> float:
    if value is None:
        raise ValueError(f"{name} is empty: give a number")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a number, got {value}")
    return float(value)


def require_words(text: str, *, name: str) -> str:
    """What a visitor wrote; raises a ValueError where it is longer than is taken, or no text that can be kept."""
    if len(text) > MAX_PROMPT_CHARS:
        raise ValueError(f"{name} has {len(text):,} letters: at most {MAX_PROMPT_CHARS:,} are taken")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"{name} holds half of a Unicode character: type it anew")
    return text


def _whole(value: float | None, *, name: str) -> int:
    number = _number(value, name=name)
    if number != int(number):
        raise ValueError(f"{name} must be a whole number, got {number}")
    return int(number)
