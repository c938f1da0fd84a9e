"""A scripted captioner behind a fake server: it answers with what it sees and hears in a request."""

import base64
import io
import wave
from typing import Any

import numpy as np
from PIL import Image

from tests.score.fake_llm_server import Answer, Script


def content_of(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the parts of the message that has the clip."""
    return next(message["content"] for message in request["messages"] if isinstance(message["content"], list))


def is_about_a_clip(request: dict[str, Any]) -> bool:
    """Return whether a request has a clip."""
    return any(isinstance(message["content"], list) for message in request["messages"])


def images_of(request: dict[str, Any]) -> list[np.ndarray]:
    """Decode the images of a request, each (H, W, 3)."""
    urls = [part["image_url"]["url"] for part in content_of(request) if part["type"] == "image_url"]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))) for url in urls]


def sound_of(request: dict[str, Any]) -> np.ndarray | None:
    """Decode the audio of a request, (S,) in -1..1."""
    for part in content_of(request):
        if part["type"] == "input_audio":
            assert part["input_audio"]["format"] == "wav"
            with wave.open(io.BytesIO(base64.b64decode(part["input_audio"]["data"]))) as file:
                assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (16_000, 1, 2)
                return np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32767
    return None


def describe(request: dict[str, Any], *, hears_wav: bool = True, hears_video: bool = False) -> str:
    """Return a caption that follows from what the request contains and the model uses."""
    parts = content_of(request)
    files = [part["video_url"]["url"].partition(",")[2] for part in parts if part["type"] == "video_url"]
    text = f"{len(images_of(request))} frames, {len(files)} files"
    sound = sound_of(request)
    if hears_wav and sound is not None:
        text += f", sound {sound.std():.3f}"
    if hears_video and files:
        text += f", file {hash(files[0])}"
    return text


def captioner(*, refused: tuple[str, ...] = (), status: int = 400, **senses: bool) -> Script:
    """Script of a model that refuses some types of parts."""

    def script(request: dict[str, Any], number: int) -> Answer:
        if not is_about_a_clip(request):
            return Answer("yes")
        for part in content_of(request):
            if part["type"] in refused:
                return Answer(f"{part['type']} is not supported by this model", status=status)
        return Answer(describe(request, **senses))

    return script
