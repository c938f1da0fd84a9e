"""Scoring from the command line with real files, fake servers, and a killed process."""

import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from salmonn.files import read_json, read_records, write_records
from salmonn.records import Caption, Event, Reference
from salmonn.score.formats import read_scores
from salmonn.synthetic.judge import RULES_VERSION
from salmonn.synthetic.render import SynthConfig, sample_clip
from tests.launch import forked, kill
from tests.limits import STEP_SECONDS
from tests.score.fake_llm_server import Answer, rule_judge_script

SALMONN = Path(sys.executable).with_name("salmonn")


def shown(out: str) -> dict[str, list[str]]:
    """Return the rows of printed tables: title -> cells."""
    rows = ([cell.strip() for cell in line.strip("│┃ ").split("│")] for line in out.splitlines() if "│" in line)
    return {row[0]: row[1:] for row in rows}


def test_score_by_hand(call, clips, tmp_path):
    """Perfect captions of all clips but one, which counts as all missing."""
    captions = [Caption(reference.video, reference.caption) for reference in clips.references[:-1]]
    write_records(tmp_path / "captions.jsonl", captions)
    code, out, _ = call(
        "score", tmp_path / "captions.jsonl", "--references", clips.root / "clips.jsonl", "--out", tmp_path / "s.jsonl",
        "--summary", tmp_path / "s.json",
    )  # fmt: skip
    assert code == 0
    counts = [len(reference.events) for reference in clips.references]
    expected = counts[-1] / sum(counts)
    rows = shown(out)
    assert rows["Missing"][0] == rows["Total"][0] == f"{100 * expected:.2f}"
    assert rows["Hallucination"][0] == "0.00" and "5 captions of 5 videos" in out
    written = read_scores(tmp_path / "s.jsonl")
    assert [score.missing for score in written.scores] == [0, 0, 0, 0, counts[-1]]
    judge_info = written.judge_info
    assert (judge_info.judge, judge_info.protocol, judge_info.seeds, judge_info.reported_pass) == (
        "rule",
        "salmonn",
        (2024,),
        0,
    )
    assert judge_info.version and judge_info.date.endswith("+00:00")
    assert judge_info.prompt_hash == f"rules {RULES_VERSION}"
    summary = read_json(tmp_path / "s.json")
    assert summary["rates"]["total"] == pytest.approx(expected) == judge_info.totals[0]
    interval = summary["intervals"]["total"]
    assert rows["Total"][1] == f"{100 * interval['low']:.1f} to {100 * interval['high']:.1f}"


def test_score_matches_paths_from_another_folder(call, clips, tmp_path, monkeypatch):
    """`salmonn caption` writes paths as given on the command line."""
    monkeypatch.chdir(clips.root)
    reference = clips.references[0]
    write_records(tmp_path / "refs.jsonl", [Reference(str(clips.root / reference.video), events=reference.events)])
    write_records(tmp_path / "captions.jsonl", [Caption(reference.video, reference.caption)])
    code, out, _ = call("score", tmp_path / "captions.jsonl", "--references", tmp_path / "refs.jsonl")
    assert code == 0 and shown(out)["Total"][0] == "0.00"


def test_a_caption_of_a_span_is_scored_against_its_events(call, clips, tmp_path):
    reference = clips.references[0]
    half = reference.duration_seconds / 2
    early = [event for event in reference.events if event.lies_within(None, half)]
    assert 0 < len(early) < len(reference.events)
    text = ". ".join(event.text for event in early)
    write_records(tmp_path / "refs.jsonl", [reference])
    for end, missing in ((half, 0), (None, len(reference.events) - len(early))):
        write_records(tmp_path / "c.jsonl", [Caption(reference.video, text, end_seconds=end)])
        args = ("--references", tmp_path / "refs.jsonl", "--out", tmp_path / "s.jsonl")
        assert call("score", tmp_path / "c.jsonl", *args)[0] == 0
        assert read_scores(tmp_path / "s.jsonl").scores[0].missing == missing


