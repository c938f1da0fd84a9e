"""Supervised fine-tuning from scratch, and of an existing model with an adapter."""

import json
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from salmonn.caption.captioner import Captioner
from salmonn.files import read_records, write_records
from salmonn.model.loading import load_network
from salmonn.model.lora import LoraConfig
from salmonn.records import Caption, Reference
from salmonn.score.formats import read_scores
from salmonn.train.data import ClipSet, ClipSource, TrainingExample
from salmonn.train.feature_cache import FeatureCacheConfig
from salmonn.train.left_out import LeftOut
from salmonn.train.loop import FitConfig
from tests.launch import forked
from tests.limits import RUN_SECONDS


def weights(path) -> dict[str, torch.Tensor]:
    return load_network(path).state_dict()


def test_from_scratch(trained_model):
    """`trained_model` is a run of the recipe: all files exist, and the loss decreased."""
    out = trained_model / "model"
    captions, scores = read_records(out / "captions.jsonl", Caption), read_scores(out / "scores.jsonl").scores
    assert len(captions) == len(scores) == 3  # held-out clips
    summary = json.loads((out / "summary.json").read_text())
    assert {"missing", "hallucination", "total", "repetition", "qa_accuracy", "clips"} < set(summary)
    assert summary["clips"] == 3 and summary["total"] == pytest.approx(
        sum(score.missing + score.incorrect + score.hallucinated for score in scores)
        / sum(score.num_events for score in scores)
    )
    steps = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == list(range(28))
    assert steps[-1]["loss"] < 0.5 * steps[0]["loss"]
    assert (out / "sft.yaml").is_file() and not (out / "checkpoints").exists()
    assert Captioner.load(out).processor.config.family == "salmonn2"


@pytest.mark.parametrize("fresh", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["forked", "torchrun"])
def test_an_adapter_changes_only_attention(trained_model, launch, tmp_path, sizes, fresh):
    result = launch(
        "sft",
        processes=1,
        fresh=fresh,
        **sizes | {"heldout_clips": 0},
        **{"out": tmp_path / "tuned", "model": trained_model / "model", "clips_dir": trained_model / "clips"},
        **{"tasks": "[human_caption]", "trainable": "[]", "lora.rank": 4, "fit.steps": 2, "fit.batch_size": 4},
        **{"feature_cache.folder": tmp_path / "tokens"},
    )
    assert result.returncode == 0, result.stderr
    before, after = weights(trained_model / "model"), weights(tmp_path / "tuned")
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        f"lm.model.layers.{layer}.self_attn.{part}_proj.weight" for layer in range(6) for part in "qkv"
    }
    assert not (tmp_path / "tuned" / "summary.json").exists()  # without held-out clips


def test_a_trained_folder_is_not_changed(trained_model, launch, trained_model_flags):
    path = trained_model / "model" / "model.safetensors"
    before = path.stat().st_mtime_ns
    result = launch("sft", out=trained_model / "model", clips_dir=trained_model / "clips", **trained_model_flags)
    assert result.returncode == 0 and path.stat().st_mtime_ns == before
    assert "already trained" in result.stderr + result.stdout


def test_a_trained_model_that_was_not_evaluated_is_evaluated(trained_model, launch, tmp_path, trained_model_flags):
    out = tmp_path / "model"
    shutil.copytree(trained_model / "model", out)
    expected = (out / "summary.json").read_bytes()
    (out / "summary.json").unlink()
    before = (out / "model.safetensors").stat().st_mtime_ns
    result = launch("sft", out=out, clips_dir=trained_model / "clips", **trained_model_flags)
    assert result.returncode == 0, result.stderr
    assert (out / "summary.json").read_bytes() == expected and (out / "model.safetensors").stat().st_mtime_ns == before


def test_own_references_need_held_out_ones(load_recipe, tmp_path):
    sft = load_recipe("sft")
    with pytest.raises(ValueError, match=r"on synthetic clips; .*--heldout-references, or pass --heldout-clips 0"):
        sft.SftConfig(out=tmp_path, references=tmp_path / "own.jsonl")
    for options in ({"heldout_clips": 0}, {"heldout_references": tmp_path / "heldout.jsonl"}):
        sft.SftConfig(out=tmp_path, references=tmp_path / "own.jsonl", **options)


