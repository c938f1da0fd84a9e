"""Supervised fine-tuning: pre-training of the encoders, audio alignment, audio-visual SFT; each stage is a YAML file.

    torchrun recipes/sft.py --config recipes/configs/pretrain_1_objects.yaml

Reads references (or renders synthetic clips), trains the parts that `trainable` and `lora` name, writes the model to
`out`, and evaluates it on held-out clips. Run the same command again to resume a killed run.
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
from salmonn.caption.processor import Processor
from salmonn.caption.prompt import LIST_EVENTS, train_tokenizer
from salmonn.config import MAY_CHANGE, run_recipe
from salmonn.conversations import Conversation, is_conversation_file, read_conversations
from salmonn.files import write_json
from salmonn.model.config import PLAIN_PROMPTS, SalmonnConfig
from salmonn.model.families import get_family
from salmonn.model.families.salmonn2 import tiny_config
from salmonn.model.layout import ClipFeatures, ClipInputs
from salmonn.model.loading import CONFIG_NAME, load_config, load_network, offline_config
from salmonn.model.lora import LoraConfig, attach_lora, merge_adapter
from salmonn.model.network import Network
from salmonn.preference.reward import make_judge
from salmonn.records import Modality, Reference
from salmonn.score.config import JudgeConfig
from salmonn.score.judge import Judge
from salmonn.synthetic.render import SynthConfig, sample_clip
from salmonn.train.checkpoint import checkpointed, load_trained
from salmonn.train.data import (
    ClipCache,
    ClipSet,
    ClipSource,
    SftBatches,
    SftTask,
    TrainingExample,
    all_texts,
    check_texts,
    conversation_examples,
    drop_sounds,
    heldout_config,
    make_examples,
    read_clips,
    render_clips,
    sft_loss,
)
from salmonn.train.dry_run import MemoryPlan, Workload, build_on_meta, clips_per_micro_batch, print_plan
from salmonn.train.encoding import cache_features, encode_clips
from salmonn.train.evaluate import ANSWERS_NAME, RATES_NAME, SCORES_NAME, evaluate, write_evaluation
from salmonn.train.feature_cache import FeatureCacheConfig, open_feature_cache
from salmonn.train.left_out import LeftOut, leave_out_unreadable
from salmonn.train.loop import FitConfig, FitContext, check_processes, fit
from salmonn.train.run_folder import RunConfig, is_missing, open_run, save_model
from salmonn.train.run_log import SUMMARY_NAME
from salmonn.train.run_steps import TRAINING_FILES, Step, choose_settings, fingerprint, flat_settings
from salmonn.train.sampling import CAPTIONS_NAME, SampleConfig
from salmonn.train.trackers import stop_tracker

log = logging.getLogger("sft")
TINY = "tiny"
NUM_TOKENIZER_SCENES = 1000
NOT_TRAINED_WITH = {"out", "heldout_clips", "heldout_references"}
MODEL_FILES = (CONFIG_NAME, "*.safetensors", "model.safetensors.index.json", "tokenizer*.json", "chat_template.jinja")
EVALUATION_FILES = (CAPTIONS_NAME, ANSWERS_NAME, SCORES_NAME, RATES_NAME, SUMMARY_NAME)


@dataclass(frozen=True, kw_only=True)
class SftConfig(RunConfig):
    """One stage of supervised fine-tuning.

    Args:
        model: folder or hub id of the model to start from; "tiny" for a toy model with random weights.
        references: JSONL of references to training videos, or a file of published conversations (docs/data.md), to
            which `tasks` does not apply; none renders synthetic clips.
        clips_dir: folder of synthetic clips.
        synth: synthetic training clips.
        heldout_references: references to held-out videos; none renders synthetic clips.
        heldout_clips: number of synthetic held-out clips, from a different seed; 0 to evaluate nothing.
        judge: judge of the captions of held-out clips.
        feature_cache: with a folder, the frozen encoders run once on each clip, before the first step and without
            dropout, which pays if clips are repeated; by default they run in each step.
        tasks: what is learned of each clip.
        single_modality_every: learn every n-th clip also from its frames alone and its audio alone, if `tasks` has
            tasks for them; the clips between are learned as a whole.
        trainable: prefixes of the names of the trained parts; "all" for everything.
        lora: adapter of the language model, merged at the end; none to train without one.
        fit: optimization.
        vocab_size: vocabulary size of the tokenizer of a model with random weights.
    """

    model: str = TINY
    references: Path | None = None
    heldout_references: Path | None = None
    clips_dir: Path = field(default=Path("run/clips"), metadata=MAY_CHANGE)
    synth: SynthConfig = field(default_factory=lambda: SynthConfig(clips=8000, seed=1))
    heldout_clips: int = 200
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    feature_cache: FeatureCacheConfig = field(default_factory=lambda: FeatureCacheConfig(folder=None))
    tasks: tuple[SftTask, ...] = ("caption", "questions", "visual_caption", "audio_caption")
    single_modality_every: int = 1
    trainable: tuple[str, ...] = ("all",)
    lora: LoraConfig | None = None
    fit: FitConfig = field(default_factory=FitConfig)
    vocab_size: int = 640

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.references and self.heldout_clips and not self.heldout_references:
            raise ValueError(
                "references are given without heldout_references, so the model would be evaluated on synthetic clips; "
                "move the lines of some videos (about a tenth) to a separate file, and pass it as "
                "--heldout-references, or pass --heldout-clips 0 to evaluate nothing"
            )


@dataclass(frozen=True)
class ConversationSet:
    """Published conversations, and the folder that their paths start from."""

    conversations: list[Conversation]
    root: Path


@dataclass(frozen=True)
class Run:
    """What training and evaluation share; `heldout` is None if nothing is evaluated."""

    config: SftConfig
    data: ClipSet | ConversationSet
    heldout: ClipSet | None
    judge: Judge
    left_out: LeftOut

    def open(self) -> None:
        """Open the run's folder, or raise ValueError if it holds results of other settings or clips."""
        open_run(self.config, plan_steps(self), name="sft")


