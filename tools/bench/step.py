"""Benchmark a guided-DPO training step against a naive one, and against itself with each optimization disabled.

    python tools/bench/step.py [--out bench.json] [--quick] [--family salmonn2-plus] [--repeats 3]
    python tools/bench/step.py --device cuda --dtype bfloat16 --shape 7b

One pair about one clip, prefix : answer about 20 : 1. All sides must give the same loss and the same adapter
gradients before any is timed. Memory is the peak above the model and batch, measured in a separate process per side.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from model import BenchConfig, attach_adapter, make_captioner, make_clip, make_pair, start
from naive import NaiveStep
from rows import BenchRow, Timing, compare, emit_json, interleave, peak_mib, run_isolated
from torch import Tensor, nn

from salmonn.model.layout import ClipInputs, ModelInputs
from salmonn.model.network import Network
from salmonn.preference.losses import LossConfig, make_loss
from salmonn.train.loop import autocast
from salmonn.train.preference import Logps, PreferenceBatch, PreferenceBatches, PreferenceBatchLoss, PreferenceExample
from salmonn.train.reference_logps import compute_reference_logps

PART = "step"
SMALL_SIDES = ("ours", "naive")  # memory is measured for these at small sizes
GRADIENT_TOLERANCE = 1e-5  # relative to the largest gradient
# The loss is a difference of answer log-probabilities of thousands of nats, whose last float32 digits are noise; the
# tolerance is relative to their size.
LOSS_TOLERANCE = 1e-7
BF16_TOLERANCE = 0.1  # of both in 16 bits, where the sides round at different points
PEAK_FLOPS = 989e12  # of an H100 or H200 in bfloat16


class StepBench:
    """A model with its adapter, a pair, and variants of a training step on it.

    Each variant is a method that leaves gradients behind and returns the loss. The learning rate is 0, so that the
    optimizer does its arithmetic but all repeats are equal.

    Args:
        config: settings of the benchmark.
        num_frames: frames of the clip (default: the shape's).
    """

    def __init__(self, config: BenchConfig, *, num_frames: int | None = None) -> None:
        shape, self.precision = config.sizes, config.dtype
        captioner = make_captioner(
            shape, family=config.family, device=config.device, dtype=getattr(torch, config.dtype)
        )
        self.network, self.processor = captioner.network, captioner.processor
        frames = num_frames or shape.num_frames
        self.media: ClipInputs = make_clip(self.processor, num_frames=frames, side=shape.side)
        self.pair = make_pair(shape)
        (self.features,) = captioner.encode([self.media])
        self.examples = [PreferenceExample(self.pair, self.features)]
        self.batch_size = 1
        attach_adapter(self.network)
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.0)
        self.preference_loss = make_loss(LossConfig())
        self.loss = PreferenceBatchLoss(self.preference_loss)
        self.batches = self._make_batches([dict.fromkeys(self.preference_loss.reference_roles, 0.0)])

    def _make_batches(self, reference_logps: Sequence[Logps]) -> PreferenceBatches:
        return PreferenceBatches(
            self.examples,
            reference_logps,
            self.processor,
            roles=self.preference_loss.roles,
            batch_size=self.batch_size,
            seed=0,
        )

    def ours(self) -> float:
        """Run the library's step, with cached reference log-probabilities and features."""
        return self.train_step(self.batches.micro_batches(0)[0])

    def compute_reference_logps(self) -> None:
        """Run the reference policy, which is done once per round and pair."""
        with autocast(self.precision):
            logps = compute_reference_logps(
                self.network,
                self.examples,
                self.processor,
                roles=self.preference_loss.reference_roles,
                batch_size=self.batch_size,
            )
        self.batches = self._make_batches(logps)

    def with_reference(self) -> float:
        """Run the reference policy in each step."""
        self.compute_reference_logps()
        return self.ours()

    def without_sharing(self) -> float:
        """Give each row its own copy of the clip, without a shared prefix."""
        batch = self.batches.micro_batches(0)[0]
        inputs = replace(
            batch.inputs,
            clip_index=(0, 1, 2),
            layouts=batch.inputs.layouts * 3,
            clip_features=batch.inputs.clip_features * 3,
        )
        return self.train_step(replace(batch, inputs=inputs))

    def with_towers(self) -> float:
        """Encode the clip in each step."""
        batch = self.batches.micro_batches(0)[0]
        return self.train_step(
            replace(batch, inputs=replace(batch.inputs, clip_features=(), clip_inputs=(self.media,)))
        )

    def with_all_logits(self) -> float:
        """Compute logits at all positions, including the prefix."""
        return self.train_step(self.batches.micro_batches(0)[0], model=AllLabels(self.network))

    def checkpointed(self) -> float:
        """Use gradient checkpointing, which saves memory and costs time."""
        self.network.checkpoint_layers(True)
        try:
            return self.ours()
        finally:
            self.network.checkpoint_layers(False)

    def naive(self) -> float:
        """Run the naive step: two encoder passes, five language model passes, logits at all positions."""
        self.optimizer.zero_grad()
        with autocast(self.precision):
            value = NaiveStep(self.network, self.processor, self.media, self.pair).loss()
        return self._finish(value)

    def train_step(self, batch: PreferenceBatch, *, model: nn.Module | None = None) -> float:
        """Run a training step of the library on a batch."""
        self.optimizer.zero_grad()
        with autocast(self.precision):
            value, _ = self.loss(model or self.network, batch)
        return self._finish(value)

    def _finish(self, value: Tensor) -> float:
        value.backward()
        self.optimizer.step()
        return value.item()

    def gradients(self) -> Tensor:
        """Return all gradients of the adapter, concatenated."""
        grads = [parameter.grad for parameter in self.network.parameters() if parameter.requires_grad]
        return torch.cat([grad.flatten().float().cpu() for grad in grads if grad is not None])

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the packed sequence."""
        return self.batches.micro_batches(0)[0].num_tokens

    @property
    def prefix_tokens(self) -> int:
        """Number of tokens of the clip."""
        return len(self.features)


class AllLabels(nn.Module):
    """Compute log-probabilities at all positions and return those of the labels.

    The shared prefix gets labels in the first row only, since it occurs once in the packed sequence.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: ModelInputs) -> Tensor:
        """See `Network`."""
        is_label = inputs.labels != -100
        labels = inputs.labels.clone()
        # Positions of the clip have no token id; any valid id will do.
        labels[0] = torch.where(is_label[0], labels[0], inputs.input_ids[0].clamp(min=0))
        return self.network(replace(inputs, labels=labels)) * is_label[:, 1:]


