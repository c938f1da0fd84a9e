"""Write votes of simulated raters on captions of synthetic clips, as the web UI writes those of people.

    python tools/raters.py run/round_1/captions.jsonl --references run/clips/seed11-400/clips.jsonl --out run/votes

Raters belong to groups that want different things, or are voters with a known flaw (--kind, as `make_voter` in
salmonn/synthetic/raters.py); a rater's name says which. Captions of the same clip are judged by the rule judge, and
each vote is between two of them that differ in words. Needs several captions of each clip: the file of a round, or that
of `salmonn caption --temperature 0.8` with several seeds. Also says for how many triples of captions of a clip the
majority of the raters has cyclic preferences.
"""

import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import get_args

from salmonn.files import atomic_folder, read_records, write_records
from salmonn.preference.feedback import FEEDBACK_NAME, Candidate, Feedback, keep_video
from salmonn.preference.voter_reward import win_probability
from salmonn.records import Caption, Reference
from salmonn.score.judge import ScoringTask
from salmonn.synthetic.judge import RuleJudge
from salmonn.synthetic.raters import (
    GROUPS,
    CaptionTraits,
    Crowd,
    NoiseName,
    Rater,
    VoterKind,
    caption_traits,
    draw_votes,
    make_raters,
    make_voter,
)  # fmt: skip

DATE = "2026-01-01T00:00:00+00:00"  # of all votes, so that the same flags write the same bytes


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a folder of votes."""
    options = _parse(arguments)
    try:
        num_votes, num_cyclic, num_triples = write_votes(options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.stderr.write(
        f"{num_votes} votes of {options.raters} raters written to {options.out}; their majority is cyclic for "
        f"{num_cyclic} of {num_triples} triples of captions ({num_cyclic / max(num_triples, 1):.2%})\n"
    )


def write_votes(options: Namespace) -> tuple[int, int, int]:
    """Draw the votes, write them with their videos, and return their number and that of cyclic and of all triples.

    Raises:
        ValueError: a caption has no reference, or the folder holds something.
    """
    references = {one.video: one for one in read_records(options.references, Reference)}
    by_video: dict[str, dict[str, Caption]] = {}  # video -> words -> caption
    for caption in read_records(options.captions, Caption):
        if caption.video not in references:
            raise ValueError(f"{caption.video} has no reference in {options.references}")
        by_video.setdefault(caption.video, {}).setdefault(" ".join(caption.text.split()), caption)
    clips = [_judge(captions, references[video]) for video, captions in by_video.items()]
    captions = [list(group.values()) for group in by_video.values()]
    raters: list[Rater] = []
    if options.kind:
        raters += [make_voter(options.kind[one % len(options.kind)], seed=one) for one in range(options.raters)]
    else:
        raters += make_raters(
            options.raters, groups=options.groups, noise=options.noise, mixed=options.mixed, seed=options.seed
        )
    votes: list[Feedback] = []
    with atomic_folder(options.out) as folder:
        (folder / "videos").mkdir()
        kept: dict[str, str] = {}
        for rater in raters:
            for drawn in draw_votes(rater, clips, number=options.votes, seed=options.seed):
                first, second = captions[drawn.clip][drawn.first], captions[drawn.clip][drawn.second]
                if first.video not in kept:
                    kept[first.video] = keep_video(options.references.parent / first.video, folder / "videos")
                votes.append(
                    Feedback(
                        date=DATE,
                        action="vote",
                        video=Path(first.video).name,
                        first=_candidate(first),
                        second=_candidate(second),
                        choice="first" if drawn.prefers_first else "second",
                        kept_video=kept[first.video],
                        rater=rater.name,
                    )
                )
        write_records(folder / FEEDBACK_NAME, votes)
    return len(votes), *count_cycles(Crowd("all", raters), clips)


def count_cycles(voter: Rater, clips: Sequence[Mapping[str, CaptionTraits]]) -> tuple[int, int]:
    """Count the triples A, B, C of captions of a clip, and those in which a voter prefers A to B, B to C and C to A.

    Args:
        voter: a rater, or a crowd for the majority of its members' preferences.
        clips: text -> traits of the distinct captions of each clip.

    Returns:
        Number of cyclic triples, and of all triples.
    """
    num_cyclic = num_triples = 0
    for captions in clips:
        numbered = list(enumerate(captions.values()))
        margins = {
            (i, j): round(win_probability(voter, one, other) - 0.5, 9)  # 0 for a tie, without rounding errors
            for (i, one), (j, other) in combinations(numbered, 2)
        }
        for i, j, k in combinations(range(len(numbered)), 3):
            circle = margins[i, j], margins[j, k], -margins[i, k]
            num_cyclic += min(circle) > 0 or max(circle) < 0
            num_triples += 1
    return num_cyclic, num_triples


def _judge(captions: dict[str, Caption], reference: Reference) -> dict[str, CaptionTraits]:
    judge = RuleJudge()
    return {
        words: caption_traits(caption, judge.judge_one(ScoringTask(reference, caption)), reference)
        for words, caption in captions.items()
    }


def _candidate(caption: Caption) -> Candidate:
    return Candidate(caption.model, caption.text, caption.prompt, caption.finished, seed=caption.sample)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def _parse(arguments: Sequence[str] | None) -> Namespace:
    parser = ArgumentParser(description="Write votes of simulated raters, as the web UI writes those of people.")
    parser.add_argument("captions", type=Path, help="JSONL of captions, several of each clip")
    parser.add_argument("--references", type=Path, required=True, help="JSONL of the synthetic clips, next to videos/")
    parser.add_argument("--out", type=Path, required=True, help="new folder for feedback.jsonl and videos/")
    parser.add_argument("--raters", type=_positive, default=40, help="number of raters")
    parser.add_argument("--votes", type=_positive, default=50, help="number of votes of each")
    parser.add_argument(
        "--groups", nargs="+", choices=GROUPS, default=["complete", "short", "sound", "careful"], help="in turn"
    )
    parser.add_argument(
        "--kind", nargs="+", choices=get_args(VoterKind), help="voters of these kinds in turn, instead of groups"
    )
    parser.add_argument("--mixed", action="store_true", help="each rater is a random mixture of the groups")
    parser.add_argument("--noise", choices=get_args(NoiseName), default="usual", help="how often raters err")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
