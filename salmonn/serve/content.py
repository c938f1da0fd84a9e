"""Parts of a message: text, and clips as OpenAI, vLLM, litellm and Qwen write them.

{"type": "video_url", "video_url": {"url": "..."}}      also image_url, audio_url, video, image, audio
{"type": "video_url", "video_url": "..."}               also with fps, num_frames or max_pixels next to the URL
{"type": "input_audio", "input_audio": {"data": "..."}}
{"type": "file", "file": {"file_data": "..."}}
{"type": "file", "file": {"file_id": "..."}}            also {"type": "video_url", "video_url": {"file_id": "..."}}
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from salmonn.media.frame_sampling import FrameOptions
from salmonn.serve.errors import RequestError

MAX_PARTS = 64  # parts of a message, and messages
_CLIP_KINDS = {
    "video_url": "video",
    "video": "video",
    "image_url": "image",
    "image": "image",
    "audio_url": "audio",
    "audio": "audio",
    "input_audio": "audio",
    "file": "file",
}
_SOURCES = ("url", "data", "file_data", "file_id")  # fields that may hold the clip
# Content decides the format, and every image is scaled as the model needs it.
_IGNORED = frozenset(["format", "filename", "detail", "uuid"])
_FRAME_FIELDS = {"fps": "frames_per_second", "num_frames": "num_frames", "max_pixels": "max_pixels"}


@dataclass(frozen=True)
class ClipPart:
    """A clip in a message.

    Args:
        kind: video, image, audio or file.
        url: data:, http:, https: or file: URL, or a path; or the reference of a long string of the body.
        where: path of the URL in the request, for error messages.
        frames: values of `FrameOptions` that the part gives, by field name.
        is_uploaded: whether the URL is the id of an uploaded file.
    """

    kind: str
    url: str
    where: str
    frames: Mapping[str, Any]
    is_uploaded: bool = False


def parse_content(content: Any, where: str) -> list[str | ClipPart]:
    """Return the texts and clips of a message.

    Args:
        content: string, or list of parts.
        where: path of the content in the request, for error messages.

    Raises:
        RequestError: the content is malformed.
    """
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        raise RequestError(f"{where} must be a string or a list of parts", param=where)
    if len(content) > MAX_PARTS:
        raise RequestError(f"{where} has {len(content)} parts; the maximum is {MAX_PARTS}", param=where)
    return [_parse_part(part, f"{where}[{number}]") for number, part in enumerate(content)]


def _parse_part(part: Any, where: str) -> str | ClipPart:
    if not isinstance(part, dict):
        raise RequestError(f"{where} must be an object with a type", param=where)
    kind = part.get("type")
    if kind == "text":
        _check_fields(part, where, known=("type", "text"))
        return _string(part.get("text"), f"{where}.text")
    if not isinstance(kind, str) or kind not in _CLIP_KINDS:
        given = f"got {kind[:60]!r}" if isinstance(kind, str) else "it is missing"
        known = ", ".join(["text", *_CLIP_KINDS])
        raise RequestError(f"{where}.type must be one of {known}; {given}", param=f"{where}.type")
    _check_fields(part, where, known=("type", kind, *_FRAME_FIELDS))
    value, at = part.get(kind), f"{where}.{kind}"
    if isinstance(value, list):
        raise RequestError(f"{at}: a list of frames is not supported; send them as one video", param=at)
    fields: dict[str, Any] = value if isinstance(value, dict) else {"url": value}
    _check_fields(fields, at, known=(*_SOURCES, *_FRAME_FIELDS))
    given_sources = [name for name in _SOURCES if fields.get(name) is not None]
    if len(given_sources) != 1:
        expected = {"input_audio": "data", "file": "file_data or file_id"}.get(kind, "url")
        param = f"{at}.{expected}" if isinstance(value, dict) else at
        raise RequestError(f"{param} must be given, as the clip's only source", param=param)
    (source,) = given_sources
    at_source = f"{at}.{source}" if isinstance(value, dict) else at
    url = _string(fields[source], at_source)
    is_data = source in ("data", "file_data") or (source == "url" and kind == "input_audio")
    if is_data and ":" not in url[:20]:  # base64 has no colon
        url = f"data:;base64,{url}"
    frames = {**frame_fields(part, where), **frame_fields(fields, at)}
    return ClipPart(_CLIP_KINDS[kind], url, at_source, frames, is_uploaded=source == "file_id")


def frame_fields(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the values of `FrameOptions` among some fields; raises a RequestError if one is not a number."""
    found = {}
    for name, field in _FRAME_FIELDS.items():
        value = values.get(name)
        if value is None:
            continue
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or (name != "fps" and value != round(value)):
            param = f"{where}.{name}"
            raise RequestError(f"{param} must be a {'number' if name == 'fps' else 'whole number'}", param=param)
        found[field] = value if name == "fps" else int(value)
    return found


def to_frame_options(values: Mapping[str, Any], where: str) -> FrameOptions | None:
    """Return frame options, None if no value is given."""
    try:
        return FrameOptions(**values) if values else None
    except ValueError as error:
        raise RequestError(str(error), param=where) from error


def check_processor_fields(values: Any) -> dict[str, Any]:
    """Return the values of `FrameOptions` in vLLM's `mm_processor_kwargs`."""
    where = "mm_processor_kwargs"
    if not isinstance(values, dict):
        raise RequestError(f"{where} must be an object", param=where)
    _check_fields(values, where, known=tuple(_FRAME_FIELDS))
    return frame_fields(values, where)


def _check_fields(values: Mapping[str, Any], where: str, *, known: tuple[str, ...]) -> None:
    for name, value in values.items():
        if value is not None and name not in known and name not in _IGNORED:
            param = f"{where}.{name[:60]}"
            raise RequestError(f"{param}: unsupported field", param=param)


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{where} must be a string", param=where)
    return value
