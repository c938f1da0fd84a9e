"""The HTML report of a scored set: rates, charts, and the worst clips with marked captions and their videos.

One file that asks no network for anything: `salmonn score ... --report report.html`. Videos that are small are inside,
others are linked by where they lie.
"""

import base64
import hashlib
import mimetypes
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from salmonn.records import Caption, Event, EventModality, JudgeInfo, Reference, Score, Unscored, write_text
from salmonn.score.highlight import Highlight, Quote, highlight_caption, locate_quotes
from salmonn.score.judge import restrict_to_span
from salmonn.score.metrics import Rates
from salmonn.templates import load_template

MODALITIES: tuple[EventModality, ...] = ("visual", "audio", "speech")
_DASH, _MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
_HERE = Path(__file__).parent
# One video, and all of them together: beyond that browsers take long to open the page.
_EMBEDDED_BYTES = 4 * 2**20
_ALL_EMBEDDED_BYTES = 48 * 2**20
_FILTERS = ("missed", "incorrect", "hallucinated", "repeated")
_HISTOGRAM_BARS = 16  # of 10 % each, the last one open
# Field of `Rates`: title, what it is.
_MEASURES = {
    "missing": ("Missing", "events that are not told"),
    "hallucination": ("Hallucination", "incorrect + hallucinated"),
    "incorrect": ("incorrect", "events that are told wrong"),
    "hallucinated": ("hallucinated", "claims that tell of no event, per event"),
    "total": ("Total", "Missing + Hallucination"),
    "repetition": ("Repetition", "words in clauses that are said again"),
    "qa_accuracy": ("QA accuracy", "questions answered rightly"),
    "cut_off": ("Cut off", "captions that ran into their token limit"),
    "audio_share": ("Audio share", "of the told events, those that are heard"),
    "order": ("Order", f"of telling against time: Kendall's tau, {_MINUS}1 to 1"),
    "words": ("Length", "words in a caption"),
}


@dataclass(frozen=True)
class Report:
    """What a report shows.

    Args:
        title: heading of the page.
        judge_info: who judged.
        rates: of the set.
        scores, unscored: of each caption.
        captions: what was scored; a score without one is shown as of a video that has no caption.
        media_dir: folder that the names of videos are relative to. A video that is not there is named only.
        intervals: name of a rate -> low and high end of its 95 % interval.
        references: by video: they give what was missed its time and its kind.
        published: name of a rate -> its value by the published arithmetic; None where it was not asked for.
        notes: sentences to be read first, for example how many videos have no caption.
        worst: how many clips are shown.
    """

    title: str
    judge_info: JudgeInfo
    rates: Rates
    scores: Sequence[Score]
    unscored: Sequence[Unscored]
    captions: Sequence[Caption]
    media_dir: Path
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    references: Mapping[str, Reference] = field(default_factory=dict)
    published: Mapping[str, float] | None = None
    notes: Sequence[str] = ()
    worst: int = 20


