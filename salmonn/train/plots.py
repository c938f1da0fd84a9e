"""Plot a training run: curves as PNG, and a table with curves as an HTML page. Needs no torch.

`salmonn plot RUN` uses this, also while the run is in progress.
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

from salmonn.files import write_text
from salmonn.templates import load_template
from salmonn.train.run_log import COLUMNS, RunRecord, RunSummary, StageRecord, column_titles, format_figure

REWARDS_TITLE = "Gain on held-out captions by the reward model and by the judge"
_MAX_POINTS = 1000  # per line over all stages: more than a panel has pixels


@dataclass(frozen=True)
class Panel:
    """One panel of curves.

    Args:
        title: title with the unit.
        lines: metric of a step -> label.
        is_noisy: whether to plot a moving average on top of the raw values.
    """

    title: str
    lines: Mapping[str, str]
    is_noisy: bool = True


PANELS = (
    Panel("Loss", {"loss": "loss", "dpo": "DPO", "ce": "cross-entropy", "qa": "questions"}),
    Panel("Rewards", {"chosen": "chosen", "rejected": "rejected"}),
    Panel("Reward margin", {"margin": "chosen minus rejected"}),
    Panel("Accuracy: chosen above rejected", {"accuracy": "accuracy"}),
    Panel("Change of log-probabilities, nats", {"chosen_drift": "chosen", "rejected_drift": "rejected"}),
    Panel("KL to the reference policy, nats per token", {"kl": "KL"}),
    Panel("Gradient norm", {"grad_norm": "norm"}),
    Panel("Learning rate", {"learning_rate": "rate"}, is_noisy=False),
    Panel("Tokens per second", {"tokens_per_second": "tokens"}),
    Panel("Seconds per step", {"seconds": "total", "wait_seconds": "waiting for data"}),
    Panel("Memory, GiB", {"memory_gib": "memory"}, is_noisy=False),
)


@dataclass(frozen=True)
class _Palette:
    """Colours of text, grid and successive lines."""

    ink: str
    soft: str
    lines: Sequence[str]


_PNG_PALETTE = _Palette(ink="#1d1b19", soft="#8a837b", lines=("#0b69a8", "#d98a00", "#b8699f", "#78716a", "#b0412a"))
# Placeholders that are replaced by the page's CSS variables, which have light and dark values.
_HTML_PALETTE = _Palette(ink="#000001", soft="#000002", lines=("#000003", "#000004", "#000005", "#000006", "#000007"))
_CSS_VARIABLES = ("ink", "soft", "missed", "incorrect", "hallucinated", "repeated", "accent")


def plot_summary(summary: RunSummary, path: Path) -> None:
    """Plot the rates of all stages to a PNG file."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    _draw_rates(summary, axes, _PNG_PALETTE)
    axes.set_title(f"mrDPO on {summary.sft.clips} held-out clips")
    figure.savefig(path, dpi=150)


def plot_curves(record: RunRecord, path: Path) -> None:
    """Plot the rates and all curves of a run to a PNG file.

    Raises:
        ValueError: the run has neither.
    """
    panels = _panels_of(record.stages)
    # The rates of a single stage are one point, plotted only if there is nothing else.
    compared = record.summary if record.summary and (len(record.summary.stages) > 1 or not panels) else None
    draw_rewards = record.summary is not None and can_compare_rewards(record.summary)
    count = len(panels) + (compared is not None) + draw_rewards
    if not count:
        raise ValueError(f"{record.name} has no steps and no rates yet; wait for its first step")
    columns = min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(4.6 * columns, 2.9 * rows + 0.5), layout="constrained")
    figure.suptitle(record.name, color=_PNG_PALETTE.ink)
    every = iter(figure.subplots(rows, columns, squeeze=False).flat)
    if compared:
        axes = next(every)
        _draw_rates(compared, axes, _PNG_PALETTE)
        axes.set_title("Held-out rates, %", fontsize=10)
    if record.summary and draw_rewards:
        axes = next(every)
        _draw_rewards(record.summary, axes, _PNG_PALETTE)
        axes.set_title(REWARDS_TITLE, fontsize=10)
    for panel in panels:
        axes = next(every)
        _draw_panel(panel, record.stages, axes, _PNG_PALETTE)
        axes.set_title(panel.title, fontsize=10, pad=14)
    for axes in every:
        axes.axis("off")
    figure.savefig(path, dpi=130)


