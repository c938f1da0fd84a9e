"""The loop: schedule and first step by hand, NaN before the step, a full disk, and resumed runs."""

import errno
import gc
import json
import re
import resource
import shutil
import threading
import weakref
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from salmonn.model.lora import LoraConfig, attach_lora
from salmonn.model.network import Network
from salmonn.train import checkpoint
from salmonn.train.checkpoint import Checkpoints, load_trained
from salmonn.train.data import ClipCache, SftBatches, make_examples, sft_loss
from salmonn.train.loop import Callback, FitConfig, FitContext, fit, learning_rate_at

ONE_STEP = FitConfig(learning_rate=0.5, steps=1, warmup_ratio=1.0, weight_decay=0.0, max_grad_norm=1e9)


@dataclass(frozen=True)
class LinearBatch:
    """A micro-batch."""

    values: Tensor
    clips: tuple[str, ...] = ("a.mp4",)
    num_tokens: int = 4
    devices: list[torch.device] = field(default_factory=list)

    def pin_for(self, device):
        """Note the device."""
        return replace(self, devices=[*self.devices, device])


class Weights(nn.Module):
    """A matrix and a vector; the loss below is linear in them, so its gradients are the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(2, 2))
        self.vector = nn.Parameter(torch.ones(2))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, values):
        return (self.matrix * values).sum() + (self.vector * values[0]).sum() + self.frozen.sum()


def linear_loss(model, batch):
    return model(batch.values), {"slope": batch.values.sum().item()}


SLOPE = torch.tensor([[3.0, -4.0], [0.5, 2.0]])


class Source:
    """Batches from a function of the step."""

    def __init__(self, micro_batches) -> None:
        self.micro_batches = micro_batches


def context_in(folder, *, seed=0, callback=None) -> FitContext:
    return FitContext("test", folder, seed, callback=callback)


def fit_weights(
    tmp_path, config, *, batches=lambda _: [LinearBatch(SLOPE)], loss=linear_loss, callback=None
) -> Weights:
    model = Weights()
    fit(model, Source(batches), loss, config, context=context_in(tmp_path, callback=callback))
    return model


def steps_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]


def test_schedule_by_hand():
    config = FitConfig(learning_rate=2.0, steps=12, warmup_ratio=1 / 3)
    # Warm-up in quarters, then 0.2 + 0.9 * (1 + cos(pi * decay_step / 8)).
    assert [learning_rate_at(step, config) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert learning_rate_at(4, config) == pytest.approx(2.0)
    assert learning_rate_at(6, config) == pytest.approx(0.2 + 0.9 * (1 + 0.5**0.5))
    assert learning_rate_at(8, config) == pytest.approx(1.1)
    assert learning_rate_at(12, config) == pytest.approx(0.2)
    assert learning_rate_at(40, config) == pytest.approx(0.2)


def test_schedule_without_warmup_and_with_only_warmup():
    assert learning_rate_at(0, FitConfig(learning_rate=2.0, steps=4, warmup_ratio=0.0)) == 2.0
    assert learning_rate_at(3, FitConfig(learning_rate=2.0, steps=4, warmup_ratio=1.0)) == 2.0


def test_micro_batches_are_prepared_for_the_device_in_the_thread(tmp_path, monkeypatch):
    """On a GPU they are copied from pinned memory, where the features on disk have been read to."""
    trained, threads, pin = [], set(), LinearBatch.pin_for

    def loss(model, batch):
        trained.append(batch.devices)
        return linear_loss(model, batch)

    monkeypatch.setattr(LinearBatch, "pin_for", lambda *args: threads.add(threading.current_thread()) or pin(*args))
    fit_weights(tmp_path, replace(ONE_STEP, steps=2), loss=loss)
    assert trained == [[torch.device("cpu")]] * 2 and threading.main_thread() not in threads


def test_first_step_by_hand(tmp_path):
    # Adam's first step is the learning rate against the gradient's sign.
    model = fit_weights(tmp_path, ONE_STEP)
    assert torch.allclose(model.matrix, torch.tensor([[0.5, 1.5], [0.5, 0.5]]), atol=1e-5)
    assert torch.allclose(model.vector, torch.tensor([0.5, 1.5]), atol=1e-5)
    assert model.frozen.eq(1).all()


def test_only_matrices_have_weight_decay(tmp_path):
    # 1 * (1 - 0.5 * 0.2) = 0.9, then the step of 0.5.
    config = FitConfig(learning_rate=0.5, steps=1, warmup_ratio=1.0, weight_decay=0.2)
    model = fit_weights(tmp_path, config)
    assert torch.allclose(model.matrix, torch.tensor([[0.4, 1.4], [0.4, 0.4]]), atol=1e-5)
    assert torch.allclose(model.vector, torch.tensor([0.5, 1.5]), atol=1e-5)


def test_the_first_step_has_the_scheduled_learning_rate(tmp_path):
    config = FitConfig(learning_rate=0.5, steps=5, warmup_ratio=1.0, weight_decay=0.0, checkpoint_every=1)

    def batches(step):
        if step == 1:
            raise Interrupted
        return [LinearBatch(SLOPE)]

    with pytest.raises(Interrupted):
        fit_weights(tmp_path, config, batches=batches)
    after = Weights()
    load_trained(after, Checkpoints(tmp_path / "checkpoints").latest())
    assert after.vector.tolist() == pytest.approx([0.9, 1.1], abs=1e-5)  # a fifth of 0.5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_stops_before_the_step_and_names_the_clips(tmp_path, value):
    """Step 0 is finite, step 1 is not: the weights are those after step 0."""
    (tmp_path / "finite").mkdir()
    expected = fit_weights(tmp_path / "finite", ONE_STEP)
    model = Weights()
    config = FitConfig(
        learning_rate=0.5, steps=3, warmup_ratio=1 / 3, weight_decay=0.0, max_grad_norm=1e9, checkpoint_every=2
    )

    def batches(step):
        return [LinearBatch(SLOPE), LinearBatch(SLOPE * (value if step == 1 else 1.0), clips=("storm.mp4", "sea.mp4"))]

    with pytest.raises(FloatingPointError, match=r"step 1: loss (nan|inf).* on a\.mp4, sea\.mp4, storm\.mp4: check"):
        fit(model, Source(batches), linear_loss, config, context=context_in(tmp_path))
    assert [step["step"] for step in steps_of(tmp_path)] == [0] and not (tmp_path / "checkpoints").exists()
    assert torch.equal(model.matrix, expected.matrix) and torch.equal(model.vector, expected.vector)


def test_a_finite_loss_with_a_bad_gradient_stops_too(tmp_path):
    # The square root of 0 is 0, its slope infinite.
    def loss(model, _):
        return (model.vector - 1).abs().sum().sqrt() + 0 * model.matrix.sum(), {}

    model = Weights()
    with pytest.raises(FloatingPointError, match=r"gradient norm (nan|inf)"):
        fit(model, Source(lambda _: [LinearBatch(SLOPE)]), loss, ONE_STEP, context=context_in(tmp_path))
    assert model.vector.eq(1).all() and model.matrix.eq(1).all()


def test_batches_are_requested_in_the_order_of_steps(tmp_path):
    requested = []

    def batches(step):
        requested.append(step)
        return [LinearBatch(SLOPE * (step + 1))]

    fit_weights(tmp_path, FitConfig(steps=4, warmup_ratio=0.25), batches=batches)
    assert requested == [0, 1, 2, 3]
    assert [(step["step"], step["slope"]) for step in steps_of(tmp_path)] == [(0, 1.5), (1, 3.0), (2, 4.5), (3, 6.0)]


def test_logged_figures_of_a_step(tmp_path):
    """Two micro-batches with gradients (3, -4; 0.5, 2) and (3, -4): the norm of the sum is 2 * sqrt(25 + 4.25 + 25)."""
    callback = Callback(lambda model: {"kl": float(model.frozen.sum())}, every=2)
    config = FitConfig(learning_rate=0.5, steps=4, warmup_ratio=0.5, max_grad_norm=1.0)
    fit_weights(tmp_path, config, batches=lambda _: [LinearBatch(SLOPE), LinearBatch(SLOPE)], callback=callback)
    first, second, third, last = steps_of(tmp_path)
    assert first["grad_norm"] == pytest.approx(2 * 54.25**0.5) and first["learning_rate"] == 0.25
    # The matrix, the vector and the frozen weights are ones: 1.5 - 1 + 2, twice.
    assert first["loss"] == pytest.approx(5.0) and first["slope"] == pytest.approx(3.0)
    assert first["tokens_per_second"] == pytest.approx(8 / first["seconds"])
    assert 0 <= first["wait_seconds"] < first["seconds"] and first["memory_gib"] > 0.05
    assert ["kl" in step for step in (first, second, third, last)] == [True, False, True, True] and last["kl"] == 2.0


class Interrupted(Exception):
    """Raised to interrupt a run."""


def attach_adapter(captioner):
    """Attach an adapter with dropout 0.5 to the random model."""
    attach_lora(captioner.network, LoraConfig(rank=2, dropout=0.5), seed=0)
    return captioner.network


@pytest.fixture
def batches(processor, clips):
    examples = make_examples(clips.head(2), ("caption", "questions"))
    return SftBatches(examples, processor, ClipCache(processor), batch_size=2, seed=0)


def trained_weights(network) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.named_parameters() if value.requires_grad}


class InterruptedBatches:
    """Batches that interrupt the run when a step's are requested, which happens one step ahead."""

    def __init__(self, batches, *, at: int) -> None:
        self.batches = batches
        self.at = at

    def micro_batches(self, step):
        if step == self.at:
            raise Interrupted
        return self.batches.micro_batches(step)


