"""Measure whether the gate of a reward model with named objectives follows the request: gated against fixed weights.

    OMP_NUM_THREADS=1 python tools/lab/gate.py --seed 2 --out run/lab/reward

The same captions are asked for in three ways: picture and sound, picture alone, sound alone. Simulated raters want what
is asked for and dislike what is not (`UTILITY`), and vote with noise. All rewards learn from the same votes; accuracy
is measured without noise on held-out clips, on pairs whose utilities differ by more than 0.1. The captions are those of
reward_model.py in the same folder, or are sampled.
"""

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from salmonn import dist
from salmonn.caption.captioner import SHIPPED_MODEL, Captioner
from salmonn.cli.options import new_table
from salmonn.config import run_recipe
from salmonn.files import write_json
from salmonn.model.config import PLAIN_PROMPTS
from salmonn.model.pooling import AnswerStates
from salmonn.preference.comparisons import AnswerGroup
from salmonn.preference.heads import Head, ObjectiveHead
from salmonn.preference.objectives import OBJECTIVES, objectives_of
from salmonn.preference.reward import JudgeReward
from salmonn.records import Comparison, Modality, Score
from salmonn.synthetic.judge import RuleJudge
from salmonn.synthetic.raters import NOISE
from salmonn.synthetic.render import SynthConfig
from salmonn.train.data import ClipSet, heldout_config, render_clips
from salmonn.train.encoding import cache_features
from salmonn.train.feature_cache import FeatureCacheConfig, open_feature_cache
from salmonn.train.reward import RewardTrainingConfig
from salmonn.train.reward_heads import ObjectiveConfig, fit_head, fit_objective_head
from salmonn.train.reward_states import RewardExample, compute_states
from salmonn.train.rounds import rate_captions
from salmonn.train.sampling import SampleConfig, sample_captions

log = logging.getLogger("gate")
# Request -> objective -> what it is worth.
UTILITY: Mapping[Modality, Mapping[str, float]] = {
    "both": {"seen": 0.35, "heard": 0.35, "faithful": 0.2, "unrepeated": 0.1},
    "visual": {"seen": 0.8, "faithful": 0.2, "heard": -0.3},
    "audio": {"heard": 0.8, "faithful": 0.2, "seen": -0.3},
}
MIN_DIFFERENCE = 0.1  # of utilities of a pair that accuracy is measured on


@dataclass(frozen=True, kw_only=True)
class GateLabConfig:
    """Sizes of the measurement.

    Args:
        out: folder for captions, scores, states and results of all seeds.
        model: folder or hub id of the captioner.
        clips_dir: folder of the clips.
        num_clips, num_heldout: numbers of clips that are voted on, and of those that are measured on.
        num_votes: votes on each clip and request.
        sampling: sampling of the captions.
        feature_cache: where the outputs of the encoders are stored.
        seed: seed of clips, captions and votes.
    """

    out: Path = Path("run/lab/reward")
    model: str = str(SHIPPED_MODEL)
    clips_dir: Path = Path("run/clips")
    num_clips: int = 400
    num_heldout: int = 100
    num_votes: int = 4
    sampling: SampleConfig = field(default_factory=SampleConfig)
    feature_cache: FeatureCacheConfig = field(default_factory=FeatureCacheConfig)
    seed: int = 2


@dataclass(frozen=True)
class Asked:
    """A clip's captions as answers to one request.

    Args:
        request: the request.
        example: captions, prompt and features; its pairs are votes, or all clear pairs of a held-out clip.
        utilities: what each caption is worth.
    """

    request: Modality
    example: RewardExample
    utilities: list[float]

    @property
    def group(self) -> AnswerGroup:
        """Captions and pairs."""
        return self.example.group


def main(config: GateLabConfig) -> None:
    """Fit all rewards to the votes, print the table and write results."""
    dist.setup()
    captioner = Captioner.load(config.model)
    synth = SynthConfig(clips=config.num_clips, seed=100 + config.seed)
    sets = [render_clips(config.clips_dir, one) for one in (synth, heldout_config(synth, clips=config.num_heldout))]
    cache = open_feature_cache(config.feature_cache, captioner)
    folder, rng = config.out / f"seed_{config.seed}", random.Random(config.seed)
    learned, measured = (
        [with_pairs(one, rng, number=number) for one in ask(captioner, clips, config, folder=folder / name)]
        for clips, name, number in zip(
            cache_features(captioner, *sets, name="clips", cache=cache),
            ("train", "heldout"),
            (config.num_votes, None),
            strict=True,
        )
    )
    learned, measured = ([one for one in asked if one.group.pairs] for asked in (learned, measured))
    states, tested = (
        compute_states(
            captioner,
            [one.example for one in asked],
            pooling="rich",
            name=f"gate_{name}",
            path=folder / f"gate_{name}.safetensors",
        )
        for asked, name in ((learned, "train"), (measured, "heldout"))
    )
    groups, training = [one.group for one in learned], RewardTrainingConfig()
    gated, fixed = (fit_objective_head(states, groups, ObjectiveConfig(gate=gate)) for gate in (True, False))
    heads: dict[str, Head] = {
        "gate": gated,
        "fixed weights": fixed,
        "Bradley-Terry": fit_head(states, groups, l2=training.l2, center_weight=training.center_weight).double(),
    }
    accuracies = {name: accuracy_of(predict(head, tested), measured) for name, head in heads.items()}
    signed = fit_signed_weights(fixed, states, groups)
    values = [fixed.objectives(one) @ signed for one in tested]
    accuracies["fixed weights of any sign"] = accuracy_of(values, measured)
    accuracies["best constant utility"] = best_constant(measured)
    gain = accuracies["gate"]["mean"] - max(
        accuracies[name]["mean"] for name in ("fixed weights", "fixed weights of any sign")
    )
    weights = mean_weights(gated, tested, measured)
    table = new_table(f"{config.num_heldout} held-out clips, pairs right %", (*UTILITY, "mean"))
    for name, row in accuracies.items():
        table.add_row(name, *(f"{100 * row[column]:.1f}" for column in (*UTILITY, "mean")))
    console = Console(width=110)
    console.print(table)
    console.print(f"gate against the best fixed weights: {100 * gain:+.1f} points; mean weights {weights}")
    write_json(folder / "gate.json", {"gain": gain, "accuracies": accuracies, "weights": weights})


