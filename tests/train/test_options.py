"""Options of the loop for full size: epochs, pieces, checkpointed layers, 16 bits; what is learnt stays the same."""

import json
import os
import subprocess
import sys
from dataclasses import replace
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
from salmonn.train.preference import (
    PreferenceBatches,
    PreferenceBatchLoss,
    PreferenceExample,
    compute_reference_logps,
)
from tests.launch import forked

STEADY = LoraConfig(rank=4, dropout=0.0)
TIMED = ("tokens_per_second", "memory_gib", "wait_seconds", "seconds")
HEARING = ("audio.qformer.", "audio.projector.")
FEW_FRAMES = {"max_frames": 4}  # for bfloat16: many CPUs take 40 times as long for a product as in float32


class Source:
    """Batches by a function of the step."""

    def __init__(self, micro_batches) -> None:
        self.micro_batches = micro_batches


def context_in(folder, *, seed=0) -> FitContext:
    return FitContext("options", folder, seed)


def steps_of(folder) -> list[dict]:
    """The figures of the log but those of time and memory."""
    steps = map(json.loads, (folder / "steps.jsonl").read_text().splitlines())
    return [{name: value for name, value in step.items() if name not in TIMED} for step in steps]


def test_epochs_become_steps():
    config = FitConfig(steps=None, epochs=2.5, batch_size=8, warmup_ratio=0.1)
    assert config.resolve(64) == FitConfig(steps=20, batch_size=8, warmup_ratio=0.1)
    assert config.resolve(1).num_steps == 1
    steps = FitConfig(steps=7)
    assert steps.resolve(64) is steps


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epochs": 1.0}, "got steps 1000 and epochs 1.0"),
        ({"steps": None}, "got steps None and epochs None"),
        ({"warmup_ratio": 50}, "from 0 to 1, got 50"),
        ({"gradient_accumulation_steps": 0}, "at least 1, got 0"),
    ],
)
def test_options_that_make_no_sense(options, words):
    with pytest.raises(ValueError, match=words):
        FitConfig(**options)


def test_a_cosine_that_ends_at_nothing():
    config = FitConfig(learning_rate=2.0, min_lr_ratio=0.0, steps=10, warmup_ratio=0.2)
    assert [learning_rate_at(step, config) for step in (0, 1, 2, 6)] == pytest.approx([1.0, 2.0, 2.0, 1.0])
    assert learning_rate_at(10, config) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("count", "parts", "expected"),
    [(5, 2, [[0, 1], [2, 3, 4]]), (2, 3, [[0], [1]]), (3, 1, [[0, 1, 2]]), (0, 2, [])],
)
def test_parts_are_even_and_never_empty(count, parts, expected):
    assert [list(part) for part in split_evenly(range(count), parts)] == expected


def test_a_batch_that_does_not_reach_for_all_ranks_is_refused(captioner, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"batch_size 1 is smaller than the number of processes \(2\)"):
        fit_network(captioner.network, Source(lambda _: []), tmp_path, loss=sft_loss, batch_size=1)


def fit_network(network, batches, folder, *, loss, **options) -> dict[str, torch.Tensor]:
    """Trained weights after a few steps."""
    config = FitConfig(**{"learning_rate": 1e-3, "steps": 1, "warmup_ratio": 1.0} | options)
    fit(network, batches, loss, config, context=context_in(folder))
    return {name: value.clone() for name, value in network.named_parameters() if value.requires_grad}


@pytest.fixture
def learn(random_model, clips, tmp_path):
    """Gradients of one SFT step of adapter and Q-Former on four clips, and its loss."""

    def run(*, gradient_accumulation_steps=1, **options):
        network = Captioner.load(random_model).network
        attach_lora(network, STEADY, seed=0)
        for name, parameter in network.named_parameters():
            if name.startswith(HEARING):
                parameter.requires_grad = True
        processor = Captioner.load(random_model).processor
        examples = make_examples(clips.head(4), ("caption", "questions"))
        batches = SftBatches(
            examples,
            processor,
            ClipCache(processor),
            batch_size=4,
            seed=0,
            gradient_accumulation_steps=gradient_accumulation_steps,
        )
        return gradients(network, batches, tmp_path, loss=sft_loss, **options)

    return run


