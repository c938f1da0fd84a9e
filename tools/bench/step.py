"""A guided-DPO step of ours against a naive one, and against itself with each trick off: time and memory.

    python tools/bench/step.py [--out bench.json] [--quick] [--family salmonn2-plus] [--repeats 3]
    python tools/bench/step.py --device cuda --dtype bfloat16 --shape 7b

One pair about one clip, prefix : answer about 20 : 1. All sides must give the same loss and the same gradients of the
adapter before any is timed; memory is the peak of a process of its own for each side, beside what that process held.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from model import BenchConfig, adapt, make_captioner, make_clip, make_pair, start
from naive import NaiveStep
from rows import BenchRow, Timing, alone, compare, interleave, peak_mib, tell
from torch import Tensor, nn

from salmonn.model.layout import ClipInputs, ModelInputs
from salmonn.model.network import Network
from salmonn.train.loop import autocast
from salmonn.train.preference import DpoConfig, PreferenceBatch, PreferenceBatches, PreferenceLoss

PART = "step"
SMALL_SIDES = ("ours", "naive")  # whose memory is measured at small sizes
GRADIENT_TOLERANCE = 1e-5  # relative to the largest
# DPO is a difference of log-probabilities of whole answers, thousands of nats in float32, whose last places are noise:
# relative to these.
LOSS_TOLERANCE = 1e-7
SHORT_TOLERANCE = 0.1  # of both, in 16 bits, where the sides round in different places
PEAK_FLOPS = 989e12  # of an H100 or H200 in bfloat16


class Bench:
    """A model with its adapter, a pair, and the ways of making a step on it.

    Each way is a method without arguments that leaves gradients behind and returns the loss. The learning rate is 0,
    so that the optimiser does its arithmetic and each repeat is the same.

    Args:
        config: what is run.
        num_frames: of the clip, in place of the shape's.
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
        self.features = dict(zip(["noise"], captioner.encode([self.media]), strict=True))
        adapt(self.network)
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.0)
        self.loss = PreferenceLoss(DpoConfig())
        self.batches = PreferenceBatches([self.pair], self.features, self.processor, batch_size=1, seed=0)

    def ours(self) -> float:
        """The library's step, with cached reference log-probabilities and features."""
        return self.learn(self.batches(0)[0])

    def compute_reference_logps(self) -> None:
        """The reference pass that comes before, once a round for each pair."""
        with autocast(self.precision):
            self.batches.compute_reference_logps(self.network)

    def with_reference(self) -> float:
        """Trick off: the reference is asked in each step."""
        self.compute_reference_logps()
        return self.ours()

    def without_sharing(self) -> float:
        """Trick off: each row goes through about a clip of its own, with nothing in common."""
        batch = self.batches(0)[0]
        inputs = replace(
            batch.inputs,
            clip_index=(0, 1, 2),
            layouts=batch.inputs.layouts * 3,
            clip_features=batch.inputs.clip_features * 3,
        )
        return self.learn(replace(batch, inputs=inputs))

    def with_towers(self) -> float:
        """Trick off: the clip is encoded in each step."""
        batch = self.batches(0)[0]
        return self.learn(replace(batch, inputs=replace(batch.inputs, clip_features=(), clip_inputs=(self.media,))))

    def with_all_logits(self) -> float:
        """Trick off: all positions go through the vocabulary, the prefix too."""
        return self.learn(self.batches(0)[0], model=AllLabels(self.network))

    def checkpointed(self) -> float:
        """The other way round: layers are computed again for the gradient, which costs time and saves memory."""
        self.network.checkpoint_layers(True)
        try:
            return self.ours()
        finally:
            self.network.checkpoint_layers(False)

    def naive(self) -> float:
        """Two encoder passes, five passes of the language model, logits for all positions."""
        self.optimizer.zero_grad()
        with autocast(self.precision):
            value = NaiveStep(self.network, self.processor, self.media, self.pair).loss()
        return self._finish(value)

    def learn(self, batch: PreferenceBatch, *, model: nn.Module | None = None) -> float:
        """One step of ours on a batch."""
        self.optimizer.zero_grad()
        with autocast(self.precision):
            value, _ = self.loss(model or self.network, batch)
        return self._finish(value)

    def _finish(self, value: Tensor) -> float:
        value.backward()
        self.optimizer.step()
        return value.item()

    def gradients(self) -> Tensor:
        """All of the adapter's, one after the other."""
        grads = [parameter.grad for parameter in self.network.parameters() if parameter.requires_grad]
        return torch.cat([grad.flatten().float().cpu() for grad in grads if grad is not None])

    @property
    def num_tokens(self) -> int:
        """Of the shared row that goes through the decoder."""
        return self.batches(0)[0].num_tokens

    @property
    def prefix_tokens(self) -> int:
        """Of the clip."""
        return len(self.features["noise"])


