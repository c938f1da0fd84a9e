"""Train a reward model: it rates captions by looking at the clip, and needs no events.

    torchrun recipes/reward.py --preferences run/round_1 --root run/clips/seed11-400 --out run/reward

The captioner itself is the reward model: a head reads the decoder's states of a caption, alone or with an adapter. The
preferences are judged captions of a round, pairs, votes, published conversations, or rows of TRL or RewardBench
(docs/reward.md). Run the same command again to resume a killed run.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

from salmonn import dist
from salmonn.caption.captioner import SHIPPED_MODEL, Captioner
from salmonn.caption.processor import Processor
from salmonn.config import run_recipe
from salmonn.files import read_records, write_records
from salmonn.model.loading import load_config
from salmonn.preference.agreement import describe_agreement, looking_warning
from salmonn.preference.claims import attach_credits
from salmonn.preference.comparisons import (
    CAPTIONS_NAME,
    SCORES_NAME,
    AnswerGroup,
    Preferences,
    group_comparisons,
    read_preferences,
)
from salmonn.preference.feedback import kept_name
from salmonn.preference.ideal_point import IdealPointConfig
from salmonn.preference.objectives import attach_objectives, find_max_words, judge_objectives
from salmonn.preference.reward import make_judge
from salmonn.preference.reward_model import HEAD_NAME, INFO_NAME, read_info
from salmonn.records import Caption, Reference, Score
from salmonn.score.config import JudgeConfig
from salmonn.score.formats import read_scores
from salmonn.train.data import ClipSource, check_texts
from salmonn.train.dry_run import check_adapters, print_adapter_plan
from salmonn.train.encoding import encode_clips
from salmonn.train.feature_cache import open_feature_cache
from salmonn.train.left_out import LeftOut
from salmonn.train.loop import check_processes
from salmonn.train.raters import describe_raters, print_groups, train_raters
from salmonn.train.reward import BLIND_DIR, RewardTrainer, RewardTrainingConfig
from salmonn.train.reward_states import STATES_NAME
from salmonn.train.run_folder import RunConfig, is_missing, open_run
from salmonn.train.run_steps import TRAINING_FILES, Step, fingerprint, flat_settings
from salmonn.train.trackers import stop_tracker

log = logging.getLogger("reward")
UNCOMPARED = ("out", "root", "judge")  # settings that a resumed run may change
ANSWERS_IN_PLAN = 8  # captions of a clip that pass through the model together


@dataclass(frozen=True, kw_only=True)
class RewardRecipeConfig(RunConfig, RewardTrainingConfig):
    """Training of a reward model.

    Args:
        model: folder or hub id of the captioner: the model that the runs start from which the reward model will rate.
        preferences: folder of a round (captions.jsonl and scores.jsonl) or of votes; or a file of comparisons, votes,
            published conversations, or rows with `prompt`, `chosen`, `rejected` and `video`.
        root: folder that the paths of the videos start from; by default that of the preferences.
        references: JSONL of references with events: for kind "objectives", those that the captions were judged against;
            for kind "ideal-point", by which prototypes are named after the objectives that they reward.
        judge: judge of the captions that were voted on, for kind "ideal-point" with references.
        min_gap: of judged captions: smallest difference in Total + repetition_weight * repetition of a comparison.
        repetition_weight: of judged captions: weight of repetition relative to Total.
        prototypes: of an ideal-point model: number of prototypes, or auto to choose it by cross-validation.
        raters: of an ideal-point model: form, sizes and optimization.
    """

    out: Path = Path("run/reward")
    model: str = str(SHIPPED_MODEL)
    preferences: Path
    root: Path | None = None
    references: Path | None = None
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    min_gap: float = 0.1
    repetition_weight: float = 1.0
    prototypes: int | Literal["auto"] = "auto"
    raters: IdealPointConfig = field(default_factory=IdealPointConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        RewardTrainingConfig.__post_init__(self)
        if self.kind != "ideal-point" and (self.kind == "objectives") != (self.references is not None):
            raise ValueError(
                "kind objectives needs the references that the captions were judged against, and besides it only kind "
                f"ideal-point reads references; got kind {self.kind} and references {self.references}"
            )
        if self.min_gap <= 0 or self.repetition_weight < 0:
            raise ValueError(
                "min_gap must be above 0 and repetition_weight at least 0, got "
                f"{self.min_gap} and {self.repetition_weight}"
            )
        if self.prototypes != "auto" and self.prototypes < 1:
            raise ValueError(f"prototypes must be at least 1, or auto, got {self.prototypes}")
        if self.prototypes != "auto" and self.kind != "ideal-point":
            raise ValueError(f"prototypes {self.prototypes} is only used with --kind ideal-point, got {self.kind}")
        if self.kind == "ideal-point" and self.lora:
            raise ValueError("kind ideal-point is fitted to frozen states; remove lora, or use kind bradley-terry")


def main(config: RewardRecipeConfig) -> None:
    """Read the preferences, train the reward model and its blind twin, and report how far it agrees."""
    if config.dry_run:
        print_memory_plan(config)
        return
    dist.setup(deterministic=config.deterministic)
    check_processes(config.strategy, *([config.fit] if config.lora else []))
    # What can be wrong is found before the folder is claimed.
    sizes = load_config(config.model, frames=config.frames)
    if config.lora:
        check_adapters(sizes, config.lora)
    processor = Processor.load(config.model, config=sizes)
    preferences = read_preferences(
        config.preferences,
        root=config.root,
        min_gap=config.min_gap,
        repetition_weight=config.repetition_weight,
        check=partial(check_texts, processor=processor),
    )
    log.info("%s", preferences.describe())
    groups, max_words = group_comparisons(preferences.comparisons), None
    if config.kind == "objectives":
        groups, max_words = with_objectives(groups, config)
    elif config.references:
        # Once for all ranks: a language model's replies cost money, and may differ.
        groups = dist.gather([judge_votes(groups, config) if dist.is_main() else groups])[0]
    elif config.kind == "claims":
        captions, scores = read_judged(config)
        groups = attach_credits(groups, captions, scores)
    left_out = LeftOut(config.out, max_failures=config.max_failures)
    open_run(config, [training_step(preferences, groups, config)], name="reward")
    if not is_missing(config.out / INFO_NAME):
        log.info("%s is already trained", config.out)
    else:
        train(preferences, groups, config, left_out=left_out, max_words=max_words)
    info = read_info(config.out)
    agreement = info.agreement
    assert agreement is not None, "training measures it"
    if info.prototypes:
        log.info("%s", describe_raters(info.prototypes))
        if dist.is_main():
            print_groups(info.prototypes)
    log.info("%s %s", config.out, describe_agreement(agreement))
    if warning := looking_warning(agreement):
        log.warning("%s", warning)


def training_step(preferences: Preferences, groups: Sequence[AnswerGroup], config: RewardRecipeConfig) -> Step:
    """Return the only step of a run. What it learns from is compared by content, as files may move or change."""
    settings = flat_settings(config) | {"preferences": fingerprint(preferences.comparisons)}
    if config.kind == "claims":
        settings["references"] = fingerprint(group.credits for group in groups)
    if config.references:
        settings["references"] = fingerprint(group.objectives for group in groups)
    # The judge matters by the objectives alone.
    settings = {name: value for name, value in settings.items() if name.partition(".")[0] not in UNCOMPARED}
    results = (HEAD_NAME, INFO_NAME, "comparisons.jsonl", "raters.jsonl")
    files = (*TRAINING_FILES, "adapter", STATES_NAME, BLIND_DIR, *results)
    return Step("model", settings, files, INFO_NAME)


def train(
    preferences: Preferences,
    groups: Sequence[AnswerGroup],
    config: RewardRecipeConfig,
    *,
    left_out: LeftOut,
    max_words: float | None,
) -> None:
    """Encode the clips and train."""
    captioner = config.load_model(config.model)
    groups = [with_prompt(group, captioner) for group in groups]
    cache = open_feature_cache(config.feature_cache, captioner)
    sources = [ClipSource.of_comparison(group.example, root=preferences.root) for group in groups]
    features = encode_clips(captioner, sources, name="clips", cache=cache, left_out=left_out)
    del captioner
    readable = [group for group, source in zip(groups, sources, strict=True) if source in features]
    if dist.is_main():
        write_records(config.out / "comparisons.jsonl", preferences.comparisons)
    if config.kind == "ideal-point":
        count = None if config.prototypes == "auto" else config.prototypes
        train_raters(
            make_trainer(config),
            readable,
            features,
            root=preferences.root,
            num_prototypes=count,
            config=config.raters,
        )
    else:
        replace(make_trainer(config), max_words=max_words).train(readable, features, root=preferences.root)


def with_objectives(groups: list[AnswerGroup], config: RewardRecipeConfig) -> tuple[list[AnswerGroup], float]:
    """Return the groups with the objectives of their captions, and the number of words from which `length` is 1.

    They are computed from the judge's scores and the references.
    """
    assert config.references is not None
    captions, scores = read_judged(config)
    references = {one.video: one for one in read_records(config.references, Reference)}
    return attach_objectives(groups, captions, scores, references), find_max_words(scores)


def judge_votes(groups: list[AnswerGroup], config: RewardRecipeConfig) -> list[AnswerGroup]:
    """Judge captions that were voted on, and return the groups with their objectives, where clips have references.

    The web UI renames the videos that it keeps for votes; those are recognized by their content.

    Raises:
        ValueError: no caption could be judged, or the judge cannot use a reference.
    """
    path = config.references
    assert path is not None
    references = read_records(path, Reference)
    by_video = {one.video: one for one in references}
    by_video |= {
        f"videos/{kept_name(path.parent / one.video)}": one for one in references if (path.parent / one.video).is_file()
    }
    judged = judge_objectives(groups, make_judge(config.judge), by_video)
    num_known = sum(bool(group.objectives) for group in judged)
    if not num_known:
        raise ValueError(
            f"no caption could be judged against {path}: it must describe the videos of the votes, and these must lie "
            "where its paths lead from its folder; or leave out --references, and prototypes are named by texts alone"
        )
    if num_known < len(groups):
        log.warning(
            "prototypes are named by the captions of %d of %d clips, as no others could be judged",
            num_known,
            len(groups),
        )
    return judged


def read_judged(config: RewardRecipeConfig) -> tuple[list[Caption], Sequence[Score]]:
    """Return captions and a judge's scores of the preferences' folder."""
    folder = config.preferences
    if not (folder / SCORES_NAME).is_file():
        raise ValueError(f"kind {config.kind} needs a folder with {CAPTIONS_NAME} and {SCORES_NAME}; {folder} is none")
    return read_records(folder / CAPTIONS_NAME, Caption), read_scores(folder / SCORES_NAME).scores


def with_prompt(group: AnswerGroup, captioner: Captioner) -> AnswerGroup:
    """Return the group with the default prompt instead of an empty one."""
    one = group.example
    return group if one.prompt else replace(group, example=replace(one, prompt=captioner.default_prompt(one.modality)))


def make_trainer(config: RewardRecipeConfig) -> RewardTrainer:
    """Return the trainer of this run."""
    return RewardTrainer(partial(config.load_model, config.model), config, config.out, config.seed, config.strategy)


def print_memory_plan(config: RewardRecipeConfig) -> None:
    """Print the memory that fine-tuning would need; without an adapter, states are computed and nothing is trained."""
    print_adapter_plan(
        config.model,
        frames=config.frames,
        lora=config.lora,
        placement=config.placement,
        fit=config.fit,
        answers=ANSWERS_IN_PLAN,
        title="reward model",
    )


if __name__ == "__main__":
    run_recipe(main, RewardRecipeConfig, description=__doc__, on_error=dist.abort, on_end=stop_tracker)
