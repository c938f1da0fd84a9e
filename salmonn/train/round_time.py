"""Hours of a round of mrDPO by arithmetic, from FLOPs, memory traffic and kernel launches. Never measured on a GPU.

    encoding        max(reading, FLOPs of the encoders), once per run
    sampling        FLOPs of the prefills + decode steps * max(launches, bytes / bandwidth); no launches if replayed
    judging         FLOPs of the questions + bytes / bandwidth of the replies, on its own GPUs, during sampling
    reference pass  FLOPs of a forward pass on each pair
    training        FLOPs of forward and backward pass, and of what is recomputed
    merge           bytes from and to the disk

A multiplication and an addition are two FLOPs. T tokens pass through the layers at 2 T FLOPs for each weight, and
attention takes 4 H d FLOPs for each query and key in each layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from salmonn import dist
from salmonn.caption.generate import EVICT_FRACTION
from salmonn.model.kv_cache import PAGE_LENGTH
from salmonn.model.memory import Stack
from salmonn.train.dry_run import MemoryPlan

PREFILL_SHARE, TRAINING_SHARE = 0.45, 0.35  # of the peak FLOPs, without and with a backward pass
LAUNCHES_PER_LAYER = 37  # of a decode step: 1,017 in 28 layers, counted by tools/bench/decode_ops.py
LAUNCH_SECONDS = 15e-6  # of Python, PyTorch and driver
# Steps after a change of the rows that are not replayed as a CUDA graph: the one in which clips join, and one for those
# that are launched before a new shape is recorded; most shapes have occurred before.
LAUNCHED_STEPS = 2
ROWS_ALIVE = 0.84  # mean share of the rows in use, simulated (docs/performance.md)
PAGE_PASSES = 5  # in which attention's outputs for the pages of a prefix are written or read
READ_SECONDS = 2.0  # of one core for a clip of 51 s, 720p
NUM_READERS = 8  # worker processes for each GPU
DISK_BYTES = 1e9  # per second
# A judge with the sizes of Qwen2.5 7B in a server with continuous batching and prefix caching: tokens of instructions
# and events, which the questions about the captions of a clip begin with, and of a reply.
JUDGE_WEIGHTS, JUDGE_KV_BYTES = 7.1e9, 57_344
JUDGE_PREFIX_TOKENS, JUDGE_REPLY_TOKENS, JUDGE_ROWS = 1400, 600, 256


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Args:
        name: name.
        flops: peak of dense matrix products in 16 bits, per second.
        bandwidth: bytes per second of its memory.
    """

    name: str
    flops: float
    bandwidth: float


GPUS = (Gpu("A100", 312e12, 2.0e12), Gpu("H100", 989e12, 3.35e12), Gpu("H200", 989e12, 4.8e12))


@dataclass(frozen=True)
class EstimateConfig:
    """Settings of the estimated hours of a round.

    Args:
        gpus: number of GPUs of training; none for one for each process.
        clips: number of training clips.
        caption_tokens: mean length of a sampled caption.
        judge_gpus: number of further GPUs that serve the judge.
    """

    gpus: int | None = None
    clips: int = 10_000
    caption_tokens: int = 540
    judge_gpus: int = 1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value < 1:
                raise ValueError(f"estimate.{name} must be at least 1, got {value}")


