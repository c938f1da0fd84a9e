"""Generate labelled pairs of captions, one with a known fault, for `salmonn judge-benchmark`.

    python tools/judge_pairs.py [--out data/judge_pairs.jsonl] [--seed 4] [--pairs 135]

Each pair describes a different clip, `sample_clip(SynthConfig(seed=seed), index=index)`. No file is read, and the same
seed writes the same bytes. Both captions omit the same few events, so that the better one is rarely perfect, and each
has its own wording. `docs/judge_benchmark.md` lists the kinds of faults.
"""

import json
import random
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from statistics import mean
from typing import Any

from salmonn.preference.benchmark import LabelledPair
from salmonn.records import Event, write_text
from salmonn.synthetic.annotate import NUMBERS
from salmonn.synthetic.lexicon import COLOURS, DIRECTIONS, FORMS, HEARD, HEARD_PLURAL, MOVE, SHAPES, SOUNDS
from salmonn.synthetic.render import sample_clip
from salmonn.synthetic.scene import EventKind, SceneEvent, SynthConfig

NUM_OMITTED = (0, 1, 1, 2)  # by both captions
MIN_CLAUSES = 4  # of the better caption
MAX_SCENE_EVENTS = 8  # per clip, to keep the file small
THROUGHOUT = 0.3  # probability that an object has its wrong colour or shape in all its mentions
CLEAR_SECONDS = 0.3  # gap between a sound and an action that it is wrongly attributed to
# None of these mentions an event, or starts with "it", which might be an object.
PADDING = (
    "the mood is calm from beginning to end",
    "the style is plain and clean",
    "everything is kept pleasantly simple",
    "the whole has a playful charm of its own",
    "the whole is rather soothing to follow",
    "the design is modern and tidy",
    "the atmosphere is light and cheerful",
    "the pace feels relaxed and unhurried",
    "the overall impression is neat and well made",
    "one cannot help but find it charming",
    "the composition is balanced and pleasing",
    "the clip makes for a curious little piece",
)
SIMULTANEOUS = ("as {action}, {sound}", "just as {action}, {sound}", "{sound} as {action}", "{sound} just as {action}")


@dataclass(frozen=True)
class CaptionClause:
    """A clause of a caption.

    Args:
        wordings: ways to phrase it.
        subject: subject that "it" can replace ("the red circle"); "" if nothing can be replaced.
        event: event that it mentions; None if the caption must not relate it to others in time.
        is_sentence: whether it is a sentence by itself, without an opener.
        needs_then: whether "then" has to introduce it.
    """

    wordings: tuple[str, ...]
    subject: str = ""
    event: SceneEvent | None = None
    is_sentence: bool = False
    needs_then: bool = False


@dataclass(frozen=True)
class Outline:
    """All events of a clip, those that both captions mention, and their texts for the judge."""

    scene_events: tuple[SceneEvent, ...]
    mentioned: tuple[SceneEvent, ...]
    events: tuple[Event, ...]  # of the scene_events

    @property
    def clauses(self) -> list[CaptionClause]:
        """Return a new list of clauses, one per mentioned event."""
        return [describe(event) for event in self.mentioned]

    @property
    def words(self) -> set[str]:
        """Return all shapes, colours, directions and sounds of the clip."""
        return {word for event in self.scene_events for word in (event.shape, event.colour, event.value)}

    def omitted(self, kind: str) -> list[SceneEvent]:
        """Return the events of a kind that both captions omit."""
        return [event for event in self.scene_events if event not in self.mentioned and event.kind == kind]

    def places(self, *, sounds: bool) -> list[int]:
        """Return the indices of mentioned sounds, or of mentioned visual events."""
        return [place for place, event in enumerate(self.mentioned) if (event.kind == "sound") == sounds]


@dataclass(frozen=True)
class Draft:
    """The clauses of both captions.

    Args:
        better, worse: clauses of the captions.
        gap: number of additional errors in the worse caption.
        faults: indices of the faults among the clauses of the worse caption; of the better one if they are omissions.
        events: events for the judge; empty for those of the clip.
    """

    better: list[CaptionClause]
    worse: list[CaptionClause]
    gap: int
    faults: Sequence[int]
    events: tuple[Event, ...] = ()


