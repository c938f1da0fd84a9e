"""A fake OpenAI-compatible server that sends scripted responses over real HTTP."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from salmonn.records import Caption, Event, Mention, Reference
from salmonn.score.judge import ScoringTask
from salmonn.synthetic.judge import RuleJudge


@dataclass(frozen=True)
class Answer:
    """A response: a completion with this text by default."""

    text: str = ""
    status: int = 200
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay_seconds: float = 0.0
    drip_seconds: float = 0.0  # between two bytes
    is_broken_off: bool = False  # the connection is closed in the middle of the body
    finish_reason: str = "stop"
    usage: Any = field(default_factory=lambda: {"total_tokens": 10})

    def to_bytes(self) -> bytes:
        """The HTTP body."""
        if self.body is not None:
            return self.body
        if self.status != 200:
            return json.dumps({"error": {"message": self.text, "code": self.text}}).encode()
        choice = {"index": 0, "message": {"role": "assistant", "content": self.text}}
        completion = {"id": "x", "object": "chat.completion", "created": 0, "model": "scripted", "usage": self.usage}
        return json.dumps(completion | {"choices": [choice | {"finish_reason": self.finish_reason}]}).encode()


Script = Callable[[dict[str, Any], int], Answer]  # (request, number of requests before it) -> response


class FakeLLMServer:
    """A server on a free port; `requests` are the received bodies, `most_at_once` the most concurrent requests."""

    def __init__(self, script: Script) -> None:
        self.requests: list[dict[str, Any]] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        scripted = self

        def play(request: dict[str, Any], number: int) -> Answer:
            try:
                return script(request, number)
            # Status 400, so that the client does not retry: the test ends with the reason.
            except (LookupError, ValueError, TypeError, AssertionError) as error:
                return Answer(f"the script raised {error!r}", status=400)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with scripted._lock:
                    number = len(scripted.requests)
                    scripted.requests.append(request)
                    scripted._at_once += 1
                    scripted.most_at_once = max(scripted.most_at_once, scripted._at_once)
                try:
                    self._send(play(request, number))
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client closed the connection
                finally:
                    with scripted._lock:
                        scripted._at_once -= 1

            def _send(self, answer: Answer) -> None:
                time.sleep(answer.delay_seconds)
                body = answer.to_bytes()
                self.send_response(answer.status)
                for name, value in {"Content-Type": "application/json", **answer.headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                for byte in body if answer.drip_seconds else b"":
                    self.wfile.write(bytes([byte]))
                    time.sleep(answer.drip_seconds)
                if not answer.drip_seconds:
                    self.wfile.write(body[: len(body) // 2] if answer.is_broken_off else body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        # Closing takes one poll interval, 0.5 s by default.
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()


def asked_about(request: dict[str, Any]) -> tuple[tuple[Event, ...], str]:
    """Return events and caption of a judge's request."""
    data = json.loads(request["messages"][1]["content"])
    events = tuple(Event(item["event"], item["kind"], *item.get("seconds", ())) for item in data["events"])
    return events, data["description"]


def honest_reply(request: dict[str, Any]) -> dict[str, Any]:
    """Return the rule judge's judgement in the requested format."""
    events, text = asked_about(request)
    score = RuleJudge().judge_one(ScoringTask(Reference("v", events), Caption("v", text)))
    told = list(score.mentions)
    entries = []
    for number, event in enumerate(events, start=1):
        here = next((one for one in told if one.event == event), None)
        if here is not None:
            told.remove(here)
        entries.append({"number": number, "class": _class_of(here), "quote": here.quote if here else ""})
    counts = {"correct": len(score.mentions) - score.incorrect, "incorrect": score.incorrect, "missed": score.missing}
    return {
        "events": entries,
        "hallucinated": list(score.hallucinations),
        "counts": counts | {"hallucinated": score.hallucinated},
    }


def _class_of(told: Mention | None) -> str:
    if told is None:
        return "missed"
    return "correct" if told.is_correct else "incorrect"


def honest(request: dict[str, Any], number: int) -> Answer:
    """Script that always judges like the rule judge."""
    return Answer(json.dumps(honest_reply(request)))
