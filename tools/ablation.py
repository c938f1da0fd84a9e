"""The papers' ablation at toy size: ways of training that differ in one thing each, over several seeds, in one table.

    python tools/ablation.py --seeds 2 3 4

Every way is a run of recipes/mrdpo.py in a folder of its own, `run/ablation/seed_K/NAME/`. What runs of a seed have in
common is made once, by its run of mrDPO, and copied into the others' folders before they start. Runs that are done are
not run again; a killed one goes on with the same command. docs/ablation.md says what is compared and how to read it.
"""

import argparse
import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from salmonn.records import Caption, Reference, atomic_folder, read_json, read_records, write_json, write_text
from salmonn.score.formats import read_scores
from salmonn.score.metrics import qa_accuracy
from salmonn.score.stats import MEASURES, Interval
from salmonn.train.references import CLIPS_NAME, HELDOUT_SEED_OFFSET

ROOT = Path(__file__).parent.parent
CLIPS_SEED = 200  # seed K is trained on clips of seed 200 + K, apart from those that settings were chosen on
RESAMPLES = 10_000
LOG_NAME = "log.txt"
# 97.5 % quantiles of Student's t by number of seeds; the degrees of freedom are one less.
T_QUANTILES = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
COLUMNS = {
    "total": "Total %",
    "missing": "Missing %",
    "hallucination": "Hallucination %",
    "repetition": "Repetition %",
    "qa_accuracy": "QA accuracy %",
    "kl": "KL, nats per token",
}
Numbers = NDArray[np.float64]
Direction = Literal["falls", "rises"]
console = Console(width=160)


@dataclass(frozen=True)
class Way:
    """A run of the recipe.

    Args:
        flags: what it changes in recipes/configs/ablation.yaml.
        taken: what it has in common with the seed's run of mrDPO.
        long: all steps of the rounds in a single one.
        last_anew: of the last round only the pairs are in common.
    """

    flags: dict[str, object]
    taken: tuple[str, ...] = ("sft",)
    long: bool = False
    last_anew: bool = False


SAMPLED = ("sft", *(f"round_1/{name}.jsonl" for name in ("captions", "scores", "pairs")))
NO_REBIRTH: dict[str, object] = {"rebirth": "null"}
BASE = "mrdpo"
# The round before a pair is compared with something else is the same in each of them: its reference is its own start.
WAYS = {
    BASE: Way({}, ()),
    "no_ce": Way(NO_REBIRTH | {"dpo.ce_weight": 0.0}, SAMPLED),
    "long_dpo": Way(NO_REBIRTH | {"dpo.ce_weight": 0.0}, SAMPLED, long=True),
    "long_gdpo": Way(NO_REBIRTH, SAMPLED, long=True),
    "frozen": Way(NO_REBIRTH | {"reference_policy": "run_start", "fresh_pairs": "false"}, ("sft", "round_1")),
    "first_pairs": Way(NO_REBIRTH | {"fresh_pairs": "false"}, ("sft", "round_1")),
    "questions": Way(NO_REBIRTH | {"qa_fraction": 0.25}, ("sft", "round_*"), last_anew=True),
    "going_on": Way({"rebirth.start": "best"}, ("sft", "round_*", "rebirth/captions.jsonl")),
}


@dataclass(frozen=True)
class AblationRow:
    """A row of the table.

    Args:
        title: of the row.
        way: the run that it is from.
        stage: sft, rebirth, or the last of the rounds.
        theirs: Total in the papers, %, where they tell it.
    """

    title: str
    way: str
    stage: Literal["sft", "last", "rebirth"] = "last"
    theirs: float | None = None


ROWS = {
    "sft": AblationRow("SFT", BASE, "sft", 41.8),
    "long_dpo": AblationRow("DPO, long", "long_dpo", theirs=37.8),
    "long_gdpo": AblationRow("guided DPO, long", "long_gdpo", theirs=39.7),
    "frozen": AblationRow("+ LoRA merged and renewed", "frozen", theirs=33.7),
    "first_pairs": AblationRow("+ reference refreshed", "first_pairs"),
    "mrdpo": AblationRow("+ new pairs: mrDPO", BASE, theirs=22.9),
    "no_ce": AblationRow("mrDPO without CE", "no_ce"),
    "questions": AblationRow("mrDPO, questions in the last round", "questions"),
    "rebirth": AblationRow("rebirth", BASE, "rebirth"),
    "going_on": AblationRow("going on instead", "going_on", "rebirth"),
}


