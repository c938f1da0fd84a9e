"""Real runs of mrDPO: its files, resuming after kills, two processes, and rejected configurations."""

import json
import shutil
import signal
import sqlite3
import subprocess
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from salmonn.files import append_record, read_records, write_json, write_records
from salmonn.model.loading import load_network
from salmonn.model.lora import LoraConfig, attach_lora, read_factors
from salmonn.preference.losses import LossConfig
from salmonn.preference.reward import JudgeReward, RewardConfig
from salmonn.preference.selection import SelectionConfig
from salmonn.preference.subset import SubsetConfig
from salmonn.preference.voter_reward import win_probability
from salmonn.records import Caption, Comparison, Question, Reference
from salmonn.score.config import JudgeConfig
from salmonn.score.formats import read_scores
from salmonn.score.judge import ScoringTask
from salmonn.score.metrics import Rates
from salmonn.synthetic.judge import RuleJudge
from salmonn.synthetic.raters import caption_traits, make_voter
from salmonn.train.kl import KLConfig
from salmonn.train.loop import FitConfig
from salmonn.train.mrdpo import MrDpoConfig, RebirthConfig, load_data, print_memory_plan
from salmonn.train.reward import RewardTrainingConfig
from salmonn.train.run_log import RewardRound
from salmonn.train.sampling import SampleConfig
from salmonn.train.server_sampling import SamplerConfig, ServerSampler
from tests.launch import forked
from tests.limits import RUN_SECONDS
from tests.score.fake_llm_server import rule_judge_script

ROUND = {
    "rounds": 1, "sampling.num_samples": 4, "sampling.temperature": 0.9, "sampling.max_new_tokens": 30,
    "selection.min_gap": 0.0001, "fit.steps": 2, "fit.batch_size": 4, "fit.warmup_ratio": 0.5,
    "fit.learning_rate": 0.002, "fit.checkpoint_every": 1, "rebirth.fit.checkpoint_every": 1, "sampling.batch_size": 16,
    "early_stopping.max_worsening": 9, "early_stopping.min_pairs": 1, "early_stopping.min_margin": "null",
    "kl.num_clips": 2, "kl.every": 1,
    "rebirth.fit.steps": 2, "rebirth.fit.batch_size": 4, "rebirth.fit.warmup_ratio": 0.5,
}  # fmt: skip
RATES = {
    "missing", "hallucination", "incorrect", "hallucinated", "total", "repetition", "qa_accuracy", "clips", "captions",
    "words", "cut_off", "audio_share", "order",
}  # fmt: skip
MODEL = ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
MEASURED = [f"heldout/{name}" for name in ("answers.jsonl", "captions.jsonl", "rates.json", "scores.jsonl")]
EXPECTED_FILES = {
    "mrdpo.yaml",
    "settings.json",
    "rounds.jsonl",
    "summary.json",
    "summary.png",
    *(f"sft/{name}" for name in MEASURED),
    *(f"round_1/{name}" for name in [*MEASURED, "heldout/kl_2.json", *(f"merged/{part}" for part in MODEL)]),
    "round_1/reference_logps.json",
    *(f"round_1/{name}.jsonl" for name in ("captions", "scores", "pairs", "steps")),
    *(
        f"{stage}/adapter/adapter_{part}"
        for stage in ("round_1", "rebirth")
        for part in ("config.json", "model.safetensors")
    ),
    *(f"rebirth/{name}" for name in [*MEASURED, "heldout/kl_2.json", *(f"merged/{part}" for part in MODEL)]),
    "rebirth/captions.jsonl",
    "rebirth/steps.jsonl",
}


@pytest.fixture(scope="session")
def flags(trained_model, sizes):
    """Flags of all runs here, except for `out` and for features on disk in some tests."""
    return (
        sizes
        | ROUND
        | {"model": trained_model / "model", "clips_dir": trained_model / "clips", "feature_cache.folder": "null"}
    )


@pytest.fixture(scope="session")
def finished(shared, launch, flags):
    """The folder of an uninterrupted run of one process."""

    def make(folder):
        result = launch("mrdpo", processes=1, out=folder, **flags)
        assert result.returncode == 0, result.stderr
        folder.with_suffix(".out").write_text(result.stdout + result.stderr)

    return shared("mrdpo", make)


def files_of(folder) -> set[str]:
    """Return all files except TensorBoard's, whose names contain time and machine, and PEFT's model card."""
    excluded = ("events.out", "README.md")
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(excluded)
    }


def weights(folder) -> dict[str, torch.Tensor]:
    return load_network(folder).state_dict()


