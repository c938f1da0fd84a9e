"""Kill a small mrDPO again and again, at random moments of all its stages, and compare its end with an unbroken run's.

    python tools/resume.py --kills 20 --processes 1 2

Into the folder OUT: `whole_N_processes/` is the unbroken run, `broken_N_processes/` the one whose processes all get
SIGKILL so many times, each time to be started again by the same command. The stages to be hit are drawn first, each
once before any twice, then the moment within each. At last all files of both are compared byte by byte; `report.json`
tells every kill and every file, and the exit code is 1 if one differs. It runs on the CPU, where sums have one order.
Ten minutes on 2 cores. Further flags go to the recipe: `--strategy zero3`.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
ROUNDS = 2
SIZES = {
    "out": "run", "clips_dir": "clips", "feature_cache.folder": "null", "synth.clips": 6, "synth.seed": 5,
    "synth.min_seconds": 3, "synth.max_seconds": 3, "synth.min_visual": 1, "synth.max_visual": 2,
    "synth.min_sounds": 1, "synth.max_sounds": 1,
    "heldout_clips": 3, "rounds": ROUNDS, "qa_fraction": 0.25, "side_by_side": 8, "pairs.num_samples": 4,
    "pairs.sampling.temperature": 0.9, "pairs.sampling.max_new_tokens": 30, "pairs.min_gap": 0.0001, "fit.steps": 10,
    "fit.batch_size": 4, "fit.checkpoint_every": 2, "rebirth.fit.steps": 10, "rebirth.fit.batch_size": 4,
    "rebirth.fit.checkpoint_every": 2, "early_stopping.min_margin": "null", "early_stopping.max_worsening": 1,
}  # fmt: skip
# What differs from run to run by its nature: figures of time and memory in steps.jsonl, the day and hour of judging in
# scores.jsonl, TensorBoard's files, which hold times and of which each start makes one, and PEFT's model card, which is
# words about an adapter and no part of it.
TIMED = ("seconds", "wait_seconds", "tokens_per_second", "memory_gib", "date")
NOT_COMPARED = ("events.out.tfevents.", "README.md", "log_")
KILL_COLUMNS = ("aimed at", "seconds", "stage", "steps", "temporary", "went on with", "said")
SAVING_SECONDS = 0.02  # a checkpoint of so small a model takes less
PATIENCE_SECONDS = 900  # for one start; a run that hangs is a failure, too


@dataclass(frozen=True)
class Stage:
    """What a run does between the appearing of two files.

    Args:
        name: of the stage.
        begins: path whose appearing begins it; empty for the launch.
        ends: path whose appearing ends it.
        checkpoints: folder, in which a new name begins it instead.
    """

    name: str
    begins: str
    ends: str
    checkpoints: str = ""

    def names(self, folder: Path) -> set[str]:
        """Checkpoints that are there, whole or half written, without their endings."""
        try:
            return {path.name.lstrip(".").partition(".")[0] for path in (folder / self.checkpoints).iterdir()}
        except FileNotFoundError:  # not made yet, or gone with the stage
            return set()


@dataclass(frozen=True)
class Kill:
    """A moment to end a run.

    Args:
        stage: in which.
        share: of the stage's length, from 0 to 1.
        count: which new checkpoint, in a stage that saves them.
    """

    stage: Stage
    share: float
    count: int


def stages_of(rounds: int) -> list[Stage]:
    """All stages of mrDPO in their order."""
    stages = [
        Stage("start", "", "run/mrdpo.yaml"),
        Stage("sft: measuring", "run/mrdpo.yaml", "run/sft/heldout/rates.json"),
    ]
    for number in range(1, rounds + 1):
        name, folder = f"round {number}", f"run/round_{number}"
        stages += [
            Stage(f"{name}: sampling", stages[-1].ends, f"{folder}/captions.jsonl"),
            Stage(f"{name}: judging", f"{folder}/captions.jsonl", f"{folder}/scores.jsonl"),
            Stage(f"{name}: pairing", f"{folder}/scores.jsonl", f"{folder}/pairs.jsonl"),
            *_fitting(name, folder, f"{folder}/pairs.jsonl"),
        ]
    return [
        *stages,
        Stage("rebirth: captions", stages[-1].ends, "run/rebirth/captions.jsonl"),
        *_fitting("rebirth", "run/rebirth", "run/rebirth/captions.jsonl"),
        Stage("summing up", "run/rebirth/heldout/rates.json", "run/summary.json"),
    ]


def _fitting(name: str, folder: str, before: str) -> list[Stage]:
    adapter, merged, rates = (f"{folder}/{path}" for path in ("adapter", "merged/config.json", "heldout/rates.json"))
    return [
        Stage(f"{name}: training", before, adapter),
        Stage(f"{name}: saving a checkpoint", before, adapter, checkpoints=f"{folder}/checkpoints"),
        Stage(f"{name}: merging", adapter, merged),
        Stage(f"{name}: measuring", merged, rates),
    ]


def plan(stages: Sequence[Stage], *, kills: int, seed: int) -> list[Kill]:
    """Moments in the order of a run, each stage hit once before any is hit twice."""
    draw = random.Random(seed)
    chosen: list[int] = []
    while len(chosen) < kills:
        chosen += draw.sample(range(len(stages)), min(len(stages), kills - len(chosen)))
    return [Kill(stages[place], draw.random(), draw.randint(1, 3)) for place in sorted(chosen)]


def lengths_of(stages: Sequence[Stage], folder: Path, *, launched: float) -> dict[str, float]:
    """Seconds of each stage of a finished run, by when its files took their names; `launched` in seconds since 1970."""

    def appeared(path: str) -> float:
        return (folder / path).stat().st_ctime if path else launched

    return {
        stage.name: SAVING_SECONDS if stage.checkpoints else max(0.0, appeared(stage.ends) - appeared(stage.begins))
        for stage in stages
    }


class Trial:
    """One command, started again and again in one folder.

    Args:
        line: the command line.
        folder: where it runs; new and empty.
    """

    def __init__(self, line: Sequence[str], folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.line = line
        self.folder = folder
        self.starts = 0

    def start(self) -> subprocess.Popen:
        """Start it once more, with a log of its own."""
        self.starts += 1
        with self.log_path.open("w") as log:
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
            return subprocess.Popen(self.line, cwd=self.folder, stdout=log, stderr=log, env=environment)

    @property
    def log_path(self) -> Path:
        """What the latest start said."""
        return self.folder / f"log_{self.starts:02}.txt"

    def finish(self) -> None:
        """Start it and let it end.

        Raises:
            RuntimeError: it fails, or hangs.
        """
        process = self.start()
        try:
            process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            kill_family(process)
        self.require_success(process)

    def require_success(self, process: subprocess.Popen) -> None:
        """Refuse a start that ended otherwise than well by itself."""
        if process.returncode:
            last = "\n".join(self.log_path.read_text(errors="replace").splitlines()[-20:])
            raise RuntimeError(f"start {self.starts} in {self.folder} ended with code {process.returncode}:\n{last}")

    def break_off(self, kill: Kill, lengths: Mapping[str, float]) -> dict:
        """Start it and kill all its processes at a moment; what was on disk then.

        Returns:
            The moment, in words and figures; `ended` if the run came to its end before.
        """
        stage, begun_before = kill.stage, self.has(kill.stage.begins)
        names = stage.names(self.folder)
        process, launched = self.start(), time.monotonic()
        if begun_before and not stage.checkpoints:
            # Killed here before: the moment lies anywhere from the new start to the stage's end.
            length = lengths["start"] + lengths[stage.name]
        else:
            self._wait(process, lambda: self._begun(kill, names), seconds=PATIENCE_SECONDS)
            length = lengths[stage.name]
        # A stage may be quicker than it was in the unbroken run.
        over_before = self.has(stage.ends)
        self._wait(process, lambda: not over_before and self.has(stage.ends), seconds=kill.share * length)
        ended, seconds = process.poll() is not None, time.monotonic() - launched
        kill_family(process)
        if ended:
            self.require_success(process)
        return {"aimed at": stage.name, "seconds": round(seconds, 2), "ended": ended, **on_disk(self.folder)}

    def _wait(self, process: subprocess.Popen, until: Callable[[], bool], *, seconds: float) -> None:
        """Wait for something on disk, for the process's end, or so long."""
        deadline = time.monotonic() + seconds
        while process.poll() is None and not until() and time.monotonic() < deadline:
            time.sleep(0.001)

    def has(self, path: str) -> bool:
        """Whether a file or folder is there."""
        return (self.folder / path).exists()

    def _begun(self, kill: Kill, names: set[str]) -> bool:
        if not kill.stage.checkpoints:
            return self.has(kill.stage.begins)
        # The last ones may be missed, or be there from an earlier start: then the stage's end has to do.
        return len(kill.stage.names(self.folder) - names) >= kill.count or self.has(kill.stage.ends)


