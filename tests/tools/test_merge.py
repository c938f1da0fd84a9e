"""Merging a model and its adapter into one model folder."""

import pytest
import torch
from safetensors.torch import load_file

from salmonn.config import run_recipe
from salmonn.model.loading import load_network
from salmonn.model.lora import LoraConfig, attach_lora, merge_adapter, save_adapter


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("merge")


def test_the_merged_model_equals_model_and_adapter(tool, captioner, random_model, fill_adapter, videos, tmp_path):
    attach_lora(captioner.network, LoraConfig(rank=4, alpha=8), seed=0)
    fill_adapter(captioner.network)
    save_adapter(captioner.network, tmp_path / "adapter")
    merge_adapter(captioner.network)
    flags = ["--model", str(random_model), "--adapter", str(tmp_path / "adapter"), "--dtype", "float32"]
    run_recipe(tool.main, tool.MergeConfig, description="", args=[*flags, "--out", str(tmp_path / "merged")])
    network = load_network(tmp_path / "merged")
    expected = dict(captioner.network.named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in network.named_parameters())
    reloaded = type(captioner).load(tmp_path / "merged")
    assert reloaded.caption(videos[0]).text == captioner.caption(videos[0]).text


def test_the_default_is_16_bits_and_a_failure_leaves_no_files(tool, random_model, tmp_path, capsys):
    flags = ["--model", str(random_model), "--adapter", str(tmp_path), "--out", str(tmp_path / "merged")]
    with pytest.raises(SystemExit) as caught:
        run_recipe(tool.main, tool.MergeConfig, description="", args=flags)
    assert caught.value.code == 2 and "has no readable adapter" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
    attach_lora(network := load_network(random_model), LoraConfig(rank=2, alpha=2), seed=0)
    save_adapter(network, tmp_path)
    run_recipe(tool.main, tool.MergeConfig, description="", args=flags)
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
