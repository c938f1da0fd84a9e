"""Logs of a run: each step's metrics, the rates of every stage, and reading both back from a run folder.

Imports torch only to write TensorBoard events, so that `salmonn plot` starts without it.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.table import Table

from salmonn.files import parse_record, read_json, read_records, write_text
from salmonn.preference.selection import PairSummary, summarize_pairs
from salmonn.records import Comparison
from salmonn.score.metrics import Rates
from salmonn.train import trackers

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

COLUMNS = {
    "missing": "Missing",
    "hallucination": "Hallucination",
    "total": "Total",
    "repetition": "Repetition",
    "qa_accuracy": "QA accuracy",
}
KL = "KL"
STEPS_NAME = "steps.jsonl"
ROUNDS_NAME = "rounds.jsonl"
ROUNDING_NAME = "rounding.json"  # of a stage whose merged weights have 16 bits
SUMMARY_NAME = "summary.json"
REWARD_ROUND_NAME = "reward_round.json"  # of a round whose captions a reward model has rated
PROXY_NAME = "proxy.json"  # in heldout/ of such a round: how much the reward of the held-out captions rose


@dataclass(frozen=True)
class RewardRound:
    """A reward model in one round of mrDPO.

    Args:
        agreement, low, high: share of the judge's comparisons of new captions that the last round's model orders alike,
            with its 95 % interval; None if there was no audit.
        audited_pairs: number of these comparisons.
        heldout_accuracy, blind_accuracy: accuracy of this round's model on held-out clips, and that of its blind twin.
        num_judged: captions that the judge has rated.
        num_captions: all captions of the round.
        trained: whether the reward model was trained in this round.
        reason: why it was or was not, as a sentence; "" if the settings alone decide.
        audited_clips: number of clips whose new captions were audited.
        learned_clips: number of these that the audited model has learned from; if any, agreement may be too high.
    """

    agreement: float | None
    low: float | None
    high: float | None
    audited_pairs: int
    heldout_accuracy: float | None
    blind_accuracy: float | None
    num_judged: int
    num_captions: int
    trained: bool = True
    reason: str = ""
    audited_clips: int = 0
    learned_clips: int = 0


@dataclass
class RunSummary:
    """Rates of every stage of a run.

    Args:
        sft, rounds, rebirth: held-out rates of the start, of each round, and of rebirth.
        kl: name of a stage, as in `stages` -> KL divergence of its model from the start, in nats per token.
        best: folder of the best round.
        stopped: why the rounds stopped early, or why there is no rebirth; None if all went well.
        reward: the reward model in each round; empty if the judge rated all captions.
        proxy: name of a stage -> mean reward of its held-out captions above the start's by the reward models, in
            standard deviations; empty as above.
    """

    sft: Rates
    rounds: list[Rates] = field(default_factory=list)
    rebirth: Rates | None = None
    kl: dict[str, float] = field(default_factory=dict)
    best: str | None = None
    stopped: str | None = None
    reward: list[RewardRound] = field(default_factory=list)
    proxy: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "RunSummary":
        """Parse a summary as `dataclasses.asdict` returns it, or the bare rates of a run with one stage.

        Raises:
            ValueError: the values are not rates.
        """
        return parse_record(value if "sft" in value else {"sft": value}, cls)

    @property
    def stages(self) -> Mapping[str, Rates]:
        """Name of a stage -> rates, in the order of the run."""
        named = {"SFT": self.sft}
        named |= {f"round {number}": rates for number, rates in enumerate(self.rounds, start=1)}
        return named | ({"rebirth": self.rebirth} if self.rebirth else {})

    @property
    def figures(self) -> Mapping[str, Mapping[str, float | None]]:
        """Name of a stage -> column of the table -> fraction, or KL in nats per token; None if it was not measured."""
        return {
            stage: {title: getattr(rates, key) for key, title in COLUMNS.items()} | {KL: self.kl.get(stage)}
            for stage, rates in self.stages.items()
        }

    def add_proxy(self, number: int, gain: float) -> None:
        """Add how much the reward of the held-out captions rose in a round."""
        before = self.proxy.setdefault("SFT", 0.0) if number == 1 else self.proxy[f"round {number - 1}"]
        self.proxy[f"round {number}"] = before + gain

    @property
    def best_stage(self) -> str | None:
        """Name of the best stage, as in `stages`."""
        return stage_name(self.best) if self.best else None


def stage_name(folder_name: str) -> str:
    """Return the name of the stage in a folder of a run: "round 2" for round_2."""
    return "SFT" if folder_name == "sft" else folder_name.replace("_", " ")


def print_summary(summary: RunSummary) -> None:
    """Print the stages as a table, in percent, and why the rounds stopped."""
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
    if summary.reward:
        judged, captions = (
            sum(getattr(one, name) for one in summary.reward) for name in ("num_judged", "num_captions")
        )
        agreements = ", ".join(
            "-" if one.agreement is None else f"{100 * one.agreement:.0f}{'*' if one.learned_clips else ''}"
            for one in summary.reward
        )
        note = " (*: also on clips that the model has learned from)" if "*" in agreements else ""
        console.print(
            f"reward model: the judge rated {judged} of {captions} captions ({captions - judged} calls saved); "
            f"agreement on new captions by round, %: {agreements}{note}",
            highlight=False,
            soft_wrap=True,
        )
    if summary.proxy:
        rewards = ", ".join(f"{reward:+.2f}" for stage, reward in summary.proxy.items() if stage != "SFT")
        changes = ", ".join(f"{100 * (rates.total - summary.sft.total):+.1f}" for rates in summary.rounds)
        console.print(
            f"held-out captions by round, against the start: reward {rewards} standard deviations by the reward model, "
            f"Total {changes} points by the judge",
            highlight=False,
            soft_wrap=True,
        )


def column_titles() -> list[str]:
    """Return the titles of the table's columns, with units."""
    return [*(f"{title} %" for title in COLUMNS.values()), f"{KL}, nats per token"]


