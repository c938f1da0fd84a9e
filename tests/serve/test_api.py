"""The HTTP API as clients use it, with a real server and the OpenAI client: answers, streams and errors."""

import base64
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Annotated, Literal
from urllib.parse import quote

import av
import httpx2
import numpy as np
import openai
import pytest
from openai.lib._parsing import type_to_response_format_param
from pydantic import BaseModel, Field

from salmonn.caption.generator import Sampling, Span
from salmonn.caption.prompt import Prompt
from salmonn.serve import sources
from salmonn.serve.fetch import FetchPolicy, TooLargeError
from salmonn.serve.sources import MediaSources
from tests.completions import complete
from tests.limits import STEP_SECONDS, wait_until
from tests.serve.running import chat, data_url, gather, read_metrics, user_message, web_server
from tests.truncated import write_truncated

SHORT = Sampling(max_new_tokens=12)


def test_an_answer_equals_the_captioners(start, model, videos):
    client = start().client()
    answer = chat(client, data_url(videos[0]))
    expected = model.caption(videos[0], sampling=SHORT)
    assert answer.choices[0].message.content == expected.text and answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == ("stop" if expected.finished else "length")
    assert answer.model == "toy" and answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens > 20 and 0 < answer.usage.completion_tokens <= 12


def test_all_parameters_reach_the_model(start, model, videos):
    """Prompt, span, modality and sampling; a path below an allowed folder."""
    sampling = Sampling(temperature=0.8, top_p=0.7, max_new_tokens=20, repetition_penalty=1.2)
    answer = chat(
        start().client(),
        videos[1].name,
        "What is heard?",
        temperature=0.8,
        top_p=0.7,
        max_completion_tokens=20,
        seed=11,
        extra_body={"start": 1, "end": 3, "modality": "audio", "repetition_penalty": 1.2},
    )
    expected = model.caption(
        videos[1], prompt="What is heard?", sampling=sampling, span=Span(1, 3), modality="audio", seed=11
    )
    assert answer.choices[0].message.content == expected.text


def test_a_stream_equals_the_complete_answer(start, model, videos):
    client = start().client()
    complete = chat(client, f"file://{videos[2]}")
    with chat(client, str(videos[2]), stream=True, stream_options={"include_usage": True}) as chunks:
        texts, reasons, last = gather(chunks)
    assert texts == {0: complete.choices[0].message.content} and reasons == {0: complete.choices[0].finish_reason}
    assert last.usage == complete.usage and not last.choices
    with chat(client, str(videos[2]), stream=True) as chunks:
        assert gather(chunks)[2].usage is None


def test_answers_have_warnings_about_a_damaged_file(start, videos, tmp_path):
    client, url = start().client(), data_url(write_truncated(videos[0], tmp_path / "a.mkv"))
    clip = chat(client, url).clip
    assert (clip["complete"], clip["modality"], len(clip["warnings"])) == (False, "both", 1)
    assert "truncated" in clip["warnings"][0] and str(tmp_path) not in clip["warnings"][0]
    with chat(client, url, stream=True) as chunks:
        *_, last = chunks
    assert last.clip == clip and last.choices[0].finish_reason
    assert chat(client, str(videos[0])).clip == {"complete": True, "modality": "both", "warnings": []}


def test_choices_have_consecutive_seeds(start, model, videos):
    client = start().client()
    options = dict(temperature=1, top_p=0.9, seed=5, n=3)
    answer = chat(client, videos[0].name, **options)
    sampling = Sampling(temperature=1, top_p=0.9, max_new_tokens=12)
    expected = [model.caption(videos[0], sampling=sampling, seed=5 + number).text for number in range(3)]
    assert [choice.message.content for choice in answer.choices] == expected and len(set(expected)) > 1
    with chat(client, videos[0].name, stream=True, **options) as chunks:
        assert gather(chunks)[0] == dict(enumerate(expected))
    assert 3 in model.batches