@dataclass(frozen=True)
class Claim:
    """What the papers lead one to expect: from the first row to the second, the measure falls or rises."""

    text: str
    first: str
    second: str
    measure: str
    direction: Direction


CLAIMS = (
    Claim("long DPO against SFT", "sft", "long_dpo", "total", "falls"),
    Claim("guided against plain, long DPO", "long_dpo", "long_gdpo", "total", "rises"),
    Claim("LoRA merged and renewed", "long_gdpo", "frozen", "total", "falls"),
    Claim("reference refreshed", "frozen", "first_pairs", "total", "falls"),
    Claim("new pairs each round", "first_pairs", "mrdpo", "total", "falls"),
    Claim("mrDPO against guided DPO, long", "long_gdpo", "mrdpo", "total", "falls"),
    Claim("CE against none in mrDPO: Total", "no_ce", "mrdpo", "total", "falls"),
    Claim("CE against none in mrDPO: questions", "no_ce", "mrdpo", "qa_accuracy", "rises"),
    Claim("questions in the last round: questions", "mrdpo", "questions", "qa_accuracy", "rises"),
    Claim("rebirth against mrDPO: questions", "mrdpo", "rebirth", "qa_accuracy", "rises"),
    Claim("rebirth against going on: questions", "going_on", "rebirth", "qa_accuracy", "rises"),
    Claim("rebirth against going on: Total", "going_on", "rebirth", "total", "falls"),
)


@dataclass(frozen=True)
class Settings:
    """Of the whole.

    Args:
        out: folder for all runs.
        seeds: of training.
        ways: names of the runs.
        jobs: runs at once.
        rounds: of DPO.
        steps: of each round; a long one has those of all rounds.
        extra: further flags for the recipe.
    """

    out: Path
    seeds: tuple[int, ...] = (2, 3, 4)
    ways: tuple[str, ...] = tuple(WAYS)
    jobs: int = 2
    rounds: int = 3
    steps: int = 50
    extra: tuple[str, ...] = ()

    def folder(self, way: str, seed: int) -> Path:
        """Of one run."""
        return self.out / f"seed_{seed}" / way

    def command(self, way: str, seed: int) -> list[str]:
        """The command line of one run."""
        rounds = 1 if WAYS[way].long else self.rounds
        flags: dict[str, object] = {
            "out": self.folder(way, seed),
            "clips_dir": self.out / "clips",
            "feature_cache.folder": self.out / "features",
            "seed": seed,
            "synth.seed": CLIPS_SEED + seed,
            "rounds": rounds,
            "fit.steps": self.steps * self.rounds // rounds,
        }
        config = ROOT / "recipes" / "configs" / "ablation.yaml"
        line = [sys.executable, str(ROOT / "recipes" / "mrdpo.py"), f"--config={config}"]
        return [*line, *self.extra, *(f"--{name}={value}" for name, value in (flags | WAYS[way].flags).items())]


def prepare(way: str, folder: Path, base: Path) -> None:
    """Make a run's folder with what it has in common with the run of mrDPO, all of it at once."""
    if folder.exists():
        return
    with atomic_folder(folder) as half:
        for pattern in WAYS[way].taken:
            for source in sorted(base.glob(pattern)):
                target = half / source.relative_to(base)
                target.parent.mkdir(parents=True, exist_ok=True)
                if source.is_dir():
                    shutil.copytree(source, target)
                else:
                    shutil.copyfile(source, target)
        if WAYS[way].last_anew:
            last = max(half.glob("round_*"), key=lambda path: int(path.name.removeprefix("round_")))
            for made in ("adapter", "merged", "heldout"):
                shutil.rmtree(last / made)


