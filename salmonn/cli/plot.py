"""`salmonn plot`: a run's curves and tables."""

import sys
from pathlib import Path

from jsonargparse import Namespace

from salmonn.config import FlagParser


def plot_parser() -> FlagParser:
    """Arguments of `salmonn plot`."""
    parser = FlagParser(
        description="Draw the curves of a training run and show its stages in a table: curves.png, and run.html, a "
        "page that asks no network for anything. Also of a run that is still going, and of one that was killed."
    )
    parser.add_argument("run", type=Path, help="folder that a recipe writes to")
    parser.add_argument("--out", type=Path | None, default=None, help="folder for both files (default: the run's)")
    return parser


def run_plot(values: Namespace) -> int:
    """Print the table of stages; write picture and page."""
    from salmonn.train.plots import plot_curves, write_page
    from salmonn.train.run_log import print_table, read_run

    record = read_run(values.run)
    out = values.out or values.run
    out.mkdir(parents=True, exist_ok=True)
    plot_curves(record, out / "curves.png")
    write_page(record, out / "run.html")
    if record.summary:
        print_table(record.summary)
    sys.stderr.write(f"written: {out / 'curves.png'} and {out / 'run.html'}\n")
    return 0
