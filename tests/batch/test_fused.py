"""Fused captions of a run."""

import json
import os
import re
import tarfile

import pytest

from salmonn.batch.export import LatestCaptions
from salmonn.batch.fused import fuse_captions
from salmonn.files import read_records, write_records
from salmonn.records import Caption
from tests.caption.served_model import describe, images_of, sound_of
from tests.score.fake_llm_server import Answer, FakeLLMServer


def captions_of(video, texts):
    return [
        Caption(video, text, start_seconds=5.0 * n, end_seconds=5.0 * n + 5, segment=n, num_segments=len(texts))
        for n, text in enumerate(texts)
    ]


class FailingWriter:
    """A model that answers no request."""

    def answer(self, requests):
        return ["no answer" for _ in requests]


def run(folder, captions, settings="rule", writer=None):
    write_records(
        folder / "captions.jsonl", [one for video, texts in captions.items() for one in captions_of(video, texts)]
    )
    failures: list[str] = []
    stats = fuse_captions(
        LatestCaptions([folder / "captions.jsonl"]), folder / "captions.fused.jsonl", settings=settings,
        load=lambda: (writer, None), on_failure=failures.append,
    )  # fmt: skip
    fused = read_records(folder / "captions.fused.jsonl", Caption)
    return stats, failures, {one.video: one.text for one in fused}


def test_only_what_changed_is_fused_again(tmp_path):
    captions = {"a.mp4": ["One.", "Two."], "b.mp4": ["Three.", "Four."]}
    stats, failures, texts = run(tmp_path, captions)
    assert (stats.fused, stats.fused_before, failures) == (2, 0, [])
    assert texts == {"a.mp4": "At 0:00: One.\nAt 0:05: Two.", "b.mp4": "At 0:00: Three.\nAt 0:05: Four."}
    captions["b.mp4"][1] = "Five."
    stats, _, texts = run(tmp_path, captions)
    assert (stats.fused, stats.fused_before) == (1, 1) and texts["b.mp4"].endswith("Five.")
    assert len((tmp_path / "captions.fused.jsonl").read_text().splitlines()) == 2
    del captions["a.mp4"]
    stats, _, texts = run(tmp_path, captions)
    assert (stats.fused, stats.fused_before) == (0, 1) and set(texts) == {"b.mp4"}
    assert run(tmp_path, captions, settings="other")[0].fused == 1


def test_what_is_outdated_does_not_count_if_fusing_fails(tmp_path):
    captions = {"a.mp4": ["One.", "Two."], "b.mp4": ["Three.", "Four."]}
    run(tmp_path, captions)
    captions["b.mp4"][1] = "Five."
    stats, failures, texts = run(tmp_path, captions, writer=FailingWriter())
    assert (stats.fused, stats.fused_before, stats.failed) == (0, 1, 1) and failures == [
        "b.mp4 is not fused: no answer"
    ]
    assert set(texts) == {"a.mp4"}
    assert run(tmp_path, captions)[2]["b.mp4"].endswith("Five.")


def test_a_killed_run_is_resumed(tmp_path):
    captions = {"a.mp4": ["One.", "Two."], "b.mp4": ["Three.", "Four."]}
    run(tmp_path, captions)
    out = tmp_path / "captions.fused.jsonl"
    os.truncate(out, out.stat().st_size - 9)
    stats, _, texts = run(tmp_path, captions)
    assert (stats.fused, stats.fused_before) == (1, 1) and set(texts) == {"a.mp4", "b.mp4"}


@pytest.fixture
def server():
    """A text model that drops the last caption of each request, unless the request says that facts are missing."""

    def script(request, number):
        prompt = request["messages"][0]["content"]
        texts = re.findall(r"^\[\S+ - \S+\] (.*)", prompt, re.MULTILINE)
        return Answer(" ".join(texts if len(request["messages"]) > 1 else texts[:-1]))

    server = FakeLLMServer(script)
    yield server
    server.close()


def test_the_command_fuses_by_rule(folder, caption, tmp_path, call):
    """The segments' captions are finished first; the same command again only reports."""
    video = folder / "0.mp4"
    code, err = caption(video, "--segments", 1, "--fuse")
    assert code == 0 and "1 video fused in" in err and "0 failed" in err
    segments = read_records(tmp_path / "captions.jsonl", Caption)
    (fused,) = read_records(tmp_path / "captions.fused.jsonl", Caption)
    assert fused.video == str(video) and fused.end_seconds == segments[-1].end_seconds
    assert all(one.text in fused.text for one in segments) and fused.fusion.num_segments == len(segments) > 1
    code, err = caption(video, "--segments", 1, "--fuse", "rule")
    assert code == 0 and "0 videos fused" in err and "1 there already" in err
    assert call("export", tmp_path / "captions.fused.jsonl", "--to", tmp_path / "fused.csv")[0] == 0
    assert json.loads(json.dumps(fused.text))[:20] in (tmp_path / "fused.csv").read_text()


