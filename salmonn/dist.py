"""Processes of one run: rank and device, logging, collectives over Python objects, and distribution of work.

The only module that reads the launcher's environment variables. Without a launcher, a run is a single process.
A process that fails ends the whole run; see `failure_ring.py`.
"""

import logging
import os
from collections.abc import Sequence
from datetime import timedelta
from functools import cache
from typing import TypeVar

import torch
import torch.distributed as torch_dist
from rich.logging import RichHandler

from salmonn.failure_ring import FailureRing

Item = TypeVar("Item")

# The default process group is used by training only, where ranks are never far apart.
TRAINING_TIMEOUT = timedelta(minutes=30)
# Elsewhere ranks may wait days for one that samples or scores; a lost process is still noticed at once.
CONTROL_TIMEOUT = timedelta(days=30)


def setup(*, threads: int | None = None, deterministic: bool = False) -> None:
    """Join the process group that torchrun launched, if any, and set up logging, which only rank 0 does at info level.

    Args:
        threads: CPU threads of this process; None takes OMP_NUM_THREADS, or divides the machine's cores among its local
            processes.
        deterministic: use algorithms with a fixed order of sums on a GPU, where PyTorch has them, and warn elsewhere.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_num_threads(threads or _default_threads())
    if world_size() > 1 and not torch_dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(device())  # otherwise every rank would compute on the first GPU
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        torch_dist.init_process_group(backend, timeout=TRAINING_TIMEOUT)
        _failure_ring()
    level = logging.INFO if is_main() else logging.WARNING
    handler = RichHandler(show_path=False, show_level=False, markup=False)
    logging.basicConfig(level=level, format="%(message)s", datefmt="%H:%M:%S", handlers=[handler], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # logs each request to a judge


def _default_threads() -> int:
    """Return OMP_NUM_THREADS, or this process's share of the cores: torchrun sets the variable to 1 on any machine."""
    requested = os.environ.get("OMP_NUM_THREADS", "")
    if "RANK" not in os.environ and requested.isdecimal() and int(requested):
        return int(requested)
    return max(1, (os.cpu_count() or 1) // local_world_size())


@cache
def _control() -> torch_dist.ProcessGroup:
    """Return the group for everything but training. It works in main memory: GPUs have no room for all features."""
    return torch_dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)


@cache
def _failure_ring() -> FailureRing:
    return FailureRing(_control())


def rank() -> int:
    """Return the number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of processes of this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Return the number of processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main() -> bool:
    """Return whether this is rank 0, which writes files and logs."""
    return rank() == 0


def device() -> torch.device:
    """Return the device that this process computes on."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        torch_dist.barrier(group=_control())


def abort(reason: str, *, code: int = 2) -> None:
    """End this process and all others of the run, which print this one's rank and the reason.

    A single process is not ended: the caller decides how.
    """
    if world_size() > 1 and torch_dist.is_initialized():
        _failure_ring().abort(reason, code=code)


def shard(items: Sequence[Item], *, first: int = 0) -> list[Item]:
    """Return this rank's part of a list: every world_size-th item, starting with item 0 on rank `first`."""
    return list(items[(rank() - first) % world_size() :: world_size()])


def gather(items: Sequence[Item]) -> list[Item]:
    """Merge the parts that `shard` made, in the order of the original list, on every rank."""
    parts = _all_gather(items)
    shortest = len(parts[-1])
    merged = [item for row in zip(*(part[:shortest] for part in parts), strict=True) for item in row]
    return merged + [item for part in parts for item in part[shortest:]]


def balance(costs: Sequence[float]) -> list[list[int]]:
    """Assign tasks to ranks by cost: the most expensive first, each to the rank with the least work so far.

    Args:
        costs: cost of each task, the same on all ranks.

    Returns:
        For each rank the indices of its tasks, the most expensive first.
    """
    shares: list[list[int]] = [[] for _ in range(world_size())]
    loads = [0.0] * world_size()
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        # Tasks of unknown cost (0) are distributed by their number.
        least = min(range(world_size()), key=lambda number: (loads[number], len(shares[number])))
        shares[least].append(place)
        loads[least] += costs[place]
    return shares


def gather_balanced(items: Sequence[Item], shares: Sequence[Sequence[int]]) -> list[Item]:
    """Merge the results of tasks that `balance` assigned, in the order of the tasks, on every rank.

    Args:
        items: results of this rank, in the order of its share.
        shares: return value of `balance`.
    """
    assert len(items) == len(shares[rank()]), "one result for each task of the share"
    return ungroup(_all_gather(items), shares)


def ungroup(parts: Sequence[Sequence[Item]], groups: Sequence[Sequence[int]]) -> list[Item]:
    """Return the items of all groups in the order of their indices.

    Args:
        parts: items of each group.
        groups: indices of these items, which are 0, 1, ... in some order.
    """
    items = {
        index: item for group, part in zip(groups, parts, strict=True) for index, item in zip(group, part, strict=True)
    }
    return [items[index] for index in range(len(items))]


def _all_gather(items: Sequence[Item]) -> list[list[Item]]:
    if world_size() == 1:
        return [list(items)]
    parts: list[list[Item]] = [[] for _ in range(world_size())]
    torch_dist.all_gather_object(parts, list(items), group=_control())
    return parts


def all_reduce_sum(value: float) -> float:
    """Sum a number over the ranks."""
    if world_size() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.double)
    torch_dist.all_reduce(tensor, group=_control())
    return float(tensor)
