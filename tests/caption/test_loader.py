"""Reading ahead: batches in order, a bounded number of clips, and workers that die or are cancelled."""

import logging
import os
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import numpy as np
import psutil
import pytest

from salmonn.caption.generator import CaptionRequest
from salmonn.caption.loader import ClipJob, ClipReader, default_num_workers, length_buckets
from salmonn.caption.read_spec import ReadSpec
from salmonn.media.clip import read_clip
from salmonn.media.container import ClipError
from salmonn.media.frame_sampling import FixedRateSampler
from tests.limits import RUN_SECONDS, STEP_SECONDS, wait_until

# A worker's behaviour depends on the file's name. A module of its own, since workers import the class they receive.
SCRIPTED_MODULE = """
import logging, os, signal, sys, time
from salmonn.caption.read_spec import ReadSpec

class ScriptedReadSpec(ReadSpec):
    def read(self, path):
        if path.name in signal.Signals.__members__:
            os.kill(os.getpid(), signal.Signals[path.name])
        if path.name == "exit":
            os._exit(3)
        if path.name == "sleep":
            time.sleep(600)
        if path.name == "print":
            print("chatter", flush=True)
            os.write(1, b"more of it")
        if path.name == "warn":
            logging.getLogger("salmonn.media.clip").warning("%s: damaged", path)
        if path.name == "torch":
            return "torch" in sys.modules
        return path.name

    def seconds(self, path):
        return 0.0
"""


def child_processes() -> set[psutil.Process]:
    """Return the child processes; other tests may have started some."""
    return set(psutil.Process().children())


class FakeReadSpec:
    """Reads files whose names are their lengths in seconds, and records the order."""

    def __init__(self, *, pause: float = 0.0) -> None:
        self.pause = pause
        self.read_order: list[int] = []

    def seconds(self, path: Path) -> float:
        return float(path.name)

    def read(self, path: Path) -> int:
        time.sleep(self.pause)
        self.read_order.append(int(path.name))
        return int(path.name)


def read_batches(reader, names, read_spec, *, size, finish=lambda clip: clip, **options):
    """Yield batches of (index, clip)."""
    jobs = (ClipJob(index, CaptionRequest(Path(name)), read_spec) for index, name in enumerate(names))
    for batch in reader.batches(jobs, size=size, finish=finish, **options):
        yield [(job.index, clip) for job, clip in batch]


def read_all(names, read_spec, *, workers, size=2):
    with ClipReader(workers=workers) as reader:
        return list(read_batches(reader, names, read_spec, size=size))


def test_length_buckets():
    # Sorted by length, the indices are 1 3 0 4 2; five files in batches of up to two are three batches: 1, 2, 2.
    assert length_buckets([3, 1, 5, 2, 4], size=2) == [[1], [0, 3], [2, 4]]
    assert length_buckets([1, 1, 1], size=8) == [[0, 1, 2]]


def test_files_are_batched_by_length_within_a_bucket():
    """A bucket is 8 batches of 2: the first 16 files form pairs of equal length, the other three a second bucket."""
    lengths = [*range(8, 0, -1), *range(1, 9), 3, 90, 4]
    batches = read_all(map(str, lengths), FakeReadSpec(), workers=0)
    indices = [[index for index, _ in batch] for batch in batches]
    # Length n is at 8 - n and 7 + n; the batch with the first path comes first. Of 3, 90, 4 the shortest is alone.
    assert indices == [*([8 - n, 7 + n] for n in range(8, 0, -1)), [16], [17, 18]]
    assert all(clip == lengths[index] for batch in batches for index, clip in batch)


def test_lengths_are_not_measured_for_single_clips():
    # These names are not numbers, so `seconds` would raise.
    class UnmeasuredReadSpec(FakeReadSpec):
        def read(self, path):
            return path.name

    assert read_all("cab", UnmeasuredReadSpec(), workers=0, size=1) == [[(0, "c")], [(1, "a")], [(2, "b")]]


@pytest.mark.parametrize(("size", "expected"), [(1, 3), (2, 6), (3, 9)])
def test_two_batches_are_read_ahead(size, expected):
    """Together with the consumed batch: 3 * size clips."""
    read_spec = FakeReadSpec()
    with ClipReader(workers=0) as reader:
        batches = read_batches(reader, ["1"] * 18, read_spec, size=size)
        next(batches)
        wait_until(lambda: len(read_spec.read_order) == expected)
        time.sleep(0.1)
        assert len(read_spec.read_order) == expected


def test_waiting_time_is_measured():
    """Two clips of 0.4 s: the consumer waits for the first one, and the other has been read when it asks for it."""
    read_spec = FakeReadSpec(pause=0.4)
    with ClipReader(workers=0) as reader:
        batches, begin = read_batches(reader, ["1"] * 2, read_spec, size=1), time.perf_counter()
        next(batches)
        assert 0.2 < reader.waited_seconds <= time.perf_counter() - begin
        wait_until(lambda: len(read_spec.read_order) == 2)
        before = reader.waited_seconds
        next(batches)
        assert reader.waited_seconds - before < 0.2


@pytest.mark.parametrize("workers", [0, 2])
def test_clips_equal_read_clip(videos, tmp_path, workers):
    paths = [*videos[:3], tmp_path / "none.mp4"]
    read_spec = ReadSpec(FixedRateSampler(side=48), start_seconds=1.0, end_seconds=3.0)
    clips = dict(chain(*read_all(paths, read_spec, workers=workers)))
    assert sorted(clips) == [0, 1, 2, 3]
    for index, path in enumerate(videos[:3]):
        clip = read_clip(path, FixedRateSampler(side=48), start_seconds=1.0, end_seconds=3.0)
        assert np.array_equal(clips[index].frames, clip.frames) and len(clip.frames) == 2
        assert np.array_equal(clips[index].waveform, clip.waveform) and len(clip.waveform) == 32_000
        assert clips[index].path == str(path)
    assert isinstance(clips[3], ValueError) and str(paths[3]) in str(clips[3])


