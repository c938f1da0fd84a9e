"""The decoder benchmark runs on two small clips; its checks detect wrong frames and audio."""

import json
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from tests.tools.benches import BENCH, load


@pytest.fixture
def bench():
    return load("decoders")


@pytest.mark.slow
def test_quick(tmp_path):
    out = tmp_path / "bench.json"
    command = [sys.executable, str(BENCH / "decoders.py"), "--quick", "--repeats", "1", "--out", str(out)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = json.loads(out.read_text())
    sequential = [row for row in rows if row["name"].endswith(": PyAV sequential")]
    assert [row["name"].split(",")[0] for row in sequential] == ["h264 240p 10 s", "mpeg4 240p 10 s"]
    for row in sequential:
        assert row["ratio"] == pytest.approx(row["other_seconds"] / row["ours_seconds"], rel=0.05)
        assert "note" not in row and row["part"] == "decoders" and row["machine"]
    assert 0 < sequential[-1]["ours_mib"] < 500 and 0 < sequential[-1]["other_mib"] < 500
    assert "h264 240p" in result.stdout
    names = " ".join(row["name"] for row in rows)
    assert "decord" in names and "torchcodec" in names  # measured, or reported as missing


def test_expected_frame_numbers(bench):
    # 120 s at one a second would be more than 110 frames: evenly from 0 to 3599, rounded down.
    numbers = bench.Case("h264", 240, 1, 120).numbers
    assert (len(numbers), numbers[0], numbers[1], numbers[-1]) == (110, 0, 33, 3599)  # 3599 / 109 = 33.02
    assert bench.Case("h264", 240, 1, 10).numbers == list(range(0, 300, 30))
    assert bench.Case("h264", 240, 1, 10, 4).numbers == [0, 99, 199, 299]


def test_a_segment_is_repeated_with_its_keyframes(bench, tmp_path):
    case = bench.Case("av1", 240, 10, 20)
    bench.encode_segment(tmp_path / "segment.mp4", case)
    bench.write_clip(tmp_path / "clip.mp4", tmp_path / "segment.mp4", seconds=20)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        assert [float(p.pts * p.time_base) for p in packets if p.is_keyframe] == [0, 10]
    with av.open(str(tmp_path / "clip.mp4")) as container:
        frames = [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]
        assert len(frames) == 600 and frames[0].shape == (240, 320)
        np.testing.assert_array_equal(frames[7], frames[307])
        assert np.abs(frames[7].astype(int) - frames[8]).mean() > bench.MAX_LEVEL_DIFFERENCE
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert abs(sum(frame.samples for frame in container.decode(audio=0)) / 44_100 - 20) < 0.1


def test_differences_are_reported(bench):
    frames = np.full((3, 4, 4, 3), 100, np.uint8)
    audio = (0.5 * np.sin(np.arange(16_000))).astype(np.float32)
    ours = frames, audio
    assert bench.differences((frames + 2, audio[:-100]), ours) == ""
    wrong = frames.copy()
    wrong[1] += 5
    assert bench.differences((wrong, audio), ours) == "wrong frames: up to 5.0 levels away"
    assert bench.differences((frames[:2], audio), ours) == "2 frames for 3"
    assert bench.differences((frames, audio[:8000]), ours) == "sound of 0.50 s for 1.00 s"
    assert bench.differences((frames, audio * 1.5), ours) == "other sound, 1.50 times as loud"


def test_an_unsupported_format_has_a_note_and_no_time(bench, monkeypatch):
    def fail(path, case):
        raise bench.Unreadable("decord cannot read h264")

    result = np.zeros((1, 4, 4, 3), np.uint8), np.zeros(16_000, np.float32)
    readers = {"ours": lambda *_: result, "PyAV sequential": lambda *_: result, "decord": fail}
    monkeypatch.setattr(bench, "READERS", readers)
    case = bench.Case("h264", 240, 1, 10)
    sequential, decord = bench.measure(case, Path("clip.mp4"), list(readers), repeats=1)
    assert sequential["ratio"] > 0 and "note" not in sequential
    assert decord["note"] == "decord cannot read h264" and "ratio" not in decord


def test_ours_must_agree_with_sequential_decoding(bench, monkeypatch):
    silent = np.zeros(16_000, np.float32)
    readers = {
        "ours": lambda *_: (np.zeros((1, 4, 4, 3), np.uint8), silent),
        "PyAV sequential": lambda *_: (np.full((1, 4, 4, 3), 9, np.uint8), silent),
    }
    monkeypatch.setattr(bench, "READERS", readers)
    with pytest.raises(SystemExit, match="wrong frames: up to 9"):
        bench.measure(bench.Case("h264", 240, 1, 10), Path("clip.mp4"), list(readers), repeats=1)


def test_a_reader_that_leaves_a_clip_to_pyav_has_not_read_it(bench, tmp_path):
    case = bench.Case("h264", 240, 1, 10)
    bench.encode_segment(tmp_path / "clip.ts", case)
    with pytest.raises(bench.Unreadable, match="decord cannot read h264"):
        bench.read_with("decord", tmp_path / "clip.ts", case)