def test_files_and_summary(finished):
    assert files_of(finished) == EXPECTED_FILES
    summary = json.loads((finished / "summary.json").read_text())
    names = {"sft", "rounds", "rebirth", "kl", "best", "stopped", "reward", "proxy"}
    assert set(summary) == names and len(summary["rounds"]) == 1 and summary["reward"] == []
    assert set(summary["kl"]) == {"round 1", "rebirth"} and min(summary["kl"].values()) > 0
    lines = [json.loads(line) for line in (finished / "rounds.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["SFT", "round 1", "rebirth"]
    assert lines[1]["kl"] == summary["kl"]["round 1"] and lines[2]["total"] == summary["rebirth"]["total"]
    assert summary["best"] == "round_1" and summary["stopped"] is None
    for stage in (summary["sft"], *summary["rounds"], summary["rebirth"]):
        assert set(stage) == RATES and stage["clips"] == 3 and 0 <= stage["qa_accuracy"] <= 1
    assert (finished / "summary.png").read_bytes().startswith(b"\x89PNG")
    output = finished.with_suffix(".out").read_text()
    assert all(word in output for word in ("SFT", "round 1", "rebirth", "Missing %"))


def test_records_of_a_round_are_consistent(finished):
    folder = finished / "round_1"
    captions, scored = read_records(folder / "captions.jsonl", Caption), read_scores(folder / "scores.jsonl")
    scores = scored.scores
    assert scored.judge_info.judge == "rule" and not scored.unscored
    assert len(captions) == 32 and len({caption.text for caption in captions}) > 8  # 8 clips, 4 samples
    assert [(caption.video, caption.sample) for caption in captions] == [
        (score.video, score.sample) for score in scores
    ]
    score_of = {(caption.video, caption.text): score for caption, score in zip(captions, scores, strict=True)}
    pairs = read_records(folder / "pairs.jsonl", Comparison)
    assert pairs
    for pair in pairs:
        gap = score_of[pair.video, pair.rejected].total - score_of[pair.video, pair.chosen].total
        assert pair.margin == pytest.approx(gap) and gap > 0 and pair.chosen_finished and pair.ground_truth
        assert pair.source == "rule"
    steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    # The first step's policy is its reference: log 2.
    assert [step["step"] for step in steps] == [0, 1] and steps[0]["dpo"] == pytest.approx(0.6931, abs=1e-3)


def test_a_round_and_rebirth_change_only_attention(finished, trained_model):
    start, after = weights(trained_model / "model"), weights(finished / "round_1" / "merged")
    reborn = weights(finished / "rebirth" / "merged")
    attention = {f"lm.model.layers.{layer}.self_attn.{part}_proj.weight" for layer in range(6) for part in "qkv"}
    assert {name for name in start if not torch.equal(start[name], after[name])} == attention
    assert {name for name in start if not torch.equal(start[name], reborn[name])} == attention
    assert any(not torch.equal(after[name], reborn[name]) for name in attention)


# In the order of a run; the points of rebirth follow those of the round.
ALL_POINTS = (
    "features", "sampling", "judging", "pairing", "reference", "step", "checkpoint", "checkpoint_json", "adapter",
    "merge", "merged", "measuring", "captions", "step", "checkpoint_json", "merge", "measuring",
)  # fmt: skip
# One for each kind of state: half a file of features, some parts of the captions, a step without its file, a training
# under way, half a checkpoint behind a complete one, a model that is merged but not cleaned up, and the last stage.
POINTS = ("features", "sampling", "pairing", "step", "checkpoint", "merge", "step")


def content(root: Path, name: str) -> object:
    """Return the content of a run's file without times and the run's folder."""
    path = root / name
    if path.name == "steps.jsonl":
        timed = ("seconds", "wait_seconds", "tokens_per_second", "memory_gib")
        steps = [json.loads(line) for line in path.read_text().splitlines()]
        return [{name: value for name, value in step.items() if name not in timed} for step in steps]
    if path.name == "scores.jsonl":
        scored = read_scores(path)
        return scored.scores, replace(scored.judge_info, date="")
    if path.name == "mrdpo.yaml":
        return [line for line in path.read_text().splitlines() if not line.startswith(("out: ", "  folder: "))]
    return path.read_bytes().replace(str(root).encode(), b"")


@pytest.mark.parametrize(
    "points", [POINTS, pytest.param(ALL_POINTS, marks=pytest.mark.slow)], ids=["each kind of state", "every stage"]
)
def test_killed_and_resumed(finished, command_of, launch, flags, tmp_path, points):
    """Each start is killed at its point; after the last one, all files equal those of an uninterrupted run.

    That run has the clips' features in memory, these on disk.
    """
    out, cache_flags = tmp_path / "mrdpo", {"feature_cache.folder": tmp_path / "tokens"}
    python, recipe, *options = command_of("mrdpo", out=out, **flags | cache_flags)
    for number, point in enumerate(points):
        command = forked(python, Path(__file__).with_name("kill_at.py"), point, recipe, *options)
        result = subprocess.run(command, capture_output=True, text=True, timeout=RUN_SECONDS, check=False)
        assert result.returncode == -signal.SIGKILL and "killed" in result.stdout, (number, point, result.stderr)
    result = launch("mrdpo", out=out, **flags | cache_flags)
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "tokens").glob("*.safetensors"))) == 11  # 8 training clips and 3 held-out ones
    assert files_of(out) == files_of(finished)
    for name in sorted(files_of(out)):
        assert content(out, name) == content(finished, name), name


@pytest.mark.parametrize("fresh", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["forked", "torchrun"])
def test_two_processes(finished, launch, flags, tmp_path, fresh):
    # Half of each step's examples are questions, unlike in the other runs here.
    cache_flags = {"feature_cache.folder": tmp_path.with_name(f"{tmp_path.name}_tokens")}
    result = launch("mrdpo", processes=2, fresh=fresh, out=tmp_path, **flags | cache_flags, qa_fraction=0.5)
    assert result.returncode == 0, result.stderr
    steps = [json.loads(line) for line in (tmp_path / "round_1" / "steps.jsonl").read_text().splitlines()]
    assert all(step["qa"] > 0 and step["dpo"] > 0 for step in steps)
    assert files_of(tmp_path) == files_of(finished)
    one, two = (json.loads((folder / "summary.json").read_text()) for folder in (finished, tmp_path))
    assert two["sft"] == one["sft"]
    for name in ("captions", "answers"):
        expected, shared = ((f / "sft" / "heldout" / f"{name}.jsonl").read_text() for f in (finished, tmp_path))
        assert expected == shared
    first, second = (read_scores(f / "sft" / "heldout" / "scores.jsonl") for f in (finished, tmp_path))
    assert first.scores == second.scores and first.judge_info.totals == second.judge_info.totals
    sampled = read_records(tmp_path / "round_1" / "captions.jsonl", Caption)
    assert [(caption.video, caption.sample) for caption in sampled] == [
        (caption.video, caption.sample) for caption in read_records(finished / "round_1" / "captions.jsonl", Caption)
    ]


LATE_RANK = """
import signal, sys, time
from pathlib import Path
from salmonn import dist
from salmonn.records import Caption
from salmonn.train.run_folder import load_or_create

dist.setup(threads=1)
dist.barrier()
signal.alarm(600)  # ranks that wait in different collectives would do so for hours
if dist.rank() == 1:
    time.sleep(0.5)
assert load_or_create(Path(sys.argv[1]), Caption, lambda: [Caption("a.mp4", "a star")]) == [Caption("a.mp4", "a star")]
assert dist.gather([dist.rank()]) == [0, 1]
dist.barrier()
"""


