"""Parse captions of the synthetic world into claims.

`parse_claims` splits a caption into clauses, reads the words of each clause by the lexicon (`ClauseParser`), and
resolves what a clause leaves to its neighbours, such as "it" or a subject named before (`CaptionParser`). It matches
words, not templates. Event texts are parsed in the same way, so a judge needs only texts.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from salmonn.records import Event, EventModality, Reference
from salmonn.synthetic.lexicon import FILLER_WORDS, LEXICON, SOUNDS, canonical_clause, replace_idioms

# A clause with more unknown words than this makes an "unreadable" claim besides those that were read.
MAX_UNKNOWN_WORDS = 4

_WORD = re.compile(r"[a-z0-9']+")
# Clause boundaries. The unnamed alternatives at the front are skipped: their words belong together.
_BOUNDARY = re.compile(
    r"\bon and off\b|\bback and forth\b|\bover and over\b|\bone after (?:an|the )other\b|\bas well\b|\d[.,]\d"
    r"|(?P<sentence>[.!?;:\n]+)"
    r"|(?P<joint>,|\b(?:and|then|while|whilst|as|when|before|until|after(?!\s+(?:that|this|which)\b)|but|with"
    r"|meanwhile|(?:followed|accompanied) by)\b)",
    re.IGNORECASE,
)
_STOPS = re.compile(
    r"\b(?:stop|(?<!the )end|cease|fade)(?:s|ped|ed|d)?\b(?! in\b)|\bdies (?:away|down)\b", re.IGNORECASE
)
_INDEFINITE = re.compile(r"\b(?:a|an|some|another)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Claim:
    """One fact that a text states.

    Args:
        kind: appear, leave, blink, move, change, sound, or unreadable.
        details: colour and shape, with the direction of a move or the new colour of a change; the kind of a sound; the
            words of an unreadable clause. "" stands for a detail that the text does not give.
        modality: audio for sounds, visual for all others.
        clause: words of the text that state the fact.
        clause_number: number of the clause in the text, which distinguishes clauses with equal words.
    """

    kind: str
    details: tuple[str, ...]
    modality: EventModality
    clause: str
    clause_number: int


@dataclass(frozen=True)
class Clause:
    """A part of a text; `joint` is the conjunction before it ("" if there is none), `sentence` counts from 0."""

    text: str
    joint: str
    sentence: int


def parse_claims(text: str) -> list[Claim]:
    """Parse the claims of a caption, in order of time ("B after A" states A first).

    A clause with content that cannot be read is a claim of kind "unreadable"; fillers ("The clip ends.") and negations
    ("the circle does not move") are not claims. Merely naming an object ("a red circle") claims that it appears.
    """
    return list(_parse(text))


@lru_cache(maxsize=8192)
def _parse(text: str) -> tuple[Claim, ...]:
    parser = CaptionParser()
    for clause in split_clauses(text):
        parser.add(clause)
    return parser.finish()


def split_clauses(text: str) -> Iterator[Clause]:
    """Split a text at sentence ends, commas, semicolons and conjunctions, except within idioms such as "on and off"."""
    start, joint, sentence = 0, "", 0
    for match in _BOUNDARY.finditer(text):
        if match.lastgroup is None:
            continue
        part = text[start : match.start()].strip()
        if part:
            yield Clause(part, joint, sentence)
        start = match.end()
        # The last of several conjunctions counts (", and then"), but a comma does not replace a word before it.
        if match.lastgroup == "sentence":
            joint, sentence = "", sentence + 1
        elif part or match[0] != ",":
            joint = match[0].lower()
    part = text[start:].strip()
    if part:
        yield Clause(part, joint, sentence)


@dataclass(frozen=True)
class _Object:
    """An object as a clause names it; `word` is "a", "it", "they", "one", "any" ("the shape"), or "" for "the"."""

    colour: str = ""
    shape: str = ""
    word: str = ""


@dataclass
class _Verb:
    """A verb of a clause; `value` is the direction of a move or the new colour of a change."""

    kind: str
    value: str = ""


@dataclass
class ParsedClause:
    """The words of one clause, before references to other clauses are resolved."""

    objects: list[_Object] = field(default_factory=list)
    verbs: list[_Verb] = field(default_factory=list)
    directions: list[str] = field(default_factory=list)
    sound_words: set[str] = field(default_factory=set)
    is_seen: bool = False  # "we see", "there is"
    is_heard: bool = False
    is_negated: bool = False
    is_verb_first: bool = False  # "there is a red circle"
    is_relative: bool = False  # "there is a red circle that moves": it appears, and it moves
    free_colour: str = ""  # a colour without an object
    unknown_subject: str = ""  # unknown words before the verb: "a dog (moves)"
    num_unknown: int = 0

    @property
    def sound(self) -> str | None:
        """Kind of the sound; "" if the clause does not specify it, None if there is no sound."""
        words = self.sound_words
        # "a low and a high tone": a pitch alone means a tone if the clause contains nothing else.
        if not words & {"tone", "beeps", "clicks", "noise"} and (self.objects or self.verbs or not words):
            return None
        moves = {*self.directions, *(verb.value for verb in self.verbs if verb.kind == "move")}
        pitches = set() if self.objects else moves
        candidates = (
            ("beeps", "beeps" in words),
            ("clicks", "clicks" in words),
            ("rising sweep", "up" in pitches),
            ("falling sweep", "down" in pitches),
            ("noise", "noise" in words),
            ("low tone", "low" in words),
            ("high tone", "high" in words),
        )
        return next((kind for kind, found in candidates if found), "")

    @property
    def names_shape(self) -> bool:
        """Whether an object is named by its shape."""
        return any(item.shape for item in self.objects)


class ClauseParser:
    """Parses the words of one clause from left to right."""

    def __init__(self) -> None:
        self.clause = ParsedClause()
        self.colour = self.article = ""  # of the object to come
        self.preposition = ""  # "from" or "at", while the word that it belongs to is still to come

    def add(self, word: str) -> None:
        """Parse the next word."""
        clause = self.clause
        tag, value = LEXICON.get(word, ("", ""))
        if tag in ("verb", "climb"):
            clause.verbs.append(_Verb(value) if tag == "verb" else _Verb("move", value))
        elif tag in ("shape", "any", "one"):
            self._add_object(tag, value)
        elif tag == "colour":
            self._add_colour(value)
        elif tag == "direction":
            self._add_direction(value, is_adverb="ward" in word)
        elif tag in ("it", "they"):
            clause.objects.append(_Object(word=tag))
        elif tag == "sound":
            clause.sound_words.add(value)
        elif tag:
            self._add_function_word(tag)
        elif word not in FILLER_WORDS and not word.isdigit():
            self._add_unknown(word)

    def _add_function_word(self, tag: str) -> None:
        clause = self.clause
        if tag == "a":
            self.article = tag
        elif tag == "see":
            clause.is_seen, clause.is_verb_first = True, clause.is_verb_first or not clause.objects
        elif tag == "hear":
            clause.is_heard = True
        elif tag == "no":
            clause.is_negated = True
        elif tag == "that":
            clause.is_relative |= clause.is_seen and bool(clause.objects)
        self.preposition = tag if tag in ("from", "at") else ""

    def _add_unknown(self, word: str) -> None:
        clause = self.clause
        if word.endswith("n't"):
            clause.is_negated = True
            return
        clause.num_unknown += 1
        if not clause.verbs and not clause.objects and not word.endswith("ly"):
            clause.unknown_subject = f"{clause.unknown_subject} {word}".strip()

    def _add_object(self, tag: str, shape: str) -> None:
        clause = self.clause
        # "moves past the blue square" and "turns into a square" do not name a new subject.
        if (tag != "one" or self.colour) and not (clause.verbs and clause.objects):
            clause.is_verb_first |= bool(clause.verbs)
            clause.objects.append(_Object(self.colour, shape, self.article if tag == "shape" else tag))
        self.colour = self.article = clause.free_colour = ""
        if self.preposition == "at":
            self.preposition = ""

    def _add_colour(self, colour: str) -> None:
        clause, is_from = self.clause, self.preposition == "from"
        changes = [verb for verb in clause.verbs if verb.kind == "change"]
        if changes and clause.objects and not changes[-1].value and not is_from:
            changes[-1].value = colour
        elif clause.objects and not clause.objects[-1].colour and (is_from or not clause.verbs):
            # "turns from red to blue", "the circle is red"
            clause.objects[-1] = _Object(colour, clause.objects[-1].shape, clause.objects[-1].word)
        else:
            self.colour = clause.free_colour = clause.free_colour or colour
        if is_from:
            self.preposition = ""

    def _add_direction(self, direction: str, *, is_adverb: bool) -> None:
        verbs = self.clause.verbs
        # "from the left" and "on the left" are places.
        if is_adverb or not self.preposition:
            self.clause.directions.append(direction)
            if verbs and verbs[-1] == _Verb("change"):
                verbs[-1].kind = "move"
            if verbs and verbs[-1] == _Verb("move"):
                verbs[-1].value = direction
        self.preposition = ""


@lru_cache(maxsize=65536)
def _parse_clause(text: str) -> ParsedClause:
    """Parse a clause in lower case. Cached, as most clauses are frequent; callers must not modify the result."""
    parser = ClauseParser()
    for word in _WORD.findall(replace_idioms(text)):
        parser.add(word)
    clause = parser.clause
    # "slides out of view" is a disappearance only.
    if any(verb.kind in ("appear", "leave") for verb in clause.verbs):
        clause.verbs = [verb for verb in clause.verbs if verb != _Verb("move")]
    # "and blue it turns", or "turns blue" without a subject.
    for verb in clause.verbs:
        if verb.kind == "change" and not verb.value:
            verb.value = clause.free_colour
    return clause


@dataclass
class _Sentence:
    """The state of a sentence: what its later clauses may refer to.

    Args:
        number: number of the sentence, from 0.
        verbs: verbs of the clause before.
        is_verb_first: whether the clause before began with its verb, which then applies to further objects.
        is_swapped: whether the next clause precedes the one before ("Before A, B").
        pending: objects without a verb so far, with the clauses that name them.
    """

    number: int
    verbs: list[_Verb] = field(default_factory=list)
    is_verb_first: bool = False
    is_swapped: bool = False
    pending: list[tuple[_Object, str]] = field(default_factory=list)


class CaptionParser:
    """Parses the clauses of a caption in order, and resolves references to earlier clauses."""

    def __init__(self) -> None:
        self.groups: list[list[Claim]] = []  # claims by clause
        self.objects: list[_Object] = []  # objects named so far, the most recent last
        self.subjects: list[_Object] = []  # subjects of the last verb
        self.sounds: list[str] = []  # kinds of the sounds named so far, the most recent last
        self.sentence = _Sentence(-1)

    def add(self, clause: Clause) -> None:
        """Parse the next clause."""
        is_first = clause.sentence != self.sentence.number
        if is_first:
            self._end_sentence()
            self.sentence = _Sentence(clause.sentence)
        self.groups.append([])
        parsed = _parse_clause(clause.text.lower())
        if parsed.is_negated:
            is_unreadable = bool(parsed.num_unknown) and not parsed.objects and parsed.sound is None
        else:
            is_sound = self._add_sound(parsed, clause.text)
            is_visual = self._add_visual(parsed, clause.text)
            is_unreadable = parsed.num_unknown > MAX_UNKNOWN_WORDS
            if not is_sound and not is_visual:
                is_unreadable |= bool(parsed.num_unknown or parsed.free_colour)
        if is_unreadable:
            self._add_claim("unreadable", (" ".join(_WORD.findall(clause.text.lower())),), clause.text)
        if not parsed.is_negated and self.groups[-1]:
            # "B after A" and "Before A, B": the clause just parsed precedes the one before it.
            if not is_first and (self.sentence.is_swapped or clause.joint == "after"):
                self.groups[-1], self.groups[-2] = self.groups[-2], self.groups[-1]
            if self.groups[-1]:
                self.sentence.is_swapped = is_first and clause.joint == "before"

    def finish(self) -> tuple[Claim, ...]:
        """Return all claims."""
        self._end_sentence()
        return tuple(claim for group in self.groups for claim in group)

    def _end_sentence(self) -> None:
        """Claim that the objects without a verb in their sentence appear."""
        if self.sentence.pending:
            self._add_claims([], [_Verb("appear")], "")

    def _add_sound(self, parsed: ParsedClause, text: str) -> bool:
        """Add a claim about a sound; return whether the clause is about one."""
        sound = parsed.sound
        if sound is None and parsed.is_heard and not parsed.names_shape:
            sound = parsed.unknown_subject
        if sound is None:
            return False
        # "It is heard again" is about the last sound; "the low tone stops" is not a separate event.
        is_new = _INDEFINITE.search(text) is not None
        if not sound and not is_new and self.sounds:
            sound = self.sounds[-1]
        if not (sound in self.sounds and not is_new and _STOPS.search(text)):
            self.sounds.append(sound)
            self._add_claim("sound", (sound,), text)
        return True

    def _add_visual(self, parsed: ParsedClause, text: str) -> bool:
        """Add claims about objects; return whether the clause was understood."""
        if (parsed.sound is not None or parsed.is_heard) and not parsed.names_shape:
            return True
        sentence, verbs = self.sentence, parsed.verbs
        if not verbs and parsed.is_seen and (parsed.objects or sentence.pending):
            verbs = [_Verb("appear")]
        if parsed.is_relative and parsed.verbs:
            verbs = [_Verb("appear"), *parsed.verbs]
        if verbs and parsed.unknown_subject and not parsed.objects:
            return False
        objects = self._resolve(parsed.objects)
        if not verbs and not objects:
            return self._add_elliptical(parsed, text)
        if not verbs and sentence.is_verb_first and sentence.verbs:
            verbs = sentence.verbs
        elif not verbs:
            sentence.pending += [(self._name(item), text) for item in objects]
            return True
        self._add_claims(objects, verbs, text)
        sentence.is_verb_first = parsed.is_verb_first or (
            sentence.is_verb_first and not parsed.verbs and not parsed.is_seen
        )
        return True

    def _add_elliptical(self, parsed: ParsedClause, text: str) -> bool:
        """Parse "(moves left), then right", "(turns blue), then red" and "a red (and a blue dot)"."""
        last = self.sentence.verbs[-1].kind if self.sentence.verbs else ""
        if last == "move" and parsed.directions:
            self._add_claims([], [_Verb("move", parsed.directions[0])], text)
        elif last == "change" and parsed.free_colour:
            self._add_claims([], [_Verb("change", parsed.free_colour)], text)
        elif parsed.free_colour and not parsed.num_unknown:
            self.sentence.pending.append((_Object(parsed.free_colour, "", "short"), text))
        else:
            return False
        return True

    def _add_claims(self, objects: list[_Object], verbs: list[_Verb], text: str) -> None:
        """Add a claim for each verb of each object, including the pending objects of the sentence."""
        subjects = [
            (_Object(item.colour, objects[0].shape if item.word == "short" and objects else item.shape), clause)
            for item, clause in self.sentence.pending
        ]
        self.sentence.pending = []
        # "(with the circle) as it blinks" names one object twice.
        pending = [item for item, _ in subjects]
        subjects += [(item, text) for item in objects if item not in pending]
        if not subjects:
            subjects = [(item, text) for item in self.subjects or self.objects[-1:] or [_Object()]]
        self.subjects = []
        for item, clause in subjects:
            subject = item
            for verb in verbs:
                values = (verb.value,) if verb.kind in ("move", "change") else ()
                self._add_claim(verb.kind, (subject.colour, subject.shape, *values), clause)
                if verb.kind == "change" and verb.value:
                    subject = self._name(_Object(verb.value, subject.shape), replaces=subject)
            self.subjects.append(self._name(subject))
        self.sentence.verbs = verbs

    def _add_claim(self, kind: str, details: tuple[str, ...], text: str) -> None:
        modality: EventModality = "audio" if kind == "sound" else "visual"
        self.groups[-1].append(Claim(kind, details, modality, text, len(self.groups)))

    def _resolve(self, objects: list[_Object]) -> list[_Object]:
        """Replace pronouns and partial descriptions by the most recent objects that they fit."""
        resolved: list[_Object] = []
        for item in objects:
            known = [
                other
                for other in reversed(self.objects)
                if item.shape in ("", other.shape) and item.colour in ("", other.colour)
            ]
            if item.word == "they":
                resolved += self.objects[-2:]
            elif item.word == "a" or (item.colour and item.shape) or (not known and not self.objects):
                resolved.append(_Object(item.colour, item.shape))
            elif known:
                resolved.append(known[0])
            else:
                # "a blue one" has the shape of the last object and its own colour.
                shape = self.objects[-1].shape if item.word in ("one", "it") else item.shape
                resolved.append(_Object(item.colour, shape))
        return resolved

    def _name(self, item: _Object, *, replaces: _Object | None = None) -> _Object:
        """Make an object the most recent one; a change of colour replaces the object with the old colour."""
        named = _Object(item.colour, item.shape)
        old = {(other.colour, other.shape) for other in (named, replaces or named)}
        self.objects = [known for known in self.objects if (known.colour, known.shape) not in old] + [named]
        return named


def split_caption(reference: Reference) -> tuple[Event, ...]:
    """Return the events of a reference's caption in canonical clauses, without times.

    Raises:
        ValueError: a clause cannot be parsed.
    """
    claims = parse_claims(reference.caption)
    for claim in claims:
        if claim.kind == "unreadable":
            raise ValueError(
                f"the rules cannot read {claim.clause!r} in the caption of {reference.video}: they only know synthetic "
                "clips; use a language model, by --judge openai"
            )
    return tuple(Event(_event_text(claim), claim.modality) for claim in claims)


def _event_text(claim: Claim) -> str:
    """Return a claim in canonical words, or its clause if a detail is missing or not in the synthetic world."""
    if not all(claim.details):
        return claim.clause
    if claim.kind == "sound":
        (kind,) = claim.details
        return canonical_clause("sound", value=kind) if kind in SOUNDS else claim.clause
    colour, shape, *values = claim.details
    return canonical_clause(claim.kind, colour=colour, shape=shape, value=values[0] if values else "")
