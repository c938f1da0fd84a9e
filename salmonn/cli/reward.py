"""`salmonn reward`: rate captions with a reward model, and choose the best caption of each video."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import Namespace
from tqdm import tqdm

from salmonn.cli.options import SOME_FAILED, garbage_kept, plural
from salmonn.config import FlagParser
from salmonn.files import read_records, write_records
from salmonn.records import Caption

if TYPE_CHECKING:
    from salmonn.preference.rating import Rating
    from salmonn.preference.reward_model import RewardInfo, RewardModel


def reward_parser() -> FlagParser:
    """Return the arguments of `salmonn reward`."""
    dtypes = Literal["auto", "float32", "bfloat16", "float16"]
    parser = FlagParser(
        description="Rate captions with a reward model, which sees the video and needs no events. Rewards are in "
        "standard deviations above the mean of its training captions. docs/reward.md explains how to train one."
    )
    parser.add_argument("captions", type=Path, help="JSONL from `salmonn caption`")
    parser.add_argument("--model", type=Path, required=True, help="folder of a reward model, from recipes/reward.py")
    parser.add_argument("--base", type=str | None, default=None, help="captioner that it was trained on, if it moved")
    parser.add_argument("--root", type=Path, default=Path(), help="folder that the paths of the videos start from")
    parser.add_argument("--out", type=Path | None, default=None, help="file for the ratings (default: stdout)")
    group = parser.add_argument_group(
        "Whose reward", "Of an ideal-point model (docs/raters.md); default: the mean rater's"
    )
    group.add_argument("--rater", type=str | None, default=None, metavar="ID", help="reward of a rater, by id")
    group.add_argument(
        "--prototype", type=int | Literal["worst"] | None, default=None, help="reward of a prototype, by its number "
        "from 1; worst: the smallest of all prototypes' standardized rewards"
    )  # fmt: skip
    group.add_argument(
        "--votes", type=Path | None, default=None, help="fit a new rater to these votes or comparisons, whose videos "
        "are named relative to the file, and rate for them; nothing is saved"
    )  # fmt: skip
    parser.add_argument("--best", type=Path | None, default=None, help="file for the best caption of each video")
    parser.add_argument(
        "--caution", type=float, default=0.0, help="subtract this multiple of the spread of an ensemble of heads"
    )
    parser.add_argument(
        "--objectives", action="store_true", help="print what each objective contributes, for a model of that kind"
    )
    parser.add_argument("--device", type=str | None, default=None, help="cpu, cuda, ... (default: cuda if available)")
    parser.add_argument("--dtype", type=dtypes, default="auto", help="dtype of the weights (auto: bfloat16 on a GPU)")
    parser.add_argument(
        "--reader", type=str | None, default=None, help="decoder of video frames (default: as in training)"
    )
    return parser


def run_reward(values: Namespace) -> int:
    """Rate captions; write the ratings, and the best caption of each video if asked."""
    outputs = [path.resolve() for path in (values.captions, values.out, values.best) if path]
    if len(set(outputs)) < len(outputs):
        raise ValueError("--out and --best must be different files, and other ones than the captions")
    if sum(value is not None for value in (values.rater, values.prototype, values.votes)) > 1:
        raise ValueError("--rater, --prototype and --votes say whose reward it is: give one of them")
    if values.caution < 0:
        raise ValueError(f"--caution must be at least 0, got {values.caution}")
    captions = read_records(values.captions, Caption)
    if not captions:
        raise ValueError(f"{values.captions} holds no captions")
    model = load_model(values, captions)
    if values.votes:
        fit_to_votes(model, values.votes)
    rate = partial(rate_clip, model, root=values.root, explain=values.objectives, caution=values.caution)
    ratings, num_failed = rate_files(captions, rate)
    rated = [rating for rating in ratings if rating]
    if values.out:
        write_records(values.out, rated)
    else:
        sys.stdout.writelines(json.dumps(asdict(rating), ensure_ascii=False) + "\n" for rating in rated)
    if values.best:
        from salmonn.preference.rating import best_captions

        write_records(values.best, best_captions(captions, ratings))
    if num_failed:
        sys.stderr.write(f"{plural(num_failed, 'video')} could not be read; the captions of the others are rated\n")
    return SOME_FAILED if num_failed else 0


def load_model(values: Namespace, captions: Sequence[Caption]) -> "RewardModel":
    """Load the reward model if it has what the flags ask for; warn of captions that it was not trained for.

    Raises:
        ValueError: it lacks what the flags ask for.
    """
    with garbage_kept():
        from salmonn.model.loading import Placement, hide_progress
        from salmonn.preference.reward_model import RewardModel, read_info

        info = read_info(values.model)
        if values.caution and not info.ensemble:
            raise ValueError(
                f"--caution needs an ensemble of heads, which {values.model} has not: train with --ensemble 5"
            )
        if values.objectives and info.kind != "objectives":
            raise ValueError(f"{values.model} is a {info.kind} reward model: --objectives needs one of that kind")
        if values.votes and not info.prototypes:
            raise ValueError(f"{values.model} has one reward for all: --votes needs a model of the kind ideal-point")
        hide_progress()
        placement = Placement(device=values.device, dtype=values.dtype)
        model = RewardModel.load(
            values.model,
            base=values.base,
            placement=placement,
            reader=values.reader,
            rater=values.rater,
            prototype=values.prototype,
        )
    for sentence in find_untested(model.info, captions):
        sys.stderr.write(f"{values.model} {sentence}\n")
    return model


def find_untested(info: "RewardInfo", captions: Sequence[Caption]) -> list[str]:
    """Return sentences on captions of a kind that a reward model was not trained on."""
    sentences = []
    if others := {one.modality for one in captions if one.modality} - set(info.modalities):
        learned, unknown = " and ".join(info.modalities), " and ".join(sorted(others))
        sentences.append(f"was trained on captions of {learned}: rewards of {unknown} are untested")
    if info.requests and (prompts := {one.prompt for one in captions if one.prompt} - set(info.requests)):
        sentences.append(
            f"learned weights of objectives for {plural(len(info.requests), 'request')}: those for others, such as "
            f'"{min(prompts)}", are untested'
        )
    return sentences


def fit_to_votes(model: "RewardModel", path: Path) -> None:
    """Fit the model's weights to the votes of a new rater.

    Raises:
        ValueError: no vote can be used.
        ClipError: a clip cannot be read.
    """
    from salmonn.preference.comparisons import group_comparisons, read_preferences
    from salmonn.preference.mixture import MixtureHead
    from salmonn.train.raters import collect_votes

    mixture = model.head
    assert isinstance(mixture, MixtureHead), "the flags have been checked"
    preferences = read_preferences(path)
    groups = group_comparisons(preferences.comparisons)
    encoded = []
    for group in tqdm(groups, desc="fitting to votes", unit="clip"):
        one = group.example
        clip = model.captioner.processor.read(
            preferences.root / one.video,
            sound=preferences.root / one.audio if one.audio else None,
            modality=one.modality,
            start_seconds=one.start_seconds,
            end_seconds=one.end_seconds,
        )
        encoded.append(mixture.encode(model.group_states(group, clip)))
    ids = dict.fromkeys((rater for group in groups for rater in group.raters), 0)
    if len(ids) > 1:
        sys.stderr.write(
            f"{path} has votes of {len(ids)} raters{', those without an id counted as one' if '' in ids else ''}; they "
            "are fitted together, as if one new rater had cast them all\n"
        )
    votes = collect_votes(groups, ids)
    model.head = mixture.fit_rater(encoded, votes)
    weights = model.head.weights.tolist()
    described = ", ".join(f"{number}: {100 * weight:.0f} %" for number, weight in enumerate(weights, start=1))
    sys.stderr.write(f"{plural(len(votes), 'vote')} of {path}; weights of the prototypes {described}\n")


def rate_files(
    captions: Sequence[Caption], rate: Callable[[Sequence[Caption]], list["Rating"]]
) -> tuple[list["Rating | None"], int]:
    """Rate captions clip by clip.

    Args:
        captions: captions of any clips.
        rate: rates the captions of one clip; raises ClipError.

    Returns:
        Ratings in the order of the captions, None for those of files that cannot be read; and the number of such clips.
    """
    from salmonn.media.container import ClipError

    by_clip: dict[tuple[object, ...], list[int]] = {}
    for index, one in enumerate(captions):
        by_clip.setdefault((one.video, one.start_seconds, one.end_seconds, one.modality), []).append(index)
    ratings: list[Rating | None] = [None] * len(captions)
    num_failed = 0
    for indices in tqdm(by_clip.values(), desc="rating", unit="clip"):
        try:
            rated = rate([captions[index] for index in indices])
        except ClipError as error:
            sys.stderr.write(f"{error}\n")
            num_failed += 1
            continue
        for index, rating in zip(indices, rated, strict=True):
            ratings[index] = rating
    return ratings, num_failed


def rate_clip(
    model: "RewardModel", captions: Sequence[Caption], *, root: Path, explain: bool, caution: float
) -> list["Rating"]:
    """Read the clip of captions that describe the same part of a video, and rate them; raises ClipError.

    With `explain`, also print a line for each caption: what each objective contributes, as weight x value.
    """
    one = captions[0]
    clip = model.captioner.processor.read(
        root / one.video,
        modality=one.modality or "both",
        start_seconds=one.start_seconds,
        end_seconds=one.end_seconds,
    )
    if explain:
        explained = model.explain(*model.rows_of(captions, lambda _: clip))
        for caption, contributions in zip(captions, explained, strict=True):
            parts = ", ".join(f"{one.objective} {one.weight:.2f} x {one.value:.2f}" for one in contributions)
            sys.stderr.write(f"{caption.video} (sample {caption.sample}): {parts}\n")
    return model.rate(captions, lambda _: clip, caution=caution)