def main() -> None:
    """Write the pairs."""
    parser = ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, default=Path("data/judge_pairs.jsonl"), help="JSONL file for the pairs")
    parser.add_argument("--seed", type=int, default=4, help="random seed of clips and pairs")
    parser.add_argument("--pairs", type=int, default=135, help="number of pairs of each kind")
    values = parser.parse_args()
    lines = []
    for pair in generate_pairs(seed=values.seed, number=values.pairs):
        value: dict[str, Any] = asdict(pair)
        for event in value["events"]:
            if event["modality"] == "visual":  # the default; omitting it, and all spaces, halves the file
                del event["modality"]
        lines.append(json.dumps(value, separators=(",", ":")) + "\n")
    write_text(values.out, "".join(lines))


def generate_pairs(*, seed: int, number: int) -> list[LabelledPair]:
    """Generate `number` pairs of each kind, alternating between kinds; clips that do not suit a kind are skipped."""
    pairs: list[LabelledPair] = []
    indices = count()
    for _ in range(number):
        for kind in FAULTS:
            candidates = (generate_pair(kind, seed=seed, index=index) for index in indices)
            pairs.append(next(pair for pair in candidates if pair))
    return pairs


def generate_pair(kind: str, *, seed: int, index: int) -> LabelledPair | None:
    """Generate a pair for one clip; None if the clip does not suit the kind of fault."""
    rng = random.Random(f"pair {seed} {index}")
    scene, reference = sample_clip(SynthConfig(seed=seed), index=index)
    if len(scene.events) > MAX_SCENE_EVENTS:
        return None
    mentioned = list(scene.events)
    for _ in range(rng.choice(NUM_OMITTED)):
        mentioned.pop(rng.choice(_removable(mentioned)))
    draft = FAULTS[kind](Outline(scene.events, tuple(mentioned), reference.events), rng)
    if draft is None or len(draft.better) < MIN_CLAUSES:
        return None
    better, worse = write_caption(draft.better, rng), write_caption(draft.worse, rng)
    is_first = rng.random() < 0.5
    length = max(len(draft.better), len(draft.worse))
    position = mean((place + 0.5) / length for place in draft.faults)
    return LabelledPair(
        events=draft.events or reference.events,
        first=better if is_first else worse,
        second=worse if is_first else better,
        better="first" if is_first else "second",
        gap=draft.gap,
        kind=kind,
        where="start" if position < 1 / 3 else "middle" if position < 2 / 3 else "end",
        seed=seed,
        index=index,
    )


def describe(event: SceneEvent) -> CaptionClause:
    """Return the clause of an event, in all wordings of the synthetic world."""
    if event.kind == "sound":
        wordings = (
            form.format(sound=sound)
            for sound in SOUNDS[event.value]
            for form in (HEARD if sound.startswith("a ") else HEARD_PLURAL)
        )
        return CaptionClause(tuple(wordings), event=event)
    name = f"{event.colour} {event.shape}"
    a = f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
    forms = MOVE[event.value] if event.kind == "move" else FORMS[event.kind]
    wordings = (form.format(a=a, the=f"the {name}", colour=event.value) for form in forms)
    return CaptionClause(tuple(wordings), subject=f"the {name}", event=event)


def write_caption(clauses: Sequence[CaptionClause], rng: random.Random) -> str:
    """Write sentences of one or two clauses; apart from `needs_then`, words about order and simultaneity are true."""

    def phrase(clause: CaptionClause, before: CaptionClause | None) -> str:
        wording = rng.choice(clause.wordings)
        if before and clause.subject and clause.subject == before.subject and rng.random() < 0.5:
            return wording.replace(clause.subject, "it")
        return wording

    sentences, place = [], 0
    while place < len(clauses):
        before, clause = clauses[place - 1] if place else None, clauses[place]
        sentence = _opener(clause, rng, before=before) + phrase(clause, before)
        following = clauses[place + 1] if place + 1 < len(clauses) else None
        can_join = following and not (clause.is_sentence or following.is_sentence)
        if following and can_join and (following.needs_then or rng.random() < 0.5):
            sentence += _conjunction(following, rng, before=clause) + phrase(following, clause)
            place += 1
        sentences.append(sentence[0].upper() + sentence[1:] + ".")
        place += 1
    return " ".join(sentences)