@contextmanager
def alone(out: Path) -> Iterator[int]:
    """Wait until nothing works in a folder any more: what a killed command had started goes on without it.

    Yields:
        what keeps others waiting, to be handed on to all processes that work there.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.print(f"waiting for runs in {out} that an earlier command has started")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def run_all(settings: Settings) -> None:
    """Run what is not done yet, a seed's mrDPO before its other runs.

    Raises:
        SystemExit: a run failed; those that do not need it have been run.
    """
    others = [(way, seed) for seed in settings.seeds for way in settings.ways if way != BASE]
    with alone(settings.out) as lock, ThreadPoolExecutor(settings.jobs) as pool:
        # They start in the order of submission, so that none waits for one that cannot start before it ends.
        bases = {seed: pool.submit(run, BASE, seed, settings, lock=lock) for seed in settings.seeds}
        rest = [pool.submit(run_after, bases[seed], way, seed, settings, lock=lock) for way, seed in others]
        try:
            failed = [folder for future in (*bases.values(), *rest) if (folder := future.result())]
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failed:
        raise SystemExit(f"{len(failed)} runs failed, see {failed[0] / LOG_NAME} first; the same command goes on")


def run_after(base: "Future[Path | None]", way: str, seed: int, settings: Settings, *, lock: int) -> Path | None:
    """`run`, with what the seed's run of mrDPO has made, unless that failed."""
    if base.result():
        return None
    prepare(way, settings.folder(way, seed), settings.folder(BASE, seed))
    return run(way, seed, settings, lock=lock)


def run(way: str, seed: int, settings: Settings, *, lock: int) -> Path | None:
    """One run to its end, unless it is done; its folder where it failed, with its output in the log."""
    folder = settings.folder(way, seed)
    if (folder / "summary.json").is_file():
        return None
    folder.mkdir(parents=True, exist_ok=True)
    since = time.monotonic()
    with (folder / LOG_NAME).open("ab") as file:
        result = subprocess.run(
            settings.command(way, seed), stdout=file, stderr=file, env=one_thread(), pass_fds=(lock,), check=False
        )
    word = "FAILED" if result.returncode else "done"
    console.print(
        f"{time.strftime('%H:%M:%S')} seed {seed}, {way}: {word} in {(time.monotonic() - since) / 60:.1f} min"
    )
    return folder if result.returncode else None


def one_thread() -> dict[str, str]:
    """The environment of a run, as if the cores were shared by so many processes: the model is too small for more."""
    return os.environ | {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(os.cpu_count())}


@dataclass(frozen=True)
class Estimate:
    """A measure, or a difference of two.

    Args:
        seeds: (S,) its value over each seed's held-out clips.
        draws: (S, R) the same over clips drawn anew R times; R is 0 where it is known for the whole set alone.
    """

    seeds: Numbers
    draws: Numbers

    def minus(self, other: "Estimate") -> "Estimate":
        """The difference; clips are drawn alike for both, so that hard ones cancel out."""
        return Estimate(self.seeds - other.seeds, self.draws - other.draws)

    @property
    def mean(self) -> float:
        """Over seeds."""
        return float(self.seeds.mean())

    @property
    def interval(self) -> Interval | None:
        """The wider of two, end by end: Student's t over the seeds, and the bootstrap over clips.

        The first counts everything that differs from seed to seed, and is too narrow where a few agree by chance; the
        second counts the choice of clips alone. None where there is one seed and no clip to draw.
        """
        ends = []
        if (count := len(self.seeds)) > 1:
            half = T_QUANTILES[count] * float(self.seeds.std(ddof=1)) / count**0.5
            ends.append((self.mean - half, self.mean + half))
        if self.draws.size:
            low, high = np.quantile(self.draws.mean(0), [0.025, 0.975])
            ends.append((float(low), float(high)))
        return Interval(min(low for low, _ in ends), max(high for _, high in ends)) if ends else None


def judge(claim: Claim, difference: Estimate) -> str:
    """Whether a finding is seen here: its whole interval on the expected side, on the other, or neither."""
    interval = difference.interval
    if interval is None or interval.low <= 0 <= interval.high:
        return "open"
    return "holds" if (interval.high < 0) == (claim.direction == "falls") else "does not hold"


