"""Check the analysis of feedback on simulated people, whose preferences are known; trains nothing and needs no model.

    python tools/lab/feedback.py --seeds 2 3 4 --out run/lab/feedback.json

Captions of four qualities are written from the annotation of synthetic clips. Each simulated folder has the votes of 8
people, 50 each, between two captions of a clip. For each seed and 100 folders: how often do the 95 % intervals of
`salmonn votes` cover the planted effects of side, length, and agreement with the metric; is the order of the ratings
that of Total? Then 200 clips are described without a draft, and with drafts of each quality.
"""

import json
import random
import re
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from salmonn.files import write_json
from salmonn.preference.feedback import Candidate, Choice, Feedback
from salmonn.preference.feedback_report import measure_agreement
from salmonn.preference.ratings import Estimate, fit_ratings
from salmonn.records import Caption, Event, Reference, Score
from salmonn.score.highlight import Quote, locate_quotes
from salmonn.score.judge import ScoringTask
from salmonn.score.persistence import share_kept
from salmonn.score.repetition import remove_clauses
from salmonn.score.text_spans import CharSpan, find_quote
from salmonn.synthetic.annotate import OMISSION_RATES
from salmonn.synthetic.judge import RuleJudge
from salmonn.synthetic.parser import parse_claims
from salmonn.synthetic.raters import (
    VOTERS,
    CaptionTraits,
    Noise,
    Rater,
    SimulatedRater,
    VoterKind,
    caption_traits,
    make_voter,
)
from salmonn.synthetic.render import sample_clip
from salmonn.synthetic.scene import SynthConfig

# Quality -> rates of leaving an event out and of adding a wrong one.
QUALITIES: Mapping[str, tuple[float, float]] = {
    "poor": (0.6, 0.15), "fair": (0.45, 0.1), "good": (0.3, 0.07), "best": (0.15, 0.04),
}  # fmt: skip
NUM_CLIPS, NUM_PEOPLE, NUM_VOTES = 200, 8, 50
NUM_RESAMPLES = 200
NO_DRAFT = "no draft"
WRITE_SECONDS, READ_SECONDS, STRIKE_SECONDS = 6.0, 1.5, 3.0  # for a clause
STRIKE_RATE = 0.7  # of noticing a wrong clause while writing
_SENTENCE = re.compile(r"[^.]+\.?")
_ACCEPTS = SimulatedRater("", {"metric": 1.0}, Noise(0.1))
_ACCEPTED_LOSS = 0.35  # perceived loss of a draft that is accepted as it is half of the time


@dataclass(frozen=True)
class Judged:
    """A caption with its score and traits."""

    caption: Caption
    score: Score
    traits: CaptionTraits

    @property
    def candidate(self) -> Candidate:
        """The caption as one of a vote."""
        return Candidate(self.caption.model, self.caption.text, "", total=self.score.total)


Clips = list[tuple[Reference, dict[str, Judged]]]


