"""Placement of weights: types, splitting, quantization, memory while loading, adapters, the hub."""

import json
import subprocess
import sys

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig as PeftConfig
from safetensors.torch import load_file, save_file
from torch import nn

from salmonn.caption.captioner import Captioner
from salmonn.caption.generator import Sampling, Span
from salmonn.caption.processor import PromptRow
from salmonn.model.families.salmonn2 import tiny_config
from salmonn.model.loading import Placement, load_network, save_network
from salmonn.model.lora import LoraConfig, attach_lora, merge_adapter, save_adapter
from salmonn.model.network import Network
from tests.launch import forked

ANSWER = "a red circle appears"


@torch.no_grad()
def logps(network: Network, captioner: Captioner, media) -> torch.Tensor:
    rows = [PromptRow(0, "Tell.", ANSWER), PromptRow(0, "What?", "a tone")]  # packed in one sequence
    return network(captioner.processor.collate(rows, [media[0]]))


def test_the_default_on_a_cpu(random_model):
    network = load_network(random_model)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert network.device == torch.device("cpu") and not network.training
    assert attention_of(network) == {"sdpa"}


def attention_of(network: Network) -> set[str]:
    """Return the attention implementations of the towers; the language model's is ours."""
    assert network.lm.get_decoder().config._attn_implementation == "salmonn"
    return {part.encoder.config._attn_implementation for part in (network.vision, network.audio)}


def test_types_and_attention(random_model, captioner, media):
    expected = logps(captioner.network, captioner, media)
    bf16 = load_network(random_model, placement=Placement(dtype="bfloat16", attention="eager"))
    assert {parameter.dtype for parameter in bf16.parameters()} == {torch.bfloat16}
    assert attention_of(bf16) == {"eager"}
    eager = load_network(random_model, placement=Placement(attention="eager"))
    assert torch.allclose(logps(eager, captioner, media), expected, atol=1e-2)  # values are about -30


def test_a_model_split_over_devices(random_model, captioner, media):
    split = load_network(random_model, placement=Placement(device_map="auto"))
    assert torch.equal(logps(split, captioner, media), logps(captioner.network, captioner, media))


def test_a_part_that_does_not_fit_is_offloaded(random_model, captioner, media, videos, tmp_path):
    """The towers on one device, the decoder's layers on another (here the disk): captions are the same."""
    config = captioner.network.config
    device_map = {"vision": "cpu", "audio": "cpu", "lm": "disk"}
    network = Network.from_pretrained(
        str(random_model), config=config, device_map=device_map, offload_folder=str(tmp_path), dtype=torch.float32
    ).eval()
    assert next(network.lm.model.layers[0].parameters()).device.type == "meta"
    sampling = Sampling(max_new_tokens=8)
    answer = Captioner(network, captioner.processor).caption(videos[0], sampling=sampling)
    assert answer.text and answer.text == captioner.caption(videos[0], sampling=sampling).text


@pytest.mark.parametrize(("bits", "kind"), [(8, Linear8bitLt), (4, Linear4bit)])
def test_quantized(random_model, captioner, media, bits, kind):
    network = load_network(random_model, placement=Placement(bits=bits))
    quantised = {name for name, module in network.named_modules() if isinstance(module, kind)}
    linears = {
        name
        for name, module in captioner.network.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("lm.") and not name.endswith("lm_head")
    }
    assert quantised == linears and linears
    difference = (logps(network, captioner, media) - logps(captioner.network, captioner, media)).abs().mean()
    assert 0 < difference < {8: 0.5, 4: 1.5}[bits]


def test_the_package_that_bits_need_is_named(random_model, monkeypatch):
    def fail(*_, **__):
        raise ImportError("Using `bitsandbytes` quantization requires bitsandbytes")

    monkeypatch.setattr(Network, "from_pretrained", fail)
    with pytest.raises(ValueError, match=r"needs a package that is not installed: Using `bitsandbytes`"):
        load_network(random_model, placement=Placement(bits=8))


def test_flash_attention_in_32_bits_is_rejected(random_model):
    with pytest.raises(ValueError, match="needs 16-bit weights; use dtype bfloat16"):
        load_network(random_model, placement=Placement(dtype="float32", attention="flash_attention_2"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 4}, "does not support quantized weights.*remove bits 4"),
        ({"device": "cpu"}, "device and device_map are not supported in training.*remove them"),
        ({"device_map": "auto"}, "device and device_map are not supported in training.*remove them"),
        ({"dtype": "float16"}, "does not support dtype float16, .*use dtype bfloat16"),
    ],
)
def test_placements_that_training_does_not_support(load_recipe, values, message):
    placement = {"dtype": "bfloat16", "attention": "sdpa"} | values
    for recipe, config in (("sft", "SftConfig"), ("mrdpo", "MrDpoConfig")):
        with pytest.raises(ValueError, match=message):
            getattr(load_recipe(recipe), config)(out="run", placement=Placement(**placement))


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "unknown device gpu; use cpu"),
        ("cuda:99", "no device cuda:99: torch finds 0 GPUs; use another one, or cpu"),
    ],
)
def test_a_device_that_does_not_exist(device, message):
    with pytest.raises(ValueError, match=message):
        Placement(device=device)


