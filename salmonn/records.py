"""Records on disk, one JSON object per line: references in; captions, scores and comparisons out.

All stages of a run read and write these with `salmonn.files`. Neither needs torch, so annotation and scoring run on any
machine.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from salmonn.speech import Dialogue

EventModality = Literal["visual", "audio", "speech"]
Modality = Literal["both", "visual", "audio"]
FailureStage = Literal["read", "caption", "write"]
LengthStatus = Literal["ok", "asked_again", "cut", "too_short", "too_long"]


@dataclass(frozen=True)
class Event:
    """One atomic event: a fact that a caption can state, miss or get wrong.

    Args:
        text: the fact as a short clause, for example "a red circle moves to the left".
        modality: visual, audio (any sound but speech) or speech.
        start_seconds, end_seconds: time from the start of the video; None if unknown.
    """

    text: str
    modality: EventModality = "visual"
    start_seconds: float | None = None
    end_seconds: float | None = None

    @property
    def is_audible(self) -> bool:
        """Whether the event is in the audio, speech included."""
        return self.modality != "visual"

    def precedes(self, other: "Event") -> bool:
        """Return whether this event starts earlier than the other and ends by its start; False for unknown times."""
        if self.start_seconds is None or self.end_seconds is None or other.start_seconds is None:
            return False
        return self.end_seconds <= other.start_seconds and self.start_seconds < other.start_seconds

    def lies_within(self, start_seconds: float | None, end_seconds: float | None) -> bool:
        """Return whether at least half of the event lies in a span; None leaves the span open at that end.

        An event of unknown time lies in the open span only. An event without duration lies in a span that starts at or
        before it and ends after it.
        """
        if start_seconds is None and end_seconds is None:
            return True
        if self.start_seconds is None:
            return False
        first = -math.inf if start_seconds is None else start_seconds
        last = math.inf if end_seconds is None else end_seconds
        end = self.start_seconds if self.end_seconds is None else self.end_seconds
        if end <= self.start_seconds:
            return first <= self.start_seconds < last
        return min(end, last) - max(self.start_seconds, first) >= (end - self.start_seconds) / 2


@dataclass(frozen=True)
class Question:
    """A question about a video with its short answer; `kind` groups questions in reports."""

    question: str
    answer: str
    kind: str = "open"


@dataclass(frozen=True)
class Reference:
    """Annotation of one video.

    Args:
        video: path of the file, relative to the folder of the JSONL file that holds this record, or absolute.
        events: the atomic events, by time.
        caption: the full reference caption (the *ground truth* of guided DPO).
        human_caption: an imperfect caption, such as an annotator in a hurry would write.
        visual_caption, audio_caption: captions of the video without its audio, and of the audio alone.
        questions: questions about the video, with answers.
        duration_seconds: length of the video.
    """

    video: str
    events: tuple[Event, ...] = ()
    caption: str = ""
    human_caption: str = ""
    visual_caption: str = ""
    audio_caption: str = ""
    questions: tuple[Question, ...] = ()
    duration_seconds: float | None = None


@dataclass(frozen=True)
class Shaping:
    """How a caption got the requested shape.

    Args:
        length: whether the number of words is in the range: "ok"; "asked_again" if only a later answer was; "cut" if
            an answer was cut at the end of a sentence; "too_short" or "too_long" if no answer was, or could be cut.
            None if no range was requested.
        missing_words: words to include that the caption does not have.
        unwanted_words: words to avoid that the caption has.
        num_answers: number of answers, the first included.
        language: language that was requested; None if none was. The answer is not checked.
        draft: caption of the first stage, which the caption was made from; None without a second stage.
        bare: the caption without trigger, prefix and suffix, and what else a template adds; None if nothing is added.
    """

    length: LengthStatus | None = None
    missing_words: tuple[str, ...] = ()
    unwanted_words: tuple[str, ...] = ()
    num_answers: int = 1
    language: str | None = None
    draft: str | None = None
    bare: str | None = None

    @property
    def is_met(self) -> bool:
        """Whether the caption has the requested length and words."""
        return self.length not in ("too_short", "too_long") and not (self.missing_words or self.unwanted_words)


@dataclass(frozen=True)
class SpokenLine:
    """Words that a person says.

    Args:
        speaker: who speaks, as far as it can be seen or heard, such as "a woman in a red coat"; or "unknown".
        words: what is said.
        start_seconds, end_seconds: time from the start of the video.
    """

    speaker: str
    words: str
    start_seconds: float
    end_seconds: float


@dataclass(frozen=True)
class EventCaption:
    """A caption in the form of events; `salmonn.score.structured` has its JSON schema and its text.

    Args:
        scene: where it takes place and who or what is there, in a sentence or two.
        events: what happens, by time: what is seen (visual), and sounds other than speech (audio).
        speech: what is said, by time.
        on_screen_text: text that can be read on the screen.
        camera: shot size, angle and movement of the camera.
        sound: the sound as a whole: music, ambience, noise.
    """

    scene: str
    events: tuple[Event, ...] = ()
    speech: tuple[SpokenLine, ...] = ()
    on_screen_text: tuple[str, ...] = ()
    camera: str = ""
    sound: str = ""

    def all_events(self) -> tuple[Event, ...]:
        """Return events and speech as events, in order of time, for judges and subtitles."""
        spoken = (
            Event(f'{line.speaker} says: "{line.words}"', "speech", line.start_seconds, line.end_seconds)
            for line in self.speech
        )
        return tuple(sorted([*self.events, *spoken], key=lambda event: event.start_seconds or 0.0))


@dataclass(frozen=True)
class Fusion:
    """How one caption was made from those of the segments of a video.

    Args:
        writer: "rule", or the model that wrote it.
        num_segments: number of segments with a caption.
        num_missing_segments: number of segments that could not be captioned, which the caption lacks.
        num_requests: number of requests to the model, repairs included.
        judge: judge that compared the caption with those of the segments; None if none did.
        num_facts: number of facts in the captions of the segments; facts that neighbours share count once.
        lost, changed, added: facts that the caption lacks, states wrongly or out of order, and statements that no
            segment's caption has.
        source: hash of its inputs.
    """

    writer: str = "rule"
    num_segments: int = 1
    num_missing_segments: int = 0
    num_requests: int = 0
    judge: str | None = None
    num_facts: int | None = None
    lost: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    source: str = ""


@dataclass(frozen=True)
class Caption:
    """Answer of a model to a prompt about a video.

    Args:
        video: path of the file, as in the reference.
        text: the answer.
        prompt: the prompt.
        model: folder or hub id of the model.
        sample: number of the sample, if several were generated for one video.
        finished: False if the answer was cut off at the token limit.
        start_seconds, end_seconds: the part of the video that was read; None for an open end.
        size_bytes, modified_ns: size and modification time (nanoseconds since 1970) of the file when it was captioned,
            by which a changed file is recognised; None if not recorded.
        etag: version of a remote file as its store reports it (ETag or content hash); None if it reports none.
        segment, num_segments: index of the captioned segment, and number of segments that the video was split into.
        num_failed_segments: number of segments that could not be captioned.
        complete: False if a part of the video, or of the part that was to be read, is missing: the file is damaged.
        modality: what the model was given: frames and audio ("both"), or what the file has of them ("visual", "audio");
            None if not recorded.
        warnings: what was lost, ignored or guessed when the file was read, one sentence each.
        logprob: natural logarithm of the answer's probability under the model: the sum over its tokens, the end token
            included; None if not recorded.
        num_tokens: number of these tokens; None if not recorded.
        captions: where the video was captioned with several named prompts, the text for each; `text` is the first.
        shaping: how a requested length or requested words were met, by name of the prompt ("caption" if there is one).
        fusion: how it was made from the captions of segments; None for an answer of a model about the video.
        structure: the caption in the form of events, if it was requested so; `text` is made from it.
    """

    video: str
    text: str
    prompt: str = ""
    model: str = ""
    sample: int = 0
    finished: bool = True
    start_seconds: float | None = None
    end_seconds: float | None = None
    size_bytes: int | None = None
    modified_ns: int | None = None
    segment: int = 0
    num_segments: int = 1
    num_failed_segments: int = 0
    complete: bool = True
    modality: Modality | None = None
    warnings: tuple[str, ...] = ()
    logprob: float | None = None
    num_tokens: int | None = None
    captions: dict[str, str] = field(default_factory=dict, hash=False)
    shaping: dict[str, Shaping] = field(default_factory=dict, hash=False)
    fusion: Fusion | None = None
    structure: EventCaption | None = None
    etag: str | None = None


@dataclass(frozen=True)
class Failure:
    """A video, or a part of one, that could not be captioned.

    Args:
        video: path of the file.
        reason: the cause, and what to do.
        stage: step that failed: reading the file, generating the caption, or writing it.
        start_seconds, end_seconds: the part of the video; None for an open end.
        size_bytes, modified_ns, etag: version of the file, as in `Caption`.
    """

    video: str
    reason: str
    stage: FailureStage = "read"
    start_seconds: float | None = None
    end_seconds: float | None = None
    size_bytes: int | None = None
    modified_ns: int | None = None
    etag: str | None = None


@dataclass(frozen=True)
class Mention:
    """A reference event that a caption mentions.

    Args:
        event: the event.
        quote: the part of the caption that mentions it; "" if the judge does not quote.
        is_correct: False if a detail that matters is wrong.
        reason: the mistake, if the quote does not show it; "" if the judge gives none.
    """

    event: Event
    quote: str = ""
    is_correct: bool = True
    reason: str = ""


@dataclass(frozen=True)
class Score:
    """Score of one caption against N events: N = missing + incorrect + correct.

    Args:
        video, sample: video and sample number of the caption.
        num_events: N.
        missing, incorrect, hallucinated: counts.
        num_words, num_repeated_words: number of words in the caption, and in its repeated clauses.
        finished: False if the caption was cut off at the token limit.
        missed: texts of the missing events.
        mentions: the correct and incorrect events, in the order in which the caption mentions them.
        hallucinations: parts of the caption that match no event.
        repeated: parts of the caption that paraphrase other parts, if the judge quotes them.
        start_seconds, end_seconds: the part of the video that was captioned, as in the caption.
        dialogue: how the caption quotes speech; None, and absent from files, if there is nothing to compare.
        num_excluded: number of events of the reference that do not count, and are not in N, because the model was given
            frames alone or audio alone (`Caption.modality`); absent from files if 0.
    """

    video: str
    num_events: int
    missing: int
    incorrect: int
    hallucinated: int
    num_words: int = 0
    num_repeated_words: int = 0
    sample: int = 0
    finished: bool = True
    missed: tuple[str, ...] = ()
    mentions: tuple[Mention, ...] = ()
    hallucinations: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    start_seconds: float | None = None
    end_seconds: float | None = None
    dialogue: Dialogue | None = None
    num_excluded: int = 0

    @property
    def incorrect_events(self) -> tuple[str, ...]:
        """Texts of the incorrect events."""
        return tuple(mention.event.text for mention in self.mentions if not mention.is_correct)

    @property
    def total(self) -> float:
        """(missing + incorrect + hallucinated) / N, with N at least 1 so that errors count even without events."""
        return (self.missing + self.incorrect + self.hallucinated) / max(self.num_events, 1)

    @property
    def repetition(self) -> float:
        """Fraction of the caption's words that are in repeated clauses."""
        return self.num_repeated_words / max(self.num_words, 1)


