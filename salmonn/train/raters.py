"""Training of ideal-point reward models: prototypes of preference, and the weights of the raters (docs/raters.md)."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from salmonn import dist
from salmonn.files import write_records
from salmonn.model.layout import ClipFeatures
from salmonn.model.pooling import AnswerStates
from salmonn.preference.agreement import OrderedVotes, describe_votes, measure_agreement, measure_votes
from salmonn.preference.comparisons import AnswerGroup
from salmonn.preference.heads import fit_temperature
from salmonn.preference.ideal_point import (
    Encoded,
    HeldoutAccuracy,
    IdealPointConfig,
    RaterModel,
    Votes,
    choose_num_prototypes,
    describe_prototypes,
    fit_raters,
    match_prototypes,
    sort_prototypes,
)
from salmonn.preference.mixture import RATERS_NAME, MixtureHead, PrototypeInfo, Rater
from salmonn.preference.objectives import OBJECTIVES
from salmonn.preference.reward_model import RewardInfo, save_reward_model
from salmonn.score.repetition import count_repeated_words
from salmonn.train.data import ClipSource
from salmonn.train.reward import BLIND_DIR, RewardTrainer, rotate_features, split_groups
from salmonn.train.reward_states import STATES_NAME, RewardExample, compute_states

log = logging.getLogger(__name__)
TEXT_TRAITS = ("words", "repetition")
MAX_TRAITS = 3  # in the description of a prototype: those with the largest coefficients


@dataclass(frozen=True)
class HeldoutVotes:
    """How a model that is fitted to some clips predicts the votes on the others.

    Args:
        margins: (N,) of the votes, each with its rater's reward.
        model: the fitted model, with K prototypes.
        agreement: for each prototype's reward, how it orders the votes of each group of raters.
        candidates: accuracy of the numbers of prototypes that were compared; empty if the number was given.
    """

    margins: Tensor
    model: RaterModel
    agreement: tuple[tuple[OrderedVotes, ...], ...]
    candidates: tuple[HeldoutAccuracy, ...] = ()

    @property
    def num_prototypes(self) -> int:
        """K."""
        return self.model.head.num_prototypes


@dataclass(frozen=True)
class FittedRaters:
    """Prototypes with the raters' weights, fitted to all clips.

    Args:
        model: prototypes and weights of the raters.
        raters: the raters.
        info: for reward.json.
        rewards: rewards of the mean rater for all answers, (R,).
    """

    model: RaterModel
    raters: list[Rater]
    info: PrototypeInfo
    rewards: Tensor

    @property
    def head(self) -> MixtureHead:
        """Head of the mean rater."""
        return MixtureHead(self.model.head, self.model.prior)


def collect_votes(groups: Sequence[AnswerGroup], ids: Mapping[str, int]) -> Votes:
    """Return the comparisons of groups whose rows follow each other.

    Args:
        groups: comparisons.
        ids: id of a rater -> index. Comparisons of all sources without ids are those of one rater, "".
    """
    rows, start, clips = [], 0, dict[str, int]()
    for group in groups:
        clip = clips.setdefault(group.example.video, len(clips))
        for (better, worse), rater in zip(group.pairs, group.raters, strict=True):
            rows.append((start + better, start + worse, ids[rater], clip))
        start += len(group.answers)
    return Votes(*torch.tensor(rows, dtype=torch.long).reshape(-1, 4).T)


def measure_raters(
    states: Sequence[AnswerStates],
    groups: Sequence[AnswerGroup],
    *,
    num_train: int,
    num_prototypes: int | None,
    config: IdealPointConfig,
    seed: int,
) -> HeldoutVotes:
    """Fit prototypes and raters to the first `num_train` groups, and predict the votes of the others.

    Args:
        states: states of each group's answers.
        groups: comparisons, grouped by clip.
        num_train: number of groups to learn from.
        num_prototypes: K; None to choose it by cross-validation on the groups to learn from, or 1 for a single rater.
        config: form, sizes and optimization.
        seed: random seed.
    """
    ids = _index_raters(groups)
    train, heldout = (collect_votes(some, ids) for some in (groups[:num_train], groups[num_train:]))
    answer, prompt = _join(states[:num_train])
    candidates: list[HeldoutAccuracy] = []
    if num_prototypes is None and len(ids) == 1:
        num_prototypes = 1
    elif num_prototypes is None:
        num_prototypes, candidates = choose_num_prototypes(
            answer, prompt, train, num_raters=len(ids), config=config, seed=seed
        )
        for one in candidates:
            log.info("%d prototypes: %.1f %% +- %.1f", one.num_prototypes, 100 * one.accuracy, 100 * one.standard_error)
    model = fit_raters(
        answer, prompt, train, num_raters=len(ids), num_prototypes=num_prototypes, config=config, seed=seed
    )
    with torch.no_grad():
        encoded = model.head(*_join(states[num_train:]))
        agreement = measure_groups(model, encoded, heldout, known=train.rater.unique())
    return HeldoutVotes(model.margins(encoded, heldout), model, agreement, tuple(candidates))


def measure_groups(
    model: RaterModel, encoded: Encoded, votes: Votes, *, known: Tensor
) -> tuple[tuple[OrderedVotes, ...], ...]:
    """Measure how the reward of each prototype alone orders the votes of each group of raters.

    A rater belongs to the group of the prototype with the largest weight, by votes on other clips; raters without such
    votes belong to none, unless there is one group only.

    Args:
        model: fitted to votes on other clips.
        encoded: the captions of the votes.
        votes: held-out votes.
        known: (M,) indices of the raters who have votes that the model is fitted to.

    Returns:
        For each prototype, in the rows, and the raters of each, in the columns.
    """
    rewards = model.head.prototype_rewards(encoded)
    margins = rewards[votes.better] - rewards[votes.worse]
    numbers = range(model.head.num_prototypes)
    is_placed = torch.isin(votes.rater, known) | (len(numbers) == 1)
    group = torch.where(is_placed, model.weights.argmax(1)[votes.rater], -1)
    of_group = [(margins[group == number], votes.clip[group == number].tolist()) for number in numbers]
    return tuple(tuple(measure_votes(some[:, number], clips) for some, clips in of_group) for number in numbers)


def fit_rater_groups(
    states: Sequence[AnswerStates],
    groups: Sequence[AnswerGroup],
    heldout: HeldoutVotes,
    *,
    num_train: int,
    config: IdealPointConfig,
    seed: int,
) -> FittedRaters:
    """Fit prototypes and raters to all groups, after `measure_raters` has measured them on the last ones."""
    ids = _index_raters(groups)
    votes, later = (collect_votes(some, ids) for some in (groups, groups[num_train:]))
    answer, prompt = _join(states)
    count = heldout.num_prototypes
    model = sort_prototypes(
        fit_raters(answer, prompt, votes, num_raters=len(ids), num_prototypes=count, config=config, seed=seed)
    )
    with torch.no_grad():
        encoded = model.head(answer, prompt)
        rows, traits, clip, names = _collect_traits(groups)
        own = model.head.prototype_rewards(encoded)
        described = describe_prototypes(own[rows], traits, clip, names=names)
        # The prototypes that were measured are others, in another order.
        head = heldout.model.head
        match = match_prototypes(own[rows], head.prototype_rewards(head(answer, prompt))[rows], clip)
        rewards = model.head.reward(encoded, model.prior)
    info = PrototypeInfo(
        form=config.form,
        dim=config.dim,
        hidden=config.hidden,
        prompt_width=prompt.shape[1],
        sizes=tuple(model.prior.tolist()),
        entropy=float(model.entropy.mean()),
        descriptions=tuple(
            ", ".join(f"{name} {value:+.2f}" for name, value in list(one.items())[:MAX_TRAITS]) for one in described
        ),
        candidates=heldout.candidates,
        means=tuple(own.mean(0).tolist()),
        stds=tuple(own.std(0).clamp(min=1e-6).tolist()),
        agreement=tuple(tuple(heldout.agreement[row][column] for column in match) for row in match),
    )
    raters = []
    for rater, index in ids.items():
        margins = heldout.margins[later.rater == index]
        agreement = float((margins > 0).float().mean()) if len(margins) else None
        weights, num_votes = tuple(model.weights[index].tolist()), int((votes.rater == index).sum())
        raters.append(Rater(rater, weights, num_votes, len(margins), agreement))
    return FittedRaters(model, raters, info, rewards)


def _index_raters(groups: Sequence[AnswerGroup]) -> dict[str, int]:
    return {rater: index for index, rater in enumerate(sorted({one for group in groups for one in group.raters}))}


def _join(states: Sequence[AnswerStates]) -> tuple[Tensor, Tensor]:
    """Return the states of all answers, (R, P), and of their prompts, (R, D)."""
    return torch.cat([one.answer for one in states]), torch.cat([one.prompt for one in states])


def _collect_traits(groups: Sequence[AnswerGroup]) -> tuple[Tensor, Tensor, Tensor, tuple[str, ...]]:
    """Return what prototypes are described by: the objectives of answers where they are known, or else their text.

    Returns:
        (M,) indices of the answers that have the traits, among all; (M, J) traits; (M,) clips; J names.
    """
    has_objectives = any(group.objectives for group in groups)
    rows, traits, clip, start = list[int](), list[Sequence[float]](), list[int](), 0
    for index, group in enumerate(groups):
        known = _fill_unknown(group.objectives) if has_objectives else _text_traits(group)
        rows += range(start, start + len(known))
        traits += known
        clip += [index] * len(known)
        start += len(group.answers)
    names = OBJECTIVES if has_objectives else TEXT_TRAITS
    return torch.tensor(rows), torch.tensor(traits, dtype=torch.float64), torch.tensor(clip), names


def _fill_unknown(objectives: Sequence[Sequence[float | None]]) -> list[Sequence[float]]:
    """Return the objectives of a clip's answers with the mean of the others in place of unknown values."""
    columns = []
    for column in zip(*objectives, strict=True):
        known = [value for value in column if value is not None]
        mean = fmean(known) if known else 0.0
        columns.append([mean if value is None else value for value in column])
    return list(zip(*columns, strict=True))


