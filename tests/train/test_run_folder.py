"""Run folders: leftovers of killed processes, records that are created once, merging of a trained adapter."""

from dataclasses import dataclass

import pytest
import torch

from salmonn.caption.captioner import Captioner
from salmonn.model.lora import LoraConfig, attach_lora
from salmonn.records import Caption
from salmonn.train.checkpoint import Checkpoints, checkpointed
from salmonn.train.run_folder import RunConfig, is_complete, load_or_create, merge_checkpoint, num_bytes, open_run


@dataclass(frozen=True)
class Config:
    steps: int = 3


def test_what_a_killed_process_left_half_written_is_cleared(tmp_path):
    run = tmp_path / "run"
    (run / "round_1" / ".adapter.77.tmp").mkdir(parents=True)
    (run / "round_1" / ".adapter.77.tmp" / "half").touch()
    (run / ".pairs.jsonl.77.tmp").touch()
    (run / "round_1" / "captions.jsonl").touch()
    open_run(run, Config(), name="recipe")
    left = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
    assert left == ["recipe.yaml", "round_1/captions.jsonl"]
    open_run(run, Config(), name="recipe")
    with pytest.raises(ValueError, match="another configuration"):
        open_run(run, Config(steps=4), name="recipe")


def test_a_machine_that_does_not_see_the_folder_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("salmonn.train.run_folder.dist.is_main", lambda: False)
    with pytest.raises(ValueError, match=r"does not see .*all machines of a run must share that folder"):
        open_run(tmp_path / "elsewhere", Config(), name="recipe")


def test_records_are_made_once(tmp_path):
    made = []

    def make():
        made.append(1)
        return [Caption("a.mp4", "a star")]

    for _ in range(2):
        assert load_or_create(tmp_path / "c.jsonl", Caption, make) == [Caption("a.mp4", "a star")]
    assert made == [1]


def test_checkpoints_that_outlive_their_stage_are_cleared(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    assert not is_complete(tmp_path) and (tmp_path / "checkpoints").is_dir()
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "config.json").touch()
    assert is_complete(tmp_path) and not (tmp_path / "checkpoints").exists()


def test_checkpoints_are_kept_where_a_stage_breaks_off(tmp_path):
    with pytest.raises(KeyboardInterrupt), checkpointed(tmp_path) as checkpoints:
        checkpoints.save({"model.a": torch.zeros(2)}, step=3)
        raise KeyboardInterrupt
    assert Checkpoints(tmp_path / "checkpoints").latest().step == 3


def test_what_was_learnt_is_put_on_the_weights_on_disk(captioner, random_model, tmp_path):
    """Whatever became of the network in training: its weights are spoilt here."""
    lora, name = LoraConfig(rank=2, alpha=6, dropout=0.0), "lm.model.layers.0.self_attn.q_proj.weight"
    before = captioner.network.get_parameter(name).detach().clone()
    attach_lora(captioner.network, lora, seed=0)
    learnt = {
        f"model.{key}": torch.full_like(value, 0.1)
        for key, value in captioner.network.named_parameters()
        if value.requires_grad
    }
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(learnt, step=1)
    with torch.no_grad():
        for parameter in captioner.network.parameters():
            parameter.fill_(7.0)
    config = RunConfig(out=tmp_path, model=str(random_model))
    merged = merge_checkpoint(checkpoints.latest(), base=random_model, lora=lora, config=config, folder=tmp_path)
    # alpha / r * B A = 3 * sum over 2 ranks of 0.1 * 0.1 = 0.06 everywhere.
    result = Captioner.load(merged)
    assert merged == tmp_path / "merged" and result.name == str(merged)
    assert torch.allclose(result.network.get_parameter(name), before + 0.06, atol=1e-6)
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    size = (tmp_path / "merged" / "model.safetensors").stat().st_size
    assert 0 <= size - num_bytes(result) < 100_000
