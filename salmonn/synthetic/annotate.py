"""Happenings into words: the event list, captions good and hasty, and questions with short answers.

The event list uses the canonical phrasings of `phrases.py`, captions any of them. Every clause of a caption has its own
subject and verb, so that a judge can read it alone, save that "it" stands for the subject of the clause just before.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from salmonn.records import Event, Question, Reference
from salmonn.synthetic import phrases
from salmonn.synthetic.phrases import COLOURS, DIRECTIONS, HEARD, MOVE, SHAPES, SOUNDS
from salmonn.synthetic.scene import Place, Scene, SceneEvent, objects_at

FORMS = {"appear": phrases.APPEAR, "leave": phrases.LEAVE, "blink": phrases.BLINK, "change": phrases.CHANGE}
# "repeated beeps" takes the forms that do not show the number.
HEARD_PLURAL = ("{sound} can be heard", "we hear {sound}")
OPENERS = ("", "", "Then ", "Next, ", "After that, ")
JOINTS = (", and ", ", and then ", " and then ")
# What goes wrong in a hasty caption. People who describe videos leave out half of what is heard and some of what is
# small: a third of all events here.
LEFT_OUT = {"appear": 0.1, "move": 0.2, "change": 0.2, "blink": 0.3, "leave": 0.3, "sound": 0.55}
# They have habits: who looks away while a shape blinks says that it is gone, and a change of colour is told as a new
# shape, this often. Slips average out in a captioner that learns from many captions; habits are what it copies.
MISREAD = 0.7
# And they slip: how often a caption has one invented event, one wrong detail or one clause said twice.
INVENTED, WRONG, TWICE = 0.2, 0.1, 0.05
NUMBERS = ("none", "one", "two", "three", "four", "five", "six")
QUESTION_KINDS = ("colour", "count", "order", "sound", "when", "where", "direction")
CLEAR_SECONDS = 0.5


def write_reference(
    scene: Scene, rng: random.Random, *, video: str, index: int = 0, num_questions: int = 3
) -> Reference:
    """All that is known about a scene in words; `index` rotates the kinds of questions from clip to clip."""
    happenings = scene.happenings
    visual = [happening for happening in happenings if happening.kind != "sound"]
    sounds = [happening for happening in happenings if happening.kind == "sound"]
    return Reference(
        video=video,
        events=write_events(happenings),
        caption=write_caption(happenings, rng),
        visual_caption=write_caption(visual, rng),
        audio_caption=write_caption(sounds, rng),
        questions=write_questions(scene, rng, index=index, number=num_questions),
        # Last, so that other habits of hasty writers would leave all the rest of a set as it is.
        human_caption=write_human_caption(happenings, rng),
        duration_seconds=scene.duration_seconds,
    )


def write_events(happenings: Sequence[SceneEvent]) -> tuple[Event, ...]:
    """One event for each happening, in the canonical words."""
    return tuple(
        Event(
            _canonical(happening),
            "audio" if happening.kind == "sound" else "visual",
            happening.start_seconds,
            happening.end_seconds,
        )
        for happening in happenings
    )


def write_caption(happenings: Sequence[SceneEvent], rng: random.Random) -> str:
    """Tell the happenings in the given order, in sentences of one or two clauses."""
    sentences, position = [], 0
    while position < len(happenings):
        size = 2 if rng.random() < 0.55 and position + 1 < len(happenings) else 1
        sentence = _write_opener(happenings, rng, position=position, size=size)
        for place in range(position, position + size):
            before = happenings[place - 1] if place else None
            if place > position:
                sentence += _write_joint(happenings[place], rng, before=happenings[place - 1])
            sentence += _write_clause(happenings[place], rng, before=before)
        sentences.append(sentence[0].upper() + sentence[1:] + ".")
        position += size
    return " ".join(sentences)


def write_human_caption(happenings: Sequence[SceneEvent], rng: random.Random) -> str:
    """A caption by somebody in a hurry: a third of the events is left out, sounds most, and some things are wrong."""
    told = [happening for happening in happenings if rng.random() >= LEFT_OUT[happening.kind]]
    told = told or [rng.choice(happenings)]
    told = [_misread(happening) if rng.random() < MISREAD else happening for happening in told]
    if rng.random() < WRONG:
        place = rng.randrange(len(told))
        told[place] = _mistake(told[place], rng, happenings=happenings)
    if rng.random() < INVENTED:
        place = rng.randint(1, len(told))
        told.insert(place, _invent(rng, happenings=happenings, after=told[place - 1]))
    if rng.random() < TWICE:
        place = rng.randrange(len(told))
        told.insert(rng.randint(place + 1, len(told)), told[place])
    return write_caption(told, rng)


def write_questions(scene: Scene, rng: random.Random, *, index: int = 0, number: int = 3) -> tuple[Question, ...]:
    """Questions of different kinds, which rotate from clip to clip so that each comes equally often.

    A kind that the scene cannot answer without doubt gives way to the next one.
    """
    first = index * number
    kinds = [QUESTION_KINDS[(first + step) % len(QUESTION_KINDS)] for step in range(len(QUESTION_KINDS))]
    questions: list[Question] = []
    for kind in kinds:
        options = _ASKERS[kind](_Story(scene))
        if options and len(questions) < number:
            questions.append(Question(*rng.choice(options), kind=kind))
    return tuple(questions)


def _object(happening: SceneEvent, *, article: str) -> str:
    if article == "a" and happening.colour[:1] in "aeiou":
        article = "an"
    return f"{article} {happening.colour} {happening.shape}"


def _canonical(happening: SceneEvent) -> str:
    if happening.kind == "sound":
        return HEARD[0].format(sound=SOUNDS[happening.value][0])
    forms = MOVE[happening.value] if happening.kind == "move" else FORMS[happening.kind]
    return forms[0].format(
        a=_object(happening, article="a"), the=_object(happening, article="the"), colour=happening.value
    )


def _write_clause(happening: SceneEvent, rng: random.Random, *, before: SceneEvent | None) -> str:
    if happening.kind == "sound":
        sound = rng.choice(SOUNDS[happening.value])
        return rng.choice(HEARD if sound.startswith("a ") else HEARD_PLURAL).format(sound=sound)
    the = _object(happening, article="the")
    if before and before.shape == happening.shape and rng.random() < 0.5:
        the = "it"
    forms = MOVE[happening.value] if happening.kind == "move" else FORMS[happening.kind]
    # The canonical form more often than its share, as one wording does prevail among annotators.
    form = forms[0] if rng.random() < 0.3 else rng.choice(forms)
    return form.format(a=_object(happening, article="a"), the=the, colour=happening.value)


def _at_once(happening: SceneEvent, before: SceneEvent) -> bool:
    return (happening.kind == "sound") != (before.kind == "sound") and happening.overlaps(before) > 0


def _write_opener(happenings: Sequence[SceneEvent], rng: random.Random, *, position: int, size: int) -> str:
    if position == 0:
        return rng.choice(("", "", "First, ", "At the start, "))
    if position + size == len(happenings) and size == 1 and rng.random() < 0.5:
        return "Finally, "
    if _at_once(happenings[position], happenings[position - 1]) and rng.random() < 0.5:
        return rng.choice(("Meanwhile, ", "At the same time, "))
    return rng.choice(OPENERS)


def _write_joint(happening: SceneEvent, rng: random.Random, *, before: SceneEvent) -> str:
    if _at_once(happening, before) and rng.random() < 0.5:
        return " while "
    return rng.choice(JOINTS)


def _unused_colours(happenings: Sequence[SceneEvent]) -> list[str]:
    used = {happening.colour for happening in happenings} | {happening.value for happening in happenings}
    return [colour for colour in COLOURS if colour not in used]


def _unheard(happenings: Sequence[SceneEvent]) -> list[str]:
    return [kind for kind in SOUNDS if kind not in {happening.value for happening in happenings}]


def _unmoved(happenings: Sequence[SceneEvent], *, shape: str) -> list[str]:
    moves = {happening.value for happening in happenings if happening.shape == shape and happening.kind == "move"}
    return [direction for direction in DIRECTIONS if direction not in moves]


def _misread(happening: SceneEvent) -> SceneEvent:
    """The same happening as a hurried watcher takes it; most kinds are plain to see."""
    if happening.kind == "blink":
        return replace(happening, kind="leave")
    if happening.kind == "change":
        return replace(happening, kind="appear", colour=happening.value, value="")
    return happening


def _mistake(happening: SceneEvent, rng: random.Random, *, happenings: Sequence[SceneEvent]) -> SceneEvent:
    """The same happening with one detail wrong: what was heard, where to, or a colour."""
    unmoved = _unmoved(happenings, shape=happening.shape)
    if happening.kind == "sound":
        return replace(happening, value=rng.choice(_unheard(happenings)))
    if happening.kind == "move" and unmoved:
        return replace(happening, value=rng.choice(unmoved))
    colour = rng.choice(_unused_colours(happenings))
    return replace(happening, value=colour) if happening.kind == "change" else replace(happening, colour=colour)


def _invent(rng: random.Random, *, happenings: Sequence[SceneEvent], after: SceneEvent) -> SceneEvent:
    """Something that is not in the clip, at the time of `after`: a sound, a new object, or a deed of an object."""
    now = replace(after, start_seconds=after.end_seconds)
    shapes = {happening.shape for happening in happenings}
    unmoved = _unmoved(happenings, shape=after.shape)
    kind = rng.choice(("sound", "appear", "move"))
    if kind == "move" and after.shape and after.kind != "leave" and unmoved:
        colour = after.value if after.kind == "change" else after.colour
        return replace(now, kind="move", colour=colour, value=rng.choice(unmoved))
    if kind == "sound":
        return replace(now, kind="sound", shape="", colour="", value=rng.choice(_unheard(happenings)))
    return replace(
        now,
        kind="appear",
        shape=rng.choice([shape for shape in SHAPES if shape not in shapes]),
        colour=rng.choice(_unused_colours(happenings)),
        value="",
    )


@dataclass(frozen=True)
class _Story:
    """A scene as the questions look at it."""

    scene: Scene

    def all(self, *kinds: str) -> list[SceneEvent]:
        return [happening for happening in self.scene.happenings if happening.kind in kinds]

    def deeds(self, shape: str) -> list[SceneEvent]:
        return [happening for happening in self.scene.happenings if happening.shape == shape]


Options = list[tuple[str, str]]  # questions with their answers


def _ask_colour(story: _Story) -> Options:
    options = []
    for appear in story.all("appear"):
        options.append((f"What colour is the {appear.shape} when it appears?", appear.colour))
        changes = [deed.value for deed in story.deeds(appear.shape) if deed.kind == "change"]
        if changes:
            options.append((f"What colour is the {appear.shape} at the end?", changes[-1]))
    return options


def _ask_count(story: _Story) -> Options:
    counts = {
        "How many shapes appear?": len(story.all("appear")),
        "How many sounds are heard?": len(story.all("sound")),
        "How many shapes disappear?": len(story.all("leave")),
        "How many times does a shape move?": len(story.all("move")),
        "How many shapes blink?": len(story.all("blink")),
    }
    return [(question, NUMBERS[count]) for question, count in counts.items()]


def _ask_order(story: _Story) -> Options:
    appears = story.all("appear")
    options = [
        ("Which shape appears first?", f"the {appears[0].shape}"),
        ("Which shape appears last?", f"the {appears[-1].shape}"),
    ]
    if leaves := story.all("leave"):
        options.append(("Which shape disappears first?", f"the {leaves[0].shape}"))
    for appear in appears:
        deeds = story.deeds(appear.shape)
        if len(deeds) > 1:
            options.append((f"What does the {appear.shape} do last?", "it " + _deed(deeds[-1]).split(maxsplit=1)[1]))
    return options


def _ask_sound(story: _Story) -> Options:
    sounds = story.all("sound")
    names = [SOUNDS[sound.value][0] for sound in sounds]
    options = [("Which sound is heard first?", names[0]), ("Which sound is heard last?", names[-1])]
    for deed in story.all("appear", "move", "change", "leave", "blink"):
        heard = [sound for sound in sounds if sound.overlaps(deed) > 0]
        # Asked only where one sound covers the deed's beginning well and no other comes near.
        covers = heard and heard[0].start_seconds + 0.2 <= deed.start_seconds <= heard[0].end_seconds - 0.4
        if len(heard) == 1 and covers:
            options.append((f"Which sound is heard when the {_deed(deed)}?", SOUNDS[heard[0].value][0]))
    return options


def _deed(happening: SceneEvent) -> str:
    """Subject without colour and verb, such as "circle moves to the left"."""
    return _canonical(happening).split(happening.colour + " ", maxsplit=1)[1]


def _ask_when(story: _Story) -> Options:
    """As many options for one half as for the other, lest one answer be the safe guess."""
    middle = story.scene.duration_seconds / 2
    halves: dict[str, Options] = {"in the first half": [], "in the second half": []}
    # The first happening is always early and would give its answer away.
    for happening in story.scene.happenings[1:]:
        if happening.end_seconds <= middle - CLEAR_SECONDS:
            half = "in the first half"
        elif happening.start_seconds >= middle + CLEAR_SECONDS:
            half = "in the second half"
        else:
            continue
        question = f"{_ask_time(happening)}, in the first half or in the second half?"
        halves[half].append((question, half))
    early, late = halves.values()
    return early * len(late) + late * len(early) if early and late else early + late


def _ask_time(happening: SceneEvent) -> str:
    if happening.kind == "sound":
        return f"When is {SOUNDS[happening.value][0]} heard"
    shape, verb, *rest = _deed(happening).split()
    return " ".join(["When does the", shape, verb.removesuffix("s"), *rest])


def _ask_where(story: _Story) -> Options:
    size = story.scene.size_pixels
    options = [
        (f"Where does the {appear.shape} appear?", _place(appear.place, size=size)) for appear in story.all("appear")
    ]
    for thing in objects_at(story.scene, story.scene.duration_seconds):
        if len(story.deeds(thing.shape)) > 1:
            options.append((f"Where is the {thing.shape} at the end?", _place(thing.place, size=size)))
    return options


def _place(place: Place, *, size: int) -> str:
    """The ninth of the picture, such as "top left"."""
    column, row = (min(3 * value // size, 2) for value in place)
    return f"{('top', '', 'bottom')[row]} {('left', '', 'right')[column]}".strip() or "middle"


def _ask_direction(story: _Story) -> Options:
    options = []
    for appear in story.all("appear"):
        moves = [_deed(deed).split(maxsplit=2)[2] for deed in story.deeds(appear.shape) if deed.kind == "move"]
        if len(moves) == 1:
            options.append((f"Which way does the {appear.shape} move?", moves[0]))
        elif moves:
            options.append((f"Which way does the {appear.shape} move first?", moves[0]))
            options.append((f"Which way does the {appear.shape} move last?", moves[-1]))
    return options


_ASKERS: dict[str, Callable[[_Story], Options]] = {
    "colour": _ask_colour,
    "count": _ask_count,
    "order": _ask_order,
    "sound": _ask_sound,
    "when": _ask_when,
    "where": _ask_where,
    "direction": _ask_direction,
}
