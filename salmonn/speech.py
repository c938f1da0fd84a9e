"""Records of speech: utterances with the times of their words, and counts of how well a caption quotes them.

Transcripts, sidecar files, captions with speech items and prompts share `SpeechEvent`. As an atomic event of a
reference (`salmonn.records.Event`), speech is a sentence that quotes the words: see `quote_words`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

DEFAULT_SPEAKER = "a voice"
MAX_CONTEXT_CHARS = 4000  # of a transcript in a prompt: some five minutes of speech, a thousand tokens
# What a tokenizer could take for a special token, and characters that no text has.
_UNSAFE = re.compile(r"[<>\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True)
class SpokenWord:
    """One spoken word.

    Args:
        text: the word, with the punctuation that follows it.
        start_seconds, end_seconds: time from the start of the video.
        probability: probability of the word under the speech recognizer; None if unknown.
    """

    text: str
    start_seconds: float
    end_seconds: float
    probability: float | None = None


@dataclass(frozen=True)
class SpeechEvent:
    """An utterance.

    Args:
        text: what is said.
        start_seconds, end_seconds: time from the start of the video; None if unknown.
        words: words of the text with their times; empty if these are unknown.
        speaker: who speaks, as a name or a short description; "" if unknown.
    """

    text: str
    start_seconds: float | None = None
    end_seconds: float | None = None
    words: tuple[SpokenWord, ...] = ()
    speaker: str = ""


@dataclass(frozen=True)
class Dialogue:
    """How a caption quotes the speech of its video; see `salmonn.score.dialogue`.

    Args:
        num_spoken: words of the reference speech.
        num_quoted: words that the caption quotes as speech.
        num_matched: quoted words that agree with a spoken one, in the order of the speech.
        num_errors: substituted, omitted and inserted words.
    """

    num_spoken: int
    num_quoted: int
    num_matched: int
    num_errors: int

    @property
    def accuracy(self) -> float:
        """1 - word error rate, at least 0; without speech, 1 for a caption that quotes none and 0 for any other."""
        return max(0.0, 1 - self.num_errors / max(self.num_spoken, 1))


def quote_words(speech: SpeechEvent) -> str:
    """Return an utterance as the text of an atomic event, such as `a voice says: "Good morning."`."""
    text = " ".join(speech.text.split()).replace('"', "'")
    return f'{speech.speaker or DEFAULT_SPEAKER} says: "{text}"'


def speech_within(
    speech: Sequence[SpeechEvent], start_seconds: float | None, end_seconds: float | None
) -> list[SpeechEvent]:
    """Return the speech of a span; None leaves the span open at that end.

    An utterance whose words have times is cut to the words whose middle lies in the span. Any other belongs to the span
    that its middle lies in, or, if its time is unknown, to every span.
    """

    def is_inside(start: float, end: float) -> bool:
        middle = (start + end) / 2
        return middle >= (start_seconds or 0.0) and (end_seconds is None or middle < end_seconds)

    found = []
    for one in speech:
        words = tuple(word for word in one.words if is_inside(word.start_seconds, word.end_seconds))
        if one.words and words == one.words:
            found.append(one)
        elif words:
            text = " ".join(word.text.strip() for word in words)
            start, end = words[0].start_seconds, words[-1].end_seconds
            found.append(replace(one, text=text, words=words, start_seconds=start, end_seconds=end))
        elif not one.words:
            first = one.start_seconds
            if first is None or is_inside(first, first if one.end_seconds is None else one.end_seconds):
                found.append(one)
    return found


def describe_speech(
    speech: Sequence[SpeechEvent], start_seconds: float | None, end_seconds: float | None
) -> tuple[str, bool]:
    """Write the speech of a span as context for a prompt, with times from the start of the span.

    Args:
        speech: utterances of the video.
        start_seconds, end_seconds: the span; None leaves it open at that end.

    Returns:
        The text, and whether it was cut off at `MAX_CONTEXT_CHARS`, after an utterance.
    """
    lines, length, is_cut = [], 0, False
    for one in speech_within(speech, start_seconds, end_seconds):
        times = [
            f"{max(0.0, time - (start_seconds or 0.0)):.1f}"
            for time in (one.start_seconds, one.end_seconds)
            if time is not None
        ]
        words = " ".join(_UNSAFE.sub(" ", f"{one.speaker}: {one.text}" if one.speaker else one.text).split())
        line = f"[{'-'.join(times)}] {words}" if times else words
        length += len(line) + 1
        if length > MAX_CONTEXT_CHARS:
            is_cut = True
            break
        lines.append(line)
    if not lines and not is_cut:
        return "Transcript of the speech: nothing is said.", False
    title = "Transcript of the speech, with times in seconds (it may have errors):"
    return "\n".join([title, *lines, *(["..."] if is_cut else [])]), is_cut
