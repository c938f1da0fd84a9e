"""Comparisons for training and testing reward models: read from any source, grouped by clip and prompt.

Sources: judged captions of a round, comparisons (pairs.jsonl), people's feedback, published conversations with
preferences, and rows of TRL or RewardBench. All become `Comparison` records; those that cannot be used are left out and
counted.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from salmonn.conversations import Conversation, is_conversation_file, list_items, read_conversations
from salmonn.files import iter_numbered_records, parse_record, read_records
from salmonn.preference.feedback import FEEDBACK_NAME, holds_feedback, read_feedback
from salmonn.preference.feedback_pairs import PEOPLE, to_comparisons
from salmonn.preference.rating import Rating
from salmonn.preference.reward import JudgeReward
from salmonn.preference.rows import PreferenceRow, parse_row, read_rows
from salmonn.records import Caption, Comparison, Modality, Score
from salmonn.score.formats import read_scores
from salmonn.synthetic.judge import RuleJudge

log = logging.getLogger(__name__)
Check = Callable[[Comparison], None]

CAPTIONS_NAME, SCORES_NAME, RATINGS_NAME = "captions.jsonl", "scores.jsonl", "ratings.jsonl"
EQUAL, NO_ANSWER, NO_VIDEO = "equal answers", "an empty better answer", "no video"
UNRATED = "captions without a rating"
_ROUNDING = 1e-9  # margins are differences of fractions: 0.5 - 0.4 must pass a gap of 0.1


@dataclass(frozen=True)
class Preferences:
    """Comparisons of a source.

    Args:
        comparisons: comparisons of answers that differ, about videos that exist.
        root: folder that the paths of the videos start from.
        left_out: reason -> number of comparisons that cannot be used.
    """

    comparisons: list[Comparison]
    root: Path
    left_out: Mapping[str, int] = field(default_factory=dict)

    def describe(self) -> str:
        """Return the numbers as a sentence."""
        num_videos = len({comparison.video for comparison in self.comparisons})
        text = f"{len(self.comparisons)} comparisons of captions of {num_videos} videos"
        raters = Counter(one.rater for one in self.comparisons if one.rater or one.source in PEOPLE)
        if raters:
            text += f"; by people: {len(raters.keys() - {''})} raters, {raters['']} comparisons without a rater's id"
        reasons = ", ".join(f"{reason} ({count})" for reason, count in self.left_out.items())
        return f"{text}; left out: {reasons}" if reasons else text


@dataclass(frozen=True)
class AnswerGroup:
    """Answers to one prompt about one clip, and which is better than which: one forward pass scores them all.

    Args:
        example: one of the comparisons, for what all of them share: clip, prompt and history.
        answers: (text, finished) of each distinct answer.
        pairs: indices of the better and the worse answer of each comparison.
        margins: how much better, in units of the source's rating; None where it is unknown.
        raters: id of the person who compared each pair; "" if unknown.
        objectives: values of `salmonn.preference.objectives.OBJECTIVES` for each answer; empty if they are unknown.
        credits: credit of each clause of each answer (salmonn.preference.claims); empty if they are unknown.
    """

    example: Comparison
    answers: tuple[tuple[str, bool], ...]
    pairs: tuple[tuple[int, int], ...]
    margins: tuple[float | None, ...]
    raters: tuple[str, ...] = ()
    objectives: tuple[tuple[float | None, ...], ...] = ()
    credits: tuple[tuple[float, ...], ...] = ()

    def to_pairwise(self) -> "AnswerGroup":
        """Return the group for a model that reads two captions at once.

        Each unordered pair becomes two rows, (a, b) and (b, a); the one with the better caption first must get the
        higher value h. P(a over b) = sigmoid(h(a, b) - h(b, a)), so no position can be preferred.
        """
        answers, pairs = list[tuple[str, bool]](), []
        for better, worse in self.pairs:
            first, second = self.answers[better], self.answers[worse]
            answers += [join_pair(first, second), join_pair(second, first)]
            pairs.append((len(answers) - 2, len(answers) - 1))
        return replace(self, answers=tuple(answers), pairs=tuple(pairs))


def join_pair(first: tuple[str, bool], second: tuple[str, bool]) -> tuple[str, bool]:
    """Return the answer that holds two captions, in this order, for a pairwise model."""
    return f"A: {first[0]} B: {second[0]}", True


def attach_values(
    groups: Sequence[AnswerGroup], values: Mapping[tuple[Any, ...], Any], *, name: Literal["credits", "objectives"]
) -> list[AnswerGroup]:
    """Return groups with a value for each answer.

    Args:
        groups: the groups.
        values: values by video, start and end in seconds, text, and whether the text is finished.
        name: field of the groups that the values are for.
    """
    attached = []
    for group in groups:
        clip = (group.example.video, group.example.start_seconds, group.example.end_seconds)
        of_answers: dict[str, Any] = {name: tuple(values[*clip, *answer] for answer in group.answers)}
        attached.append(replace(group, **of_answers))
    return attached


def group_comparisons(comparisons: Sequence[Comparison]) -> list[AnswerGroup]:
    """Group comparisons by clip, prompt and history, in the order of the clips' names."""
    groups: dict[tuple[Any, ...], list[Comparison]] = {}
    for one in comparisons:
        span = (one.start_seconds or 0.0, one.end_seconds or float("inf"))
        groups.setdefault((one.video, *span, one.modality, one.audio or "", one.prompt, one.history), []).append(one)
    return [_make_group(groups[key]) for key in sorted(groups)]


