"""Supervised fine-tuning from nothing, and with an adapter on a model that is there."""

import json

import pytest
import torch

from salmonn.caption.captioner import Captioner
from salmonn.model.load import load_network
from salmonn.records import Caption, read_records
from salmonn.score.files import read_scores


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
    assert (out / "sft.yaml").is_file() and not (out / "checkpoint.safetensors").exists()
    assert Captioner.load(out).processor.config.family == "salmonn2"


def test_an_adapter_changes_attention_alone(taught, launch, tmp_path, sizes):
    result = launch(
        "sft",
        **sizes | {"heldout_clips": 0},
        **{"out": tmp_path / "tuned", "model": taught / "model", "clips_dir": taught / "clips"},
        **{"tasks": "[human_caption]", "trainable": "[]", "lora.rank": 4, "fit.steps": 2, "fit.batch_size": 4},
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
    assert "trained already" in result.stderr + result.stdout


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


@pytest.mark.parametrize(
    ("recipe", "config", "given"),
    [
        ("sft", "SftConfig", ("references",)),
        ("mrdpo", "MrDpoConfig", ("references", "heldout_references")),
        ("dpo", "GivenDpoConfig", ("preferences",)),
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
    with pytest.raises(ValueError, match="named ears"):
        sft.choose_trainable(captioner.network, sft.SftConfig(out=tmp_path, trainable=("ears",)))
