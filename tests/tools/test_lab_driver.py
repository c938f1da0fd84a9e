"""The driver of the preference lab's tables, on stand-in parts that train nothing."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from salmonn.files import write_json
from tests.limits import STEP_SECONDS, wait_until

# Notes that it runs, fails if there is a file FAIL_<name>, waits if there is a file WAIT, and writes its result last.
PART = """
import json, os, pathlib, sys, time
name, seed, out = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
with (out / "runs.txt").open("a") as log:
    log.write(f"{name} {seed} {os.getpid()}\\n")
while (out / "WAIT").exists():
    time.sleep(0.01)
if (out / f"FAIL_{name}").exists():
    sys.exit("as planned")
(out / f"{name}_{seed}.json").write_text(json.dumps({"value": 10 * seed}))
"""
# The driver as a command of its own, to be killed.
COMMAND = """
import pathlib, sys
sys.path[:0] = {paths}
from lab_driver import Lab, Part, run_lab
out = pathlib.Path({out!r})
flags = lambda name: lambda seed, folder: [name, str(seed), str(folder)]
parts = {{name: Part({script!r}, flags(name), name + "_{{seed}}.json") for name in ("first", "second")}}
run_lab(Lab("lab", out, parts, {{"all": ("first", "second")}}, ()), ["--seeds", "2"], description="")
"""


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("lab_driver")


@pytest.fixture
def lab(tool, tmp_path):
    """Parts `first` and `last`, which needs `second`, which needs `first`; `alone` needs none."""
    script = tmp_path / "part.py"
    script.write_text(PART)

    def part(name: str, *needs: str):
        return tool.Part(str(script), lambda seed, out: [name, str(seed), str(out)], f"{name}_{{seed}}.json", needs)

    parts = {
        "first": part("first"),
        "second": part("second", "first"),
        "last": part("last", "second"),
        "alone": part("alone"),
    }
    rows = [tool.Row("**Last**: value: >= 25", lambda one: one["last"]["value"], lambda value: value >= 25)]
    return tool.Lab("lab", tmp_path / "out", parts, {"chain": ("last",), "alone": ("alone",)}, rows)


def runs(out: Path) -> list[str]:
    return [line.rpartition(" ")[0] for line in (out / "runs.txt").read_text().splitlines()]


def test_parts_run_after_those_they_need_and_only_once(tool, lab, tmp_path, capsys):
    args = ["--seeds", "2", "3", "--jobs", "1", "--document", str(tmp_path / "lab.md")]
    (tmp_path / "lab.md").write_text("before\n<!-- lab: start -->\nearlier\n<!-- lab: end -->\nafter\n")
    lab.out.mkdir()
    (lab.out / "FAIL_second").touch()
    with pytest.raises(SystemExit, match="4 parts failed"):
        tool.run_lab(lab, args, description="")
    assert runs(lab.out) == ["first 2", "first 3", "second 2", "second 3", "alone 2", "alone 3"]
    printed = capsys.readouterr().out
    assert "seed 3, last: not run, since second has failed" in printed and "FAILED" in printed
    assert "| **Last** | | | | not run |\n" in (tmp_path / "lab.md").read_text()

    (lab.out / "FAIL_second").unlink()
    tool.run_lab(lab, [*args, "--parts", "chain"], description="")
    assert runs(lab.out)[6:] == ["second 2", "second 3", "last 2", "last 3"]
    text = (tmp_path / "lab.md").read_text()
    # Student's t for one degree of freedom is 12.706, and the standard error of two values half their difference.
    line = "| **Last**: value: >= 25 | 20.0 | 30.0 | 25.0 (-38.5 to 88.5) | in the mean, on 1 of 2 seeds |"
    assert line in text and text.startswith("before\n") and text.endswith("after\n") and "earlier" not in text
    tool.run_lab(lab, args, description="")
    assert len(runs(lab.out)) == 10


def test_a_killed_driver_loses_the_part_under_way(tool, lab, tmp_path):
    """What is finished is kept: the next command runs only the part that was killed with its driver."""
    out, script = lab.out, tmp_path / "part.py"
    out.mkdir()
    write_json(out / "first_2.json", {"value": 0})
    (out / "WAIT").touch()
    root = Path(tool.__file__).parent
    code = COMMAND.format(paths=[str(root), str(root.parent)], out=str(out), script=str(script))
    driver = subprocess.Popen([sys.executable, "-c", code])
    wait_until(lambda: (out / "runs.txt").exists() and (out / "runs.txt").read_text().endswith("\n"))
    driver.kill()
    driver.wait(STEP_SECONDS)
    os.kill(int((out / "runs.txt").read_text().split()[-1]), signal.SIGKILL)
    (out / "WAIT").unlink()
    parts = {name: lab.parts[name] for name in ("first", "second")}
    tool.run_lab(replace(lab, parts=parts, groups={"all": ("second",)}), ["--seeds", "2"], description="")
    assert runs(out) == ["second 2", "second 2"] and (out / "second_2.json").is_file()


def test_verdicts(tool):
    row = tool.Row("points: >= 2", lambda one: one["value"], lambda value: value >= 2)
    assert tool.judge(row, [], num_seeds=3) == "not run"
    assert tool.judge(row, [2, 3, 4], num_seeds=3) == "yes"
    assert tool.judge(row, [1, 3, 4], num_seeds=3) == "in the mean, on 2 of 3 seeds"
    assert tool.judge(row, [1, 1, 3], num_seeds=3) == "**no**"
    assert tool.judge(row, [3], num_seeds=3) == "yes (1 of 3 seeds)"
    assert tool.judge(tool.Row("control", row.value), [3], num_seeds=3) == "(1 of 3 seeds)"


def test_a_document_without_marks_is_refused(tool, tmp_path):
    (tmp_path / "lab.md").write_text("no marks")
    with pytest.raises(ValueError, match="between which the table belongs"):
        tool.write_document(tmp_path / "lab.md", [], marks=("<!-- a -->", "<!-- b -->"))