@dataclass(frozen=True)
class Unscored:
    """A caption that the judge could not score, and the reason."""

    video: str
    reason: str
    sample: int = 0
    start_seconds: float | None = None
    end_seconds: float | None = None


@dataclass(frozen=True)
class JudgeInfo:
    """How a set of captions was scored.

    Args:
        judge: "rule", or a model with its server.
        prompt_hash: hash of the judge's prompt, or version of its rules.
        protocol: "salmonn" or "published".
        date, version: time in UTC and ISO format, and version of salmonn.
        seeds: seed of each pass over the captions.
        totals: Total of each pass; None for a pass in which nothing could be scored.
        reported_pass: index of the pass that the scores are from.
    """

    judge: str
    prompt_hash: str
    protocol: str
    date: str
    version: str
    seeds: tuple[int, ...] = (0,)
    totals: tuple[float | None, ...] = ()
    reported_pass: int = 0


@dataclass(frozen=True)
class Mark:
    """A judgement of a clause: characters `start` to `end` of a caption, exclusive, are right or wrong.

    Marks are made by people, or derived from a judge's quotes.
    """

    start: int
    end: int
    is_right: bool = False


@dataclass(frozen=True)
class Comparison:
    """Two answers to one prompt about a video; `chosen` is better than `rejected`. Every recipe reads them.

    If only one was rated (good or bad), for losses that treat each answer separately, the other is "" and not
    finished: an answer without tokens, on which no loss depends.

    Args:
        video: path of the file with the video, or the audio or image alone, as in `Reference.video`.
        prompt: the prompt that both answer.
        chosen, rejected: the better and the worse answer.
        ground_truth: a correct answer, for the cross-entropy term of guided DPO; "" where there is none.
        margin: how much better the chosen answer is, in units of the source's rating; None where it is unknown.
        source: who compared them: the name of a reward or judge; "vote", "edit", "missing" or "rating" of a person;
            "published" or "given" in another format.
        chosen_finished, rejected_finished: False for an answer that was cut off at the token limit.
        history: earlier turns of the conversation, (prompt, answer) each.
        modality: what of the video the answers are about.
        audio: path of the audio track where it is a separate file.
        start_seconds, end_seconds: the part of the video that the answers are about; None for an open end.
        rater: id of the person who compared them, as in a vote; "" if unknown, or if it was not a person.
        chosen_marks, rejected_marks: marks on clauses of the answers.
    """

    video: str
    prompt: str
    chosen: str
    rejected: str
    ground_truth: str = ""
    margin: float | None = None
    source: str = ""
    chosen_finished: bool = True
    rejected_finished: bool = True
    history: tuple[tuple[str, str], ...] = ()
    modality: Modality = "both"
    audio: str | None = None
    start_seconds: float | None = None
    end_seconds: float | None = None
    rater: str = ""
    chosen_marks: tuple[Mark, ...] = ()
    rejected_marks: tuple[Mark, ...] = ()
