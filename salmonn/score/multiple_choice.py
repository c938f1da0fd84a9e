"""Accuracy on multiple-choice questions, from files of responses in several formats.

`read_questions` reads a JSON list (`.json`) or JSON lines of
- videos with their questions, as in Video-MME's result files: `{"video_id", "duration", "domain", "sub_category",
  "questions": [{"task_type", "question", "options": ["A. ...", ...], "answer": "C", "response": "..."}]}`;
- questions: `{"question", "options", "answer", "response"}`, optionally with `video` and the keys of `GROUPS`;
- output of the published code of video-SALMONN 2 and 2+: `{"video" or "id", "prompt", "ref": "C", "pred": "..."}`.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from salmonn.score.formats import END_OF_ANSWER, read_objects
from salmonn.score.stats import Interval, bootstrap_ratios

GROUPS = ("duration", "domain", "sub_category", "task_type")  # accuracy is also reported by these keys

_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_NUM_UNKNOWN = 8  # options assumed if they are not listed; no test set in use has more
_LABEL = re.compile(r"\s*\(?([A-Z])[.):]\s*")
# A capital by itself: not part of a word ("A's", "A-frame", "D.C."), nor negated. "A man" and "I think" start with
# words, "A is right" does not.
_CAPITAL = (
    r"(?<![\w'\u2019-])(?<![A-Z]\.)(?<!\b[Nn]ot )(?P<letter>[A-Z])(?![\w'\u2019]|-\w|\.[A-Z]\b)"
    r"(?!(?<=[AI])[ \t]+(?!(?:is|was|or|and|because|since|as|seems)\b)\w)"
)
# A lower-case letter counts only if just punctuation can follow: "b.", "(b)".
_SMALL = r"(?<![\w'\u2019-])(?P<small>[a-z])(?=[\W_]*$|[.):\]*<}])"
_LETTER = re.compile(_CAPITAL)
# The rest of "A or B", "A, B and C" after the first letter.
_MORE = re.compile(
    rf"[)\]*]*[ \t]*(?:[,/&]|\bor\b|\band\b)[ \t]*(?:(?:or|and)[ \t]+)?(?:(?i:option)[ \t]+)?[(\[*]*{_CAPITAL}"
)
_CUE = (
    r"\b(?i:answers?|(?:correct|right|best) (?:option|choice|one)|choose|pick|select)\b"
    r"(?i:\s+(?:is|was|would be|should be|must be|option|choice|letter))*"
)
_STATED = re.compile(rf"{_CUE}[\W_]*(?:{_CAPITAL}|{_SMALL})")
# A label at the start: "B. Berries", "(B)", "B: since ...", "**B**", "B\nThe ...", "A or B".
_LEADING = re.compile(
    rf"[\W_]*(?:{_CAPITAL}(?=[ \t]*(?:[^\w\s'\u2019]|[\r\n]|$|(?:or|and)\b))|(?P<small>[a-z])[.):])",
)
# Further labels at the start of a line or sentence: the response repeats the options.
_NEXT_LABEL = re.compile(rf"(?<=[.!?;\n])[ \t]*[(\[*]*{_CAPITAL}[.):]")
_STATED_TEXT = re.compile(rf"{_CUE}[\s:=*\"'\u201c]*((?P<sentence>[^\n]+?)(?:[.!?][ \t][^\n]*)?)$", re.MULTILINE)
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class MultipleChoiceQuestion:
    """A multiple-choice question with a model's response.

    Args:
        question: text of the question.
        options: texts of the options without their letters; empty if unknown.
        answer: letter of the correct option.
        response: text that the model generated; None if it gave no response.
        video: video that the question is about; None if unknown.
        groups: groups that the question belongs to, for example {"duration": "short"}.
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
        accuracy: share of all questions with a correct response.
        interval: 95 % interval over videos; a question about an unknown video counts as its own video.
        num_questions: number of questions.
        unanswered: number of questions without a response; they count as wrong.
        unreadable: number of responses that name no option, or several; they count as wrong.
        by_group: (accuracy, number of questions) by key of `GROUPS` and its value.
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
        ValueError: an item is invalid; the message has the file and item.
    """
    found = []
    for item, where in read_objects(Path(path), expected="multiple-choice questions with responses"):
        if "questions" in item:
            questions = item["questions"]
            if not isinstance(questions, list) or not all(isinstance(question, dict) for question in questions):
                raise ValueError(f"{where}: questions must be a list of objects")
            # Keys of a question override those of its video.
            found += [
                _parse_flat({**item, **question}, where=f"{where}, question {number}")
                for number, question in enumerate(questions, start=1)
            ]
        elif "ref" in item and "pred" in item:
            found.append(_parse_published(item, where=where))
        else:
            found.append(_parse_flat(item, where=where))
    return found


def parse_choice(response: str, options: Sequence[str]) -> str | None:
    """Return the letter of the option that a response chooses; None if it names none, or several.

    In this order: only a letter; only an option's text, alone or after "the answer is" (ignoring case and punctuation);
    stated letters ("Answer: B") or labels at the start ("B. Berries"); letters anywhere. An "A" before a word is the
    article ("A man walks").

    Args:
        response: text that the model generated.
        options: texts of the options without their letters; if empty, the letters A to H are accepted.
    """
    letters = _ALPHABET[: len(options) or _NUM_UNKNOWN]
    bare = response.strip(" \t\r\n.,:;()[]{}<>*_\"'`").upper()
    if len(bare) == 1 and bare in letters:
        return bare
    mentioned = {match["letter"] for match in _LETTER.finditer(response)}
    for named in (_letters_by_text(response, options), _stated_letters(response), mentioned):
        if named:
            return named.pop() if len(named) == 1 and named <= set(letters) else None
    return None


def score_questions(questions: Sequence[MultipleChoiceQuestion]) -> MultipleChoiceRates:
    """Return the accuracy over questions, overall and by group.

    Raises:
        ValueError: there are no questions.
    """
    if not questions:
        raise ValueError("no questions: accuracy needs at least one")
    chosen = [
        None if question.response is None else parse_choice(question.response, question.options)
        for question in questions
    ]
    correct = [letter == question.answer for letter, question in zip(chosen, questions, strict=True)]
    num_unanswered = sum(question.response is None for question in questions)

    videos = [number if question.video is None else question.video for number, question in enumerate(questions)]
    totals, hits = (
        Counter(videos),
        Counter(video for video, is_correct in zip(videos, correct, strict=True) if is_correct),
    )
    numerators, denominators = (np.array([[float(counts[video])] for video in totals]) for counts in (hits, totals))

    members: dict[str, dict[str, list[bool]]] = {}
    for question, is_correct in zip(questions, correct, strict=True):
        for key, group in question.groups.items():
            members.setdefault(key, {}).setdefault(group, []).append(is_correct)
    return MultipleChoiceRates(
        accuracy=sum(correct) / len(correct),
        interval=bootstrap_ratios(numerators, denominators)[0],
        num_questions=len(correct),
        unanswered=num_unanswered,
        unreadable=chosen.count(None) - num_unanswered,
        by_group={
            key: {group: (sum(hits) / len(hits), len(hits)) for group, hits in groups.items()}
            for key, groups in members.items()
        },
    )


def _letters_by_text(response: str, options: Sequence[str]) -> set[str]:
    """Return the letters of options whose text, with or without the letter, is all that the response or answer says."""

    def words(text: str) -> tuple[str, ...]:
        return tuple(_WORD.findall(text.lower()))

    stated = [text for match in _STATED_TEXT.finditer(response) for text in (match[1], match["sentence"])]
    said = {words(text) for text in (response, *stated)} - {()}
    return {
        letter
        for letter, text in zip(_ALPHABET, options, strict=False)
        if said & {words(text), words(f"{letter} {text}")}
    }


def _stated_letters(response: str) -> set[str]:
    stated = {letter for match in _STATED.finditer(response) for letter in _listed_letters(match)}
    leading = _LEADING.match(response)
    if not leading:
        return stated
    labels = {*_listed_letters(leading), *(match["letter"] for match in _NEXT_LABEL.finditer(response, leading.end()))}
    # "A. Apples. B. Berries. Answer: B" repeats the options, and chooses after that.
    return stated if stated and len(labels) > 1 else stated | labels


def _listed_letters(match: re.Match[str]) -> Iterator[str]:
    """Yield the matched letter, and one listed directly after it: two letters choose nothing."""
    yield (match["letter"] or match["small"]).upper()
    more = _MORE.match(match.string, match.end())
    if more:
        yield more["letter"]


def _parse_flat(item: Mapping[str, Any], *, where: str) -> MultipleChoiceQuestion:
    question, options, video = item.get("question"), item.get("options", []), item.get("video_id", item.get("video"))
    is_list = isinstance(options, list) and options and all(isinstance(option, str) for option in options)
    if not isinstance(question, str) or not is_list:
        raise ValueError(
            f'{where}: expected {{"question": text, "options": [text, ...], "answer": letter, "response": text}}, '
            f"got the keys {', '.join(item)}"
        )
    texts = []
    for option, letter in zip(options, _ALPHABET, strict=False):
        label = _LABEL.match(option)
        texts.append(option[label.end() :].strip() if label and label[1] == letter else option.strip())
    return MultipleChoiceQuestion(
        question,
        tuple(texts),
        _parse_answer(item.get("answer"), texts, where=where),
        _parse_response(item.get("response"), where=where),
        video if isinstance(video, str) else None,
        {key: item[key] for key in GROUPS if isinstance(item.get(key), str)},
    )


def _parse_published(item: Mapping[str, Any], *, where: str) -> MultipleChoiceQuestion:
    """Parse output of 2+, with "video" and a prompt in conversation format, or of 2, with a list "id" and a text."""
    prompt, video = item.get("prompt"), item.get("video", item.get("id"))
    question = prompt.get("value") if isinstance(prompt, dict) else prompt
    question = question if isinstance(question, str) else ""
    first = video[0] if isinstance(video, list) and video else video
    options: list[str] = []
    for line in question.splitlines():  # lines "A. ...", "B. ...", in the order of the alphabet
        label = _LABEL.match(line)
        if label and label[1] == _ALPHABET[len(options) :][:1]:
            options.append(line[label.end() :].strip())
    return MultipleChoiceQuestion(
        question,
        tuple(options),
        _parse_answer(item["ref"], options, where=where),
        _parse_response(item["pred"], where=where),
        first if isinstance(first, str) else None,
    )


def _parse_answer(value: Any, options: Sequence[str], *, where: str) -> str:
    letter = parse_choice(value.replace(END_OF_ANSWER, ""), options) if isinstance(value, str) else None
    if letter is None:
        raise ValueError(f"{where}: the correct answer {value!r} is not the letter of an option")
    return letter


def _parse_response(value: Any, *, where: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: the response must be one text, got {type(value).__name__}")
    return (value or "").replace(END_OF_ANSWER, "").strip() or None
