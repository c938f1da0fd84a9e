"""Supervised fine-tuning: pre-training of the towers, audio alignment, audio-visual SFT; a stage is a YAML.

    torchrun recipes/sft.py --config recipes/configs/pretrain.yaml

Reads references (or renders synthetic clips), trains what `trainable` and `lora` name, writes the model to `out`, and
measures it on held-out clips. Killed, the same command goes on from the last checkpoint.
"""

import gc
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from salmonn import dist
from salmonn.caption.captioner import Captioner
from salmonn.caption.generator import Sampling
from salmonn.caption.processor import Processor
from salmonn.caption.prompt import LIST_EVENTS, train_tokenizer
from salmonn.config import run_recipe
from salmonn.conversations import Conversation, is_conversation_file, read_conversations
from salmonn.model.config import PLAIN_PROMPTS
from salmonn.model.families import get_family
from salmonn.model.families.tiny import tiny_config
from salmonn.model.layout import ClipFeatures, ClipInputs
from salmonn.model.loading import CONFIG_NAME, Placement, load_config, load_network, offline_config
from salmonn.model.lora import LoraConfig, attach_lora, merge_adapter
from salmonn.model.network import Network
from salmonn.records import Modality, write_json
from salmonn.synthetic.judge import RuleJudge
from salmonn.synthetic.render import SynthConfig, sample_clip
from salmonn.train.checkpoint import checkpointed, load_trained
from salmonn.train.data import ClipCache, Example, SftBatches, SftTask, conversation_examples, make_examples, sft_loss
from salmonn.train.dry_run import MemoryPlan, Workload, build_on_meta, clips_per_micro_batch, print_plan
from salmonn.train.evaluate import encode_clips, encode_examples, evaluate, write_evaluation
from salmonn.train.feature_cache import FeatureCacheConfig, open_feature_cache
from salmonn.train.loop import FitConfig, FitContext, fit, require_processes
from salmonn.train.parallel import StrategyName
from salmonn.train.references import ClipSet, all_texts, heldout_config, read_clips, render_clips
from salmonn.train.run_folder import is_missing, open_run, save_merged

log = logging.getLogger("sft")
TINY = "tiny"
NUM_TOKENIZER_SCENES = 1000


@dataclass(frozen=True)
class SftConfig:
    """One stage of supervised fine-tuning.

    Args:
        out: folder for the trained model and its figures.
        model: folder or hub id of the model to start from; "tiny" starts the toy model from nothing.
        engine: how training is spread over processes; it may change when a run goes on.
        placement: device and type of its weights.
        frames: values of the model's frame rule that are other in training, such as `min_frames`.
        references: JSONL of references to one's own videos, or a file of conversations about them in the format of the
            published models (docs/data.md), of which `tasks` choose nothing; none renders clips as `synth` says.
        clips_dir: where synthetic clips are kept.
        synth: training clips.
        heldout_clips: synthetic clips to measure on, of a seed of their own; 0 measures nothing.
        feature_cache: in a folder, frozen towers run once on each clip, before the first step, and without dropout; by
            default they run in each step. It pays where a clip comes up more than once.
        tasks: what is learnt of each clip.
        single_modality_every: of so many clips one is learnt by its picture alone and its sound alone too, if `tasks`
            say so; more trains more on clips as a whole.
        trainable: parts of the network that are trained, by the start of their names; "all" for everything.
        lora: adapter of the language model, merged at the end; none trains without one.
        fit: optimisation.
        vocab_size: of the tokenizer that is made for a model from nothing.
        seed: of weights, order and dropout.
        dry_run: print what the stage would need of a GPU, and do nothing.
    """

    out: Path
    model: str = TINY
    strategy: StrategyName = "ddp"
    placement: Placement = field(default_factory=lambda: Placement(dtype="float32", attention="sdpa"))
    frames: dict[str, int | float] | None = None
    references: Path | None = None
    clips_dir: Path = Path("run/clips")
    synth: SynthConfig = field(default_factory=lambda: SynthConfig(clips=8000, seed=1))
    heldout_clips: int = 200
    feature_cache: FeatureCacheConfig = field(default_factory=lambda: FeatureCacheConfig(folder=None))
    tasks: tuple[SftTask, ...] = ("caption", "questions", "visual_caption", "audio_caption")
    single_modality_every: int = 1
    trainable: tuple[str, ...] = ("all",)
    lora: LoraConfig | None = None
    fit: FitConfig = field(default_factory=FitConfig)
    vocab_size: int = 640
    seed: int = 0
    dry_run: bool = False

    def __post_init__(self) -> None:
        self.placement.require_trainable()

    @property
    def resume_key(self) -> "SftConfig":
        """What results follow from; the rest, by its default here, may be changed in a run that goes on."""
        folder = (
            self.feature_cache.folder and FeatureCacheConfig.folder
        )  # with tokens from disk, towers have no dropout
        return replace(self, strategy="ddp", feature_cache=FeatureCacheConfig(folder))


