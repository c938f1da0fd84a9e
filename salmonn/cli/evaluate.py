"""`salmonn eval`: score captions on a public captioning benchmark whose files a user has."""

import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Any

from jsonargparse import Namespace
from rich.console import Console
from tqdm import tqdm

from salmonn.cli.options import SOME_FAILED, add_judge_options, judge_config, new_table, plural
from salmonn.config import FlagParser
from salmonn.files import write_json, write_text
from salmonn.score.benchmarks import BENCHMARKS, Benchmark


def eval_parser() -> FlagParser:
    """Return the arguments of `salmonn eval`."""
    listed = "; ".join(f"{name}: {one.title}, judged by {one.judge} when published" for name, one in BENCHMARKS.items())
    parser = FlagParser(
        description="Score captions on a captioning benchmark. Without --captions, write the list of its videos and "
        f"print the command that captions them with the benchmark's prompt. {listed}."
    )
    parser.add_argument("benchmark", type=str, choices=tuple(BENCHMARKS), help="benchmark")
    files = ", ".join(one.file for one in BENCHMARKS.values())
    parser.add_argument("data", type=Path, help=f"annotations of the benchmark ({files})")
    parser.add_argument(
        "--videos", type=Path | None, default=None, help="folder of its videos (default: where the benchmark puts them)"
    )
    parser.add_argument("--captions", type=Path | None, default=None, help="captions of its videos")
    parser.add_argument("--out", type=Path | None, default=None, help="JSON file for rates and scores")
    add_judge_options(parser, seed=2024, judge="openai")
    return parser


def run_eval(values: Namespace) -> int:
    """Print the rates of a benchmark, or how to caption its videos."""
    benchmark = BENCHMARKS[values.benchmark]
    if values.captions is None:
        if values.out:
            raise ValueError("--out needs --captions, a file of captions to score")
        return _explain(values, benchmark)
    if benchmark.score_one is None:
        from salmonn.cli.score import run_score, score_parser

        arguments = score_parser().parse_args(
            [str(values.captions), "--references", str(values.data), "--protocol", "published", "--passes", "7"]
        )
        shared = {name: value for name, value in vars(values).items() if name in vars(arguments)}
        shared |= {"captions": values.captions, "out": None, "summary": values.out}
        return run_score(Namespace(**(vars(arguments) | shared)))
    if judge_config(values).kind == "rule":
        raise ValueError(
            f"{values.benchmark} is judged by a language model; pass --judge openai with --base-url and --model"
        )
    return _score(values, benchmark)


def _explain(values: Namespace, benchmark: Benchmark) -> int:
    """Write the list of videos and print the command that captions them."""
    items = benchmark.read(values.data)
    path = values.data.with_suffix(".videos.txt")
    folder = _video_folder(values, benchmark)
    write_text(path, "".join(f"{os.path.normpath(folder / item.video)}\n" for item in items))
    flags = "" if benchmark.prompt is None else f" --prompt {quote(benchmark.prompt(values.data))}"
    flags += "" if benchmark.modality == "both" else f" --modality {benchmark.modality}"
    videos = f" --videos {quote(str(values.videos))}" if values.videos else ""
    prompt = "the benchmark's prompt" if benchmark.prompt else "the model's own prompt"
    sys.stdout.write(
        f"{benchmark.title}: {plural(len(items), 'video')} listed in {path}. To caption them, with {prompt} and "
        "the model's own frame sampling, and to score the captions:\n"
        f"salmonn caption --list {quote(str(path))} --out captions.jsonl{flags} --model MODEL\n"
        f"salmonn eval {values.benchmark} {quote(str(values.data))}{videos} --captions captions.jsonl "
        "--base-url URL --model JUDGE\n"
    )
    return 0


def _video_folder(values: Namespace, benchmark: Benchmark) -> Path:
    if values.videos is not None:
        return Path(values.videos)
    if benchmark.folder is None:
        raise ValueError(
            f"{values.data} does not say where the videos of {benchmark.title} are: name their folder as --videos"
        )
    return benchmark.folder(values.data)


def _score(values: Namespace, benchmark: Benchmark) -> int:
    from salmonn.preference.reward import make_llm_client
    from salmonn.score.benchmark_items import judge_items, match_captions
    from salmonn.score.formats import read_captions

    assert benchmark.score_one is not None
    items = benchmark.read(values.data)
    try:
        captions = match_captions(read_captions(values.captions), items, _video_folder(values, benchmark))
    except ValueError as error:
        raise ValueError(f"{values.captions}: {error}") from error
    if not captions:
        raise ValueError(f"{values.captions} has no caption of a video of {values.data}; their paths must agree")
    config = judge_config(values)
    with tqdm(total=len(items), desc="judging", unit=" captions") as bar:
        scores, unscored = judge_items(
            items,
            captions,
            benchmark.score_one,
            make_llm_client(config),
            attempts=config.attempts,
            seed=values.seed or 0,
            progress=bar.update,
        )
    for one in unscored[:20]:
        sys.stderr.write(f"unscored: {one.video}: {one.reason}\n")
    if unscored:
        sys.stderr.write(f"unscored: {plural(len(unscored), 'video')}, excluded from the rates\n")
    if not scores:
        return SOME_FAILED
    rates = benchmark.rates(scores)
    _print_table(benchmark, rates, judge=config.model)
    if values.out:
        columns = (benchmark.columns or {}).values()
        result = {
            "benchmark": values.benchmark,
            "judge": config.model,
            "rates": {row: {field: getattr(rate, field) for field in columns} for row, rate in rates.items()},
            "scores": [asdict(one) for one in scores],
            "unscored": [asdict(one) for one in unscored],
        }
        write_json(values.out, result)
    return SOME_FAILED if unscored else 0


def _print_table(benchmark: Benchmark, rates: Mapping[str, Any], *, judge: str) -> None:
    columns = benchmark.columns or {}
    table = new_table(f"{benchmark.title}, judged by {judge}", tuple(columns))
    for row, rate in rates.items():
        table.add_row(row, *(_format(getattr(rate, field), name) for name, field in columns.items()))
    Console(width=120).print(table)


def _format(value: float | None, column: str) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f}" if column.endswith("%") else str(value)
