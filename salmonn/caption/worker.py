"""A process that reads clips, with limits of time and memory: what goes wrong in it costs only the file it was reading.

The design follows from measurements on two cores:
- A worker imports `salmonn.media` and little else: it starts in 0.3 s with 50 MB, where torch and transformers take 5 s
  and 400 MB. `multiprocessing` would import the caller's main module in each worker, and all that it imports.
- Frames come through a pipe, at 0.3 to 0.75 ms per megabyte: 0.2 % of the time of decoding for salmonn2, 2 to 7 % for
  2+ with ten frames a second. Shared memory would save that, but is too small for it in most containers.
"""

import io
import logging
import os
import pickle
import queue
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

from salmonn import system
from salmonn.media.container import ClipError

Result = TypeVar("Result")

PIPE_BYTES = 1 << 20  # the most that Linux grants without privileges
KILL_TIMEOUT_SECONDS = 30.0  # for a killed process to end
_START_TIMEOUT_SECONDS = 120.0  # for a process to start, from a slow disk too
_STARTED = b"!"  # sent by a worker when it takes a job
# The classes and functions that a pickled reply may refer to.
_ALLOWED_GLOBALS = {
    "salmonn.caption.worker._Reply", "salmonn.media.clip.Clip", "salmonn.media.container.ClipShape",
    "logging.LogRecord",
    "numpy.ndarray", "numpy.dtype", "numpy._core.multiarray._reconstruct", "numpy._core.numeric._frombuffer",
    "numpy._core.multiarray.scalar",
}  # fmt: skip
_WORKER_CODE = (
    "import os, sys; os.environ['OMP_NUM_THREADS'] = '1'; sys.path[:] = {path!r}; "
    "from salmonn.caption.worker import WorkerLimits, serve; serve({limits!r})"
)


@dataclass(frozen=True)
class WorkerLimits:
    """Limits for reading one file; a file that exceeds them fails, and does not affect the others.

    Args:
        seconds: maximum wall-clock time.
        memory_gib: maximum data segment of the process, in GiB.
    """

    seconds: float = 900.0
    memory_gib: float = 4.0

    def __post_init__(self) -> None:
        if not self.seconds > 0 or not self.memory_gib > 0:
            raise ValueError(f"a file's limits must be above 0, got {self.seconds} s and {self.memory_gib} GiB")


