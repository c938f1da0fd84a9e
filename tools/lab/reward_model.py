"""Measure reward models on the built-in model: accuracy on held-out pairs and Total of the best of N, next to controls.

    OMP_NUM_THREADS=1 python tools/lab/reward_model.py --out run/lab/reward --seed 2

The rule judge is the gold standard. Captions, scores and states are computed once and kept in the folder.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from statistics import fmean

import torch
from rich.console import Console
from scipy.stats import spearmanr
from torch import Tensor

from salmonn import dist
from salmonn.caption.captioner import SHIPPED_MODEL, Captioner
from salmonn.cli.options import new_table
from salmonn.config import run_recipe
from salmonn.files import write_json
from salmonn.model.pooling import AnswerStates, Pooling
from salmonn.preference.agreement import share_positive
from salmonn.preference.claims import clause_credits, sum_clauses
from salmonn.preference.comparisons import AnswerGroup
from salmonn.preference.rating import Rating
from salmonn.preference.reward import JudgeReward
from salmonn.records import Caption, Comparison, Score
from salmonn.score.metrics import compute_rates
from salmonn.synthetic.judge import RuleJudge
from salmonn.synthetic.render import SynthConfig
from salmonn.train.data import ClipSet, heldout_config, render_clips
from salmonn.train.encoding import cache_features
from salmonn.train.feature_cache import FeatureCacheConfig, open_feature_cache
from salmonn.train.reward import RewardTrainingConfig
from salmonn.train.reward_heads import fit_claims, fit_head
from salmonn.train.reward_states import RewardExample, compute_states
from salmonn.train.rounds import rate_captions
from salmonn.train.sampling import SampleConfig, sample_captions

log = logging.getLogger("reward lab")
NUM_LABELLED = (25, 50, 100, 200, 400)
COLUMNS = ("pairs right %, gap 0.1", "gap 0.3", "Total of the best %", "Spearman with words")


@dataclass(frozen=True, kw_only=True)
class RewardLabConfig:
    """Sizes of the measurement.

    Args:
        out: folder for captions, scores, states and results of all seeds.
        model: folder or hub id of the captioner.
        clips_dir: folder of the clips.
        num_clips, num_heldout: numbers of clips that are learned from, and of those that are measured on.
        sampling: sampling of the captions.
        training: l2 and center_weight of the heads.
        feature_cache: where the outputs of the encoders are stored.
        seed: seed of clips and captions.
    """

    out: Path = Path("run/lab/reward")
    model: str = str(SHIPPED_MODEL)
    clips_dir: Path = Path("run/clips")
    num_clips: int = 400
    num_heldout: int = 100
    sampling: SampleConfig = field(default_factory=SampleConfig)
    training: RewardTrainingConfig = field(default_factory=RewardTrainingConfig)
    feature_cache: FeatureCacheConfig = field(default_factory=FeatureCacheConfig)
    seed: int = 2


@dataclass(frozen=True)
class LabClip:
    """A clip with its judged captions.

    Args:
        example: captions with the clip's features; the pairs are those with a gap of at least 0.1.
        scores: the judge's scores.
        values: the judge's ratings.
    """

    example: RewardExample
    scores: list[Score]
    values: list[float]

    @property
    def words(self) -> list[int]:
        """Lengths of the captions."""
        return [len(text.split()) for text, _ in self.example.group.answers]


def main(config: RewardLabConfig) -> None:
    """Sample and judge captions, fit heads and print the table."""
    dist.setup()
    captioner = Captioner.load(config.model)
    synth = SynthConfig(clips=config.num_clips, seed=100 + config.seed)
    sets = [render_clips(config.clips_dir, one) for one in (synth, heldout_config(synth, clips=config.num_heldout))]
    cache = open_feature_cache(config.feature_cache, captioner)
    train, heldout = cache_features(captioner, *sets, name="clips", cache=cache)
    folder = config.out / f"seed_{config.seed}"
    learned, measured = (
        make_clips(captioner, clips, config, folder=folder / name)
        for clips, name in ((train, "train"), (heldout, "heldout"))
    )
    rows = controls(measured)
    rows |= fitted_rows(captioner, learned, measured, config, folder=folder)
    print_table(rows, measured)
    write_json(folder / "reward_model.json", {name: measure(values, measured) for name, values in rows.items()})


def make_clips(captioner: Captioner, clips: ClipSet, config: RewardLabConfig, *, folder: Path) -> list[LabClip]:
    """Sample captions of clips and judge them, or load both from the folder."""
    name = f"{folder.name}: sampling"
    captions = sample_captions(captioner, clips, config.sampling, name=name, seed=config.seed, folder=folder)
    ratings = rate_captions(captions, clips, reward=JudgeReward(RuleJudge(), repetition_weight=1.0), folder=folder)
    by_video: dict[str, list[tuple[Caption, Rating]]] = {}
    for caption, rating in zip(captions, ratings, strict=True):
        by_video.setdefault(caption.video, []).append((caption, rating))
    references = clips.by_video
    return [
        LabClip(
            RewardExample(make_group(own), clips.features_of(references[video])),
            [rating.score for _, rating in own if rating.score],
            [rating.value for _, rating in own],
        )
        for video, own in by_video.items()
    ]


def make_group(rated: Sequence[tuple[Caption, Rating]]) -> AnswerGroup:
    """Return all captions of a clip, also equal ones, with the pairs that differ by at least 0.1 in the rating."""
    pairs = [
        (first, second) if rated[first][1].value > rated[second][1].value else (second, first)
        for first, second in combinations(range(len(rated)), 2)
        if abs(rated[first][1].value - rated[second][1].value) >= 0.1 - 1e-9
    ]
    one = rated[0][0]
    answers = tuple((caption.text, caption.finished) for caption, _ in rated)
    credits = tuple(clause_credits(rating.score, caption.text) for caption, rating in rated if rating.score)
    example = Comparison(one.video, one.prompt, "", "")
    return AnswerGroup(example, answers, tuple(pairs), (None,) * len(pairs), credits=credits)


def controls(clips: Sequence[LabClip]) -> dict[str, list[Tensor]]:
    """Return rankers that need no training."""
    generator = torch.Generator().manual_seed(0)
    return {
        "random": [torch.rand(len(clip.values), generator=generator) for clip in clips],
        "longest": [torch.tensor(clip.words).double() for clip in clips],
        "oracle (rule judge)": [torch.tensor(clip.values, dtype=torch.float64) for clip in clips],
    }


def fitted_rows(
    captioner: Captioner,
    learned: Sequence[LabClip],
    measured: Sequence[LabClip],
    config: RewardLabConfig,
    *,
    folder: Path,
) -> dict[str, list[Tensor]]:
    """Return the rewards of the measured captions by heads on frozen states, and by two log-probabilities."""
    clips = [*learned, *measured]
    count, width = len(learned), captioner.network.lm.get_decoder().config.hidden_size
    others = [
        replace(one.example, features=other.example.features)
        for one, other in zip(clips, [*clips[1:], clips[0]], strict=True)
    ]

    def states_of(examples: Sequence[RewardExample], pooling: Pooling, name: str) -> list[AnswerStates]:
        return compute_states(captioner, examples, pooling=pooling, name=name, path=folder / f"{name}.safetensors")

    examples = [clip.example for clip in clips]
    rich, last = states_of(examples, "rich", "rich"), states_of(examples, "last", "last")
    foreign = states_of(others, "rich", "rich_blind")
    # Of 6 layers, two are pooled before the mean of the output (salmonn.model.pooling).
    mean = [AnswerStates(one.prompt, one.answer[:, 2 * width : 3 * width]) for one in rich]

    def rewards(states: Sequence[AnswerStates], asked: Sequence[AnswerStates], labelled: int = count) -> list[Tensor]:
        usable = [number for number in range(labelled) if learned[number].example.group.pairs]
        head = fit_head(
            [states[n] for n in usable],
            [learned[n].example.group for n in usable],
            l2=config.training.l2,
            center_weight=config.training.center_weight,
        )
        with torch.no_grad():
            return [head.double()(one) for one in asked[count:]]

    rows = {
        "sum of log-probabilities": [one.answer[:, -6].double() for one in rich[count:]],
        "mean of log-probabilities": [one.answer[:, -5].double() for one in rich[count:]],
        "last": rewards(last, last),
        "mean": rewards(mean, mean),
        "rich": rewards(rich, rich),
        "rich, asked with another clip": rewards(rich, foreign),
        "blind (trained and asked with another clip)": rewards(foreign, foreign),
    }
    for name, shown in (("claims", examples), ("claims, blind", others)):
        clauses = states_of(shown, "clauses", name)
        summed = [
            sum_clauses(one, clip.example.group.answers) for one, clip in zip(clauses[count:], measured, strict=True)
        ]
        for number in (count, min(100, count)):
            head = fit_claims(clauses[:number], [clip.example.group for clip in learned[:number]]).double()
            with torch.no_grad():
                rows[name if number == count else f"{name}, {number} labelled clips"] = [head(one) for one in summed]
    numbers = [number for number in NUM_LABELLED if number < count]
    return rows | {f"rich, {number} labelled clips": rewards(rich, rich, number) for number in numbers}


def measure(values: Sequence[Tensor], clips: Sequence[LabClip]) -> tuple[float, float, float, float]:
    """Return accuracy on pairs with a gap of 0.1 and of 0.3, Total of the best caption, mean Spearman with words."""
    margins, large, best, correlations = [], [], [], []
    for value, clip in zip(values, clips, strict=True):
        for better, worse in clip.example.group.pairs:
            margins.append(float(value[better] - value[worse]))
            if clip.values[better] - clip.values[worse] >= 0.3 - 1e-9:
                large.append(margins[-1])
        best.append(clip.scores[int(value.argmax())])
        if len(set(clip.words)) > 1 and len(set(value.tolist())) > 1:
            correlations.append(float(spearmanr(value.tolist(), clip.words).statistic))
    accuracies = (share_positive(torch.tensor(one)) for one in (margins, large))
    return (*accuracies, compute_rates(best).total, fmean(correlations))  # type: ignore[return-value]


def print_table(rows: dict[str, list[Tensor]], clips: Sequence[LabClip]) -> None:
    """Print the figures of all rankers."""
    table = new_table(f"{len(clips)} held-out clips", COLUMNS)
    for name, values in rows.items():
        small, large, total, words = measure(values, clips)
        table.add_row(name, f"{100 * small:.1f}", f"{100 * large:.1f}", f"{100 * total:.1f}", f"{words:+.2f}")
    num_pairs = sum(len(clip.example.group.pairs) for clip in clips)
    console = Console(width=110)
    console.print(table)
    console.print(json.dumps({"pairs": num_pairs}))


if __name__ == "__main__":
    run_recipe(main, RewardLabConfig, description=__doc__, on_error=dist.abort)