# Pairs are selected without communication between ranks, where real runs sometimes hung.
def test_a_slow_rank_does_not_hang_the_run(command_of, tmp_path):
    (tmp_path / "late.py").write_text(LATE_RANK)
    *launcher, _ = command_of("mrdpo", processes=2)
    command = forked(*launcher, tmp_path / "late.py", tmp_path / "pairs.jsonl")
    result = subprocess.run(command, capture_output=True, text=True, timeout=RUN_SECONDS, check=False)
    assert result.returncode == 0, result.stderr


def test_a_round_of_grpo(finished, launch, flags, tmp_path):
    """On the samples and ratings of the other run; a round has no pairs then."""
    out = tmp_path / "mrdpo"
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns("rebirth", "merged", "adapter"))
    changed = flags | {"loss.kind": "grpo", "rebirth": "null", "selection.min_gap": 0.1, "redo_from": "round_1/ratings"}
    result = launch("mrdpo", out=out, **changed)
    assert result.returncode == 0, result.stderr
    for name in ("captions.jsonl", "scores.jsonl", "pairs.jsonl"):  # pairs are kept for another loss
        assert (out / "round_1" / name).stat().st_mtime_ns == (finished / "round_1" / name).stat().st_mtime_ns
    first, last = (json.loads(line) for line in (out / "round_1" / "steps.jsonl").read_text().splitlines())
    assert first["kl_estimate"] == pytest.approx(0, abs=1e-6) and last["kl_estimate"] > 1e-6 and first["ce"] > 0
    assert json.loads((out / "summary.json").read_text())["rounds"][0]["captions"] == 3


def test_a_voter_and_a_mixed_reference_policy(finished, launch, flags, tmp_path):
    """A second round on win rates, whose reference policy is a mixture of the start of the run and of the round."""
    out = tmp_path / "mrdpo"
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns("rebirth"))
    changed = {
        "reward.kind": "voter", "reward.voter": "cycle", "loss.kind": "nash", "loss.ce_weight": 0, "rounds": 2,
        "reference_policy": "mixed", "rebirth": "null", "redo_from": "round_2/captions", "learning_rate_decay": 0.5,
        "last_round_weight": 1e-6,
    }  # fmt: skip
    result = launch("mrdpo", out=out, **flags | changed)
    assert result.returncode == 0, result.stderr
    folder = out / "round_2"
    wins = {line["parts"]["wins"] for line in map(json.loads, (folder / "ratings.jsonl").read_text().splitlines())}
    assert len(wins) > 1 and all(0 <= one <= 1 for one in wins)
    start, own = (json.loads((folder / f"{name}_logps.json").read_text())["logps"] for name in ("start", "reference"))
    assert len(start) == len(own) and start != own
    steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    assert steps[0]["learning_rate"] == pytest.approx(flags["fit.learning_rate"] / 2)
    # The policy is not the reference policy at first, unlike in other rounds.
    assert abs(steps[0]["chosen_drift"]) > 1e-6 and steps[0]["dpo"] > 0
    assert (folder / "heldout" / "exploitability.json").is_file()
    adapter = read_factors(folder / "adapter").values()
    assert 0 < max(factors.b.abs().max() for factors in adapter) < 1e-6  # the weight of the last round


def test_extrapolation(finished, command_of, launch, flags, tmp_path):
    """The second step of a round starts where the first did, and its win rates are against the first one's captions.

    A run that is killed between the two ends with the same files.
    """
    changed = flags | {
        "reward.kind": "voter", "reward.voter": "cycle", "loss.kind": "nash", "loss.ce_weight": 0, "rounds": 2,
        "reference_policy": "mixed", "extrapolate": "true", "rebirth": "null", "redo_from": "round_2/captions",
        "last_round_weight": 1e-6,
    }  # fmt: skip
    out, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (out, killed):
        shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("rebirth"))
    python, recipe, *options = command_of("mrdpo", out=killed, **changed)
    command = forked(python, Path(__file__).with_name("kill_at.py"), "wins", recipe, *options)
    result = subprocess.run(command, capture_output=True, text=True, timeout=RUN_SECONDS, check=False)
    assert result.returncode == -signal.SIGKILL and "killed" in result.stdout, result.stderr
    assert (killed / "round_2" / "half" / "merged").is_dir() and not (killed / "round_2" / "pairs.jsonl").exists()
    for folder in (out, killed):
        result = launch("mrdpo", out=folder, **changed)
        assert result.returncode == 0, result.stderr
    assert files_of(killed) == files_of(out)
    for name in sorted(name for name in files_of(out) if name.startswith("round_2")):
        assert content(killed, name) == content(out, name), name

    folder = out / "round_2"
    captions, opponents = (read_records(folder / name, Caption) for name in ("captions.jsonl", "half/captions.jsonl"))
    assert [one.text for one in captions] != [one.text for one in opponents]
    (clips,) = flags["clips_dir"].glob("seed*-8/clips.jsonl")
    references = {one.video: one for one in read_records(clips, Reference)}
    judge, voter = RuleJudge(), make_voter("cycle")

    def traits(caption):
        reference = references[caption.video]
        return caption_traits(caption, judge.judge_one(ScoringTask(reference, caption)), reference)

    expected = []
    for caption in captions:
        others = [traits(one) for one in opponents if one.video == caption.video]
        expected.append(sum(win_probability(voter, traits(caption), one) for one in others) / len(others))
    wins = [json.loads(line)["parts"]["wins"] for line in (folder / "wins.jsonl").read_text().splitlines()]
    ratings = [json.loads(line)["parts"]["wins"] for line in (folder / "ratings.jsonl").read_text().splitlines()]
    assert wins == pytest.approx(expected) and wins != pytest.approx(ratings)
    for path, values in ((folder / "pairs.jsonl", wins), (folder / "half" / "pairs.jsonl", ratings)):
        value_of = {(one.video, one.text): value for one, value in reversed(list(zip(captions, values, strict=True)))}
        pairs = read_records(path, Comparison)
        assert pairs
        for pair in pairs:
            gap = value_of[pair.video, pair.chosen] - value_of[pair.video, pair.rejected]
            assert pair.margin == pytest.approx(gap)
    # Both steps start from the first round's model; the weight of the last round leaves the second one's there.
    start, half, end = (weights(out / name / "merged") for name in ("round_1", "round_2/half", "round_2"))
    moved = {name for name in start if not torch.allclose(start[name], half[name], atol=1e-5)}
    assert moved and all(torch.allclose(start[name], end[name], atol=1e-5) for name in moved)


