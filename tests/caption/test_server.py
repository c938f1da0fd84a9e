"""Captions through a scripted server: what it is sent, what its answers become, and what its faults do."""

import json
import re
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest

from salmonn.caption.generator import CaptionRequest, Generator, Sampling, Span
from salmonn.caption.in_flight import AnswerError
from salmonn.caption.length import WordRange
from salmonn.caption.loader import ClipReader
from salmonn.caption.segments import FixedSegments
from salmonn.caption.server import ServerCaptioner
from salmonn.caption.server_connection import connect_captioner
from salmonn.caption.server_messages import DEFAULT_PROMPTS
from salmonn.caption.server_options import ServerOptions
from salmonn.caption.shape import CaptionShape, Shape
from salmonn.media.clip import read_clip
from salmonn.media.frame_sampling import FrameOptions
from salmonn.records import Caption, Failure
from salmonn.score.chat_client import LLMRejectedError, LLMStoppedError
from salmonn.speech import SpeechEvent
from tests.caption.served_model import captioner as scripted
from tests.caption.served_model import content_of, describe, images_of, sound_of
from tests.score.completions import FakeClock, use_fake_clock
from tests.score.fake_llm_server import Answer, FakeLLMServer, model_list

pytestmark = pytest.mark.usefixtures("written_probe_clips")

GREEDY = Sampling(max_new_tokens=50)


@pytest.fixture(autouse=True)
def clock(monkeypatch) -> FakeClock:
    """Let retries take no real time, and record their exact delays."""
    return use_fake_clock(monkeypatch)


def open_captioner(server: FakeLLMServer, **options) -> ServerCaptioner:
    """Return a captioner that has not been tested."""
    return ServerCaptioner(ServerOptions(server.url, "m", **options))


def connect(server: FakeLLMServer, *, modality="both", cuts_files=False, **options) -> ServerCaptioner:
    return connect_captioner(ServerOptions(server.url, "m", **options), modality=modality, cuts_files=cuts_files)


def test_no_torch_is_imported():
    code = "import sys, salmonn.caption.server_connection; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("frame_format", ["jpeg", "png"])
def test_frames_with_times_and_sound(serve, videos, frame_format):
    server = serve(scripted())
    generator: Generator = open_captioner(server, server_frame_format=frame_format)
    ((caption,),) = generator.generate([CaptionRequest(videos[0], sampling=GREEDY)])
    (request,) = server.requests
    clip = read_clip(videos[0], open_captioner(server).read_spec(CaptionRequest(videos[0])).sampler)
    assert len(clip.frames) == 8 and clip.frames.shape[1:] == (96, 96, 3)  # 7 s: one per second, at least 8
    *timed, sound, prompt = content_of(request)
    assert [part["text"] for part in timed[::2]] == [f"[{seconds:.1f} s]" for seconds in clip.frame_times]
    assert all(part["image_url"]["url"].startswith(f"data:image/{frame_format};base64,") for part in timed[1::2])
    error = np.abs(np.stack(images_of(request)).astype(int) - clip.frames)
    assert error.mean() < 2 if frame_format == "jpeg" else not error.any()
    assert np.abs(sound_of(request) - clip.waveform).max() < 1 / 32767
    assert sound["type"] == "input_audio" and prompt == {"type": "text", "text": DEFAULT_PROMPTS["both"]}
    # Greedy: neither a seed nor top_p, which some servers refuse.
    assert {name: value for name, value in request.items() if name != "messages"} == {
        "model": "m", "temperature": 0.0, "max_tokens": 50,
    }  # fmt: skip
    assert caption == Caption(
        str(videos[0]), describe(request), prompt=DEFAULT_PROMPTS["both"], model="scripted", modality="both"
    )


