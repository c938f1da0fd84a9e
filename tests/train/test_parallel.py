"""Strategies on two real processes: losses, checkpoints and merged weights of one process; rejected settings."""

import filecmp
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from salmonn.train import sharded
from salmonn.train.parallel import check_strategy
from tests.launch import forked
from tests.limits import RUN_SECONDS

SCRIPT = Path(__file__).with_name("train_worker.py")
STRATEGIES = ("ddp", "zero2", "zero3", "fsdp2")
SLOW = pytest.mark.slow


def launch(strategy, model, clips, out, *, processes, options=("float32",), fresh=False):
    launcher = [Path(sys.executable).with_name("torchrun"), "--standalone", f"--nproc_per_node={processes}"]
    args = [*(launcher if processes > 1 else [sys.executable]), SCRIPT, strategy, model, clips, out, *options]
    command = list(map(str, args)) if fresh else forked(*args)
    return subprocess.run(command, capture_output=True, text=True, timeout=RUN_SECONDS, check=False)


def train(strategy, model, clips, out, *, processes, precision="float32", options=(), fresh=False):
    result = launch(strategy, model, clips, out, processes=processes, options=[precision, *options], fresh=fresh)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def steps_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]


def merged(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "merged" / "model.safetensors")


def max_difference(one, other) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.fixture(scope="module")
def single_process(shallow_model, clips, shared):
    """The folder of one process's training."""
    return shared("strategy_single_process", lambda out: train("ddp", shallow_model, clips.root, out, processes=1))


@pytest.fixture(scope="module")
def train_split(shallow_model, clips, shared):
    """Train by two processes, once for each strategy, in forks or by a real torchrun; return the folder."""

    def once(strategy, *, fresh=False):
        return shared(
            f"strategy_{strategy}{'_fresh' * fresh}",
            lambda out: train(strategy, shallow_model, clips.root, out, processes=2, fresh=fresh),
        )

    return once


@pytest.mark.parametrize("fresh", [False, pytest.param(True, marks=SLOW)], ids=["forked", "torchrun"])
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero2", marks=SLOW), "zero3", "fsdp2"])
def test_two_processes_train_like_one(strategy, fresh, train_split, single_process, shallow_model):
    folder = train_split(strategy, fresh=fresh)
    # The same losses and figures, six steps of the same pairs.
    steps, expected = steps_of(folder), steps_of(single_process)
    assert len(steps) == len(expected) == 6 and expected[-1]["loss"] < expected[0]["loss"] - 0.3
    for name, tolerance in (("loss", 2e-5), ("dpo", 2e-5), ("ce", 1e-4), ("learning_rate", 1e-9)):
        assert [step[name] for step in steps] == pytest.approx([step[name] for step in expected], abs=tolerance), name
    # Adam amplifies rounding differences of small gradients, which dominate from the third step on.
    assert [step["grad_norm"] for step in steps[:2]] == pytest.approx(
        [step["grad_norm"] for step in expected[:2]], rel=1e-4
    )
    for name in ("margin", "chosen_drift", "rejected_drift", "kl"):
        values = [[step[name] for step in log if name in step] for log in (steps, expected)]
        assert values[0] == pytest.approx(values[1], rel=1e-3, abs=1e-3), name
    assert [step["step"] for step in steps if "kl" in step] == [0, 5] and steps[-1]["kl"] > steps[0]["kl"] > 0

    # merged = base + alpha / r * B A in the attention's projections; other weights are unchanged.
    base, after = load_file(shallow_model / "model.safetensors"), merged(folder)
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    changed = set()
    for name, weight in base.items():
        key = f"base_model.model.{name.removeprefix('lm.').removesuffix('.weight')}"
        if f"{key}.lora_A.weight" not in adapter:
            assert torch.equal(after[name], weight), name
            continue
        change = 2 * adapter[f"{key}.lora_B.weight"] @ adapter[f"{key}.lora_A.weight"]
        assert torch.allclose(after[name], weight + change, atol=1e-6) and change.abs().max() > 1e-3
        changed.add(name)
    assert len(changed) == len(adapter) / 2 == 6
    assert max_difference(after, merged(single_process)) < 1e-4


