"""Training of ideal-point reward models: prototypes of preference, and the weights of the raters (docs/raters.md)."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from salmonn import dist
from salmonn.files import write_records
from salmonn.model.layout import ClipFeatures
from salmonn.model.pooling import AnswerStates
from salmonn.preference.agreement import measure_agreement
from salmonn.preference.comparisons import AnswerGroup
from salmonn.preference.heads import fit_temperature
from salmonn.preference.ideal_point import (
    HeldoutAccuracy,
    IdealPointConfig,
    RaterModel,
    Votes,
    choose_num_prototypes,
    describe_prototypes,
    fit_raters,
    sort_prototypes,
)
from salmonn.preference.mixture import RATERS_NAME, MixtureHead, PrototypeInfo, Rater
from salmonn.preference.reward_model import RewardInfo, save_reward_model
from salmonn.score.repetition import count_repeated_words
from salmonn.train.data import ClipSource
from salmonn.train.reward import BLIND_DIR, RewardTrainer, rotate_features, split_groups
from salmonn.train.reward_states import STATES_NAME, RewardExample, compute_states

log = logging.getLogger(__name__)
TEXT_TRAITS = ("words", "repetition")


@dataclass(frozen=True)
class FittedRaters:
    """Prototypes with the raters' weights, and how far they predict held-out votes.

    Args:
        model: prototypes and weights of the raters.
        raters: the raters.
        info: for reward.json.
        margins: (N,) of the held-out votes, each with its rater's reward.
        rewards: rewards of the mean rater for the answers that were trained on, (R,).
    """

    model: RaterModel
    raters: list[Rater]
    info: PrototypeInfo
    margins: Tensor
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


def fit_rater_groups(
    states: Sequence[AnswerStates],
    groups: Sequence[AnswerGroup],
    *,
    num_train: int,
    num_prototypes: int | None,
    config: IdealPointConfig,
    seed: int,
) -> FittedRaters:
    """Fit prototypes and raters to the first `num_train` groups, and measure them on the others.

    Args:
        states: states of each group's answers.
        groups: comparisons, grouped by clip.
        num_train: number of groups to learn from.
        num_prototypes: K; None to choose it by cross-validation on the groups to learn from, or 1 for a single rater.
        config: form, sizes and optimization.
        seed: random seed.
    """
    ids = {rater: index for index, rater in enumerate(sorted({one for group in groups for one in group.raters}))}
    train, heldout = (collect_votes(some, ids) for some in (groups[:num_train], groups[num_train:]))
    answer, prompt = (torch.cat([getattr(one, name) for one in states[:num_train]]) for name in ("answer", "prompt"))
    candidates: list[HeldoutAccuracy] = []
    if num_prototypes is None and len(ids) == 1:
        num_prototypes = 1
    elif num_prototypes is None:
        num_prototypes, candidates = choose_num_prototypes(
            answer, prompt, train, num_raters=len(ids), config=config, seed=seed
        )
        for one in candidates:
            log.info("%d prototypes: %.1f %% +- %.1f", one.num_prototypes, 100 * one.accuracy, 100 * one.standard_error)
    model = sort_prototypes(
        fit_raters(answer, prompt, train, num_raters=len(ids), num_prototypes=num_prototypes, config=config, seed=seed)
    )
    with torch.no_grad():
        others = [torch.cat([getattr(one, name) for one in states[num_train:]]) for name in ("answer", "prompt")]
        margins = model.margins(model.head(*others), heldout)
        encoded = model.head(answer, prompt)
        described = describe_prototypes(
            model.head.prototype_rewards(encoded), *_text_traits(groups[:num_train]), names=TEXT_TRAITS
        )
        rewards = model.head.reward(encoded, model.prior)
    info = PrototypeInfo(
        form=config.form,
        dim=config.dim,
        hidden=config.hidden,
        prompt_width=prompt.shape[1],
        sizes=tuple(model.prior.tolist()),
        entropy=float(model.entropy.mean()),
        descriptions=tuple(", ".join(f"{name} {value:+.2f}" for name, value in one.items()) for one in described),
        candidates=tuple(candidates),
    )
    return FittedRaters(model, _list_raters(model, ids, train, heldout, margins), info, margins, rewards)


def _text_traits(groups: Sequence[AnswerGroup]) -> tuple[Tensor, Tensor]:
    """Return the numbers of words and the shares of repeated ones of all answers, (R, 2), and their clips, (R,)."""
    rows, clip = [], []
    for index, group in enumerate(groups):
        for text, _ in group.answers:
            repeated, words = count_repeated_words(text)
            rows.append((words, repeated / max(words, 1)))
            clip.append(index)
    return torch.tensor(rows, dtype=torch.float64), torch.tensor(clip)


def _list_raters(
    model: RaterModel, ids: Mapping[str, int], train: Votes, heldout: Votes, margins: Tensor
) -> list[Rater]:
    raters = []
    for rater, index in ids.items():
        theirs = margins[heldout.rater == index]
        raters.append(
            Rater(
                rater,
                tuple(model.weights[index].tolist()),
                num_votes=int((train.rater == index).sum()),
                num_heldout=len(theirs),
                agreement=float((theirs > 0).float().mean()) if len(theirs) else None,
            )
        )
    return raters


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

    def measure(seen: Mapping[ClipSource, ClipFeatures], folder: Path, count: int | None) -> FittedRaters:
        examples = [
            RewardExample(group, seen[ClipSource.of_comparison(group.example, root=root)]) for group in together
        ]
        states = compute_states(
            captioner,
            examples,
            pooling=trainer.config.pooling,
            name=f"{folder.name}: states",
            path=folder / STATES_NAME,
        )
        return fit_rater_groups(
            states, together, num_train=len(train), num_prototypes=count, config=config, seed=trainer.seed
        )

    fitted = measure(features, trainer.folder, num_prototypes)
    blind = None
    if trainer.config.blind:
        blind = measure(rotate_features(features), trainer.folder / BLIND_DIR, len(fitted.info.sizes))
    agreement = measure_agreement(heldout, fitted.margins, blind.margins if blind else None)
    std, mean = torch.std_mean(fitted.rewards)
    info = replace(
        trainer.make_info(captioner, train, heldout),
        mean=float(mean),
        std=max(float(std), 1e-6),
        temperature=fit_temperature(fitted.margins),
        agreement=agreement,
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
