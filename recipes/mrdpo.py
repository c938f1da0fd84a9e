"""Multi-round DPO (mrDPO): a captioner that improves by rating its own captions, then rebirth.

    torchrun recipes/mrdpo.py --config recipes/configs/mrdpo.yaml

Each round samples captions of the training clips, rates them against the clips' events, pairs the best with the worst,
trains a fresh LoRA with guided DPO and merges it: the merged model is the next round's policy and reference policy.
Rebirth then fine-tunes the model from before all rounds on the captions of the best round's model. Every stage writes
to a folder of `out`; run the same command again to resume a killed run.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from salmonn import dist
from salmonn.caption.captioner import Captioner
from salmonn.caption.processor import Processor
from salmonn.config import run_recipe
from salmonn.files import parse_record, read_json, read_records, write_json
from salmonn.model.config import PLAIN_PROMPTS
from salmonn.model.loading import load_config
from salmonn.model.lora import attach_lora
from salmonn.preference.groups import make_groups
from salmonn.preference.losses import make_loss
from salmonn.preference.rating import Rating
from salmonn.preference.reward import JudgeReward, make_judge, make_reward
from salmonn.preference.reward_model import ModelReward
from salmonn.preference.selection import SelectionConfig, mark_clauses
from salmonn.preference.subset import SubsetConfig
from salmonn.records import Caption, Comparison
from salmonn.train.checkpoint import checkpointed
from salmonn.train.data import (
    ClipSet,
    ClipSource,
    SftBatch,
    SftBatches,
    make_examples,
    sft_loss,
)
from salmonn.train.dry_run import check_adapters
from salmonn.train.encoding import cache_features
from salmonn.train.feature_cache import open_feature_cache
from salmonn.train.influence import best_captions, rate_by_influence, shuffle_ratings, split_clips
from salmonn.train.kl import kl_callback
from salmonn.train.left_out import LeftOut
from salmonn.train.loop import Batches, FitContext, autocast, check_processes, fit
from salmonn.train.mrdpo import (
    MrDpoConfig,
    RebirthConfig,
    list_trainings,
    load_data,
    print_memory_plan,
)
from salmonn.train.mrdpo_steps import lacks_captions, plan_steps
from salmonn.train.plots import plot_summary
from salmonn.train.preference import (
    Example,
    GroupExample,
    MixedBatches,
    MixedBatchLoss,
    PreferenceBatch,
    make_pair_examples,
)
from salmonn.train.rating_ahead import RatingAhead
from salmonn.train.reference_logps import make_preference_batches
from salmonn.train.reward_rounds import require_labels, require_model
from salmonn.train.rounds import (
    PAIRS_NAME,
    RoundFailedError,
    best_round,
    load_or_select,
    over_optimization,
    rate_against,
    rate_captions,
    require_examples,
    require_margin,
    stop_reason,
)
from salmonn.train.run_folder import is_complete, is_missing, merge_checkpoint, open_run
from salmonn.train.run_log import (
    REWARD_ROUND_NAME,
    SUMMARY_NAME,
    RewardRound,
    RunSummary,
)
from salmonn.train.sharded import merge_sharded
from salmonn.train.stages import (
    ModelPath,
    Run,
    Stage,
    adapters_of_rounds,
    load_encoders_of,
    load_policy_of,
    measure,
    report,
)
from salmonn.train.trackers import stop_tracker

log = logging.getLogger("mrdpo")
OPPONENT_SEED = 500  # added to the seed of a round
# Drafts of a clip whose influences differ by a standard deviation. Influence grows with length, so lengths are alike.
TEACHER_PAIRS = SelectionConfig(min_gap=1.0, max_pairs_per_video=1, max_length_ratio=1.3)


def main(config: MrDpoConfig) -> None:
    """Run all rounds and rebirth."""
    if config.dry_run:
        print_memory_plan(config)
        return
    dist.setup(deterministic=config.deterministic)
    trainings = list_trainings(config)
    check_processes(config.strategy, *(optimization for _, optimization in trainings))
    # What can be wrong is found before anything is rendered, and before the folder is claimed.
    sizes = load_config(config.model, frames=config.frames)
    check_adapters(sizes, *(lora for lora, _ in trainings))
    processor = Processor.load(config.model, config=sizes)
    judge = make_judge(config.judge, processes=dist.world_size())
    reward = make_reward(config.reward, judge=judge)
    rating_file = ModelReward.file_name if config.reward.kind == "model" else reward.file_name
    train, heldout = load_data(config, reward, processor, judge=judge)
    left_out = LeftOut(config.out, max_failures=config.max_failures)
    train, heldout = left_out.remove_from(train), left_out.remove_from(heldout)
    steps = plan_steps(config, train, heldout, rating_file=rating_file)
    open_run(config, steps, name="mrdpo")
    if (server := config.server_sampler(processor)) and lacks_captions(config, steps):
        server.connect()  # what is wrong with it is found before hours of work
    captioner = load_encoders_of(config)
    selection = config.selection
    require_model(config.reward, captioner, floors=selection.floors or (), min_spreads=selection.min_spreads)
    # Both sets at once, so that the cache does not evict the features of one for those of the other.
    cache = open_feature_cache(config.feature_cache, captioner)
    train, heldout = cache_features(captioner, train, heldout, name="clips", cache=cache, left_out=left_out)
    if config.reward.kind == "model" and isinstance(reward, JudgeReward):
        require_labels(train.references, reward, config.reward)
    if not (train.references and heldout.references):
        raise ValueError("no training clip or no held-out clip can be read; replace the files that are listed above")
    # Clips that became unreadable must not be part of existing results.
    open_run(config, plan_steps(config, train, heldout, rating_file=rating_file), name="mrdpo")
    del captioner
    run = Run(config, train, heldout, judge, reward, server)
    summary = RunSummary(sft=measure(config.model, config.out / "sft", run))
    best = run_rounds(run, summary)
    if best:
        add_rebirth(best, run, summary)
    if dist.is_main():
        write_json(config.out / SUMMARY_NAME, asdict(summary))
        plot_summary(summary, config.out / "summary.png")
        log.info("wrote %s and summary.png", config.out / SUMMARY_NAME)
    dist.barrier()


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
            summary.reward.append(parse_record(read_json(run.folder(number) / REWARD_ROUND_NAME), RewardRound))
            summary.add_proxy(number, run.reward_rounds.heldout_gain(number, run.heldout))
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

    # A fresh LoRA is trained. All rounds are added to the start, and their sum is rounded once.
    stage = Stage(
        folder, seed, config.round_loss, config.round_fit(number), earlier=adapters_of_rounds(number - 1, config)
    )
    if number > 1 and config.reference_policy == "run_start":
        stage = replace(stage, reference_policy=config.model)
    if number > 1 and config.reference_policy == "mixed":
        stage = replace(stage, anchor=config.model)

    # Mirror Prox: after a half step, the same captions are compared with those of its model.
    opponents = sample_opponents(number, policy, stage, run) if config.extrapolate else ()

    # Sample, rate, and select pairs or, for GRPO, group by clip; then train and merge.
    examples = make_round_examples(number, policy, run, stage=stage, opponents=opponents)
    if number == config.rounds:
        stage = replace(stage, num_questions=config.num_questions, weight=config.last_round_weight)
    return train_on_preferences(examples, policy, stage, run)


def sample_opponents(number: int, policy: ModelPath, stage: Stage, run: Run) -> list[Caption]:
    """Train the model that the round would lead to without opponents, and sample its captions of the training clips.

    Raises:
        RoundFailedError: there are too few pairs, or the model has not learned to prefer the chosen captions.
    """
    stage = replace(stage, folder=stage.folder / "half")
    model = stage.folder / "merged"
    if not is_complete(stage.folder):
        examples = make_round_examples(number, policy, run, stage=stage)
        model = train_on_preferences(examples, policy, stage, run)
    adapters, name = [*stage.earlier, stage.folder / "adapter"], f"round_{number}: opponents"
    # With the seed of the round's captions, a similar model would sample much the same ones.
    seed = stage.seed + OPPONENT_SEED
    return run.sample(model, adapters, run.train, run.config.sampling, name=name, seed=seed, folder=stage.folder)


def train_on_preferences(examples: Sequence[Example], policy: ModelPath, stage: Stage, run: Run) -> Path:
    """Train a fresh LoRA on pairs or groups, merge it, and return the merged model.

    Raises:
        RoundFailedError: the model has not learned to prefer the chosen captions.
    """
    config, folder, fit_config, loss = run.config, stage.folder, stage.fit, make_loss(stage.loss)
    name = folder.relative_to(config.out).as_posix()
    captioner = load_policy_of(policy, config.lora, config, seed=stage.seed)
    num_questions = stage.num_questions
    preferences = make_preference_batches(
        captioner,
        examples,
        loss,
        fit_config,
        seed=stage.seed,
        folder=folder,
        reference_policy=stage.find_reference_policy(config),
        num_questions=num_questions,
    )
    batches: Batches[PreferenceBatch | SftBatch] = preferences
    if num_questions:
        questions = SftBatches(
            make_examples(run.train, ("questions",)),
            captioner.processor,
            run.train.features.__getitem__,
            batch_size=num_questions,
            seed=stage.seed,
            gradient_accumulation_steps=fit_config.gradient_accumulation_steps,
            first_rank=fit_config.batch_size - num_questions,
        )
        batches = MixedBatches(preferences, questions)
    batch_loss = MixedBatchLoss(loss, qa_fraction=num_questions / fit_config.batch_size)
    context = FitContext(
        f"{name}: {stage.loss.title}",
        folder,
        stage.seed,
        config.strategy,
        kl_callback(captioner, run.heldout, config.kl, fit_config=fit_config),
    )
    with checkpointed(folder):
        checkpoint = fit(captioner.network, batches, batch_loss, fit_config.resolve(len(examples)), context=context)
        require_margin(folder, config.early_stopping, name=name, steps=stage.steps_setting)
        # Free the network before it is merged: merging loads the policy again, and a GPU may hold only one.
        del captioner, preferences, batches, context
        merge = merge_sharded if config.load_sharded else merge_checkpoint
        return merge(
            checkpoint,
            base=config.model,
            earlier=stage.earlier,
            lora=config.lora,
            config=config,
            folder=folder,
            weight=stage.weight,
        )


def make_round_examples(
    number: int, policy: ModelPath, run: Run, *, stage: Stage, opponents: Sequence[Caption] = ()
) -> Sequence[Example]:
    """Make the examples of a round, or of its half step: preference pairs, or groups of samples for GRPO.

    Raises:
        RoundFailedError: there are too few.
    """
    config, train, name = run.config, run.train, stage.folder.relative_to(run.config.out).as_posix()
    if config.loss.kind == "grpo":
        captions, ratings, _ = sample_and_rate(number, policy, run)
        groups = make_groups(captions, ratings, train.by_video)
        log.info("%s: %d of %d clips have samples with different ratings", name, len(groups), len(train.references))
        require_examples(groups, config.early_stopping, batch_size=config.fit.batch_size, name=name, are_groups=True)
        sources = [ClipSource(train.root / group.captions[0].video) for group in groups]
        return [GroupExample(group, train.features[source]) for group, source in zip(groups, sources, strict=True)]
    pairs = make_pairs(number, policy, run, folder=stage.folder, opponents=opponents)
    require_examples(pairs, config.early_stopping, batch_size=config.fit.batch_size, name=name)
    return make_pair_examples(pairs, train, roles=make_loss(stage.loss).roles)


def make_pairs(
    number: int, policy: ModelPath, run: Run, *, folder: Path, opponents: Sequence[Caption] = ()
) -> list[Comparison]:
    """Sample captions of the training clips, rate them and select preference pairs, or load those of an earlier run.

    With opponents, captions are rated by their win rates against those.
    """
    config = run.config
    if number > 1 and not config.fresh_pairs:
        return read_records(run.folder(1) / PAIRS_NAME, Comparison)
    captions, ratings, min_gap = sample_and_rate(number, policy, run)
    if opponents:
        ratings = rate_against(captions, opponents, run.train, reward=run.reward, folder=folder)
    pairs = load_or_select(
        captions,
        ratings,
        run.train,
        config=replace(config.selection, min_gap=min_gap),
        subset=config.subset,
        source="reward model" if config.reward.kind == "model" else run.reward.name,
        folder=folder,
    )
    return mark_clauses(pairs, captions, ratings) if config.loss.per == "clause" else pairs


def sample_and_rate(number: int, policy: ModelPath, run: Run) -> tuple[list[Caption], list[Rating], float]:
    """Sample captions of the training clips and rate them, or load those of an earlier run.

    Returns:
        Captions, ratings, and the smallest difference of two ratings that counts.
    """
    config, folder, min_gap = run.config, run.folder(number), run.config.selection.min_gap
    adapters, name = adapters_of_rounds(number - 1, config), f"{folder.name}: sampling"
    sample = partial(
        run.sample, policy, adapters, run.train, config.sampling, name=name, seed=run.seed(number), folder=folder
    )
    if config.reward.kind == "model":
        captions = sample()
        ratings, info = run.reward_rounds.rate(number, captions)
        return captions, ratings, max(min_gap, info.margin(config.reward.min_confidence))
    # A judge behind a URL rates the captions of each part while further ones are sampled.
    with RatingAhead(run.reward, judge=run.judge, references=run.train.by_video) as ahead:
        captions = sample(on_part=ahead.add)
    return captions, rate_captions(captions, run.train, reward=run.reward, folder=folder, ahead=ahead), min_gap


def add_rebirth(best: Path, run: Run, summary: RunSummary) -> None:
    """Run rebirth, if it is configured, and add it to the summary; the results of the rounds outlive its failure."""
    if not run.config.rebirth:
        return
    try:
        reborn = run_rebirth(best, run, run.config.rebirth)
    except RoundFailedError as error:
        log.warning("no rebirth: %s", error)
        summary.stopped = "; ".join(filter(None, (summary.stopped, f"no rebirth: {error}")))
    else:
        summary.rebirth = measure(reborn, run.config.out / "rebirth", run, summary)
    report(run, summary)


def run_rebirth(best: Path, run: Run, rebirth: RebirthConfig) -> Path:
    """Fine-tune the start on the best model's captions of the training clips and on questions; returns the model.

    Raises:
        RoundFailedError: the teacher cannot be trained.
    """
    config, folder = run.config, run.config.out / "rebirth"
    if is_complete(folder):
        return folder / "merged"
    train, captions = make_rebirth_captions(best, run, rebirth)
    student = load_student(best, config, rebirth)
    references = [
        replace(reference, caption=caption.text) for reference, caption in zip(train.references, captions, strict=True)
    ]
    examples = make_examples(
        replace(train, references=references),
        ("caption", "questions"),
        prompts=student.processor.config.prompts or PLAIN_PROMPTS,
    )
    batches = SftBatches(
        examples,
        student.processor,
        run.train.features.__getitem__,
        batch_size=rebirth.fit.batch_size,
        seed=config.seed,
        gradient_accumulation_steps=rebirth.fit.gradient_accumulation_steps,
    )
    context = FitContext("rebirth", folder, config.seed, config.strategy)
    with checkpointed(folder):
        checkpoint = fit(student.network, batches, sft_loss, rebirth.fit.resolve(len(examples)), context=context)
        del student, batches
        last = 0 if rebirth.start == "start" else round_of(best)
        return merge_checkpoint(
            checkpoint,
            base=config.model,
            earlier=adapters_of_rounds(last, config),
            lora=rebirth.lora,
            config=config,
            folder=folder,
        )


def make_rebirth_captions(best: Path, run: Run, rebirth: RebirthConfig) -> tuple[ClipSet, list[Caption]]:
    """Return the clips that rebirth trains on, and their captions: the best model's, or those the student learns best.

    Raises:
        RoundFailedError: the teacher cannot be trained.
    """
    config, folder = run.config, run.config.out / "rebirth"
    train, teacher, adapters = run.train, best, adapters_of_rounds(round_of(best), config)
    if rebirth.tailor != "none":
        preference, train = split_clips(run.train, rebirth.preference_fraction, seed=config.seed)
        drafts_folder = folder / "drafts"
        drafts = run.sample(
            best, adapters, train, config.sampling, name="rebirth: drafts", seed=config.seed, folder=drafts_folder
        )
        student = load_student(best, config, rebirth)
        student.network.checkpoint_layers(rebirth.fit.gradient_checkpointing)
        size = rebirth.fit.micro_batch_size
        with autocast(rebirth.fit.precision):
            ratings = rate_by_influence(drafts, train, preference, student, batch_size=size, folder=folder)
        del student
        if rebirth.tailor == "draft":
            return train, best_captions(drafts, ratings)
        if rebirth.tailor == "random":
            ratings = shuffle_ratings(ratings, seed=config.seed)
        teacher = align_teacher(best, drafts, ratings, train, run, rebirth)
        adapters.append(teacher.parent / "adapter")
    greedy = config.sampling.greedy()
    captions = run.sample(teacher, adapters, train, greedy, name="rebirth: captions", seed=config.seed, folder=folder)
    return train, captions


def align_teacher(
    best: Path,
    drafts: Sequence[Caption],
    ratings: Sequence[Rating],
    train: ClipSet,
    run: Run,
    rebirth: RebirthConfig,
) -> Path:
    """Train the best model to prefer its drafts of high rating, comparing drafts of similar length; returns the model.

    Raises:
        RoundFailedError: there are no pairs, or the model has not learned to prefer the chosen drafts.
    """
    config, folder = run.config, run.config.out / "rebirth" / "teacher"
    if is_complete(folder):
        return folder / "merged"
    pairs = load_or_select(
        drafts,
        ratings,
        train,
        config=TEACHER_PAIRS,
        subset=SubsetConfig(),
        source="influence" if rebirth.tailor == "teacher" else "random",
        folder=folder,
    )
    if not pairs:
        raise RoundFailedError(
            "no two drafts of a clip are of similar length and differ by a standard deviation; sample more captions "
            "(sampling.num_samples) with --redo-from rebirth/drafts, or set rebirth.tailor none"
        )
    stage = Stage(
        folder,
        config.seed,
        config.teacher_loss,
        replace(config.fit, steps=rebirth.teacher_steps, epochs=None),
        adapters_of_rounds(round_of(best), config),
        steps_setting="rebirth.teacher_steps",
    )
    examples = make_pair_examples(pairs, train, roles=make_loss(stage.loss).roles)
    return train_on_preferences(examples, best, stage, run)


def load_student(best: Path, config: MrDpoConfig, rebirth: RebirthConfig) -> Captioner:
    """Load the model that rebirth tunes, with a fresh LoRA."""
    captioner = config.load_model(config.model if rebirth.start == "start" else best)
    attach_lora(captioner.network, rebirth.lora, seed=config.seed)
    return captioner


def round_of(model: Path) -> int:
    """Return the number of the round whose merged model this is."""
    return int(model.parent.name.removeprefix("round_"))


if __name__ == "__main__":
    run_recipe(main, MrDpoConfig, description=__doc__, on_error=dist.abort, on_end=stop_tracker)