def gradients(network, batches, folder, *, loss, **options):
    """What the first step's optimiser sees: its gradients before clipping, and the figures of the log."""
    grads, folder = {}, Path(mkdtemp(dir=folder))  # a run in the folder of another would go on from its end
    names = {parameter: name for name, parameter in network.named_parameters() if parameter.requires_grad}
    # The hook hears of a weight's gradient once all pieces have added to it, since steps overwrite the earlier.
    for parameter, name in names.items():
        parameter.register_post_accumulate_grad_hook(
            lambda parameter, name=name: grads.__setitem__(name, parameter.grad.clone())
        )
    config = FitConfig(**{"steps": 1, "warmup_ratio": 1.0, "max_grad_norm": 1e9} | options)
    fit(network, batches, loss, config, context=context_in(folder))
    return grads, steps_of(folder)[0]


def distance(ours: dict, theirs: dict) -> float:
    """Greatest difference of two sets of gradients, in parts of the greatest gradient."""
    assert ours.keys() == theirs.keys() and ours
    greatest = max(value.abs().max() for value in theirs.values())
    return max(float((ours[name] - theirs[name]).abs().max() / greatest) for name in theirs)


def test_checkpointed_layers_give_the_same_gradients(learn):
    plain, figures = learn()
    again, same = learn(gradient_checkpointing=True)
    assert same == pytest.approx(figures, abs=1e-6) and distance(again, plain) < 1e-6
    assert any("lora_A" in name for name in again) and any("qformer" in name for name in again)
    assert any(value.abs().max() > 0 for name, value in again.items() if "qformer" in name)


def test_checkpointed_layers_keep_less(captioner, clips):
    """Or else the option would be a word: what the forward pass keeps for the gradient."""
    processor = captioner.processor
    attach_lora(captioner.network, STEADY, seed=0)
    examples = make_examples(clips.head(1), ("caption",))
    (batch,) = SftBatches(examples, processor, ClipCache(processor), batch_size=1, seed=0).micro_batches(0)
    captioner.network.train()
    kept = {}
    for on in (False, True):
        captioner.network.checkpoint_layers(on)
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: (sizes.__setitem__(t.untyped_storage().data_ptr(), t.nbytes), t)[1], lambda t: t
        ):
            sft_loss(captioner.network, batch)
        kept[on] = sum(sizes.values())
    assert kept[True] < 0.6 * kept[False]


@pytest.mark.parametrize("gradient_accumulation_steps", [2, 3, 9])
def test_pieces_give_the_gradient_of_the_whole(learn, gradient_accumulation_steps):
    whole, figures = learn()
    pieces, same = learn(gradient_accumulation_steps=gradient_accumulation_steps)
    # Sums in another order round otherwise, by some 1e-5 here; a piece of a wrong weight would be parts of a hundred.
    assert same == pytest.approx(figures, rel=1e-5) and distance(pieces, whole) < 5e-5


def test_pieces_of_pairs(clips, tmp_path, fill_adapter):
    """Guided DPO on three pairs, together and one by one; every figure of the log is the same."""
    results = []
    for gradient_accumulation_steps in (1, 3):
        # A trained model, since a random one of large weights makes much of rounding.
        captioner = Captioner.load(SHIPPED_MODEL)
        media = [captioner.processor.read(clips.root / reference.video) for reference in clips.references[:3]]
        features = zip(clips.references, captioner.encode(media), strict=False)
        examples = [
            PreferenceExample(Comparison(one.video, "Tell.", "a red star", f"{one.video} a tone", "the truth"), clip)
            for one, clip in features
        ]
        attach_lora(captioner.network, STEADY, seed=0)
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
    (whole, figures), (pieces, same) = results
    assert same == pytest.approx(figures, rel=1e-4) and distance(pieces, whole) < 1e-5


