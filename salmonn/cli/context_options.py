"""Options of `salmonn caption` for context that the model gets in addition to the clip: the transcript of its
speech."""

from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import Namespace

from salmonn.config import FlagParser

if TYPE_CHECKING:
    from salmonn.batch.transcripts import SpeechContext

CONTEXT_SETTINGS = ("context", "transcripts")
TRANSCRIPTS_JOB = "transcripts_job"


def add_context_options(parser: FlagParser) -> None:
    """Add the context that the model gets in addition to the clip."""
    group = parser.add_argument_group("Context")
    contexts = "transcript: add the speech of the video, or of its part, to the prompt"
    group.add_argument("--context", type=Literal["transcript"] | None, default=None, help=contexts)
    files = "JSONL files of `salmonn transcribe` (default: film.json, film.vtt or film.srt next to film.mp4)"
    group.add_argument("--transcripts", nargs="+", type=str, default=[], help=files)


def speech_context(values: Namespace) -> "SpeechContext | None":
    """Return where the speech of videos is found, if it is to be added to the prompts."""
    from salmonn.batch.subtitles import written_captions
    from salmonn.batch.transcripts import SpeechContext, TranscriptFiles

    if values.context is None:
        if values.transcripts:
            raise ValueError("--transcripts needs --context transcript")
        return None
    if values.transcripts:
        return SpeechContext(TranscriptFiles([Path(path) for path in values.transcripts]))
    if {"srt", "vtt"} & set(values.export) and values.subtitle_dir is None:
        raise ValueError(
            "--export srt or vtt would write captions next to the videos, where --context transcript takes subtitles "
            "for speech; name --transcripts, or another folder with --subtitle-dir"
        )
    return SpeechContext(captions=written_captions(values.out.parent))


def fingerprint_transcripts(values: Namespace) -> dict[str, str]:
    """Identify how the transcripts were made by the settings next to them; more of the same kind may be added."""
    from salmonn.batch.ledger_files import LedgerFiles

    state = blake2b(digest_size=16)
    jobs = {LedgerFiles.of(Path(path)).job for path in values.transcripts}
    found = sorted(path for path in jobs if path.is_file())
    for path in found:
        state.update(path.read_bytes())
    return {TRANSCRIPTS_JOB: state.hexdigest()} if found else {}