def checkpoint_weights(folder, model) -> dict[str, torch.Tensor]:
    """Load the last checkpoint into a model and return its trained weights."""
    load_trained(model, Checkpoints(folder / "checkpoints").latest())
    return trained_weights(model)


def bytes_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_resumed_run_equals_an_uninterrupted_one(random_model, batches, tmp_path):
    from salmonn.caption.captioner import Captioner

    config = FitConfig(learning_rate=0.01, steps=4, warmup_ratio=1 / 2, checkpoint_every=2)

    def run(name, batches):
        fit(
            attach_adapter(Captioner.load(random_model)),
            batches,
            sft_loss,
            config,
            context=context_in(tmp_path / name, seed=1),
        )

    run("uninterrupted", batches)
    with pytest.raises(Interrupted):
        run("interrupted", InterruptedBatches(batches, at=3))
    # The checkpoint has 2 steps.
    assert [step["step"] for step in steps_of(tmp_path / "interrupted")] == [0, 1, 2]
    run("interrupted", batches)
    assert bytes_of(tmp_path / "interrupted" / "checkpoints") == bytes_of(tmp_path / "uninterrupted" / "checkpoints")
    timed = ("seconds", "wait_seconds", "tokens_per_second", "memory_gib")
    logs = [
        [{name: value for name, value in step.items() if name not in timed} for step in steps_of(tmp_path / run)]
        for run in ("interrupted", "uninterrupted")
    ]
    assert logs[0] == logs[1] and len(logs[0]) == 4
    resumed = checkpoint_weights(tmp_path / "interrupted", attach_adapter(Captioner.load(random_model)))
    fresh = trained_weights(attach_adapter(Captioner.load(random_model)))
    assert any(not torch.equal(fresh[name], resumed[name]) for name in fresh)


