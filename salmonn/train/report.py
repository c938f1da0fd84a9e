"""The end of a run in one table and one picture: each stage against the rates on held-out clips."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.table import Table

from salmonn.score.rates import Rates

matplotlib.use("Agg")  # no screen is needed, nor looked for
from matplotlib import pyplot

COLUMNS = {
    "missing": "Missing",
    "hallucination": "Hallucination",
    "total": "Total",
    "repetition": "Repetition",
    "qa_accuracy": "QA accuracy",
}


@dataclass
class Summary:
    """Rates of every stage of a run."""

    sft: Rates
    rounds: list[Rates] = field(default_factory=list)
    rebirth: Rates | None = None

    def to_json(self) -> dict[str, Any]:
        """`{"sft": {...}, "rounds": [{...}], "rebirth": {...}}`, fractions."""
        return asdict(self)

    @property
    def stages(self) -> Mapping[str, Rates]:
        """Name -> rates, in the order of time."""
        named = {"SFT": self.sft}
        named |= {f"round {number}": rates for number, rates in enumerate(self.rounds, start=1)}
        return named | ({"rebirth": self.rebirth} if self.rebirth else {})


def print_table(summary: Summary) -> None:
    """Print the stages as a table, in percent."""
    table = Table(title=f"{summary.sft.clips} held-out clips")
    table.add_column("stage")
    for title in COLUMNS.values():
        table.add_column(f"{title} %", justify="right")
    for stage, rates in summary.stages.items():
        table.add_row(stage, *(_percent(getattr(rates, key)) for key in COLUMNS))
    Console(width=100).print(table)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def plot_summary(summary: Summary, path: Path) -> None:
    """Draw the rates over the stages to a PNG file."""
    stages = list(summary.stages)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for key, title in COLUMNS.items():
        values: Sequence[float | None] = [getattr(rates, key) for rates in summary.stages.values()]
        if None in values:
            continue
        style = "--" if key == "qa_accuracy" else "-"
        axes.plot(stages, [100 * value for value in values if value is not None], style, marker="o", label=title)
    axes.set_ylabel("%")
    axes.set_ylim(bottom=0)
    axes.set_title(f"mrDPO on {summary.sft.clips} held-out clips")
    axes.grid(alpha=0.3)
    axes.legend(ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