def main(config: SftConfig) -> None:
    """Run one stage."""
    if config.dry_run:
        print_memory_plan(config)
        return
    dist.setup()
    require_processes(config.strategy, config.fit)
    if config.model != TINY:
        load_config(config.model)  # a wrong folder is told before anything is rendered
    clips = read_data(config)
    open_run(config.out, config.resume_key, name="sft")
    if not is_missing(config.out / CONFIG_NAME):
        log.info("%s is trained already", config.out)
        with checkpointed(config.out):  # clears what a kill has left
            return
    captioner = load_model(config, clips)
    choose_trainable(captioner.network, config)
    examples = to_examples(clips, captioner, config)
    if config.strategy != "ddp":
        examples = whole_clips(examples, strategy=config.strategy)
    batches = SftBatches(
        examples,
        captioner.processor,
        find_clips(captioner, examples, config.feature_cache),
        batch_size=config.fit.batch_size,
        seed=config.seed,
        gradient_accumulation_steps=config.fit.gradient_accumulation_steps,
    )
    with checkpointed(config.out) as checkpoints:
        stage = FitContext(config.out.name, config.out, checkpoints, config.seed, config.strategy)
        done = fit(captioner.network, batches, sft_loss, config.fit.resolve(len(examples)), stage=stage)
        # Training uses the network up: what it has learnt goes into another that is made in the same way.
        del captioner.network
        gc.collect()
        captioner.network = start_network(config, captioner.processor)
        choose_trainable(captioner.network, config)
        load_trained(captioner.network, done)
        if config.lora:
            merge_adapter(captioner.network)
        captioner.network.requires_grad_(False).eval()
        measure(captioner, config)
        save_merged(captioner, config.out)


def print_memory_plan(config: SftConfig) -> None:
    """Print what the stage would need of memory."""
    sizes = tiny_config(vocab_size=config.vocab_size, eos_token_id=2, pad_token_id=0)
    if config.model != TINY:
        sizes = offline_config(config.model)
    sizes = get_family(sizes).with_frames(config.frames)
    network = build_on_meta(sizes)
    with torch.device("meta"):
        choose_trainable(network, config)
    # What is learnt of the whole clip stands together, if anything is.
    uses: list[Modality] = [
        modality for modality in ("visual", "audio") if any(task.startswith(modality) for task in config.tasks)
    ]
    whole = sum(not task.startswith(("visual_", "audio_")) for task in config.tasks)
    work = Workload(
        clips=clips_per_micro_batch(config.fit),
        answers=max(whole, 1),
        modality="both" if whole or not uses else uses[0],
    )
    print_plan(
        MemoryPlan(network, sizes, placement=config.placement, fit=config.fit, work=work),
        title=f"SFT of {config.model}",
    )


@dataclass(frozen=True)
class Conversations:
    """Published conversations, and the folder that their paths start from."""

    items: list[Conversation]
    root: Path


def read_data(config: SftConfig) -> ClipSet | Conversations:
    """What is to be learnt: the clips' references, or conversations about them as the published models had them."""
    path = config.references
    if path is None:
        return render_clips(config.clips_dir, config.synth)
    if is_conversation_file(path):
        return Conversations(read_conversations(path), path.parent)
    return read_clips(path)


def to_examples(clips: ClipSet | Conversations, captioner: Captioner, config: SftConfig) -> list[Example]:
    """One epoch of examples."""
    if isinstance(clips, Conversations):
        told = [item for item in clips.items if item.turns]
        if left := len(clips.items) - len(told):
            log.info("%d preferences among the conversations are left to recipes/dpo.py", left)
        return conversation_examples(told, root=clips.root)
    return make_examples(
        clips.references,
        config.tasks,
        root=clips.root,
        prompts=captioner.processor.config.prompts or PLAIN_PROMPTS,
        single_modality_every=config.single_modality_every,
    )


