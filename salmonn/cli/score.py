"""`salmonn score`, `compare`, `events` and `qa`: metrics of captions and answers."""

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from jsonargparse import Namespace
from rich.console import Console
from tqdm import tqdm

from salmonn.cli.options import SOME_FAILED, add_judge_options, judge_config, new_table, plural
from salmonn.config import FlagParser
from salmonn.files import read_records, write_json, write_records
from salmonn.records import Caption, Reference
from salmonn.score.config import ProtocolName

if TYPE_CHECKING:
    from salmonn.records import Score
    from salmonn.score.metrics import Rates
    from salmonn.score.scoring import ScoredSet
    from salmonn.score.stats import Interval

MAX_LISTED = 20  # unscored captions on the terminal
# Titles of the rates that are fractions, in the order of the table.
TITLES = {
    "missing": "Missing",
    "hallucination": "Hallucination",
    "incorrect": "  incorrect",
    "hallucinated": "  hallucinated",
    "total": "Total",
    "repetition": "Repetition",
    "cut_off": "Cut off at the token limit",
    "audio_share": "Audio share",
}
DIALOGUE_TITLES = {
    "dialogue_wer": "Dialogue word error rate",
    "dialogue_missing": "Spoken words not quoted",
    "dialogue_hallucinated": "Hallucinated dialogue",
}


def score_parser() -> FlagParser:
    """Return the arguments of `salmonn score`."""
    parser = FlagParser(
        description="Score captions against the atomic events of their references. Every reference counts, even one "
        "without a caption. docs/metrics.md explains each metric."
    )
    parser.add_argument("captions", type=Path, help="JSONL from `salmonn caption`, or JSON of published predictions")
    parser.add_argument("--references", type=Path, required=True, help="JSONL of references, or the published JSON")
    parser.add_argument(
        "--out", type=Path | None, default=None, help="file for the score of each caption and the judge"
    )
    parser.add_argument("--summary", type=Path | None, default=None, help="JSON file for all metrics")
    parser.add_argument("--report", type=Path | None, default=None, help="HTML report: metrics, worst clips, videos")
    parser.add_argument("--num_worst", type=int, default=20, help="number of worst clips in the report")
    parser.add_argument(
        "--protocol",
        type=ProtocolName,
        default="salmonn",
        help="scoring protocol: " + ", ".join(get_args(ProtocolName)),
    )
    parser.add_argument(
        "--passes", type=int, default=1, help="judging passes; the pass with the median Total is reported"
    )
    add_judge_options(parser, seed=2024)
    return parser


def run_score(values: Namespace) -> int:
    """Print the metrics of captions with confidence intervals; write the requested files."""
    if values.num_worst < 1:
        raise ValueError(f"--num-worst must be at least 1, got {values.num_worst}")
    config = judge_config(values)
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
    judge = make_judge(config, published=values.protocol == "published")
    total = len(captions) * values.passes
    with tqdm(total=total, desc="judging", unit=" captions", disable=judge.is_deterministic) as bar:
        scored = score_set(
            references,
            captions,
            judge,
            protocol=values.protocol,
            passes=values.passes,
            seed=values.seed or 0,
            progress=bar.update,
        )
    if values.out:
        write_scores(values.out, scored.judge_info, scored.results)
    _list_unscored(scored)
    if not scored.scores:
        return SOME_FAILED
    figures, intervals = compute_rates(scored.scores), bootstrap_intervals(scored.scores)
    if values.protocol == "published":  # its replies do not say which events are mentioned, or where
        figures = replace(figures, audio_share=None, order=None)
    print_scores(scored, figures, intervals)
    dialogue = print_dialogue(scored.scores)
    if values.summary:
        write_json(values.summary, summarise(scored, figures, intervals) | dialogue)
    if values.report:
        _write_report(values, scored, figures, intervals, captions=captions, references=references)
    return SOME_FAILED if scored.unscored else 0


def _require_outputs(values: Namespace) -> None:
    """Check, before anything is judged, that no output overwrites an input or another output."""
    used = {path.resolve(): name for name, path in (("captions", values.captions), ("references", values.references))}
    for name in ("out", "summary", "report", "cache"):
        path = values[name]
        if path is None:
            continue
        if path.is_dir():
            raise ValueError(f"--{name} must be the name of a file, and {path} is a folder")
        if other := used.get(path.expanduser().resolve()):
            raise ValueError(f"--{name} would overwrite the {other} file, {path}; choose another name")
        used[path.expanduser().resolve()] = f"--{name}"