SIDES: dict[str, Callable[[StepBench], float]] = {
    "ours": StepBench.ours,
    "naive": StepBench.naive,
    "no shared prefix": StepBench.without_sharing,
    "reference policy in each step": StepBench.with_reference,
    "encoders in each step": StepBench.with_towers,
    "logits of all positions": StepBench.with_all_logits,
    "layers checkpointed": StepBench.checkpointed,
}


def check(bench: StepBench, config: BenchConfig) -> None:
    """Check that all sides give our loss and gradients.

    Raises:
        ValueError: one does not.
    """
    bench.compute_reference_logps()
    expected = bench.ours(), bench.gradients()
    for name, side in SIDES.items():
        require_equal(name, (side(bench), bench.gradients()), expected, config=config)


def require_equal(
    name: str, found: tuple[float, Tensor], expected: tuple[float, Tensor], *, config: BenchConfig
) -> None:
    """Raise ValueError if a loss and its gradients differ from the expected ones."""
    nats = 2 * config.sizes.answer_tokens * math.log(config.sizes.vocab_size)
    apart = abs(found[0] - expected[0]) / (LossConfig().beta * nats)
    off = float((found[1] - expected[1]).abs().max() / expected[1].abs().max())
    exact = config.dtype == "float32"
    if not (
        apart <= (LOSS_TOLERANCE if exact else BF16_TOLERANCE)
        and off <= (GRADIENT_TOLERANCE if exact else BF16_TOLERANCE)
    ):
        raise ValueError(
            f"{name}: loss {found[0]:.8f} against {expected[0]:.8f}, gradients off by {off:.1e} of the largest; "
            "it does not compute the same, so its time would be meaningless"
        )


