"""Dialogue in captions: the speech that a caption quotes, aligned to the speech of its reference.

After the word error rate of D-ORCA (arXiv 2602.07960), for which a language model extracts all speech from a caption.
Here rules extract quotations, so that the result is the same each time and costs nothing. `docs/metrics.md` has the
formulas with a worked example.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from salmonn.records import Reference, Score
from salmonn.score.metrics import Measures
from salmonn.score.quotations import find_quotations, quoted_speech
from salmonn.score.text_spans import WORD
from salmonn.speech import Dialogue

# Numerator and denominator of each measure, as in `salmonn.score.metrics.MEASURES`. Lower is better for all of them.
DIALOGUE_MEASURES: Measures = {
    "dialogue_wer": (lambda score: _of(score).num_errors, lambda score: _of(score).num_spoken),
    "dialogue_missing": (
        lambda score: _of(score).num_spoken - _of(score).num_matched,
        lambda score: _of(score).num_spoken,
    ),
    "dialogue_hallucinated": (
        lambda score: _of(score).num_quoted - _of(score).num_matched,
        lambda score: _of(score).num_quoted,
    ),
}


@dataclass(frozen=True)
class DialogueRates:
    """Measures of a set of captions, as fractions.

    Args:
        wer: (substituted + omitted + inserted words) / spoken words; can exceed 1.
        recall: matched words / spoken words.
        hallucinated: quoted words that match no spoken word / quoted words; None if nothing is quoted.
        num_spoken, num_quoted: words in the references, and in the captions' quotations.
        num_silent: captions that quote speech where the reference has none.
    """

    wer: float
    recall: float
    hallucinated: float | None
    num_spoken: int
    num_quoted: int
    num_silent: int


def dialogue_rates(scores: Sequence[Score]) -> DialogueRates | None:
    """Return the dialogue measures of a set; None if none of its references quotes speech.

    Counts are summed over all captions before dividing.
    """
    counts = [score.dialogue for score in scores if score.dialogue]
    spoken, quoted = sum(one.num_spoken for one in counts), sum(one.num_quoted for one in counts)
    if not spoken:
        return None
    matched = sum(one.num_matched for one in counts)
    return DialogueRates(
        wer=sum(one.num_errors for one in counts) / spoken,
        recall=matched / spoken,
        hallucinated=(quoted - matched) / quoted if quoted else None,
        num_spoken=spoken,
        num_quoted=quoted,
        num_silent=sum(not one.num_spoken for one in counts),
    )


def count_dialogue(caption: str, reference: Reference) -> Dialogue | None:
    """Align the speech that a caption quotes with the speech of its reference.

    A quotation that the caption repeats more often than it is spoken is aligned only so often; the words of its other
    repetitions count as inserted.

    Returns:
        Counts; None if the words of the reference speech are unknown, or if there is no speech on either side.
    """
    spoken = spoken_words(reference)
    quotes = [words for quote in quoted_speech(caption) if (words := normalize_words(quote))]
    if spoken is None or not (spoken or quotes):
        return None
    kept: list[str] = []
    num_repeated, seen = 0, Counter[tuple[str, ...]]()
    for words in quotes:
        key = tuple(words)
        seen[key] += 1
        if seen[key] > max(1, _count_runs(words, spoken)):
            num_repeated += len(words)
        else:
            kept += words
    errors, matched = align_words(spoken, kept)
    return Dialogue(len(spoken), len(kept) + num_repeated, matched, errors + num_repeated)


def spoken_words(reference: Reference) -> list[str] | None:
    """Return the words that the speech events of a reference quote, by time; None if it has such events without words.

    A reference without speech events has no speech: the list is empty.
    """
    events = [event for event in reference.events if event.modality == "speech"]
    if all(event.start_seconds is not None for event in events):
        events.sort(key=lambda event: event.start_seconds or 0.0)
    quotes = [one.text for event in events for one in find_quotations(event.text)]
    if events and not quotes:
        return None
    return [word for quote in quotes for word in normalize_words(quote)]


def normalize_words(text: str) -> list[str]:
    """Return the words of a text for comparison: lower case, no punctuation, numbers as digits, no hesitations.

    Simple rules instead of Whisper's normalizer, which needs torch: apostrophes and commas in numbers are dropped,
    hyphens separate words, English cardinal numbers become digits. A character of a script without spaces between
    words is a word, so Chinese is measured by its character error rate.
    """
    text = re.sub(r"(?<=\w)['\u2019](?=\w)|(?<=\d),(?=\d{3})", "", unicodedata.normalize("NFKC", text).casefold())
    words = (part for word in WORD.findall(text) for part in word.split("-"))
    return _join_numbers([word for word in words if word not in _HESITATIONS])


def align_words(reference: Sequence[str], hypothesis: Sequence[str]) -> tuple[int, int]:
    """Return the Levenshtein distance of two word sequences, and the most matches of an alignment with that distance.

    Each row of the table is computed as an array, with `errors * scale - matches` as the cost.
    """
    scale = len(reference) + len(hypothesis) + 1
    columns = np.arange(len(hypothesis) + 1, dtype=np.int64) * scale
    ids = {word: number for number, word in enumerate({*reference, *hypothesis})}
    other = np.array([ids[word] for word in hypothesis], np.int64)
    costs = columns.copy()
    for word in reference:
        best = np.concatenate([costs[:1] + scale, costs[1:] + scale])
        best[1:] = np.minimum(best[1:], costs[:-1] + np.where(other == ids[word], -1, scale))
        costs = np.minimum.accumulate(best - columns) + columns  # insertions
    errors = -(-int(costs[-1]) // scale)
    return errors, errors * scale - int(costs[-1])


def _of(score: Score) -> Dialogue:
    return score.dialogue or Dialogue(0, 0, 0, 0)


def _count_runs(words: Sequence[str], within: Sequence[str]) -> int:
    """Return how often words occur one after the other in others."""
    return sum(list(within[start : start + len(words)]) == list(words) for start in range(len(within) - len(words) + 1))


_HESITATIONS = frozenset(("uh", "um", "hm", "hmm", "mm", "mmm", "mhm"))
_SMALL = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_NUMBERS = dict(zip((*_SMALL, *_TENS), (*range(20), *range(20, 100, 10)), strict=True))


def _join_numbers(words: Sequence[str]) -> list[str]:
    """Replace English cardinal numbers below a million by digits: "twenty one" by "21", but "one two" by "1", "2"."""
    joined: list[str] = []
    thousands, rest = 0, -1  # of the number so far; -1: none
    for word, following in zip(words, [*words[1:], ""], strict=True):
        value = _NUMBERS.get(word, -1)
        if word == "and" and rest >= 100 and rest % 100 == 0 and following in _NUMBERS:
            continue
        if word == "hundred" and 0 < rest < 10:
            rest *= 100
        elif word == "thousand" and rest > 0 and not thousands:
            thousands, rest = 1000 * rest, -1
        elif value >= 0 and _extends(rest, value):
            rest = max(rest, 0) + value
        else:
            if rest >= 0 or thousands:
                joined.append(str(thousands + max(rest, 0)))
            thousands, rest = 0, value
            if value < 0:
                joined.append(word)
    if rest >= 0 or thousands:
        joined.append(str(thousands + max(rest, 0)))
    return joined


def _extends(number: int, value: int) -> bool:
    """Return whether a number below 100 continues one that is spelled out: 20 takes a unit, 300 anything."""
    is_unit_of_tens = 0 < value < 10 and number % 100 >= 20 and number % 10 == 0
    return number < 0 or (number > 0 and number % 100 == 0) or is_unit_of_tens
