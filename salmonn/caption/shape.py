"""The shape of captions: how it is requested, checked and enforced.

    shape = Shape({"caption": CaptionShape(words=WordRange(80, 120), avoid=("red hair",), trigger="ohwx")})
    for caption in captioner.caption_many(requests, shape=shape):
        print(caption.text, caption.shaping["caption"].length)

Each caption is a *dialogue*: a generator that yields questions and is sent the answers. A dialogue asks again if an
answer has a wrong length or wrong words, and may ask for a draft first. The dialogues of many clips, and of several
named captions of each clip, proceed side by side (`run_dialogues`), so that a model answers them in batches and
prefills a clip once for all its first questions. Nothing here imports torch.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from salmonn.caption.fields import CLIP_FIELDS, check_template, clip_fields, fill, find_fields
from salmonn.caption.generator import CaptionRequest
from salmonn.caption.generator import Generator as CaptionGenerator
from salmonn.caption.length import WordRange, cut_at_sentence, drop_unfinished_sentence, sentence_ends
from salmonn.caption.text_model import REFINE_KEY_FLAG, load_text_model
from salmonn.media.index import measured_seconds
from salmonn.records import Caption, Failure, LengthStatus, Shaping
from salmonn.score.budget import Budget
from salmonn.score.config import LLMConfig
from salmonn.score.text_spans import count_words, find_quote

ONLY_CAPTION = "caption"  # name of the caption of a shape without named prompts
MAX_ANSWERS = 3  # to a question with a range of words
MAX_ANSWERS_ABOUT_WORDS = 2  # to one with words to include or avoid
TRIGGER_TEMPLATE = "{trigger}, {caption}"
OUTPUT_FIELDS = ("trigger", "caption", *CLIP_FIELDS)

LANGUAGES = {
    "ar": "Arabic", "bn": "Bengali", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek", "en": "English",
    "es": "Spanish", "fa": "Persian", "fi": "Finnish", "fr": "French", "he": "Hebrew", "hi": "Hindi",
    "hu": "Hungarian", "id": "Indonesian", "it": "Italian", "ja": "Japanese", "ko": "Korean", "nl": "Dutch",
    "no": "Norwegian", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "sv": "Swedish",
    "th": "Thai", "tr": "Turkish", "uk": "Ukrainian", "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A question of a dialogue.

    Args:
        request: request with the prompt, and the earlier turns as history.
        is_for_text_model: whether a language model answers it that sees only the text.
    """

    request: CaptionRequest
    is_for_text_model: bool = False


@dataclass(frozen=True)
class ShapedText:
    """The result of a dialogue: a text, the answer that it was made from, the first prompt, and how it was made."""

    text: str
    answer: Caption
    prompt: str
    shaping: Shaping


Dialogue = Generator[Question, Caption, ShapedText]


class DialogueError(ValueError):
    """A dialogue ended without a text that can be used; the message has the reason."""


