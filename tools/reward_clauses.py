"""Write captions of synthetic clips clause by clause, for `reward_pairs.py`."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from salmonn.synthetic.lexicon import FORMS, HEARD, HEARD_PLURAL, MOVE, SOUNDS
from salmonn.synthetic.scene import SceneEvent


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
