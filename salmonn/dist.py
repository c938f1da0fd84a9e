"""Processes of one run: rank, barrier, gather, a log that rank 0 alone writes, and an end that all of them share.

The only place that reads the launcher's variables. Without a launcher everything works as one process of one.

A process that fails ends the whole run (`abort`), on all machines and whatever the others are at: each has a thread
that listens to the rank before its own and hands on to the rank after it why the run ends.
"""

import atexit
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from functools import cache, partial
from types import TracebackType
from typing import TypeVar

import torch
import torch.distributed as torch_dist
from rich.logging import RichHandler

Item = TypeVar("Item")

# Training alone uses the default group, and its ranks are never far apart.
TRAINING_TIMEOUT = timedelta(minutes=30)
# For all else ranks may wait for one whose judge or sampling takes days; a process that is gone is noticed at once.
CONTROL_TIMEOUT = timedelta(days=30)
HEARING_SECONDS = 5.0  # within which the reason of a lost connection has come round to every rank
REPORT_SECONDS = 0.5  # by which torchrun has noticed the process that failed first, and reports that one
LEAVING_SECONDS = 10.0  # that a process at its end waits for the goodbye of the one before
REASON_BYTES = 2000  # of the reason that is handed on
REASON_TAG = 1  # marks it among what the ranks send each other
NO_REASON = (
    "process {} of this run ended without a word (killed, or out of memory?): "
    "torchrun's report below has its signal; the same command goes on"
)


def setup(*, threads: int | None = None) -> None:
    """Join the process group that torchrun launched, if any, and set up logging.

    Args:
        threads: CPU threads of this process; None shares the machine's cores among its local processes.
    """
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // local_size))
    if world_size() > 1 and not torch_dist.is_initialized():
        _join()
    level = logging.INFO if is_main() else logging.WARNING
    handler = RichHandler(show_path=False, show_level=False, markup=False)
    logging.basicConfig(level=level, format="%(message)s", datefmt="%H:%M:%S", handlers=[handler], force=True)


def _join() -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(device())  # or else every rank would compute on the first one's
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    torch_dist.init_process_group(backend, timeout=TRAINING_TIMEOUT)
    _control()
    watcher = threading.Thread(target=_watch, name="watcher", daemon=True)
    watcher.start()
    sys.excepthook = partial(_fail, watcher)
    atexit.register(_leave, watcher)


@cache
def _control() -> torch_dist.ProcessGroup:
    """The group of all that is not training, in main memory: GPUs have no room for all clips' tokens."""
    return torch_dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)


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
        torch_dist.barrier(group=_control())


def shard(items: Sequence[Item], *, first: int = 0) -> list[Item]:
    """This rank's part of a list: every world_size-th item, the list's first going to rank `first`."""
    return list(items[(rank() - first) % world_size() :: world_size()])


def gather(items: Sequence[Item]) -> list[Item]:
    """All ranks' parts of a list that was shared out by `share`, in the list's own order, on every rank."""
    parts = _every(items)
    gathered = [item for group in zip(*(part[: len(parts[-1])] for part in parts), strict=True) for item in group]
    tails = [part[len(parts[-1]) :] for part in parts]
    return gathered + [item for tail in tails for item in tail]


def balance(costs: Sequence[float]) -> list[list[int]]:
    """Deal work out by what it costs: the dearest piece first, each to the rank with the least to do so far.

    Args:
        costs: of each piece of work, the same on all ranks.

    Returns:
        For each rank the places of its pieces in `costs`, the dearest first.
    """
    shares: list[list[int]] = [[] for _ in range(world_size())]
    loads = [0.0] * world_size()
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        # Pieces whose cost is not known (0) are dealt out by their number.
        least = min(range(world_size()), key=lambda number: (loads[number], len(shares[number])))
        shares[least].append(place)
        loads[least] += costs[place]
    return shares


def gather_balanced(items: Sequence[Item], shares: Sequence[Sequence[int]]) -> list[Item]:
    """What all ranks made of a list that `spread` dealt out, in the list's own order, on every rank.

    Args:
        items: this rank's, as many as its share and in its order.
        shares: as `spread` gave them.
    """
    assert len(items) == len(shares[rank()]), "one item for each place of the share"
    placed = {
        place: item
        for shard, part in zip(shares, _every(items), strict=True)
        for place, item in zip(shard, part, strict=True)
    }
    return [placed[place] for place in range(len(placed))]


def _every(items: Sequence[Item]) -> list[list[Item]]:
    """Each rank's list."""
    if world_size() == 1:
        return [list(items)]
    parts: list[list[Item]] = [[] for _ in range(world_size())]
    torch_dist.all_gather_object(parts, list(items), group=_control())
    return parts


def all_reduce_sum(value: float) -> float:
    """Sum of a number over the ranks."""
    if world_size() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.double)
    torch_dist.all_reduce(tensor, group=_control())
    return float(tensor)


def abort(reason: str, *, code: int = 2) -> None:
    """End this process and all others of the run, which say this one's number and the reason.

    A process that is alone goes on, to end as it likes.
    """
    if world_size() == 1 or not torch_dist.is_initialized():
        return
    _hand_on(f"process {rank()} of this run failed: {reason}")
    sys.stdout.flush()
    # Past Python's own end: the watcher waits outside of Python, and woken in the midst of that it would crash.
    os._exit(code)


def _fail(
    watcher: threading.Thread, kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Take an error that nobody caught, as sys.excepthook: show it, and end the run."""
    if isinstance(error, RuntimeError):
        # Perhaps a connection that another's end broke: the watcher then hears why, and ends this process.
        watcher.join(HEARING_SECONDS)
    sys.__excepthook__(kind, error, trace)
    abort("".join(traceback.format_exception_only(error)).strip(), code=1)


def _watch() -> None:
    """Listen to the rank before; once it fails, or is gone without a word, hand on why and end this process too.

    In a thread of its own, since this one's main thread may judge for hours, or wait on a GPU for what never comes.
    """
    before = (rank() - 1) % world_size()
    message = torch.zeros(REASON_BYTES, dtype=torch.uint8)
    try:
        torch_dist.recv(message, src=before, group=_control(), tag=REASON_TAG)
        reason = bytes(message.tolist()).rstrip(b"\0").decode(errors="replace")
    except RuntimeError:  # the connection is closed
        reason = NO_REASON.format(before)
    if not reason:  # it came to the end of the run
        return
    _hand_on(reason)
    sys.stderr.write(f"error: {reason}\n")
    sys.stderr.flush()
    time.sleep(REPORT_SECONDS)
    os._exit(1)


def _hand_on(reason: str) -> None:
    """Tell the next rank why the run ends; an empty reason is a goodbye."""
    letters = reason.encode()[:REASON_BYTES].ljust(REASON_BYTES, b"\0")
    message = torch.tensor(list(letters), dtype=torch.uint8)
    with suppress(RuntimeError):  # that rank is gone already
        torch_dist.send(message, dst=(rank() + 1) % world_size(), group=_control(), tag=REASON_TAG)


def _leave(watcher: threading.Thread) -> None:
    """Say goodbye at the end of the run."""
    _hand_on("")
    watcher.join(LEAVING_SECONDS)
    torch_dist.destroy_process_group()
