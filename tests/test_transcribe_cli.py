"""`salmonn transcribe`: a tiny real Whisper for the wiring, a scripted one and espeak-ng's voice for the contents."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from salmonn.batch.transcripts import Transcript, read_speech_beside
from salmonn.caption.transcribe import Transcription, is_silent
from salmonn.cli import transcribe
from salmonn.files import read_json, read_records, write_records
from salmonn.media.clip import read_clip
from salmonn.media.frame_sampling import FixedRateSampler
from salmonn.records import Caption, Event, Failure, Reference
from salmonn.score.dialogue import count_dialogue
from salmonn.speech import Dialogue, SpeechEvent

SCRIPT = "<|0.00|> Good morning, everyone.<|2.00|>"


def write_silent_video(path: Path) -> None:
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=5, width=64, height=64, pix_fmt="yuv420p")
        for _ in range(5):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8))))
        file.mux(stream.encode(None))


class Scripted:
    """A recognizer that hears what is written for a waveform's length in whole seconds; seeds are recorded."""

    name = "scripted"

    def __init__(self, speech=()):
        self.speech, self.seeds, self.lengths = tuple(speech), [], []

    def transcribe(self, waveform, *, seed=0):
        self.seeds.append(seed)
        self.lengths.append(len(waveform) / 16_000)
        if self.speech and self.speech[0] is None:
            raise RuntimeError("CUDA error: no kernel image\nmore lines")
        return Transcription(self.speech, "en", ("dropped 1 recognized sentence: silence (1)",))


@pytest.fixture
def folder(tmp_path, videos):
    """A clip with tones, one without audio, and a text file with the name of a video."""
    (tmp_path / "clips").mkdir()
    shutil.copy(videos[0], tmp_path / "clips" / "tones.mp4")
    write_silent_video(tmp_path / "clips" / "silent.mp4")
    (tmp_path / "clips" / "text.mp4").write_text("no video")
    return tmp_path


@pytest.fixture
def script(monkeypatch):
    """Replace Whisper by a scripted recognizer."""

    def install(*speech):
        scripted = Scripted(speech)
        monkeypatch.setattr(transcribe, "load_transcriber", lambda config: scripted)
        monkeypatch.setattr("salmonn.caption.transcribe.check_config", lambda config: None)
        return scripted

    return install


def test_a_folder_by_a_real_whisper(call, folder):
    pytest.importorskip("whisper", reason="openai-whisper is not installed (the extra speech)")
    from tests.whisper_model import write_whisper

    write_whisper(folder / "tiny.pt", SCRIPT)
    args = ["transcribe", folder / "clips", "--out", folder / "t.jsonl", "--whisper-model", folder / "tiny.pt"]
    code, out, _ = call(*args, "--dry-run")
    assert code == 0 and "would transcribe 3 videos" in out and not (folder / "t.jsonl").exists()
    code, _, err = call(*args, "--export", "srt", "json", "--workers", "1")
    assert code == 1 and "2 transcripts written" in err and "1 video failed" in err
    found = {Path(one.video).name: one for one in read_records(folder / "t.jsonl", Transcript)}
    assert found.keys() == {"tones.mp4", "silent.mp4"}
    tones, silent = found["tones.mp4"], found["silent.mp4"]
    assert set(one.text for one in tones.speech) == {"Good morning, everyone."} == {tones.text[:23]}
    assert (tones.language, tones.modality, tones.complete, tones.has_audio) == ("en", "audio", True, True)
    assert tones.model == f"whisper {folder / 'tiny.pt'}" and tones.size_bytes
    assert (silent.speech, silent.text, silent.has_audio) == ((), "", False)
    assert silent.warnings == ("the file has no audio",)
    (failure,) = read_records(folder / "t.failed.jsonl", Failure)
    assert failure.video.endswith("text.mp4") and failure.stage == "read" and "is not a video" in failure.reason
    assert read_speech_beside(tones.video) == tones.speech and read_speech_beside(silent.video) == ()
    assert "Good morning, everyone." in (folder / "clips" / "tones.srt").read_text()
    # Resumed: nothing is left, and the failure is reported; other settings are refused.
    code, _, err = call(*args)
    assert code == 1 and "no videos left to transcribe" in err and "2 videos already done" in err
    code, _, err = call(*args, "--language", "en")
    assert code == 2 and "made with language null" in err and "--overwrite" in err
    write_whisper(folder / "tiny.pt", "<|0.00|> Good evening.<|2.00|>")
    code, _, err = call(*args)
    assert code == 2 and "other files of the model" in err


def test_resume_retry_and_tables(call, folder, script):
    scripted = script(SpeechEvent("Hello.", 0.0, 1.0))
    args = ["transcribe", folder / "clips", "--out", folder / "t.jsonl", "--workers", "1"]
    code, _, err = call(*args, "--limit", "1", "--export", "csv")
    assert code == 0 and "1 transcript written" in err and "Hello." not in (folder / "t.csv").read_text()
    code, _, err = call(*args, "--export", "csv", "vtt")
    assert code == 1 and "1 video already done" in err and ",Hello.," in (folder / "t.csv").read_text()
    assert (folder / "clips" / "silent.vtt").read_text() == "WEBVTT\n"  # of the first run, which wrote none
    (seed,) = scripted.seeds
    (folder / "clips" / "text.mp4").unlink()
    shutil.copy(folder / "clips" / "tones.mp4", folder / "clips" / "text.mp4")
    code, _, err = call(*args, "--retry-failed")
    assert code == 0 and not (folder / "t.failed.jsonl").exists()
    assert len(set(scripted.seeds)) == 2 and scripted.seeds[0] == seed
    assert read_records(folder / "t.jsonl", Transcript)[-1].warnings == ("dropped 1 recognized sentence: silence (1)",)
    code, _, err = call("export", folder / "t.jsonl", "--to", "json", "--subtitle-dir", folder / "beside")
    assert code == 0 and "json files written for 3 videos" in err
    assert len(list((folder / "beside").rglob("*.json"))) == 3


