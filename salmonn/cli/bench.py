"""`salmonn judge-bench`: how far a judge can be trusted."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from tqdm import tqdm

from salmonn.cli.judge import add_judge, judge_config
from salmonn.records import write_json


def bench_parser() -> ArgumentParser:
    """Arguments of `salmonn judge-bench`."""
    parser = ArgumentParser(
        description="Accuracy of a judge on labelled pairs of captions, by kind of fault, with its bias for position "
        "and length. data/judge_pairs.jsonl is such a set."
    )
    parser.add_argument("pairs", type=Path, help="JSONL of labelled pairs")
    parser.add_argument("--out", type=Path | None, default=None, help="JSON file for the figures")
    parser.add_argument("--seed", type=int, default=2024, help="of the judge")
    add_judge(parser)
    return parser


def run_bench(values: Namespace) -> int:
    """Print the judge's figures; write them where asked."""
    from salmonn.score.bench import bench, print_bench, read_pairs
    from salmonn.score.build import make_judge

    judge = make_judge(judge_config(values))
    pairs = read_pairs(values.pairs)
    with tqdm(total=2 * len(pairs), desc="judging", unit="caption") as bar:
        result = bench(pairs, judge, seed=values.seed, progress=bar.update)
    if values.out:
        write_json(values.out, result.to_json())
    print_bench(result)
    return 0
