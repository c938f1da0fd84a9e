"""The kill test on a fake run: when it kills, and which faults it detects."""

import json
import shutil
import sys

import pytest

from salmonn.config import parse_config

# Writes a run's files in order, one per step, and resumes after the last one. With a fault, the resumed run differs:
# "nondeterministic" writes weights that depend on the number of starts, "extra_file" leaves another file.
FAKE_RUN = """
import json, sys, time
from pathlib import Path

fault, *paths = sys.argv[1:]
starts = Path("README.md")  # not compared
starts.write_text(starts.read_text() + "." if starts.exists() else ".")
for path in map(Path, paths):
    if path.exists():
        continue
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name == "adapter":
        saved = path.with_name("checkpoints")
        saved.mkdir(exist_ok=True)
        for step in range(4):
            (saved / f".step_{step}.tmp").touch()
            time.sleep(0.02)
            (saved / f".step_{step}.tmp").replace(saved / f"step_{step}")
        with path.with_name("steps.jsonl").open("w") as log:
            log.write(json.dumps({"step": 0, "seconds": time.time()}) + "\\n")
        for file in saved.iterdir():
            file.unlink()
        saved.rmdir()
    time.sleep(0.02)
    half = path.with_name(f".{path.name}.tmp")
    half.write_text(path.name + (starts.read_text() if fault == "nondeterministic" else ""))
    half.replace(path)
    if fault == "extra_file" and len(starts.read_text()) > 1:
        path.with_name("more").touch()
"""


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("resume")


@pytest.fixture
def fake_run(tool, tmp_path):
    """Return the command line of a fake run with a fault, or "none"."""

    def command(fault: str) -> list[str]:
        (tmp_path / "fake_run.py").write_text(FAKE_RUN)
        paths = dict.fromkeys(stage.ends for stage in tool.list_stages(tool.ROUNDS))
        return [sys.executable, str(tmp_path / "fake_run.py"), fault, *paths]

    return command


def test_each_stage_is_killed_once_before_any_twice(tool):
    stages = tool.list_stages(1)
    # 2 at the start, 7 in the round, 5 in rebirth, 1 at the end
    assert len(stages) == 15
    few, many = (tool.sample_kills(stages, num_kills=kills, seed=1) for kills in (15, 20))
    assert [kill.stage for kill in few] == stages
    indices = [stages.index(kill.stage) for kill in many]
    assert indices == sorted(indices) and set(indices) == set(range(15)) and len(indices) == 20
    assert all(0 <= kill.fraction < 1 and 1 <= kill.count <= 3 for kill in many)
    assert tool.sample_kills(stages, num_kills=20, seed=1) == many != tool.sample_kills(stages, num_kills=20, seed=2)


def test_each_stage_starts_where_an_earlier_one_ends(tool):
    ends = [""]
    for stage in tool.list_stages(2):
        assert stage.begins in ends
        ends.append(stage.ends)
    assert ends[-1] == "run/summary.json"


def test_a_correct_run_is_identical(tool, fake_run, tmp_path):
    result = tool.run_test(fake_run("none"), tmp_path, name="1", num_kills=6, seed=3)
    assert tool.is_identical(result) and len(result["kills"]) == 6
    assert {"run/summary.json", "run/round_1/adapter", "run/round_2/steps.jsonl"} <= set(result["files"])
    assert not any(name.startswith(("README", "log_")) for name in result["files"])
    targets, hits = ([kill[key] for kill in result["kills"]] for key in ("target", "stage"))
    stages = [stage.name for stage in tool.list_stages(tool.ROUNDS) if not stage.checkpoints]
    for target, hit in zip(targets, hits, strict=True):
        if target in stages:  # at its end the next stage may have started
            assert stages.index(hit) - stages.index(target) in (0, 1)
    assert all(kill["resumed with"] and not kill["ended"] for kill in result["kills"])
    tool.report({"1": result})


