"""Kill a small mrDPO run at random moments of all its stages, and compare the result with an uninterrupted run.

    python tools/resume.py --num-kills 20 --processes 1 2

Writes to the folder OUT: `whole_N_processes/` is the uninterrupted run, `broken_N_processes/` the run whose processes
receive SIGKILL `num_kills` times, each time to be started again by the same command. The stages to hit are sampled
first, each once before any is hit twice, then the moment within each stage. At the end all files of the two runs are
compared byte by byte. `report.json` lists every kill and every file; the exit code is 1 if a file differs. The runs
use the CPU, where sums have a fixed order, and take ten minutes on 2 cores. Other flags are passed on to the recipe,
for example `--strategy zero3`.
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
    "heldout_clips": 3, "rounds": ROUNDS, "qa_fraction": 0.25, "sampling.batch_size": 8, "sampling.num_samples": 4,
    "sampling.temperature": 0.9, "sampling.max_new_tokens": 30, "selection.min_gap": 0.0001, "fit.steps": 10,
    "fit.batch_size": 4, "fit.checkpoint_every": 2, "rebirth.fit.steps": 10, "rebirth.fit.batch_size": 4,
    "rebirth.fit.checkpoint_every": 2, "early_stopping.min_margin": "null", "early_stopping.max_worsening": 1,
}  # fmt: skip
# These differ between equal runs: times and memory in steps.jsonl, the date in scores.jsonl, TensorBoard's event files
# (one for each start, with times), and the model card that PEFT writes next to an adapter.
TIMED = ("seconds", "wait_seconds", "tokens_per_second", "memory_gib", "date")
NOT_COMPARED = ("events.out.tfevents.", "README.md", "log_")
KILL_COLUMNS = ("target", "seconds", "stage", "steps", "temporary", "resumed with", "messages")
SAVE_SECONDS = 0.02  # upper bound for a checkpoint of the toy model
RESUME_MESSAGES = ("resuming from", "skipping")  # in the log of a run that resumes
TIMEOUT_SECONDS = 900  # for one start; a run that hangs has failed


@dataclass(frozen=True)
class Stage:
    """A part of a run between the creation of two files.

    Args:
        name: name of the stage.
        begins: path whose creation begins the stage; empty for the launch.
        ends: path whose creation ends the stage.
        checkpoints: folder in which a new name begins the stage instead.
    """

    name: str
    begins: str
    ends: str
    checkpoints: str = ""

    def saved_names(self, folder: Path) -> set[str]:
        """Return the names of complete and partial checkpoints, without suffixes."""
        try:
            return {path.name.lstrip(".").partition(".")[0] for path in (folder / self.checkpoints).iterdir()}
        except FileNotFoundError:  # before or after the stage
            return set()


@dataclass(frozen=True)
class Kill:
    """A moment at which to kill a run.

    Args:
        stage: stage to hit.
        fraction: part of the stage's duration that has passed, from 0 to 1.
        count: number of new checkpoints to wait for, in a stage that saves them.
    """

    stage: Stage
    fraction: float
    count: int


def list_stages(rounds: int) -> list[Stage]:
    """Return the stages of mrDPO in order."""
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
            *_training_stages(name, folder, f"{folder}/pairs.jsonl"),
        ]
    return [
        *stages,
        Stage("rebirth: captions", stages[-1].ends, "run/rebirth/captions.jsonl"),
        *_training_stages("rebirth", "run/rebirth", "run/rebirth/captions.jsonl"),
        Stage("summing up", "run/rebirth/heldout/rates.json", "run/summary.json"),
    ]


def _training_stages(name: str, folder: str, before: str) -> list[Stage]:
    adapter, merged, rates = (f"{folder}/{path}" for path in ("adapter", "merged/config.json", "heldout/rates.json"))
    return [
        Stage(f"{name}: training", before, adapter),
        Stage(f"{name}: saving a checkpoint", before, adapter, checkpoints=f"{folder}/checkpoints"),
        Stage(f"{name}: merging", adapter, merged),
        Stage(f"{name}: measuring", merged, rates),
    ]


def sample_kills(stages: Sequence[Stage], *, num_kills: int, seed: int) -> list[Kill]:
    """Sample moments in the order of a run; each stage is hit once before any is hit twice."""
    generator = random.Random(seed)
    chosen: list[int] = []
    while len(chosen) < num_kills:
        chosen += generator.sample(range(len(stages)), min(len(stages), num_kills - len(chosen)))
    return [Kill(stages[index], generator.random(), generator.randint(1, 3)) for index in sorted(chosen)]


def measure_stages(stages: Sequence[Stage], folder: Path, *, launched: float) -> dict[str, float]:
    """Return the seconds that each stage of a finished run took, by the change times of its files.

    Args:
        launched: start of the run in seconds since the epoch.
    """

    def created(path: str) -> float:
        return (folder / path).stat().st_ctime if path else launched

    return {
        stage.name: SAVE_SECONDS if stage.checkpoints else max(0.0, created(stage.ends) - created(stage.begins))
        for stage in stages
    }


class Trial:
    """A command that is started several times in one folder, which is emptied first."""

    def __init__(self, line: Sequence[str], folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.line = line
        self.folder = folder
        self.starts = 0

    def start(self) -> subprocess.Popen:
        """Start the command, with its own log."""
        self.starts += 1
        with self.log_path.open("w") as log:
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
            return subprocess.Popen(self.line, cwd=self.folder, stdout=log, stderr=log, env=environment)

    @property
    def log_path(self) -> Path:
        """Log of the latest start."""
        return self.folder / f"log_{self.starts:02}.txt"

    def finish(self) -> None:
        """Start the command and wait for its end.

        Raises:
            RuntimeError: the command fails or hangs.
        """
        process = self.start()
        try:
            process.wait(TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            kill_family(process)
        self.require_success(process)

    def require_success(self, process: subprocess.Popen) -> None:
        """Raise a RuntimeError with the end of the log if the exit code is not 0."""
        if process.returncode:
            last = "\n".join(self.log_path.read_text(errors="replace").splitlines()[-20:])
            raise RuntimeError(f"start {self.starts} in {self.folder} ended with code {process.returncode}:\n{last}")

    def kill_at(self, kill: Kill, durations: Mapping[str, float]) -> dict:
        """Start the command and kill all its processes at a moment.

        Returns:
            The moment and the progress on disk; `ended` is true if the run finished before it could be killed.
        """
        stage, begun_before = kill.stage, self.has(kill.stage.begins)
        names = stage.saved_names(self.folder)

        def has_begun() -> bool:
            if not stage.checkpoints:
                return self.has(stage.begins)
            # The last checkpoints may be missed or come from an earlier start; then wait for the end of the stage.
            return len(stage.saved_names(self.folder) - names) >= kill.count or self.has(stage.ends)

        process, launched = self.start(), time.monotonic()
        if begun_before and not stage.checkpoints:
            # Killed here before: the moment is anywhere between the new start and the end of the stage.
            seconds = durations["start"] + durations[stage.name]
        else:
            self._wait(process, has_begun, seconds=TIMEOUT_SECONDS)
            seconds = durations[stage.name]
        ended_before = self.has(stage.ends)
        # A stage may be faster than in the uninterrupted run.
        self._wait(process, lambda: not ended_before and self.has(stage.ends), seconds=kill.fraction * seconds)
        ended, elapsed = process.poll() is not None, time.monotonic() - launched
        kill_family(process)
        if ended:
            self.require_success(process)
        return {"target": stage.name, "seconds": round(elapsed, 2), "ended": ended, **read_progress(self.folder)}

    def _wait(self, process: subprocess.Popen, condition: Callable[[], bool], *, seconds: float) -> None:
        """Wait until the condition holds, the process ends, or time is over."""
        deadline = time.monotonic() + seconds
        while process.poll() is None and not condition() and time.monotonic() < deadline:
            time.sleep(0.001)

    def has(self, path: str) -> bool:
        """Return whether a file or folder exists."""
        return (self.folder / path).exists()


def kill_family(process: subprocess.Popen) -> None:
    """Send SIGKILL to a launcher and all its descendants, which have their own sessions."""
    if process.poll() is not None:
        return
    head = psutil.Process(process.pid)
    family = [*head.children(recursive=True), head]
    for member in family:
        member.kill()
    psutil.wait_procs(family, timeout=30)
    process.wait(timeout=30)


def list_files(folder: Path) -> dict[str, Path]:
    """Return the files to compare by their paths relative to a folder."""
    paths = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in paths.items() if not path.name.startswith(NOT_COMPARED)}


def is_temporary(name: str) -> bool:
    """Return whether a path belongs to a partial file or to one that is deleted at the end of its stage."""
    return any(part.startswith(".") or part in ("checkpoints", "captions.parts") for part in Path(name).parts)


def read_progress(folder: Path) -> dict:
    """Return the latest stage of a run, its numbers of steps, and its temporary files."""
    begun = [stage.name for stage in list_stages(ROUNDS) if not stage.checkpoints and (folder / stage.begins).exists()]
    steps = [path.read_bytes().count(b"\n") for path in sorted(folder.glob("run/*/steps.jsonl"))]
    temporary = [name for name in list_files(folder) if is_temporary(name)]
    return {"stage": begun[-1], "steps": steps, "temporary": temporary}


def first_new_file(folder: Path, before: set[str]) -> str:
    """Return the first file that a start created, which shows where it resumed."""
    new = [path for name, path in list_files(folder).items() if name not in before and not is_temporary(name)]
    return str(min(new, key=lambda path: path.stat().st_ctime).relative_to(folder)) if new else ""


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, without times and memory sizes."""
    content = path.read_bytes()
    if path.name in ("steps.jsonl", "scores.jsonl"):

        def remove_times(fields: dict) -> dict:
            return {key: value for key, value in fields.items() if key not in TIMED}

        with suppress(json.JSONDecodeError):  # a truncated line makes the file differ as it is
            content = json.dumps([json.loads(line, object_hook=remove_times) for line in content.splitlines()]).encode()
    return hashlib.sha256(content).hexdigest()


