"""The step benchmark: all sides compute the same with the expected work, and a side that does not is detected."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.tools.benches import load


@pytest.fixture(scope="module")
def step():
    return load("step")


@pytest.fixture(scope="module")
def small():
    """The smallest sizes of the first family."""
    return load("model").BenchConfig(shape="small", repeats=1)


@pytest.fixture(scope="module")
def bench(step, small):
    step_bench = step.StepBench(small)
    step_bench.compute_reference_logps()
    return step_bench


def count_calls(bench, side):
    """Return a side's number of calls of the vision tower, audio tower and decoder, and the decoder's tokens."""
    calls = {"vision": 0, "audio": 0, "decoder": 0, "tokens": 0}

    def count(name):
        def hook(module, args, kwargs, output):
            calls[name] += 1
            calls["tokens"] += kwargs["inputs_embeds"].shape[:2].numel() if name == "decoder" else 0

        return hook

    network = bench.network
    parts = {"vision": network.vision, "audio": network.audio, "decoder": network.lm.get_decoder()}
    handles = [part.register_forward_hook(count(name), with_kwargs=True) for name, part in parts.items()]
    side(bench)
    for handle in handles:
        handle.remove()
    return calls


def test_work_of_each_side(step, bench):
    inputs = bench.batches.micro_batches(0)[0].inputs
    lengths = inputs.attention_mask.sum(1).tolist()
    shared = (inputs.input_ids == inputs.input_ids[:1]).all(0).long().cumprod(0).sum().item()
    # One pass over the shared prefix of the three rows and the rest of each row; naively, five rows in separate passes.
    shared_pass = shared + sum(length - shared for length in lengths)
    chosen, rejected, truth = lengths
    work = {name: count_calls(bench, side) for name, side in step.SIDES.items()}
    assert work["ours"] == {"vision": 0, "audio": 0, "decoder": 1, "tokens": shared_pass}
    assert work["logits of all positions"] == work["ours"]
    assert work["naive"] == {"vision": 2, "audio": 2, "decoder": 5, "tokens": 2 * chosen + 2 * rejected + truth}
    assert work["no shared prefix"]["tokens"] == sum(lengths)
    assert work["encoders in each step"] == work["ours"] | {"vision": 1, "audio": 1}
    assert work["reference policy in each step"]["decoder"] == 2
    assert bench.prefix_tokens / bench.pair.chosen.count("w") > 20


@pytest.mark.parametrize("family", ["salmonn2", "salmonn2-plus"])
def test_all_sides_compute_the_same(step, small, family):
    config = replace(small, family=family)
    step.check(step.StepBench(config), config)


def test_a_side_with_another_gradient_or_loss_is_detected(step, small, bench, monkeypatch):
    def other_gradient(bench):
        loss = bench.ours()
        for parameter in bench.network.parameters():
            if parameter.grad is not None:
                parameter.grad *= 1.001
        return loss

    for side in (other_gradient, lambda bench: bench.ours() * 1.001):
        monkeypatch.setattr(step, "SIDES", {"ours": step.StepBench.ours, "wrong": side})
        with pytest.raises(ValueError, match=r"wrong: .*does not compute the same"):
            step.check(bench, small)


def test_nan_is_detected(step, small, bench):
    gradients = torch.ones(3)
    with pytest.raises(ValueError, match="loss nan"):
        step.require_equal("broken", (float("nan"), gradients), (1.0, gradients), config=small)


def test_all_positions_are_computed_once(step, bench):
    class RecordingNetwork(nn.Module):
        def forward(self, inputs):
            self.labels = inputs.labels
            return torch.ones(inputs.labels[:, 1:].shape)

    inputs, network = bench.batches.micro_batches(0)[0].inputs, RecordingNetwork()
    logits = step.AllLabels(network)(inputs)
    assert (network.labels[0] >= 0).all() and torch.equal(network.labels[1:], inputs.labels[1:])
    assert torch.equal(logits, (inputs.labels[:, 1:] != -100).float())


def test_flops(step):
    # 10 parameters x 6 tokens x 2 flops x 3 passes = 360; attention: 2 layers x width 5 x 36 / 2 pairs x 4 x 3 = 2160.
    assert step.flops(10, 6, width=5, layers=2, passes=3) == 360 + 2160


def test_rows(step, small, monkeypatch, tmp_path):
    memory = {"ours": {"step_mib": 10, "process_mib": 100}, "naive": {"step_mib": 30, "process_mib": 120}}
    monkeypatch.setattr(step, "run_isolated", lambda script, *, memory_of, **config: memory[memory_of])
    out = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["step.py", "--quick", f"--out={out}"])
    load("model").start(step.__doc__, step.run, step.report_memory)
    rows = {row["name"]: row for row in json.loads(out.read_text())}
    assert list(rows)[:2] == ["naive", "naive, our reference pass counted in"] and len(rows) == 7
    assert (rows["naive"]["ours_mib"], rows["naive"]["other_process_mib"]) == (10, 120)
    assert all(
        row["ratio"] == pytest.approx(row["other_seconds"] / row["ours_seconds"], rel=0.2) for row in rows.values()
    )
    assert rows["naive"]["ratio"] > rows["naive, our reference pass counted in"]["ratio"] > 1


@pytest.mark.slow
def test_memory_is_measured_in_a_separate_process(step, small):
    measured = step.run_isolated(step.__file__, **vars(small), memory_of="naive")
    assert 0 <= measured["step_mib"] < 200 < measured["process_mib"] < 3000


def test_without_trl_there_is_no_row(small, monkeypatch, capsys):
    trl_step = load("trl_step")
    monkeypatch.setattr(trl_step.importlib.util, "find_spec", lambda name: None)
    assert trl_step.run(small) == []
    assert "trl is not installed" in capsys.readouterr().err


@pytest.mark.slow
def test_trl(small, tmp_path):
    pytest.importorskip("trl")
    trl_step = load("trl_step")
    ours = trl_step.Ours(small)
    for precomputed in (False, True):
        theirs = trl_step.Theirs(ours, small, precomputed=precomputed, folder=str(tmp_path))
        trl_step.check(ours, theirs, name="TRL", config=small)


def test_growth():
    growth = load("growth")
    one, two, fit = growth.growth_rows(
        [{"size": 100, "seconds": 2.0, "step_mib": 5}, {"size": 200, "seconds": 8.0, "step_mib": 10}],
        "{} clips",
        "part",
    )
    # 2 s per 100 are 20 s per 1,000; twice the size takes 4 times as long and twice the memory.
    assert one["name"] == "100 clips" and one["note"] == "20 s per 1,000" and two["ours_mib"] == 10
    assert (fit["time_exponent"], fit["memory_exponent"]) == (2.0, 1.0)


def test_sizes_that_growth_measures(small, monkeypatch):
    growth = load("growth")
    # A frame of 112 pixels is 4 x 5 tokens; the 60 tokens of an audio chunk are stretched to 64 for 8 frames.
    assert growth.measure_step(small, 8)["size"] == 8 * 20 + 64
    batches = []
    train_step = growth.StepBench.train_step
    monkeypatch.setattr(
        growth.StepBench, "train_step", lambda bench, batch: (batches.append(batch.clips), train_step(bench, batch))[1]
    )
    measured = growth.measure_round(small, 8)
    assert measured["size"] == 8 and measured["seconds"] > 0
    # One warm-up step on the clip of noise, then 8 pairs, 4 a step, each once.
    assert batches[0] == ("noise",) and sorted(batches[1] + batches[2]) == [f"clip {number}" for number in range(8)]
    assert len(batches) == 3 and len(batches[1]) == 4