def _draw_rates(summary: RunSummary, axes: Any, palette: _Palette) -> None:
    """Plot a line per metric over the stages, if it was measured at every stage."""
    stages = _short_names(list(summary.stages))
    for (key, title), colour in zip(COLUMNS.items(), palette.lines, strict=True):
        values = [getattr(rates, key) for rates in summary.stages.values()]
        if None not in values:
            style = "--" if key == "qa_accuracy" else "-"
            axes.plot(stages, [100 * value for value in values], style, marker="o", ms=4, label=title, color=colour)
    axes.set_ylim(bottom=0)
    _style_axes(axes, palette)
    axes.legend(
        ncols=3,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.12),
        frameon=False,
        fontsize=8,
        labelcolor=palette.ink,
    )


def can_compare_rewards(summary: RunSummary) -> bool:
    """Return whether rewards of a reward model, the judge's Totals and KL divergences of the same rounds are known."""
    return len(summary.proxy) > 1 and all(name == "SFT" or name in summary.kl for name in summary.proxy)


def _draw_rewards(summary: RunSummary, axes: Any, palette: _Palette) -> None:
    """Plot the gain by the reward model and that by the judge over sqrt(KL), as arXiv 2210.10760 does.

    Where the first rises and the second does not, the policy exploits its reward model.
    """
    distances = [summary.kl.get(name, 0.0) ** 0.5 for name in summary.proxy]
    judged = axes.twinx()
    falls = [100 * (summary.sft.total - summary.stages[name].total) for name in summary.proxy]
    for side, values, label, colour in (
        (axes, list(summary.proxy.values()), "reward model, standard deviations", palette.lines[0]),
        (judged, falls, "judge, points of Total", palette.lines[1]),
    ):
        side.plot(distances, values, marker="o", ms=4, color=colour)
        side.set_ylabel(label, fontsize=8, color=colour)
        _style_axes(side, palette)
    judged.grid(visible=False)
    judged.spines["right"].set_visible(True)
    axes.set_xlabel("square root of KL, nats per token", fontsize=8, color=palette.soft)


def _panels_of(stages: Sequence[StageRecord]) -> list[Panel]:
    """Return the panels for which the run has values."""
    known = {key for stage in stages for figures in stage.steps for key in figures}
    return [panel for panel in PANELS if known & set(panel.lines)]