def _text_traits(group: AnswerGroup) -> list[Sequence[float]]:
    """Return the number of words and the share of repeated ones of each answer."""
    counts = [count_repeated_words(text) for text, _ in group.answers]
    return [(words, repeated / max(words, 1)) for repeated, words in counts]


def train_raters(
    trainer: RewardTrainer,
    groups: Sequence[AnswerGroup],
    features: Mapping[ClipSource, ClipFeatures],
    *,
    root: Path,
    num_prototypes: int | None = None,
    config: IdealPointConfig,
) -> RewardInfo:
    """Fit an ideal-point reward model to the captioner's frozen states, measure and save it.

    The number of prototypes is chosen and all figures are measured with some clips held out; what is saved is then
    fitted to all clips.

    Args:
        trainer: loads the captioner; its kind, pooling, folder, seed and share of held-out clips count.
        groups: comparisons with their raters, grouped by clip.
        features: features of their clips.
        root: folder that the paths of the videos start from.
        num_prototypes: K; None to choose it.
        config: form, sizes and optimization.

    Raises:
        ValueError: the comparisons are of one video only.
    """
    if warning := rater_ids_warning(groups):
        log.warning("%s", warning)
    train, heldout = split_groups(groups, fraction=trainer.config.heldout_fraction, seed=trainer.seed)
    together = [*train, *heldout]
    captioner = trainer.load()

    def states_of(seen: Mapping[ClipSource, ClipFeatures], folder: Path) -> list[AnswerStates]:
        sources = [ClipSource.of_comparison(group.example, root=root) for group in together]
        examples = [RewardExample(group, seen[source]) for group, source in zip(together, sources, strict=True)]
        pooling, name = trainer.config.pooling, f"{folder.name}: states"
        return compute_states(captioner, examples, pooling=pooling, name=name, path=folder / STATES_NAME)

    measure = partial(measure_raters, groups=together, num_train=len(train), config=config, seed=trainer.seed)
    states = states_of(features, trainer.folder)
    measured = measure(states, num_prototypes=num_prototypes)
    blind = None
    if trainer.config.blind:
        blind_states = states_of(rotate_features(features), trainer.folder / BLIND_DIR)
        blind = measure(blind_states, num_prototypes=measured.num_prototypes).margins
    fitted = fit_rater_groups(states, together, measured, num_train=len(train), config=config, seed=trainer.seed)
    std, mean = torch.std_mean(fitted.rewards)
    info = replace(
        trainer.make_info(captioner, train, heldout),
        mean=float(mean),
        std=max(float(std), 1e-6),
        temperature=fit_temperature(measured.margins),
        agreement=measure_agreement(heldout, measured.margins, blind),
        prototypes=fitted.info,
    )
    if dist.is_main():
        write_records(trainer.folder / RATERS_NAME, fitted.raters)
        save_reward_model(trainer.folder, fitted.head, info)
    dist.barrier()
    return info