@dataclass(frozen=True)
class CaptionShape:
    """What one caption of a clip is asked for, checked for and made into.

    Prompts, prefix, suffix and template may have the fields {name}, {folder}, {duration} and {sidecar}.

    Args:
        prompt: prompt; None uses that of the request.
        words: number of words; None for any.
        include, avoid: words or phrases that the caption has to have, and must not have.
        language: code such as "de", or the name of a language.
        template: text around the caption, with the fields {caption} and {trigger}; None for the trigger, if there is
            one, before the caption.
        prefix, suffix: texts before and after all that, as they are.
        trigger: trigger word of a LoRA, for the templates.
        refine: prompt of a second stage, with the first stage's text as {caption}.
        by_text_model: whether a text model answers the second stage.

    Raises:
        ValueError: a template or a list of words cannot be used, or they contradict each other.
    """

    prompt: str | None = None
    words: WordRange | None = None
    include: tuple[str, ...] = ()
    avoid: tuple[str, ...] = ()
    language: str | None = None
    template: str | None = None
    prefix: str = ""
    suffix: str = ""
    trigger: str = ""
    refine: str | None = None
    by_text_model: bool = False

    def __post_init__(self) -> None:
        if self.prompt is not None:
            check_template(self.prompt, what="the prompt", known=CLIP_FIELDS)
        if self.refine is not None:
            check_template(self.refine, what="refine", known=("caption", *CLIP_FIELDS), needed="caption")
        if self.template is not None:
            check_template(self.template, what="template", known=OUTPUT_FIELDS, needed="caption")
        for what, text in (("prefix", self.prefix), ("suffix", self.suffix)):
            if text:
                check_template(text, what=what, known=("trigger", *CLIP_FIELDS))
        uses_trigger = "trigger" in self.fields
        if uses_trigger and not self.trigger.strip():
            raise ValueError("the template uses {trigger}, but no trigger is given; give one, such as --trigger ohwx")
        if self.trigger and not uses_trigger:
            raise ValueError(f"the trigger {self.trigger!r} is used nowhere; put {{trigger}} into the template")
        _check_words(self.include, self.avoid, self.words)
        if self.language is not None:
            language_name(self.language)

    @property
    def output_templates(self) -> tuple[str, str, str]:
        """Templates that make up the whole text, one after the other."""
        has_trigger_beside = "trigger" in find_fields(self.prefix) | find_fields(self.suffix)
        template = TRIGGER_TEMPLATE if self.trigger and not has_trigger_beside else "{caption}"
        return self.prefix, self.template or template, self.suffix

    @property
    def fields(self) -> set[str]:
        """Names of the fields of all templates."""
        texts = (self.prompt or "", self.refine or "", *self.output_templates)
        return {name for text in texts for name in find_fields(text)}

    @property
    def may_ask_again(self) -> bool:
        """Whether a model may be asked more than one question about the clip itself."""
        return bool(self.words or self.include or self.avoid or self.refine) and not self.by_text_model

    def dialogue(self, request: CaptionRequest, values: Mapping[str, str]) -> Dialogue:
        """Ask for the caption of one clip until it has the right shape, a bounded number of times.

        Args:
            request: request with its prompt.
            values: values of the fields about the clip.
        """
        first = prompt = request.with_context(fill(self.prompt, values) if self.prompt else request.prompt or "")
        request = replace(request, speech=None)
        draft: Caption | None = None
        if self.refine is not None:
            first = _join(prompt, self._language_request())
            draft = yield Question(replace(request, prompt=first))
            prompt = fill(self.refine, {**values, "caption": draft.text})
        question = replace(request, prompt=_join(prompt, *self._requests()))
        first = question.prompt or "" if draft is None else first
        answers: list[_CheckedAnswer] = []
        while True:
            answer = yield Question(question, self.by_text_model)
            if draft is not None and self.by_text_model:  # what is known of the clip, which the text model did not see
                answer = replace(draft, text=answer.text, finished=answer.finished, logprob=None, num_tokens=None)
            answers.append(_check_answer(self, answer, number=len(answers)))
            if not (complaints := answers[-1].complaints(self)):
                break
            history = (*question.history, (question.prompt or "", answer.text))
            question = replace(question, prompt=" ".join(complaints), history=history)
        best = min(answers, key=lambda one: one.rank)
        text = self.finish(best.text, values)
        shaping = Shaping(
            length=_length_status(best, answers) if self.words else None,
            missing_words=best.missing,
            unwanted_words=best.unwanted,
            num_answers=len(answers),
            language=self.language,
            draft=None if draft is None else draft.text,
            bare=None if text == best.text else best.text,
        )
        return ShapedText(text, best.answer, first, shaping)

    def finish(self, text: str, values: Mapping[str, str]) -> str:
        """Return a caption with what the templates put around it; `values` are those of the fields about the clip."""
        values = {**values, "caption": text, "trigger": self.trigger}
        return "".join(fill(template, values) for template in self.output_templates)

    def _requests(self) -> list[str]:
        """Return the sentences that ask for the shape."""
        requests = [self._language_request()]
        if self.words:
            requests.append(f"Write {self.words.minimum} to {self.words.maximum} words.")
        if self.include:
            requests.append(f"Use these words: {', '.join(self.include)}.")
        if self.avoid:
            requests.append(f"Do not use these words: {', '.join(self.avoid)}.")
        return requests

    def _language_request(self) -> str:
        return f"Answer in {language_name(self.language)}." if self.language else ""


