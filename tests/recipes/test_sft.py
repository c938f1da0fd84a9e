"""Supervised fine-tuning from nothing, and with an adapter on a model that is there."""

import json
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from salmonn.caption.captioner import Captioner
from salmonn.model.loading import load_network
from salmonn.records import Caption, read_records
from salmonn.score.formats import read_scores
from salmonn.train.data import ClipSource, TrainingExample
from salmonn.train.feature_cache import FeatureCacheConfig
from tests.launch import forked


def weights(path) -> dict[str, torch.Tensor]:
    return load_network(path).state_dict()


def test_from_nothing(taught):
    """`taught` is the recipe's own run: everything promised is there, and it learnt."""
    out = taught / "model"
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
def test_an_adapter_changes_attention_alone(taught, launch, tmp_path, sizes, fresh):
    result = launch(
        "sft",
        processes=1,
        fresh=fresh,
        **sizes | {"heldout_clips": 0},
        **{"out": tmp_path / "tuned", "model": taught / "model", "clips_dir": taught / "clips"},
        **{"tasks": "[human_caption]", "trainable": "[]", "lora.rank": 4, "fit.steps": 2, "fit.batch_size": 4},
        **{"feature_cache.folder": tmp_path / "tokens"},
    )
    assert result.returncode == 0, result.stderr
    before, after = weights(taught / "model"), weights(tmp_path / "tuned")
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        f"lm.model.layers.{layer}.self_attn.{part}_proj.weight" for layer in range(6) for part in "qkv"
    }
    assert not (tmp_path / "tuned" / "summary.json").exists()  # nothing was measured


def test_a_trained_folder_is_left_alone(taught, launch, taught_flags):
    path = taught / "model" / "model.safetensors"
    before = path.stat().st_mtime_ns
    result = launch("sft", out=taught / "model", clips_dir=taught / "clips", **taught_flags)
    assert result.returncode == 0 and path.stat().st_mtime_ns == before
    assert "already trained" in result.stderr + result.stdout


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
    wanted = {name for name in parameters if name.startswith(prefixes)}
    assert {name for name, parameter in parameters.items() if parameter.requires_grad} == wanted and wanted


def test_frozen_towers_run_once_where_tokens_are_kept(load_recipe, captioner, videos, tmp_path):
    sft, tokens = load_recipe("sft"), FeatureCacheConfig(tmp_path / "tokens")
    clips = [ClipSource(video, modality) for video in videos[:2] for modality in ("both", "audio")]
    examples = [TrainingExample(clip, ()) for clip in clips]
    sft.choose_trainable(captioner.network, sft.SftConfig(out=tmp_path, trainable=()))
    media = [sft.clip_reader(captioner, [], FeatureCacheConfig(folder=None))(clip) for clip in clips]
    blocks = [sft.clip_reader(captioner, examples, tokens)(clip) for clip in clips]
    for block, alone in zip(blocks, captioner.encode(media, batch_size=1), strict=True):
        assert torch.equal(block.tokens, alone.tokens)
    assert len(list(tokens.folder.iterdir())) == 4
    for part in ("vision.newline", "audio", "lm.model.embed"):
        config = sft.SftConfig(out=tmp_path, trainable=(part,))
        sft.choose_trainable(captioner.network, config)
        with pytest.raises(ValueError, match=r"omit feature_cache\.folder"):
            sft.clip_reader(captioner, examples, tokens)


@pytest.mark.parametrize(
    ("recipe", "config", "given"),
    [
        ("sft", "SftConfig", ("references",)),
        ("mrdpo", "MrDpoConfig", ("references", "heldout_references")),
        ("dpo", "OfflineDpoConfig", ("preferences",)),
    ],
)
def test_a_file_that_is_not_there_claims_no_folder(
    load_recipe, random_model, tmp_path, monkeypatch, recipe, config, given
):
    """Or the mended command would be refused as another run."""
    module = load_recipe(recipe)
    monkeypatch.setattr(module.dist, "setup", lambda: None)  # threads and log of the tests stay theirs
    files = dict.fromkeys(given, tmp_path / "gone.jsonl")
    with pytest.raises(FileNotFoundError, match="gone"):
        module.main(getattr(module, config)(out=tmp_path / "out", model=str(random_model), **files))
    assert not (tmp_path / "out").exists()


