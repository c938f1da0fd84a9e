"""Preferences and objectives as rows for other libraries: `salmonn export SOURCE --rows trl|helpsteer`.

    trl        {"prompt": [message], "chosen": [message], "rejected": [message], "videos": [path]} for each comparison,
               a conversational preference dataset with explicit prompts as TRL documents it
    helpsteer  {"prompt": text, "response": text, "videos": [path], "correctness": 0 to 4, ...} for each judged caption,
               as in HelpSteer, whose correctness and verbosity are our `correct` and `length`

TRL has `images` and no videos yet; `videos` is named by analogy.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from salmonn.preference.comparisons import CAPTIONS_NAME, SCORES_NAME, read_preferences
from salmonn.preference.objectives import OBJECTIVES, judged_objectives
from salmonn.records import Caption, Comparison, Reference, read_records, write_text
from salmonn.score.formats import read_scores

RowKind = Literal["trl", "helpsteer"]
HELPSTEER_NAMES = {"correct": "correctness", "length": "verbosity"}
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
        out: JSONL file.
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
    rows = list[dict[str, Any]]()
    left_out = Counter[str]()
    if references:
        if not (source / SCORES_NAME).is_file():
            raise ValueError(f"{source} holds no judged captions: expected {CAPTIONS_NAME} and {SCORES_NAME} in it")
        by_video = {one.video: one for one in read_records(references, Reference)}
        captions = read_records(source / CAPTIONS_NAME, Caption)
        judged = judged_objectives(captions, read_scores(source / SCORES_NAME).scores, by_video)
        for caption, objectives in judged:
            if reason := _misfit(caption, finished=[caption.finished]):
                left_out[reason] += 1
            else:
                rows.append(_helpsteer_row(caption, objectives, root=root or source))
    else:
        preferences = read_preferences(source, root=root, min_gap=min_gap)
        left_out.update(preferences.left_out)
        for one in preferences.comparisons:
            reason = _misfit(one, finished=[one.chosen_finished, one.rejected_finished])
            if reason or one.audio:
                left_out[reason or PART] += 1
            else:
                rows.append(_trl_row(one, root=preferences.root, with_margin=with_margin))
    write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return len(rows), dict(left_out)


def _misfit(record: Caption | Comparison, *, finished: Iterable[bool]) -> str:
    """Return why a row of text and whole videos cannot hold a record; "" if it can."""
    if record.start_seconds or record.end_seconds is not None or (record.modality or "both") != "both":
        return PART
    return "" if all(finished) else CUT


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


def _messages(*messages: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in messages]


def _helpsteer_row(caption: Caption, objectives: Iterable[float | None], *, root: Path) -> dict[str, Any]:
    """Return a row whose objectives are HelpSteer's grades 0 to 4, of equal width (ArmoRM: value = grade / 5 + 0.1)."""
    grades = {
        HELPSTEER_NAMES.get(name, name): None if value is None else min(int(5 * value), 4)
        for name, value in zip(OBJECTIVES, objectives, strict=True)
    }
    return {
        "prompt": caption.prompt,
        "response": caption.text,
        "videos": [str((root / caption.video).resolve())],
    } | grades