def test_span_seconds(videos):
    full = ReadSpec(FixedRateSampler()).seconds(videos[0])
    assert full > 4
    assert ReadSpec(FixedRateSampler(), start_seconds=1.0).seconds(videos[0]) == full - 1
    assert ReadSpec(FixedRateSampler(), start_seconds=1.0, end_seconds=3.5).seconds(videos[0]) == 2.5
    assert ReadSpec(FixedRateSampler(), end_seconds=100.0).seconds(videos[0]) == full
    assert ReadSpec(FixedRateSampler()).seconds(videos[0].parent) == 0


def test_a_dead_worker_fails_only_its_file(scripted):
    ends = {"SIGKILL": "memory", "SIGSEGV": "SIGSEGV", "exit": "exit code 3"}
    names = ["a", "b", "SIGKILL", "c", "SIGSEGV", "exit", "d"]
    clips = dict(chain(*read_all(names, scripted, workers=2, size=3)))
    for index, name in enumerate(names):
        if name in ends:
            assert isinstance(clips[index], ValueError) and ends[name] in str(clips[index])
            assert str(clips[index]).startswith(f"{name}: the worker process")
        else:
            assert clips[index] == name


def test_a_worker_killed_while_idle_is_replaced(scripted):
    before = child_processes()
    with ClipReader(workers=1) as reader:
        assert list(read_batches(reader, ["a"], scripted, size=1, finish=str)) == [[(0, "a")]]
        (worker,) = child_processes() - before
        worker.kill()
        assert list(read_batches(reader, ["b"], scripted, size=1, finish=str)) == [[(0, "b")]]


def test_output_and_logs_of_workers(scripted, caplog, capfd):
    assert read_all(["print", "warn", "torch"], scripted, workers=1, size=1) == [
        [(0, "print")],
        [(1, "warn")],
        [(2, False)],  # a worker without torch starts fast and is small
    ]
    assert [(record.name, record.getMessage()) for record in caplog.records] == [
        ("salmonn.media.clip", "warn: damaged")
    ]
    assert "chatter" in capfd.readouterr().err
    caplog.clear()
    logging.getLogger("salmonn.media.clip").setLevel(logging.ERROR)
    try:
        read_all(["warn"], scripted, workers=1)
    finally:
        logging.getLogger("salmonn.media.clip").setLevel(logging.NOTSET)
    assert not caplog.records


def test_cancel(scripted):
    """A file that is being read and one that is waiting are cancelled; others are read."""
    with ClipReader(workers=1) as reader:
        sleeping = reader.submit(Path("sleep"), scripted, str)
        waiting = reader.submit(Path("a"), scripted, str)
        wait_until(lambda: [task for task in reader._running.values() if task.worker])
        started = time.monotonic()
        reader.cancel(waiting)
        reader.cancel(sleeping)
        with pytest.raises(ClipError, match="was killed because it did not finish"):
            sleeping.result(STEP_SECONDS)
        assert waiting.cancelled() and reader.submit(Path("b"), scripted, str).result(STEP_SECONDS) == "b"
        assert time.monotonic() - started < 300
        done = reader.submit(Path("c"), scripted, str)
        assert done.result(STEP_SECONDS) == "c"
        reader.cancel(done)  # no effect
        assert reader.submit(Path("d"), scripted, str).result(STEP_SECONDS) == "d"
        wait_until(lambda: not reader._running)


def test_closing_kills_reading_workers(scripted):
    before, started = child_processes(), time.monotonic()
    reader = ClipReader(workers=2)
    batches = read_batches(reader, ["a", "sleep", "sleep", "b"], scripted, size=1, finish=str)
    assert next(batches) == [(0, "a")]
    reader.close()
    assert child_processes() <= before and time.monotonic() - started < 300
    with pytest.raises(RuntimeError, match="shutdown"):
        next(read_batches(reader, ["a"], scripted, size=1, finish=str))


SLEEPING_READER = """
import signal, sys
from pathlib import Path
from salmonn.caption.loader import ClipJob, ClipReader
from salmonn.caption.generator import CaptionRequest
from salmonn.media.frame_sampling import FixedRateSampler
from scripted import ScriptedReadSpec

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if pytest runs in the background of a script
with ClipReader(workers=1) as reader:
    read = ScriptedReadSpec(FixedRateSampler())
    jobs = [ClipJob(index, CaptionRequest(Path(name)), read) for index, name in enumerate(["a", "sleep"])]
    batches = reader.batches(jobs, size=1, finish=str)
    next(batches)
    print("reading", flush=True)
    next(batches)
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_no_worker_outlives_its_parent(scripted, tmp_path, end):
    """The parent ends while its worker reads for ten minutes."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPING_READER],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
    )
    assert process.stdout.readline() == "reading\n"
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 1
    process.send_signal(end)
    process.communicate(timeout=RUN_SECONDS)
    _, alive = psutil.wait_procs(workers, timeout=STEP_SECONDS)
    assert not alive


def test_default_num_workers(monkeypatch):
    for cores, num_clips, expected in [(2, 100, 2), (4, 3, 3), (64, 100, 8), (64, 1, 1)]:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert default_num_workers(num_clips) == expected
    with pytest.raises(ValueError, match="workers must be 0"):
        ClipReader(workers=-1)