def _make_group(comparisons: Sequence[Comparison]) -> AnswerGroup:
    index: dict[tuple[str, bool], int] = {}
    pairs = [
        (
            index.setdefault((one.chosen, one.chosen_finished), len(index)),
            index.setdefault((one.rejected, one.rejected_finished), len(index)),
        )
        for one in comparisons
    ]
    margins, raters = (tuple(getattr(one, name) for one in comparisons) for name in ("margin", "rater"))
    return AnswerGroup(comparisons[0], tuple(index), tuple(pairs), margins, raters)


def compare_ratings(
    captions: Sequence[Caption], ratings: Sequence[Rating], *, min_gap: float, source: str
) -> list[Comparison]:
    """Return all pairs of captions of a clip whose ratings differ by at least `min_gap`.

    Args:
        captions: captions, several of each clip.
        ratings: ratings of these captions, matched by video, sample and, if a judge rated them, part of the video;
            captions without one are left out.
        min_gap: smallest difference of the ratings' values.
        source: name of what rated them.
    """
    rating_of = {_rating_key(rating.score or rating): rating.value for rating in ratings}
    by_clip: dict[tuple[object, ...], list[Caption]] = {}
    for caption in captions:
        if _rating_key(caption) in rating_of:
            key = (caption.video, caption.prompt, caption.start_seconds, caption.end_seconds)
            by_clip.setdefault(key, []).append(caption)
    comparisons = []
    for group in by_clip.values():
        for one, other in combinations(group, 2):
            gap = rating_of[_rating_key(one)] - rating_of[_rating_key(other)]
            if abs(gap) < min_gap - _ROUNDING or one.text.split() == other.text.split():
                continue
            better, worse = (one, other) if gap > 0 else (other, one)
            comparisons.append(
                Comparison(
                    video=one.video,
                    prompt=one.prompt,
                    chosen=better.text,
                    rejected=worse.text,
                    margin=abs(gap),
                    source=source,
                    chosen_finished=better.finished,
                    rejected_finished=worse.finished,
                    start_seconds=one.start_seconds,
                    end_seconds=one.end_seconds,
                )
            )
    return comparisons


def _rating_key(record: Caption | Score | Rating) -> tuple[object, ...]:
    """Return video, sample and part of the video, by which captions and their ratings are matched."""
    span = (None, None) if isinstance(record, Rating) else (record.start_seconds, record.end_seconds)
    return (record.video, record.sample, *span)


