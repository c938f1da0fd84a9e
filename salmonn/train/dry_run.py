"""What a run would need, before it has anything: parameters, a clip's tokens, memory for training and captioning.

The network is built without memory (on torch's meta device), its clip is taken through the model's own rules of frames,
sizes, chunks and layout, and `budget` does the arithmetic. Nothing is read but a model folder's config.json, and
nothing is written.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from salmonn import dist
from salmonn.caption.processor import select_modality
from salmonn.model.config import SalmonnConfig
from salmonn.model.families import get_family
from salmonn.model.layout import ClipInputs
from salmonn.model.loading import Placement, offline_config
from salmonn.model.lora import LoraConfig, attach_lora
from salmonn.model.network import MAX_LOGIT_BYTES, PREFILL_CHUNK_TOKENS, Network
from salmonn.records import Modality
from salmonn.train import memory as budget
from salmonn.train.loop import FitConfig
from salmonn.train.memory import FLOAT32, GIB, NumberSizes, Stack, TrainedParts

GPUS = (24, 40, 80, 141)  # GiB
RESERVE = GIB  # what a framework and its kernels take for themselves
PARTS = {
    "vision tower": ("vision.encoder.",),
    "audio tower": ("audio.encoder.", "audio.norm."),
    "Q-Former": ("audio.qformer.",),
    "projections": ("vision.encoder.merger.", "vision.projector.", "vision.newline", "audio.projector."),
    "language model": ("lm.",),
}


@dataclass(frozen=True)
class ClipShape:
    """A clip by its outside."""

    seconds: float = 51.0
    width: int = 1280
    height: int = 720
    frames_per_second: float = 30.0


DEFAULT_SHAPE = ClipShape()


@dataclass(frozen=True)
class Workload:
    """One forward pass, and one captioning.

    Args:
        clips: of a pass.
        answers: to each clip, that share its tokens.
        answer_tokens: of each answer; how long captions are nobody knows before.
        prompt_tokens: the prompt with all that the chat format puts around it.
        blocks: whether the towers have run before all training, once for each clip.
        use: what the answers are about.
    """

    clips: int
    answers: int
    answer_tokens: int = 512
    prompt_tokens: int = 100
    blocks: bool = False
    modality: Modality = "both"

    def length(self, clip_tokens: int) -> int:
        """Tokens of a sequence."""
        return clip_tokens + self.prompt_tokens + self.answers * self.answer_tokens


@dataclass(frozen=True)
class ParameterCount:
    """Counts of numbers."""

    total: int
    trained: int


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device by what holds them; of `at_work`, the largest alone counts, since they come in turn."""

    persistent: dict[str, int]
    workspace: dict[str, int]

    @property
    def peak(self) -> int:
        """The most at once."""
        return sum(self.persistent.values()) + max(self.workspace.values())


def build_on_meta(config: SalmonnConfig) -> Network:
    """The network without its weights."""
    with torch.device("meta"):
        return Network(config)


def placeholder_inputs(config: SalmonnConfig, shape: ClipShape) -> ClipInputs:
    """A clip as the towers would take it, its sizes without its contents."""
    family = get_family(config)
    sampler = family.frame_sampler
    num_frames = round(shape.seconds * shape.frames_per_second)
    count = len(sampler.sample_times(0.0, shape.seconds, num_frames))
    frames = torch.empty(
        (count, 3, *sampler.frame_size(shape.height, shape.width, count)), dtype=torch.uint8, device="meta"
    )
    chunks = family.count_chunks(shape.seconds)
    mel = torch.empty(chunks, config.whisper["num_mel_bins"], config.chunk_seconds * 100, device="meta")
    return family.clip_inputs(frames, mel, seconds=shape.seconds)


def count_parameters(network: Network) -> dict[str, ParameterCount]:
    """Parameters by part, the adapter last."""
    counts = {name: [0, 0] for name in [*PARTS, "LoRA"]}
    for name, parameter in network.named_parameters():
        part = "LoRA" if ".lora_" in name else _part_of(name)
        counts[part][0] += parameter.numel()
        counts[part][1] += parameter.numel() * parameter.requires_grad
    return {name: ParameterCount(*both) for name, both in counts.items()}


def _part_of(name: str) -> str:
    # The merger stands within the vision tower: the longer beginning decides.
    fitting = {start: part for part, starts in PARTS.items() for start in starts if name.startswith(start)}
    return fitting[max(fitting, key=len)]


