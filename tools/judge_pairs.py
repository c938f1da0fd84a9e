"""Write labelled pairs of captions, one with a known fault, that judges are checked on by `salmonn judge-benchmark`.

    python tools/judge_pairs.py [--out data/judge_pairs.jsonl] [--seed 4] [--pairs 135]

Each pair belongs to the clip that `sample_clip(SynthConfig(seed=seed), index=index)` tells of, each to another one.
Nothing is read, and the same seed writes the same bytes. Both captions leave out the same few events, so that the
better one is seldom perfect, and each has a wording of its own. `docs/judge_benchmark.md` lists the kinds of faults.
"""

import json
import random
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from statistics import mean
from typing import Any

from salmonn.preference.benchmark import LabelledPair, Where
from salmonn.records import Event, write_text
from salmonn.synthetic.annotate import FORMS, HEARD_PLURAL, NUMBERS
from salmonn.synthetic.phrases import COLOURS, DIRECTIONS, HEARD, MOVE, SHAPES, SOUNDS
from salmonn.synthetic.render import sample_clip
from salmonn.synthetic.scene import SceneEvent, SynthConfig

LEFT_OUT_BY_BOTH = (0, 1, 1, 2)
FEWEST_CLAUSES = 4  # of the better caption
MOST_HAPPENINGS = 8  # of a clip, lest the shipped file become large
THROUGHOUT = 0.3  # how often an object has its wrong colour or shape for as long as it is told of
CLEAR_SECONDS = 0.3  # by which a sound misses a deed that it is wrongly told to go with
# Said beside the happenings; none of it tells of one, nor begins with "it", which might be an object.
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
AS_ONE = ("as {deed}, {sound}", "just as {deed}, {sound}", "{sound} as {deed}", "{sound} just as {deed}")


@dataclass(frozen=True)
class Clause:
    """What one clause tells.

    Args:
        forms: the ways to say it.
        subject: "the red circle", for which "it" may stand; "" where nothing may.
        happening: when it is told to take place; None where that is not to be said.
        is_alone: whether it is a sentence of its own without an opener.
        is_then: whether "then" must lead it in.
    """

    forms: tuple[str, ...]
    subject: str = ""
    happening: SceneEvent | None = None
    is_alone: bool = False
    is_then: bool = False


@dataclass(frozen=True)
class Story:
    """A clip, and which of its happenings both captions tell."""

    happenings: tuple[SceneEvent, ...]
    told: tuple[SceneEvent, ...]
    events: tuple[Event, ...]  # one for each of the happenings

    @property
    def clauses(self) -> list[Clause]:
        return [say(happening) for happening in self.told]

    def left_out(self, *kinds: str) -> list[SceneEvent]:
        return [one for one in self.happenings if one not in self.told and one.kind in kinds]

    def places(self, *, sounds: bool) -> list[int]:
        """Where in the telling something is heard, or seen."""
        return [place for place, one in enumerate(self.told) if (one.kind == "sound") == sounds]


@dataclass(frozen=True)
class Draft:
    """Two tellings; `share` is how far into the caption the fault stands, 0 to 1, `events` differ from the clip's."""

    better: list[Clause]
    worse: list[Clause]
    gap: int
    share: float
    events: tuple[Event, ...] = ()


def main() -> None:
    """Write the pairs."""
    parser = ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, default=Path("data/judge_pairs.jsonl"), help="JSONL file for the pairs")
    parser.add_argument("--seed", type=int, default=4, help="another seed gives other clips and pairs")
    parser.add_argument("--pairs", type=int, default=135, help="of each kind")
    values = parser.parse_args()
    pairs = draw_pairs(seed=values.seed, number=values.pairs)
    write_text(values.out, "".join(to_line(pair) for pair in pairs))


def draw_pairs(*, seed: int, number: int) -> list[LabelledPair]:
    """So many pairs of each kind, the kinds in turn; a clip that has nothing for a kind is passed over."""
    pairs: list[LabelledPair] = []
    indices = count()
    for _ in range(number):
        for kind in FAULTS:
            drawn = (draw_pair(kind, seed=seed, index=index) for index in indices)
            pairs.append(next(pair for pair in drawn if pair))
    return pairs


