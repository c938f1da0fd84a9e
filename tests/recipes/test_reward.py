"""Real runs that train reward models, and mrDPO with one: files, resuming after kills, two processes."""

import json
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from salmonn.files import read_json, read_records, write_records
from salmonn.preference.comparisons import Preferences, group_comparisons
from salmonn.preference.objectives import OBJECTIVES, find_max_words
from salmonn.preference.rating import Rating
from salmonn.preference.reward_model import RewardModel, read_info
from salmonn.records import Caption, Comparison, Reference
from salmonn.score.formats import read_scores, write_scores
from salmonn.score.judge import ScoringTask
from salmonn.score.scoring import make_judge_info
from salmonn.synthetic.judge import RuleJudge
from salmonn.train.run_log import read_run
from tests.launch import forked
from tests.limits import RUN_SECONDS

LORA = {"lora.rank": 2, "lora.alpha": 4, "fit.epochs": 1, "fit.batch_size": 3, "fit.checkpoint_every": 1}
TIMES = ("seconds", "wait_seconds", "tokens_per_second", "memory_gib")


@pytest.fixture(scope="session")
def preferences(trained_model, shared) -> Path:
    """Comparisons of 8 clips: the caption, the caption of the next clip, and its words in reverse order."""

    def make(folder: Path) -> None:
        (file,) = (trained_model / "clips").glob("seed5-*/clips.jsonl")
        references = read_records(file, Reference)
        comparisons = []
        for one, other in zip(references, [*references[1:], references[0]], strict=True):
            best, worst = one.caption, " ".join(reversed(one.caption.split()))
            video = str(file.parent / one.video)
            comparisons += [
                Comparison(video, "", better, worse, source="given")
                for better, worse in ((best, other.caption), (best, worst), (other.caption, worst))
            ]
        folder.mkdir()
        write_records(folder / "pairs.jsonl", comparisons)

    return shared("reward_preferences", make) / "pairs.jsonl"


def flags_of(trained_model, preferences, out):
    return {
        "model": trained_model / "model", "preferences": preferences, "out": out, "feature_cache.folder": "null",
    }  # fmt: skip


def content(root: Path, name: str) -> object:
    """Return the content of a file without times, dates and the run's folder."""
    path = root / name
    if path.name == "steps.jsonl":
        return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in path.open()]
    if path.name == "scores.jsonl":
        return read_scores(path).scores
    return path.read_bytes().replace(str(root).encode(), b"")


def files_of(folder: Path) -> set[str]:
    excluded = ("events.out", "README.md", "summary.png", "mrdpo.yaml", "reward.yaml")
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(excluded))
    return {str(path.relative_to(folder)) for path in paths}


def kill_at(point: str, command: list[str]) -> None:
    """Start a run that is killed at a point."""
    python, recipe, *options = command
    killing = forked(python, Path(__file__).with_name("kill_at.py"), point, recipe, *options)
    result = subprocess.run(killing, capture_output=True, text=True, timeout=RUN_SECONDS, check=False)
    assert result.returncode == -signal.SIGKILL and "killed" in result.stdout, (point, result.stderr)


def test_a_frozen_reward_model(launch, trained_model, preferences, tmp_path, command_of):
    """A killed run ends like an unbroken one, and a second start trains nothing."""
    flags = flags_of(trained_model, preferences, tmp_path / "reward")
    kill_at("reward", command_of("reward", **flags))
    result = launch("reward", **flags)
    assert result.returncode == 0, result.stderr
    output = " ".join((result.stdout + result.stderr).split())
    assert "24 comparisons of captions of 8 videos" in output and "held-out comparisons of 2 clips; blind" in output
    names = (
        "reward.json",
        "head.safetensors",
        "states.safetensors",
        "comparisons.jsonl",
        "blind/states.safetensors",
        "settings.json",
    )
    assert files_of(tmp_path / "reward") == set(names)
    info = read_info(tmp_path / "reward")
    assert (info.num_clips, info.num_comparisons, info.source) == (6, 18, "given") and info.std > 0
    assert info.agreement.num_comparisons == 6 and info.agreement.blind is not None
    assert "is already trained" in " ".join(launch("reward", **flags).stdout.split())
    model = RewardModel.load(tmp_path / "reward")
    other = launch("reward", **flags | {"out": tmp_path / "unbroken"})
    assert other.returncode == 0, other.stderr
    for name in files_of(tmp_path / "unbroken"):
        assert content(tmp_path / "unbroken", name) == content(tmp_path / "reward", name), name
    assert model.info == read_info(tmp_path / "unbroken")