def summarise(scored: "ScoredSet", figures: "Rates", intervals: Mapping[str, "Interval"]) -> dict[str, object]:
    """Return all metrics of a scored set as JSON values."""
    num_excluded = sum(score.num_excluded for score in scored.scores)
    return {
        "judge_info": asdict(scored.judge_info),
        "rates": asdict(figures),
        "intervals": {name: asdict(interval) for name, interval in intervals.items()},
        "unscored": [asdict(one) for one in scored.unscored],
        **({"num_excluded": num_excluded} if num_excluded else {}),
        "as_published": asdict(scored.as_published) if scored.as_published else None,
        "as_published_with_all_videos": asdict(scored.with_all) if scored.with_all else None,
    }


def print_scores(scored: "ScoredSet", figures: "Rates", intervals: Mapping[str, "Interval"]) -> None:
    """Print the tables of a scored set."""
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
    if note := _note_excluded(scored.scores):
        console.print(note, highlight=False, soft_wrap=True)
    if len(judge_info.totals) > 1:
        found = [100 * total for total in judge_info.totals if total is not None]
        totals = ", ".join("-" if total is None else f"{100 * total:.2f}" for total in judge_info.totals)
        deviation = statistics.stdev(found) if found[1:] else 0
        console.print(
            f"Total of each pass: {totals} %; standard deviation {deviation:.2f}; showing pass "
            f"{judge_info.reported_pass + 1}, the median",
            highlight=False,
            soft_wrap=True,
        )
    if scored.as_published and scored.with_all:
        _print_published(console, scored)


def _note_excluded(scores: Sequence["Score"]) -> str:
    """Return a sentence about the events that do not count for captions of frames alone or audio alone, if any."""
    counts = [score.num_excluded for score in scores if score.num_excluded]
    if not counts:
        return ""
    made, events = plural(len(counts), "caption"), plural(sum(counts), "event")
    return f"not counted: {events} that {made} of frames alone or audio alone cannot be expected to mention"


def print_dialogue(scores: Sequence["Score"]) -> dict[str, object]:
    """Print the dialogue measures if the references quote speech; return them as JSON values, or else nothing."""
    from salmonn.score.dialogue import DIALOGUE_MEASURES, dialogue_rates
    from salmonn.score.stats import bootstrap_intervals

    if (rates := dialogue_rates(scores)) is None:
        return {}
    intervals = bootstrap_intervals(scores, measures=DIALOGUE_MEASURES)
    missing = intervals["dialogue_missing"]
    intervals["dialogue_recall"] = replace(missing, low=1 - missing.high, high=1 - missing.low)
    table = new_table(f"dialogue: {rates.num_spoken} spoken words, {rates.num_quoted} quoted", ("%", "95 % interval"))
    rows = {"dialogue_wer": rates.wer, "dialogue_recall": rates.recall, "dialogue_hallucinated": rates.hallucinated}
    for name, value in rows.items():
        interval = intervals[name]
        title = DIALOGUE_TITLES.get(name, "Recall of spoken words")
        shown = "-" if value is None else f"{100 * value:.2f}"
        table.add_row(title, shown, "" if value is None else f"{100 * interval.low:.1f} to {100 * interval.high:.1f}")
    console = Console(width=100)
    console.print(table)
    if rates.num_silent:
        quote = f"{plural(rates.num_silent, 'caption')} of videos without speech quote some"
        console.print(f"{quote}; all of it counts as hallucinated", highlight=False)
    shown_intervals = {name: asdict(interval) for name, interval in intervals.items()}
    return {"dialogue": {"rates": asdict(rates), "intervals": shown_intervals}}


def _list_unscored(scored: "ScoredSet") -> None:
    for one in scored.unscored[:MAX_LISTED]:
        sys.stderr.write(f"unscored: {one.video} (sample {one.sample}): {one.reason}\n")
    if scored.unscored[MAX_LISTED:]:
        sys.stderr.write(f"... and {len(scored.unscored) - MAX_LISTED} more; --out lists all of them\n")
    if scored.unscored:
        number = plural(len(scored.unscored), "caption")
        rest = "excluded from all metrics" if scored.scores else "no caption was scored, so no metrics were written"
        sys.stderr.write(f"unscored: {number}; {rest}\n")


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
        '"all videos" counts videos without a score as completely missed; "as published" excludes them', soft_wrap=True
    )