def read_preferences(
    path: Path,
    *,
    root: Path | None = None,
    min_gap: float = 0.1,
    repetition_weight: float = 1.0,
    check: Check | None = None,
) -> Preferences:
    """Read comparisons from any source.

    Args:
        path: folder with captions.jsonl and scores.jsonl or, from a reward other than a judge, ratings.jsonl; or
            with feedback.jsonl; or a file of comparisons, of feedback, of published conversations, or of rows with
            `prompt`, `chosen`, `rejected` and `video`.
        root: folder that the paths of the videos start from; by default that of the file.
        min_gap, repetition_weight: for judged captions: smallest difference of -(Total + repetition_weight *
            repetition) of a pair; for captions with a reward, of the reward.
        check: raises a ValueError for texts that the model cannot read.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: a line is invalid, or no comparison can be used.
    """
    if path.is_dir() and (path / SCORES_NAME).is_file():
        scores = read_scores(path / SCORES_NAME)
        # The conversion of scores is the same for every judge.
        judged = JudgeReward(RuleJudge(), repetition_weight=repetition_weight)
        ratings = [judged.to_rating(score) for score in scores.scores]
        read, left_out = _read_rated(path, ratings, min_gap=min_gap, source=scores.judge_info.judge)
    elif path.is_dir() and (path / RATINGS_NAME).is_file():
        ratings = read_records(path / RATINGS_NAME, Rating)
        read, left_out = _read_rated(path, ratings, min_gap=min_gap, source="reward")
    elif path.is_dir():
        if not holds_feedback(path):
            raise FileNotFoundError(
                f"{path} holds no preferences: expected {CAPTIONS_NAME} with {SCORES_NAME} or {RATINGS_NAME}, or "
                f"{FEEDBACK_NAME}"
            )
        read, left_out = to_comparisons(read_feedback(path))
    else:
        read, left_out = _read_file(path)
    root = root or (path if path.is_dir() else path.parent)
    comparisons = []
    for number, one in enumerate(read, start=1):
        if reason := _find_flaw(one, root, may_be_silent=path.is_dir()):
            left_out[reason] += 1
        else:
            _check(one, check, where=f"{path}, comparison {number}")
            comparisons.append(one)
    preferences = Preferences(comparisons, root, dict(left_out))
    if not comparisons:
        raise ValueError(
            f"{path} has no comparisons that can be used: {preferences.describe()}; paths of videos start from "
            f"{root.resolve()}, which root changes"
        )
    return preferences


def _find_flaw(comparison: Comparison, root: Path, *, may_be_silent: bool) -> str:
    """Return why a comparison cannot be used; "" if it can. A judge may prefer an empty caption to a wrong one."""
    if comparison.chosen.split() == comparison.rejected.split():
        return EQUAL
    if not comparison.chosen.strip() and not may_be_silent:
        return NO_ANSWER
    return "" if comparison.video and (root / comparison.video).is_file() else NO_VIDEO


def _check(comparison: Comparison, check: Check | None, *, where: str) -> None:
    try:
        if check:
            check(comparison)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _read_rated(
    folder: Path, ratings: Sequence[Rating], *, min_gap: float, source: str
) -> tuple[list[Comparison], Counter[str]]:
    """Return comparisons of a folder's captions, and the number of captions without a rating if there are such.

    Raises:
        ValueError: captions or ratings cannot be distinguished.
    """
    captions, comparisons = read_records(folder / CAPTIONS_NAME, Caption), list[Comparison]()
    _check_distinct(captions, where=f"{folder} has captions")
    _check_distinct([rating.score or rating for rating in ratings], where=f"{folder} has ratings")
    modalities: tuple[Modality, ...] = ("both", "visual", "audio")
    for modality in modalities:  # of what the captioner was given, as `salmonn reward` reads it
        same = [caption for caption in captions if (caption.modality or "both") == modality]
        compared = compare_ratings(same, ratings, min_gap=min_gap, source=source)
        comparisons += [replace(one, modality=modality) for one in compared]
    rated = {_rating_key(rating.score or rating) for rating in ratings}
    return comparisons, +Counter({UNRATED: sum(_rating_key(caption) not in rated for caption in captions)})


