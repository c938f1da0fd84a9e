"""Pickled weights are converted to safetensors bit for bit; code in a pickle does not run."""

import json
import os
import pickle
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from salmonn.model.loading import load_network
from salmonn.model.lora import LoraConfig, attach_lora, merge_adapter

LORA_A, BASE = ".lora_A.", ".base_layer."
PARITY_DIR = Path(os.environ.get("PARITY_DIR", Path(__file__).parents[3] / "shared" / "parity"))
TENSORS = {
    "norm.weight": torch.tensor([1.0, float("nan"), -0.0]),
    "layer.weight": torch.arange(24, dtype=torch.bfloat16).reshape(4, 6),
    "layer.bias": torch.arange(4, dtype=torch.float16),
    "layer.steps": torch.tensor(7),
    "layer.nothing": torch.empty(0, 3),
}


class CodeOnUnpickling:
    """A pickle that creates a folder when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("convert")


@pytest.fixture
def source(tmp_path) -> Path:
    """A model folder without weights."""
    path = tmp_path / "published"
    path.mkdir()
    for name in ("config.json", "tokenizer.json", "merges.txt", "chat_template.jinja", "LICENSE", "modeling.py"):
        (path / name).write_text(f"text of {name}")
    torch.save({"lr": 1.0}, path / "training_args.bin")
    return path


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "converted"


def is_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Compare bit for bit, including NaN and the sign of zero."""

    def bits(tensor: Tensor) -> tuple:
        return tensor.dtype, tensor.shape, tensor.contiguous().flatten().view(torch.uint8).tolist()

    return ours.keys() == theirs.keys() and all(bits(ours[name]) == bits(theirs[name]) for name in ours)


