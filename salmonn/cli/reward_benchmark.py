"""`salmonn reward-benchmark`: how often a judge or a reward model prefers the correct answer, by scenario."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace
from rich.console import Console
from tqdm import tqdm

from salmonn.cli.options import add_judge_options, judge_config, new_table, plural
from salmonn.config import FlagParser
from salmonn.files import write_json
from salmonn.score.config import JudgeConfig

if TYPE_CHECKING:
    from salmonn.preference.benchmark import BenchmarkResult
    from salmonn.preference.benchmark_items import BenchmarkItem

RATED_AT_ONCE = 64  # items; a language model judges their answers concurrently


def benchmark_parser() -> FlagParser:
    """Return the arguments of `salmonn reward-benchmark`."""
    parser = FlagParser(
        description="Measure how often a judge or a reward model prefers the correct answer, by scenario, next to "
        "controls that see no clip. data/reward_pairs.jsonl is such a set; the files of RewardBench, RewardBench 2 and "
        "RAG-RewardBench are read, too. docs/reward_benchmark.md explains the table."
    )
    parser.add_argument("files", type=Path, nargs="+", help="JSONL or JSON with prompt, chosen and rejected")
    parser.add_argument("--out", type=Path | None, default=None, help="JSON file for the results")
    parser.add_argument("--base", type=str | None, default=None, help="the reward model's base, if it has moved")
    parser.add_argument("--device", type=str | None, default=None, help="cpu, cuda, ... (default: cuda if available)")
    parser.add_argument("--clips", type=Path, default=Path("run/benchmark"), help="folder for rendered clips")
    model_help = "folder of a reward model; with --judge openai the name of the language model on its server"
    add_judge_options(parser, seed=2024, judge=None, model_help=model_help)
    return parser


def run_benchmark(values: Namespace) -> int:
    """Print the results, and write them to --out."""
    is_model = values.judge is None and bool(values.model)
    config = None if is_model else judge_config(values)
    from salmonn.preference.benchmark_items import read_items

    items = read_items(values.files)
    with tqdm(total=len(items), desc="rating", unit=" items") as bar:
        if config:
            result = judge_items(items, replace(config, seed=values.seed), progress=bar.update)
        else:
            result = rate_by_model(items, values, progress=bar.update)
    if values.out:
        write_json(values.out, {"files": [str(path) for path in values.files], **asdict(result)})
    print_benchmark(result)
    if result.unscored:
        first = result.unscored[0]
        number = plural(len(result.unscored), "item")
        sys.stderr.write(f"{number} unscored, the first one {first.video}: {first.reason}\n")
    return 0


def judge_items(
    items: Sequence["BenchmarkItem"], config: JudgeConfig, *, progress: Callable[[int], object]
) -> "BenchmarkResult":
    """Judge the answers of items with events one by one, and compare those of others by their texts."""
    from salmonn.preference.benchmark import rate_items, summarize
    from salmonn.preference.pairwise import compare_items
    from salmonn.preference.reward import JudgeReward, RewardConfig, make_judge, make_llm_client

    with_events = [item for item in items if item.events]
    others = [item for item in items if not item.events]
    if others and config.kind == "rule":
        raise ValueError(
            f"item {others[0].id} of {others[0].subset} has no events, which the rule judge needs: pass --judge "
            "openai, which can compare its answers"
        )
    judge = make_judge(config)
    reward = JudgeReward(judge, repetition_weight=RewardConfig().repetition_weight)
    rated = rate_items(with_events, reward, batch_size=RATED_AT_ONCE, progress=progress)
    outcomes = dict(zip(map(id, with_events), rated, strict=True))
    orders = None
    if others:
        compared = compare_items(others, make_llm_client(config), attempts=config.attempts, progress=progress)
        outcomes.update(zip(map(id, others), compared.outcomes, strict=True))
        orders = compared.orders
    return summarize(items, [outcomes[id(item)] for item in items], name=judge.name, orders=orders)


def rate_by_model(
    items: Sequence["BenchmarkItem"], values: Namespace, *, progress: Callable[[int], object]
) -> "BenchmarkResult":
    """Rate the answers by a reward model, which is shown their clips, and then others."""
    from salmonn.model.loading import Placement
    from salmonn.preference.benchmark import choose_other_clips, rate_items, summarize
    from salmonn.preference.reward_model import ModelReward, RewardModel
    from salmonn.train.encoding import encode_benchmark_clips
    from salmonn.train.feature_cache import FeatureCacheConfig, open_feature_cache

    others = choose_other_clips(items)
    model = RewardModel.load(values.model, base=values.base, placement=Placement(device=values.device))
    cache = open_feature_cache(FeatureCacheConfig(), model.captioner)
    reward = ModelReward(model, encode_benchmark_clips(model.captioner, items, clips_dir=values.clips, cache=cache))
    # A pairwise model compares all answers about a clip with each other, also those of other items.
    batch_size = 1 if model.info.kind == "pairwise" else RATED_AT_ONCE
    outcomes = rate_items(items, reward, batch_size=batch_size, progress=progress)
    blind = rate_items(items, reward, clips=others, batch_size=batch_size)
    return summarize(items, outcomes, name=values.model, blind=blind)


def print_benchmark(result: "BenchmarkResult") -> None:
    """Print a table of accuracies in percent, and notes."""
    from salmonn.preference.benchmark import COLUMNS, table_notes, table_rows

    table = new_table(f"reward {result.reward}", COLUMNS[1:])
    for group in table_rows(result):
        for row in group:
            table.add_row(*row, end_section=row == group[-1])
    console = Console(width=110)
    console.print(table)
    for line in table_notes(result):
        console.print(line, highlight=False)
