"""Simulated raters of captions of synthetic clips: their criteria, preferences and errors; needs no torch.

    rater = make_voter("noisy", seed=1)
    rater.prefers(caption_traits(caption, score, reference), other_traits)   # probability of the first caption

Groups have different preferences, with the same noise for all. Voters are single raters with a known flaw, or none. All
are invented for tests whose answer is known, and say nothing about real people.
"""

import math
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from salmonn.records import Caption, Reference, Score
from salmonn.synthetic.parser import parse_claims

NoiseName = Literal["clean", "usual", "tired"]
VoterKind = Literal["metric", "noisy", "hasty", "long", "doubter", "eye", "ear", "crowd", "cycle"]
WORDS = 60  # length of 1
MIXTURE_CONCENTRATION = 0.3  # of the Dirichlet distribution; below 1, a rater is mostly of one group
REPETITION_WEIGHT = 8.0  # as in recipes/configs/mrdpo.yaml


@dataclass(frozen=True)
class CaptionTraits:
    """What raters look at.

    Args:
        seen, heard: shares of the visual events, and of the events in the audio, that the caption mentions correctly;
            0 for a clip without such events.
        errors: (incorrect + hallucinated) / number of events.
        repetition: share of the words that are in repeated clauses.
        length: words / 60.
        total: Total, (missing + incorrect + hallucinated) / number of events.
        sound_form: phrase of `SOUND_FORMS` that introduces most of its sounds; "" for another one, None without
            sounds.
    """

    seen: float
    heard: float
    errors: float
    repetition: float
    length: float
    total: float = 0.0
    sound_form: str | None = None

    @property
    def loss(self) -> float:
        """Total plus weighted repetition, which mrDPO minimizes."""
        return self.total + REPETITION_WEIGHT * self.repetition


# Group, or kind of voter -> weight of each trait.
UTILITIES: Mapping[str, Mapping[str, float]] = {
    "complete": {"seen": 2, "heard": 2, "errors": -1, "repetition": -1},  # wants everything
    "short": {"seen": 0.7, "heard": 0.7, "errors": -0.5, "length": -4},  # wants it brief
    "sound": {"seen": 0.3, "heard": 4, "errors": -0.5},  # listens
    "careful": {"seen": 0.4, "heard": 0.4, "errors": -4},  # forgives gaps, not errors
    "picture": {"seen": 4, "heard": 0.3, "errors": -0.5},  # looks
    "metric": {"loss": -1},  # the judge as a rater
    "noisy": {"total": -1},
    "hasty": {"total": -1},
    "long": {"length": 1},  # likes words, whatever they say
    "doubter": {"errors": -1},
    "eye": {"seen": 1},
    "ear": {"heard": 1},
}
GROUPS = ("complete", "short", "sound", "careful", "picture")


@dataclass(frozen=True)
class Noise:
    """Errors of a rater: P(a over b) = lapses / 2 + (1 - lapses) * sigmoid((u(a) - u(b)) / temperature + side).

    `side` is a preference for the caption that is shown first, in logits.
    """

    temperature: float
    lapses: float = 0.0
    side: float = 0.0


NOISE: Mapping[NoiseName, Noise] = {
    "clean": Noise(temperature=0.1),
    "usual": Noise(temperature=0.3, lapses=0.05),
    "tired": Noise(temperature=0.6, lapses=0.15),
}
# Kind of a voter with a utility -> its noise.
VOTERS: Mapping[str, Noise] = {
    "metric": Noise(0.05),
    "noisy": Noise(0.25),
    "hasty": Noise(0.25, side=0.4),  # 60 % for the first of two equal captions
    "long": Noise(6 / WORDS),
    "doubter": Noise(0.05),
    "eye": Noise(0.05),
    "ear": Noise(0.05),
}
# Phrases for a sound, each beating the next, and the last one the first, in the eyes of the voter "cycle".
SOUND_FORMS = ("plays", "is heard", "can be heard")
_FORM_PATTERNS = {
    "plays": re.compile(r"\bplays?\b", re.IGNORECASE),
    "is heard": re.compile(r"\b(?:is|are) heard\b", re.IGNORECASE),
    "can be heard": re.compile(r"\bcan be heard\b", re.IGNORECASE),
}


class Rater(Protocol):
    """Prefers one of two captions of a clip."""

    @property
    def name(self) -> str:
        """Id of the rater."""
        ...

    def prefers(self, first: CaptionTraits, second: CaptionTraits) -> float:
        """Return the probability that the rater prefers the first caption."""
        ...