def format_figure(column: str, value: float | None) -> str:
    """Format a value of a column: in percent, or in nats; "-" if it was not measured."""
    if value is None:
        return "-"
    return f"{value:.3f}" if column == KL else f"{100 * value:.1f}"


class StepLog:
    """Metrics of each step, in steps.jsonl, in TensorBoard events next to it and in a tracker; only rank 0 creates one.

    Opening the log drops what a killed run wrote for this step and later ones, since these steps are repeated: from the
    file at once, from TensorBoard by a purge mark that its reader obeys.
    """

    def __init__(self, folder: Path, *, first_step: int) -> None:
        self._folder = folder
        path = folder / STEPS_NAME
        finished = [figures for figures in read_steps(path) if figures["step"] < first_step]
        write_text(path, "".join(json.dumps(figures) + "\n" for figures in finished))
        self._file: TextIO = path.open("a", encoding="utf-8")
        self._events = open_events(folder, first_step=first_step)

    def __call__(self, step: int, figures: Mapping[str, float]) -> None:
        """Write the metrics of one step and flush them."""
        self._file.write(json.dumps({"step": step, **figures}) + "\n")
        self._file.flush()
        for name, value in figures.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()
        trackers.report(self._folder, figures, step=step)

    def close(self) -> None:
        """Close both files."""
        self._file.close()
        self._events.close()


def open_events(folder: Path, *, first_step: int) -> "SummaryWriter":
    """Open TensorBoard events of a folder; events of `first_step` and later in earlier files become void."""
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - imports torch

    return SummaryWriter(str(folder), purge_step=first_step)


def log_summary(folder: Path, summary: RunSummary) -> None:
    """Write the rates of all stages: a line each to rounds.jsonl, and to TensorBoard with the stage's number as step.

    Those of the newest stage go to the run's tracker, too. Rates are fractions, KL is in nats per token, the number of
    SFT is 0. A stage that was merged into 16-bit weights has "rounding": how much of its update remained. With a reward
    model, "proxy" is the reward of the stage's held-out captions above the start's, in standard deviations. Earlier
    contents are replaced or become void, so this may be called after every stage.
    """
    lines: list[dict[str, Any]] = []
    for name, rates in summary.stages.items():
        lines.append({"stage": name, **asdict(rates), "kl": summary.kl.get(name)})
        if name in summary.proxy:
            lines[-1]["proxy"] = summary.proxy[name]
        if (path := folder / name.replace(" ", "_") / ROUNDING_NAME).is_file():
            lines[-1]["rounding"] = read_json(path)
    write_text(folder / ROUNDS_NAME, "".join(json.dumps(line) + "\n" for line in lines))
    with open_events(folder, first_step=0) as events:
        for number, figures in enumerate(summary.figures.values()):
            for title, value in figures.items():
                if value is not None:
                    events.add_scalar(title, value, number)
        for number, reward in enumerate(summary.proxy.values()):
            events.add_scalar("Reward of the reward model", reward, number)
    newest = len(summary.stages) - 1
    known = {title: value for title, value in [*summary.figures.values()][newest].items() if value is not None}
    trackers.report(folder / "heldout", known, step=newest)


