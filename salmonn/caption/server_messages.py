"""Clips as parts of a chat message: frames with their times, a WAV file, or the video file itself.

{"type": "text", "text": "[1.0 s]"}
{"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,..."}}
{"type": "input_audio", "input_audio": {"data": "...", "format": "wav"}}
{"type": "video_url", "video_url": {"url": "data:video/mp4;base64,..."}}
"""

import base64
import io
import mimetypes
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from salmonn.caption.generator import CaptionRequest
from salmonn.caption.server_options import ServerInput
from salmonn.media.audio import SAMPLE_RATE_HZ
from salmonn.media.clip import Clip
from salmonn.media.container import ClipError
from salmonn.records import Modality
from salmonn.score.llm_protocol import ChatMessage

MAX_FILE_MIB = 512  # a request holds its file in memory, in base64
_JPEG_QUALITY = 90
# For models that have no default of their own.
DEFAULT_PROMPTS: dict[Modality, str] = {
    "both": "Describe this video in detail, in the order of events: what can be seen, and what can be heard, including "
    "speech, music and other sounds.",
    "visual": "Describe in detail what can be seen in this video, in the order of events.",
    "audio": "Describe in detail what can be heard in this recording, in the order of events, including speech, music "
    "and other sounds.",
}

Part = dict[str, Any]


@dataclass(frozen=True)
class EncodedClip:
    """A clip as it is sent.

    Args:
        parts: parts of the user's message.
        modality: what they contain.
        seconds: length of the clip.
        is_complete, warnings: see `Clip`.
    """

    parts: tuple[Part, ...]
    modality: Modality
    seconds: float
    is_complete: bool = True
    warnings: tuple[str, ...] = ()


def encode_clip(
    clip: Clip, *, server_input: ServerInput, frame_format: Literal["jpeg", "png"], is_file_only: bool = False
) -> EncodedClip:
    """Encode a clip.

    Args:
        clip: the clip; of a video that is sent as a file, only the audio is used.
        server_input: what to send.
        frame_format: format of frames.
        is_file_only: whether the server takes audio files instead of a video.

    Raises:
        ClipError: the file is too large to be sent as a whole.
    """
    parts: list[Part] = []
    has_file = server_input != "frames" and (clip.has_video or is_file_only)
    if has_file:
        remedy = "cut it into several files" if is_file_only else "use --server-input frames"
        parts.append(video_part(Path(clip.path), remedy=remedy))
    elif clip.has_video:
        # From the start of the span, as the audio and the transcript.
        for seconds, frame in zip(clip.frame_times - clip.start_seconds, clip.frames, strict=True):
            parts += [{"type": "text", "text": f"[{seconds:.1f} s]"}, image_part(frame, frame_format)]
    if clip.waveform is not None and not (has_file and server_input == "video"):
        parts.append(audio_part(clip.waveform))
    return EncodedClip(tuple(parts), clip.modality, clip.duration_seconds, clip.is_complete, clip.warnings)


def image_part(frame: np.ndarray, frame_format: Literal["jpeg", "png"]) -> Part:
    """Return a frame, (H, W, 3) uint8 RGB, as a data URL."""
    file = io.BytesIO()
    options = {"quality": _JPEG_QUALITY} if frame_format == "jpeg" else {"compress_level": 1}
    Image.fromarray(frame).save(file, frame_format, **options)
    return {"type": "image_url", "image_url": {"url": _data_url(file.getvalue(), f"image/{frame_format}")}}


def audio_part(waveform: np.ndarray) -> Part:
    """Return a waveform, (S,) float32 at 16 kHz, as a WAV file of 16 bits."""
    file = io.BytesIO()
    with wave.open(file, "wb") as wav:
        wav.setnchannels(1)
        wav.setsampwidth(2)
        wav.setframerate(SAMPLE_RATE_HZ)
        wav.writeframes((np.clip(waveform, -1, 1) * 32767).round().astype("<i2").tobytes())
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(file.getvalue()).decode(), "format": "wav"}}


def video_part(path: Path, *, remedy: str) -> Part:
    """Return a file as a data URL; raises a ClipError with the remedy if it is too large."""
    size = path.stat().st_size
    if size > MAX_FILE_MIB << 20:
        raise ClipError(
            f"{path}: has {size >> 20} MiB, and files of up to {MAX_FILE_MIB} MiB are sent as a whole; {remedy}"
        )
    return {"type": "video_url", "video_url": {"url": _data_url(path.read_bytes(), media_type(path))}}


def media_type(path: Path) -> str:
    """Return the media type of a file, by its suffix."""
    return mimetypes.guess_type(path.name)[0] or "video/mp4"


def to_messages(request: CaptionRequest, clip: EncodedClip, *, default_prompt: str) -> list[ChatMessage]:
    """Return the conversation of a request.

    Args:
        request: the request.
        clip: its clip.
        default_prompt: text instead of empty prompts; "" leaves them out, for a server that has its own.
    """
    messages: list[ChatMessage] = [] if request.system is None else [_message("system", [], request.system)]
    prompts = [*(prompt for prompt, _ in request.history), request.prompt]
    for number, prompt in enumerate(prompts):
        parts = clip.parts if number == request.clip_turn else ()
        messages.append(_message("user", parts, prompt or default_prompt))
        if number < len(request.history):
            messages.append(_message("assistant", (), request.history[number][1]))
    return messages


def _message(role: str, parts: Sequence[Part], text: str) -> ChatMessage:
    if not parts:
        return {"role": role, "content": text}
    return {"role": role, "content": [*parts, *([{"type": "text", "text": text}] if text else [])]}


def _data_url(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
