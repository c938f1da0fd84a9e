"""Train variants of mrDPO over several seeds and compare them in one table with confidence intervals.

    python tools/ablation.py --seeds 2 3 4
    python tools/ablation.py --variants mrdpo --config recipes/configs/mrdpo.yaml --clips-seed 100 --out run/proof

Each run is one of recipes/mrdpo.py with its own folder, `OUT/seed_K/VARIANT/`. Results that the variants of a seed
share are computed once, by the seed's mrDPO run, and copied into the other folders before those runs start. Finished
runs are skipped: run the same command again to resume. Other flags are passed on to the recipe. docs/ablation.md
describes the comparison and how to read it.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ablation_variants import BASE, HYPOTHESES, ROWS, VARIANTS, Hypothesis
from lab_driver import copy_results, lock_folder, one_thread
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy import stats

from salmonn.files import atomic_folder, read_json, read_records, write_text
from salmonn.records import Caption, Reference, Score
from salmonn.score.formats import read_scores
from salmonn.score.metrics import MEASURES, qa_accuracy
from salmonn.score.stats import Interval
from salmonn.train.data import CLIPS_NAME, HELDOUT_SEED_OFFSET
from salmonn.train.run_steps import MERGED_FILES, SETTINGS_NAME

ROOT = Path(__file__).parent.parent
NUM_RESAMPLES = 10_000
LOG_NAME = "log.txt"
RATES = {
    "total": "Total %",
    "missing": "Missing %",
    "hallucination": "Hallucination %",
    "repetition": "Repetition %",
    "qa_accuracy": "QA accuracy %",
}
COLUMNS = RATES | {"kl": "KL, nats per token"}
Numbers = NDArray[np.float64]
Failure = Future[Path | None]
console = Console(width=160)


@dataclass(frozen=True)
class Ablation:
    """Settings of all runs.

    Args:
        out: folder of all runs.
        seeds: training seeds; seed K is trained on clips of seed `clips_seed` + K.
        variants: names of the runs.
        jobs: number of runs at a time.
        rounds: rounds of DPO.
        steps: optimizer steps of each round; a single long round has the steps of all rounds.
        config: base configuration of the recipe.
        clips_seed: offset of the seed of the clips.
        extra: further flags of the recipe.
    """

    out: Path
    seeds: tuple[int, ...] = (2, 3, 4)
    variants: tuple[str, ...] = tuple(VARIANTS)
    jobs: int = 2
    rounds: int = 3
    steps: int = 50
    config: Path = ROOT / "recipes" / "configs" / "ablation.yaml"
    clips_seed: int = 200
    extra: tuple[str, ...] = ()

    def folder(self, variant: str, seed: int) -> Path:
        """Return the folder of a run."""
        return self.out / f"seed_{seed}" / variant

    def command(self, variant: str, seed: int) -> list[str]:
        """Return the command line of a run."""
        rounds = 1 if VARIANTS[variant].one_round else self.rounds
        flags: dict[str, object] = {
            "out": self.folder(variant, seed),
            "clips_dir": self.out / "clips",
            "feature_cache.folder": self.out / "features",
            "seed": seed,
            "synth.seed": self.clips_seed + seed,
            "rounds": rounds,
            "fit.steps": self.steps * self.rounds // rounds,
        }
        line = [sys.executable, str(ROOT / "recipes" / "mrdpo.py"), f"--config={self.config}", *self.extra]
        return [*line, *(f"--{name}={value}" for name, value in (flags | VARIANTS[variant].flags).items())]


def run_all(ablation: Ablation) -> None:
    """Run all variants that have not finished, the mrDPO run of a seed first.

    Raises:
        SystemExit: a run failed. Runs that do not depend on it have been run.
    """
    others = [(variant, seed) for seed in ablation.seeds for variant in ablation.variants if variant != BASE]
    with lock_folder(ablation.out) as lock, ThreadPoolExecutor(ablation.jobs) as pool:
        # The pool starts runs in the order of submission, so no run waits for one that cannot start.
        bases = {seed: pool.submit(run, BASE, seed, ablation, lock=lock) for seed in ablation.seeds}
        rest = [pool.submit(run, variant, seed, ablation, lock=lock, base=bases[seed]) for variant, seed in others]
        try:
            failed = [folder for future in (*bases.values(), *rest) if (folder := future.result())]
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failed:
        raise SystemExit(
            f"{len(failed)} runs failed, see {failed[0] / LOG_NAME} first. Run the same command to resume."
        )


def run(variant: str, seed: int, ablation: Ablation, *, lock: int, base: Failure | None = None) -> Path | None:
    """Run a variant unless it has finished; return its folder if it failed.

    Args:
        lock: file descriptor that the run inherits.
        base: mrDPO run of the seed, which must succeed first.
    """
    folder = ablation.folder(variant, seed)
    if base is not None:
        if base.result():
            return None
        copy_shared(variant, folder, ablation.folder(BASE, seed))
    if (folder / "summary.json").is_file():
        return None
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with (folder / LOG_NAME).open("ab") as log:
        command = ablation.command(variant, seed)
        code = subprocess.run(
            command, stdout=log, stderr=log, env=one_thread(), pass_fds=(lock,), check=False
        ).returncode
    minutes = (time.monotonic() - start) / 60
    result = "FAILED" if code else "done"
    console.print(f"{time.strftime('%H:%M:%S')} seed {seed}, {variant}: {result} in {minutes:.1f} min")
    return folder if code else None


def copy_shared(variant: str, folder: Path, base: Path) -> None:
    """Create the folder of a run with the results that it shares with the mrDPO run; keep a folder that exists."""
    if folder.exists():
        return
    with atomic_folder(folder) as temporary:
        # With its settings, so that the run checks that it has them too.
        copy_results(base, temporary, (SETTINGS_NAME, *VARIANTS[variant].copied))
        if VARIANTS[variant].retrain_last:
            last = max(temporary.glob("round_*"), key=lambda path: int(path.name.removeprefix("round_")))
            for file in (path for name in (*MERGED_FILES, "heldout") for path in last.glob(name)):
                (shutil.rmtree if file.is_dir() else Path.unlink)(file)


@dataclass(frozen=True)
class Estimate:
    """A measure over several seeds, or the difference of two.

    Args:
        seeds: (S,) value over the held-out clips of each seed.
        resamples: (S, R) value over R bootstrap samples of those clips; R is 0 for measures of the whole set.
    """

    seeds: Numbers
    resamples: Numbers

    def __sub__(self, other: "Estimate") -> "Estimate":
        """Return the difference; both have the same bootstrap samples, so the difficulty of clips cancels out."""
        return Estimate(self.seeds - other.seeds, self.resamples - other.resamples)

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return float(self.seeds.mean())

    def interval(self) -> Interval | None:
        """Return the 95 % interval, or None for one seed without bootstrap samples.

        Each end is the wider of two: Student's t over seeds, which covers all that differs between trainings but is
        too narrow where a few seeds agree by chance, and the bootstrap over clips.
        """
        ends = []
        if (count := len(self.seeds)) > 1:
            half = float(stats.t.ppf(0.975, count - 1)) * float(self.seeds.std(ddof=1)) / count**0.5
            ends.append((self.mean - half, self.mean + half))
        if self.resamples.size:
            low, high = np.quantile(self.resamples.mean(0), [0.025, 0.975])
            ends.append((float(low), float(high)))
        return Interval(min(low for low, _ in ends), max(high for _, high in ends)) if ends else None

    def to_text(self, measure: str, *, signed: bool = False) -> str:
        """Format mean and interval, in percent except for the KL."""
        (scale, digits), sign = (1, 3) if measure == "kl" else (100, 1), "+" if signed else ""
        interval = self.interval()
        numbers = [self.mean] + ([interval.low, interval.high] if interval else [])
        mean, *ends = (f"{scale * number:{sign}.{digits}f}" for number in numbers)
        return f"{mean} ({ends[0]} to {ends[1]})" if ends else mean

    def to_json(self) -> dict[str, object]:
        """Return the mean, the value of each seed, and the ends of the interval."""
        interval = self.interval()
        return {"mean": self.mean, "seeds": self.seeds.tolist()} | (vars(interval) if interval else {})


def judge(hypothesis: Hypothesis, difference: Estimate) -> str:
    """Return whether the whole interval lies on the expected side of 0, on the other side, or on both."""
    interval = difference.interval()
    if interval is None or interval.low <= 0 <= interval.high:
        return "inconclusive"
    return "supported" if (interval.high < 0) == (hypothesis.direction == "falls") else "contradicted"


def read_estimates(ablation: Ablation) -> dict[str, dict[str, Estimate]]:
    """Return row -> measure -> estimate for all rows whose stages have been run."""
    found: dict[str, dict[str, list[tuple[float, Numbers]]]] = {}
    for seed in ablation.seeds:
        references = read_heldout(ablation, seed)
        weights = np.random.default_rng(seed).multinomial(
            len(references), np.full(len(references), 1 / len(references)), size=NUM_RESAMPLES
        )
        for name, row in ROWS.items():
            folder = ablation.folder(row.variant, seed)
            if row.variant not in ablation.variants:
                continue
            summary = read_json(folder / "summary.json")
            stage = f"round_{len(summary['rounds'])}" if row.stage == "last" else row.stage
            if not (row.stage == "last" or summary[stage]):
                continue
            values = found.setdefault(name, {measure: [] for measure in COLUMNS})
            kl = 0.0 if stage == "sft" else summary["kl"][stage.replace("_", " ")]
            values["kl"].append((kl, np.zeros(0)))
            for measure, (numerators, denominators) in count_clips(folder / stage / "heldout", references).items():
                # At least 1, as in the rates.
                whole = float(numerators.sum() / max(denominators.sum(), 1))
                values[measure].append((whole, (weights @ numerators) / np.maximum(weights @ denominators, 1)))
    return {
        name: {
            measure: Estimate(np.array([whole for whole, _ in parts]), np.array([samples for _, samples in parts]))
            for measure, parts in values.items()
        }
        for name, values in found.items()
    }


def read_heldout(ablation: Ablation, seed: int) -> list[Reference]:
    """Return the annotations of a seed's held-out clips."""
    num_clips = read_json(ablation.folder(BASE, seed) / "summary.json")["sft"]["clips"]
    name = f"seed{HELDOUT_SEED_OFFSET + ablation.clips_seed + seed}-{num_clips}"
    return read_records(ablation.out / "clips" / name / CLIPS_NAME, Reference)