def test_conversation_and_sampling(serve, videos):
    server = serve(scripted())
    schema = '{"type": "object"}'
    sampling = Sampling(0.7, 0.8, 20, repetition_penalty=1.1, stop=("END",), logprobs=3, json_schema=schema)
    further = {"mm_processor_kwargs": {"fps": 2}}
    request = CaptionRequest(
        videos[0], "And now?", sampling, Span(2.0, 4.0), "visual", 7,
        history=[("", "A circle."), ("Where?", "Left.")], system="Be brief.", frames=FrameOptions(num_frames=80),
    )  # fmt: skip
    ((caption,),) = open_captioner(server, server_parameters=further).generate([request])
    (sent,) = server.requests
    assert [message["role"] for message in sent["messages"]] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
        "user",
    ]
    assert [sent["messages"][number]["content"] for number in (0, 2, 3, 4, 5)] == [
        "Be brief.", "A circle.", "Where?", "Left.", "And now?",
    ]  # fmt: skip
    *frames, text = content_of(sent)
    assert text["text"] == DEFAULT_PROMPTS["visual"] and sound_of(sent) is None
    times = [float(part["text"][1:-3]) for part in frames[::2]]
    assert times == [number / 10 for number in range(20)]  # all of two seconds at 10 fps, from the start of the span
    form = {"type": "json_schema", "json_schema": {"name": "reply", "strict": True, "schema": {"type": "object"}}}
    assert {name: value for name, value in sent.items() if name not in ("messages", "model")} == {
        "temperature": 0.7, "top_p": 0.8, "max_tokens": 20, "repetition_penalty": 1.1, "stop": ["END"], "seed": 7,
        "logprobs": True, "top_logprobs": 3, "response_format": form, **further,
    }  # fmt: skip
    with pytest.raises(ValueError, match="server_parameters has seed, temperature, which other options set"):
        open_captioner(server, server_parameters={"temperature": 1, "top_k": 5, "seed": 0})
    assert (caption.start_seconds, caption.end_seconds, caption.modality) == (2.0, 4.0, "visual")


@pytest.mark.parametrize(
    ("takes_n", "sent_n"), [("all", [3]), ("ignored", [3, None, None]), ("refused", [3, None, None, None])]
)
def test_samples(serve, videos, takes_n, sent_n):
    """A server that ignores or refuses n is asked for each sample, with seeds of their own."""

    def script(request, number):
        if takes_n == "refused" and "n" in request:
            return Answer("Unsupported fields in the request: {'n'}", status=422)
        count = request.get("n", 1) if takes_n == "all" else 1
        choices = [
            {"index": k, "message": {"content": f"seed {request['seed'] + k}"}, "finish_reason": "stop"}
            for k in range(count)
        ]
        return Answer(body=json.dumps({"choices": choices, "usage": {"total_tokens": 5}}).encode())

    server = serve(script)
    request = CaptionRequest(videos[0], sampling=replace(GREEDY, temperature=1.0), seed=4, num_samples=3)
    ((*captions,),) = open_captioner(server).generate([request])
    assert [(one.text, one.sample) for one in captions] == [("seed 4", 0), ("seed 5", 1), ("seed 6", 2)]
    assert [sent.get("n") for sent in server.requests] == sent_n


def test_long_seeds(serve, videos):
    """Seeds are those of the request plus a number from the path: other servers than ours may take only 32 bits."""
    server = serve(scripted())
    captioner = open_captioner(server)
    request = CaptionRequest(videos[0], sampling=replace(GREEDY, temperature=1.0), seed=(1 << 32) + 7)
    captioner.generate([request, replace(request, seed=1 << 31)])
    captioner.is_own = True
    captioner.generate([request])
    assert sorted(sent["seed"] for sent in server.requests[:2]) == [0, 7]
    assert server.requests[2]["seed"] == request.seed


def answer(message: dict | None = None, **choice) -> Answer:
    choices = [{"message": message or {"content": "ok"}, "finish_reason": "stop"} | choice]
    return Answer(body=json.dumps({"choices": choices, "model": "served"}).encode())