def main(config: SftConfig) -> None:
    """Run one stage."""
    if config.dry_run:
        print_memory_plan(config)
        return
    dist.setup(deterministic=config.deterministic)
    check_processes(config.strategy, config.fit)
    # What can be wrong is found before anything is rendered, and before the folder is claimed.
    choose_trainable(build_on_meta(model_sizes(config)), config)
    judge = make_judge(config.judge, processes=dist.world_size())
    left_out = LeftOut(config.out, max_failures=config.max_failures)
    run = Run(config, load_data(config), load_heldout(config, judge), judge, left_out)
    run.open()
    if is_missing(config.out / CONFIG_NAME):
        captioner = train(run)
    else:
        log.info("%s is already trained", config.out)
        with checkpointed(config.out):  # deletes checkpoints that a killed process left
            captioner = None
    if run.heldout and is_missing(config.out / SUMMARY_NAME):
        measure(captioner or config.load_model(config.out), run.heldout, run)


def train(run: Run) -> Captioner:
    """Train, merge and save the model."""
    # Load.
    config, left_out = run.config, run.left_out
    captioner = load_model(config, run.data)
    choose_trainable(captioner.network, config)
    examples = to_examples(run.data, captioner, config)
    if config.strategy != "ddp":
        examples = require_one_modality(examples, strategy=config.strategy, hears=captioner.processor.family.hears)
    read_clip = clip_reader(captioner, examples, config.feature_cache, left_out)
    examples = [example for example in examples if example.clip not in left_out.sources]
    run.open()  # a checkpoint must not be of other clips

    # Train.
    batches = SftBatches(
        examples,
        captioner.processor,
        read_clip,
        batch_size=config.fit.batch_size,
        seed=config.seed,
        gradient_accumulation_steps=config.fit.gradient_accumulation_steps,
    )
    context = FitContext(config.out.name, config.out, config.seed, config.strategy)
    with checkpointed(config.out):
        checkpoint = fit(captioner.network, batches, sft_loss, config.fit.resolve(len(examples)), context=context)

        # Merge and save. Training took the network apart, so the weights go into a new one.
        del captioner.network
        gc.collect()
        captioner.network = initial_network(config, captioner.processor)
        choose_trainable(captioner.network, config)
        load_trained(captioner.network, checkpoint)
        if config.lora:
            merge_adapter(captioner.network)
        captioner.network.requires_grad_(False).eval()
        save_model(captioner, config.out)
    return captioner


def plan_steps(run: Run) -> list[Step]:
    """Return the two steps of a stage, each with the settings that its results depend on."""
    config, settings = run.config, flat_settings(run.config)
    heldout = {run.heldout.source(one) for one in run.heldout.references} if run.heldout else set()
    evaluation = choose_settings(settings, "judge")
    if run.heldout:
        evaluation["heldout_references"] = fingerprint(run.heldout.references)
    # Clips are compared by content: their files may move.
    training = {name: value for name, value in settings.items() if name not in NOT_TRAINED_WITH | evaluation.keys()}
    training["left_out"] = fingerprint(clip for clip in run.left_out.clips if clip.source not in heldout)
    if config.references:
        records = run.data.references if isinstance(run.data, ClipSet) else run.data.conversations
        training = {name: value for name, value in training.items() if not name.startswith("synth.")}
        training["references"] = fingerprint(records)
    return [
        Step("model", training, (*MODEL_FILES, *TRAINING_FILES), CONFIG_NAME),
        Step("heldout", evaluation, EVALUATION_FILES, SUMMARY_NAME, needs=("model",)),
    ]


