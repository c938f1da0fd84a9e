"""The command line: one parser, one command for each thing that `salmonn` does.

Heavy imports stand inside the commands, so that `--help` and scoring start at once and without torch.
"""

import logging
import os
import sys
from collections.abc import Callable, Sequence

from jsonargparse import Namespace

from salmonn.cli.caption import caption_parser, run_caption
from salmonn.cli.codes import WRONG_USAGE
from salmonn.cli.demo import demo_parser, run_demo
from salmonn.cli.events import events_parser, run_events
from salmonn.cli.export import export_parser, run_export
from salmonn.cli.judge_benchmark import bench_parser, run_bench
from salmonn.cli.plot import plot_parser, run_plot
from salmonn.cli.score import compare_parser, qa_parser, run_compare, run_qa, run_score, score_parser
from salmonn.cli.serve import run_serve, serve_parser
from salmonn.cli.synth import run_synth, synth_parser
from salmonn.config import FlagParser

Command = tuple[Callable[[], FlagParser], Callable[[Namespace], int], str]

COMMANDS: dict[str, Command] = {
    "caption": (caption_parser, run_caption, "describe videos, or ask anything about them"),
    "export": (export_parser, run_export, "turn captions into a table, or into texts beside the videos"),
    "score": (score_parser, run_score, "score captions against reference events"),
    "compare": (compare_parser, run_compare, "compare two scored sets of captions, clip by clip"),
    "events": (events_parser, run_events, "split reference captions into atomic events"),
    "qa": (qa_parser, run_qa, "accuracy of answers to multiple-choice questions"),
    "judge-benchmark": (bench_parser, run_bench, "check a judge on labelled pairs of captions"),
    "demo": (demo_parser, run_demo, "a page in the browser: caption, compare and vote, look at a run"),
    "plot": (plot_parser, run_plot, "curves and tables of a training run"),
    "serve": (serve_parser, run_serve, "answer chat completions about videos, as a service"),
    "synth": (synth_parser, run_synth, "make synthetic clips with exactly known events"),
}


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and end the process with its exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    values = build_parser().parse_args(args)
    _, command, _ = COMMANDS[values.subcommand]
    try:
        sys.exit(command(values[values.subcommand]))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(WRONG_USAGE)
    except KeyboardInterrupt:
        sys.stderr.write("stopped; what was finished is kept, and the same command goes on from there\n")
        sys.stderr.flush()
        os._exit(130)  # a second Ctrl-C: an ordinary exit would wait for the requests that are under way


def build_parser() -> FlagParser:
    """The parser of all commands."""
    parser = FlagParser(prog="salmonn", description="Audio-visual video captioning that teaches itself.")
    commands = parser.add_subcommands(dest="subcommand")
    for name, (make_parser, _, words) in COMMANDS.items():
        commands.add_subcommand(name, make_parser(), help=words)
    return parser
