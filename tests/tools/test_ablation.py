"""The ablation: shared stages, the order of runs, and intervals and verdicts by hand."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from salmonn.files import write_json, write_records
from salmonn.records import Caption, JudgeInfo, Question, Reference, Score
from salmonn.score.formats import write_scores
from salmonn.score.stats import Interval
from tests.launch import forked
from tests.limits import RUN_SECONDS

# Clips of three seconds with one or two objects and one sound, and few steps, yet captions of different quality.
SMALLEST_RUN = {
    "synth.clips": 6, "synth.min_seconds": 3, "synth.max_seconds": 3, "synth.min_visual": 1, "synth.max_visual": 2,
    "synth.min_sounds": 1, "synth.max_sounds": 1, "heldout_clips": 2, "kl.num_clips": 1, "sampling.num_samples": 3,
    "sampling.temperature": 1.2, "sampling.max_new_tokens": 30, "selection.min_gap": 0.0001, "fit.batch_size": 4,
    "rebirth": "null",
}  # fmt: skip


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("ablation")


@pytest.fixture(scope="module")
def finished(tool, tmp_path_factory) -> Path:
    """The folder of real runs of two variants on one seed."""
    out = tmp_path_factory.mktemp("ablation")
    flags = [f"--{name}={value}" for name, value in SMALLEST_RUN.items()]
    args = ["--out", str(out), "--seeds", "2", "--variants", "mrdpo", "fixed_pairs", "--rounds=2", "--steps=2", *flags]
    command = tool.Ablation.command
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tool.Ablation, "command", lambda *args: forked(*command(*args)))
        tool.main(args)
    return out


@pytest.mark.slow
def test_copied_stages_equal_those_of_a_complete_run(tool, finished, tmp_path):
    """The first round on the same pairs is copied; a run without copied stages gives the same bytes."""
    extra = tuple(f"--{name}={value}" for name, value in SMALLEST_RUN.items())
    ablation = tool.Ablation(tmp_path, rounds=2, steps=2, extra=extra)
    line = [*ablation.command("fixed_pairs", 2), f"--clips_dir={finished / 'clips'}"]
    env = tool.one_thread()
    result = subprocess.run(forked(*line), capture_output=True, text=True, timeout=RUN_SECONDS, env=env, check=False)
    assert result.returncode == 0, result.stderr
    complete, shared = ablation.folder("fixed_pairs", 2), finished / "seed_2" / "fixed_pairs"
    names = ("round_1/pairs.jsonl", "round_1/merged/model.safetensors", "round_2/merged/model.safetensors")
    for name in (*names, "round_2/heldout/captions.jsonl", "round_2/heldout/kl_1.json"):
        ours, theirs = (folder / name for folder in (complete, shared))
        if name.endswith("captions.jsonl"):  # they contain the model's path
            assert [json.loads(line)["text"] for line in ours.open()] == [
                json.loads(line)["text"] for line in theirs.open()
            ]
        else:
            assert ours.read_bytes() == theirs.read_bytes(), name
    assert not (shared / "round_2" / "pairs.jsonl").exists()
    full = finished / "seed_2" / "mrdpo" / "round_2"
    assert (full / "pairs.jsonl").is_file()
    assert (full / names[1].removeprefix("round_1/")).read_bytes() != (shared / names[2]).read_bytes()


def test_results_of_a_real_run(tool, finished):
    results = json.loads((finished / "results.json").read_text())
    assert results["seeds"] == [2] and set(results["rows"]) == {"sft", "mrdpo", "fixed_pairs"}
    for name, variant in (("mrdpo", "mrdpo"), ("fixed_pairs", "fixed_pairs")):
        summary = json.loads((finished / "seed_2" / variant / "summary.json").read_text())
        last, row = summary["rounds"][-1], results["rows"][name]
        for measure in ("total", "missing", "hallucination", "repetition", "qa_accuracy"):
            assert row[measure]["mean"] == pytest.approx(last[measure])
            assert row[measure]["low"] <= last[measure] <= row[measure]["high"]
        assert row["kl"] == {"mean": summary["kl"]["round 2"], "seeds": [summary["kl"]["round 2"]]}
        assert row["kl"]["mean"] > 0
    (finding,) = results["hypotheses"]
    assert (finding["text"], finding["first"]) == ("new pairs each round", "fixed_pairs")
    change = results["rows"]["mrdpo"]["total"]["mean"] - results["rows"]["fixed_pairs"]["total"]["mean"]
    assert finding["differences"]["total"]["mean"] == pytest.approx(change) and not results["stopped"]
    assert "| SFT |" in (finished / "table.md").read_text()


def test_finished_runs_are_skipped(tool, finished, capsys):
    stamps = {path: path.stat().st_mtime_ns for path in finished.glob("seed_2/*/log.txt")}
    tool.main(["--out", str(finished), "--seeds", "2", "--variants", "mrdpo", "fixed_pairs"])
    assert len(stamps) == 2 and all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert "done in" not in capsys.readouterr().out


FAKE_RECIPE = """
import sys, time
from pathlib import Path
folder, log, code = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
started = time.time()
time.sleep(0.3)
with log.open("a") as file:
    file.write(f"{folder.parent.name} {folder.name} {started} {time.time()}\\n")