def model_sizes(config: SftConfig) -> SalmonnConfig:
    """Return the config of the model to start from."""
    sizes = tiny_config(vocab_size=config.vocab_size, eos_token_id=2, pad_token_id=0)
    if config.model != TINY:
        # A dry run needs no download.
        sizes = offline_config(config.model) if config.dry_run else load_config(config.model)
    return get_family(sizes).with_frames(config.frames)


def print_memory_plan(config: SftConfig) -> None:
    """Print the memory that the stage would need."""
    sizes = model_sizes(config)
    network = build_on_meta(sizes)
    with torch.device("meta"):
        choose_trainable(network, config)
    # Tasks about both modalities form one example, if there are any.
    modalities: list[Modality] = [
        modality for modality in ("visual", "audio") if any(task.startswith(modality) for task in config.tasks)
    ]
    num_both = sum(not task.startswith(("visual_", "audio_")) for task in config.tasks)
    workload = Workload(
        clips=clips_per_micro_batch(config.fit),
        answers=max(num_both, 1),
        modality="both" if num_both or not modalities else modalities[0],
    )
    plan = MemoryPlan(network, sizes, placement=config.placement, fit=config.fit, work=workload)
    print_plan(plan, title=f"SFT of {config.model}")


def load_data(config: SftConfig) -> ClipSet | ConversationSet:
    """Read references or published conversations, or render synthetic clips.

    Raises:
        ValueError: a reference lacks a caption that is learned, or a text contains a special token.
    """
    path = config.references
    if path is None:
        return render_clips(config.clips_dir, config.synth)
    # A toy model gets a tokenizer for these texts.
    processor = None if config.model == TINY else Processor.load(config.model, config=model_sizes(config))

    def check(record: Reference | Conversation) -> None:
        if processor:
            check_texts(record, processor)

    def check_reference(reference: Reference) -> None:
        for task in ("caption", "human_caption"):
            if task in config.tasks and not getattr(reference, task).strip():
                raise ValueError(f"{reference.video} has no {task}; add it, or remove {task} from tasks")
        check(reference)

    if is_conversation_file(path):
        return ConversationSet(read_conversations(path, check=check), path.parent)
    return read_clips(path, check=check_reference)


def load_heldout(config: SftConfig, judge: Judge) -> ClipSet | None:
    """Read or render the held-out clips; None if the model is not to be evaluated.

    Raises:
        ValueError: the judge cannot use a reference.
    """
    if config.heldout_references:
        return read_clips(config.heldout_references, check=judge.check)
    if config.heldout_clips:
        return render_clips(config.clips_dir, heldout_config(config.synth, clips=config.heldout_clips))
    return None


def to_examples(data: ClipSet | ConversationSet, captioner: Captioner, config: SftConfig) -> list[TrainingExample]:
    """Return one epoch of examples."""
    if isinstance(data, ConversationSet):
        with_turns = [one for one in data.conversations if one.turns]
        if num_preferences := len(data.conversations) - len(with_turns):
            log.info("skipped %d preferences among the conversations; recipes/dpo.py uses them", num_preferences)
        return conversation_examples(with_turns, root=data.root)
    audible = [task for task in config.tasks if task.split("_")[0] not in ("visual", "audio")]
    if audible and not captioner.processor.family.hears:
        log.warning(
            "the model has no audio input, but the tasks %s are about sounds too; visual_caption and others "
            "are about what can be seen",
            ", ".join(audible),
        )
    return make_examples(
        data,
        config.tasks,
        prompts=captioner.processor.config.prompts or PLAIN_PROMPTS,
        single_modality_every=config.single_modality_every,
    )