@dataclass(frozen=True)
class SimulatedRater:
    """A rater with the utility of one group or kind of voter, or of several groups in part.

    Args:
        name: id of the rater.
        shares: group or kind of voter -> share; they sum to 1.
        noise: errors.
    """

    name: str
    shares: Mapping[str, float]
    noise: Noise

    def utility(self, traits: CaptionTraits) -> float:
        """Return how much the rater likes a caption."""
        return sum(share * group_utility(group, traits) for group, share in self.shares.items())

    def prefers(self, first: CaptionTraits, second: CaptionTraits) -> float:
        """Return the probability that the rater prefers the first caption."""
        difference = (self.utility(first) - self.utility(second)) / self.noise.temperature + self.noise.side
        preferred = 0.5 * (1 + math.tanh(difference / 2))  # the sigmoid, without overflow
        return self.noise.lapses / 2 + (1 - self.noise.lapses) * preferred


@dataclass(frozen=True)
class Crowd:
    """Several raters, one of whom votes."""

    name: str
    members: Sequence[Rater]

    def prefers(self, first: CaptionTraits, second: CaptionTraits) -> float:
        """Return the probability that a random member prefers the first caption."""
        return sum(member.prefers(first, second) for member in self.members) / len(self.members)


@dataclass(frozen=True)
class CyclicRater:
    """Prefers phrases for sounds in a circle, which no reward can explain; `metric` decides between equal phrases.

    Each of `SOUND_FORMS` beats the next with 0.9; all three beat other phrases, and these beat silence, with 0.7.
    """

    name: str
    metric: Rater

    def prefers(self, first: CaptionTraits, second: CaptionTraits) -> float:
        """Return the probability that the rater prefers the first caption."""
        if first.sound_form == second.sound_form:
            return self.metric.prefers(first, second)
        if first.sound_form in SOUND_FORMS and second.sound_form in SOUND_FORMS:
            step = SOUND_FORMS.index(second.sound_form) - SOUND_FORMS.index(first.sound_form)
            return 0.9 if step % len(SOUND_FORMS) == 1 else 0.1
        return 0.7 if _form_rank(first) > _form_rank(second) else 0.3


def _form_rank(traits: CaptionTraits) -> int:
    return 0 if traits.sound_form is None else 1 + (traits.sound_form in SOUND_FORMS)


@dataclass(frozen=True)
class SimulatedVote:
    """A vote between two captions of a clip, by their indices."""

    clip: int
    first: int
    second: int
    prefers_first: bool


def caption_traits(caption: Caption, score: Score, reference: Reference) -> CaptionTraits:
    """Return the traits of a caption, with its score against a reference."""
    correct = [mention.event.is_audible for mention in score.mentions if mention.is_correct]
    num_audible = sum(event.is_audible for event in reference.events)
    num_visual = len(reference.events) - num_audible
    return CaptionTraits(
        seen=correct.count(False) / max(num_visual, 1),
        heard=correct.count(True) / max(num_audible, 1),
        errors=(score.incorrect + score.hallucinated) / max(score.num_events, 1),
        repetition=score.repetition,
        length=score.num_words / WORDS,
        total=score.total,
        sound_form=main_sound_form(caption.text),
    )


def main_sound_form(text: str) -> str | None:
    """Return the phrase of `SOUND_FORMS` that introduces most sounds of a caption, "" if it is another one.

    Of equally frequent phrases, the first in the caption counts. None for a caption without sounds.
    """
    clauses = {claim.clause_number: claim.clause for claim in parse_claims(text) if claim.kind == "sound"}
    forms = Counter(_sound_form(clauses[number]) for number in sorted(clauses))
    return max(forms, key=lambda form: forms[form]) if forms else None


def _sound_form(clause: str) -> str:
    return next((form for form, pattern in _FORM_PATTERNS.items() if pattern.search(clause)), "")


def group_utility(group: str, traits: CaptionTraits) -> float:
    """Return how much a group, or a kind of voter, likes a caption."""
    return sum(weight * getattr(traits, name) for name, weight in UTILITIES[group].items())


def make_voter(kind: VoterKind, *, seed: int = 0) -> Rater:
    """Make a voter; the seed only distinguishes the votes of several voters of a kind.

    crowd is doubter, eye and ear, each as often as the others. It looks intransitive, but hardly is (docs/raters.md).
    """
    name = f"{kind}-{seed}"
    if kind == "crowd":
        return Crowd(name, [make_voter(member, seed=seed) for member in ("doubter", "eye", "ear")])
    if kind == "cycle":
        return CyclicRater(name, make_voter("metric", seed=seed))
    return SimulatedRater(name, {kind: 1.0}, VOTERS[kind])


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
    rater: Rater, clips: Sequence[Mapping[str, CaptionTraits]], *, number: int, seed: int = 0
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
        prefers_first = rng.random() < rater.prefers(traits[first], traits[second])
        votes.append(SimulatedVote(clip, first, second, prefers_first))
    return votes
