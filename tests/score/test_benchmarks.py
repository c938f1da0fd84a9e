"""Benchmarks of `salmonn eval` with files in their formats and a scripted language model: reading, checks and rates."""

import json

import pytest

from salmonn.files import write_records
from salmonn.records import Caption
from salmonn.score.benchmarks import BENCHMARKS
from salmonn.score.cloze import parse_choices
from salmonn.score.description_ratings import parse_ratings
from salmonn.score.event_recall import parse_hits
from salmonn.score.llm_judge import InvalidReplyError
from tests.score.fake_llm_server import Answer


def blank(number, key, modality):
    options = dict(zip("ABCD", ("red", "blue", "green", "black"), strict=True)) | {"E": "not given"}
    secret = {"answer": options[key], "distractors": ["x"], "answer_index": "ABCD".index(key), "answer_key": key}
    return {"id": number, "options": options, "required_modality": modality} | secret


def cloze(video, subcategory, keys):
    blanks = [blank(number, key, modality) for number, (key, modality) in enumerate(keys, start=1)]
    passage = {"passage": "A (1) ball rolls, and a (2) bell rings.", "blanks": blanks}
    return {
        "uuid": 1,
        "video_path": f"./videos/{video}.mp4",
        "metadata": {"subcategory": subcategory},
        "cloze": passage,
    }


def checklist(video, visual, audio, synergy):
    return {
        "video_id": video,
        "event": {"visual_events": visual, "audio_events": audio, "synergistic_events": synergy},
    }


@pytest.fixture
def evaluate(call, serve, tmp_path):
    """Run `salmonn eval` on captions (video -> text) with a scripted judge; returns exit code, result and output."""

    def run(benchmark, data, captions, judge, *flags):
        write_records(tmp_path / "captions.jsonl", [Caption(str(video), text) for video, text in captions.items()])
        code, out, err = call(
            "eval", benchmark, data, "--captions", tmp_path / "captions.jsonl", "--out", tmp_path / "out.json",
            "--base-url", serve(judge).url, "--model", "m", "--cache", tmp_path / "cache.sqlite", "--attempts", "2",
            *flags,
        )  # fmt: skip
        result = json.loads((tmp_path / "out.json").read_text()) if (tmp_path / "out.json").exists() else None
        return code, result, out + err

    return run


