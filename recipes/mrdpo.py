"""Multi-round DPO (mrDPO): a captioner that improves by rating its own captions, then rebirth.

    torchrun recipes/mrdpo.py --config recipes/configs/mrdpo.yaml

Each round samples captions of the training clips, rates them against the clips' events, pairs the best with the worst,
trains a fresh LoRA with guided DPO and merges it: the merged model is the next round's policy and reference policy.
Rebirth then fine-tunes the model from before all rounds on the captions of the best round's model. Every stage writes
to a folder of `out`; run the same command again to resume a killed run.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from torch import nn

from salmonn import dist
from salmonn.caption.captioner import SHIPPED_MODEL, Captioner
from salmonn.caption.processor import Processor
from salmonn.config import MAY_CHANGE, run_recipe
from salmonn.model.config import PLAIN_PROMPTS
from salmonn.model.loading import load_config
from salmonn.model.lora import LoraConfig, attach_lora
from salmonn.model.network import Network
from salmonn.preference.losses import LossConfig, make_loss
from salmonn.preference.rating import Reward
from salmonn.preference.reward import RewardConfig, make_judge, make_reward
from salmonn.preference.selection import SelectionConfig, make_selector
from salmonn.records import Comparison, Reference, read_json, read_records, write_json
from salmonn.score.config import JudgeConfig
from salmonn.score.judge import Judge
from salmonn.score.metrics import Rates
from salmonn.synthetic.render import SynthConfig
from salmonn.train.checkpoint import checkpointed, require_free_space
from salmonn.train.data import (
    ClipSet,
    ClipSource,
    SftBatch,
    SftBatches,
    check_texts,
    heldout_config,
    make_examples,
    read_clips,
    render_clips,
    sft_loss,
)
from salmonn.train.dry_run import check_adapters, print_adapter_plan
from salmonn.train.evaluate import RATES_NAME, SampleConfig, cache_features, evaluate, sample_captions, write_evaluation
from salmonn.train.feature_cache import open_feature_cache
from salmonn.train.kl import KLProbe
from salmonn.train.loop import Batches, Callback, FitConfig, FitContext, autocast, check_processes, fit
from salmonn.train.plots import plot_summary
from salmonn.train.preference import (
    MixedBatches,
    MixedBatchLoss,
    PreferenceBatch,
    PreferenceBatches,
    PreferenceExample,
    compute_reference_logps,
)
from salmonn.train.rounds import (
    PAIRS_NAME,
    EarlyStopConfig,
    RoundFailedError,
    best_round,
    load_or_select,
    rate_captions,
    require_margin,
    require_pairs,
    stop_reason,
)
from salmonn.train.run_folder import RunConfig, is_complete, is_missing, merge_checkpoint, num_bytes, open_run
from salmonn.train.run_log import SUMMARY_NAME, RunSummary, log_summary, print_summary, stage_name

log = logging.getLogger("mrdpo")
ModelPath = Path | str  # folder or hub id


@dataclass(frozen=True)
class KLConfig:
    """Measurement of the KL divergence from the start of a round, on held-out reference captions.

    Args:
        num_clips: number of held-out clips; 0 to measure nothing.
        every: steps between two measurements.
    """

    num_clips: int = 16
    every: int = 10

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"kl.every must be at least 1, got {self.every}")


@dataclass(frozen=True)
class RebirthConfig:
    """Fine-tuning on the best model's captions of the training clips, and on questions.

    Args:
        start: model to fine-tune: the run's start, or the best round's model.
        lora: adapter, merged at the end.
        fit: optimization.
    """

    start: Literal["start", "best"] = "start"
    lora: LoraConfig = field(default_factory=LoraConfig)
    fit: FitConfig = field(default_factory=lambda: FitConfig(steps=100, learning_rate=1e-3, warmup_ratio=0.1))


@dataclass(frozen=True, kw_only=True)
class MrDpoConfig(RunConfig):
    """A run of mrDPO.

    Args:
        model: folder or hub id of the model to start from; the built-in toy model by default.
        references: JSONL of references (events, caption, questions) to training videos; none renders synthetic clips.
        heldout_references: references to held-out videos; none renders synthetic clips.
        clips_dir: folder of synthetic clips.
        synth: synthetic training clips; held-out clips are like them, from a different seed.
        heldout_clips: number of synthetic held-out clips.
        max_failures: number of clips that may be unreadable; they are listed and left out, before anything is sampled.
        kl: measurement of the KL divergence; may change when a run is resumed.
        rounds: number of rounds of DPO.
        fresh_pairs: sample and pair captions in each round; otherwise all rounds train on the first round's pairs.
        reference_policy: policy that rewards are relative to: the start of the round, or the start of the run.
        qa_fraction: fraction of the last round's examples that are questions on the training clips.
        sampling: sampling of captions.
        judge: judge of captions.
        reward: reward that captions are rated by.
        selection: selection of preference pairs.
        loss: loss of the rounds.
        lora: fresh adapter of each round.
        fit: optimization of each round.
        early_stopping: rules that stop the rounds early.
        rebirth: the last stage; none to skip it.
    """

    out: Path = Path("run")
    model: str = str(SHIPPED_MODEL)
    references: Path | None = None
    heldout_references: Path | None = None
    clips_dir: Path = Path("run/clips")
    synth: SynthConfig = field(default_factory=lambda: SynthConfig(clips=320, seed=11))
    heldout_clips: int = 200
    max_failures: int = field(default=0, metadata=MAY_CHANGE)
    kl: KLConfig = field(default_factory=KLConfig, metadata=MAY_CHANGE)
    rounds: int = 3
    fresh_pairs: bool = True
    reference_policy: Literal["round_start", "run_start"] = "round_start"
    qa_fraction: float = 0.0
    sampling: SampleConfig = field(default_factory=SampleConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    fit: FitConfig = field(
        default_factory=lambda: FitConfig(steps=60, learning_rate=2e-4, warmup_ratio=0.1, batch_size=16)
    )
    early_stopping: EarlyStopConfig = field(default_factory=EarlyStopConfig)
    rebirth: RebirthConfig | None = field(default_factory=RebirthConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")
        if self.references and not self.heldout_references:
            raise ValueError(
                "references are given without heldout_references, so synthetic clips would decide which round is best; "
                "move the lines of some videos (about a tenth) to a file of their own, and pass it as "
                "--heldout-references"
            )
        if self.sampling.num_samples < 2 or not self.sampling.temperature:
            raise ValueError(
                "pairs need different captions of a clip: sampling.num_samples must be at least 2 and "
                f"sampling.temperature above 0, got {self.sampling.num_samples} and {self.sampling.temperature}"
            )
        if not 0 <= self.qa_fraction < 1 or (self.qa_fraction and not 0 < self.num_questions < self.fit.batch_size):
            raise ValueError(
                f"qa_fraction {self.qa_fraction} of batch_size {self.fit.batch_size} leaves no question or no pair in "
                "a step; choose a fraction from 0 to 1 that leaves both, or 0"
            )

    @property
    def num_questions(self) -> int:
        """Number of questions in each step of the last round."""
        return round(self.qa_fraction * self.fit.batch_size)


@dataclass(frozen=True)
class Run:
    """What all stages of a run share."""

    config: MrDpoConfig
    train: ClipSet
    heldout: ClipSet
    judge: Judge
    reward: Reward


def main(config: MrDpoConfig) -> None:
    """Run all rounds and rebirth."""
    if config.dry_run:
        print_memory_plan(config)
        return
    dist.setup()
    check_processes(config.strategy, config.fit, *([config.rebirth.fit] if config.rebirth else []))
    # What can be wrong is found before anything is rendered, and before the folder is claimed.
    sizes = load_config(config.model, frames=config.frames)
    check_adapters(sizes, config.lora, *([config.rebirth.lora] if config.rebirth else []))
    processor = Processor.load(config.model, config=sizes)
    judge = make_judge(config.judge, processes=dist.world_size())
    reward = make_reward(config.reward, judge=judge)
    train, heldout = load_data(config, reward, processor)
    open_run(config.out, config, name="mrdpo")
    captioner = config.load_model(config.model)
    # Both sets at once, so that the cache does not evict the features of one for those of the other.
    cache = open_feature_cache(config.feature_cache, captioner)
    train, heldout = cache_features(
        captioner, train, heldout, name="clips", cache=cache, max_failures=config.max_failures
    )
    if not (train.references and heldout.references):
        raise ValueError("no training clip or no held-out clip can be read; replace the files that are listed above")
    del captioner
    run = Run(config, train, heldout, judge, reward)
    summary = RunSummary(sft=measure(config.model, config.out / "sft", run))
    best = run_rounds(run, summary)
    if config.rebirth and best:
        reborn = run_rebirth(best, run, config.rebirth)
        summary.rebirth = measure(reborn, config.out / "rebirth", run, summary)
        report(run, summary)
    if dist.is_main():
        write_json(config.out / SUMMARY_NAME, asdict(summary))
        plot_summary(summary, config.out / "summary.png")
        log.info("wrote %s and summary.png", config.out / SUMMARY_NAME)
    dist.barrier()


def print_memory_plan(config: MrDpoConfig) -> None:
    """Print the memory that a round and rebirth would need."""
    model, frames, placement = config.model, config.frames, config.placement
    print_adapter_plan(
        model,
        frames=frames,
        placement=placement,
        lora=config.lora,
        fit=config.fit,
        answers=3,
        title="guided DPO",
        batch_size=config.sampling.batch_size,
    )
    if rebirth := config.rebirth:
        # A caption and the questions on the clip, assumed to be as long in total.
        print_adapter_plan(
            model, frames=frames, placement=placement, lora=rebirth.lora, fit=rebirth.fit, answers=2, title="rebirth"
        )


def load_data(config: MrDpoConfig, reward: Reward, processor: Processor) -> tuple[ClipSet, ClipSet]:
    """Load or render the training and the held-out clips.

    Raises:
        ValueError: captions of them cannot be rated, they lack the questions or captions that the run needs, or a text
            contains a special token.
    """

    def check(reference: Reference) -> None:
        reward.check(reference)
        check_texts(reference, processor)

    def check_train(reference: Reference) -> None:
        if config.loss.ce_weight and not reference.caption.strip():
            raise ValueError(
                f"{reference.video} has no caption, which is the ground truth of guided DPO; add it, or set "
                "--loss.ce-weight 0"
            )
        check(reference)

    heldout_synth = heldout_config(config.synth, clips=config.heldout_clips)
    train, heldout = (
        read_clips(path, check=check_one) if path else render_clips(config.clips_dir, synth)
        for path, synth, check_one in (
            (config.references, config.synth, check_train),
            (config.heldout_references, heldout_synth, check),
        )
    )
    if config.num_questions and not any(reference.questions for reference in train.references):
        raise ValueError(
            f"qa_fraction is {config.qa_fraction}, but the references have no questions; add some, or set 0"
        )
    num_clips = config.kl.num_clips
    if num_clips and not any(reference.caption.strip() for reference in heldout.head(num_clips).references):
        raise ValueError(
            f"the first {num_clips} held-out references have no caption to measure the KL divergence on; add captions, "
            "or set kl.num_clips 0"
        )
    return train, heldout


def run_rounds(run: Run, summary: RunSummary) -> Path | None:
    """Run all rounds and fill the summary; returns the best model, if a round improved on the start."""
    config = run.config
    policy: ModelPath = config.model
    for number in range(1, config.rounds + 1):
        try:
            policy = run_round(number, policy, run)
        except RoundFailedError as error:
            if number == 1:
                raise
            summary.stopped = str(error)
            break
        summary.rounds.append(measure(policy, config.out / f"round_{number}", run, summary))
        report(run, summary)
        if reason := stop_reason(summary, config.early_stopping):
            summary.stopped = reason
            break
    if summary.stopped:
        log.warning("stopped early: %s", summary.stopped)
    best = best_round(summary)
    if best is None:
        log.warning("no round improved on the initial model; skipping rebirth")
        return None
    summary.best = f"round_{best}"
    return config.out / summary.best / "merged"


def run_round(number: int, policy: ModelPath, run: Run) -> Path:
    """Run one round of mrDPO and return the merged model that starts the next.

    Each step writes its result to `round_<number>/`; a restarted run loads what exists.

    Raises:
        RoundFailedError: there are too few pairs, or the model has not learned to prefer the chosen captions.
    """
    config, folder = run.config, run.config.out / f"round_{number}"
    seed = config.seed * 1000 + number
    if is_complete(folder):
        return folder / "merged"

    # Load.
    captioner = config.load_model(policy)

    # Sample, rate and select. Only the first round does if all rounds train on its pairs.
    if config.fresh_pairs or number == 1:
        require_free_space(config.out, num_bytes(captioner), what=f"the model of {folder.name}")  # before hours of work
        captions = sample_captions(
            captioner, run.train, config.sampling, name=f"{folder.name}: sampling", seed=seed, folder=folder
        )
        ratings = rate_captions(captions, run.train, reward=run.reward, folder=folder)
        selector = make_selector(config.selection)
        pairs = load_or_select(captions, ratings, run.train, selector=selector, source=run.reward.name, folder=folder)
    else:
        pairs = read_records(config.out / "round_1" / PAIRS_NAME, Comparison)
    require_pairs(pairs, config.early_stopping, batch_size=config.fit.batch_size, name=folder.name)

    # Train a fresh LoRA. Rewards are relative to the reference policy, which scores each pair once, in advance.
    attach_lora(captioner.network, config.lora, seed=seed)
    loss = make_loss(config.loss)
    examples = [
        PreferenceExample(pair, run.train.features[ClipSource.of_comparison(pair, root=run.train.root)])
        for pair in pairs
    ]
    with autocast(config.fit.precision):
        reference_logps = compute_reference_logps(
            load_reference_policy(number, captioner, config),
            examples,
            captioner.processor,
            roles=loss.reference_roles,
            batch_size=config.fit.micro_batch_size,
            folder=folder,
        )
    num_questions = config.num_questions if number == config.rounds else 0
    preferences = PreferenceBatches(
        examples,
        reference_logps,
        captioner.processor,
        roles=loss.roles,
        batch_size=config.fit.batch_size - num_questions,
        seed=seed,
        gradient_accumulation_steps=config.fit.gradient_accumulation_steps,
    )
    batches: Batches[PreferenceBatch | SftBatch] = preferences
    if num_questions:
        batches = MixedBatches(preferences, qa_batches(captioner, run, seed=seed, num_questions=num_questions))
    batch_loss = MixedBatchLoss(loss, qa_fraction=num_questions / config.fit.batch_size)
    context = FitContext(f"{folder.name}: guided DPO", folder, seed, config.strategy, kl_callback(captioner, run))
    with checkpointed(folder):
        checkpoint = fit(captioner.network, batches, batch_loss, config.fit.resolve(len(pairs)), context=context)
        require_margin(folder, config.early_stopping)

        # Merge and save. Free the network first: merging loads the policy again, and a GPU may hold only one.
        del captioner, preferences, batches, context
        # All rounds are added to the start, and their sum is rounded once.
        earlier = adapters_of_rounds(number - 1, config)
        return merge_checkpoint(
            checkpoint, base=config.model, earlier=earlier, lora=config.lora, config=config, folder=folder
        )


def adapters_of_rounds(last: int, config: MrDpoConfig) -> list[Path]:
    """Return the folders of the adapters of the first rounds, which the merged model of the last one consists of."""
    return [config.out / f"round_{number}" / "adapter" for number in range(1, last + 1)]


def load_reference_policy(number: int, captioner: Captioner, config: MrDpoConfig) -> Network:
    """Return the network that is the reference policy while its adapter is disabled."""
    if config.reference_policy == "round_start" or number == 1:
        return captioner.network
    start = config.load_model(config.model).network
    attach_lora(start, config.lora, seed=0)
    return start


def qa_batches(captioner: Captioner, run: Run, *, seed: int, num_questions: int) -> SftBatches:
    """Return batches of questions on the training clips, for the ranks that follow those of the pairs."""
    fit_config = run.config.fit
    return SftBatches(
        make_examples(run.train, ("questions",)),
        captioner.processor,
        run.train.features.__getitem__,
        batch_size=num_questions,
        seed=seed,
        gradient_accumulation_steps=fit_config.gradient_accumulation_steps,
        first_rank=fit_config.batch_size - num_questions,
    )


def make_kl_probe(captioner: Captioner, run: Run) -> KLProbe:
    """Return the held-out clips that the KL divergence is measured on."""
    return KLProbe(
        run.heldout.head(run.config.kl.num_clips),
        captioner.processor,
        prompt=captioner.default_prompt(),
        batch_size=run.config.fit.micro_batch_size,
    )


def kl_callback(captioner: Captioner, run: Run) -> Callback | None:
    """Return a callback that measures the KL divergence from the start of the round."""
    config = run.config
    if not config.kl.num_clips:
        return None
    probe, network = make_kl_probe(captioner, run), captioner.network

    def measure_kl(model: nn.Module) -> Mapping[str, float]:
        with autocast(config.fit.precision):
            return {"kl": probe.kl_from_reference_policy(model, network)}

    return Callback(measure_kl, every=config.kl.every)


def run_rebirth(best: Path, run: Run, rebirth: RebirthConfig) -> Path:
    """Fine-tune the start on the best model's captions of the training clips and on questions; returns the model."""
    config, folder = run.config, run.config.out / "rebirth"
    if is_complete(folder):
        return folder / "merged"
    teacher = config.load_model(best)
    captions = sample_captions(
        teacher, run.train, config.sampling.greedy(), name="rebirth: captions", seed=config.seed, folder=folder
    )
    del teacher
    base = config.model if rebirth.start == "start" else best
    captioner = config.load_model(base)
    attach_lora(captioner.network, rebirth.lora, seed=config.seed)
    references = [
        replace(reference, caption=caption.text)
        for reference, caption in zip(run.train.references, captions, strict=True)
    ]
    examples = make_examples(
        replace(run.train, references=references),
        ("caption", "questions"),
        prompts=captioner.processor.config.prompts or PLAIN_PROMPTS,
    )
    batches = SftBatches(
        examples,
        captioner.processor,
        run.train.features.__getitem__,
        batch_size=rebirth.fit.batch_size,
        seed=config.seed,
        gradient_accumulation_steps=rebirth.fit.gradient_accumulation_steps,
    )
    context = FitContext("rebirth", folder, config.seed, config.strategy)
    with checkpointed(folder):
        checkpoint = fit(captioner.network, batches, sft_loss, rebirth.fit.resolve(len(examples)), context=context)
        del captioner, batches
        last = 0 if rebirth.start == "start" else int(best.parent.name.removeprefix("round_"))
        return merge_checkpoint(
            checkpoint,
            base=config.model,
            earlier=adapters_of_rounds(last, config),
            lora=rebirth.lora,
            config=config,
            folder=folder,
        )


