"""Requests in words: what they ask for, and what is refused because it cannot be given."""

import json

import pytest

from salmonn.caption.captioner import Span
from salmonn.caption.generate import Sampling
from salmonn.caption.streaming import Completion
from salmonn.serve.schema import ChatLimits, ChatRequest, RequestError, ResponseBuilder, Usage, parse_chat_request

LIMITS = ChatLimits(100, max_tokens=200, max_choices=4, max_prompt_chars=50, max_conversation_chars=100)
VIDEO = {"type": "video_url", "video_url": {"url": "data:,"}}


def text(words):
    return {"type": "text", "text": words}


def talk(*contents):
    """Messages of the user and the assistant in turn; the words, or the one part, of each."""
    return [
        {"role": ("user", "assistant")[place % 2], "content": [content] if isinstance(content, dict) else content}
        for place, content in enumerate(contents)
    ]


def parse(content=(VIDEO,), **parameters):
    body = {"messages": [{"role": "user", "content": content}]} | parameters
    return parse_chat_request(json.dumps(body).encode(), limits=LIMITS)


def test_the_least_that_is_asked():
    assert parse() == (
        ChatRequest(
            kind="video",
            model="",
            prompt=None,
            history=(),
            system=None,
            sampling=Sampling(max_new_tokens=100),
            span=Span(),
            modality="both",
            num_max_choices=1,
            seed=None,
            stream=False,
            include_usage=False,
        ),
        "data:,",
    )


