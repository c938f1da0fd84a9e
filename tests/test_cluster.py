"""Several machines: two torchrun agents on this one, a fake SLURM, and the commands of docs/scaling.md."""

import math
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import get_args

import psutil
import pytest

from salmonn.config import parse_config
from salmonn.train.parallel import StrategyName
from tests.limits import RUN_SECONDS

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "recipes" / "cluster"
SCALE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
BIN = Path(sys.executable).parent
# Three seconds with one or two things to see and one to hear; `out` is not here, as captions hold their model's path.
FLAGS = {
    "out": "run", "clips_dir": "clips", "feature_cache.folder": "tokens", "synth.clips": 4, "synth.seed": 5,
    "synth.min_seconds": 3, "synth.max_seconds": 3, "synth.min_visual": 1, "synth.max_visual": 2,
    "synth.min_sounds": 1, "synth.max_sounds": 1,
    "heldout_clips": 2, "rounds": 1, "sampling.num_samples": 3, "sampling.temperature": 0.9,
    "sampling.max_new_tokens": 24, "selection.min_gap": 0.0001, "fit.steps": 2, "fit.batch_size": 2,
    "rebirth.fit.steps": 2, "rebirth.fit.batch_size": 2, "early_stopping.min_margin": "null",
    "early_stopping.max_worsening": 1,
}  # fmt: skip
MRDPO = [f"--{name}={value}" for name, value in FLAGS.items()]
# Starts the command once for each machine, as SLURM does, and ends as the worst of them.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for ((node = 0; node < SLURM_NNODES; node++)); do
    SLURM_NODEID=$node SLURM_PROCID=$node SLURM_LOCALID=0 "$@" &
done
code=0
for job in $(jobs -p); do wait "$job" || code=$?; done
exit "$code"
"""
SCONTROL = """#!/bin/bash
[[ "$*" == "show hostnames n[1-2]" ]] && printf 'localhost\\nlocalhost\\n'
"""


def run_all(lines: Sequence[Sequence[object]], folder: Path, **variables: object) -> None:
    """Run commands side by side to their good ends, on machines of one core each: sums of two threads may differ."""
    (folder / "cores").mkdir()
    (folder / "cores" / "sitecustomize.py").write_text("import os\nos.cpu_count = lambda: 1\n")
    env = {"OMP_NUM_THREADS": 1, "PYTHONPATH": f"{ROOT}:{folder / 'cores'}"} | variables
    env = {name: str(value) for name, value in env.items()}
    processes = []
    for number, line in enumerate(lines):
        with (folder / f"log_{number}").open("w") as log:
            processes.append(
                subprocess.Popen(list(map(str, line)), cwd=folder, stdout=log, stderr=log, env=os.environ | env)
            )
    try:
        for number, process in enumerate(processes):
            assert process.wait(timeout=RUN_SECONDS) == 0, (folder / f"log_{number}").read_text()[-3000:]
    finally:
        family = [child for process in processes if process.poll() is None for child in _family(process.pid)]
        for member in family:
            member.kill()


def _family(pid: int) -> list[psutil.Process]:
    return [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]


def results(folder: Path) -> dict[str, bytes]:
    """Weights, records and figures of a run, without the times in them."""
    paths = (path for ending in ("safetensors", "jsonl", "json") for path in folder.glob(f"run/**/*.{ending}"))
    return {
        str(path.relative_to(folder)): re.sub(
            rb'"(date|\w*seconds|tokens_per_second|memory_gib)": [^,}]*', b"", path.read_bytes()
        )
        for path in paths
    }


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def run_under_slurm(folder: Path, job_id: int, **programs: str) -> None:
    """Run the SLURM script on two machines, with fakes of SLURM's programs and of others."""
    (folder / "recipes").symlink_to(ROOT / "recipes")
    (folder / "bin").mkdir()
    for name, content in ({"srun": SRUN, "scontrol": SCONTROL} | programs).items():
        (folder / "bin" / name).write_text(content)
        (folder / "bin" / name).chmod(0o755)
    job = {"SLURM_SUBMIT_DIR": folder, "SLURM_JOB_ID": job_id, "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": 2}
    job |= {"SLURM_GPUS_ON_NODE": 1, "SLURM_CPUS_PER_TASK": 1, "PATH": f"{folder / 'bin'}:{BIN}:{os.environ['PATH']}"}
    run_all([["bash", CLUSTER / "slurm.sbatch", "mrdpo", *MRDPO]], folder, **job)


def resume_without_slurm(folder: Path) -> None:
    """Resume on machines that are started manually with their ranks."""
    agent = [BIN / "torchrun", "--nnodes=2", "--nproc_per_node=1", "--master_addr=localhost"]
    agent.append(f"--master_port={free_port()}")
    run_all([[*agent, f"--node_rank={node}", ROOT / "recipes" / "mrdpo.py", *MRDPO] for node in range(2)], folder)


def test_slurm_starts_torchrun_on_each_machine(tmp_path):
    run_under_slurm(tmp_path, 12345, torchrun='#!/bin/bash\necho "$SLURM_NODEID" "$@" >> calls\n')
    # Port 20000 + the job's number modulo 10000, on the first machine.
    agent = "--nnodes=2 --nproc_per_node=1 --rdzv_backend=c10d --rdzv_endpoint=localhost:22345 --rdzv_id=12345"
    calls = sorted((tmp_path / "calls").read_text().splitlines())
    assert calls == [f"{node} {agent} recipes/mrdpo.py {' '.join(MRDPO)}" for node in (0, 1)]


