"""Items of the reward benchmark: prompts with correct and wrong answers, from our files and from published ones.

`read_items` reads JSON lines, or a JSON list, whose columns are those of RewardBench (`chosen` and `rejected` are texts
or message lists), RewardBench 2 (both are lists of texts), RAG-RewardBench (`reject`), or these with a `video`.
`docs/reward_benchmark.md` describes them, and the synthetic pairs that ship with the repository.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

from salmonn.records import Event, Modality, parse_record
from salmonn.synthetic.render import sample_clip
from salmonn.synthetic.scene import SynthConfig

TIES = "Ties"  # subset of RewardBench 2 with several correct answers, and a score of its own
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
_EXPECTED = (
    '{"prompt": text, "chosen": text, "rejected": text, "subset": text}, with lists of texts as in RewardBench 2, or '
    '"reject" as in RAG-RewardBench'
)


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
        for number, value in _read_rows(path):
            try:
                found.append(parse_item(value, path=path, number=number))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
        if not found:
            raise ValueError(f"{path} has no items: expected lines such as {_EXPECTED}")
        items += found
    return items


def _read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a file with their numbers, from 1: lines of a JSONL file, or items of a JSON list."""
    if path.suffix == ".parquet":
        raise ValueError(f"{path} is a Parquet file: convert it to JSON lines, for example by pandas' to_json")
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        try:
            yield from enumerate(json.loads(text), start=1)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {error.lineno}: not JSON at column {error.colno}: {error.msg}") from error
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON at column {error.colno}: {error.msg}") from error


def parse_item(value: Any, *, path: Path, number: int) -> BenchmarkItem:
    """Parse one row; unknown columns are ignored, because published files have many.

    Args:
        value: parsed JSON.
        path: file of the row: its name is the subset of rows without one, and clips are relative to its folder.
        number: number of the row, its name if it has no id.

    Raises:
        ValueError: a column is missing or of the wrong type.
    """
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}: {_EXPECTED}")
    is_rag = "reject" in value
    rejected = value.get("reject") if is_rag else value.get("rejected")
    texts = {"prompt": value.get("prompt", value.get("question")), "chosen": value.get("chosen"), "rejected": rejected}
    if missing := [name for name, text in texts.items() if text is None]:
        raise ValueError(f"{' and '.join(missing)} missing: expected {_EXPECTED}")
    chosen, wrong = (_parse_answers(texts[name], name) for name in ("chosen", "rejected"))
    subset = path.stem if is_rag else _optional_text(value, "subset") or path.stem
    scenario = RAG_SCENARIOS.get(subset, subset) if is_rag else _SCENARIO_OF.get(subset, subset)
    use = value.get("use", "both")
    if use not in get_args(Modality):
        raise ValueError(f"use must be one of {', '.join(get_args(Modality))}, got {use!r}")
    clip = _parse_clip(value, folder=path.parent)
    return BenchmarkItem(
        id=str(value.get("id", number)),
        subset=subset,
        prompt=_parse_conversation(texts["prompt"], "prompt"),
        chosen=chosen,
        rejected=wrong,
        scenario=scenario,
        clip=clip,
        use=use,
        events=_parse_events(value, clip, use=use),
    )


def _parse_answers(value: Any, name: str) -> tuple[str, ...]:
    """Return the answers of a column: one text, a list of texts, or a conversation that ends with one."""
    if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        return tuple(value)
    if isinstance(value, list) and value and isinstance(value[-1], dict):  # as RewardBench's preference sets
        value = value[-1].get("content")
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} must be a text, a list of texts or a list of messages, got {value!r:.80}")
    return (value,)


def _parse_conversation(value: Any, name: str) -> str:
    """Return a prompt: a text, or the messages of a conversation, each with its role unless there is only one."""
    if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
        turns = [(message.get("role"), message.get("content")) for message in value]
        if all(isinstance(role, str) and isinstance(content, str) for role, content in turns):
            return turns[0][1] if len(turns) == 1 else "\n\n".join(f"{role}: {content}" for role, content in turns)
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text or a list of messages, got {value!r:.80}")
    return value


def _optional_text(value: Mapping[str, Any], name: str) -> str:
    text = value.get(name) or ""
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a text, got {text!r:.80}")
    return text


def _parse_clip(value: Mapping[str, Any], *, folder: Path) -> Path | SyntheticClip | None:
    video = _optional_text(value, "video") or _optional_text(value, "video_path")
    if video:
        return folder / video
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
