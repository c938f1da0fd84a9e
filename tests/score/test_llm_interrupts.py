"""Ctrl-C while a server is asked: replies in flight are kept, and a second Ctrl-C does not wait for them."""

import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from salmonn.files import write_records
from salmonn.records import Caption, Event, Reference
from tests.launch import forked
from tests.limits import STEP_SECONDS
from tests.score.completions import SCHEMA, complete, text_of
from tests.score.fake_llm_server import Answer

SALMONN = Path(sys.executable).with_name("salmonn")


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
    process = start_process(forked(sys.executable, "-c", code))
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
    process = start_process(forked(*command))
    wait_for(lambda: server.requests, process)
    process.send_signal(signal.SIGINT)
    wait_for_line("waiting for replies in flight", process)
    assert process.poll() is None  # it waits for a reply that is never sent
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    script.release()
    assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err