def test_sounds_do_not_count_for_captions_of_frames_alone(call, clips, tmp_path):
    references = clips.references
    captions = [Caption(one.video, one.visual_caption, modality="visual") for one in references]
    write_records(tmp_path / "c.jsonl", captions)
    files = ("--out", tmp_path / "s.jsonl", "--summary", tmp_path / "s.json", "--report", tmp_path / "r.html")
    code, out, err = call("score", tmp_path / "c.jsonl", "--references", clips.root / "clips.jsonl", *files)
    assert code == 0, err
    num_sounds = sum(event.is_audible for reference in references for event in reference.events)
    note = f"not counted: {num_sounds} events that {len(captions)} captions of frames alone or audio alone cannot be"
    assert shown(out)["Missing"][0] == "0.00" and note in out and note in (tmp_path / "r.html").read_text()
    assert json.loads((tmp_path / "s.json").read_text())["num_excluded"] == num_sounds
    write_records(tmp_path / "c.jsonl", [replace(one, modality="both") for one in captions])
    code, out, _ = call("score", tmp_path / "c.jsonl", "--references", clips.root / "clips.jsonl", *files[2:4])
    num_events = sum(len(one.events) for one in references)
    assert code == 0 and shown(out)["Missing"][0] == f"{100 * num_sounds / num_events:.2f}" and "not counted" not in out
    assert "num_excluded" not in json.loads((tmp_path / "s.json").read_text())


@pytest.mark.parametrize(
    ("captions", "more", "message"),
    [
        (Caption("stranger.mp4", "a star"), [], "stranger.mp4"),
        (Caption("videos/clip_00000.mp4", "a star"), ["--judge", "oracle"], "oracle"),
        (Caption("videos/clip_00000.mp4", "a star"), ["--judge", "openai"], "--model"),
        (Caption("videos/clip_00000.mp4", "a star"), ["--base-url", "http://localhost:1/v1"], "--judge openai"),
        (Caption("videos/clip_00000.mp4", "a star"), ["--passes", "7"], "omit --passes"),
        (Caption("videos/clip_00000.mp4", "a star"), ["--passes", "0"], "at least 1"),
        (Caption("videos/clip_00000.mp4", "a star"), ["--protocol", "unpublished"], "protocol"),
        (Caption("videos/clip_00000.mp4", "a star"), ["--max-requests", "5"], "uses no language model"),
        (Caption("videos/clip_00000.mp4", "a star"), ["--temperature", "-1"], "temperature must be 0"),
        (Caption("videos/clip_00000.mp4", "a star"), ["--num-worst", "-1"], "--num-worst must be"),
        (Caption("videos/clip_00000.mp4", "a star"), ["--out", "{folder}"], "--out must be the name of a file"),
        (Caption("videos/clip_00000.mp4", "a star"), ["--report", "{captions}"], "overwrite the captions file"),
        (Caption("videos/clip_00000.mp4", "a star"), ["--out", "x", "--summary", "x"], "overwrite the --out file"),
        (None, [], "holds no captions"),
        (Reference("videos/clip_00000.mp4"), [], "captions.jsonl, line 1"),
    ],
)
def test_wrong_usage_of_score(call, clips, tmp_path, captions, more, message):
    path = tmp_path / "captions.jsonl"
    write_records(path, [captions] if captions else [])
    before = path.read_bytes()
    more = [flag.format(folder=tmp_path, captions=path) for flag in more]
    code, _, err = call("score", path, "--references", clips.root / "clips.jsonl", *more)
    assert path.read_bytes() == before and code == 2 and message in err and "Traceback" not in err


@pytest.fixture
def hasty(tmp_path) -> Path:
    """40 synthetic clips, not rendered, with hasty captions: references.jsonl and captions.jsonl."""
    references = [sample_clip(SynthConfig(clips=40), index=index)[1] for index in range(40)]
    write_records(tmp_path / "references.jsonl", references)
    captions = [Caption(reference.video, reference.human_caption) for reference in references]
    write_records(tmp_path / "captions.jsonl", captions)
    return tmp_path


def openai_args(folder: Path, server, *, cache: str = "replies.sqlite", out: str = "scores.jsonl") -> list[str]:
    paths = [folder / "captions.jsonl", "--references", folder / "references.jsonl"]
    paths += ["--out", folder / out, "--cache", folder / cache]
    return ["score", *map(str, paths), "--judge", "openai", "--model", "m", "--base-url", server.url]