def draw_pair(kind: str, *, seed: int, index: int) -> LabelledPair | None:
    """A pair on one clip, None where the clip has nothing that the kind is about."""
    rng = random.Random(f"pair {seed} {index}")
    scene, reference = sample_clip(SynthConfig(seed=seed), index=index)
    if len(scene.happenings) > MOST_HAPPENINGS:
        return None
    told = list(scene.happenings)
    for _ in range(rng.choice(LEFT_OUT_BY_BOTH)):
        told.pop(rng.choice(_removable(told)))
    draft = FAULTS[kind](Story(scene.happenings, tuple(told), reference.events), rng)
    if draft is None or len(draft.better) < FEWEST_CLAUSES:
        return None
    captions = tell(draft.better, rng), tell(draft.worse, rng)
    is_first = rng.random() < 0.5
    return LabelledPair(
        events=draft.events or reference.events,
        first=captions[0 if is_first else 1],
        second=captions[1 if is_first else 0],
        better="first" if is_first else "second",
        gap=draft.gap,
        kind=kind,
        where=_third(draft.share),
        seed=seed,
        index=index,
    )


def to_line(pair: LabelledPair) -> str:
    """One line of JSON, without spaces and without what every visual event would say, which halves the file."""
    value: dict[str, Any] = asdict(pair)
    for event in value["events"]:
        if event["modality"] == "visual":
            del event["modality"]
    return json.dumps(value, separators=(",", ":")) + "\n"


def say(happening: SceneEvent) -> Clause:
    """The clause of a happening, in all wordings of the synthetic world."""
    if happening.kind == "sound":
        return Clause(
            tuple(
                form.format(sound=sound)
                for sound in SOUNDS[happening.value]
                for form in (HEARD if sound.startswith("a ") else HEARD_PLURAL)
            ),
            happening=happening,
        )
    name = f"{happening.colour} {happening.shape}"
    a = f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
    forms = MOVE[happening.value] if happening.kind == "move" else FORMS[happening.kind]
    words = tuple(form.format(a=a, the=f"the {name}", colour=happening.value) for form in forms)
    return Clause(words, subject=f"the {name}", happening=happening)


def tell(clauses: Sequence[Clause], rng: random.Random) -> str:
    """A caption of sentences of one or two clauses; what it says on order and simultaneity is true, `is_then` aside."""
    sentences, place = [], 0
    while place < len(clauses):
        before, now = clauses[place - 1] if place else None, clauses[place]
        sentence = _opener(now, rng, before=before) + _words(now, rng, before=before)
        following = clauses[place + 1] if place + 1 < len(clauses) else None
        if following and not (now.is_alone or following.is_alone) and (following.is_then or rng.random() < 0.5):
            sentence += _joint(following, rng, before=now) + _words(following, rng, before=now)
            place += 1
        sentences.append(sentence[0].upper() + sentence[1:] + ".")
        place += 1
    return " ".join(sentences)


def _words(clause: Clause, rng: random.Random, *, before: Clause | None) -> str:
    words = rng.choice(clause.forms)
    if before and clause.subject and clause.subject == before.subject and rng.random() < 0.5:
        return words.replace(clause.subject, "it")
    return words


def _opener(clause: Clause, rng: random.Random, *, before: Clause | None) -> str:
    if clause.is_alone:
        return ""
    if before is None:
        return rng.choice(("", "", "First, "))
    later, at_once = _relation(before, clause)
    if clause.is_then:
        return rng.choice(("Then ", "Next, ", "After that, "))
    if later:
        return rng.choice(("", "", "Then ", "Next, ", "After that, "))
    return rng.choice(("", "Meanwhile, ", "At the same time, ")) if at_once else ""


def _joint(clause: Clause, rng: random.Random, *, before: Clause) -> str:
    later, at_once = _relation(before, clause)
    if clause.is_then:
        return rng.choice((", and then ", " and then "))
    if later:
        return rng.choice((", and ", ", and then ", " and then "))
    return rng.choice((", and ", " while ")) if at_once else ", and "


