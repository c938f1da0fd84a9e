"""Measurements of the preference lab: run missing ones for several seeds, and write one table into a document.

`lab_rewards.py` and `lab_selection.py` list their parts, each a command with a file as its result, and the rows of the
table. A part whose result exists is skipped, and a part that is killed resumes as far as its command does.
"""

import argparse
import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.console import Console
from scipy import stats

from salmonn.files import read_json

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "recipes" / "configs" / "ablation.yaml"
RECIPE = ROOT / "recipes" / "configs" / "mrdpo.yaml"
OUT = Path("run/lab")  # one folder, as the measurements share clips, features and the run of the default recipe
# What the ablation changes in mrdpo_plain.yaml. A worse model is a result too, so no round stops early.
SIZE = (
    "--synth.clips=230",
    "--synth.questions=4",
    "--heldout_clips=160",
    "--early_stopping.min_pairs=1",
    "--early_stopping.min_margin=null",
    "--early_stopping.max_worsening=100",
)
console = Console(width=160)
Results = Mapping[str, Any]  # part -> what it has written
Flags = Callable[[int, Path], Sequence[str]]


@dataclass(frozen=True)
class Part:
    """A command of the measurement.

    Args:
        script: script that is run, from the root of the repository.
        flags: its flags for a seed and the folder of all results.
        result: file that it writes last, in the folder of all results.
        needs: parts of the same seed that are finished before.
        prepare: called before the command with the seed and the folder of all results, also when a part is resumed.
        further: names of further results in the folder of the result, which are read as "<part>/<name>".
    """

    script: str
    flags: Flags
    result: str
    needs: tuple[str, ...] = ()
    prepare: Callable[[int, Path], None] | None = None
    further: tuple[str, ...] = ()

    def path(self, seed: int, out: Path) -> Path:
        """Return the path of the result for a seed."""
        return out / self.result.format(seed=seed)


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Args:
        text: what is measured, and what is wanted of it.
        value: its value for a seed, from the results of the parts; KeyError where a part is missing.
        holds: whether a value fulfils the claim; None for a control, about which nothing is claimed.
        digits: number of decimals.
    """

    text: str
    value: Callable[[Results], float]
    holds: Callable[[float], bool] | None = None
    digits: int = 1


@dataclass(frozen=True)
class Lab:
    """A measurement of several parts.

    Args:
        name: name of the target of the Makefile, and of the marks in the document.
        out: default folder of all results.
        parts: name -> part, each after those that it needs.
        groups: name of the command line -> parts that it stands for.
        rows: rows of the table.
        details: further lines after the table, from the results of each seed.
    """

    name: str
    out: Path
    parts: Mapping[str, Part]
    groups: Mapping[str, Sequence[str]]
    rows: Sequence[Row]
    details: Callable[[Mapping[int, Results]], list[str]] = lambda results: []

    @property
    def marks(self) -> tuple[str, str]:
        """Lines of the document between which the table belongs."""
        return f"<!-- {self.name}: start -->", f"<!-- {self.name}: end -->"

    def choose(self, groups: Sequence[str]) -> list[str]:
        """Return the parts of groups in their order, and before each those that it needs."""
        chosen: dict[str, None] = {}

        def add(name: str) -> None:
            for needed in self.parts[name].needs:
                add(needed)
            chosen[name] = None

        for group in groups:
            for name in self.groups[group]:
                add(name)
        return list(chosen)


def loop_flags(name: str, *flags: str, rounds: int = 3, rebirth: bool = False, config: Path = CONFIG) -> Flags:
    """Return the flags of an mrDPO run, by default of the ablation's size."""

    def make(seed: int, out: Path) -> list[str]:
        shared = {
            "config": config,
            "out": run_folder(name, seed, out),
            "clips_dir": out / "clips",
            "feature_cache.folder": out / "features",
            "seed": seed,
            "synth.seed": 200 + seed,
            "rounds": rounds,
        }
        line = [f"--{key}={value}" for key, value in shared.items()]
        return [*line, *flags] if rebirth else [*line, "--rebirth=null", *flags]

    return make


def recipe_flags(name: str, *flags: str) -> Flags:
    """Return the flags of three rounds of the default recipe, with as many clips as the ablation."""
    return loop_flags(name, *SIZE, *flags, config=RECIPE)


