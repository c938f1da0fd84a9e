"""Measure rater groups on the built-in model: do prototypes predict simulated raters better than one reward?

    OMP_NUM_THREADS=1 python tools/lab/rater_groups.py --seed 2 --out run/lab/raters

Raters of four groups (salmonn/synthetic/raters.py) vote on captions of training clips. Accuracy is measured without
noise on pairs of captions of held-out clips whose utilities differ by more than 0.1, as the mean of the groups.
Controls: raters who all want the same, for whom one prototype must be chosen, and votes with shuffled ids, which must
gain nothing. Captions and states are computed once and kept: other seeds of votes and fits then take a minute.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from salmonn import dist
from salmonn.caption.captioner import SHIPPED_MODEL, Captioner
from salmonn.caption.processor import PromptRow
from salmonn.config import run_recipe
from salmonn.files import write_json
from salmonn.preference.ideal_point import (
    IdealPointConfig,
    RaterModel,
    Votes,
    choose_num_prototypes,
    describe_prototypes,
    fit_new_rater,
    fit_raters,
    sort_prototypes,
)  # fmt: skip
from salmonn.preference.states import answer_states
from salmonn.score.judge import ScoringTask
from salmonn.synthetic.judge import RuleJudge
from salmonn.synthetic.raters import (
    CaptionTraits,
    NoiseName,
    SimulatedRater,
    caption_traits,
    draw_votes,
    group_utility,
    make_raters,
)  # fmt: skip
from salmonn.synthetic.render import SynthConfig
from salmonn.train.data import heldout_config, render_clips
from salmonn.train.encoding import cache_features
from salmonn.train.feature_cache import FeatureCacheConfig, open_feature_cache
from salmonn.train.sampling import SampleConfig, sample_captions

log = logging.getLogger("raters")
MIN_DIFFERENCE = 0.1  # of utilities of a pair that accuracy is measured on
TRAITS = ("seen", "heard", "errors", "repetition", "length")
NEW_VOTES = (0, 2, 5, 10, 20, 50)


@dataclass(frozen=True, kw_only=True)
class RaterLabConfig:
    """Sizes of the measurement.

    Args:
        out: folder for captions, states and results of all seeds.
        model: folder or hub id of the captioner.
        clips_dir: folder of the clips.
        num_clips, num_heldout: numbers of clips that are voted on, and of those that are predicted.
        num_raters, num_unseen: numbers of raters that prototypes are fitted to, and of new ones.
        num_votes: votes of each rater.
        groups: groups that the raters belong to, in turn.
        mixed: each rater is a random mixture of the groups.
        noise: how often raters err.
        num_prototypes: numbers of prototypes to compare.
        num_folds: folds of the cross-validation that chooses one of them; 0 to skip it.
        controls: measure the controls, too.
        fit: model of the raters.
        sampling: sampling of the captions.
        clips_seed: seed of clips and captions.
        seed: seed of votes and fits.
    """

    out: Path = Path("run/lab/raters")
    model: str = str(SHIPPED_MODEL)
    clips_dir: Path = Path("run/clips")
    num_clips: int = 400
    num_heldout: int = 100
    num_raters: int = 40
    num_unseen: int = 20
    num_votes: int = 50
    groups: tuple[str, ...] = ("complete", "short", "sound", "careful")
    mixed: bool = False
    noise: NoiseName = "usual"
    num_prototypes: tuple[int, ...] = (1, 2, 3, 4, 6)
    num_folds: int = 5
    controls: bool = True
    fit: IdealPointConfig = field(default_factory=IdealPointConfig)
    sampling: SampleConfig = field(default_factory=lambda: SampleConfig(temperature=0.8, num_samples=8))
    clips_seed: int = 2
    seed: int = 2


@dataclass(frozen=True)
class JudgedCaptions:
    """Distinct captions of clips, R in all.

    Args:
        clips: text -> traits of the captions of each clip; rows follow each other in this order.
        answer, prompt: (R, P) and (R, D) states.
    """

    clips: list[dict[str, CaptionTraits]]
    answer: Tensor
    prompt: Tensor

    @property
    def offsets(self) -> list[int]:
        """First row of each clip."""
        return [sum(map(len, self.clips[:index])) for index in range(len(self.clips))]

    def traits(self) -> tuple[Tensor, Tensor]:
        """Return traits (R, 5) and the index of each row's clip (R,)."""
        rows = [[getattr(one, name) for name in TRAITS] for captions in self.clips for one in captions.values()]
        return torch.tensor(rows), torch.arange(len(self.clips)).repeat_interleave(
            torch.tensor([len(captions) for captions in self.clips])
        )