@pytest.mark.parametrize(
    ("strategy", "kind", "pooling"),
    [
        ("fsdp2", "bradley-terry", "last"),
        pytest.param("ddp", "pairwise", "mean", marks=pytest.mark.slow),
    ],
)
def test_fine_tuning_in_two_processes(launch, trained_model, preferences, tmp_path, strategy, kind, pooling):
    flags = flags_of(trained_model, preferences, tmp_path / "reward") | LORA
    options = {"strategy": strategy, "kind": kind, "pooling": pooling, "blind": "false"}
    options["feature_cache.folder"] = tmp_path / "features"
    result = launch("reward", processes=2, **flags | options)
    assert result.returncode == 0, result.stderr
    steps = [json.loads(line) for line in (tmp_path / "reward" / "steps.jsonl").read_text().splitlines()]
    assert len(steps) == 2 and all(0 <= step["accuracy"] <= 1.001 and 0 < step["loss"] < 2 for step in steps)
    model = RewardModel.load(tmp_path / "reward", kind=kind)
    assert model.info.agreement.blind is None and (tmp_path / "reward" / "adapter").is_dir()
    assert not (tmp_path / "reward" / "checkpoints").exists()


def test_changed_references_are_noticed(load_recipe):
    """Changed objectives of the same captions, or other comparisons, are another run; a moved file is the same."""
    recipe, comparisons = load_recipe("reward"), [Comparison("a.mp4", "Tell.", "x", "y")]
    (group,) = group_comparisons(comparisons)

    def settings(value=0.5, *, compared=comparisons, **paths):
        config = recipe.RewardRecipeConfig(
            kind="objectives", preferences=Path(paths.get("folder", "a")), references=Path(paths.get("file", "r"))
        )
        judged = replace(group, objectives=((value, None), (0.0, 1.0)))
        return recipe.training_step(Preferences(compared, Path()), [judged], config).settings

    assert settings(folder="b", file="s") == settings()
    assert settings(0.25) != settings() != settings(compared=[replace(comparisons[0], chosen="z")])


def test_named_objectives(launch, trained_model, tmp_path, call):
    """Judged captions with their references give objectives; `salmonn reward --objectives` explains a rating."""
    (file,) = (trained_model / "clips").glob("seed5-*/clips.jsonl")
    references = read_records(file, Reference)
    captions = [
        Caption(one.video, text, "Tell.", sample=sample)
        for one, other in zip(references, [*references[1:], references[0]], strict=True)
        for sample, text in enumerate((one.caption, other.caption, " ".join([one.human_caption] * 5)))
    ]
    by_video = {one.video: one for one in references}
    judge = RuleJudge()
    scores = judge.judge([ScoringTask(by_video[caption.video], caption) for caption in captions])
    write_records(tmp_path / "captions.jsonl", captions)
    write_scores(tmp_path / "scores.jsonl", make_judge_info(judge), scores)
    flags = flags_of(trained_model, tmp_path, tmp_path / "reward") | {"root": file.parent, "kind": "objectives"}
    refused = launch("reward", **flags)
    assert refused.returncode == 2 and "needs the references that the captions were judged against" in refused.stderr
    result = launch("reward", **flags | {"references": file, "blind": "false"})
    assert result.returncode == 0, result.stderr
    info = read_info(tmp_path / "reward", kind="objectives")
    assert info.objectives == OBJECTIVES and info.gate_widths == (128, 7)
    assert info.max_words == find_max_words(scores) > 60
    args = ["reward", tmp_path / "captions.jsonl", "--model", tmp_path / "reward", "--root", file.parent]
    code, out, err = call(*args, "--objectives")
    assert code == 0 and len(out.splitlines()) == 24
    assert set(json.loads(out.splitlines()[0])["parts"]) == {"reward", *OBJECTIVES}
    lines = [line for line in err.splitlines() if "(sample 0): seen " in line]
    assert len(lines) == 8 and all(f", {name} " in lines[0] for name in OBJECTIVES[1:])


MRDPO = {
    "rounds": 2, "sampling.num_samples": 4, "sampling.temperature": 0.9, "sampling.max_new_tokens": 30,
    "sampling.batch_size": 16, "selection.min_gap": 0.0001, "fit.steps": 1, "fit.batch_size": 4,
    "fit.learning_rate": 0.002, "early_stopping.max_worsening": 9, "early_stopping.min_pairs": 1,
    "early_stopping.min_margin": "null", "kl.num_clips": 0, "rebirth": "null", "reward.kind": "model",
    "reward.seed_clips": 3, "reward.refresh_clips": 2, "reward.audit_clips": 2, "reward.audit_samples": 2,
    "reward.min_confidence": 0.5, "reward.caution": 0.5, "reward_training.ensemble": 2, "selection.min_spreads": 0.01,
}  # fmt: skip


