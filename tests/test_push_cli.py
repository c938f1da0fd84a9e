"""`salmonn push`: the files of a repository on the hub, in our layout, in the published one, and as an adapter."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel, Qwen3VLForConditionalGeneration
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from salmonn.caption.prompt import train_tokenizer
from salmonn.model.loading import load_network, save_network
from salmonn.model.lora import LoraConfig, attach_lora, load_adapter, save_adapter
from salmonn.model.network import Network
from salmonn.model.publish import write_adapter, write_published_layout
from salmonn.score.metrics import Rates
from salmonn.train.data import all_texts
from salmonn.train.run_log import RunSummary
from tests.qwen3_vl import save_tiny
from tests.test_parity import FOLDERS


@pytest.fixture
def run(random_model, tmp_path) -> Path:
    """A run folder with one round: its model, settings and summary."""
    folder = tmp_path / "run"
    model = folder / "round_1" / "merged"
    model.mkdir(parents=True)
    for file in random_model.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    summary = RunSummary(Rates(0.5, 0.1, 0.6, 0.02, 0.7), [Rates(0.3, 0.05, 0.35, 0.021, 0.69)])
    (folder / "summary.json").write_text(json.dumps(asdict(summary)))
    (folder / "mrdpo.yaml").write_text("rounds: 1\nloss:\n  kind: sigmoid\n  beta: 0.1\njudge:\n  kind: rule\n")
    return folder


def card_of(folder: Path) -> tuple[dict, str]:
    """Return the metadata and the text of a model card."""
    _, metadata, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_own_layout(call, run, tmp_path):
    flags = ("--license", "apache-2.0", "--out", tmp_path / "repo")
    code, _, err = call("push", run / "round_1" / "merged", "me/captioner", *flags)
    assert code == 0 and "hf upload me/captioner" in err
    metadata, text = card_of(tmp_path / "repo")
    assert metadata["pipeline_tag"] == "video-text-to-text" and metadata["license"] == "apache-2.0"
    assert "| SFT | 50.0 | 10.0 | 60.0 | 2.0 | 70.0 |" in text
    assert "| **round 1 (this model)** | 30.0 | 5.0 | 35.0 | 2.1 | 69.0 |" in text
    assert "- `loss.beta`: 0.1\n" in text and "`recipes/mrdpo.py`" in text
    assert "salmonn caption my_videos/ --out captions.jsonl --model me/captioner" in text
    # With transformers: by the package's registration, and by the code that the repository brings.
    network = AutoModel.from_pretrained(tmp_path / "repo")
    assert isinstance(network, Network)
    expected = load_file(run / "round_1" / "merged" / "model.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items() if name in expected)
    assert get_class_from_dynamic_module("modeling_salmonn.Network", str(tmp_path / "repo")) is Network


@pytest.fixture(params=["qwen3-vl", *(path.parent.name for path in FOLDERS)])
def base(request, clips, tmp_path) -> Path:
    """A small checkpoint in the published layout: one made here, and the parity fixtures where they are."""
    if request.param != "qwen3-vl":
        return next(path.parent for path in FOLDERS if path.parent.name == request.param)
    (tmp_path / "base").mkdir()
    return save_tiny(tmp_path / "base", train_tokenizer(all_texts(clips.references), vocab_size=400))


def test_published_layout_and_adapter(base, random_model, tmp_path):
    """A trained model has the names of its base, and loads as the base does."""
    network = load_network(base)
    attach_lora(network, LoraConfig(rank=2, alpha=4), seed=0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ".lora_B" in name:
                parameter.fill_(0.01)
    save_adapter(network, tmp_path / "adapter")
    network.lm = network.lm.merge_and_unload()
    save_network(network, tmp_path / "merged")
    for name in ("published", "repo"):
        (tmp_path / name).mkdir()
    write_published_layout(tmp_path / "merged", tmp_path / "published", base=str(base))
    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "published" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed and all("layers" in name and "proj" in name for name in changed)
    again = load_network(tmp_path / "published").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in network.state_dict().items())
    # The adapter has the names of the code for the base, and gives the same model.
    write_adapter(tmp_path / "adapter", tmp_path / "repo", base=str(base))
    names = load_file(tmp_path / "repo" / "adapter_model.safetensors")
    modules = {name.rpartition(".")[0] for name in before}
    assert all(name.removeprefix("base_model.model.").split(".lora_")[0] in modules for name in names)
    other = load_network(base)
    load_adapter(other, tmp_path / "repo")
    other.lm = other.lm.merge_and_unload()
    assert all(torch.allclose(value, again[name], atol=1e-6) for name, value in other.state_dict().items())
    # Another base is refused.
    for other_base in {random_model, *(path.parent for path in FOLDERS)} - {base}:
        with pytest.raises(ValueError, match=r"was not trained from|has no weights"):
            write_published_layout(tmp_path / "merged", tmp_path / "published", base=str(other_base))


def test_peft_finds_the_modules_of_an_adapter(clips, tmp_path):
    """PEFT attaches a pushed adapter to transformers' own model."""
    for name in ("base", "repo"):
        (tmp_path / name).mkdir()
    base = save_tiny(tmp_path / "base", train_tokenizer(all_texts(clips.references), vocab_size=400))
    network = load_network(base)
    attach_lora(network, LoraConfig(rank=2, alpha=4), seed=0)
    save_adapter(network, tmp_path / "adapter")
    write_adapter(tmp_path / "adapter", tmp_path / "repo", base=str(base))
    model = Qwen3VLForConditionalGeneration.from_pretrained(base)
    weights = load_file(tmp_path / "repo" / "adapter_model.safetensors")
    attached = PeftModel.from_pretrained(model, str(tmp_path / "repo")).state_dict()
    for name, value in weights.items():
        assert torch.equal(attached[name.replace(".weight", ".default.weight")], value), name


def test_upload(call, run, monkeypatch):
    calls = {}

    class Api:
        def create_repo(self, repo, **options):
            calls["create"] = (repo, options)
            return f"https://hub/{repo}"

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            calls["files"] = sorted(path.name for path in Path(folder_path).iterdir())

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    code, _, err = call("push", run / "round_1" / "merged", "me/captioner", "--private")
    assert code == 0 and "https://hub/me/captioner" in err
    assert calls["create"] == ("me/captioner", {"private": True, "exist_ok": True})
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "modeling_salmonn.py"} <= set(
        calls["files"]
    )


def test_wrong_usage(call, run, tmp_path):
    model = run / "round_1" / "merged"
    save_file({"a": torch.zeros(1)}, str(tmp_path / "adapter_model.safetensors"))
    (tmp_path / "adapter_config.json").write_text("{}")
    for args, message in {
        (run, "me/c"): "has neither config.json nor adapter_config.json",
        (model, "c"): "must be OWNER/NAME",
        (model, "me/c", "--layout", "published"): "pass its folder or hub id as --base",
        (tmp_path, "me/c"): "an adapter belongs to a base model",
        (tmp_path, "me/c", "--base", "b", "--layout", "published"): "always has the names of published ones",
        (model, "me/c", "--run", tmp_path, "--out", tmp_path / "new"): "has no summary.json",
    }.items():
        code, _, err = call("push", *args)
        assert code == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "new").exists()