def kill_family(process: subprocess.Popen) -> None:
    """SIGKILL to a launcher and all processes below it, which stand in sessions of their own."""
    if process.poll() is not None:
        return
    head = psutil.Process(process.pid)
    family = [*head.children(recursive=True), head]
    for member in family:
        member.kill()
    psutil.wait_procs(family, timeout=30)
    process.wait(timeout=30)


def files_of(folder: Path) -> dict[str, Path]:
    """All files by their paths from a folder, but those that are not compared."""
    paths = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in paths.items() if not path.name.startswith(NOT_COMPARED)}


def is_temporary(name: str) -> bool:
    """Whether a path is of something half written, or kept only until its stage ends."""
    return any(part.startswith(".") or part in ("checkpoints", "captions.parts") for part in Path(name).parts)


def on_disk(folder: Path) -> dict:
    """How far a run has come: its latest stage, figures of steps, and what is there for a while only."""
    begun = [stage.name for stage in stages_of(ROUNDS) if not stage.checkpoints and (folder / stage.begins).exists()]
    steps = [path.read_bytes().count(b"\n") for path in sorted(folder.glob("run/*/steps.jsonl"))]
    temporary = [name for name in files_of(folder) if is_temporary(name)]
    return {"stage": begun[-1], "steps": steps, "temporary": temporary}


