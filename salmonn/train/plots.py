"""A run's curves in a picture, and its table and curves on a page. Needs no torch.

`salmonn plot RUN` calls this, for a run that is still going, too.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from io import StringIO
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from salmonn.records import write_text
from salmonn.templates import load_template
from salmonn.train.run_log import COLUMNS, RunRecord, RunSummary, StageLog, column_titles, format_figure

_MOST_POINTS = 1000  # of a line over all stages: more than a panel has pixels


@dataclass(frozen=True)
class Panel:
    """One small picture of the curves.

    Args:
        title: with the unit.
        lines: field of a step's figures -> what it is called.
        is_noisy: whether a mean over neighbouring steps is drawn over the steps themselves.
    """

    title: str
    lines: Mapping[str, str]
    is_noisy: bool = True


PANELS = (
    Panel("Loss", {"loss": "loss", "dpo": "DPO", "ce": "cross-entropy", "qa": "questions"}),
    Panel("Rewards", {"chosen": "chosen", "rejected": "rejected"}),
    Panel("Margin of rewards", {"margin": "chosen less rejected"}),
    Panel("Accuracy: chosen above rejected", {"accuracy": "accuracy"}),
    Panel("Drift of log-probabilities, nats", {"chosen_drift": "chosen", "rejected_drift": "rejected"}),
    Panel("KL to the reference, nats a token", {"kl": "KL"}),
    Panel("Gradient norm", {"grad_norm": "norm"}),
    Panel("Learning rate", {"learning_rate": "rate"}, is_noisy=False),
    Panel("Tokens a second", {"tokens_per_second": "tokens"}),
    Panel("Seconds a step", {"seconds": "whole", "wait_seconds": "waiting for data"}),
    Panel("Memory, GiB", {"memory_gib": "memory"}, is_noisy=False),
)


@dataclass(frozen=True)
class _Look:
    """Colours: of words, of grids, and of one line after the other."""

    ink: str
    soft: str
    lines: Sequence[str]


_ON_PAPER = _Look(ink="#1d1b19", soft="#8a837b", lines=("#0b69a8", "#d98a00", "#b8699f", "#78716a", "#b0412a"))
# Colours that stand for those of the page's style, which has a light and a dark set.
_ON_PAGE = _Look(ink="#000001", soft="#000002", lines=("#000003", "#000004", "#000005", "#000006", "#000007"))
_STYLE_NAMES = ("ink", "soft", "missed", "incorrect", "hallucinated", "repeated", "accent")


def plot_summary(summary: RunSummary, path: Path) -> None:
    """Draw the rates over the stages to a PNG file."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    _draw_rates(summary, axes, _ON_PAPER)
    axes.set_title(f"mrDPO on {summary.sft.clips} held-out clips")
    figure.savefig(path, dpi=150)


def plot_curves(record: RunRecord, path: Path) -> None:
    """Draw all curves of a run to a PNG file, and the rates over its stages first.

    Raises:
        ValueError: the run has neither.
    """
    panels = _panels_of(record.stages)
    # One stage alone is a point, which is drawn only where there is nothing else.
    compared = record.summary if record.summary and (len(record.summary.stages) > 1 or not panels) else None
    count = len(panels) + (compared is not None)
    if not count:
        raise ValueError(f"{record.name} has no steps and no rates yet: wait for its first step")
    columns = min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(4.6 * columns, 2.9 * rows + 0.5), layout="constrained")
    figure.suptitle(record.name, color=_ON_PAPER.ink)
    every = iter(figure.subplots(rows, columns, squeeze=False).flat)
    if compared:
        axes = next(every)
        _draw_rates(compared, axes, _ON_PAPER)
        axes.set_title("Held-out rates, %", fontsize=10)
    for panel in panels:
        axes = next(every)
        _draw_panel(panel, record.stages, axes, _ON_PAPER)
        axes.set_title(panel.title, fontsize=10, pad=14)
    for axes in every:
        axes.axis("off")
    figure.savefig(path, dpi=130)


def _draw_rates(summary: RunSummary, axes: Any, look: _Look) -> None:
    """A line for each measure over the stages; one that is not measured at every stage is left out."""
    stages = _short(list(summary.stages))
    for (key, title), colour in zip(COLUMNS.items(), look.lines, strict=True):
        values = [getattr(rates, key) for rates in summary.stages.values()]
        if None not in values:
            style = "--" if key == "qa_accuracy" else "-"
            axes.plot(stages, [100 * value for value in values], style, marker="o", ms=4, label=title, color=colour)
    axes.set_ylim(bottom=0)
    _dress(axes, look)
    axes.legend(
        ncols=3,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.12),
        frameon=False,
        fontsize=8,
        labelcolor=look.ink,
    )


def _panels_of(stages: Sequence[StageLog]) -> list[Panel]:
    """The panels that the run has figures for."""
    known = {key for stage in stages for figures in stage.steps for key in figures}
    return [panel for panel in PANELS if known & set(panel.lines)]


