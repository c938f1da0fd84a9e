"""Processes of one run, launched for real: what they share and gather, how they wait, and how they end together."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from salmonn import dist
from tests.launch import forked
from tests.limits import RUN_SECONDS

SCRIPT = """
import json, sys, time
from datetime import timedelta
from pathlib import Path
from torch.distributed.distributed_c10d import _set_pg_timeout
from salmonn import dist

dist.setup(threads=1)
_set_pg_timeout(timedelta(seconds=0.3))  # of training: others wait longer for a judge
late = 0.6 * dist.rank()
time.sleep(late)
dist.barrier()
result = {"rank": dist.rank(), "size": dist.world_size(), "main": dist.is_main()}
time.sleep(late)
result["total"] = dist.all_reduce_sum(dist.rank() + 1.5)
time.sleep(late)
for count in (0, 1, 4, 5):
    mine = dist.shard(list(range(count)))
    result[f"mine {count}"] = mine
    result[f"all {count}"] = dist.gather([item * 10 for item in mine])
result["text"] = dist.gather([f"of {dist.rank()}"])
for costs in ([], [1], [2, 9, 4, 4]):
    shares = dist.balance(costs)
    mine = [f"{index} of {dist.rank()}" for index in shares[dist.rank()]]
    result[f"collected {len(costs)}"] = dist.gather_balanced(mine, shares)
Path(sys.argv[1], f"{dist.rank()}.json").write_text(json.dumps(result))
"""

# A process fails while the others wait.
ENDS = """
import os, signal, sys, time
from dataclasses import dataclass
import torch
from salmonn import dist
from salmonn.config import run_recipe

@dataclass(frozen=True)
class Config:
    '''What each rank does.

    Args:
        failing_rank: rank that fails.
        end: how it fails.
        wait: what the other ranks do meanwhile.
    '''

    failing_rank: int
    end: str
    wait: str

def main(config):
    dist.setup(threads=1)
    dist.barrier()
    if dist.rank() == config.failing_rank:
        {"mistake": mistake, "bug": bug, "kill": kill}[config.end]()
    waits = {"gather": lambda: dist.gather([1]), "train": lambda: torch.distributed.all_reduce(torch.ones(1))}
    (waits | {"judge": lambda: time.sleep(1000)})[config.wait]()

def mistake():
    raise ValueError("a.mp4 is not there: add it")

def bug():
    raise RuntimeError("a sum is off")

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

run_recipe(main, Config, description="Ends.", on_error=dist.abort)
"""
MISTAKE, BUG = "a.mp4 is not there: add it", "RuntimeError: a sum is off"
LOST = "ended without a message (killed, or out of memory?)"


@pytest.fixture
def script(tmp_path):
    """The path of a script with this text."""

    def write(text: str) -> Path:
        path = tmp_path / "script.py"
        path.write_text(text)
        return path

    return write


def torchrun(*options: object, fresh: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a script in two processes: forks, or fresh ones of a real torchrun."""
    launcher = Path(sys.executable).with_name("torchrun")
    args = [str(part) for part in (launcher, "--standalone", "--nproc_per_node=2", *options)]
    command = args if fresh else forked(*args)
    return subprocess.run(command, capture_output=True, text=True, timeout=RUN_SECONDS, check=False)


