"""Launch recipes at the smallest size that still gives preference pairs."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.launch import forked
from tests.limits import STEP_SECONDS

ROOT = Path(__file__).parents[2]
# Clips of three seconds with one or two visual events and one sound: short captions, few tokens, fast to render.
SIZES = {
    "synth.clips": 8, "synth.seed": 5, "synth.min_seconds": 3, "synth.max_seconds": 3, "synth.min_visual": 1,
    "synth.max_visual": 2, "synth.min_sounds": 1, "synth.max_sounds": 1, "heldout_clips": 3,
}  # fmt: skip
SFT = SIZES | {
    "tasks": "[caption,questions]", "fit.steps": 28, "fit.batch_size": 8, "fit.warmup_ratio": 0.18,
    "fit.learning_rate": 0.003,
}  # fmt: skip


def command(recipe: str, *, processes: int = 0, **options: object) -> list[str]:
    """Return the command line of a recipe; with 0 processes, without torchrun."""
    launcher = ["python"] if not processes else ["torchrun", "--standalone", f"--nproc_per_node={processes}"]
    launcher[0] = str(Path(sys.executable).with_name(launcher[0]))
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return [*launcher, str(ROOT / "recipes" / f"{recipe}.py"), *flags]


def kill(process: subprocess.Popen) -> None:
    """Send SIGKILL to a launcher and all its processes, which have sessions of their own."""
    processes = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for each in processes:
        each.kill()
    psutil.wait_procs(processes, timeout=STEP_SECONDS)
    process.wait(timeout=STEP_SECONDS)


def execute(command: list[str], *, timeout: float = 900) -> subprocess.CompletedProcess[str]:
    """Run a command line to its end; kill all its processes after the timeout."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill(process)
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def run(recipe: str, *, processes: int = 0, fresh: bool = False, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a recipe to its end, in forks of a process that has imported torch, or in fresh processes."""
    args = command(recipe, processes=processes, **options)
    return execute(args if fresh else forked(*args))


@pytest.fixture(scope="session")
def launch() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run`, for tests."""
    return run


@pytest.fixture(scope="session")
def command_of() -> Callable[..., list[str]]:
    """`command`, for tests that start the process themselves."""
    return command


@pytest.fixture(scope="session")
def trained_model(shared) -> Path:
    """Folder with `model/`, trained from scratch for 28 steps on captions and questions, and its `clips/`."""

    def make(folder: Path) -> None:
        result = run("sft", processes=1, out=folder / "model", clips_dir=folder / "clips", **SFT)
        assert result.returncode == 0, result.stderr

    return shared("trained_model", make)


@pytest.fixture(scope="session")
def trained_model_flags() -> dict[str, object]:
    """Flags with which the model was trained."""
    return SFT


@pytest.fixture(scope="session")
def sizes() -> dict[str, object]:
    """Flags of the clips on which the model was trained."""
    return SIZES