def _draw_panel(panel: Panel, stages: Sequence[StageLog], axes: Any, look: _Look) -> None:
    """The stages' steps, one stage after the other, with a mark where each begins."""
    trained = [stage for stage in stages if stage.steps]
    lengths = [int(stage.steps[-1]["step"]) + 1 for stage in trained]
    starts = [0, *accumulate(lengths)]
    size = -(-starts[-1] // _MOST_POINTS)
    shown = 0
    for (key, label), colour in zip(panel.lines.items(), look.lines, strict=False):
        lines = [points_of(stage.steps, key, start=start) for stage, start in zip(trained, starts, strict=False)]
        for points, stage in zip(lines, trained, strict=True):
            is_rare = 2 * len(points) < len(stage.steps)
            _draw_line(axes, points, size=size, is_noisy=panel.is_noisy, is_rare=is_rare, colour=colour)
        if any(lines):
            axes.plot([], [], color=colour, label=label)
            shown += 1
    if len(trained) > 1:
        _mark_stages(axes, [stage.name for stage in trained], starts, look)
    axes.set_xlim(0, max(starts[-1], 2) - 1)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel("step", fontsize=8, color=look.soft)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _dress(axes, look)
    if shown > 1:
        axes.legend(frameon=False, fontsize=8, labelcolor=look.ink)


def points_of(steps: Sequence[Mapping[str, float]], key: str, *, start: int) -> list[tuple[float, float]]:
    """(step over all stages, value) where it was measured, of a stage that begins at step `start`."""
    return [(start + figures["step"], figures[key]) for figures in steps if key in figures]


def thin(points: Sequence[tuple[float, float]], *, size: int) -> list[tuple[float, float]]:
    """Means over so many points each."""
    groups = (points[first : first + size] for first in range(0, len(points), size))
    return [(fmean(x for x, _ in group), fmean(y for _, y in group)) for group in groups]


def smooth(values: Sequence[float]) -> list[float]:
    """Each value's mean with its neighbours: a twentieth of all on either side, fewer at the ends."""
    half = max(1, len(values) // 20)
    return [fmean(values[max(0, place - half) : place + half + 1]) for place in range(len(values))]


def _draw_line(
    axes: Any, points: Sequence[tuple[float, float]], *, size: int, is_noisy: bool, is_rare: bool, colour: str
) -> None:
    if not is_rare:
        points = thin(points, size=size)
    places, values = [x for x, _ in points], [y for _, y in points]
    if is_rare:
        axes.plot(places, values, color=colour, marker="o" if len(points) < 50 else "", ms=3, lw=1.2)
        return
    if is_noisy:
        axes.plot(places, values, color=colour, lw=0.8, alpha=0.3)
        values = smooth(values)
    axes.plot(places, values, color=colour, lw=1.5)


def _mark_stages(axes: Any, names: Sequence[str], starts: Sequence[int], look: _Look) -> None:
    """Lines where stages begin, and their names above."""
    for number, name in enumerate(_short(names)):
        if number:
            axes.axvline(starts[number], color=look.soft, lw=0.8, ls=":")
        middle = (starts[number] + starts[number + 1]) / 2
        where = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "va": "bottom"}
        axes.annotate(name, (middle, 1), xycoords=axes.get_xaxis_transform(), color=look.soft, fontsize=8, **where)


def _short(names: Sequence[str]) -> list[str]:
    """Names of stages where there is little room: of a round after a round the number alone."""
    return [
        name.removeprefix("round ") if before.startswith("round ") else name
        for before, name in zip(["", *names], names, strict=False)
    ]


def _dress(axes: Any, look: _Look) -> None:
    """Quiet axes in the look's colours."""
    axes.grid(color=look.soft, alpha=0.25, lw=0.6)
    axes.tick_params(labelsize=8, colors=look.soft, labelcolor=look.ink)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(look.soft)


def write_page(record: RunRecord, path: Path) -> None:
    """Write the run as one HTML file that asks no network for anything; it appears whole or not at all."""
    template = Path(__file__).with_name("run.html.jinja")
    page = load_template(template, figure=lambda value, column: format_figure(column, value)).render(
        record=record,
        summary=record.summary,
        column_titles=column_titles(),
        paired=[stage for stage in record.stages if stage.pairs],
        num_steps=sum(len(stage.steps) for stage in record.stages),
        rates=_to_svg("Held-out rates", partial(_draw_rates, record.summary)) if record.summary else "",
        curves={
            panel.title: _to_svg(panel.title, partial(_draw_panel, panel, record.stages))
            for panel in _panels_of(record.stages)
        },
        style=Markup(resources.files("salmonn.score").joinpath("report.css").read_text(encoding="utf-8")),
    )
    write_text(path, page)


def _to_svg(title: str, draw: Callable[[Any, _Look], None]) -> Markup:
    """A drawing as a part of the page, in the page's own colours and letters."""
    figure = Figure(figsize=(4.4, 2.7), layout="constrained")
    draw(figure.subplots(), _ON_PAGE)
    buffer = StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)  # every drawing would bring the same ones
    # A hundredth of a point is fine enough for lines.
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)
    for colour, name in zip((_ON_PAGE.ink, _ON_PAGE.soft, *_ON_PAGE.lines), _STYLE_NAMES, strict=True):
        svg = svg.replace(colour, f"var(--{name})")
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1))
