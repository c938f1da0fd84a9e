"""The `salmonn` command line: a parser with one subcommand per task, and the smallest commands, `plot` and `synth`.

Commands import heavy modules when they run, so that `--help` and scoring start at once and without torch.
"""

import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from jsonargparse import Namespace
from tqdm import tqdm

from salmonn import __version__
from salmonn.cli.caption import run_caption
from salmonn.cli.caption_options import caption_parser
from salmonn.cli.demo import demo_parser, run_demo
from salmonn.cli.evaluate import eval_parser, run_eval
from salmonn.cli.export import export_parser, run_export
from salmonn.cli.models import models_parser, run_models
from salmonn.cli.options import WRONG_USAGE
from salmonn.cli.push import push_parser, run_push
from salmonn.cli.report import report_parser, run_report
from salmonn.cli.reward import reward_parser, run_reward
from salmonn.cli.reward_benchmark import benchmark_parser, run_benchmark
from salmonn.cli.score import (
    compare_parser,
    events_parser,
    qa_parser,
    run_compare,
    run_events,
    run_qa,
    run_score,
    score_parser,
)
from salmonn.cli.serve import run_serve, serve_parser
from salmonn.cli.transcribe import run_transcribe, transcribe_parser
from salmonn.cli.votes import run_votes, votes_parser
from salmonn.config import FlagParser
from salmonn.synthetic.render import SynthConfig, make_clips


def plot_parser() -> FlagParser:
    """Return the arguments of `salmonn plot`."""
    parser = FlagParser(
        description="Plot the curves of a training run (curves.png) and list its stages in a table and an HTML report "
        "that works offline (run.html). Works for finished, running and interrupted runs."
    )
    parser.add_argument("run", type=Path, help="output folder of a recipe")
    parser.add_argument("--out", type=Path | None, default=None, help="folder for both files (default: the run folder)")
    return parser


def run_plot(values: Namespace) -> int:
    """Print the table of stages; write the plot and the report."""
    from salmonn.train.plots import plot_curves, write_page
    from salmonn.train.run_log import print_summary, read_run

    record = read_run(values.run)
    out = values.out or values.run
    out.mkdir(parents=True, exist_ok=True)
    plot_curves(record, out / "curves.png")
    write_page(record, out / "run.html")
    if record.summary:
        print_summary(record.summary)
    sys.stderr.write(f"wrote {out / 'curves.png'} and {out / 'run.html'}\n")
    return 0