def _check_distinct(records: Sequence[Caption | Score | Rating], *, where: str) -> None:
    counts = Counter(_rating_key(one) for one in records)
    if repeated := next((key for key, count in counts.items() if count > 1), None):
        raise ValueError(
            f"{where} that cannot be distinguished: {counts[repeated]} of {repeated[0]} have sample {repeated[1]}; "
            "number the samples of each video, or use a folder for each modality, prompt and seed"
        )


def _read_file(path: Path) -> tuple[list[Comparison], Counter[str]]:
    """Return the comparisons of a file of any format, and reason -> number of those that cannot be used."""
    if path.is_file() and (path.suffix == ".parquet" or _is_list_of_rows(path)):
        return _read_rows(path), Counter()
    if path.is_file() and is_conversation_file(path):
        return [conversation_to_comparison(one) for one in read_conversations(path) if one.preference], Counter()
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected a file or a folder with preferences")
    kind = _guess_kind(path)
    if kind == "feedback":
        return to_comparisons(read_feedback(path))
    if kind == "comparisons":
        return [record for _, record in iter_numbered_records(path, Comparison)], Counter()
    return _read_rows(path), Counter()


def _is_list_of_rows(path: Path) -> bool:
    """Return whether a file is a JSON list of rows rather than of conversations, by its first item."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        if not next((line for line in file if line.strip()), "").lstrip().startswith("["):
            return False
    _, first = next(list_items(path), (0, None))
    return isinstance(first, dict) and "chosen" in first


def _guess_kind(path: Path) -> str:
    """Return the format of a JSONL file by its first line."""
    with path.open(encoding="utf-8-sig") as file:
        first = next((line for line in file if line.strip()), "{}")
    try:
        row = json.loads(first)
    except ValueError as error:
        raise ValueError(f"{path}, line 1: not JSON ({error})") from error
    names = set(row) if isinstance(row, dict) else set()
    if {"first", "second", "choice"} <= names:
        return "feedback"
    is_plain = all(isinstance(row.get(name), str) for name in ("prompt", "chosen", "rejected"))
    return "comparisons" if is_plain and names <= {one.name for one in fields(Comparison)} else "rows"


def _read_rows(path: Path) -> list[Comparison]:
    """Read rows of TRL or RewardBench; columns that a comparison does not have are ignored."""
    comparisons = []
    for number, value in read_rows(path):
        try:
            comparisons += _row_to_comparisons(parse_row(value))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return comparisons


def _row_to_comparisons(row: PreferenceRow) -> list[Comparison]:
    """Return a comparison of each better answer with each worse one."""
    history, prompt = row.conversation
    names = ("margin", "modality", "start_seconds", "end_seconds", "audio")
    shared = {name: row.columns[name] for name in names if name in row.columns}
    shared |= {"video": row.video, "prompt": prompt, "source": "given", "history": [list(turn) for turn in history]}
    return [
        parse_record(shared | {"chosen": better, "rejected": worse}, Comparison)
        for better in row.chosen
        for worse in row.rejected
    ]


def conversation_to_comparison(conversation: Conversation) -> Comparison:
    """Convert the preference of a published conversation to a comparison."""
    preference = conversation.preference
    assert preference is not None, "the conversation has a preference"
    return Comparison(
        video=conversation.video or conversation.image or conversation.audio or "",
        prompt=preference.prompt,
        chosen=preference.chosen,
        rejected=preference.rejected,
        ground_truth=preference.ground_truth,
        source="published",
        history=preference.history,
        modality=conversation.modality,
        audio=conversation.audio if conversation.video or conversation.image else None,
        start_seconds=conversation.start_seconds,
        end_seconds=conversation.end_seconds,
    )
