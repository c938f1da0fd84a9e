"""Parsing and rejection of chat requests, and the responses."""

import json
from pathlib import Path

import pytest

from salmonn.caption.generator import CaptionRequest, Sampling, Span
from salmonn.caption.streaming import Completion, TextDelta
from salmonn.model.layout import ClipInfo
from salmonn.serve.schema import ChatLimits, ChatRequest, RequestError, ResponseBuilder, Usage, parse_chat_request

LIMITS = ChatLimits(100, max_tokens=200, max_choices=4, max_prompt_chars=50, max_conversation_chars=100)
VIDEO = {"type": "video_url", "video_url": {"url": "data:,"}}


def text_part(text):
    return {"type": "text", "text": text}


def alternating_messages(*contents):
    """Return alternating user and assistant messages with the given texts or content parts."""
    return [
        {"role": ("user", "assistant")[index % 2], "content": [content] if isinstance(content, dict) else content}
        for index, content in enumerate(contents)
    ]


def parse(content=(VIDEO,), **parameters):
    body = {"messages": [{"role": "user", "content": content}]} | parameters
    return parse_chat_request(json.dumps(body).encode(), limits=LIMITS)


def test_a_minimal_request():
    assert parse(seed=7) == (
        ChatRequest(
            kind="video",
            model="",
            request=CaptionRequest(Path(), sampling=Sampling(max_new_tokens=100), seed=7),
            stream=False,
            include_usage=False,
        ),
        "data:,",
    )
    assert parse()[0].request.seed != parse()[0].request.seed  # a random one


def test_all_parameters():
    chat, url = parse(
        [
            text_part("What is"),
            {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
            text_part("heard?"),
        ],
        model="m",
        temperature=1,
        top_p=0.5,
        max_completion_tokens=7,
        max_tokens=7,
        n=3,
        seed=-4,
        stream=True,
        stream_options={"include_usage": True},
        start=1,
        end=2.5,
        modality="audio",
        repetition_penalty=1.1,
        frequency_penalty=0,
        logit_bias=None,
        tool_choice="none",
        response_format={"type": "text"},
        user="me",
        metadata={"a": "b"},
    )
    assert url == "data:audio/wav;base64,AAAA"
    sampling = Sampling(temperature=1, top_p=0.5, max_new_tokens=7, repetition_penalty=1.1)
    request = CaptionRequest(Path(), "What is\nheard?", sampling, Span(1, 2.5), "audio", seed=-4, num_samples=3)
    assert chat == ChatRequest("audio", "m", request, stream=True, include_usage=True)


def test_a_conversation():
    """Answers as clients send them back, with empty fields."""
    system = {"role": "developer", "content": [text_part("Be brief.")], "name": None}
    first, answer, last = alternating_messages(VIDEO, " A star. ", [text_part("What"), text_part("else?")])
    chat, url = parse(messages=[system, first, answer | {"refusal": None, "annotations": []}, last])
    assert (chat.request.system, chat.request.history, chat.request.prompt) == (
        "Be brief.",
        (("", "A star."),),
        "What\nelse?",
    )
    assert url == "data:,"
    assert parse(messages=[{"role": "system", "content": ""}, first])[0].request.system == ""
    with_empty_answer = parse(messages=alternating_messages(VIDEO, "", "Why?"))[0]
    assert with_empty_answer.request.history == (("", ""),)


def test_an_image():
    chat, url = parse([{"type": "image_url", "image_url": {"url": "a.png", "detail": "auto"}}])
    assert (chat.kind, url) == ("image", "a.png")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"frequency_penalty": 0.5}, "frequency_penalty: this value is not supported"),
        ({"presence_penalty": -1}, "presence_penalty"),
        ({"logprobs": True}, "logprobs"),
        ({"stop": "."}, "stop"),
        ({"tools": [{}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"top_k": 4}, "top_k: unsupported parameter"),
        ({"temperature": 2.5}, "temperature: .*less than or equal to 2"),
        ({"temperature": 1e-9}, "temperature must be 0, or 0.01 and above"),
        ({"temperature": "1"}, "temperature: "),
        ({"top_p": 0}, "top_p: .*greater than 0"),
        ({"n": 0}, "n: "),
        ({"n": 5, "temperature": 1}, "n: the maximum is 4"),
        ({"n": 2}, "n: at temperature 0 all choices are the same"),
        ({"n": True}, "n: "),
        ({"max_tokens": 201}, "max_tokens: the maximum is 200"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "differ: give one"),
        ({"stream_options": {"include_usage": True}}, "stream_options requires stream: true"),
        ({"start": 3, "end": 2}, r"the span from 3.0 to 2.0 s is empty"),
        ({"start": -1}, "start: "),
        ({"modality": "smell"}, "modality: "),
        ({"repetition_penalty": 1e-30}, "repetition_penalty: "),
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "user", "content": "a"}] * 65}, "messages: .* at most 64 items"),
        ({"metadata": {"a": [{}] * 25_000}}, "the body has more than 50,000 JSON values"),
        ({"messages": [{"role": "system", "content": "Be brief."}]}, "and end with user, and alternate"),
        ({"messages": alternating_messages("a", "b")}, "alternate user/assistant"),
        ({"messages": [*alternating_messages("a"), *alternating_messages("b")]}, "alternate user/assistant"),
        ({"messages": alternating_messages(VIDEO, "b", "c", "d", "")}, "the user's message 3 has no text"),
        ({"messages": alternating_messages("a", "b", VIDEO)}, "belongs in the user's first message"),
        ({"messages": alternating_messages(VIDEO, "b", VIDEO)}, "the messages have 2 clips"),
        ({"messages": alternating_messages("a", "b", "c")}, "the messages have no clips"),
        ({"messages": alternating_messages("a", VIDEO, "c")}, "belongs in the user's first message"),
        (
            {"messages": [{"role": "system", "content": [VIDEO]}, *alternating_messages(VIDEO)]},
            "belongs in the user's first message",
        ),
        ({"messages": [{"role": "tool", "content": "a"}]}, r"messages.0.role"),
        (
            {"messages": [*alternating_messages(VIDEO), {"role": "assistant", "content": "a", "tool_calls": [{}]}]},
            "tool_calls is not supported",
        ),
        (
            {"messages": alternating_messages(VIDEO, "x" * 90, "y" * 11)},
            "the messages have 101 characters; .*: drop the oldest",
        ),
        ({"messages": alternating_messages(VIDEO, "x", "y" * 51)}, "a message has 51 characters; the maximum is 50"),
        (
            {"messages": [{"role": "system", "content": "x" * 51}, *alternating_messages(VIDEO)]},
            "a message has 51 characters",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "x" * 5000}]}]}, r"^messages[^\n]{,600}$"),
        ({"messages": [{"role": "user", "content": [VIDEO | {"x" * 5000: 1}]}]}, r"^messages[^\n]{,600}$"),
    ],
)
def test_unsupported_values_are_rejected(parameters, message):
    with pytest.raises(RequestError, match=message):
        parse(**parameters)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Describe it.", "the messages have no clips: give exactly one video_url, image_url or input_audio"),
        ([text_part("Describe it.")], "the messages have no clips"),
        ([VIDEO, VIDEO], "the messages have 2 clips"),
        (
            [VIDEO, {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}],
            "the audio of a video is read from the video",
        ),
        ([VIDEO, *[text_part("x")] * 64], "at most 64 items"),
        ([1] * 60_000, "the body has more than 50,000 JSON values"),
        ([VIDEO, text_part("x" * 51)], "a message has 51 characters; the maximum is 50"),
        ([{"type": "file", "file": {}}], "messages.0.content"),
        ([{"type": "image_url", "image_url": {"url": "a", "detail": "high"}}], "detail"),
        ([{"type": "input_audio", "input_audio": {"data": "", "format": "ogg"}}], "format"),
        ([VIDEO | {"fps": 2}], "fps"),
    ],
)
def test_unsupported_messages_are_rejected(content, message):
    with pytest.raises(RequestError, match=message):
        parse(content)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"messages": 1e999}', b'{"messages": [{"role": "user", "content": "\\ud800"}]}']
)
def test_malformed_bodies(body):
    with pytest.raises(RequestError):
        parse_chat_request(body, limits=LIMITS)


