"""Reads clips ahead of the model, in processes of their own: decoding overlaps the model, and a crash costs one file.

    with ClipReader(workers=2) as reader:
        for batch in reader.batches(paths, Wanted(rule), size=8, finish=processor.media):
            ...

Measured on two cores, which explains the form:
- Decoding is what costs: mel spectrograms and patches take a hundredth of its time (2+: a tenth) and are made in this
  process. So a worker imports `salmonn.media` alone, and starts in 0.3 s with 50 MB, where torch and transformers take
  5 s and 400 MB. `multiprocessing` would import the caller's main module in each worker, and all that it imports.
- Frames come through a pipe, at 0.3 to 0.75 ms a megabyte: 0.2 % of what decoding costs for salmonn2, 2 to 7 % for 2+
  with ten frames a second. Shared memory would save that, but is too small for it in most containers.
- Where a process dies, a pool of `concurrent.futures` is lost as a whole and does not tell which file it was at. Here
  each worker has one file at a time, and a thread in this process that waits for it.
"""

import fcntl
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
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from logging.handlers import QueueHandler
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

from salmonn.media.clip import Clip, read_clip
from salmonn.media.container import ClipError, declared_seconds
from salmonn.media.frames import FrameRule

Result = TypeVar("Result")
Read = tuple[int, Result | ValueError]

BATCHES_AHEAD = 2  # that are read or being read while the model is at another
BATCHES_ALIKE = 8  # that clips of like length are looked for in
MOST_WORKERS = 8
PIPE_BYTES = 1 << 20  # the most that Linux gives without asking
_WORKER = (
    "import os, sys; os.environ['OMP_NUM_THREADS'] = '1'; sys.path[:] = {path!r}; "
    "from salmonn.caption.reading import serve; serve()"
)


@dataclass(frozen=True)
class Wanted:
    """What is read of each file, as `read_clip` takes it."""

    rule: FrameRule
    start_seconds: float | None = None
    end_seconds: float | None = None
    video: bool = True
    audio: bool = True

    def read(self, path: Path | str) -> Clip:
        """Read a file; raises as `read_clip`."""
        span: dict[str, Any] = dict(start_seconds=self.start_seconds, end_seconds=self.end_seconds)
        return read_clip(path, self.rule, **span, video=self.video, audio=self.audio)

    def seconds(self, path: Path) -> float:
        """How long the span is, by what the file states of itself; 0 where it states nothing or cannot be read."""
        try:
            declared = declared_seconds(path)
        except ClipError:
            return 0.0
        return min(declared, self.end_seconds or declared) - (self.start_seconds or 0.0)


def sensible_workers(num_clips: int) -> int:
    """Workers for so many clips: the cores that this process may use, up to 8; none where nothing can be read ahead."""
    return min(len(os.sched_getaffinity(0)), MOST_WORKERS, num_clips - 1)


