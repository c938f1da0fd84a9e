"""The client against a misbehaving server: retries, errors that stop the run, spending caps and cached replies."""

import logging
import re
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from salmonn.score import chat_client
from salmonn.score.budget import Budget, Spending
from salmonn.score.chat_client import LLMRejectedError, LLMStoppedError, SpendCapError
from salmonn.score.config import LLMConfig
from salmonn.score.llm_client import LLMClient
from salmonn.score.llm_protocol import LLMResponse
from salmonn.score.response_cache import ResponseCache
from tests.limits import STEP_SECONDS
from tests.score.completions import SCHEMA, complete, text_of
from tests.score.fake_llm_server import Answer

pytestmark = pytest.mark.usefixtures("clock")
HELLO = [{"role": "user", "content": "hello"}]


def test_a_request_is_sent_once(serve, open_client):
    server = serve(lambda request, number: Answer(f"{text_of(request)} {number}"))
    client = open_client(server)
    assert complete(client) == complete(client) == LLMResponse("hello 0", False, 10)
    assert complete(open_client(server)).text == "hello 0"  # a new process finds it too
    assert complete(client, "other").text == "other 1"
    assert complete(client, seed=1).text == "hello 2"
    assert complete(open_client(server, temperature=0.5)).text == "hello 3"
    assert client.budget.spent == {client.name: Spending(3, 30)}


def test_request_body(serve, open_client):
    server = serve(lambda request, number: Answer("x"))
    complete(open_client(server, max_reply_tokens=99), seed=7)
    complete(open_client(server, structured="never", temperature=None))
    full, bare = server.requests
    assert full == {
        "model": "m",
        "messages": HELLO,
        "seed": 7,
        "temperature": 0.0,
        "max_tokens": 99,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "reply", "strict": True, "schema": SCHEMA},
        },
    }
    assert bare == {"model": "m", "messages": HELLO, "seed": 0, "max_tokens": 4096}
    complete(open_client(server, structured="never", temperature=None, seed=None, max_reply_tokens=None), "other")
    assert server.requests[-1] == {"model": "m", "messages": [{"role": "user", "content": "other"}]}
    assert LLMConfig("m").reply_token_limit is None


@pytest.mark.parametrize("body", [b'{"detail": "pinned to another"}', b"pinned to another"])
def test_reports_the_server_s_error_message(serve, open_client, body):
    server = serve(lambda request, number: Answer(status=400, body=body))
    with pytest.raises(LLMRejectedError, match="pinned to another"):
        complete(open_client(server))


@pytest.mark.parametrize(
    "fault",
    [
        Answer("busy", status=429),
        Answer("down", status=500),
        Answer("overloaded", status=503),
        Answer("conflict", status=409),
        Answer("request time-out", status=408),
        Answer("half", is_truncated=True),
        Answer(body=b"<html>proxy error</html>"),
        Answer(body=b'{"choices": []}'),
        Answer(body=b"null"),
        Answer(body=b"\xff\xfe"),
        Answer(body=b'{"choices": [{"message": {"content": 7}}]}'),
        Answer(body=b'{"error": {"message": "upstream", "code": 502}}'),
        Answer(body=b'{"error": {"message": "busy", "code": "rate_limit_exceeded"}}'),
        Answer(body=b'{"choices": [{"message": {}, "error": {"message": "upstream", "code": 502}}]}'),
        Answer(body=b'data: {"choices": [{"delta": {"content": "half"}}]}'),
    ],
)
def test_transient_failures_are_retried(serve, open_client, fault, caplog):
    server = serve(lambda request, number: Answer("good") if number else fault)
    client = open_client(server)
    assert complete(client).text == "good"
    assert len(server.requests) == client.budget.spent[client.name].requests == 2
    assert "retrying in" in caplog.text