def ask(captioner: Captioner, clips: ClipSet, config: GateLabConfig, *, folder: Path) -> list[Asked]:
    """Sample and judge captions of clips, or load both from the folder, and put them under each request."""
    name = f"{folder.name}: sampling"
    captions = sample_captions(captioner, clips, config.sampling, name=name, seed=config.seed, folder=folder)
    ratings = rate_captions(captions, clips, reward=JudgeReward(RuleJudge(), repetition_weight=1.0), folder=folder)
    by_video: dict[str, dict[tuple[str, bool], Score]] = {}
    for caption, rating in zip(captions, ratings, strict=True):
        assert rating.score is not None
        by_video.setdefault(caption.video, {}).setdefault((caption.text, caption.finished), rating.score)
    return [make_asked(request, video, scores, clips) for video, scores in by_video.items() for request in UTILITY]


def make_asked(request: Modality, video: str, scores: Mapping[tuple[str, bool], Score], clips: ClipSet) -> Asked:
    """Return a clip's distinct captions under a request, without pairs."""
    reference = clips.by_video[video]
    objectives = tuple(objectives_of(score, reference) for score in scores.values())
    utilities = [utility(request, row) for row in objectives]
    example = Comparison(video, PLAIN_PROMPTS[request], "", "")
    group = AnswerGroup(example, tuple(scores), (), (), objectives=objectives)
    return Asked(request, RewardExample(group, clips.features_of(reference)), utilities)


def utility(request: Modality, objectives: Sequence[float | None]) -> float:
    """Return what a caption with these objectives is worth under a request."""
    return sum(weight * (objectives[OBJECTIVES.index(name)] or 0.0) for name, weight in UTILITY[request].items())


def with_pairs(asked: Asked, rng: random.Random, *, number: int | None) -> Asked:
    """Return the captions with this number of noisy votes, or with all clear pairs in the right order."""
    pairs = list(combinations(range(len(asked.utilities)), 2))
    differences = {(one, other): asked.utilities[one] - asked.utilities[other] for one, other in pairs}
    if number is None:
        chosen = [
            pair if differences[pair] > 0 else pair[::-1] for pair in pairs if abs(differences[pair]) > MIN_DIFFERENCE
        ]
    else:
        noise, chosen = NOISE["usual"], []
        for pair in rng.sample(pairs, min(number, len(pairs))):
            certain = float(torch.sigmoid(torch.tensor(differences[pair] / noise.temperature)))
            first = rng.random() < noise.lapses / 2 + (1 - noise.lapses) * certain
            chosen.append(pair if first else pair[::-1])
    group = replace(asked.group, pairs=tuple(chosen), margins=(None,) * len(chosen))
    return replace(asked, example=replace(asked.example, group=group))


@torch.no_grad()
def predict(head: Head, states: Sequence[AnswerStates]) -> list[Tensor]:
    """Return the rewards of the captions of each clip and request."""
    return [head(one) for one in states]


def accuracy_of(values: Sequence[Tensor], measured: Sequence[Asked]) -> dict[str, float]:
    """Return request -> share of its pairs that are ordered right, and their mean."""
    right: dict[str, list[bool]] = {request: [] for request in UTILITY}
    for value, one in zip(values, measured, strict=True):
        right[one.request] += [bool(value[better] > value[worse]) for better, worse in one.group.pairs]
    shares = {request: fmean(one) for request, one in right.items()}
    return shares | {"mean": fmean(shares.values())}


def fit_signed_weights(head: ObjectiveHead, states: Sequence[AnswerStates], groups: Sequence[AnswerGroup]) -> Tensor:
    """Return fixed weights (k,) of the predicted objectives, of any sign, by logistic regression on the votes."""
    with torch.no_grad():
        objectives = [head.objectives(one) for one in states]
    differences = torch.stack(
        [
            own[better] - own[worse]
            for own, group in zip(objectives, groups, strict=True)
            for better, worse in group.pairs
        ]
    )
    weights = torch.zeros(differences.shape[1], dtype=differences.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.softplus(-differences @ weights).mean() + 1e-4 * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def best_constant(measured: Sequence[Asked]) -> dict[str, float]:
    """Return the accuracy of the best of the true utilities for all requests: about the limit of fixed weights."""
    rows = [
        accuracy_of(
            [torch.tensor([utility(request, row) for row in one.group.objectives]) for one in measured], measured
        )
        for request in UTILITY
    ]
    return max(rows, key=lambda row: row["mean"])


@torch.no_grad()
def mean_weights(
    head: ObjectiveHead, states: Sequence[AnswerStates], measured: Sequence[Asked]
) -> dict[str, dict[str, float]]:
    """Return request -> objective -> mean weight that the gate gives it."""
    found: dict[str, dict[str, float]] = {}
    for request in UTILITY:
        own = torch.cat(
            [head.weights(state) for state, one in zip(states, measured, strict=True) if one.request == request]
        )
        found[request] = {name: round(float(weight), 2) for name, weight in zip(OBJECTIVES, own.mean(0), strict=True)}
    return found


if __name__ == "__main__":
    run_recipe(main, GateLabConfig, description=__doc__, on_error=dist.abort)