def _write_report(
    values: Namespace,
    scored: "ScoredSet",
    figures: "Rates",
    intervals: Mapping[str, "Interval"],
    *,
    captions: Sequence[Caption],
    references: Mapping[str, Reference],
) -> None:
    from salmonn.score.dialogue import dialogue_rates
    from salmonn.score.report import Report, write_report

    absent = len(references) - len({caption.video for caption in captions} & set(references))
    counted = "count as completely missed" if values.protocol == "salmonn" else "are excluded from all metrics"
    notes = [f"{absent} of {len(references)} videos have no caption and {counted}."] if absent else []
    if note := _note_excluded(scored.scores):
        notes.append(f"{note}.")
    if scored.with_all:
        notes.append(
            f"Total by the published protocol is {scored.with_all.total:.3f} over all {scored.with_all.num_videos} "
            "videos, if those without a score count as completely missed."
        )
    if dialogue := dialogue_rates(scored.scores):
        notes.append(
            f"Dialogue: word error rate {dialogue.wer:.1%}, recall {dialogue.recall:.1%} of {dialogue.num_spoken} "
            "spoken words."
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
    """Return the published metrics under our names; the published tables, too, count incorrect as hallucination."""
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
    """Return the arguments of `salmonn compare`."""
    parser = FlagParser(
        description="Compare two sets of captions of the same videos, clip by clip: differences with 95 % confidence "
        "intervals, wins, ties and losses. Both must have been scored by the same judge and protocol."
    )
    parser.add_argument("first", type=Path, help="score file from `salmonn score --out`")
    parser.add_argument("second", type=Path, help="score file to compare with it")
    parser.add_argument("--force", action="store_true", help="compare even if the judges differ")
    return parser


def run_compare(values: Namespace) -> int:
    """Print the differences of two sets of captions."""
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
            (TITLES | DIALOGUE_TITLES)[name],
            f"{100 * one.first:.2f}",
            f"{100 * one.second:.2f}",
            f"{100 * one.difference:+.2f}",
            f"{100 * one.interval.low:+.2f} to {100 * one.interval.high:+.2f}",
            *map(str, (one.wins, one.ties, one.losses)),
        )
    console = Console(width=110)
    console.print(table)
    console.print("lower is better; a win is a video on which the second set is lower", highlight=False)
    if result.only_first or result.only_second:
        console.print(
            f"not compared: {result.only_first} captions only in the first set, {result.only_second} in the second"
        )
    return 0


def events_parser() -> FlagParser:
    """Return the arguments of `salmonn events`."""
    parser = FlagParser(
        description="Split the captions of references into atomic events: one fact each (visual, audio or speech), "
        "with its time if the caption gives one. Existing events, in the references or in --out, are kept as long as "
        "the caption is the same, so you can edit --out by hand and run the command again."
    )
    parser.add_argument("references", type=Path, help="JSONL of references with captions")
    parser.add_argument("--out", type=Path, required=True, help="JSONL file for the references with their events")
    add_judge_options(parser, seed=0)
    return parser


def run_events(values: Namespace) -> int:
    """Split captions into events and write all references."""
    from salmonn.preference.reward import make_llm_client
    from salmonn.score.events import list_events
    from salmonn.score.formats import read_references
    from salmonn.synthetic.parser import split_caption

    config = judge_config(values)
    references = read_references(values.references)
    if values.out.suffix == ".json":
        raise ValueError(f"{values.out}: the output is JSON lines; choose a name that ends in .jsonl")
    kept = {known.video: known for known in read_records(values.out, Reference)} if values.out.exists() else {}
    for video, reference in references.items():
        # A caption that has changed since is split again.
        if not reference.events and video in kept and kept[video].caption == reference.caption:
            references[video] = replace(reference, events=kept[video].events)
    num_captions = sum(not reference.events for reference in references.values())
    is_quiet = config.kind == "rule" or not num_captions
    with tqdm(total=num_captions, desc="splitting", unit=" captions", disable=is_quiet) as bar:
        found, failed = list_events(
            list(references.values()),
            client=make_llm_client(config) if config.kind == "openai" else None,
            rules=split_caption,
            attempts=config.attempts,
            seed=values.seed or 0,
            progress=bar.update,
        )
    write_records(values.out, found)
    for one in failed:
        sys.stderr.write(f"failed: {one.video}: {one.reason}\n")
    num_events = sum(len(reference.events) for reference in found)
    videos, failures = plural(len(found) - len(failed), "video"), plural(len(failed), "video")
    sys.stderr.write(f"{plural(num_events, 'event')} of {videos} written to {values.out}, {failures} failed\n")
    return SOME_FAILED if failed else 0


def qa_parser() -> FlagParser:
    """Return the arguments of `salmonn qa`."""
    parser = FlagParser(
        description="Compute the accuracy of answers to multiple-choice questions, overall and by group. Reads "
        "Video-MME result files, JSON or JSONL with question, options, answer and response, and the pred and ref files "
        "of the published code."
    )
    parser.add_argument("answers", type=Path, help="JSON or JSONL file")
    parser.add_argument("--summary", type=Path | None, default=None, help="JSON file for all metrics")
    return parser


def run_qa(values: Namespace) -> int:
    """Print the accuracy of answers to multiple-choice questions."""
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
    console.print(f"unanswered: {result.unanswered}, unparsable: {result.unreadable}; both count as wrong")
    return 0