def load_model(config: SftConfig, clips: ClipSet | Conversations) -> Captioner:
    """The model to start from."""
    if config.model != TINY:
        return Captioner.load(config.model, placement=config.placement, frames=config.frames)
    # Whole scenes besides the stage's own clips, so that a stage of few words leaves no word of later ones in pieces.
    world = [sample_clip(SynthConfig(seed=config.seed), index=index)[1] for index in range(NUM_TOKENIZER_SCENES)]
    if isinstance(clips, Conversations):
        told = [text for item in clips.items for turn in item.turns for text in (turn.prompt, turn.answer)]
    else:
        told = all_texts(clips.references)
    texts = [*told, *all_texts(world), *PLAIN_PROMPTS.values(), LIST_EVENTS]
    tokenizer = train_tokenizer(texts, vocab_size=config.vocab_size)
    sizes = tiny_config(
        vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    processor = Processor(tokenizer, config=get_family(sizes).with_frames(config.frames))
    return Captioner(start_network(config, processor), processor)


def whole_clips(examples: Sequence[Example], *, strategy: str) -> list[Example]:
    """Examples for an engine that splits the training: all processes must use the same parts of the model in each step.

    Raises:
        ValueError: the engine gathers the towers' weights part by part, and they run as often as a process has clips;
            or some examples are of the whole clip, others of picture or sound alone. A clip that lacks what it is
            meant for ends the run when it is read.
    """
    if strategy == "zero3":
        raise ValueError("strategy zero3 does not take towers into training: choose fsdp2, which splits weights too")
    uses = sorted({example.modality for example in examples})
    if len(uses) > 1:
        raise ValueError(
            f"the {len(examples)} examples are of {' and of '.join(uses)}, and with strategy {strategy} all processes "
            "must use the same parts of the model in each step: choose tasks of one kind, or strategy ddp"
        )
    return [replace(example, needs_both=example.modality == "both") for example in examples]


def start_network(config: SftConfig, processor: Processor) -> Network:
    """The weights to start from."""
    if config.model != TINY:
        return load_network(config.model, placement=config.placement)
    torch.manual_seed(config.seed)
    network = Network(processor.config)
    # Fresh positions are a tenth of what fresh patches give, and where a shape stands would not be learnt for hundreds
    # of steps.
    network.get_parameter("vision.encoder.embeddings.position_embedding.weight").data.mul_(8)
    return network.to(dist.device())


def choose_trainable(network: Network, config: SftConfig) -> None:
    """Let gradients through to the chosen parts and the adapter alone."""
    network.requires_grad_("all" in config.trainable)
    for prefix in config.trainable:
        parameters = [value for name, value in network.named_parameters() if name.startswith(prefix)]
        if not parameters and prefix != "all":
            raise ValueError(f"no part of the network is named {prefix}: it has vision., audio. and lm.")
        for parameter in parameters:
            parameter.requires_grad = True
    if config.lora:
        chosen = [parameter for parameter in network.parameters() if parameter.requires_grad]
        attach_lora(network, config.lora, seed=config.seed)  # freezes all but the adapter
        for parameter in chosen:
            parameter.requires_grad = True


def find_clips(
    captioner: Captioner, examples: Sequence[Example], tokens: FeatureCacheConfig
) -> Callable[[Example], ClipInputs | ClipFeatures]:
    """Gives an example's clip: as it is read, or as the frozen towers encoded it before.

    Raises:
        ValueError: tokens are to be kept, and what gives them is trained.
    """
    if tokens.folder is None:
        return ClipCache(captioner.processor)
    embeddings = captioner.network.lm.get_input_embeddings().weight
    towers = [*captioner.network.vision.parameters(), *captioner.network.audio.parameters()]
    if any(value.requires_grad for value in (*towers, embeddings)):
        raise ValueError(
            "tokens are kept where towers and embeddings are frozen, and trainable names some of them: leave "
            "feature_cache.folder out, or train a LoRA alone"
        )
    blocks = encode_examples(captioner, examples, name="training clips", store=open_feature_cache(tokens, captioner))
    return lambda example: blocks[example.clip]


def measure(captioner: Captioner, config: SftConfig) -> None:
    """Score the model on the held-out clips and write captions, scores and summary."""
    if not config.heldout_clips:
        return
    clips = render_clips(config.clips_dir, heldout_config(config.synth, clips=config.heldout_clips))
    (blocks,) = encode_clips(
        captioner, clips, name="held-out clips", store=open_feature_cache(config.feature_cache, captioner)
    )
    judge = RuleJudge()
    result = evaluate(captioner, clips.references, blocks, judge=judge, sampling=Sampling(), name="held-out")
    if dist.is_main():
        write_evaluation(config.out, result, judge=judge)
        write_json(config.out / "summary.json", asdict(result.rates))
        log.info("held-out: %s", json.dumps(asdict(result.rates)))


if __name__ == "__main__":
    run_recipe(main, SftConfig, description=__doc__, on_error=dist.abort)