@pytest.mark.parametrize(
    "points", [("reward", "audit"), pytest.param(("judging", "reward", "rating", "audit"), marks=pytest.mark.slow)]
)
def test_mrdpo_with_a_reward_model(launch, trained_model, sizes, tmp_path, command_of, points):
    """Killed while training and auditing (also labelling and rating), a run ends with the bytes of an unbroken one."""
    shared = sizes | MRDPO | {"model": trained_model / "model", "clips_dir": trained_model / "clips"}
    shared |= {"feature_cache.folder": "null"}
    killed, unbroken = tmp_path / "killed", tmp_path / "unbroken"
    for point in points:
        kill_at(point, command_of("mrdpo", **shared | {"out": killed}))
    for out in (killed, unbroken):
        result = launch("mrdpo", **shared | {"out": out})
        assert result.returncode == 0, result.stderr
    assert files_of(killed) == files_of(unbroken)
    for name in sorted(files_of(unbroken)):
        assert content(killed, name) == content(unbroken, name), name
    first, second = read_json(unbroken / "summary.json")["reward"]
    # 3 and 2 clips with 4 captions each, and the audit's 2 times 2; of 8 clips with 4 captions.
    assert [first["num_judged"], second["num_judged"]] == [12, 12] and first["num_captions"] == 32
    assert first["agreement"] is None and second["agreement"] is not None
    proxy = read_json(unbroken / "summary.json")["proxy"]
    lines = [json.loads(line) for line in (unbroken / "rounds.jsonl").read_text().splitlines()]
    assert {line["stage"]: line["proxy"] for line in lines} == proxy and list(proxy) == ["SFT", "round 1", "round 2"]
    gains = [read_json(unbroken / f"round_{number}/heldout/proxy.json") for number in (1, 2)]
    assert [proxy["SFT"], proxy["round 1"]] == [0, gains[0]] and proxy["round 2"] == sum(gains) and all(gains)
    assert read_run(unbroken).summary.proxy == proxy
    assert "the judge rated 24 of 64 captions (40 calls saved)" in " ".join(result.stdout.split())
    labels = [
        {score.video for score in read_scores(unbroken / f"round_{number}" / "labels" / "scores.jsonl").scores}
        for number in (1, 2)
    ]
    assert [len(videos) for videos in labels] == [3, 2] and not labels[0] & labels[1]
    ratings = read_records(unbroken / "round_2" / "ratings.jsonl", Rating)
    assert len(ratings) == 32 and len({rating.value for rating in ratings}) > 8
    assert all(one.value == pytest.approx(one.main - 0.5 * one.parts["spread"]) for one in ratings)
    info = read_info(unbroken / "round_2" / "reward")
    # Of the five labelled clips one is held out, and one may have no captions that differ.
    assert info.base == str(trained_model / "model") and info.num_clips + info.agreement.num_clips in (4, 5)


@pytest.mark.slow
def test_mrdpo_trains_a_reward_model_on_demand(launch, trained_model, sizes, tmp_path, command_of):
    """A run is killed after its audit, and ends in two processes; the interval of two clips reaches below 50 %."""
    flags = sizes | MRDPO | {"model": trained_model / "model", "clips_dir": trained_model / "clips", "out": tmp_path}
    flags |= {"feature_cache.folder": tmp_path / "features", "reward.refresh": "on_demand"}
    kill_at("audited", command_of("mrdpo", **flags))
    assert not (tmp_path / "round_2/labels").exists()
    result = launch("mrdpo", processes=2, **flags)
    assert result.returncode == 0, result.stderr
    first, second = read_json(tmp_path / "summary.json")["reward"]
    assert [first["reason"], first["num_judged"], second["num_judged"], second["trained"]] == ["", 12, 12, True]
    assert second["reason"] in " ".join(result.stdout.split()) and "was trained again, since" in second["reason"]
    assert len({score.video for score in read_scores(tmp_path / "round_2/labels/scores.jsonl").scores}) == 2


def test_mrdpo_needs_labels(launch, trained_model, sizes, tmp_path):
    shared = sizes | MRDPO | {"model": trained_model / "model", "clips_dir": trained_model / "clips"}
    result = launch("mrdpo", **shared | {"out": tmp_path, "reward.seed_clips": 9, "feature_cache.folder": "null"})
    assert result.returncode == 2
    assert "can rate captions of 8 of 8 training clips, fewer than 9 (reward.seed_clips)" in " ".join(
        result.stderr.split()
    )