def first_made(folder: Path, before: set[str]) -> str:
    """The first file that a start made: where it went on."""
    made = [path for name, path in files_of(folder).items() if name not in before and not is_temporary(name)]
    return str(min(made, key=lambda path: path.stat().st_ctime).relative_to(folder)) if made else ""


def digest(path: Path) -> str:
    """SHA-256 of a file, without its figures of time and memory."""
    content = path.read_bytes()
    if path.name in ("steps.jsonl", "scores.jsonl"):
        with suppress(json.JSONDecodeError):  # with a line that was cut off it is another file as it is
            content = json.dumps([json.loads(line, object_hook=_timeless) for line in content.splitlines()]).encode()
    return hashlib.sha256(content).hexdigest()


def _timeless(figures: dict) -> dict:
    return {key: value for key, value in figures.items() if key not in TIMED}


def compare(whole: Path, broken: Path) -> dict[str, str]:
    """What came of each file: `identical`, `differs`, `missing`, `too many`, or `left over` if it is temporary."""
    expected, seen = files_of(whole), files_of(broken)
    verdicts = {}
    for name in sorted(expected | seen):
        if name not in seen:
            verdicts[name] = "missing"
        elif name not in expected:
            hidden = any(part.startswith(".") for part in Path(name).parts)
            verdicts[name] = "left over" if hidden else "too many"
        else:
            verdicts[name] = "identical" if digest(expected[name]) == digest(seen[name]) else "differs"
    return verdicts


