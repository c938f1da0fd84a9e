"""Faults of captions for `reward_pairs.py`: each returns the clauses of a correct caption and of a faulty one.

Both captions omit the same few events, so that the better one is rarely complete, and use the same wordings.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from reward_clauses import CaptionClause, describe

from salmonn.records import Event, Modality
from salmonn.synthetic.annotate import CLEAR_SECONDS as CLEAR_HALF_SECONDS
from salmonn.synthetic.annotate import FIRST_HALF, NUMBERS, SECOND_HALF
from salmonn.synthetic.lexicon import (
    COLOURS,
    DIRECTIONS,
    SHAPES,
    SOUNDS,
    canonical_clause,
)
from salmonn.synthetic.scene import EventKind, Scene, SceneEvent, objects_at

# The prompt that the shipped model was trained on.
CAPTION_PROMPT = "Describe the video and its sounds in detail."
CLEAR_SECONDS = 0.3  # gap between a sound and an action that it is wrongly attributed to
NUM_PULSES = {"beeps": (3, 4), "clicks": (4, 5, 6)}
CUT_WORDS = 2  # words of the last clause of a caption that stops in a sentence
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
NO_SOUND = ("no sound can be heard", "nothing can be heard", "there is no sound")
NO_PICTURE = ("no shape can be seen", "nothing can be seen", "there is nothing visible")
SIMULTANEOUS = ("as {action}, {sound}", "just as {action}, {sound}", "{sound} as {action}", "{sound} just as {action}")


@dataclass(frozen=True)
class Outline:
    """A clip, the events that both captions mention, and the texts of all events for a judge."""

    scene: Scene
    mentioned: tuple[SceneEvent, ...]
    events: tuple[Event, ...]  # of the scene's events

    @property
    def scene_events(self) -> tuple[SceneEvent, ...]:
        """Return all events of the clip."""
        return self.scene.events

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
        events: events for a judge; empty for those of the clip.
        prompt: the prompt that both captions answer.
        use: what of the clip the prompt is about.
        is_cut: whether the worse caption stops in a sentence.
        balance: (group, right answer, wrong answer): in each group of a subset both are right equally often, so that
            the right one cannot be guessed from the group; None where it cannot anyway.
    """

    better: list[CaptionClause]
    worse: list[CaptionClause]
    events: tuple[Event, ...] = ()
    prompt: str = CAPTION_PROMPT
    use: Modality = "both"
    is_cut: bool = False
    balance: tuple[str, str, str] | None = None


def removable(mentioned: Sequence[SceneEvent]) -> list[int]:
    """Return the events that no later mention implies: an object that acts has appeared, a blue one turned blue."""
    shapes = [event.shape for event in mentioned]
    return [
        place
        for place, event in enumerate(mentioned)
        if not (event.kind == "appear" and shapes.count(event.shape) > 1)
        and not (event.kind == "change" and event.shape in shapes[place + 1 :])
    ]


def _omit(outline: Outline, rng: random.Random) -> Draft | None:
    """Omit one or two more neighbouring events."""
    options, number = removable(outline.mentioned), rng.choice((1, 1, 2))
    if len(options) < number or len(outline.mentioned) < number + 2:
        return None
    middle = rng.choice(options)
    faults = sorted(options, key=lambda place: abs(place - middle))[:number]
    worse = [clause for place, clause in enumerate(outline.clauses) if place not in faults]
    return Draft(outline.clauses, worse)


def _alter_object(outline: Outline, rng: random.Random, *, attribute: str) -> Draft:
    """Give an object, or what it turns into, a colour or a shape that is not in the clip."""
    altered = _altered_events(outline, rng, attribute=attribute)
    # "it" replaces the altered object in neither caption, so that each clause is right or wrong by itself.
    better, worse = outline.clauses, outline.clauses
    for place, event in altered.items():
        better[place] = replace(better[place], subject="")
        worse[place] = replace(describe(event), subject="")
    return Draft(better, worse)