def test_a_changed_evaluation_keeps_the_model(load_recipe, tmp_path):
    sft = load_recipe("sft")

    def steps(heldout, **options):
        run = sft.Run(sft.SftConfig(out=tmp_path, **options), data, heldout, None, LeftOut(None, max_failures=0))
        return [step.settings for step in sft.plan_steps(run)]

    data = ClipSet([Reference("a.mp4", caption="a star")], tmp_path)
    heldout = ClipSet([Reference("b.mp4", caption="a star")], tmp_path)
    model, evaluation = steps(heldout)
    assert steps(heldout, heldout_clips=7, max_failures=2, clips_dir=tmp_path) == [model, evaluation]
    assert steps(data)[0] == model and steps(data)[1] != evaluation
    assert (
        steps(heldout, fit=FitConfig(steps=7))[0] != model and steps(heldout, fit=FitConfig(steps=7))[1] == evaluation
    )


@pytest.mark.parametrize(
    ("trainable", "prefixes"),
    [
        (("all",), ("",)),
        (("audio.qformer", "audio.projector"), ("audio.qformer.", "audio.projector.")),
        (("vision.",), ("vision.",)),
    ],
)
def test_trainable_parts(load_recipe, captioner, tmp_path, trainable, prefixes):
    sft = load_recipe("sft")
    sft.choose_trainable(captioner.network, sft.SftConfig(out=tmp_path, trainable=trainable))
    parameters = dict(captioner.network.named_parameters())
    expected = {name for name in parameters if name.startswith(prefixes)}
    assert {name for name, parameter in parameters.items() if parameter.requires_grad} == expected and expected


def test_features_of_frozen_towers_are_cached(load_recipe, captioner, videos, tmp_path):
    sft, cache_config = load_recipe("sft"), FeatureCacheConfig(tmp_path / "features")
    left_out = LeftOut(None, max_failures=0)
    clips = [ClipSource(video, modality) for video in videos[:2] for modality in ("both", "audio")]
    examples = [TrainingExample(clip, ()) for clip in clips]
    sft.choose_trainable(captioner.network, sft.SftConfig(out=tmp_path, trainable=()))
    media = [sft.clip_reader(captioner, [], FeatureCacheConfig(folder=None), left_out)(clip) for clip in clips]
    cached = [sft.clip_reader(captioner, examples, cache_config, left_out)(clip) for clip in clips]
    for features, expected in zip(cached, captioner.encode(media, batch_size=1), strict=True):
        assert torch.equal(features.tokens, expected.tokens)
    assert len(list(cache_config.folder.iterdir())) == 4
    for part in ("vision.newline", "audio", "lm.model.embed"):
        config = sft.SftConfig(out=tmp_path, trainable=(part,))
        sft.choose_trainable(captioner.network, config)
        with pytest.raises(ValueError, match=r"omit feature_cache\.folder"):
            sft.clip_reader(captioner, examples, cache_config, left_out)


@pytest.mark.parametrize(
    ("recipe", "config", "options"),
    [
        ("sft", "SftConfig", ("references", "heldout_references")),
        ("mrdpo", "MrDpoConfig", ("references", "heldout_references")),
        ("dpo", "OfflineDpoConfig", ("preferences",)),
    ],
)
def test_a_missing_file_creates_no_folder(load_recipe, random_model, tmp_path, monkeypatch, recipe, config, options):
    """Otherwise the corrected command would be rejected as another run."""
    module = load_recipe(recipe)
    monkeypatch.setattr(module.dist, "setup", lambda **_: None)  # keep the tests' threads and logging
    files = dict.fromkeys(options, tmp_path / "gone.jsonl")
    with pytest.raises(FileNotFoundError, match="gone"):
        module.main(getattr(module, config)(out=tmp_path / "out", model=str(random_model), **files))
    assert not (tmp_path / "out").exists()


def test_an_unknown_part_is_rejected(load_recipe, captioner, tmp_path):
    sft = load_recipe("sft")
    with pytest.raises(ValueError, match="named 'ears'"):
        sft.choose_trainable(captioner.network, sft.SftConfig(out=tmp_path, trainable=("ears",)))


# All weights of the trained model, in three steps on the same clips.
ALL = {"heldout_clips": 0, "tasks": "[caption]", "fit.steps": 3, "fit.batch_size": 3, "fit.checkpoint_every": 1}


@pytest.fixture(scope="module")
def single_process(trained_model, launch, sizes, tmp_path_factory):
    """Flags and folder of a run of one process."""
    flags = sizes | ALL | {"model": trained_model / "model", "clips_dir": trained_model / "clips"}
    out = tmp_path_factory.mktemp("single_process") / "tuned"
    result = launch("sft", out=out, **flags)
    assert result.returncode == 0, result.stderr
    return flags, out


