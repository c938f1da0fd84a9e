"""`salmonn caption --format events`: a scripted server's answers become records, subtitles, failures and scores."""

import json
import re
import sys

import pytest

from salmonn.files import read_records, write_records
from salmonn.records import Caption, Failure, Reference
from salmonn.score.formats import read_scores
from salmonn.score.structured import schema_text
from tests.score.fake_llm_server import Answer, FakeLLMServer

pytestmark = pytest.mark.usefixtures("written_probe_clips")


def answer_of(end):
    """An answer with a circle up to a time, and a tone in the second before it."""
    events = [("a red circle appears", "visual", 0, end), ("a low tone is heard", "audio", end - 1, end)]
    names = ("text", "modality", "start_seconds", "end_seconds")
    event_list = [dict(zip(names, event, strict=True)) for event in events]
    return json.dumps(
        {"scene": "", "events": event_list, "speech": [], "on_screen_text": [], "camera": "", "sound": ""}
    )


def text_of(message):
    parts = message["content"]
    return parts if isinstance(parts, str) else " ".join(part.get("text", "") for part in parts)


@pytest.fixture
def server():
    """A server whose answers end with the clip, or too late where the prompt has the word BAD."""

    def script(request, number):
        prompt = text_of(request["messages"][0])
        if (found := re.search(r"which is ([\d.]+) s long", prompt)) is None:
            return Answer("A tone.")  # to the hearing probe
        seconds = float(found[1])
        is_repair = len(request["messages"]) > 1
        is_late = "ALWAYS BAD" in prompt or ("BAD" in prompt and not is_repair)
        return Answer(answer_of(seconds + 50 if is_late else seconds))

    server = FakeLLMServer(script)
    yield server
    server.close()


@pytest.fixture
def run(call, tmp_path, server, videos):
    def run(*flags):
        model = ("--server", server.url, "--server-model", "m", "--server-input", "frames", "--allow-deaf")
        args = (videos[0], "--out", tmp_path / "captions.jsonl", "--format", "events", "--workers", 0)
        return call("caption", *args, *model, *flags)

    return run


def test_events_are_recorded_exported_and_scored(run, server, tmp_path, videos, call):
    code, _, err = run("--export", "srt", "csv", "--subtitle-dir", tmp_path / "subs")
    assert code == 0, err
    (caption,) = read_records(tmp_path / "captions.jsonl", Caption)
    first, second = caption.structure.events
    assert caption.text == "A red circle appears. A low tone is heard." and (second.modality, second.end_seconds) == (
        "audio", first.end_seconds,
    )  # fmt: skip
    sent = server.requests[-1]["response_format"]["json_schema"]["schema"]
    assert sent == json.loads(schema_text())
    (subtitles,) = (tmp_path / "subs").rglob("*.srt")
    assert subtitles.read_text().count(" --> ") == 2 and "a low tone is heard" in subtitles.read_text()
    assert "a low tone is heard" in (tmp_path / "captions.csv").read_text()
    code, _, err = run("--format", "text")
    assert code == 2 and 'caption_format "events" (now null)' in err.replace("caption-format", "caption_format")
    write_records(tmp_path / "references.jsonl", [Reference(caption.video, events=caption.structure.events)])
    references = ("--references", tmp_path / "references.jsonl", "--out", tmp_path / "scores.jsonl")
    assert call("score", tmp_path / "captions.jsonl", *references)[0] == 0
    (score,) = read_scores(tmp_path / "scores.jsonl").scores
    assert (score.num_events, score.total) == (2, 0)


def test_times_of_segments_are_those_of_the_video(run, tmp_path):
    assert run("--segments", 2)[0] == 0
    for caption in read_records(tmp_path / "captions.jsonl", Caption):
        assert caption.structure.events[0].start_seconds == caption.start_seconds
        assert caption.structure.events[0].end_seconds == pytest.approx(caption.end_seconds, abs=0.06)


def test_a_clip_is_repaired_once_or_fails_with_the_reason(run, server, tmp_path):
    assert run("--prompt", "BAD")[0] == 0
    (caption,) = read_records(tmp_path / "captions.jsonl", Caption)
    assert caption.shaping["caption"].num_answers == 2
    assert "ends at" in text_of(server.requests[-1]["messages"][-1])
    code, _, _ = run("--prompt", "ALWAYS BAD", "--overwrite")
    (failure,) = read_records(tmp_path / "captions.failed.jsonl", Failure)
    assert code == 1 and "its events are not valid after 2 answers: event 1 ends at" in failure.reason
    assert failure.stage == "caption"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--words", "5-9"], "--format events has its own form"),
        (["--trigger", "ohwx"], "--format events has its own form"),
    ],
)
def test_flags_of_other_forms_are_refused(run, flags, message):
    code, _, err = run(*flags)
    assert code == 2 and message in err


def test_a_missing_package_is_named(call, videos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.setattr("salmonn.cli.caption_options.find_spec", lambda name: None)
    code, _, err = call("caption", videos[0], "--out", tmp_path / "captions.jsonl", "--format", "events")
    assert code == 2 and "--format events needs llguidance: pip install 'salmonn[json]'" in err
