"""Captions through this project's own service: the same captions as those of the model in this process."""

import os
from dataclasses import replace

import pytest

from salmonn.caption.captioner import Captioner
from salmonn.caption.engine import Engine
from salmonn.caption.generator import SHIPPED_MODEL, CaptionRequest, Sampling, Span
from salmonn.caption.hearing import Hearing
from salmonn.caption.loader import ClipReader
from salmonn.caption.server_connection import connect_captioner
from salmonn.caption.server_options import ServerOptions
from salmonn.files import read_records
from salmonn.records import Caption, Failure
from tests.caption.served_model import captioner as scripted


@pytest.fixture
def folder(videos, tmp_path):
    """Four clips."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for number, video in enumerate(videos[:4]):
        os.link(video, folder / f"{number}.mp4")
    return folder


@pytest.fixture(scope="module")
def toy_engine():
    """An engine of the built-in model, whose answers do not depend on rounding, as those of random weights may."""
    with ClipReader(workers=1) as reader:
        engine = Engine(Captioner.load(SHIPPED_MODEL), reader)
        yield engine
        engine.close(grace_seconds=5)


@pytest.fixture
def toy_server(start, toy_engine):
    return start(toy_engine)


@pytest.fixture
def without_probe(monkeypatch):
    """Leave out the four requests that test whether the model hears, before each command."""
    monkeypatch.setattr("salmonn.caption.server_connection.probe_hearing", lambda *_, **__: Hearing(True, ()))


def texts(path):
    return {
        one.video: (one.text, one.finished, one.modality, one.complete, one.warnings)
        for one in read_records(path, Caption)
    }


def test_captions_are_those_of_the_local_model(toy_server, call, videos, tmp_path):
    server = toy_server
    args = ["caption", videos[0].parent, "--max-new-tokens", 20, "--workers", 0, "--temperature", 0.9, "--seed", 5]
    # One at a time on both sides: rounding depends on what is decoded together.
    served = ["--server", f"{server.url}/v1", "--server-model", "toy", "--concurrency", 1]
    code, _, err = call(*args, "--out", tmp_path / "served.jsonl", *served)
    assert code == 0, err
    assert call(*args, "--out", tmp_path / "local.jsonl", "--batch-size", 1)[0] == 0
    local = texts(tmp_path / "local.jsonl")
    assert len({one[0] for one in local.values()}) == 5
    assert texts(tmp_path / "served.jsonl") == local


@pytest.mark.usefixtures("without_probe")
@pytest.mark.parametrize(
    "flags",
    [
        ("--segments", 3, "--export", "srt", "--logprobs"),
        ("--start", 1.5, "--end", 4, "--frames", 4, "--modality", "visual", "--prompt", "What moves?", "--stop", "e"),
    ],
)
def test_options_have_the_same_effect(toy_server, call, videos, tmp_path, flags):
    server = toy_server
    args = ["caption", *videos[:2], "--max-new-tokens", 8, "--workers", 0, *flags]
    served = (
        "--server",
        f"{server.url}/v1",
        "--server-model",
        "salmonn",
    )  # a name that the service takes for its model
    for name, model in {"local": ("--batch-size", 1), "served": served}.items():
        code, _, err = call(*args, "--out", tmp_path / f"{name}.jsonl", "--subtitle-dir", tmp_path / name, *model)
        assert code == 0, err
    local, remote = (read_records(tmp_path / f"{name}.jsonl", Caption) for name in ("local", "served"))
    by_segment = {(one.video, one.segment): one for one in remote}
    assert len(local) == len(by_segment) == (6 if "--logprobs" in flags else 2)
    for one in local:
        other = by_segment[one.video, one.segment]
        # The service does not name its default prompt, and leaves out the end token's log-probability.
        same = {"prompt": one.prompt, "model": one.model, "logprob": one.logprob, "num_tokens": one.num_tokens}
        assert replace(other, **same) == one and other.model == "toy"
        assert other.prompt == (one.prompt if "--prompt" in flags else "")
        if one.logprob is not None:
            assert not one.finished and other.num_tokens == one.num_tokens == 8
            assert other.logprob == pytest.approx(one.logprob, abs=1e-4)
    subtitles = [sorted(path.name for path in (tmp_path / name).rglob("*.srt")) for name in ("local", "served")]
    assert subtitles[0] == subtitles[1] and len(subtitles[0]) == (2 if "--logprobs" in flags else 0)


@pytest.mark.usefixtures("without_probe")
def test_shapes_leave_the_models_own_prompt(toy_server, call, videos, tmp_path):
    """What would have to be added to a prompt that the service does not list is refused."""
    args = ["caption", videos[0], "--max-new-tokens", 8, "--workers", 0]
    served = ["--server", f"{toy_server.url}/v1", "--server-model", "toy"]
    for flags in (("--words", "1-90"), ("--language", "de"), ("--context", "transcript")):
        code, _, err = call(*args, "--out", tmp_path / "refused.jsonl", *served, *flags)
        assert code == 2 and "pass the whole prompt with --prompt" in err, err
        assert not (tmp_path / "refused.jsonl").exists()
    for name, model in {"local": ("--batch-size", 1), "served": served}.items():
        code, _, err = call(*args, "--out", tmp_path / f"{name}.jsonl", *model, "--trigger", "ohwx")
        assert code == 0, err
    ((local,), (remote,)) = (read_records(tmp_path / f"{name}.jsonl", Caption) for name in ("local", "served"))
    assert local.text == remote.text and local.text.startswith("ohwx, ") and remote.prompt == ""
    code, _, err = call(*args, "--out", tmp_path / "words.jsonl", *served, "--words", "1-90", "--prompt", "What moves?")
    (caption,) = read_records(tmp_path / "words.jsonl", Caption)
    assert code == 0 and caption.prompt == "What moves?\nWrite 1 to 90 words."


def test_samples_history_and_system_prompt(start, captioner, videos):
    server = start()
    served = connect_captioner(ServerOptions(f"{server.url}/v1", "toy"))
    assert served.is_own and served.input == "video"
    sampling = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=8)
    requests = [
        CaptionRequest(videos[0], sampling=sampling, seed=3, num_samples=3),
        CaptionRequest(
            videos[1],
            "And then?",
            sampling,
            history=[("What?", "A circle."), ("What else?", "A tone.")],
            system="Be brief.",
            clip_turn=1,
        ),
        CaptionRequest(videos[1], "Which tone?", sampling, Span(1.0, 3.0), "audio", seed=1),
    ]
    samples, *others = served.generate(requests)
    assert [one.sample for one in samples] == [0, 1, 2] and len({one.text for one in samples}) == 3
    # Choice k of the service is sampled with seed + k.
    alone = [replace(requests[0], seed=3 + number, num_samples=1) for number in range(3)]
    expected = captioner.generate([*alone, *requests[1:]])
    assert [one.text for one in samples] == [one.text for (one,) in expected[:3]]
    assert [one.text for (one,) in others] == [one.text for (one,) in expected[3:]]
    assert served.generate([]) == []


def test_errors_of_the_service_are_one_sentence(start, call, videos, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "0123456789abcdef")  # for another server
    server = start(keys=("0123456789abcdef",))
    args = ["caption", videos[0], "--out", tmp_path / "captions.jsonl", "--server", f"{server.url}/v1", "--workers", 0]

    def error(*flags) -> str:
        code, out, err = call(*args, *flags)
        assert code == 2 and not out and err.count("\n") == 1, err
        assert not (tmp_path / "captions.jsonl").exists()
        return err

    assert error() == "error: --server needs the name of a model on it: pass --server-model\n"
    message = error("--server-model", "toy")
    assert "requires an API key: name the environment variable that has it with --server-api-key-env" in message
    args += ["--server-api-key-env", "TOY_KEY"]
    assert "the environment variable TOY_KEY is not set" in error("--server-model", "toy")
    monkeypatch.setenv("TOY_KEY", "wrong-secret")
    message = error("--server-model", "toy")
    assert "refuses the API key in the environment variable TOY_KEY" in message and "secret" not in message
    monkeypatch.setenv("TOY_KEY", "0123456789abcdef")
    assert error("--server-model", "gpt") == f"error: {server.url}/v1 has no model 'gpt'; it offers toy\n"
    for name in ("frames", "video+audio"):
        assert f"takes one file per request, not {name}; use --server-input video" in error(
            "--server-model", "toy", "--server-input", name
        )
    assert call(*args, "--server-model", "toy", "--max-new-tokens", 2)[0] == 0
    assert (
        "0123456789abcdef"
        not in (tmp_path / "captions.jsonl").read_text() + (tmp_path / "captions.job.json").read_text()
    )


@pytest.mark.usefixtures("without_probe")
def test_the_job_is_resumed_at_another_address(start, serve, call, folder, tmp_path):
    """The address may change, the model may not; what is done is not captioned again."""
    first, second = start(), start()
    args = [
        "caption",
        "--out",
        tmp_path / "captions.jsonl",
        "--max-new-tokens",
        4,
        "--workers",
        0,
        "--server-model",
        "toy",
    ]
    assert call(*args, folder / "0.mp4", "--server", f"{first.url}/v1")[0] == 0
    other = serve(scripted(hears_video=True))  # it has the model, and is not `salmonn serve`
    code, _, err = call(*args, folder, "--server", other.url)
    assert code == 2 and 'was made with server_software "salmonn serve" (now null)' in err
    code, _, err = call(*args, folder, "--server", f"{second.url}/v1", "--concurrency", 3)
    assert code == 0 and "1 video already done, skipped" in err
    captions = read_records(tmp_path / "captions.jsonl", Caption)
    assert len(captions) == len({one.video for one in captions}) == 4
    for changed in (["--server-model", "other"], ["--server-input", "video+audio"]):
        code, _, err = call(*args, folder, "--server", f"{second.url}/v1", *changed)
        assert code == 2 and "use the same settings" in err and changed[1] in err
    code, _, err = call(*args[:3], folder)
    assert code == 2 and "--server-model" in err


def test_damaged_and_missing_files(start, call, folder, tmp_path):
    server = start()
    whole = (folder / "0.mp4").read_bytes()
    for name, content in {"1.mp4": b"no video", "2.mp4": whole[: len(whole) // 2]}.items():
        (folder / name).unlink()  # a link to the shared clip
        (folder / name).write_bytes(content)
    args = ["caption", folder / "1.mp4", folder / "2.mp4", "--max-new-tokens", 4, "--workers", 1]
    code, _, err = call(
        *args, "--out", tmp_path / "served.jsonl", "--server", f"{server.url}/v1", "--server-model", "toy"
    )
    assert code == 1 and "failed" in err
    assert call(*args, "--out", tmp_path / "local.jsonl", "--model", SHIPPED_MODEL)[0] == 1
    failures = [read_records(tmp_path / f"{name}.failed.jsonl", Failure) for name in ("served", "local")]
    assert failures[0] == failures[1]