def number_sizes(placement: Placement, fit: FitConfig) -> NumberSizes:
    """Bytes of numbers under a placement and precision; `auto` is taken for a GPU's bfloat16."""
    stored = 4 if placement.dtype == "float32" else 2
    return NumberSizes(stored, 2 if fit.precision == "bfloat16" else stored)


def weights_bytes(network: Network, placement: Placement, *, merged: bool = False) -> int:
    """Bytes of all weights: trained ones in float32, the language model's matrices in so many bits.

    Args:
        network: with its adapter.
        placement: type and bits.
        merged: after training: adapters merged, all of one type.
    """
    stored = 4 if placement.dtype == "float32" else 2
    # Four bits keep a float32 scale for each 64 numbers.
    quantised = {None: float(stored), 8: 1.0, 4: 0.5 + 4 / 64}[placement.bits]
    total = 0.0
    for name, parameter in network.named_parameters():
        if parameter.requires_grad and not merged:
            total += FLOAT32 * parameter.numel()
        elif ".lora_" not in name:
            is_matrix = name.startswith("lm.") and "_proj." in name and parameter.ndim == 2
            total += parameter.numel() * (quantised if is_matrix else stored)
    return math.ceil(total)


def clips_per_micro_batch(fit: FitConfig) -> int:
    """Clips of a forward pass: a rank's share of the batch in as many pieces as the config asks for."""
    share = math.ceil(fit.batch_size / dist.world_size())
    return math.ceil(share / min(fit.gradient_accumulation_steps, share))


