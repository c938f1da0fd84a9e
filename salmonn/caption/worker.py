"""A process that reads clips, with limits of time and memory: what goes wrong in it costs the file that it was at.

Measured on two cores, which explains the form:
- A worker imports `salmonn.media` alone, and starts in 0.3 s with 50 MB, where torch and transformers take 5 s and
  400 MB. `multiprocessing` would import the caller's main module in each worker, and all that it imports.
- Frames come through a pipe, at 0.3 to 0.75 ms a megabyte: 0.2 % of what decoding costs for salmonn2, 2 to 7 % for 2+
  with ten frames a second. Shared memory would save that, but is too small for it in most containers.
"""

import fcntl
import io
import logging
import os
import pickle
import queue
import resource
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from logging.handlers import QueueHandler
from typing import Any, Generic, TypeVar

from salmonn.media.container import ClipError

Result = TypeVar("Result")

PIPE_BYTES = 1 << 20  # the most that Linux gives without asking
_BEGUN = b"!"  # what a worker says of a job that it took
KILL_TIMEOUT_SECONDS = 30.0  # in which a process ends that was told to
_START_SECONDS = 120.0  # in which one starts, from a slow disk too
# What a reply is made of.
_SENT = {
    "salmonn.caption.worker._Reply", "salmonn.media.clip.Clip", "logging.LogRecord",
    "numpy.ndarray", "numpy.dtype", "numpy._core.multiarray._reconstruct", "numpy._core.numeric._frombuffer",
    "numpy._core.multiarray.scalar",
}  # fmt: skip
_WORKER = (
    "import os, sys; os.environ['OMP_NUM_THREADS'] = '1'; sys.path[:] = {path!r}; "
    "from salmonn.caption.worker import WorkerLimits, serve; serve({limits!r})"
)


@dataclass(frozen=True)
class WorkerLimits:
    """What one file may cost; a file that costs more is a failure, and harms no other.

    Args:
        seconds: of reading, by the clock.
        memory_gib: that the process may hold.
    """

    seconds: float = 900.0
    memory_gib: float = 4.0

    def __post_init__(self) -> None:
        if not self.seconds > 0 or not self.memory_gib > 0:
            raise ValueError(f"a file's limits must be above 0, got {self.seconds} s and {self.memory_gib} GiB")


