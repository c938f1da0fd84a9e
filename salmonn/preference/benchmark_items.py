"""Items of the reward benchmark: prompts with correct and wrong answers, from our files and from published ones.

`read_items` reads JSON lines, or a JSON list, in the formats of `rows.py`, with or without a clip.
`docs/reward_benchmark.md` describes them, and the synthetic pairs that ship with the repository.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

from salmonn.files import parse_record
from salmonn.preference.rows import EXPECTED, parse_row, read_rows
from salmonn.records import Event, Modality
from salmonn.synthetic.render import sample_clip
from salmonn.synthetic.scene import SynthConfig

TIES = "Ties"  # subset of RewardBench 2 with several correct answers, and its own score
# Scenario -> its subsets: ours (after RAG-RewardBench, arXiv 2412.13746, table 1), and the sections of RewardBench.
SCENARIOS = {
    "helpful": ("left_out", "colour", "object", "invented"),
    "multi-hop": ("order", "together", "count"),
    "attribution": ("who", "when", "source"),
    "abstain": ("silent", "dark", "false_premise", "true_premise"),
    "conflict": ("hint_wrong", "hint_right"),
    "harmless": ("repetition", "padding", "cut"),
    "Chat": ("alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med"),
    "Chat Hard": (
        "mt-bench-hard",
        "llmbar-natural",
        "llmbar-adver-neighbor",
        "llmbar-adver-GPTInst",
        "llmbar-adver-GPTOut",
        "llmbar-adver-manual",
    ),
    "Safety": (
        "refusals-dangerous",
        "refusals-offensive",
        "xstest-should-refuse",
        "xstest-should-respond",
        "donotanswer",
    ),
    "Reasoning": ("math-prm", "hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust"),
}
# RAG-RewardBench has a file per subset, and averages over these two groups.
RAG_SCENARIOS = {
    "helpful": "Helpful",
    "reason": "Helpful",
    "citation": "Helpful",
    "harmless": "Harmless",
    "abstain": "Harmless",
    "conflict": "Harmless",
}
_SCENARIO_OF = {subset: scenario for scenario, subsets in SCENARIOS.items() for subset in subsets}


@dataclass(frozen=True)
class SyntheticClip:
    """The clip `sample_clip(SynthConfig(seed=seed), index=index)`."""

    seed: int
    index: int


@dataclass(frozen=True)
class BenchmarkItem:
    """A prompt with correct and wrong answers.

    Args:
        id: name of the item, unique in its file.
        subset: subset that it belongs to.
        prompt: the prompt; earlier turns of a conversation are part of it.
        chosen: correct answers.
        rejected: wrong answers.
        scenario: scenario of the subset; the subset itself where there are no scenarios.
        clip: file of the clip, or a synthetic one; None for text alone.
        use: what of the clip a model is given.
        events: events of what it is given, for a judge; empty where unknown.
    """

    id: str
    subset: str
    prompt: str
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    scenario: str = ""
    clip: Path | SyntheticClip | None = None
    use: Modality = "both"
    events: tuple[Event, ...] = ()

    @property
    def answers(self) -> tuple[str, ...]:
        """Return all answers, the correct ones first."""
        return self.chosen + self.rejected


def clip_name(item: BenchmarkItem) -> str:
    """Return the name of an item's clip in captions and references; the item's id if it has none."""
    if isinstance(item.clip, SyntheticClip):
        return f"seed {item.clip.seed} clip {item.clip.index}"
    return str(item.clip or item.id)


def read_items(paths: Sequence[Path]) -> list[BenchmarkItem]:
    """Read the items of all files.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file is not JSON or empty, or an item lacks a column; the message names file and line.
    """
    items = []
    for path in paths:
        found = []
        for number, value in read_rows(path):
            try:
                found.append(parse_item(value, path=path, number=number))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
        if not found:
            raise ValueError(f"{path} has no items: expected lines such as {EXPECTED}")
        items += found
    return items


def parse_item(value: Any, *, path: Path, number: int) -> BenchmarkItem:
    """Parse one row; unknown columns are ignored, because published files have many.

    Args:
        value: parsed JSON.
        path: file of the row: its name is the subset of rows without one, and clips are relative to its folder.
        number: number of the row, its name if it has no id.

    Raises:
        ValueError: a column is missing or of the wrong type.
    """
    row = parse_row(value)
    if not all(answer.strip() for answer in row.chosen + row.rejected):
        raise ValueError("an answer is empty")
    is_rag = "reject" in value
    subset = "" if is_rag else value.get("subset") or ""
    if not isinstance(subset, str):
        raise ValueError(f"subset must be a text, got {subset!r:.80}")
    subset = subset or path.stem
    scenario = RAG_SCENARIOS.get(subset, subset) if is_rag else _SCENARIO_OF.get(subset, subset)
    use = value.get("use", "both")
    if use not in get_args(Modality):
        raise ValueError(f"use must be one of {', '.join(get_args(Modality))}, got {use!r}")
    clip = path.parent / row.video if row.video else _parse_synthetic_clip(value)
    return BenchmarkItem(
        id=str(value.get("id", number)),
        subset=subset,
        prompt=row.prompt,
        chosen=row.chosen,
        rejected=row.rejected,
        scenario=scenario,
        clip=clip,
        use=use,
        events=_parse_events(value, clip, use=use),
    )


def _parse_synthetic_clip(value: Mapping[str, Any]) -> SyntheticClip | None:
    metadata = value.get("additional_metadata")
    where = value if "seed" in value else metadata if isinstance(metadata, dict) else {}
    seed, index = where.get("seed"), where.get("index")
    if seed is None and index is None:
        return None
    if type(seed) is not int or type(index) is not int or min(seed, index) < 0:
        raise ValueError(f"seed and index must be whole numbers of at least 0, got {seed!r} and {index!r}")
    return SyntheticClip(seed, index)


def _parse_events(value: Mapping[str, Any], clip: Path | SyntheticClip | None, *, use: Modality) -> tuple[Event, ...]:
    """Return the events of a row, or else of its synthetic clip, as far as they can be perceived."""
    given = value.get("events")
    if given is None and isinstance(clip, SyntheticClip):
        events = _synthetic_events(clip)
    else:
        events = tuple(parse_record(event, Event) for event in given or ())
    return tuple(event for event in events if use in ("both", event.modality))


@lru_cache(maxsize=4096)  # subsets share clips
def _synthetic_events(clip: SyntheticClip) -> tuple[Event, ...]:
    _, reference = sample_clip(SynthConfig(seed=clip.seed), index=clip.index)
    return reference.events