def _altered_events(outline: Outline, rng: random.Random, *, attribute: str) -> dict[int, SceneEvent]:
    """Return the altered events by their place: all mentions of the object, so that no caption contradicts itself."""
    wrong = rng.choice([word for word in (COLOURS if attribute == "colour" else SHAPES) if word not in outline.words])
    event = outline.mentioned[rng.choice(outline.places(sounds=False))]
    if attribute == "shape":
        return {
            place: replace(one, shape=wrong) for place, one in enumerate(outline.mentioned) if one.shape == event.shape
        }
    # The object may have the colour before it changes, or after.
    colour = event.value if event.kind == "change" and rng.random() < 0.5 else event.colour
    altered = {}
    for place, one in enumerate(outline.mentioned):
        new = replace(one, colour=wrong if one.colour == colour else one.colour)
        if one.kind == "change" and one.value == colour:
            new = replace(new, value=wrong)
        if one.shape == event.shape and new != one:
            altered[place] = new
    return altered


def _miscount(outline: Outline, rng: random.Random) -> Draft | None:
    """State a wrong but usual number of beeps or clicks, and let an event state the right one."""
    counted = [place for place in outline.places(sounds=True) if outline.mentioned[place].value in NUM_PULSES]
    if not counted:
        return None
    place = rng.choice(counted)
    sound = outline.mentioned[place]
    right = sound.num_pulses
    wrong = rng.choice([number for number in NUM_PULSES[sound.value] if number != right])
    better, worse, events = outline.clauses, outline.clauses, list(outline.events)
    for clauses, number in ((better, right), (worse, wrong)):
        name = f"{NUMBERS[number]} {sound.value}"
        clauses[place] = CaptionClause((f"{name} are heard", f"{name} can be heard"), event=sound)
    index = outline.scene_events.index(sound)
    events[index] = replace(events[index], text=f"{NUMBERS[right]} {sound.value} are heard")
    group = f"{sound.value} {sorted((right, wrong))}"
    return Draft(better, worse, tuple(events), balance=(group, str(right), str(wrong)))


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
    worse = outline.clauses
    for shift, (place, clause) in enumerate(sorted(rng.sample(options, number), key=lambda option: option[0])):
        worse.insert(place + shift, clause)
    return Draft(outline.clauses, worse)


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
        # It is obvious that a shape appears before it acts, and leaves afterwards, and which colour it has when.
        is_obvious = one.shape == other.shape and (
            one.kind == "appear" or other.kind == "leave" or "change" in (one.kind, other.kind)
        )
        if "sound" not in (one.kind, other.kind) and one.end_seconds <= other.start_seconds and not is_obvious:
            options.append(place)
    if not options:
        return None
    place = rng.choice(options)
    better, worse = outline.clauses, outline.clauses
    earlier, later = better[place : place + 2]
    better[place : place + 2] = earlier, replace(later, needs_then=True)
    worse[place : place + 2] = later, replace(earlier, needs_then=True)
    return Draft(better, worse)


def _misattribute(outline: Outline, rng: random.Random) -> Draft | None:
    """Attribute a sound to the action of another shape, during which it is not heard."""
    options = [
        (heard, right, wrong)
        for heard in outline.places(sounds=True)
        for right in outline.places(sounds=False)
        for wrong in outline.places(sounds=False)
        if _is_during(outline.mentioned[right], outline.mentioned[heard])
        and _is_apart(outline.mentioned[wrong], outline.mentioned[heard])
        and outline.mentioned[right].shape != outline.mentioned[wrong].shape
    ]
    if not options:
        return None
    heard, right, wrong = rng.choice(options)
    better = _join(outline, rng, action=right, sound=heard, place=right)
    worse = _join(outline, rng, action=wrong, sound=heard, place=wrong)
    return Draft(better, worse, _joined_events(outline, action=right, sound=heard))


def _mismatch(outline: Outline, rng: random.Random) -> Draft | None:
    """Say that another sound of the clip is heard during an action."""
    options = [
        (action, right, wrong)
        for action in outline.places(sounds=False)
        for right in outline.places(sounds=True)
        for wrong in outline.places(sounds=True)
        if _is_during(outline.mentioned[action], outline.mentioned[right])
        and _is_apart(outline.mentioned[action], outline.mentioned[wrong])
    ]
    if not options:
        return None
    action, right, wrong = rng.choice(options)
    better = _join(outline, rng, action=action, sound=right, place=action)
    worse = _join(outline, rng, action=action, sound=wrong, place=action)
    return Draft(better, worse, _joined_events(outline, action=action, sound=right))


def _is_during(action: SceneEvent, sound: SceneEvent) -> bool:
    """Return whether an action clearly starts while a sound is heard."""
    return sound.start_seconds + 0.2 <= action.start_seconds <= sound.end_seconds - 0.4


