"""`salmonn judge-benchmark`: measure a judge on labelled pairs of captions."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace
from rich.console import Console
from tqdm import tqdm

from salmonn.cli.options import add_judge_options, judge_config, new_table, plural
from salmonn.config import FlagParser
from salmonn.records import write_json

if TYPE_CHECKING:
    from salmonn.preference.benchmark import BenchmarkResult


def benchmark_parser() -> FlagParser:
    """Return the arguments of `salmonn judge-benchmark`."""
    parser = FlagParser(
        description="Measure the accuracy of a judge on labelled pairs of captions, by kind of error, and its bias for "
        "position and length. data/judge_pairs.jsonl is such a set."
    )
    parser.add_argument("pairs", type=Path, help="JSONL of labelled pairs")
    parser.add_argument("--out", type=Path | None, default=None, help="JSON file for the results")
    parser.add_argument("--seed", type=int, default=2024, help="random seed of the judge")
    add_judge_options(parser)
    return parser


def run_judge_benchmark(values: Namespace) -> int:
    """Print the results, and write them to --out."""
    from salmonn.preference.benchmark import read_labelled_pairs, run_benchmark
    from salmonn.preference.reward import make_judge

    judge = make_judge(judge_config(values))
    pairs = read_labelled_pairs(values.pairs)
    with tqdm(total=2 * len(pairs), desc="judging", unit=" captions") as bar:
        result = run_benchmark(pairs, judge, seed=values.seed, progress=bar.update)
    if values.out:
        write_json(values.out, result.to_json())
    print_benchmark(result)
    if result.unscored:
        first = result.unscored[0]
        number = plural(result.total.unscored, "pair")
        sys.stderr.write(f"{number} unscored, the first one {first.video}: {first.reason}\n")
    return 0


def print_benchmark(result: "BenchmarkResult") -> None:
    """Print a table of accuracies in percent, and the biases."""
    from salmonn.preference.benchmark import COLUMNS, benchmark_notes, benchmark_rows

    table = new_table(f"judge {result.judge}", COLUMNS[1:])
    for group in benchmark_rows(result):
        for row in group:
            table.add_row(*row, end_section=row == group[-1])
    console = Console(width=110)
    console.print(table)
    for line in benchmark_notes(result):
        console.print(line, highlight=False)
