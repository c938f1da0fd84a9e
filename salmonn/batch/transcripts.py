"""Transcripts of videos: their record, where captioning finds them, and how they become events of references.

`salmonn transcribe` writes one `Transcript` per video to a JSONL file, and on request files next to the videos. As
context of captions, speech is also read from subtitles of any origin next to a video: film.json, film.vtt or film.srt.
"""

import html
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from salmonn.batch.discovery import VideoFile
from salmonn.batch.ledger_files import VERSION_FIELDS, HashSet, hash_key, parse_last_line
from salmonn.files import parse_record
from salmonn.records import Caption, Event, Reference
from salmonn.score.quotations import find_quotations
from salmonn.speech import SpeechEvent, quote_words

NO_TRANSCRIPT = "no transcript"  # start of the warning
MAX_SIDECAR_BYTES = 16 << 20
_CUE_TIMES = re.compile(r"((?:\d+:)?\d{1,2}:\d{1,2}[.,]\d{1,3})\s*-->\s*((?:\d+:)?\d{1,2}:\d{1,2}[.,]\d{1,3})")
_VOICE = re.compile(r"<v(?:\.[^\s>]*)?\s+([^>]+)>")
_TAG = re.compile(r"<[^>]*>|\{\\[^}]*\}")


@dataclass(frozen=True)
class Transcript(Caption):
    """The speech of a video, as a caption with its words as the text.

    Args:
        speech: utterances by time; empty if nothing was recognized.
        language: code of the language; "" if nothing was recognized.
        has_audio: False if the file has no audio.
    """

    speech: tuple[SpeechEvent, ...] = ()
    language: str = ""
    has_audio: bool = True

    def cues(self) -> list[Caption]:
        """Return a caption for each utterance, as subtitles show them."""
        return [
            Caption(
                self.video,
                f"{one.speaker}: {one.text}" if one.speaker else one.text,
                start_seconds=one.start_seconds,
                end_seconds=one.end_seconds,
            )
            for one in self.speech
        ]


class SpeechContext:
    """Speech as context of captions: from transcripts, or from files next to the videos.

    Args:
        files: transcripts; None for files next to the videos.
        captions: subtitle files that are captions and not speech, by `subtitle_key`.
    """

    def __init__(self, files: "TranscriptFiles | None" = None, *, captions: HashSet | None = None) -> None:
        self._files = files
        self._captions = captions or HashSet()

    def find(self, video: VideoFile) -> tuple[tuple[SpeechEvent, ...] | None, str]:
        """Return the speech of a video as it is now, and an empty text; or None, and why there is none."""
        if self._files is None:
            try:
                speech = read_speech_beside(video.path, captions=self._captions)
            except (OSError, ValueError) as error:
                return None, f"{NO_TRANSCRIPT}: {error}"
            return speech, "" if speech is not None else f"{NO_TRANSCRIPT} next to the video"
        transcript = self._files.get(video.path)
        if transcript is None:
            return None, f"{NO_TRANSCRIPT} of the video"
        if any(getattr(transcript, name) != getattr(video, name) for name in VERSION_FIELDS):
            return None, f"{NO_TRANSCRIPT} of the video as it is now: it has changed since it was transcribed"
        return transcript.speech, ""


