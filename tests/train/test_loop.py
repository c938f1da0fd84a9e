"""The loop: schedule and first step by hand, NaN before the step, and a resumed run like an unbroken one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from salmonn.model.lora import LoraConfig, attach
from salmonn.train.examples import ClipCache, SftBatches, make_examples, sft_loss
from salmonn.train.loop import FitConfig, StepLog, fit, learning_rate_at

PLAIN = FitConfig(learning_rate=0.5, steps=1, warmup_steps=1, weight_decay=0.0, max_grad_norm=1e9)


class Weights(nn.Module):
    """A matrix and a vector; the loss below is linear in them, so that its gradients are the batch itself."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(2, 2))
        self.vector = nn.Parameter(torch.ones(2))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, slope):
        return (self.matrix * slope).sum() + (self.vector * slope[0]).sum() + self.frozen.sum()


def linear_loss(model, batch):
    return model(batch), {"slope": batch.sum().item()}


SLOPE = torch.tensor([[3.0, -4.0], [0.5, 2.0]])


def fit_weights(tmp_path, config, *, batches=lambda _: SLOPE, loss=linear_loss, **options) -> Weights:
    model = Weights()
    fit(model, batches, loss, config, seed=0, name="test", checkpoint_path=tmp_path / "c.safetensors", **options)
    return model


def test_schedule_by_hand():
    config = FitConfig(learning_rate=2.0, steps=12, warmup_steps=4)
    # Up by quarters, then 0.2 + 0.9 * (1 + cos(pi * done / 8)).
    assert [learning_rate_at(step, config) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert learning_rate_at(4, config) == pytest.approx(2.0)
    assert learning_rate_at(6, config) == pytest.approx(0.2 + 0.9 * (1 + 0.5**0.5))
    assert learning_rate_at(8, config) == pytest.approx(1.1)
    assert learning_rate_at(12, config) == pytest.approx(0.2)
    assert learning_rate_at(40, config) == pytest.approx(0.2)


def test_schedule_without_warmup_and_with_nothing_else():
    assert learning_rate_at(0, FitConfig(learning_rate=2.0, steps=4, warmup_steps=0)) == 2.0
    assert learning_rate_at(3, FitConfig(learning_rate=2.0, steps=4, warmup_steps=4)) == 2.0


def test_first_step_by_hand(tmp_path):
    # Adam's first step is the learning rate against the gradient's sign.
    model = fit_weights(tmp_path, PLAIN)
    assert torch.allclose(model.matrix, torch.tensor([[0.5, 1.5], [0.5, 0.5]]), atol=1e-5)
    assert torch.allclose(model.vector, torch.tensor([0.5, 1.5]), atol=1e-5)
    assert model.frozen.eq(1).all() and not model.training


def test_decay_is_of_matrices_alone(tmp_path):
    # 1 * (1 - 0.5 * 0.2) = 0.9, then the step of 0.5.
    config = FitConfig(learning_rate=0.5, steps=1, warmup_steps=1, weight_decay=0.2)
    model = fit_weights(tmp_path, config)
    assert torch.allclose(model.matrix, torch.tensor([[0.4, 1.4], [0.4, 0.4]]), atol=1e-5)
    assert torch.allclose(model.vector, torch.tensor([0.5, 1.5]), atol=1e-5)


def test_the_first_step_is_as_small_as_the_schedule_says(tmp_path):
    model = fit_weights(tmp_path, FitConfig(learning_rate=0.5, steps=1, warmup_steps=5, weight_decay=0.0))
    assert torch.allclose(model.vector, torch.tensor([0.9, 1.1]), atol=1e-5)  # a fifth of 0.5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_stops_before_the_step(tmp_path, bad):
    """Step 0 is sound, step 1 is not: the weights are those after step 0, no checkpoint is written."""
    sound = fit_weights(tmp_path, PLAIN)
    model = Weights()
    config = FitConfig(
        learning_rate=0.5, steps=3, warmup_steps=1, weight_decay=0.0, max_grad_norm=1e9, checkpoint_every=2
    )
    steps = []
    with pytest.raises(FloatingPointError, match="step 1"):
        fit(
            model,
            lambda step: SLOPE * (bad if step == 1 else 1.0),
            linear_loss,
            config,
            seed=0,
            name="test",
            checkpoint_path=tmp_path / "c.safetensors",
            on_step=lambda step, _: steps.append(step),
        )
    assert steps == [0] and not (tmp_path / "c.safetensors").exists()
    assert torch.equal(model.matrix, sound.matrix) and torch.equal(model.vector, sound.vector)


def test_a_finite_loss_with_a_bad_gradient_stops_too(tmp_path):
    # The square root of 0 is 0, its slope infinite.
    def loss(model, _):
        return (model.vector - 1).abs().sum().sqrt() + 0 * model.matrix.sum(), {}

    model = Weights()
    with pytest.raises(FloatingPointError, match="gradient norm"):
        fit(model, lambda _: None, loss, PLAIN, seed=0, name="t", checkpoint_path=tmp_path / "c.safetensors")
    assert model.vector.eq(1).all() and model.matrix.eq(1).all()


def test_batches_come_in_the_order_of_steps(tmp_path):
    asked, seen = [], []

    def batches(step):
        asked.append(step)
        return SLOPE * (step + 1)

    config = FitConfig(steps=4, warmup_steps=1)
    fit_weights(tmp_path, config, batches=batches, on_step=lambda step, figures: seen.append((step, figures["slope"])))
    assert asked == [0, 1, 2, 3] and seen == [(0, 1.5), (1, 3.0), (2, 4.5), (3, 6.0)]


def test_step_log(tmp_path):
    log = StepLog(tmp_path / "steps.jsonl")
    log(0, {"loss": 1.5})
    log(1, {"loss": 0.5, "ce": 2.0})
    lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert lines == [{"step": 0, "loss": 1.5}, {"step": 1, "loss": 0.5, "ce": 2.0}]


class Killed(Exception):
    """What ends a run in the middle."""


def adapted(captioner):
    """The random model with an adapter that drops out half of its input."""
    attach(captioner.network, LoraConfig(rank=2, dropout=0.5), seed=0)
    return captioner.network


@pytest.fixture
def batches(processor, clips):
    examples = make_examples(clips.references[:2], ("caption", "questions"), root=clips.root)
    return SftBatches(examples, processor, ClipCache(processor), batch_size=2, seed=0)


def trained(network) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.named_parameters() if value.requires_grad}


