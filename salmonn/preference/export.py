"""Preferences and objectives as rows for other libraries: `salmonn export SOURCE --rows trl|helpsteer`.

People's feedback has more kinds, which `salmonn votes FOLDER --export` writes.

    trl        {"prompt": [message], "chosen": [message], "rejected": [message], "videos": [path]} for each comparison,
               a conversational preference dataset with explicit prompts as TRL documents it
    helpsteer  {"prompt": text, "response": text, "videos": [path], "correctness": 0 to 4, ...} for each judged caption,
               as in HelpSteer, whose correctness and verbosity are our `correct` and `length`
    unpaired   {"prompt": [message], "completion": [message], "label": bool, "videos": [path]} for each caption rated
               good or bad, as TRL's KTOTrainer takes it
    arena      {"model_a": name, "model_b": name, "winner": "model_a", "model_b", "tie" or "tie (bothbad)",
               "judge": rater, "turn": 1, "anony": true, "language": "unknown", "tstamp": seconds since 1970} for each
               vote: a JSON list, as FastChat's elo_analysis.py reads battles

TRL has `images` and no videos yet; `videos` is named by analogy.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from salmonn.files import read_records, write_text
from salmonn.media.container import ClipError, declared_shape
from salmonn.preference.comparisons import CAPTIONS_NAME, NO_VIDEO, SCORES_NAME, Preferences, read_preferences
from salmonn.preference.feedback import Feedback, read_feedback
from salmonn.preference.feedback_pairs import to_comparisons
from salmonn.preference.objectives import OBJECTIVES, judged_objectives
from salmonn.records import Caption, Comparison, Modality, Reference
from salmonn.score.formats import read_scores

RowKind = Literal["trl", "helpsteer", "unpaired", "arena"]
HELPSTEER_NAMES = {"correct": "correctness", "length": "verbosity"}
Rows = tuple[list[dict[str, Any]], Counter[str]]  # and reason -> number of what a row cannot hold
NO_RATING = "votes and texts, which are not ratings"
CUT, PART = "answers that are cut off", "a part of the clip, one modality or a separate audio track"


def export_rows(
    source: Path,
    out: Path,
    *,
    kind: RowKind,
    root: Path | None = None,
    references: Path | None = None,
    min_gap: float = 0.1,
    with_margin: bool = False,
) -> tuple[int, Mapping[str, int]]:
    """Write the preferences, or the judged captions, of a source as rows for other libraries.

    Args:
        source: folder or file with preferences, see `read_preferences`; for "helpsteer" a folder with judged captions.
        out: JSONL file; a JSON list for "arena".
        kind: format of the rows.
        root: folder that the paths of the videos start from; by default that of the source.
        references: for "helpsteer": JSONL of the references that the captions were judged against.
        min_gap: for "trl", of rated captions: smallest difference of two ratings.
        with_margin: for "trl": add `margin`, which TRL's RewardTrainer subtracts from the difference of rewards.

    Returns:
        Number of rows, and reason -> number of comparisons or captions that such a row cannot hold.

    Raises:
        ValueError: the source cannot be read as such, references are missing, or a comparison has no margin.
    """
    if (kind == "helpsteer") != (references is not None):
        raise ValueError(
            "rows of helpsteer need --references, the events that the captions were judged against; rows of trl do not"
        )
    root = root or (source.parent if source.is_file() else source)
    match kind:
        case "helpsteer":
            rows, left_out = _helpsteer_rows(source, references or Path(), root=root)
        case "arena":
            rows, left_out = _arena_rows(read_feedback(source))
        case "unpaired":
            rows, left_out = _unpaired_rows(read_feedback(source), root=root)
        case _:
            rows, left_out = _trl_rows(read_preferences(source, root=root, min_gap=min_gap), with_margin=with_margin)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    is_list = kind == "arena"
    write_text(out, "[\n" + ",\n".join(lines) + "\n]\n" if is_list else "".join(line + "\n" for line in lines))
    return len(rows), dict(left_out)


def _helpsteer_rows(source: Path, references: Path, *, root: Path) -> Rows:
    if not (source / SCORES_NAME).is_file():
        raise ValueError(f"{source} holds no judged captions: expected {CAPTIONS_NAME} and {SCORES_NAME} in it")
    by_video = {one.video: one for one in read_records(references, Reference)}
    captions = read_records(source / CAPTIONS_NAME, Caption)
    rows, left_out = list[dict[str, Any]](), Counter[str]()
    for caption, objectives in judged_objectives(captions, read_scores(source / SCORES_NAME).scores, by_video):
        if reason := _misfit(caption, finished=[caption.finished], root=root):
            left_out[reason] += 1
        else:
            rows.append(_helpsteer_row(caption, objectives, root=root))
    return rows, left_out


def _trl_rows(preferences: Preferences, *, with_margin: bool) -> Rows:
    rows, left_out = list[dict[str, Any]](), Counter(preferences.left_out)
    for one in preferences.comparisons:
        reason = _misfit(one, finished=[one.chosen_finished, one.rejected_finished], root=preferences.root)
        if reason or one.audio:
            left_out[reason or PART] += 1
        else:
            rows.append(_trl_row(one, root=preferences.root, with_margin=with_margin))
    return rows, left_out


def _unpaired_rows(feedback: Sequence[Feedback], *, root: Path) -> Rows:
    comparisons, left_out = to_comparisons(feedback, unpaired=True)
    rows = list[dict[str, Any]]()
    for one in comparisons:
        reason = _misfit(one, finished=[], root=root) if one.source == "rating" else NO_RATING
        if not reason and not (root / one.video).is_file():
            reason = NO_VIDEO
        if reason:
            left_out[reason] += 1
        else:
            row: dict[str, Any] = {
                "prompt": _messages(("user", one.prompt)),
                "completion": _messages(("assistant", one.chosen or one.rejected)),
                "label": bool(one.chosen),
                "videos": [str((root / one.video).resolve())],
            }
            rows.append(row)
    return rows, left_out


def _arena_rows(feedback: Sequence[Feedback]) -> Rows:
    votes = [one for one in feedback if one.action == "vote"]
    whole = [one for one in votes if all(caption.finished for caption in one.captions)]
    return [_arena_row(one) for one in whole], +Counter({CUT: len(votes) - len(whole)})


def _misfit(record: Caption | Comparison, *, finished: Iterable[bool], root: Path) -> str:
    """Return why a row of text and whole videos cannot hold a record; "" if it can."""
    if record.start_seconds or record.end_seconds is not None:
        return PART
    if (record.modality or "both") != "both" and _find_streams(root / record.video) != record.modality:
        return PART  # a silent video has one modality only, and is whole
    return "" if all(finished) else CUT


@lru_cache(maxsize=1024)  # captions of a clip follow each other
def _find_streams(path: Path) -> Modality | None:
    """Return what a file has by its header; None if it cannot be opened."""
    try:
        shape = declared_shape(path)
    except ClipError:
        return None
    return "audio" if not shape.width else "both" if shape.has_audio else "visual"


def _trl_row(comparison: Comparison, *, root: Path, with_margin: bool) -> dict[str, Any]:
    turns = [turn for pair in comparison.history for turn in zip(("user", "assistant"), pair, strict=True)]
    row = {
        "prompt": _messages(*turns, ("user", comparison.prompt)),
        "chosen": _messages(("assistant", comparison.chosen)),
        "rejected": _messages(("assistant", comparison.rejected)),
        "videos": [str((root / comparison.video).resolve())],
    }
    if not with_margin:
        return row
    if comparison.margin is None:
        raise ValueError(
            f"a comparison about {comparison.video} has no margin, since its source says only which answer is better"
        )
    return row | {"margin": comparison.margin}


def _arena_row(vote: Feedback) -> dict[str, Any]:
    first, second = (caption.name for caption in vote.captions)
    winners = {"first": "model_a", "second": "model_b", "both bad": "tie (bothbad)"}
    return {
        "model_a": first,
        "model_b": second,
        "winner": winners.get(vote.choice or "", "tie"),
        "judge": vote.rater,
        "turn": 1,
        "anony": True,  # models were revealed after the vote
        "language": "unknown",
        "tstamp": datetime.fromisoformat(vote.date).timestamp(),
    }


def _messages(*messages: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in messages]


def _helpsteer_row(caption: Caption, objectives: Iterable[float | None], *, root: Path) -> dict[str, Any]:
    """Return a row whose objectives are HelpSteer's grades 0 to 4, of equal width (ArmoRM: value = grade / 5 + 0.1)."""
    grades = {
        HELPSTEER_NAMES.get(name, name): None if value is None else min(int(5 * value + 1e-9), 4)  # 1 - 4 / 5 is 1 / 5
        for name, value in zip(OBJECTIVES, objectives, strict=True)
    }
    return {
        "prompt": caption.prompt,
        "response": caption.text,
        "videos": [str((root / caption.video).resolve())],
    } | grades
