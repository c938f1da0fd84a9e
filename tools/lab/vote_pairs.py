"""Write the pairs of `lab_selection.py`: a simulated voter's choices among a round's captions, and controls.

    python tools/lab/vote_pairs.py --round run/lab/loop/seed_2/all/round_1 \\
        --references run/lab/clips/seed202-230/clips.jsonl --seed 2 --out run/lab/pairs/seed_2

The pool has all pairs of unlike captions of a clip, each decided by one vote; its margin is the judge's difference in
Total. Of these, 128 are chosen in five ways. `random_quarter` is a random quarter of the round's own pairs.
"""

import random
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import get_args

from salmonn.files import atomic_folder, read_records, write_json, write_records
from salmonn.preference.rating import Rating
from salmonn.preference.selection import RatedCaption, to_comparison
from salmonn.preference.subset import PairImportance, SubsetConfig, rank_pairs
from salmonn.records import Caption, Comparison, Reference, Score
from salmonn.score.formats import read_scores
from salmonn.synthetic.raters import Rater, VoterKind, caption_traits, main_sound_form, make_voter
from salmonn.train.rounds import PAIRS_NAME

FACTS_NAME = "facts.json"
Vote = tuple[RatedCaption, RatedCaption]  # chosen, rejected


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a file of pairs for each choice, and facts.json about them."""
    parser = ArgumentParser(description="Write pairs that a simulated voter decided, chosen in several ways.")
    parser.add_argument("--round", type=Path, required=True, help="folder of a round, with captions, scores and pairs")
    parser.add_argument("--references", type=Path, required=True, help="references of its clips")
    parser.add_argument("--voter", choices=get_args(VoterKind), default="noisy", help="kind of voter")
    parser.add_argument("--keep", type=int, default=128, help="number of pairs of each choice")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    options = parser.parse_args(arguments)
    references = {one.video: one for one in read_records(options.references, Reference)}
    captions = read_records(options.round / "captions.jsonl", Caption)
    votes = cast_votes(
        captions,
        read_scores(options.round / "scores.jsonl").scores,
        references,
        voter=make_voter(options.voter),
        seed=options.seed,
    )
    pairs = [to_pair(*vote, references[vote[0].caption.video], source=options.voter) for vote in votes]
    chosen = choose(pairs, [chosen.quality or 0.0 for chosen, _ in votes], keep=options.keep, seed=options.seed)
    gaps = {id(pair): error(rejected) - error(chosen) for pair, (chosen, rejected) in zip(pairs, votes, strict=True)}
    facts: dict[str, object] = {
        name: describe(kept, [gaps[id(pair)] for pair in kept]) for name, kept in {"pool": pairs, **chosen}.items()
    }
    own = read_records(options.round / PAIRS_NAME, Comparison)
    rng = random.Random(f"quarter {options.seed}")
    chosen["random_quarter"] = rng.sample(own, SubsetConfig(keep=0.25).num_pairs(len(own)))
    with atomic_folder(options.out) as folder:
        for name, kept in chosen.items():
            write_records(folder / f"{name}.jsonl", kept)
        write_json(folder / FACTS_NAME, facts | {"sound_forms": count_forms(captions)})


def cast_votes(
    captions: Sequence[Caption],
    scores: Sequence[Score],
    references: Mapping[str, Reference],
    *,
    voter: Rater,
    seed: int,
) -> list[Vote]:
    """Return the voter's choice between each two finished captions of a clip that differ in words."""
    score_of = {(one.video, one.sample): one for one in scores}
    by_video: dict[str, dict[str, RatedCaption]] = {}
    for caption in captions:
        score = score_of.get((caption.video, caption.sample))
        if score and caption.finished and caption.text.strip():
            rated = RatedCaption(caption, Rating(caption.video, {"total": score.total}, {"total": -1.0}, score=score))
            by_video.setdefault(caption.video, {}).setdefault(" ".join(caption.text.split()), rated)
    votes = []
    for video, group in by_video.items():
        rng, reference = random.Random(f"votes {seed} {video}"), references[video]
        for one, other in combinations(group.values(), 2):
            first, second = rng.sample((one, other), 2)
            traits = [
                caption_traits(each.caption, each.rating.score, reference)
                for each in (first, second)
                if each.rating.score
            ]
            votes.append((first, second) if rng.random() < voter.prefers(*traits) else (second, first))
    return votes


def error(one: RatedCaption) -> float:
    """Return the judge's Total of a caption."""
    return -one.rating.value


def to_pair(chosen: RatedCaption, rejected: RatedCaption, reference: Reference, *, source: str) -> Comparison:
    """Return a vote as a comparison, with the size of the judge's difference as its margin."""
    comparison = to_comparison(chosen, rejected, reference=reference, source=source)
    return replace(comparison, margin=abs(comparison.margin or 0.0))


def choose(
    pairs: Sequence[Comparison], qualities: Sequence[float], *, keep: int, seed: int
) -> dict[str, list[Comparison]]:
    """Return name -> pairs chosen from the pool; ties in the margin go to the earlier pair.

    votes_random: at random. votes_margin: by the margin alone. votes_one_a_clip: by the margin, one of each clip.
    votes_diverse: margin and diversity. votes_full: margin, quality and diversity, as `--subset.keep`.
    """
    by_margin = sorted(pairs, key=lambda pair: -(pair.margin or 0.0))
    best: dict[str, Comparison] = {}
    for pair in by_margin:
        best.setdefault(pair.video, pair)
    diverse = rank_pairs(pairs, SubsetConfig(keep=keep, quality_weight=0.0))
    full = rank_pairs(pairs, SubsetConfig(keep=keep), qualities=qualities)

    def ranked(importances: Sequence[PairImportance]) -> list[Comparison]:
        return [pair for pair, importance in zip(pairs, importances, strict=True) if importance.rank]

    return {
        "votes_random": random.Random(f"pairs {seed}").sample(list(pairs), keep),
        "votes_margin": by_margin[:keep],
        "votes_one_a_clip": list(best.values())[:keep],
        "votes_diverse": ranked(diverse),
        "votes_full": ranked(full),
    }


def describe(pairs: Sequence[Comparison], gaps: Sequence[float]) -> dict[str, float]:
    """Return number of pairs and clips, share of the votes for the lower of two unlike Totals, and words.

    `gaps` says how much lower the Total of the chosen caption is.
    """
    return {
        "pairs": len(pairs),
        "clips": len({pair.video for pair in pairs}),
        "right": fmean(gap > 0 for gap in gaps if gap),
        "words_chosen": fmean(len(pair.chosen.split()) for pair in pairs),
        "words_rejected": fmean(len(pair.rejected.split()) for pair in pairs),
    }


def count_forms(captions: Sequence[Caption]) -> dict[str, float]:
    """Return phrase for sounds -> share of the captions with sounds; "" for other phrases."""
    forms = [form for caption in captions if (form := main_sound_form(caption.text)) is not None]
    return {form: forms.count(form) / len(forms) for form in sorted(set(forms))}


if __name__ == "__main__":
    main()