@dataclass(frozen=True)
class _CheckedAnswer:
    """An answer, the text that remains of it, and what is wrong with that text.

    Args:
        answer: the answer.
        text: the answer, or its beginning up to the end of a sentence.
        number: number of the answer, from 0.
        excess: words of the text above the range, or negative below it.
        breaks_off: whether the text ends within a sentence, at the token limit.
        missing, unwanted: words to include that the text lacks, and words to avoid that it has.
    """

    answer: Caption
    text: str
    number: int
    excess: int = 0
    breaks_off: bool = False
    missing: tuple[str, ...] = ()
    unwanted: tuple[str, ...] = ()

    @property
    def is_cut(self) -> bool:
        return self.text != self.answer.text

    @property
    def is_right_length(self) -> bool:
        return not (self.excess or self.is_cut or self.breaks_off)

    @property
    def rank(self) -> tuple[int, bool, int, bool, int]:
        """Order of preference, the best first: right words, whole sentences, right length, not cut, early."""
        num_wrong = len(self.missing) + len(self.unwanted)
        return num_wrong, self.breaks_off, abs(self.excess), self.is_cut, self.number

    def complaints(self, shape: CaptionShape) -> list[str]:
        """Return what to ask for again; nothing if the answer is right, or was the last one."""
        complaints = []
        # A text that was cut off at the token limit, and has enough whole sentences, would be cut off again.
        is_good_enough = self.is_right_length or (not self.answer.finished and not self.excess and not self.breaks_off)
        if shape.words and not is_good_enough and self.number + 1 < MAX_ANSWERS:
            number, end = count_words(self.answer.text), "" if self.answer.finished else " and breaks off"
            limits = f"{shape.words.minimum} to {shape.words.maximum}"
            complaints.append(f"Your text has {number} words{end}; it must have {limits}.")
        if self.number + 1 < MAX_ANSWERS_ABOUT_WORDS:
            if self.missing:
                complaints.append(f"It must contain: {', '.join(self.missing)}.")
            if self.unwanted:
                complaints.append(f"It must not contain: {', '.join(self.unwanted)}.")
        return [*complaints, "Write it again, and reply with the text alone."] if complaints else []


def _check_answer(shape: CaptionShape, answer: Caption, *, number: int) -> _CheckedAnswer:
    """Cut an answer if need be, and find what is wrong with it."""
    text, excess, breaks_off = answer.text, 0, False
    if shape.words:
        if not answer.finished:
            breaks_off = not sentence_ends(text)
            text = drop_unfinished_sentence(text)
        excess = shape.words.distance(count_words(text))
        if excess > 0 and (cut := cut_at_sentence(text, shape.words.maximum)):
            excess_of_cut = shape.words.distance(count_words(cut))
            if abs(excess_of_cut) <= excess:
                text, excess, breaks_off = cut, excess_of_cut, False
    return _CheckedAnswer(
        answer=answer,
        text=text,
        number=number,
        excess=excess,
        breaks_off=breaks_off,
        missing=tuple(word for word in shape.include if find_quote(word, text) is None),
        unwanted=tuple(word for word in shape.avoid if find_quote(word, text) is not None),
    )


def _length_status(best: _CheckedAnswer, answers: Sequence[_CheckedAnswer]) -> LengthStatus:
    if best.excess or best.breaks_off:
        return "too_short" if best.excess < 0 else "too_long"
    if best.is_cut:
        return "cut"
    return "ok" if best.number == 0 or answers[0].is_right_length else "asked_again"


@dataclass(frozen=True)
class Shape:
    """The captions of each clip.

    Args:
        captions: their shapes by name, in the order in which they are reported.
        is_named: whether the names were given by the user, so that each text is reported under its name.
        text_model: the text model of second stages, if one of them has one.
        budget: what the text model may spend, together with other servers; None for no limit.
    """

    captions: Mapping[str, CaptionShape]
    is_named: bool = False
    text_model: LLMConfig | None = None
    budget: Budget | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if any(one.by_text_model for one in self.captions.values()) != (self.text_model is not None):
            raise ValueError("a text model answers second stages: give both refine and the text model, or neither")

    @property
    def may_ask_again(self) -> bool:
        """Whether a clip may be needed for more than one round of questions."""
        return any(one.may_ask_again for one in self.captions.values())

    @property
    def fields(self) -> set[str]:
        """Names of the fields of all templates."""
        return {name for one in self.captions.values() for name in one.fields}

    def combine(self, path: Path, texts: Mapping[str, ShapedText]) -> Caption:
        """Return one record for the captions of a clip."""
        first = texts[next(iter(self.captions))]
        return replace(
            first.answer,
            video=str(path),
            text=first.text,
            prompt=first.prompt,
            finished=all(one.answer.finished for one in texts.values()),
            captions={name: texts[name].text for name in self.captions} if self.is_named else {},
            shaping={name: texts[name].shaping for name in self.captions},
        )


Answers = list[Caption | str]  # answers, or why there is none


def shape_captions(
    shape: Shape,
    clips: Sequence[tuple[CaptionRequest, float]],
    *,
    answer: Callable[[Sequence[tuple[int, CaptionRequest]]], Answers],
) -> Answers:
    """Caption clips in a shape, all of them side by side.

    Args:
        shape: shape of the captions.
        clips: request of each clip, with its prompt, and the clip's length in seconds.
        answer: answers requests about clips, given with the index of the clip; the questions of one clip in a row.

    Returns:
        A caption for each clip, or why there is none: if one of a clip's captions fails, all of them are missing.

    Raises:
        LLMStoppedError: the text model is unavailable.
    """
    failures: dict[int, str] = {}
    dialogues: dict[tuple[int, str], Dialogue] = {}
    for index, (request, seconds) in enumerate(clips):
        try:
            place = request.source or request.path
            values = clip_fields(shape.fields, place, seconds=seconds, is_local=request.source is None)
        except ValueError as error:
            failures[index] = str(error)
            continue
        for name, one in shape.captions.items():
            dialogues[index, name] = one.dialogue(request, values)
    text_model = None
    if shape.text_model is not None:
        text_model = load_text_model(shape.text_model, budget=shape.budget, key_flag=REFINE_KEY_FLAG)
    texts = run_dialogues(dialogues, failures, answer=answer, answer_text=text_model.answer if text_model else None)
    return [
        failures[index]
        if index in failures
        else shape.combine(request.path, {name: texts[index, name] for name in shape.captions})
        for index, (request, _) in enumerate(clips)
    ]