def test_slow_answers_are_given_up_and_retried(serve, open_client, caplog):
    """One starts after the timeout, one takes longer as a whole; both are asked for at the same time."""
    faults = [Answer("late", delay_seconds=30.0), Answer("drips", drip_seconds=0.1)]
    servers = [serve(lambda request, number, fault=fault: Answer("good") if number else fault) for fault in faults]
    clients = [open_client(server, timeout_seconds=2.0) for server in servers]
    with ThreadPoolExecutor() as threads:
        assert [response.text for response in threads.map(complete, clients)] == ["good", "good"]
    for server, client in zip(servers, clients, strict=True):
        assert len(server.requests) == client.budget.spent[client.name].requests == 2
    assert caplog.text.count("retrying in") == 2


DATE = "Mon, 30 Nov 2026 10:00:00 GMT"


@pytest.mark.parametrize(
    ("headers", "delay"),
    [
        ({"Retry-After": "1.6"}, 1.6),
        ({"retry-after-ms": "4000", "Retry-After": "5"}, 4.0),
        ({"Retry-After": "Mon, 30 Nov 2026 10:00:05 GMT", "Date": DATE}, 5.0),
    ],
)
def test_respects_retry_after(serve, open_client, clock, monkeypatch, headers, delay):
    monkeypatch.setattr(chat_client, "time", clock)
    server = serve(lambda request, number: Answer("x", status=200 if number else 429, headers=headers))
    complete(open_client(server))
    assert clock.delays == [delay]  # the default delay is at most a second


def test_retry_after_holds_for_all_requests(serve, open_client, monkeypatch):
    monkeypatch.undo()  # real time
    times = []

    def script(request, number):
        times.append(time.monotonic())
        return Answer("x", status=200 if number else 429, headers={"retry-after-ms": "500"})

    client = open_client(serve(script))
    first = threading.Thread(target=complete, args=(client,))
    first.start()
    while client._resume_at < 0:
        time.sleep(0.01)
    complete(client, "other")
    first.join()
    assert min(times[1:]) >= times[0] + 0.5


def test_a_past_or_invalid_retry_after_is_ignored(serve, open_client, clock):
    values = ["Mon, 30 Nov 2026 09:00:00 GMT", "soon", "-3"]
    server = serve(
        lambda request, number: Answer(
            "x", status=429 if number < 3 else 200, headers={"Date": DATE, "Retry-After": values[min(number, 2)]}
        )
    )
    complete(open_client(server))
    assert [0.5 <= delay / 2**number <= 1 for number, delay in enumerate(clock.delays)] == [True] * 3


def test_retry_after_beyond_the_time_limit(serve, open_client, clock):
    server = serve(lambda request, number: Answer("x", status=429, headers={"Retry-After": "3600"}))
    with pytest.raises(LLMStoppedError, match=r"is unavailable: .*429.*asks to wait 3600 s"):
        complete(open_client(server, retry_seconds=30.0))
    assert clock.delays == [] and len(server.requests) == 1


def test_stops_at_the_time_limit_and_caches_replies(serve, open_client, clock):
    server = serve(lambda request, number: Answer("x", status=500 if number else 200))
    client = open_client(server, retry_seconds=2.0)
    complete(client, "first")
    with pytest.raises(LLMStoppedError, match=r"is unavailable: .*500.*run the same command again"):
        complete(client, "second")
    # delays of 0.5 to 1, then 1 to 2 seconds, the last one shortened to the limit: 3 or 4 tries, then a trivial request
    assert sum(clock.delays) == pytest.approx(2.0, abs=1e-3)
    assert 0.5 <= clock.delays[0] <= 1 <= clock.delays[0] + clock.delays[1] <= 2.001
    texts = [text_of(request) for request in server.requests]
    assert 3 <= texts.count("second") <= 4 and texts[-1] == "Reply with the word yes."
    assert complete(open_client(server), "first").text == "x"


def test_no_server_at_all(open_client, serve, clock):
    """A server that was never reached gets 10 seconds, one that has replied before all of --retry-seconds."""
    server = serve(lambda request, number: Answer())
    known, client = open_client(server, retry_seconds=25.0), open_client(server)
    complete(known)
    server.close()
    with pytest.raises(LLMStoppedError, match=r"refused.*is the server running") as caught:
        complete(client, "other")
    assert sum(clock.delays) == pytest.approx(10.0, abs=1e-3) and "saved" not in str(caught.value)
    clock.delays.clear()
    with pytest.raises(LLMStoppedError, match="Replies so far are saved"):
        complete(known, "other")
    assert sum(clock.delays) == pytest.approx(25.0, abs=1e-3)