def test_a_fused_caption_has_trigger_and_templates_once(folder, caption, tmp_path):
    """As the caption of a whole video has; {duration} is that of the video."""
    shape = ("--template", "{trigger}: {caption}", "--trigger", "ohwx", "--suffix", " ({name}, {duration} s)")
    code, err = caption(folder / "0.mp4", "--segments", 1, "--fuse", *shape)
    assert code == 0, err
    segments = read_records(tmp_path / "captions.jsonl", Caption)
    bare = [one.shaping["caption"].bare for one in segments]
    assert [one.text for one in segments[:2]] == [f"ohwx: {text} (0, 1 s)" for text in bare[:2]]
    (fused,) = read_records(tmp_path / "captions.fused.jsonl", Caption)
    assert fused.text.startswith(f"ohwx: At 0:00: {bare[0].strip()}\n") and fused.text.count("ohwx") == 1
    assert fused.text.endswith(f" (0, {round(fused.end_seconds, 1):g} s)") and fused.text.count("(0, ") == 1
    assert all(text.strip() in fused.text for text in bare)


def test_the_command_fuses_by_a_text_model(folder, caption, tmp_path, server, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_clip_captions(folder / "0.mp4", tmp_path, caption)
    flags = ("--fuse", "text-model", "--fuse-server", server.url, "--fuse-model", "m")
    code, err = caption(folder / "0.mp4", "--segments", 0.5, *flags)
    assert code == 0 and len(server.requests) == 1
    (fused,) = read_records(tmp_path / "captions.fused.jsonl", Caption)
    assert fused.fusion.writer == "m" and "disappears" not in fused.text
    moved = ("--fuse", "text-model", "--fuse-server", "http://localhost:9/v1", "--fuse-model", "m")
    code, err = caption(folder / "0.mp4", "--segments", 0.5, *moved)
    assert code == 0 and "1 there already" in err
    code, err = caption(folder / "0.mp4", "--segments", 0.5, *flags, "--fuse-judge", "rule")
    assert code == 0 and "0 lost, 0 changed; 0 added" in err and len(server.requests) == 2  # the first is remembered
    (fused,) = read_records(tmp_path / "captions.fused.jsonl", Caption)
    assert "disappears" in fused.text and fused.fusion.num_requests == 2


def test_a_server_that_refuses_the_key_ends_the_run(folder, caption, tmp_path, monkeypatch):
    """The other videos are neither tried nor reported as failed."""
    monkeypatch.setenv("HOME", str(tmp_path))
    server = FakeLLMServer(lambda request, number: Answer("wrong key", status=401))
    try:
        flags = ("--fuse-judge", "openai", "--fuse-server", server.url, "--fuse-model", "m")
        code, err = caption(folder / "0.mp4", folder / "1.mp4", "--segments", 1, "--fuse", *flags)
    finally:
        server.close()
    assert code == 2 and "requires an API key" in err and "is not fused" not in err
    videos = [one.video for one in read_records(tmp_path / "captions.jsonl", Caption)]
    assert len(server.requests) <= videos.count(videos[0])


def write_clip_captions(video, tmp_path, caption):
    """Caption a video in segments, and put texts that the rule judge can read instead of the random model's."""
    assert caption(video, "--segments", 0.5)[0] == 0
    captions = read_records(tmp_path / "captions.jsonl", Caption)
    texts = [
        "A red circle appears.",
        "A low tone is heard.",
        "The red circle turns blue.",
        "The blue circle disappears.",
    ]
    assert len(captions) == len(texts)
    lines = (tmp_path / "captions.jsonl").read_text().splitlines()
    edited = [json.dumps(json.loads(line) | {"text": text}) for line, text in zip(lines, texts, strict=True)]
    (tmp_path / "captions.jsonl").write_text("\n".join(edited) + "\n")


def test_the_captioning_model_fuses(folder, call, tmp_path):
    """It is asked once about the whole video, with the captions of the segments in the prompt."""
    out = tmp_path / "captions.jsonl"
    code, _, err = call("caption", folder / "0.mp4", "--out", out, "--segments", 1, "--fuse", "model", "--workers", 0)
    assert code == 0, err
    (fused,) = read_records(tmp_path / "captions.fused.jsonl", Caption)
    (first, *_) = read_records(out, Caption)
    assert fused.fusion.writer == first.model and fused.fusion.num_requests == 1 and fused.text and fused.prompt == ""


def test_a_served_model_fuses_as_it_captions(folder, serve, call, tmp_path):
    """One client for both: one probe, and one budget; requests have the run's modality, frames and sampling."""
    server = serve(lambda request, number: Answer(f"{describe(request)}, {number}"))
    flags = ["--server", server.url, "--server-model", "m", "--server-input", "frames", "--workers", 0]
    flags += ["--modality", "visual", "--frames", 3, "--segments", 1, "--temperature", 0.5, "--max-new-tokens", 2000]
    out = tmp_path / "captions.jsonl"
    code, _, err = call("caption", folder / "0.mp4", "--out", out, *flags)
    assert code == 0, err
    num_without = len(server.requests)
    num_probes = num_without - len(read_records(out, Caption))
    out.unlink()
    fuse_flags = [*flags, "--fuse", "model", "--max-requests", num_without]
    code, _, err = call("caption", folder / "0.mp4", "--out", out, *fuse_flags)
    assert code == 2 and f"the cap of {num_without} requests is reached" in err and "is not fused" not in err
    assert len(server.requests) == 2 * num_without
    code, _, err = call("caption", folder / "0.mp4", "--out", out, *fuse_flags)
    assert code == 0 and "1 video fused" in err and len(server.requests) == 2 * num_without + num_probes + 1
    request = server.requests[-1]
    assert len(images_of(request)) == 3 and sound_of(request) is None and "parts of one video" in str(request)
    assert (request["temperature"], request["max_tokens"]) == (0.5, 2000)
    code, _, err = call("caption", folder / "0.mp4", "--out", out, *fuse_flags)  # no model is needed
    assert code == 0 and "1 there already" in err and len(server.requests) == 2 * num_without + num_probes + 1


def test_the_captioning_model_fuses_members_of_archives(folder, call, tmp_path):
    with tarfile.open(tmp_path / "clips.tar", "w") as archive:
        archive.add(folder / "0.mp4", "0.mp4")
    flags = ("--out", tmp_path / "captions.jsonl", "--segments", 1, "--fuse", "model", "--scratch-dir", tmp_path)
    code, _, err = call("caption", tmp_path / "clips.tar", *flags, "--workers", 0)
    assert code == 0, err
    (fused,) = read_records(tmp_path / "captions.fused.jsonl", Caption)
    assert fused.video == f"{tmp_path / 'clips.tar'}::0.mp4" and fused.fusion.num_requests == 1
    assert not list(tmp_path.glob("salmonn-scratch-*"))


def test_a_text_that_is_cut_off_is_a_failure(folder, call, tmp_path):
    """So is a file that has been deleted; the next run tries again."""
    video, out = folder / "0.mp4", tmp_path / "captions.jsonl"
    command = ("--out", out, "--segments", 1, "--fuse", "model", "--workers", 0)
    code, _, err = call("caption", video, *command, "--fuse-max-new-tokens", 2)
    assert code == 1 and "was cut off at 2 tokens; increase --fuse-max-new-tokens" in err
    video.rename(tmp_path / "moved.mp4")
    code, _, err = call("caption", folder / "more" / "1.mp4", *command)
    assert code == 1 and "0.mp4 is not fused" in err and "no such file" in err, err
    (tmp_path / "moved.mp4").rename(video)
    assert call("caption", video, *command)[0] == 0
    assert {one.video for one in read_records(tmp_path / "captions.fused.jsonl", Caption)} >= {str(video)}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fuse"], "--fuse makes one caption from those of segments; add --segments"),
        (["--fuse-model", "m"], "--fuse-model needs --fuse"),
        (["--fuse", "rule", "--segments", "2", "--fuse-max-new-tokens", "9"], "is for --fuse model"),
        (["--fuse", "model", "--segments", "2", "--fuse-max-new-tokens", "0"], "must be at least 1, got 0"),
        (
            ["--fuse", "--segments", "2", "--prompts", "PROMPTS"],
            "--fuse makes one caption of each video, and --prompts",
        ),
        (["--fuse", "text-model", "--segments", "2"], "add --fuse-model"),
        (["--fuse", "rule", "--segments", "2", "--fuse-judge", "openai"], "add --fuse-model"),
        (
            ["--fuse", "rule", "--segments", "2", "--fuse-server", "http://x/v1"],
            "--fuse-server is for --fuse text-model",
        ),
        (["--fuse", "text-model", "--segments", "2", "--fuse-model", "m", "--fuse-server", "x"], "must be an address"),
        (["--fuse", "model", "--segments", "2", "--engine", "ray"], "--fuse model runs in one process"),
    ],
)
def test_options_are_checked(folder, caption, tmp_path, flags, message):
    (tmp_path / "prompts.yaml").write_text("short: Briefly.\n")
    code, err = caption(folder, *(tmp_path / "prompts.yaml" if flag == "PROMPTS" else flag for flag in flags))
    assert code == 2 and message in err


def test_stdout_is_refused(folder, call):
    code, _, err = call("caption", folder, "--out", "-", "--segments", "2", "--fuse")
    assert code == 2 and "--fuse needs a file" in err
