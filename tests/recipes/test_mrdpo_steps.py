"""Which settings of mrDPO each step of a run depends on."""

import json
from dataclasses import replace
from pathlib import Path

from salmonn.preference.losses import LossConfig
from salmonn.preference.reward import RewardConfig
from salmonn.preference.reward_model import REWARD_FORMAT
from salmonn.preference.selection import SelectionConfig
from salmonn.records import Reference
from salmonn.score.config import JudgeConfig
from salmonn.train.data import ClipSet
from salmonn.train.mrdpo import MrDpoConfig, RebirthConfig
from salmonn.train.mrdpo_steps import plan_steps
from salmonn.train.rounds import EarlyStopConfig


def test_ratings_of_any_reward_are_deleted_with_their_step():
    clips = ClipSet([Reference("a.mp4", caption="a star")], Path("clips"))
    steps = plan_steps(MrDpoConfig(), clips, clips, rating_file="own.jsonl")
    assert "round_1/own.jsonl" in next(step.files for step in steps if step.name == "round_1/ratings")


def test_steps_of_a_run_depend_on_their_own_settings(load_recipe, tmp_path):
    """For every setting, the first step that it changes; what other steps are made with stays as it is."""
    clips = ClipSet([Reference("a.mp4", caption="a star")], Path("clips"))
    recipe, base = load_recipe("mrdpo"), MrDpoConfig(rounds=2)

    def steps_of(config, train=clips, heldout=clips):
        return {s.name: s for s in recipe.plan_steps(config, train, heldout, rating_file="scores.jsonl")}

    def changed(config, *, before=None, **sets):
        before, after = before or steps_of(base), steps_of(config, **sets)
        return [name for name, step in before.items() if name in after and after[name].settings != step.settings]

    sampling, fit = base.sampling, base.fit
    assert changed(replace(base, clips_dir=Path("moved"), max_failures=3, strategy="zero2", out=Path("b"))) == []
    assert changed(replace(base, sampling=replace(sampling, batch_size=8))) == []
    assert changed(replace(base, fit=replace(fit, gradient_accumulation_steps=2, checkpoint_every=7))) == []
    assert changed(replace(base, sampling=replace(sampling, temperature=1.0))) == [
        "round_1/captions",
        "round_2/captions",
    ]
    assert changed(replace(base, reward=RewardConfig(repetition_weight=2.0))) == ["round_1/ratings", "round_2/ratings"]
    (tmp_path / "reward.json").write_text(
        json.dumps(
            {"kind": "pairwise", "pooling": "last", "base": "b", "base_fingerprint": "f", "format": REWARD_FORMAT}
        )
    )
    (tmp_path / "head.safetensors").touch()
    base = replace(base, reward=RewardConfig("model", model=tmp_path, refresh_clips=0))
    before = steps_of(base)
    (tmp_path / "head.safetensors").write_text("changed")
    assert changed(base, before=before) == ["round_1/ratings", "round_2/ratings"]
    base = replace(base, reward=RewardConfig())
    assert changed(replace(base, selection=SelectionConfig(min_gap=0.2))) == ["round_1/pairs", "round_2/pairs"]
    assert changed(replace(base, fit=replace(fit, steps=7))) == ["round_1/model", "round_2/model"]
    assert changed(replace(base, learning_rate_decay=0.5)) == ["round_2/model"]
    assert changed(replace(base, last_round_weight=0.5)) == ["round_2/model"]
    assert changed(replace(base, reference_policy="run_start")) == ["round_2/model"]
    assert changed(replace(base, qa_fraction=0.5)) == ["round_2/model"]  # only the last round has questions
    assert changed(replace(base, early_stopping=EarlyStopConfig(max_worsening=1.0))) == ["rebirth/captions"]
    assert changed(replace(base, rounds=3)) == ["rebirth/captions"]
    assert changed(replace(base, rebirth=RebirthConfig(start="best"))) == ["rebirth/model"]
    teacher = replace(base, rebirth=RebirthConfig(tailor="teacher"))
    assert changed(teacher) == ["rebirth/captions", "rebirth/model"]
    draft = steps_of(replace(base, rebirth=RebirthConfig(tailor="draft")))
    assert draft["rebirth/model"].needs == ("rebirth/influence",) and "rebirth/captions" not in draft
    cycle = replace(base, reward=RewardConfig("voter", voter="cycle"))
    assert steps_of(cycle)["sft/heldout"].settings["reward.voter"] == "cycle"
    other = ClipSet([Reference("b.mp4", caption="a star")], Path("clips"))
    heldout_steps = ["sft/heldout", "round_1/heldout", "round_2/heldout", "rebirth/heldout"]
    assert changed(base, heldout=other) == heldout_steps
    assert changed(base, heldout=ClipSet(clips.references, Path("moved"))) == []
    judge = JudgeConfig(kind="openai", model="m", base_url="http://127.0.0.1:1/v1", concurrency=3)
    assert set(changed(replace(base, judge=judge))) == {*heldout_steps, "round_1/ratings", "round_2/ratings"}