def compare(whole: Path, broken: Path) -> dict[str, str]:
    """Compare all files: `identical`, `differs`, `missing`, `unexpected`, or `left over` for a temporary file."""
    expected, seen = list_files(whole), list_files(broken)
    verdicts = {}
    for name in sorted(expected | seen):
        if name not in seen:
            verdicts[name] = "missing"
        elif name not in expected:
            hidden = any(part.startswith(".") for part in Path(name).parts)
            verdicts[name] = "left over" if hidden else "unexpected"
        else:
            verdicts[name] = "identical" if digest(expected[name]) == digest(seen[name]) else "differs"
    return verdicts


def run_test(line: Sequence[str], folder: Path, *, name: str, num_kills: int, seed: int) -> dict:
    """Run a command uninterrupted and with kills; return the kills and the comparison of all files."""
    console = Console()
    whole, launched = Trial(line, folder / f"whole_{name}"), time.time()
    whole.finish()
    seconds = time.time() - launched
    stages = [stage for stage in list_stages(ROUNDS) if whole.has(stage.begins) and whole.has(stage.ends)]
    durations = measure_stages(stages, whole.folder, launched=launched)
    console.print(f"{name}: uninterrupted in {seconds:.0f} s; {num_kills} kills in {len(stages)} stages")
    broken, moments = Trial(line, folder / f"broken_{name}"), list[dict]()
    for kill in [*sample_kills(stages, num_kills=num_kills, seed=seed), None]:
        before, moment = set(list_files(broken.folder)), None
        if kill:
            moment = broken.kill_at(kill, durations)
        else:
            broken.finish()
        if moments:  # how the start after the previous kill resumed
            log = broken.log_path.read_text(errors="replace").splitlines()
            moments[-1]["resumed with"] = first_new_file(broken.folder, before)
            moments[-1]["messages"] = [text.strip() for text in log if any(word in text for word in RESUME_MESSAGES)]
        if moment:
            moments.append(moment)
            console.print(f"{name}: kill {len(moments)}, {moment['seconds']} s after its start, {moment['stage']}")
    return {
        "whole_seconds": round(seconds, 1),
        "all_seconds": round(time.time() - launched, 1),
        "kills": moments,
        "files": compare(whole.folder, broken.folder),
    }


