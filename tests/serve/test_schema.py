"""Parsing and rejection of chat requests, and the responses."""

import json
from pathlib import Path

import pytest

from salmonn.caption.generator import CaptionRequest, Sampling, Span
from salmonn.caption.streaming import Completion, TextDelta
from salmonn.media.frame_sampling import FrameOptions
from salmonn.model.layout import ClipInfo
from salmonn.score.structured import schema_text
from salmonn.serve.content import ClipPart
from salmonn.serve.errors import RequestError
from salmonn.serve.logprobs import LogprobsFormat
from salmonn.serve.schema import ChatLimits, ChatRequest, ResponseBuilder, Usage, parse_chat_request

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
    assert parse(seed=7) == ChatRequest(
        clip=ClipPart("video", "data:,", "messages[0].content[0].video_url.url", {}),
        model="",
        request=CaptionRequest(Path(), sampling=Sampling(max_new_tokens=100), seed=7),
        stream=False,
        include_usage=False,
    )
    assert parse().request.seed != parse().request.seed  # a random one


def test_all_parameters():
    chat = parse(
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
    clip = ClipPart("audio", "data:;base64,AAAA", "messages[0].content[1].input_audio.data", {})
    sampling = Sampling(temperature=1, top_p=0.5, max_new_tokens=7, repetition_penalty=1.1)
    request = CaptionRequest(Path(), "What is\nheard?", sampling, Span(1, 2.5), "audio", seed=-4, num_samples=3)
    assert chat == ChatRequest(clip, "m", request, stream=True, include_usage=True)


def test_a_conversation():
    """Answers as clients send them back, with empty fields."""
    system = {"role": "developer", "content": [text_part("Be brief.")], "name": None}
    first, answer, last = alternating_messages(VIDEO, " A star. ", [text_part("What"), text_part("else?")])
    chat = parse(messages=[system, first, answer | {"refusal": None, "annotations": []}, last])
    assert (chat.request.system, chat.request.history, chat.request.prompt) == (
        "Be brief.",
        (("", "A star."),),
        "What\nelse?",
    )
    assert chat.clip.url == "data:,"
    assert parse(messages=[{"role": "system", "content": ""}, first]).request.system == ""
    with_empty_answer = parse(messages=alternating_messages(VIDEO, "", "Why?"))
    assert with_empty_answer.request.history == (("", ""),)


@pytest.mark.parametrize(
    ("part", "kind", "url"),
    [
        ({"type": "image_url", "image_url": {"url": "a.png", "detail": "high"}}, "image", "a.png"),
        ({"type": "image", "image": "a.png"}, "image", "a.png"),
        ({"type": "video_url", "video_url": "a.mp4", "uuid": "x"}, "video", "a.mp4"),
        ({"type": "video", "video": "file:///a.mp4"}, "video", "file:///a.mp4"),
        ({"type": "audio_url", "audio_url": {"url": "https://a/b"}}, "audio", "https://a/b"),
        ({"type": "audio", "audio": "a.ogg"}, "audio", "a.ogg"),
        ({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "flac"}}, "audio", "data:;base64,AAAA"),
        (
            {"type": "input_audio", "input_audio": {"data": "data:audio/wav;base64,AA"}},
            "audio",
            "data:audio/wav;base64,AA",
        ),
        ({"type": "input_audio", "input_audio": "AAAA"}, "audio", "data:;base64,AAAA"),
        ({"type": "file", "file": {"file_data": "data:;base64,AA", "filename": "a"}}, "file", "data:;base64,AA"),
        ({"type": "file", "file": {"file_data": "AAAA"}}, "file", "data:;base64,AAAA"),
    ],
)
def test_spellings_of_a_clip(part, kind, url):
    chat = parse([part])
    assert (chat.clip.kind, chat.clip.url, chat.request.frames) == (kind, url, None)


def test_frames_can_be_chosen():
    def frames(part=VIDEO, **parameters):
        return parse([part], **parameters).request.frames

    assert frames(VIDEO | {"fps": 2, "max_pixels": 50_000}) == FrameOptions(2, max_pixels=50_000)
    assert frames({"type": "video_url", "video_url": {"url": "a", "num_frames": 8.0}}) == FrameOptions(num_frames=8)
    assert frames(mm_processor_kwargs={"fps": 0.5}) == FrameOptions(0.5)
    assert frames(VIDEO | {"fps": 2}, mm_processor_kwargs={"fps": 0.5}) == FrameOptions(2)  # the nearer one
    assert frames(mm_processor_kwargs={}) is None