def test_errors_do_not_repeat_the_file():
    with pytest.raises(RequestError) as caught:
        parse([{"type": "video_url", "video_url": {"url": ["AAAABBBB"]}}])
    assert "AAAABBBB" not in str(caught.value) and "url" in caught.value.param


def test_responses_tell_what_was_lost_of_the_clip():
    """Beside OpenAI's fields; in a stream, in the chunk that ends a choice."""
    builder = ResponseBuilder("chatcmpl-1", "toy", 1234)
    completion = Completion("a", True, ClipInfo("visual", is_complete=False, warnings=("lost 1 s of video",)))
    clip = {"complete": False, "modality": "visual", "warnings": ["lost 1 s of video"]}
    assert json.loads(json.dumps(builder.response([completion], usage=Usage(10, 3))["clip"])) == clip
    text, end = (json.loads(event.removeprefix("data: ")) for event in builder.deltas(0, TextDelta("a", completion)))
    assert "clip" not in text and end["clip"] == clip and end["choices"][0]["finish_reason"] == "stop"


def test_responses():
    builder = ResponseBuilder("chatcmpl-1", "toy", 1234)
    response = builder.response([Completion("a", True), Completion("b", False)], usage=Usage(10, 3))
    assert response["usage"] == {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13}
    assert [(one["index"], one["message"]["content"], one["finish_reason"]) for one in response["choices"]] == [
        (0, "a", "stop"),
        (1, "b", "length"),
    ]
    assert json.loads(builder.deltas(1, TextDelta("é\n"))[0].removeprefix("data: ")) == {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1234,
        "model": "toy",
        "choices": [{"index": 1, "delta": {"content": "é\n"}, "logprobs": None, "finish_reason": None}],
    }
