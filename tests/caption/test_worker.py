"""Limits of a worker: a file that needs too much time or memory fails without affecting others."""

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
            return np.empty(1 << 28, np.uint8).nbytes
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
    """Read files with three workers; return the results by name, as text."""
    with ClipReader(workers=3, limits=limits) as reader:
        jobs = [ClipJob(index, CaptionRequest(Path(name)), read_spec) for index, name in enumerate(names)]
        batches = reader.batches(jobs, size=1, finish=str)
        return {str(job.request.path): str(clip) for batch in batches for job, clip in batch}


def test_only_the_files_that_fail_their_workers_fail(scripted, tmp_path, monkeypatch):
    """One takes too long, one too much memory; the workers of the others break the protocol, or are compromised."""
    monkeypatch.setenv("TOUCHED", str(tmp_path / "touched"))
    names = ["a", "slow", "busy", "large", "closed", "garbage", "pickle", "b"]
    found = read_all(names, scripted, WorkerLimits(seconds=1.0, memory_gib=0.125))
    assert list(found) == names and (found["a"], found["b"]) == ("a", "b")
    for name in ("slow", "busy"):
        assert found[name].startswith(f"{name}: reading it took more than 1 s:") and "read_seconds" in found[name]
    # An array of 256 MiB, with a limit of 128 MiB.
    assert found["large"].startswith("large: the clip needs more than 0.125 GiB") and "read_gib" in found["large"]
    assert found["closed"].startswith("closed: ") and "because it did not finish" in found["closed"]
    assert found["garbage"].startswith("garbage: ") and "do not trust the file" in found["garbage"]
    # The unpickled reply would run code in this process.
    assert "system, which no worker does: do not trust the file" in found["pickle"]
    assert not (tmp_path / "touched").exists()


def test_workers_that_do_not_end_are_killed_or_abandoned(scripted, monkeypatch):
    """One stops within its reply; a stopped process ignores its timer, like one that is blocked on a lost disk."""
    monkeypatch.setattr("salmonn.caption.worker.KILL_TIMEOUT_SECONDS", 0.5)
    names = ["a", "stopped", "partial", "large", "b"]
    found = read_all(names, scripted, WorkerLimits(seconds=1.0, memory_gib=1.0))
    assert list(found) == names and (found["a"], found["b"]) == ("a", "b")
    assert found["large"] == str(1 << 28)
    assert found["partial"].startswith("partial: ") and "killed because it did not finish" in found["partial"]
    reason = found["stopped"]
    assert reason.startswith("stopped: reading it took more than 1 s, and the worker process") and "disk" in reason


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
    expected, read_spec = [(20, 8, [5, 10, 15, 20]), (6, 100, [6])], ReadSpec(FixedRateSampler())
    paths = [write_matroska(tmp_path / f"{one}.mka", seconds=one, declared=declared) for one, declared, _ in expected]
    for path, (seconds, declared, _) in zip(paths, expected, strict=True):
        assert read_spec.seconds(path) == pytest.approx(declared)
        assert read_spec.seconds(path, exact=True) == pytest.approx(seconds, abs=0.01)
    jobs = [ClipJob(index, CaptionRequest(path), read_spec) for index, path in enumerate(paths)]
    with ClipReader(workers=1) as reader:
        batches = list(reader.batches(jobs, size=8, finish=lambda clip: clip, segments=FixedSegments(5)))
    for index, (seconds, _, ends) in enumerate(expected):
        segments = [segment for batch in batches for segment in batch if segment[0].index == index]
        segments.sort(key=lambda segment: segment[0].request.span.end_seconds)
        assert [job.request.span.end_seconds for job, _ in segments] == pytest.approx(ends, abs=0.01)
        num_samples = sum(len(clip.waveform) for _, clip in segments)
        assert num_samples == pytest.approx(16_000 * seconds, rel=0.001)
