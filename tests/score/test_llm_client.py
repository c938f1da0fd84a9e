"""The client against a misbehaving server: retries, errors that stop the run, spend caps and cached replies."""

import logging
import re
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from salmonn.records import Caption, Event, Reference, write_records
from salmonn.score import chat_client
from salmonn.score.api_keys import find_api_key
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

SALMONN = Path(sys.executable).with_name("salmonn")
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
        Answer("late", delay_seconds=30.0),  # longer than the timeout
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
        Answer("drips", drip_seconds=0.1),
    ],
)
def test_transient_failures_are_retried(serve, open_client, fault, caplog):
    server = serve(lambda request, number: Answer("good") if number else fault)
    is_slow = fault.delay_seconds or fault.drip_seconds
    client = open_client(server, timeout_seconds=2.0 if is_slow else 120.0)
    assert complete(client).text == "good"
    assert len(server.requests) == client.budget.spent[client.name].requests == 2
    assert "retrying in" in caplog.text


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
        return Answer("x", status=200 if number else 429, headers={"retry-after-ms": "1200"})

    client = open_client(serve(script))
    first = threading.Thread(target=complete, args=(client,))
    first.start()
    while client._resume_at < 0:
        time.sleep(0.01)
    complete(client, "other")
    first.join()
    assert min(times[1:]) >= times[0] + 1.2


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


class HeldReplies:
    """A script that delays every reply until `release` is called, and repeats the text of its request."""

    def __init__(self):
        self._released = threading.Event()
        self.release = self._released.set

    def __call__(self, request, number):
        self._released.wait(timeout=STEP_SECONDS)
        return Answer(text_of(request))


@pytest.fixture
def start_process():
    """Start processes that react to Ctrl-C, also if the tests run in the background, and kill them after 300 s."""
    timers = []

    def start(command: list[str]) -> subprocess.Popen:
        # A process in the background inherits that SIGINT is ignored.
        restore = "signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
        launcher = [sys.executable, "-c", f"import os, signal, sys; {restore}"]
        process = subprocess.Popen([*launcher, *command], stderr=subprocess.PIPE, text=True)
        timers.append(threading.Timer(300, process.kill))
        timers[-1].start()
        return process

    yield start
    for timer in timers:
        timer.cancel()


def wait_for(condition, process: subprocess.Popen) -> None:
    """Wait until the condition is true, as long as the process runs."""
    while not condition():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def wait_for_line(text: str, process: subprocess.Popen) -> None:
    """Read lines from the process until one has the text."""
    lines = []
    while not lines or text not in lines[-1]:
        lines.append(process.stderr.readline())
        assert lines[-1], f"it ended without {text!r}: {''.join(lines)}"


def test_ctrl_c_caches_replies_in_flight(serve, open_client, start_process, tmp_path):
    script = HeldReplies()
    server = serve(script)
    code = textwrap.dedent(f"""
        from pathlib import Path
        from salmonn.score.llm_client import LLMClient
        from salmonn.score.config import LLMConfig
        cache = Path({str(tmp_path / "replies.sqlite")!r})
        client = LLMClient(LLMConfig("m", {server.url!r}, concurrency=2, cache=cache))
        complete = lambda text: client.complete([{{"role": "user", "content": text}}], schema={SCHEMA!r}, seed=0)
        client.map_concurrent(complete, [str(number) for number in range(20)])
    """)
    process = start_process([sys.executable, "-c", code])
    wait_for(lambda: len(server.requests) == 2, process)
    process.send_signal(signal.SIGINT)
    wait_for_line("waiting for replies in flight", process)
    script.release()
    process.communicate()
    assert process.returncode != 0
    texts = [text_of(request) for request in server.requests]
    assert sorted(texts) == ["0", "1"]
    client = open_client(server)
    assert [complete(client, text).text for text in texts] == texts
    assert len(server.requests) == 2


