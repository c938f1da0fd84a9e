"""Dry run: estimate parameters, clip tokens and memory without loading weights.

The network is built on torch's meta device, a placeholder clip goes through the model's own frame sampling, resizing,
audio chunking and token layout, and `salmonn.model.memory` does the arithmetic. Only the model's config.json is read.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, replace

import torch
from rich.console import Console
from rich.table import Table

from salmonn import dist
from salmonn.caption.processor import select_modality
from salmonn.media.container import ClipShape
from salmonn.model import memory as estimate
from salmonn.model.config import SalmonnConfig
from salmonn.model.families import get_family
from salmonn.model.layout import ClipInputs, Layout
from salmonn.model.loading import Placement, offline_config
from salmonn.model.lora import LoraConfig, attach_lora, check_targets
from salmonn.model.memory import FLOAT32, GIB, NumberSizes, Stack, TrainedParts
from salmonn.model.network import MAX_LOGIT_BYTES, PREFILL_CHUNK_TOKENS, Network
from salmonn.records import Modality
from salmonn.train.loop import FitConfig

GPUS = (24, 40, 80, 141)  # GiB
LIBRARY_BYTES = GIB  # CUDA context, kernels, workspaces of cuBLAS and cuDNN
FRAGMENTATION = 0.05  # share of activations and workspace that the allocator cannot use
PARTS = {
    "vision encoder": ("vision.encoder.",),
    "audio encoder": ("audio.encoder.", "audio.norm."),
    "Q-Former": ("audio.qformer.",),
    "projections": (
        "vision.encoder.merger.",
        "vision.encoder.deepstack_merger_list.",
        "vision.encoder.merger_list.",
        "vision.projector.",
        "vision.newline",
        "audio.projector.",
        "audio.encoder.proj",
    ),
    "language model": ("lm.",),
}
TEXT_TOKENS = re.compile(r"<\|\w+\|>|\d| ?[^\W\d]+|\S")  # special tokens, digits, words, other characters


DEFAULT_SHAPE = ClipShape()


@dataclass(frozen=True)
class Workload:
    """Sizes of one forward pass of training.

    Args:
        clips: clips in a micro-batch.
        answers: answers per clip, which share its tokens.
        answer_tokens: tokens per answer (an assumption).
        prompt_tokens: tokens of the prompt including the chat template.
        cached_features: whether the encoders have run before training, once per clip.
        modality: modalities that the answers are about.
    """

    clips: int
    answers: int
    answer_tokens: int = 512
    prompt_tokens: int = 100
    cached_features: bool = False
    modality: Modality = "both"

    def length(self, clip_tokens: int) -> int:
        """Return the number of tokens in a packed sequence."""
        return clip_tokens + self.prompt_tokens + self.answers * self.answer_tokens


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a part of the network."""

    total: int
    trained: int


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device by purpose; only the largest workspace counts, since workspaces are used in turn.

    Args:
        persistent: bytes that are held all the time.
        workspace: bytes that are held in turn.
        margins: bytes that only a GPU needs, besides.
    """

    persistent: dict[str, int]
    workspace: dict[str, int]
    margins: dict[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """Peak memory of tensors in bytes."""
        return sum(self.persistent.values()) + max(self.workspace.values())

    @property
    def on_gpu(self) -> int:
        """Peak memory of a GPU in bytes."""
        return self.peak + sum(self.margins.values())


def gpu_margins(persistent: Mapping[str, int], workspace: Mapping[str, int], **others: int) -> dict[str, int]:
    """Return what a GPU needs besides tensors; weights are allocated once, so they do not fragment."""
    changing = sum(size for name, size in persistent.items() if name != "weights") + max(workspace.values())
    return {**others, "libraries": LIBRARY_BYTES, "fragmentation": round(FRAGMENTATION * changing)}


def build_on_meta(config: SalmonnConfig) -> Network:
    """Build the network without allocating its weights."""
    with torch.device("meta"):
        return Network(config)


def check_adapters(config: SalmonnConfig, *adapters: LoraConfig) -> None:
    """Raise a ValueError if an adapter names projections that the model does not have; no weights are loaded."""
    network = build_on_meta(config)
    for adapter in adapters:
        check_targets(network, adapter)


def placeholder_inputs(config: SalmonnConfig, shape: ClipShape) -> ClipInputs:
    """Build the model inputs of a clip with shapes but no data."""
    family = get_family(config)
    sampler = family.frame_sampler
    num_frames = max(1, round(shape.seconds * shape.frames_per_second))
    times = sampler.sample_times(0.0, shape.seconds, num_frames)
    count = len(times)
    frames = torch.empty(
        (count, 3, *sampler.frame_size(shape.height, shape.width, count)), dtype=torch.uint8, device="meta"
    )
    mel = torch.empty(0, device="meta")
    if family.hears:
        mel = torch.empty(family.mel_shape(shape.seconds), device="meta")
    return replace(family.clip_inputs(frames, mel, seconds=shape.seconds), times=tuple(times.tolist()))


def placeholder_layout(config: SalmonnConfig, media: ClipInputs) -> Layout:
    """Return the layout of a clip's tokens; the published tokenizers cut text as `TEXT_TOKENS` does."""
    family = get_family(config)
    timestamps = [[0] * len(TEXT_TOKENS.findall(text)) for text in family.timestamps(media)]
    return family.layout(media, timestamp_ids=timestamps)


