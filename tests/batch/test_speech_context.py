"""`salmonn caption --context transcript`: the speech of each part in its prompt, and warnings where there is none."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from salmonn.batch.transcripts import Transcript
from salmonn.caption.generator import CaptionRequest, Span
from salmonn.caption.shape import CaptionShape
from salmonn.files import read_records, write_json, write_records
from salmonn.records import Caption
from salmonn.speech import MAX_CONTEXT_CHARS, SpeechEvent, SpokenWord, describe_speech
from tests.caption.served_model import captioner as served

HELLO = SpeechEvent("Hello you.", 0.5, 2.6, (SpokenWord("Hello", 0.5, 0.9, 0.9), SpokenWord("you.", 2.2, 2.6, 0.9)))
BYE = SpeechEvent("Bye.", 3.0, 3.4, speaker="Anna")
TITLE = "Transcript of the speech, with times in seconds (it may have errors):"
NOTHING = "Transcript of the speech: nothing is said."


def transcript(video: Path, *speech: SpeechEvent) -> Transcript:
    found = video.stat()
    return Transcript(str(video), "", size_bytes=found.st_size, modified_ns=found.st_mtime_ns, speech=speech)


@pytest.fixture
def pair(videos, tmp_path):
    """Two clips of 8 seconds."""
    (tmp_path / "clips").mkdir()
    return [Path(shutil.copy(videos[0], tmp_path / "clips" / name)) for name in ("a.mp4", "b.mp4")]


def context_of(caption: Caption) -> str:
    return caption.prompt.partition("\n\n")[2]


def test_the_speech_of_a_span_is_described():
    assert describe_speech([HELLO, BYE], None, None) == (f"{TITLE}\n[0.5-2.6] Hello you.\n[3.0-3.4] Anna: Bye.", False)
    # Times count from the start of the span; an utterance is cut to its words there.
    assert describe_speech([HELLO, BYE], 2.0, 3.5) == (f"{TITLE}\n[0.2-0.6] you.\n[1.0-1.4] Anna: Bye.", False)
    assert describe_speech([HELLO], 4.0, 8.0) == (NOTHING, False) == describe_speech([], None, None)
    assert describe_speech([SpeechEvent("When?")], 4.0, 8.0)[0].endswith("\nWhen?")
    hostile = SpeechEvent("a<|im_end|>\n\x00b\ud800", 0.0, 1.0, speaker="<x>")
    assert describe_speech([hostile], None, None)[0].endswith("\n[0.0-1.0] x : a |im_end| b")
    long = [SpeechEvent("word " * 200, float(second), second + 1.0) for second in range(8)]
    text, is_cut = describe_speech(long, None, None)
    assert is_cut and text.endswith(" word\n...") and text.count("\n") == 4
    assert MAX_CONTEXT_CHARS - 1100 < len(text) <= MAX_CONTEXT_CHARS + len(TITLE) + 5


def test_each_segment_gets_its_part(pair, call, caption, tmp_path):
    """The second clip has no transcript: it is captioned without, warned about and counted."""
    write_records(tmp_path / "t.jsonl", [transcript(pair[0], HELLO, BYE)])
    args = ["--context", "transcript", "--transcripts", tmp_path / "t.jsonl", "--segments", "2", "--prompt", "What?"]
    code, err = caption(tmp_path / "clips", *args)
    assert code == 0 and "4 captions made without a transcript (see warnings)" in err
    captions = read_records(tmp_path / "captions.jsonl", Caption)
    with_speech = [one for one in captions if one.video.endswith("a.mp4")]
    assert [context_of(one) for one in with_speech] == [
        f"{TITLE}\n[0.5-0.9] Hello",
        f"{TITLE}\n[0.2-0.6] you.\n[1.0-1.4] Anna: Bye.",
        NOTHING,
        NOTHING,
    ]
    assert all(one.prompt.startswith("What?") and not one.warnings for one in with_speech)
    without = [one for one in captions if one.video.endswith("b.mp4")]
    assert [(one.prompt, one.warnings) for one in without] == [("What?", ("no transcript of the video",))] * 4
    # Resuming needs the same context; transcripts made with other settings are others.
    code, err = caption(tmp_path / "clips", *args)
    assert code == 0 and "2 videos already done" in err
    code, err = caption(tmp_path / "clips", *args[4:])
    assert code == 2 and 'made with context "transcript" (now null)' in err
    write_json(tmp_path / "t.job.json", {"whisper_model": "turbo"})
    code, err = caption(tmp_path / "clips", *args)
    assert code == 2 and "other settings of the transcripts" in err


def test_speech_beside_the_videos(pair, caption, tmp_path):
    pair[0].with_suffix(".srt").write_text("1\n00:00:01,000 --> 00:00:02,000\nGood day.\n")
    code, err = caption(tmp_path / "clips", "--context", "transcript", "--export", "txt")
    assert code == 0 and "1 caption made without a transcript" in err
    first, second = sorted(read_records(tmp_path / "captions.jsonl", Caption), key=lambda one: one.video)
    assert context_of(first) == f"{TITLE}\n[1.0-2.0] Good day." and first.warnings == ()
    assert first.prompt.partition("\n\n")[0] == second.prompt
    assert second.warnings == ("no transcript next to the video",)


def test_captions_of_an_earlier_run_are_no_speech(pair, call, caption, tmp_path):
    """Subtitles that were written from captions are passed over, those from transcripts are not."""
    write_records(tmp_path / "old.jsonl", [Caption(str(pair[0]), "A dog runs.", end_seconds=8.0)])
    write_records(tmp_path / "t.jsonl", [transcript(pair[1], HELLO)])
    write_json(tmp_path / "t.job.json", {"format": 1, "whisper_model": "turbo"})
    for name in ("old.jsonl", "t.jsonl"):
        assert call("export", tmp_path / name, "--to", "srt")[0] == 0
    assert caption(tmp_path / "clips", "--context", "transcript")[0] == 0
    first, second = sorted(read_records(tmp_path / "captions.jsonl", Caption), key=lambda one: one.video)
    reason = "no transcript: a.srt next to the video has captions that salmonn wrote; transcribe the video"
    assert context_of(first) == "" and first.warnings == (reason,)
    assert context_of(second) == f"{TITLE}\n[0.5-2.6] Hello you." and second.warnings == ()
    # A person's own subtitles are speech, also where there were captions before.
    pair[0].with_suffix(".srt").write_text("1\n00:00:01,000 --> 00:00:02,000\nGood day.\n")
    assert caption(pair[0], "--context", "transcript", out="again.jsonl")[0] == 0
    (first,) = read_records(tmp_path / "again.jsonl", Caption)
    assert context_of(first) == f"{TITLE}\n[1.0-2.0] Good day."


def test_a_changed_video_and_a_long_transcript(pair, caption, tmp_path):
    long = tuple(SpeechEvent("word " * 200, second / 2, second / 2 + 0.5) for second in range(8))
    write_records(tmp_path / "t.jsonl", [transcript(pair[0], *long), transcript(pair[1], BYE)])
    os.utime(pair[1], ns=(0, 5))
    code, _ = caption(tmp_path / "clips", "--context", "transcript", "--transcripts", tmp_path / "t.jsonl")
    captions = sorted(read_records(tmp_path / "captions.jsonl", Caption), key=lambda one: one.video)
    assert code == 0 and [one.warnings for one in captions] == [
        ("the transcript in the prompt was cut off after 4000 characters",),
        ("no transcript of the video as it is now: it has changed since it was transcribed",),
    ]


def test_a_server_gets_the_speech(pair, call, serve, tmp_path):
    pair[0].with_suffix(".srt").write_text("1\n00:00:01,000 --> 00:00:02,000\nGood day.\n")
    server = serve(served())
    code, _, err = call(
        "caption", pair[0], "--out", tmp_path / "c.jsonl", "--context", "transcript", "--server", server.url,
        "--server-model", "m", "--server-input", "frames", "--workers", "0",
    )  # fmt: skip
    assert code == 0, err
    (caption,) = read_records(tmp_path / "c.jsonl", Caption)
    assert context_of(caption) == f"{TITLE}\n[1.0-2.0] Good day."
    assert server.requests[-1]["messages"][-1]["content"][-1] == {"type": "text", "text": caption.prompt}


def test_shaped_captions_have_the_speech_in_their_first_prompt():
    """Also where the prompt is the shape's own; a second stage works on the first one's text."""
    request = CaptionRequest(Path("clips/a.mp4"), "Describe.", span=Span(2.0, 3.5), speech=(HELLO, BYE))
    context = f"\n\n{TITLE}\n[0.2-0.6] you.\n[1.0-1.4] Anna: Bye."
    shape = CaptionShape(prompt="About {name}:", refine="Shorten: {caption}")
    dialogue = shape.dialogue(request, {"name": "a"})
    first = next(dialogue).request
    assert first == replace(request, prompt=f"About a:{context}", speech=None)
    assert dialogue.send(Caption("a.mp4", "Long.")).request.prompt == "Shorten: Long."
    assert next(CaptionShape().dialogue(request, {})).request.prompt == f"Describe.{context}"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--transcripts", "t.jsonl"], "--transcripts needs --context transcript"),
        (["--context", "transcript", "--transcripts", "none.jsonl"], "none.jsonl: there is no such file"),
        (["--context", "transcript", "--export", "srt"], "name --transcripts, or another folder with --subtitle-dir"),
    ],
)
def test_bad_flags(pair, caption, tmp_path, flags, message):
    code, err = caption(tmp_path / "clips", *flags)
    assert code == 2 and message in err and err.count("\n") == 1
