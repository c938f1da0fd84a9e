"""The HTML report of a scored set: rates, charts, and the worst clips with highlighted captions and their videos.

It is one self-contained file: `salmonn score ... --report report.html`. Small videos are embedded, others linked.
"""

import base64
import hashlib
import mimetypes
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from salmonn.files import write_text
from salmonn.records import Caption, Event, EventModality, Failure, JudgeInfo, Reference, Score, Unscored
from salmonn.score.highlight import Highlight, Quote, find_missed_events, highlight_caption, locate_quotes
from salmonn.score.judge import restrict_to_caption
from salmonn.score.metrics import Rates, compute_measures
from salmonn.templates import load_template

MODALITIES: tuple[EventModality, ...] = ("visual", "audio", "speech")
_DASH, _MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
_FOLDER = Path(__file__).parent
# Limits for one video, and for all of them; larger pages open slowly.
_EMBEDDED_BYTES = 4 * 2**20
_ALL_EMBEDDED_BYTES = 48 * 2**20
_FILTERS = ("missed", "incorrect", "hallucinated", "repeated")
_HISTOGRAM_BARS = 16  # of 10 % each; the last one is open-ended
# Title and description of each field of `Rates`.
_MEASURES = {
    "missing": ("Missing", "events that are not mentioned"),
    "hallucination": ("Hallucination", "incorrect + hallucinated"),
    "incorrect": ("incorrect", "events that are described wrongly"),
    "hallucinated": ("hallucinated", "claims that match no event, per event"),
    "total": ("Total", "Missing + Hallucination"),
    "repetition": ("Repetition", "words in repeated clauses"),
    "qa_accuracy": ("QA accuracy", "questions answered correctly"),
    "cut_off": ("Cut off", "captions that reached their token limit"),
    "audio_share": ("Audio share", "audible events among the mentioned ones"),
    "order": ("Order", f"of mentions against time: Kendall's tau, {_MINUS}1 to 1"),
    "words": ("Length", "words per caption"),
}


@dataclass(frozen=True)
class Report:
    """Contents of a report.

    Args:
        title: heading of the page.
        judge_info: judge, protocol and passes.
        rates: rates of the set.
        scores, unscored: results of all captions.
        captions: scored captions; a score without one is shown as a video without a caption.
        media_dir: folder that video names are relative to. A video that is not there is only named.
        intervals: low and high end of the 95 % interval by name of rate.
        references: references by video, which have time and modality of the missed events.
        published: values of the published protocol by name of rate; None if it was not used.
        notes: sentences shown first, for example how many videos have no caption.
        worst: number of clips shown.
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
    """Write the page atomically.

    Raises:
        ValueError: there are no scores.
    """
    if not report.scores:
        raise ValueError("no caption was scored, so there is nothing to report; the score file has the reasons")
    scale = max([1e-9, *(high for _, high in report.intervals.values())])
    clips = _worst_clips(report, path)
    script = (_FOLDER / "report.js").read_text(encoding="utf-8")
    page = load_template(_FOLDER / "report.html.jinja", percent=_format_percent, span=format_span).render(
        report=report,
        measures=_measure_rows(report, scale=scale),
        scale=scale,
        passes=list(zip(report.judge_info.seeds, report.judge_info.totals, strict=False)),
        split=_split_total(report.scores),
        # In the published protocol, replies do not list the events that are mentioned correctly.
        modalities=[] if report.judge_info.protocol == "published" else _modality_rows(report),
        histogram=_histogram(report.scores),
        median_total=median(score.total for score in report.scores),
        clips=clips,
        filters={"all": len(clips)} | {kind: sum(kind in clip.kinds for clip in clips) for kind in _FILTERS},
        style=Markup((_FOLDER / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        # The browser runs only the script with this hash, whatever a caption contains.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    write_text(path, page)


def _measure_rows(report: Report, *, scale: float) -> list[dict[str, Any]]:
    """Return the rows of the rates that are known.

    `place` is the low end of the interval, the value and the high end, relative to the end `scale` of the axis.
    """
    rows = []
    for key, (title, meaning) in _MEASURES.items():
        value, published = getattr(report.rates, key), (report.published or {}).get(key)
        if value is None:
            continue
        interval, place = "", None
        if key in report.intervals:
            low, high = report.intervals[key]
            interval = f"{_format(key, low).removesuffix(' %')} {_DASH} {_format(key, high)}"
            place = (low / scale, value / scale, high / scale)
        rows.append(
            {
                "key": key,
                "title": title,
                "meaning": meaning,
                "value": _format(key, value),
                "published": "" if published is None else _format(key, published),
                "interval": interval,
                "place": place,
            }
        )
    return rows


def _format(key: str, value: float) -> str:
    if key == "order":
        return f"{value:+.2f}".replace("-", _MINUS)
    return f"{value:.1f}" if key == "words" else _format_percent(value)


def _format_percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def format_span(record: Event | Caption | Failure) -> str:
    """Format the time span of an event, caption or failure, such as 0:03.0-1:05.2; "" if unknown."""

    def clock(seconds: float) -> str:
        tenths = round(10 * seconds)
        return f"{tenths // 600}:{tenths % 600 // 10:02}.{tenths % 10}"

    start, end = record.start_seconds, record.end_seconds
    if start is None:
        return "" if end is None else f"until {clock(end)}"
    return f"from {clock(start)}" if end is None else f"{clock(start)}{_DASH}{clock(end)}"


def _split_total(scores: Sequence[Score]) -> dict[str, float]:
    """Return the errors of each kind per event; their sum is Total."""
    measures = compute_measures(scores)
    return {"missed": measures["missing"]} | {kind: measures[kind] for kind in ("incorrect", "hallucinated")}


def _modality_rows(report: Report) -> list[dict[str, Any]]:
    """Return the number of events, and the missed and incorrect shares, of each modality that the judge lists."""
    found: Counter[tuple[EventModality, str]] = Counter()
    for score, caption in _with_captions(report):
        found.update((event.modality, kind) for kind, event in _classified_events(report, score, caption))
    rows = []
    for modality in MODALITIES:
        counts = {kind: found[modality, kind] for kind in ("missed", "incorrect", "correct")}
        num_events = sum(counts.values())
        if num_events:
            shares = {kind: counts[kind] / num_events for kind in ("missed", "incorrect")}
            rows.append({"modality": modality, "num_events": num_events, "shares": shares})
    return rows


def _histogram(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Return the number of captions by Total, in steps of 10 %; the last step is open-ended."""
    # Integer arithmetic, so that 7 errors of 10 are at 70 % and not just below.
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
    """Pair scores with their captions, by video, sample and part of the video."""

    def key(record: Score | Caption) -> tuple[object, ...]:
        return record.video, record.sample, record.start_seconds, record.end_seconds

    captions = {key(caption): caption for caption in report.captions}
    return [(score, captions.get(key(score))) for score in report.scores]