class MemoryPlan:
    """The arithmetic of one network, clip and work.

    Args:
        network: as it is trained, with its adapter.
        config: of the network, with the frames of training.
        placement: of its weights.
        fit: optimisation.
        work: a forward pass of training.
        shape: of the clips.
    """

    def __init__(
        self,
        network: Network,
        config: SalmonnConfig,
        *,
        placement: Placement,
        fit: FitConfig,
        work: Workload,
        shape: ClipShape = DEFAULT_SHAPE,
    ) -> None:
        self.network = network
        self.config = config
        self.family = get_family(config)
        self.placement = placement
        self.fit = fit
        self.work = work
        self.shape = shape
        self.numbers = number_sizes(placement, fit)
        self.media = select_modality(placeholder_inputs(config, shape), work.modality)
        # The published tokenizer has a token for each digit and for the point.
        timestamps = [[0] * len(text) for text in self.family.timestamps(self.media)]
        self.layout = self.family.layout(self.media, timestamp_ids=timestamps)
        self.parameters = count_parameters(network)
        self.decoder = Stack.of(network.lm.config.get_text_config())
        self.seeing = Stack.of(network.get_submodule("vision.encoder").config)
        self.hearing = Stack.of(network.get_submodule("audio.encoder").config)

    @property
    def clip_tokens(self) -> int:
        """Tokens of the clip."""
        return len(self.layout)

    @property
    def patches(self) -> int:
        """Patches that the vision tower's layers see of the clip."""
        return self.family.count_patches(self.media)

    @property
    def steps(self) -> int:
        """Steps that the audio tower's layers hear of the clip."""
        return len(self.media.mel) * self.config.chunk_seconds * 50

    @property
    def trained(self) -> int:
        """Numbers that are trained."""
        return sum(part.trained for part in self.parameters.values())

    @property
    def block_bytes(self) -> int:
        """Bytes of a clip's tokens, as they are kept where the towers run once."""
        return self.clip_tokens * self.decoder.width * self.numbers.stored

    def training(self, *, checkpointed: bool) -> MemoryEstimate:
        """Memory of a training step on one device."""
        work, decoder, numbers = self.work, self.decoder, self.numbers
        length = work.length(self.clip_tokens)
        tokens, rows = work.clips * length, work.answers
        adapted = self.network.lm.peft_config["default"].target_modules if self.parameters["LoRA"].total else ()
        tuning = TrainedParts(len(adapted), whole=self._is_trained("lm."))
        layers = 1 if checkpointed else decoder.layers
        layer = tokens * budget.workspace(decoder, numbers)
        if checkpointed:
            layer += tokens * budget.saved_per_layer(decoder, numbers, tuning, rows=rows)
        kept = budget.saved_by_stack(decoder, numbers, tuning, tokens=tokens, rows=rows, checkpointed=checkpointed)
        vocabulary = self.network.lm.get_output_embeddings().weight.shape[0]
        answers = min(work.clips * work.answers * work.answer_tokens, MAX_LOGIT_BYTES // (FLOAT32 * vocabulary))
        return MemoryEstimate(
            persistent={
                "weights": weights_bytes(self.network, self.placement) + self._casts(layers),
                "gradients": FLOAT32 * self.trained,
                "Adam's moments": 2 * FLOAT32 * self.trained,
                "inputs": budget.embedded(decoder, numbers, tokens=tokens),
                "activations": kept + work.clips * self._towers_keep(checkpointed=checkpointed),
            },
            workspace={
                "a layer": layer,
                "logits": budget.logits_bytes(vocabulary, numbers, tokens=answers),
                "towers": 0 if work.blocks else work.clips * self._towers_at_work(numbers),
            },
        )

    def captioning(self, *, max_new_tokens: int, side_by_side: int = 1) -> MemoryEstimate:
        """Memory of so many captions side by side, each of a clip of its own."""
        numbers = NumberSizes(self.numbers.stored, self.numbers.stored)
        prompt = self.clip_tokens + self.work.prompt_tokens
        reading = budget.embedded(self.decoder, numbers, tokens=prompt)
        reading += prompt * budget.workspace(self.decoder, numbers)
        cache = budget.kv_cache_bytes(self.decoder, numbers, tokens=prompt + max_new_tokens)
        at_once = max(1, min(side_by_side, PREFILL_CHUNK_TOKENS // prompt))
        return MemoryEstimate(
            persistent={"weights": weights_bytes(self.network, self.placement, merged=True)},
            workspace={
                "towers": at_once * self._towers_at_work(numbers),
                "cache, prompt": side_by_side * cache + at_once * reading,
            },
        )

    def _towers_at_work(self, numbers: NumberSizes) -> int:
        """Bytes while the towers see and hear the clip: the greater of the two."""
        visual = self.family.vision_peak_bytes(
            self.media,
            patch_bytes=budget.workspace(self.seeing, numbers),
            weight_bytes=numbers.stored,
            matmul_bytes=numbers.computed,
        )
        return max(budget.chunks_workspace(self.hearing, numbers, steps=self.steps), visual)

    def _towers_keep(self, *, checkpointed: bool) -> int:
        """What trained parts of the towers keep for the gradient."""
        if self.work.blocks:
            return 0
        numbers, whole, kept = self.numbers, TrainedParts(whole=True), 0
        if self._is_trained("audio.qformer."):
            queries = len(self.media.mel) * self.config.tokens_per_chunk
            qformer = Stack.of(self.network.get_submodule("audio.qformer.qformer").config)
            kept += budget.windows_saved(
                qformer, numbers, steps=self.steps, queries=queries, width_heard=self.hearing.width
            )
        if self._is_trained("vision.encoder.merger."):
            kept += budget.merger_saved(self.seeing.width, numbers, patches=self.patches)
        if self._is_trained("vision.projector."):
            kept += budget.projector_saved(self.seeing.width, numbers, patches=self.patches, width=self.decoder.width)
        for start, stack, tokens in (
            ("vision.encoder.", self.seeing, self.patches),
            ("audio.encoder.", self.hearing, self.steps),
        ):
            if self._is_trained(start):
                kept += budget.saved_by_stack(stack, numbers, whole, tokens=tokens, rows=1, checkpointed=checkpointed)
        return kept

    def _is_trained(self, start: str) -> bool:
        """Whether weights are trained that belong to no part with a longer name."""
        names = [name for name, parameter in self.network.named_parameters() if parameter.requires_grad]
        inner = ".merger." if start == "vision.encoder." else ".lora_"
        return any(name.startswith(start) and inner not in name for name in names)

    def _casts(self, layers: int) -> int:
        """Copies of float32 weights that compute in 16 bits, of so many layers."""
        if self.numbers.computed == self.numbers.stored:
            return 0
        return self.numbers.computed * self.parameters["language model"].total * layers // self.decoder.layers


def print_plan(plan: MemoryPlan, *, title: str, side_by_side: int = 1) -> None:
    """Print parameters, tokens and memory; rank 0 alone does.

    Args:
        plan: of the run.
        title: what is planned.
        side_by_side: captions that the run generates at once.
    """
    if not dist.is_main():
        return
    console = Console(width=100)
    console.print(_parameter_table(plan, title))
    console.print(sample_clip(plan), highlight=False)
    longest = plan.config.max_new_tokens
    memories = {
        "training": plan.training(checkpointed=False),
        "checkpointed": plan.training(checkpointed=True),
        "one caption": plan.captioning(max_new_tokens=longest),
    }
    if side_by_side > 1:
        memories[f"{side_by_side} captions"] = plan.captioning(max_new_tokens=longest, side_by_side=side_by_side)
    console.print(_memory_table(plan, memories))


def sample_clip(plan: MemoryPlan) -> str:
    """The clip's way to tokens, and what is assumed, in sentences."""
    shape, work, media = plan.shape, plan.work, plan.media
    of_frames = "no picture"
    if media.num_frames:
        rows, columns = plan.family.frame_sampler.frame_size(shape.height, shape.width, media.num_frames)
        of_frames = f"{media.num_frames} frames of {columns}x{rows}: {plan.layout.num_visual} tokens seen"
    heard = plan.clip_tokens - plan.layout.num_visual
    told = [
        f"A clip of {shape.seconds:g} s, {shape.width}x{shape.height}, {shape.frames_per_second:g} fps, with sound: "
        f"{of_frames}, {heard} heard, {plan.clip_tokens} in all.",
        f"A sequence of training: {work.length(plan.clip_tokens)} tokens, with a prompt of {work.prompt_tokens} and "
        f"{work.answers} answers of {work.answer_tokens} (assumed); clips that go through at a time: {work.clips}.",
    ]
    if work.blocks:
        told.append(f"The clip's tokens are kept on disk: {plan.block_bytes / GIB:.2f} GiB for each clip.")
    return "\n".join(told)


def _parameter_table(plan: MemoryPlan, title: str) -> Table:
    table = Table(title=title)
    for name in ("part", "parameters", "trained"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for name, part in plan.parameters.items():
        table.add_row(name, f"{part.total:,}", f"{part.trained:,}")
    table.add_section()
    table.add_row("all", f"{sum(part.total for part in plan.parameters.values()):,}", f"{plan.trained:,}")
    return table


def _memory_table(plan: MemoryPlan, memories: Mapping[str, MemoryEstimate]) -> Table:
    chosen = "its layers checkpointed" if plan.fit.gradient_checkpointing else "no layers checkpointed"
    table = Table(title=f"GiB on each GPU (this configuration has {chosen})")
    table.add_column("")
    for name in memories:
        table.add_column(name, justify="right")
    for kind in ("held", "at_work"):
        for row in dict.fromkeys(row for memory in memories.values() for row in getattr(memory, kind)):
            cells = [_gib(getattr(memory, kind).get(row, 0)) for memory in memories.values()]
            table.add_row(row if kind == "held" else f"briefly: {row}", *cells)
        table.add_section()
    table.add_row("peak", *(_gib(memory.peak) for memory in memories.values()))
    for size in GPUS:
        fits = ["yes" if memory.peak + RESERVE <= size * GIB else "no" for memory in memories.values()]
        table.add_row(f"fits {size} GiB", *fits)
    return table


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f}" if num_bytes else "-"


def print_adapter_plan(
    model: str,
    *,
    frames: Mapping[str, int | float] | None,
    lora: LoraConfig,
    placement: Placement,
    fit: FitConfig,
    answers: int,
    title: str,
    side_by_side: int = 1,
) -> None:
    """Print what training an adapter on clips' kept tokens would need of memory, and captions drawn side by side.

    Args:
        model: folder, or id of a published model.
        frames, lora, placement, fit: of the run.
        answers: of a caption's length to each clip: three in guided DPO (chosen, rejected, ground truth).
        title: what is planned, of which the model's name follows.
        side_by_side: captions that the run generates at once.
    """
    sizes = offline_config(model, frames=frames)
    network = build_on_meta(sizes)
    with torch.device("meta"):
        attach_lora(network, lora, seed=0)
    work = Workload(clips=clips_per_micro_batch(fit), answers=answers, blocks=True)
    budget = MemoryPlan(network, sizes, placement=placement, fit=fit, work=work)
    print_plan(budget, title=f"{title} of {model}", side_by_side=side_by_side)