def test_a_killed_command_resumes_without_repeated_requests(call, hasty, serve):
    """40 captions, kill -9 with half of the requests answered, and the same command again."""
    killed = threading.Event()

    def script(request, number):
        if number >= 20:  # 8 requests are in flight when it is killed
            killed.wait(timeout=STEP_SECONDS)
        return rule_judge_script(request, number)

    server = serve(script)
    command = forked(SALMONN, *openai_args(hasty, server))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    while len(server.requests) < 28:
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.005)
    kill(process)
    killed.set()
    num_before = len(server.requests)
    assert num_before == 28 and not (hasty / "scores.jsonl").exists()
    with sqlite3.connect(hasty / "replies.sqlite") as cache:
        cached = {
            json.loads(row[0])["messages"][1]["content"] for row in cache.execute("SELECT request FROM responses")
        }
    assert len(cached) == 20
    resumed = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert resumed.returncode == 0, resumed.stderr
    sent = [request["messages"][1]["content"] for request in server.requests]
    assert len(set(sent)) == 40
    # Only the 8 requests in flight at the kill are sent again.
    sent_again = [content for content in sent[num_before:] if content in sent[:num_before]]
    assert len(sent_again) == 8 and not cached & set(sent_again) and len(sent) == 48
    assert call(*openai_args(hasty, server))[0] == 0 and len(server.requests) == len(sent)
    assert call(*openai_args(hasty, server, cache="other.sqlite", out="uninterrupted.jsonl"))[0] == 0
    interrupted, uninterrupted = read_scores(hasty / "scores.jsonl"), read_scores(hasty / "uninterrupted.jsonl")
    assert interrupted.scores == uninterrupted.scores and len(uninterrupted.scores) == 40
    assert interrupted.judge_info.totals == uninterrupted.judge_info.totals


def few(folder: Path, count: int) -> None:
    for name, kind in (("references.jsonl", Reference), ("captions.jsonl", Caption)):
        write_records(folder / name, read_records(folder / name, kind)[:count])


def test_a_spend_cap_stops_and_the_same_command_resumes(call, hasty, serve):
    few(hasty, 10)
    server = serve(rule_judge_script)
    args = openai_args(hasty, server)
    code, _, err = call(*args, "--max-requests", 6)
    assert code == 2 and "the cap of 6 requests is reached" in err and len(server.requests) == 6
    assert not (hasty / "scores.jsonl").exists()  # no table over part of the clips
    code, out, _ = call(*args, "--max-requests", 6)
    assert code == 0 and len(server.requests) == 10 and "10 captions of 10 videos" in out


def test_unscored_captions_are_listed_and_counted(call, hasty, serve):
    few(hasty, 6)
    captions = read_records(hasty / "captions.jsonl", Caption)

    def script(request, number):
        is_first = json.loads(request["messages"][1]["content"])["description"] == captions[0].text
        return Answer("I cannot judge this.") if is_first else rule_judge_script(request, number)

    code, out, err = call(*openai_args(hasty, serve(script)), "--report", hasty / "r.html")
    assert code == 1
    assert f"unscored: {captions[0].video} (sample 0): no usable reply in 3 attempts" in err
    assert "unscored: 1 caption; excluded from all metrics" in err and "5 captions of 5 videos" in out
    written = read_scores(hasty / "scores.jsonl")
    assert [one.video for one in written.unscored] == [captions[0].video] and len(written.scores) == 5
    page = (hasty / "r.html").read_text()
    assert "no usable reply in 3 attempts" in page and captions[0].video in page


def test_flags_omit_optional_parameters(call, hasty, serve):
    few(hasty, 2)
    server = serve(rule_judge_script)
    omit = ("--seed", "null", "--temperature", "null", "--max-reply-tokens", "null", "--structured", "never")
    code, _, _ = call(*openai_args(hasty, server), *omit)
    assert code == 0 and [set(request) for request in server.requests] == [{"model", "messages"}] * 2


def test_passes_show_their_spread(call, hasty, serve):
    """A judge that counts 1, 3 or 2 missed events of a caption as mentioned: the middle pass is reported."""
    few(hasty, 10)

    def script(request, number):
        reply = json.loads(rule_judge_script(request, number).text)
        drop = {2024: 1, 2124: 3, 2224: 2}[request["seed"]]
        caption_words = json.loads(request["messages"][1]["content"])["description"].split()
        for index, entry in enumerate([entry for entry in reply["events"] if entry["class"] == "missed"][:drop]):
            entry |= {"class": "correct", "quote": " ".join(caption_words[index : index + 3])}
            reply["counts"]["missed"] -= 1
            reply["counts"]["correct"] += 1
        return Answer(json.dumps(reply))

    server = serve(script)
    code, out, _ = call(*openai_args(hasty, server), "--passes", 3)
    assert code == 0 and len(server.requests) == 30
    judge_info = read_scores(hasty / "scores.jsonl").judge_info
    assert judge_info.seeds == (2024, 2124, 2224) and judge_info.reported_pass == 2
    assert judge_info.totals[1] < judge_info.totals[2] < judge_info.totals[0]
    listed = ", ".join(f"{100 * total:.2f}" for total in judge_info.totals)
    assert f"Total of each pass: {listed} %; standard deviation" in out and "showing pass 3, the median" in out
    assert shown(out)["Total"][0] == f"{100 * judge_info.totals[2]:.2f}"


