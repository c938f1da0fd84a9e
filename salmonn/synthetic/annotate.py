"""Describe scenes in words: event lists, accurate and hasty captions, and questions with short answers.

Event lists use the canonical phrasing of `lexicon.py`, captions any phrasing. Every clause of a caption has a subject
and its own verb, so that a judge can read it alone, except that "it" stands for the subject of the clause before.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from salmonn.records import Event, Question, Reference
from salmonn.synthetic.lexicon import (
    COLOURS,
    DIRECTIONS,
    FORMS,
    HEARD,
    HEARD_PLURAL,
    MOVE,
    SHAPES,
    SOUNDS,
    canonical_clause,
    fill_template,
)
from salmonn.synthetic.scene import Position, Scene, SceneEvent, objects_at

OPENERS = ("", "", "Then ", "Next, ", "After that, ")
JOINTS = (", and ", ", and then ", " and then ")
# Errors of hasty captions. Human annotators omit half of the sounds and some of the small visual events: a third of all
# events here.
OMISSION_RATES = {"appear": 0.1, "move": 0.2, "change": 0.2, "blink": 0.3, "leave": 0.3, "sound": 0.55}
# Systematic errors: how often a blink is described as disappearing, and a change of colour as a new shape. A model that
# learns from many captions copies these, while random errors average out.
MISREADING_RATE = 0.7
# Random errors: how often a caption has a hallucinated event, a wrong detail, or a repeated clause.
HALLUCINATION_RATE, MISTAKE_RATE, REPETITION_RATE = 0.2, 0.1, 0.05
NUMBERS = ("none", "one", "two", "three", "four", "five", "six")
QUESTION_KINDS = ("colour", "count", "order", "sound", "when", "where", "direction")
CLEAR_SECONDS = 0.5  # minimum distance from the middle of the clip of an event that is asked about by "when"
FIRST_HALF, SECOND_HALF = "in the first half", "in the second half"

Options = list[tuple[str, str]]  # questions with their answers


def write_reference(
    scene: Scene, rng: random.Random, *, video: str, index: int = 0, num_questions: int = 3
) -> Reference:
    """Write the complete annotation of a scene; `index` rotates the kinds of questions from clip to clip."""
    events = scene.events
    return Reference(
        video=video,
        events=write_events(events),
        caption=write_caption(events, rng),
        visual_caption=write_caption([event for event in events if event.kind != "sound"], rng),
        audio_caption=write_caption([event for event in events if event.kind == "sound"], rng),
        questions=write_questions(scene, rng, index=index, number=num_questions),
        # Last, so that other error rates leave the rest of a set unchanged.
        human_caption=write_human_caption(events, rng),
        duration_seconds=scene.duration_seconds,
    )


def write_events(events: Sequence[SceneEvent]) -> tuple[Event, ...]:
    """Write the event list, in canonical clauses."""
    return tuple(
        Event(_canonical(event), "audio" if event.kind == "sound" else "visual", event.start_seconds, event.end_seconds)
        for event in events
    )


def write_caption(events: Sequence[SceneEvent], rng: random.Random) -> str:
    """Describe events in the given order, in sentences of one or two clauses."""
    sentences, start = [], 0
    while start < len(events):
        size = 2 if rng.random() < 0.55 and start + 1 < len(events) else 1
        sentence = _write_opener(events, rng, index=start, size=size)
        for index in range(start, start + size):
            before = events[index - 1] if index else None
            if before and index > start:
                is_while = _coincide(events[index], before) and rng.random() < 0.5
                sentence += " while " if is_while else rng.choice(JOINTS)
            sentence += _write_clause(events[index], rng, before=before)
        sentences.append(sentence[0].upper() + sentence[1:] + ".")
        start += size
    return " ".join(sentences)


def write_human_caption(events: Sequence[SceneEvent], rng: random.Random) -> str:
    """Write a caption as a hasty annotator would: a third of the events are missing and some details are wrong."""
    described = [event for event in events if rng.random() >= OMISSION_RATES[event.kind]]
    described = described or [rng.choice(events)]
    described = [_misread(event) if rng.random() < MISREADING_RATE else event for event in described]
    if rng.random() < MISTAKE_RATE:
        index = rng.randrange(len(described))
        described[index] = _change_detail(described[index], rng, events=events)
    if rng.random() < HALLUCINATION_RATE:
        index = rng.randint(1, len(described))
        described.insert(index, _hallucinate(rng, events=events, after=described[index - 1]))
    if rng.random() < REPETITION_RATE:
        index = rng.randrange(len(described))
        described.insert(rng.randint(index + 1, len(described)), described[index])
    return write_caption(described, rng)


def write_questions(scene: Scene, rng: random.Random, *, index: int = 0, number: int = 3) -> tuple[Question, ...]:
    """Write questions of different kinds, rotated from clip to clip so that each kind is equally frequent.

    A kind without an unambiguous question about the scene is replaced by the next kind.
    """
    questions: list[Question] = []
    for step in range(len(QUESTION_KINDS)):
        kind = QUESTION_KINDS[(index * number + step) % len(QUESTION_KINDS)]
        options = _QUESTIONS[kind](scene)
        if options and len(questions) < number:
            questions.append(Question(*rng.choice(options), kind=kind))
    return tuple(questions)


def _canonical(event: SceneEvent) -> str:
    return canonical_clause(event.kind, colour=event.colour, shape=event.shape, value=event.value)


def _predicate(event: SceneEvent) -> str:
    """Return subject and verb without the colour, for example "circle moves to the left"."""
    return _canonical(event).split(event.colour + " ", maxsplit=1)[1]


def _write_clause(event: SceneEvent, rng: random.Random, *, before: SceneEvent | None) -> str:
    if event.kind == "sound":
        sound = rng.choice(SOUNDS[event.value])
        return rng.choice(HEARD if sound.startswith("a ") else HEARD_PLURAL).format(sound=sound)
    pronoun = "it" if before and before.shape == event.shape and rng.random() < 0.5 else ""
    templates = MOVE[event.value] if event.kind == "move" else FORMS[event.kind]
    # The canonical template is more frequent than the others, as one wording usually prevails among annotators.
    template = templates[0] if rng.random() < 0.3 else rng.choice(templates)
    return fill_template(template, colour=event.colour, shape=event.shape, value=event.value, pronoun=pronoun)


def _write_opener(events: Sequence[SceneEvent], rng: random.Random, *, index: int, size: int) -> str:
    if index == 0:
        return rng.choice(("", "", "First, ", "At the start, "))
    if index + size == len(events) and size == 1 and rng.random() < 0.5:
        return "Finally, "
    if _coincide(events[index], events[index - 1]) and rng.random() < 0.5:
        return rng.choice(("Meanwhile, ", "At the same time, "))
    return rng.choice(OPENERS)


def _coincide(event: SceneEvent, before: SceneEvent) -> bool:
    """Return whether a sound and a visual event overlap in time."""
    return (event.kind == "sound") != (before.kind == "sound") and event.overlap_seconds(before) > 0


def _unused_colours(events: Sequence[SceneEvent]) -> list[str]:
    used = {event.colour for event in events} | {event.value for event in events}
    return [colour for colour in COLOURS if colour not in used]


def _unused_sounds(events: Sequence[SceneEvent]) -> list[str]:
    return [kind for kind in SOUNDS if kind not in {event.value for event in events}]


def _unused_directions(events: Sequence[SceneEvent], *, shape: str) -> list[str]:
    used = {event.value for event in events if event.shape == shape and event.kind == "move"}
    return [direction for direction in DIRECTIONS if direction not in used]


def _misread(event: SceneEvent) -> SceneEvent:
    """Return an event as a hasty viewer understands it; most kinds are unmistakable."""
    if event.kind == "blink":
        return replace(event, kind="leave")
    if event.kind == "change":
        return replace(event, kind="appear", colour=event.value, value="")
    return event


def _change_detail(event: SceneEvent, rng: random.Random, *, events: Sequence[SceneEvent]) -> SceneEvent:
    """Return an event with one wrong detail: the kind of sound, the direction, or the colour."""
    directions = _unused_directions(events, shape=event.shape)
    if event.kind == "sound":
        return replace(event, value=rng.choice(_unused_sounds(events)))
    if event.kind == "move" and directions:
        return replace(event, value=rng.choice(directions))
    colour = rng.choice(_unused_colours(events))
    return replace(event, value=colour) if event.kind == "change" else replace(event, colour=colour)


def _hallucinate(rng: random.Random, *, events: Sequence[SceneEvent], after: SceneEvent) -> SceneEvent:
    """Make up an event at the end of `after`: a sound, a new object, or an action of the same object."""
    now = replace(after, start_seconds=after.end_seconds)
    directions = _unused_directions(events, shape=after.shape)
    shapes = [shape for shape in SHAPES if shape not in {event.shape for event in events}]
    kind = rng.choice(("sound", "appear", "move"))
    if kind == "move" and after.shape and after.kind != "leave" and directions:
        colour = after.value if after.kind == "change" else after.colour
        return replace(now, kind="move", colour=colour, value=rng.choice(directions))
    if kind == "sound" or not shapes:
        return replace(now, kind="sound", shape="", colour="", value=rng.choice(_unused_sounds(events)))
    shape = rng.choice(shapes)
    return replace(now, kind="appear", shape=shape, colour=rng.choice(_unused_colours(events)), value="")


def _of_kind(scene: Scene, *kinds: str) -> list[SceneEvent]:
    return [event for event in scene.events if event.kind in kinds]


def _of_shape(scene: Scene, shape: str) -> list[SceneEvent]:
    return [event for event in scene.events if event.shape == shape]


def _colour_questions(scene: Scene) -> Options:
    options = []
    for appear in _of_kind(scene, "appear"):
        options.append((f"What colour is the {appear.shape} when it appears?", appear.colour))
        changes = [event.value for event in _of_shape(scene, appear.shape) if event.kind == "change"]
        if changes:
            options.append((f"What colour is the {appear.shape} at the end?", changes[-1]))
    return options


def _count_questions(scene: Scene) -> Options:
    kinds = {
        "How many shapes appear?": "appear",
        "How many sounds are heard?": "sound",
        "How many shapes disappear?": "leave",
        "How many times does a shape move?": "move",
        "How many shapes blink?": "blink",
    }
    return [(question, NUMBERS[len(_of_kind(scene, kind))]) for question, kind in kinds.items()]


def _order_questions(scene: Scene) -> Options:
    appears = _of_kind(scene, "appear")
    options = [
        ("Which shape appears first?", f"the {appears[0].shape}"),
        ("Which shape appears last?", f"the {appears[-1].shape}"),
    ]
    if leaves := _of_kind(scene, "leave"):
        options.append(("Which shape disappears first?", f"the {leaves[0].shape}"))
    for appear in appears:
        events = _of_shape(scene, appear.shape)
        if len(events) > 1:
            verb = _predicate(events[-1]).split(maxsplit=1)[1]
            options.append((f"What does the {appear.shape} do last?", f"it {verb}"))
    return options


def _sound_questions(scene: Scene) -> Options:
    sounds = _of_kind(scene, "sound")
    names = [SOUNDS[sound.value][0] for sound in sounds]
    options = [("Which sound is heard first?", names[0]), ("Which sound is heard last?", names[-1])]
    for event in _of_kind(scene, "appear", "move", "change", "leave", "blink"):
        # Only where the sound clearly covers the start of the event, and no other sound overlaps with it.
        heard = [sound for sound in sounds if sound.overlap_seconds(event) > 0]
        covers = heard and heard[0].start_seconds + 0.2 <= event.start_seconds <= heard[0].end_seconds - 0.4
        if len(heard) == 1 and covers:
            options.append((f"Which sound is heard when the {_predicate(event)}?", SOUNDS[heard[0].value][0]))
    return options


def _time_questions(scene: Scene) -> Options:
    """Ask in which half an event happens, with equally many options for both, so that no answer is the better guess."""
    middle = scene.duration_seconds / 2
    early: Options = []
    late: Options = []
    # The first event is always early, so that its answer could be guessed.
    for event in scene.events[1:]:
        if event.kind == "sound":
            question = f"When is {SOUNDS[event.value][0]} heard"
        else:
            shape, verb, *rest = _predicate(event).split()
            question = " ".join(["When does the", shape, verb.removesuffix("s"), *rest])
        question += f", {FIRST_HALF} or {SECOND_HALF}?"
        if event.end_seconds <= middle - CLEAR_SECONDS:
            early.append((question, FIRST_HALF))
        elif event.start_seconds >= middle + CLEAR_SECONDS:
            late.append((question, SECOND_HALF))
    return early * len(late) + late * len(early) if early and late else early + late


def _place_questions(scene: Scene) -> Options:
    options = [
        (f"Where does the {appear.shape} appear?", _name_place(appear.position, size=scene.size_pixels))
        for appear in _of_kind(scene, "appear")
    ]
    for item in objects_at(scene, scene.duration_seconds):
        if len(_of_shape(scene, item.shape)) > 1:
            place = _name_place(item.position, size=scene.size_pixels)
            options.append((f"Where is the {item.shape} at the end?", place))
    return options


def _name_place(position: Position, *, size: int) -> str:
    """Name the ninth of the frame that a position is in, for example "top left"."""
    column, row = (min(3 * value // size, 2) for value in position)
    return f"{('top', '', 'bottom')[row]} {('left', '', 'right')[column]}".strip() or "middle"


def _direction_questions(scene: Scene) -> Options:
    options = []
    for appear in _of_kind(scene, "appear"):
        moves = [event for event in _of_shape(scene, appear.shape) if event.kind == "move"]
        ways = [_predicate(move).split(maxsplit=2)[2] for move in moves]
        if len(ways) == 1:
            options.append((f"Which way does the {appear.shape} move?", ways[0]))
        elif ways:
            options.append((f"Which way does the {appear.shape} move first?", ways[0]))
            options.append((f"Which way does the {appear.shape} move last?", ways[-1]))
    return options


_QUESTIONS: dict[str, Callable[[Scene], Options]] = {
    "colour": _colour_questions,
    "count": _count_questions,
    "order": _order_questions,
    "sound": _sound_questions,
    "when": _time_questions,
    "where": _place_questions,
    "direction": _direction_questions,
}