def main(config: RaterLabConfig) -> None:
    """Measure, print and save the results of one seed."""
    dist.setup()
    train, heldout = prepare(config)
    results = measure(config, train, heldout)
    log.info("%s", json.dumps(results, indent=1))
    if config.controls:
        results["controls"] = measure_controls(config, train, heldout)
        log.info("%s", json.dumps(results["controls"], indent=1))
    kind = f"{config.noise}{'_mixed' if config.mixed else ''}_{config.fit.form}"
    name = f"raters_{config.seed}_{config.num_votes}_{kind}.json"
    write_json(config.out / f"seed_{config.clips_seed}" / name, results)


def prepare(config: RaterLabConfig) -> tuple[JudgedCaptions, JudgedCaptions]:
    """Sample, judge and encode captions of training and held-out clips, or load what is there."""
    captioner = Captioner.load(config.model)
    cache = open_feature_cache(FeatureCacheConfig(), captioner)
    synth = SynthConfig(clips=config.num_clips, seed=100 + config.clips_seed)
    judged = []
    for name, one in (("train", synth), ("heldout", heldout_config(synth, clips=config.num_heldout))):
        (clips,) = cache_features(captioner, render_clips(config.clips_dir, one), name=name, cache=cache)
        folder = config.out / f"seed_{config.clips_seed}" / name  # as of reward_model.py
        folder.mkdir(parents=True, exist_ok=True)
        captions = sample_captions(
            captioner, clips, config.sampling, name=f"{name}: sampling", seed=config.clips_seed, folder=folder
        )
        texts: list[dict[str, CaptionTraits]] = [{} for _ in clips.references]
        rows: list[list[PromptRow]] = [[] for _ in clips.references]
        index_of = {reference.video: index for index, reference in enumerate(clips.references)}
        for caption in captions:
            index, words = index_of[caption.video], " ".join(caption.text.split())
            if words and words not in texts[index]:
                reference = clips.references[index]
                score = RuleJudge().judge_one(ScoringTask(reference, caption))
                texts[index][words] = caption_traits(caption, score, reference)
                rows[index].append(PromptRow(index, caption.prompt, caption.text, finished=caption.finished))
        path = folder / "states.safetensors"
        if not path.exists():
            features = [clips.features_of(reference) for reference in clips.references]
            states = answer_states(captioner, [row for group in rows for row in group], features, pooling="rich")
            save_file({"answer": states.answer.contiguous(), "prompt": states.prompt.contiguous()}, path)
        states = load_file(path)
        judged.append(JudgedCaptions(texts, states["answer"], states["prompt"]))
    return judged[0], judged[1]


def measure(config: RaterLabConfig, train: JudgedCaptions, heldout: JudgedCaptions) -> dict[str, Any]:
    """Compare numbers of prototypes on known and on new raters."""
    raters = make_raters(config.num_raters, groups=config.groups, mixed=config.mixed, noise=config.noise)
    votes = collect_votes(raters, train, number=config.num_votes, seed=config.seed)
    results: dict[str, Any] = {"votes": len(votes)}
    if config.num_folds:
        chosen, table = choose(config, train, votes, num_raters=len(raters))
        results |= {"chosen": chosen, "cross_validation": [asdict(one) for one in table]}
    for count in config.num_prototypes:
        model = fit(config, train, votes, num_raters=len(raters), num_prototypes=count)
        accuracy = measure_raters(model, raters, model.weights, heldout)
        results[f"K={count}"] = {
            "known": accuracy | {"mean": sum(accuracy.values()) / len(accuracy)},
            "unseen": measure_unseen(config, model, train, heldout),
            "sizes": model.prior.tolist(),
            "entropy": float(model.entropy.mean()),
            "prototypes": describe(model, train),
        }
    return results


def measure_controls(config: RaterLabConfig, train: JudgedCaptions, heldout: JudgedCaptions) -> dict[str, Any]:
    """Choose one or two prototypes for raters of one group, and for votes whose ids are shuffled."""
    alike = make_raters(config.num_raters, groups=("complete",), noise=config.noise)
    same = collect_votes(alike, train, number=config.num_votes, seed=config.seed)
    raters = make_raters(config.num_raters, groups=config.groups, noise=config.noise)
    votes = collect_votes(raters, train, number=config.num_votes, seed=config.seed)
    order = torch.randperm(len(votes), generator=torch.Generator().manual_seed(config.seed))
    shuffled = replace(votes, rater=votes.rater[order])
    config = replace(config, num_prototypes=(1, 2))
    results: dict[str, Any] = {}
    for name, given, people in (("alike", same, alike), ("shuffled", shuffled, raters)):
        if config.num_folds:
            chosen, table = choose(config, train, given, num_raters=len(people))
            results[name] = {"chosen": chosen, "cross_validation": [asdict(one) for one in table]}
        for count in (1, 2):
            model = fit(config, train, given, num_raters=len(people), num_prototypes=count)
            accuracy = measure_raters(model, people, model.weights, heldout)
            results.setdefault(name, {})[f"K={count}"] = sum(accuracy.values()) / len(accuracy)
    return results


