"""Multi-round DPO (mrDPO): a captioner that improves by rating its own captions, then rebirth.

    torchrun recipes/mrdpo.py --config recipes/configs/mrdpo.yaml

Each round samples captions of the training clips, rates them against the clips' events, pairs the best with the worst,
trains a fresh LoRA with guided DPO and merges it: the merged model is the next round's policy and reference policy.
Rebirth then fine-tunes the model from before all rounds on the captions of the best round's model. Every stage writes
to a folder of `out`; run the same command again to resume a killed run.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from torch import nn

from salmonn import dist
from salmonn.caption.captioner import Captioner
from salmonn.caption.processor import Processor
from salmonn.config import run_recipe
from salmonn.model.config import PLAIN_PROMPTS
from salmonn.model.loading import load_config
from salmonn.model.lora import LoraConfig, attach_lora
from salmonn.model.network import Network
from salmonn.preference.groups import make_groups
from salmonn.preference.losses import Role, make_loss
from salmonn.preference.rating import Rating
from salmonn.preference.reward import JudgeReward, make_judge, make_reward
from salmonn.preference.reward_model import ModelReward
from salmonn.preference.selection import make_selector
from salmonn.records import Caption, Comparison, read_json, read_records, write_json
from salmonn.score.judge import Judge
from salmonn.score.metrics import Rates
from salmonn.train.checkpoint import checkpointed, require_free_space
from salmonn.train.data import (
    ClipSet,
    ClipSource,
    SftBatch,
    SftBatches,
    make_examples,
    sft_loss,
)
from salmonn.train.dry_run import check_adapters, print_adapter_plan
from salmonn.train.evaluate import RATES_NAME, cache_features, evaluate, sample_captions, write_evaluation
from salmonn.train.feature_cache import open_feature_cache
from salmonn.train.kl import KLProbe
from salmonn.train.left_out import LeftOut
from salmonn.train.loop import Batches, Callback, FitConfig, FitContext, autocast, check_processes, fit
from salmonn.train.mrdpo import MrDpoConfig, RebirthConfig, load_data, plan_steps
from salmonn.train.plots import plot_summary
from salmonn.train.preference import (
    Example,
    GroupExample,
    MixedBatches,
    MixedBatchLoss,
    PreferenceBatch,
    PreferenceBatches,
    compute_reference_logps,
    make_preference_examples,
)
from salmonn.train.reward_rounds import RewardRounds, require_labels, require_model
from salmonn.train.rounds import (
    PAIRS_NAME,
    RoundFailedError,
    best_round,
    load_or_select,
    over_optimization,
    rate_captions,
    require_examples,
    require_margin,
    stop_reason,
)
from salmonn.train.run_folder import is_complete, is_missing, merge_checkpoint, num_bytes, open_run
from salmonn.train.run_log import (
    REWARD_ROUND_NAME,
    SUMMARY_NAME,
    RewardRound,
    RunSummary,
    log_summary,
    print_summary,
    stage_name,
)

log = logging.getLogger("mrdpo")
ModelPath = Path | str  # folder or hub id


@dataclass(frozen=True)
class Run:
    """What all stages of a run share."""

    config: MrDpoConfig
    train: ClipSet
    heldout: ClipSet
    judge: Judge
    reward: JudgeReward

    def folder(self, number: int) -> Path:
        """Return the folder of a round."""
        return self.config.out / f"round_{number}"

    def seed(self, number: int) -> int:
        """Return the seed of a round."""
        return self.config.seed * 1000 + number


def main(config: MrDpoConfig) -> None:
    """Run all rounds and rebirth."""
    if config.dry_run:
        print_memory_plan(config)
        return
    dist.setup()
    trainings = list_trainings(config)
    check_processes(config.strategy, *(optimization for _, optimization in trainings))
    # What can be wrong is found before anything is rendered, and before the folder is claimed.
    sizes = load_config(config.model, frames=config.frames)
    check_adapters(sizes, *(lora for lora, _ in trainings))
    processor = Processor.load(config.model, config=sizes)
    judge = make_judge(config.judge, processes=dist.world_size())
    reward = make_reward(config.reward, judge=judge)
    rating_file = ModelReward.file_name if config.reward.kind == "model" else reward.file_name
    train, heldout = load_data(config, reward, processor)
    left_out = LeftOut(config.out, max_failures=config.max_failures)
    train, heldout = left_out.remove_from(train), left_out.remove_from(heldout)
    open_run(config, plan_steps(config, train, heldout, rating_file=rating_file), name="mrdpo")
    captioner = config.load_model(config.model)
    require_model(config.reward, captioner)
    # Both sets at once, so that the cache does not evict the features of one for those of the other.
    cache = open_feature_cache(config.feature_cache, captioner)
    train, heldout = cache_features(captioner, train, heldout, name="clips", cache=cache, left_out=left_out)
    if config.reward.kind == "model":
        require_labels(train.references, reward, config.reward)
    if not (train.references and heldout.references):
        raise ValueError("no training clip or no held-out clip can be read; replace the files that are listed above")
    # Clips that became unreadable must not be part of existing results.
    open_run(config, plan_steps(config, train, heldout, rating_file=rating_file), name="mrdpo")
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


def list_trainings(config: MrDpoConfig) -> list[tuple[LoraConfig, FitConfig]]:
    """Return adapter and optimization of everything that a run trains an adapter for."""
    trainings, reward = [(config.lora, config.fit)], config.reward_training
    if config.rebirth:
        trainings.append((config.rebirth.lora, config.rebirth.fit))
    if config.reward.kind == "model" and reward.lora:
        trainings.append((reward.lora, reward.fit))
    return trainings


def print_memory_plan(config: MrDpoConfig) -> None:
    """Print the memory that a round and rebirth would need."""
    model, frames, placement = config.model, config.frames, config.placement
    print_adapter_plan(
        model,
        frames=frames,
        placement=placement,
        lora=config.lora,
        fit=config.fit,
        answers=config.sampling.num_samples + 1 if config.loss.kind == "grpo" else 3,
        title=config.loss.title,
        batch_size=config.sampling.batch_size,
    )
    if rebirth := config.rebirth:
        # A caption and the questions on the clip, assumed to be as long in total.
        print_adapter_plan(
            model, frames=frames, placement=placement, lora=rebirth.lora, fit=rebirth.fit, answers=2, title="rebirth"
        )


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
        summary.rounds.append(measure(policy, run.folder(number), run, summary))
        if not is_missing(run.folder(number) / REWARD_ROUND_NAME):
            summary.reward.append(RewardRound(**read_json(run.folder(number) / REWARD_ROUND_NAME)))
        report(run, summary)
        if reason := stop_reason(summary, config.early_stopping) or over_optimization(summary):
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
    config, folder, seed = run.config, run.folder(number), run.seed(number)
    if is_complete(folder):
        return folder / "merged"

    # Sample, rate, and select pairs or, for GRPO, group by clip.
    loss = make_loss(config.loss)
    examples = make_round_examples(number, policy, run, roles=loss.roles)
    captioner = config.load_model(policy)

    # Train a fresh LoRA. Rewards are relative to the reference policy, which scores each answer once, in advance.
    attach_lora(captioner.network, config.lora, seed=seed)
    with autocast(config.fit.precision):
        reference_logps = compute_reference_logps(
            load_reference_policy(number, captioner, config),
            examples,
            captioner.processor,
            roles=loss.reference_roles,
            batch_size=config.fit.micro_batch_size,
            per_token=loss.per_token,
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
    context = FitContext(
        f"{folder.name}: {config.loss.title}", folder, seed, config.strategy, kl_callback(captioner, run)
    )
    with checkpointed(folder):
        checkpoint = fit(captioner.network, batches, batch_loss, config.fit.resolve(len(examples)), context=context)
        require_margin(folder, config.early_stopping)

        # Merge and save. Free the network first: merging loads the policy again, and a GPU may hold only one.
        del captioner, preferences, batches, context
        # All rounds are added to the start, and their sum is rounded once.
        earlier = adapters_of_rounds(number - 1, config)
        return merge_checkpoint(
            checkpoint, base=config.model, earlier=earlier, lora=config.lora, config=config, folder=folder
        )


def make_round_examples(number: int, policy: ModelPath, run: Run, *, roles: Sequence[Role]) -> Sequence[Example]:
    """Make the examples of a round: preference pairs, or groups of samples for GRPO.

    Raises:
        RoundFailedError: there are too few.
    """
    config, train, name = run.config, run.train, run.folder(number).name
    if config.loss.kind == "grpo":
        captions, ratings, _ = sample_and_rate(number, policy, run)
        groups = make_groups(captions, ratings, train.by_video)
        log.info("%s: %d of %d clips have samples with different ratings", name, len(groups), len(train.references))
        require_examples(groups, config.early_stopping, batch_size=config.fit.batch_size, name=name)
        sources = [ClipSource(train.root / group.captions[0].video) for group in groups]
        return [GroupExample(group, train.features[source]) for group, source in zip(groups, sources, strict=True)]
    pairs = make_pairs(number, policy, run)
    require_examples(pairs, config.early_stopping, batch_size=config.fit.batch_size, name=name)
    sources = [ClipSource.of_comparison(pair, root=train.root) for pair in pairs]
    return make_preference_examples(
        [(pair, train.features[one]) for pair, one in zip(pairs, sources, strict=True)], roles
    )


def make_pairs(number: int, policy: ModelPath, run: Run) -> list[Comparison]:
    """Sample captions of the training clips, rate them and select preference pairs, or load those of an earlier run."""
    config = run.config
    if number > 1 and not config.fresh_pairs:
        return read_records(run.folder(1) / PAIRS_NAME, Comparison)
    captions, ratings, min_gap = sample_and_rate(number, policy, run)
    return load_or_select(
        captions,
        ratings,
        run.train,
        selector=make_selector(replace(config.selection, min_gap=min_gap)),
        subset=config.subset,
        repetition_fraction=config.selection.repetition_fraction,
        source="reward model" if config.reward.kind == "model" else run.reward.name,
        folder=run.folder(number),
    )


def sample_and_rate(number: int, policy: ModelPath, run: Run) -> tuple[list[Caption], list[Rating], float]:
    """Sample captions of the training clips and rate them, or load those of an earlier run.

    Returns:
        Captions, ratings, and the smallest difference of two ratings that counts.
    """
    config, folder, min_gap = run.config, run.folder(number), run.config.selection.min_gap
    captioner = config.load_model(policy)
    require_free_space(config.out, num_bytes(captioner), what=f"the model of {folder.name}")  # before hours of work
    captions = sample_captions(
        captioner, run.train, config.sampling, name=f"{folder.name}: sampling", seed=run.seed(number), folder=folder
    )
    del captioner  # a reward model is another network, and a GPU may hold only one
    if config.reward.kind == "model":
        ratings, info = reward_rounds(run).rate(number, captions)
        return captions, ratings, max(min_gap, info.margin(config.reward.min_confidence))
    return captions, rate_captions(captions, run.train, reward=run.reward, folder=folder), min_gap


def reward_rounds(run: Run) -> RewardRounds:
    """Return the labels and reward models of a run whose reward is a model."""
    config = run.config
    return RewardRounds(
        config.reward,
        config.reward_training,
        run.reward,
        run.train,
        config.out,
        partial(config.load_model, config.model),
        config.seed,
        config.strategy,
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
