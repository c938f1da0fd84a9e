"""Persistence of a draft: the share of its claims that a person's text keeps, found by rules.

Accepting a draft says little about it; what is left of it says more (RealHumanEval, arXiv 2404.02806).
"""

import re
from dataclasses import dataclass
from statistics import fmean

from salmonn.score.repetition import list_clauses

# Words that a claim does not depend on: pronouns, auxiliaries, and "one", which is like an article.
_FILLERS = frozenset((
    "it", "they", "he", "she", "this", "these", "that", "which", "who", "there", "one", "is", "are", "was", "were",
    "be", "been", "being", "has", "have", "had", "do", "does", "did", "can", "could", "will", "would",
))  # fmt: skip
_NUMBERS = dict(zip("23456789", ("two", "three", "four", "five", "six", "seven", "eight", "nine"), strict=True))
# A claim with one of these more, or less, is another claim.
_DECISIVE = frozenset((*_NUMBERS.values(), "ten", "no", "not", "never", "without", "nothing", "nobody"))
_NOT = re.compile(r"(?:\bca|\bwo)?n['\u2019]t\b|\bcannot\b")
_JOINER = re.compile(r"['\u2019\-]")
_PLURAL = re.compile(r"(?<=..[^s])s$")
_ENDING = re.compile(r"(?<=..[^e])(?:ing|ed)$|(?<=...)e$")
_DOUBLED = re.compile(r"([^aeiou])\1$")


@dataclass(frozen=True)
class _Claim:
    """Stems of a clause, and of the clause whose subject it shares, if it has none of its own ("it moves up")."""

    own: tuple[str, ...]
    subject: tuple[str, ...] = ()

    @property
    def stems(self) -> tuple[str, ...]:
        return self.subject + self.own


def share_kept(draft: str, text: str) -> float:
    """Return the share of a draft's clauses that a text keeps, in any order; 1 for a draft without clauses.

    A clause is kept if one clause of the text has all of its words. Articles, pronouns, auxiliaries and regular endings
    do not count; more words are allowed, except for numbers and negations. Words must have the same order, but the
    clause may start with another of its words ("in the park a dog barks"), and adverbs in -ly may move. So "a cat
    chases a dog" does not keep "a dog chases a cat". The subject of "it moves up" must be kept, too.

    Synonyms, irregular forms ("sang") and passives count as lost, and an object that moved to another one's colour
    may count as kept: this is a measure of how much was changed, not a judge.
    """
    claims, told = _read_claims(draft), _read_claims(text)
    return fmean(any(_keeps(other, claim) for other in told) for claim in claims) if claims else 1.0


def _read_claims(text: str) -> list[_Claim]:
    claims = [_Claim(*(_stems(part) for part in reversed(clause.key))) for clause in list_clauses(text)]
    return [claim for claim in claims if claim.own]


def _stems(words: str) -> tuple[str, ...]:
    plain = _JOINER.sub(" ", _NOT.sub(" not", words)).split()
    return tuple(_stem(_NUMBERS.get(word, word)) for word in plain if word not in _FILLERS)


def _stem(word: str) -> str:
    """Remove a regular ending: "stops", "stopped" and "stopping" become "stop"."""
    word = _PLURAL.sub("", word)
    root = _ENDING.sub("", word)
    root = _DOUBLED.sub(r"\1", root if re.search("[aeiouy]", root) else word)
    return f"{root[:-1]}i" if root.endswith("y") else root


def _keeps(other: _Claim, claim: _Claim) -> bool:
    """Return whether a claim of a text states a draft's claim; a subject that was "it" may be named in its place."""
    if _has_words(other.stems, claim.stems):
        return True
    is_named = bool(claim.subject) and not other.subject
    return is_named and _has_words(other.own, claim.own) and _has_words(claim.stems, other.own)


def _has_words(stems: tuple[str, ...], part: tuple[str, ...]) -> bool:
    """Return whether words contain others in order, which may start with any of them; adverbs in any order."""
    if not _adverbs(part) <= _adverbs(stems) or set(stems) & _DECISIVE != set(part) & _DECISIVE:
        return False
    part = tuple(stem for stem in part if stem not in _adverbs(part))
    return any(_is_subsequence(part[start:] + part[:start], stems) for start in range(max(len(part), 1)))


def _adverbs(stems: tuple[str, ...]) -> set[str]:
    return {stem for stem in stems if stem.endswith("li")}


def _is_subsequence(part: tuple[str, ...], stems: tuple[str, ...]) -> bool:
    remaining = iter(stems)
    return all(stem in remaining for stem in part)