@pytest.mark.parametrize("voter", ["judge", "llm"])
def test_voters_for_any_videos(finished, launch, flags, serve, tmp_path, voter):
    """The judge as a voter on the scores of the other run; a language model that likes the longer of two captions."""
    out, server = tmp_path / "mrdpo", serve(rule_judge_script)
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns("rebirth", "merged", "adapter"))
    changed = flags | {
        "reward.kind": "voter", "reward.voter": voter, "loss.kind": "nash", "loss.ce_weight": 0, "rebirth": "null",
        "redo_from": "round_1/pairs",
    }  # fmt: skip
    if voter == "llm":
        judge = {"kind": "openai", "model": "m", "base_url": server.url, "cache": tmp_path / "c.sqlite"}
        changed |= {f"judge.{name}": value for name, value in judge.items()} | {"redo_from": "round_1/ratings"}
    result = launch("mrdpo", out=out, **changed)
    assert result.returncode == 0, result.stderr
    names = ("captions.jsonl", "scores.jsonl") if voter == "judge" else ("captions.jsonl",)
    for name in names:
        assert (out / "round_1" / name).stat().st_mtime_ns == (finished / "round_1" / name).stat().st_mtime_ns
    by_video = {}
    for caption in read_records(out / "round_1" / "captions.jsonl", Caption):
        by_video.setdefault(caption.video, []).append(caption)
    scores = {(one.video, one.sample): one for one in read_scores(finished / "round_1" / "scores.jsonl").scores}

    def value(caption):
        score = scores[caption.video, caption.sample]
        return -score.total - score.repetition if voter == "judge" else len(caption.text)

    def wins(caption):
        others = [value(one) for one in by_video[caption.video] if one.sample != caption.sample]
        return sum((value(caption) > one) + (value(caption) == one) / 2 for one in others) / len(others)

    wins_of = {(one.video, one.text): wins(one) for captions in by_video.values() for one in captions}
    pairs = read_records(out / "round_1" / "pairs.jsonl", Comparison)
    assert pairs and {pair.source for pair in pairs} == {"rule" if voter == "judge" else f"m at {server.url}"}
    for pair in pairs:
        gap = wins_of[pair.video, pair.chosen] - wins_of[pair.video, pair.rejected]
        assert pair.margin == pytest.approx(gap) and gap > 0
    steps = [json.loads(line) for line in (out / "round_1" / "steps.jsonl").read_text().splitlines()]
    assert steps[0]["dpo"] > 0 and (out / "round_1" / "merged").is_dir()
    asked = [json.loads(request["messages"][1]["content"]) for request in server.requests]
    texts = [len({one.text for one in captions}) for captions in by_video.values()]
    num_asked = sum("description_1" in data for data in asked)
    assert ("up to 96 requests per round" in " ".join(result.stdout.split())) == (voter == "llm")
    assert num_asked == (0 if voter == "judge" else sum(number * (number - 1) for number in texts))


def test_rebirth_from_an_aligned_teacher(finished, launch, flags, tmp_path):
    """Only rebirth is made again: drafts, their influence on the student, DPO on the teacher, and its captions."""
    out = tmp_path / "mrdpo"
    shutil.copytree(finished, out)
    changed = {"rebirth.tailor": "teacher", "rebirth.teacher_steps": 2, "rebirth.preference_fraction": 0.25}
    result = launch("mrdpo", out=out, **flags | changed, redo_from="rebirth/captions")
    assert result.returncode == 0, result.stderr
    rebirth = out / "rebirth"
    drafts, captions = (read_records(rebirth / name, Caption) for name in ("drafts/captions.jsonl", "captions.jsonl"))
    assert len(drafts) == 24 and len(captions) == 6  # 6 of the 8 clips, 4 samples
    influence = {
        (line["video"], line["sample"]): line["value"]
        for line in map(json.loads, (rebirth / "influence.jsonl").read_text().splitlines())
    }
    sample_of = {(draft.video, draft.text): draft.sample for draft in reversed(drafts)}
    pairs = read_records(rebirth / "teacher" / "pairs.jsonl", Comparison)
    assert pairs and all(pair.source == "influence" for pair in pairs)
    for pair in pairs:
        chosen, rejected = (influence[pair.video, sample_of[pair.video, one]] for one in (pair.chosen, pair.rejected))
        assert chosen > rejected and pair.margin >= 1
    teacher, best = weights(rebirth / "teacher" / "merged"), weights(finished / "round_1" / "merged")
    assert any(not torch.equal(teacher[name], best[name]) for name in best)
    for name in ("round_1/merged/model.safetensors", "round_1/pairs.jsonl"):
        assert (out / name).stat().st_mtime_ns == (finished / name).stat().st_mtime_ns