def test_without_a_seed_answers_differ(start, videos):
    client = start().client()
    answers = {chat(client, videos[0].name, temperature=1.5).choices[0].message.content for _ in range(3)}
    assert len(answers) > 1


def test_a_conversation_continues(start, model, videos):
    """The answer is sent back, followed by another question, with and without a system message."""
    client, default_prompt = start().client(), model.default_prompt()
    messages = user_message(videos[0].name)
    first = client.chat.completions.create(model="", messages=messages, max_completion_tokens=12).choices[0].message
    messages += [first.model_dump(), {"role": "user", "content": "What is heard?"}]
    media = model.processor.read(videos[0])

    def expected(system):
        prompt = Prompt("What is heard?", ((default_prompt, first.content),), system)
        return complete(model, [media], [prompt], sampling=SHORT)[0].text

    answers = []
    for system in (None, "Be brief.", ""):
        prefix = [] if system is None else [{"role": "system", "content": system}]
        answer = client.chat.completions.create(model="", messages=[*prefix, *messages], max_completion_tokens=12)
        answers.append(answer.choices[0].message.content)
        assert answers[-1] == expected(system)
    assert answers[0] != first.content and answers[1] not in (answers[0], answers[2])
    with pytest.raises(openai.BadRequestError, match="special token"):
        client.chat.completions.create(
            model="", messages=[{"role": "system", "content": "<|im_end|>"}, *messages], max_completion_tokens=12
        )


def test_concurrent_requests_are_batched(start, model, videos, monkeypatch):
    """While one is prefilled, eight arrive and are prefilled together, with the same answers as alone."""
    monkeypatch.setattr(model.network, "prefill_chunk_tokens", 8192)
    running = start()
    model.gate.clear()
    with ThreadPoolExecutor(9) as pool:
        first = pool.submit(chat, running.client(), videos[0].name)
        wait_until(lambda: model.batches == [1])
        others = [pool.submit(chat, running.client(), videos[index % 5].name) for index in range(8)]
        wait_until(lambda: read_metrics(running)["salmonn_waiting"] == 8)
        model.gate.set()
        answers = [future.result(STEP_SECONDS).choices[0].message.content for future in [first, *others]]
    assert model.batches == [1, 8] and model.largest_batch == 9
    expected = [model.caption(video, sampling=SHORT).text for video in videos]
    assert answers == [expected[0], *(expected[index % 5] for index in range(8))]


def test_images_and_audio(start, model, videos, tmp_path):
    running = start()
    with av.open(str(tmp_path / "image.png"), "w", format="image2") as target:
        stream = target.add_stream("png", rate=1)
        stream.width = stream.height = 64
        stream.pix_fmt = "rgb24"
        pixels = np.zeros((64, 64, 3), np.uint8)
        pixels[20:40, 20:40] = [255, 0, 0]
        target.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        target.mux(stream.encode())
    with av.open(str(videos[0])) as source, av.open(str(tmp_path / "audio.wav"), "w") as target:
        stream = target.add_stream("pcm_s16le", rate=16000, layout="mono")
        for frame in source.decode(audio=0):
            target.mux(stream.encode(frame))
        target.mux(stream.encode())
    messages = user_message(data_url(tmp_path / "image.png", "image/png"), kind="image_url")
    answer = running.client().chat.completions.create(model="toy", messages=messages, max_tokens=12)
    assert answer.choices[0].message.content == model.caption(tmp_path / "image.png", sampling=SHORT).text
    audio = {"data": base64.b64encode((tmp_path / "audio.wav").read_bytes()).decode(), "format": "wav"}
    messages = [{"role": "user", "content": [{"type": "input_audio", "input_audio": audio}]}]
    answer = running.client().chat.completions.create(model="salmonn", messages=messages, max_tokens=12)
    assert answer.choices[0].message.content == model.caption(tmp_path / "audio.wav", sampling=SHORT).text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frequency_penalty": 1}, "frequency_penalty: this value is not supported"),
        ({"extra_body": {"rate": 3}}, "rate: unsupported parameter"),
        ({"temperature": 9}, "temperature: "),
    ],
)
def test_rejected_parameters(start, videos, options, message):
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        chat(start().client(), videos[0].name, **options)
    assert caught.value.body["type"] == "invalid_request_error"
    assert caught.value.body["param"] in ("frequency_penalty", "rate", "temperature")


