"""`salmonn plot`: plot a training run and list its stages."""

import sys
from pathlib import Path

from jsonargparse import Namespace

from salmonn.config import FlagParser


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