def choose(config: RaterLabConfig, captions: JudgedCaptions, votes: Votes, *, num_raters: int) -> tuple[int, list[Any]]:
    """Choose the number of prototypes by cross-validation."""
    return choose_num_prototypes(
        captions.answer, captions.prompt, votes, num_raters=num_raters, config=config.fit,
        candidates=config.num_prototypes, num_folds=config.num_folds, seed=config.seed,
    )  # fmt: skip


def fit(
    config: RaterLabConfig, captions: JudgedCaptions, votes: Votes, *, num_raters: int, num_prototypes: int
) -> RaterModel:
    """Fit prototypes to all votes."""
    return sort_prototypes(
        fit_raters(
            captions.answer, captions.prompt, votes, num_raters=num_raters, num_prototypes=num_prototypes,
            config=config.fit, seed=config.seed,
        )
    )  # fmt: skip


def collect_votes(raters: Sequence[SimulatedRater], captions: JudgedCaptions, *, number: int, seed: int) -> Votes:
    """Draw the votes of all raters."""
    offsets, rows = captions.offsets, []
    for index, rater in enumerate(raters):
        for vote in draw_votes(rater, captions.clips, number=number, seed=seed):
            first, second = offsets[vote.clip] + vote.first, offsets[vote.clip] + vote.second
            rows.append((first, second, index, vote.clip) if vote.prefers_first else (second, first, index, vote.clip))
    return Votes(*torch.tensor(rows).T)


@torch.no_grad()
def measure_raters(
    model: RaterModel, raters: Sequence[SimulatedRater], weights: Tensor, captions: JudgedCaptions
) -> dict[str, float]:
    """Return group -> mean accuracy of its raters on the pairs that are clear to them, with weights (R, K)."""
    encoded = model.head(captions.answer, captions.prompt)
    shares: dict[str, list[float]] = {}
    for rater, mixture in zip(raters, weights, strict=True):
        better, worse = clear_pairs(rater.shares, captions)
        reward = model.head.reward(encoded, mixture)
        right = float((reward[better] > reward[worse]).float().mean())
        shares.setdefault(rater.name.rsplit("-", 1)[0], []).append(right)
    return {group: sum(values) / len(values) for group, values in shares.items()}


def clear_pairs(shares: Mapping[str, float], captions: JudgedCaptions) -> tuple[Tensor, Tensor]:
    """Return the rows of the better and the worse caption of all pairs whose utilities differ enough."""
    pairs = []
    for offset, clip in zip(captions.offsets, captions.clips, strict=True):
        utilities = [sum(share * group_utility(group, one) for group, share in shares.items()) for one in clip.values()]
        for one, other in combinations(range(len(utilities)), 2):
            if abs(utilities[one] - utilities[other]) > MIN_DIFFERENCE:
                better, worse = (one, other) if utilities[one] > utilities[other] else (other, one)
                pairs.append((offset + better, offset + worse))
    better, worse = torch.tensor(pairs).T
    return better, worse


def measure_unseen(
    config: RaterLabConfig, model: RaterModel, train: JudgedCaptions, heldout: JudgedCaptions
) -> dict[int, float]:
    """Return number of votes -> mean accuracy of new raters that are fitted to that number of votes."""
    raters = make_raters(config.num_unseen, groups=config.groups, mixed=config.mixed, noise=config.noise, seed=1)
    accuracy = {}
    with torch.no_grad():
        encoded = model.head(train.answer, train.prompt)
    for number in NEW_VOTES:
        weights = []
        for rater in raters:
            # Other votes than those of known raters with the same name.
            votes = draw_votes(rater, train.clips, number=max(NEW_VOTES), seed=1000 + config.seed)[:number]
            offsets = train.offsets
            first = torch.tensor([offsets[vote.clip] + vote.first for vote in votes], dtype=torch.long)
            second = torch.tensor([offsets[vote.clip] + vote.second for vote in votes], dtype=torch.long)
            wins = torch.tensor([vote.prefers_first for vote in votes], dtype=torch.bool)
            better, worse = torch.where(wins, first, second), torch.where(wins, second, first)
            weights.append(fit_new_rater(model.head, encoded.rows(better), encoded.rows(worse), model.prior))
        by_group = measure_raters(model, raters, torch.stack(weights), heldout)
        accuracy[number] = sum(by_group.values()) / len(by_group)
    return accuracy


@torch.no_grad()
def describe(model: RaterModel, captions: JudgedCaptions) -> list[dict[str, float]]:
    """Return trait -> standardized coefficient of each prototype."""
    traits, clip = captions.traits()
    rewards = model.head.prototype_rewards(model.head(captions.answer, captions.prompt))
    described = describe_prototypes(rewards, traits, clip, names=TRAITS)
    return [{name: round(value, 2) for name, value in one.items()} for one in described]


if __name__ == "__main__":
    run_recipe(main, RaterLabConfig, description=__doc__, on_error=dist.abort)