PUBLISHED = [
    {"video": "0.mp4", "events": ["a dog runs", "a man sings", "rain falls", "a car stops"]},
    {"video": "1.mp4", "events": ["a cat sleeps", "a bell rings"]},
    {"video": "2.mp4", "events": ["a door opens"] * 4},
    {"video": "3.mp4", "events": ["a boy jumps"] * 2},
]
PREDICTIONS = [
    {"id": ["0.mp4"], "pred": "A dog runs. It rains.<|im_end|>"},
    {"id": ["1.mp4"], "pred": ["so so so so so on"]},
    {"id": ["3.mp4"], "pred": "unreadable<|im_end|>"},
    {"id": ["9.mp4"], "pred": "not in the set<|im_end|>"},
]


def test_published_protocol(call, tmp_path, serve):
    """0: 2 missed, 1 wrong of 4; 1: 1 missed, 3 hallucinated of 2; 2 has no prediction, 3 no readable reply.

    As published: (3 + 1 + 3) / 6 = 1.167, of which missing 3/6, incorrect 1/6, hallucination 3/6. With all videos:
    2's 4 and 3's 2 events are missed as well, (9 + 1 + 3) / 12 = 1.083.
    """
    replies = {"A dog runs. It rains.": (2, 1, 0), "so on": (1, 0, 3)}

    def script(request, number):
        caption = json.loads(request["messages"][1]["content"].rsplit("Description:\n", 1)[1])
        if caption not in replies:
            return Answer("?")
        missed, wrong, invented = replies[caption]
        lists = '"Missed Event": [], "Incorrect Event": [], "Hallucination Event": []}'
        return Answer(f'{{"Missed": {missed}, "Incorrect": {wrong}, "Hallucination": {invented}, {lists}')

    (tmp_path / "test.json").write_text(json.dumps(PUBLISHED))
    (tmp_path / "pred.json").write_text(json.dumps(PREDICTIONS))
    code, out, err = call(
        "score", tmp_path / "pred.json", "--references", tmp_path / "test.json", "--protocol", "published",
        "--judge", "openai", "--model", "m", "--base-url", serve(script).url, "--cache", tmp_path / "c.sqlite",
        "--out", tmp_path / "s.jsonl", "--summary", tmp_path / "s.json",
    )  # fmt: skip
    assert code == 1
    rows = shown(out)
    assert rows["EER"] == ["1.167", "1.083"] and rows["MISS"] == ["0.500", "0.750"]
    assert rows["INCORRECT"] == ["0.167", "0.083"] and rows["HALLUCINATION"] == ["0.500", "0.250"]
    assert rows["videos"] == ["2", "4"]
    assert "unscored: 2.mp4 (sample 0): it has no prediction" in err
    assert "unscored: 3.mp4 (sample 0): no usable reply in 12 attempts" in err
    summary = read_json(tmp_path / "s.json")
    assert summary["as_published"]["total"] == 7 / 6 and summary["as_published_with_all_videos"]["total"] == 13 / 12
    assert read_scores(tmp_path / "s.jsonl").judge_info.protocol == "published"