def count_clips(folder: Path, references: Sequence[Reference]) -> dict[str, tuple[Numbers, Numbers]]:
    """Return measure -> numerators and denominators (N,) of its ratio, over the captions or questions of each clip."""
    scores: dict[str, list[Score]] = {reference.video: [] for reference in references}
    answers: dict[str, list[Caption]] = {reference.video: [] for reference in references}
    for score in read_scores(folder / "scores.jsonl").scores:
        scores[score.video].append(score)
    for answer in read_records(folder / "answers.jsonl", Caption):
        answers[answer.video].append(answer)

    def sums(count: Callable[[Score], int]) -> Numbers:
        return np.array([float(sum(map(count, scores[one.video]))) for one in references])

    counts = {name: (sums(top), sums(bottom)) for name, (top, bottom) in MEASURES.items() if name in COLUMNS}
    num_questions = np.array([float(len(one.questions)) for one in references])
    accuracy = [qa_accuracy({one.video: one}, answers[one.video]) if one.questions else 0.0 for one in references]
    return counts | {"qa_accuracy": (np.array(accuracy) * num_questions, num_questions)}


def check_goals(summary: Mapping[str, Any]) -> dict[str, bool]:
    """Return the goals of an mrDPO run with rebirth, and whether it reached them."""
    sft, last, rebirth = summary["sft"], summary["rounds"][-1], summary["rebirth"]
    goals = {
        "Total falls by 45 %": last["total"] <= 0.55 * sft["total"],
        "Missing falls": last["missing"] < sft["missing"],
        "Hallucination falls": last["hallucination"] < sft["hallucination"],
        "Repetition does not rise": last["repetition"] <= sft["repetition"],
    }
    if rebirth:
        gain, kept_gain = sft["total"] - last["total"], sft["total"] - rebirth["total"]
        goals["rebirth keeps 90 % of the gain"] = kept_gain >= 0.9 * gain
        goals["QA accuracy of rebirth within 1 point of SFT"] = rebirth["qa_accuracy"] >= sft["qa_accuracy"] - 0.01
    return goals