def test_a_resumed_run_equals_an_unbroken_one(random_model, batches, tmp_path):
    from salmonn.caption.captioner import Captioner

    config = FitConfig(learning_rate=0.01, steps=6, warmup_steps=2, checkpoint_every=4)

    def run(name, on_step=None):
        network = adapted(Captioner.load(random_model))
        path = tmp_path / f"{name}.safetensors"
        fit(network, batches, sft_loss, config, seed=1, name=name, checkpoint_path=path, on_step=on_step)
        return trained(network)

    steps = []

    def kill(step, _):
        steps.append(step)
        if step == 4:
            raise Killed

    unbroken = run("unbroken")
    with pytest.raises(Killed):
        run("broken", kill)
    resumed = run("broken", lambda step, _: steps.append(step))
    assert steps == [0, 1, 2, 3, 4, 4, 5]  # the checkpoint is of 4 steps
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)
    fresh = trained(adapted(Captioner.load(random_model)))
    assert any(not torch.equal(fresh[name], resumed[name]) for name in fresh)


def test_another_seed_is_another_run(random_model, batches, tmp_path):
    """Or else the test above would not see a seed that got lost: dropout differs."""
    from salmonn.caption.captioner import Captioner

    config = FitConfig(learning_rate=0.01, steps=2, warmup_steps=1)
    results = []
    for seed in (1, 2):
        network = adapted(Captioner.load(random_model))
        fit(network, batches, sft_loss, config, seed=seed, name="s", checkpoint_path=tmp_path / f"{seed}.safetensors")
        results.append(trained(network))
    assert any(not torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_a_weight_that_no_batch_touches_is_kept_and_resumed(tmp_path):
    """The matrix has its first gradient at step 3, after the checkpoint of 2 steps."""

    def loss(model, step):
        return (model.vector * SLOPE[0]).sum() + ((model.matrix * SLOPE).sum() if step >= 3 else 0), {}

    def kill(step, _):
        if step == 2:
            raise Killed

    config = FitConfig(learning_rate=0.5, steps=5, warmup_steps=1, checkpoint_every=2)
    same = {"batches": lambda step: step, "loss": loss}
    (tmp_path / "whole").mkdir()
    unbroken = fit_weights(tmp_path / "whole", config, **same)
    with pytest.raises(Killed):
        fit_weights(tmp_path, config, **same, on_step=kill)
    resumed = fit_weights(tmp_path, config, **same)
    assert torch.equal(unbroken.matrix, resumed.matrix) and torch.equal(unbroken.vector, resumed.vector)
    assert not resumed.matrix.eq(1).any()


def test_a_checkpoint_of_other_weights_is_refused(captioner, tmp_path):
    path = tmp_path / "c.safetensors"
    config = FitConfig(steps=1, warmup_steps=1, checkpoint_every=1)
    fit(Weights(), lambda _: SLOPE, linear_loss, config, seed=0, name="t", checkpoint_path=path)
    assert path.is_file()
    with pytest.raises(ValueError, match=r"c\.safetensors.*another configuration"):
        fit(adapted(captioner), lambda _: None, sft_loss, config, seed=0, name="t", checkpoint_path=path)


@pytest.mark.parametrize("size", [1, 3])
def test_a_checkpoint_of_other_sizes_is_refused(tmp_path, size):
    path = tmp_path / "c.safetensors"
    config = FitConfig(steps=1, warmup_steps=1, checkpoint_every=1)

    def loss(model, _):
        return model.weight.sum() + model.bias.sum(), {}

    fit(nn.Linear(2, size), lambda _: None, loss, config, seed=0, name="t", checkpoint_path=path)
    with pytest.raises(ValueError, match="another configuration"):
        fit(nn.Linear(2, 2), lambda _: None, loss, config, seed=0, name="t", checkpoint_path=path)


def test_fit_learns_two_clips(random_model, processor, clips, tmp_path):
    from salmonn.model.build import build

    torch.manual_seed(0)
    network = build(processor.config)
    examples = make_examples(clips.references[:2], ("audio_caption",), root=clips.root)
    batches = SftBatches(examples, processor, ClipCache(processor), batch_size=2, seed=0)
    losses = []
    fit(
        network,
        batches,
        sft_loss,
        FitConfig(learning_rate=2e-3, steps=15, warmup_steps=3),
        seed=0,
        name="two clips",
        checkpoint_path=tmp_path / "c.safetensors",
        on_step=lambda _, figures: losses.append(figures["loss"]),
    )
    # A fresh model knows nothing of 400 tokens: log 400 = 5.99, and half its logits' variance of 128 * 0.09^2 = 1.04.
    assert losses[0] == pytest.approx(5.99 + 0.52, abs=0.2)
    assert losses[-1] < 0.75 * losses[0]


RANKS = """
import json, sys
from pathlib import Path
import torch
from salmonn import dist
from salmonn.caption.captioner import Captioner
from salmonn.model.lora import LoraConfig, attach
from salmonn.records import Reference, read_records
from salmonn.train.examples import ClipCache, SftBatches, make_examples, sft_loss
from salmonn.train.loop import FitConfig, fit

model, clips, out = sys.argv[1:]
dist.setup(threads=1)
captioner = Captioner.load(model)
attach(captioner.network, LoraConfig(rank=2, dropout=0.0), seed=0)
trained = [value for value in captioner.network.parameters() if value.requires_grad]
start = torch.cat([value.detach().flatten() for value in trained])
references = read_records(Path(clips) / "clips.jsonl", Reference)
examples = make_examples(references[:4], ("caption",), root=Path(clips))
batches = SftBatches(examples, captioner.processor, ClipCache(captioner.processor), batch_size=4, seed=0)
config = FitConfig(steps=2, warmup_steps=1, batch_size=4)
path = Path(out) / f"c{dist.rank()}.safetensors"
fit(captioner.network, batches, sft_loss, config, seed=0, name="ranks", checkpoint_path=path)
moved = torch.cat([value.detach().flatten() for value in trained]) - start
(Path(out) / f"{dist.world_size()}-{dist.rank()}.json").write_text(json.dumps(moved.tolist()))
"""


def test_two_processes_train_as_one(random_model, clips, tmp_path):
    """Each on its half of the batch: both move the weights as one process on the whole does."""
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    torchrun = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc_per_node=2"]
    for launcher in ([sys.executable], torchrun):
        line = list(map(str, [*launcher, script, random_model, clips.root, tmp_path]))
        subprocess.run(line, check=True, timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"})
    alone, first, second = (
        torch.tensor(json.loads((tmp_path / f"{name}.json").read_text())) for name in ("1-0", "2-0", "2-1")
    )
    assert torch.equal(first, second) and alone.abs().max() > 1e-3
    assert (alone - first).abs().max() < 0.02 * 1e-3  # a hundredth of what two steps move a weight
