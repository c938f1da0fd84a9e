"""Measure what is claimed of reward models on several seeds, each claim with its control: `make lab-rewards`.

    python tools/lab/rewards.py --seeds 2 3 4 --jobs 2 --out run/lab/reward --document docs/lab.md

Runs the tools of this folder and recipes/mrdpo.py for each seed, and writes one table between the marks of the
document. Finished parts are skipped: run the same command again to resume. A part that has not been run leaves a gap.
"""

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.console import Console
from scipy import stats

ROOT = Path(__file__).parent.parent.parent
START, END = "<!-- lab-rewards: start -->", "<!-- lab-rewards: end -->"
NUM_LABELLED = 39  # of 230 clips in all three rounds: as many of the judge's calls as the reward model takes
# 58 * 8 + 2 * (23 * 8 + 14 * 4) = 944 of 5,520 ratings.
MODEL = ("--reward.kind=model", "--reward.seed_clips=58", "--reward.refresh_clips=23", "--reward.audit_clips=14")
console = Console(width=120)
Results = Mapping[str, Any]  # part -> what it has written


@dataclass(frozen=True)
class Part:
    """A command of the measurement.

    Args:
        script: script that is run, from the root of the repository.
        flags: its flags for a seed and the folder of all results.
        result: file that it writes last, in the folder of all results.
    """

    script: str
    flags: Callable[[int, Path], Sequence[str]]
    result: str

    def path(self, seed: int, out: Path) -> Path:
        """Return the path of the result for a seed."""
        return out / self.result.format(seed=seed)


def lab_flags(seed: int, out: Path) -> list[str]:
    """Return the flags of a tool that samples captions, which all of them share."""
    return [f"--out={out}", f"--clips_dir={out / 'clips'}", f"--seed={seed}"]


def loop_flags(name: str, *flags: str) -> Callable[[int, Path], Sequence[str]]:
    """Return the flags of an mrDPO run of the ablation's size."""

    def make(seed: int, out: Path) -> list[str]:
        shared = {
            "config": ROOT / "recipes" / "configs" / "ablation.yaml",
            "out": out / "loop" / f"seed_{seed}" / name,
            "clips_dir": out / "clips",
            "feature_cache.folder": out / "features",
            "seed": seed,
            "synth.seed": 200 + seed,
            "rebirth": "null",
        }
        return [*(f"--{key}={value}" for key, value in shared.items()), *flags]

    return make


def labelled_flags(seed: int, out: Path) -> Sequence[str]:
    """Return the flags of a run on the labelled clips alone, after writing their references."""
    folder, heldout = out / "clips" / f"seed{200 + seed}-230", out / "clips" / f"seed{1000200 + seed}-160"
    lines = sorted((folder / "clips.jsonl").read_text(encoding="utf-8").splitlines())
    chosen = random.Random(f"{seed}-labels").sample(lines, NUM_LABELLED)
    (folder / "labelled.jsonl").write_text("".join(f"{line}\n" for line in chosen), encoding="utf-8")
    files = (f"--references={folder / 'labelled.jsonl'}", f"--heldout_references={heldout / 'clips.jsonl'}")
    return loop_flags("labelled", *files)(seed, out)


PARTS = {
    "heads": Part("tools/lab/reward_model.py", lab_flags, "seed_{seed}/reward_model.json"),
    "gate": Part("tools/lab/gate.py", lab_flags, "seed_{seed}/gate.json"),
    "raters": Part(
        "tools/lab/rater_groups.py",
        lambda seed, out: [*lab_flags(seed, out), f"--clips_seed={seed}", "--num_prototypes=[1,2,3]", "--num_folds=3"],
        "seed_{seed}/raters_{seed}_50_usual_score.json",
    ),
    "benchmark": Part(
        "tools/lab/reward_benchmark.py",
        lambda seed, out: [
            *lab_flags(seed, out / f"seed_{seed}"),
            f"--clips_dir={out / 'clips'}",
            f"--synth.seed={100 + seed}",
            "--synth.questions=3",
            f"--benchmark_dir={out / 'benchmark'}",
        ],
        "seed_{seed}/benchmark.json",
    ),
    "judge": Part("recipes/mrdpo.py", loop_flags("judge"), "loop/seed_{seed}/judge/summary.json"),
    "model": Part("recipes/mrdpo.py", loop_flags("model", *MODEL), "loop/seed_{seed}/model/summary.json"),
    "labelled": Part("recipes/mrdpo.py", labelled_flags, "loop/seed_{seed}/labelled/summary.json"),
}


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Args:
        text: what is measured, and the claim about it.
        value: its value for a seed, from the results of the parts; KeyError where a part is missing.
        holds: whether a mean over seeds fulfils the claim; None for a control, about which nothing is claimed.
        digits: number of decimals.
    """

    text: str
    value: Callable[[Results], float]
    holds: Callable[[float], bool] | None = None
    digits: int = 1


def last_total(results: Results, part: str) -> float:
    """Return the held-out Total of a run after its last round, in %."""
    return 100 * float(results[part]["rounds"][-1]["total"])


def judge_gain(results: Results) -> float:
    """Return the share of the judge's gain in Total that the reward model reaches, in %."""
    start, judge = 100 * results["judge"]["sft"]["total"], last_total(results, "judge")
    return 100 * (start - last_total(results, "model")) / (start - judge)