def stage_table(summaries: Mapping[int, Mapping[str, Any]]) -> list[list[str]]:
    """Return the rates of each stage of the mrDPO runs, the header first."""
    lines = [["seed", "stage", *RATES.values()]]
    for seed, summary in summaries.items():
        stages = {"SFT": summary["sft"]} | {f"round {i}": rates for i, rates in enumerate(summary["rounds"], start=1)}
        stages |= {"rebirth": summary["rebirth"]} if summary["rebirth"] else {}
        lines += [[str(seed), name, *(f"{100 * rates[key]:.1f}" for key in RATES)] for name, rates in stages.items()]
    return lines


def row_table(estimates: Mapping[str, Mapping[str, Estimate]]) -> list[list[str]]:
    """Return the table of variants, the header first."""
    lines = [["", *COLUMNS.values(), "published Total %"]]
    for name, values in estimates.items():
        published = ROWS[name].published_total
        cells = [values[measure].to_text(measure) for measure in COLUMNS]
        lines.append([ROWS[name].title, *cells, "" if published is None else f"{published}"])
    return lines


def hypothesis_table(differences: Mapping[Hypothesis, Mapping[str, Estimate]]) -> list[list[str]]:
    """Return the table of hypotheses, the header first."""
    shown = ("total", "repetition", "qa_accuracy", "kl")
    lines = [["difference", *(COLUMNS[measure] for measure in shown), "expected", "result"]]
    for hypothesis, values in differences.items():
        cells = [values[measure].to_text(measure, signed=True) for measure in shown]
        expected = f"{COLUMNS[hypothesis.measure].removesuffix(' %')} {hypothesis.direction}"
        lines.append([hypothesis.text, *cells, expected, judge(hypothesis, values[hypothesis.measure])])
    return lines