def read_steps(path: Path) -> list[dict[str, float]]:
    """Read the metrics of all steps, with their numbers as "step"; none if there is no file.

    Incomplete lines, as a kill or a full disk leaves them, are skipped.
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


@dataclass(frozen=True)
class StageRecord:
    """Files of one stage of training.

    Args:
        name: "round 2", "rebirth", or the name of a run with one stage.
        steps: metrics of each step, with its number as "step".
        pairs: summary of its preference pairs; None for a stage without its own pairs.
    """

    name: str
    steps: Sequence[Mapping[str, float]]
    pairs: PairSummary | None = None


@dataclass(frozen=True)
class RunRecord:
    """Contents of a run folder.

    Args:
        name: name of the folder.
        summary: rates of the stages; None if none was measured.
        is_complete: whether the run wrote its summary, at its end.
        stages: stages in the order of the run.
        config: resolved config as YAML; "" if there is none.
    """

    name: str
    summary: RunSummary | None
    is_complete: bool
    stages: Sequence[StageRecord]
    config: str = ""


def read_run(folder: Path) -> RunRecord:
    """Read what a recipe has written so far.

    Raises:
        ValueError: the folder holds no run, or a file in it is malformed.
    """
    path = folder / SUMMARY_NAME
    if path.is_file():
        try:
            summary: RunSummary | None = RunSummary.from_json(read_json(path))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is not the summary of a run: {error}") from error
    else:
        summary = _summary_so_far(folder)
    stages = list(_read_stages(folder))
    if not stages and summary is None:
        raise ValueError(
            f"{folder} holds no run; pass the folder that a recipe wrote to, with summary.json, {STEPS_NAME} or round_1"
        )
    configs = sorted(folder.glob("*.yaml"))
    return RunRecord(
        name=folder.resolve().name,
        summary=summary,
        is_complete=path.is_file(),
        stages=stages,
        config=configs[0].read_text(encoding="utf-8") if configs else "",
    )


def _summary_so_far(folder: Path) -> RunSummary | None:
    """Return the rates that the stages of an unfinished run have written."""
    rates = {path.parents[1].name: parse_record(read_json(path), Rates) for path in folder.glob("*/heldout/rates.json")}
    if "sft" not in rates:
        return None
    rounds = sorted((name for name in rates if name.startswith("round_")), key=_stage_order)
    # The latest of several measurements, which differ in the number of clips.
    measured = sorted(folder.glob("*/heldout/kl_*.json"), key=lambda path: path.stat().st_mtime_ns)
    kl = {stage_name(path.parents[1].name): read_json(path) for path in measured}
    summary = RunSummary(rates["sft"], [rates[name] for name in rounds], rates.get("rebirth"), kl)
    for number, name in enumerate(rounds, start=1):
        if not (path := folder / name / "heldout" / PROXY_NAME).is_file():
            break
        summary.add_proxy(number, read_json(path))
    return summary


def _read_stages(folder: Path) -> Iterator[StageRecord]:
    if steps := read_steps(folder / STEPS_NAME):
        yield StageRecord(folder.resolve().name, steps)
    # A run folder also holds folders that are not stages, such as votes, which have their own pairs.jsonl.
    names = {path.parent.name for path in (*folder.glob(f"*/{STEPS_NAME}"), *folder.glob("round_*/pairs.jsonl"))}
    for name in sorted(names, key=_stage_order):
        steps, path = read_steps(folder / name / STEPS_NAME), folder / name / "pairs.jsonl"
        pairs = summarize_pairs(read_records(path, Comparison)) if path.is_file() else None
        if steps or pairs:
            yield StageRecord(stage_name(name), steps, pairs)


def _stage_order(folder_name: str) -> tuple[int, int, str]:
    """Sort key of folders: stages before the rounds, rounds by number, rebirth."""
    if numbered := re.fullmatch(r"round_(\d+)", folder_name):
        return 1, int(numbered[1]), ""
    return (2 if folder_name == "rebirth" else 0), 0, folder_name