def test_an_unknown_model(start, videos):
    with pytest.raises(openai.NotFoundError, match="model 'gpt-4o' not found; available: toy") as caught:
        start().client().chat.completions.create(model="gpt-4o", messages=user_message(videos[0].name))
    assert caught.value.code == "model_not_found"


def test_errors_do_not_reveal_paths(start, videos, tmp_path):
    client = start().client()
    (tmp_path / "broken.mp4").write_bytes(videos[0].read_bytes()[:700])
    with pytest.raises(openai.BadRequestError, match="the video: is not a video or is damaged") as caught:
        chat(client, data_url(tmp_path / "broken.mp4"))
    assert str(tmp_path) not in str(caught.value)
    with pytest.raises(openai.BadRequestError, match=r"the video: the start is at 500.0 s, but the file ends at"):
        chat(client, data_url(videos[0]), extra_body={"start": 500}, stream=True)
    with pytest.raises(openai.BadRequestError, match="special token"):
        chat(client, videos[0].name, "<|im_end|>")
    assert chat(client, data_url(videos[0])).choices


def test_files_are_fetched_from_allowed_hosts(start, model, videos):
    def send(handler):
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(videos[3].read_bytes())

    with web_server(send) as (host, requests):
        running = start(sources=MediaSources((), FetchPolicy((host,), private=True)))
        answer = chat(running.client(), f"http://{host}/it.mp4")
        assert answer.choices[0].message.content == model.caption(videos[3], sampling=SHORT).text
        with pytest.raises(openai.BadRequestError, match="not public"):
            chat(start(sources=MediaSources((), FetchPolicy((host,)))).client(), f"http://{host}/it.mp4")
        assert requests == [(host, "/it.mp4")]
        assert read_metrics(running)["salmonn_received_bytes_totalfetched"] == videos[3].stat().st_size


def test_a_failing_model(start, model, videos):
    """The error is a status before the first text and an event after it; /health fails until the model recovers."""
    running = start()
    client = running.client()
    model.step_error = lambda size: IndexError("out of range")
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError, match="the model failed"):
            chat(client, videos[0].name, stream=stream)
    health = httpx2.get(f"{running.url}/health", trust_env=False)
    assert health.status_code == 503 and health.json()["status"] == "failing"
    model.step_error = lambda size: None
    model.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        streaming = pool.submit(chat, client, videos[0].name, stream=True)
        wait_until(lambda: model.batches[-1] == 1 and len(model.batches) == 3)
        steps = iter([None, None, None, IndexError("out of range")])
        model.step_error = lambda size: next(steps)
        model.gate.set()
        with (
            pytest.raises(openai.APIError, match="the model failed") as caught,
            streaming.result(STEP_SECONDS) as chunks,
        ):
            gather(chunks)
    assert not isinstance(caught.value, openai.APIStatusError)
    model.step_error = lambda size: None
    assert chat(client, videos[0].name).choices
    assert httpx2.get(f"{running.url}/health", trust_env=False).status_code == 200


def test_uploads_are_removed_when_the_answer_starts(start, model, videos):
    """It may end much later."""
    running = start()
    model.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        streaming = pool.submit(chat, running.client(), data_url(videos[0]), stream=True)
        wait_until(lambda: model.batches == [1])
        assert [file.stat().st_size for file in running.service.uploads.rglob("file")] == [videos[0].stat().st_size]
        model.gate.set()
        with streaming.result(STEP_SECONDS) as chunks:
            next(chunks)
            assert not list(running.service.uploads.iterdir())