def test_compare(call, clips, tmp_path):
    """The second set mentions everything, the first misses one clip completely: 1 win and 4 ties."""
    references = ("--references", clips.root / "clips.jsonl")
    perfect = [Caption(reference.video, reference.caption) for reference in clips.references]
    for name, captions in (("first", [*perfect[:4], Caption(perfect[4].video, "")]), ("second", perfect)):
        write_records(tmp_path / "c.jsonl", captions)
        assert call("score", tmp_path / "c.jsonl", *references, "--out", tmp_path / f"{name}.jsonl")[0] == 0
    code, out, _ = call("compare", tmp_path / "first.jsonl", tmp_path / "second.jsonl")
    counts = [len(reference.events) for reference in clips.references]
    share = 100 * counts[-1] / sum(counts)
    first, second, difference, _, *tally = shown(out)["Total"]
    assert code == 0
    assert (first, second, difference) == (f"{share:.2f}", "0.00", f"{-share:+.2f}") and tally == ["1", "4", "0"]

    other = (tmp_path / "second.jsonl").read_text().replace('"judge": "rule"', '"judge": "m at OpenAI"', 1)
    (tmp_path / "other.jsonl").write_text(other)
    code, _, err = call("compare", tmp_path / "first.jsonl", tmp_path / "other.jsonl")
    assert code == 2 and "rule" in err and "m at OpenAI" in err and "--force" in err
    assert call("compare", tmp_path / "first.jsonl", tmp_path / "other.jsonl", "--force")[0] == 0
    code, _, err = call("compare", tmp_path / "c.jsonl", tmp_path / "second.jsonl")
    assert code == 2 and "c.jsonl, line 1" in err and "judge_info" in err


def test_events_are_split_once_and_may_be_edited(call, tmp_path, serve):
    caption = "A dog runs. A dog barks."
    write_records(tmp_path / "r.jsonl", [Reference(f"{name}.mp4", caption=caption + name) for name in "ab"])

    def script(request, number):
        words = json.loads(request["messages"][1]["content"])["description"]
        entry = {"text": words[-1], "kind": "visual", "start_seconds": None, "end_seconds": None, "quote": "A dog runs"}
        return Answer(json.dumps({"events": [entry]}))

    server = serve(script)
    args = ["events", tmp_path / "r.jsonl", "--out", tmp_path / "e.jsonl", "--judge", "openai", "--model", "m"]
    args += ["--base-url", server.url, "--cache", tmp_path / "c.sqlite"]
    code, _, err = call(*args)
    assert code == 0 and "2 events of 2 videos" in err
    first, second = read_records(tmp_path / "e.jsonl", Reference)
    assert (first.events, second.events) == ((Event("a"),), (Event("b"),))
    write_records(tmp_path / "e.jsonl", [Reference("a.mp4", (Event("by hand"),), caption + "a"), second])
    write_records(tmp_path / "r.jsonl", [Reference(f"{name}.mp4", caption=caption + name) for name in "abc"])
    assert call(*args)[0] == 0
    kept = read_records(tmp_path / "e.jsonl", Reference)
    assert [record.events[0].text for record in kept] == ["by hand", "b", "c"]
    assert len(server.requests) == 3
    # Everything except the events comes from the references; a changed caption is split again.
    changed = [
        Reference("a.mp4", caption=caption + "a", duration_seconds=9.0),
        Reference("b.mp4", caption=caption + "x"),
    ]
    write_records(tmp_path / "r.jsonl", changed)
    assert call(*args)[0] == 0
    first, second = read_records(tmp_path / "e.jsonl", Reference)
    assert (first.events[0].text, first.duration_seconds, second.events[0].text) == ("by hand", 9.0, "x")
    code, _, err = call(*[tmp_path / "e.json" if arg == tmp_path / "e.jsonl" else arg for arg in args])
    assert code == 2 and ".jsonl" in err


def test_events_that_cannot_be_split(call, tmp_path, serve):
    write_records(tmp_path / "r.jsonl", [Reference("a.mp4", caption="A dog runs.")])
    server = serve(lambda request, number: Answer("no"))
    args = ["events", tmp_path / "r.jsonl", "--out", tmp_path / "e.jsonl"]
    code, _, err = call(*args, "--judge", "openai", "--model", "m", "--base-url", server.url, "--cache", tmp_path / "c")
    assert code == 1 and "failed: a.mp4: no usable reply" in err and "1 video failed" in err
    assert read_records(tmp_path / "e.jsonl", Reference)[0].caption == "A dog runs."  # to be filled in by hand
    code, _, err = call(*args)
    assert code == 2 and "A dog runs" in err and "--judge openai" in err


def test_qa(call, tmp_path):
    item = {"question": "Which?", "options": ["A. red", "B. blue"], "answer": "B"}
    items = [item | {"response": response} for response in ("B", "The best answer is: A", "maybe", "b. blue")]
    (tmp_path / "qa.json").write_text(json.dumps(items))
    code, out, _ = call("qa", tmp_path / "qa.json", "--summary", tmp_path / "s.json")
    assert code == 0 and shown(out)["all"][0] == "50.00" and "unparsable: 1" in out
    assert read_json(tmp_path / "s.json")["accuracy"] == 0.5