def count_clip_tokens(config: SalmonnConfig, shape: ClipShape, *, modality: Modality) -> int:
    """Return the number of tokens of a clip, as far as it follows from its shape; 0 for one without a known
    duration."""
    if not shape.seconds:
        return 0
    if not get_family(config).hears:
        if not shape.width or modality == "audio":
            return 0  # there is nothing that the model perceives, which is reported when the clip is read
        modality = "visual"
    elif not shape.width:
        shape, modality = replace(DEFAULT_SHAPE, seconds=shape.seconds), "audio"
    elif not shape.has_audio:
        modality = "visual"
    media = placeholder_inputs(config, shape)
    return len(placeholder_layout(config, select_modality(media, modality)))


def count_parameters(network: Network) -> dict[str, ParameterCount]:
    """Count parameters by part, the adapter last."""
    counts = {name: [0, 0] for name in [*PARTS, "LoRA"]}
    for name, parameter in network.named_parameters():
        # The merger is part of the vision encoder: the longest prefix decides.
        matching = {start: part for part, starts in PARTS.items() for start in starts if name.startswith(start)}
        part = "LoRA" if ".lora_" in name else matching[max(matching, key=len)]
        counts[part][0] += parameter.numel()
        counts[part][1] += parameter.numel() * parameter.requires_grad
    return {name: ParameterCount(*both) for name, both in counts.items()}


def weights_bytes(network: Network, placement: Placement, *, merged: bool = False) -> int:
    """Return the bytes of all weights: trained ones in float32, the language model's matrices possibly quantized.

    Args:
        network: network with its adapter.
        placement: dtype and bits.
        merged: whether the adapter is merged, so that all weights have one dtype.
    """
    stored = 4 if placement.dtype == "float32" else 2
    # 4-bit quantization stores a float32 scale per 64 numbers.
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
    """Return the clips in a micro-batch: a rank's share of the batch divided by the accumulation steps."""
    share = math.ceil(fit.batch_size / dist.world_size())
    return math.ceil(share / min(fit.gradient_accumulation_steps, share))


