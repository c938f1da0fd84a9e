"""Shared parts of the benchmarks: medians of interleaved repeats, rows, tables, and merged results."""

import importlib
import json
import sys

import pytest

from tests.tools.benches import BENCH, load

ROW = {"name": "naive", "part": "step", "machine": "one core", "ours_seconds": 0.5, "other_seconds": 2.0, "ratio": 4.0}


@pytest.fixture
def rows():
    return load("rows")


def test_medians_of_interleaved_repeats(rows, monkeypatch):
    calls = []
    times = iter([(1.0, 0.5), (10.0, 5.0), (3.0, 1.5), (30.0, 15.0), (2.0, 1.0), (90.0, 45.0)])
    monkeypatch.setattr(rows, "_clock", lambda run: (run(), next(times))[1])
    timings = rows.interleave({"ours": lambda: calls.append("ours"), "other": lambda: calls.append("other")}, repeats=3)
    assert calls == ["ours", "other"] * 3
    # Of 1, 3, 2 the median is 2; of 10, 30, 90 it is 30.
    assert timings == {"ours": rows.Timing(2.0, 1.0), "other": rows.Timing(30.0, 15.0)}


def test_wall_clock_and_cpu_time(rows):
    wall, cpu = rows._clock(lambda: sum(range(3_000_000)))
    assert 0.01 < cpu < 10 and 0.01 < wall < 60


def test_a_row(rows):
    # 3 / 1.5 of wall-clock time, 2.5 / 1.25 of CPU time.
    row = rows.compare("naive", rows.Timing(1.0, 0.75) + rows.Timing(0.5, 0.5), rows.Timing(3.0, 2.5), ours_mib=7)
    expected = {"ours_seconds": 1.5, "other_seconds": 3.0, "ratio": 2.0, "cpu_ratio": 2.0, "ours_mib": 7}
    assert row == {"name": "naive"} | expected


@pytest.mark.parametrize(("power", "costs"), [(1, [3, 6, 12]), (2, [3, 12, 48]), (0, [3, 3, 3])])
def test_the_exponent_of_growth(rows, power, costs):
    assert rows.exponent([1, 2, 4], costs) == pytest.approx(power, abs=1e-9)


def test_memory_is_measured_in_a_separate_process(rows, tmp_path):
    # 96 MiB of float32 ones, which are resident; an earlier peak of 192 MiB does not count.
    lines = [
        f"import sys; sys.path.insert(0, {str(BENCH)!r})",
        "import numpy as np",
        "from rows import emit_json, peak_mib",
        "print('something else', np.ones(48 << 20, np.float32).sum())",
        "emit_json(peak_mib(lambda: np.ones(24 << 20, np.float32).sum()))",
    ]
    (tmp_path / "one.py").write_text("\n".join(lines))
    measured = rows.run_isolated(str(tmp_path / "one.py"))
    assert 92 <= measured["step_mib"] <= 110 and measured["process_mib"] > measured["step_mib"]


def test_a_failing_process_stops_the_benchmark(rows, tmp_path):
    (tmp_path / "one.py").write_text("raise SystemExit(3)")
    with pytest.raises(SystemExit, match=r"one\.py --side failed"):
        rows.run_isolated(str(tmp_path / "one.py"), "--side")


def test_the_table(rows):
    more = ROW | {"name": "growth", "part": "second", "other_seconds": None, "ratio": None, "note": "linear"}
    assert rows.to_markdown([ROW, more]).splitlines() == [
        "Measured on one core.",
        "",
        "**step**",
        "",
        "| what | ours, s | other, s | ratio |",
        "| --- | ---: | ---: | ---: |",
        "| naive | 0.5 | 2 | 4 |",
        "",
        "**second**",
        "",
        "| what | ours, s | other, s | ratio | note |",
        "| --- | ---: | ---: | ---: | --- |",
        "| growth | 0.5 |  |  | linear |",
    ]


def test_the_table_is_written_between_its_markers(rows, tmp_path):
    page = tmp_path / "web_ui.md"
    page.write_text(f"before\n{rows.TABLE_START}\nold\n{rows.TABLE_END}\nafter\n")
    for _ in range(2):
        rows.replace_table(page, "new\n")
        assert page.read_text() == f"before\n{rows.TABLE_START}\nnew\n{rows.TABLE_END}\nafter\n"
    page.write_text(f"before\n{rows.TABLE_END}\n{rows.TABLE_START}\n")
    with pytest.raises(ValueError, match="lacks the marker lines"):
        rows.replace_table(page, "new\n")


def test_results_of_the_parts_are_merged(rows, tmp_path, monkeypatch, capsys):
    collector = importlib.import_module("all")
    monkeypatch.setattr(collector, "HERE", tmp_path)
    measured = json.dumps([ROW | {"part": "step: mid"}, {"name": "bare"}])
    write = "import os, pathlib, sys; assert sys.argv[3:] == ['--quick'] and os.environ['OMP_NUM_THREADS']\n"
    (tmp_path / "step.py").write_text(write + f"pathlib.Path(sys.argv[2]).write_text({measured!r})")
    (tmp_path / "trl_step.py").write_text(write + "pathlib.Path(sys.argv[2]).write_text('[]')")
    (tmp_path / "growth.py").write_text("raise SystemExit(1)")
    document, out = tmp_path / "web_ui.md", tmp_path / "bench.json"
    document.write_text(f"{rows.TABLE_START}\n{rows.TABLE_END}\n")
    command = ["all.py", "--quick", f"--out={out}", f"--document={document}", "--parts", "step", "trl_step", "growth"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as end:
        collector.main()
    # A part without rows is not a failure (TRL may not be installed); an exit code is.
    assert end.value.code == 1 and capsys.readouterr().err == "growth failed, see the output above\n"
    first, second = json.loads(out.read_text())
    assert first == ROW | {"part": "step: mid", "bench": "step"}
    assert (second["name"], second["part"]) == ("bare", "step") and "torch" in second["machine"]
    assert "**step: mid**" in document.read_text() and "| bare |" in document.read_text()


def test_results_that_are_not_measured_again_are_kept(rows):
    """Older results keep the machine on which they were measured; titles may have changed with the sizes."""
    collector = importlib.import_module("all")
    before = [
        ROW | {"bench": bench, "part": part}
        for bench, part in (("step", "step"), ("folder", "24 clips"), ("folder", "its parts"), ("growth", "growth"))
    ]
    new = [
        ROW | {"bench": "decoders", "part": "readers"},
        ROW | {"bench": "folder", "part": "9 clips", "machine": "two cores"},
    ]
    merged = collector.merge_rows(before, new)
    assert merged == [before[0], new[1], new[0], before[3]]
    heads = [line for line in rows.to_markdown(merged).splitlines() if line.startswith("**")]
    assert heads == ["**step**", "**9 clips** (measured on two cores)", "**readers**", "**growth**"]
    assert collector.merge_rows([], new) == [new[1], new[0]]


def test_an_unknown_part_is_rejected(rows, monkeypatch, capsys):
    collector = importlib.import_module("all")
    monkeypatch.setattr(sys, "argv", ["all.py", "--parts", "stepp"])
    with pytest.raises(SystemExit):
        collector.main()
    assert "unknown part stepp" in capsys.readouterr().err