def is_identical(result: Mapping) -> bool:
    """Return whether both runs ended with the same files; temporary files may be left over."""
    return set(result["files"].values()) <= {"identical", "left over"}


def report(results: Mapping[str, Mapping]) -> None:
    """Print the kills, the files and the result for each number of processes."""
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
        console.print(f"{name}: {len(result['kills'])} kills; identical: {'yes' if is_identical(result) else 'NO'}")


def command(processes: int, extra: Sequence[str]) -> list[str]:
    """Return the command line of the smallest run of the recipe."""
    flags = [f"--{name}={value}" for name, value in SIZES.items()]
    launcher = [str(Path(sys.executable).with_name("torchrun")), "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, str(ROOT / "recipes" / "mrdpo.py"), *flags, *extra]


def main() -> None:
    """Run the tests and report; exit with code 1 if files differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, default=Path("run/resume"), help="folder of the runs")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes to test")
    parser.add_argument("--num-kills", type=int, default=20, help="kills of each run")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the moments")
    values, extra = parser.parse_known_args()
    results = {}
    for number in values.processes:
        name = f"{number}_processes"
        folder = values.out.resolve()
        line = command(number, extra)
        results[name] = run_test(line, folder, name=name, num_kills=values.num_kills, seed=values.seed)
    text = json.dumps({"seed": values.seed, "runs": results}, indent=2) + "\n"
    (values.out / "report.json").write_text(text, encoding="utf-8")
    report(results)
    sys.exit(0 if all(map(is_identical, results.values())) else 1)


if __name__ == "__main__":
    main()