def test_neutral_values_pass():
    neutral = dict(top_k=-1, min_p=0.0, best_of=1, echo=False, skip_special_tokens=True, ignore_eos=False)
    neutral |= dict(length_penalty=1.0, presence_penalty=0.0, frequency_penalty=0, chat_template_kwargs={})
    chat = parse(**neutral, reasoning_effort="none", max_tokens=32.0, temperature=1e-6, n=2, seed=3.0)
    assert chat.request.sampling == Sampling(temperature=0, max_new_tokens=32)
    assert (chat.request.num_samples, chat.request.seed) == (2, 3)
    assert parse(top_k=0, stop=[]).request.sampling.stop == ()


def test_stop_strings():
    assert parse(stop="\n").request.sampling.stop == ("\n",)
    assert parse(stop=["a", "b c"]).request.sampling.stop == ("a", "b c")


def test_response_formats():
    def schema(value):
        return parse(response_format=value).request.sampling.json_schema

    assert schema({"type": "text"}) is None and schema({"type": "json_object"}) == '{"type": "object"}'
    given = {"type": "object", "properties": {"b": {}, "a": {}}}
    named = {"type": "json_schema", "json_schema": {"name": "x", "schema": given, "strict": True}}
    assert schema(named) == json.dumps(given)  # properties stay in order
    assert schema({"type": "json_schema", "json_schema": {"name": "events"}}) == schema_text()


def test_a_clip_in_a_later_message():
    request = parse(messages=alternating_messages("Hello.", "Hi.", VIDEO)).request
    assert (request.history, request.prompt, request.clip_turn) == ((("Hello.", "Hi."),), None, 1)


def test_messages_of_the_user_in_a_row_are_one():
    messages = [*alternating_messages(VIDEO), *alternating_messages("What is", "A star.", "Where?")]
    request = parse(messages=messages).request
    assert (request.history, request.prompt, request.clip_turn) == ((("What is", "A star."),), "Where?", 0)