@pytest.mark.parametrize(
    ("given", "text", "finished", "logprob"),
    [
        (answer(), "ok", True, None),
        (answer({"content": "\n\nok \n"}), "ok", True, None),
        (answer({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}), "ab", True, None),
        (answer(finish_reason="length"), "ok", False, None),
        (answer(finish_reason="content_filter"), "ok", False, None),
        (answer(logprobs={"content": [{"logprob": -0.5}, {"logprob": -0.25}]}), "ok", True, -0.75),
        (answer(logprobs=None), "ok", True, None),
        (Answer(body=b'data: {"model": "served", "choices": [{"delta": {"content": "o"}, "logprobs": {"content": '
                b'[{"logprob": -1}]}}]}\n\ndata: {"choices": [{"delta": {"content": "k"}, "finish_reason": "stop", '
                b'"logprobs": {"content": [{"logprob": -2}]}}]}\n\ndata: [DONE]\n\n'), "ok", True, -3.0),
    ],
)  # fmt: skip
def test_answers(serve, videos, given, text, finished, logprob):
    request = CaptionRequest(videos[0], sampling=replace(GREEDY, logprobs=0))
    ((caption,),) = open_captioner(serve(lambda request, number: given)).generate([request])
    assert (caption.text, caption.finished, caption.model, caption.logprob) == (text, finished, "served", logprob)
    assert caption.num_tokens == (None if logprob is None else 2)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (answer({"content": ""}), "an empty answer instead of a caption (finish_reason stop)"),
        (answer({"content": None, "refusal": "I cannot."}), "a refusal ('(refusal) I cannot.')"),
        (answer({"content": None}, finish_reason="content_filter"), "a content filter"),
        (
            answer({"content": None, "reasoning_content": "Let me see"}, finish_reason="length"),
            "a reasoning ('Let me see')",
        ),
        (Answer("the prompt is too long", status=400), "the server rejects the request: "),
    ],
)
def test_an_answer_without_a_caption_fails_that_clip_alone(serve, videos, given, reason):
    server = serve(lambda request, number: answer() if describe(request) != first else given)
    first = ""
    captioner = open_captioner(server)
    captioner.generate([CaptionRequest(videos[0], sampling=GREEDY)])
    first = describe(server.requests[0])
    with pytest.raises((AnswerError, LLMRejectedError)) as caught:
        captioner.generate([CaptionRequest(videos[0], sampling=GREEDY)])
    assert reason in str(caught.value)
    results = run(captioner, videos[:3])
    assert [type(one) for one in results] == [Failure, Caption, Caption]
    assert results[0].stage == "caption" and results[0].reason == f"{videos[0]}: {caught.value}"


def run(captioner: ServerCaptioner, paths, **options) -> list[Caption | Failure]:
    """Caption videos in a batch run; return the results in their order."""
    requests = [CaptionRequest(path, sampling=GREEDY) for path in paths]
    results = [one for batch in captioner.caption_batches(requests, **options) for one in batch]
    assert sorted(one.index for one in results) == list(range(len(paths)))
    return [one.result for one in sorted(results, key=lambda one: one.index)]


@pytest.mark.parametrize(
    "fault",
    [
        Answer("busy", status=429, headers={"Retry-After": "0.01"}),
        Answer("down", status=500),
        Answer("overloaded", status=503),
        Answer("half", is_truncated=True),
        Answer(body=b"<html>proxy error</html>"),
        Answer(body=b'{"choices": []}'),
        Answer(body=b'{"error": {"message": "upstream", "code": 502}}'),
    ],
)
def test_transient_faults_cost_no_clip(serve, videos, fault):
    server = serve(lambda request, number: fault if number % 3 == 0 else Answer(describe(request)))
    results = run(open_captioner(server), videos)
    assert all(isinstance(one, Caption) for one in results) and len({one.text for one in results}) > 1
    assert len(server.requests) >= 7


def test_concurrency_grows_up_to_the_limit(serve, videos):
    server = serve(lambda request, number: Answer("x", delay_seconds=0.3))
    captioner = open_captioner(server, concurrency=3)
    run(captioner, videos * 2)
    assert server.max_concurrent == captioner._limit.limit == 3
    slow_start = serve(lambda request, number: Answer("x", status=429) if number in (0, 1) else Answer("x"))
    captioner = open_captioner(slow_start, concurrency=32)
    captioner.generate([CaptionRequest(videos[0], sampling=GREEDY)])
    assert captioner._limit.limit == 1  # halved from 2


