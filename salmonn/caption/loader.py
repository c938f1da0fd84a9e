"""Reads clips ahead of the model, in processes of their own: decoding overlaps the model, and a crash costs one file.

    with ClipReader(workers=2) as reader:
        for batch in reader.batches([Part(0, path, Wanted(rule))], size=8, finish=processor.clip_inputs):
            ...

Decoding is what costs: mel spectrograms and patches take a hundredth of its time (2+: a tenth) and are made in this
process. Where a process dies, a pool of `concurrent.futures` is lost as a whole and does not tell which file it was at.
Here each worker has one file at a time, and a thread in this process that waits for it.
"""

import math
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from salmonn.caption.worker import KILL_TIMEOUT_SECONDS, Worker, WorkerDied, WorkerLimits
from salmonn.media.clip import Clip, read_clip
from salmonn.media.container import ClipError, declared_seconds, measured_seconds
from salmonn.media.frame_sampling import FrameSampler

Result = TypeVar("Result")

BATCHES_AHEAD = 2  # that are read or being read while the model is at another
BATCHES_ALIKE = 8  # that clips of like length are looked for in
MAX_WORKERS = 8


@dataclass(frozen=True)
class ReadSpec:
    """What is read of each file, as `read_clip` takes it."""

    sampler: FrameSampler
    start_seconds: float | None = None
    end_seconds: float | None = None
    video: bool = True
    audio: bool = True

    def read(self, path: Path | str) -> Clip:
        """Read a file; raises as `read_clip`."""
        span: dict[str, Any] = dict(start_seconds=self.start_seconds, end_seconds=self.end_seconds)
        return read_clip(path, self.sampler, **span, video=self.video, audio=self.audio)

    def seconds(self, path: Path, *, exact: bool = False) -> float:
        """How long the span is; 0 or less where the file does not say or cannot be read.

        Args:
            path: of the file.
            exact: by all that the file holds, not by what it states of itself.
        """
        try:
            whole = measured_seconds(path) if exact else declared_seconds(path)
        except ClipError:
            return 0.0
        return min(whole, self.end_seconds or whole) - (self.start_seconds or 0.0)


@dataclass(frozen=True)
class ClipJob:
    """A file that is asked for, or one of the segments that it was cut into.

    Args:
        place: by which whoever asked knows it.
        path: of the file.
        wanted: what is read of it; its span is the segment's.
        seed: of what is drawn on it.
        num_segments: that the file was cut into.
    """

    place: int
    path: Path
    read_spec: ReadSpec
    seed: int = 0
    num_segments: int = 1


ReadResult = tuple[ClipJob, Result | ValueError]


def default_num_workers(num_clips: int) -> int:
    """Workers for so many clips: the cores that this process may use, up to 8.

    One at least: a file that kills its decoder must not kill whoever asked for it.
    """
    return max(1, min(len(os.sched_getaffinity(0)), MAX_WORKERS, num_clips))