def test_errors_have_the_path_of_the_parameter():
    with pytest.raises(RequestError) as caught:
        parse([text_part("a"), {"type": "movie"}])
    assert caught.value.param == "messages[0].content[1].type"
    assert str(caught.value).startswith("messages[0].content[1].type must be one of text, video_url, ")
    assert str(caught.value).endswith("; got 'movie'")
    with pytest.raises(RequestError, match=r"stream_options\.include_usage: ") as caught:
        parse(stream_options={"include_usage": "x"}, stream=True)
    assert caught.value.param == "stream_options.include_usage"


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"frequency_penalty": 0.5}, "frequency_penalty: this value is not supported"),
        ({"presence_penalty": -1}, "presence_penalty"),
        ({"top_logprobs": 2}, "top_logprobs requires logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs: .*less than or equal to 20"),
        ({"stop": [""]}, "stop must be a string or a list of up to 16, each of 1 to 200 characters"),
        ({"stop": ["a"] * 17}, "stop must be"),
        ({"stop": 3}, "stop must be"),
        ({"tools": [{}]}, "tools"),
        ({"response_format": {"type": "yaml"}}, "response_format.type must be text, json_object or json_schema"),
        ({"response_format": 3}, "response_format.type must be"),
        ({"top_k": 4}, "top_k: this value is not supported; leave it out"),
        ({"colour": 4}, "colour: unsupported parameter"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema must be an object"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"title": "x" * 20_000}}}},
            "is too long; the maximum is 20,000 characters",
        ),
        ({"ignore_eos": True}, "ignore_eos: this value"),
        ({"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs: this value"),
        ({"reasoning_effort": "high"}, "reasoning_effort: this value"),
        ({"best_of": 2}, "best_of: only 1 is supported"),
        ({"mm_processor_kwargs": {"size": 3}}, "mm_processor_kwargs.size: unsupported field"),
        ({"mm_processor_kwargs": {"fps": 1e9}}, "fps must be from 0.01 to 1000"),
        ({"mm_processor_kwargs": {"num_frames": True}}, "mm_processor_kwargs.num_frames must be a whole number"),
        ({"mm_processor_kwargs": {"fps": 1, "num_frames": 1}}, "exclude each other"),
        ({"max_tokens": 32.5}, "max_tokens: "),
        ({"temperature": 2.5}, "temperature: .*less than or equal to 2"),
        ({"temperature": "1"}, "temperature: "),
        ({"top_p": 0}, "top_p: .*greater than 0"),
        ({"n": 0}, "n: "),
        ({"n": 5, "temperature": 1}, "n: the maximum is 4"),
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
        ({"messages": [*alternating_messages(VIDEO, "b"), *alternating_messages("a", "b")[1:]]}, "alternate user/assi"),
        ({"messages": alternating_messages(VIDEO, "b", "c", "d", "")}, "the user's message 3 has no text"),
        ({"messages": alternating_messages("", "b", VIDEO)}, "the user's message 1 has neither a clip nor text"),
        ({"messages": alternating_messages(VIDEO, "b", VIDEO)}, "the messages have 2 clips"),
        ({"messages": alternating_messages("a", "b", "c")}, "the messages have no clip"),
        (
            {"messages": alternating_messages("a", VIDEO, "c")},
            r"messages\[1\]: a clip belongs in a message of the user",
        ),
        (
            {"messages": [{"role": "system", "content": [VIDEO]}, *alternating_messages(VIDEO)]},
            r"messages\[0\]: a clip belongs in a message of the user",
        ),
        ({"messages": [{"role": "tool", "content": "a"}]}, r"messages\[0\].role: "),
        (
            {"messages": [*alternating_messages(VIDEO), {"role": "assistant", "content": "a", "tool_calls": [{}]}]},
            r"messages\[1\].tool_calls is not supported",
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
        (
            "Describe it.",
            "the messages have no clip; send one .*, such as a video_url",
        ),
        ([text_part("Describe it.")], "the messages have no clip"),
        (
            [VIDEO, VIDEO],
            r"^messages\[0\].content\[1\].video_url.url: the messages have 2 clips, and the model takes one",
        ),
        (
            [VIDEO, {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}],
            "the audio of a video is read from the video",
        ),
        ([VIDEO, *[text_part("x")] * 64], r"messages\[0\].content has 65 parts; the maximum is 64"),
        ([1] * 60_000, "the body has more than 50,000 JSON values"),
        ([VIDEO, text_part("x" * 51)], "a message has 51 characters; the maximum is 50"),
        ([{"type": "file", "file": {}}], r"messages\[0\].content\[0\].file.file_data or file_id must be given"),
        (
            [{"type": "file", "file": {"file_id": "a", "file_data": "AAAA"}}],
            "file_data or file_id must be given, as the clip's only source",
        ),
        ([{"type": "video", "video": ["1.png", "2.png"]}], r"content\[0\].video: a list of frames is not supported"),
        ([{"type": "video_url", "video_url": {"url": 3}}], r"content\[0\].video_url.url must be a string"),
        ([VIDEO | {"colour": 1}], r"content\[0\].colour: unsupported field"),
        ([VIDEO | {"fps": "2"}], r"content\[0\].fps must be a number"),
        ([VIDEO | {"num_frames": 0}], "num_frames must be at least 1"),
        ([text_part(None)], r"content\[0\].text must be a string"),
        (["a"], r"content\[0\] must be an object with a type"),
        (None, r"content must be a string or a list of parts"),
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


def test_responses_tell_what_was_lost_of_the_clip(captioner):
    """Beside OpenAI's fields; in a stream, in the chunk that ends a choice."""
    builder = ResponseBuilder("chatcmpl-1", "toy", 1234, LogprobsFormat(captioner.processor))
    completion = Completion("a", True, ClipInfo("visual", is_complete=False, warnings=("lost 1 s of video",)))
    clip = {"complete": False, "modality": "visual", "warnings": ["lost 1 s of video"]}
    assert json.loads(json.dumps(builder.response([completion], usage=Usage(10, 3))["clip"])) == clip
    text, end = (json.loads(event.removeprefix("data: ")) for event in builder.deltas(0, TextDelta("a", completion)))
    assert "clip" not in text and end["clip"] == clip and end["choices"][0]["finish_reason"] == "stop"


def test_responses(captioner):
    builder = ResponseBuilder("chatcmpl-1", "toy", 1234, LogprobsFormat(captioner.processor))
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