def test_a_finished_stage_is_not_run_again(tmp_path):
    fit_weights(tmp_path, ONE_STEP)

    def batches(_):
        raise AssertionError("no batch is needed")

    resumed = fit(Weights(), Source(batches), linear_loss, ONE_STEP, context=context_in(tmp_path))
    assert resumed.step == 1


def test_the_seed_affects_the_run(random_model, batches, tmp_path):
    """Dropout differs; otherwise the test above would not detect a lost seed."""
    from salmonn.caption.captioner import Captioner

    config = FitConfig(learning_rate=0.01, steps=2, warmup_ratio=0.5)
    results = []
    for seed in (1, 2):
        network = attach_adapter(Captioner.load(random_model))
        fit(network, batches, sft_loss, config, context=context_in(tmp_path / str(seed), seed=seed))
        results.append(trained_weights(network))
    assert any(not torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_a_weight_without_gradient_is_resumed(tmp_path):
    """The matrix has its first gradient in step 3, after the checkpoint of 2 steps."""

    def loss(model, batch):
        matrix_loss = (model.matrix * SLOPE).sum() if batch.num_tokens >= 3 else 0
        return (model.vector * SLOPE[0]).sum() + matrix_loss, {}

    def batches(step):
        return [LinearBatch(SLOPE, num_tokens=step)]

    config = FitConfig(learning_rate=0.5, steps=5, warmup_ratio=0.2, checkpoint_every=2)
    expected = fit_weights(tmp_path / "uninterrupted", config, batches=batches, loss=loss)
    with pytest.raises(Interrupted):
        fit_weights(tmp_path, config, batches=InterruptedBatches(Source(batches), at=3).micro_batches, loss=loss)
    resumed = fit_weights(tmp_path, config, batches=batches, loss=loss)
    assert torch.equal(expected.matrix, resumed.matrix) and torch.equal(expected.vector, resumed.vector)
    assert not resumed.matrix.eq(1).any()


def test_a_checkpoint_of_other_weights_is_rejected(captioner, tmp_path):
    fit(Weights(), Source(lambda _: [LinearBatch(SLOPE)]), linear_loss, ONE_STEP, context=context_in(tmp_path))
    config = FitConfig(steps=2, warmup_ratio=1.0)
    with pytest.raises(ValueError, match=r"step_000001\.safetensors.*other trained weights"):
        fit(attach_adapter(captioner), Source(lambda _: []), sft_loss, config, context=context_in(tmp_path))


@pytest.mark.parametrize("size", [1, 3])
def test_a_checkpoint_of_other_sizes_is_rejected(tmp_path, size):
    def loss(model, _):
        return model.weight.sum() + model.bias.sum(), {}

    fit(nn.Linear(2, size), Source(lambda _: [LinearBatch(SLOPE)]), loss, ONE_STEP, context=context_in(tmp_path))
    with pytest.raises(ValueError, match="other trained weights"):
        fit(
            nn.Linear(2, 2),
            Source(lambda _: []),
            loss,
            FitConfig(steps=2, warmup_ratio=1.0),
            context=context_in(tmp_path),
        )


FIVE_STEPS = FitConfig(learning_rate=0.1, steps=5, warmup_ratio=0.2, checkpoint_every=2)


@pytest.fixture
def interrupted_run(tmp_path):
    """The folder of a run that was interrupted after 4 of 5 steps, with checkpoints of 2 and 4 steps."""
    with pytest.raises(Interrupted):
        fit_weights(
            tmp_path, FIVE_STEPS, batches=InterruptedBatches(Source(lambda _: [LinearBatch(SLOPE)]), at=4).micro_batches
        )
    names = ["step_000002.json", "step_000002.safetensors", "step_000004.json", "step_000004.safetensors"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == names
    return tmp_path


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.with_suffix(".json").unlink(), "it is incomplete"),
        (lambda path: path.with_suffix(".json").write_text('{"step": 4'), "cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), r"it has \d+ of \d+ bytes"),
        (flip_a_bit, "checksum does not match"),
    ],
)
def test_a_damaged_checkpoint_is_skipped(interrupted_run, caplog, damage, reason):
    (interrupted_run / "uninterrupted").mkdir()
    expected = fit_weights(interrupted_run / "uninterrupted", FIVE_STEPS)
    damage(interrupted_run / "checkpoints" / "step_000004.safetensors")
    with caplog.at_level("INFO"):
        resumed = fit_weights(interrupted_run, FIVE_STEPS)
    assert "skipping checkpoint" in caplog.text and "step_000004.safetensors" in caplog.text
    assert "resuming from step 2" in caplog.text
    assert re.search(reason, caplog.text)
    assert torch.equal(expected.matrix, resumed.matrix) and torch.equal(expected.vector, resumed.vector)
    assert [step["step"] for step in steps_of(interrupted_run)] == [0, 1, 2, 3, 4]