def _is_apart(action: SceneEvent, sound: SceneEvent) -> bool:
    return action.overlap_seconds(sound) <= -CLEAR_SECONDS


def _join(outline: Outline, rng: random.Random, *, action: int, sound: int, place: int) -> list[CaptionClause]:
    """Return clauses with one that joins an action and a sound, instead of the two."""
    events = {"action": outline.mentioned[action], "sound": outline.mentioned[sound]}
    form = rng.choice(SIMULTANEOUS)
    clauses = outline.clauses
    words = {name: rng.choice(describe(event).wordings) for name, event in events.items()}
    clauses[place] = CaptionClause((form.format(**words),), is_sentence=True)
    del clauses[sound]
    return clauses


def _joined_events(outline: Outline, *, action: int, sound: int) -> tuple[Event, ...]:
    """Return the clip's events, with the text of a sound stating the action that it goes with."""
    events = list(outline.events)
    heard = outline.scene_events.index(outline.mentioned[sound])
    action_text = events[outline.scene_events.index(outline.mentioned[action])].text
    events[heard] = replace(events[heard], text=f"{events[heard].text} as {action_text}")
    return tuple(events)


def _give_to_other(outline: Outline, rng: random.Random) -> Draft | None:
    """Say that another object, present at that moment, does what one object does."""
    options = []
    for place, event in enumerate(outline.mentioned):
        if event.kind in ("sound", "appear"):
            continue
        earlier = {one.shape for one in outline.mentioned[:place]}
        later = {one.shape for one in outline.mentioned[place + 1 :]}
        for other in objects_at(outline.scene, event.start_seconds):
            own = [(one.kind, one.value) for one in outline.scene_events if one.shape == other.shape]
            is_possible = other.shape != event.shape and other.visible and other.shape in earlier
            is_false = (event.kind, event.value) not in own and other.colour != event.value
            # Neither caption may contradict itself, by what one of the objects does or looks like later on.
            is_consistent = event.kind in ("move", "blink") or not {event.shape, other.shape} & later
            if is_possible and is_false and is_consistent:
                options.append((place, replace(event, shape=other.shape, colour=other.colour)))
    if not options:
        return None
    place, altered = rng.choice(options)
    better, worse = outline.clauses, outline.clauses
    better[place] = replace(better[place], subject="")
    worse[place] = replace(describe(altered), subject="")
    return Draft(better, worse)


def _misdate(outline: Outline, rng: random.Random) -> Draft | None:
    """Answer in which half an event happens; questions are worded as in the shipped model's training data."""
    middle = outline.scene.duration_seconds / 2
    options = []
    for event in outline.scene_events[1:]:  # the first event is always early
        alike = [one for one in outline.scene_events if _fact(one)[1:] == _fact(event)[1:]]
        is_early = event.end_seconds <= middle - CLEAR_HALF_SECONDS
        if len(alike) == 1 and (is_early or event.start_seconds >= middle + CLEAR_HALF_SECONDS):
            options.append((event, is_early))
    if not options:
        return None
    event, is_early = rng.choice(options)
    clause = canonical_clause(event.kind, colour=event.colour, shape=event.shape, value=event.value)
    if event.kind == "sound":
        question = f"When is {SOUNDS[event.value][0]} heard"
    else:
        verb, *rest = clause.split(event.shape + " ")[1].split()
        question = " ".join(["When does the", event.shape, verb.removesuffix("s"), *rest])
    right, wrong = (FIRST_HALF, SECOND_HALF) if is_early else (SECOND_HALF, FIRST_HALF)
    return Draft(
        [CaptionClause((f"{clause} {right}",), is_sentence=True)],
        [CaptionClause((f"{clause} {wrong}",), is_sentence=True)],
        prompt=f"{question}, {FIRST_HALF} or {SECOND_HALF}?",
        balance=(event.value if event.kind == "sound" else event.kind, right, wrong),
    )


def _fact(event: SceneEvent) -> tuple[str, ...]:
    return event.colour, event.kind, event.shape, event.value