def rater_ids_warning(groups: Sequence[AnswerGroup]) -> str:
    """Return what it means that comparisons lack ids of raters, or are all of one rater; "" if neither is so."""
    raters = Counter(rater for group in groups for rater in group.raters)
    without = raters.pop("", 0)
    if raters and without:
        total = without + raters.total()
        return f"{without} of {total} comparisons have no rater's id; together they count as those of one rater"
    if len(raters) > 1:
        return ""
    found = "no comparison has the id of a rater, so all count" if without else "all comparisons count"
    return (
        f"{found} as those of one rater: there are no groups of raters to find, and one prototype is enough (K = 1), "
        "as with --kind bradley-terry"
    )


def describe_raters(info: PrototypeInfo) -> str:
    """Return sizes and descriptions of the prototypes as a sentence."""
    described = "; ".join(
        f"{number}: {100 * size:.0f} % of the raters, {text}"
        for number, (size, text) in enumerate(zip(info.sizes, info.descriptions, strict=True), start=1)
    )
    return f"{len(info.sizes)} prototypes ({described}); raters are mixed by {100 * info.entropy:.0f} %"


def print_groups(info: PrototypeInfo) -> None:
    """Print how each prototype's reward orders the held-out votes of each group of raters, as a table.

    For a single prototype it is a sentence; nothing is printed if it was not measured.
    """
    console = Console(width=110)
    if len(info.agreement) == 1:
        ((cell,),) = info.agreement
        described = f"{describe_votes(cell)} of {cell.num_votes} held-out votes"
        console.print(f"The raters are one group, whose reward orders {described} right.", highlight=False)
    elif info.agreement:
        table = Table(title="Held-out votes of each group of raters that a reward orders right (95 % interval)")
        table.add_column("reward")
        for number, cell in enumerate(info.agreement[0], start=1):
            table.add_column(f"group {number} ({cell.num_votes} votes)", justify="right")
        for number, (description, row) in enumerate(zip(info.descriptions, info.agreement, strict=True), start=1):
            table.add_row(f"{number}: {description}", *map(describe_votes, row))
        console.print(table)
