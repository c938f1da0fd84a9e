"""Simulated raters of captions of synthetic clips: groups that want different things, with noise; needs no torch.

    traits = caption_traits(score, reference)
    rater = SimulatedRater("short-1", {"short": 1.0}, NOISE["usual"])
    rater.preference(traits, other_traits)          # probability that the first caption is preferred

The groups are inventions that make a test possible, whose answer is known. They say nothing about people.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from salmonn.records import Reference, Score

NoiseName = Literal["clean", "usual", "tired"]
WORDS = 60  # length of 1
MIXTURE_CONCENTRATION = 0.3  # of the Dirichlet distribution; below 1, a rater is mostly of one group


@dataclass(frozen=True)
class CaptionTraits:
    """What raters look at.

    Args:
        seen, heard: shares of the visual events, and of the events in the audio, that the caption mentions correctly;
            0 for a clip without such events.
        errors: (incorrect + hallucinated) / number of events.
        repetition: share of the words that are in repeated clauses.
        length: words / 60.
    """

    seen: float
    heard: float
    errors: float
    repetition: float
    length: float


# Group -> weight of each trait.
GROUPS: Mapping[str, CaptionTraits] = {
    "complete": CaptionTraits(seen=2, heard=2, errors=-1, repetition=-1, length=0),  # wants everything
    "short": CaptionTraits(seen=0.7, heard=0.7, errors=-0.5, repetition=0, length=-4),  # wants it brief
    "sound": CaptionTraits(seen=0.3, heard=4, errors=-0.5, repetition=0, length=0),  # listens
    "careful": CaptionTraits(seen=0.4, heard=0.4, errors=-4, repetition=0, length=0),  # forgives gaps, not errors
    "picture": CaptionTraits(seen=4, heard=0.3, errors=-0.5, repetition=0, length=0),  # looks
}


@dataclass(frozen=True)
class Noise:
    """Errors of a rater: P(a over b) = lapses / 2 + (1 - lapses) * sigmoid((u(a) - u(b)) / temperature)."""

    temperature: float
    lapses: float


NOISE: Mapping[NoiseName, Noise] = {
    "clean": Noise(temperature=0.1, lapses=0.0),
    "usual": Noise(temperature=0.3, lapses=0.05),
    "tired": Noise(temperature=0.6, lapses=0.15),
}


@dataclass(frozen=True)
class SimulatedRater:
    """A rater that belongs to one group, or to several in part.

    Args:
        name: id of the rater.
        shares: group -> share; they sum to 1.
        noise: errors.
    """

    name: str
    shares: Mapping[str, float]
    noise: Noise

    def utility(self, traits: CaptionTraits) -> float:
        """Return how much the rater likes a caption."""
        return sum(share * group_utility(group, traits) for group, share in self.shares.items())

    def preference(self, first: CaptionTraits, second: CaptionTraits) -> float:
        """Return the probability that the rater prefers the first caption."""
        difference = (self.utility(first) - self.utility(second)) / self.noise.temperature
        preferred = 0.5 * (1 + math.tanh(difference / 2))  # the sigmoid, without overflow
        return self.noise.lapses / 2 + (1 - self.noise.lapses) * preferred


@dataclass(frozen=True)
class SimulatedVote:
    """A vote between two captions of a clip, by their indices."""

    clip: int
    first: int
    second: int
    prefers_first: bool


def caption_traits(score: Score, reference: Reference) -> CaptionTraits:
    """Return the traits of a caption from its score against a reference."""
    correct = [mention.event.is_audible for mention in score.mentions if mention.is_correct]
    num_audible = sum(event.is_audible for event in reference.events)
    num_visual = len(reference.events) - num_audible
    return CaptionTraits(
        seen=correct.count(False) / max(num_visual, 1),
        heard=correct.count(True) / max(num_audible, 1),
        errors=(score.incorrect + score.hallucinated) / max(score.num_events, 1),
        repetition=score.repetition,
        length=score.num_words / WORDS,
    )


def group_utility(group: str, traits: CaptionTraits) -> float:
    """Return how much a group likes a caption."""
    return sum(weight * getattr(traits, name) for name, weight in vars(GROUPS[group]).items())


def make_raters(
    number: int, *, groups: Sequence[str], noise: NoiseName = "usual", mixed: bool = False, seed: int = 0
) -> list[SimulatedRater]:
    """Make raters of the groups in turn, or mixtures of all groups drawn from a Dirichlet distribution.

    Raises:
        ValueError: there are no groups, or there is no such group.
    """
    if not groups or (unknown := [group for group in groups if group not in GROUPS]):
        raise ValueError(f"unknown group {unknown[0] if groups else ''!r}: choose from {', '.join(GROUPS)}")
    raters = []
    for index in range(number):
        if mixed:
            rng = random.Random(f"mixture {seed} {index}")
            shares = [rng.gammavariate(MIXTURE_CONCENTRATION, 1.0) for _ in groups]
            total = math.fsum(shares)
            raters.append(
                SimulatedRater(
                    f"mixture-{index}",
                    {group: share / total for group, share in zip(groups, shares, strict=True)},
                    NOISE[noise],
                )
            )
        else:
            group = groups[index % len(groups)]
            raters.append(SimulatedRater(f"{group}-{index}", {group: 1.0}, NOISE[noise]))
    return raters


def draw_votes(
    rater: SimulatedRater, clips: Sequence[Mapping[str, CaptionTraits]], *, number: int, seed: int = 0
) -> list[SimulatedVote]:
    """Draw votes of a rater between two captions of a clip, each time a random one.

    Args:
        rater: the rater; the votes depend on its name and the seed, not on other raters.
        clips: text -> traits of the distinct captions of each clip; clips with fewer than two are left out.
        number: number of votes.
        seed: random seed.

    Raises:
        ValueError: no clip has two different captions.
    """
    usable = [index for index, captions in enumerate(clips) if len(captions) > 1]
    if not usable:
        raise ValueError("no clip has two different captions: sample several at a temperature above 0")
    rng = random.Random(f"votes {seed} {rater.name}")
    votes = []
    for _ in range(number):
        clip = rng.choice(usable)
        traits = list(clips[clip].values())
        first, second = rng.sample(range(len(traits)), 2)
        prefers_first = rng.random() < rater.preference(traits[first], traits[second])
        votes.append(SimulatedVote(clip, first, second, prefers_first))
    return votes