def report(ablation: Ablation) -> None:
    """Print the tables and write them to results.json and table.md."""
    estimates = read_estimates(ablation)
    differences = {
        one: {name: value - estimates[one.first][name] for name, value in estimates[one.second].items()}
        for one in HYPOTHESES
        if one.first in estimates and one.second in estimates
    }
    summaries = {seed: read_json(ablation.folder(BASE, seed) / "summary.json") for seed in ablation.seeds}
    goals = {seed: check_goals(summary) for seed, summary in summaries.items()}
    text = []
    for lines in (stage_table(summaries), row_table(estimates), hypothesis_table(differences)):
        table = Table(*lines[0])
        for line in lines[1:]:
            table.add_row(*line)
        console.print(table)
        head, *body = ("| " + " | ".join(line) + " |" for line in lines)
        text += [head, "| --- |" + " ---: |" * (len(lines[0]) - 1), *body, ""]
    notes = [
        f"seed {seed}: {goal}: {'yes' if reached else 'NO'}" for seed in goals for goal, reached in goals[seed].items()
    ]
    runs = [f"seed_{seed}/{variant}" for seed in ablation.seeds for variant in ablation.variants]
    reasons = {name: read_json(ablation.out / name / "summary.json")["stopped"] for name in runs}
    stopped = {name: reason for name, reason in reasons.items() if reason}
    notes += [f"{name} stopped early: {reason}" for name, reason in stopped.items()]
    console.print("\n".join(notes))
    write_text(ablation.out / "table.md", "\n".join([*text, *(f"{note}\n" for note in notes)]))
    findings = [
        vars(one) | {"result": judge(one, values[one.measure]), "differences": values}
        for one, values in differences.items()
    ]
    results = {"seeds": ablation.seeds, "rows": estimates, "hypotheses": findings, "goals": goals, "stopped": stopped}
    write_text(ablation.out / "results.json", json.dumps(results, indent=2, default=Estimate.to_json) + "\n")
    console.print(f"wrote results.json and table.md to {ablation.out}")


def main(args: Sequence[str] | None = None) -> None:
    """Run the variants and report the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    default = Ablation(Path("run/ablation"))
    parser.add_argument("--out", type=Path, default=default.out, help="folder of all runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=default.seeds, help="training seeds")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=default.variants, help="runs, with mrdpo")
    parser.add_argument("--jobs", type=int, default=default.jobs, help="runs at a time, each with one thread")
    parser.add_argument("--rounds", type=int, default=default.rounds, help="rounds of DPO")
    parser.add_argument("--steps", type=int, default=default.steps, help="optimizer steps of each round")
    parser.add_argument("--config", type=Path, default=default.config, help="base configuration of the recipe")
    parser.add_argument("--clips-seed", type=int, default=default.clips_seed, help="seed K has clips of this plus K")
    values, extra = parser.parse_known_args(args)
    if BASE not in values.variants or values.jobs < 1:
        parser.error(f"--variants needs {BASE}, whose results the others start from, and --jobs at least 1")
    values.seeds, values.variants = tuple(values.seeds), tuple(values.variants)
    ablation = Ablation(**vars(values), extra=tuple(extra))
    run_all(ablation)
    report(ablation)


if __name__ == "__main__":
    main()