class _ReplyUnpickler(pickle.Unpickler):
    """An unpickler for replies alone: a hostile file may have taken over the process that read it."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in _ALLOWED_GLOBALS:
            raise _ForbiddenError(f"{module}.{name}")
        return super().find_class(module, name)


class _ForbiddenError(Exception):
    """A reply refers to a class or function that no worker sends."""


class WorkerDied(Exception):
    """A worker ended; the message says how."""


@dataclass(frozen=True)
class _Reply(Generic[Result]):
    """The result of a job or the message of its error, and the log records of the job."""

    result: Result | None
    error: str | None
    records: list[logging.LogRecord]


class Worker:
    """A process that runs one job at a time."""

    def __init__(self, limits: WorkerLimits) -> None:
        self._limits = limits
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WORKER_CODE.format(path=sys.path, limits=limits)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            process_group=0,  # Ctrl-C is for the parent, which then ends its workers
        )
        assert self._process.stdout is not None
        system.enlarge_pipe(self._process.stdout, PIPE_BYTES)
        self._killed_at = 0.0
        self._replies = io.BufferedReader(self._process.stdout, PIPE_BYTES)  # type: ignore[type-var]

    def kill(self) -> None:
        """Kill the process; a thread that waits for the job's result gets a WorkerDied."""
        self._process.kill()
        self._killed_at = self._killed_at or time.monotonic()

    def wait(self, seconds: float) -> None:
        """Wait for the process to end, up to a time limit: one that is blocked on a lost disk cannot be killed."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, seconds))

    def close(self) -> None:
        """Kill the process and wait for its end."""
        self.kill()
        self.wait(KILL_TIMEOUT_SECONDS)

    def start_job(self, job: "partial[Result]") -> None:
        """Send a job and wait until the process has taken it; raises WorkerDied if the process ended before."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(pickle.dumps(job))
        except BrokenPipeError as error:
            raise WorkerDied(self._describe_end()) from error
        if not self._poll(_START_TIMEOUT_SECONDS):
            raise WorkerDied(f"the worker process did not start within {_START_TIMEOUT_SECONDS:g} s")
        # Read from the raw pipe: the buffer must be empty when `result` polls. Without `poll`, it is what is looked at.
        source = self._process.stdout if system.HAS_POLL else self._replies
        if (reply := source.read(1)) != _STARTED:
            raise WorkerDied(self._reject("unexpected data") if reply else self._describe_end())

    def result(self) -> Any:
        """Wait for the job and return its result.

        Raises:
            ClipError: the job raised a ValueError.
            WorkerDied: the process ended.
        """
        if not self._poll(self._limits.seconds + KILL_TIMEOUT_SECONDS):
            raise WorkerDied(
                f"reading it took more than {self._limits.seconds:g} s, and the worker process cannot be killed: the "
                "disk or the server that the file is on may be unavailable"
            )
        # A process may also stop in the middle of its reply, which may be large.
        timer = threading.Timer(self._limits.seconds + KILL_TIMEOUT_SECONDS, self.kill)
        timer.start()
        try:
            reply: _Reply[Any] = self._read_reply()
        finally:
            timer.cancel()
        for record in reply.records:
            logger = logging.getLogger(record.name)
            if logger.isEnabledFor(record.levelno):
                logger.handle(record)
        if reply.error is not None:
            raise ClipError(reply.error)
        return reply.result

    def _poll(self, seconds: float) -> bool:
        """Wait for output until the deadline; kill the process on timeout.

        Returns:
            Whether there was output; the end of the process counts.
        """
        has_output, deadline = system.watch(self._replies), time.monotonic() + seconds
        while not has_output(1.0):
            now = time.monotonic()
            if now > deadline or (self._killed_at and now > self._killed_at + KILL_TIMEOUT_SECONDS):
                self.kill()
                return False
        return True

    def _read_reply(self) -> Any:
        try:
            return _ReplyUnpickler(self._replies).load()
        except EOFError as error:
            raise WorkerDied(self._describe_end()) from error
        except MemoryError as error:  # the rest of the reply is still in the pipe
            self.kill()
            raise WorkerDied("not enough memory for the clip: take a part of it (start, end)") from error
        except Exception as error:  # unpickling can raise nearly anything
            self.wait(1.0)
            if self._process.returncode is not None:  # it ended in the middle of its reply
                raise WorkerDied(self._describe_end()) from error
            what = str(error) if isinstance(error, _ForbiddenError) else "unexpected data"
            raise WorkerDied(self._reject(what)) from error

    def _reject(self, what: str) -> str:
        self.kill()
        return f"the worker process sent {what}, which no worker does: do not trust the file"

    def _describe_end(self) -> str:
        self.wait(1.0)
        if self._process.returncode is None:  # it closed its pipe but is alive
            self.close()
        code = self._process.returncode
        if self._killed_at and (code is None or system.was_killed(code)):
            return "the worker process was killed because it did not finish"
        if system.timed_out(code):
            return (
                f"reading it took more than {self._limits.seconds:g} s: take a part of it (start, end), or raise the "
                "limit (read_seconds)"
            )
        if code >= 0:
            return f"the worker process ended with exit code {code}; see its output in the terminal"
        why = "perhaps out of memory" if system.was_killed(code) else "the file may be damaged; convert it"
        return f"the worker process was killed by signal {-code} ({signal.Signals(-code).name}): {why}"


def serve(limits: WorkerLimits) -> None:
    """Run a worker: take jobs from stdin and write replies to stdout, until the parent process is gone."""
    system.limit_memory(int(limits.memory_gib * (1 << 30)))
    system.ignore_broken_pipes()
    deadline = system.Deadline()
    replies = os.fdopen(os.dup(1), "wb", PIPE_BYTES)
    os.dup2(2, 1)  # the output of libraries must not get into the replies
    log_records: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    logging.getLogger().addHandler(QueueHandler(log_records))
    jobs: queue.SimpleQueue[partial[Any]] = queue.SimpleQueue()
    threading.Thread(target=_receive_jobs, args=[jobs], daemon=True).start()
    while True:
        job, result, error = jobs.get(), None, None
        replies.write(_STARTED)
        replies.flush()
        deadline.start(limits.seconds)
        try:
            result = job()
        except ValueError as caught:
            error = str(caught)
        except MemoryError:
            error = (
                f"{job.args[0]}: the clip needs more than {limits.memory_gib:g} GiB: take a part of it (start, end), "
                "or raise the limit (read_gib)"
            )
        deadline.cancel()
        records = [log_records.get() for _ in range(log_records.qsize())]
        pickle.dump(_Reply(result, error, records), replies, protocol=pickle.HIGHEST_PROTOCOL)
        replies.flush()


def _receive_jobs(jobs: "queue.SimpleQueue[partial[Any]]") -> None:
    try:
        while True:
            jobs.put(pickle.load(sys.stdin.buffer))
    except (EOFError, pickle.UnpicklingError):
        os._exit(0)  # the parent is gone, perhaps killed: the process ends even while it reads a file
    finally:  # a job that cannot be imported here
        traceback.print_exc()
        os._exit(1)