def _draw_panel(panel: Panel, stages: Sequence[StageRecord], axes: Any, palette: _Palette) -> None:
    """Plot all stages one after the other, with a marker at the start of each."""
    trained = [stage for stage in stages if stage.steps]
    lengths = [int(stage.steps[-1]["step"]) + 1 for stage in trained]
    starts = [0, *accumulate(lengths)]
    size = -(-starts[-1] // _MAX_POINTS)
    shown = 0
    for (key, label), colour in zip(panel.lines.items(), palette.lines, strict=False):
        lines = [points_of(stage.steps, key, start=start) for stage, start in zip(trained, starts, strict=False)]
        for points, stage in zip(lines, trained, strict=True):
            is_rare = 2 * len(points) < len(stage.steps)
            _draw_line(axes, points, size=size, is_noisy=panel.is_noisy, is_rare=is_rare, colour=colour)
        if any(lines):
            axes.plot([], [], color=colour, label=label)
            shown += 1
    if len(trained) > 1:
        _mark_stages(axes, [stage.name for stage in trained], starts, palette)
    axes.set_xlim(0, max(starts[-1], 2) - 1)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel("step", fontsize=8, color=palette.soft)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _style_axes(axes, palette)
    if shown > 1:
        axes.legend(frameon=False, fontsize=8, labelcolor=palette.ink)


def points_of(steps: Sequence[Mapping[str, float]], key: str, *, start: int) -> list[tuple[float, float]]:
    """Return the (global step, value) points of a metric for a stage that begins at step `start`."""
    return [(start + figures["step"], figures[key]) for figures in steps if key in figures]


def thin(points: Sequence[tuple[float, float]], *, size: int) -> list[tuple[float, float]]:
    """Return the means of groups of `size` consecutive points."""
    groups = (points[first : first + size] for first in range(0, len(points), size))
    return [(fmean(x for x, _ in group), fmean(y for _, y in group)) for group in groups]


def smooth(values: Sequence[float]) -> list[float]:
    """Return a moving average over a twentieth of all values on either side, fewer at the ends."""
    half = max(1, len(values) // 20)
    return [fmean(values[max(0, place - half) : place + half + 1]) for place in range(len(values))]


def _draw_line(
    axes: Any, points: Sequence[tuple[float, float]], *, size: int, is_noisy: bool, is_rare: bool, colour: str
) -> None:
    if not is_rare:
        points = thin(points, size=size)
    steps, values = [x for x, _ in points], [y for _, y in points]
    if is_rare:
        axes.plot(steps, values, color=colour, marker="o" if len(points) < 50 else "", ms=3, lw=1.2)
        return
    if is_noisy:
        axes.plot(steps, values, color=colour, lw=0.8, alpha=0.3)
        values = smooth(values)
    axes.plot(steps, values, color=colour, lw=1.5)


def _mark_stages(axes: Any, names: Sequence[str], starts: Sequence[int], palette: _Palette) -> None:
    """Mark where stages begin, with their names above."""
    for number, name in enumerate(_short_names(names)):
        if number:
            axes.axvline(starts[number], color=palette.soft, lw=0.8, ls=":")
        middle = (starts[number] + starts[number + 1]) / 2
        where = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "va": "bottom"}
        axes.annotate(name, (middle, 1), xycoords=axes.get_xaxis_transform(), color=palette.soft, fontsize=8, **where)


def _short_names(names: Sequence[str]) -> list[str]:
    """Shorten stage names: a round that follows a round is its number only."""
    return [
        name.removeprefix("round ") if before.startswith("round ") else name
        for before, name in zip(["", *names], names, strict=False)
    ]


def _style_axes(axes: Any, palette: _Palette) -> None:
    """Style axes with the palette's colours."""
    axes.grid(color=palette.soft, alpha=0.25, lw=0.6)
    axes.tick_params(labelsize=8, colors=palette.soft, labelcolor=palette.ink)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(palette.soft)


def write_page(record: RunRecord, path: Path) -> None:
    """Write the run as one self-contained HTML file, atomically."""
    template = Path(__file__).with_name("run.html.jinja")
    page = load_template(template, figure=lambda value, column: format_figure(column, value)).render(
        record=record,
        summary=record.summary,
        column_titles=column_titles(),
        paired=[stage for stage in record.stages if stage.pairs],
        num_steps=sum(len(stage.steps) for stage in record.stages),
        rates=_to_svg("Held-out rates", partial(_draw_rates, record.summary)) if record.summary else "",
        rewards_title=REWARDS_TITLE,
        rewards=_to_svg(REWARDS_TITLE, partial(_draw_rewards, record.summary))
        if record.summary and can_compare_rewards(record.summary)
        else "",
        curves={
            panel.title: _to_svg(panel.title, partial(_draw_panel, panel, record.stages))
            for panel in _panels_of(record.stages)
        },
        style=Markup(resources.files("salmonn.score").joinpath("report.css").read_text(encoding="utf-8")),
    )
    write_text(path, page)


def _to_svg(title: str, plot: Callable[[Any, _Palette], None]) -> Markup:
    """Render a plot as inline SVG in the page's colours and fonts."""
    figure = Figure(figsize=(4.4, 2.7), layout="constrained")
    plot(figure.subplots(), _HTML_PALETTE)
    buffer = StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)  # ids would repeat between plots
    # Two decimals of a point are precise enough for lines.
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)
    for colour, name in zip((_HTML_PALETTE.ink, _HTML_PALETTE.soft, *_HTML_PALETTE.lines), _CSS_VARIABLES, strict=True):
        svg = svg.replace(colour, f"var(--{name})")
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1))
