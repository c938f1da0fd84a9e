"""`salmonn score`, `salmonn compare` and `salmonn qa`: captions and answers into figures."""

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from jsonargparse import Namespace
from rich.console import Console
from tqdm import tqdm

from salmonn.cli.codes import SOME_FAILED
from salmonn.cli.judge import add_judge, judge_config
from salmonn.cli.tables import new_table
from salmonn.config import FlagParser
from salmonn.records import Caption, Reference, write_json
from salmonn.score.config import ProtocolName

if TYPE_CHECKING:
    from salmonn.score.metrics import Rates
    from salmonn.score.scoring import ScoredSet
    from salmonn.score.stats import Interval

_MOST_LISTED = 20
# Rates that are fractions, in the order of the table, with their titles.
TITLES = {
    "missing": "Missing",
    "hallucination": "Hallucination",
    "incorrect": "  incorrect",
    "hallucinated": "  hallucinated",
    "total": "Total",
    "repetition": "Repetition",
    "cut_off": "Cut off at the limit",
    "audio_share": "Audio share",
}


def score_parser() -> FlagParser:
    """Arguments of `salmonn score`."""
    parser = FlagParser(
        description="Score captions against the atomic events of their references. Every reference counts, also one "
        "without a caption. docs/metrics.md says what each figure means."
    )
    parser.add_argument("captions", type=Path, help="JSONL of `salmonn caption`, or JSON of published predictions")
    parser.add_argument("--references", type=Path, required=True, help="JSONL of references, or the published JSON")
    parser.add_argument("--out", type=Path | None, default=None, help="file for each caption's score, and who judged")
    parser.add_argument("--summary", type=Path | None, default=None, help="JSON file for all figures")
    parser.add_argument("--report", type=Path | None, default=None, help="HTML page: figures, worst clips, videos")
    parser.add_argument("--num-worst", type=int, default=20, help="clips on that page")
    parser.add_argument(
        "--protocol", type=ProtocolName, default="salmonn", help="arithmetic: " + ", ".join(get_args(ProtocolName))
    )
    parser.add_argument("--passes", type=int, default=1, help="judge all so often; the median Total counts")
    parser.add_argument("--seed", type=int, default=2024, help="of the judge's first pass")
    add_judge(parser)
    return parser


def run_score(values: Namespace) -> int:
    """Print the rates of captions with their intervals; write scores, figures and page where asked."""
    if values.num_worst < 1 or not 0 <= values.seed < 2**31:
        raise ValueError(
            f"--num-worst must be at least 1 and --seed 0 or more, got {values.num_worst} and {values.seed}"
        )
    _require_outputs(values)
    from salmonn.preference.reward import make_judge
    from salmonn.score.formats import match_video_names, read_captions, read_references, write_scores
    from salmonn.score.metrics import compute_rates
    from salmonn.score.scoring import score_set
    from salmonn.score.stats import bootstrap_intervals

    references = read_references(values.references)
    captions = match_video_names(read_captions(values.captions), references, values.references)
    if not captions:
        raise ValueError(f"{values.captions} holds no captions")
    judge = make_judge(judge_config(values), published=values.protocol == "published")
    total = len(captions) * values.passes
    with tqdm(total=total, desc="judging", unit=" captions", disable=judge.is_deterministic) as bar:
        scored = score_set(
            references,
            captions,
            judge,
            protocol=values.protocol,
            passes=values.passes,
            seed=values.seed,
            progress=bar.update,
        )
    if values.out:
        write_scores(values.out, scored.judge_info, scored.results)
    _list_unscored(scored)
    if not scored.scores:
        return SOME_FAILED
    figures, intervals = compute_rates(scored.scores), bootstrap_intervals(scored.scores)
    if values.protocol == "published":  # its replies do not say which events are told, nor where
        figures = replace(figures, audio_share=None, order=None)
    print_scores(scored, figures, intervals)
    if values.summary:
        write_json(values.summary, summarise(scored, figures, intervals))
    if values.report:
        _write_page(values, scored, figures, intervals, captions=captions, references=references)
    return SOME_FAILED if scored.unscored else 0