def test_steps_of_a_run_with_a_voter(load_recipe):
    """Exploitability on held-out clips depends on a simulated voter; no other voter has it."""
    clips = ClipSet([Reference("a.mp4", caption="a star")], Path("clips"))

    def settings_of(kind):
        config = MrDpoConfig(rounds=1, reward=RewardConfig("voter", voter=kind), rebirth=None)
        steps = load_recipe("mrdpo").plan_steps(config, clips, clips, rating_file="scores.jsonl")
        return {step.name: step.settings for step in steps if "reward.voter" in step.settings}

    assert list(settings_of("cycle")) == ["sft/heldout", "round_1/ratings", "round_1/heldout"]
    assert list(settings_of("llm")) == ["round_1/ratings"]
    # The scores are those of the reward "judge"; other pairs are made from them.
    judge = settings_of("judge")
    assert judge["round_1/ratings"]["reward.kind"] == "judge" and judge["round_1/pairs"]["reward.kind"] == "voter"


def test_steps_of_a_round_with_extrapolation(load_recipe):
    """The half step comes before the pairs of the round, which depend on it."""
    clips = ClipSet([Reference("a.mp4", caption="a star")], Path("clips"))
    base = MrDpoConfig(
        rounds=1, loss=LossConfig("nash", ce_weight=0.0), reward=RewardConfig("voter"), rebirth=None, qa_fraction=0.5
    )

    def steps_of(config):
        steps = load_recipe("mrdpo").plan_steps(config, clips, clips, rating_file="ratings.jsonl")
        return {step.name: step for step in steps}

    plain, steps = steps_of(base), steps_of(replace(base, extrapolate=True))
    added = ["round_1/half/pairs", "round_1/half/model", "round_1/half/captions", "round_1/wins"]
    assert [name for name in steps if name not in plain] == added
    assert list(steps).index("round_1/ratings") < list(steps).index(added[0]) < list(steps).index("round_1/pairs")
    assert steps["round_1/pairs"].needs == ("round_1/wins",)
    assert steps["round_1/wins"].needs == ("round_1/captions", "round_1/half/captions")
    assert [name for name in plain if steps[name].settings != plain[name].settings] == ["round_1/pairs"]
    changed = steps_of(replace(base, extrapolate=True, qa_fraction=0.25))
    assert [name for name in steps if steps[name].settings != changed[name].settings] == ["round_1/model"]


def test_ratings_depend_on_when_the_reward_model_is_trained_again():
    """The default is left out, so that earlier runs can be resumed."""
    clips = ClipSet([Reference("a.mp4", caption="a star")], Path("clips"))
    always, on_demand = (
        plan_steps(
            MrDpoConfig(reward=RewardConfig("model", refresh=refresh)), clips, clips, rating_file="ratings.jsonl"
        )
        for refresh in ("always", "on_demand")
    )
    for one, other in zip(always, on_demand, strict=True):
        added = {"reward.refresh": "on_demand"} if one.name.endswith("/ratings") else {}
        assert dict(other.settings) == {**one.settings, **added}
