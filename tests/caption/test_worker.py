"""Limits of a worker: a file that takes too much time or memory kills its worker, and fails alone."""

import re
import struct
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from salmonn.caption.generator import CaptionRequest
from salmonn.caption.loader import ClipJob, ClipReader, ReadSpec, split_into_segments
from salmonn.caption.worker import WorkerLimits
from salmonn.media.frame_sampling import FixedRateSampler

GREEDY = """
import fcntl, os, signal, stat, time
from contextlib import suppress
import numpy as np
from salmonn.caption.generator import CaptionRequest
from salmonn.caption.loader import ReadSpec

def say(what):
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    for fd in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):  # what lists them is gone
            is_pipe = stat.S_ISFIFO(os.fstat(fd).st_mode)
            if fd > 2 and is_pipe and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_WRONLY:
                os.write(fd, what)  # the one that replies go to

class Evil:
    def __reduce__(self):
        import os
        return os.system, ("touch " + os.environ["TOUCHED"],)

class Greedy(ReadSpec):
    def read(self, path):
        if path.name == "slow":
            time.sleep(600)
        if path.name == "busy":
            while True:  # without a pause in which Python would look for signals
                sum(range(10**8))
        if path.name == "large":
            return np.ones(1 << 28, np.uint8).nbytes
        if path.name == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        if path.name == "dribble":  # as one does that a file has taken over
            say(b"\\x80")
            time.sleep(600)
        if path.name == "garbage":
            say(b"cnowhere\\nnothing\\n.")
            time.sleep(600)
        if path.name == "mute":
            say(b"")
            for fd in range(3, 9):
                with suppress(OSError):
                    os.close(fd)
            time.sleep(600)
        if path.name == "evil":
            return Evil()
        return path.name
"""


@pytest.fixture
def greedy(tmp_path, monkeypatch):
    (tmp_path / "greedy.py").write_text(GREEDY)
    monkeypatch.syspath_prepend(tmp_path)
    import greedy

    yield greedy.Greedy(FixedRateSampler())
    del sys.modules["greedy"]


def read_all(names, read_spec, limits):
    with ClipReader(workers=1, limits=limits) as reader:
        parts = [ClipJob(place, CaptionRequest(Path(name)), read_spec) for place, name in enumerate(names)]
        return [str(read) for batch in reader.batches(parts, size=1, finish=str) for _, read in batch]


@pytest.mark.parametrize("name", ["slow", "busy"])
def test_a_slow_file_fails_alone(greedy, name):
    before, late, after = read_all(["a", name, "b"], greedy, WorkerLimits(seconds=1.0))
    assert (before, after) == ("a", "b")
    assert late.startswith(f"{name}: reading it took more than 1 s") and "read_seconds" in late


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dribble", "killed because it did not finish"),
        ("mute", "because it did not finish"),
        ("garbage", "do not trust the file"),
    ],
)
def test_a_worker_that_breaks_the_protocol(greedy, monkeypatch, name, words):
    monkeypatch.setattr("salmonn.caption.worker.KILL_TIMEOUT_SECONDS", 3.0)
    before, bad, after = read_all(["a", name, "b"], greedy, WorkerLimits(seconds=1.0))
    assert (before, after) == ("a", "b")
    assert bad.startswith(f"{name}: ") and re.search(words, bad)


def test_a_worker_that_cannot_be_killed_is_abandoned(greedy, monkeypatch):
    """A stopped process ignores its timer, like one that is blocked on a lost disk."""
    monkeypatch.setattr("salmonn.caption.worker.KILL_TIMEOUT_SECONDS", 0.5)
    before, late, after = read_all(["a", "stopped", "b"], greedy, WorkerLimits(seconds=1.0))
    assert (before, after) == ("a", "b")
    assert late.startswith("stopped: reading it took more than 1 s, and the worker process") and "disk" in late


def test_a_large_file_fails_alone(greedy):
    # An array of 256 MiB, where 128 MiB beside what a worker holds are allowed, and where 1 GiB is.
    before, large, after = read_all(["a", "large", "b"], greedy, WorkerLimits(memory_gib=0.125))
    assert (before, after) == ("a", "b")
    assert large.startswith("large: the clip needs more than 0.125 GiB") and "read_gib" in large
    assert read_all(["large"], greedy, WorkerLimits(memory_gib=1.0)) == [str(1 << 28)]


