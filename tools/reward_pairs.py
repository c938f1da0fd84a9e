"""Generate the data of `salmonn reward-benchmark`: pairs of captions, and one correct caption among four.

    python tools/reward_pairs.py [--out data] [--seed 4] [--pairs 100]

writes `reward_pairs.jsonl`, with columns as in RewardBench, and `reward_best_of_4.jsonl`, with columns as in
RewardBench 2. Every row is about a synthetic clip, `sample_clip(SynthConfig(seed=seed), index=index)`; no file is read,
and the same seed writes the same bytes. A subset has one row per clip; subsets share clips, so that a model encodes few
of them. `docs/reward_benchmark.md` lists the faults of the rejected captions.

The two captions of a pair have nearly the same number of words: of several wordings of each, the closest are chosen.
"""

import json
import random
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import count, product
from pathlib import Path
from typing import Any

from reward_clauses import CaptionClause, write_caption
from reward_faults import CAPTION_FAULTS, CAPTION_PROMPT, FAULTS, Draft, Outline, removable

from salmonn.files import write_text
from salmonn.records import Event
from salmonn.synthetic.render import sample_clip
from salmonn.synthetic.scene import SynthConfig

NUM_OMITTED = (0, 1, 1, 2)  # by both captions
MIN_CLAUSES = 4  # of a caption of picture and sound
MAX_SCENE_EVENTS = 8  # per clip, to keep captions short
NUM_WORDINGS = 24  # per caption; the pair closest in length is chosen

Row = dict[str, Any]


def main() -> None:
    """Write both files."""
    parser = ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder of both files")
    parser.add_argument("--seed", type=int, default=4, help="random seed of clips and pairs")
    parser.add_argument("--pairs", type=int, default=100, help="number of rows of each subset")
    values = parser.parse_args()
    pairs = [row for subset in FAULTS for row in generate_pairs(subset, seed=values.seed, number=values.pairs)]
    write_rows(values.out / "reward_pairs.jsonl", pairs)
    write_rows(values.out / "reward_best_of_4.jsonl", generate_best_of_4(seed=values.seed, number=values.pairs))


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as compact JSON lines."""
    write_text(path, "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows))


def generate_pairs(subset: str, *, seed: int, number: int) -> list[Row]:
    """Generate the pairs of a subset from the first clips that suit it; at most one pair per clip."""
    rows: list[Row] = []
    seen: Counter[tuple[str, str]] = Counter()
    for index, outline, rng in _outlines(subset, seed=seed):
        draft = FAULTS[subset](outline, rng)
        if draft is None or (draft.prompt == CAPTION_PROMPT and not _is_long(draft)):
            continue
        if draft.balance:
            group, right, wrong = draft.balance
            if seen[group, right] > seen[group, wrong]:
                continue
            seen[group, right] += 1
        chosen, rejected = write_pair(draft, rng)
        row: Row = {"id": f"{subset}-{len(rows)}", "subset": subset, "prompt": draft.prompt}
        row |= {"chosen": chosen, "rejected": rejected, "chosen_model": "", "rejected_model": ""}
        row |= {"seed": seed, "index": index}
        if draft.use != "both":
            row["use"] = draft.use
        if draft.events:
            row["events"] = [_to_json(event) for event in draft.events]
        rows.append(row)
        if len(rows) == number:
            break
    return rows


def generate_best_of_4(*, seed: int, number: int) -> list[Row]:
    """Generate rows of one correct caption and three wrong ones, each with another fault."""
    rows: list[Row] = []
    for index, outline, rng in _outlines("best_of_4", seed=seed):
        faults = {name: FAULTS[name](outline, rng) for name in rng.sample(CAPTION_FAULTS, len(CAPTION_FAULTS))}
        drafts = {name: draft for name, draft in faults.items() if draft and _is_long(draft)}
        if len(drafts) < 3:
            continue
        chosen = write_caption(outline.clauses, rng)
        names = list(drafts)[:3]
        rejected = [_closest(_write(drafts[name].worse, rng), [chosen])[0] for name in names]
        row: Row = {"id": str(len(rows)), "subset": "best_of_4", "prompt": CAPTION_PROMPT}
        row |= {"chosen": [chosen], "rejected": rejected, "num_correct": 1, "num_incorrect": 3, "total_completions": 4}
        row |= {"models": [""] * 4, "additional_metadata": {"seed": seed, "index": index, "faults": names}}
        rows.append(row)
        if len(rows) == number:
            break
    return rows


def write_pair(draft: Draft, rng: random.Random) -> tuple[str, str]:
    """Return wordings of the better and the worse caption whose numbers of words differ least."""
    worse = _write(draft.worse, rng)
    if draft.is_cut:
        worse = [text.removesuffix(".") for text in worse]
    return _closest(_write(draft.better, rng), worse)


def _write(clauses: Sequence[CaptionClause], rng: random.Random) -> list[str]:
    return [write_caption(clauses, rng) for _ in range(NUM_WORDINGS)]


def _closest(first: Sequence[str], second: Sequence[str]) -> tuple[str, str]:
    """Return the two texts, one of each list, whose numbers of words are closest; the first such two."""
    return min(product(first, second), key=lambda texts: abs(len(texts[0].split()) - len(texts[1].split())))


def _outlines(subset: str, *, seed: int) -> Iterator[tuple[int, Outline, random.Random]]:
    """Yield short enough clips with the events that captions mention, and the random generator of the row."""
    for index in count():
        rng = random.Random(f"{subset} {seed} {index}")
        scene, reference = sample_clip(SynthConfig(seed=seed), index=index)
        if len(scene.events) > MAX_SCENE_EVENTS:
            continue
        mentioned = list(scene.events)
        for _ in range(rng.choice(NUM_OMITTED)):
            mentioned.pop(rng.choice(removable(mentioned)))
        yield index, Outline(scene, tuple(mentioned), reference.events), rng


def _is_long(draft: Draft) -> bool:
    """Return whether a caption of picture and sound has enough clauses; one of a part of the clip has fewer."""
    return draft.use != "both" or len(draft.better) >= MIN_CLAUSES


def _to_json(event: Event) -> Row:
    value = asdict(event)
    if event.modality == "visual":
        del value["modality"]  # the default
    return value


if __name__ == "__main__":
    main()