def test_a_full_disk_is_detected_before_writing(interrupted_run, monkeypatch):
    before = bytes_of(interrupted_run / "checkpoints")
    usage = shutil.disk_usage(interrupted_run)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=20))
    with pytest.raises(ValueError, match=r"the checkpoint of step 5 needs .* GiB, .* free some space"):
        fit_weights(interrupted_run, FIVE_STEPS)
    assert bytes_of(interrupted_run / "checkpoints") == before
    monkeypatch.undo()
    assert not fit_weights(interrupted_run, FIVE_STEPS).matrix.eq(1).any()


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left (os error 28)")],
)
def test_a_disk_that_fills_up_keeps_earlier_checkpoints(interrupted_run, monkeypatch, error):
    before = bytes_of(interrupted_run / "checkpoints")

    def save(tensors, path, metadata):
        Path(path).write_bytes(b"partial")
        raise error

    monkeypatch.setattr(checkpoint, "save_file", save)
    with pytest.raises(ValueError, match="free some space"):
        fit_weights(interrupted_run, FIVE_STEPS)
    assert bytes_of(interrupted_run / "checkpoints") == before


def test_a_file_size_limit_keeps_earlier_checkpoints(tmp_path):
    """The system rejects files larger than 100 kB, like a full disk."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save({"model.a": torch.ones(10)}, step=1)
    before, limits = bytes_of(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(ValueError, match=r"the checkpoint of step 2 needs .* free some space"):
            checkpoints.save({"model.a": torch.ones(100_000)}, step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert bytes_of(tmp_path) == before and checkpoints.latest().step == 1


def test_fit_learns_two_clips(random_model, processor, clips, tmp_path):
    torch.manual_seed(0)
    network = Network(processor.config)
    examples = make_examples(clips.head(2), ("audio_caption",))
    batches = SftBatches(examples, processor, ClipCache(processor), batch_size=2, seed=0)
    config = FitConfig(learning_rate=2e-3, steps=15, warmup_ratio=0.2)
    fit(network, batches, sft_loss, config, context=context_in(tmp_path))
    losses = [step["loss"] for step in steps_of(tmp_path)]
    # A fresh model is uniform over 400 tokens: log 400 = 5.99, plus half the logits' variance of 128 * 0.09^2 = 1.04.
    assert losses[0] == pytest.approx(5.99 + 0.52, abs=0.2)
    assert losses[-1] < 0.75 * losses[0]


def test_a_trained_network_is_freed(captioner, batches, tmp_path):
    """A GPU has no memory for two networks."""
    network = weakref.ref(attach_adapter(captioner))
    callback = Callback(lambda model: {"kl": 0.0}, every=1)
    fit(
        captioner.network,
        batches,
        sft_loss,
        FitConfig(steps=1, warmup_ratio=1.0),
        context=context_in(tmp_path, callback=callback),
    )
    assert network() is not None
    del captioner.network
    gc.collect()  # training wrappers hold the network in reference cycles
    assert network() is None
