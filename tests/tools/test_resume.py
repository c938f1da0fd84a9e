"""The kill test, on a stand-in for a run: where it strikes, and what it finds wrong."""

import json
import shutil
import sys

import pytest

from salmonn.config import parse_config

# Writes a run's files in their order, a step each, and goes on where it was. With a flaw it is not what it was before:
# "forgets" writes a weight by how often it was started, "litters" leaves a file.
STAND_IN = """
import json, sys, time
from pathlib import Path

flaw, *paths = sys.argv[1:]
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
    half.write_text(path.name + (starts.read_text() if flaw == "forgets" else ""))
    half.replace(path)
    if flaw == "litters" and len(starts.read_text()) > 1:
        path.with_name("more").touch()
"""


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("resume")


@pytest.fixture
def stand_in(tool, tmp_path):
    """The command line of a stand-in with a flaw, or with none."""

    def line(flaw: str) -> list[str]:
        (tmp_path / "stand_in.py").write_text(STAND_IN)
        paths = dict.fromkeys(stage.ends for stage in tool.list_stages(tool.ROUNDS))
        return [sys.executable, str(tmp_path / "stand_in.py"), flaw, *paths]

    return line


def test_each_stage_is_hit_before_any_is_hit_again(tool):
    stages = tool.list_stages(1)
    # 2 at the start, 7 in the round, 5 in rebirth, 1 at the end
    assert len(stages) == 15
    few, many = (tool.sample_kills(stages, num_kills=kills, seed=1) for kills in (15, 20))
    assert [kill.stage for kill in few] == stages
    places = [stages.index(kill.stage) for kill in many]
    assert places == sorted(places) and set(places) == set(range(15)) and len(places) == 20
    assert all(0 <= kill.fraction < 1 and 1 <= kill.count <= 3 for kill in many)
    assert tool.sample_kills(stages, num_kills=20, seed=1) == many != tool.sample_kills(stages, num_kills=20, seed=2)


def test_each_stage_begins_where_one_before_ends(tool):
    ends = [""]
    for stage in tool.list_stages(2):
        assert stage.begins in ends
        ends.append(stage.ends)
    assert ends[-1] == "run/summary.json"


def test_a_sound_run_is_found_sound(tool, stand_in, tmp_path):
    result = tool.run_test(stand_in("none"), tmp_path, name="1", num_kills=6, seed=3)
    assert tool.is_identical(result) and len(result["kills"]) == 6
    assert {"run/summary.json", "run/round_1/adapter", "run/round_2/steps.jsonl"} <= set(result["files"])
    assert not any(name.startswith(("README", "log_")) for name in result["files"])
    aimed, found = ([kill[key] for kill in result["kills"]] for key in ("target", "stage"))
    stages = [stage.name for stage in tool.list_stages(tool.ROUNDS) if not stage.checkpoints]
    for wanted, seen in zip(aimed, found, strict=True):
        if wanted in stages:  # at its end the next may have begun
            assert stages.index(seen) - stages.index(wanted) in (0, 1)
    assert all(kill["resumed with"] and not kill["ended"] for kill in result["kills"])
    tool.report({"1": result})


def test_a_checkpoint_is_hit_while_it_is_written(tool, stand_in, tmp_path):
    stages = {stage.name: stage for stage in tool.list_stages(tool.ROUNDS)}
    trial = tool.Trial(stand_in("none"), tmp_path / "trial")
    kill = tool.Kill(stages["round 2: saving a checkpoint"], fraction=0.0, count=3)
    moment = trial.kill_at(kill, dict.fromkeys(stages, 0.02))
    # Two are whole, the third is half written, or whole by the time that it is hit.
    folder = "run/round_2/checkpoints"
    assert moment["temporary"][-2:] == [f"{folder}/step_0", f"{folder}/step_1"]
    assert [name.count("step_2") for name in moment["temporary"]].count(1) == 1 and not moment["ended"]


@pytest.mark.parametrize(("flaw", "verdict"), [("forgets", "differs"), ("litters", "unexpected")])
def test_a_flaw_is_found(tool, stand_in, tmp_path, flaw, verdict):
    result = tool.run_test(stand_in(flaw), tmp_path, name="1", num_kills=2, seed=0)
    assert not tool.is_identical(result) and verdict in result["files"].values()


def test_times_and_temporary_files_harm_nothing(tool, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    (whole / "run").mkdir(parents=True)
    (whole / "run" / "steps.jsonl").write_text(json.dumps({"step": 0, "loss": 0.5, "seconds": 1.0}) + "\n")
    (whole / "run" / "scores.jsonl").write_text(json.dumps({"judge_info": {"judge": "rule", "date": "today"}}) + "\n")
    shutil.copytree(whole, broken)
    (broken / "run" / "steps.jsonl").write_text(json.dumps({"step": 0, "loss": 0.5, "seconds": 2.0}) + "\n")
    (broken / "run" / "scores.jsonl").write_text(json.dumps({"judge_info": {"judge": "rule", "date": "later"}}) + "\n")
    (broken / "run" / ".scores.jsonl.7.tmp").touch()
    (broken / "run" / "events.out.tfevents.1").touch()
    verdicts = tool.compare(whole, broken)
    assert verdicts == {
        "run/.scores.jsonl.7.tmp": "left over", "run/scores.jsonl": "identical", "run/steps.jsonl": "identical",
    }  # fmt: skip
    assert tool.is_identical({"files": verdicts})
    (broken / "run" / "steps.jsonl").write_text(json.dumps({"step": 0, "loss": 0.6, "seconds": 1.0}) + "\n")
    (broken / "run" / "scores.jsonl").unlink()
    (broken / "run" / "checkpoints").mkdir()
    (broken / "run" / "checkpoints" / "step_1").touch()
    verdicts = tool.compare(whole, broken)
    assert verdicts["run/steps.jsonl"] == "differs" and verdicts["run/scores.jsonl"] == "missing"
    assert verdicts["run/checkpoints/step_1"] == "unexpected" and not tool.is_identical({"files": verdicts})


def test_a_run_that_fails_is_told(tool, tmp_path):
    trial = tool.Trial([sys.executable, "-c", "raise SystemExit('no such clip')"], tmp_path / "trial")
    with pytest.raises(RuntimeError, match="no such clip"):
        trial.finish()
    kill = tool.sample_kills(tool.list_stages(1), num_kills=1, seed=0)[0]
    with pytest.raises(RuntimeError, match=r"(?s)start 2 .*no such clip"):
        trial.kill_at(kill, {kill.stage.name: 600.0})


def test_the_smallest_run_has_all_stages(tool, load_recipe):
    """The flags are the recipe's, and the folder within a trial is where the stages look."""
    line = tool.command(2, ["--strategy", "zero3"])
    assert "--nproc_per_node=2" in line and line[-2:] == ["--strategy", "zero3"]
    flags = [part for part in line if part.startswith("--") and "nproc" not in part and part != "--standalone"]
    recipe = load_recipe("mrdpo")
    config = parse_config(recipe.MrDpoConfig, description="", args=flags[:-1])
    assert (str(config.out), config.rounds, config.num_questions) == ("run", tool.ROUNDS, 1)
    assert 3 * config.fit.checkpoint_every < config.fit.num_steps