def test_a_second_ctrl_c_does_not_wait(serve, start_process, tmp_path):
    script = HeldReplies()
    server = serve(script)
    write_records(tmp_path / "r.jsonl", [Reference("v", (Event("a dog runs"),))])
    write_records(tmp_path / "c.jsonl", [Caption("v", "A dog runs.")])
    command = [SALMONN, "score", tmp_path / "c.jsonl", "--references", tmp_path / "r.jsonl", "--judge", "openai"]
    command += ["--model", "m", "--base-url", server.url, "--cache", tmp_path / "replies.sqlite"]
    command += ["--timeout-seconds", "600"]
    process = start_process([*map(str, command)])
    wait_for(lambda: server.requests, process)
    process.send_signal(signal.SIGINT)
    wait_for_line("waiting for replies in flight", process)
    assert process.poll() is None  # it waits for a reply that is never sent
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    script.release()
    assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err


def test_requires_an_api_key(monkeypatch, tmp_path):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match="OPENAI_API_KEY"):
        LLMClient(LLMConfig("m", cache=tmp_path / "c"))
    # A key in place of a name is not repeated.
    for name, message in (("MY_KEY", "the environment variable MY_KEY is not set"), ("hf_abc", "that --api-key-env")):
        with pytest.raises(ValueError, match=message) as caught:
            LLMClient(LLMConfig("m", base_url="http://host/v1", api_key_env=name, cache=tmp_path / "c"))
        assert "hf_abc" not in str(caught.value)
    with pytest.raises(ValueError, match="api_key_env takes the name of an environment variable") as caught:
        LLMConfig("m", api_key_env="sk-123")
    assert "sk-123" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "environment", "key"),
    [
        ({}, {}, "openai"),
        ({"base_url": "https://api.openai.com/v1/"}, {}, "openai"),
        ({"base_url": "http://localhost:8000/v1"}, {}, "none"),
        ({"base_url": "http://api.openai.com/v1"}, {}, "none"),  # not encrypted
        ({"base_url": "https://api.openai.com.evil.org/v1"}, {}, "none"),
        ({"base_url": "https://host/v1"}, {}, "none"),
        ({"base_url": "https://host/v1", "api_key_env": "HOST_KEY"}, {}, "host"),
        ({"api_key_env": "HOST_KEY"}, {}, "host"),
        ({}, {"OPENAI_BASE_URL": "https://proxy/v1"}, "openai"),
        ({"base_url": "https://proxy/v2"}, {"OPENAI_BASE_URL": "https://proxy/v1"}, "openai"),
        ({"base_url": "https://api.openai.com/v1"}, {"OPENAI_BASE_URL": "https://proxy/v1"}, "none"),
    ],
)
def test_a_key_goes_to_its_own_server_only(monkeypatch, config, environment, key):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    for name, value in {"OPENAI_API_KEY": "openai", "HOST_KEY": "host", **environment}.items():
        monkeypatch.setenv(name, value)
    assert find_api_key(LLMConfig("m", **config)) == key


@pytest.mark.parametrize("is_default", [True, False])
def test_what_the_environment_has_for_openai_goes_nowhere_else(serve, open_client, monkeypatch, is_default):
    server = serve(lambda request, number: Answer("x"))
    variables = {"API_KEY": "key", "ORG_ID": "org", "PROJECT_ID": "project", "CUSTOM_HEADERS": "X-Secret: custom"}
    variables["BASE_URL"] = server.url if is_default else "http://elsewhere/v1"
    for name, value in variables.items():
        monkeypatch.setenv(f"OPENAI_{name}", value)
    client = open_client(server)
    complete(client)
    client.list_models()
    expected = ["org", "project", "custom", "Bearer key"] if is_default else [None, None, None, "Bearer none"]
    for sent in (server.headers[0], server.get_headers[0]):
        names = ("OpenAI-Organization", "OpenAI-Project", "X-Secret", "Authorization")
        assert [sent.get(name) for name in names] == expected


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
