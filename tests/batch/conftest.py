"""The files of a run, videos and the command that captions them."""

import os

import pytest

from salmonn.batch.ledger_files import LedgerFiles


@pytest.fixture
def files(tmp_path):
    """Names of the files of a run without shards."""
    return LedgerFiles(tmp_path / "captions.jsonl")


@pytest.fixture
def folder(videos, tmp_path):
    """The five clips, each under two names."""
    folder = tmp_path / "clips"
    (folder / "more").mkdir(parents=True)
    for number, video in enumerate(videos):
        os.link(video, folder / f"{number}.mp4")
        (folder / "more" / f"{number}.mp4").write_bytes(video.read_bytes())
    return folder


@pytest.fixture
def caption(call, random_model, tmp_path):
    """Run the command and return exit code and stderr."""

    def caption(*args: object, out: str = "captions.jsonl") -> tuple[int, str]:
        model = ("--model", random_model, "--max-new-tokens", 6, "--workers", 1)
        code, _, err = call("caption", *args, "--out", tmp_path / out, *model)
        return code, err

    caption.model = ("--model", random_model, "--max-new-tokens", 6)
    return caption