def run_dialogues(
    dialogues: Mapping[tuple[int, str], Dialogue],
    failures: dict[int, str],
    *,
    answer: Callable[[Sequence[tuple[int, CaptionRequest]]], Answers],
    answer_text: Callable[[Sequence[CaptionRequest]], Answers] | None,
) -> dict[tuple[int, str], ShapedText]:
    """Run dialogues to their ends, one question of each at a time; see `shape_captions`.

    Args:
        dialogues: dialogues by clip and name.
        failures: receives the reasons of clips without an answer, by clip.
        answer: see `shape_captions`.
        answer_text: answers requests from their text alone.
    """
    texts: dict[tuple[int, str], ShapedText] = {}
    questions = {key: next(dialogue) for key, dialogue in dialogues.items()}
    while questions:
        about_clips = [key for key, question in questions.items() if not question.is_for_text_model]
        about_text = [key for key, question in questions.items() if question.is_for_text_model]
        answers: Answers = []
        if about_clips:
            answers += answer([(key[0], questions[key].request) for key in about_clips])
        if about_text:
            assert answer_text is not None
            answers += answer_text([questions[key].request for key in about_text])
        asked, questions = [*about_clips, *about_text], {}
        for key, reply in zip(asked, answers, strict=True):
            if isinstance(reply, str):
                failures.setdefault(key[0], reply)
                continue
            try:
                questions[key] = dialogues[key].send(reply)
            except StopIteration as end:
                texts[key] = end.value
            except DialogueError as error:
                failures.setdefault(key[0], str(error))
        questions = {key: question for key, question in questions.items() if key[0] not in failures}
    return texts


def generate_shaped(
    generator: CaptionGenerator, requests: Sequence[CaptionRequest], shape: Shape
) -> list[Caption | Failure]:
    """Caption clips in a shape with any `Generator`.

    `Captioner.caption_many` does this for many files and reads each only once.

    Args:
        generator: answers the questions.
        requests: requests with a prompt, unless the shape has prompts, and one sample each.
        shape: shape of the captions.

    Raises:
        ClipError: a file cannot be read.
        LLMStoppedError: the text model is unavailable.
    """
    needs_seconds = "duration" in shape.fields
    results = shape_captions(
        shape,
        [(request, measured_seconds(request.path) if needs_seconds else 0.0) for request in requests],
        answer=lambda asked: [caption for (caption,) in generator.generate([request for _, request in asked])],
    )
    return [
        Failure(str(request.path), f"{request.path}: {result}", "caption") if isinstance(result, str) else result
        for request, result in zip(requests, results, strict=True)
    ]


def language_name(language: str) -> str:
    """Return the English name of a language given by code or name; raises a ValueError for an unknown code."""
    language = language.strip()
    name = LANGUAGES.get(language.lower().split("-")[0])
    if name is None and len(language) <= 3:
        raise ValueError(
            f"language {language!r} is not a known code; use one of {', '.join(LANGUAGES)}, or the language's name"
        )
    return name or language


def _check_words(include: Sequence[str], avoid: Sequence[str], words: WordRange | None) -> None:
    """Raise a ValueError for words to include or avoid that no caption can satisfy."""
    for what, phrases in (("include", include), ("avoid", avoid)):
        if empty := [phrase for phrase in phrases if not count_words(phrase)]:
            raise ValueError(f"{what} has {empty[0]!r}, which contains no word; leave it out")
    for phrase in include:
        if clash := [one for one in avoid if find_quote(one, phrase)]:
            raise ValueError(f"{phrase!r} is to be included and {clash[0]!r} to be avoided; leave one of them out")
    needed = sum(count_words(phrase) for phrase in dict.fromkeys(include))
    if words and needed > words.maximum:
        raise ValueError(f"the words to include are {needed}, and the caption may have {words.maximum} at most")


def _join(prompt: str, *requests: str) -> str:
    return "\n".join(part for part in (prompt, " ".join(filter(None, requests))) if part)