def test_changed_settings_redo_only_what_depends_on_them(finished, launch, flags, tmp_path):
    out = tmp_path / "mrdpo"
    shutil.copytree(finished, out)
    files = {name: (out / name).stat().st_mtime_ns for name in files_of(out)}
    changed = flags | {"fit.learning_rate": 0.001, "fit.checkpoint_every": 2, "early_stopping.max_worsening": 8}
    result = launch("mrdpo", out=out, **changed)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    message = (
        f"error: {out}/round_1/model was made with another configuration: fit.learning_rate 0.002 (now 0.001). Set it "
        "back, choose another --out, or pass --redo-from round_1/model to redo that and what depends on it\n"
    )
    assert message in result.stderr
    assert files == {name: (out / name).stat().st_mtime_ns for name in files_of(out)}  # nothing was touched
    # Twice: the flag may stay in the command that resumes a run.
    for _ in range(2):
        result = launch("mrdpo", out=out, **changed, redo_from="round_1/model")
        assert result.returncode == 0, result.stderr
    after = {name: (out / name).stat().st_mtime_ns for name in files_of(out)}
    kept = {name for name in files if files[name] == after[name]}
    assert kept == {
        *(f"sft/{name}" for name in MEASURED),
        *(f"round_1/{n}.jsonl" for n in ("captions", "scores", "pairs")),
    }
    steps = [json.loads(line) for line in (out / "round_1" / "steps.jsonl").read_text().splitlines()]
    assert steps[0]["learning_rate"] == pytest.approx(0.001)


def rates(total: float) -> Rates:
    return Rates(
        missing=total, incorrect=0.0, hallucinated=0.0, hallucination=0.0, total=total, repetition=0.0, clips=1
    )


@pytest.mark.parametrize(
    ("totals", "best", "stopped"),
    [
        ([0.5, 0.4, 0.3], "round_3", None),
        ([0.5, 0.4, 0.42], "round_2", None),
        ([0.62, 0.61, 0.6], "round_3", None),
        ([0.5, 0.4, 0.46], "round_2", "after round 3"),
        ([0.5, 0.4, "round_3 has 2 pairs"], "round_2", "has 2 pairs"),
        ([0.7, 0.1, 0.1], None, "after round 1"),
    ],
)
def test_rounds_stop_early_with_the_best_model(load_recipe, monkeypatch, tmp_path, totals, best, stopped):
    """The SFT model has a Total of 0.6; a Total more than 0.05 above the best, or a round without pairs, stops."""
    recipe, policies = load_recipe("mrdpo"), []

    def run_round(number, policy, run):
        policies.append(policy)
        if isinstance(totals[number - 1], str):
            raise recipe.RoundFailedError(totals[number - 1])
        return tmp_path / f"round_{number}" / "merged"

    monkeypatch.setattr(recipe, "run_round", run_round)
    monkeypatch.setattr(recipe, "measure", lambda _, folder, *__: rates(totals[int(folder.name[-1]) - 1]))
    config, summary = recipe.MrDpoConfig(out=tmp_path, rounds=3, model="start"), recipe.RunSummary(sft=rates(0.6))
    best_path = recipe.run_rounds(recipe.Run(config, None, None, None, None), summary)
    assert summary.best == best and (stopped in summary.stopped if stopped else summary.stopped is None)
    assert best_path == (tmp_path / best / "merged" if best else None)
    assert policies == ["start", tmp_path / "round_1" / "merged", tmp_path / "round_2" / "merged"][: len(policies)]


def test_rounds_stop_when_the_reward_model_is_exploited(load_recipe, monkeypatch, tmp_path):
    """Its reward of the held-out captions rises by 1.5 in each round, but the judge's Total hardly falls."""
    recipe, report = load_recipe("mrdpo"), asdict(RewardRound(None, None, None, 0, 0.7, 0.6, 10, 100))
    for number in (1, 2):
        write_json(tmp_path / f"round_{number}" / "reward_round.json", report)
        write_json(tmp_path / f"round_{number}" / "heldout" / "proxy.json", 1.5)
    monkeypatch.setattr(recipe, "run_round", lambda number, *_: tmp_path / f"round_{number}" / "merged")
    monkeypatch.setattr(recipe, "measure", lambda *_: rates(0.6))
    config = recipe.MrDpoConfig(out=tmp_path, rounds=3, reward=RewardConfig("model"))
    run = recipe.Run(config, None, None, None, JudgeReward(RuleJudge(), repetition_weight=1.0))
    summary = recipe.RunSummary(sft=rates(0.6))
    assert recipe.run_rounds(run, summary) is None
    assert summary.proxy == {"SFT": 0, "round 1": 1.5, "round 2": 3.0} and len(summary.rounds) == 2
    assert "rose by a standard deviation in rounds 1 and 2" in summary.stopped
    lines = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert [line["proxy"] for line in lines] == [0, 1.5, 3.0]


def test_a_first_round_that_fails_ends_the_run(load_recipe, monkeypatch, tmp_path):
    recipe = load_recipe("mrdpo")

    def run_round(*_):
        raise recipe.RoundFailedError("round_1 has 0 pairs")

    monkeypatch.setattr(recipe, "run_round", run_round)
    run = recipe.Run(recipe.MrDpoConfig(out=tmp_path), None, None, None, None)
    with pytest.raises(ValueError, match="round_1 has 0 pairs"):
        recipe.run_rounds(run, recipe.RunSummary(sft=rates(0.6)))


def test_a_rebirth_that_fails_keeps_the_results_of_the_rounds(load_recipe, monkeypatch, tmp_path):
    recipe = load_recipe("mrdpo")

    def align_teacher(*_):
        raise recipe.RoundFailedError("rebirth/teacher has not learned")

    monkeypatch.setattr(recipe, "run_rebirth", align_teacher)
    config = recipe.MrDpoConfig(out=tmp_path, rebirth=RebirthConfig(tailor="teacher"))
    summary = recipe.RunSummary(sft=rates(0.6), rounds=[rates(0.4)], stopped="too few pairs")
    recipe.add_rebirth(tmp_path / "round_1" / "merged", recipe.Run(config, None, None, None, None), summary)
    assert summary.stopped == "too few pairs; no rebirth: rebirth/teacher has not learned"
    assert summary.rebirth is None and (tmp_path / "rounds.jsonl").is_file()


