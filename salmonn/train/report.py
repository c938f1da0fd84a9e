"""A run looked back on: its stages in a table, its curves in a picture, and both on a page. Needs no torch.

`salmonn plot RUN` calls this, for a run that is still going, too.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import resources
from io import StringIO
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

from salmonn.prefer.pairs import PairReport, summarise_pairs
from salmonn.records import Pair, parse_record, read_json, read_records, write_text
from salmonn.score.rates import Rates

COLUMNS = {
    "missing": "Missing",
    "hallucination": "Hallucination",
    "total": "Total",
    "repetition": "Repetition",
    "qa_accuracy": "QA accuracy",
}
KL = "KL"
STEPS_NAME = "steps.jsonl"
_MOST_POINTS = 1000  # of a line over all stages: more than a panel has pixels


@dataclass
class Summary:
    """Rates of every stage of a run.

    Args:
        sft, rounds, rebirth: held-out rates of the start, of each round, and of the end.
        kl: name of a stage, as in `stages` -> how far its model is from the start, in nats a token.
        best: folder of the stage that is taken for the best.
        stopped: why the rounds ended before their number, in a sentence.
    """

    sft: Rates
    rounds: list[Rates] = field(default_factory=list)
    rebirth: Rates | None = None
    kl: dict[str, float] = field(default_factory=dict)
    best: str | None = None
    stopped: str | None = None

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Summary":
        """What `to_json` gave, or the rates alone of a run that has one stage.

        Raises:
            ValueError: the values are not those of rates.
        """
        if "sft" not in value:
            return cls(parse_record(value, Rates))
        return cls(
            sft=parse_record(value["sft"], Rates),
            rounds=[parse_record(rates, Rates) for rates in value["rounds"]],
            rebirth=parse_record(value["rebirth"], Rates) if value["rebirth"] else None,
            kl=value.get("kl", {}),
            best=value.get("best"),
            stopped=value.get("stopped"),
        )

    def to_json(self) -> dict[str, Any]:
        """`{"sft": {...}, "rounds": [{...}], "rebirth": {...}, "kl": {...}, "best": ..., "stopped": ...}`."""
        return asdict(self)

    @property
    def stages(self) -> Mapping[str, Rates]:
        """Name -> rates, in the order of time."""
        named = {"SFT": self.sft}
        named |= {f"round {number}": rates for number, rates in enumerate(self.rounds, start=1)}
        return named | ({"rebirth": self.rebirth} if self.rebirth else {})

    @property
    def figures(self) -> Mapping[str, Mapping[str, float | None]]:
        """Name of a stage -> column of the table -> fraction, or nats a token of KL; None where it was not measured."""
        return {
            stage: {title: getattr(rates, key) for key, title in COLUMNS.items()} | {KL: self.kl.get(stage)}
            for stage, rates in self.stages.items()
        }

    @property
    def best_stage(self) -> str | None:
        """Name of the best stage, as in `stages`."""
        return _stage_name(self.best) if self.best else None


def print_table(summary: Summary) -> None:
    """Print the stages as a table, in percent; and why the rounds stopped."""
    table = Table(title=f"{summary.sft.clips} held-out clips")
    table.add_column("stage")
    for title in _heads():
        table.add_column(title, justify="right")
    for stage, figures in summary.figures.items():
        is_best = stage == summary.best_stage
        cells = (_write(column, value) for column, value in figures.items())
        table.add_row(f"{stage}, best" if is_best else stage, *cells, style="bold" if is_best else None)
    console = Console(width=110)
    console.print(table)
    if summary.stopped:
        console.print(f"stopped: {summary.stopped}", highlight=False, markup=False, soft_wrap=True)


def _heads() -> list[str]:
    return [*(f"{title} %" for title in COLUMNS.values()), f"{KL} nats a token"]


def _write(column: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if column == KL else f"{100 * value:.1f}"


# Reading a run back.


@dataclass(frozen=True)
class StageLog:
    """What one stage of training wrote.

    Args:
        name: "round 2", "rebirth", or the run's own name where there is one stage.
        steps: the figures of each step, with its number as "step".
        pairs: what it was trained on; None of a stage without pairs of its own.
    """

    name: str
    steps: Sequence[Mapping[str, float]]
    pairs: PairReport | None = None


@dataclass(frozen=True)
class RunRecord:
    """A run's folder, read.

    Args:
        name: of the folder.
        summary: None where no stage is measured.
        is_whole: whether it wrote its summary, at the end.
        stages: in the order of time.
        config: the resolved config as YAML, "" where there is none.
    """

    name: str
    summary: Summary | None
    is_whole: bool
    stages: Sequence[StageLog]
    config: str = ""


def read_run(folder: Path) -> RunRecord:
    """Read what a recipe wrote, or has written so far.

    Raises:
        ValueError: the folder holds no run, or a file of it is not what its name says.
    """
    whole = folder / "summary.json"
    summary = _read_summary(whole) if whole.is_file() else _measured_so_far(folder)
    stages = list(_read_stages(folder))
    if not stages and summary is None:
        raise ValueError(
            f"{folder} holds no run: give the folder that a recipe wrote to, with summary.json, {STEPS_NAME} or round_1"
        )
    configs = sorted(folder.glob("*.yaml"))
    return RunRecord(
        name=folder.resolve().name,
        summary=summary,
        is_whole=whole.is_file(),
        stages=stages,
        config=configs[0].read_text(encoding="utf-8") if configs else "",
    )


def read_steps(path: Path) -> list[dict[str, float]]:
    """The figures of all steps, with their numbers as "step"; none where there is no file.

    A line that is not whole, as a kill or a full disk leaves it, is passed over.
    """
    if not path.is_file():
        return []
    steps = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            figures = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(figures, dict) and "step" in figures:
            steps.append(figures)
    return steps


def _read_summary(path: Path) -> Summary:
    try:
        return Summary.from_json(read_json(path))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no summary of a run: {error}") from error


def _measured_so_far(folder: Path) -> Summary | None:
    """From what each stage has measured: of a run that is going on, or was killed."""
    found = {path.parents[1].name: parse_record(read_json(path), Rates) for path in folder.glob("*/heldout/rates.json")}
    if "sft" not in found:
        return None
    rounds = sorted((name for name in found if name.startswith("round_")), key=_place)
    kl = {_stage_name(path.parents[1].name): read_json(path) for path in folder.glob("*/heldout/kl.json")}
    return Summary(found["sft"], [found[name] for name in rounds], found.get("rebirth"), kl)


def _read_stages(folder: Path) -> Iterator[StageLog]:
    if own := read_steps(folder / STEPS_NAME):
        yield StageLog(folder.resolve().name, own)
    for name in sorted({path.parent.name for path in folder.glob("*/*.jsonl")}, key=_place):
        steps, pairs = read_steps(folder / name / STEPS_NAME), folder / name / "pairs.jsonl"
        report = summarise_pairs(read_records(pairs, Pair)) if pairs.is_file() else None
        if steps or report:
            yield StageLog(_stage_name(name), steps, report)


def _place(folder_name: str) -> tuple[int, int, str]:
    """Folders in the order of time: what is before the rounds, rounds by number, rebirth."""
    if numbered := re.fullmatch(r"round_(\d+)", folder_name):
        return 1, int(numbered[1]), ""
    return (2 if folder_name == "rebirth" else 0), 0, folder_name


def _stage_name(folder_name: str) -> str:
    return "SFT" if folder_name == "sft" else folder_name.replace("_", " ")


# Drawing.


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


def plot_summary(summary: Summary, path: Path) -> None:
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


def _draw_rates(summary: Summary, axes: Any, look: _Look) -> None:
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


# The page.


def write_page(record: RunRecord, path: Path) -> None:
    """Write the run as one HTML file that asks no network for anything; it appears whole or not at all."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = lambda value, column: _write(column, value)
    page = environment.get_template("run.html.jinja").render(
        record=record,
        summary=record.summary,
        heads=_heads(),
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