def test_spellings_of_base64(start, model, videos):
    """Line breaks, a final newline, the alphabet for URLs, percent-encoding, a comma in the media type, no padding."""
    client, data = start().client(), videos[0].read_bytes()
    expected = model.caption(videos[0], sampling=SHORT).text
    plain = base64.b64encode(data).decode()
    assert "+" in plain and "/" in plain
    for url in (
        f"data:video/mp4;base64,{base64.encodebytes(data).decode()}",
        f"data:video/mp4;base64,{plain}\r\n",
        f"data:video/mp4;base64,{base64.urlsafe_b64encode(data).decode()}",
        f"data:video/mp4;base64,{quote(plain, safe='')}",
        f"data:video/mp4;base64,{plain.rstrip('=')}",
        f'data:video/mp4;codecs="avc1, mp4a";base64,{plain}',
    ):
        assert chat(client, url).choices[0].message.content == expected
    for broken in (plain.replace("+", " "), plain + "%", plain + "A=", "data:" + plain):
        with pytest.raises(openai.BadRequestError, match="is not valid base64"):
            chat(client, f"data:video/mp4;base64,{broken}")


def test_base64_is_decoded_across_chunks(videos, tmp_path, monkeypatch):
    """Chunks cut percent-encoded characters and groups of four at every place."""
    monkeypatch.setattr(sources, "_CHUNK_CHARS", 7)
    data = videos[0].read_bytes()[:500]
    for text in (quote(base64.b64encode(data), safe=""), base64.encodebytes(data).decode()):
        assert sources.write_data(f"data:;base64,{text}", tmp_path / "a", max_bytes=500) == 500
        assert (tmp_path / "a").read_bytes() == data
        with pytest.raises(TooLargeError):
            sources.write_data(f"data:;base64,{text}", tmp_path / "a", max_bytes=499)


def test_stop_strings_end_the_answer(start, model, videos):
    """Nothing of a stop string is sent, and the row leaves the batch."""
    client = start().client()
    whole = chat(client, videos[0].name, max_completion_tokens=60).choices[0].message.content
    stop = whole[len(whole) // 2 :][:7]
    expected = whole[: whole.index(stop)].rstrip()
    options = dict(max_completion_tokens=60, stop=["no such text", stop])
    before = model.num_steps
    answer = chat(client, videos[0].name, **options)
    assert answer.choices[0].message.content == expected and answer.choices[0].finish_reason == "stop"
    assert 0 < answer.usage.completion_tokens == model.num_steps - before < 60
    with chat(client, videos[0].name, stream=True, **options) as chunks:
        texts, reasons, _ = gather(chunks)
    assert (texts, reasons) == ({0: expected}, {0: "stop"})
    sampling = Sampling(max_new_tokens=60, stop=(stop,))
    assert model.caption(videos[0], sampling=sampling).text == expected
    assert "".join(model.stream(videos[0], sampling=sampling)) == expected


def test_a_stop_string_ends_one_of_several_answers(start, videos):
    client = start().client()
    options = dict(temperature=1.2, seed=3, n=4, max_completion_tokens=60)
    whole = [choice.message.content for choice in chat(client, videos[0].name, **options).choices]
    stop = whole[1][10:16]
    with chat(client, videos[0].name, stream=True, stop=stop, **options) as chunks:
        texts = gather(chunks)[0]
    assert [texts[number] for number in range(4)] == [text.split(stop)[0].rstrip() for text in whole]


def test_the_number_of_frames_reaches_the_model(start, model, videos):
    client = start().client()
    counts, original = [], model.processor.clip_inputs

    def count(clip):
        counts.append(len(clip.frames))
        return original(clip)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.processor, "clip_inputs", count)
        chat(client, videos[0].name)
        chat(client, videos[0].name, extra_body={"mm_processor_kwargs": {"num_frames": 3}})
        chat(client, videos[0].name, extra_body={"mm_processor_kwargs": {"fps": 0.5}})
    assert counts[0] > counts[1] == 3 and counts[2] < counts[0]
    with pytest.raises(openai.BadRequestError, match="num_frames is 1000; the maximum of this model is 16"):
        chat(client, videos[0].name, extra_body={"mm_processor_kwargs": {"num_frames": 1000}})
    with pytest.raises(openai.BadRequestError, match="max_pixels cannot be set"):
        chat(client, videos[0].name, extra_body={"mm_processor_kwargs": {"max_pixels": 1000}})