class TranscriptFiles:
    """Transcripts in JSONL files, found by the path of their video and read on demand.

    Args:
        paths: files of `salmonn transcribe`; of several transcripts of a video, the last one counts.

    Raises:
        ValueError: a file does not exist, or a line is not about a video.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._places: dict[str, tuple[Path, int]] = {}
        for path in paths:
            if not path.is_file():
                raise ValueError(f"{path}: there is no such file; name a JSONL file from `salmonn transcribe`")
            offset = 0
            with path.open("rb") as file:
                for line in file:
                    if line.strip() and (values := parse_last_line(line, path)) is not None:
                        self._places[os.path.abspath(values["video"])] = (path, offset)  # noqa: PTH100 - of any string
                    offset += len(line)

    def get(self, video: str) -> Transcript | None:
        """Return the transcript of a video, if there is one.

        Raises:
            ValueError: its line is not a transcript.
        """
        place = self._places.get(os.path.abspath(video))  # noqa: PTH100
        if place is None:
            return None
        path, offset = place
        with path.open("rb") as file:
            file.seek(offset)
            line = file.readline()
        try:
            return parse_record(json.loads(line), Transcript)
        except ValueError as error:
            raise ValueError(f"{path}: the line of {video} is not a transcript: {error}") from error


def subtitle_key(path: str, size_bytes: int, modified_ns: int) -> bytes:
    """Return the key of a subtitle file in a `HashSet`: of its name, since the folder may be named in several ways."""
    return hash_key(os.path.basename(path), size_bytes, modified_ns)  # noqa: PTH119 - of any string


def read_speech_beside(video: str, *, captions: HashSet | None = None) -> tuple[SpeechEvent, ...] | None:
    """Read the speech of a video from a file next to it; None if there is none.

    For film.mp4 that is film.mp4.json or film.json, if it is a transcript, else the same names with .vtt or .srt.

    Args:
        video: path of the video.
        captions: files to skip, by `subtitle_key`.

    Raises:
        ValueError: a file is too large to be subtitles, or there are only captions.
    """
    path, passed_over = Path(video), None
    for suffix in (".json", ".vtt", ".srt"):
        for name in (path.name + suffix, path.stem + suffix):
            beside = path.with_name(name)
            if os.path.isfile(beside):  # noqa: PTH113 - False for a name that is too long
                state = beside.stat()
                if captions is not None and subtitle_key(name, state.st_size, state.st_mtime_ns) in captions:
                    passed_over = name
                    continue
                text = _read_text(beside)
                found = _parse_transcript(text) if suffix == ".json" else parse_subtitles(text)
                if found is not None:
                    return found
    if passed_over is not None:
        raise ValueError(f"{passed_over} next to the video has captions that salmonn wrote; transcribe the video")
    return None


def _read_text(path: Path) -> str:
    if path.stat().st_size > MAX_SIDECAR_BYTES:
        raise ValueError(f"{path} is larger than {MAX_SIDECAR_BYTES >> 20} MiB, too large for the speech of one video")
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:  # old subtitles
        return content.decode("cp1252", errors="replace")


def _parse_transcript(text: str) -> tuple[SpeechEvent, ...] | None:
    try:
        return parse_record(json.loads(text), Transcript).speech
    except ValueError:  # other programs keep their own data in such a file
        return None


def parse_subtitles(text: str) -> tuple[SpeechEvent, ...]:
    """Read the cues of SubRip or WebVTT text, without styling; `<v Anna>` names the speaker."""
    events = []
    blocks = re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n").replace("\r", "\n"))
    for block in blocks:
        if (times := _CUE_TIMES.search(block)) is None:
            continue
        _, _, body = block[times.end() :].partition("\n")  # the rest of the line places the cue
        speaker = _VOICE.search(body)
        words = html.unescape(" ".join(_TAG.sub("", body).split()))
        if words:
            start, end = (_seconds(time) for time in times.groups())
            name = html.unescape(speaker[1].strip()) if speaker else ""
            events.append(SpeechEvent(words, start, max(start, end), speaker=name))
    return tuple(sorted(events, key=lambda event: event.start_seconds or 0.0))


def add_speech(
    references: Iterable[Reference], transcripts: TranscriptFiles, *, root: Path, replace_quoted: bool = False
) -> tuple[list[Reference], dict[str, int]]:
    """Add the speech of transcripts to references, as events that quote it.

    Speech events without a quotation stay. A reference that quotes speech already is left as it is.

    Args:
        references: references.
        transcripts: transcripts of their videos.
        root: folder that the paths of the videos start from.
        replace_quoted: replace the speech events that quote words instead.

    Returns:
        The references, and how many were changed ("added", "replaced") or not ("quoted before", "without transcript").
    """
    changed: list[Reference] = []
    counts = dict.fromkeys(("added", "replaced", "quoted before", "without transcript"), 0)
    for reference in references:
        transcript = transcripts.get(str(root / reference.video))
        others = tuple(e for e in reference.events if e.modality != "speech" or not any(find_quotations(e.text)))
        quotes = len(others) < len(reference.events)
        if transcript is None:
            outcome = "without transcript"
        elif quotes and not replace_quoted:
            outcome = "quoted before"
        else:
            outcome = "replaced" if quotes else "added"
            spoken = (
                Event(quote_words(one), "speech", one.start_seconds, one.end_seconds) for one in transcript.speech
            )
            reference = replace(reference, events=_merge([*others, *spoken]))  # noqa: PLW2901
        counts[outcome] += 1
        changed.append(reference)
    return changed, counts


def _merge(events: list[Event]) -> tuple[Event, ...]:
    """Sort events by time, unless one has no time: then their order was chosen by a person and stays."""
    if all(event.start_seconds is not None for event in events):
        events.sort(key=lambda event: event.start_seconds or 0.0)
    return tuple(events)


def _seconds(time: str) -> float:
    *hours, minutes, seconds = time.replace(",", ".").split(":")
    return 3600 * float(hours[0] if hours else 0) + 60 * float(minutes) + float(seconds)