def _opener(clause: CaptionClause, rng: random.Random, *, before: CaptionClause | None) -> str:
    if clause.is_sentence:
        return ""
    if before is None:
        return rng.choice(("", "", "First, "))
    is_later, is_simultaneous = _relation(before, clause)
    if clause.needs_then:
        return rng.choice(("Then ", "Next, ", "After that, "))
    if is_later:
        return rng.choice(("", "", "Then ", "Next, ", "After that, "))
    return rng.choice(("", "Meanwhile, ", "At the same time, ")) if is_simultaneous else ""


def _conjunction(clause: CaptionClause, rng: random.Random, *, before: CaptionClause) -> str:
    is_later, is_simultaneous = _relation(before, clause)
    if clause.needs_then:
        return rng.choice((", and then ", " and then "))
    if is_later:
        return rng.choice((", and ", ", and then ", " and then "))
    return rng.choice((", and ", " while ")) if is_simultaneous else ", and "


def _relation(before: CaptionClause, clause: CaptionClause) -> tuple[bool, bool]:
    """Return whether an event starts after the one before, and whether they overlap; both False if unknown."""
    if before.event is None or clause.event is None:
        return False, False
    # Appearing, changing and leaving take no time.
    spans = [
        (event.start_seconds, event.start_seconds if event.kind in ("appear", "change", "leave") else event.end_seconds)
        for event in (before.event, clause.event)
    ]
    is_simultaneous = min(end for _, end in spans) >= max(start for start, _ in spans)
    return before.event.end_seconds <= clause.event.start_seconds, is_simultaneous


def _removable(mentioned: Sequence[SceneEvent]) -> list[int]:
    """Return the events that no later mention implies: an object that acts has appeared, a blue one turned blue."""
    shapes = [event.shape for event in mentioned]
    return [
        place
        for place, event in enumerate(mentioned)
        if not (event.kind == "appear" and shapes.count(event.shape) > 1)
        and not (event.kind == "change" and event.shape in shapes[place + 1 :])
    ]


def _omit(outline: Outline, rng: random.Random) -> Draft | None:
    """Omit one to three more neighbouring events."""
    options, number = _removable(outline.mentioned), rng.choice((1, 1, 2, 3))
    if len(options) < number or len(outline.mentioned) < number + 2:
        return None
    middle = rng.choice(options)
    faults = sorted(options, key=lambda place: abs(place - middle))[:number]
    worse = [clause for place, clause in enumerate(outline.clauses) if place not in faults]
    return Draft(outline.clauses, worse, number, faults)


def _alter_object(outline: Outline, rng: random.Random, *, attribute: str) -> Draft:
    """Give an object, or what it turns into, a colour or a shape that is not in the clip."""
    wrong = rng.choice([word for word in (COLOURS if attribute == "colour" else SHAPES) if word not in outline.words])
    place = rng.choice(outline.places(sounds=False))
    event = outline.mentioned[place]
    if attribute == "colour" and event.kind == "change" and rng.random() < 0.5:
        altered = {place: replace(event, value=wrong)}
    else:
        places = [place]
        if rng.random() < THROUGHOUT:
            same = (event.shape, event.colour)
            places = [other for other, one in enumerate(outline.mentioned) if (one.shape, one.colour) == same]
        altered = {
            other: replace(outline.mentioned[other], colour=wrong)
            if attribute == "colour"
            else replace(outline.mentioned[other], shape=wrong)
            for other in places
        }
    # "it" never replaces the altered object, so that each clause is wrong by itself.
    worse = [
        replace(describe(altered[other]), subject="") if other in altered else clause
        for other, clause in enumerate(outline.clauses)
    ]
    return Draft(outline.clauses, worse, len(altered), list(altered))