def test_device_and_device_map_exclude_each_other():
    with pytest.raises(ValueError, match="use only one of them"):
        Placement(device="cpu", device_map="auto")


@pytest.mark.parametrize("family", ["salmonn2", "salmonn2-plus"])
def test_captions_in_16_bits(published, videos, family):
    """The default dtype on a GPU, here on the CPU."""
    sampling = Sampling(max_new_tokens=4)
    bf16 = Captioner.load(published(family), placement=Placement(dtype="bfloat16"))
    assert {parameter.dtype for parameter in bf16.network.parameters()} == {torch.bfloat16}
    for modality in ("both", "visual", "audio"):
        caption = bf16.caption(videos[0], modality=modality, sampling=sampling, span=Span(0, 1))
        assert len(bf16.processor.tokenizer.encode(caption.text)) > 0
    float32 = Captioner.load(published(family))
    media = float32.processor.read(videos[0], start_seconds=0, end_seconds=1)
    exact, rounded = (model.encode([media])[0].tokens.float() for model in (float32, bf16))
    assert (exact - rounded).norm() < 0.05 * exact.norm()


def test_an_unknown_device_map_is_rejected(random_model):
    with pytest.raises(ValueError, match="device_map"):
        load_network(random_model, placement=Placement(device_map="everywhere"))


@pytest.fixture(scope="module")
def large_model(tmp_path_factory):
    """Folder of a model of more than 200 MB."""
    config = tiny_config(vocab_size=32000, eos_token_id=2, pad_token_id=0)
    config.lm |= dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=16)
    folder = tmp_path_factory.mktemp("large")
    save_network(Network(config), folder)
    return folder


@pytest.mark.parametrize(("dtype", "copies"), [("float32", 0), ("bfloat16", 0.5)])
def test_no_second_copy_in_memory(large_model, dtype, copies):
    """On a CPU, float32 weights stay memory-mapped; weights of another dtype are allocated once, not twice."""
    code = f"""
import re, threading, time
from salmonn.model.loading import Placement, load_network
own = lambda: int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) * 1024
before, peak, done = own(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, own())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
network = load_network({str(large_model)!r}, placement=Placement(dtype={dtype!r}))
done = True
thread.join()
print(peak - before)
"""
    result = subprocess.run(forked(sys.executable, "-c", code), capture_output=True, text=True, check=True)
    size = (large_model / "model.safetensors").stat().st_size
    assert size > 200e6
    assert int(result.stdout) < copies * size + 60e6