class ClipReader:
    """Worker processes that read clips; to be closed, or used in a `with` statement.

    The workers end with this process, however it ends.

    Args:
        workers: processes; 0 reads in a thread of this process.

    Attributes:
        waited_seconds: for how long whoever took batches had to wait for clips, up to now.
    """

    def __init__(self, *, workers: int) -> None:
        if workers < 0:
            raise ValueError(f"workers must be 0 (read within this process) or more, got {workers}")
        self.waited_seconds = 0.0
        self._num_workers = workers
        self._threads = ThreadPoolExecutor(max(workers, 1), thread_name_prefix="reading")
        self._lock = threading.Lock()
        self._closed = False
        self._workers = {_Worker() for _ in range(workers)}
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)

    def __enter__(self) -> "ClipReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers at once, whatever they are at."""
        with self._lock:
            self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.kill()

    def batches(
        self, paths: Sequence[Path], wanted: Wanted, *, size: int, finish: Callable[[Clip], Result]
    ) -> Iterator[list[Read[Result]]]:
        """Read files in batches of like length, two batches ahead (and as many clips as keep the workers busy).

        Which files go together follows from their order and their lengths alone.

        Args:
            paths: of the files.
            wanted: what is read of each.
            size: clips in a batch, at most.
            finish: what a clip becomes; called in a thread of this process.

        Yields:
            Batches of (place among the paths, what `finish` gave, or the error that stands for the file).
        """
        plan = self._plan(paths, wanted, size=size)
        ahead = max(BATCHES_AHEAD, -(-(self._num_workers + 1) // size))

        def begin(count: int) -> Iterator[list[tuple[int, Future[Result]]]]:
            for places in islice(plan, count):
                yield [(place, self._threads.submit(self._read, paths[place], wanted, finish)) for place in places]

        pending = deque(begin(ahead))
        while pending:
            batch: list[Read[Result]] = []
            for place, future in pending.popleft():
                read = self._wait(future)
                batch.append((place, read))
            pending.extend(begin(1))
            yield batch

    def _read(self, path: Path, wanted: Wanted, finish: Callable[[Clip], Result]) -> Result:
        return finish(self._do(partial(wanted.read, path)))

    def _plan(self, paths: Sequence[Path], wanted: Wanted, *, size: int) -> Iterator[list[int]]:
        """Places of the paths in batches; among some batches' paths, the one with the first path comes first."""
        window = size * BATCHES_ALIKE
        if size == 1 or len(paths) <= size:
            yield from ([*range(start, min(start + size, len(paths)))] for start in range(0, len(paths), size))
            return
        # One window's lengths are asked for before the window ahead of it is read, so that nobody waits for them.
        coming = self._ask_seconds(paths[:window], wanted)
        for start in range(0, len(paths), window):
            seconds = [self._wait_for_seconds(future) for future in coming]
            coming = self._ask_seconds(paths[start + window : start + 2 * window], wanted)
            for batch in sorted(cut_alike(seconds, size=size), key=min):
                yield [start + place for place in batch]

    def _ask_seconds(self, paths: Sequence[Path], wanted: Wanted) -> list[Future[float]]:
        return [self._threads.submit(self._do, partial(wanted.seconds, path)) for path in paths]

    def _wait_for_seconds(self, future: Future[float]) -> float:
        seconds = self._wait(future)
        return 0.0 if isinstance(seconds, ValueError) else seconds  # reading the file will tell what is wrong

    def _wait(self, future: Future[Result]) -> Result | ValueError:
        begin = time.perf_counter()
        try:
            return future.result()
        except ValueError as error:  # a ClipError is one
            return error
        finally:
            self.waited_seconds += time.perf_counter() - begin

    def _do(self, job: "partial[Result]") -> Result:
        """What a worker makes of a job.

        Raises:
            ClipError: as the job raised it, or since its worker died.
        """
        if not self._num_workers:
            return job()
        worker = self._idle.get()
        try:
            try:
                worker.begin(job)
            except _WorkerDied:  # with nothing to do, which is no fault of this file
                worker = self._replace(worker)
                worker.begin(job)
            return worker.finish()
        except _WorkerDied as error:
            worker = self._replace(worker)
            raise ClipError(f"{job.args[0]}: {error}") from error
        finally:
            self._idle.put(worker)

    def _replace(self, dead: "_Worker") -> "_Worker":
        with self._lock:
            if self._closed:
                return dead
            self._workers.discard(dead)
            worker = _Worker()
            self._workers.add(worker)
            return worker


def cut_alike(lengths: Sequence[float], *, size: int) -> list[list[int]]:
    """Places of a list in even batches of at most `size` and of like length, the shortest first."""
    order = sorted(range(len(lengths)), key=lambda place: lengths[place])
    count = -(-len(order) // size)
    cuts = [len(order) * number // max(1, count) for number in range(count + 1)]
    return [sorted(order[start:end]) for start, end in pairwise(cuts)]


class _WorkerDied(Exception):
    """A worker ended; the message says how."""


@dataclass(frozen=True)
class _Reply(Generic[Result]):
    """What a job gave, or the words of its error, and what was logged meanwhile."""

    result: Result | None
    error: str | None
    records: list[logging.LogRecord]


class _Worker:
    """A process that does one job after the other."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WORKER.format(path=sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            process_group=0,  # a Ctrl-C is for the parent, which ends its workers
        )
        assert self._process.stdout is not None
        with suppress(OSError):  # a user may have only so much memory in pipes; a small one is slower
            fcntl.fcntl(self._process.stdout, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self._replies = io.BufferedReader(self._process.stdout, PIPE_BYTES)  # type: ignore[type-var]

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()

    def begin(self, job: "partial[Result]") -> None:
        """Give it a job and see that it took it; raises _WorkerDied where the process ended before."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(pickle.dumps(job))
        except BrokenPipeError as error:
            raise _WorkerDied(_tell_end(self._process.wait())) from error
        self._hear()

    def finish(self) -> Any:
        """What the job gave.

        Raises:
            ClipError: the job raised a ValueError.
            _WorkerDied: the process ended.
        """
        reply: _Reply[Any] = self._hear()
        for record in reply.records:
            logger = logging.getLogger(record.name)
            if logger.isEnabledFor(record.levelno):
                logger.handle(record)
        if reply.error is not None:
            raise ClipError(reply.error)
        return reply.result

    def _hear(self) -> Any:
        try:
            return pickle.load(self._replies)
        except (EOFError, pickle.UnpicklingError) as error:
            raise _WorkerDied(_tell_end(self._process.wait())) from error
        except MemoryError as error:  # what is left in the pipe is of no use
            self.kill()
            raise _WorkerDied("there is no memory for what was read of it: take a part of it (start, end)") from error


def _tell_end(code: int) -> str:
    if code >= 0:
        return f"the process that read it ended with code {code}; what it said stands in the terminal"
    why = "perhaps for want of memory" if -code == signal.SIGKILL else "the file may be damaged; convert it"
    return f"the process that read it was ended by signal {-code} ({signal.Signals(-code).name}): {why}"


def serve() -> None:
    """What a worker does: jobs from stdin, replies to stdout, until its parent is gone."""
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
        say("begun")
        try:
            result = job()
        except ValueError as caught:
            error = str(caught)
        records = [notes.get() for _ in range(notes.qsize())]
        say(_Reply(result, error, records))


def _listen(jobs: "queue.SimpleQueue[partial[Any]]") -> None:
    while True:
        try:
            jobs.put(pickle.load(sys.stdin.buffer))
        except (EOFError, pickle.UnpicklingError):
            os._exit(0)  # in the middle of a file too: whoever wanted it is gone, though it was killed
