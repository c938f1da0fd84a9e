"""Limits of a worker: a file that needs too much time or memory fails without affecting others."""

import re
import struct
from pathlib import Path

import av
import numpy as np
import pytest

from salmonn.caption.generator import CaptionRequest, Span
from salmonn.caption.loader import ClipJob, ClipReader, split_into_segments
from salmonn.caption.read_spec import LimitedReadSpec, ReadSpec
from salmonn.caption.segments import FixedSegments
from salmonn.caption.worker import WorkerLimits
from salmonn.media.frame_sampling import FixedRateSampler

SCRIPTED_MODULE = """
import fcntl, os, signal, stat, time
from contextlib import suppress
import numpy as np
from salmonn.caption.generator import CaptionRequest
from salmonn.caption.read_spec import ReadSpec

def write_reply(data):
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    for fd in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):  # the descriptor of the listing is closed
            is_pipe = stat.S_ISFIFO(os.fstat(fd).st_mode)
            if fd > 2 and is_pipe and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_WRONLY:
                os.write(fd, data)  # the pipe for replies

class CodeOnUnpickling:
    def __reduce__(self):
        import os
        return os.system, ("touch " + os.environ["TOUCHED"],)

class ScriptedReadSpec(ReadSpec):
    def read(self, path):
        if path.name == "slow":
            time.sleep(600)
        if path.name == "busy":
            while True:  # Python handles no signals meanwhile
                sum(range(10**8))
        if path.name == "large":
            return np.ones(1 << 28, np.uint8).nbytes
        if path.name == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        if path.name == "partial":  # like a worker that a file has compromised
            write_reply(b"\\x80")
            time.sleep(600)
        if path.name == "garbage":
            write_reply(b"cnowhere\\nnothing\\n.")
            time.sleep(600)
        if path.name == "closed":
            write_reply(b"")
            for fd in range(3, 9):
                with suppress(OSError):
                    os.close(fd)
            time.sleep(600)
        if path.name == "pickle":
            return CodeOnUnpickling()
        return path.name
"""


def read_all(names, read_spec, limits):
    with ClipReader(workers=1, limits=limits) as reader:
        jobs = [ClipJob(index, CaptionRequest(Path(name)), read_spec) for index, name in enumerate(names)]
        return [str(clip) for batch in reader.batches(jobs, size=1, finish=str) for _, clip in batch]


@pytest.mark.parametrize("name", ["slow", "busy"])
def test_only_the_slow_file_fails(scripted, name):
    before, slow, after = read_all(["a", name, "b"], scripted, WorkerLimits(seconds=1.0))
    assert (before, after) == ("a", "b")
    assert slow.startswith(f"{name}: reading it took more than 1 s") and "read_seconds" in slow


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("partial", "killed because it did not finish"),
        ("closed", "because it did not finish"),
        ("garbage", "do not trust the file"),
    ],
)
def test_a_worker_that_breaks_the_protocol(scripted, monkeypatch, name, message):
    monkeypatch.setattr("salmonn.caption.worker.KILL_TIMEOUT_SECONDS", 3.0)
    before, failed, after = read_all(["a", name, "b"], scripted, WorkerLimits(seconds=1.0))
    assert (before, after) == ("a", "b")
    assert failed.startswith(f"{name}: ") and re.search(message, failed)


def test_a_worker_that_cannot_be_killed_is_abandoned(scripted, monkeypatch):
    """A stopped process ignores its timer, like one that is blocked on a lost disk."""
    monkeypatch.setattr("salmonn.caption.worker.KILL_TIMEOUT_SECONDS", 0.5)
    before, stopped, after = read_all(["a", "stopped", "b"], scripted, WorkerLimits(seconds=1.0))
    assert (before, after) == ("a", "b")
    assert stopped.startswith("stopped: reading it took more than 1 s, and the worker process") and "disk" in stopped


def test_only_the_large_file_fails(scripted):
    # An array of 256 MiB, with a limit of 128 MiB above a worker's own memory, and with one of 1 GiB.
    before, large, after = read_all(["a", "large", "b"], scripted, WorkerLimits(memory_gib=0.125))
    assert (before, after) == ("a", "b")
    assert large.startswith("large: the clip needs more than 0.125 GiB") and "read_gib" in large
    assert read_all(["large"], scripted, WorkerLimits(memory_gib=1.0)) == [str(1 << 28)]


def test_a_compromised_worker_cannot_run_code_in_its_parent(scripted, tmp_path, monkeypatch):
    monkeypatch.setenv("TOUCHED", str(tmp_path / "touched"))
    before, failed, after = read_all(["a", "pickle", "b"], scripted, WorkerLimits())
    assert (before, after) == ("a", "b")
    assert "system, which no worker does: do not trust the file" in failed and not (tmp_path / "touched").exists()


