"""Render records as HTML. All text of models and users is escaped."""

from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from salmonn.preference.feedback_report import FeedbackSummary
from salmonn.preference.mixture import RaterGroup
from salmonn.records import Caption, Event, Score
from salmonn.score.highlight import find_missed_events, highlight_caption
from salmonn.templates import load_template
from salmonn.webui.chooser import ChosenCaption
from salmonn.webui.scorer import CaptionAnalysis
from salmonn.webui.segments import Segment
from salmonn.webui.session import error_message


@cache
def _macros() -> Any:
    path = Path(__file__).with_name("rendering.html.jinja")
    return load_template(path, percent=lambda value: f"{100 * value:.1f} %", span=_span, clock=_clock).module


def plural(number: int, noun: str) -> str:
    """Return a number with its noun, such as "1 word" or "1,200 words"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def render_placeholder(title: str, text: str) -> str:
    """Render what is shown before there is any content."""
    return str(_macros().placeholder(title, text))


def render_error(message: str) -> str:
    """Render an error message as a sentence; a first word that is a name (run/votes, clip.mp4) is not capitalized."""
    is_word = message.partition(" ")[0].isalpha()
    return str(_macros().error(message[:1].upper() + message[1:] if is_word else message))


def render_caption(text: str, *, is_growing: bool = False, finished: bool = True) -> str:
    """Render a caption, or the part of it that has arrived."""
    return str(_macros().caption(text, is_growing, not (finished or is_growing)))


def render_file_notice(caption: Caption) -> str:
    """Render what was lost or guessed when the caption's file was read; "" if nothing was."""
    return str(_macros().file_notice(caption.complete, caption.warnings))


def render_segments(segments: Sequence[Segment], *, path: Path, is_cut: bool = False) -> str:
    """Render captions of segments, with times to play from.

    Args:
        segments: segments in order of time; of errors, only what users may see is shown.
        path: path of the video, which errors name.
        is_cut: whether captions were cut off at the token limit.
    """
    errors = [error_message(ValueError(one.error), path) for one in segments]
    return str(_macros().segments(list(zip(segments, errors, strict=True)), is_cut))


def render_thread(turns: Sequence[tuple[str, str]], *, is_growing: bool = False) -> str:
    """Render questions and answers; the last answer may be growing."""
    return str(_macros().thread(turns, is_growing)) if turns else ""


def render_note(sentence: str) -> str:
    """Render a sentence in small print."""
    return str(_macros().notes([sentence]))


def render_reason(chosen: ChosenCaption) -> str:
    """Render why a caption was chosen among several."""
    return str(_macros().reason(chosen))


def render_downloads(files: Mapping[str, str], *, stem: str) -> str:
    """Render links to files that the page itself contains.

    Args:
        files: contents by suffix.
        stem: name of the files without suffix.
    """
    links = {suffix: f"data:text/plain;charset=utf-8,{quote(text)}" for suffix, text in sorted(files.items())}
    return str(_macros().downloads(links, stem))


def render_scored_caption(analysis: CaptionAnalysis) -> str:
    """Render a caption, with highlights if it has a score."""
    if analysis.score is None:
        return render_caption(analysis.caption.text, finished=analysis.caption.finished)
    highlights = highlight_caption(analysis.caption.text, analysis.score)
    return str(_macros().highlighted(highlights, not analysis.caption.finished))


def render_score(score: Score) -> str:
    """Render the figures of a score."""
    return str(_macros().figures(score))


def render_analysis(analysis: CaptionAnalysis, *, judge: str) -> str:
    """Render the score and the events of a caption, and the notes on what is missing."""
    parts = [_macros().notes(analysis.notes)]
    if analysis.score and analysis.reference:
        missing = [
            event or Event(text) for text, event in find_missed_events(analysis.score, analysis.reference.events)
        ]
        parts.append(_macros().scored(analysis.score, missing, judge))
    if analysis.events:
        parts.append(_macros().events(analysis.events))
    return "".join(map(str, parts))


def render_candidate(
    letter: str, text: str, *, model: str = "", score: Score | None = None, is_choice: bool = False
) -> str:
    """Render one of two captions; model and score are given after the vote."""
    return str(_macros().candidate(letter, text, model, score, is_choice))


def render_results(summary: FeedbackSummary, *, folder: Path, groups: Sequence[RaterGroup] = ()) -> str:
    """Render the summary of all feedback, and groups of raters if they are known."""
    return str(_macros().results(summary, folder.name, groups))


def render_run(page: str) -> str:
    """Render the HTML page of a training run in a sandboxed frame; app.js fits its height to the content."""
    return (
        f'<iframe class="run" title="Training run" sandbox="allow-same-origin" loading="eager" '
        f'srcdoc="{escape(page, quote=True)}"></iframe>'
    )


def _span(event: Event) -> str:
    """Format a time span, for example "1.5-2.0 s" with an en dash."""
    assert event.start_seconds is not None
    if event.end_seconds is None or event.end_seconds <= event.start_seconds:
        return f"{event.start_seconds:.1f} s"
    return f"{event.start_seconds:.1f}\N{EN DASH}{event.end_seconds:.1f} s"


def _clock(seconds: float) -> str:
    """Format a time like video players, in whole seconds: "1:05"."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