def test_all_that_can_be_asked():
    ask, url = parse(
        [text("What is"), {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}, text("heard?")],
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
    assert ask == ChatRequest(
        "sound", "m", "What is\nheard?", (), None, sampling, Span(1, 2.5), "audio", 3, -4, True, True
    )


def test_a_conversation():
    """Answers as clients send them back, with fields of nothing."""
    system = {"role": "developer", "content": [text("Be brief.")], "name": None}
    first, answer, last = talk(VIDEO, " A star. ", [text("What"), text("else?")])
    ask, url = parse(messages=[system, first, answer | {"refusal": None, "annotations": []}, last])
    assert (ask.system, ask.history, ask.prompt) == ("Be brief.", (("", "A star."),), "What\nelse?")
    assert url == "data:,"
    assert parse(messages=[{"role": "system", "content": ""}, first])[0].system == ""
    assert parse(messages=talk(VIDEO, "", "Why?"))[0].history == (("", ""),)  # it may have said nothing


def test_a_still_is_asked_about():
    ask, url = parse([{"type": "image_url", "image_url": {"url": "a.png", "detail": "auto"}}])
    assert (ask.kind, url) == ("image", "a.png")


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"frequency_penalty": 0.5}, "frequency_penalty: this server does not do what that asks for: leave it out"),
        ({"presence_penalty": -1}, "presence_penalty"),
        ({"logprobs": True}, "logprobs"),
        ({"stop": "."}, "stop"),
        ({"tools": [{}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"top_k": 4}, "top_k: this server does not know it: leave it out"),
        ({"temperature": 2.5}, "temperature: .*less than or equal to 2"),
        ({"temperature": 1e-9}, "temperature must be 0, or 0.01 and above"),
        ({"temperature": "1"}, "temperature: "),
        ({"top_p": 0}, "top_p: .*greater than 0"),
        ({"n": 0}, "n: "),
        ({"n": 5, "temperature": 1}, "n: 4 choices are given at most"),
        ({"n": 2}, "n: at temperature 0 all choices are the same"),
        ({"n": True}, "n: "),
        ({"max_tokens": 201}, "max_tokens: 200 are given at most"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "differ: give one"),
        ({"stream_options": {"include_usage": True}}, "stream_options go with stream: true only"),
        ({"start": 3, "end": 2}, r"the span from 3.0 to 2.0 s is empty"),
        ({"start": -1}, "start: "),
        ({"modality": "smell"}, "use: "),
        ({"repetition_penalty": 1e-30}, "repetition_penalty: "),
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "user", "content": "a"}] * 65}, "messages: .* at most 64 items"),
        ({"metadata": {"a": [{}] * 25_000}}, "the body has more than 50,000 values"),
        ({"messages": [{"role": "system", "content": "Be brief."}]}, "the last is the user's"),
        ({"messages": talk("a", "b")}, "the user's and the assistant's in turn"),
        ({"messages": [*talk("a"), *talk("b")]}, "in turn"),
        ({"messages": talk(VIDEO, "b", "c", "d", "")}, "the user's message 3 has no words: write some"),
        ({"messages": talk("a", "b", VIDEO)}, "belongs into the first message of the user"),
        ({"messages": talk(VIDEO, "b", VIDEO)}, "the messages have 2 clips"),
        ({"messages": talk("a", "b", "c")}, "the messages have no clips"),
        ({"messages": talk("a", VIDEO, "c")}, "belongs into the first message of the user"),
        ({"messages": [{"role": "system", "content": [VIDEO]}, *talk(VIDEO)]}, "belongs into the first message"),
        ({"messages": [{"role": "tool", "content": "a"}]}, r"messages.0.role"),
        ({"messages": [*talk(VIDEO), {"role": "assistant", "content": "a", "tool_calls": [{}]}]}, "tool_calls is not"),
        ({"messages": talk(VIDEO, "x" * 90, "y" * 11)}, "the messages have 101 letters, .*: leave out the eldest"),
        ({"messages": talk(VIDEO, "x", "y" * 51)}, "a message has 51 letters: 50 are taken at most"),
        ({"messages": [{"role": "system", "content": "x" * 51}, *talk(VIDEO)]}, "a message has 51 letters"),
        ({"messages": [{"role": "user", "content": [{"type": "x" * 5000}]}]}, r"^messages[^\n]{,600}$"),
        ({"messages": [{"role": "user", "content": [VIDEO | {"x" * 5000: 1}]}]}, r"^messages[^\n]{,600}$"),
    ],
)
def test_what_cannot_be_given_is_refused(parameters, words):
    with pytest.raises(RequestError, match=words):
        parse(**parameters)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("Describe it.", "the messages have no clips: give one video_url, image_url or input_audio"),
        ([text("Describe it.")], "the messages have no clips"),
        ([VIDEO, VIDEO], "the messages have 2 clips"),
        (
            [VIDEO, {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}],
            "the sound of a video is taken from the video",
        ),
        ([VIDEO, *[text("x")] * 64], "at most 64 items"),
        ([1] * 60_000, "the body has more than 50,000 values"),
        ([VIDEO, text("x" * 51)], "a message has 51 letters: 50 are taken at most"),
        ([{"type": "file", "file": {}}], "messages.0.content"),
        ([{"type": "image_url", "image_url": {"url": "a", "detail": "high"}}], "detail"),
        ([{"type": "input_audio", "input_audio": {"data": "", "format": "ogg"}}], "format"),
        ([VIDEO | {"fps": 2}], "fps"),
    ],
)
def test_messages_of_another_kind_are_refused(content, words):
    with pytest.raises(RequestError, match=words):
        parse(content)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"messages": 1e999}', b'{"messages": [{"role": "user", "content": "\\ud800"}]}']
)
def test_bodies_that_are_no_request(body):
    with pytest.raises(RequestError):
        parse_chat_request(body, limits=LIMITS)


def test_a_refusal_does_not_repeat_the_file():
    with pytest.raises(RequestError) as caught:
        parse([{"type": "video_url", "video_url": {"url": ["AAAABBBB"]}}])
    assert "AAAABBBB" not in str(caught.value) and "url" in caught.value.param


def test_answers_in_json():
    speaker = ResponseBuilder("chatcmpl-1", "toy", 1234)
    told = speaker.whole([Completion("a", True), Completion("b", False)], usage=Usage(10, 3))
    assert told["usage"] == {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13}
    assert [(one["index"], one["message"]["content"], one["finish_reason"]) for one in told["choices"]] == [
        (0, "a", "stop"),
        (1, "b", "length"),
    ]
    assert json.loads(speaker.piece(1, "é\n").removeprefix("data: ")) == {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1234,
        "model": "toy",
        "choices": [{"index": 1, "delta": {"content": "é\n"}, "logprobs": None, "finish_reason": None}],
    }