def _relation(before: Clause, now: Clause) -> tuple[bool, bool]:
    """Whether it begins when the one before is over, and whether both go on at once; neither where unknown."""
    if before.happening is None or now.happening is None:
        return False, False
    first, second = _while(before.happening), _while(now.happening)
    at_once = min(first[1], second[1]) - max(first[0], second[0]) >= 0
    return before.happening.end_seconds <= now.happening.start_seconds, at_once


def _while(happening: SceneEvent) -> tuple[float, float]:
    """When it goes on, start and end: to appear, change or leave takes no time."""
    is_sudden = happening.kind in ("appear", "change", "leave")
    return happening.start_seconds, happening.start_seconds if is_sudden else happening.end_seconds


def _removable(told: Sequence[SceneEvent]) -> list[int]:
    """What can be left out without being implied: what acts must have appeared, what is blue now has turned blue."""
    shapes = [one.shape for one in told]
    return [
        place
        for place, one in enumerate(told)
        if not (one.kind == "appear" and shapes.count(one.shape) > 1)
        and not (one.kind == "change" and one.shape in shapes[place + 1 :])
    ]


def _third(share: float) -> Where:
    return "start" if share < 1 / 3 else "middle" if share < 2 / 3 else "end"


def _share(places: Sequence[int], number: int) -> float:
    return mean((place + 0.5) / number for place in places)


def _leave_out(story: Story, rng: random.Random) -> Draft | None:
    """One to three neighbouring events more are left out."""
    options, number = _removable(story.told), rng.choice((1, 1, 2, 3))
    if len(options) < number or len(story.told) < number + 2:
        return None
    middle = rng.choice(options)
    gone = sorted(options, key=lambda place: abs(place - middle))[:number]
    worse = [clause for place, clause in enumerate(story.clauses) if place not in gone]
    return Draft(story.clauses, worse, number, _share(gone, len(story.told)))


def _recolour(story: Story, rng: random.Random) -> Draft | None:
    """An object, or what it turns to, has a colour that the clip does not know."""
    used = {one.colour for one in story.happenings} | {one.value for one in story.happenings}
    wrong = rng.choice([colour for colour in COLOURS if colour not in used])
    place = rng.choice(story.places(sounds=False))
    if story.told[place].kind == "change" and rng.random() < 0.5:
        return _replace(story, {place: replace(story.told[place], value=wrong)})
    places = _mentions(story, rng, place=place)
    return _replace(story, {place: replace(story.told[place], colour=wrong) for place in places})


def _reshape(story: Story, rng: random.Random) -> Draft | None:
    """An object has a shape that the clip does not know."""
    used = {one.shape for one in story.happenings}
    wrong = rng.choice([shape for shape in SHAPES if shape not in used])
    places = _mentions(story, rng, place=rng.choice(story.places(sounds=False)))
    return _replace(story, {place: replace(story.told[place], shape=wrong) for place in places})


def _mentions(story: Story, rng: random.Random, *, place: int) -> list[int]:
    """The place, or now and then all where the object is told of in the same colour."""
    one = story.told[place]
    if rng.random() >= THROUGHOUT:
        return [place]
    return [other for other, deed in enumerate(story.told) if (deed.shape, deed.colour) == (one.shape, one.colour)]


def _replace(story: Story, wrong: dict[int, SceneEvent]) -> Draft:
    # No "it" for a wrong object: each clause is wrong by itself.
    worse = [
        replace(say(wrong[place]), subject="") if place in wrong else clause
        for place, clause in enumerate(story.clauses)
    ]
    return Draft(story.clauses, worse, len(wrong), _share(list(wrong), len(worse)))


def _miscount(story: Story, rng: random.Random) -> Draft | None:
    """A wrong number of beeps, clicks or shapes."""
    counted = [place for place in story.places(sounds=True) if story.told[place].value in ("beeps", "clicks")]
    if not counted or rng.random() < 0.4:
        return _miscount_shapes(story, rng)
    place = rng.choice(counted)
    sound = story.told[place]
    number = count_pulses(sound)
    better, worse = story.clauses, story.clauses
    for clauses, told in ((better, number), (worse, _other_number(number, rng))):
        clauses[place] = Clause(
            _count(told, f"{sound.value} are heard", f"{sound.value} can be heard"), happening=sound
        )
    events = list(story.events)
    at = story.happenings.index(sound)
    events[at] = replace(events[at], text=f"{NUMBERS[number]} {sound.value} are heard")
    return Draft(better, worse, 1, _share([place], len(worse)), tuple(events))


