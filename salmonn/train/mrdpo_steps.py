"""Steps of an mrDPO run, and the settings that each depends on."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from salmonn import dist
from salmonn.files import read_json
from salmonn.model.loading import CONFIG_NAME
from salmonn.preference.reward import RewardConfig
from salmonn.preference.reward_model import hash_reward_model
from salmonn.train.data import ClipSet
from salmonn.train.evaluate import RATES_NAME
from salmonn.train.influence import INFLUENCE_NAME
from salmonn.train.mrdpo import MrDpoConfig, RebirthConfig
from salmonn.train.reward_rounds import LABEL_FILES
from salmonn.train.rounds import IMPORTANCE_NAME, PAIRS_NAME, WINS_NAME
from salmonn.train.run_log import SUMMARY_NAME
from salmonn.train.run_steps import MERGED_FILES, Settings, Step, choose_settings, fingerprint, flat_settings
from salmonn.train.sampling import CAPTIONS_NAME, PARTIAL_NAME

# Settings, or groups of them, that results depend on.
LOADING = ("model", "placement", "frames", "reader")
SAMPLED = {
    f"sampling.{name}" for name in ("temperature", "temperatures", "top_p", "num_samples")
}  # without effect on greedy captions
RATING_FILES = ("scores.jsonl", "ratings.jsonl")  # of the rewards that come with the package


def plan_steps(config: MrDpoConfig, train: ClipSet, heldout: ClipSet, *, rating_file: str) -> list[Step]:
    """Return all steps of a run, each with the settings and the earlier steps that its results depend on."""
    # Clips and the reward model are compared by content: their files may move.
    settings = flat_settings(config) | {
        "training_videos": fingerprint(reference.video for reference in train.references),
        "references": fingerprint(train.references),
        "heldout_references": fingerprint(heldout.references),
    }
    if config.reward.model:
        settings["reward.model"] = hash_reward_model(config.reward.model)
    if config.references:
        settings = {name: value for name, value in settings.items() if not name.startswith("synth.")}
    # The server may move to another address; without one, none of its settings matters.
    dropped = ("sampler.server", "sampler.allow_deaf") if config.sampler.server else ("sampler",)
    for name in choose_settings(settings, *dropped):
        del settings[name]
    choose = partial(choose_settings, settings)
    greedy = {name: value for name, value in choose("sampling").items() if name not in SAMPLED}
    voter = choose("reward.kind", "reward.voter") if config.reward.is_simulated else {}
    evaluation = choose("heldout_references", "synth", "judge") | greedy | voter
    if config.load_sharded:  # then a server captions held-out clips, too
        evaluation |= choose("load_sharded", "sampler")
    steps, policy = [_evaluation_step("sft", choose(*LOADING) | evaluation)], tuple[str, ...]()
    for number in range(1, config.rounds + 1):
        folder = f"round_{number}"
        if number == 1 or config.fresh_pairs:
            steps += _example_steps(config, number, choose, rating_file=rating_file, needs=policy)
            examples = steps[-1].name
        steps += _training_steps(folder, _round_settings(config, number, choose), evaluation, needs=(examples, *policy))
        policy = (f"{folder}/model",)
    if config.rebirth:
        # The best round depends on all evaluations.
        needs = tuple(step.name for step in steps if step.name.endswith(("/model", "/heldout")))
        choice = choose("rounds", "early_stopping", "training_videos", "synth", "seed")
        if config.rebirth.tailor != "none":
            steps += _tailoring_steps(config.rebirth, choose, choice=choice, needs=needs)
            choice |= choose("rebirth.tailor", "rebirth.preference_fraction")
            needs = (steps[-1].name,)
        if config.rebirth.tailor != "draft":
            steps.append(_captions_step("rebirth", choice | greedy | choose("sampler"), needs=needs))
            needs = ("rebirth/captions",)
        training = choose("rebirth", "references", "seed")
        steps += _training_steps("rebirth", training, evaluation, needs=needs)
    return steps


def lacks_captions(config: MrDpoConfig, steps: Sequence[Step]) -> bool:
    """Return whether a run has captions left that its server must sample, on all ranks as rank 0 finds it.

    Args:
        config: configuration.
        steps: all steps of the run.
    """
    if not dist.is_main():
        return dist.gather([False])[0]
    path = config.out / SUMMARY_NAME
    summary = read_json(path) if path.is_file() else None
    # A run that has ended may have stopped before its last round, or skipped rebirth.
    last = len(summary["rounds"]) if summary and summary["stopped"] else config.rounds
    stages = {"sft", *(f"round_{number}" for number in range(1, last + 1)), *(() if summary else ("rebirth",))}
    sampled = ("captions", "heldout") if config.load_sharded else ("captions",)
    missing = (
        step.name.startswith(tuple(f"{stage}/" for stage in stages)) and not (config.out / step.result).is_file()
        for step in steps
        if step.name.endswith(sampled)
    )
    return dist.gather([any(missing)])[0]


def _example_steps(
    config: MrDpoConfig, number: int, choose: Callable[..., Settings], *, rating_file: str, needs: tuple[str, ...]
) -> list[Step]:
    """Return the steps of a round before its training: captions, ratings and, except for GRPO, pairs."""
    folder, is_model = f"round_{number}", config.reward.kind == "model"
    rewarded = dict(choose("references", "judge", "reward", *(("reward_training",) if is_model else ())))
    if config.reward.refresh == "always":  # absent, the default, in earlier runs
        del rewarded["reward.refresh"]
    selection = choose("selection", "subset")
    if config.reward.voter == "judge" and config.loss.kind != "grpo":
        # Ratings are made from the scores that the reward "judge" writes, so these are kept when the reward changes.
        rewarded = {**rewarded, "reward.kind": "judge", "reward.voter": RewardConfig().voter}
        selection = {**selection, **choose("reward.kind", "reward.voter")}
    earlier_labels = (f"round_{number - 1}/ratings",) if is_model and number > 1 else ()
    captions = _captions_step(
        folder, choose(*LOADING, "training_videos", "synth", "sampling", "sampler", "seed"), needs=needs
    )
    ratings = Step(
        f"{folder}/ratings",
        rewarded,
        files=tuple(f"{folder}/{name}" for name in dict.fromkeys((*RATING_FILES, rating_file, *LABEL_FILES))),
        result=f"{folder}/{rating_file}",
        needs=(captions.name, *earlier_labels),
    )
    steps = [captions, ratings]
    if config.loss.kind == "grpo":
        return steps
    if config.extrapolate:
        half = f"{folder}/half"
        steps.append(_pairs_step(half, selection, needs=(ratings.name,)))
        settings = _round_settings(config, number, choose, is_half_step=True)
        files = tuple(f"{half}/{name}" for name in MERGED_FILES)
        steps += [
            Step(f"{half}/model", settings, files, f"{half}/merged/{CONFIG_NAME}", (steps[-1].name, *needs)),
            _captions_step(half, captions.settings, needs=(f"{half}/model",)),
            Step(
                f"{folder}/wins",
                rewarded,
                (f"{folder}/{WINS_NAME}",),
                f"{folder}/{WINS_NAME}",
                (captions.name, f"{half}/captions"),
            ),
        ]
        selection = {**selection, **choose("extrapolate")}  # absent in runs without it
    return [*steps, _pairs_step(folder, selection, needs=(steps[-1].name,))]


def _pairs_step(folder: str, settings: Settings, *, needs: tuple[str, ...]) -> Step:
    result = f"{folder}/{PAIRS_NAME}"
    return Step(f"{folder}/pairs", settings, (result, f"{folder}/{IMPORTANCE_NAME}"), result, needs)


def _round_settings(
    config: MrDpoConfig, number: int, choose: Callable[..., Settings], *, is_half_step: bool = False
) -> dict[str, Any]:
    """Return what the model of a round depends on, besides its examples and the policy that it starts from."""
    settings = dict(choose("loss", "lora", "fit", "seed"))
    settings["fit.learning_rate"] = config.round_fit(number).learning_rate
    settings |= choose("reference_policy", "fresh_pairs") if number > 1 else {}
    settings |= choose("reference_policy", "eta") if config.reference_policy == "mixed" else {}
    if is_half_step:
        return settings
    settings |= {"num_questions": config.num_questions if number == config.rounds else 0}
    if number == config.rounds and config.last_round_weight != 1:  # absent, the default, in earlier runs
        settings |= choose("last_round_weight")
    return settings


def _tailoring_steps(
    rebirth: RebirthConfig, choose: Callable[..., Settings], *, choice: Settings, needs: tuple[str, ...]
) -> list[Step]:
    """Return the steps of rebirth before its captions; `choice` is what the choice of clips and teacher depends on."""
    drafts = {**choice, **choose("rebirth.preference_fraction", "sampling", "sampler")}
    path = f"rebirth/{INFLUENCE_NAME}"
    settings = choose(*LOADING, "rebirth.lora", "rebirth.start", "references", "seed")
    steps = [
        _captions_step("rebirth/drafts", drafts, needs=needs),
        Step("rebirth/influence", settings, (path,), path, ("rebirth/drafts/captions",)),
    ]
    if rebirth.tailor != "draft":
        folder = "rebirth/teacher"
        files = tuple(f"{folder}/{name}" for name in (PAIRS_NAME, *MERGED_FILES))
        settings = choose("rebirth.tailor", "rebirth.teacher_steps", "loss", "lora", "fit", "seed")
        steps.append(Step(f"{folder}/model", settings, files, f"{folder}/merged/{CONFIG_NAME}", (steps[-1].name,)))
    return steps


def _captions_step(folder: str, settings: Settings, *, needs: tuple[str, ...]) -> Step:
    result = f"{folder}/{CAPTIONS_NAME}"
    return Step(f"{folder}/captions", settings, (result, f"{folder}/{PARTIAL_NAME}"), result, needs)


def _training_steps(folder: str, settings: Settings, evaluation: Settings, *, needs: tuple[str, ...]) -> list[Step]:
    """Return the step that trains and merges a stage's model, and its evaluation."""
    files = tuple(f"{folder}/{name}" for name in MERGED_FILES)
    training = Step(f"{folder}/model", settings, files, f"{folder}/merged/{CONFIG_NAME}", needs)
    return [training, _evaluation_step(folder, evaluation, needs=(training.name,))]


def _evaluation_step(folder: str, settings: Settings, *, needs: tuple[str, ...] = ()) -> Step:
    return Step(f"{folder}/heldout", settings, (f"{folder}/heldout",), f"{folder}/heldout/{RATES_NAME}", needs)