@pytest.mark.parametrize("resumed", [False, pytest.param(True, marks=SLOW)])
def test_a_sharded_model_is_trained_and_merged_like_a_whole_one(train_split, shallow_model, clips, tmp_path, resumed):
    """The same losses, and the same bytes of adapter and merged model; no process holds or reads all weights."""
    expected = train_split("fsdp2")
    if resumed:
        copy_first_four_steps(expected, tmp_path)
    train("fsdp2", shallow_model, clips.root, tmp_path, processes=2, options=["sharded"])
    losses, expected_losses = ([step["loss"] for step in steps_of(folder)] for folder in (tmp_path, expected))
    assert losses == expected_losses
    for name in ("adapter", "merged"):
        files = sorted(path.name for path in (expected / name).iterdir() if path.name != "README.md")
        assert files == sorted(path.name for path in (tmp_path / name).iterdir() if path.name != "README.md")
        assert filecmp.cmpfiles(expected / name, tmp_path / name, files, shallow=False)[0] == files
    sizes = {name: value.nbytes for name, value in load_file(shallow_model / "model.safetensors").items()}
    ranks = [json.loads((tmp_path / f"read_{rank}.json").read_text()) for rank in range(2)]
    for rank in ranks:
        base = {name: size for name, size in rank["held"].items() if ".lora_" not in name}
        assert rank["read"] == list(base.values())  # what it holds, each tensor by itself
        assert sum(base.values()) < 0.51 * sum(sizes.values())
    assert sum(sum(rank["read"]) for rank in ranks) == sum(sizes.values())


@pytest.mark.parametrize("strategy", [*(pytest.param(name, marks=SLOW) for name in ("ddp", "zero2")), "zero3", "fsdp2"])
def test_checkpoints_of_one_process_and_of_a_strategy_are_interchangeable(
    strategy, train_split, single_process, shallow_model, clips, tmp_path
):
    """Four steps of one and two of the other are as six of one process."""
    folder = train_split(strategy)
    there, back = tmp_path / "there", tmp_path / "back"
    copy_first_four_steps(single_process, there)
    assert "resuming from step 4" in train(strategy, shallow_model, clips.root, there, processes=2)
    assert max_difference(merged(there), merged(single_process)) < 1e-5
    # The optimizer's moments are the same too.
    resumed, expected = (load_file(run / "checkpoints" / "step_000006.safetensors") for run in (there, single_process))
    assert max_difference(resumed, expected) < 1e-4

    copy_first_four_steps(folder, back)
    assert "resuming from step 4" in train("ddp", shallow_model, clips.root, back, processes=1)
    assert max_difference(merged(back), merged(single_process)) < 1e-4


def copy_first_four_steps(source, folder) -> None:
    """Create the folder of a run that was killed after its checkpoint of four steps."""
    (folder / "checkpoints").mkdir(parents=True)
    for path in (source / "checkpoints").glob("step_000004.*"):
        shutil.copy(path, folder / "checkpoints")
    shutil.copy(source / "steps.jsonl", folder)


@pytest.mark.parametrize(
    "strategy", ["ddp", pytest.param("zero2", marks=SLOW), "zero3", pytest.param("fsdp2", marks=SLOW)]
)
def test_nan_on_one_rank_stops_all_ranks_before_the_step(strategy, shallow_model, clips, tmp_path):
    """Rank 1 has the second of a step's three pairs."""
    result = launch(strategy, shallow_model, clips.root, tmp_path, processes=2, options=["float32", "nan"])
    assert result.returncode != 0
    assert re.search(r"step 1: loss nan, gradient norm (nan|inf), on [\w/]+\.mp4: check these clips", result.stderr)
    assert [step["step"] for step in steps_of(tmp_path)] == [0] and not (tmp_path / "merged").exists()