def test_only_the_last_round_has_the_weight(load_recipe, monkeypatch, tmp_path):
    recipe, weights = load_recipe("mrdpo"), []
    monkeypatch.setattr(recipe, "make_round_examples", lambda *_, **__: [])
    monkeypatch.setattr(recipe, "train_on_preferences", lambda _, __, stage, ___: weights.append(stage.weight))
    run = recipe.Run(recipe.MrDpoConfig(out=tmp_path, rounds=3, last_round_weight=0.5), None, None, None, None)
    for number in (1, 2, 3):
        recipe.run_round(number, "start", run)
    assert weights == [1.0, 1.0, 0.5]


def test_the_reference_policy_is_the_start_of_the_round_or_run(load_recipe, captioner, random_model):
    recipe, name = load_recipe("mrdpo"), "lm.base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    attach_lora(captioner.network, LoraConfig(rank=2), seed=0)
    weight = captioner.network.get_parameter(name)
    with torch.no_grad():
        weight.add_(1.0)
    config = recipe.MrDpoConfig(model=str(random_model))
    stage = recipe.Stage(Path("round_2"), 0, config.loss, config.fit, [])
    own = stage.find_reference_policy(config)
    assert own.load is None and own.load_anchor is None
    renewed = replace(stage, reference_policy=config.model).find_reference_policy(config).load()
    assert torch.allclose(renewed.get_parameter(name), weight - 1.0, atol=1e-6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "/nowhere"}, "no model in /nowhere"),
        ({"references": "/nowhere/refs.jsonl", "heldout_references": "/nowhere/refs.jsonl"}, "/nowhere/refs.jsonl"),
    ],
)
def test_missing_files_are_reported(launch, flags, tmp_path, changed, message):
    result = launch("mrdpo", out=tmp_path / "out", **flags | changed)
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr


