"""`salmonn eval`: DREAM-1K by AutoDQ with a scripted language model, and the video-SALMONN 2 test set."""

import json

import pytest

from salmonn.files import write_records
from salmonn.records import Caption, Event, Reference
from salmonn.score.autodq import DreamScore, compute_dream_rates, parse_classes
from salmonn.score.llm_judge import InvalidReplyError
from tests.score.fake_llm_server import Answer


def judge(request, number):
    """List sentences as events, and call an event entailed if the description has it, contradicted if it has "not"."""
    data = json.loads(request["messages"][1]["content"])
    description = data["description"]
    if "events" not in data:
        return Answer(json.dumps({"events": [part.strip() for part in description.split(".") if part.strip()]}))

    def classify(event):
        if event.lower().rstrip(".") in description:
            return "entailment"
        return "contradiction" if "not" in description else "neutral"

    events = [{"event": event, "relationship": classify(event)} for event in data["events"]]
    return Answer(json.dumps({"events": events}))


def annotation(video, response, events, category):
    return {
        "video_file": video, "dataset": category, "text": {"prompt": "<video>\nDescribe.", "response": response},
        "extra_info": {"events": events},
    }  # fmt: skip


@pytest.fixture
def dream(tmp_path):
    lines = [
        annotation("a.mp4", "A dog runs. A cat sleeps.", ["A dog runs.", "A cat sleeps."], "DREAM/youtube"),
        annotation("b.mp4", "A man sings. He bows.", [], "DREAM/youtube"),  # its events are listed by the judge
        annotation("c.mp4", "A car stops.", ["A car stops."], "DREAM/stock"),
        annotation("d.mp4", "It rains.", ["It rains."], "DREAM/stock"),
    ]
    path = tmp_path / "DREAM-1k.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    captions = [
        Caption("a.mp4", "A dog runs. A bird flies. A tree falls."),
        Caption(str(tmp_path / "b.mp4"), "A man sings."),
        Caption("c.mp4", "A car does not stop."),
    ]
    write_records(tmp_path / "captions.jsonl", captions)
    return path


def test_dream1k(call, serve, dream, tmp_path):
    """Recall 1/2, 1/2 and 0, precision 1/3, 1 and 0, averaged over videos and then over categories."""
    server = serve(judge)
    code, out, err = call(
        "eval", "dream1k", dream, "--captions", tmp_path / "captions.jsonl", "--out", tmp_path / "result.json",
        "--base-url", server.url, "--model", "m", "--cache", tmp_path / "cache.sqlite",
    )  # fmt: skip
    assert code == 1 and "unscored: d.mp4: it has no caption" in err
    result = json.loads((tmp_path / "result.json").read_text())
    youtube, stock = result["rates"]["DREAM/youtube"], result["rates"]["DREAM/stock"]
    assert youtube["recall"] == pytest.approx(1 / 2) and youtube["precision"] == pytest.approx(2 / 3)
    assert stock == {"recall": 0.0, "precision": 0.0, "num_videos": 1, "f1": 0.0}
    overall = result["rates"]["overall"]
    assert (overall["recall"], overall["precision"]) == pytest.approx((1 / 4, 1 / 3))
    assert overall["f1"] == pytest.approx(2 / 7) and overall["num_videos"] == 3
    assert "28.6" in out and "DREAM-1K" in out
    events = {one["video"]: one["reference_events"] for one in result["scores"]}
    assert events["c.mp4"] == [["A car stops.", "contradiction"]] and events["b.mp4"][1] == ["he bows", "neutral"]


def test_videos_without_captions_are_listed(call, dream):
    code, out, _ = call("eval", "dream1k", dream)
    assert code == 0 and "--prompt 'Describe the video in detail.' --modality visual" in out
    listed = dream.with_suffix(".videos.txt").read_text().splitlines()
    assert listed[0] == str(dream.parent / "a.mp4") and len(listed) == 4


def test_test_set(call, serve, tmp_path):
    references = tmp_path / "test.jsonl"
    write_records(references, [Reference("a.mp4", (Event("a red circle appears", "visual"),), "A red circle appears.")])
    write_records(tmp_path / "captions.jsonl", [Caption("a.mp4", "A red circle appears.")])
    server = serve(lambda request, number: Answer(PUBLISHED_REPLY))
    code, out, _ = call(
        "eval", "testset", references, "--captions", tmp_path / "captions.jsonl", "--base-url", server.url,
        "--model", "m", "--cache", tmp_path / "cache.sqlite", "--out", tmp_path / "summary.json",
    )  # fmt: skip
    assert code == 0 and "by the published protocol" in out
    assert json.loads((tmp_path / "summary.json").read_text())["as_published"]["total"] == 0.0


PUBLISHED_REPLY = (
    '{"Missed": 0, "Incorrect": 0, "Hallucination": 0, '
    '"Missed Event": [], "Incorrect Event": [], "Hallucination Event": []}'
)


def test_wrong_usage(call, dream, tmp_path):
    captions = tmp_path / "captions.jsonl"
    unfilled = tmp_path / "unfilled.jsonl"
    unfilled.write_text(json.dumps(annotation("<placeholder>", "x", [], "c")) + "\n")
    (tmp_path / "none.jsonl").write_text('{"a": 1}\n')
    write_records(tmp_path / "others.jsonl", [Caption("z.mp4", "x")])
    write_records(tmp_path / "twice.jsonl", [Caption("a.mp4", "x"), Caption("a.mp4", "y", sample=1)])
    server = ("--base-url", "http://localhost:1/v1", "--model", "m")
    for args, message in {
        ("dream1k", unfilled, "--captions", captions, *server): "fill in the files",
        ("dream1k", tmp_path / "none.jsonl", "--captions", captions, *server): "is not an annotation of DREAM-1K",
        ("dream1k", dream, "--captions", tmp_path / "others.jsonl", *server): "has no caption of a video of",
        ("dream1k", dream, "--captions", captions, "--judge", "rule"): "is judged by a language model",
        ("omni", dream): "omni",
        ("dream1k", dream, "--out", tmp_path / "out.json"): "--out needs --captions",
        ("dream1k", dream, "--captions", tmp_path / "twice.jsonl", *server): "2 captions of 1 video",
    }.items():
        code, _, err = call("eval", *args)
        assert code == 2 and message in err


def test_replies_are_checked():
    with pytest.raises(InvalidReplyError, match="classifies 1 events, and the list has 2"):
        parse_classes('{"events": [{"relationship": "neutral"}]}', ["a", "b"])
    with pytest.raises(InvalidReplyError, match="'maybe' is none of"):
        parse_classes('{"events": [{"relationship": "maybe"}]}', ["a"])
    assert parse_classes('{"events": [{"relationship": "Entailment "}]}', ["a"]) == [("a", "entailment")]


def test_a_caption_without_events_is_precise():
    rates = compute_dream_rates([DreamScore("a", "c", 0.0, 1.0, [("e", "neutral")], [])])
    assert rates["overall"].precision == 1.0 and rates["overall"].f1 == 0.0