def test_16_bits_train_in_32(random_model, clips, tmp_path):
    """Adapter and Q-Former are float32 while they are trained, the rest stays in bfloat16; the result is all of it."""
    captioner = Captioner.load(random_model, placement=Placement(dtype="bfloat16"), frames=FEW_FRAMES)
    processor = captioner.processor
    before = {name: value.clone() for name, value in captioner.network.named_parameters()}

    def prepare(network):
        attach_lora(network, STEADY, seed=0)
        for name, parameter in network.named_parameters():
            if name.startswith(HEARING):
                parameter.requires_grad = True
        return network

    network = prepare(captioner.network)
    examples = make_examples(clips.head(2), ("audio_caption",))
    batches = SftBatches(examples, processor, ClipCache(processor), batch_size=2, seed=0)
    dtypes = []

    def look(model):
        dtypes.append({(value.requires_grad, value.dtype) for value in model.parameters()})
        return {}

    config = FitConfig(
        learning_rate=6e-3, steps=12, warmup_ratio=0.2, precision="bfloat16", gradient_checkpointing=True
    )
    context = replace(context_in(tmp_path), callback=Callback(look, every=1))
    done = fit(network, batches, sft_loss, config, context=context)
    losses = [step["loss"] for step in steps_of(tmp_path)]
    assert set.union(*dtypes) == {(True, torch.float32), (False, torch.bfloat16)}
    assert losses[-1] < 0.8 * losses[0]
    captioner.reload(random_model, placement=Placement(dtype="bfloat16"))
    network = prepare(captioner.network)
    load_trained(network, done)
    merge_adapter(network)
    after = dict(network.named_parameters())
    assert after.keys() == before.keys() and {value.dtype for value in after.values()} == {torch.bfloat16}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith(HEARING) for name in changed) and any("q_proj" in name for name in changed)
    assert all(name.startswith(HEARING) or name.split(".")[-2] in ("q_proj", "k_proj", "v_proj") for name in changed)
    captioner.encode([processor.read(clips.root / clips.references[0].video)])  # of one type again


def test_16_bits_trained_as_a_whole_need_16_bit_precision(random_model, tmp_path):
    network = Captioner.load(random_model, placement=Placement(dtype="bfloat16")).network
    network.requires_grad_(True)
    with pytest.raises(ValueError, match=r"weights to train are bfloat16, .*fit\.precision bfloat16"):
        fit_network(network, Source(lambda _: []), tmp_path, loss=sft_loss)


class Killed(Exception):
    """What ends a run in the middle."""


def test_a_run_with_all_options_resumes(random_model, clips, tmp_path):
    """Float32 masters of bfloat16 weights come back from the checkpoint whole."""

    def run(name, *, killed_at=None):
        captioner = Captioner.load(random_model, placement=Placement(dtype="bfloat16"), frames=FEW_FRAMES)
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
            if step == killed_at:
                raise Killed
            return batches.micro_batches(step)

        return fit(
            captioner.network,
            Source(micro_batches),
            sft_loss,
            config.resolve(len(examples)),
            context=context_in(tmp_path / name, seed=1),
        )

    unbroken = run("unbroken")
    with pytest.raises(Killed):
        run("broken", killed_at=3)
    assert len(steps_of(tmp_path / "broken")) == 3  # the checkpoint is of 2
    resumed = run("broken")
    assert steps_of(tmp_path / "broken") == steps_of(tmp_path / "unbroken") and resumed.step == 4
    assert resumed.path.read_bytes() == unbroken.path.read_bytes()


RANKS = """
import json, sys
from pathlib import Path
import torch
from salmonn import dist
from salmonn.caption.captioner import Captioner
from salmonn.model.lora import LoraConfig, attach_lora
from salmonn.records import Reference, read_records
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


def test_pieces_on_two_processes(clips, tmp_path):
    """Three examples in two pieces on one rank, two on the other: both move the weights as one process does."""
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    arguments = [script, SHIPPED_MODEL, clips.root, tmp_path]
    torchrun = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc_per_node=2"]
    for launcher in ([sys.executable], torchrun):
        subprocess.run(
            forked(*launcher, *arguments), check=True, timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    alone, first, second = (
        torch.tensor(json.loads((tmp_path / f"{name}.json").read_text())) for name in ("1-0", "2-0", "2-1")
    )
    assert torch.equal(first, second) and alone.abs().max() > 1e-3
    assert (alone - first).abs().max() < 0.02 * 1e-3  # a hundredth of what a step moves a weight
