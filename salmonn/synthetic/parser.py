"""Captions into claims: which event each clause tells of.

`parse_claims` cuts a caption into clauses and reads each by its words (`lexicon.py`), not by templates. It knows the
world of synthetic clips (`salmonn/synthetic/phrases.py`); the texts of the event list are read by the same parser, so a
judge needs texts only.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from salmonn.records import Event, EventModality, Reference
from salmonn.synthetic import phrases
from salmonn.synthetic.lexicon import FILLER_WORDS, LEXICON, join_phrases

# What `Claim.details` holds, in order, for each kind; "" stands for a detail that the text does not tell.
DETAILS = {
    "appear": ("colour", "shape"),
    "leave": ("colour", "shape"),
    "blink": ("colour", "shape"),
    "move": ("colour", "shape", "direction"),
    "change": ("colour", "shape", "to_colour"),
    "sound": ("sound",),
    "unreadable": ("words",),
}
# A clause that is read may hold this many words that mean nothing here; with more, they count as a claim of their own.
MAX_UNREAD_WORDS = 4

_WORD = re.compile(r"[a-z0-9']+")
# Where clauses part. What is named first is passed over: these words belong together.
_BREAK = re.compile(
    r"\bon and off\b|\bback and forth\b|\bover and over\b|\bone after (?:an|the )other\b|\bas well\b|\d[.,]\d"
    r"|(?P<sentence>[.!?;:\n]+)"
    r"|(?P<joint>,|\b(?:and|then|while|whilst|as|when|before|until|after(?!\s+(?:that|this|which)\b)|but|with"
    r"|meanwhile|(?:followed|accompanied) by)\b)",
    re.IGNORECASE,
)
_STOPS = re.compile(
    r"\b(?:stop|(?<!the )end|cease|fade)(?:s|ped|ed|d)?\b(?! in\b)|\bdies (?:away|down)\b", re.IGNORECASE
)
_ANEW = re.compile(r"\b(?:a|an|some|another)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Claim:
    """One fact that a text tells.

    Args:
        kind: appear, leave, blink, move, change, sound, or unreadable.
        details: what `DETAILS` names for the kind; "" where the text does not tell. For unreadable the clause's words.
        modality: audio for sounds, visual for the rest.
        clause: the words that tell it, as they stand in the text.
        clause_number: which clause of the text that is, so that claims of one clause can be told from those of two
            that read alike.
    """

    kind: str
    details: tuple[str, ...]
    modality: EventModality
    clause: str
    clause_number: int


@dataclass(frozen=True)
class Clause:
    """A piece of a text; `joint` is the word that leads it in ("" where none does), `sentence` counts from 0."""

    text: str
    joint: str
    sentence: int


def parse_claims(text: str) -> list[Claim]:
    """Read the claims of a caption, in the order in which it tells them ("B after A" tells A first).

    A clause with content that cannot be read is a claim of kind "unreadable"; fillers ("The clip ends.") and denials
    ("the circle does not move") are none. A bare mention ("a red circle") claims that the object appears.
    """
    return list(_parse(text))


@lru_cache(maxsize=8192)
def _parse(text: str) -> tuple[Claim, ...]:
    reader = _Reader()
    for clause in split_clauses(text):
        reader.read(clause)
    return reader.finish()


def split_clauses(text: str) -> Iterator[Clause]:
    """Cut a text at sentence ends, commas, semicolons and conjunctions; "on and off" stays whole. No empty pieces."""
    start, joint, sentence = 0, "", 0
    for match in _BREAK.finditer(text):
        if match.lastgroup is None:
            continue
        piece = text[start : match.start()].strip()
        if piece:
            yield Clause(piece, joint, sentence)
        start = match.end()
        # The last of several joints counts (", and then"), save that a bare comma says less than the word before it.
        if match.lastgroup == "sentence":
            joint, sentence = "", sentence + 1
        elif piece or match[0] != ",":
            joint = match[0].lower()
    piece = text[start:].strip()
    if piece:
        yield Clause(piece, joint, sentence)


@dataclass(frozen=True)
class _Thing:
    colour: str = ""
    shape: str = ""
    word: str = ""  # how it is referred to: "a", "it", "they", "one", or "" for a definite noun


@dataclass
class _Sketch:
    """What the words of one clause say, before names are resolved."""

    things: list[_Thing] = field(default_factory=list)
    verbs: list[list[str]] = field(default_factory=list)  # [kind, direction or new colour]
    directions: list[str] = field(default_factory=list)
    sounds: set[str] = field(default_factory=set)
    sees: bool = False
    hears: bool = False
    verb_first: bool = False  # "there is a red circle"
    relative: bool = False  # "a red circle that moves": it is there, and it moves
    denied: bool = False
    loose_colour: str = ""
    stranger: str = ""  # unknown words ahead of the verb: "a dog (moves)"
    num_unknown: int = 0

    @property
    def sound(self) -> str | None:
        """The kind of sound told of, "" for a sound of no kind, None for no sound."""
        sounds = self.sounds
        # "a low and a high tone": a pitch by itself is a tone where the clause says nothing else.
        if not sounds & {"tone", "beeps", "clicks", "noise"} and (self.things or self.verbs or not sounds):
            return None
        climbs = set() if self.things else {*self.directions, *(value for kind, value in self.verbs if kind == "move")}
        tests = (
            ("beeps", "beeps" in sounds),
            ("clicks", "clicks" in sounds),
            ("rising sweep", "up" in climbs),
            ("falling sweep", "down" in climbs),
            ("noise", "noise" in sounds),
            ("low tone", "low" in sounds),
            ("high tone", "high" in sounds),
        )
        return next((kind for kind, found in tests if found), "")


class _Sketcher:
    """Reads the words of one clause from left to right."""

    def __init__(self) -> None:
        self.sketch = _Sketch()
        self.colour = self.article = ""
        self.behind_from = self.behind_at = False

    def take(self, word: str) -> None:
        tag, value = LEXICON.get(word, ("", ""))
        if tag in ("verb", "climb"):
            self.sketch.verbs.append([value, ""] if tag == "verb" else ["move", value])
        elif tag in ("shape", "any", "one"):
            self._take_thing(tag, value)
        elif tag == "colour":
            self._take_colour(value)
        elif tag == "direction":
            self._take_direction(value, adverb="ward" in word)
        elif tag in ("it", "they"):
            self.sketch.things.append(_Thing(word=tag))
        elif tag == "sound":
            self.sketch.sounds.add(value)
        elif tag:
            self._take_sign(tag)
        elif word not in FILLER_WORDS and not word.isdigit():
            self._take_unknown(word)

    def _take_unknown(self, word: str) -> None:
        sketch = self.sketch
        if word.endswith("n't"):
            sketch.denied = True
            return
        sketch.num_unknown += 1
        if not sketch.verbs and not sketch.things and not word.endswith("ly"):
            sketch.stranger = f"{sketch.stranger} {word}".strip()

    def _take_sign(self, tag: str) -> None:
        sketch = self.sketch
        if tag == "a":
            self.article = tag
        elif tag == "see":
            sketch.sees, sketch.verb_first = True, sketch.verb_first or not sketch.things
        elif tag == "hear":
            sketch.hears = True
        elif tag == "no":
            sketch.denied = True
        elif tag == "that":
            sketch.relative |= sketch.sees and bool(sketch.things)
        self.behind_from, self.behind_at = tag == "from", tag == "at"

    def _take_thing(self, tag: str, shape: str) -> None:
        sketch = self.sketch
        # "moves past the blue square" and "turns into a square" name no new subject.
        if (tag != "one" or self.colour) and not (sketch.verbs and sketch.things):
            sketch.verb_first |= bool(sketch.verbs)
            sketch.things.append(_Thing(self.colour, shape, self.article if tag == "shape" else tag))
        self.colour = self.article = sketch.loose_colour = ""
        self.behind_at = False

    def _take_colour(self, colour: str) -> None:
        sketch = self.sketch
        changes = [verb for verb in sketch.verbs if verb[0] == "change"]
        if changes and sketch.things and not changes[-1][1] and not self.behind_from:
            changes[-1][1] = colour
        elif sketch.things and not sketch.things[-1].colour and (self.behind_from or not sketch.verbs):
            # "turns from red to blue", "the circle is red"
            sketch.things[-1] = _Thing(colour, sketch.things[-1].shape, sketch.things[-1].word)
        else:
            self.colour = sketch.loose_colour = sketch.loose_colour or colour
        self.behind_from = False

    def _take_direction(self, direction: str, *, adverb: bool) -> None:
        verbs = self.sketch.verbs
        # "from the left" and "on the left" are places.
        if adverb or not (self.behind_from or self.behind_at):
            self.sketch.directions.append(direction)
            if verbs and verbs[-1] == ["change", ""]:
                verbs[-1][0] = "move"
            if verbs and verbs[-1] == ["move", ""]:
                verbs[-1][1] = direction
        self.behind_from = self.behind_at = False


@lru_cache(maxsize=65536)
def _sketch(text: str) -> _Sketch:
    """Sketch a clause in lower case. Cached, since captions of one world share most of their clauses: do not change."""
    sketcher = _Sketcher()
    for word in _WORD.findall(join_phrases(text)):
        sketcher.take(word)
    sketch = sketcher.sketch
    # "slides out of view" goes away, that is all.
    if any(kind in ("appear", "leave") for kind, _ in sketch.verbs):
        sketch.verbs = [verb for verb in sketch.verbs if verb != ["move", ""]]
    # "and blue it turns", or "turns blue" with its subject left out.
    for verb in sketch.verbs:
        if verb[0] == "change" and not verb[1]:
            verb[1] = sketch.loose_colour
    return sketch


class _Reader:
    """Reads clauses in turn, knowing what was named before."""

    def __init__(self) -> None:
        self.groups: list[list[Claim]] = []  # the claims of each clause
        self.named: list[_Thing] = []  # the latest last
        self.sound = ""  # the latest
        self.sounds: set[str] = set()
        self.subjects: list[_Thing] = []
        self.pending: list[tuple[_Thing, str]] = []  # named in this sentence, still without a verb
        self.verbs: list[list[str]] = []  # of the clause before, in the same sentence
        self.verb_first = False
        self.sentence = -1
        self.swap = False  # "Before A, B": B goes ahead of A

    def read(self, clause: Clause) -> None:
        is_first = clause.sentence != self.sentence
        if is_first:
            self._flush()
            self.sentence, self.verbs, self.verb_first, self.swap = clause.sentence, [], False, False
        self.groups.append([])
        sketch = _sketch(clause.text.lower())
        if sketch.denied:
            self._refuse(sketch, clause.text)
            return
        is_read = self._read_sound(sketch, clause.text)
        is_read |= self._read_sight(sketch, clause.text)
        if sketch.num_unknown > MAX_UNREAD_WORDS or (not is_read and (sketch.num_unknown or sketch.loose_colour)):
            self._add("unreadable", (_normal(clause.text),), clause.text)
        self._order(clause.joint, is_first=is_first)

    def finish(self) -> tuple[Claim, ...]:
        self._flush()
        return tuple(claim for group in self.groups for claim in group)

    def _refuse(self, sketch: _Sketch, text: str) -> None:
        if sketch.num_unknown and not sketch.things and sketch.sound is None:
            self._add("unreadable", (_normal(text),), text)

    def _order(self, joint: str, *, is_first: bool) -> None:
        """Put the clause just read ahead of the one before it, where "after" or "before" says so."""
        groups = self.groups
        if groups[-1] and not is_first and (self.swap or joint == "after"):
            groups[-1], groups[-2] = groups[-2], groups[-1]
        if groups[-1]:
            self.swap = is_first and joint == "before"

    def _read_sound(self, sketch: _Sketch, text: str) -> bool:
        sound = sketch.sound
        if sound is None and sketch.hears and not any(thing.shape for thing in sketch.things):
            sound = sketch.stranger
        if sound is None:
            return False
        # "It is heard again" speaks of the sound before; "the low tone stops" tells no event of its own.
        is_new = _ANEW.search(text) is not None
        if not sound and not is_new:
            sound = self.sound
        if sound in self.sounds and not is_new and _STOPS.search(text):
            return True
        self.sounds.add(sound)
        self.sound = sound
        self._add("sound", (sound,), text)
        return True

    def _read_sight(self, sketch: _Sketch, text: str) -> bool:
        """Whether the clause told something seen, or named an object whose verb is still to come."""
        if (sketch.sound is not None or sketch.hears) and not any(thing.shape for thing in sketch.things):
            return True
        verbs = sketch.verbs or ([["appear", ""]] if sketch.sees and (sketch.things or self.pending) else [])
        if sketch.relative and sketch.verbs:
            verbs = [["appear", ""], *sketch.verbs]
        if verbs and sketch.stranger and not sketch.things:
            return False
        things = self._resolve(sketch.things)
        if not verbs and not things:
            return self._read_rest(sketch, text)
        if not verbs and self.verb_first and self.verbs:
            verbs = self.verbs
        elif not verbs:
            self.pending += [(self._name(thing), text) for thing in things]
            return True
        self._tell(things, verbs, text)
        self.verb_first = sketch.verb_first or (self.verb_first and not sketch.verbs and not sketch.sees)
        return True

    def _read_rest(self, sketch: _Sketch, text: str) -> bool:
        """What leans on a neighbour: "(moves left), then right", "(turns blue), then red", "a red (and a blue dot)"."""
        last = self.verbs[-1][0] if self.verbs else ""
        if last == "move" and sketch.directions:
            self._tell([], [["move", sketch.directions[0]]], text)
        elif last == "change" and sketch.loose_colour:
            self._tell([], [["change", sketch.loose_colour]], text)
        elif sketch.loose_colour and not sketch.num_unknown:
            self.pending.append((_Thing(sketch.loose_colour, "", "short"), text))
        else:
            return False
        return True

    def _tell(self, things: list[_Thing], verbs: list[list[str]], text: str) -> None:
        pending = [
            (_Thing(thing.colour, things[0].shape if thing.word == "short" and things else thing.shape), place)
            for thing, place in self.pending
        ]
        self.pending = []
        # "(with the circle) as it blinks" names one object twice.
        subjects = [*pending, *((thing, text) for thing in things if all(thing != other for other, _ in pending))]
        if not subjects:
            subjects = [(thing, text) for thing in self.subjects or self.named[-1:] or [_Thing()]]
        self.subjects = []
        for thing, place in subjects:
            for kind, value in verbs:
                values = (value,) if kind in ("move", "change") else ()
                self._add(kind, (thing.colour, thing.shape, *values), place)
                if kind == "change" and value:
                    thing = self._name(_Thing(value, thing.shape), instead=thing)  # noqa: PLW2901
            self.subjects.append(self._name(thing))
        self.verbs = verbs

    def _resolve(self, things: Iterable[_Thing]) -> list[_Thing]:
        found: list[_Thing] = []
        for thing in things:
            if thing.word == "they":
                found += self.named[-2:]
            elif thing.word == "a" or (thing.colour and thing.shape):
                found.append(_Thing(thing.colour, thing.shape))
            else:
                found.append(self._recall(thing))
        return found

    def _recall(self, thing: _Thing) -> _Thing:
        """The latest object that fits; "a blue one" takes the latest shape and keeps its own colour."""
        for known in reversed(self.named):
            if thing.shape in ("", known.shape) and thing.colour in ("", known.colour):
                return known
        if thing.word in ("one", "it") and self.named:
            return _Thing(thing.colour, self.named[-1].shape)
        return _Thing(thing.colour, thing.shape)

    def _name(self, thing: _Thing, *, instead: _Thing | None = None) -> _Thing:
        thing = _Thing(thing.colour, thing.shape)
        gone = {(old.colour, old.shape) for old in (thing, instead or thing)}
        self.named = [known for known in self.named if (known.colour, known.shape) not in gone] + [thing]
        return thing

    def _flush(self) -> None:
        """Objects that found no verb in their sentence: a bare mention says that they are there."""
        if self.pending:
            self._tell([], [["appear", ""]], "")

    def _add(self, kind: str, details: tuple[str, ...], text: str) -> None:
        modality: EventModality = "audio" if kind == "sound" else "visual"
        self.groups[-1].append(Claim(kind, details, modality, text, len(self.groups)))


def _normal(text: str) -> str:
    return " ".join(_WORD.findall(text.lower()))


def split_caption(reference: Reference) -> tuple[Event, ...]:
    """The events that the caption of a synthetic clip tells, in the words of the synthetic world, without times.

    Raises:
        ValueError: the rules cannot read a clause.
    """
    claims = parse_claims(reference.caption)
    for claim in claims:
        if claim.kind == "unreadable":
            raise ValueError(
                f"the rules cannot read {claim.clause!r} in the caption of {reference.video}: they know synthetic "
                "clips only; ask a language model by --judge openai"
            )
    return tuple(Event(_canonical(claim), claim.modality) for claim in claims)


def _canonical(claim: Claim) -> str:
    """A claim in the words of the event list; as it stands in the caption where it leaves a detail open."""
    if not all(claim.details):
        return claim.clause
    if claim.kind == "sound":
        sounds = phrases.SOUNDS.get(claim.details[0])
        return phrases.HEARD[0].format(sound=sounds[0]) if sounds else claim.clause
    colour, shape, *values = claim.details
    forms = {"appear": phrases.APPEAR, "leave": phrases.LEAVE, "blink": phrases.BLINK, "change": phrases.CHANGE}
    form = (phrases.MOVE[values[0]] if claim.kind == "move" else forms[claim.kind])[0]
    article = "an" if colour[0] in "aeiou" else "a"
    return form.format(a=f"{article} {colour} {shape}", the=f"the {colour} {shape}", colour=values[0] if values else "")