if not code:
    (folder / "summary.json").write_text("{}")
sys.exit(code)
"""


@pytest.fixture
def fake_recipe(tool, monkeypatch, tmp_path):
    """Replace the recipe by a script that logs its runs; yield the set of (variant, seed) that fail."""
    failing = set()

    def command(self, variant, seed):
        code = int((variant, seed) in failing)
        args = [self.folder(variant, seed), tmp_path / "runs.log", code]
        return [sys.executable, "-c", FAKE_RECIPE, *map(str, args)]

    monkeypatch.setattr(tool.Ablation, "command", command)
    return failing


def read_run_log(tmp_path) -> dict[tuple[str, str], tuple[float, float]]:
    entries = [line.split() for line in (tmp_path / "runs.log").read_text().splitlines()]
    return {(seed, variant): (float(started), float(finished_at)) for seed, variant, started, finished_at in entries}


def test_two_runs_at_a_time_and_shared_ones_first(tool, fake_recipe, tmp_path):
    ablation = tool.Ablation(tmp_path / "out", seeds=(2, 3), variants=("mrdpo", "no_ce", "fixed_reference"))
    tool.run_all(ablation)
    runs = read_run_log(tmp_path)
    assert len(runs) == 6
    for (seed, variant), (started, _) in runs.items():
        assert variant == "mrdpo" or started >= runs[seed, "mrdpo"][1]
        assert sum(first <= started < last for first, last in runs.values()) <= 2
    assert min(started for started, _ in runs.values()) < min(finished_at for _, finished_at in runs.values())


def test_a_failed_run_is_reported_and_the_others_continue(tool, fake_recipe, tmp_path, capsys):
    fake_recipe |= {("mrdpo", 2), ("no_ce", 3)}
    ablation = tool.Ablation(tmp_path / "out", seeds=(2, 3), variants=("mrdpo", "no_ce", "fixed_reference"))
    with pytest.raises(
        SystemExit, match=r"2 runs failed, see .*seed_2/mrdpo/log.txt first. Run the same command to resume"
    ):
        tool.run_all(ablation)
    assert set(read_run_log(tmp_path)) == {("seed_2", "mrdpo"), *(("seed_3", variant) for variant in ablation.variants)}
    assert capsys.readouterr().out.count("FAILED") == 2
    fake_recipe.clear()
    tool.run_all(ablation)
    assert len(read_run_log(tmp_path)) == 6


def test_a_second_command_waits_for_runs_of_the_first(tool, fake_recipe, tmp_path, capsys):
    with tool.lock_folder(tmp_path / "out") as lock:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1)"], pass_fds=(lock,))
    started = time.monotonic()  # the first command has ended, but not its child
    tool.run_all(tool.Ablation(tmp_path / "out", seeds=(2,), variants=("mrdpo",)))
    assert child.wait() == 0 and time.monotonic() - started > 0.7
    assert "waiting for runs" in capsys.readouterr().out


def test_shared_files_are_copied(tool, tmp_path):
    base, folder = tmp_path / "mrdpo", tmp_path / "variants"
    for name in ("sft/heldout/rates.json", "round_1/pairs.jsonl", "round_1/merged/config.json", "round_2/pairs.jsonl"):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(name)
    for name in ("round_1/captions.jsonl", "round_1/scores.jsonl", "rebirth/captions.jsonl", "rebirth/steps.jsonl"):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(name)

    def copied(variant):
        tool.copy_shared(variant, folder / variant, base)
        files = [path for path in (folder / variant).rglob("*") if path.is_file()]
        assert all(path.read_text() == str(path.relative_to(folder / variant)) for path in files)
        return {str(path.relative_to(folder / variant)) for path in files}

    sampled = {f"round_1/{name}.jsonl" for name in ("captions", "scores", "pairs")}
    assert copied("no_ce") == copied("long_dpo") == {"sft/heldout/rates.json"} | sampled
    assert copied("fixed_reference") == {"sft/heldout/rates.json", "round_1/merged/config.json"} | sampled
    assert copied("tune_best") == copied("fixed_reference") | {"round_2/pairs.jsonl", "rebirth/captions.jsonl"}
    (folder / "fixed_reference" / "round_1" / "pairs.jsonl").unlink()
    tool.copy_shared("fixed_reference", folder / "fixed_reference", base)  # a started run is not changed
    assert not (folder / "fixed_reference" / "round_1" / "pairs.jsonl").exists()


def test_rounds_and_steps_of_a_variant(tool, tmp_path):
    ablation = tool.Ablation(tmp_path, extra=("--synth.clips=9",))
    for variant, rounds, steps in (("long_dpo", 1, 150), ("mrdpo", 3, 50), ("fixed_reference", 3, 50)):
        line = ablation.command(variant, 4)
        assert f"--rounds={rounds}" in line and f"--fit.steps={steps}" in line
        assert {"--seed=4", "--synth.seed=204", "--synth.clips=9"} <= set(line)


def test_intervals_by_hand(tool):
    no_resamples = np.zeros((3, 0))
    # Mean 2, standard deviation 1: 4.302653 / sqrt(3) = 2.484138 either way.
    interval = tool.Estimate(np.array([1.0, 2.0, 3.0]), no_resamples).interval()
    assert (interval.low, interval.high) == pytest.approx((-0.484138, 4.484138), abs=1e-6)
    # The seeds agree, so only the resampled clips count: of -10 to 10 the middle 95 % are from -9.5 to 9.5.
    resamples = np.tile(np.linspace(-10, 10, 2001), (3, 1))
    interval = tool.Estimate(np.zeros(3), resamples).interval()
    assert (interval.low, interval.high) == pytest.approx((-9.5, 9.5))
    # Each end is the wider of the two.
    interval = tool.Estimate(np.array([1.0, 2.0, 3.0]), resamples / 10 + 2).interval()
    assert (interval.low, interval.high) == pytest.approx((-0.484138, 4.484138), abs=1e-6)
    assert tool.Estimate(np.array([1.0]), np.zeros((1, 0))).interval() is None


@pytest.mark.parametrize("spread_of_seeds", [0.02, 0.04])
def test_intervals_cover_the_truth(tool, spread_of_seeds):
    """3 seeds of 160 clips around 0: 93 % of the intervals contain 0, unlike those of a bootstrap over clips."""
    rng, num_covered, num_covered_clips_only = np.random.default_rng(0), 0, 0
    weights = rng.multinomial(160, np.full(160, 1 / 160), size=500) / 160
    for _ in range(400):
        values = rng.normal(0, spread_of_seeds, (3, 1)) + rng.normal(0, 0.2, (3, 160))
        resamples = values @ weights.T
        interval = tool.Estimate(values.mean(1), resamples).interval()
        num_covered += interval.low <= 0 <= interval.high
        low, high = np.quantile(resamples.mean(0), [0.025, 0.975])
        num_covered_clips_only += low <= 0 <= high
    assert num_covered >= 0.93 * 400 and num_covered_clips_only < 0.85 * 400, (
        num_covered / 400,
        num_covered_clips_only / 400,
    )


@pytest.mark.parametrize(
    ("seeds", "falls", "rises"),
    [
        ((-0.11, -0.10, -0.09), "supported", "contradicted"),  # -0.10 +- 4.303 * 0.01 / sqrt(3) = 0.025
        ((0.11, 0.10, 0.09), "contradicted", "supported"),
        ((-0.15, -0.10, -0.05), "inconclusive", "inconclusive"),  # -0.10 +- 0.124
    ],
)
def test_verdicts(tool, seeds, falls, rises):
    difference = tool.Estimate(np.array(seeds), np.zeros((3, 0)))
    for direction, verdict in (("falls", falls), ("rises", rises)):
        assert tool.judge(tool.Hypothesis("", "a", "b", "total", direction), difference) == verdict


def test_goals_of_a_run(tool):
    sft = {"total": 0.6, "missing": 0.5, "hallucination": 0.1, "repetition": 0.02, "qa_accuracy": 0.7}
    last = {"total": 0.33, "missing": 0.2, "hallucination": 0.13, "repetition": 0.02, "qa_accuracy": 0.6}
    rebirth = last | {"total": 0.4, "qa_accuracy": 0.695}
    goals = tool.check_goals({"sft": sft, "rounds": [{}, last], "rebirth": rebirth})
    # 0.33 is 55 % of 0.6; rebirth keeps 0.2 of the gain of 0.27, which is 74 %.
    assert goals == {
        "Total falls by 45 %": True, "Missing falls": True, "Hallucination falls": False,
        "Repetition does not rise": True, "rebirth keeps 90 % of the gain": False,
        "QA accuracy of rebirth within 1 point of SFT": True,
    }  # fmt: skip
    assert len(tool.check_goals({"sft": sft, "rounds": [last], "rebirth": None})) == 4


def write_results(folder, missing, num_right_answers, *, seed):
    """Write results on two held-out clips of 4 and 6 events, with 1 and 3 questions: missing events, right answers."""
    clips = (("a.mp4", 4, 1), ("b.mp4", 6, 3))
    references = [
        Reference(name, questions=tuple(Question(f"{number}?", "yes") for number in range(count)))
        for name, _, count in clips
    ]
    write_records(folder.parents[2] / "clips" / f"seed{1_000_200 + seed}-2" / "clips.jsonl", references)
    scores = [
        Score(
            name,
            num_events=events,
            missing=num_missing,
            incorrect=0,
            hallucinated=1,
            num_words=10,
            num_repeated_words=num_missing,
        )
        for (name, events, _), num_missing in zip(clips, missing, strict=True)
    ]
    write_scores(folder / "heldout" / "scores.jsonl", JudgeInfo("rule", "", "salmonn", "", ""), scores)
    answers = [
        Caption(name, "Yes." if number < num_right else "no", prompt=f"{number}?")
        for (name, _, count), num_right in zip(clips, num_right_answers, strict=True)
        for number in range(count)
    ]
    write_records(folder / "heldout" / "answers.jsonl", answers)


@pytest.fixture
def known_results(tool, tmp_path):
    """Two variants on two seeds with known results."""
    results = {
        (2, "mrdpo", "sft"): ((2, 3), (1, 2)), (2, "mrdpo", "round_1"): ((1, 1), (1, 3)),
        (3, "mrdpo", "sft"): ((4, 6), (0, 0)), (3, "mrdpo", "round_1"): ((2, 2), (0, 3)),
        (2, "no_ce", "round_1"): ((1, 1), (1, 3)), (3, "no_ce", "round_1"): ((2, 2), (0, 3)),
    }  # fmt: skip
    for (seed, variant, stage), (missing, right) in results.items():
        folder = tmp_path / f"seed_{seed}" / variant
        write_results(folder / stage, missing, right, seed=seed)
        kl = {"round 1": seed / 10}
        stopped = "too few pairs" if (seed, variant) == (3, "no_ce") else None
        rates = dict.fromkeys(tool.RATES, 0.5) | {"clips": 2}
        summary = {"sft": rates, "rounds": [rates], "rebirth": None, "kl": kl, "stopped": stopped}
        write_json(folder / "summary.json", summary)
    return tool.Ablation(tmp_path, seeds=(2, 3), variants=("mrdpo", "no_ce"))


def test_rows_by_hand(tool, known_results):
    rows = tool.read_estimates(known_results)
    assert list(rows) == ["sft", "mrdpo", "no_ce"]
    # Seed 2: 5 of 10 events missing, 2 hallucinated; seed 3: all missing. Questions: 3 of 4, and none.
    assert rows["sft"]["missing"].seeds.tolist() == [0.5, 1.0] and rows["sft"]["total"].seeds.tolist() == [0.7, 1.2]
    assert rows["sft"]["repetition"].seeds.tolist() == [0.25, 0.5]
    assert rows["sft"]["qa_accuracy"].seeds.tolist() == [0.75, 0.0]
    assert rows["sft"]["kl"].seeds.tolist() == [0.0, 0.0] and rows["mrdpo"]["kl"].seeds.tolist() == [0.2, 0.3]
    # Resamples of two clips: the first twice (4 of 8), both (5 of 10) or the second twice (6 of 12).
    assert set(rows["sft"]["missing"].resamples[0].tolist()) == {4 / 8, 5 / 10, 6 / 12}
    assert set(rows["mrdpo"]["missing"].resamples[0].tolist()) == {2 / 8, 2 / 10, 2 / 12}


def test_variants_share_their_resamples(tool, known_results):
    rows = tool.read_estimates(known_results)
    same = rows["no_ce"]["total"] - rows["mrdpo"]["total"]
    assert (same.mean, same.interval()) == (0.0, Interval(0.0, 0.0))
    better = rows["mrdpo"]["missing"] - rows["sft"]["missing"]
    assert better.seeds == pytest.approx([-0.3, -0.6])
    # Seed 2: from 4 to 2 of 8, from 5 to 2 of 10, from 6 to 2 of 12.
    assert sorted(set(better.resamples[0].round(6).tolist())) == pytest.approx([-4 / 12, -3 / 10, -2 / 8], abs=1e-6)


def test_the_table(tool, known_results, capsys):
    tool.report(known_results)
    lines = (known_results.out / "table.md").read_text().splitlines()
    # SFT's repetition: 0.25 and 0.5, mean 0.375, standard deviation 0.176777: 0.375 +- 12.7062 * 0.125 = 1.58828.
    (sft,) = (line for line in lines if line.startswith("| SFT |"))
    (no_ce,) = (line for line in lines if line.startswith("| mrDPO without CE |"))
    assert sft.startswith("| SFT | 95.0 (") and "| 37.5 (-121.3 to 196.3) |" in sft and sft.endswith("| 41.8 |")
    assert no_ce.endswith("|  |")
    assert "| 2 | SFT | 50.0 | 50.0 | 50.0 | 50.0 | 50.0 |" in lines
    assert "seed 3: Missing falls: NO" in lines and "seed 3: Repetition does not rise: yes" in lines
    claims = [line for line in lines if line.startswith("| CE vs. none")]
    assert [claim.split(" | ")[1] for claim in claims] == ["+0.0 (+0.0 to +0.0)"] * 2
    assert all(claim.endswith("| inconclusive |") for claim in claims)
    assert "mrDPO without CE" in capsys.readouterr().out
    assert "seed_3/no_ce stopped early: too few pairs" in lines


def test_invalid_options_are_rejected(tool, capsys):
    for args in (["--variants", "no_ce"], ["--jobs", "0"]):
        with pytest.raises(SystemExit):
            tool.main(args)
        assert "needs mrdpo" in capsys.readouterr().err