def run(config: BenchConfig) -> list[BenchRow]:
    """Measure time and memory of all sides."""
    bench = StepBench(config)
    check(bench, config)
    sides: dict[str, Callable[[], object]] = {name: lambda side=side: side(bench) for name, side in SIDES.items()}  # type: ignore[misc]
    timings = interleave(sides | {"reference": bench.compute_reference_logps}, repeats=config.repeats)
    memory = {
        name: run_isolated(__file__, **vars(config), memory_of=name)
        for name in (SIDES if config.shape != "small" else SMALL_SIDES)
    }
    rows = [
        compare(name, timings["ours"], timings[name])
        | (compare_memory(memory["ours"], memory[name]) if name in memory else {})
        for name in SIDES
        if name != "ours"
    ]
    counted = timings["ours"] + timings["reference"]
    rows.insert(1, compare("naive, our reference pass counted in", counted, timings["naive"]))
    if config.device == "cuda":
        rows += [_gpu_row(bench, timings["ours"])]
    about = f"{config.family}, {bench.prefix_tokens} tokens of clip, {config.sizes.answer_tokens} of each answer"
    return [row | {"part": f"{PART}: {about}"} for row in rows]


def compare_memory(ours: BenchRow, other: BenchRow) -> BenchRow:
    """Return the memory columns of a row: of the step alone, and of the process with model and batch."""
    return {
        "ours_mib": ours["step_mib"],
        "other_mib": other["step_mib"],
        "ours_process_mib": ours["process_mib"],
        "other_process_mib": other["process_mib"],
    }


def utilization(bench: StepBench, seconds: float) -> dict[str, float]:
    """Compute the model FLOPs utilization (MFU) of a step on a GPU, with and without gradients of frozen weights.

    A pass is the forward pass, the backward pass to the inputs, or the backward pass to the weights, which a LoRA step
    does not need.
    """
    lm, tokens = bench.network.lm.config.get_text_config(), bench.num_tokens
    # The embedding lookup, and the head on answers only, are a few percent and not counted.
    count = sum(parameter.numel() for parameter in bench.network.lm.get_decoder().parameters())
    count -= bench.network.lm.get_input_embeddings().weight.numel()
    whole, needed = (
        flops(count, tokens, width=lm.hidden_size, layers=lm.num_hidden_layers, passes=passes) for passes in (3, 2)
    )
    mfu, mfu_lora = (round(each / seconds / PEAK_FLOPS, 3) for each in (whole, needed))
    return {"tokens_per_second": round(tokens / seconds), "mfu": mfu, "mfu_lora": mfu_lora}


def _gpu_row(bench: StepBench, ours: Timing) -> BenchRow:
    figures = utilization(bench, ours.seconds)
    return {
        "name": "ours on the GPU",
        "ours_seconds": round(ours.seconds, 4),
        "other_seconds": None,
        "ratio": None,
        **figures,
        "note": f"{figures['tokens_per_second']:,} tokens/s; MFU {figures['mfu']} = (2 x 3 flops a parameter and token "
        f"+ attention) / seconds / 989 TFLOP/s; {figures['mfu_lora']} with 2 x 2, as a LoRA step needs",
    }


def flops(count: int, tokens: int, *, width: int, layers: int, passes: int) -> float:
    """Return the FLOPs of a step.

    2 per parameter, token and pass. Attention: 4 per layer, hidden dimension and pair of tokens, three times (forward
    once, backward twice), halved by causality.
    """
    return 2 * passes * count * tokens + 3 * 4 * layers * width * tokens**2 / 2


def report_memory(config: BenchConfig, side: str) -> None:
    """Measure the peak memory of a side in this process and write it as JSON."""
    # A small step first, so that what libraries allocate once is not counted.
    warm = StepBench(replace(config, shape="small"))
    warm.compute_reference_logps()
    SIDES[side](warm)
    bench = StepBench(config)
    # Reference log-probabilities stay 0: running the reference policy at full size would leave freed memory for reuse.
    emit_json(peak_mib(lambda: SIDES[side](bench)))


if __name__ == "__main__":
    start(__doc__, run, report_memory)
