"""Options of the loop: epochs, gradient accumulation, checkpointing and 16 bits give the same gradients."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch

from salmonn.caption.captioner import SHIPPED_MODEL, Captioner
from salmonn.model.loading import Placement
from salmonn.model.lora import LoraConfig, attach_lora, merge_adapter
from salmonn.preference.losses import LossConfig, make_loss
from salmonn.records import Comparison
from salmonn.train.checkpoint import load_trained
from salmonn.train.data import ClipCache, SftBatches, make_examples, sft_loss, split_evenly
from salmonn.train.loop import Callback, FitConfig, FitContext, fit, learning_rate_at
from salmonn.train.preference import PreferenceBatches, PreferenceBatchLoss, PreferenceExample
from salmonn.train.reference_logps import compute_reference_logps
from tests.launch import forked
from tests.limits import RUN_SECONDS

NO_DROPOUT = LoraConfig(rank=4, dropout=0.0)
TIMED = ("tokens_per_second", "memory_gib", "wait_seconds", "seconds")
AUDIO_PREFIXES = ("audio.qformer.", "audio.projector.")
FEW_FRAMES = {"max_frames": 4}  # for bfloat16: many CPUs take 40 times as long for a product as in float32


class Source:
    """Batches from a function of the step."""

    def __init__(self, micro_batches) -> None:
        self.micro_batches = micro_batches


def context_in(folder, *, seed=0) -> FitContext:
    return FitContext("options", folder, seed)


def steps_of(folder) -> list[dict]:
    """Return the logged figures, except for times and memory."""
    steps = map(json.loads, (folder / "steps.jsonl").read_text().splitlines())
    return [{name: value for name, value in step.items() if name not in TIMED} for step in steps]


def test_epochs_become_steps():
    config = FitConfig(steps=None, epochs=2.5, batch_size=8, warmup_ratio=0.1)
    assert config.resolve(64) == FitConfig(steps=20, batch_size=8, warmup_ratio=0.1)
    assert config.resolve(1).num_steps == 1
    steps = FitConfig(steps=7)
    assert steps.resolve(64) is steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 1.0}, "got steps 1000 and epochs 1.0"),
        ({"steps": None}, "got steps None and epochs None"),
        ({"warmup_ratio": 50}, "from 0 to 1, got 50"),
        ({"gradient_accumulation_steps": 0}, "at least 1, got 0"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(ValueError, match=message):
        FitConfig(**options)


def test_a_cosine_that_ends_at_zero():
    config = FitConfig(learning_rate=2.0, min_lr_ratio=0.0, steps=10, warmup_ratio=0.2)
    assert [learning_rate_at(step, config) for step in (0, 1, 2, 6)] == pytest.approx([1.0, 2.0, 2.0, 1.0])
    assert learning_rate_at(10, config) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("count", "parts", "expected"),
    [(5, 2, [[0, 1], [2, 3, 4]]), (2, 3, [[0], [1]]), (3, 1, [[0, 1, 2]]), (0, 2, [])],
)
def test_parts_are_even_and_never_empty(count, parts, expected):
    assert [list(part) for part in split_evenly(range(count), parts)] == expected


def test_a_batch_smaller_than_the_number_of_ranks_is_rejected(captioner, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"batch_size 1 is smaller than the number of processes \(2\)"):
        fit_network(captioner.network, Source(lambda _: []), tmp_path, loss=sft_loss, batch_size=1)


def fit_network(network, batches, folder, *, loss, **options) -> dict[str, torch.Tensor]:
    """Train for a few steps and return the trained weights."""
    config = FitConfig(**{"learning_rate": 1e-3, "steps": 1, "warmup_ratio": 1.0} | options)
    fit(network, batches, loss, config, context=context_in(folder))
    return {name: value.clone() for name, value in network.named_parameters() if value.requires_grad}


@pytest.fixture(scope="module")
def sft_gradients(shallow_model, clips, tmp_path_factory):
    """Return the gradients of adapter and Q-Former in one SFT step on four clips, and the logged figures."""

    @cache
    def run(*, gradient_accumulation_steps=1, **options):
        network = Captioner.load(shallow_model).network
        attach_lora(network, NO_DROPOUT, seed=0)
        for name, parameter in network.named_parameters():
            if name.startswith(AUDIO_PREFIXES):
                parameter.requires_grad = True
        processor = Captioner.load(shallow_model).processor
        examples = make_examples(clips.head(4), ("caption", "questions"))
        batches = SftBatches(
            examples,
            processor,
            ClipCache(processor),
            batch_size=4,
            seed=0,
            gradient_accumulation_steps=gradient_accumulation_steps,
        )
        return gradients(network, batches, tmp_path_factory.mktemp("gradients"), loss=sft_loss, **options)

    return run


def gradients(network, batches, folder, *, loss, **options):
    """Return the gradients of the first step before clipping, and the logged figures."""
    grads, folder = {}, Path(mkdtemp(dir=folder))  # a run in the folder of another would resume it
    names = {parameter: name for name, parameter in network.named_parameters() if parameter.requires_grad}
    # Later micro-batches overwrite the recorded gradient, so the last one includes all of them.
    for parameter, name in names.items():
        parameter.register_post_accumulate_grad_hook(
            lambda parameter, name=name: grads.__setitem__(name, parameter.grad.clone())
        )
    config = FitConfig(**{"steps": 1, "warmup_ratio": 1.0, "max_grad_norm": 1e9} | options)
    fit(network, batches, loss, config, context=context_in(folder))
    return grads, steps_of(folder)[0]


def distance(ours: dict, theirs: dict) -> float:
    """Return the largest difference of two sets of gradients, relative to the largest gradient."""
    assert ours.keys() == theirs.keys() and ours
    largest = max(value.abs().max() for value in theirs.values())
    return max(float((ours[name] - theirs[name]).abs().max() / largest) for name in theirs)


def test_checkpointed_layers_give_the_same_gradients(sft_gradients):
    plain, figures = sft_gradients()
    checkpointed, checkpointed_figures = sft_gradients(gradient_checkpointing=True)
    assert checkpointed_figures == pytest.approx(figures, abs=1e-6) and distance(checkpointed, plain) < 1e-6
    assert any("lora_A" in name for name in checkpointed) and any("qformer" in name for name in checkpointed)
    assert any(value.abs().max() > 0 for name, value in checkpointed.items() if "qformer" in name)


def test_checkpointed_layers_save_less(captioner, clips):
    """Compare the tensors that the forward pass saves for the backward pass."""
    processor = captioner.processor
    attach_lora(captioner.network, NO_DROPOUT, seed=0)
    examples = make_examples(clips.head(1), ("caption",))
    (batch,) = SftBatches(examples, processor, ClipCache(processor), batch_size=1, seed=0).micro_batches(0)
    captioner.network.train()
    saved_bytes = {}
    for checkpointed in (False, True):
        captioner.network.checkpoint_layers(checkpointed)
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: (sizes.__setitem__(t.untyped_storage().data_ptr(), t.nbytes), t)[1], lambda t: t
        ):
            sft_loss(captioner.network, batch)
        saved_bytes[checkpointed] = sum(sizes.values())
    assert saved_bytes[True] < 0.6 * saved_bytes[False]


@pytest.mark.parametrize("gradient_accumulation_steps", [2, 3, 9])
def test_accumulated_gradients_equal_those_of_the_batch(sft_gradients, gradient_accumulation_steps):
    full, figures = sft_gradients()
    accumulated, accumulated_figures = sft_gradients(gradient_accumulation_steps=gradient_accumulation_steps)
    # Another order of sums changes rounding by about 1e-5; a wrong weight of a micro-batch would change about 1e-2.
    assert accumulated_figures == pytest.approx(figures, rel=1e-5) and distance(accumulated, full) < 5e-5


def test_accumulated_gradients_of_pairs(clips, tmp_path, fill_adapter):
    """Guided DPO on three pairs in one micro-batch and in three; all logged figures are the same."""
    results = []
    for gradient_accumulation_steps in (1, 3):
        # A trained model: with large random weights, rounding errors would dominate.
        captioner = Captioner.load(SHIPPED_MODEL)
        media = [captioner.processor.read(clips.root / reference.video) for reference in clips.references[:3]]
        features = zip(clips.references, captioner.encode(media), strict=False)
        examples = [
            PreferenceExample(
                Comparison(reference.video, "Tell.", "a red star", f"{reference.video} a tone", "the truth"), clip
            )
            for reference, clip in features
        ]
        attach_lora(captioner.network, NO_DROPOUT, seed=0)
        loss = make_loss(LossConfig())
        logps = compute_reference_logps(
            captioner.network, examples, captioner.processor, roles=loss.reference_roles, batch_size=1
        )
        batches = PreferenceBatches(
            examples,
            logps,
            captioner.processor,
            roles=loss.roles,
            batch_size=3,
            seed=0,
            gradient_accumulation_steps=gradient_accumulation_steps,
        )
        fill_adapter(captioner.network)
        assert len(batches.micro_batches(0)) == gradient_accumulation_steps
        results.append(gradients(captioner.network, batches, tmp_path, loss=PreferenceBatchLoss(loss)))
    (full, figures), (accumulated, accumulated_figures) = results
    assert accumulated_figures == pytest.approx(figures, rel=1e-4) and distance(accumulated, full) < 1e-5


def test_16_bit_weights_are_trained_in_32_bits(shallow_model, clips, tmp_path):
    """Adapter and Q-Former are float32 in training, the rest is bfloat16; the result is all bfloat16."""
    captioner = Captioner.load(shallow_model, placement=Placement(dtype="bfloat16"), frames=FEW_FRAMES)
    processor = captioner.processor
    before = {name: value.clone() for name, value in captioner.network.named_parameters()}

    def prepare(network):
        attach_lora(network, NO_DROPOUT, seed=0)
        for name, parameter in network.named_parameters():
            if name.startswith(AUDIO_PREFIXES):
                parameter.requires_grad = True
        return network

    network = prepare(captioner.network)
    examples = make_examples(clips.head(2), ("audio_caption",))
    batches = SftBatches(examples, processor, ClipCache(processor), batch_size=2, seed=0)
    dtypes = []

    def record_dtypes(model):
        dtypes.append({(value.requires_grad, value.dtype) for value in model.parameters()})
        return {}

    config = FitConfig(
        learning_rate=1.2e-2, steps=12, warmup_ratio=0.2, precision="bfloat16", gradient_checkpointing=True
    )
    context = replace(context_in(tmp_path), callback=Callback(record_dtypes, every=1))
    checkpoint = fit(network, batches, sft_loss, config, context=context)
    losses = [step["loss"] for step in steps_of(tmp_path)]
    assert set.union(*dtypes) == {(True, torch.float32), (False, torch.bfloat16)}
    assert losses[-1] < 0.8 * losses[0]
    captioner = Captioner.load(shallow_model, placement=Placement(dtype="bfloat16"))
    network = prepare(captioner.network)
    load_trained(network, checkpoint)
    merge_adapter(network)
    after = dict(network.named_parameters())
    assert after.keys() == before.keys() and {value.dtype for value in after.values()} == {torch.bfloat16}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith(AUDIO_PREFIXES) for name in changed) and any("q_proj" in name for name in changed)
    assert all(
        name.startswith(AUDIO_PREFIXES) or name.split(".")[-2] in ("q_proj", "k_proj", "v_proj") for name in changed
    )
    captioner.encode([processor.read(clips.root / clips.references[0].video)])  # all weights have one dtype again


def test_full_training_of_16_bit_weights_needs_16_bit_precision(shallow_model, tmp_path):
    network = Captioner.load(shallow_model, placement=Placement(dtype="bfloat16")).network
    network.requires_grad_(True)
    with pytest.raises(ValueError, match=r"weights to train are bfloat16, .*fit\.precision bfloat16"):
        fit_network(network, Source(lambda _: []), tmp_path, loss=sft_loss)


class Interrupted(Exception):
    """Raised to interrupt a run."""


def test_a_run_with_all_options_resumes(shallow_model, clips, tmp_path):
    """Float32 master weights of bfloat16 weights are restored exactly from the checkpoint."""

    def run(name, *, interrupted_at=None):
        captioner = Captioner.load(shallow_model, placement=Placement(dtype="bfloat16"), frames=FEW_FRAMES)
        attach_lora(captioner.network, LoraConfig(rank=2, dropout=0.5), seed=0)
        for parameter in captioner.network.audio.projector.parameters():
            parameter.requires_grad = True
        examples = make_examples(clips.head(2), ("caption",))
        cache = ClipCache(captioner.processor)
        batches = SftBatches(examples, captioner.processor, cache, batch_size=2, seed=0, gradient_accumulation_steps=2)
        config = FitConfig(
            **{
                "learning_rate": 1e-4,
                "epochs": 4,
                "steps": None,
                "batch_size": 2,
                "gradient_accumulation_steps": 2,
                "warmup_ratio": 0.4,
            },
            **{"min_lr_ratio": 0.0, "precision": "bfloat16", "gradient_checkpointing": True, "checkpoint_every": 2},
        )

        def micro_batches(step):
            if step == interrupted_at:
                raise Interrupted
            return batches.micro_batches(step)

        return fit(
            captioner.network,
            Source(micro_batches),
            sft_loss,
            config.resolve(len(examples)),
            context=context_in(tmp_path / name, seed=1),
        )

    uninterrupted = run("uninterrupted")
    with pytest.raises(Interrupted):
        run("interrupted", interrupted_at=3)
    assert len(steps_of(tmp_path / "interrupted")) == 3  # the checkpoint has 2 steps
    resumed = run("interrupted")
    assert steps_of(tmp_path / "interrupted") == steps_of(tmp_path / "uninterrupted") and resumed.step == 4
    assert resumed.path.read_bytes() == uninterrupted.path.read_bytes()


RANKS = """
import json, sys
from pathlib import Path
import torch
from salmonn import dist
from salmonn.caption.captioner import Captioner
from salmonn.model.lora import LoraConfig, attach_lora
from salmonn.files import read_records
from salmonn.records import Reference
from salmonn.train.data import ClipCache, ClipSet, SftBatches, make_examples, sft_loss
from salmonn.train.loop import FitConfig, FitContext, fit

