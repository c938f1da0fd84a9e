"""What becomes of replies that vLLM 0.32.0 has really sent, replayed by a scripted server."""

import json
from typing import Any

import pytest
import tenacity

from salmonn.caption.server_connection import connect_captioner
from salmonn.caption.server_options import ServerOptions
from tests.caption.served_model import content_of, describe
from tests.score.completions import FakeClock
from tests.score.fake_llm_server import Answer

PARAMETERS = {"mm_processor_kwargs": {"use_audio_in_video": True}}
UNTRUSTED = (
    "Per-request mm_processor_kwargs are disabled by default because they can change multimodal preprocessing resource "
    "usage. Start the server with --trust-request-mm-kwargs only when clients are trusted. "
    "(parameter=mm_processor_kwargs)"
)
SECOND_AUDIO = "At most 1 audio(s) may be provided in one prompt. (parameter=audio)"


def refuse(words: str) -> Answer:
    error = {"message": words, "type": "BadRequestError", "param": None, "code": 400}
    return Answer(body=json.dumps({"error": error}).encode(), status=400)


@pytest.fixture(autouse=True)
def clock(monkeypatch) -> None:
    """Let retries take no real time."""
    clock = FakeClock()
    monkeypatch.setattr(tenacity, "time", clock)
    monkeypatch.setattr(tenacity, "sleep_using_event", lambda event: clock.sleep)


@pytest.mark.parametrize("server_input", ["auto", "video"])
def test_parameters_that_the_server_does_not_trust(serve, server_input):
    def script(request: dict[str, Any], number: int) -> Answer:
        return refuse(UNTRUSTED) if "mm_processor_kwargs" in request else Answer(describe(request))

    options = ServerOptions(serve(script).url, "m", server_input=server_input, server_parameters=PARAMETERS)
    with pytest.raises(ValueError, match=r"rejects requests with --server-parameters \{.*--trust-request-mm-kwargs.*"):
        connect_captioner(options)


def test_a_file_and_its_sound_are_too_much_sound(serve):
    """With use_audio_in_video, the sound of the file counts as one recording, and the WAV as another."""

    def script(request: dict[str, Any], number: int) -> Answer:
        if {"video_url", "input_audio"} <= {part["type"] for part in content_of(request)}:
            return refuse(SECOND_AUDIO)
        return Answer(describe(request, hears_video="mm_processor_kwargs" in request))

    options = ServerOptions(serve(script).url, "m", server_input="video+audio", server_parameters=PARAMETERS)
    with pytest.raises(ValueError, match=r"does not take clips sent as video\+audio: .*At most 1 audio"):
        connect_captioner(options)
    assert connect_captioner(ServerOptions(options.server, "m", server_parameters=PARAMETERS)).input == "video"