def test_one_machine_starts_a_process_for_each_gpu(tmp_path):
    (tmp_path / "torchrun").write_text('#!/bin/bash\necho "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    script = shutil.copy(CLUSTER / "one_machine.sh", tmp_path)  # away from the repository's own torchrun
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for processes, expected in (({}, "gpu"), ({"PROCESSES": "3"}, "3")):
        env = {name: value for name, value in os.environ.items() if name != "PROCESSES"} | variables | processes
        out = subprocess.run(
            ["bash", script, "mrdpo", "--rounds=1"], capture_output=True, text=True, env=env, check=True
        )
        launcher, _, command = out.stdout.partition(" /")
        assert launcher == f"--standalone --nproc_per_node={expected} --max_restarts=2"
        assert command.endswith("/recipes/mrdpo.py --rounds=1\n")


# One test, so that workers of pytest-xdist do not each make the run of one machine.
@pytest.mark.slow
def test_two_machines_give_the_same_files_as_one(tmp_path):
    """Under SLURM from the start, and resumed without SLURM after rebirth was interrupted."""
    one_machine, slurm, resumed = (tmp_path / name for name in ("one_machine", "slurm", "resumed"))
    one_machine.mkdir()
    run_all([[CLUSTER / "one_machine.sh", "mrdpo", *MRDPO]], one_machine, PROCESSES=2)
    expected = results(one_machine)
    assert "run/rebirth/merged/model.safetensors" in expected

    shutil.copytree(one_machine / "clips", slurm / "clips")
    run_under_slurm(slurm, free_port())
    assert different(expected, results(slurm)) == []

    for folder in ("clips", "run"):
        shutil.copytree(one_machine / folder, resumed / folder)
    for missing in ("merged", "heldout"):
        shutil.rmtree(resumed / "run" / "rebirth" / missing)
    (resumed / "run" / "summary.json").unlink()
    resume_without_slurm(resumed)
    assert different(expected, results(resumed)) == []


def different(expected: dict[str, bytes], actual: dict[str, bytes]) -> list[str]:
    """Return the names of files that differ."""
    return [name for name in expected | actual if expected.get(name) != actual.get(name)]


def documented_commands() -> list[list[str]]:
    """Return the arguments of every shell command in docs/scaling.md."""
    blocks = re.findall(r"```bash\n(.*?)```", SCALE, re.DOTALL)
    lines = (line for block in blocks for line in block.replace("\\\n", " ").splitlines())
    return [args for line in lines if (args := shlex.split(line, comments=True))]


def read_recipe(args: list[str]) -> tuple[str, list[str], int] | None:
    """Return the recipe of a command, its flags and the number of processes; None for other commands."""
    for index, arg in enumerate(args):
        if match := re.fullmatch(r"recipes/(\w+)\.py", arg):
            before = dict(part.split("=") for part in args[:index] if "=" in part)
            return (
                match[1],
                args[index + 1 :],
                math.prod(int(before.get(f"--{flag}", 1)) for flag in ("nnodes", "nproc_per_node")),
            )
        if arg.startswith("recipes/cluster/"):
            sizes = re.findall(r"^#SBATCH --(?:nodes|gpus-per-node)=(\d+)", (ROOT / arg).read_text(), re.MULTILINE)
            return args[index + 1], args[index + 2 :], math.prod(map(int, sizes)) if sizes else 8
    return None


def test_documented_recipe_commands_are_valid(load_recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipes = [recipe for args in documented_commands() if (recipe := read_recipe(args))]
    assert [processes for _, _, processes in recipes] == [1, 8, 8, 32, 32]
    for name, flags, processes in recipes:
        config_type = getattr(
            load_recipe(name), {"mrdpo": "MrDpoConfig", "sft": "SftConfig", "dpo": "OfflineDpoConfig"}[name]
        )
        config = parse_config(config_type, description="", args=flags)
        # Each process needs an example in every step of every stage.
        assert config.dry_run or min(config.fit.batch_size, config.rebirth.fit.batch_size) >= processes


def test_other_documented_commands_are_known():
    assert {args[0] for args in documented_commands() if not read_recipe(args)} == {"pip", "vllm"}


def test_documented_settings_strategies_and_files_exist(load_recipe):
    config = load_recipe("mrdpo").MrDpoConfig()
    dotted = set(re.findall(r"`(?:--)?((?:early[_-]stopping|fit|judge|rebirth)\.[\w-]+)", SCALE))
    assert len(dotted) > 8
    for name in dotted:
        attrgetter(name.replace("-", "_"))(config)  # AttributeError for an unknown setting
    assert {name for name in re.findall(r"^\| `(\w+)` \|", SCALE, re.MULTILINE)} >= set(get_args(StrategyName))
    files = set(re.findall(r"\b(?:recipes|tools|docs|tests)/[\w/.]+\.\w+", SCALE))
    files |= {f"docs/{target}" for target in re.findall(r"\]\(([^)#:]+)\)", SCALE)}
    assert len(files) > 4 and [name for name in files if not (ROOT / name).is_file()] == []