def _require_outputs(values: Namespace) -> None:
    """Refuse outputs that would overwrite what is read, or one another, before anything is judged."""
    used = {path.resolve(): name for name, path in (("captions", values.captions), ("references", values.references))}
    for name in ("out", "summary", "report", "cache"):
        path = values[name]
        if path is None:
            continue
        if path.is_dir():
            raise ValueError(f"--{name} is a folder, {path}: give the name of a file")
        if other := used.get(path.expanduser().resolve()):
            raise ValueError(f"--{name} would overwrite the {other} file, {path}: give another name")
        used[path.expanduser().resolve()] = f"--{name}"


def summarise(scored: "ScoredSet", figures: "Rates", intervals: Mapping[str, "Interval"]) -> dict[str, object]:
    """All figures of a scored set, as JSON."""
    return {
        "judge_info": asdict(scored.judge_info),
        "rates": asdict(figures),
        "intervals": {name: asdict(interval) for name, interval in intervals.items()},
        "unscored": [asdict(one) for one in scored.unscored],
        "as_published": asdict(scored.as_published) if scored.as_published else None,
        "as_published_with_all_videos": asdict(scored.with_all) if scored.with_all else None,
    }


def print_scores(scored: "ScoredSet", figures: "Rates", intervals: Mapping[str, "Interval"]) -> None:
    """Print tables of a scored set, and what could not be scored."""
    judge_info = scored.judge_info
    console = Console(width=100)
    console.print(f"judge {judge_info.judge}", highlight=False, soft_wrap=True)
    table = new_table(f"{figures.captions} captions of {figures.clips} videos", ("%", "95 % interval"))
    for name, title in TITLES.items():
        value = getattr(figures, name)
        interval = intervals.get(name)
        shown = f"{100 * interval.low:.1f} to {100 * interval.high:.1f}" if interval else ""
        table.add_row(title, "-" if value is None else f"{100 * value:.2f}", shown)
    table.add_row("Order (Kendall's tau)", "-" if figures.order is None else f"{figures.order:+.3f}", "")
    table.add_row("Length in words", f"{figures.words:.1f}", "")
    console.print(table)
    if len(judge_info.totals) > 1:
        found = [100 * total for total in judge_info.totals if total is not None]
        words = ", ".join("-" if total is None else f"{100 * total:.2f}" for total in judge_info.totals)
        words = f"Total of each pass: {words} %; standard deviation {statistics.stdev(found) if found[1:] else 0:.2f}; "
        console.print(
            f"{words}pass {judge_info.reported_pass + 1}, the median, is shown", highlight=False, soft_wrap=True
        )
    if scored.as_published and scored.with_all:
        _print_published(console, scored)


def _list_unscored(scored: "ScoredSet") -> None:
    for one in scored.unscored[:_MOST_LISTED]:
        sys.stderr.write(f"unscored: {one.video} (sample {one.sample}): {one.reason}\n")
    if scored.unscored[_MOST_LISTED:]:
        sys.stderr.write(f"... and {len(scored.unscored) - _MOST_LISTED} more: --out lists them all\n")
    if scored.unscored:
        rest = "in none of the rates" if scored.scores else "all that there are: no figures, no summary and no page"
        sys.stderr.write(f"{len(scored.unscored)} captions are unscored and {rest}\n")


def _print_published(console: Console, scored: "ScoredSet") -> None:
    table = new_table("fractions, by the published protocol", ("as published", "all videos"))
    names = {"total": "EER", "missing": "MISS", "incorrect": "INCORRECT", "hallucination": "HALLUCINATION"}
    for name, title in names.items():
        table.add_row(title, *(f"{getattr(rates, name):.3f}" for rates in (scored.as_published, scored.with_all)))
    both = (rates.incorrect + rates.hallucination for rates in (scored.as_published, scored.with_all) if rates)
    table.add_row("INCORRECT + HALLUCINATION", *(f"{value:.3f}" for value in both))
    counts = (rates.num_videos for rates in (scored.as_published, scored.with_all) if rates)
    table.add_row("videos", *map(str, counts))
    console.print(table)
    console.print(
        '"all videos" counts those without a score as all missed; "as published" leaves them out', soft_wrap=True
    )