def measure(model: ModelPath, folder: Path, run: Run, summary: RunSummary | None = None) -> Rates:
    """Evaluate a stage's model on the held-out clips, or load the result from `heldout/`.

    With a summary of the stages before, also measure its KL divergence from the run's start.

    Args:
        model: folder or hub id of the model.
        folder: folder of the stage.
        run: clips and judge.
        summary: gets the KL divergence.
    """
    config, results = run.config, folder / "heldout"
    kl_path = results / f"kl_{config.kl.num_clips}.json"
    needs_rates = is_missing(results / RATES_NAME)
    needs_kl = bool(summary and config.kl.num_clips) and is_missing(kl_path)
    if needs_rates or needs_kl:
        captioner = config.load_model(model)
        if needs_rates:
            result = evaluate(captioner, run.heldout, judge=run.judge, sampling=config.sampling, name=folder.name)
            if dist.is_main():
                write_evaluation(results, result, judge=run.judge)
        if needs_kl:
            start = config.load_model(config.model).network
            kl = make_kl_probe(captioner, run).kl_between(captioner.network, start)
            if dist.is_main():
                write_json(kl_path, kl)
        dist.barrier()
    rates = Rates(**read_json(results / RATES_NAME))
    log.info("%s: total %.3f, questions %s", folder.name, rates.total, rates.qa_accuracy)
    if summary and config.kl.num_clips:
        summary.kl[stage_name(folder.name)] = read_json(kl_path)
    return rates


def report(run: Run, summary: RunSummary) -> None:
    """Show the stages so far in the terminal and in TensorBoard."""
    if dist.is_main():
        log_summary(run.config.out, summary)
        print_summary(summary)


if __name__ == "__main__":
    run_recipe(main, MrDpoConfig, description=__doc__, on_error=dist.abort)