def _miscount_shapes(story: Story, rng: random.Random) -> Draft:
    appearing = [event for event, one in zip(story.events, story.happenings, strict=True) if one.kind == "appear"]
    number = len(appearing)
    place = rng.randint(0, len(story.told))
    better, worse = story.clauses, story.clauses
    for clauses, told in ((better, number), (worse, _other_number(number, rng))):
        clauses.insert(place, Clause(_count(told, "shapes appear in all", "shapes show up in all"), is_alone=True))
    event = Event(
        f"{NUMBERS[number]} shapes appear in all", "visual", appearing[0].start_seconds, appearing[-1].end_seconds
    )
    return Draft(better, worse, 1, _share([place], len(worse)), (*story.events, event))


def _count(number: int, *nouns: str) -> tuple[str, ...]:
    return tuple(f"{NUMBERS[number]} {noun}" for noun in nouns)


def _other_number(number: int, rng: random.Random) -> int:
    return rng.choice([other for other in range(2, len(NUMBERS)) if 0 < abs(other - number) <= 2])


def count_pulses(sound: SceneEvent) -> int:
    """How many beeps or clicks the clip has, as `salmonn.synthetic.render` renders them."""
    seconds = sound.end_seconds - sound.start_seconds
    if sound.value == "beeps":
        return 3 if seconds < 1.2 else 4
    return min(max(round(seconds / 0.25), 4), 6)


def _invent(story: Story, rng: random.Random) -> Draft | None:
    """One or two events that are not in the clip, and that no event left out could be taken for."""
    options = [
        (place, clause)
        for invent in (_invent_sound, _invent_object, _invent_move, _invent_blink)
        for place in [rng.randint(1, len(story.told))]
        if (clause := invent(story, rng, after=story.told[place - 1]))
    ]
    number = rng.choice((1, 1, 2))
    if len(options) < number:
        return None
    worse, places = story.clauses, []
    for shift, (place, clause) in enumerate(sorted(rng.sample(options, number), key=lambda option: option[0])):
        worse.insert(place + shift, clause)
        places.append(place + shift)
    return Draft(story.clauses, worse, number, _share(places, len(worse)))


def _invent_sound(story: Story, rng: random.Random, *, after: SceneEvent) -> Clause | None:
    del after
    heard = {one.value for one in story.happenings}
    unheard = rng.choice([kind for kind in SOUNDS if kind not in heard])
    return None if story.left_out("sound") else _untimed(SceneEvent("sound", 0, 0, value=unheard))


def _invent_object(story: Story, rng: random.Random, *, after: SceneEvent) -> Clause | None:
    del after
    used = {word for one in story.happenings for word in (one.shape, one.colour, one.value)}
    shape, colour = (rng.choice([word for word in words if word not in used]) for words in (SHAPES, list(COLOURS)))
    return _untimed(SceneEvent("appear", 0, 0, shape=shape, colour=colour))


def _invent_move(story: Story, rng: random.Random, *, after: SceneEvent) -> Clause | None:
    moves = [one.value for one in story.happenings if one.shape == after.shape and one.kind == "move"]
    options = [direction for direction in DIRECTIONS if direction not in moves]
    hidden = [one for one in story.left_out("move") if one.shape == after.shape]
    if hidden or not options or after.kind in ("sound", "leave"):
        return None
    return _untimed(_deed_after(after, "move", value=rng.choice(options)))


def _invent_blink(story: Story, rng: random.Random, *, after: SceneEvent) -> Clause | None:
    del rng
    blinks = any(one.shape == after.shape and one.kind == "blink" for one in story.happenings)
    return None if blinks or after.kind in ("sound", "leave") else _untimed(_deed_after(after, "blink", value=""))


def _deed_after(after: SceneEvent, kind: Any, *, value: str) -> SceneEvent:
    colour = after.value if after.kind == "change" else after.colour
    return replace(after, kind=kind, colour=colour, value=value)