def test_a_compromised_worker_cannot_run_code_in_its_parent(greedy, tmp_path, monkeypatch):
    monkeypatch.setenv("TOUCHED", str(tmp_path / "touched"))
    before, evil, after = read_all(["a", "evil", "b"], greedy, WorkerLimits())
    assert (before, after) == ("a", "b")
    assert "system, which no worker does: do not trust the file" in evil and not (tmp_path / "touched").exists()


@pytest.mark.parametrize("values", [{"seconds": 0}, {"memory_gib": -1}, {"seconds": float("nan")}])
def test_limits_are_positive(values):
    with pytest.raises(ValueError, match="must be above 0"):
        WorkerLimits(**values)


@pytest.mark.parametrize(
    ("start", "seconds", "length", "expected"),
    [
        (None, 20.0, 10.0, [(0, 10), (10, 20)]),
        (None, 20.9, 10.0, [(0, 10), (10, 20.9)]),  # a rest of up to a second stays with the last
        (None, 21.5, 10.0, [(0, 10), (10, 20), (20, 21.5)]),
        (2.0, 5.0, 2.0, [(2, 4), (4, 7)]),
        (None, 3.0, 1.0, [(0, 1), (1, 2), (2, 3)]),  # of half a segment, where that is less
        (None, 0.3, 10.0, [(0, 0.3)]),
        (4.0, 6.0, float("inf"), [(4, 10)]),
    ],
)
def test_segments(start, seconds, length, expected):
    part = ClipJob(
        3, CaptionRequest(Path("a.mp4"), seed=9), ReadSpec(FixedRateSampler(), start_seconds=start, audio=False)
    )
    cut = split_into_segments(part, seconds, length)
    assert [(one.read_spec.start_seconds, one.read_spec.end_seconds) for one, _ in cut] == expected
    assert [length for _, length in cut] == pytest.approx([end - begin for begin, end in expected])
    for number, (one, _) in enumerate(cut):
        assert (one.index, one.request.seed, one.num_segments) == (
            3,
            9 + number,
            len(expected),
        ) and not one.read_spec.audio


def test_a_file_of_unknown_length_cannot_be_split(videos):
    part = ClipJob(0, CaptionRequest(videos[0]), ReadSpec(FixedRateSampler(side=48)))
    ((endless, seconds),) = split_into_segments(part, 0.0, 2.0)
    assert seconds == 0
    with pytest.raises(ValueError, match=r"does not state its length.*its data ends at \d+\.\d\d s"):
        endless.read_spec.read(videos[0])


def write_matroska(path, *, seconds, declared):
    """Silence in PCM whose head says that it lasts otherwise: its duration, a float of 8 bytes, is overwritten."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("pcm_s16le", rate=8000, layout="mono")
        for _ in range(10 * seconds):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
            frame.sample_rate = 8000
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    data = path.read_bytes()
    place = data.index(b"\x44\x89\x88") + 3  # Duration, of 8 bytes, in milliseconds
    path.write_bytes(data[:place] + struct.pack(">d", 1000.0 * declared) + data[place + 8 :])
    return path


def test_segments_follow_the_data_and_not_the_header(tmp_path):
    """20 s whose header states 8 s, and 6 s whose header states 100 s."""
    for seconds, declared, ends in [(20, 8, [5, 10, 15, 20]), (6, 100, [6])]:
        path = write_matroska(tmp_path / f"{seconds}.mka", seconds=seconds, declared=declared)
        read_spec = ReadSpec(FixedRateSampler())
        assert read_spec.seconds(path) == pytest.approx(declared)
        assert read_spec.seconds(path, exact=True) == pytest.approx(seconds, abs=0.01)
        with ClipReader(workers=1) as reader:
            batches = list(
                reader.batches(
                    [ClipJob(0, CaptionRequest(path), read_spec)], size=8, finish=lambda clip: clip, segment_seconds=5
                )
            )
        read = [one for batch in batches for one in batch]
        assert [part.read_spec.end_seconds for part, _ in read] == pytest.approx(ends, abs=0.01)
        heard = sum(len(clip.waveform) for _, clip in read)
        assert heard == pytest.approx(16_000 * seconds, rel=0.001)