def load_model(config: SftConfig, data: ClipSet | ConversationSet) -> Captioner:
    """Load the model to start from, or create a toy model with a tokenizer for this data."""
    if config.model != TINY:
        return config.load_model(config.model)
    # Full scenes besides this stage's clips, so that words of later stages are not split into single characters.
    world = [sample_clip(SynthConfig(seed=config.seed), index=index)[1] for index in range(NUM_TOKENIZER_SCENES)]
    if isinstance(data, ConversationSet):
        texts = [text for one in data.conversations for turn in one.turns for text in (turn.prompt, turn.answer)]
    else:
        texts = all_texts(data.references)
    texts = [*texts, *all_texts(world), *PLAIN_PROMPTS.values(), LIST_EVENTS]
    tokenizer = train_tokenizer(texts, vocab_size=config.vocab_size)
    sizes = tiny_config(
        vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    processor = Processor(tokenizer, config=get_family(sizes).with_frames(config.frames), reader=config.reader)
    return Captioner(initial_network(config, processor), processor)


def require_one_modality(
    examples: Sequence[TrainingExample], *, strategy: str, hears: bool = True
) -> list[TrainingExample]:
    """Return examples for a strategy that shards the model: all processes must use the same parts in each step.

    A clip without the video or audio that its example needs then stops the run when it is read. A model that does not
    hear uses the same parts for all examples.

    Raises:
        ValueError: the strategy cannot train the encoders, or the examples use different modalities.
    """
    if strategy == "zero3":
        raise ValueError("strategy zero3 cannot train the encoders; use fsdp2, which shards weights too")
    if not hears:
        return list(examples)
    modalities = sorted({example.clip.modality for example in examples})
    if len(modalities) > 1:
        raise ValueError(
            f"the {len(examples)} examples use the modalities {' and '.join(modalities)}, but with strategy {strategy} "
            "all processes must use the same parts of the model in each step; choose tasks of one modality, or "
            "strategy ddp"
        )
    return [
        replace(example, clip=replace(example.clip, needs_both=example.clip.modality == "both")) for example in examples
    ]


def initial_network(config: SftConfig, processor: Processor) -> Network:
    """Load the weights to start from, or initialize those of a toy model."""
    if config.model != TINY:
        return load_network(config.model, placement=config.placement)
    torch.manual_seed(config.seed)
    network = Network(processor.config)
    # Initial position embeddings are a tenth of the patch embeddings; without scaling, positions of shapes would not be
    # learned for hundreds of steps.
    network.get_parameter("vision.encoder.embeddings.position_embedding.weight").data.mul_(8)
    return network.to(dist.device())


def choose_trainable(network: Network, config: SftConfig) -> None:
    """Make the chosen parts and the adapter require gradients, and nothing else.

    Raises:
        ValueError: no parameter has a name with one of the prefixes.
    """
    network.requires_grad_("all" in config.trainable)
    for prefix in config.trainable:
        parameters = [value for name, value in network.named_parameters() if name.startswith(prefix)]
        if not parameters and prefix != "all":
            raise ValueError(f"no part of the network is named {prefix!r}; names start with vision., audio. or lm.")
        for parameter in parameters:
            parameter.requires_grad = True
    if config.lora:
        chosen = [parameter for parameter in network.parameters() if parameter.requires_grad]
        attach_lora(network, config.lora, seed=config.seed)  # freezes everything but the adapter
        for parameter in chosen:
            parameter.requires_grad = True


def clip_reader(
    captioner: Captioner, examples: Sequence[TrainingExample], cache: FeatureCacheConfig, left_out: LeftOut
) -> Callable[[ClipSource], ClipInputs | ClipFeatures]:
    """Return a function that reads clips from files, or that returns their cached features if the cache has a folder.

    If some clips may be unreadable, or features are cached, all clips are read first.

    Raises:
        ValueError: features would be cached, but the encoders or the embeddings are trained.
    """
    clips = [example.clip for example in examples]
    if cache.folder is None:
        read = ClipCache(captioner.processor)
        if left_out.max_failures:
            leave_out_unreadable(clips, read, left_out, name="training clips")
        return read
    embeddings = captioner.network.lm.get_input_embeddings().weight
    towers = [tower for tower in (captioner.network.vision, captioner.network.audio) if tower is not None]
    encoders = [value for tower in towers for value in tower.parameters()]
    if any(value.requires_grad for value in (*encoders, embeddings)):
        raise ValueError(
            "features can be cached only if encoders and embeddings are frozen, but trainable names some of them; omit "
            "feature_cache.folder, or train only a LoRA"
        )
    cache_on_disk = open_feature_cache(cache, captioner)
    features = encode_clips(captioner, clips, name="training clips", cache=cache_on_disk, left_out=left_out)
    return features.__getitem__


def measure(captioner: Captioner, heldout: ClipSet, run: Run) -> None:
    """Evaluate the model on the held-out clips, and write captions, scores and summary."""
    config = run.config
    cache = open_feature_cache(config.feature_cache, captioner)
    if not captioner.processor.family.hears:
        heldout = drop_sounds(heldout)
    (clips,) = cache_features(captioner, heldout, name="held-out clips", cache=cache, left_out=run.left_out)
    result = evaluate(captioner, clips, judge=run.judge, sampling=SampleConfig(), name="held-out")
    if dist.is_main():
        write_evaluation(config.out, result, judge=run.judge)
        write_json(config.out / SUMMARY_NAME, asdict(result.rates))
        log.info("held-out: %s", json.dumps(asdict(result.rates)))


if __name__ == "__main__":
    run_recipe(main, SftConfig, description=__doc__, on_error=dist.abort, on_end=stop_tracker)