def test_an_llm_judge_whose_cap_is_raised(serve, launch, flags, tmp_path):
    """Two processes share a scripted judge: after the cap stopped the run, it resumes without repeated requests."""
    server = serve(rule_judge_script)
    judge = {
        "judge.kind": "openai", "judge.model": "m", "judge.base_url": server.url, "judge.cache": tmp_path / "c.sqlite",
    }  # fmt: skip
    options = flags | judge | {"out": tmp_path / "run", "feature_cache.folder": tmp_path / "features"}
    options |= {"rebirth": "null", "kl.num_clips": 0}
    stopped = launch("mrdpo", processes=2, **options, **{"judge.max_requests": 8})
    assert stopped.returncode != 0 and "requests is reached" in stopped.stderr
    num_before = len(server.requests)
    with closing(sqlite3.connect(tmp_path / "c.sqlite")) as cache:
        ((num_cached,),) = cache.execute("SELECT count(*) FROM responses")
    assert 0 < num_cached <= num_before <= 8
    result = launch("mrdpo", processes=2, **options)
    assert result.returncode == 0, result.stderr
    requests = [request["messages"][1]["content"] for request in server.requests]
    # A request in flight when the run stopped has no reply in the cache.
    assert len(requests) - num_before == len(set(requests)) - num_cached
    scored = read_scores(tmp_path / "run" / "round_1" / "scores.jsonl")
    assert scored.judge_info.judge == f"m at {server.url}" and len(scored.scores) == 32
    pairs = read_records(tmp_path / "run" / "round_1" / "pairs.jsonl", Comparison)
    assert pairs and all(pair.margin > 0 for pair in pairs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"references": Path("a.jsonl")}, "without heldout_references"),
        ({"sampling": {"num_samples": 1}}, "num_samples must be at least 2"),
        ({"sampling": {"temperature": 0.0}}, "temperature above 0"),
        ({"sampling": {"batch_size": 0}}, "batch_size must be at least 1"),
        ({"selection": {"min_gap": 0.0}}, "min_gap must be above 0"),
        ({"selection": {"max_length_ratio": 0.5}}, "must be at least 1"),
        ({"loss": {"beta": 0.0}}, "loss.beta must be above 0"),
        ({"loss": {"beta": -0.1}}, "loss.beta must be above 0"),
        ({"loss": {"ce_weight": -1.0}}, "loss.ce_weight at least 0"),
        ({"loss": {"kind": "grpo"}, "fresh_pairs": False}, "set fresh_pairs true"),
        ({"loss": {"per": "clause"}, "reference_policy": "mixed"}, "set loss.per caption"),
        ({"loss": {"kind": "nash"}}, "loss.kind nash fits win rates, which reward.kind judge does not give"),
        ({"extrapolate": True}, "set loss.kind nash and fresh_pairs true, or leave extrapolate out"),
        ({"loss": {"kind": "kto"}, "reference_policy": "mixed"}, "use sigmoid, robust, nash, or reference_policy"),
        (
            {"loss": {"kind": "grpo"}, "selection": {"min_gap": 0.2}, "subset": SubsetConfig(keep=0.5)},
            "subset.keep would have no effect; .* pass --selection.min_gap 0.1 --subset.keep null",
        ),
        (
            {"reward": RewardConfig("voter"), "selection": {"floors": {"faithful": 0.8}}},
            "named objectives, which reward.kind voter does not give",
        ),
        (
            {"selection": {"max_length_ratio": 1.5, "repeat_negatives": 0.25}},
            "selection.max_length_ratio has no effect on the pairs that selection.repeat_negatives adds",
        ),
        (
            {"selection": {"floors": {"faithful": 0.8}, "repetition_fraction": 0.1}},
            "selection.floors has no effect on the pairs that selection.repetition_fraction adds",
        ),
        ({"selection": {"min_spreads": 1.0}}, "reward.kind judge does not give; leave it out"),
        (
            {"reward": RewardConfig("model"), "selection": {"min_spreads": 1.0}},
            "selection.min_spreads is 1.0, but the reward models of the rounds have no ensemble",
        ),
        ({"eta": 0.0}, "eta must be above 0"),
        ({"learning_rate_decay": 0.0}, "learning_rate_decay must be above 0"),
        ({"last_round_weight": 0.0}, "last_round_weight must be above 0 and at most 1, got 0.0"),
        (
            {"loss": {"kind": "grpo", "beta": 0.0}, "rebirth": RebirthConfig(tailor="teacher")},
            "trains the teacher by guided DPO with the same loss.beta: loss.beta must be above 0",
        ),
        ({"lora": {"rank": 0}}, "lora.rank must be at least 1"),
        ({"lora": {"dropout": 2.0}}, "lora.dropout must be at least 0 and below 1"),
        ({"lora": {"targets": ()}}, "lora.targets names no module"),
        ({"fit": {"steps": 0}}, "steps must be at least 1"),
        ({"fit": {"learning_rate": -1e-3}}, "learning_rate must be above 0"),
        ({"fit": {"weight_decay": -1.0}}, "weight_decay at least 0"),
        (
            {"reward": RewardConfig("model"), "selection": {"repetition_fraction": 0.1}},
            "selection.repetition_fraction needs the judge's quotes",
        ),
        ({"reward": RewardConfig("model", caution=1.0)}, "the reward models of the rounds have no ensemble of heads"),
        (
            {"reward": RewardConfig("model"), "selection": {"floors": {"faithful": 0.8}}},
            "selection.floors needs named objectives",
        ),
        ({"reward_training": {"ensemble": 1}}, "an ensemble has at least 2 heads of kind bradley-terry"),
        ({"sampling": {"temperatures": (1.0, 0.7, 0.5)}}, "num_samples 8 a multiple of their number"),
        ({"reward_training": {"kind": "ideal-point"}}, "reward_training.kind ideal-point cannot be trained"),
    ],
)
def test_impossible_values_are_rejected_with_the_configuration(load_recipe, options, message):
    recipe = load_recipe("mrdpo")
    types = {
        "sampling": SampleConfig, "selection": SelectionConfig, "loss": LossConfig, "lora": LoraConfig,
        "fit": FitConfig, "reward_training": RewardTrainingConfig,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        recipe.MrDpoConfig(
            **{name: types[name](**value) if name in types else value for name, value in options.items()}
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "ddp"}, "needs strategy fsdp2, got ddp"),
        ({"kl": KLConfig(num_clips=4)}, "needs kl.num_clips 0, got 4"),
        ({"rebirth": RebirthConfig()}, "pass --rebirth null"),
        ({"reference_policy": "run_start"}, "needs reference_policy round_start"),
        ({"sampler": SamplerConfig()}, "pass its URL as --sampler.server"),
        ({"reward": RewardConfig("model")}, "use --reward.kind judge"),
    ],
)
def test_what_needs_a_whole_model_is_refused_with_load_sharded(options, message):
    sampler = SamplerConfig(server="http://127.0.0.1:1/v1", server_model="m")
    usable = dict(strategy="fsdp2", kl=KLConfig(num_clips=0), rebirth=None, sampler=sampler, load_sharded=True)
    MrDpoConfig(**usable)
    with pytest.raises(ValueError, match=message):
        MrDpoConfig(**usable | options)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (Reference("b.mp4"), "b.mp4 has no caption"),
        (Reference("b.mp4", caption=" \n"), "b.mp4 has no caption"),
        (Reference("./a.mp4", caption="a star"), "a.mp4 has a reference in line 1"),
        (Reference("b.mp4", caption="A sign says <|im_end|>."), r"special token <\|im_end\|>"),
        (
            Reference("b.mp4", caption="a", questions=(Question("Who?", "<|im_start|>"),)),
            r"special token <\|im_start\|>",
        ),
    ],
)
def test_unusable_references_are_rejected_before_anything_is_written(
    load_recipe, random_model, videos, tmp_path, monkeypatch, line, message
):
    recipe = load_recipe("mrdpo")
    monkeypatch.setattr(recipe.dist, "setup", lambda **_: None)  # keep the tests' threads and logging
    lenient = SimpleNamespace(check=lambda _: None, file_name="scores.jsonl")
    for name in ("make_judge", "make_reward"):
        monkeypatch.setattr(recipe, name, lambda *_, **__: lenient)
    for name in ("a.mp4", "b.mp4"):
        shutil.copy(videos[0], tmp_path / name)
    references, heldout = tmp_path / "references.jsonl", tmp_path / "heldout.jsonl"
    good = Reference("a.mp4", caption="a star appears")
    write_records(references, [good])
    references.write_text(references.read_text() + "\n")  # a blank line counts
    append_record(references, line)
    write_records(heldout, [good])
    config = recipe.MrDpoConfig(
        model=str(random_model), out=tmp_path / "out", references=references, heldout_references=heldout
    )
    with pytest.raises(ValueError, match=rf"references\.jsonl, line 3: .*{message}"):
        recipe.main(config)
    write_records(references, [good])
    if "no caption" not in message:  # which held-out videos need not have
        append_record(heldout, line)
        with pytest.raises(ValueError, match=rf"heldout\.jsonl, line 2: .*{message}"):
            recipe.main(config)
    assert not (tmp_path / "out").exists()


def test_held_out_clips_suit_the_judge_whatever_the_reward(captioner, videos, tmp_path):
    shutil.copy(videos[0], tmp_path / "a.mp4")
    write_records(tmp_path / "references.jsonl", [Reference("a.mp4", caption="a star appears")])
    config = MrDpoConfig(references=tmp_path / "references.jsonl", heldout_references=tmp_path / "references.jsonl")
    with pytest.raises(ValueError, match=r"line 1: .* has no event list"):
        load_data(config, SimpleNamespace(check=lambda _: None), captioner.processor, judge=RuleJudge())


@pytest.mark.parametrize(("extrapolate", "told"), [(False, "up to 12 requests"), (True, "up to 48 requests")])
def test_the_requests_of_a_language_model_as_a_voter_are_told(captioner, videos, tmp_path, caplog, extrapolate, told):
    """2 clips with 3 captions each: 3 pairs in two orders, and with 3 opponents 9 pairs more."""
    for name in ("a.mp4", "b.mp4"):
        shutil.copy(videos[0], tmp_path / name)
    references = tmp_path / "references.jsonl"
    write_records(references, [Reference(name, caption="a star appears") for name in ("a.mp4", "b.mp4")])
    config = MrDpoConfig(
        references=references,
        heldout_references=references,
        loss=LossConfig("nash", ce_weight=0.0),
        reward=RewardConfig("voter", voter="llm"),
        judge=JudgeConfig(kind="openai", model="m"),
        sampling=SampleConfig(num_samples=3),
        extrapolate=extrapolate,
        rebirth=None,
    )
    caplog.set_level("INFO")
    anything = SimpleNamespace(check=lambda _: None)
    load_data(config, anything, captioner.processor, judge=anything)
    assert told in caplog.text and ("with as many opponents" in caplog.text) == extrapolate


