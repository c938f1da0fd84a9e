"""Measure whether the reward benchmark predicts what a reward is good for: choosing the best of N captions.

    OMP_NUM_THREADS=1 python tools/lab/reward_benchmark.py --out run/lab/reward_benchmark

Linear reward models on the frozen states of the built-in model, fitted to 25 to 400 clips of judged captions, with two
poolings and with wrong labels, and rewards that need no fit. For each: accuracy on data/reward_pairs.jsonl, and on
held-out clips the reduction of Total by choosing the best of N samples, and Pearson's r of the two. RAG-RewardBench
reports 0.84 for its own (arXiv 2412.13746); the rule judge is the gold standard here.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean

import torch
from rich.console import Console
from rich.table import Table
from scipy import stats
from torch import Tensor

from salmonn import dist
from salmonn.caption.captioner import SHIPPED_MODEL, Captioner
from salmonn.caption.processor import PromptRow
from salmonn.config import run_recipe
from salmonn.files import write_json
from salmonn.model.layout import ClipFeatures
from salmonn.model.pooling import NUM_LOGP_FIGURES, upper_layers
from salmonn.preference.benchmark import COLUMNS, BenchmarkResult, Outcome, summarize, table_rows
from salmonn.preference.benchmark_items import BenchmarkItem, clip_name, read_items
from salmonn.preference.comparisons import compare_ratings
from salmonn.preference.heads import fit_scalar_head
from salmonn.preference.reward import JudgeReward
from salmonn.preference.states import answer_states
from salmonn.records import Caption
from salmonn.synthetic.judge import RuleJudge
from salmonn.synthetic.render import SynthConfig
from salmonn.train.data import ClipSet, heldout_config, render_clips
from salmonn.train.encoding import cache_features, encode_benchmark_clips
from salmonn.train.feature_cache import FeatureCacheConfig, open_feature_cache
from salmonn.train.rounds import rate_captions
from salmonn.train.sampling import SampleConfig, sample_captions

MIN_GAP = 0.1  # of the judge's ratings, for a pair to be learned from
L2 = 3e-3
Clips = dict[str, ClipFeatures]


@dataclass(frozen=True, kw_only=True)
class BenchmarkLabConfig:
    """Sizes of the measurement.

    Args:
        out: folder for captions, scores and results.
        model: folder or hub id of the captioner.
        clips_dir: folder of the clips.
        benchmark_dir: folder of the benchmark's clips, as of `salmonn reward-benchmark`.
        synth: training clips; held-out clips are like them, from a different seed.
        heldout_clips: number of held-out clips.
        sampling: sampling of the captions.
        seed: seed of the sampling, and of the order of the training clips.
        pairs: file of the benchmark.
        labelled_clips: numbers of training clips with labels; all of them are used as well.
        noise: fractions of wrong labels, with all training clips.
        blind: also fit and ask a reward with the features of other clips.
    """

    out: Path = Path("run/lab/reward_benchmark")
    model: str = str(SHIPPED_MODEL)
    clips_dir: Path = Path("run/clips")
    benchmark_dir: Path = Path("run/benchmark")
    synth: SynthConfig = field(default_factory=lambda: SynthConfig(clips=400, seed=11, questions=7))
    heldout_clips: int = 100
    sampling: SampleConfig = field(default_factory=lambda: SampleConfig(temperature=0.8, num_samples=8))
    seed: int = 1
    pairs: Path = Path("data/reward_pairs.jsonl")
    labelled_clips: tuple[int, ...] = (25, 50, 100, 200)
    noise: tuple[float, ...] = (0.2, 0.4)
    blind: bool = True


@dataclass(frozen=True)
class Texts:
    """Answers with the clips that they are about.

    Args:
        rows: prompt, answer and the clip's place in `clips`.
        clips: names of the clips.
        features: features by name.
    """

    rows: list[PromptRow]
    clips: list[str]
    features: Clips

    def states(self, captioner: Captioner, *, blind: bool = False) -> Tensor:
        """Return the rich states (B, P) of all answers, with the features of their clips or of the next ones."""
        shown = [*self.clips[1:], *self.clips[:1]] if blind else self.clips
        return answer_states(captioner, self.rows, [self.features[name] for name in shown], pooling="rich").answer


@dataclass(frozen=True)
class RewardResult:
    """Result of one reward.

    Args:
        reward: its name.
        accuracy: accuracy on the benchmark.
        total: Total of the captions that it chooses of N.
        scenarios: accuracy by scenario.
    """

    reward: str
    accuracy: float
    total: float
    scenarios: dict[str, float]


def main(config: BenchmarkLabConfig) -> None:
    """Measure all rewards, print the table and write benchmark.json."""
    dist.setup()
    captioner = Captioner.load(config.model)
    cache = open_feature_cache(FeatureCacheConfig(), captioner)
    sets = [
        render_clips(config.clips_dir, synth)
        for synth in (config.synth, heldout_config(config.synth, clips=config.heldout_clips))
    ]
    train, heldout = cache_features(captioner, *sets, name="clips", cache=cache)
    learned = Judged.of(captioner, train, config, folder=config.out / "train")
    chosen = Judged.of(captioner, heldout, config, folder=config.out / "heldout")
    items = read_items([config.pairs])
    features = encode_benchmark_clips(captioner, items, clips_dir=config.benchmark_dir, cache=cache)
    benchmark = benchmark_texts(items, features)

    results = measure(config, captioner, learned, chosen, items, benchmark)
    random_total = mean(chosen.totals)
    r = stats.pearsonr([one.accuracy for one in results], [random_total - one.total for one in results])
    table = Table(title=f"{len(results)} rewards, Pearson's r = {r.statistic:.3f} (random choice: {random_total:.1%})")
    for column in ("reward", "benchmark %", "Total of best %"):
        table.add_column(column, justify="left" if column == "reward" else "right")
    for one in sorted(results, key=lambda one: one.total):
        table.add_row(one.reward, f"{100 * one.accuracy:.1f}", f"{100 * one.total:.1f}")
    Console(width=80).print(table)
    figures = {"pearson": float(r.statistic), "p": float(r.pvalue), "random_total": random_total}
    write_json(config.out / "benchmark.json", {**figures, "rewards": [asdict(one) for one in results]})


@dataclass(frozen=True)
class Judged:
    """Sampled captions of a set of clips, N of each clip in a row, and what the judge says.

    Args:
        texts: the captions as texts, for their states.
        captions: the captions.
        totals: Total of each caption.
        pairs: by clip, the places of the better and the worse caption of each pair with a clear gap.
    """

    texts: Texts
    captions: list[Caption]
    totals: list[float]
    pairs: list[list[tuple[int, int]]]

    @classmethod
    def of(cls, captioner: Captioner, clips: ClipSet, config: BenchmarkLabConfig, *, folder: Path) -> "Judged":
        """Sample captions and judge them, or read both from the folder."""
        name = f"{folder.name}: sampling"
        captions = sample_captions(captioner, clips, config.sampling, name=name, seed=config.seed, folder=folder)
        ratings = rate_captions(captions, clips, reward=JudgeReward(RuleJudge(), repetition_weight=1.0), folder=folder)
        totals = {(rating.video, rating.sample): rating.parts["total"] for rating in ratings}
        names = [reference.video for reference in clips.references]
        index = {name: place for place, name in enumerate(names)}
        place_of = {(caption.video, caption.text): place for place, caption in enumerate(captions)}
        pairs: list[list[tuple[int, int]]] = [[] for _ in names]
        for one in compare_ratings(captions, ratings, min_gap=MIN_GAP, source="rule"):
            pairs[index[one.video]].append((place_of[one.video, one.chosen], place_of[one.video, one.rejected]))
        rows = [
            PromptRow(index[caption.video], caption.prompt, caption.text, finished=caption.finished or not caption.text)
            for caption in captions
        ]
        features = {reference.video: clips.features_of(reference) for reference in clips.references}
        return cls(
            Texts(rows, names, features),
            captions,
            [totals[caption.video, caption.sample] for caption in captions],
            pairs,
        )


def benchmark_texts(items: Sequence[BenchmarkItem], features: Callable[[Caption], ClipFeatures]) -> Texts:
    """Return the answers of all items, in order."""
    clips: dict[tuple[str, str], int] = {}
    by_name: Clips = {}
    rows = []
    for item in items:
        key = (clip_name(item), item.use)
        place = clips.setdefault(key, len(clips))
        by_name[" ".join(key)] = features(Caption(key[0], "", modality=item.use))
        rows += [PromptRow(place, item.prompt, text) for text in item.answers]
    return Texts(rows, [" ".join(key) for key in clips], by_name)


def measure(
    config: BenchmarkLabConfig,
    captioner: Captioner,
    learned: Judged,
    chosen: Judged,
    items: Sequence[BenchmarkItem],
    benchmark: Texts,
) -> list[RewardResult]:
    """Measure all rewards."""
    decoder = captioner.network.lm.get_decoder().config
    start = len(upper_layers(decoder.num_hidden_layers)) * decoder.hidden_size
    parts = {"rich": slice(None), "mean": slice(start, start + decoder.hidden_size)}  # of a rich state
    order = random.Random(config.seed).sample(range(len(learned.pairs)), len(learned.pairs))
    results = []

    def add(name: str, heldout_values: Tensor, benchmark_values: Tensor) -> None:
        result = summarize(items, to_outcomes(items, benchmark_values), name=name)
        total = best_total(chosen, heldout_values, number=config.sampling.num_samples)
        scenarios = {scenario: row.accuracy for scenario, row in result.scenarios.items()}
        results.append(RewardResult(name, result.total.accuracy, total, scenarios))

    def fit(states: Sequence[Tensor], part: str, clips: Sequence[int], *, noise: float = 0.0, name: str) -> Tensor:
        train, heldout, bench = (one[:, parts[part]].double() for one in states)
        weight = fit_scalar_head(train, *draw_pairs(learned, clips, noise=noise, seed=config.seed), l2=L2)
        add(name, heldout @ weight, bench @ weight)
        return weight

    states = [texts.states(captioner) for texts in (learned.texts, chosen.texts, benchmark)]
    for part in parts:
        for number in config.labelled_clips:
            fit(states, part, order[:number], name=f"{part}, {number} clips")
    weight = fit(states, "rich", order, name=f"rich, all {len(order)} clips")
    for noise in config.noise:
        fit(states, "rich", order, noise=noise, name=f"rich, {len(order)} clips, {noise:.0%} wrong labels")
    _, heldout, bench = states
    for name, figure in (("sum of log-probabilities", 0), ("mean of log-probabilities", 1)):
        place = figure - NUM_LOGP_FIGURES
        add(name, heldout[:, place], bench[:, place])
    words = [
        torch.tensor([float(len((row.answer or "").split())) for row in texts.rows])
        for texts in (chosen.texts, benchmark)
    ]
    add("longest", *words)
    if config.blind:
        blind = [texts.states(captioner, blind=True) for texts in (learned.texts, chosen.texts, benchmark)]
        fit(blind, "rich", order, name=f"blind, {len(order)} clips")
        # The table of the last one of the rich poolings, asked with its clips and with others.
        outcomes, others = (to_outcomes(items, one.double() @ weight) for one in (bench, blind[2]))
        print_table(summarize(items, outcomes, name=f"rich, {len(order)} clips", blind=others))
    return results


def to_outcomes(items: Sequence[BenchmarkItem], values: Tensor) -> list[Outcome]:
    """Return the outcomes of items whose answers have these values, in order."""
    outcomes, flat = [], iter(values.tolist())
    for item in items:
        own = tuple(next(flat) for _ in item.answers)
        outcomes.append(Outcome(own[: len(item.chosen)], own[len(item.chosen) :]))
    return outcomes


def print_table(result: BenchmarkResult) -> None:
    """Print the table of `salmonn reward-benchmark`."""
    table = Table(*COLUMNS, title=result.reward)
    for group in table_rows(result):
        for row in group:
            table.add_row(*row, end_section=row == group[-1])
    Console(width=110).print(table)


def draw_pairs(
    learned: Judged, clips: Sequence[int], *, noise: float, seed: int
) -> tuple[list[tuple[int, int]], Tensor]:
    """Return the pairs of clips, a fraction of them in the wrong order, and their weights: equal for all clips."""
    rng = random.Random(f"noise {seed}")
    own = [learned.pairs[clip] for clip in clips if learned.pairs[clip]]
    pairs = [(worse, better) if rng.random() < noise else (better, worse) for one in own for better, worse in one]
    weights = [1 / len(one) / len(own) for one in own for _ in one]
    return pairs, torch.tensor(weights, dtype=torch.float64)


def best_total(chosen: Judged, values: Tensor, *, number: int) -> float:
    """Return the mean Total of the caption with the highest value of each clip; the first one of equals."""
    best = values.view(-1, number).argmax(1).tolist()
    return mean(chosen.totals[clip * number + place] for clip, place in enumerate(best))


if __name__ == "__main__":
    run_recipe(main, BenchmarkLabConfig, description=__doc__, on_error=dist.abort)
