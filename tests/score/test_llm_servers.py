"""What servers refuse in a request and how they reply: each request is sent in the way that its server accepts."""

import json

import pytest

from salmonn.score.chat_client import LLMRejectedError, LLMStoppedError
from salmonn.score.llm_protocol import LLMResponse
from tests.score.completions import complete, text_of
from tests.score.fake_llm_server import Answer

pytestmark = pytest.mark.usefixtures("clock")


def refuse(*names: str, message: str, status: int = 400):
    """Script that refuses requests with any of these parameters, or values of response_format's type."""

    def script(request, number):
        sent = {*request, request.get("response_format", {}).get("type")}
        return Answer(message, status=status) if sent & set(names) else Answer(text_of(request))

    return script


@pytest.mark.parametrize(
    ("names", "status", "message", "learned"),
    [
        (["json_schema"], 400, "This response_format type is unavailable now", {"type": "json_object"}),
        (["response_format"], 400, "bad request", None),
        (["response_format"], 404, "No endpoints found that support the requested parameters: response_format", None),
        (["response_format"], 422, "extra fields", None),
        (["response_format"], 500, "Internal Server Error", None),  # on response_format only
        (["response_format"], 503, "unknown response_format", None),
    ],
)
def test_falls_back_to_weaker_response_formats(serve, open_client, caplog, names, status, message, learned):
    server = serve(refuse(*names, message=message, status=status))
    client = open_client(server)
    assert [complete(client, text).text for text in "abc"] == list("abc")
    assert [request.get("response_format") for request in server.requests[-3:]] == [learned] * 3
    assert [record.getMessage() for record in caplog.records if "does not accept" in record.getMessage()] == [
        f"m at {server.url} does not accept json_schema ({caplog.records[-1].args[2]}); requests are sent "
        + ("with json_object" if learned else "without it")
    ]
    assert message in caplog.text
    with pytest.raises((LLMRejectedError, LLMStoppedError), match=message):
        complete(open_client(server, structured="always", retry_seconds=1.0), "d")


def test_a_server_that_replies_with_nothing_to_a_schema(serve, open_client, caplog):
    server = serve(lambda request, number: Answer("" if "response_format" in request else "x"))
    client = open_client(server)
    assert [complete(client, text).text for text in "ab"] == ["x", "x"]
    assert len(server.requests) == 4 and caplog.text.count("does not accept json_schema (empty reply)") == 1
    silent = serve(lambda request, number: Answer(""))
    client = open_client(silent)
    assert complete(client).text == complete(client, "other").text == "" and len(silent.requests) == 4
    assert "response_format" in silent.requests[-1] and caplog.text.count("does not accept") == 1


def test_a_passing_failure_does_not_cost_the_schema(serve, open_client, caplog):
    server = serve(lambda request, number: Answer("down", status=500 if number < 6 else 200))
    complete(open_client(server))
    assert all("response_format" in request for request in server.requests if text_of(request) == "hello")
    assert "does not accept" not in caplog.text