class _Replies(pickle.Unpickler):
    """Takes from a worker what workers send, and nothing else: a file may have taken over the process that read it."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in _SENT:
            raise _ForbiddenError(f"{module}.{name}")
        return super().find_class(module, name)


class _ForbiddenError(Exception):
    """A reply names what no worker sends."""


class WorkerDied(Exception):
    """A worker ended; the message says how."""


@dataclass(frozen=True)
class _Reply(Generic[Result]):
    """What a job gave, or the words of its error, and what was logged meanwhile."""

    result: Result | None
    error: str | None
    records: list[logging.LogRecord]


class Worker:
    """A process that does one job after the other."""

    def __init__(self, limits: WorkerLimits) -> None:
        self._limits = limits
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WORKER.format(path=sys.path, limits=limits)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            process_group=0,  # a Ctrl-C is for the parent, which ends its workers
        )
        assert self._process.stdout is not None
        with suppress(OSError):  # a user may have only so much memory in pipes; a small one is slower
            fcntl.fcntl(self._process.stdout, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self._told_to_end = 0.0
        self._replies = io.BufferedReader(self._process.stdout, PIPE_BYTES)  # type: ignore[type-var]

    def interrupt(self) -> None:
        """Have it end at once; whoever waits for its job hears so."""
        self._process.kill()
        self._told_to_end = self._told_to_end or time.monotonic()

    def kill(self) -> None:
        """End it at once, and wait for its end."""
        self.interrupt()
        self.wait(KILL_TIMEOUT_SECONDS)

    def wait(self, seconds: float) -> None:
        """For its end; not where it is stuck in the system, which ends none that waits for a disk which is gone."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, seconds))

    def begin(self, job: "partial[Result]") -> None:
        """Give it a job and see that it took it; raises WorkerDied where the process ended before."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(pickle.dumps(job))
        except BrokenPipeError as error:
            raise WorkerDied(self._tell_end()) from error
        if not self._await(_START_SECONDS):
            raise WorkerDied(f"a process to read it did not start within {_START_SECONDS:g} s")
        # Not of the buffer, which must be empty where `finish` waits.
        if (said := self._process.stdout.read(1)) != _BEGUN:
            raise WorkerDied(self._tell_garbage("something") if said else self._tell_end())

    def finish(self) -> Any:
        """What the job gave.

        Raises:
            ClipError: the job raised a ValueError.
            WorkerDied: the process ended.
        """
        if not self._await(self._limits.seconds + KILL_TIMEOUT_SECONDS):
            raise WorkerDied(
                f"reading it took more than {self._limits.seconds:g} s, and the process that reads it cannot be ended: "
                "the disk or the server that the file is on may be gone"
            )
        # For one that stops in the middle of its reply, which may be large.
        last = threading.Timer(self._limits.seconds + KILL_TIMEOUT_SECONDS, self.interrupt)
        last.start()
        try:
            reply: _Reply[Any] = self._hear()
        finally:
            last.cancel()
        for record in reply.records:
            logger = logging.getLogger(record.name)
            if logger.isEnabledFor(record.levelno):
                logger.handle(record)
        if reply.error is not None:
            raise ClipError(reply.error)
        return reply.result

    def _await(self, seconds: float) -> bool:
        """Whether something comes of it in time, and soon after it was told to end; its own end counts. Or it ends."""
        coming, end = select.poll(), time.monotonic() + seconds
        coming.register(self._replies, select.POLLIN)
        while not coming.poll(1000):
            now = time.monotonic()
            if now > end or (self._told_to_end and now > self._told_to_end + KILL_TIMEOUT_SECONDS):
                self.interrupt()
                return False
        return True

    def _tell_garbage(self, what: str) -> str:
        self.interrupt()
        return f"the process that read it sent {what}, which none sends: do not trust the file"

    def _tell_end(self) -> str:
        self.wait(1.0)
        if self._process.returncode is None:  # it speaks no more, and yet lives
            self.kill()
        code = self._process.returncode
        if self._told_to_end and code in (None, -signal.SIGKILL):
            return "the process that read it was ended, since it did not finish"
        if code >= 0:
            return f"the process that read it ended with code {code}; what it said stands in the terminal"
        if -code == signal.SIGALRM:
            return (
                f"reading it took more than {self._limits.seconds:g} s: take a part of it (start, end), or allow more "
                "(read_seconds)"
            )
        why = "perhaps for want of memory" if -code == signal.SIGKILL else "the file may be damaged; convert it"
        return f"the process that read it was ended by signal {-code} ({signal.Signals(-code).name}): {why}"

    def _hear(self) -> Any:
        try:
            return _Replies(self._replies).load()
        except EOFError as error:
            raise WorkerDied(self._tell_end()) from error
        except MemoryError as error:  # what is left in the pipe is of no use
            self.interrupt()
            raise WorkerDied("there is no memory for what was read of it: take a part of it (start, end)") from error
        except Exception as error:  # of which unpickling has many
            self.wait(1.0)
            if self._process.returncode is not None:  # it ended in the middle of its reply
                raise WorkerDied(self._tell_end()) from error
            what = str(error) if isinstance(error, _ForbiddenError) else "something"
            raise WorkerDied(self._tell_garbage(what)) from error


def serve(limits: WorkerLimits) -> None:
    """What a worker does: jobs from stdin, replies to stdout, until its parent is gone."""
    memory = int(limits.memory_gib * (1 << 30))
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, in the middle of a decoder too
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a parent that is gone is no error
    replies = os.fdopen(os.dup(1), "wb", PIPE_BYTES)

    def say(what: object) -> None:
        pickle.dump(what, replies, protocol=pickle.HIGHEST_PROTOCOL)
        replies.flush()

    os.dup2(2, 1)  # what a library prints must not come among the replies
    notes: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    logging.getLogger().addHandler(QueueHandler(notes))
    jobs: queue.SimpleQueue[partial[Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=[jobs], daemon=True).start()
    while True:
        job, result, error = jobs.get(), None, None
        replies.write(_BEGUN)
        replies.flush()
        signal.setitimer(signal.ITIMER_REAL, limits.seconds)
        try:
            result = job()
        except ValueError as caught:
            error = str(caught)
        except MemoryError:
            error = (
                f"{job.args[0]}: what is read of it takes more than {limits.memory_gib:g} GiB: take a part of it "
                "(start, end), or allow more (read_gib)"
            )
        signal.setitimer(signal.ITIMER_REAL, 0)
        records = [notes.get() for _ in range(notes.qsize())]
        say(_Reply(result, error, records))


def _listen(jobs: "queue.SimpleQueue[partial[Any]]") -> None:
    try:
        while True:
            jobs.put(pickle.load(sys.stdin.buffer))
    except (EOFError, pickle.UnpicklingError):
        os._exit(0)  # in the middle of a file too: whoever wanted it is gone, though it was killed
    finally:  # a job that cannot be imported here
        traceback.print_exc()
        os._exit(1)