@dataclass(frozen=True)
class RoundWork:
    """Sizes of a model and of a round.

    Args:
        decoder: layers of the language model.
        weight_bytes: bytes of the weights that a decode step reads.
        model_bytes: bytes of all weights.
        bytes_per_number: bytes of a number in the KV cache.
        encoder_flops: FLOPs of the encoders for a clip.
        prefix_tokens: tokens of a clip and its prompt.
        clips: number of training clips.
        num_samples: captions of each clip.
        caption_tokens: mean length of a caption.
        rows: captions that a GPU generates at a time.
        pairs: pairs (or, for GRPO, clips) that are trained on: steps times batch size.
        answers: answers of a pair that are trained on, the ground truth among them.
        recomputed: share of the layers that are recomputed for the gradient.
        is_judged_by_model: whether the judge is a language model.
        is_sampled_here: whether this model samples the captions; otherwise a server does on GPUs of its own.
    """

    decoder: Stack
    weight_bytes: float
    model_bytes: float
    bytes_per_number: int
    encoder_flops: float
    prefix_tokens: int
    clips: int
    num_samples: int
    caption_tokens: int
    rows: int
    pairs: int
    answers: int = 3
    recomputed: float = 0.0
    is_judged_by_model: bool = True
    is_sampled_here: bool = True

    def linear_flops(self, answers: int) -> float:
        """Return the FLOPs of the layers' matrices for a prefix and some answers."""
        stack = self.decoder
        heads = 2 * stack.head_width * (stack.heads + stack.kv_heads)
        weights = stack.layers * stack.width * (heads + (3 if stack.gated else 2) * stack.inner)
        return 2.0 * weights * (self.prefix_tokens + answers * self.caption_tokens)

    def attention_flops(self, answers: int) -> float:
        """Return the FLOPs of attention: the prefix to itself, each answer to the prefix and to itself, causally."""
        stack, prefix, answer = self.decoder, self.prefix_tokens, self.caption_tokens
        pairs = prefix**2 / 2 + answers * (answer * prefix + answer**2 / 2)
        return 4.0 * stack.layers * stack.heads * stack.head_width * pairs

    def forward_flops(self, answers: int) -> float:
        """Return the FLOPs of a forward pass."""
        return self.linear_flops(answers) + self.attention_flops(answers)

    @property
    def training_flops(self) -> float:
        """FLOPs of a step on one pair.

        The backward pass needs the gradients of the activations, but not of the frozen weights: as many FLOPs as the
        forward pass, and 2.5 times as many in attention, which computes its scores again.
        """
        backward = self.linear_flops(self.answers) + 2.5 * self.attention_flops(self.answers)
        return (1 + self.recomputed) * self.forward_flops(self.answers) + backward

    def decode_step_seconds(self, gpu: Gpu) -> tuple[float, float]:
        """Return the seconds of a decode step's launches, and those of its memory traffic."""
        stack = self.decoder
        token = 2 * stack.layers * stack.kv_heads * stack.head_width * self.bytes_per_number
        clips = self.rows / self.num_samples
        cached = token * (clips * self.prefix_tokens + self.rows * self.caption_tokens / 2)
        outputs = stack.layers * stack.heads * stack.head_width * self.rows * self.bytes_per_number
        merged = PAGE_PASSES * outputs * self.prefix_tokens / PAGE_LENGTH
        return LAUNCHES_PER_LAYER * stack.layers * LAUNCH_SECONDS, (self.weight_bytes + cached + merged) / gpu.bandwidth

    @property
    def launched_share(self) -> float:
        """Share of the decode steps that are not replayed; the rows change whenever some of them have ended."""
        return min(1.0, LAUNCHED_STEPS / (EVICT_FRACTION * self.caption_tokens))

    def mean_step_seconds(self, gpu: Gpu) -> float:
        """Return the mean seconds of a decode step."""
        launches, traffic = self.decode_step_seconds(gpu)
        return self.launched_share * max(launches, traffic) + (1 - self.launched_share) * traffic

    def judge_seconds(self, gpu: Gpu) -> float:
        """Return the seconds that a GPU of the judge takes for a caption."""
        tokens = JUDGE_PREFIX_TOKENS / self.num_samples + self.caption_tokens
        cached = JUDGE_PREFIX_TOKENS + self.caption_tokens + JUDGE_REPLY_TOKENS / 2
        step_bytes = 2 * JUDGE_WEIGHTS + JUDGE_ROWS * JUDGE_KV_BYTES * cached
        reply = JUDGE_REPLY_TOKENS * step_bytes / JUDGE_ROWS / gpu.bandwidth
        return 2 * JUDGE_WEIGHTS * tokens / (PREFILL_SHARE * gpu.flops) + reply


def estimate_hours(work: RoundWork, gpu: Gpu, *, gpus: int, judge_gpus: int) -> dict[str, float]:
    """Return the hours of each stage of a round; without those of sampling where a server samples.

    Args:
        work: sizes.
        gpu: kind of all GPUs.
        gpus: number of GPUs that sample and train.
        judge_gpus: number of GPUs that serve the judge.
    """
    prefill, training = PREFILL_SHARE * gpu.flops, TRAINING_SHARE * gpu.flops
    captions = work.clips * work.num_samples
    steps = captions * work.caption_tokens / (work.rows * ROWS_ALIVE)
    judging = captions * work.judge_seconds(gpu) if work.is_judged_by_model else 0.0
    seconds = {
        "encoding, once": work.clips * max(READ_SECONDS / NUM_READERS, work.encoder_flops / prefill) / gpus,
        "sampling": (work.clips * work.forward_flops(0) / prefill + steps * work.mean_step_seconds(gpu)) / gpus,
        "judging": judging / judge_gpus,
        "reference pass": work.pairs * work.forward_flops(work.answers - 1) / prefill / gpus,
        "training": work.pairs * work.training_flops / training / gpus,
        "merge": 3 * work.model_bytes / DISK_BYTES,  # the start is read, the merged model written and read
    }
    return {name: value / 3600 for name, value in seconds.items() if name != "sampling" or work.is_sampled_here}