def main() -> None:
    """Measure all seeds, print the results and write them."""
    parser = ArgumentParser(description="Check the analysis of feedback on simulated people.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4], help="random seeds")
    parser.add_argument("--out", type=Path, default=Path("run/lab/feedback.json"), help="file for the results")
    parser.add_argument("--folders", type=int, default=100, help="simulated folders of votes for each seed")
    options = parser.parse_args()
    results = {}
    for seed in options.seeds:
        clips = make_captions(seed)
        results[seed] = {
            "totals": {name: fmean(captions[name].score.total for _, captions in clips) for name in QUALITIES},
            "coverage": measure_coverage(clips, seed=seed, num_folders=options.folders),
            "writing": {limit: measure_writing(clips, seed=seed, max_seconds=limit) for limit in (60.0, 25.0)},
        }
        print(f"seed {seed}: {json.dumps(results[seed], indent=1)}", flush=True)  # noqa: T201
    write_json(options.out, results)


def make_captions(seed: int) -> Clips:
    """Write a caption of each quality for each clip."""
    references = [
        sample_clip(SynthConfig(clips=NUM_CLIPS, seed=100 + seed), index=index)[1] for index in range(NUM_CLIPS)
    ]
    clips: Clips = []
    for index, reference in enumerate(references):
        others = references[(index + 1) % NUM_CLIPS].events
        captions = {}
        for name, (omitted, wrong) in QUALITIES.items():
            rng = random.Random(f"caption {seed} {index} {name}")
            texts = [event.text for event in reference.events if rng.random() >= omitted] or [reference.events[0].text]
            texts += [event.text for event in others if rng.random() < wrong]
            text = " ".join(f"{text[:1].upper()}{text[1:]}." for text in texts)
            captions[name] = judge(reference, Caption(reference.video, text, model=name))
        clips.append((reference, captions))
    return clips


def judge(reference: Reference, caption: Caption) -> Judged:
    """Score a caption."""
    score = RuleJudge().judge_one(ScoringTask(reference, caption))
    return Judged(caption, score, caption_traits(caption, score, reference))


def draw_duels(clips: Clips, rng: random.Random, number: int) -> list[tuple[str, Judged, Judged]]:
    """Draw pairs of captions of a clip, of two qualities, in random order."""
    duels = []
    for _ in range(number):
        reference, captions = rng.choice(clips)
        first, second = rng.sample(list(QUALITIES), 2)
        duels.append((reference.video, captions[first], captions[second]))
    return duels


def vote_by(kind: VoterKind, clips: Clips, *, seed: str) -> list[Feedback]:
    """Return the votes of a folder: 8 people of one kind, 50 votes each, without ties."""
    votes = []
    for person in range(NUM_PEOPLE):
        rater: Rater = make_voter(kind, seed=person)
        rng = random.Random(f"votes {seed} {rater.name}")
        for video, first, second in draw_duels(clips, rng, NUM_VOTES):
            is_first = rng.random() < rater.prefers(first.traits, second.traits)
            captions = (first.candidate, second.candidate)
            choice: Choice = "first" if is_first else "second"
            votes.append(Feedback("", "vote", video, *captions, choice, rater=rater.name))
    return votes


def measure_coverage(clips: Clips, *, seed: int, num_folders: int) -> dict[str, float]:
    """Return how many of the simulated folders have each planted effect in its interval, and ratings in order."""
    truth = true_agreement(clips, seed=seed)
    names = ("side of hasty", "side of noisy", "length of long", "agreement of noisy", "order of ratings")
    hits = dict.fromkeys(names, 0)
    sides, pooled = list[float](), list[Feedback]()
    for folder in range(num_folders):
        votes = {kind: vote_by(kind, clips, seed=f"{seed} {folder}") for kind in ("hasty", "noisy", "long")}
        hasty, noisy, long = (fit_ratings(one, resamples=NUM_RESAMPLES) for one in votes.values())
        assert hasty and noisy and long
        sides.append(hasty.side.value)
        pooled += votes["noisy"]
        agreement, _ = measure_agreement(votes["noisy"])
        hits["side of hasty"] += covers(hasty.side, VOTERS["hasty"].side)
        hits["side of noisy"] += covers(noisy.side, 0.0)
        hits["length of long"] += covers(long.length, 10 / 6)
        hits["agreement of noisy"] += agreement.interval.low <= truth <= agreement.interval.high
        hits["order of ratings"] += list(noisy.models) == list(QUALITIES)[::-1]
    ratings = fit_ratings(pooled, resamples=2)
    assert ratings
    in_order = list(ratings.models) == list(QUALITIES)[::-1]
    return hits | {"true agreement": truth, "mean side of hasty": fmean(sides), "order of pooled ratings": in_order}


def covers(estimate: Estimate, value: float) -> bool:
    """Return whether a value is in the interval."""
    return estimate.low <= value <= estimate.high


def true_agreement(clips: Clips, *, seed: int) -> float:
    """Return the probability that the voter `noisy` prefers the caption with the lower Total, where they differ."""
    rater = make_voter("noisy")
    duels = draw_duels(clips, random.Random(f"truth {seed}"), 20_000)
    chances = [
        rater.prefers(first.traits, second.traits) if first.score.total < second.score.total
        else 1 - rater.prefers(first.traits, second.traits)
        for _, first, second in duels if first.score.total != second.score.total
    ]  # fmt: skip
    return fmean(chances)


def measure_writing(clips: Clips, *, seed: int, max_seconds: float) -> dict[str, dict[str, float]]:
    """Return what becomes of each draft: final Total, seconds, share accepted, and share of its claims kept."""
    results = {}
    for name in (NO_DRAFT, *QUALITIES):
        totals, seconds, accepted, kept = [], [], [], []
        for index, (reference, captions) in enumerate(clips):
            rng = random.Random(f"write {seed} {index}")  # the same attention with every draft
            draft = None if name == NO_DRAFT else (captions[name].caption, captions[name].score)
            written = write_caption(reference, draft, rng, max_seconds=max_seconds)
            totals.append(judge(reference, Caption(reference.video, written.text)).score.total)
            seconds.append(written.seconds)
            accepted.append(written.accepted)
            kept.append(share_kept(draft[0].text, written.text) if draft else 0.0)
        results[name] = {
            "final Total": fmean(totals), "seconds": fmean(seconds), "accepted": fmean(accepted), "kept": fmean(kept),
        }  # fmt: skip
    return results


@dataclass(frozen=True)
class WrittenText:
    """What a writer made of a draft, or without one.

    Args:
        text: the text.
        seconds: time that it took.
        accepted: whether the draft was accepted as it is.
    """

    text: str
    seconds: float
    accepted: bool = False


def write_caption(
    reference: Reference,
    draft: tuple[Caption, Score] | None,
    rng: random.Random,
    *,
    max_seconds: float = 60.0,
) -> WrittenText:
    """Describe a clip as a person with limited attention and time would.

    They notice each event with the rates of hasty annotators (`OMISSION_RATES`), and each wrong clause of a draft with
    0.7. A draft that seems good enough is accepted. Else they strike wrong clauses, and add what they have noticed and
    the draft lacks, until the time is over.

    Args:
        reference: the clip.
        draft: draft and its score against the reference; None to write without one.
        rng: random numbers.
        max_seconds: time limit; an action that has been started is completed.
    """
    noticed = [event for event in reference.events if rng.random() >= OMISSION_RATES[parse_claims(event.text)[0].kind]]
    if draft is None:
        return _add_events([], noticed, seconds=0.0, max_seconds=max_seconds)
    caption, score = draft
    quotes = [quote for quote in locate_quotes(caption.text, score) if quote.kind != "repeated"]
    seconds = READ_SECONDS * len(quotes)
    wrong = [quote for quote in quotes if quote.kind != "correct" and rng.random() < STRIKE_RATE]
    told = [quote.event for quote in quotes if quote.event and quote not in wrong]
    lacking = [event for event in noticed if event not in told]
    perceived = (len(lacking) + len(wrong)) / max(len(noticed), 1)
    if rng.random() < _ACCEPTS.prefers(_with_loss(perceived), _with_loss(_ACCEPTED_LOSS)):
        return WrittenText(caption.text, seconds, accepted=True)
    struck: list[CharSpan] = []
    for quote in wrong:
        if quote.span and seconds < max_seconds:
            struck.append(quote.span)
            seconds += STRIKE_SECONDS
    text = remove_clauses(caption.text, struck)
    sentences = [
        (_start_of(sentence, quotes), sentence) for sentence in map(str.strip, _SENTENCE.findall(text)) if sentence
    ]
    return _add_events(sentences, lacking, seconds=seconds, max_seconds=max_seconds)


def _start_of(sentence: str, quotes: Sequence[Quote]) -> float | None:
    """Return when the first event that a sentence mentions starts; None if it mentions none with a time."""
    starts = [
        quote.event.start_seconds
        for quote in quotes
        if quote.event and quote.event.start_seconds is not None and find_quote(quote.text, sentence)
    ]
    return min(starts) if starts else None


def _with_loss(loss: float) -> CaptionTraits:
    return CaptionTraits(seen=0, heard=0, errors=0, repetition=0, length=0, total=loss)


def _add_events(
    sentences: list[tuple[float | None, str]], events: Sequence[Event], *, seconds: float, max_seconds: float
) -> WrittenText:
    """Insert a sentence for each event before the first one about a later event, while there is time."""
    for event in events:
        if seconds >= max_seconds:
            break
        begin = event.start_seconds or 0.0
        later = (place for place, (start, _) in enumerate(sentences) if start is not None and start > begin)
        place = next(later, len(sentences))
        sentences.insert(place, (event.start_seconds, f"{event.text[:1].upper()}{event.text[1:]}."))
        seconds += WRITE_SECONDS
    return WrittenText(" ".join(sentence for _, sentence in sentences), seconds)


if __name__ == "__main__":
    main()