def write_report(path: Path, report: Report) -> None:
    """Write the page; the file appears whole or not at all.

    Raises:
        ValueError: there is no score to report.
    """
    if not report.scores:
        raise ValueError("there is no scored caption to report: see the reasons of the unscored ones in the score file")
    clips = _worst_clips(report, path)
    script = (_HERE / "report.js").read_text(encoding="utf-8")
    page = load_template(_HERE / "report.html.jinja", percent=_percent, span=_span).render(
        report=report,
        measures=_measures(report),
        scale=_scale(report),
        passes=list(zip(report.judge_info.seeds, report.judge_info.totals, strict=False)),
        split=_split_of_total(report.scores),
        # By the published protocol replies do not say which events are told.
        modalities=[] if report.judge_info.protocol == "published" else _share_by_modality(report),
        histogram=_histogram(report.scores),
        median_total=median(score.total for score in report.scores),
        clips=clips,
        filters={"all": len(clips)} | {kind: sum(kind in clip.kinds for clip in clips) for kind in _FILTERS},
        style=Markup((_HERE / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        # The browser runs this script and no other, whatever a caption holds.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    write_text(path, page)


@dataclass(frozen=True)
class _Measure:
    """A row of the table; `place` is where its interval begins, its value and where it ends, as parts of the scale."""

    key: str
    title: str
    meaning: str
    value: str
    interval: str = ""
    published: str = ""
    place: tuple[float, float, float] | None = None


def _scale(report: Report) -> float:
    """The end of the axis that intervals are drawn on."""
    return max([1e-9, *(high for _, high in report.intervals.values())])


def _measures(report: Report) -> list[_Measure]:
    """The rates that were taken."""
    values = {key: value for key, value in asdict(report.rates).items() if key in _MEASURES and value is not None}
    published = report.published or {}
    scale = _scale(report)
    rows = []
    for key, (title, meaning) in _MEASURES.items():
        if key not in values:
            continue
        row = _Measure(key, title, meaning, _write_measure(key, values[key]))
        if key in published:
            row = replace(row, published=_write_measure(key, published[key]))
        if key in report.intervals:
            low, high = report.intervals[key]
            interval = f"{_write_measure(key, low).removesuffix(' %')} {_DASH} {_write_measure(key, high)}"
            row = replace(row, interval=interval, place=(low / scale, values[key] / scale, high / scale))
        rows.append(row)
    return rows


def _write_measure(key: str, value: float) -> str:
    if key == "order":
        return f"{value:+.2f}".replace("-", _MINUS)
    return f"{value:.1f}" if key == "words" else _percent(value)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _clock(seconds: float) -> str:
    """1:05.2"""
    tenths = round(10 * seconds)
    return f"{tenths // 600}:{tenths % 600 // 10:02}.{tenths % 10}"


def _span(record: Event | Caption) -> str:
    """When it is, "" where that is not known."""
    start, end = record.start_seconds, record.end_seconds
    if start is None:
        return "" if end is None else f"until {_clock(end)}"
    return f"from {_clock(start)}" if end is None else f"{_clock(start)}{_DASH}{_clock(end)}"


def _split_of_total(scores: Sequence[Score]) -> dict[str, float]:
    """Kind of error -> errors of that kind / events of all captions; together they are Total."""
    num_events = max(sum(score.num_events for score in scores), 1)
    return {
        "missed": sum(score.missing for score in scores) / num_events,
        "incorrect": sum(score.incorrect for score in scores) / num_events,
        "hallucinated": sum(score.hallucinated for score in scores) / num_events,
    }


def _share_by_modality(report: Report) -> list[dict[str, Any]]:
    """Of each modality's events, as far as the judge lists them: how many, and the shares missed and told wrong."""
    found: Counter[tuple[EventModality, str]] = Counter()
    for score, caption in _with_captions(report):
        found.update((event.modality, kind) for kind, event in _sorted_events(report, score, caption))
    rows = []
    for modality in MODALITIES:
        counts = {kind: found[modality, kind] for kind in ("missed", "incorrect", "correct")}
        num_events = sum(counts.values())
        if num_events:
            shares = {kind: counts[kind] / num_events for kind in ("missed", "incorrect")}
            rows.append({"modality": modality, "num_events": num_events, "shares": shares})
    return rows


def _histogram(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Captions by Total, in steps of 10 %; the last step is open."""
    # In whole numbers, so that 7 errors of 10 stand at 70 % and not just below.
    tenths = [
        10 * (score.missing + score.incorrect + score.hallucinated) // max(score.num_events, 1) for score in scores
    ]
    steps = Counter(min(tenth, _HISTOGRAM_BARS - 1) for tenth in tenths)
    highest = max(steps.values())
    return [
        {
            "label": f"from {10 * step} %" + (f" to {10 * step + 10} %" if step < _HISTOGRAM_BARS - 1 else ""),
            "tick": f"{10 * step}" if step % 5 == 0 else "",
            "count": steps[step],
            "height": steps[step] / highest,
        }
        for step in range(max(10, max(steps) + 1))
    ]


def _with_captions(report: Report) -> list[tuple[Score, Caption | None]]:
    """Scores with their captions."""
    captions = {_name(caption): caption for caption in report.captions}
    return [(score, captions.get(_name(score))) for score in report.scores]


def _name(record: Score | Caption) -> tuple[object, ...]:
    """What tells the captions of a set apart: a video may have several samples, and captions of its parts."""
    return record.video, record.sample, record.start_seconds, record.end_seconds


def _missed_events(report: Report, score: Score, caption: Caption | None) -> list[tuple[str, Event | None]]:
    """Texts of missed events, each with its event where the reference has one of that text that is not told."""
    reference = report.references.get(score.video, Reference(score.video))
    events = list((restrict_to_span(reference, caption) if caption else reference).events)
    for mention in score.mentions:
        if mention.event in events:
            events.remove(mention.event)
    missed: list[tuple[str, Event | None]] = []
    for text in score.missed:
        event = next((event for event in events if event.text == text), None)
        if event:
            events.remove(event)
        missed.append((text, event))
    return missed


def _sorted_events(report: Report, score: Score, caption: Caption | None) -> list[tuple[str, Event]]:
    """All events with what became of them: missed, incorrect or correct."""
    missed = [("missed", event) for _, event in _missed_events(report, score, caption) if event]
    return missed + [("correct" if mention.is_correct else "incorrect", mention.event) for mention in score.mentions]


@dataclass(frozen=True)
class _Media:
    """A video on the page: its address, "" where there is no file; and whether that holds the video itself."""

    address: str = ""
    is_inside: bool = False


@dataclass(frozen=True)
class _Tick:
    """An event on the bar of time below a video; `left` and `width` as fractions of its duration."""

    kind: str
    event: Event
    left: float
    width: float


@dataclass(frozen=True)
class _Clip:
    """A caption as it is shown."""

    score: Score
    caption: Caption | None
    marks: list[Highlight]
    lost: list[Quote]
    missed: list[tuple[str, Event | None]]
    ticks: list[_Tick]
    media: _Media

    @property
    def shares(self) -> dict[str, float]:
        """Kind of error -> its part in Total."""
        return _split_of_total([self.score])

    @property
    def kinds(self) -> list[str]:
        """What it can be filtered by."""
        counts = {
            "missed": self.score.missing,
            "incorrect": self.score.incorrect,
            "hallucinated": self.score.hallucinated,
            "repeated": self.score.num_repeated_words,
        }
        return [kind for kind, count in counts.items() if count]


def _worst_clips(report: Report, path: Path) -> list[_Clip]:
    """The clips of the highest Total, the worst first, ready to be shown on the page at `path`."""
    everything = sorted(_with_captions(report), key=lambda pair: (-pair[0].total, pair[0].video, pair[0].sample))
    shown = everything[: report.worst]
    media = _place_media([report.media_dir / score.video for score, _ in shown], path)
    clips = []
    for (score, caption), medium in zip(shown, media, strict=True):
        text = caption.text if caption else ""
        clips.append(
            _Clip(
                score=score,
                caption=caption,
                marks=highlight_caption(text, score),
                lost=[quote for quote in locate_quotes(text, score) if not quote.span],
                missed=_missed_events(report, score, caption),
                ticks=_place_ticks(report, score, caption),
                media=medium,
            )
        )
    return clips


def _place_ticks(report: Report, score: Score, caption: Caption | None) -> list[_Tick]:
    """The events that have a time, on the duration of the video as far as it is known."""
    timed = [
        (kind, event, event.start_seconds, event.start_seconds if event.end_seconds is None else event.end_seconds)
        for kind, event in _sorted_events(report, score, caption)
        if event.start_seconds is not None
    ]
    reference = report.references.get(score.video, Reference(score.video))
    duration = max([reference.duration_seconds or 0.0, *(end for _, _, _, end in timed)])
    if not duration:
        return []
    return [_Tick(kind, event, start / duration, max(end - start, 0) / duration) for kind, event, start, end in timed]


def _place_media(videos: Sequence[Path], path: Path) -> list[_Media]:
    """Where the page at `path` takes each video from: the first small ones are put inside."""
    media, room = [], _ALL_EMBEDDED_BYTES
    for video in videos:
        size = video.stat().st_size if video.is_file() else None
        if size is None:
            media.append(_Media())
        elif size <= min(room, _EMBEDDED_BYTES):
            room -= size
            kind = mimetypes.guess_type(video.name)[0] or "video/mp4"
            media.append(_Media(f"data:{kind};base64,{base64.b64encode(video.read_bytes()).decode()}", is_inside=True))
        else:
            media.append(_Media(_link(video.resolve(), path.resolve().parent)))
    return media


def _link(video: Path, folder: Path) -> str:
    """Relative for a video below the page's folder, which may then be moved as a whole; else absolute."""
    if video.is_relative_to(folder):
        return quote(os.path.relpath(video, folder).replace(os.sep, "/"))  # ":" too, so that no name is a scheme
    return video.as_uri()
