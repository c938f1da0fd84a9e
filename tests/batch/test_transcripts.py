"""Transcripts: their files, subtitles beside videos, and references that quote them."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from salmonn.batch.export import LatestCaptions, export_table
from salmonn.batch.subtitles import format_text
from salmonn.batch.transcripts import Transcript, TranscriptFiles, add_speech, parse_subtitles, read_speech_beside
from salmonn.files import read_records, write_records
from salmonn.records import Caption, Event, Reference
from salmonn.speech import SpeechEvent, SpokenWord

HELLO = SpeechEvent("Hello <there>.", 0.5, 1.25, (SpokenWord("Hello", 0.5, 0.8), SpokenWord("<there>.", 0.8, 1.25)))
BYE = SpeechEvent("Goodbye.", 61.0, 62.5, speaker="Anna")


def transcript(video, *speech, **values) -> Transcript:
    text = " ".join(one.text for one in speech)
    return Transcript(str(video), text, speech=speech, **{"language": "en"} | values)


def test_transcripts_are_found_by_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_records("a.jsonl", [transcript("clips/a.mp4", HELLO), transcript("b.mp4"), transcript("clips/a.mp4", BYE)])
    with Path("a.jsonl").open("a") as file:
        file.write('{"video": "torn')
    write_records("c.jsonl", [Caption("c.mp4", "A dog barks.")])
    files = TranscriptFiles([tmp_path / "a.jsonl", tmp_path / "c.jsonl"])
    assert files.get(str(tmp_path / "clips" / "a.mp4")).speech == (BYE,)
    assert files.get("./b.mp4").speech == () and files.get("torn") is None
    write_records("d.jsonl", [transcript("d.mp4", language=1)])
    with pytest.raises(
        ValueError, match=r"d\.jsonl: the line of d\.mp4 is not a transcript: .*language must be a valid"
    ):
        TranscriptFiles([tmp_path / "d.jsonl"]).get("d.mp4")


def test_no_such_file(tmp_path):
    with pytest.raises(ValueError, match=r"none\.jsonl: there is no such file"):
        TranscriptFiles([tmp_path / "none.jsonl"])


def test_subtitles_of_a_transcript():
    spoken = transcript("v.mp4", HELLO, BYE)
    never = {"seconds_of": lambda video: pytest.fail("all times are known")}
    assert format_text([spoken], "srt", **never) == (
        "1\n00:00:00,500 --> 00:00:01,250\nHello <there>.\n\n2\n00:01:01,000 --> 00:01:02,500\nAnna: Goodbye.\n"
    )
    assert "00:00:00.500 --> 00:00:01.250\nHello &lt;there&gt;." in format_text([spoken], "vtt", **never)
    assert format_text([spoken], "txt", **never) == "[00:00:00.500] Hello <there>.\n[00:01:01.000] Anna: Goodbye.\n"
    assert json.loads(format_text([spoken], "json", **never)) == json.loads(json.dumps(asdict(spoken)))
    silent = transcript("v.mp4")
    assert [format_text([silent], name, **never) for name in ("srt", "vtt", "txt")] == ["\n", "WEBVTT\n", ""]
    plain = [Caption("v.mp4", "A dog.")]
    assert json.loads(format_text(plain, "json", **never)) == [json.loads(json.dumps(asdict(plain[0])))]


def test_tables_have_the_text_of_transcripts(tmp_path):
    write_records(tmp_path / "t.jsonl", [transcript("v.mp4", HELLO, BYE)])
    export_table(LatestCaptions([tmp_path / "t.jsonl"]), tmp_path / "t.csv")
    head, row = (tmp_path / "t.csv").read_text().splitlines()
    assert "speech" not in head and row.startswith("v.mp4,Hello <there>. Goodbye.,")
    export_table(LatestCaptions([tmp_path / "t.jsonl"]), tmp_path / "copy.jsonl")
    assert read_records(tmp_path / "copy.jsonl", Transcript) == [transcript("v.mp4", HELLO, BYE)]


def test_speech_beside_a_video(tmp_path):
    """A transcript, then WebVTT, then SubRip; data of other programs is no transcript."""
    video = tmp_path / "film.mp4"
    assert read_speech_beside(str(video)) is None
    subrip = "1\r\n00:00:01,5 --> 00:00:02,000\r\n<i>Caf\u00e9</i> {\\an8}open\r\n"
    (tmp_path / "film.srt").write_bytes(subrip.encode("cp1252"))
    assert read_speech_beside(str(video)) == (SpeechEvent("Café open", 1.5, 2.0),)
    (tmp_path / "film.json").write_text('{"fps": 25}')
    (tmp_path / "film.vtt").write_text(
        "\ufeffWEBVTT\n\nNOTE 00:01 is a note\n\nid\n01:00.000 --> 01:02.500 align:start\n"
        "<v.loud Anna &amp; Bo>Go &lt;now&gt;\nplease\n"
        "\n00:01.000 --> 00:02.000\n \n\n00:03.000 --> 00:02.000\nbackwards\n",
        encoding="utf-8",
    )
    assert read_speech_beside(str(video)) == (
        SpeechEvent("backwards", 3.0, 3.0),
        SpeechEvent("Go <now> please", 60.0, 62.5, speaker="Anna & Bo"),
    )
    spoken = transcript(video, HELLO)
    (tmp_path / "film.json").write_text(format_text([spoken], "json", seconds_of=lambda video: 0.0))
    assert read_speech_beside(str(video)) == (HELLO,)
    (tmp_path / "film.mp4.json").write_text(json.dumps(asdict(transcript(video, BYE))))
    assert read_speech_beside(str(video)) == (BYE,)
    assert parse_subtitles("no cues") == ()


def test_speech_is_added_to_references(tmp_path):
    seen, heard = Event("a man waves", "visual", 0.0, 2.0), Event("a man greets somebody", "speech", 0.4, 1.5)
    old = Event('a voice says: "Yellow."', "speech", 0.5, 1.0)
    added = (
        Event('a voice says: "Hello <there>."', "speech", 0.5, 1.25),
        Event('Anna says: "Goodbye."', "speech", 61.0, 62.5),
    )
    late, untimed = Event("a door closes", "audio", 5.0, 6.0), Event("a man waves")
    references = [
        Reference("a.mp4", (seen, heard, late), caption="A man waves."),
        Reference("b.mp4", (seen, old)),
        Reference("c.mp4", (untimed, late)),
        Reference("d.mp4"),
        Reference("e.mp4", (seen,)),
    ]
    write_records(
        tmp_path / "t.jsonl",
        [transcript(tmp_path / f"{name}.mp4", HELLO, BYE) for name in "abc"] + [transcript(tmp_path / "e.mp4")],
    )
    files = TranscriptFiles([tmp_path / "t.jsonl"])
    changed, counts = add_speech(references, files, root=tmp_path)
    assert changed[0] == Reference("a.mp4", (seen, heard, added[0], late, added[1]), caption="A man waves.")
    assert changed[1] == references[1] and changed[2].events == (untimed, late, *added)
    assert changed[3:] == references[3:]  # without a transcript, and without speech
    assert counts == {"added": 3, "replaced": 0, "quoted before": 1, "without transcript": 1}
    others = [Event(f"a voice says {text}", "speech", 0.5, 1.0) for text in ("“Yellow.”", "«Jaune.»", "「黄色。」")]
    kept, counts_of_others = add_speech([Reference("a.mp4", (one,)) for one in others], files, root=tmp_path)
    assert [one.events for one in kept] == [(one,) for one in others] and counts_of_others["quoted before"] == 3
    replaced, counts = add_speech(changed, files, root=tmp_path, replace_quoted=True)
    assert replaced[0] == changed[0] and replaced[1].events == (seen, *added)
    assert counts == {"added": 1, "replaced": 3, "quoted before": 0, "without transcript": 1}