@dataclass
class MemoryPlan:
    """Memory estimate for one network, clip shape and workload.

    Args:
        network: network as it is trained, with its adapter.
        config: config of the network with the frame sampling of training.
        placement: dtype and quantization of the weights.
        fit: optimization settings.
        work: sizes of a forward pass.
        shape: length and format of the clips.
    """

    network: Network
    config: SalmonnConfig
    _: KW_ONLY
    placement: Placement
    fit: FitConfig
    work: Workload
    shape: ClipShape = DEFAULT_SHAPE

    def __post_init__(self) -> None:
        self.family = get_family(self.config)
        stored = 4 if self.placement.dtype == "float32" else 2  # `auto` is assumed to be bfloat16
        self.numbers = NumberSizes(stored, 2 if self.fit.precision == "bfloat16" else stored)
        self.media = select_modality(placeholder_inputs(self.config, self.shape), self.work.modality)
        self.layout = placeholder_layout(self.config, self.media)
        self.clip_tokens = len(self.layout)
        self.patches = self.family.count_patches(self.media)  # in the vision encoder's layers
        hears = self.family.hears
        self.steps = self.family.count_audio_steps(self.media) if hears else 0  # in the audio encoder's layers
        self.parameters = count_parameters(self.network)
        self.trained = sum(part.trained for part in self.parameters.values())
        self.decoder = Stack.of(self.network.lm.config.get_text_config())
        self.vision = Stack.of(self.network.get_submodule("vision.encoder").config)
        self.audio = Stack.of(self.network.get_submodule("audio.encoder").config) if hears else None
        # What the decoder's first layers add to the clip's tokens is held until the end of a step.
        self.deep_tokens = self.clip_tokens * self.family.num_deep_layers

    def training(self, *, checkpointed: bool | int) -> MemoryEstimate:
        """Estimate the memory of a training step on one device.

        Args:
            checkpointed: gradient checkpointing of all layers, of none, or of a number of the language model's.
        """
        num_layers = self.decoder.layers * checkpointed if isinstance(checkpointed, bool) else checkpointed
        work, decoder, numbers = self.work, self.decoder, self.numbers
        length = work.length(self.clip_tokens)
        tokens, rows = work.clips * length, work.answers
        adapted = self.network.lm.peft_config["default"].target_modules if self.parameters["LoRA"].total else ()
        tuning = TrainedParts(len(adapted), whole=self._is_trained("lm."))
        # Autocast copies the float32 weights of the layers in use.
        is_cast = numbers.computed != numbers.stored
        cast = numbers.computed * self.parameters["language model"].total if is_cast else 0
        layer = tokens * estimate.workspace(decoder, numbers)
        if num_layers:
            layer += tokens * estimate.saved_per_layer(decoder, numbers, tuning, rows=rows)
        saved = estimate.saved_by_stack(decoder, numbers, tuning, tokens=tokens, rows=rows, checkpointed=num_layers)
        vocabulary = self.network.lm.get_output_embeddings().weight.shape[0]
        answers = min(work.clips * work.answers * work.answer_tokens, MAX_LOGIT_BYTES // (FLOAT32 * vocabulary))
        persistent = {
            "weights": weights_bytes(self.network, self.placement)
            + (cast // decoder.layers if num_layers == decoder.layers else cast),
            "gradients": FLOAT32 * self.trained,
            "Adam's moments": 2 * FLOAT32 * self.trained,
            "inputs": estimate.embedded(decoder, numbers, tokens=tokens, deep_tokens=work.clips * self.deep_tokens),
            "activations": saved + work.clips * self._encoder_saved(checkpointed=num_layers > 0),
        }
        workspace = {
            "one layer": layer,
            "logits": estimate.logits_bytes(vocabulary, numbers, tokens=answers),
            "encoders": 0 if work.cached_features else work.clips * self._encoder_workspace(numbers),
        }
        kernels = estimate.gpu_training(decoder, numbers, tokens=tokens, is_adapted=bool(adapted))
        return MemoryEstimate(persistent, workspace, gpu_margins(persistent, workspace, **kernels))

    def fewest_checkpointed(self, gib: int) -> int | None:
        """Return how many layers of the language model must be checkpointed to fit a GPU; None if all are too few."""
        fits = (
            count for count in range(self.decoder.layers + 1) if self.training(checkpointed=count).on_gpu <= gib * GIB
        )
        return next(fits, None)

    def captioning(self, *, max_new_tokens: int, batch_size: int = 1, num_samples: int = 1) -> MemoryEstimate:
        """Estimate the memory of generating a batch of captions, with one prefix in the KV cache per clip.

        Args:
            max_new_tokens: tokens of each caption.
            batch_size: captions that are generated at a time.
            num_samples: captions of each clip.
        """
        num_clips = max(1, batch_size // num_samples)
        numbers = NumberSizes(self.numbers.stored, self.numbers.stored)
        prompt = self.clip_tokens + self.work.prompt_tokens
        prefill = estimate.embedded(self.decoder, numbers, tokens=prompt, deep_tokens=self.deep_tokens)
        prefill += prompt * estimate.workspace(self.decoder, numbers)
        cached = num_clips * prompt + num_clips * num_samples * max_new_tokens
        cache = estimate.kv_cache_bytes(self.decoder, numbers, tokens=cached)
        prefilled = max(1, min(num_clips, PREFILL_CHUNK_TOKENS // prompt))
        persistent = {"weights": weights_bytes(self.network, self.placement, merged=True)}
        workspace = {
            "encoders": prefilled * self._encoder_workspace(numbers),
            "KV cache, prefill": cache + prefilled * prefill,
        }
        return MemoryEstimate(persistent, workspace, gpu_margins(persistent, workspace))

    def _encoder_workspace(self, numbers: NumberSizes) -> int:
        return estimate.encoder_workspace(self.network, self.media, numbers)

    def _encoder_saved(self, *, checkpointed: bool) -> int:
        """Return the bytes that trained parts of the encoders save for the backward pass."""
        if self.work.cached_features:
            return 0
        numbers, whole, saved = self.numbers, TrainedParts(whole=True), 0
        if self.audio is not None and self._is_trained("audio.qformer."):
            # The audio steps in float32, their keys and values in each layer (2 b D), and for the few queries what a
            # layer with two attentions saves.
            qformer = Stack.of(self.network.get_submodule("audio.qformer.qformer").config)
            of_step = FLOAT32 * self.audio.width + qformer.layers * 2 * numbers.computed * qformer.width
            of_query = 2 * qformer.layers * estimate.saved_per_layer(qformer, numbers, whole, rows=1)
            saved += self.steps * of_step + len(self.media.mel) * self.config.tokens_per_chunk * of_query
        if self._is_trained("vision.encoder.merger."):
            # Qwen2.5-VL's: its input, normed input, and its activation's input and output.
            saved += self.patches * self.vision.width * (FLOAT32 + 3 * numbers.computed)
        if self.audio is not None and self._is_trained("audio.encoder.proj"):
            # Qwen-Omni's: its input, and where it has a layer more, its activation's input and output.
            saved += self.steps * numbers.computed * 3 * self.audio.width
        if self._is_trained("vision.projector."):
            # SigLIP's: its input, and its activation's input and output.
            saved += self.patches * numbers.computed * (self.vision.width + 2 * self.decoder.width)
        for start, stack, tokens in (
            ("vision.encoder.", self.vision, self.patches),
            ("audio.encoder.", self.audio, self.steps),
        ):
            if stack is not None and self._is_trained(start):
                saved += estimate.saved_by_stack(
                    stack, numbers, whole, tokens=tokens, rows=1, checkpointed=stack.layers * checkpointed
                )
        return saved

    def _is_trained(self, start: str) -> bool:
        """Return whether weights with this prefix are trained, apart from its separately listed parts."""
        names = [name for name, parameter in self.network.named_parameters() if parameter.requires_grad]
        inner = {"vision.encoder.": ".merger", "audio.encoder.": ".encoder.proj"}.get(start, ".lora_")
        return any(name.startswith(start) and inner not in name for name in names)


def print_plan(plan: MemoryPlan, *, title: str, captions: tuple[int, int] | None = (1, 1)) -> None:
    """Print parameters, tokens and memory on rank 0.

    Args:
        plan: memory plan of the run.
        title: title of the parameter table.
        captions: number of captions that the run generates at a time, and of each clip; None if it generates none.
    """
    if not dist.is_main():
        return
    console = Console(width=100)
    console.print(_parameter_table(plan, title))
    console.print(summarize_clip(plan), highlight=False)
    max_new_tokens = plan.config.max_new_tokens
    memories = {
        "training": plan.training(checkpointed=False),
        "gradient checkpointing": plan.training(checkpointed=True),
    }
    if captions:
        memories["one caption"] = plan.captioning(max_new_tokens=max_new_tokens)
    batch_size, num_samples = captions or (1, 1)
    if batch_size > 1:
        name = f"{batch_size} captions" + (f", {num_samples} a clip" if num_samples > 1 else "")
        memories[name] = plan.captioning(max_new_tokens=max_new_tokens, batch_size=batch_size, num_samples=num_samples)
    console.print(_memory_table(plan, memories))
    fewest = {size: plan.fewest_checkpointed(size) for size in GPUS}
    if plan.trained and any(fewest.values()):
        numbers = ", ".join(f"{count} on {size} GiB" for size, count in fewest.items() if count is not None)
        console.print(
            f"Layers of the language model (of {plan.decoder.layers}) that need gradient checkpointing "
            f"(fit.gradient_checkpointing; each makes a step slower): {numbers}.",
            highlight=False,
        )


def summarize_clip(plan: MemoryPlan) -> str:
    """Return sentences on how a clip becomes tokens, and on the assumptions made."""
    shape, work, media = plan.shape, plan.work, plan.media
    video = "no video"
    if media.num_frames:
        rows, columns = plan.family.frame_sampler.frame_size(shape.height, shape.width, media.num_frames)
        video = f"{media.num_frames} frames of {columns}x{rows} = {plan.layout.num_visual} visual tokens"
    num_text = len(plan.layout.timestamp_ids)
    num_audio = plan.clip_tokens - plan.layout.num_visual - num_text
    text = f"{num_text} text tokens, " if num_text else ""
    sound = "with sound" if plan.family.hears else "without sound (this model has no audio input)"
    sentences = [
        f"A clip of {shape.seconds:g} s, {shape.width}x{shape.height}, {shape.frames_per_second:g} fps, {sound}: "
        f"{video}, {num_audio} audio tokens, {text}{plan.clip_tokens} in total.",
        f"A packed training sequence: {work.length(plan.clip_tokens)} tokens, with a prompt of {work.prompt_tokens} "
        f"and {work.answers} answers of {work.answer_tokens} (assumed); clips per micro-batch: {work.clips}.",
    ]
    if work.cached_features:
        feature_bytes = (plan.clip_tokens + plan.deep_tokens) * plan.decoder.width * plan.numbers.stored
        sentences.append(f"Feature cache: {feature_bytes / GIB:.2f} GiB per clip.")
    return "\n".join(sentences)


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
    checkpointed = plan.fit.gradient_checkpointing
    chosen = ("off", "on")[checkpointed] if isinstance(checkpointed, bool) else f"on for {checkpointed} layers"
    table = Table(title=f"GiB per GPU (gradient checkpointing is {chosen} in this configuration)")
    table.add_column("")
    for name in memories:
        table.add_column(name, justify="right")
    parts = {
        "": [memory.persistent for memory in memories.values()],
        "workspace: ": [memory.workspace for memory in memories.values()],
        "GPU: ": [memory.margins for memory in memories.values()],
    }

    def gib(num_bytes: int) -> str:
        return f"{num_bytes / GIB:.2f}" if num_bytes else "-"

    for prefix, columns in parts.items():
        for row in dict.fromkeys(row for column in columns for row in column):
            table.add_row(prefix + row, *(gib(column.get(row, 0)) for column in columns))
        table.add_section()
    table.add_row("peak of tensors", *(gib(memory.peak) for memory in memories.values()))
    table.add_row("peak of a GPU", *(gib(memory.on_gpu) for memory in memories.values()))
    for size in GPUS:
        fits = ["yes" if memory.on_gpu <= size * GIB else "no" for memory in memories.values()]
        table.add_row(f"fits {size} GiB", *fits)
    return table


def print_adapter_plan(
    model: str,
    *,
    frames: Mapping[str, int | float] | None,
    lora: LoraConfig | None,
    placement: Placement,
    fit: FitConfig,
    answers: int,
    title: str,
    captions: tuple[int, int] | None = (1, 1),
) -> MemoryPlan:
    """Print the memory that training an adapter on cached features needs, and captioning in batches.

    Args:
        model: folder, or id of a published model.
        frames, lora, placement, fit: settings of the run; without `lora` nothing is trained.
        answers: caption-length answers per clip: three in guided DPO (chosen, rejected, ground truth).
        title: name of the stage; the model's name is added.
        captions: see `print_plan`.
    """
    sizes = offline_config(model, frames=frames)
    network = build_on_meta(sizes)
    network.requires_grad_(False)
    if lora:
        with torch.device("meta"):
            attach_lora(network, lora, seed=0)
    work = Workload(clips=clips_per_micro_batch(fit), answers=answers, cached_features=True)
    plan = MemoryPlan(network, sizes, placement=placement, fit=fit, work=work)
    print_plan(plan, title=f"{title} of {model}", captions=captions)
    return plan
