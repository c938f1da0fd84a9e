"""The bench's sides compute the same, do the work that they are said to do, and a side that does not is found out."""

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
    made = step.StepBench(small)
    made.compute_reference_logps()
    return made


def count_calls(bench, side):
    """How often a side calls the vision tower, the audio tower and the decoder, and with how many tokens in all."""
    calls = {"vision": 0, "audio": 0, "decoder": 0, "tokens": 0}

    def counted(name):
        def hook(module, args, kwargs, output):
            calls[name] += 1
            calls["tokens"] += kwargs["inputs_embeds"].shape[:2].numel() if name == "decoder" else 0

        return hook

    network = bench.network
    parts = {"vision": network.vision, "audio": network.audio, "decoder": network.lm.get_decoder()}
    handles = [part.register_forward_hook(counted(name), with_kwargs=True) for name, part in parts.items()]
    side(bench)
    for handle in handles:
        handle.remove()
    return calls


def test_sides_do_the_work_that_is_told_of_them(step, bench):
    inputs = bench.batches.micro_batches(0)[0].inputs
    lengths = inputs.attention_mask.sum(1).tolist()
    shared = (inputs.input_ids == inputs.input_ids[:1]).all(0).long().cumprod(0).sum().item()
    # One pass over what the three rows begin with alike and over each row's own part; two encoder passes and five rows.
    once = shared + sum(length - shared for length in lengths)
    chosen, rejected, truth = lengths
    works = {name: count_calls(bench, side) for name, side in step.SIDES.items()}
    assert works["ours"] == {"vision": 0, "audio": 0, "decoder": 1, "tokens": once}
    assert works["logits of all positions"] == works["ours"]
    assert works["naive"] == {"vision": 2, "audio": 2, "decoder": 5, "tokens": 2 * chosen + 2 * rejected + truth}
    assert works["no shared prefix"]["tokens"] == sum(lengths)
    assert works["encoders in each step"] == works["ours"] | {"vision": 1, "audio": 1}
    assert works["reference policy in each step"]["decoder"] == 2
    assert bench.prefix_tokens / bench.pair.chosen.count("w") > 20


@pytest.mark.parametrize("family", ["salmonn2", "salmonn2-plus"])
def test_sides_are_the_same(step, small, family):
    config = replace(small, family=family)
    step.check(step.StepBench(config), config)


def test_a_side_that_computes_something_else_is_found_out(step, small, bench, monkeypatch):
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


def test_not_a_number_is_found_out(step, small, bench):
    gradients = torch.ones(3)
    with pytest.raises(ValueError, match="loss nan"):
        step.require_equal("broken", (float("nan"), gradients), (1.0, gradients), config=small)


def test_all_positions_are_asked_once(step, bench):
    class Asked(nn.Module):
        def forward(self, inputs):
            self.labels = inputs.labels
            return torch.ones(inputs.labels[:, 1:].shape)

    inputs, network = bench.batches.micro_batches(0)[0].inputs, Asked()
    given = step.AllLabels(network)(inputs)
    assert (network.labels[0] >= 0).all() and torch.equal(network.labels[1:], inputs.labels[1:])
    assert torch.equal(given, (inputs.labels[:, 1:] != -100).float())


def test_flops(step):
    # 10 parameters x 6 tokens x 2 flops x 3 passes = 360; attention: 2 layers x width 5 x 36 / 2 pairs x 4 x 3 = 2160.
    assert step.flops(10, 6, width=5, layers=2, passes=3) == 360 + 2160


def test_rows(step, small, monkeypatch, tmp_path):
    memory = {"ours": {"step_mib": 10, "process_mib": 100}, "naive": {"step_mib": 30, "process_mib": 120}}
    monkeypatch.setattr(step, "measure_isolated", lambda config, side: memory[side])
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
def test_memory_is_measured_in_another_process(step, small):
    measured = step.measure_isolated(small, "naive")
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
    # 2 s a hundred are 20 a thousand; twice the size takes 4 times as long and twice the memory.
    assert one["name"] == "100 clips" and one["note"] == "20 s per 1,000" and two["ours_mib"] == 10
    assert (fit["time_exponent"], fit["memory_exponent"]) == (2.0, 1.0)


def test_growth_measures_what_it_says(small, monkeypatch):
    growth = load("growth")
    # A frame of 112 pixels is 4 x 5 tokens; the 60 of a chunk of sound are made 64 to be dealt out to 8 frames.
    assert growth.measure_step(small, 8)["size"] == 8 * 20 + 64
    seen = []
    train_step = growth.StepBench.train_step
    monkeypatch.setattr(
        growth.StepBench, "train_step", lambda bench, batch: (seen.append(batch.clips), train_step(bench, batch))[1]
    )
    measured = growth.measure_round(small, 8)
    assert measured["size"] == 8 and measured["seconds"] > 0
    # One step on the clip of noise to warm up, then 8 pairs, 4 a step, each once.
    assert seen[0] == ("noise",) and sorted(seen[1] + seen[2]) == [f"clip {number}" for number in range(8)]
    assert len(seen) == 3 and len(seen[1]) == 4
