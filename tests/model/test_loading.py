"""Model folders: saving and loading are inverse, and damaged or other folders are rejected."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import gelu

from salmonn.caption.captioner import Captioner
from salmonn.model.families.salmonn2 import tiny_config
from salmonn.model.loading import load_config, load_network, save_network
from salmonn.model.network import Network


@pytest.fixture
def folder(random_model, tmp_path):
    """A copy of the random model, for a test to damage."""
    return shutil.copytree(random_model, tmp_path / "model")


def tiny_network() -> Network:
    return Network(tiny_config(vocab_size=640, eos_token_id=2, pad_token_id=0))


def test_size_of_the_tiny_model():
    with torch.device("meta"):
        network = tiny_network()
    assert 1e6 < sum(parameter.numel() for parameter in network.parameters()) < 5e6
    assert (network.config.chunk_seconds, network.config.tokens_per_chunk) == (8, 16)
    assert network.family.tokens_per_frame == 12


@torch.no_grad()
def test_a_fresh_audio_tower_outputs_more_than_its_positions():
    """Audio features far smaller than Whisper's fixed positions slow down learning; with std 0.02 they are 1 %."""
    torch.manual_seed(0)
    encoder = tiny_network().audio.encoder
    mel = -0.5 + 0.4 * torch.randn(2, 40, 800)  # mean and deviation of the synthetic clips' features
    steps = gelu(encoder.conv2(gelu(encoder.conv1(mel))))
    assert steps.std() > 0.2 * encoder.embed_positions.weight.std()


def test_round_trip_is_bit_equal(random_model, tmp_path):
    network = load_network(random_model)
    save_network(network, tmp_path / "saved")
    reloaded = load_network(tmp_path / "saved")
    assert reloaded.config.to_diff_dict() == network.config.to_diff_dict() and not reloaded.training
    before, after = network.state_dict(), reloaded.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    # Input and output embeddings are tied before and after.
    assert reloaded.lm.get_input_embeddings().weight is reloaded.lm.get_output_embeddings().weight


def test_captioner_round_trip(random_model, tmp_path):
    first = Captioner.load(random_model)
    first.save(tmp_path / "saved")
    second = Captioner.load(tmp_path / "saved")
    assert second.processor.config.to_diff_dict() == first.processor.config.to_diff_dict()
    text = "A red circle, <|video_pad|> und ein Ton."
    assert second.processor.tokenizer.encode(text) == first.processor.tokenizer.encode(text)
    assert second.processor.tokenizer.chat_template == first.processor.tokenizer.chat_template
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == sorted(
        path.name for path in random_model.iterdir()
    )


def test_loading_is_deterministic(random_model):
    """The same folder gives the same weights whatever the state of the random generator."""
    torch.manual_seed(1)
    first = load_network(random_model).state_dict()
    torch.manual_seed(2)
    second = load_network(random_model).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_missing_and_unexpected_weights_are_named(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["audio.gadget.weight"] = weights.pop("audio.qformer.queries")
    save_file(weights, path)
    with pytest.raises(ValueError) as caught:
        load_network(folder)
    assert "missing ['audio.qformer.queries']" in str(caught.value)
    assert "unexpected ['audio.gadget.weight']" in str(caught.value)
    assert str(folder) in str(caught.value)


def test_only_some_of_many_keys_are_named(folder):
    path = folder / "model.safetensors"
    save_file({f"audio.gadget.{number}": torch.zeros(1) for number in range(30)}, path)
    with pytest.raises(ValueError, match=r"unexpected \['audio.gadget.0'.* and 22 more") as caught:
        load_network(folder)
    assert str(caught.value).count("gadget") == 8


def test_pickled_weights_are_not_opened(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"missing or damaged.*tools/convert\.py"):
        load_network(folder)


def test_weights_of_another_size_are_rejected(folder):
    values = json.loads((folder / "config.json").read_text())
    values["lm"]["intermediate_size"] = 200
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="mlp"):
        load_network(folder)


def test_damaged_weights_are_rejected(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="missing or damaged"):
        load_network(folder)


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"missing or damaged.*model\.safetensors"):
        load_network(folder)


def test_a_folder_without_config(tmp_path):
    with pytest.raises(ValueError, match=rf"no model in {tmp_path}.*config\.json"):
        load_config(tmp_path)


@pytest.mark.parametrize("format_number", [None, 0, 2])
def test_a_config_of_another_format(folder, format_number):
    values = json.loads((folder / "config.json").read_text())
    assert values.pop("format") == 1
    (folder / "config.json").write_text(
        json.dumps(values if format_number is None else values | {"format": format_number})
    )
    with pytest.raises(ValueError, match=rf"has format {format_number}, but this version of salmonn reads format 1"):
        load_config(folder)


def test_a_config_of_another_family(folder):
    values = json.loads((folder / "config.json").read_text()) | {"family": "salmonn3"}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="unknown family 'salmonn3'; known families are salmonn2, salmonn2-plus"):
        load_config(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"model_type": "qwen2"}, "model type 'qwen2' is not supported"), ({"lm": None}, "no lm section")],
)
def test_a_config_of_another_model_type(folder, change, message):
    values = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        load_config(folder)
