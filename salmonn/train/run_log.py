"""A run looked back on: its stages in a table, and what its folder holds. Needs no torch."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from salmonn.preference.selection import PairReport, summarise_pairs
from salmonn.records import Comparison, parse_record, read_json, read_records
from salmonn.score.metrics import Rates

COLUMNS = {
    "missing": "Missing",
    "hallucination": "Hallucination",
    "total": "Total",
    "repetition": "Repetition",
    "qa_accuracy": "QA accuracy",
}
KL = "KL"
STEPS_NAME = "steps.jsonl"


@dataclass
class RunSummary:
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
    def from_json(cls, value: Mapping[str, Any]) -> "RunSummary":
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


def print_table(summary: RunSummary) -> None:
    """Print the stages as a table, in percent; and why the rounds stopped."""
    table = Table(title=f"{summary.sft.clips} held-out clips")
    table.add_column("stage")
    for title in column_titles():
        table.add_column(title, justify="right")
    for stage, figures in summary.figures.items():
        is_best = stage == summary.best_stage
        cells = (format_figure(column, value) for column, value in figures.items())
        table.add_row(f"{stage}, best" if is_best else stage, *cells, style="bold" if is_best else None)
    console = Console(width=110)
    console.print(table)
    if summary.stopped:
        console.print(f"stopped: {summary.stopped}", highlight=False, markup=False, soft_wrap=True)


def column_titles() -> list[str]:
    """Of the table's columns of figures."""
    return [*(f"{title} %" for title in COLUMNS.values()), f"{KL} nats a token"]


def format_figure(column: str, value: float | None) -> str:
    """A figure as its column shows it: in percent, or nats; "-" where it was not measured."""
    if value is None:
        return "-"
    return f"{value:.3f}" if column == KL else f"{100 * value:.1f}"


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
    summary: RunSummary | None
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


def _read_summary(path: Path) -> RunSummary:
    try:
        return RunSummary.from_json(read_json(path))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no summary of a run: {error}") from error


def _measured_so_far(folder: Path) -> RunSummary | None:
    """From what each stage has measured: of a run that is going on, or was killed."""
    found = {path.parents[1].name: parse_record(read_json(path), Rates) for path in folder.glob("*/heldout/rates.json")}
    if "sft" not in found:
        return None
    rounds = sorted((name for name in found if name.startswith("round_")), key=_place)
    # Of several, on other numbers of clips, the latest counts.
    measured = sorted(folder.glob("*/heldout/kl_*.json"), key=lambda path: path.stat().st_mtime_ns)
    kl = {_stage_name(path.parents[1].name): read_json(path) for path in measured}
    return RunSummary(found["sft"], [found[name] for name in rounds], found.get("rebirth"), kl)


def _read_stages(folder: Path) -> Iterator[StageLog]:
    if own := read_steps(folder / STEPS_NAME):
        yield StageLog(folder.resolve().name, own)
    for name in sorted({path.parent.name for path in folder.glob("*/*.jsonl")}, key=_place):
        steps, pairs = read_steps(folder / name / STEPS_NAME), folder / name / "pairs.jsonl"
        report = summarise_pairs(read_records(pairs, Comparison)) if pairs.is_file() else None
        if steps or report:
            yield StageLog(_stage_name(name), steps, report)


def _place(folder_name: str) -> tuple[int, int, str]:
    """Folders in the order of time: what is before the rounds, rounds by number, rebirth."""
    if numbered := re.fullmatch(r"round_(\d+)", folder_name):
        return 1, int(numbered[1]), ""
    return (2 if folder_name == "rebirth" else 0), 0, folder_name


def _stage_name(folder_name: str) -> str:
    return "SFT" if folder_name == "sft" else folder_name.replace("_", " ")
