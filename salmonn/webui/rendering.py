"""The page's parts as HTML, from records; all text of models and visitors is escaped."""

from collections.abc import Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from salmonn.preference.vote_results import VoteSummary
from salmonn.records import Event, Score
from salmonn.score.highlight import highlight_caption
from salmonn.templates import load_template
from salmonn.webui.scorer import CaptionAnalysis

_DASH = "\N{EN DASH}"


@cache
def _macros() -> Any:
    return load_template(Path(__file__).with_name("rendering.html.jinja"), percent=_percent, span=_span).module


def show_empty(title: str, words: str) -> str:
    """What stands where nothing is yet: what to do."""
    return str(_macros().empty(title, words))


def show_trouble(words: str) -> str:
    """What went wrong, and what helps."""
    return str(_macros().trouble(words[:1].upper() + words[1:]))


def show_caption(text: str, *, growing: bool = False, finished: bool = True) -> str:
    """A caption, or as much of it as has come."""
    return str(_macros().caption(text, growing, not (finished or growing)))


def show_marked(found: CaptionAnalysis) -> str:
    """A caption, marked by its score where it has one."""
    if found.score is None:
        return show_caption(found.caption.text, finished=found.caption.finished)
    return str(_macros().marked(highlight_caption(found.caption.text, found.score), not found.caption.finished))


def show_findings(found: CaptionAnalysis, *, judge: str) -> str:
    """The score and the events of a caption, and why one of them is not there."""
    parts = [_macros().notes(found.notes)]
    if found.score and found.reference:
        parts.append(_macros().scored(found.score, missed_events(found.reference.events, found.score), judge))
    if found.events:
        parts.append(_macros().events(found.events))
    return "".join(map(str, parts))


def missed_events(events: Sequence[Event], score: Score) -> list[Event]:
    """The missed events with their times and kinds; an event that two share the text of is taken once each."""
    left = list(events)
    for mention in score.mentions:
        if mention.event in left:
            left.remove(mention.event)
    missed = []
    for text in score.missed:
        event = next((event for event in left if event.text == text), Event(text))
        if event in left:
            left.remove(event)
        missed.append(event)
    return missed


def show_side(letter: str, text: str, *, who: str = "", score: Score | None = None, is_choice: bool = False) -> str:
    """One of two captions; whose it is and how it scores are told after the vote."""
    return str(_macros().side(letter, text, who, score, is_choice))


def show_results(summary: VoteSummary, *, folder: Path) -> str:
    """What all votes say."""
    return str(_macros().results(summary, folder.name))


def show_run(page: str) -> str:
    """The page of a run, in a frame of its own where nothing can run; app.js makes it as high as it is."""
    return (
        f'<iframe class="run" title="Training run" sandbox="allow-same-origin" loading="eager" '
        f'srcdoc="{escape(page, quote=True)}"></iframe>'
    )


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _span(event: Event) -> str:
    """1.5-2.0 s"""
    assert event.start_seconds is not None
    if event.end_seconds is None or event.end_seconds <= event.start_seconds:
        return f"{event.start_seconds:.1f} s"
    return f"{event.start_seconds:.1f}{_DASH}{event.end_seconds:.1f} s"