class ClipReader:
    """Worker processes that read clips; to be closed, or used in a `with` statement.

    The workers end with this process, however it ends.

    Args:
        workers: processes; 0 reads in a thread of this process, without limits.
        limits: what a file may cost.

    Attributes:
        waited_seconds: for how long whoever took batches had to wait for clips, up to now.
    """

    def __init__(self, *, workers: int, limits: WorkerLimits | None = None) -> None:
        if workers < 0:
            raise ValueError(f"workers must be 0 (read within this process) or more, got {workers}")
        self.waited_seconds = 0.0
        self._num_workers = workers
        self._limits = limits or WorkerLimits()
        self._threads = ThreadPoolExecutor(max(workers, 1), thread_name_prefix="reading")
        self._lock = threading.Lock()
        self._closed = False
        self._tasks: dict[Future[Any], _Task] = {}
        self._workers = {Worker(self._limits) for _ in range(workers)}
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
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
            worker.interrupt()
        end = time.monotonic() + KILL_TIMEOUT_SECONDS
        for worker in self._workers:
            worker.wait(end - time.monotonic())

    def submit(self, path: Path, read_spec: ReadSpec, finish: Callable[[Clip], Result]) -> "Future[Result]":
        """Have one file read; the future raises a ClipError where it cannot be.

        Args:
            path: of the file.
            wanted: what is read of it.
            finish: what the clip becomes; called in a thread of this process.
        """
        task = _Task()
        future = self._threads.submit(lambda: finish(self._do(partial(read_spec.read, path), task)))
        self._tasks[future] = task
        future.add_done_callback(self._tasks.pop)
        return future

    def cancel(self, future: "Future[Any]") -> None:
        """Stop what `submit` began, since nobody waits for it: its worker ends, and another takes its place."""
        if future.cancel():
            return
        with self._lock:
            if (task := self._tasks.get(future)) is not None:
                task.is_abandoned = True
                if task.worker is not None:
                    task.worker.interrupt()

    def batches(
        self,
        asked: Iterable[ClipJob],
        *,
        size: int,
        finish: Callable[[Clip], Result],
        segment_seconds: float | None = None,
    ) -> Iterator[list[ReadResult[Result]]]:
        """Read files in batches of like length, two batches ahead (and as many clips as keep the workers busy).

        Which files go together follows from their order and their lengths alone. What is asked for is taken a few
        batches at a time, and may be endless.

        Args:
            asked: the files.
            size: clips in a batch, at most.
            finish: as of `submit`.
            segment_seconds: cut each file into segments of this length, infinite for one that ends where the file does.

        Yields:
            Batches of (part, what `finish` gave, or the error that stands for the part).
        """
        plan = self._plan(asked, size=size, segment_seconds=segment_seconds)
        ahead = max(BATCHES_AHEAD, -(-(self._num_workers + 1) // size))

        def begin(count: int) -> Iterator[list[tuple[ClipJob, Future[Result]]]]:
            for parts in islice(plan, count):
                yield [(part, self.submit(part.path, part.read_spec, finish)) for part in parts]

        pending = deque(begin(ahead))
        while pending:
            batch: list[ReadResult[Result]] = []
            for part, future in pending.popleft():
                read = self._wait(future)
                batch.append((part, read))
            pending.extend(begin(1))
            yield batch

    def _plan(self, asked: Iterable[ClipJob], *, size: int, segment_seconds: float | None) -> Iterator[list[ClipJob]]:
        """Parts in batches; among some batches' files, the one with the first file comes first."""
        files = iter(asked)
        if size == 1 and segment_seconds is None:
            yield from ([part] for part in files)
            return
        window = size * BATCHES_ALIKE
        # One window's lengths are asked for before the window ahead of it is read, so that nobody waits for them.
        exact = segment_seconds is not None
        coming = self._ask_seconds(list(islice(files, window)), exact=exact)
        while coming:
            now, coming = coming, self._ask_seconds(list(islice(files, window)), exact=exact)
            lengths = [(part, self._wait_for_seconds(future)) for part, future in now]
            if segment_seconds is not None:
                lengths = [
                    cut for part, seconds in lengths for cut in split_into_segments(part, seconds, segment_seconds)
                ]
            alike = length_buckets([seconds for _, seconds in lengths], size=size)
            yield from ([lengths[number][0] for number in batch] for batch in sorted(alike, key=min))

    def _ask_seconds(self, parts: Sequence[ClipJob], *, exact: bool) -> list[tuple[ClipJob, "Future[float]"]]:
        more = {"exact": True} if exact else {}
        return [
            (part, self._threads.submit(self._do, partial(part.read_spec.seconds, part.path, **more))) for part in parts
        ]

    def _wait_for_seconds(self, future: "Future[float]") -> float:
        seconds = self._wait(future)
        return 0.0 if isinstance(seconds, ValueError) else seconds  # reading the file will tell what is wrong

    def _wait(self, future: "Future[Result]") -> Result | ValueError:
        begin = time.perf_counter()
        try:
            return future.result()
        except ValueError as error:  # a ClipError is one
            return error
        finally:
            self.waited_seconds += time.perf_counter() - begin

    def _do(self, job: "partial[Result]", task: "_Task | None" = None) -> Result:
        """What a worker makes of a job, which may be abandoned.

        Raises:
            ClipError: as the job raised it, or since its worker died.
        """
        if not self._num_workers:
            return job()
        task, worker = task or _Task(), self._idle.get()
        try:
            self._give(task, worker)
            try:
                worker.begin(job)
            except WorkerDied:  # with nothing to do, which is no fault of this file
                worker = self._replace(worker)
                self._give(task, worker)
                worker.begin(job)
            result: Result = worker.finish()
            return result
        except ClipError:
            raise
        except WorkerDied as error:
            worker = self._replace(worker)
            raise ClipError(f"{job.args[0]}: {error}") from error
        except BaseException:  # such as what a log's handler raises: the worker may be in the middle of something
            worker.interrupt()
            worker = self._replace(worker)
            raise
        finally:
            self._give(task, None)
            self._idle.put(worker)

    def _give(self, task: "_Task", worker: Worker | None) -> None:
        """Note who is at a task; from then on, and until nobody is, that worker may be interrupted for it."""
        with self._lock:
            task.worker = worker
            if worker is not None and task.is_abandoned:
                worker.interrupt()

    def _replace(self, dead: Worker) -> Worker:
        with self._lock:
            if self._closed:
                return dead
            self._workers.discard(dead)
            worker = Worker(self._limits)
            self._workers.add(worker)
            return worker


class _Task:
    """A file that a worker is at, once one is."""

    def __init__(self) -> None:
        self.worker: Worker | None = None
        self.is_abandoned = False


def length_buckets(lengths: Sequence[float], *, size: int) -> list[list[int]]:
    """Places of a list in even batches of at most `size` and of like length, the shortest first."""
    order = sorted(range(len(lengths)), key=lambda place: lengths[place])
    count = -(-len(order) // size)
    cuts = [len(order) * number // max(1, count) for number in range(count + 1)]
    return [sorted(order[start:end]) for start, end in pairwise(cuts)]


def split_into_segments(part: ClipJob, seconds: float, segment_seconds: float) -> list[tuple[ClipJob, float]]:
    """A file's segments with their lengths; a rest of up to a second, or half a segment, stays with the last one.

    Each draws from a seed of its own: those that look alike need not say the same.

    Args:
        part: the file, or the span of it that is wanted.
        seconds: how long that is; 0 where it is not known: then it stays whole, to a reader that says so.
        segment_seconds: of each segment.
    """
    if seconds <= 0:
        return [(replace(part, read_spec=_Endless(**vars(part.read_spec))), 0.0)]
    begin = part.read_spec.start_seconds or 0.0
    end = begin + seconds
    count = max(1, math.ceil((seconds - min(1.0, segment_seconds / 2)) / segment_seconds))
    starts = [begin + number * segment_seconds for number in range(count)] if count > 1 else [begin]
    spans = enumerate(pairwise([*starts, end]))
    return [
        (
            replace(
                part,
                read_spec=replace(part.read_spec, start_seconds=start, end_seconds=stop),
                seed=part.seed + number,
                num_segments=count,
            ),
            stop - start,
        )
        for number, (start, stop) in spans
    ]


@dataclass(frozen=True)
class _Endless(ReadSpec):
    """Of a file that is to be cut up and does not say where it ends."""

    def read(self, path: Path | str) -> Clip:
        read = super().read(path)
        raise ClipError(
            f"{path}: does not say how long it is, so that it cannot be cut into segments; here it ends at "
            f"{read.start_seconds + read.duration_seconds:.2f} s: write it anew (ffmpeg -i it -c copy new.mp4)"
        )