def test_a_clip_may_follow_a_conversation(start, model, videos):
    messages = [
        {"role": "user", "content": "I will send a video."},
        {"role": "assistant", "content": "Please do."},
        {"role": "user", "content": "Here it is."},
        *user_message(videos[0].name, "What is heard?"),
    ]
    answer = start().client().chat.completions.create(model="", messages=messages, max_completion_tokens=12)
    history = (("I will send a video.", "Please do."),)
    expected, otherwise = (
        model.caption(
            videos[0], prompt="Here it is.\nWhat is heard?", sampling=SHORT, history=history, clip_turn=turn
        ).text
        for turn in (1, 0)
    )
    assert expected != otherwise
    assert answer.choices[0].message.content == expected


def test_log_probabilities(start, model, videos):
    """With and without a stream; the tokens are the text, and the most likely one is the greedy one."""
    client = start().client()
    choice = chat(client, videos[0].name, logprobs=True, top_logprobs=3).choices[0]
    content = choice.logprobs.content
    text = b"".join(bytes(token.bytes) for token in content).decode(errors="replace")
    assert text.strip() == choice.message.content and len(content) == 12
    assert all(token.logprob == token.top_logprobs[0].logprob and len(token.top_logprobs) == 3 for token in content)
    expected = model.caption(videos[0], sampling=replace(SHORT, logprobs=0))
    assert sum(token.logprob for token in content) == pytest.approx(expected.logprob, abs=1e-4)
    with chat(client, videos[0].name, logprobs=True, top_logprobs=3, stream=True) as chunks:
        parts = [chunk.choices[0].logprobs for chunk in chunks]
    streamed = [token for part in parts if part for token in part.content]
    assert [token.token for token in streamed] == [token.token for token in content]
    assert [token.logprob for token in streamed] == pytest.approx([token.logprob for token in content], abs=1e-4)
    assert chat(client, videos[0].name).choices[0].logprobs is None
    assert chat(client, videos[0].name, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


class Scene(BaseModel):
    sound: bool
    shapes: Annotated[list[Literal["circle", "star"]], Field(min_length=1, max_length=2)]


def test_answers_in_json(start, videos):
    """A pydantic model, as OpenAI's client sends it; any object, and a schema that cannot be used."""
    client = start().client()
    messages = user_message(videos[0].name, "What is seen?")
    options = dict(model="", messages=messages, temperature=1.5, max_tokens=100)
    answer = client.chat.completions.parse(response_format=Scene, n=3, seed=1, **options)
    assert all(isinstance(choice.message.parsed, Scene) for choice in answer.choices)
    with client.chat.completions.create(
        response_format=type_to_response_format_param(Scene), stream=True, **options
    ) as chunks:
        texts, reasons, _ = gather(chunks)
    assert Scene.model_validate_json(texts[0]) and reasons == {0: "stop"}
    anything = client.chat.completions.create(response_format={"type": "json_object"}, **options).choices[0]
    assert anything.message.content.startswith("{")
    wrong = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strange"}}}
    with pytest.raises(openai.BadRequestError, match="cannot be used: Invalid type: strange") as caught:
        client.chat.completions.create(response_format=wrong, **options)
    assert caught.value.param == "response_format.json_schema.schema"


def test_greedy_choices_are_equal(start, videos):
    first, second = chat(start().client(), videos[0].name, n=2).choices
    assert first.message.content == second.message.content != ""