class TestAdapter:
    """Adapters saved by this project, and those of published models."""

    @pytest.fixture
    def saved(self, captioner, fill_adapter, tmp_path):
        """An adapter saved by this project, and the model with the adapter merged."""
        attach_lora(captioner.network, LoraConfig(rank=4, alpha=8), seed=0)
        fill_adapter(captioner.network)
        with torch.no_grad():
            for name, parameter in captioner.network.named_parameters():
                parameter.mul_(8 if "lora_B" in name else 1)  # large compared with 8-bit rounding errors
        save_adapter(captioner.network, tmp_path / "adapter")
        merge_adapter(captioner.network)
        return tmp_path / "adapter", captioner

    def test_an_adapter_is_merged(self, saved, random_model, media):
        folder, merged = saved
        network = load_network(random_model, adapter=folder)
        assert "lora" not in str(network.state_dict().keys())
        assert torch.equal(logps(network, merged, media), logps(merged.network, merged, media))

    @torch.no_grad()
    def test_on_quantized_weights_it_stays_separate(self, saved, random_model):
        folder, merged = saved
        network = load_network(random_model, placement=Placement(bits=8), adapter=folder)
        values = torch.randn(1, 5, 128)
        projections = [
            model.lm.get_decoder().layers[2].self_attn.v_proj
            for model in (network, load_network(random_model, placement=Placement(bits=8)), merged.network)
        ]
        with_it, without, expected = (projection(values) for projection in projections)
        assert (with_it - expected).norm() < 0.1 * (without - expected).norm()

    @pytest.mark.parametrize("family", ["salmonn2", "salmonn2-plus"])
    def test_a_published_adapter(self, published, family, tmp_path):
        base = published(family)
        lora = base.resolve() / "model.safetensors"
        tensors = load_file(lora.resolve().parent / "lora.safetensors")
        save_published(tmp_path, tensors)
        network = load_network(base, adapter=tmp_path)
        plain = load_network(base)
        name = "layers.1.self_attn.v_proj"
        matrices = {key: value for key, value in tensors.items() if name in key}
        (a,), (b,) = ([value for key, value in matrices.items() if half in key] for half in ("lora_A", "lora_B"))
        ours, before = (dict(model.named_parameters()) for model in (network, plain))
        (full,) = (key for key in ours if key.startswith("lm.") and key.endswith(f"{name}.weight"))
        assert torch.allclose(ours[full], before[full] + 2 * b @ a, atol=1e-6)  # alpha 8, rank 4

    def test_modules_trained_in_full_replace_the_weights(self, published, tmp_path):
        base = published("salmonn2-plus")
        tensors = load_file((base / "model.safetensors").resolve().parent / "lora.safetensors")
        plain = dict(load_network(base).named_parameters())
        shape = plain["audio.projector.weight"].shape
        key = "base_model.model.audio.audio_proj.weight"
        save_published(tmp_path, tensors | {key: torch.full(shape, 0.5)})
        assert (dict(load_network(base, adapter=tmp_path).named_parameters())["audio.projector.weight"] == 0.5).all()
        save_published(tmp_path, tensors | {"base_model.model.audio.gadget.weight": torch.zeros(2)})
        with pytest.raises(ValueError, match=r"another model.*audio\.gadget"):
            load_network(base, adapter=tmp_path)

    def test_all_modules_that_published_sft_trains_are_read(self, published, tmp_path):
        """PEFT saves the Q-Former and the merger with their buffers; here each weight is doubled."""
        base = published("salmonn2-plus")
        folder = (base / "model.safetensors").resolve().parent
        trained = ("audio.qformer.", "audio.audio_proj.", "visual.merger.")
        weights = {
            key: value for key, value in load_file(folder / "model.safetensors").items() if key.startswith(trained)
        }
        assert any("position_ids" in key for key in weights)
        saved = {
            f"base_model.model.{key}": value * 2 if value.is_floating_point() else value
            for key, value in weights.items()
        }
        save_published(tmp_path, load_file(folder / "lora.safetensors") | saved)
        after, before = (dict(load_network(base, adapter=path).named_parameters()) for path in (tmp_path, None))
        parts = ("audio.qformer.qformer.", "audio.projector.", "vision.encoder.merger.")
        changed = {name for name in before if name.startswith(parts)}
        assert changed and all(torch.equal(after[name], 2 * before[name]) for name in changed)

    @pytest.mark.parametrize(
        ("kind", "value"), [("use_rslora", True), ("rank_pattern", {"q_proj": 2}), ("bias", "all")]
    )
    def test_another_kind_of_adapter_is_rejected(self, published, tmp_path, kind, value):
        base = published("salmonn2-plus")
        save_published(tmp_path, load_file((base / "model.safetensors").resolve().parent / "lora.safetensors"))
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {kind: value}))
        with pytest.raises(ValueError, match=f"uses {kind}; only plain LoRA"):
            load_network(base, adapter=tmp_path)

    def test_an_adapter_of_another_model_is_rejected(self, saved, published, tmp_path):
        folder, _ = saved
        tensors = load_file(folder / "adapter_model.safetensors")
        first = sorted(tensors)[0]
        tensors["base_model.model.other.lora_A.weight"] = tensors.pop(first)
        save_file(tensors, folder / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=r"to another model: missing .*, unexpected .*other"):
            load_network(saved[1].name, adapter=folder)

    def test_a_pickled_adapter_is_not_opened(self, saved, random_model):
        folder, _ = saved
        torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
        (folder / "adapter_model.safetensors").unlink()
        with pytest.raises(ValueError, match=r"no readable adapter.*tools/convert\.py"):
            load_network(random_model, adapter=folder)

    def test_no_adapter(self, random_model, tmp_path):
        with pytest.raises(ValueError, match="has no readable adapter"):
            load_network(random_model, adapter=tmp_path)


def save_published(folder, tensors):
    """Write an adapter folder like PEFT does for a published model."""
    PeftConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM").save_pretrained(
        str(folder)
    )
    save_file(tensors, folder / "adapter_model.safetensors")
    values = json.loads((folder / "adapter_config.json").read_text())
    assert values["r"] == 4
