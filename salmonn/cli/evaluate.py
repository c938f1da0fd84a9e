"""`salmonn eval`: score captions on a public captioning benchmark whose files a user has."""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import quote
from typing import Literal

from jsonargparse import Namespace
from rich.console import Console
from tqdm import tqdm

from salmonn.cli.options import SOME_FAILED, add_judge_options, judge_config, new_table, plural
from salmonn.config import FlagParser
from salmonn.records import write_json, write_text
from salmonn.score import autodq

BenchmarkName = Literal["testset", "dream1k"]


@dataclass(frozen=True)
class Benchmark:
    """How captions of a benchmark are made and scored.

    Args:
        title: name and source.
        flags: flags of `salmonn caption`; the model's own prompt and frames where they say nothing.
        judge: language model that judges in published results.
    """

    title: str
    flags: str
    judge: str


BENCHMARKS: dict[str, Benchmark] = {
    "testset": Benchmark("video-SALMONN 2 test set (arXiv 2506.15220)", "", "gpt-3.5-turbo-0125"),
    "dream1k": Benchmark(
        "DREAM-1K (arXiv 2407.00634)", f'--prompt "{autodq.PROMPT}" --modality visual', "gpt-35-turbo-0125"
    ),
}


def eval_parser() -> FlagParser:
    """Return the arguments of `salmonn eval`."""
    listed = "; ".join(f"{name}: {one.title}, judged by {one.judge} when published" for name, one in BENCHMARKS.items())
    parser = FlagParser(
        description="Score captions on a captioning benchmark. Without --captions, write the list of its videos and "
        f"print the command that captions them with the benchmark's prompt. {listed}."
    )
    parser.add_argument("benchmark", type=BenchmarkName, help="benchmark: " + ", ".join(BENCHMARKS))
    parser.add_argument(
        "data", type=Path, help="annotations of the benchmark (DREAM-1k.jsonl, video_salmonn2_test.json)"
    )
    parser.add_argument("--captions", type=Path | None, default=None, help="captions of its videos")
    parser.add_argument("--out", type=Path | None, default=None, help="JSON file for rates and scores")
    add_judge_options(parser, seed=2024, judge="openai")
    return parser


def run_eval(values: Namespace) -> int:
    """Print the rates of a benchmark, or how to caption its videos."""
    if values.captions is None:
        if values.out:
            raise ValueError("--out needs --captions, a file of captions to score")
        return _explain(values)
    if values.benchmark == "testset":
        from salmonn.cli.score import run_score, score_parser

        arguments = score_parser().parse_args(
            [str(values.captions), "--references", str(values.data), "--protocol", "published", "--passes", "7"]
        )
        shared = {name: value for name, value in vars(values).items() if name in vars(arguments)}
        shared |= {"captions": values.captions, "out": None, "summary": values.out}
        return run_score(Namespace(**(vars(arguments) | shared)))
    config = judge_config(values)
    if config.kind == "rule":
        raise ValueError("dream1k is judged by a language model; pass --judge openai with --base-url and --model")
    return _score_dream(values)


def _explain(values: Namespace) -> int:
    """Write the list of videos and print the command that captions them."""
    from salmonn.score.formats import read_references

    if values.benchmark == "dream1k":
        videos = [item.video for item in autodq.read_dream(values.data)]
    else:
        videos = list(read_references(values.data))
    path = values.data.with_suffix(".videos.txt")
    write_text(path, "".join(f"{values.data.parent / video}\n" for video in videos))
    one = BENCHMARKS[values.benchmark]
    flags = f" {one.flags}" if one.flags else ""
    sys.stdout.write(
        f"{one.title}: {plural(len(videos), 'video')} listed in {path}. To caption them, with the model's own frame "
        "sampling, and to score the captions:\n"
        f"salmonn caption --list {quote(str(path))} --out captions.jsonl{flags} --model MODEL\n"
        f"salmonn eval {values.benchmark} {quote(str(values.data))} --captions captions.jsonl "
        "--base-url URL --model JUDGE\n"
    )
    return 0


def _score_dream(values: Namespace) -> int:
    from salmonn.preference.reward import make_llm_client
    from salmonn.score.formats import read_captions

    items = autodq.read_dream(values.data)
    by_path = {str(values.data.parent / item.video): item.video for item in items}
    by_path |= {item.video: item.video for item in items}
    found = [one for one in read_captions(values.captions) if one.video in by_path]
    captions = {by_path[one.video]: one.text for one in found}
    if len(captions) < len(found):
        raise ValueError(
            f"{values.captions} has {len(found)} captions of {plural(len(captions), 'video')}; the benchmark scores "
            "one caption of each whole video"
        )
    if not captions:
        raise ValueError(f"{values.captions} has no caption of a video of {values.data}; their paths must agree")
    config = judge_config(values)
    with tqdm(total=len(items), desc="judging", unit=" captions") as bar:
        scores, unscored = autodq.score_dream(
            items,
            captions,
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
    rates = autodq.compute_dream_rates(scores)
    table = new_table(
        f"{BENCHMARKS['dream1k'].title}, judged by {config.model}, %", ("F1", "recall", "precision", "videos")
    )
    for name, rate in rates.items():
        figures = (f"{100 * value:.1f}" for value in (rate.f1, rate.recall, rate.precision))
        table.add_row(name, *figures, str(rate.num_videos))
    Console(width=100).print(table)
    if values.out:
        by_category = {name: asdict(rate) | {"f1": rate.f1} for name, rate in rates.items()}
        write_json(
            values.out,
            {
                "benchmark": values.benchmark,
                "judge": config.model,
                "rates": by_category,
                "scores": [asdict(one) for one in scores],
                "unscored": [asdict(one) for one in unscored],
            },
        )
    return SOME_FAILED if unscored else 0
