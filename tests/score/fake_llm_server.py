"""A fake OpenAI-compatible server that sends scripted responses over real HTTP."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
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
    is_truncated: bool = False  # the connection is closed in the middle of the body
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


def model_list(*names: str, owner: str = "test") -> Answer:
    """Answer to GET /v1/models."""
    models = [{"id": name, "object": "model", "created": 0, "owned_by": owner} for name in names]
    return Answer(body=json.dumps({"object": "list", "data": models}).encode())


Script = Callable[[dict[str, Any], int], Answer]  # (request, number of requests before it) -> response


class FakeLLMServer:
    """A server on a free port; `requests` are the received bodies, `paths` their routes.

    `max_concurrent` is the largest number of concurrent requests.

    `headers` are those of the requests, `models` answers GET requests, whose headers are `get_headers`.
    """

    def __init__(self, script: Script, models: Answer | None = None) -> None:
        self.requests: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.headers: list[Message] = []
        self.get_headers: list[Message] = []
        self.models = models or model_list("m")
        self.max_concurrent = 0
        self._concurrent = 0
        self._lock = threading.Lock()
        scripted = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                scripted.get_headers.append(self.headers)
                self._send(scripted.models)

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with scripted._lock:
                    number = len(scripted.requests)
                    scripted.requests.append(request)
                    scripted.paths.append(self.path)
                    scripted.headers.append(self.headers)
                    scripted._concurrent += 1
                    scripted.max_concurrent = max(scripted.max_concurrent, scripted._concurrent)
                try:
                    self._send(_run_script(script, request, number))
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client closed the connection
                finally:
                    with scripted._lock:
                        scripted._concurrent -= 1

            def _send(self, answer: Answer) -> None:
                time.sleep(answer.delay_seconds)
                body = answer.to_bytes()
                self.send_response_only(answer.status)  # without a Date
                for name, value in {"Content-Type": "application/json", **answer.headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                for byte in body if answer.drip_seconds else b"":
                    self.wfile.write(bytes([byte]))
                    time.sleep(answer.drip_seconds)
                if not answer.drip_seconds:
                    self.wfile.write(body[: len(body) // 2] if answer.is_truncated else body)

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


def _run_script(script: Script, request: dict[str, Any], number: int) -> Answer:
    try:
        return script(request, number)
    # Status 400, so that the client does not retry: the test ends with the reason.
    except (LookupError, ValueError, TypeError, AssertionError) as error:
        return Answer(f"the script raised {error!r}", status=400)


def request_contents(request: dict[str, Any]) -> tuple[tuple[Event, ...], str]:
    """Return events and caption of a judge's request."""
    data = json.loads(request["messages"][1]["content"])
    events = tuple(Event(item["event"], item["kind"], *item.get("seconds", ())) for item in data["events"])
    return events, data["description"]


def rule_judge_reply(request: dict[str, Any]) -> dict[str, Any]:
    """Return the rule judge's judgement in the requested format."""
    events, text = request_contents(request)
    score = RuleJudge().judge_one(ScoringTask(Reference("v", events), Caption("v", text)))
    mentions = list(score.mentions)
    entries = []
    for number, event in enumerate(events, start=1):
        mention = next((mention for mention in mentions if mention.event == event), None)
        if mention is not None:
            mentions.remove(mention)
        entries.append({"number": number, "class": _class_of(mention), "quote": mention.quote if mention else ""})
    counts = {"correct": len(score.mentions) - score.incorrect, "incorrect": score.incorrect, "missed": score.missing}
    return {
        "events": entries,
        "hallucinated": list(score.hallucinations),
        "counts": counts | {"hallucinated": score.hallucinated},
    }


def _class_of(mention: Mention | None) -> str:
    if mention is None:
        return "missed"
    return "correct" if mention.is_correct else "incorrect"


def rule_judge_script(request: dict[str, Any], number: int) -> Answer:
    """Script that judges like the rule judge, and prefers the longer description and the first one of two answers."""
    data = json.loads(request["messages"][1]["content"])
    if "answer_1" in data:
        return Answer('{"better": "1"}')
    if "description_1" in data:
        lengths = len(data["description_1"]), len(data["description_2"])
        better = "tie" if lengths[0] == lengths[1] else "1" if lengths[0] > lengths[1] else "2"
        return Answer(json.dumps({"better": better}))
    return Answer(json.dumps(rule_judge_reply(request)))