def label_share(results: Results) -> float:
    """Return the share of captions that the judge rated in the run with a reward model, in %."""
    rounds = results["model"]["reward"]
    return 100 * sum(one["num_judged"] for one in rounds) / sum(one["num_captions"] for one in rounds)


def head(name: str, column: int) -> Callable[[Results], float]:
    """Return the value of a row of reward_model.py, in %: 0 accuracy at a gap of 0.1, 2 Total of the best of 8."""
    return lambda results: 100 * float(results["heads"][name][column])


def rater(*keys: str) -> Callable[[Results], float]:
    """Return a value of rater_groups.py in %."""

    def value(results: Results) -> float:
        found = results["raters"]
        for key in keys:
            found = found[key]
        return 100 * float(found)

    return value


def difference(one: Callable[[Results], float], other: Callable[[Results], float]) -> Callable[[Results], float]:
    """Return the difference of two values."""
    return lambda results: one(results) - other(results)


def gate(name: str) -> Callable[[Results], float]:
    """Return the mean accuracy of a reward of gate.py, in %."""
    return lambda results: 100 * float(results["gate"]["accuracies"][name]["mean"])


CLAIMS, BLIND = "claims", "claims, blind"
KNOWN, UNSEEN = ("K=2", "known", "mean"), ("K=2", "unseen", "20")
ROWS = (
    Row("**Instead of the judge**: Total after three rounds, %", lambda one: last_total(one, "model")),
    Row("control: the judge on every caption", lambda one: last_total(one, "judge")),
    Row("control: the judge's pairs of as many labelled captions, no model", lambda one: last_total(one, "labelled")),
    Row("share of the judge's calls, %", label_share),
    Row("share of the judge's gain, %: >= 80", judge_gain, lambda mean: mean >= 80),
    Row(
        "points below the same labels without a model: >= 3",
        lambda one: last_total(one, "labelled") - last_total(one, "model"),
        lambda mean: mean >= 3,
    ),
    Row("**Heads that look**: pairs of held-out captions in the judge's order, 400 clips, %", head(CLAIMS, 0)),
    Row("control: trained and asked with another clip", head(BLIND, 0)),
    Row("control: the longer caption", head("longest", 0)),
    Row("points above the blind head: >= 5", difference(head(CLAIMS, 0), head(BLIND, 0)), lambda mean: mean >= 5),
    Row("Total of the best of 8, 400 clips, %: <= 40", head(CLAIMS, 2), lambda mean: mean <= 40),
    Row("control: a random one of 8", head("random", 2)),
    Row("control: the blind head's best of 8", head(BLIND, 2)),
    Row(
        "**Rater groups**: prototypes chosen: 2",
        lambda one: float(one["raters"]["chosen"]),
        lambda mean: mean == 2,
        digits=0,
    ),
    Row(
        "two prototypes above one, points: >= 10",
        difference(rater(*KNOWN), rater("K=1", "known", "mean")),
        lambda mean: mean >= 10,
    ),
    Row(
        "new raters with 20 votes below known ones, points: <= 5",
        difference(rater(*KNOWN), rater(*UNSEEN)),
        lambda mean: mean <= 5,
    ),
    Row(
        "control: prototypes chosen for raters who are all alike: 1",
        lambda one: float(one["raters"]["controls"]["alike"]["chosen"]),
        lambda mean: mean == 1,
        digits=0,
    ),
    Row(
        "control: two above one with shuffled ids, points: <= 2",
        difference(rater("controls", "shuffled", "K=2"), rater("controls", "shuffled", "K=1")),
        lambda mean: mean <= 2,
    ),
    Row("**Gate**: pairs right over three requests, %", gate("gate")),
    Row("control: fixed weights of any sign", gate("fixed weights of any sign")),
    Row("points above the best fixed weights: >= 8", lambda one: 100 * one["gate"]["gain"], lambda mean: mean >= 8),
    Row(
        "**Benchmark**: Pearson's r of accuracy and gain by the best of 8: >= 0.8",
        lambda one: float(one["benchmark"]["pearson"]),
        lambda mean: mean >= 0.8,
        digits=2,
    ),
)