def _write_page(
    values: Namespace,
    scored: "ScoredSet",
    figures: "Rates",
    intervals: Mapping[str, "Interval"],
    *,
    captions: Sequence[Caption],
    references: Mapping[str, Reference],
) -> None:
    from salmonn.score.report import Report, write_report

    absent = len(references) - len({caption.video for caption in captions} & set(references))
    counted = "count as all missed" if values.protocol == "salmonn" else "are in none of the rates"
    notes = [f"{absent} of {len(references)} videos have no caption and {counted}."] if absent else []
    if scored.with_all:
        notes.append(
            f"By the published protocol Total is {scored.with_all.total:.3f} where each of the "
            f"{scored.with_all.num_videos} videos counts, those without a score as all missed."
        )
    write_report(
        values.report,
        Report(
            title=f"{values.captions.name} against {values.references.name}",
            judge_info=scored.judge_info,
            rates=figures,
            scores=scored.scores,
            unscored=scored.unscored,
            captions=captions,
            media_dir=values.references.parent,
            intervals={name: (interval.low, interval.high) for name, interval in intervals.items()},
            references=references,
            published=_published_rates(scored),
            notes=notes,
            worst=values.num_worst,
        ),
    )


def _published_rates(scored: "ScoredSet") -> dict[str, float] | None:
    """The published figures under our names: its tables, too, count what is told wrong under hallucination."""
    rates = scored.as_published
    if rates is None:
        return None
    return {
        "missing": rates.missing,
        "incorrect": rates.incorrect,
        "hallucinated": rates.hallucination,
        "hallucination": rates.incorrect + rates.hallucination,
        "total": rates.total,
    }


def compare_parser() -> FlagParser:
    """Arguments of `salmonn compare`."""
    parser = FlagParser(
        description="Compare two sets of captions of the same videos, clip by clip: differences with 95 % intervals, "
        "wins, ties and losses. Both must have been scored by one judge on one protocol."
    )
    parser.add_argument("first", type=Path, help="score file, as `salmonn score --out` writes it")
    parser.add_argument("second", type=Path, help="another")
    parser.add_argument("--force", action="store_true", help="compare although the judges differ")
    return parser


def run_compare(values: Namespace) -> int:
    """Print how two sets of captions differ."""
    from salmonn.score.formats import read_scores
    from salmonn.score.stats import compare_sets, require_same_judge

    first, second = read_scores(values.first), read_scores(values.second)
    if not values.force:
        require_same_judge(first.judge_info, second.judge_info)
    result = compare_sets(first.scores, second.scores)
    table = new_table(
        f"{result.num_clips} videos: {values.second.name} against {values.first.name}",
        ("first %", "second %", "difference", "95 % interval", "wins", "ties", "losses"),
    )
    for name, one in result.differences.items():
        table.add_row(
            TITLES[name],
            f"{100 * one.first:.2f}",
            f"{100 * one.second:.2f}",
            f"{100 * one.difference:+.2f}",
            f"{100 * one.interval.low:+.2f} to {100 * one.interval.high:+.2f}",
            *map(str, (one.wins, one.ties, one.losses)),
        )
    console = Console(width=110)
    console.print(table)
    console.print("less is better; a win is a video on which the second set has less", highlight=False)
    if result.only_first or result.only_second:
        console.print(f"left out: {result.only_first} captions of the first alone, {result.only_second} of the second")
    return 0


def qa_parser() -> FlagParser:
    """Arguments of `salmonn qa`."""
    parser = FlagParser(
        description="Accuracy of answers to multiple-choice questions, overall and by group. Reads Video-MME's result "
        "files, flat JSON or JSONL of question, options, answer, response, and the published code's pred and ref."
    )
    parser.add_argument("answers", type=Path, help="JSON or JSONL file")
    parser.add_argument("--summary", type=Path | None, default=None, help="JSON file for all figures")
    return parser


def run_qa(values: Namespace) -> int:
    """Print the accuracy of answers."""
    from salmonn.score.multiple_choice import read_questions, score_questions

    result = score_questions(read_questions(values.answers))
    if values.summary:
        write_json(values.summary, asdict(result))
    table = new_table(f"{result.num_questions} questions", ("accuracy %", "95 % interval", "questions"))
    interval = f"{100 * result.interval.low:.1f} to {100 * result.interval.high:.1f}"
    table.add_row("all", f"{100 * result.accuracy:.2f}", interval, str(result.num_questions))
    for group, values_of_group in result.by_group.items():
        table.add_section()
        for value, (accuracy, count) in values_of_group.items():
            table.add_row(f"{group}: {value}", f"{100 * accuracy:.2f}", "", str(count))
    console = Console(width=100)
    console.print(table)
    console.print(f"unanswered: {result.unanswered}, unreadable: {result.unreadable}; both count as wrong")
    return 0
