"""Adapters: trained weights, merging, and the reference policy with the adapter disabled."""

import json

import pytest
import torch
from safetensors.torch import load_file

from salmonn.caption.processor import PromptRow
from salmonn.model.loading import Placement, load_network
from salmonn.model.lora import (
    LoraConfig,
    MergeRounding,
    attach_lora,
    merge_adapter,
    merge_in_float32,
    save_adapter,
)

CONFIG = LoraConfig(rank=4, alpha=8)


@pytest.fixture
def inputs(captioner, media):
    return captioner.processor.collate([PromptRow(0, "Tell.", "a red circle appears")], [media[0]])


def test_only_the_attention_of_the_decoder_is_trained(captioner):
    attach_lora(captioner.network, CONFIG, seed=0)
    trainable = {name for name, parameter in captioner.network.named_parameters() if parameter.requires_grad}
    assert trainable == {
        f"lm.base_model.model.model.layers.{layer}.self_attn.{part}_proj.lora_{half}.default.weight"
        for layer in range(6)
        for part in "qkv"
        for half in "AB"
    }


def test_only_the_configured_targets_are_trained(captioner):
    attach_lora(captioner.network, LoraConfig(rank=2, targets=("v_proj",)), seed=0)
    trainable = [name for name, parameter in captioner.network.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 12 and all(".v_proj.lora_" in name for name in trainable)


@torch.no_grad()
def test_a_fresh_adapter_changes_nothing(captioner, inputs):
    before = captioner.network(inputs)
    attach_lora(captioner.network, CONFIG, seed=0)
    assert torch.equal(captioner.network.eval()(inputs), before)


def test_the_seed_affects_only_the_adapter(random_model):
    results = []
    for seed in (5, 5, 6):
        network = load_network(random_model)
        torch.manual_seed(0)
        attach_lora(network, CONFIG, seed=seed)
        state = {name: value for name, value in network.state_dict().items() if "lora_A" in name}
        results.append((torch.cat([value.flatten() for value in state.values()]), torch.rand(3)))
    assert torch.equal(results[0][0], results[1][0]) and not torch.equal(results[0][0], results[2][0])
    torch.manual_seed(0)
    expected = torch.rand(3)
    assert all(torch.equal(after, expected) for _, after in results)


@torch.no_grad()
def test_merged_is_base_plus_scaled_product(captioner, inputs, fill_adapter):
    network = captioner.network
    base = network.lm.model.layers[2].self_attn.k_proj.weight.clone()
    base_o_proj = network.lm.model.layers[2].self_attn.o_proj.weight.clone()
    plain = network(inputs)
    attach_lora(network, CONFIG, seed=0)
    fill_adapter(network)
    layer = network.lm.base_model.model.model.layers[2].self_attn.k_proj
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight  # (128, 4) @ (4, 128)
    with_adapter = network.eval()(inputs)
    merge_adapter(network)
    merged = network.lm.model.layers[2].self_attn
    assert torch.allclose(merged.k_proj.weight, base + 2.0 * product, atol=1e-6)  # alpha / rank = 8 / 4
    assert torch.equal(merged.o_proj.weight, base_o_proj)
    assert torch.allclose(network(inputs), with_adapter, atol=1e-4, rtol=1e-5)
    assert (with_adapter - plain).abs().max() > 1e-2
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not any("lora" in name for name in network.state_dict())


@torch.no_grad()
def test_the_disabled_adapter_is_the_reference_policy(captioner, inputs, fill_adapter):
    network = captioner.network
    plain = network(inputs)
    attach_lora(network, CONFIG, seed=0)
    fill_adapter(network)
    network.eval()
    policy = network(inputs)
    with network.lm.disable_adapter():
        assert torch.equal(network(inputs), plain)
    assert torch.equal(network(inputs), policy) and not torch.equal(policy, plain)


def test_a_second_adapter_is_rejected_until_the_first_is_merged(captioner):
    attach_lora(captioner.network, CONFIG, seed=0)
    with pytest.raises(ValueError, match="already has an adapter; merge it"):
        attach_lora(captioner.network, CONFIG, seed=0)
    merge_adapter(captioner.network)
    attach_lora(captioner.network, CONFIG, seed=0)


def test_saved_as_a_peft_folder(captioner, tmp_path):
    attach_lora(captioner.network, CONFIG, seed=0)
    save_adapter(captioner.network, tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (values["r"], values["lora_alpha"], values["lora_dropout"]) == (4, 8, 0.05)
    assert sorted(values["target_modules"]) == ["k_proj", "q_proj", "v_proj"]
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert len(weights) == 36 and all("lora_" in name for name in weights)


def test_a_merged_model_is_saved_and_loaded_like_any_other(captioner, inputs, fill_adapter, tmp_path):
    from salmonn.caption.captioner import Captioner

    attach_lora(captioner.network, CONFIG, seed=0)
    fill_adapter(captioner.network)
    merge_adapter(captioner.network)
    captioner.save(tmp_path)
    with torch.no_grad():
        assert torch.equal(Captioner.load(tmp_path).network(inputs), captioner.network.eval()(inputs))


def test_every_target_must_be_a_projection(captioner):
    with pytest.raises(ValueError, match=r"no projection q_prj, norm; it has .*down_proj.*q_proj"):
        attach_lora(captioner.network, LoraConfig(targets=("q_prj", "v_proj", "norm")), seed=0)
    assert not hasattr(captioner.network.lm, "peft_config")


@torch.no_grad()
def test_rounds_are_summed_in_float32_and_rounded_once(random_model, tmp_path):
    """A weight of 1 in bfloat16 has steps of 2^-7 = 0.0078: an update of 0.003 is lost, two of them are a step."""
    name = "lm.model.layers.0.self_attn.q_proj.weight"

    def load():
        network = load_network(random_model, placement=Placement(dtype="bfloat16", attention="sdpa"))
        network.get_parameter(name).fill_(1.0)
        return network

    for number in (1, 2):
        network = load()
        attach_lora(network, LoraConfig(rank=1, alpha=3, targets=("q_proj",)), seed=0)
        for key, value in network.lm.named_parameters():
            if ".lora_" in key:
                value.fill_(1.0 if "lora_A" in key else 0.001 * ("layers.0." in key))
        save_adapter(network, tmp_path / f"adapter_{number}")
    folders = [tmp_path / "adapter_1", tmp_path / "adapter_2"]
    one, two = load(), load()
    first, second = merge_in_float32(one, folders[:1]), merge_in_float32(two, folders)
    assert (one.get_parameter(name) == 1.0).all() and first == MergeRounding(kept=0.0, error=1.0)
    assert (two.get_parameter(name) == 1.0 + 2**-7).all()
    assert second.kept == pytest.approx(2**-7 / 0.003, rel=1e-5)
    assert second.error == pytest.approx(2**-7 / 0.003 - 1, rel=1e-5)
    other = "lm.model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(two.get_parameter(other), load().get_parameter(other))


@torch.no_grad()
def test_float32_rounds_equal_peft_merging_one_by_one(random_model, fill_adapter, tmp_path):
    """Bit for bit; the second adapter has another rank and other targets."""
    network, folders = load_network(random_model), [tmp_path / "first", tmp_path / "second"]
    for folder, config in zip(
        folders, (CONFIG, LoraConfig(rank=2, alpha=3, targets=("v_proj", "o_proj"))), strict=True
    ):
        attach_lora(network, config, seed=1)
        fill_adapter(network)
        save_adapter(network, folder)
        merge_adapter(network)
    summed = load_network(random_model)
    rounding = merge_in_float32(summed, folders)
    assert rounding.kept == pytest.approx(1, abs=1e-4) and rounding.error < 1e-4
    expected = network.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in summed.state_dict().items())
    assert not any(parameter.requires_grad for parameter in summed.parameters())