model, clips, out = sys.argv[1:]
dist.setup(threads=1)
captioner = Captioner.load(model)
attach_lora(captioner.network, LoraConfig(rank=2, dropout=0.0), seed=0)
trained = [value for value in captioner.network.parameters() if value.requires_grad]
start = torch.cat([value.detach().flatten() for value in trained])
references = read_records(Path(clips) / "clips.jsonl", Reference)
examples = make_examples(ClipSet(references[:5], Path(clips)), ("caption", "visual_caption"))
batches = SftBatches(
    examples, captioner.processor, ClipCache(captioner.processor), batch_size=5, seed=0, gradient_accumulation_steps=2
)
config = FitConfig(steps=2, warmup_ratio=0.5, batch_size=5, gradient_accumulation_steps=2, gradient_checkpointing=True)
folder = Path(out) / f"of_{dist.world_size()}"
fit(captioner.network, batches, sft_loss, config, context=FitContext("ranks", folder))
moved = torch.cat([value.detach().flatten() for value in trained]) - start
(Path(out) / f"{dist.world_size()}-{dist.rank()}.json").write_text(json.dumps(moved.tolist()))
"""


def test_gradient_accumulation_on_two_processes(clips, tmp_path):
    """Three examples in two micro-batches on one rank, two on the other: the same update as of one process."""
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    arguments = [script, SHIPPED_MODEL, clips.root, tmp_path]
    torchrun = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc_per_node=2"]
    for launcher in ([sys.executable], torchrun):
        subprocess.run(forked(*launcher, *arguments), check=True, timeout=RUN_SECONDS)
    single, first, second = (
        torch.tensor(json.loads((tmp_path / f"{name}.json").read_text())) for name in ("1-0", "2-0", "2-1")
    )
    assert torch.equal(first, second) and single.abs().max() > 1e-3
    assert (single - first).abs().max() < 0.02 * 1e-3  # 2 % of a step's change of a weight