def read_estimates(settings: Settings) -> dict[str, dict[str, Estimate]]:
    """Row -> measure -> estimate, of all rows whose stages were run."""
    found: dict[str, dict[str, list[tuple[float, Numbers]]]] = {}
    for seed in settings.seeds:
        references = read_heldout(settings, seed)
        weights = np.random.default_rng(seed).multinomial(
            len(references), np.full(len(references), 1 / len(references)), size=RESAMPLES
        )
        for name, row in ROWS.items():
            folder = settings.folder(row.way, seed)
            if row.way not in settings.ways or not (stage := find_stage(folder, row)):
                continue
            values = found.setdefault(name, {measure: [] for measure in COLUMNS})
            # The start has not moved.
            kl = 0.0 if stage == "sft" else read_json(folder / "summary.json")["kl"][stage.replace("_", " ")]
            values["kl"].append((kl, np.zeros(0)))
            for measure, (tops, bottoms) in count_clips(folder / stage / "heldout", references).items():
                # At least 1, as in rates.
                whole = float(tops.sum() / max(bottoms.sum(), 1))
                values[measure].append((whole, (weights @ tops) / np.maximum(weights @ bottoms, 1)))
    return {
        name: {
            measure: Estimate(np.array([whole for whole, _ in parts]), np.array([draws for _, draws in parts]))
            for measure, parts in values.items()
        }
        for name, values in found.items()
    }


def read_heldout(settings: Settings, seed: int) -> list[Reference]:
    """What is known of the clips that a seed's models were measured on."""
    num_clips = read_json(settings.folder(BASE, seed) / "summary.json")["sft"]["clips"]
    folder = settings.out / "clips" / f"seed{HELDOUT_SEED_OFFSET + CLIPS_SEED + seed}-{num_clips}"
    return read_records(folder / CLIPS_NAME, Reference)


def find_stage(folder: Path, row: AblationRow) -> str | None:
    """The folder of a row's stage within its run; none where there was no rebirth."""
    summary = read_json(folder / "summary.json")
    if row.stage == "last":
        return f"round_{len(summary['rounds'])}"
    return row.stage if summary[row.stage] else None


def count_clips(folder: Path, references: Sequence[Reference]) -> dict[str, tuple[Numbers, Numbers]]:
    """Measure -> the two sums (N,) of its ratio over each held-out clip's captions, or its questions."""
    scores: dict[str, list] = {reference.video: [] for reference in references}
    answers: dict[str, list[Caption]] = {reference.video: [] for reference in references}
    for score in read_scores(folder / "scores.jsonl").scores:
        scores[score.video].append(score)
    for answer in read_records(folder / "answers.jsonl", Caption):
        answers[answer.video].append(answer)
    counts = {
        name: (
            np.array([float(sum(map(top, scores[one.video]))) for one in references]),
            np.array([float(sum(map(bottom, scores[one.video]))) for one in references]),
        )
        for name, (top, bottom) in MEASURES.items()
        if name in COLUMNS
    }
    asked = np.array([float(len(one.questions)) for one in references])
    share = [qa_accuracy({one.video: one}, answers[one.video]) if one.questions else 0.0 for one in references]
    return counts | {"qa_accuracy": (np.array(share) * asked, asked)}


def to_json(estimates: Mapping[str, Estimate]) -> dict[str, dict[str, object]]:
    """Of each measure the mean, the value of each seed, and the ends of the interval."""
    values: dict[str, dict[str, object]] = {}
    for measure, estimate in estimates.items():
        values[measure] = {"mean": estimate.mean, "seeds": estimate.seeds.tolist()}
        if interval := estimate.interval:
            values[measure] |= {"low": interval.low, "high": interval.high}
    return values


def tell(estimate: Estimate, measure: str, *, signed: bool = False) -> str:
    """Mean and interval in words, in percent but for the KL."""
    scale, digits = (1, 3) if measure == "kl" else (100, 1)
    sign = "+" if signed else ""
    numbers = [estimate.mean] + ([estimate.interval.low, estimate.interval.high] if estimate.interval else [])
    mean, *ends = (f"{scale * number:{sign}.{digits}f}" for number in numbers)
    return f"{mean} ({ends[0]} to {ends[1]})" if ends else mean


