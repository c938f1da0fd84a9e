"""`salmonn votes`: report on people's feedback in the web UI, export it, or delete that of one person."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import Namespace

from salmonn.cli.options import new_table, plural
from salmonn.config import FlagParser

if TYPE_CHECKING:
    from rich.console import Console

    from salmonn.preference.feedback_report import FeedbackSummary, Proportion
    from salmonn.preference.ratings import Ratings


def votes_parser() -> FlagParser:
    """Return the arguments of `salmonn votes`."""
    parser = FlagParser(
        description="Report on people's feedback: what they did with each model's captions, ratings of models from "
        "votes, agreement with the metric, and votes by rater. With --export, write it as rows for other libraries; "
        "with --forget, delete everything of a rater."
    )
    parser.add_argument("folder", type=Path, help="folder of feedback, as `salmonn demo --votes` writes it")
    parser.add_argument(
        "--export", type=Literal["trl", "unpaired", "arena"] | None, default=None, help="trl: prompt, chosen and "
        "rejected messages; unpaired: prompt, completion and label of rated captions; arena: a battle for each vote"
    )  # fmt: skip
    parser.add_argument("--out", type=Path | None, default=None, help="JSONL file for --export; for arena a JSON list")
    parser.add_argument(
        "--forget", type=str | None, default=None, metavar="ID", help="delete all feedback of this rater, with "
        "videos that no other feedback uses"
    )  # fmt: skip
    return parser


def run_votes(values: Namespace) -> int:
    """Print the report, export feedback, or delete that of a rater."""
    from rich.console import Console

    from salmonn.preference.feedback import FeedbackStore, read_feedback
    from salmonn.preference.feedback_report import summarize_feedback

    if (values.export is None) != (values.out is None):
        raise ValueError("--export names a format and --out its file: give both, or neither")
    if values.forget is not None and values.export is not None:
        raise ValueError("--forget deletes and --export writes: give one of them")
    feedback = read_feedback(values.folder)
    if values.forget is not None:
        deleted = FeedbackStore(values.folder).forget(values.forget)
        sys.stderr.write(
            f"deleted {plural(deleted, 'record')} of {values.forget}; models trained on them stay as they are: train "
            "them again\n"
        )
    elif values.export:
        from salmonn.preference.export import export_rows

        number, left_out = export_rows(values.folder, values.out, kind=values.export)
        reasons = "".join(f"; left out: {reason} ({count})" for reason, count in left_out.items())
        sys.stderr.write(f"{plural(number, 'row')} written to {values.out}{reasons}\n")
    else:
        _print_report(summarize_feedback(feedback), Console(width=120))
    return 0


def _print_report(report: "FeedbackSummary", console: "Console") -> None:
    if report.models:
        columns = ("copied", "rated good", "drafts accepted", "edited", "kept of drafts", "seconds", "final Total")
        table = new_table("Use of captions, in %", columns)
        for one in report.models:
            shares = (
                f"{_percent(share.value)} of {share.total}" if share.total else "-"
                for share in (one.copied, one.rated_good, one.accepted, one.edited)
            )
            seconds = "-" if one.seconds is None else f"{one.seconds:.0f}"
            table.add_row(one.name, *shares, _percent(one.persistence), seconds, _percent(one.total))
        console.print(table)
    if report.ratings:
        _print_ratings(report.ratings, console)
    if report.agreement.total:
        console.print(f"votes for the caption with the lower Total: {_describe(report.agreement)}", highlight=False)
    summary = report.raters
    num_raters = sum(bool(one.rater) for one in summary.raters)
    title = f"{plural(report.num_votes, 'vote')} of {plural(num_raters, 'rater')}"
    if report.num_compared:
        title += f", on {plural(report.num_compared, 'pair')} shown"
    table = new_table(title, ("votes", "ties", "both bad", "same preference as others"))
    for rater in summary.raters:
        counts = map(str, (rater.num_votes, rater.num_ties, rater.num_both_bad))
        table.add_row(rater.rater or "(without an id)", *counts, _describe(rater.agreement))
    console.print(table)
    console.print(f"any two raters, same two captions: {_describe(summary.agreement)}", highlight=False)


def _print_ratings(ratings: "Ratings", console: "Console") -> None:
    table = new_table("Ratings at equal side and length (Elo)", ("rating", "95 % interval"))
    for name, one in ratings.models.items():
        table.add_row(name, f"{one.value:.0f}", f"{one.low:.0f} to {one.high:.0f}")
    if ratings.models:
        console.print(table)
    for effect, one in (("caption A", ratings.side), ("10 words more", ratings.length)):
        console.print(
            f"preference for {effect}: {one.value:+.2f} ({one.low:+.2f} to {one.high:+.2f}) logits", highlight=False
        )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _describe(share: "Proportion") -> str:
    if not share.total:
        return "-"
    low, high = share.interval.low, share.interval.high
    return f"{100 * share.value:.1f} % of {share.total} ({100 * low:.1f} to {100 * high:.1f})"