class AllLabels(nn.Module):
    """Asks a network for log-probabilities of everything, and hands on those that were asked for.

    The shared beginning is asked of the first row alone, as it is one in the packed row.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: ModelInputs) -> Tensor:
        """See `Network`."""
        asked = inputs.labels != -100
        labels = inputs.labels.clone()
        # Where a clip stands is no word; any will do.
        labels[0] = torch.where(asked[0], labels[0], inputs.input_ids[0].clamp(min=0))
        return self.network(replace(inputs, labels=labels)) * asked[:, 1:]


SIDES: dict[str, Callable[[Bench], float]] = {
    "ours": Bench.ours,
    "naive": Bench.naive,
    "no shared prefix": Bench.without_sharing,
    "reference in each step": Bench.with_reference,
    "towers in each step": Bench.with_towers,
    "logits of all positions": Bench.with_all_logits,
    "layers checkpointed": Bench.checkpointed,
}


def check(bench: Bench, config: BenchConfig) -> None:
    """All sides' losses and gradients are ours.

    Raises:
        ValueError: they are not, so there is nothing to be compared.
    """
    bench.compute_reference_logps()
    wanted = bench.ours(), bench.gradients()
    for name, side in SIDES.items():
        require_same(name, (side(bench), bench.gradients()), wanted, config=config)


def require_same(name: str, found: tuple[float, Tensor], wanted: tuple[float, Tensor], *, config: BenchConfig) -> None:
    """Raise ValueError where a loss and its gradients are not those that are wanted."""
    nats = 2 * config.sizes.answer_tokens * math.log(config.sizes.vocab_size)
    apart = abs(found[0] - wanted[0]) / (DpoConfig().beta * nats)
    off = float((found[1] - wanted[1]).abs().max() / wanted[1].abs().max())
    exact = config.dtype == "float32"
    if not (
        apart <= (LOSS_TOLERANCE if exact else SHORT_TOLERANCE)
        and off <= (GRADIENT_TOLERANCE if exact else SHORT_TOLERANCE)
    ):
        raise ValueError(
            f"{name}: loss {found[0]:.8f} against {wanted[0]:.8f}, gradients off by {off:.1e} of the largest: it does "
            "not compute what ours does, and there is nothing to compare"
        )


def run(config: BenchConfig) -> list[BenchRow]:
    """Rows of time and memory."""
    bench = Bench(config)
    check(bench, config)
    sides: dict[str, Callable[[], object]] = {name: lambda side=side: side(bench) for name, side in SIDES.items()}  # type: ignore[misc]
    timings = interleave(sides | {"reference": bench.compute_reference_logps}, repeats=config.repeats)
    memory = {name: measured(config, name) for name in (SIDES if config.shape != "small" else SMALL_SIDES)}
    rows = [_against(name, timings, memory) for name in SIDES if name != "ours"]
    counted = timings["ours"] + timings["reference"]
    rows.insert(1, compare("naive, our reference pass counted in", counted, timings["naive"]))
    if config.device == "cuda":
        rows += [_use(bench, timings["ours"])]
    about = f"{config.family}, {bench.prefix_tokens} tokens of clip, {config.sizes.answer_tokens} of each answer"
    return [row | {"part": f"{PART}: {about}"} for row in rows]


def _against(name: str, timings: dict[str, Timing], memory: dict[str, BenchRow]) -> BenchRow:
    row = compare(name, timings["ours"], timings[name])
    return row | compare_memory(memory["ours"], memory[name]) if name in memory else row


def compare_memory(ours: BenchRow, other: BenchRow) -> BenchRow:
    """What a row says of memory: of the step alone, and of the process with model and batch."""
    return {
        "ours_mib": ours["step_mib"],
        "other_mib": other["step_mib"],
        "ours_process_mib": ours["process_mib"],
        "other_process_mib": other["process_mib"],
    }


def _use(bench: Bench, ours: Timing) -> BenchRow:
    """How much of the GPU is used: model flops utilisation, counted with and without weights' gradients.

    A pass is forwards, backwards to what went in, or backwards to the weights, which a LoRA step does not need.
    """
    lm, tokens = bench.network.lm.config.get_text_config(), bench.num_tokens
    # The embedding table is looked up, and only answers go through the vocabulary: a few percent, left out.
    count = sum(parameter.numel() for parameter in bench.network.lm.get_decoder().parameters())
    count -= bench.network.lm.get_input_embeddings().weight.numel()
    whole, needed = (
        flops(count, tokens, width=lm.hidden_size, layers=lm.num_hidden_layers, passes=passes) for passes in (3, 2)
    )
    mfu, mfu_lora = (round(each / ours.seconds / PEAK_FLOPS, 3) for each in (whole, needed))
    return {
        "name": "ours on the GPU",
        "ours_seconds": round(ours.seconds, 4),
        "other_seconds": None,
        "ratio": None,
        "tokens_per_second": round(tokens / ours.seconds),
        "mfu": mfu,
        "mfu_lora": mfu_lora,
        "note": f"{tokens / ours.seconds:,.0f} tokens/s; MFU {mfu} = (2 x 3 flops a parameter and token + attention) / "
        f"seconds / 989 TFLOP/s; {mfu_lora} with 2 x 2, as a LoRA step needs",
    }


def flops(count: int, tokens: int, *, width: int, layers: int, passes: int) -> float:
    """Of a step: 2 a parameter, token and pass; attention 4 a layer, width and pair of tokens, thrice (forwards, and
    twice that backwards), of which causality leaves half."""
    return 2 * passes * count * tokens + 3 * 4 * layers * width * tokens**2 / 2


def measured(config: BenchConfig, side: str) -> BenchRow:
    """Peak memory of a side, in a process of its own."""
    flags = [f"--{name}={value}" for name, value in vars(config).items()]
    answer: BenchRow = alone(__file__, *flags, f"--memory_of={side}")
    return answer


def tell_memory(config: BenchConfig, side: str) -> None:
    """Run a side once, and tell what it took."""
    # What libraries need in any case is not counted.
    warm = Bench(replace(config, shape="small"))
    warm.compute_reference_logps()
    SIDES[side](warm)
    bench = Bench(config)
    # What the reference says changes no memory; asked in full size, it would leave a heap to be used again.
    bench.batches.reference_logps = [(0.0, 0.0)]
    tell(peak_mib(lambda: SIDES[side](bench)))


if __name__ == "__main__":
    start(__doc__, run, tell_memory)