def try_out(line: Sequence[str], folder: Path, *, name: str, kills: int, seed: int) -> dict:
    """An unbroken run, a broken one, and what the comparison says."""
    console = Console()
    whole, launched = Trial(line, folder / f"whole_{name}"), time.time()
    whole.finish()
    seconds = time.time() - launched
    stages = [stage for stage in stages_of(ROUNDS) if whole.has(stage.begins) and whole.has(stage.ends)]
    lengths = lengths_of(stages, whole.folder, launched=launched)
    console.print(f"{name}: unbroken in {seconds:.0f} s; {kills} kills in {len(stages)} stages")
    broken, moments = Trial(line, folder / f"broken_{name}"), list[dict]()
    for kill in plan(stages, kills=kills, seed=seed):
        before = set(files_of(broken.folder))
        moment = broken.break_off(kill, lengths)
        _tell_how_it_went_on(moments, broken, before)
        moments.append(moment)
        console.print(f"{name}: kill {len(moments)}, {moment['seconds']} s after its start, {moment['stage']}")
    before = set(files_of(broken.folder))
    broken.finish()
    _tell_how_it_went_on(moments, broken, before)
    return {
        "unbroken_seconds": round(seconds, 1),
        "all_seconds": round(time.time() - launched, 1),
        "kills": moments,
        "files": compare(whole.folder, broken.folder),
    }


def _tell_how_it_went_on(moments: Sequence[dict], trial: Trial, before: set[str]) -> None:
    """Add to the kill before what the start after it said and made first."""
    if moments:
        lines = trial.log_path.read_text(errors="replace").splitlines()
        moments[-1]["went on with"] = first_made(trial.folder, before)
        moments[-1]["said"] = [line.strip() for line in lines if "goes on" in line or "passed over" in line]


def is_sound(result: Mapping) -> bool:
    """Whether the broken run ended as the unbroken one did; temporary leftovers are listed, and harm nothing."""
    return set(result["files"].values()) <= {"identical", "left over"}


def report(results: Mapping[str, Mapping]) -> None:
    """Print the kills, the files, and the verdict of each number of processes."""
    console = Console(width=160)
    for name, result in results.items():
        kills = Table(*KILL_COLUMNS, title=f"{name}: kills")
        for kill in result["kills"]:
            cells = (kill[column] for column in KILL_COLUMNS)
            kills.add_row(*("\n".join(map(str, cell)) if isinstance(cell, list) else str(cell) for cell in cells))
        files = Table("file", "identical", title=f"{name}: files")
        for path, verdict in result["files"].items():
            files.add_row(path, {"identical": "yes", "left over": "left over"}.get(verdict, f"NO: {verdict}"))
        console.print(kills, files)
        console.print(f"{name}: {len(result['kills'])} kills; identical: {'yes' if is_sound(result) else 'NO'}")


def command(processes: int, extra: Sequence[str]) -> list[str]:
    """The recipe's command line at the smallest size."""
    flags = [f"--{name}={value}" for name, value in SIZES.items()]
    launcher = [str(Path(sys.executable).with_name("torchrun")), "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, str(ROOT / "recipes" / "mrdpo.py"), *flags, *extra]


def main() -> None:
    """Run, kill, compare, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("run/resume"), help="folder for the runs")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes to try")
    parser.add_argument("--kills", type=int, default=20, help="of each broken run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    values, extra = parser.parse_known_args()
    results = {}
    for number in values.processes:
        name = f"{number}_processes"
        folder = values.out.resolve()
        results[name] = try_out(command(number, extra), folder, name=name, kills=values.kills, seed=values.seed)
    text = json.dumps({"seed": values.seed, "runs": results}, indent=2) + "\n"
    (values.out / "report.json").write_text(text, encoding="utf-8")
    report(results)
    sys.exit(0 if all(map(is_sound, results.values())) else 1)


if __name__ == "__main__":
    main()