def usage_error(tool, capsys, *args: object) -> str:
    """Return the error message of a command that ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        tool.main([str(arg) for arg in args])
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tensors: tensors,
        lambda tensors: {"model": tensors},
        lambda tensors: {"state_dict": {"module": tensors}, "epoch": 3, "name": "a run"},
        lambda tensors: {f"module.{name}": tensor for name, tensor in tensors.items()},
        lambda tensors: {"model": {f"module.{name}": nn.Parameter(value, False) for name, value in tensors.items()}},
    ],
    ids=["plain", "model", "state_dict-module", "distributed", "parameters"],
)
def test_round_trip(tool, source, out, wrap):
    torch.save(wrap(TENSORS), source / "pytorch_model.bin")
    tool.main([str(source), "--out", str(out)])
    assert is_equal(load_file(out / "model.safetensors"), TENSORS)
    small = {"config.json", "tokenizer.json", "merges.txt", "chat_template.jinja", "LICENSE"}
    assert {path.name for path in out.iterdir()} == small | {"model.safetensors"}
    assert all((out / name).read_text() == f"text of {name}" for name in small)
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers rejects files without it


def test_a_prefix_of_some_names_is_kept(tool, source, out):
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, source / "pytorch_model.bin")
    tool.convert(source, out=out)
    assert load_file(out / "model.safetensors").keys() == {"module.a", "b"}


def test_shards(tool, source, out):
    parts = [dict(list(TENSORS.items())[:2]), dict(list(TENSORS.items())[2:])]
    names = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    for name, part in zip(names, parts, strict=True):
        torch.save({f"module.{key}": tensor for key, tensor in part.items()}, source / name)
    weight_map = {f"module.{key}": name for name, part in zip(names, parts, strict=True) for key in part}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    tool.main([str(source), "--out", str(out), "--shard-gb", "48e-9"])  # bytes: 12, 48, 8 and 8
    shards = sorted(out.glob("*.safetensors"))
    assert [path.name for path in shards] == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    shards_read = [load_file(path) for path in shards]
    assert all(sum(tensor.nbytes for tensor in shard.values()) <= 48 for shard in shards_read)
    assert is_equal(shards_read[0] | shards_read[1] | shards_read[2], TENSORS) and sum(map(len, shards_read)) == len(
        TENSORS
    )
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {
        key: path.name for path, shard in zip(shards, shards_read, strict=True) for key in shard
    }
    assert index["metadata"]["total_size"] == 76
    assert not (out / "pytorch_model.bin.index.json").exists()


def test_an_incomplete_set_of_shards(tool, source, out, capsys):
    torch.save({"a": torch.ones(1)}, source / "one.bin")
    index = source / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.bin", "b": "two.bin"}}))
    assert "lists missing files (two.bin)" in usage_error(tool, capsys, source, "--out", out)
    torch.save({"a": torch.ones(1)}, source / "two.bin")
    assert "repeats a of an earlier shard" in usage_error(tool, capsys, source, "--out", out)
    index.write_text("{}")
    assert "is not a valid index of shards" in usage_error(tool, capsys, source, "--out", out)


@pytest.mark.parametrize("limit", ["5", "24e-9"], ids=["one-file", "shards"])
def test_tied_weights_are_written_separately(tool, source, out, capsys, limit):
    table = torch.arange(12.0).reshape(3, 4)
    tied = {"embed": table, "head": table, "transposed": table.T, "row": table[1], "other": torch.ones(4)}
    torch.save(tied, source / "pytorch_model.bin")
    tool.main([str(source), "--out", str(out), "--shard-gb", limit])
    tensors = {key: tensor for path in out.glob("*.safetensors") for key, tensor in load_file(path).items()}
    assert is_equal(tensors, tied)
    assert "embed and head and transposed and row share memory" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["checkpoint-12000.bin", "step.pt", "model.pth"])
def test_a_single_file_or_its_folder(tool, source, out, name):
    torch.save({"model": TENSORS}, source / name)
    tool.convert(source / name, out=out)
    tool.convert(source, out=out.with_name("from_folder"))
    for folder in (out, out.with_name("from_folder")):
        assert is_equal(load_file(folder / "model.safetensors"), TENSORS)
        assert (folder / "config.json").is_file() and not (folder / name).exists()


def test_files_beside_a_single_weights_file_are_not_copied(tool, tmp_path, out):
    (tmp_path / "other.txt").write_text("private")
    torch.save(TENSORS, tmp_path / "weights.pt")
    tool.convert(tmp_path / "weights.pt", out=out)
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]


class TestLoraMatricesOnly:
    """LoRA matrices as training scripts save them: a state dict without their scale."""

    @pytest.fixture
    def pickled(self, tmp_path, captioner, fill_adapter):
        attach_lora(captioner.network, LoraConfig(rank=4, alpha=12, targets=("q_proj", "v_proj")), seed=0)
        fill_adapter(captioner.network)
        state = captioner.network.lm.state_dict()
        path = tmp_path / "checkpoint.bin"
        torch.save({key: tensor for key, tensor in state.items() if ".lora_" in key}, path)
        merge_adapter(captioner.network)
        return path

    def test_become_an_adapter(self, tool, pickled, out, captioner, random_model):
        tool.main([str(pickled), "--out", str(out), "--lora-alpha", "12"])
        network = load_network(random_model, adapter=out)
        merged = dict(captioner.network.named_parameters())
        assert all(torch.equal(value, merged[name]) for name, value in network.named_parameters())
        plain = dict(load_network(random_model).named_parameters())
        assert not all(torch.equal(plain[name], merged[name]) for name in plain)

    @pytest.mark.parametrize("scale_source", ["on the command line", "in its config"])
    def test_with_the_weights_of_their_model_are_merged(self, tool, capsys, tmp_path, out, published, scale_source):
        """DeepSpeed saves a published model trained with PEFT in one file: base layers and matrices."""
        source = published("salmonn2")
        base = load_file(source / "model.safetensors")
        matrices = load_file((source / "model.safetensors").resolve().parent / "lora.safetensors")
        adapted = {key.split(LORA_A)[0] for key in matrices if LORA_A in key}
        state = dict(matrices)
        for key, tensor in base.items():
            layer, _, kind = f"base_model.model.{key}".rpartition(".")
            state[f"{layer}.base_layer.{kind}" if layer in adapted else f"{layer}.{kind}"] = tensor
        assert sum(BASE in key for key in state) > 3
        (tmp_path / "both").mkdir()
        torch.save(state, tmp_path / "both" / "all_parameters.bin")
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(source / name, tmp_path / "both")
        assert "no adapter_config.json with their scale" in usage_error(tool, capsys, tmp_path / "both", "--out", out)
        scale = ["--lora-alpha", "8"]
        if scale_source == "in its config":
            config = tmp_path / "both" / "adapter_config.json"
            config.write_text('{"r": 4, "lora_alpha": 8, "use_rslora": true}')
            assert "the source has one; remove it" in usage_error(tool, capsys, tmp_path / "both", "--out", out, *scale)
            assert "merge it with PEFT" in usage_error(tool, capsys, tmp_path / "both", "--out", out)
            config.write_text('{"r": 4, "lora_alpha": 8}')
            scale = []
        tool.main([str(tmp_path / "both"), "--out", str(out), *scale])
        assert not (out / "adapter_config.json").exists()  # the result is a merged model
        ours, expected = load_file(out / "model.safetensors"), dict(base)
        for layer in adapted:
            name = f"{layer.removeprefix('base_model.model.')}.weight"  # scaled by alpha / rank = 8 / 4
            expected[name] = (
                base[name] + 2 * matrices[f"{layer}.lora_B.default.weight"] @ matrices[f"{layer}.lora_A.default.weight"]
            )
        assert ours.keys() == expected.keys()
        assert all(torch.allclose(ours[name], expected[name], atol=1e-6) for name in ours)
        load_network(out)

    def test_their_scale_is_required(self, tool, capsys, pickled, out):
        message = usage_error(tool, capsys, pickled, "--out", out)
        assert "LoRA matrices of rank 4 without an adapter_config.json" in message and "--lora-alpha" in message
        assert not out.exists()

    def test_of_several_ranks_are_rejected(self, tool, capsys, pickled, out):
        matrices = torch.load(pickled, weights_only=True)
        first = next(key for key in matrices if "lora_A" in key)
        matrices[first] = matrices[first][:2]
        torch.save(matrices, pickled)
        assert "several ranks, [2, 4]" in usage_error(tool, capsys, pickled, "--out", out, "--lora-alpha", 12)

    def test_a_scale_without_matrices_is_rejected(self, tool, capsys, source, out, pickled):
        torch.save(TENSORS, source / "pytorch_model.bin")
        assert "but the source has none" in usage_error(tool, capsys, source, "--out", out, "--lora-alpha", 12)
        (pickled.parent / "adapter_config.json").write_text("{}")
        assert "the source has one; remove it" in usage_error(tool, capsys, pickled, "--out", out, "--lora-alpha", 12)


def test_an_adapter_stays_one_file(tool, source, out):
    (source / "adapter_config.json").write_text("{}")
    torch.save(TENSORS, source / "adapter_model.bin")
    tool.convert(source, out=out, shard_gb=1e-9)
    assert is_equal(load_file(out / "adapter_model.safetensors"), TENSORS)
    assert (out / "adapter_config.json").is_file() and len(list(out.glob("*.safetensors*"))) == 1


@pytest.mark.parametrize("wrap", [lambda trap: trap, lambda trap: TENSORS | {"z": trap}, lambda trap: [TENSORS, trap]])
def test_code_is_rejected_and_does_not_run(tool, source, out, capsys, tmp_path, wrap):
    trap = tmp_path / "sprung"
    torch.save(wrap(CodeOnUnpickling(trap)), source / "pytorch_model.bin")
    message = usage_error(tool, capsys, source, "--out", out)
    assert "pytorch_model.bin: it would run code" in message and ".mkdir" in message
    assert not trap.exists() and not out.exists()
    torch.load(source / "pytorch_model.bin", weights_only=False)
    assert trap.exists()  # it runs without `weights_only`


def test_a_bare_pickle_does_not_run(tool, source, out, capsys, tmp_path):
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(CodeOnUnpickling(tmp_path / "sprung")))
    assert "cannot read" in usage_error(tool, capsys, source, "--out", out)
    assert not (tmp_path / "sprung").exists() and not out.exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (TENSORS | {"args": Namespace(lr=1.0)}, "it calls argparse.Namespace"),
        (nn.Linear(2, 2), "it calls torch.nn.modules.linear.Linear"),
        (TENSORS | {"epoch": 3}, "epoch is 3"),
        (TENSORS | {"sparse": torch.eye(2).to_sparse()}, "sparse is tensor("),
        (TENSORS | {"meta": torch.empty(2, device="meta")}, "meta is tensor("),
        ({"model": TENSORS, "module": TENSORS}, "several state dicts (model and module)"),
        ({"model": {}}, "expected named tensors, found dict"),
        ([torch.ones(2)], "expected named tensors, found list"),
    ],
    ids=["namespace", "module", "number", "sparse", "meta", "several", "empty", "list"],
)
def test_anything_but_plain_tensors_is_rejected(tool, source, out, capsys, value, message):
    torch.save(value, source / "pytorch_model.bin")
    stderr = usage_error(tool, capsys, source, "--out", out)
    assert message in stderr and "pytorch_model.bin" in stderr and not out.exists()


def test_a_dictionary_that_contains_itself_is_rejected(tool, source, out, capsys):
    recursive: dict = {}
    recursive["model"] = recursive
    torch.save(recursive, source / "pytorch_model.bin")
    assert "model is {" in usage_error(tool, capsys, source, "--out", out)


@pytest.mark.parametrize("kind", ["truncated", "empty", "pointer", "old"])
def test_a_damaged_file(tool, source, out, capsys, kind):
    path = source / "pytorch_model.bin"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=kind != "old")
    complete = path.read_bytes()
    path.write_bytes(
        {"truncated": complete[:700], "empty": b"", "pointer": b"version https://git-lfs"}.get(kind, complete)
    )
    assert f"cannot read {path}" in usage_error(tool, capsys, source, "--out", out)
    assert not out.exists()


def test_sources_without_weights(tool, source, out, capsys):
    assert "has no weights" in usage_error(tool, capsys, source, "--out", out)
    (source / "model.safetensors").touch()
    assert "are safetensors already" in usage_error(tool, capsys, source, "--out", out)
    assert "is not a .bin, .pt, .pth file" in usage_error(tool, capsys, source / "model.safetensors", "--out", out)
    for name in ("a.pt", "b.pt", "c-00001-of-00002.bin"):
        torch.save(TENSORS, source / name)
    assert "(a.pt, b.pt, c-00001-of-00002.bin); use one" in usage_error(tool, capsys, source, "--out", out)
    assert "one of several shards" in usage_error(tool, capsys, source / "c-00001-of-00002.bin", "--out", out)
    assert "does not exist" in usage_error(tool, capsys, source / "none", "--out", out)
    assert "must be above 0" in usage_error(tool, capsys, source / "a.pt", "--out", out, "--shard-gb", "0")
    assert not out.exists()


def test_existing_files_are_not_overwritten(tool, source, out, capsys):
    torch.save(TENSORS, source / "pytorch_model.bin")
    out.mkdir()
    (out / "mine").write_text("mine")
    assert "exists and is not empty" in usage_error(tool, capsys, source, "--out", out)
    assert [path.name for path in out.iterdir()] == ["mine"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["full", "stopped"])
def test_a_failure_leaves_no_files(tool, source, out, monkeypatch, error):
    torch.save(TENSORS, source / "pytorch_model.bin")
    save, state = tool.save_file, []

    def fail_at_second(tensors, path, **kwargs):
        assert not out.exists()  # so a kill at this point would not leave it either
        if state:
            raise error
        save(tensors, path, **kwargs)
        state.append(path)

    monkeypatch.setattr(tool, "save_file", fail_at_second)
    with pytest.raises(type(error)):
        tool.convert(source, out=out, shard_gb=48e-9)
    assert state and [path.name for path in out.parent.iterdir()] == ["published"]


@pytest.mark.skipif(not (PARITY_DIR / "salmonn2").is_dir(), reason=f"no fixture salmonn2 in {PARITY_DIR}")
def test_a_published_model_loads(tool, tmp_path, out):
    folder = PARITY_DIR / "salmonn2"
    shutil.copytree(folder, tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(folder / "model.safetensors")
    torch.save({"model": {f"module.{key}": tensor for key, tensor in tensors.items()}}, tmp_path / "pickled" / "m.bin")
    tool.convert(tmp_path / "pickled", out=out, shard_gb=0.0005)
    assert len(list(out.glob("*.safetensors"))) > 1
    assert is_equal(load_network(out).state_dict(), load_network(folder).state_dict())