def test_segments_and_files_that_cannot_be_read(serve, videos, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    server = serve(scripted())
    captioner = open_captioner(server)
    requests = [CaptionRequest(path, sampling=GREEDY) for path in (tmp_path / "broken.mp4", videos[0])]
    with ClipReader(workers=0) as reader:
        batches = captioner.caption_batches(requests, segments=FixedSegments(3.0), reader=reader)
        results = [one for batch in batches for one in batch]
    assert len(results) == 4 and len(server.requests) == 3
    (failure,) = [one.result for one in results if isinstance(one.result, Failure)]
    assert failure.stage == "read" and "broken.mp4" in failure.reason
    spans = sorted((one.result.start_seconds, one.num_segments) for one in results if isinstance(one.result, Caption))
    assert spans == [(0.0, 3), (3.0, 3), (6.0, 3)]
    with pytest.raises(ValueError, match="--server-input video sends whole files, without segments; use frames"):
        next(open_captioner(server, server_input="video").caption_batches(requests, segments=FixedSegments(3.0)))
    with pytest.raises(ValueError, match="sends whole files, without spans"):
        open_captioner(server, server_input="video").generate([replace(requests[1], span=Span(1.0))])


def test_a_spend_cap_ends_the_run_with_the_finished_captions(serve, videos):
    server = serve(scripted())
    captioner = open_captioner(server, max_requests=3)
    results = []
    with pytest.raises(LLMStoppedError) as caught:
        for batch in captioner.caption_batches(CaptionRequest(video, sampling=GREEDY) for video in videos):
            results += batch
    assert len(results) == len(server.requests) == 3
    # The third answer may still be in flight.
    assert re.fullmatch(
        r"the cap of 3 requests is reached \(3 requests, [23]0 tokens in this run\)\. Finished captions are saved; run "
        "the same command again to resume with 3 more requests, or raise --max-requests",
        str(caught.value),
    )
    tokens = open_captioner(server, max_tokens_total=25)
    with pytest.raises(LLMStoppedError, match=r"the cap of 25 tokens is reached .* or raise --max-tokens-total"):
        run(tokens, videos)
    silent = serve(lambda request, number: Answer("x", usage=None))
    with pytest.raises(LLMStoppedError, match="does not report token usage, which --max-tokens-total needs"):
        run(open_captioner(silent, max_tokens_total=25), videos)


def test_replies_in_flight_are_kept_after_a_fatal_error(serve, videos):
    """The third request is refused for good while the others are being answered."""
    is_refused = threading.Event()

    def script(request, number):
        if number == 2:
            is_refused.set()
            return Answer("no", status=401)
        is_refused.wait(60)
        return Answer(describe(request))

    captioner = open_captioner(serve(script), concurrency=3)
    captioner._limit._limit = 3.0
    results = []
    with pytest.raises(LLMStoppedError, match="requires an API key: name the environment variable that has it"):
        for batch in captioner.caption_batches(CaptionRequest(video, sampling=GREEDY) for video in videos):
            results += batch
    assert len(results) == 2


@pytest.mark.parametrize(
    ("senses", "refused", "chosen"),
    [
        (dict(hears_wav=True, hears_video=True), (), "video"),
        (dict(hears_wav=True), (), "video+audio"),  # the video's own audio is dropped silently
        (dict(hears_wav=True), ("video_url",), "frames"),
        (dict(hears_wav=True, hears_video=True), ("input_audio",), "video"),
    ],
)
def test_the_input_is_chosen_by_what_the_model_hears(serve, videos, senses, refused, chosen):
    server = serve(scripted(refused=refused, **senses))
    captioner = connect(server)
    assert captioner.input == chosen
    captioner.generate([CaptionRequest(videos[0], sampling=GREEDY)])
    kinds = {part["type"] for part in content_of(server.requests[-1])}
    expected = {
        "video": {"video_url"},
        "video+audio": {"video_url", "input_audio"},
        "frames": {"image_url", "input_audio"},
    }
    assert kinds - {"text"} == expected[chosen]
    # A part of a file can be sent as frames only.
    assert refused or connect(server, cuts_files=True).input == "frames"
    with pytest.raises(ValueError, match="--server-input video sends whole files, and --start, --end"):
        connect(server, cuts_files=True, server_input="video")


def test_a_deaf_server_is_reported(serve, videos, caplog):
    server = serve(scripted(hears_wav=False))
    with pytest.raises(ValueError) as caught:
        connect(server)
    assert str(caught.value) == (
        f"m at {server.url} does not hear: two clips that differ in sound alone get the same answer "
        "('0 frames, 1 files'), sent as video and as video+audio and as frames; choose a model that takes audio, "
        "caption without sound "
        "(--modality visual), or go ahead with --allow-deaf"
    )
    assert len(server.requests) == 12
    captioner = connect(server, allow_deaf=True, server_input="frames")
    assert captioner.input == "frames" and "does not hear" in caplog.text
    num_before = len(server.requests)
    assert connect(server, modality="visual").input == "frames"
    assert sound_of(server.requests[-1]) is None and len(server.requests) == num_before + 1


def test_a_model_that_reasons_first_is_given_room_to_answer(serve, caplog):
    def script(request, number):
        if request["max_tokens"] > 100:
            return Answer(describe(request))
        return answer({"content": None, "reasoning_content": "Let me listen"}, finish_reason="length")

    assert connect(serve(script), server_input="frames").input == "frames"
    assert "cannot be tested" not in caplog.text
    # Within 90 tokens it never answers.
    captioner = connect_captioner(ServerOptions(serve(script).url, "m"), max_new_tokens=90)
    assert captioner.input == "video"
    assert "cannot be tested if it hears: the server sent a reasoning ('Let me listen')" in caplog.text


def test_a_filter_of_the_probe_does_not_end_the_run(serve, caplog):
    filtered = answer({"content": None}, finish_reason="content_filter")
    assert connect(serve(lambda request, number: filtered), modality="visual").input == "frames"
    assert connect(serve(lambda request, number: filtered), modality="audio").input == "frames"
    assert caplog.text.count("cannot be tested if it hears: the server sent ") == 1


@pytest.mark.parametrize(
    ("refused", "modality", "message"),
    [
        (("input_audio", "video_url"), "both", "does not take audio: .* input_audio is not supported by this model"),
        (("image_url", "video_url"), "both", "does not take images: .*; choose a model that takes images, or caption"),
        (("image_url", "input_audio", "video_url"), "both", "does not take images and audio: "),
        (("input_audio",), "audio", "does not take audio: "),
        (("image_url",), "visual", "does not take images: "),
    ],
)
def test_refused_modalities_are_named(serve, refused, modality, message):
    with pytest.raises(ValueError, match=message):
        connect(serve(scripted(refused=refused)), modality=modality)


def test_a_server_that_breaks_on_what_it_does_not_take(serve, clock):
    """As `transformers serve` does: status 500, also when it is asked again, while it answers other requests."""
    senses = dict(refused=("video_url",), status=500)
    assert connect(serve(scripted(**senses))).input == "frames"
    # Both of the file's inputs were retried for a few seconds, not for ten minutes.
    assert 0 < clock.now < 60
    senses["refused"] = ("video_url", "input_audio")
    with pytest.raises(ValueError, match=r"does not take audio: .*; choose a model that takes audio"):
        connect(serve(scripted(**senses)))


def test_a_refused_input_is_named(serve):
    with pytest.raises(ValueError, match=r"does not take clips sent as video: .* use --server-input frames$"):
        connect(serve(scripted(refused=("video_url",))), server_input="video")


def test_servers_that_are_none(serve):
    page = serve(scripted(), models=Answer(body=b"<html><title>Welcome to nginx!</title></html>"))
    with pytest.raises(ValueError, match=rf"{page.url} is not an OpenAI-compatible server: instead of a list of models "
                       "it sends 'Welcome to nginx!'; most addresses end in /v1"):  # fmt: skip
        connect(page)
    page.close()
    with pytest.raises(
        ValueError, match=rf"{page.url} cannot be reached: .*; is the server running, and is the address"
    ):
        connect(page)
    # A server may have no list of models.
    assert connect(serve(scripted(), models=Answer("not found", status=404)), server_input="frames").input == "frames"
    with pytest.raises(ValueError, match="cannot list its models: "):
        connect(serve(scripted(), models=Answer("down", status=500)))


def test_an_unknown_model_is_answered_with_the_list(serve):
    names = ["qwen3-omni", "whisper", *(f"model-{number}" for number in range(20))]

    def script(request, number):
        return Answer(f"The model {request['model']} does not exist", status=404)

    server = serve(script, models=model_list(*names))
    with pytest.raises(ValueError) as caught:
        connect_captioner(ServerOptions(server.url, "Qwen3-Omni-30B"))
    assert str(caught.value).startswith(f"{server.url} has no model 'Qwen3-Omni-30B'; it offers qwen3-omni, ")
    assert str(caught.value).endswith(" and 12 more") and len(server.requests) <= 4
    # One that is not listed may still be served.
    assert connect_captioner(ServerOptions(serve(scripted()).url, "on-demand")).input == "video+audio"


def test_the_key_is_sent_and_not_recorded(serve, videos, monkeypatch):
    monkeypatch.setenv("VLLM_KEY", "secret")
    server = serve(scripted())
    captioner = open_captioner(server, server_api_key_env="VLLM_KEY")
    ((caption,),) = captioner.generate([CaptionRequest(videos[0], sampling=GREEDY)])
    assert server.headers[0]["Authorization"] == "Bearer secret" and "secret" not in repr(caption)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(server="localhost:8000"), "base_url must be an address such as http://localhost:8000/v1"),
        (
            dict(server="http://user:secret@host/v1"),
            "an API key belongs in an environment variable, which api_key_env names",
        ),
        (dict(server="http://host/v1", concurrency=0), "concurrency must be at least 1"),
        (
            dict(server="http://host/v1", max_requests=0),
            "max_requests, max_tokens and max_reply_tokens must be at least",
        ),
        (dict(server="http://host/v1", server_max_pixels=10), "server_max_pixels must be at least 784, got 10"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(ValueError, match=message):
        ServerOptions(**options)


def test_the_transcript_is_added_to_the_prompt(serve, videos):
    server = serve(scripted())
    speech = (SpeechEvent("Hello.", 0.5, 1.5), SpeechEvent("Goodbye.", 3.0, 3.5))
    request = CaptionRequest(videos[0], None, GREEDY, Span(2.5, 5.0), history=[("What?", "A circle.")], speech=speech)
    ((caption,),) = open_captioner(server).generate([request])
    first, answer, last = server.requests[0]["messages"]
    assert content_of(server.requests[0])[-1]["text"] == "What?" and answer["content"] == "A circle."
    assert last["content"] == request.with_context(DEFAULT_PROMPTS["both"]) and "[0.5-1.0] Goodbye." in last["content"]
    assert "Hello" not in last["content"] and caption.prompt == last["content"]
    assert first["role"] == "user"


def test_shaped_captions(serve, videos):
    """A caption of the wrong length is asked for again, as an answer to the first one."""

    def script(request, number):
        answers = [message["content"] for message in request["messages"] if message["role"] == "assistant"]
        return Answer("Too short." if not answers else "A circle moves to the left and then leaves.")

    server = serve(script)
    shape = Shape({"caption": CaptionShape(words=WordRange(5, 12), trigger="ohwx")})
    (caption,) = run(open_captioner(server), videos[:1], shape=shape)
    assert caption.text == "ohwx, A circle moves to the left and then leaves."
    assert caption.shaping["caption"].length == "asked_again" and len(server.requests) == 2
    first, second = (content_of(request)[-1]["text"] for request in server.requests)
    assert first == second == f"{DEFAULT_PROMPTS['both']}\nWrite 5 to 12 words."
    assert server.requests[1]["messages"][1] == {"role": "assistant", "content": "Too short."}
    assert "Your text has 2 words" in server.requests[1]["messages"][2]["content"]