@pytest.mark.parametrize("values", [{"seconds": 0}, {"memory_gib": -1}, {"seconds": float("nan")}])
def test_limits_are_positive(values):
    with pytest.raises(ValueError, match="must be above 0"):
        WorkerLimits(**values)


@pytest.mark.parametrize(
    ("start", "seconds", "length", "expected"),
    [
        (None, 20.0, 10.0, [(0, 10), (10, 20)]),
        (None, 20.9, 10.0, [(0, 10), (10, 20.9)]),  # a remainder of up to a second extends the last segment
        (None, 21.5, 10.0, [(0, 10), (10, 20), (20, 21.5)]),
        (2.0, 5.0, 2.0, [(2, 4), (4, 7)]),
        (None, 3.0, 1.0, [(0, 1), (1, 2), (2, 3)]),  # or up to half a segment, whichever is shorter
        (None, 0.3, 10.0, [(0, 0.3)]),
        (4.0, 6.0, float("inf"), [(4, 10)]),
    ],
)
def test_segments(start, seconds, length, expected):
    job = ClipJob(
        3, CaptionRequest(Path("a.mp4"), seed=9), ReadSpec(FixedRateSampler(), start_seconds=start, audio=False)
    )
    segments = split_into_segments(job, FixedSegments(length).bounds(start or 0.0, seconds))
    spans = [segment.request.span for segment, _ in segments]
    assert [(span.start_seconds or 0, span.end_seconds) for span in spans] == expected
    read_spans = [(segment.read_spec.start_seconds, segment.read_spec.end_seconds) for segment, _ in segments]
    assert read_spans == [*expected[:-1], (expected[-1][0], None)]  # the last one, to the end of the file
    assert [length for _, length in segments] == pytest.approx([end - start for start, end in expected])
    for number, (segment, _) in enumerate(segments):
        assert (segment.index, segment.request.seed) == (3, 9 + number)
        assert segment.num_segments == len(expected) and not segment.read_spec.audio


def test_the_last_segment_ends_with_the_span():
    read_spec = ReadSpec(FixedRateSampler(), start_seconds=2.0, end_seconds=9.0)
    cut = split_into_segments(ClipJob(0, CaptionRequest(Path("a.mp4")), read_spec), FixedSegments(3.0).bounds(2.0, 6.5))
    assert [one.request.span for one, _ in cut] == [Span(2.0, 5.0), Span(5.0, 8.5)]
    assert [one.read_spec.end_seconds for one, _ in cut] == [5.0, 9.0]


def test_a_header_that_states_too_much_does_not_refuse_a_short_file(tmp_path):
    """6 s whose header states 100 s."""
    path = write_matroska(tmp_path / "a.mka", seconds=6, declared=100)
    clip = LimitedReadSpec(FixedRateSampler(), max_seconds=10).read(path)
    assert clip.duration_seconds == pytest.approx(6, abs=0.01)
    with pytest.raises(ValueError, match=r"has 6 s or more, and the maximum is 5 s"):
        LimitedReadSpec(FixedRateSampler(), max_seconds=5).read(path)


def test_a_file_of_unknown_length_cannot_be_split(videos):
    job = ClipJob(0, CaptionRequest(videos[0]), ReadSpec(FixedRateSampler(side=48)))
    ((segment, seconds),) = split_into_segments(job, FixedSegments(2.0).bounds(0.0, 0.0))
    assert seconds == 0
    with pytest.raises(ValueError, match=r"does not state its length.*its data ends at \d+\.\d\d s"):
        segment.read_spec.read(videos[0])


def write_matroska(path, *, seconds, declared):
    """Write PCM silence whose header declares another duration: the field, a float of 8 bytes, is overwritten."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("pcm_s16le", rate=8000, layout="mono")
        for _ in range(10 * seconds):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
            frame.sample_rate = 8000
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    data = path.read_bytes()
    offset = data.index(b"\x44\x89\x88") + 3  # Duration, of 8 bytes, in milliseconds
    path.write_bytes(data[:offset] + struct.pack(">d", 1000.0 * declared) + data[offset + 8 :])
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
                    [ClipJob(0, CaptionRequest(path), read_spec)],
                    size=8,
                    finish=lambda clip: clip,
                    segments=FixedSegments(5),
                )
            )
        segments = [segment for batch in batches for segment in batch]
        assert [job.request.span.end_seconds for job, _ in segments] == pytest.approx(ends, abs=0.01)
        num_samples = sum(len(clip.waveform) for _, clip in segments)
        assert num_samples == pytest.approx(16_000 * seconds, rel=0.001)
