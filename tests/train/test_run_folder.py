"""Run folders: partial files of killed processes, records that are created once, and merged adapters."""

import pytest
import torch

from salmonn.caption.captioner import Captioner
from salmonn.model.lora import LoraConfig, attach_lora, read_factors
from salmonn.records import Caption
from salmonn.train.checkpoint import Checkpoints, checkpointed
from salmonn.train.run_folder import RunConfig, is_complete, load_or_create, merge_checkpoint, num_bytes, open_run
from salmonn.train.run_steps import Step


def test_partial_files_of_killed_processes_are_removed(tmp_path):
    run = tmp_path / "run"
    (run / "round_1" / ".adapter.77.tmp").mkdir(parents=True)
    (run / "round_1" / ".adapter.77.tmp" / "half").touch()
    (run / ".pairs.jsonl.77.tmp").touch()
    (run / "round_1" / "captions.jsonl").touch()
    open_run(RunConfig(out=run, model="tiny"), [Step("model", {"seed": 0}, ("*.jsonl",), "x.jsonl")], name="recipe")
    names = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
    assert names == ["recipe.yaml", "round_1/captions.jsonl", "settings.json"]


def test_a_machine_that_cannot_see_the_folder_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr("salmonn.train.run_folder.dist.is_main", lambda: False)
    with pytest.raises(ValueError, match=r"does not see .*all machines of a run must share that folder"):
        open_run(RunConfig(out=tmp_path / "elsewhere", model="tiny"), [], name="recipe")


def test_records_are_created_once(tmp_path):
    calls = []

    def create():
        calls.append(1)
        return [Caption("a.mp4", "a star")]

    for _ in range(2):
        assert load_or_create(tmp_path / "c.jsonl", Caption, create) == [Caption("a.mp4", "a star")]
    assert calls == [1]


def test_checkpoints_of_a_finished_stage_are_removed(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    assert not is_complete(tmp_path) and (tmp_path / "checkpoints").is_dir()
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "config.json").touch()
    assert is_complete(tmp_path) and not (tmp_path / "checkpoints").exists()


def test_checkpoints_of_an_interrupted_stage_are_kept(tmp_path):
    with pytest.raises(KeyboardInterrupt), checkpointed(tmp_path) as checkpoints:
        checkpoints.save({"model.a": torch.zeros(2)}, step=3)
        raise KeyboardInterrupt
    assert Checkpoints(tmp_path / "checkpoints").latest().step == 3


def test_the_checkpoint_is_merged_into_the_weights_on_disk(captioner, random_model, tmp_path):
    """The network in memory may have changed during training; here its weights are overwritten."""
    lora, name = LoraConfig(rank=2, alpha=6, dropout=0.0), "lm.model.layers.0.self_attn.q_proj.weight"
    before = captioner.network.get_parameter(name).detach().clone()
    attach_lora(captioner.network, lora, seed=0)
    trained = {
        f"model.{key}": torch.full_like(value, 0.1)
        for key, value in captioner.network.named_parameters()
        if value.requires_grad
    }
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(trained, step=1)
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
    # With a weight of 0.5, the mean of both models; the saved adapter is what was merged.
    options = {"base": random_model, "lora": lora, "config": config, "folder": tmp_path / "half"}
    half = Captioner.load(merge_checkpoint(checkpoints.latest(), **options, weight=0.5))
    assert torch.allclose(half.network.get_parameter(name), before + 0.03, atol=1e-6)
    update = read_factors(tmp_path / "half" / "adapter")[name.removeprefix("lm.").removesuffix(".weight")]
    assert torch.allclose(update.product(torch.device("cpu")), torch.tensor(0.03), atol=1e-6)
    size = (tmp_path / "merged" / "model.safetensors").stat().st_size
    assert 0 <= size - num_bytes(result) < 100_000