def test_a_recognizer_that_fails_costs_one_file(call, folder, script):
    script(None)
    code, _, err = call("transcribe", folder / "clips", "--out", folder / "t.jsonl", "--quiet", "--workers", "0")
    assert code == 1 and "transcripts written" not in err
    failures = {Path(one.video).name: one for one in read_records(folder / "t.failed.jsonl", Failure)}
    assert failures["tones.mp4"].stage == "caption"
    assert failures["tones.mp4"].reason.endswith(
        "tones.mp4: the speech recognizer failed (CUDA error: no kernel image); with little memory, use a smaller model"
    )
    assert [one.has_audio for one in read_records(folder / "t.jsonl", Transcript)] == [False]


def test_references_get_the_speech(call, folder, script):
    script(SpeechEvent("Hello.", 0.2, 1.0), SpeechEvent("Bye.", 1.5, 2.0, speaker="Anna"))
    seen = Event("a circle appears", "visual", 1.2, 1.4)
    references = [Reference("clips/tones.mp4", (seen,)), Reference("clips/silent.mp4", (seen,))]
    write_records(folder / "r.jsonl", references)
    args = ["transcribe", "--references", folder / "r.jsonl", "--out", folder / "t.jsonl", "--workers", "1"]
    code, _, err = call(*args)
    assert code == 0 and "speech of 2 references: added 2" in err and "r.jsonl.old" in err
    added = (Event('a voice says: "Hello."', "speech", 0.2, 1.0), seen, Event('Anna says: "Bye."', "speech", 1.5, 2.0))
    assert read_records(folder / "r.jsonl", Reference) == [replace(references[0], events=added), references[1]]
    assert read_records(folder / "r.jsonl.old", Reference) == references
    code, _, err = call(*args)
    assert code == 0 and "quoted before 1" in err and "--replace-speech" in err
    assert not (folder / "r.jsonl.old.1").exists()  # nothing has changed
    code, _, err = call(*args, "--replace-speech")
    assert code == 0 and "replaced 1" in err and read_records(folder / "r.jsonl", Reference)[0].events == added


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed (apt-get install espeak-ng)")
def test_a_spoken_sentence_from_file_to_error_rate(call, tmp_path, script):
    """espeak-ng speaks; our reader hears sound from its first word to its last. What is said is scripted."""
    subprocess.run(["espeak-ng", "-w", tmp_path / "a.wav", "We leave at nine. Bring the map."], check=True)
    waveform = read_clip(tmp_path / "a.wav", FixedRateSampler(), video=False).waveform
    assert waveform is not None and not is_silent(waveform) and 1 < len(waveform) / 16_000 < 6
    scripted = script(SpeechEvent("We leave at nine.", 0.0, 1.2), SpeechEvent("Bring the map.", 1.5, 2.4))
    write_records(tmp_path / "r.jsonl", [Reference("a.wav")])
    code, _, err = call("transcribe", "--references", tmp_path / "r.jsonl", "--out", tmp_path / "t.jsonl")
    assert code == 0, err
    assert scripted.lengths == [len(waveform) / 16_000]
    (reference,) = read_records(tmp_path / "r.jsonl", Reference)
    caption = Caption("a.wav", 'A woman says, "We leave at 9. Bring a map."')
    # Of seven words one is substituted: 1 / 7.
    assert count_dialogue(caption.text, reference) == Dialogue(7, 7, 6, 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out", "t.csv"], "--out t.csv must end in .jsonl"),
        (["--out", "t.jsonl", "--replace-speech"], "--replace-speech needs --references"),
        (["--out", "t.jsonl", "--limit", "0"], "--limit must be at least 1"),
        (["--out", "t.jsonl", "--references", "r.json"], "must be JSON lines"),
        (["--out", "r.jsonl", "--references", "r.jsonl"], "--out would overwrite the references"),
        (["--out", "t.jsonl", "--references", "r.jsonl", "--shard", "1/2"], "without --shard at the end"),
        (["--out", "t.jsonl", "--references", "none.jsonl"], "does not exist"),
        (["--out", "t.jsonl", "--no-speech-threshold", "0"], "--no-speech-threshold must be above 0"),
        (["--out", "t.jsonl"], "needs openai-whisper: pip install 'salmonn[speech]'"),
    ],
)
def test_bad_flags_cost_one_sentence(call, folder, monkeypatch, flags, message):
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, "whisper", None)
    write_records("r.jsonl", [Reference("clips/tones.mp4")])
    code, _, err = call("transcribe", "clips", *flags)
    assert code == 2 and message in err and err.count("\n") == 1 and not Path("t.jsonl").exists()
    assert read_json("r.jsonl")["video"] == "clips/tones.mp4"


def test_not_under_torchrun(call, folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = call("transcribe", folder / "clips", "--out", folder / "t.jsonl")
    assert code == 2 and "start a process with --shard on each GPU" in err