def run_part(name: str, seed: int, out: Path) -> None:
    """Run a part of a seed unless it is finished; its output goes to a log next to the results."""
    part = PARTS[name]
    if part.path(seed, out).is_file():
        return
    log = out / "logs" / f"{name}_{seed}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    if name == "model":
        copy_shared(seed, out)
    start = time.monotonic()
    with log.open("ab") as file:
        command = [sys.executable, str(ROOT / part.script), *part.flags(seed, out)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(os.cpu_count())}
        code = subprocess.run(command, stdout=file, stderr=file, cwd=ROOT, env=environment, check=False).returncode
    result = f"FAILED, see {log}" if code else "done"
    console.print(f"seed {seed}, {name}: {result} in {(time.monotonic() - start) / 60:.1f} min")


def copy_shared(seed: int, out: Path) -> None:
    """Copy what a run with a reward model shares with the judge's: the start's evaluation and its captions."""
    folder = out / "loop" / f"seed_{seed}"
    source, target = folder / "judge", folder / "model"
    if not target.exists() and source.exists():
        shutil.copytree(source / "sft", target / "sft")
        shutil.copyfile(source / "settings.json", target / "settings.json")
        (target / "round_1").mkdir()
        shutil.copyfile(source / "round_1" / "captions.jsonl", target / "round_1" / "captions.jsonl")


def run_seed(seed: int, parts: Sequence[str], out: Path) -> None:
    """Run the parts of a seed one after the other: they share captions, and two of them need the judge's run."""
    for name in parts:
        run_part(name, seed, out)


def read_results(seeds: Sequence[int], out: Path) -> dict[int, dict[str, Any]]:
    """Return seed -> part -> its result, where there is one."""
    return {
        seed: {
            name: json.loads(part.path(seed, out).read_text(encoding="utf-8"))
            for name, part in PARTS.items()
            if part.path(seed, out).is_file()
        }
        for seed in seeds
    }


def make_table(results: Mapping[int, Results]) -> list[str]:
    """Return the lines of the table: value of each seed, mean with Student's 95 % interval, and whether it holds."""
    lines = ["| measured: wanted | " + " | ".join(f"seed {seed}" for seed in results) + " | mean (95 %) | holds |"]
    lines.append("|---|" + "---:|" * (len(results) + 1) + "---|")
    for row in ROWS:
        values = [value_of(row, one) for one in results.values()]
        known = [value for value in values if value is not None]
        cells = ["" if value is None else f"{value:.{row.digits}f}" for value in values]
        verdict = "" if row.holds is None or not known else "yes" if row.holds(fmean(known)) else "**no**"
        if verdict and len(known) < len(values):
            verdict += f" ({len(known)} of {len(values)} seeds)"
        lines.append(f"| {row.text} | {' | '.join(cells)} | {describe(known, row.digits)} | {verdict} |")
    return lines


def value_of(row: Row, results: Results) -> float | None:
    """Return the value of a row for a seed; None where a part has not been run."""
    try:
        return row.value(results)
    except KeyError:
        return None


def describe(values: Sequence[float], digits: int) -> str:
    """Return mean and 95 % interval by Student's t as text."""
    if len(values) < 2:
        return ""
    mean = fmean(values)
    half = float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return f"{mean:.{digits}f} ({mean - half:.{digits}f} to {mean + half:.{digits}f})"


def write_document(document: Path, lines: Sequence[str]) -> None:
    """Replace the table between the marks of a document.

    Raises:
        ValueError: the document has no marks.
    """
    text = document.read_text(encoding="utf-8")
    if START not in text or END not in text:
        raise ValueError(f"{document} has no lines {START} and {END}, between which the table belongs")
    inner = "\n".join(["", "", *lines, "", ""])
    pattern = re.escape(START) + r".*" + re.escape(END)
    document.write_text(re.sub(pattern, lambda _: START + inner + END, text, flags=re.DOTALL), encoding="utf-8")


def main(args: Sequence[str] | None = None) -> None:
    """Run all parts, print the table and write it to the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("run/lab/reward"), help="folder of all results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4], help="seeds of clips, captions and fits")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS), help="parts to run; none: table only")
    parser.add_argument("--jobs", type=int, default=2, help="seeds at a time, each on one thread")
    parser.add_argument("--document", type=Path, help="document whose table is replaced")
    values = parser.parse_args(args)
    out = values.out.resolve()
    with ThreadPoolExecutor(values.jobs) as pool:
        list(pool.map(lambda seed: run_seed(seed, values.parts, out), values.seeds))
    lines = make_table(read_results(values.seeds, out))
    console.print("\n".join(lines), markup=False, soft_wrap=True)
    if values.document:
        write_document(values.document, lines)


if __name__ == "__main__":
    main()
