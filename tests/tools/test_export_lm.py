"""The language model alone, as transformers' own class runs it on the embeddings of our prompts."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

from salmonn.caption.processor import PromptRow
from salmonn.config import run_recipe


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("export_lm")


@torch.no_grad()
def test_transformers_runs_the_exported_model_on_our_embeddings(tool, captioner, random_model, media, tmp_path):
    flags = ["--model", str(random_model), "--dtype", "float32", "--out", str(tmp_path / "lm")]
    run_recipe(tool.main, tool.ExportConfig, description="", args=flags)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "lm").eval()
    assert isinstance(model, Qwen2ForCausalLM) and not list((tmp_path / "lm").glob("*.py"))
    inputs = captioner.processor.collate([PromptRow(0, "Tell.", "a red circle appears")], media[:1])
    ours = captioner.network(inputs, distributions=True)
    theirs = model(inputs_embeds=captioner.network.embed(inputs)).logits[0, -len(ours) - 1 : -1].log_softmax(-1)
    assert ours.std() > 0.5 and (ours - theirs).abs().max() < 1e-4


def test_the_decoder_of_2_plus_is_exported_for_the_plugin_only(tool, plus, random_plus, tmp_path):
    flags = ["--model", str(random_plus), "--dtype", "float32", "--out", str(tmp_path / "lm")]
    run_recipe(tool.main, tool.ExportConfig, description="", args=flags)
    config = json.loads((tmp_path / "lm" / "config.json").read_text())
    assert config["architectures"] == ["SalmonnForCausalLM"] and config["model_type"] == "qwen2"
    assert config["rope_parameters"]["mrope_section"] == [8, 4, 4]
    saved = load_file(tmp_path / "lm" / "model.safetensors")
    layers = plus.network.lm.model.language_model.state_dict()
    assert saved.keys() == {f"model.{name}" for name in layers}  # the output layer is tied to the embeddings
    assert all(torch.equal(saved[f"model.{name}"], weight) for name, weight in layers.items())
