"""Read clips ahead of the model in worker processes: decoding overlaps generation, and a crash costs one file.

    with ClipReader(workers=2) as reader:
        for batch in reader.batches(jobs, size=8, finish=processor.clip_inputs):
            ...

Decoding is the expensive part; mel spectrograms and patches take a hundredth of its time (2+: a tenth) and are computed
in this process. A pool of `concurrent.futures` breaks as a whole if one of its processes dies, and does not say which
file was to blame. Here each worker has one file at a time, and a thread in this process that waits for it.

Worker processes import this module, so nothing here imports torch.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice, pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from salmonn import system
from salmonn.caption.generator import CaptionRequest, Span
from salmonn.caption.read_spec import ReadSpec
from salmonn.caption.segments import BoundsStore, SegmentRule
from salmonn.caption.worker import KILL_TIMEOUT_SECONDS, Worker, WorkerDied, WorkerLimits
from salmonn.media.clip import Clip
from salmonn.media.container import ClipError, ClipShape, declared_shape

Result = TypeVar("Result")

BATCHES_AHEAD = 2  # batches that are read or being read while the model works on another
CLIPS_AHEAD = 16  # clips, where the model takes them one by one; a clip of a minute takes 100 MB
BUCKET_BATCHES = 8  # batches whose clips are sorted by length together
MAX_WORKERS = 8


@dataclass(frozen=True)
class _UnknownLengthSpec(ReadSpec):
    """A `ReadSpec` for a file that was to be split into segments but does not state its length."""

    def read(self, path: Path | str) -> Clip:
        clip = super().read(path)
        raise ClipError(
            f"{path}: the file does not state its length, so it cannot be split into segments; its data ends at "
            f"{clip.start_seconds + clip.duration_seconds:.2f} s. Remux it (ffmpeg -i FILE -c copy new.mp4)"
        )


@dataclass(frozen=True)
class _UnsplitSpec(ReadSpec):
    """A `ReadSpec` for a file that cannot be split into segments, for a known reason."""

    reason: str = ""

    def read(self, path: Path | str) -> Clip:
        raise ClipError(self.reason)


@dataclass(frozen=True)
class ClipJob:
    """A request for a file, or for one of the segments that the file was split into.

    Args:
        index: position of the original request.
        request: request; for a segment, with the segment's span and seed.
        read_spec: what to read of the file.
        num_segments: number of segments that the file was split into.
    """

    index: int
    request: CaptionRequest
    read_spec: ReadSpec
    num_segments: int = 1


ReadResult = tuple[ClipJob, Result | ValueError]


def default_num_workers(num_clips: int, *, num_processes: int = 1) -> int:
    """Return the number of workers for some clips: the cores that this process may use, up to 8.

    It is at least 1: a file that kills its decoder must not kill the caller.

    Args:
        num_clips: number of clips.
        num_processes: processes on this machine that start workers and share its cores.
    """
    return max(1, min(system.num_cpus() // num_processes, MAX_WORKERS, num_clips))


class ClipReader:
    """Worker processes that read clips; close it, or use it in a `with` statement.

    The workers end with this process, however it ends.

    Args:
        workers: number of processes; 0 reads in a thread of this process, without limits.
        limits: limits for each file.
        bucket_share: share of a bucket that a file fills besides counting as one; a full bucket ends early. It bounds
            the size of files that exist only until they are read.

    Attributes:
        waited_seconds: total time that the consumer of `batches` has waited for clips.
    """

    def __init__(
        self,
        *,
        workers: int,
        limits: WorkerLimits | None = None,
        bucket_share: Callable[[Path], float] = lambda path: 0.0,
    ) -> None:
        if workers < 0:
            raise ValueError(f"workers must be 0 (read within this process) or more, got {workers}")
        self.waited_seconds = 0.0
        self._num_workers = workers
        self._limits = limits or WorkerLimits()
        self._bucket_share = bucket_share
        self._threads = ThreadPoolExecutor(max(workers, 1), thread_name_prefix="reading")
        # Finding the shots of a film takes minutes, in which a worker remains for clips.
        self._splitting_threads = ThreadPoolExecutor(max(workers - 1, 1), thread_name_prefix="splitting")
        self._lock = threading.Lock()
        self._closed = False
        self._running: dict[Future[Any], _RunningJob] = {}
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
        """Kill the workers, even while they are reading."""
        with self._lock:
            self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._splitting_threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.kill()
        deadline = time.monotonic() + KILL_TIMEOUT_SECONDS
        for worker in self._workers:
            worker.wait(deadline - time.monotonic())

    def submit(self, path: Path, read_spec: ReadSpec, finish: Callable[[Clip], Result]) -> "Future[Result]":
        """Start reading one file; the future raises a ClipError if it cannot be read.

        Args:
            path: video or audio file.
            read_spec: what to read of it.
            finish: conversion of the clip, called in a thread of this process.
        """
        job = _RunningJob()
        future = self._threads.submit(lambda: finish(self._run(partial(read_spec.read, path), job)))
        self._running[future] = job
        future.add_done_callback(self._running.pop)
        return future

    def measure_seconds(self, path: Path, read_spec: ReadSpec) -> float:
        """Return the length of the span that is read of a file, measured from all packets by a worker; 0 if unknown."""
        return self._threads.submit(self._run, partial(read_spec.seconds, path, exact=True)).result()

    def find_bounds(self, path: Path, read_spec: ReadSpec, rule: SegmentRule) -> Sequence[float]:
        """Return the bounds of the segments of a file, found by a worker; see `SegmentRule.find_bounds`."""
        return self._splitting_threads.submit(self._run, partial(rule.find_bounds, path, read_spec)).result()

    def declared_shape(self, path: Path) -> ClipShape:
        """Return length and format of a file according to its header, read by a worker.

        Raises:
            ClipError: the file cannot be opened.
        """
        return self._threads.submit(self._run, partial(declared_shape, path)).result()

    def cancel(self, future: "Future[Any]") -> None:
        """Stop a job that `submit` started, even while the file is being read: its worker is replaced."""
        if future.cancel():
            return
        with self._lock:
            if (job := self._running.get(future)) is not None:
                job.is_cancelled = True
                if job.worker is not None:
                    job.worker.kill()

    def batches(
        self,
        jobs: Iterable[ClipJob],
        *,
        size: int,
        finish: Callable[[Clip], Result],
        segments: SegmentRule | None = None,
        store: BoundsStore | None = None,
    ) -> Iterator[list[ReadResult[Result]]]:
        """Read files in batches of similar length, two batches ahead (and enough clips to keep the workers busy).

        The composition of the batches depends only on the order and the lengths of the files. Jobs are taken a few
        batches at a time, and may be endless.

        Args:
            jobs: files to read.
            size: maximum number of clips per batch.
            finish: see `submit`.
            segments: rule by which files are split into segments.
            store: keeps the bounds of the segments, so that they are found once.

        Yields:
            Batches of (job, result of `finish`, or the error).
        """
        plan = self._plan(jobs, size=size, segments=segments, store=store)
        return self._read_ahead(plan, finish, num_ahead=max(BATCHES_AHEAD, -(-(self._num_workers + 1) // size)))

    def clips(
        self,
        jobs: Iterable[ClipJob],
        *,
        size: int,
        finish: Callable[[Clip], Result],
        segments: SegmentRule | None = None,
        store: BoundsStore | None = None,
    ) -> Iterator[ReadResult[Result]]:
        """Like `batches`, in which at most 16 clips count as a batch, but one clip after the other.

        As many are read ahead as a batch has, and enough to keep the workers busy.
        """
        size = min(size, CLIPS_AHEAD)
        plan = ([job] for batch in self._plan(jobs, size=size, segments=segments, store=store) for job in batch)
        num_ahead = max(BATCHES_AHEAD, size, self._num_workers + 1)
        return chain.from_iterable(self._read_ahead(plan, finish, num_ahead=num_ahead))

    def _read_ahead(
        self, plan: Iterator[list[ClipJob]], finish: Callable[[Clip], Result], *, num_ahead: int
    ) -> Iterator[list[ReadResult[Result]]]:
        """Read the files of a plan, the given number of its lists ahead."""

        def start(count: int) -> Iterator[list[tuple[ClipJob, Future[Result]]]]:
            for batch in islice(plan, count):
                yield [(job, self.submit(job.request.path, job.read_spec, finish)) for job in batch]

        pending = deque(start(num_ahead))
        while pending:
            batch: list[ReadResult[Result]] = []
            for job, future in pending.popleft():
                result = self._wait(future)
                batch.append((job, result))
            pending.extend(start(1))
            yield batch

    def _plan(
        self, jobs: Iterable[ClipJob], *, size: int, segments: SegmentRule | None, store: BoundsStore | None
    ) -> Iterator[list[ClipJob]]:
        """Group jobs into batches; of the batches of a bucket, the one with the earliest file comes first."""
        jobs, bucket_size = iter(jobs), size * BUCKET_BATCHES
        if size == 1 and segments is None:
            yield from ([job] for job in jobs)
            return
        measuring: deque[tuple[Future[list[tuple[ClipJob, float]]], float]] = deque()  # with the shares of the files

        def measure_ahead() -> None:
            filled = sum(share for _, share in measuring)
            while len(measuring) < bucket_size and filled < 1.0 and (job := next(jobs, None)) is not None:
                if segments is None:
                    future = self._threads.submit(self._measure, job)
                else:
                    future = self._splitting_threads.submit(self._split, job, segments, store)
                measuring.append((future, self._bucket_share(job.request.path)))
                filled += measuring[-1][1]

        # The files of a bucket are measured before the previous bucket is read, so that nothing waits for them. A long
        # file fills a bucket with its segments alone.
        measure_ahead()
        while measuring:
            parts: list[tuple[ClipJob, float]] = []
            num_files = 0
            while measuring and num_files < bucket_size and len(parts) < bucket_size:
                measured = self._wait(measuring.popleft()[0])
                if isinstance(measured, ValueError):  # of the store
                    raise measured
                parts += measured
                num_files += 1
            measure_ahead()
            buckets = length_buckets([seconds for _, seconds in parts], size=size)
            yield from ([parts[number][0] for number in bucket] for bucket in sorted(buckets, key=min))

    def _measure(self, job: ClipJob) -> list[tuple[ClipJob, float]]:
        """Return a job with its declared length: 0 for an unreadable file, since reading it reports what is wrong."""
        try:
            return [(job, self._run(partial(job.read_spec.seconds, job.request.path)))]
        except ClipError:
            return [(job, 0.0)]

    def _split(self, job: ClipJob, segments: SegmentRule, store: BoundsStore | None) -> list[tuple[ClipJob, float]]:
        """Return a job for each segment of a file with its length; for one that cannot be split, a job that fails."""
        path = job.request.path
        bounds = None if store is None else store.get(path)
        if bounds is None:
            try:
                bounds = self._run(partial(segments.find_bounds, path, job.read_spec))
            except ValueError as error:
                return [(_failing(job, str(error)), 0.0)]
            if store is not None:
                store.put(path, bounds)
        if not job.request.finished_starts <= set(bounds[:-1]):
            reason = f"{path}: its segments are not those that an earlier run captioned; caption all of them again"
            return [(_failing(job, f"{reason} with --retry-failed"), 0.0)]
        return split_into_segments(job, bounds)

    def _wait(self, future: "Future[Result]") -> Result | ValueError:
        start = time.perf_counter()
        try:
            return future.result()
        except ValueError as error:  # ClipError is one
            return error
        finally:
            self.waited_seconds += time.perf_counter() - start

    def _run(self, call: "partial[Result]", job: "_RunningJob | None" = None) -> Result:
        """Run a call in a worker.

        Raises:
            ClipError: the call raised it, or its worker died.
        """
        if not self._num_workers:
            return call()
        job, worker = job or _RunningJob(), self._idle.get()
        try:
            self._assign(job, worker)
            try:
                worker.start_job(call)
            except WorkerDied:  # while it was idle, so the file is not to blame
                worker = self._replace(worker)
                self._assign(job, worker)
                worker.start_job(call)
            result: Result = worker.result()
            return result
        except ClipError:
            raise
        except WorkerDied as error:
            worker = self._replace(worker)
            raise ClipError(f"{call.args[0]}: {error}") from error
        except BaseException:  # for example from a log handler: the worker may be in the middle of a reply
            worker.kill()
            worker = self._replace(worker)
            raise
        finally:
            self._assign(job, None)
            self._idle.put(worker)

    def _assign(self, job: "_RunningJob", worker: Worker | None) -> None:
        """Record which worker runs a job; until this is reset, `cancel` may kill that worker."""
        with self._lock:
            job.worker = worker
            if worker is not None and job.is_cancelled:
                worker.kill()

    def _replace(self, dead: Worker) -> Worker:
        with self._lock:
            if self._closed:
                return dead
            self._workers.discard(dead)
            worker = Worker(self._limits)
            self._workers.add(worker)
            return worker


class _RunningJob:
    """A call, and the worker that runs it, once one does."""

    def __init__(self) -> None:
        self.worker: Worker | None = None
        self.is_cancelled = False


def length_buckets(lengths: Sequence[float], *, size: int) -> list[list[int]]:
    """Return indices of the lengths in evenly sized batches of at most `size` and similar length, shortest first."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    count = -(-len(order) // size)
    bounds = [len(order) * number // max(1, count) for number in range(count + 1)]
    return [sorted(order[start:end]) for start, end in pairwise(bounds)]


def _failing(job: ClipJob, reason: str) -> ClipJob:
    return replace(job, read_spec=_UnsplitSpec(**vars(job.read_spec), reason=reason))


def split_into_segments(job: ClipJob, bounds: Sequence[float]) -> list[tuple[ClipJob, float]]:
    """Return the segments of a file with their lengths.

    Each segment has its own seed, so that segments that look alike need not have the same caption. The last segment is
    read to the end of the file, or of the span: a file that breaks off is only recognized as truncated by what it lacks
    there. Segments that have a caption are left out.

    Args:
        job: file, or a span of it.
        bounds: start of each segment and end of the last; if there are none, the length of the file is unknown: it is
            not split, and reading it raises an error.
    """
    if not bounds:
        return [(replace(job, read_spec=_UnknownLengthSpec(**vars(job.read_spec))), 0.0)]
    count, segments = len(bounds) - 1, []
    for number, (first, last) in enumerate(pairwise(bounds)):
        request = replace(job.request, span=Span(first, last), seed=job.request.seed + number)
        end = last if number < count - 1 else job.read_spec.end_seconds
        read_spec = replace(job.read_spec, start_seconds=first, end_seconds=end)
        if first not in request.finished_starts:
            segments.append((ClipJob(job.index, request, read_spec, count), last - first))
    return segments