def start_without_launcher(*options: object, size: int) -> list[tuple[int, str]]:
    """Start processes without a launcher; return the exit code and stderr of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    for rank in range(size):
        env = {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
        command = forked(sys.executable, *options)
        processes.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | env))
    try:
        outputs = [process.communicate(timeout=RUN_SECONDS)[1] for process in processes]
        return [(process.returncode, stderr) for process, stderr in zip(processes, outputs, strict=True)]
    finally:
        for process in processes:
            process.kill()


def test_two_processes_share_and_gather(script, tmp_path):
    result = torchrun(script(SCRIPT), tmp_path)
    assert result.returncode == 0 and "rror" not in result.stderr, result.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert (first["rank"], first["size"], first["main"]) == (0, 2, True)
    assert (second["rank"], second["size"], second["main"]) == (1, 2, False)
    assert first["mine 5"] == [0, 2, 4] and second["mine 5"] == [1, 3]
    assert first["mine 1"] == [0] and second["mine 1"] == []
    for result in (first, second):
        assert result["all 0"] == [] and result["all 1"] == [0]
        assert result["all 4"] == [0, 10, 20, 30] and result["all 5"] == [0, 10, 20, 30, 40]
        assert result["text"] == ["of 0", "of 1"] and result["total"] == 4.0  # 1.5 + 2.5
        # The 9 is about as much as the others: 4 + 4 + 2.
        assert result["collected 4"] == ["0 of 1", "1 of 0", "2 of 1", "3 of 1"]
        assert result["collected 0"] == [] and result["collected 1"] == ["0 of 0"]


# The reason is broadcast also to ranks that do not communicate with the failed one.
@pytest.mark.parametrize(
    ("size", "failing_rank", "end", "wait", "code", "own", "others"),
    [
        (2, 0, "mistake", "gather", 2, f"error: {MISTAKE}\n", f"process 0 of this run failed: {MISTAKE}"),
        (2, 1, "bug", "train", 1, BUG, f"process 1 of this run failed: {BUG}"),
        (2, 1, "mistake", "judge", 2, f"error: {MISTAKE}\n", f"process 1 of this run failed: {MISTAKE}"),
        (3, 1, "kill", "train", -signal.SIGKILL, "", f"process 1 of this run {LOST}"),
        (2, 0, "kill", "judge", -signal.SIGKILL, "", f"process 0 of this run {LOST}"),
    ],
)
def test_a_failing_process_stops_the_others(script, size, failing_rank, end, wait, code, own, others):
    args = (script(ENDS), "--failing_rank", failing_rank, "--end", end, "--wait", wait)
    ended = start_without_launcher(*args, size=size)
    assert ended[failing_rank][0] == code and own in ended[failing_rank][1]
    assert ("Traceback" in ended[failing_rank][1]) == (end == "bug")
    for rank, (exit_code, stderr) in enumerate(ended):
        if rank != failing_rank:
            assert exit_code == 1 and stderr.startswith(f"error: {others}") and stderr.count("\n") == 1, stderr


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("mistake", f"error: {MISTAKE}\n"),
        pytest.param("kill", "Signal 9 (SIGKILL)", marks=pytest.mark.slow),
    ],
)
def test_torchrun_reports_why_a_run_ended(script, end, message):
    result = torchrun(script(ENDS), "--failing_rank", 1, "--end", end, "--wait", "gather", fresh=True)
    root = result.stderr.partition("Root Cause")[2]
    assert result.returncode == 1 and message in result.stderr
    assert "rank      : 1 " in root and ("exitcode  : 2 " if end == "mistake" else "exitcode  : -9 ") in root


def test_without_a_launcher_it_is_one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (dist.rank(), dist.world_size(), dist.is_main()) == (0, 1, True)
    assert dist.shard("abc") == dist.gather("abc") == ["a", "b", "c"]
    shares = dist.balance([1, 3, 2])
    assert shares == [[1, 2, 0]] and dist.gather_balanced(["3", "2", "1"], shares) == ["1", "3", "2"]
    assert dist.all_reduce_sum(2.5) == 2.5
    dist.barrier()
    dist.abort("there is no other process")


@pytest.mark.parametrize(("rank", "expected"), [("0", ["a", "d"]), ("1", ["b", "e"]), ("2", ["c"])])
def test_shares_of_three(monkeypatch, rank, expected):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", rank)
    assert dist.shard("abcde") == expected


def test_work_is_balanced_by_cost(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    # 7 to rank 0 and 6 to rank 1; 5 and then 4 to rank 2, as 5 is the least; 3 to rank 1 and 2 to rank 0: 9 each.
    assert dist.balance([2, 3, 4, 5, 6, 7]) == [[5, 0], [4, 1], [3, 2]]
    # Balanced by number, the long item would share a rank.
    assert dist.balance([1, 1, 1, 1, 60]) == [[4], [0, 2], [1, 3]]
    # Items of unknown cost are assigned in turn.
    assert dist.balance([0, 0, 0, 0]) == [[0, 3], [1], [2]]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 8),
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "2,1"}, 8),  # by nesting level
        ({"RANK": "0", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}, 4),  # as torchrun sets it on any machine
    ],
)
def test_threads_of_a_process(monkeypatch, environment, expected):
    for name in ("RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    used = []
    monkeypatch.setattr(dist.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(dist.torch, "set_num_threads", used.append)
    monkeypatch.setattr(dist.logging, "basicConfig", lambda **_: None)
    dist.setup()
    assert used == [expected]


def test_deterministic_algorithms_are_chosen_before_cuda_starts(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(dist.logging, "basicConfig", lambda **_: None)
    try:
        dist.setup(threads=torch.get_num_threads(), deterministic=True)
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