@pytest.mark.parametrize(
    ("name", "status", "message", "learned"),
    [
        ("seed", 422, "extra_forbidden: body, seed", None),
        ("temperature", 400, "Unsupported value: 'temperature' does not support 0 with this model.", None),
        ("max_tokens", 400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.", 99),
    ],
)
def test_omits_what_the_server_refuses(serve, open_client, caplog, name, status, message, learned):
    server = serve(refuse(name, message=message, status=status))
    client = open_client(server, max_reply_tokens=99)
    assert [complete(client, text).text for text in "abc"] == list("abc")
    assert [name in request for request in server.requests] == [True, False, False, False]
    assert server.requests[-1].get("max_completion_tokens") == learned
    assert {"response_format", "seed", "temperature", "max_tokens"} - {name} <= {*server.requests[-1]}
    assert caplog.text.count(f"does not accept {name}") == 1


def test_a_server_that_refuses_several_parameters(serve, open_client):
    def script(request, number):
        refused = [name for name in ("temperature", "max_tokens", "max_completion_tokens", "seed") if name in request]
        return Answer(f"unknown parameter {refused[0]}", status=400) if refused else Answer("x")

    server = serve(script)
    client = open_client(server, concurrency=8)
    client.map_concurrent(lambda text: complete(client, text), [str(number) for number in range(30)])
    assert {*server.requests[-1]} == {"model", "messages", "response_format"}


def test_a_conversation_that_is_too_long_does_not_cost_the_token_limit(serve, open_client):
    message = "max_tokens is too large: 4096. This model's maximum context length is 4096 tokens"
    server = serve(lambda request, number: Answer(message, status=400 if "max_tokens" in request else 200))
    with pytest.raises(LLMRejectedError, match="too large"):
        complete(open_client(server))


def test_a_rejected_request_is_not_a_rejected_schema(serve, open_client):
    server = serve(lambda request, number: Answer("too long", status=400 if text_of(request) == "long" else 200))
    client = open_client(server)
    with pytest.raises(LLMRejectedError, match="too long"):
        complete(client, "long")
    complete(client, "short")
    assert "response_format" in server.requests[-1]


def test_a_request_on_which_the_server_fails_does_not_affect_others(serve, open_client):
    server = serve(lambda request, number: Answer("x", status=500 if text_of(request) == "bad" else 200))
    client = open_client(server, retry_seconds=2.0, concurrency=2)

    def complete_or_error(text: str) -> str:
        try:
            return complete(client, text).text
        except LLMRejectedError as error:
            return str(error)

    replies = client.map_concurrent(complete_or_error, ["bad", "a", "b"])
    assert "the server fails on this request but not on others" in replies[0] and replies[1:] == ["x", "x"]


def completion(message: dict, *, finish_reason: str = "stop", **extra) -> bytes:
    return json.dumps({"choices": [{"message": message, "finish_reason": finish_reason}]} | extra).encode()


CHUNKS = [{"content": "a\u2028"}, {"content": "b", "role": "assistant"}, {}]


@pytest.mark.parametrize(
    ("body", "reply"),
    [
        (completion({"content": [{"type": "text", "text": "a"}, "b"]}), LLMResponse("ab")),
        (completion({"content": [{"type": "thinking", "thinking": [{"text": "x"}]}, {"text": "a"}]}), LLMResponse("a")),
        (completion({"content": None, "reasoning_content": "a"}), LLMResponse("a")),
        (completion({"content": None, "reasoning": "a"}), LLMResponse("a")),
        (completion({"content": "a", "reasoning_content": "b"}), LLMResponse("a")),
        (completion({"tool_calls": [{"function": {"name": "reply", "arguments": "a"}}]}), LLMResponse("a")),
        (completion({"content": None, "refusal": "I'm sorry."}), LLMResponse("(refusal) I'm sorry.")),
        (
            completion({"content": ""}, finish_reason="content_filter"),
            LLMResponse("(the server's content filter withheld the reply)"),
        ),
        (completion({"content": "a"}, finish_reason="length"), LLMResponse("a", True)),
        (completion({"content": "a"}, usage={"total_tokens": 20.0}), LLMResponse("a", False, 20)),
        (completion({"content": "a"}, usage={"total_tokens": "20"}), LLMResponse("a", False, 20)),
        (completion({"content": "a"}, usage={"total_tokens": "many"}), LLMResponse("a")),
        (completion({"content": "a"}, usage=[1]), LLMResponse("a")),
        (b"\xef\xbb\xbf\n " + completion({"content": "a"}), LLMResponse("a")),
        (
            b"".join(
                b"data: " + json.dumps({"choices": [{"delta": delta}]}, ensure_ascii=False).encode() + b"\r\n\r\n"
                for delta in CHUNKS
            )
            + b'data: {"choices": [], "usage": {"total_tokens": 5}}\n\ndata: [DONE]\n\n',
            LLMResponse("a\u2028b", False, 5),
        ),
    ],
)
def test_reads_replies_of_many_servers_once(serve, open_client, body, reply):
    server = serve(lambda request, number: Answer(body=body))
    assert complete(open_client(server)) == complete(open_client(server)) == reply
    assert len(server.requests) == 1


def test_a_server_that_only_streams(serve, open_client):
    def script(request, number):
        if not request.get("stream"):
            return Answer("this model only supports stream=True", status=400)
        return Answer(body=b'data: {"choices": [{"delta": {"content": "a"}, "finish_reason": "stop"}]}\n\n')

    server = serve(script)
    client = open_client(server)
    assert complete(client).text == complete(client, "other").text == "a" and len(server.requests) == 3


@pytest.mark.parametrize(
    ("body", "words", "num_requests"),
    [
        (b'{"error": {"message": "Invalid API key", "code": 401}}', "Invalid API key", 1),
        (b'{"error": {"message": "Invalid API key", "type": "authentication_error"}}', "Invalid API key", 1),
        (b'{"error": {"message": "pay first", "code": "insufficient_quota"}}', "pay first", 1),
        (b'{"error": "no such model", "code": 5}', "no such model", None),
        (b'{"error": {"message": "Rate limit exceeded"}}', "Rate limit exceeded", None),
        (b"<!DOCTYPE html><style>a {b}</style><p>Log in <b>here</b></p>", "not a completion: 'Log in here'", None),
        (b'{"detail": "moved"}', "moved", None),
        (b"", "it is empty", None),
    ],
)
def test_reports_the_words_of_a_body_without_a_reply(serve, open_client, body, words, num_requests):
    server = serve(lambda request, number: Answer(body=body))
    with pytest.raises(LLMStoppedError, match=words):
        complete(open_client(server, retry_seconds=2.0))
    assert len(server.requests) == num_requests if num_requests else len(server.requests) > 2


def test_an_unpaired_surrogate_is_replaced(serve, open_client):
    server = serve(lambda request, number: Answer(body=Answer("ab").to_bytes().replace(b"ab", b"a\\ud83d")))
    assert complete(open_client(server)).text == complete(open_client(server)).text == "a?"
    assert len(server.requests) == 1
