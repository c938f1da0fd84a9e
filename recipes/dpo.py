"""Guided DPO on existing preferences: mrDPO's own pairs, people's feedback, or published conversations.

    torchrun recipes/dpo.py --preferences data/published_dpo.json --model FOLDER --out run/dpo
    torchrun recipes/dpo.py --feedback run/votes --model FOLDER --out run/dpo

One round: a fresh LoRA is trained on chosen against rejected answers with cross-entropy on the ground truth; the
reference policy is the same weights without it. Then it is merged. To sample and rate captions first, use `mrdpo.py`.
Run the same command again to resume a killed run.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from salmonn import dist
from salmonn.caption.captioner import Captioner
from salmonn.caption.processor import Processor
from salmonn.config import MAY_CHANGE, run_recipe
from salmonn.conversations import Conversation, is_conversation_file, read_conversations
from salmonn.files import iter_numbered_records
from salmonn.model.loading import CONFIG_NAME, load_config
from salmonn.model.lora import LoraConfig, attach_lora
from salmonn.preference.comparisons import conversation_to_comparison
from salmonn.preference.feedback import read_feedback
from salmonn.preference.feedback_pairs import deal_pairs, describe_comparisons, to_comparisons
from salmonn.preference.losses import UNPAIRED_LOSSES, LossConfig, Role, make_loss
from salmonn.preference.subset import SubsetConfig
from salmonn.preference.taste import fit_taste
from salmonn.records import Comparison
from salmonn.train.checkpoint import checkpointed
from salmonn.train.data import ClipSource, check_texts, require_files
from salmonn.train.dry_run import check_adapters, print_adapter_plan
from salmonn.train.encoding import encode_clips
from salmonn.train.feature_cache import open_feature_cache
from salmonn.train.left_out import LeftOut
from salmonn.train.loop import FitConfig, FitContext, check_processes, fit
from salmonn.train.preference import PreferenceBatchLoss, PreferenceExample, make_preference_examples
from salmonn.train.reference_logps import make_preference_batches
from salmonn.train.rounds import IMPORTANCE_NAME, keep_subset
from salmonn.train.run_folder import RunConfig, is_complete, merge_checkpoint, open_run
from salmonn.train.run_steps import MERGED_FILES, Step, fingerprint, flat_settings
from salmonn.train.sharded import load_encoding_model, load_policy, merge_sharded
from salmonn.train.trackers import stop_tracker

log = logging.getLogger("dpo")
ClipComparison = tuple[Comparison, ClipSource]


@dataclass(frozen=True, kw_only=True)
class OfflineDpoConfig(RunConfig):
    """Guided DPO on existing preference pairs.

    Args:
        preferences: JSONL of comparisons (pairs.jsonl of a round), or .json or .jsonl of published conversations with
            preferences (docs/data.md).
        feedback: folder of people's feedback, as the web UI saves it, to train on instead of `preferences`. Votes,
            edits and ratings become pairs; with loss.kind kto or bco_pair, each rated caption is trained on separately.
            The cross-entropy is on what people wrote and on reference captions, where there are any.
        root: folder that the paths of the videos start from; by default the folder of `preferences`, or the
            folder `feedback`.
        max_pairs_per_video: maximum number of comparisons of a clip and prompt, dealt evenly over the people who made
            them; none for no limit.
        subset: subset of the preferences that is trained on. Votes get margins for it from the taste of the voters.
        loss: loss.
        lora: adapter.
        fit: optimization.
        load_sharded: load only a part of the weights into each process, for models that do not fit on one GPU; needs
            strategy fsdp2.
    """

    preferences: Path | None = None
    feedback: Path | None = None
    root: Path | None = None
    max_pairs_per_video: int | None = None
    subset: SubsetConfig = field(default_factory=SubsetConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    lora: LoraConfig = field(default_factory=lambda: LoraConfig(rank=128, alpha=256))
    fit: FitConfig = field(default_factory=lambda: FitConfig(learning_rate=5e-6, batch_size=8, weight_decay=0.0))
    load_sharded: bool = field(default=False, metadata=MAY_CHANGE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.load_sharded and self.strategy != "fsdp2":
            raise ValueError(f"load_sharded needs strategy fsdp2, got {self.strategy}; set --strategy fsdp2")
        if (self.preferences is None) == (self.feedback is None) and not self.dry_run:
            raise ValueError(
                "give either --preferences, a file of preference pairs, or --feedback, a folder of people's feedback"
            )
        if self.max_pairs_per_video is not None and self.max_pairs_per_video < 1:
            raise ValueError(f"max_pairs_per_video must be at least 1, or none, got {self.max_pairs_per_video}")
        if self.loss.kind in ("grpo", "nash"):
            raise ValueError(
                f"loss.kind {self.loss.kind} needs rated samples of the policy; use recipes/mrdpo.py for it"
            )


def main(config: OfflineDpoConfig) -> None:
    """Run the round."""
    if config.dry_run:
        print_adapter_plan(
            config.model,
            frames=config.frames,
            lora=config.lora,
            placement=config.placement,
            fit=config.fit,
            answers=3,
            title=config.loss.title,
        )
        return
    dist.setup(deterministic=config.deterministic)
    check_processes(config.strategy, config.fit)
    # What can be wrong is found before the folder is claimed.
    sizes = load_config(config.model, frames=config.frames)
    check_adapters(sizes, config.lora)
    processor = Processor.load(config.model, config=sizes)
    load = load_feedback if config.feedback else load_comparisons
    comparisons = limit_pairs(load(config, check=partial(check_texts, processor=processor)), config)
    if config.loss.per == "clause" and not any(one.chosen_marks or one.rejected_marks for one, _ in comparisons):
        raise ValueError("loss.per clause needs marked clauses, and no comparison has one; set loss.per caption")
    left_out = LeftOut(config.out, max_failures=config.max_failures)
    open_run(config, plan_steps(config, comparisons, left_out), name="dpo")
    if is_complete(config.out):
        log.info("%s is already trained", config.out)
        return

    # Load. The frozen encoders run once on each clip.
    load_model = partial(load_encoding_model, config=config) if config.load_sharded else config.load_model
    captioner = load_model(config.model)
    has_truth = any(comparison.ground_truth for comparison, _ in comparisons)
    loss = make_loss(config.loss if has_truth else replace(config.loss, ce_weight=0.0))
    examples = load_examples(comparisons, captioner, config, left_out=left_out, roles=loss.roles)

    # Train.
    if config.load_sharded:
        load_policy(captioner, config.model, config, lora=config.lora, seed=config.seed)
    else:
        attach_lora(captioner.network, config.lora, seed=config.seed)
    batches = make_preference_batches(captioner, examples, loss, config.fit, seed=config.seed, folder=config.out)
    context = FitContext(config.loss.title, config.out, config.seed, config.strategy)
    fit_config = config.fit.resolve(len(examples))
    with checkpointed(config.out):
        checkpoint = fit(captioner.network, batches, PreferenceBatchLoss(loss), fit_config, context=context)

        # Merge and save. Free the network first: merging loads the model again, and a GPU may hold only one.
        del captioner, batches
        merge = merge_sharded if config.load_sharded else merge_checkpoint
        merge(checkpoint, base=config.model, lora=config.lora, config=config, folder=config.out)


def load_comparisons(
    config: OfflineDpoConfig, *, check: Callable[[Comparison | Conversation], None] | None = None
) -> list[ClipComparison]:
    """Read comparisons or published preferences, each with its clip; those of two equal answers are left out.

    Args:
        config: file, folder and loss.
        check: raises a ValueError for texts that the model cannot learn; the message gets file and line.

    Raises:
        FileNotFoundError: the file or one of its videos does not exist.
        ValueError: there are no preferences, or they lack the ground truth that the loss needs.
    """
    path = config.preferences
    assert path
    root = config.root or path.parent
    if is_conversation_file(path):
        conversations = read_conversations(path, check=check)
        preferences = [one for one in conversations if one.preference]
        if num_others := len(conversations) - len(preferences):
            log.info("skipped %d conversations without a preference; recipes/sft.py uses them", num_others)
        pairs = [(conversation_to_comparison(one), ClipSource.of_conversation(one, root=root)) for one in preferences]
    else:
        records = (record for _, record in iter_numbered_records(path, Comparison, check=check))
        pairs = [(record, ClipSource.of_comparison(record, root=root)) for record in records]
    num_read = len(pairs)
    pairs = [(one, clip) for one, clip in pairs if one.chosen.split() != one.rejected.split()]
    if num_equal := num_read - len(pairs):
        log.warning("left out %d of %d preferences: the chosen answer equals the rejected one", num_equal, num_read)
    if not pairs:
        raise ValueError(f"{path} has no preference pairs; each needs a chosen and a rejected answer that differ")
    require_files([clip for _, clip in pairs], root=root)
    num_without = sum(not comparison.ground_truth.strip() for comparison, _ in pairs)
    if config.loss.ce_weight and num_without:
        raise ValueError(
            f"{num_without} preferences of {path} have no ground truth, which the cross-entropy needs; add it, or set "
            "--loss.ce-weight 0"
        )
    return pairs


def load_feedback(
    config: OfflineDpoConfig, *, check: Callable[[Comparison | Conversation], None] | None = None
) -> list[ClipComparison]:
    """Read people's feedback as comparisons, each with its clip, and log what could not be used.

    Args:
        config: folder and loss.
        check: raises a ValueError for texts that the model cannot learn; these are not used.

    Raises:
        FileNotFoundError: a video does not exist.
        ValueError: there is no feedback to train on.
    """
    assert config.feedback
    feedback, margins = read_feedback(config.feedback), None
    if config.subset.keep is not None:
        taste = fit_taste(feedback)
        log.info("%s: %s", config.feedback, taste.describe())
        margins = taste.margins
    comparisons, unused = to_comparisons(feedback, unpaired=config.loss.kind in UNPAIRED_LOSSES, margins=margins)
    usable = []
    for one in comparisons:
        try:
            if check:
                check(one)
            usable.append(one)
        except ValueError as error:
            unused[str(error)] += 1
    log.info("%s: %s", config.feedback, describe_comparisons(usable, unused))
    if not usable:
        raise ValueError(
            f"{config.feedback} has nothing to train on: {describe_comparisons(usable, unused)}. Votes for A or B, "
            "edits, and captions of one clip rated good and bad are needed"
        )
    if config.loss.kind == "kto" and len({one.video for one in usable if one.chosen}) < 2:
        raise ValueError(
            f"loss.kind kto estimates the KL divergence from good captions of other clips, and {config.feedback} has "
            "them of fewer than two clips; rate captions of more clips as good, or use loss.kind bco_pair"
        )
    num_truths = sum(bool(one.ground_truth) for one in usable)
    log.info("%d of them have a text of a person or a reference caption for the cross-entropy", num_truths)
    root = config.root or config.feedback
    pairs = [(one, ClipSource.of_comparison(one, root=root)) for one in usable]
    require_files([clip for _, clip in pairs], root=root)
    return pairs


def limit_pairs(comparisons: list[ClipComparison], config: OfflineDpoConfig) -> list[ClipComparison]:
    """Return at most `max_pairs_per_video` comparisons of each clip, and log how many are left out."""
    if config.max_pairs_per_video is None:
        return comparisons
    kept = {id(one) for one in deal_pairs([one for one, _ in comparisons], config.max_pairs_per_video)}
    log.info(
        "left out %d of %d comparisons: at most %d of a clip, dealt evenly over %d raters",
        len(comparisons) - len(kept),
        len(comparisons),
        config.max_pairs_per_video,
        len({one.rater for one, _ in comparisons}),
    )
    return [(one, clip) for one, clip in comparisons if id(one) in kept]


def load_examples(
    comparisons: Sequence[ClipComparison],
    captioner: Captioner,
    config: OfflineDpoConfig,
    *,
    left_out: LeftOut,
    roles: Sequence[Role],
) -> list[PreferenceExample]:
    """Return the subset of the comparisons to train on, with the features of their clips.

    Raises:
        ValueError: too many clips cannot be read.
    """
    cache = open_feature_cache(config.feature_cache, captioner)
    while True:
        readable = [(one, clip) for one, clip in comparisons if clip not in left_out.sources]
        kept = {id(one) for one in keep_subset([one for one, _ in readable], config.subset, folder=config.out)}
        readable = [(one, clip) for one, clip in readable if id(one) in kept]
        clips = [clip for _, clip in readable]
        features = encode_clips(captioner, clips, name="clips", cache=cache, left_out=left_out)
        if all(clip in features for clip in clips):
            break
        # Others take the place of comparisons whose clip cannot be read, as in a run that is resumed.
    open_run(config, plan_steps(config, comparisons, left_out), name="dpo")  # a checkpoint must be of the same ones
    return make_preference_examples([(one, features[clip]) for one, clip in readable], roles)


def plan_steps(config: OfflineDpoConfig, comparisons: Sequence[ClipComparison], left_out: LeftOut) -> list[Step]:
    """Return the only step of a run; comparisons are compared by content, since their files may move."""
    read = fingerprint(one for one, clip in comparisons if clip not in left_out.sources)
    settings = flat_settings(config) | {"preferences": read}
    settings = {name: value for name, value in settings.items() if name not in ("out", "root", "feedback")}
    return [Step("model", settings, (*MERGED_FILES, IMPORTANCE_NAME), f"merged/{CONFIG_NAME}")]


if __name__ == "__main__":
    run_recipe(main, OfflineDpoConfig, description=__doc__, on_error=dist.abort, on_end=stop_tracker)