def test_omni_cloze(evaluate, tmp_path):
    """Of the blanks of two videos, 2 are correct, 1 is not given and 1 wrong: accuracy 1/2, score 1/4."""
    data = tmp_path / "omni_cloze.jsonl"
    lines = [
        cloze("0000001", "sports", [("B", "visual"), ("C", "audio")]),
        cloze("0000002", "news", [("A", "visual"), ("D", "audio-visual")]),
        cloze("0000003", "news", [("A", "visual")]),
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    seen = []

    def judge(request, number):
        value = json.loads(request["messages"][1]["content"])
        seen.append(value)
        return Answer(json.dumps(json.loads(value["caption"])))  # the captions of this test are replies

    captions = {
        tmp_path / "videos/0000001.mp4": '{"1": "B: blue", "2": "E: not given"}',
        "videos/0000002.mp4": '{"1": "A: red", "2": "C: green"}',
        "videos/0000003.mp4": '{"1": "F: pink"}',  # no option, also when it is requested again
    }
    code, result, text = evaluate("omnicloze", data, captions, judge)
    assert code == 1 and "unscored: videos/0000003.mp4: no usable reply in 2 attempts" in text
    overall = result["rates"]["overall"]
    assert overall == {"accuracy": 0.5, "not_given": 0.25, "wrong": 0.25, "score": 0.25, "num_blanks": 4}
    assert result["rates"]["modality: visual"]["accuracy"] == 1.0 and "accuracy %" in text
    assert result["rates"]["modality: audio-visual"]["score"] == -1.0
    assert result["rates"]["subcategory: news"]["num_blanks"] == 2
    # The judge sees passage and options, and nothing that tells the answer.
    shown = seen[0]["cloze"]
    assert shown["passage"].startswith("A (1)") and shown["blanks"][0].keys() == {"id", "options"}


def test_avscapbench(evaluate, tmp_path):
    """Visual 1/2 and 1/1; the second video has no other events, and counts as 0 there as published."""
    (tmp_path / "metadata").mkdir()
    data = tmp_path / "metadata" / "OmniCaption.json"
    audio = {"speech": ["He says stop."], "music": [], "sfx": ["A crash.", "A bark."]}
    items = [
        checklist("1.mp4", ["A car hits a wall.", "A man runs."], audio, ["The crash comes as the car hits."]),
        checklist(2, ["A cat sleeps."], [], []),
    ]
    data.write_text(json.dumps(items))

    def judge(request, number):
        value = json.loads(request["messages"][1]["content"])
        if value["caption"] == "cat":
            return Answer('{"visual_hits": [1], "audio_hits": [], "synergy_hits": []}')
        assert value["audio_events"] == ["He says stop.", "A crash.", "A bark."]
        if len(request["messages"]) == 2:  # a list of the wrong length is requested again
            return Answer('{"visual_hits": [1, 0], "audio_hits": [1, 0], "synergy_hits": [1]}')
        assert "2 marks for 3 events" in request["messages"][-1]["content"]
        return Answer('{"visual_hits": [1, 0], "audio_hits": [1, 0, 0], "synergy_hits": [1]}')

    captions = {tmp_path / "videos" / "1.mp4": "crash", "2.mp4": "cat"}
    code, result, text = evaluate("avscapbench", data, captions, judge)
    assert code == 0 and "AVSCapBench" in text
    rates = {row: (rate["recall"], rate["recall_where_present"]) for row, rate in result["rates"].items()}
    assert rates == {
        "visual": (0.75, 0.75), "audio": (pytest.approx(1 / 6), pytest.approx(1 / 3)), "speech": (0.5, 1.0),
        "music": (0.0, None), "sfx": (0.0, 0.0), "synergy": (0.5, 1.0),
        "total": (pytest.approx((3 / 6 + 1) / 2),) * 2,
    }  # fmt: skip
    assert result["rates"]["total"]["num_events"] == 7


def test_ugc_videocap(evaluate, call, tmp_path):
    data = tmp_path / "final_caption_qa.json"
    samples = [{"video_id": name, "path": f"/bench/{name}.mp4", "answer": "A dog."} for name in ("a", "b")]
    data.write_text(json.dumps({"question": "Write a paragraph. ", "valid_count": 2, "samples": samples}))
    code, out, _ = call("eval", "ugc", data, "--videos", tmp_path / "clips")
    assert code == 0 and "--prompt 'Write a paragraph.' --model" in out and f"--videos {tmp_path / 'clips'}" in out
    assert data.with_suffix(".videos.txt").read_text().splitlines() == [
        str(tmp_path / "clips" / name) for name in ("a.mp4", "b.mp4")
    ]

    def judge(request, number):
        value = json.loads(request["messages"][1]["content"])
        assert value["reference"] == "A dog."
        return Answer(
            json.dumps(dict(zip(("visual", "audio", "details"), json.loads(value["description"]), strict=True)))
        )

    captions = {tmp_path / "clips" / "a.mp4": "[5, 1, 3]", tmp_path / "clips" / "b.mp4": "[4, 2, 3]"}
    code, result, _ = evaluate("ugc", data, captions, judge, "--videos", tmp_path / "clips")
    rates = {row: rate["rate"] for row, rate in result["rates"].items()}
    assert code == 0 and rates == pytest.approx({"visual": 0.9, "audio": 0.3, "details": 0.6, "overall": 0.6})


def test_files_of_other_formats_are_refused(call, tmp_path):
    wrong = tmp_path / "wrong.json"
    wrong.write_text('[{"video_id": "1", "video_path": "1.mp4", "cloze": {"passage": "x", "blanks": []}, "event": {}}]')
    object_file = tmp_path / "object.json"
    object_file.write_text('{"samples": []}')
    for name, path, message in (
        ("omnicloze", wrong, "item 1 is not an item of Omni-Cloze: ValueError('its cloze has no blanks"),
        ("avscapbench", wrong, "item 1 is not an item of AVSCapBench: ValueError('its event has no lists of events"),
        ("ugc", object_file, 'is not the file of UGC-VideoCap, which has "question"'),
        ("ugc", tmp_path / "none.json", "expected final_caption_qa.json"),
    ):
        code, _, err = call("eval", name, path, "--videos", tmp_path)
        assert code == 2 and message in err
    object_file.write_text('{"question": "?", "samples": [{"path": "a.mp4", "answer": "x"}]}')
    code, _, err = call("eval", "ugc", object_file)
    assert code == 2 and "name their folder as --videos" in err


def test_replies_are_checked():
    lists = '"audio_hits": [], "synergy_hits": []'
    for parse, reply, message in (
        (lambda reply: parse_choices(reply, ["1", "2"]), '{"1": "A: x"}', "no choice for blank 2"),
        (lambda reply: parse_choices(reply, ["1"]), '{"1": "A: x", "3": "B"}', "no blank '3'"),
        (lambda reply: parse_choices(reply, ["1"]), '{"1": "red"}', "does not begin with a letter A to E"),
        (lambda reply: parse_hits(reply, [1, 0, 0]), f'{{"visual_hits": [2], {lists}}}', "0 and 1"),
        (parse_ratings, '{"visual": 6, "audio": 1, "details": 1}', '"visual" is 6'),
        (parse_ratings, '{"visual": 5, "audio": 1}', '"details" is None'),
    ):  # fmt: skip
        with pytest.raises(InvalidReplyError, match=message):
            parse(reply)


def test_each_benchmark_is_complete():
    for name, benchmark in BENCHMARKS.items():
        assert (benchmark.score_one is None) == (name == "testset") == (benchmark.columns is None)
