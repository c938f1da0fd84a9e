"""Processes of one run: rank, barrier, gather, and a log that rank 0 alone writes.

The only place that reads the launcher's variables. Without a launcher everything works as one process of one.
"""

import atexit
import logging
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as torch_dist
from rich.logging import RichHandler

Item = TypeVar("Item")

# Other ranks wait while one samples or judges longer than they do, which can take hours on a slow endpoint.
TIMEOUT = timedelta(hours=12)


def setup(*, threads: int | None = None) -> None:
    """Join the process group that torchrun launched, if any, and set up logging.

    Args:
        threads: CPU threads of this process; None shares the machine's cores among its local processes.
    """
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // local_size))
    if world_size() > 1 and not torch_dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(device())  # or else every rank would gather on the first one's
        # Objects, such as clips' tokens, are gathered in main memory: GPUs have no room for all of them.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        torch_dist.init_process_group(backend, timeout=TIMEOUT)
        atexit.register(torch_dist.destroy_process_group)
    level = logging.INFO if is_main() else logging.WARNING
    handler = RichHandler(show_path=False, show_level=False, markup=False)
    logging.basicConfig(level=level, format="%(message)s", datefmt="%H:%M:%S", handlers=[handler], force=True)


def rank() -> int:
    """Number of this process, 0 first."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes of this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is rank 0, which writes files and logs."""
    return rank() == 0


def device() -> torch.device:
    """The device that this process computes on."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        torch_dist.barrier()


def share(items: Sequence[Item], *, first: int = 0) -> list[Item]:
    """This rank's part of a list: every world_size-th item, the list's first going to rank `first`."""
    return list(items[(rank() - first) % world_size() :: world_size()])


def gather(items: Sequence[Item]) -> list[Item]:
    """All ranks' parts of a list that was shared out by `share`, in the list's own order, on every rank."""
    if world_size() == 1:
        return list(items)
    parts: list[list[Item]] = [[] for _ in range(world_size())]
    torch_dist.all_gather_object(parts, list(items))
    gathered = [item for group in zip(*(part[: len(parts[-1])] for part in parts), strict=True) for item in group]
    tails = [part[len(parts[-1]) :] for part in parts]
    return gathered + [item for tail in tails for item in tail]


def total(value: float) -> float:
    """Sum of a number over the ranks."""
    if world_size() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.double, device=device())
    torch_dist.all_reduce(tensor)
    return float(tensor)