@pytest.mark.parametrize("strategy", [pytest.param("zero2", marks=pytest.mark.slow), "fsdp2"])
def test_sharded_training_of_the_towers(single_process, launch, tmp_path, strategy):
    flags, expected_folder = single_process
    result = launch("sft", processes=2, out=tmp_path / "tuned", strategy=strategy, **flags)
    assert result.returncode == 0, result.stderr
    losses, expected_losses = (
        [json.loads(line)["loss"] for line in (folder / "steps.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "tuned", expected_folder)
    )
    assert losses == pytest.approx(expected_losses, abs=1e-4) and len(losses) == 3
    before, after = weights(expected_folder), weights(tmp_path / "tuned")
    # Adam's first steps depend on the signs of gradients, which are rounding errors where gradients are almost 0.
    near = [torch.isclose(before[name], after[name], atol=1e-5).float().mean() for name in before]
    assert min(near) > 0.9 and before.keys() == after.keys()


def test_killed_while_training_saving_and_cleaning_up(single_process, command_of, launch, tmp_path):
    flags, expected_folder = single_process
    python, recipe, *options = command_of("sft", out=tmp_path / "tuned", **flags)
    for point in ("step", "checkpoint_json", "merge", "merged"):
        command = forked(python, Path(__file__).with_name("kill_at.py"), point, recipe, *options)
        result = subprocess.run(command, capture_output=True, text=True, timeout=RUN_SECONDS, check=False)
        assert result.returncode == -signal.SIGKILL and "killed" in result.stdout, (point, result.stderr)
    assert (tmp_path / "tuned" / "checkpoints").is_dir()
    result = launch("sft", out=tmp_path / "tuned", **flags)
    assert result.returncode == 0 and "already trained" in result.stdout + result.stderr
    names = {path.name for path in expected_folder.iterdir() if not path.name.startswith("events")}
    assert {path.name for path in (tmp_path / "tuned").iterdir() if not path.name.startswith("events")} == names
    for name in names - {"steps.jsonl", "sft.yaml"}:
        assert (tmp_path / "tuned" / name).read_bytes() == (expected_folder / name).read_bytes(), name


@pytest.mark.parametrize("uses", [("both", "both"), ("audio", "audio")])
def test_sharded_training_needs_one_modality(load_recipe, uses):
    examples = [TrainingExample(ClipSource(Path("a.mp4"), modality), ()) for modality in uses]
    checked = load_recipe("sft").require_one_modality(examples, strategy="zero2")
    assert {example.clip.needs_both for example in checked} == {uses[0] == "both"}


def test_sharded_training_rejects_several_modalities(load_recipe):
    modalities = ("both", "visual", "both")
    examples = [TrainingExample(ClipSource(Path("a.mp4"), modality), ()) for modality in modalities]
    check = load_recipe("sft").require_one_modality
    with pytest.raises(ValueError, match="the 3 examples use the modalities both and visual, but with strategy fsdp2"):
        check(examples, strategy="fsdp2")
    with pytest.raises(ValueError, match="zero3 cannot train the encoders; use fsdp2"):
        check(examples[:1], strategy="zero3")


def test_unusable_references_are_rejected_with_their_line(load_recipe, random_model, videos, tmp_path, monkeypatch):
    sft, path = load_recipe("sft"), tmp_path / "references.jsonl"
    monkeypatch.setattr(sft.dist, "setup", lambda **_: None)  # keep the tests' threads and logging
    shutil.copy(videos[0], tmp_path / "a.mp4")
    config = sft.SftConfig(
        model=str(random_model), out=tmp_path / "out", references=path, heldout_clips=0, tasks=("caption",)
    )
    for reference, message in (
        (Reference("a.mp4", caption=" "), "a.mp4 has no caption; add it, or remove caption from tasks"),
        (Reference("a.mp4", caption="<|im_end|>"), "special token"),
    ):
        write_records(path, [reference])
        with pytest.raises(ValueError, match=f"line 1: .*{message}"):
            sft.main(config)
    with pytest.raises(ValueError, match="no projection q_prj"):
        sft.main(replace(config, trainable=(), lora=LoraConfig(targets=("q_prj", "v_proj"))))
    assert not (tmp_path / "out").exists()
