"""`salmonn votes`: report on people's feedback in the web UI, export it, or delete that of one person."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import Namespace
from markupsafe import Markup
from rich.table import Table

from salmonn.cli.options import new_table, plural
from salmonn.config import FlagParser

if TYPE_CHECKING:
    from salmonn.preference.feedback_report import FeedbackSummary, Proportion
    from salmonn.preference.helpfulness import Difference, HelpSummary
    from salmonn.preference.ratings import Estimate, Ratings
    from salmonn.records import Score

Item = Table | str  # of the report: a table, or a line of text


def votes_parser() -> FlagParser:
    """Return the arguments of `salmonn votes`."""
    parser = FlagParser(
        description="Report on people's feedback: what they did with each model's captions, ratings of models from "
        "votes, whether help follows the metric, and votes by rater. With --export, write it as rows for other "
        "libraries; with --forget, delete everything of a rater."
    )
    parser.add_argument("folder", type=Path, help="folder of feedback, as `salmonn demo --votes` writes it")
    parser.add_argument(
        "--export", type=Literal["trl", "unpaired", "arena"] | None, default=None, help="trl: prompt, chosen and "
        "rejected messages; unpaired: prompt, completion and label of rated captions; arena: a battle for each vote"
    )  # fmt: skip
    parser.add_argument("--out", type=Path | None, default=None, help="JSONL file for --export; for arena a JSON list")
    parser.add_argument(
        "--scores", nargs="+", type=str, default=[], metavar="MODEL=FILE", help="score files of models, as `salmonn "
        "score --out` writes them, in place of the Totals that were recorded with the captions"
    )  # fmt: skip
    parser.add_argument("--report", type=Path | None, default=None, help="HTML page for the tables, besides printing")
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
    from salmonn.preference.helpfulness import summarize_help

    if (values.export is None) != (values.out is None):
        raise ValueError("--export names a format and --out its file: give both, or neither")
    if values.forget is not None and values.export is not None:
        raise ValueError("--forget deletes and --export writes: give one of them")
    if (values.report or values.scores) and (values.forget is not None or values.export):
        raise ValueError("--report and --scores belong to the report: give them without --forget and --export")
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
        report = summarize_feedback(feedback)
        names = {caption.name for one in feedback for caption in one.captions}
        help_ = summarize_help(feedback, report.ratings, scores=_read_scores(values.scores, names))
        items, console = list(_list_items(report, help_)), Console(width=120)
        for item in items:
            console.print(item, highlight=not isinstance(item, str))
        if values.report:
            _write_page(values.report, items, title=f"Feedback in {values.folder.resolve().name}")
    return 0


def _read_scores(arguments: Sequence[str], names: set[str]) -> "dict[str, list[Score]]":
    """Read the score file of each model that `--scores` names.

    Raises:
        ValueError: a model has no feedback, or the files are of different judges.
    """
    from salmonn.score.formats import read_scores

    scores, judges = {}, set()
    for argument in arguments:
        name, _, path = argument.rpartition("=")
        if not name or name not in names:
            known = ", ".join(sorted(names - {""}))
            raise ValueError(f"--scores {argument}: expected MODEL=FILE with a model that has feedback: {known}")
        file = read_scores(path)
        if not file.scores:
            raise ValueError(f"--scores {argument}: the file holds no scored captions")
        scores[name] = file.scores
        judges.add((file.judge_info.judge, file.judge_info.prompt_hash, file.judge_info.protocol))
    if len(judges) > 1:
        raise ValueError("--scores are of different judges, prompts or protocols: score all models in the same way")
    return scores


def _write_page(path: Path, items: Iterable[Item], *, title: str) -> None:
    """Write the report as one self-contained HTML file."""
    from salmonn.files import write_text
    from salmonn.templates import load_template

    def rows(table: Table) -> list[tuple[object, ...]]:
        return list(zip(*(column.cells for column in table.columns), strict=True))

    style = Markup(resources.files("salmonn.score").joinpath("report.css").read_text(encoding="utf-8"))
    template = load_template(Path(__file__).with_name("votes.html.jinja"), rows=rows)
    write_text(path, template.render(items=items, title=title, style=style))


def _list_items(report: "FeedbackSummary", help_: "HelpSummary") -> Iterator[Item]:
    """Yield the tables and lines of the report."""
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
        yield table
    if report.ratings:
        yield from _list_ratings(report.ratings)
    if report.agreement.total:
        yield f"votes for the caption with the lower Total: {_describe(report.agreement)}"
    yield from _list_help(help_)
    summary = report.raters
    num_raters = sum(bool(one.rater) for one in summary.raters)
    title = f"{plural(report.num_votes, 'vote')} of {plural(num_raters, 'rater')}"
    if report.num_compared:
        title += f", on {plural(report.num_compared, 'pair')} shown"
    table = new_table(title, ("votes", "ties", "both bad", "same preference as others"))
    for rater in summary.raters:
        counts = map(str, (rater.num_votes, rater.num_ties, rater.num_both_bad))
        table.add_row(rater.rater or "(without an id)", *counts, _describe(rater.agreement))
    yield table
    yield f"any two raters, same two captions: {_describe(summary.agreement)}"


def _list_ratings(ratings: "Ratings") -> Iterator[Item]:
    table = new_table("Ratings at equal side and length (Elo)", ("votes", "rating", "95 % interval"))
    for name, one in ratings.models.items():
        table.add_row(name, str(ratings.votes_of[name]), f"{one.value:.0f}", f"{one.low:.0f} to {one.high:.0f}")
    if ratings.models:
        yield table
    for effect, one in (("caption A", ratings.side), ("10 words more", ratings.length)):
        yield f"preference for {effect}: {_interval(one)} logits"


def _list_help(help_: "HelpSummary") -> Iterator[Item]:
    from salmonn.preference.helpfulness import METRICS, MIN_CAPTIONS, MIN_RATERS

    known = [metric for metric in METRICS if any(metric in one for one in help_.metrics.values())]
    if known:
        table = new_table("Metric by model, in %", [metric.capitalize() for metric in known])
        for name, values in help_.metrics.items():
            table.add_row(name, *(_percent(values.get(metric)) for metric in known))
        yield table
    yield from _list_correlations(help_)
    if help_.differences:
        table = new_table(
            "Differences of models by least squares", ["first - second (95 %)", "n", "raters", "effects", "p (BH)"]
        )
        for difference in help_.differences:
            table.add_row(*_difference_row(difference))
        yield table
    if help_.uncompared:
        needed = f"{MIN_CAPTIONS} captions of {MIN_RATERS} raters who had captions of several models"
        yield f"no differences of models in {', '.join(help_.uncompared)}: they need {needed}"


def _list_correlations(help_: "HelpSummary") -> Iterator[Item]:
    from salmonn.preference.helpfulness import MIN_CAPTIONS, MIN_MODELS, MIN_RATERS

    needed = f"{MIN_RATERS} raters, and {MIN_MODELS} models or {MIN_CAPTIONS} captions, with unequal values"
    if not help_.correlations:
        yield f"whether help follows the metric cannot be told: it needs {needed} of a metric and of what people did"
        return
    columns = ("over", "Spearman's correlation (95 %)", "n", "raters")
    table, few = new_table("Does help follow the metric?", columns), list[str]()
    for one in help_.correlations:
        names = f"{one.metric.capitalize()} and {one.measure}"
        if one.rho:
            table.add_row(names, f"{one.level}s", _interval(one.rho), str(one.number), str(one.num_raters))
        else:
            few.append(f"{names} ({plural(one.number, one.level)} of {plural(one.num_raters, 'rater')})")
    if table.rows:
        yield table
    if few:
        yield f"no correlation of {'; '.join(few)}: it needs {needed}"


def _difference_row(one: "Difference") -> list[str]:
    is_share = one.measure != "seconds"
    value = one.value.scale(100 if is_share else 1, 0)
    difference = f"{value.value:+.1f} ({value.low:+.1f} to {value.high:+.1f}) {'points' if is_share else 's'}"
    p_value = "< 0.001" if one.adjusted_p < 0.001 else f"{one.adjusted_p:.3f}"
    numbers, effects = f"{one.numbers[0]}, {one.numbers[1]}", ", ".join(one.effects) or "-"
    return [f"{one.measure}: {one.first} - {one.second}", difference, numbers, str(one.num_raters), effects, p_value]


def _interval(one: "Estimate") -> str:
    return f"{one.value:+.2f} ({one.low:+.2f} to {one.high:+.2f})"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _describe(share: "Proportion") -> str:
    if not share.total:
        return "-"
    low, high = share.interval.low, share.interval.high
    return f"{100 * share.value:.1f} % of {share.total} ({100 * low:.1f} to {100 * high:.1f})"