def _miscount(outline: Outline, rng: random.Random) -> Draft:
    """State a wrong number of beeps, clicks or shapes, and let an event state the right one."""
    better, worse, events = outline.clauses, outline.clauses, list(outline.events)
    counted = [place for place in outline.places(sounds=True) if outline.mentioned[place].value in ("beeps", "clicks")]
    is_sound = bool(counted) and rng.random() >= 0.4
    if is_sound:
        place = rng.choice(counted)
        sound = outline.mentioned[place]
        number = sound.num_pulses
        endings = (f"{sound.value} are heard", f"{sound.value} can be heard")
        index = outline.scene_events.index(sound)
        events[index] = replace(events[index], text=f"{NUMBERS[number]} {endings[0]}")
    else:
        appearing = [event for event, one in zip(events, outline.scene_events, strict=True) if one.kind == "appear"]
        number = len(appearing)
        place = rng.randint(0, len(outline.mentioned))
        endings = ("shapes appear in all", "shapes show up in all")
        start, end = appearing[0].start_seconds, appearing[-1].end_seconds
        events.append(Event(f"{NUMBERS[number]} {endings[0]}", "visual", start, end))
    wrong = rng.choice([other for other in range(2, len(NUMBERS)) if 0 < abs(other - number) <= 2])
    for clauses, stated in ((better, number), (worse, wrong)):
        wordings = tuple(f"{NUMBERS[stated]} {ending}" for ending in endings)
        if is_sound:
            clauses[place] = CaptionClause(wordings, event=outline.mentioned[place])
        else:
            clauses.insert(place, CaptionClause(wordings, is_sentence=True))
    return Draft(better, worse, 1, [place], tuple(events))


def _invent(outline: Outline, rng: random.Random) -> Draft | None:
    """Add one or two events that are not in the clip, and could not be taken for an omitted one."""
    options = []
    kinds: tuple[EventKind, ...] = ("sound", "appear", "move", "blink")
    for kind in kinds:
        place = rng.randint(1, len(outline.mentioned))
        event = _invent_event(kind, outline, rng, after=outline.mentioned[place - 1])
        if event:
            options.append((place, replace(describe(event), subject="", event=None)))
    number = rng.choice((1, 1, 2))
    if len(options) < number:
        return None
    worse, faults = outline.clauses, []
    for shift, (place, clause) in enumerate(sorted(rng.sample(options, number), key=lambda option: option[0])):
        worse.insert(place + shift, clause)
        faults.append(place + shift)
    return Draft(outline.clauses, worse, number, faults)


def _invent_event(kind: EventKind, outline: Outline, rng: random.Random, *, after: SceneEvent) -> SceneEvent | None:
    """Return an event of a kind: a sound or object that is not in the clip, or an action of the object in `after`."""
    if kind == "sound":
        value = rng.choice([sound for sound in SOUNDS if sound not in outline.words])
        return None if outline.omitted("sound") else SceneEvent("sound", 0, 0, value=value)
    if kind == "appear":
        shape, colour = (
            rng.choice([word for word in words if word not in outline.words]) for words in (SHAPES, list(COLOURS))
        )
        return SceneEvent("appear", 0, 0, shape=shape, colour=colour)
    own = [event for event in outline.scene_events if event.shape == after.shape]
    values = [event.value for event in own if event.kind == kind]
    options = [value for value in (DIRECTIONS if kind == "move" else [""]) if value not in values]
    hidden = kind == "move" and any(event.shape == after.shape for event in outline.omitted("move"))
    if not options or hidden or after.kind in ("sound", "leave"):
        return None
    value = rng.choice(options) if kind == "move" else ""
    return replace(after, kind=kind, colour=after.value if after.kind == "change" else after.colour, value=value)