def _invent_unavailable(outline: Outline, rng: random.Random, *, use: Modality) -> Draft:
    """Describe a clip without its sound, or without its picture, and make up what it might have been."""
    sounds = use == "audio"
    clauses = [outline.clauses[place] for place in outline.places(sounds=sounds)]
    if sounds:
        shape, colour = (rng.choice([w for w in words if w not in outline.words]) for words in (SHAPES, list(COLOURS)))
        invented = SceneEvent("appear", 0, 0, shape=shape, colour=colour)
    else:
        invented = SceneEvent("sound", 0, 0, value=rng.choice([s for s in SOUNDS if s not in outline.words]))
    place = rng.randint(0, len(clauses))
    better, worse = list(clauses), list(clauses)
    worse.insert(place, CaptionClause(describe(invented).wordings, is_sentence=True))
    if rng.random() < 0.5:  # otherwise the better caption omits the subject
        better.insert(place, CaptionClause(NO_PICTURE if sounds else NO_SOUND, is_sentence=True))
    return Draft(better, worse, use=use)


def _ask_about(outline: Outline, rng: random.Random, *, is_present: bool) -> Draft | None:
    """Ask what an object does last; it is in the clip or not, and the wrong answer assumes the opposite."""
    acting = [event for event in outline.scene_events if event.kind in ("move", "blink", "change", "leave")]
    last = [
        event
        for place, event in enumerate(outline.scene_events)
        if event in acting and all(one.shape != event.shape for one in outline.scene_events[place + 1 :])
    ]
    if not last:
        return None
    event = rng.choice(last)
    if not is_present:
        shape, colour = (rng.choice([w for w in words if w not in outline.words]) for words in (SHAPES, list(COLOURS)))
        event = replace(event, shape=shape, colour=colour)
    name = f"{event.colour} {event.shape}"
    yes = CaptionClause(describe(event).wordings, is_sentence=True)
    a = f"an {name}" if name[0] in "aeiou" else f"a {name}"
    no = CaptionClause(
        (f"there is no {name}", f"no {name} can be seen", f"there is no {name} in it", f"we never see {a} at all"),
        is_sentence=True,
    )
    better, worse = ([yes], [no]) if is_present else ([no], [yes])
    return Draft(better, worse, prompt=f"What does the {name} do last?")


def _hint(outline: Outline, rng: random.Random, *, is_right: bool) -> Draft:
    """Describe a clip that a note in the prompt contradicts, or confirms, in a colour."""
    altered = _altered_events(outline, rng, attribute="colour")
    place = min(altered)
    event = outline.mentioned[place] if is_right else altered[place]
    note = canonical_clause(event.kind, colour=event.colour, shape=event.shape, value=event.value)
    better, worse = outline.clauses, outline.clauses
    for other, wrong in altered.items():
        better[other] = replace(better[other], subject="")
        worse[other] = replace(describe(wrong), subject="")
    return Draft(better, worse, prompt=f'{CAPTION_PROMPT} A viewer noted: "{note[0].upper()}{note[1:]}."')


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
    return Draft(outline.clauses, worse)


def _pad(outline: Outline, rng: random.Random) -> Draft:
    """Add a sentence that mentions nothing in the clip."""
    worse = outline.clauses
    worse.insert(rng.randint(0, len(worse)), CaptionClause((rng.choice(PADDING),), is_sentence=True))
    return Draft(outline.clauses, worse)


def _cut(outline: Outline, _: random.Random) -> Draft:
    """Stop before the verb of the last clause."""
    *clauses, last = outline.clauses
    starts = {" ".join(wording.split()[:CUT_WORDS]) for wording in last.wordings}
    worse = [*clauses, replace(last, wordings=tuple(sorted(starts)), subject="")]
    return Draft(outline.clauses, worse, is_cut=True)


Fault = Callable[[Outline, random.Random], Draft | None]

FAULTS: dict[str, Fault] = {
    "left_out": _omit,
    "colour": partial(_alter_object, attribute="colour"),
    "object": partial(_alter_object, attribute="shape"),
    "invented": _invent,
    "order": _swap,
    "together": _mismatch,
    "count": _miscount,
    "who": _give_to_other,
    "when": _misdate,
    "source": _misattribute,
    "silent": partial(_invent_unavailable, use="visual"),
    "dark": partial(_invent_unavailable, use="audio"),
    "false_premise": partial(_ask_about, is_present=False),
    "true_premise": partial(_ask_about, is_present=True),
    "hint_wrong": partial(_hint, is_right=False),
    "hint_right": partial(_hint, is_right=True),
    "repetition": _repeat,
    "padding": _pad,
    "cut": _cut,
}
# Faults of complete captions; several of them may be applied to one caption.
CAPTION_FAULTS = ("left_out", "colour", "object", "invented", "order", "who")