def synth_parser() -> FlagParser:
    """Return the arguments of `salmonn synth`."""
    parser = FlagParser(
        description="Render synthetic MP4 clips (H.264 and AAC); clips.jsonl lists their events, captions and "
        "questions. The same seed gives the same clips. After an interruption, run the same command to resume."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the clips")
    parser.add_class_arguments(SynthConfig)
    return parser


def run_synth(values: Namespace) -> int:
    """Render synthetic clips."""
    names = set(asdict(SynthConfig()))
    config = SynthConfig(**{name: value for name, value in vars(values).items() if name in names})
    with tqdm(total=config.clips, desc="rendering", unit="clip") as bar:
        make_clips(values.out, config, progress=bar.update)
    return 0


def completion_parser() -> FlagParser:
    """Return the arguments of `salmonn completion`."""
    parser = FlagParser(
        description="Print a script that completes commands and flags with Tab. To use it, add this line to ~/.bashrc: "
        "source <(salmonn completion bash); or to ~/.zshrc, with zsh, after compinit."
    )
    parser.add_argument("shell", type=Literal["bash", "zsh"], help="bash or zsh")
    return parser


def run_completion(values: Namespace) -> int:
    """Print the script; zsh runs the one for bash."""
    cases = []
    for name, (make_parser, _, _) in COMMANDS.items():
        flags = [flag for action in make_parser()._actions for flag in action.option_strings if flag.startswith("--")]
        cases.append(f"    {name}) words='{' '.join(flags).replace('_', '-')}' ;;\n")
    sys.stdout.write("autoload -U bashcompinit && bashcompinit\n" if values.shell == "zsh" else "")
    sys.stdout.write(COMPLETION.format(cases="".join(cases), commands=" ".join([*COMMANDS, "help"])))
    return 0


# Names of files are completed by the shell wherever no word fits.
COMPLETION = """\
_salmonn() {{
  local cur=${{COMP_WORDS[COMP_CWORD]}} words=
  case ${{COMP_WORDS[1]}} in
{cases}  esac
  if [ "$COMP_CWORD" = 1 ]; then words='{commands} --help --version'; elif [[ $cur != -* ]]; then words=; fi
  COMPREPLY=($(compgen -W "$words" -- "$cur"))
}}
complete -o default -F _salmonn salmonn
"""

FLAG_OF = {"num_frames": "frames", "start_seconds": "start", "end_seconds": "end"}  # where they differ
Command = tuple[Callable[[], FlagParser], Callable[[Namespace], int], str]

COMMANDS: dict[str, Command] = {
    "caption": (caption_parser, run_caption, "caption videos, or ask a question about each"),
    "export": (export_parser, run_export, "export captions to a table, or to subtitles next to the videos"),
    "transcribe": (transcribe_parser, run_transcribe, "transcribe the speech of videos, with the time of each word"),
    "report": (report_parser, run_report, "write an HTML page to look through captions, with pictures"),
    "score": (score_parser, run_score, "score captions against reference events"),
    "compare": (compare_parser, run_compare, "compare two scored sets of captions, clip by clip"),
    "events": (events_parser, run_events, "split reference captions into atomic events"),
    "eval": (eval_parser, run_eval, "score captions on a public benchmark"),
    "qa": (qa_parser, run_qa, "compute the accuracy of answers to multiple-choice questions"),
    "reward": (reward_parser, run_reward, "rate captions with a reward model"),
    "reward-benchmark": (benchmark_parser, run_benchmark, "measure a judge or reward model on labelled pairs"),
    "models": (models_parser, run_models, "list model families and known checkpoints, with their memory"),
    "demo": (demo_parser, run_demo, "start the web UI: caption, compare and vote, inspect training runs"),
    "votes": (votes_parser, run_votes, "report on people's feedback, export it, or delete that of one person"),
    "plot": (plot_parser, run_plot, "plot a training run and list its stages"),
    "push": (push_parser, run_push, "upload a trained model or adapter to the Hugging Face hub"),
    "serve": (serve_parser, run_serve, "start an HTTP server with an OpenAI-compatible API"),
    "synth": (synth_parser, run_synth, "render synthetic clips whose events are known exactly"),
    "completion": (completion_parser, run_completion, "print a script that completes commands in bash or zsh"),
}


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and end the process with its exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    args = sys.argv[1:] if args is None else args
    if args and args[0] == "help":
        args = [*args[1:2], "--help"]
    values = build_parser(args[0] if args else None).parse_args(args)
    _, command, _ = COMMANDS[values.subcommand]
    try:
        sys.exit(command(values[values.subcommand]))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {name_flags(str(error), COMMANDS[values.subcommand][0]())}\n")
        sys.exit(WRONG_USAGE)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; finished work is saved. Run the same command to resume.\n")
        sys.stderr.flush()
        os._exit(130)  # a normal exit would wait for pending requests, even after a second Ctrl-C


def name_flags(message: str, parser: FlagParser) -> str:
    """Write the settings that a message names as a user types them: --max-new-tokens for max_new_tokens."""
    flags = {action.dest for action in parser._actions}

    def to_flag(name: re.Match[str]) -> str:
        flag = FLAG_OF.get(name[0], name[0])
        return f"--{flag.replace('_', '-')}" if flag in flags else name[0]

    return re.sub(r"(?<![\w./-])[a-z]+(_[a-z]+)+(?![\w/=]|\.\w)", to_flag, message)


def build_parser(only: str | None = None) -> FlagParser:
    """Return the parser of one command, if it is known, or of all, which takes longer to make."""
    parser = FlagParser(
        prog="salmonn", description="Audio-visual video captioning with self-improvement.", version=__version__
    )
    commands = parser.add_subcommands(dest="subcommand")
    for name in [only] if only in COMMANDS else COMMANDS:
        make_parser, _, summary = COMMANDS[name]
        commands.add_subcommand(name, make_parser(), help=summary)
    return parser