@pytest.fixture(scope="module")
def ddp_in_16_bits(shallow_model, clips, shared):
    """Folders of trainings in bfloat16 by one process and by two with DDP."""

    def train_once(processes):
        return shared(
            f"strategy_{processes}_bfloat16",
            lambda out: train("ddp", shallow_model, clips.root, out, processes=processes, precision="bfloat16"),
        )

    return [train_once(processes) for processes in (1, 2)]


def test_zero3_in_16_bits(train_split, shallow_model, clips, tmp_path):
    """Two steps: losses near those of float32, weights and products in bfloat16, and the adapter's file in float32."""
    train("zero3", shallow_model, clips.root, tmp_path, processes=2, precision="bfloat16", options=["short"])
    losses, expected = ([step["loss"] for step in steps_of(folder)] for folder in (tmp_path, train_split("zero3")))
    assert losses[0] == pytest.approx(expected[0], abs=4 * 2**-7) and len(losses) == 2
    check_dtypes_of_16_bits(tmp_path, "zero3")


def check_dtypes_of_16_bits(folder, strategy) -> None:
    """Check the types in training, and of the files; DeepSpeed trains copies of the weights in 16 bits."""
    trained = ["torch.bfloat16"] if strategy.startswith("zero") else ["torch.bfloat16", "torch.float32"]
    found = json.loads((folder / "dtypes.json").read_text())
    assert found == {"weights": trained, "products": ["torch.bfloat16"], "autocast": ["torch.bfloat16"]}
    weights = load_file(folder / "adapter" / "adapter_model.safetensors").values()
    assert {tensor.dtype for tensor in weights} == {torch.float32}
    assert {tensor.dtype for tensor in merged(folder).values()} == {torch.bfloat16}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_in_16_bits(strategy, ddp_in_16_bits, shallow_model, clips, tmp_path):
    """The published settings: base and products in bfloat16, adapter in float32, layers checkpointed.

    Losses of about 2 have steps of 2^-7 = 0.008. Sums of one and of two processes are rounded differently, and where
    the loss falls fast their losses differ by more than that: each step is between the two, up to two such steps.
    """
    train(strategy, shallow_model, clips.root, tmp_path, processes=2, precision="bfloat16")
    one, two, losses = ([step["loss"] for step in steps_of(folder)] for folder in (*ddp_in_16_bits, tmp_path))
    assert len(losses) == 5 and losses[-1] < losses[0] - 0.3
    for loss, *ends in zip(losses, one, two, strict=True):
        assert min(ends) - 2 * 2**-7 < loss < max(ends) + 2 * 2**-7, (losses, one, two)
    for folder, name in zip((*ddp_in_16_bits, tmp_path), ("ddp", "ddp", strategy), strict=True):
        check_dtypes_of_16_bits(folder, name)


@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_sharding_strategies_need_several_processes(strategy):
    with pytest.raises(ValueError, match=rf"strategy {strategy} needs several processes.*torchrun"):
        check_strategy(strategy)


def test_a_missing_package_is_reported(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'salmonn\[deepspeed\]'"):
        check_strategy("zero3")
    check_strategy("fsdp2")
    check_strategy("ddp")


def test_a_sharded_model_is_published_when_all_its_files_are_visible(tmp_path, monkeypatch):
    """A file system over a network shows the files of other machines late."""
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict(zip("ab", names, strict=True))}))
    (tmp_path / names[0]).touch()
    naps = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 2:
            (tmp_path / names[1]).touch()

    monkeypatch.setattr(sharded.time, "sleep", sleep)
    sharded.wait_for_weights(tmp_path)
    assert len(naps) == 2
    monkeypatch.setattr(sharded, "_VISIBLE_SECONDS", 0)
    index.unlink()
    with pytest.raises(ValueError, match=r"lacks model\.safetensors, which other processes should have written"):
        sharded.wait_for_weights(tmp_path)
