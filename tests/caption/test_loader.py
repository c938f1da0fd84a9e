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
from salmonn.caption.loader import ClipJob, ClipReader, ReadSpec, default_num_workers, length_buckets
from salmonn.media.clip import read_clip
from salmonn.media.container import ClipError
from salmonn.media.frame_sampling import FixedRateSampler

# What a worker does at a file's name; a module of its own, since a worker imports what it is sent.
ODD = """
import logging, os, signal, sys, time
from salmonn.caption.loader import ReadSpec

class Odd(ReadSpec):
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
    """Return the child processes; other tests may have left some."""
    return set(psutil.Process().children())


@pytest.fixture
def odd(tmp_path, monkeypatch):
    (tmp_path / "odd.py").write_text(ODD)
    monkeypatch.syspath_prepend(tmp_path)
    import odd

    yield odd.Odd(FixedRateSampler())
    del sys.modules["odd"]


class Listed:
    """Files that are no more than their lengths, and the order in which they are read."""

    def __init__(self, *, pause: float = 0.0) -> None:
        self.pause = pause
        self.read_so_far: list[int] = []

    def seconds(self, path: Path) -> float:
        return float(path.name)

    def read(self, path: Path) -> int:
        time.sleep(self.pause)
        self.read_so_far.append(int(path.name))
        return int(path.name)


def batches_of(reader, names, read_spec, *, size, finish=lambda clip: clip, **named):
    """Batches of (place, clip)."""
    asked = (ClipJob(place, CaptionRequest(Path(name)), read_spec) for place, name in enumerate(names))
    for batch in reader.batches(asked, size=size, finish=finish, **named):
        yield [(job.index, read) for job, read in batch]


def read_all(names, read_spec, *, workers, size=2):
    with ClipReader(workers=workers) as reader:
        return list(batches_of(reader, names, read_spec, size=size))


def wait_until(done, *, seconds=120.0):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.02)


def test_length_buckets():
    # In order 1 2 3 4 5 are the places 1 3 0 4 2; five in batches of two are three batches: 1, 2, 2.
    assert length_buckets([3, 1, 5, 2, 4], size=2) == [[1], [0, 3], [2, 4]]
    assert length_buckets([1, 1, 1], size=8) == [[0, 1, 2]]


def test_files_are_batched_by_length_within_a_bucket():
    """A bucket is 8 batches of 2: the first 16 lengths form pairs of equal length, the rest is one more pair."""
    lengths = [*range(8, 0, -1), *range(1, 9), 3, 90, 4]
    batches = read_all(map(str, lengths), Listed(), workers=0)
    places = [[place for place, _ in batch] for batch in batches]
    # Length n stands at 8 - n and 7 + n; the batch with the first path comes first. Of 3, 90, 4 the least goes alone.
    assert places == [*([8 - n, 7 + n] for n in range(8, 0, -1)), [16], [17, 18]]
    assert all(clip == lengths[place] for batch in batches for place, clip in batch)


def test_lengths_are_not_measured_for_single_clips():
    # These names are no numbers, so asking would raise.
    class Unasked(Listed):
        def read(self, path):
            return path.name

    assert read_all("cab", Unasked(), workers=0, size=1) == [[(0, "c")], [(1, "a")], [(2, "b")]]


@pytest.mark.parametrize(("size", "expected"), [(1, 3), (2, 6), (3, 9)])
def test_two_batches_are_read_ahead(size, expected):
    """With the batch that was taken: 3 * size clips."""
    read_spec = Listed()
    with ClipReader(workers=0) as reader:
        batches = batches_of(reader, ["1"] * 18, read_spec, size=size)
        next(batches)
        wait_until(lambda: len(read_spec.read_so_far) == expected)
        time.sleep(0.1)
        assert len(read_spec.read_so_far) == expected


def test_waiting_time_is_measured():
    """Three clips of 0.2 s each; the last is read while the consumer is busy for 0.5 s."""
    with ClipReader(workers=0) as reader:
        batches = batches_of(reader, ["1"] * 3, Listed(pause=0.2), size=1)
        next(batches)
        next(batches)
        assert 0.35 < reader.waited_seconds < 1
        time.sleep(0.5)
        before = reader.waited_seconds
        next(batches)
        assert reader.waited_seconds - before < 0.1


@pytest.mark.parametrize("workers", [0, 2])
def test_clips_equal_read_clip(videos, tmp_path, workers):
    paths = [*videos[:3], tmp_path / "none.mp4"]
    read_spec = ReadSpec(FixedRateSampler(side=48), start_seconds=1.0, end_seconds=3.0)
    read = dict(chain(*read_all(paths, read_spec, workers=workers)))
    assert sorted(read) == [0, 1, 2, 3]
    for place, path in enumerate(videos[:3]):
        clip = read_clip(path, FixedRateSampler(side=48), start_seconds=1.0, end_seconds=3.0)
        assert np.array_equal(read[place].frames, clip.frames) and len(clip.frames) == 2
        assert np.array_equal(read[place].waveform, clip.waveform) and len(clip.waveform) == 32_000
        assert read[place].path == str(path)
    assert isinstance(read[3], ValueError) and str(paths[3]) in str(read[3])


def test_span_seconds(videos):
    whole = ReadSpec(FixedRateSampler()).seconds(videos[0])
    assert whole > 4
    assert ReadSpec(FixedRateSampler(), start_seconds=1.0).seconds(videos[0]) == whole - 1
    assert ReadSpec(FixedRateSampler(), start_seconds=1.0, end_seconds=3.5).seconds(videos[0]) == 2.5
    assert ReadSpec(FixedRateSampler(), end_seconds=100.0).seconds(videos[0]) == whole
    assert ReadSpec(FixedRateSampler()).seconds(videos[0].parent) == 0


@pytest.mark.parametrize(("end", "words"), [("SIGKILL", "memory"), ("SIGSEGV", "SIGSEGV"), ("exit", "exit code 3")])
def test_a_dead_worker_fails_its_file_alone(odd, end, words):
    read = dict(chain(*read_all(["a", "b", end, "c", "d", end, "e"], odd, workers=2, size=3)))
    assert [read[place] for place in (0, 1, 3, 4, 6)] == ["a", "b", "c", "d", "e"]
    for place in (2, 5):
        assert isinstance(read[place], ValueError) and str(read[place]).startswith(f"{end}: the worker process")
        assert words in str(read[place])


def test_a_worker_killed_while_idle_is_replaced(odd):
    before = child_processes()
    with ClipReader(workers=1) as reader:
        assert list(batches_of(reader, ["a"], odd, size=1, finish=str)) == [[(0, "a")]]
        (worker,) = child_processes() - before
        worker.kill()
        assert list(batches_of(reader, ["b"], odd, size=1, finish=str)) == [[(0, "b")]]


def test_output_and_logs_of_workers(odd, caplog, capfd):
    assert read_all(["print", "warn", "torch"], odd, workers=1, size=1) == [
        [(0, "print")],
        [(1, "warn")],
        [(2, False)],  # so it starts at once, and is small
    ]
    assert [(record.name, record.getMessage()) for record in caplog.records] == [
        ("salmonn.media.clip", "warn: damaged")
    ]
    assert "chatter" in capfd.readouterr().err
    caplog.clear()
    logging.getLogger("salmonn.media.clip").setLevel(logging.ERROR)
    try:
        read_all(["warn"], odd, workers=1)
    finally:
        logging.getLogger("salmonn.media.clip").setLevel(logging.NOTSET)
    assert not caplog.records


def test_cancel(odd):
    """A file that is being read and one that is waiting are cancelled; others are read."""
    with ClipReader(workers=1) as reader:
        sleeping = reader.submit(Path("sleep"), odd, str)
        waiting = reader.submit(Path("a"), odd, str)
        wait_until(lambda: [task for task in reader._running.values() if task.worker])
        begun = time.monotonic()
        reader.cancel(waiting)
        reader.cancel(sleeping)
        with pytest.raises(ClipError, match="was killed because it did not finish"):
            sleeping.result(120)
        assert waiting.cancelled() and reader.submit(Path("b"), odd, str).result(120) == "b"
        assert time.monotonic() - begun < 300
        done = reader.submit(Path("c"), odd, str)
        assert done.result(120) == "c"
        reader.cancel(done)  # which changes nothing
        assert reader.submit(Path("d"), odd, str).result(120) == "d"
        wait_until(lambda: not reader._running)


def test_closing_kills_reading_workers(odd):
    before, begun = child_processes(), time.monotonic()
    reader = ClipReader(workers=2)
    batches = batches_of(reader, ["a", "sleep", "sleep", "b"], odd, size=1, finish=str)
    assert next(batches) == [(0, "a")]
    reader.close()
    assert child_processes() <= before and time.monotonic() - begun < 300
    with pytest.raises(RuntimeError, match="shutdown"):
        next(batches_of(reader, ["a"], odd, size=1, finish=str))


SLEEPER = """
import sys
from pathlib import Path
from salmonn.caption.loader import ClipJob, ClipReader
from salmonn.caption.generator import CaptionRequest
from salmonn.media.frame_sampling import FixedRateSampler
from odd import Odd

with ClipReader(workers=2) as reader:
    read = Odd(FixedRateSampler())
    names = ("a", "b", "sleep", "sleep")
    jobs = [ClipJob(index, CaptionRequest(Path(name)), read) for index, name in enumerate(names)]
    batches = reader.batches(jobs, size=1, finish=str)
    next(batches), next(batches)
    print("reading", flush=True)
    next(batches)
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_worker_outlives_its_parent(odd, tmp_path, end):
    """However the parent ends, while its workers read for ten minutes."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPER],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
    )
    assert process.stdout.readline() == "reading\n"
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    process.send_signal(end)
    process.communicate(timeout=120)
    _, alive = psutil.wait_procs(workers, timeout=120)
    assert not alive


def test_default_num_workers(monkeypatch):
    for cores, num_clips, expected in [(2, 100, 2), (4, 3, 3), (64, 100, 8), (64, 1, 1)]:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert default_num_workers(num_clips) == expected
    with pytest.raises(ValueError, match="workers must be 0"):
        ClipReader(workers=-1)
