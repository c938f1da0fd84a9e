"""`salmonn votes`: summarize the votes of the web UI by rater, or delete those of one."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from salmonn.cli.options import new_table, plural
from salmonn.config import FlagParser

if TYPE_CHECKING:
    from salmonn.preference.feedback_report import Proportion


def votes_parser() -> FlagParser:
    """Return the arguments of `salmonn votes`."""
    parser = FlagParser(
        description="Summarize votes by rater: how many each gave, how many are ties, and how often raters prefer the "
        "same of two captions. With --forget, delete everything of a rater."
    )
    parser.add_argument("folder", type=Path, help="folder of feedback, as `salmonn demo --votes` writes it")
    parser.add_argument(
        "--forget", type=str | None, default=None, metavar="ID", help="delete all feedback of this rater, with "
        "videos that no other feedback uses"
    )  # fmt: skip
    return parser


def run_votes(values: Namespace) -> int:
    """Print the summary, or delete the votes of a rater."""
    from rich.console import Console

    from salmonn.preference.feedback import FeedbackStore, read_feedback
    from salmonn.preference.feedback_report import summarize_feedback

    if values.forget is not None:
        deleted = FeedbackStore(values.folder).forget(values.forget)
        sys.stderr.write(
            f"deleted {plural(deleted, 'record')} of {values.forget}; models trained on them stay as they are: train "
            "them again\n"
        )
        return 0
    report = summarize_feedback(read_feedback(values.folder))
    summary = report.raters
    num_raters = sum(bool(one.rater) for one in summary.raters)
    title = f"{plural(report.num_votes, 'vote')} of {plural(num_raters, 'rater')}"
    table = new_table(title, ("votes", "ties", "both bad", "same preference as others"))
    for one in summary.raters:
        counts = map(str, (one.num_votes, one.num_ties, one.num_both_bad))
        table.add_row(one.rater or "(without an id)", *counts, _describe(one.agreement))
    console = Console(width=110)
    console.print(table)
    console.print(f"any two raters, same two captions: {_describe(summary.agreement)}", highlight=False)
    return 0


def _describe(share: "Proportion") -> str:
    if not share.total:
        return "-"
    low, high = share.interval.low, share.interval.high
    return f"{100 * share.value:.1f} % of {share.total} ({100 * low:.1f} to {100 * high:.1f})"