def row_table(estimates: Mapping[str, Mapping[str, Estimate]]) -> list[list[str]]:
    """The table of rows, its head first."""
    lines = [["", *COLUMNS.values(), "their Total %"]]
    for name, values in estimates.items():
        theirs = ROWS[name].theirs
        told = [tell(values[measure], measure) for measure in COLUMNS]
        lines.append([ROWS[name].title, *told, "" if theirs is None else f"{theirs}"])
    return lines


def compare(estimates: Mapping[str, Mapping[str, Estimate]]) -> list[tuple[Claim, dict[str, Estimate]]]:
    """Each claim whose rows are there, with the differences of its second row from its first."""
    return [
        (
            claim,
            {name: value.minus(estimates[claim.first][name]) for name, value in estimates[claim.second].items()},
        )
        for claim in CLAIMS
        if claim.first in estimates and claim.second in estimates
    ]


def claim_table(compared: Sequence[tuple[Claim, Mapping[str, Estimate]]]) -> list[list[str]]:
    """The table of claims, its head first."""
    shown = ("total", "repetition", "qa_accuracy", "kl")
    lines = [["finding", *(COLUMNS[measure] for measure in shown), "expected", "seen here"]]
    for claim, differences in compared:
        told = [tell(differences[measure], measure, signed=True) for measure in shown]
        expected = f"{COLUMNS[claim.measure].removesuffix(' %')} {claim.direction}"
        lines.append([claim.text, *told, expected, judge(claim, differences[claim.measure])])
    return lines


def find_stopped(settings: Settings) -> dict[str, str]:
    """Runs whose rounds ended before their number, and why: their rows have had fewer steps."""
    names = [f"seed_{seed}/{way}" for seed in settings.seeds for way in settings.ways]
    reasons = {name: read_json(settings.out / name / "summary.json")["stopped"] for name in names}
    return {name: reason for name, reason in reasons.items() if reason}


def report(settings: Settings) -> None:
    """Write results.json and table.md, and print the tables."""
    estimates, stopped = read_estimates(settings), find_stopped(settings)
    compared = compare(estimates)
    text = []
    for lines in (row_table(estimates), claim_table(compared)):
        table = Table(*lines[0])
        for line in lines[1:]:
            table.add_row(*line)
        console.print(table)
        head, *body = ("| " + " | ".join(line) + " |" for line in lines)
        text += [head, "| --- |" + " ---: |" * (len(lines[0]) - 1), *body, ""]
    for name, reason in stopped.items():
        console.print(f"{name} has had fewer rounds: {reason}")
        text += [f"{name} has had fewer rounds: {reason}", ""]
    write_text(settings.out / "table.md", "\n".join(text))
    findings = [
        vars(claim) | {"seen": judge(claim, values[claim.measure]), "differences": to_json(values)}
        for claim, values in compared
    ]
    rows = {name: to_json(values) for name, values in estimates.items()}
    results = {"seeds": settings.seeds, "rows": rows, "findings": findings, "stopped": stopped}
    write_json(settings.out / "results.json", results)
    console.print(f"written: {settings.out / 'results.json'} and table.md beside it")


def main(args: Sequence[str] | None = None) -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("run/ablation"), help="folder for all runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4], help="of training; clips: 200 + seed")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="runs, mrdpo among them")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one process and one thread each")
    parser.add_argument("--rounds", type=int, default=3, help="of DPO")
    parser.add_argument("--steps", type=int, default=50, help="of each round")
    values, extra = parser.parse_known_args(args)
    if BASE not in values.ways or not 1 <= len(values.seeds) <= max(T_QUANTILES) or values.jobs < 1:
        parser.error(f"--ways needs {BASE}, which the others start from; --seeds 1 to {max(T_QUANTILES)}; --jobs 1")
    settings = Settings(
        values.out, tuple(values.seeds), tuple(values.ways), values.jobs, values.rounds, values.steps, tuple(extra)
    )
    run_all(settings)
    report(settings)


if __name__ == "__main__":
    main()