def test_a_run_is_killed_while_it_writes_a_checkpoint(tool, fake_run, tmp_path):
    stages = {stage.name: stage for stage in tool.list_stages(tool.ROUNDS)}
    trial = tool.Trial(fake_run("none"), tmp_path / "trial")
    kill = tool.Kill(stages["round 2: saving a checkpoint"], fraction=0.0, count=3)
    state = trial.kill_at(kill, dict.fromkeys(stages, 0.02))
    # Two are complete; the third is partial, or was completed just before the kill.
    folder = "run/round_2/checkpoints"
    assert state["temporary"][-2:] == [f"{folder}/step_0", f"{folder}/step_1"]
    assert [name.count("step_2") for name in state["temporary"]].count(1) == 1 and not state["ended"]


@pytest.mark.parametrize(("fault", "verdict"), [("nondeterministic", "differs"), ("extra_file", "unexpected")])
def test_a_fault_is_detected(tool, fake_run, tmp_path, fault, verdict):
    result = tool.run_test(fake_run(fault), tmp_path, name="1", num_kills=2, seed=0)
    assert not tool.is_identical(result) and verdict in result["files"].values()


def test_times_and_temporary_files_are_ignored(tool, tmp_path):
    complete, interrupted = tmp_path / "complete", tmp_path / "interrupted"
    (complete / "run").mkdir(parents=True)
    (complete / "run" / "steps.jsonl").write_text(json.dumps({"step": 0, "loss": 0.5, "seconds": 1.0}) + "\n")
    (complete / "run" / "scores.jsonl").write_text(
        json.dumps({"judge_info": {"judge": "rule", "date": "today"}}) + "\n"
    )
    shutil.copytree(complete, interrupted)
    (interrupted / "run" / "steps.jsonl").write_text(json.dumps({"step": 0, "loss": 0.5, "seconds": 2.0}) + "\n")
    (interrupted / "run" / "scores.jsonl").write_text(
        json.dumps({"judge_info": {"judge": "rule", "date": "later"}}) + "\n"
    )
    (interrupted / "run" / ".scores.jsonl.7.tmp").touch()
    (interrupted / "run" / "events.out.tfevents.1").touch()
    verdicts = tool.compare(complete, interrupted)
    assert verdicts == {
        "run/.scores.jsonl.7.tmp": "left over", "run/scores.jsonl": "identical", "run/steps.jsonl": "identical",
    }  # fmt: skip
    assert tool.is_identical({"files": verdicts})
    (interrupted / "run" / "steps.jsonl").write_text(json.dumps({"step": 0, "loss": 0.6, "seconds": 1.0}) + "\n")
    (interrupted / "run" / "scores.jsonl").unlink()
    (interrupted / "run" / "checkpoints").mkdir()
    (interrupted / "run" / "checkpoints" / "step_1").touch()
    verdicts = tool.compare(complete, interrupted)
    assert verdicts["run/steps.jsonl"] == "differs" and verdicts["run/scores.jsonl"] == "missing"
    assert verdicts["run/checkpoints/step_1"] == "unexpected" and not tool.is_identical({"files": verdicts})


def test_a_failing_run_is_reported(tool, tmp_path):
    trial = tool.Trial([sys.executable, "-c", "raise SystemExit('no such clip')"], tmp_path / "trial")
    with pytest.raises(RuntimeError, match="no such clip"):
        trial.finish()
    kill = tool.sample_kills(tool.list_stages(1), num_kills=1, seed=0)[0]
    with pytest.raises(RuntimeError, match=r"(?s)start 2 .*no such clip"):
        trial.kill_at(kill, {kill.stage.name: 600.0})


def test_the_smallest_run_has_all_stages(tool, load_recipe):
    """The recipe accepts the flags, and writes to the folder that the stages expect."""
    command = tool.command(2, ["--strategy", "zero3"])
    assert "--nproc_per_node=2" in command and command[-2:] == ["--strategy", "zero3"]
    flags = [part for part in command if part.startswith("--") and "nproc" not in part and part != "--standalone"]
    recipe = load_recipe("mrdpo")
    config = parse_config(recipe.MrDpoConfig, description="", args=flags[:-1])
    assert (str(config.out), config.rounds, config.num_questions) == ("run", tool.ROUNDS, 1)
    assert 3 * config.fit.checkpoint_every < config.fit.num_steps