def recipe_part() -> Part:
    """Return the run of the default recipe, whose results other runs share."""
    return Part("recipes/mrdpo.py", recipe_flags("recipe"), "loop/seed_{seed}/recipe/summary.json")


def run_folder(name: str, seed: int, out: Path) -> Path:
    """Return the folder of an mrDPO run."""
    return out / "loop" / f"seed_{seed}" / name


def copy_results(source: Path, target: Path, patterns: Sequence[str]) -> None:
    """Copy the results of a run that match glob patterns to a folder."""
    for pattern in patterns:
        for path in sorted(source.glob(pattern)):
            copied = target / path.relative_to(source)
            copied.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                shutil.copytree(path, copied)
            else:
                shutil.copyfile(path, copied)


@contextmanager
def lock_folder(out: Path) -> Iterator[int]:
    """Wait until no run is active in a folder, including runs of a command that was killed.

    Yields:
        File descriptor of the lock, to be inherited by all processes that work in the folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.print(f"waiting for runs in {out} that an earlier command started")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def one_thread() -> dict[str, str]:
    """Return the environment of a run on one thread; the toy model is too small for more."""
    return os.environ | {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(os.cpu_count())}


@dataclass
class Progress:
    """Minutes of the parts that have been run, for an estimate of the rest.

    Args:
        num_left: number of parts that are not finished.
        jobs: number of parts at a time.
    """

    num_left: int
    jobs: int
    num_run: int = 0
    minutes: float = 0.0

    def add(self, minutes: float) -> str:
        """Count a part, and return what is left in words."""
        self.num_left, self.num_run, self.minutes = self.num_left - 1, self.num_run + 1, self.minutes + minutes
        left = self.num_left * self.minutes / self.num_run / self.jobs
        return f"{self.num_left} parts left, about {left:.0f} min"


def run_parts(lab: Lab, names: Sequence[str], *, seeds: Sequence[int], out: Path, jobs: int) -> int:
    """Run parts that have not finished, each for all seeds before the next; returns how many failed.

    The parts of a seed are run one after the other, since they share captions.
    """
    todo = [(name, seed) for name in names for seed in seeds if not lab.parts[name].path(seed, out).is_file()]
    progress = Progress(len(todo), jobs)
    last: dict[int, Future[bool]] = {}
    with lock_folder(out) as lock, ThreadPoolExecutor(jobs) as pool:

        def run(name: str, seed: int, before: Future[bool] | None) -> bool:
            if before:
                before.result()
            missing = [one for one in lab.parts[name].needs if not lab.parts[one].path(seed, out).is_file()]
            if missing:
                console.print(f"seed {seed}, {name}: not run, since {missing[0]} has failed")
                return False
            return run_part(lab.parts[name], name, seed=seed, out=out, lock=lock, progress=progress)

        # The pool starts parts in the order of submission, so that no part waits for one that cannot start.
        futures = []
        for name, seed in todo:
            last[seed] = pool.submit(run, name, seed, last.get(seed))
            futures.append(last[seed])
        return sum(not future.result() for future in futures)


def run_part(part: Part, name: str, *, seed: int, out: Path, lock: int, progress: Progress) -> bool:
    """Run a part of a seed, with its output in a log, and return whether it succeeded."""
    log = out / "logs" / f"{name}_{seed}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    if part.prepare:
        part.prepare(seed, out)
    command = [sys.executable, str(ROOT / part.script), *part.flags(seed, out)]
    with log.open("ab") as file:
        code = subprocess.run(
            command, stdout=file, stderr=file, cwd=ROOT, env=one_thread(), pass_fds=(lock,), check=False
        ).returncode
    is_done = not code and part.path(seed, out).is_file()
    minutes = (time.monotonic() - start) / 60
    left = progress.add(minutes)
    result = "done" if is_done else f"FAILED, see {log},"
    console.print(f"{time.strftime('%H:%M:%S')} seed {seed}, {name}: {result} in {minutes:.1f} min; {left}")
    return is_done


def read_results(lab: Lab, *, seeds: Sequence[int], out: Path) -> dict[int, dict[str, Any]]:
    """Return seed -> part -> its result, where there is one."""
    results: dict[int, dict[str, Any]] = {}
    for seed in seeds:
        files: dict[str, Path] = {}
        for name, part in lab.parts.items():
            files[name] = part.path(seed, out)
            files |= {f"{name}/{one}": files[name].parent / one for one in part.further}
        results[seed] = {name: read_json(path) for name, path in files.items() if path.is_file()}
    return results


def make_table(rows: Sequence[Row], results: Mapping[int, Results]) -> list[str]:
    """Return the lines of the table: value of each seed, mean with Student's 95 % interval, and whether it holds.

    A section starts with a row that begins with its name in bold; one without a value is a single line.
    """
    lines = ["| measured: wanted | " + " | ".join(f"seed {seed}" for seed in results) + " | mean (95 %) | holds |"]
    lines.append("|---|" + "---:|" * (len(results) + 1) + "---|")
    for section in split_sections(rows):
        values = [[value_of(row, one) for one in results.values()] for row in section]
        if all(value is None for of_row in values for value in of_row):
            name = section[0].text.rpartition("**")[0]
            lines.append(f"| {name}** | {'| ' * len(results)}| not run |")
        else:
            lines += [format_row(row, of_row) for row, of_row in zip(section, values, strict=True)]
    return lines


def split_sections(rows: Sequence[Row]) -> list[list[Row]]:
    """Return rows by section."""
    sections: list[list[Row]] = []
    for row in rows:
        if row.text.startswith("**"):
            sections.append([])
        sections[-1].append(row)
    return sections


def format_row(row: Row, values: Sequence[float | None]) -> str:
    """Return a line of the table."""
    known = [value for value in values if value is not None]
    cells = ["" if value is None else f"{value:.{row.digits}f}" for value in values]
    verdict = judge(row, known, num_seeds=len(values))
    return f"| {row.text} | {' | '.join(cells)} | {describe(known, row.digits)} | {verdict} |"


def judge(row: Row, values: Sequence[float], *, num_seeds: int) -> str:
    """Return whether a claim holds: in the mean and for each seed, in the mean only, or not."""
    if not values:
        return "not run"
    if row.holds is None:
        return "" if len(values) == num_seeds else f"({len(values)} of {num_seeds} seeds)"
    # A difference of rates may be just below a whole number by rounding.
    holding = sum(row.holds(round(value, 6)) for value in values)
    if not row.holds(round(fmean(values), 6)):
        verdict = "**no**"
    elif holding < len(values):
        verdict = f"in the mean, on {holding} of {len(values)} seeds"
    else:
        verdict = "yes"
    return verdict if len(values) == num_seeds else f"{verdict} ({len(values)} of {num_seeds} seeds)"


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


def difference(one: Callable[[Results], float], other: Callable[[Results], float]) -> Callable[[Results], float]:
    """Return the difference of two values."""
    return lambda results: one(results) - other(results)


def write_document(document: Path, lines: Sequence[str], *, marks: tuple[str, str]) -> None:
    """Replace the text between the marks of a document.

    Raises:
        ValueError: the document has no marks.
    """
    start, end = marks
    text = document.read_text(encoding="utf-8")
    if start not in text or end not in text:
        raise ValueError(f"{document} has no lines {start} and {end}, between which the table belongs")
    inner = "\n".join(["", "", *lines, "", ""])
    pattern = re.escape(start) + r".*" + re.escape(end)
    document.write_text(re.sub(pattern, lambda _: start + inner + end, text, flags=re.DOTALL), encoding="utf-8")


def run_lab(lab: Lab, args: Sequence[str] | None, *, description: str) -> None:
    """Run the parts of a command line, print the table and write it to the document.

    Raises:
        SystemExit: a part failed. The others have been run, and the table has been written.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=lab.out, help="folder of all results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4], help="seeds of clips, captions and fits")
    parser.add_argument(
        "--parts", nargs="*", choices=lab.groups, default=list(lab.groups), help="parts to run, with those that they "
        "need; none: table only"
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, default=2, help="parts at a time, each on one thread")
    parser.add_argument("--document", type=Path, help="document whose table is replaced")
    values = parser.parse_args(args)
    out = values.out.resolve()
    num_failed = run_parts(lab, lab.choose(values.parts), seeds=values.seeds, out=out, jobs=values.jobs)
    results = read_results(lab, seeds=values.seeds, out=out)
    lines = [*make_table(lab.rows, results), *lab.details(results)]
    console.print("\n".join(lines), markup=False, soft_wrap=True)
    if values.document:
        write_document(values.document, lines, marks=lab.marks)
    if num_failed:
        raise SystemExit(f"{num_failed} parts failed; run the same command to resume")