def _untimed(happening: SceneEvent) -> Clause:
    return replace(say(happening), subject="", happening=None)


def _swap(story: Story, rng: random.Random) -> Draft | None:
    """Two visual events, told one right after the other, the wrong way round."""
    options = []
    for place, (one, other) in enumerate(zip(story.told, story.told[1:], strict=False)):
        # That a shape appears before it acts and leaves afterwards goes without saying.
        is_plain = one.shape == other.shape and (one.kind == "appear" or other.kind == "leave")
        if "sound" not in (one.kind, other.kind) and one.end_seconds <= other.start_seconds and not is_plain:
            options.append(place)
    if not options:
        return None
    place = rng.choice(options)
    better, worse = story.clauses, story.clauses
    earlier, later = better[place : place + 2]
    better[place : place + 2] = earlier, replace(later, is_then=True)
    worse[place : place + 2] = later, replace(earlier, is_then=True)
    return Draft(better, worse, 1, _share([place, place + 1], len(worse)))


def _missource(story: Story, rng: random.Random) -> Draft | None:
    """A sound goes with the deed of another shape than in the clip, where it is not heard."""
    options = []
    for heard in story.places(sounds=True):
        sound = story.told[heard]
        seen = [(place, story.told[place]) for place in story.places(sounds=False)]
        with_it = [one for one in seen if sound.start_seconds + 0.2 <= one[1].start_seconds <= sound.end_seconds - 0.4]
        without = [one for one in seen if one[1].overlaps(sound) <= -CLEAR_SECONDS]
        options += [(heard, *one, *two) for one in with_it for two in without if one[1].shape != two[1].shape]
    if not options:
        return None
    heard, right_place, right, wrong_place, wrong = rng.choice(options)
    sound = story.told[heard]
    better, worse = story.clauses, story.clauses
    better[right_place] = _as_one(sound, right, rng)
    worse[wrong_place] = _as_one(sound, wrong, rng)
    for clauses in (better, worse):
        del clauses[heard]
    events = list(story.events)
    at, deed = story.happenings.index(sound), story.events[story.happenings.index(right)]
    events[at] = replace(events[at], text=f"{events[at].text} as {deed.text}")
    place = wrong_place - (heard < wrong_place)
    return Draft(better, worse, 1, _share([place], len(worse)), tuple(events))


def _as_one(sound: SceneEvent, deed: SceneEvent, rng: random.Random) -> Clause:
    words = (rng.choice(say(happening).forms) for happening in (deed, sound))
    form = rng.choice(AS_ONE).format(**dict(zip(("deed", "sound"), words, strict=True)))
    return Clause((form,), is_alone=True)


def _repeat(story: Story, rng: random.Random) -> Draft | None:
    """One or two clauses are said again later on, word for word or in other words."""
    number, is_verbatim = rng.choice((1, 2)), rng.random() < 0.5
    first = rng.randint(0, len(story.told) - number)
    worse = story.clauses
    again = []
    for place in range(first, first + number):
        words = rng.choice(worse[place].forms)
        others = tuple(form for form in worse[place].forms if form != words)
        worse[place] = replace(worse[place], forms=(words,), subject="")
        again.append(Clause((words,) if is_verbatim else others, is_alone=True))
    place = rng.randint(first + number, len(worse))
    worse[place:place] = again
    return Draft(story.clauses, worse, 0, _share(range(place, place + number), len(worse)))


def _pad(story: Story, rng: random.Random) -> Draft | None:
    """One to three sentences that tell of nothing in the clip."""
    number, place = rng.randint(1, 3), rng.randint(0, len(story.told))
    worse = story.clauses
    worse[place:place] = [Clause((words,), is_alone=True) for words in rng.sample(PADDING, number)]
    return Draft(story.clauses, worse, 0, _share(range(place, place + number), len(worse)))


FAULTS: dict[str, Callable[[Story, random.Random], Draft | None]] = {
    "left_out": _leave_out,
    "colour": _recolour,
    "object": _reshape,
    "number": _miscount,
    "invented": _invent,
    "order": _swap,
    "source": _missource,
    "repetition": _repeat,
    "padding": _pad,
}

if __name__ == "__main__":
    main()