def test_clips_that_cannot_be_tailored_are_rejected_before_the_rounds(captioner, videos, tmp_path):
    shutil.copy(videos[0], tmp_path / "a.mp4")
    references, heldout = tmp_path / "references.jsonl", tmp_path / "heldout.jsonl"
    write_records(heldout, [Reference("a.mp4", caption="a star appears")])
    config = MrDpoConfig(
        references=references,
        heldout_references=heldout,
        loss=LossConfig(ce_weight=0.0),
        rebirth=RebirthConfig(tailor="draft"),
    )
    reward = SimpleNamespace(check=lambda _: None)
    for caption, message in (
        ("", "line 1: a.mp4 has no caption, and rebirth.tailor draft"),
        ("a star appears", "of 1 clips leaves 0 preference clips"),
    ):
        write_records(references, [Reference("a.mp4", caption=caption)])
        with pytest.raises(ValueError, match=message):
            load_data(config, reward, captioner.processor, judge=reward)


def test_a_dry_run_says_which_hours_of_nash_learning_are_not_estimated(capsys):
    plain = MrDpoConfig(
        dry_run=True, rebirth=None, loss=LossConfig("nash", ce_weight=0.0), reward=RewardConfig("voter", voter="judge")
    )
    llm = replace(plain, reward=RewardConfig("voter", voter="llm"), judge=JudgeConfig(kind="openai", model="m"))
    shown = []
    for config in (plain, replace(llm, extrapolate=True)):
        print_memory_plan(config)
        text = " ".join(capsys.readouterr().out.split())
        shown.append([part in text for part in ("those of the first step of a round", "voter llm are not estimated")])
    assert shown == [[False, False], [True, True]]


def test_a_misspelt_target_is_rejected_before_anything_is_rendered(load_recipe, random_model, tmp_path, monkeypatch):
    recipe = load_recipe("mrdpo")
    monkeypatch.setattr(recipe.dist, "setup", lambda **_: None)
    wrong = LoraConfig(targets=("q_prj", "v_proj"))
    for options in ({"lora": wrong}, {"rebirth": RebirthConfig(lora=wrong)}):
        config = recipe.MrDpoConfig(
            model=str(random_model), out=tmp_path / "out", clips_dir=tmp_path / "clips", **options
        )
        with pytest.raises(ValueError, match=r"no projection q_prj; it has .*q_proj"):
            recipe.main(config)
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_tests_its_server_first(load_recipe, random_model, clips, tmp_path, monkeypatch):
    """Unless it has all captions: those of held-out clips, too, where no process has the whole model."""
    recipe, out = load_recipe("mrdpo"), tmp_path / "run"
    monkeypatch.setattr(recipe.dist, "setup", lambda **_: None)
    monkeypatch.setattr(recipe, "load_data", lambda *_, **__: (clips, clips))

    def fail(error):
        raise error

    monkeypatch.setattr(ServerSampler, "connect", lambda _: fail(ValueError("unreachable")))
    monkeypatch.setattr(recipe, "load_encoders_of", lambda _: fail(ZeroDivisionError))
    sampler = SamplerConfig(server="http://localhost:1/v1", server_model="m")
    whole = MrDpoConfig(
        model=str(random_model), out=out, sampler=sampler, rounds=2, rebirth=None, kl=KLConfig(num_clips=0)
    )
    sharded = replace(whole, load_sharded=True, strategy="fsdp2", out=tmp_path / "sharded")
    monkeypatch.setattr(recipe, "check_processes", lambda *_: None)
    made = [
        ("round_1/captions.jsonl", ValueError, ValueError),
        ("round_2/captions.jsonl", ZeroDivisionError, ValueError),
        *((f"{stage}/heldout/rates.json", ZeroDivisionError, ValueError) for stage in ("sft", "round_1")),
        ("round_2/heldout/rates.json", ZeroDivisionError, ZeroDivisionError),
    ]
    for config, index in ((whole, 1), (sharded, 2)):
        with pytest.raises(ValueError, match="unreachable"):
            recipe.main(config)
        for row in made:
            path = config.out / row[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            with pytest.raises(row[index]):
                recipe.main(config)
    (sharded.out / "summary.json").write_text(json.dumps({"rounds": [{}], "stopped": "no gain"}))
    (sharded.out / "round_2" / "captions.jsonl").unlink()  # which a run that stopped after round 1 does not sample
    with pytest.raises(ZeroDivisionError):
        recipe.main(sharded)


def test_a_dry_run_shows_what_a_server_leaves_to_this_process(capsys):
    """The server samples 8 captions a clip; here held-out clips get one each, and none with the model in parts."""
    sampler = SamplerConfig(server="http://localhost:1/v1", server_model="m")
    local = MrDpoConfig(dry_run=True, rebirth=None, sampling=SampleConfig(batch_size=16))
    shown = []
    for config in (
        local,
        replace(local, sampler=sampler),
        replace(local, sampler=sampler, load_sharded=True, strategy="fsdp2", kl=KLConfig(num_clips=0)),
    ):
        print_memory_plan(config)
        text = " ".join(capsys.readouterr().out.replace("\u2502", " ").replace("\u2503", " ").split())
        parts = ("a clip", "16 captions", "one caption", "A decode step", "encoding and sampling", "its hours are not")
        shown.append([part in text for part in parts])
    assert shown == [
        [True, True, True, True, False, False],
        [False, True, True, False, True, True],
        [False, False, False, False, True, True],
    ]
