"""Accuracy on multiple-choice questions, from files of responses: Video-MME's, the published model's, or flat ones.

`read_questions` takes a JSON list (`.json`), or JSON lines, of
- videos with their questions, Video-MME's format for results: `{"video_id", "duration", "domain", "sub_category",
  "questions": [{"task_type", "question", "options": ["A. ...", ...], "answer": "C", "response": "..."}]}`;
- questions: `{"question", "options", "answer", "response"}`, with `video` and the keys of `GROUPS` where known;
- what the published code of video-SALMONN 2 and 2+ writes: `{"video" or "id", "prompt", "ref": "C", "pred": "..."}`.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from salmonn.score.formats import END_OF_ANSWER, read_objects
from salmonn.score.stats import RESAMPLES, Interval, bootstrap_ratios

# What accuracy is broken down by, where an item says it.
GROUPS = ("duration", "domain", "sub_category", "task_type")

_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# Of options that are not known; no test set in use has more.
_NUM_UNKNOWN = 8
_LABEL = re.compile(r"\s*\(?([A-Z])[.):]\s*")
# A letter by itself, no part of a word ("A's", "A-frame", "D.C."), nor denied. "A man" and "I think" begin with words,
# "A is right" does not.
_FREE = (
    r"(?<![\w'\u2019-])(?<![A-Z]\.)(?<!\b[Nn]ot )(?P<letter>[A-Z])(?![\w'\u2019]|-\w|\.[A-Z]\b)"
    r"(?!(?<=[AI])[ \t]+(?!(?:is|was|or|and|because|since|as|seems)\b)\w)"
)
# A small letter counts only where nothing but a sign can follow: "b.", "(b)".
_SMALL = r"(?<![\w'\u2019-])(?P<small>[a-z])(?=[\W_]*$|[.):\]*<}])"
_LETTER = re.compile(_FREE)
# "A or B", "A, B and C" after a first letter.
_MORE = re.compile(
    rf"[)\]*]*[ \t]*(?:[,/&]|\bor\b|\band\b)[ \t]*(?:(?:or|and)[ \t]+)?(?:(?i:option)[ \t]+)?[(\[*]*{_FREE}"
)
_CUE = (
    r"\b(?i:answers?|(?:correct|right|best) (?:option|choice|one)|choose|pick|select)\b"
    r"(?i:\s+(?:is|was|would be|should be|must be|option|choice|letter))*"
)
_STATED = re.compile(rf"{_CUE}[\W_]*(?:{_FREE}|{_SMALL})")
# A label in front: "B. Berries", "(B)", "B: since ...", "**B**", "B\nThe ...", "A or B".
_LEADING = re.compile(
    rf"[\W_]*(?:{_FREE}(?=[ \t]*(?:[^\w\s'\u2019]|[\r\n]|$|(?:or|and)\b))|(?P<small>[a-z])[.):])",
)
# Further labels at the beginning of a line or sentence: the options are repeated.
_NEXT_LABEL = re.compile(rf"(?<=[.!?;\n])[ \t]*[(\[*]*{_FREE}[.):]")
_STATED_TEXT = re.compile(rf"{_CUE}[\s:=*\"'\u201c]*((?P<sentence>[^\n]+?)(?:[.!?][ \t][^\n]*)?)$", re.MULTILINE)
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class MultipleChoiceQuestion:
    """A multiple-choice question with a model's response.

    Args:
        question: its text.
        options: texts of the options without their letters; empty where they are not known.
        answer: letter of the right option.
        response: what the model said; None where it said nothing.
        video: what it is about; None where that is not known.
        groups: what it belongs to, for example {"duration": "short"}.
    """

    question: str
    options: tuple[str, ...]
    answer: str
    response: str | None
    video: str | None = None
    groups: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class MultipleChoiceRates:
    """Accuracy over a set of questions.

    Args:
        accuracy: share of all questions that are answered right.
        interval: 95 %, over videos; a question whose video is not known counts as a video.
        num_questions: number of questions.
        unanswered: number without a response; they count as wrong.
        unreadable: number whose response names no option, or several; they count as wrong.
        by_group: kind of group -> group -> (accuracy, number of questions).
    """

    accuracy: float
    interval: Interval
    num_questions: int
    unanswered: int
    unreadable: int
    by_group: dict[str, dict[str, tuple[float, int]]]


def read_questions(path: Path | str) -> list[MultipleChoiceQuestion]:
    """Read multiple-choice questions with their responses, in any of the formats above.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: naming what is wrong, with file and item.
    """
    items = read_objects(Path(path), expected="multiple-choice questions with responses")
    return [choice for item, where in items for choice in _choices_of(item, where=where)]


def parse_choice(response: str, options: Sequence[str]) -> str | None:
    """The letter of the option that a response chooses; None where it names none, or different ones.

    In this order: nothing but a letter; nothing but an option's text, alone or after "the answer is" (case and
    punctuation aside); letters that are stated ("Answer: B") or stand as a label in front ("B. Berries"); letters that
    are named anywhere. An "A" before a word is the article ("A man walks").

    Args:
        response: what a model said.
        options: texts of the options without their letters; where there are none, the letters A to H are known.
    """
    letters = _ALPHABET[: len(options) or _NUM_UNKNOWN]
    bare = response.strip(" \t\r\n.,:;()[]{}<>*_\"'`").upper()
    if len(bare) == 1 and bare in letters:
        return bare
    for named in (_by_text(response, options), _by_statement(response), _by_mention(response)):
        if named:
            return named.pop() if len(named) == 1 and named <= set(letters) else None
    return None


def score_questions(
    choices: Sequence[MultipleChoiceQuestion], *, resamples: int = RESAMPLES, seed: int = 0
) -> MultipleChoiceRates:
    """Accuracy over questions, in all and by group.

    Raises:
        ValueError: there is no question.
    """
    if not choices:
        raise ValueError("no questions: accuracy needs at least one")
    chosen = [None if choice.response is None else parse_choice(choice.response, choice.options) for choice in choices]
    right = [letter == choice.answer for letter, choice in zip(chosen, choices, strict=True)]
    num_unanswered = sum(choice.response is None for choice in choices)
    return MultipleChoiceRates(
        accuracy=sum(right) / len(right),
        interval=_interval(choices, right, resamples=resamples, seed=seed),
        num_questions=len(right),
        unanswered=num_unanswered,
        unreadable=chosen.count(None) - num_unanswered,
        by_group=_by_group(choices, right),
    )


def _by_text(response: str, options: Sequence[str]) -> set[str]:
    stated = [text for match in _STATED_TEXT.finditer(response) for text in (match[1], match["sentence"])]
    said = {words for words in map(_words, (response, *stated)) if words}
    forms = {
        letter: {_words(text), _words(f"{letter} {text}")} for letter, text in zip(_ALPHABET, options, strict=False)
    }
    return {letter for letter, form in forms.items() if said & form}


def _by_statement(response: str) -> set[str]:
    stated = {letter for match in _STATED.finditer(response) for letter in _listed(match)}
    leading = _LEADING.match(response)
    if not leading:
        return stated
    labels = {*_listed(leading), *(match["letter"] for match in _NEXT_LABEL.finditer(response, leading.end()))}
    # "A. Apples. B. Berries. Answer: B" repeats the options, and chooses after that.
    return stated if stated and len(labels) > 1 else stated | labels


def _by_mention(response: str) -> set[str]:
    return {match["letter"] for match in _LETTER.finditer(response)}


def _listed(match: re.Match[str]) -> Iterator[str]:
    """The letter found, and the one that is listed right after it: with two, nothing is chosen."""
    yield (match["letter"] or match["small"]).upper()
    more = _MORE.match(match.string, match.end())
    if more:
        yield more["letter"]


def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.lower()))


def _interval(
    choices: Sequence[MultipleChoiceQuestion], right: Sequence[bool], *, resamples: int, seed: int
) -> Interval:
    videos = [number if choice.video is None else choice.video for number, choice in enumerate(choices)]
    questions = Counter(videos)
    hits = Counter(video for video, is_right in zip(videos, right, strict=True) if is_right)
    tops, bottoms = (np.array([[float(counts[video])] for video in questions]) for counts in (hits, questions))
    return bootstrap_ratios(tops, bottoms, resamples=resamples, seed=seed)[0]


def _by_group(
    choices: Sequence[MultipleChoiceQuestion], right: Sequence[bool]
) -> dict[str, dict[str, tuple[float, int]]]:
    members: dict[str, dict[str, list[bool]]] = {}
    for choice, is_right in zip(choices, right, strict=True):
        for kind, group in choice.groups.items():
            members.setdefault(kind, {}).setdefault(group, []).append(is_right)
    return {
        kind: {group: (sum(hits) / len(hits), len(hits)) for group, hits in groups.items()}
        for kind, groups in members.items()
    }


def _choices_of(item: Mapping[str, Any], *, where: str) -> Iterator[MultipleChoiceQuestion]:
    if "questions" in item:
        questions = item["questions"]
        if not isinstance(questions, list) or not all(isinstance(question, dict) for question in questions):
            raise ValueError(f"{where}: questions must be a list of objects")
        for number, question in enumerate(questions, start=1):
            # The video's keys first: a question may say otherwise of itself.
            yield _flat_choice({**item, **question}, where=f"{where}, question {number}")
    elif "ref" in item and "pred" in item:
        yield _published_choice(item, where=where)
    else:
        yield _flat_choice(item, where=where)


def _flat_choice(item: Mapping[str, Any], *, where: str) -> MultipleChoiceQuestion:
    question, options, video = item.get("question"), item.get("options", []), item.get("video_id", item.get("video"))
    is_list = isinstance(options, list) and options and all(isinstance(option, str) for option in options)
    if not isinstance(question, str) or not is_list:
        raise ValueError(
            f'{where}: expected {{"question": text, "options": [text, ...], "answer": letter, "response": text}}, '
            f"got the keys {', '.join(item)}"
        )
    texts = tuple(_unlabelled(option, letter) for option, letter in zip(options, _ALPHABET, strict=False))
    return MultipleChoiceQuestion(
        question,
        texts,
        _answer(item.get("answer"), texts, where=where),
        _response(item.get("response"), where=where),
        video if isinstance(video, str) else None,
        {key: item[key] for key in GROUPS if isinstance(item.get(key), str)},
    )


def _published_choice(item: Mapping[str, Any], *, where: str) -> MultipleChoiceQuestion:
    """2+ names the video "video" and its prompt as a turn of a conversation, 2 has a list "id" and a text."""
    prompt, video = item.get("prompt"), item.get("video", item.get("id"))
    question = prompt.get("value") if isinstance(prompt, dict) else prompt
    question = question if isinstance(question, str) else ""
    first = video[0] if isinstance(video, list) and video else video
    options = _options_in(question)
    return MultipleChoiceQuestion(
        question,
        options,
        _answer(item["ref"], options, where=where),
        _response(item["pred"], where=where),
        first if isinstance(first, str) else None,
    )


def _options_in(question: str) -> tuple[str, ...]:
    """The lines "A. ...", "B. ..." of a question, in the order of the alphabet."""
    options: list[str] = []
    for line in question.splitlines():
        label = _LABEL.match(line)
        if label and label[1] == _ALPHABET[len(options) :][:1]:
            options.append(line[label.end() :].strip())
    return tuple(options)


def _unlabelled(option: str, letter: str) -> str:
    label = _LABEL.match(option)
    return option[label.end() :].strip() if label and label[1] == letter else option.strip()


def _answer(value: Any, options: Sequence[str], *, where: str) -> str:
    letter = parse_choice(value.replace(END_OF_ANSWER, ""), options) if isinstance(value, str) else None
    if letter is None:
        raise ValueError(f"{where}: the right answer {value!r} is none of the options' letters")
    return letter


def _response(value: Any, *, where: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: the response must be one text, got {type(value).__name__}")
    text = (value or "").replace(END_OF_ANSWER, "").strip()
    return text or None