def _swap(outline: Outline, rng: random.Random) -> Draft | None:
    """Mention two successive visual events in the wrong order."""
    options = []
    for place, (one, other) in enumerate(zip(outline.mentioned, outline.mentioned[1:], strict=False)):
        # It is obvious that a shape appears before it acts, and leaves afterwards.
        is_obvious = one.shape == other.shape and (one.kind == "appear" or other.kind == "leave")
        if "sound" not in (one.kind, other.kind) and one.end_seconds <= other.start_seconds and not is_obvious:
            options.append(place)
    if not options:
        return None
    place = rng.choice(options)
    better, worse = outline.clauses, outline.clauses
    earlier, later = better[place : place + 2]
    better[place : place + 2] = earlier, replace(later, needs_then=True)
    worse[place : place + 2] = later, replace(earlier, needs_then=True)
    return Draft(better, worse, 1, [place, place + 1])


def _misattribute(outline: Outline, rng: random.Random) -> Draft | None:
    """Attribute a sound to the action of another shape, during which it is not heard."""
    seen = [(place, outline.mentioned[place]) for place in outline.places(sounds=False)]
    options = []
    for heard in outline.places(sounds=True):
        sound = outline.mentioned[heard]
        during = [one for one in seen if sound.start_seconds + 0.2 <= one[1].start_seconds <= sound.end_seconds - 0.4]
        apart = [one for one in seen if one[1].overlap_seconds(sound) <= -CLEAR_SECONDS]
        options += [(heard, one, other) for one in during for other in apart if one[1].shape != other[1].shape]
    if not options:
        return None
    heard, (right_place, right), (wrong_place, wrong) = rng.choice(options)
    sound = outline.mentioned[heard]
    better, worse = outline.clauses, outline.clauses
    for clauses, place, action in ((better, right_place, right), (worse, wrong_place, wrong)):
        form = rng.choice(SIMULTANEOUS)
        words = {name: rng.choice(describe(event).wordings) for name, event in (("action", action), ("sound", sound))}
        clauses[place] = CaptionClause((form.format(**words),), is_sentence=True)
        del clauses[heard]
    events = list(outline.events)
    index, action_text = outline.scene_events.index(sound), outline.events[outline.scene_events.index(right)].text
    events[index] = replace(events[index], text=f"{events[index].text} as {action_text}")
    return Draft(better, worse, 1, [wrong_place - (heard < wrong_place)], tuple(events))


def _repeat(outline: Outline, rng: random.Random) -> Draft:
    """Repeat one or two clauses later on, literally or in other words."""
    number, is_literal = rng.choice((1, 2)), rng.random() < 0.5
    first = rng.randint(0, len(outline.mentioned) - number)
    worse, repeated = outline.clauses, []
    for place in range(first, first + number):
        wordings = worse[place].wordings
        wording = rng.choice(wordings)
        worse[place] = replace(worse[place], wordings=(wording,), subject="")
        others = tuple(other for other in wordings if other != wording)
        repeated.append(CaptionClause((wording,) if is_literal else others, is_sentence=True))
    place = rng.randint(first + number, len(worse))
    worse[place:place] = repeated
    return Draft(outline.clauses, worse, 0, range(place, place + number))


def _pad(outline: Outline, rng: random.Random) -> Draft:
    """Add one to three sentences that mention nothing in the clip."""
    number, place = rng.randint(1, 3), rng.randint(0, len(outline.mentioned))
    worse = outline.clauses
    worse[place:place] = [CaptionClause((words,), is_sentence=True) for words in rng.sample(PADDING, number)]
    return Draft(outline.clauses, worse, 0, range(place, place + number))


FAULTS: dict[str, Callable[[Outline, random.Random], Draft | None]] = {
    "left_out": _omit,
    "colour": partial(_alter_object, attribute="colour"),
    "object": partial(_alter_object, attribute="shape"),
    "number": _miscount,
    "invented": _invent,
    "order": _swap,
    "source": _misattribute,
    "repetition": _repeat,
    "padding": _pad,
}

if __name__ == "__main__":
    main()