def test_a_server_that_rejects_everything(serve, open_client):
    server = serve(lambda request, number: Answer("no such option", status=400))
    client = open_client(server, structured="never")
    for number in range(19):
        with pytest.raises(LLMRejectedError):
            complete(client, str(number))
    with pytest.raises(LLMStoppedError, match="no such option"):
        complete(client, "19")


def test_a_cap_does_not_hide_the_real_problem(serve, open_client):
    server = serve(lambda request, number: Answer("bad key", status=401, delay_seconds=0.3))
    client = open_client(server, concurrency=4, max_requests=2)
    with pytest.raises(LLMStoppedError, match="bad key"):
        client.map_concurrent(lambda text: complete(client, text), list("abcdefgh"))


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "bad key"),
        (402, "no money"),
        (403, "forbidden"),
        (404, "no such model"),
        (405, "no such method"),
        (429, "insufficient_quota"),
        (451, "not here"),
    ],
)
def test_permanent_failures_stop_at_once(serve, open_client, status, message):
    server = serve(lambda request, number: Answer(message, status=status))
    with pytest.raises(LLMStoppedError, match=message):
        complete(open_client(server))
    assert len(server.requests) == 1


def test_a_proxy_is_not_used_for_this_machine(serve, open_client, monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://user:secret@127.0.0.1:9")  # nothing listens there
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert complete(open_client(serve(lambda request, number: Answer("x")))).text == "x"


def test_names_the_proxy_of_an_unreachable_server(tmp_path, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://user:secret@127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    client = LLMClient(LLMConfig("m", "http://judge.example/v1", cache=tmp_path / "c", retry_seconds=1.0))
    with pytest.raises(LLMStoppedError, match=r"through the proxy 127\.0\.0\.1:9 of the environment"):
        complete(client)


def test_cap_of_requests(serve, open_client):
    server = serve(lambda request, number: Answer(text_of(request)))
    client = open_client(server, max_requests=2)
    complete(client, "a"), complete(client, "b"), complete(client, "a")  # the third is cached
    with pytest.raises(LLMStoppedError, match=r"the cap of 2 requests is reached \(2 requests, 20 tokens in"):
        complete(client, "c")
    assert len(server.requests) == 2
    limited = open_client(server, max_requests=1)
    assert [complete(limited, message).text for message in "abc"] == ["a", "b", "c"]
    assert len(server.requests) == 3


def test_retries_count_against_the_cap(serve, open_client):
    server = serve(lambda request, number: Answer("x", status=500))
    with pytest.raises(LLMStoppedError, match="the cap of 2 requests"):
        complete(open_client(server, max_requests=2))
    assert len(server.requests) == 2


def test_cap_of_tokens(serve, open_client):
    server = serve(lambda request, number: Answer("x"))
    client = open_client(server, max_tokens=15)
    complete(client, "a"), complete(client, "b")  # 10 of 15 are spent before the second, which may start
    with pytest.raises(LLMStoppedError, match="the cap of 15 tokens"):
        complete(client, "c")
    silent = serve(lambda request, number: Answer("x", usage=None))
    with pytest.raises(LLMStoppedError, match="does not report token usage"):
        complete(open_client(silent, max_tokens=15))
    assert complete(open_client(silent)).num_tokens is None


def test_map_concurrent(serve, open_client):
    barrier = threading.Barrier(3)  # each request waits for two others: fewer at once would never finish

    def script(request, number):
        barrier.wait(timeout=STEP_SECONDS)
        return Answer(text_of(request))

    server = serve(script)
    client = open_client(server, concurrency=3)
    completed = []
    texts = [str(number) for number in range(12)]
    replies = client.map_concurrent(lambda text: complete(client, text).text, texts, progress=completed.append)
    assert replies == texts and sorted(completed) == sorted(texts)
    assert server.max_concurrent == 3


def test_the_first_error_stops_all(serve, open_client):
    def script(request, number):
        if number:
            client._stop.wait(timeout=STEP_SECONDS)  # later replies are sent after the client has stopped
        return Answer("no", status=401)

    server = serve(script)
    client = open_client(server, concurrency=2)
    with pytest.raises(LLMStoppedError, match="no"):
        client.map_concurrent(lambda text: complete(client, text), [str(number) for number in range(50)])
    assert len(server.requests) <= 3


def test_clients_share_a_budget(serve, tmp_path):
    """Replies from the cache cost nothing; the error names what each server has cost."""
    servers = [serve(lambda request, number: Answer("x")) for _ in range(2)]
    budget = Budget(max_requests=3)
    first, second = (
        LLMClient(LLMConfig(f"m{number}", server.url, cache=tmp_path / "c"), budget=budget)
        for number, server in enumerate(servers)
    )
    complete(first)
    complete(second)
    complete(second)
    complete(first, "other")
    spent = f"2 requests, 20 tokens by m0 at {servers[0].url}; 1 request, 10 tokens by m1 at {servers[1].url}"
    assert budget.describe() == spent
    with pytest.raises(SpendCapError, match=re.escape(f"the cap of 3 requests is reached ({spent} in this run). Rep")):
        complete(second, "new")
    assert [len(server.requests) for server in servers] == [2, 1]


def test_a_reply_is_found_wherever_the_model_is_served(serve, tmp_path):
    servers = [serve(lambda request, number: Answer("x")) for _ in range(2)]
    for server in servers:
        complete(LLMClient(LLMConfig("m", server.url, cache=tmp_path / "c")))
    assert [len(server.requests) for server in servers] == [1, 0]
    complete(LLMClient(LLMConfig("other", servers[1].url, cache=tmp_path / "c")))
    assert len(servers[1].requests) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_reply_tokens": 0}, "max_reply_tokens"),
        ({"concurrency": 0}, "concurrency"),
        ({"retry_seconds": 0}, "retry_seconds"),
        ({"max_requests": 0}, "max_requests"),
        ({"base_url": "localhost:8000"}, "base_url must be an address"),
        *(
            ({"base_url": address}, r"no user name, password, query or fragment[^?@]*which api_key_env names$")
            for address in (
                "http://user:secret@host/v1",
                "http://:secret@host/v1",
                "user:secret@host/v1",
                "https://host/v1?api-key=secret",
                "http://host/v1#secret",
            )
        ),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        LLMConfig("m", **options)
    assert "secret" not in str(caught.value)


def test_a_cache_of_another_format(tmp_path):
    path = tmp_path / "replies.sqlite"
    ResponseCache(path).put("k", LLMResponse("x", True, 3), model="m", request={})
    assert ResponseCache(path).get("k") == LLMResponse("x", True, 3)
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 7")
    with pytest.raises(ValueError, match=r"replies\.sqlite is not a reply cache of format 1"):
        ResponseCache(path)


def test_reading_leaves_no_lock_on_the_cache(tmp_path):
    """With one, a write of another thread fails at once where another process waits to write: "database is locked"."""
    path = tmp_path / "replies.sqlite"
    cache = ResponseCache(path)
    for key in "ab":
        cache.put(key, LLMResponse("x", True, 3), model="m", request={})
    read = cache._execute("SELECT key FROM responses")
    with sqlite3.connect(path, timeout=0) as other:
        other.execute("BEGIN EXCLUSIVE")
    assert sorted(read) == [("a",), ("b",)]


def test_a_file_that_is_not_a_cache(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("no database, and longer than a header of one hundred bytes " * 4)
    with pytest.raises(ValueError, match=r"notes\.txt cannot be used as reply cache"):
        ResponseCache(path)


def test_logs_nothing_without_problems(serve, open_client, caplog):
    caplog.set_level(logging.WARNING)
    complete(open_client(serve(lambda request, number: Answer("x"))))
    assert not caplog.records