def test_an_unknown_part_is_named(load_recipe, captioner, tmp_path):
    sft = load_recipe("sft")
    with pytest.raises(ValueError, match="named 'ears'"):
        sft.choose_trainable(captioner.network, sft.SftConfig(out=tmp_path, trainable=("ears",)))


# From the taught model, all of it trained, on three steps of the same clips.
ALL = {"heldout_clips": 0, "tasks": "[caption]", "fit.steps": 3, "fit.batch_size": 3, "fit.checkpoint_every": 1}


@pytest.fixture(scope="module")
def whole(taught, launch, sizes, tmp_path_factory):
    """Flags of a run of one process, and its folder."""
    flags = sizes | ALL | {"model": taught / "model", "clips_dir": taught / "clips"}
    out = tmp_path_factory.mktemp("whole") / "tuned"
    result = launch("sft", out=out, **flags)
    assert result.returncode == 0, result.stderr
    return flags, out


@pytest.mark.parametrize("strategy", ["zero2", "fsdp2"])
def test_towers_in_training_on_engines_that_split(whole, launch, tmp_path, strategy):
    flags, alone = whole
    result = launch("sft", processes=2, out=tmp_path / "tuned", strategy=strategy, **flags)
    assert result.returncode == 0, result.stderr
    mine, theirs = (
        [json.loads(line)["loss"] for line in (folder / "steps.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "tuned", alone)
    )
    assert mine == pytest.approx(theirs, abs=1e-4) and len(mine) == 3
    before, after = weights(alone), weights(tmp_path / "tuned")
    # Adam's first steps go by gradients' signs, of which those that are all but 0 are rounding.
    near = [torch.isclose(before[name], after[name], atol=1e-5).float().mean() for name in before]
    assert min(near) > 0.9 and before.keys() == after.keys()


def test_killed_in_a_step_in_saving_and_in_clearing(whole, command_of, launch, tmp_path):
    flags, alone = whole
    python, recipe, *options = command_of("sft", out=tmp_path / "tuned", **flags)
    for point in ("step", "mark", "merge", "merged"):
        line = forked(python, Path(__file__).with_name("kill_at.py"), point, recipe, *options)
        result = subprocess.run(line, capture_output=True, text=True, timeout=900, check=False)
        assert result.returncode == -signal.SIGKILL and "killed" in result.stdout, (point, result.stderr)
    assert (tmp_path / "tuned" / "checkpoints").is_dir()
    result = launch("sft", out=tmp_path / "tuned", **flags)
    assert result.returncode == 0 and "already trained" in result.stdout + result.stderr
    names = {path.name for path in alone.iterdir() if not path.name.startswith("events")}
    assert {path.name for path in (tmp_path / "tuned").iterdir() if not path.name.startswith("events")} == names
    for name in names - {"steps.jsonl", "sft.yaml"}:
        assert (tmp_path / "tuned" / name).read_bytes() == (alone / name).read_bytes(), name


@pytest.mark.parametrize("uses", [("both", "both"), ("audio", "audio")])
def test_examples_of_one_kind_for_engines_that_split(load_recipe, uses):
    examples = [TrainingExample(ClipSource(Path("a.mp4"), modality), ()) for modality in uses]
    checked = load_recipe("sft").require_one_modality(examples, strategy="zero2")
    assert {one.clip.needs_both for one in checked} == {uses[0] == "both"}


def test_examples_of_two_kinds_are_refused_by_engines_that_split(load_recipe):
    modalities = ("both", "visual", "both")
    examples = [TrainingExample(ClipSource(Path("a.mp4"), modality), ()) for modality in modalities]
    check = load_recipe("sft").require_one_modality
    with pytest.raises(ValueError, match="the 3 examples use the modalities both and visual, but with strategy fsdp2"):
        check(examples, strategy="fsdp2")
    with pytest.raises(ValueError, match="zero3 cannot train the encoders; use fsdp2"):
        check(examples[:1], strategy="zero3")