def _missed_events(report: Report, score: Score, caption: Caption | None) -> list[tuple[str, Event | None]]:
    reference = report.references.get(score.video, Reference(score.video))
    return find_missed_events(score, (restrict_to_caption(reference, caption) if caption else reference).events)


def _classified_events(report: Report, score: Score, caption: Caption | None) -> list[tuple[str, Event]]:
    """Return all events with their class: missed, incorrect or correct."""
    missed = [("missed", event) for _, event in _missed_events(report, score, caption) if event]
    return missed + [("correct" if mention.is_correct else "incorrect", mention.event) for mention in score.mentions]


@dataclass(frozen=True)
class _CaptionCard:
    """A caption as shown; `unlocated` are quotes that are not in the caption, `shares` the parts of its Total."""

    score: Score
    caption: Caption | None
    highlights: list[Highlight]
    unlocated: list[Quote]
    missed: list[tuple[str, Event | None]]
    ticks: list[dict[str, Any]]
    address: str  # of the video; "" if there is no file
    is_linked: bool  # the address does not contain the video itself
    shares: dict[str, float]
    kinds: list[str]  # of errors, to filter by


def _worst_clips(report: Report, path: Path) -> list[_CaptionCard]:
    """Return the clips with the highest Total, worst first, for the page at `path`."""
    ranked = sorted(_with_captions(report), key=lambda pair: (-pair[0].total, pair[0].video, pair[0].sample))
    ranked = ranked[: report.worst]
    clips = []
    room = _ALL_EMBEDDED_BYTES
    for score, caption in ranked:
        text = caption.text if caption else ""
        address, used = _embed_or_link(report.media_dir / score.video, page=path, room=room)
        room -= used
        counts = (score.missing, score.incorrect, score.hallucinated, score.num_repeated_words)
        clips.append(
            _CaptionCard(
                score=score,
                caption=caption,
                highlights=highlight_caption(text, score),
                unlocated=[quote for quote in locate_quotes(text, score) if not quote.span],
                missed=_missed_events(report, score, caption),
                ticks=_place_ticks(report, score, caption),
                address=address,
                is_linked=bool(address) and not address.startswith("data:"),
                shares=_split_total([score]),
                kinds=[kind for kind, count in zip(_FILTERS, counts, strict=True) if count],
            )
        )
    return clips


def _place_ticks(report: Report, score: Score, caption: Caption | None) -> list[dict[str, Any]]:
    """Return the events that have a time, placed in fractions of the video's duration (or of the last known time)."""
    timed = [
        (kind, event, event.start_seconds, event.start_seconds if event.end_seconds is None else event.end_seconds)
        for kind, event in _classified_events(report, score, caption)
        if event.start_seconds is not None
    ]
    reference = report.references.get(score.video, Reference(score.video))
    duration = max([reference.duration_seconds or 0.0, *(end for _, _, _, end in timed)])
    if not duration:
        return []
    return [
        {"kind": kind, "event": event, "left": start / duration, "width": max(end - start, 0) / duration}
        for kind, event, start, end in timed
    ]


def _embed_or_link(video: Path, *, page: Path, room: int) -> tuple[str, int]:
    """Embed a small video if it fits into `room` bytes, else link it; return its address and the bytes used."""
    if not video.is_file():
        return "", 0
    size = video.stat().st_size
    if size <= min(room, _EMBEDDED_BYTES):
        kind = mimetypes.guess_type(video.name)[0] or "video/mp4"
        data = base64.b64encode(video.read_bytes()).decode()
        return f"data:{kind};base64,{data}", size
    return link_to_video(video, page=page), 0


def link_to_video(video: Path, *, page: Path) -> str:
    """Return the address of a file for a page: relative if it is below the page's folder, which can then be moved."""
    video, folder = video.resolve(), page.resolve().parent
    if video.is_relative_to(folder):
        # ":" is quoted too, so that no name looks like a URL scheme.
        return quote(os.path.relpath(video, folder).replace(os.sep, "/"))
    return video.as_uri()