def sum_hours(hours: Mapping[str, float]) -> float:
    """Return the hours of a round without encoding: captions are judged while further ones are sampled."""
    return (
        max(hours.get("sampling", 0.0), hours["judging"]) + hours["reference pass"] + hours["training"] + hours["merge"]
    )


def make_work(
    plan: MemoryPlan,
    config: EstimateConfig,
    *,
    num_samples: int,
    batch_size: int,
    is_judged_by_model: bool,
    is_sampled_here: bool = True,
) -> RoundWork:
    """Return the sizes of a round.

    Args:
        plan: memory plan of its training.
        config: what the estimate is for.
        num_samples, batch_size: captions of each clip, and captions that a GPU generates at a time.
        is_judged_by_model, is_sampled_here: see `RoundWork`.
    """
    stored, lm = plan.numbers.stored, plan.network.lm
    num_weights = {name: part.total for name, part in plan.parameters.items() if name != "LoRA"}
    embeddings = lm.get_input_embeddings().weight
    is_tied = lm.get_output_embeddings().weight is embeddings
    fit = plan.fit.resolve(config.clips)  # as if each clip had a pair
    checkpointed = fit.gradient_checkpointing
    return RoundWork(
        decoder=plan.decoder,
        weight_bytes=stored * (num_weights["language model"] - (0 if is_tied else embeddings.numel())),
        model_bytes=stored * sum(num_weights.values()),
        bytes_per_number=stored,
        encoder_flops=2.0 * (num_weights["vision encoder"] * plan.patches + num_weights["audio encoder"] * plan.steps),
        prefix_tokens=plan.clip_tokens + plan.work.prompt_tokens,
        clips=config.clips,
        num_samples=num_samples,
        caption_tokens=config.caption_tokens,
        rows=max(batch_size, num_samples),
        pairs=fit.num_steps * fit.batch_size,
        answers=plan.work.answers,
        recomputed=float(checkpointed) if isinstance(checkpointed, bool) else checkpointed / plan.decoder.layers,
        is_judged_by_model=is_judged_by_model,
        is_sampled_here=is_sampled_here,
    )


def print_hours(work: RoundWork, config: EstimateConfig, *, not_estimated: Sequence[str] = ()) -> None:
    """Print the hours of a round for each kind of GPU, on rank 0, and sentences on what is not part of them."""
    if not dist.is_main():
        return
    gpus = config.gpus or dist.world_size()
    table = Table(title=f"Hours of a round of {work.clips:,} clips x {work.num_samples} captions on {gpus} GPUs")
    table.add_column("estimated by arithmetic, never measured")
    hours = [estimate_hours(work, gpu, gpus=gpus, judge_gpus=config.judge_gpus) for gpu in GPUS]
    for gpu in GPUS:
        table.add_column(gpu.name, justify="right")
    for stage in hours[0]:
        table.add_row(stage, *(f"{one[stage]:.2f}" for one in hours))
    table.add_section()
    left_out = "encoding" if work.is_sampled_here else "encoding and sampling"
    table.add_row(f"a round, without {left_out}", *(f"{sum_hours(one):.2f}" for one in hours))
    console = Console(width=100)
    console.print(table)
    rows = f"{100 * ROWS_ALIVE:.0f} % of the rows in use; " if work.is_sampled_here else ""
    console.print(
        f"{_describe_sampling(work)}\n"
        f"Assumed: clips of 51 s; captions of {work.caption_tokens} tokens; "
        f"{rows}{100 * PREFILL_SHARE:.0f} % of the peak FLOPs in forward passes, "
        f"{100 * TRAINING_SHARE:.0f} % in training; the judge is a 7B on further GPUs of this kind "
        f"({config.judge_gpus}), with prefix caching, and judges while captions are sampled."
        + "".join(f"\n{sentence}" for sentence in not_estimated),
        highlight=False,
    )


def _describe_sampling(work: RoundWork) -> str:
    if not work.is_sampled_here:
        return "The server samples the captions of the training clips; its memory and its hours are not estimated."
    launches = work.decode_step_seconds(GPUS[0])[0]
    traffic = ", ".join(f"{gpu.name} {1e3 * work.decode_step_seconds(gpu)[1]:.1f} ms" for gpu in GPUS)
    return (
        f"A decode step of {work.rows} captions takes {1e3 * launches:.1f} ms of launches, unless it is replayed as a "
        f"CUDA graph ({100 * (1 - work.launched_share):.0f} %), or if longer, its memory traffic: {traffic}."
    )
