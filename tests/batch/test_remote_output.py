"""Captions that go to a remote store: uploaded as they are written, and resumed from there on another machine."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest

from salmonn.batch.ledger_files import LedgerFiles
from salmonn.batch.remote import RemoteError
from salmonn.batch.remote_output import RemoteOutput, working_path
from tests.launch import forked
from tests.limits import RUN_SECONDS, STEP_SECONDS, wait_until

URL = "memory://out/captions.jsonl"


@pytest.fixture
def memory():
    store = fsspec.filesystem("memory")
    yield store
    if store.exists("/out"):
        store.rm("/out", recursive=True)


def machine(tmp_path: Path, name: str) -> LedgerFiles:
    (tmp_path / name).mkdir(exist_ok=True)
    return LedgerFiles(tmp_path / name / "captions.jsonl")


def test_files_are_uploaded_at_intervals_and_at_the_end(memory, tmp_path):
    files = machine(tmp_path, "one")
    with RemoteOutput(URL, files, seconds=0.01):
        files.captions.write_text("first\n")
        files.lock.write_text("")
        wait_until(lambda: memory.exists("/out/captions.jsonl"), seconds=STEP_SECONDS)
        assert memory.cat("/out/captions.jsonl") == b"first\n"
        files.failed.write_text("failure\n")
    assert memory.cat("/out/captions.failed.jsonl") == b"failure\n"
    output = RemoteOutput(URL, files)
    output.download()
    with output:
        files.failed.unlink()  # a retry has succeeded
        (files.out.parent / "captions.datasets").mkdir()
        (files.out.parent / "captions.datasets" / "train-00000-of-00001.parquet").write_bytes(b"rows")
    shard = "/out/captions.datasets/train-00000-of-00001.parquet"
    assert sorted(memory.find("/out")) == [shard, "/out/captions.jsonl"]


def test_a_run_begins_with_the_files_that_are_ahead(memory, tmp_path):
    one, two = machine(tmp_path, "one"), machine(tmp_path, "two")
    one.captions.write_text("a\nb\n")
    one.job.write_text("{}")
    RemoteOutput(URL, one).upload()
    RemoteOutput(URL, two).download()  # another machine
    assert two.captions.read_text() == "a\nb\n" and two.job.read_text() == "{}"
    two.captions.write_text("a\nb\nc\n")
    RemoteOutput(URL, two).download()  # it was killed before it uploaded
    assert two.captions.read_text() == "a\nb\nc\n"
    RemoteOutput(URL, two).upload()
    RemoteOutput(URL, one).download()  # the first one lags behind
    assert one.captions.read_text() == "a\nb\nc\n"
    one.captions.write_text("a\nb\nd\n")
    with pytest.raises(RemoteError, match=r"each have captions that the other lacks; delete or move one of them"):
        RemoteOutput(URL, one).download()
    assert one.captions.read_text() == "a\nb\nd\n"


def test_a_file_is_deleted_on_the_store_when_the_run_deletes_it(memory, tmp_path):
    one = machine(tmp_path, "one")
    for path in (one.captions, one.failed):
        path.write_text("x\n")
    RemoteOutput(URL, one).upload()
    output = RemoteOutput(URL, one)
    output.download()
    one.failed.unlink()
    output.upload()
    assert [Path(path).name for path in memory.find("/out")] == ["captions.jsonl"]


def test_where_captions_cannot_go(call, tmp_path, monkeypatch, videos):
    monkeypatch.setenv("HOME", str(tmp_path))
    for url, words in (
        ("https://host/captions.jsonl", "captions cannot be written to a web server"),
        ("s3://bucket/", "must name a file"),
        ("memory://out/captions.txt", "must end in .jsonl"),
    ):
        code, _, err = call("caption", videos[0], "--out", url)
        assert code == 2 and words in err
    (tmp_path / "captions.jsonl").write_text("")
    for command in (["transcribe", videos[0], "--out"], ["export", tmp_path / "captions.jsonl", "--to"]):
        code, _, err = call(*command, "s3://bucket/captions.jsonl")
        assert code == 2 and "s3://bucket/captions.jsonl is a URL, and this command writes local files" in err
    assert working_path("s3://b/captions.csv").parent == working_path("s3://b/captions.jsonl").parent


def test_a_bucket_that_does_not_exist_is_found_before_a_model_is_loaded(call, bucket, tmp_path, monkeypatch, videos):
    monkeypatch.setenv("HOME", str(tmp_path))
    code, _, err = call("caption", videos[0], "--out", "s3://no-such-bucket/captions.jsonl")
    assert code == 2 and "s3://no-such-bucket: there is no such file or folder" in err


KILLED_AFTER_AN_UPLOAD = """
import os, signal, sys, time
from salmonn import cli
from salmonn.batch import ledger, remote_output

append_records, calls = ledger.append_records, []

def append_or_die(path, records):
    calls.append(path)
    if len(calls) == 4:
        (output,) = outputs
        output.upload()
    if len(calls) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    append_records(path, records)

outputs = []
enter = remote_output.RemoteOutput.__enter__
remote_output.RemoteOutput.__enter__ = lambda self: outputs.append(self) or enter(self)
ledger.append_records = append_or_die
cli.main(sys.argv[1:])
"""


def test_runs_resume_from_the_store(folder, bucket, call, random_model, tmp_path, monkeypatch):
    """A run is killed: 3 captions are uploaded, 5 written. It resumes on another machine, then on its own."""
    url = "s3://bucket/out/captions.jsonl"
    model = ["--model", random_model, "--max-new-tokens", 6, "--workers", 1, "--batch-size", 1]
    args = ["caption", folder, "--out", url, *model]
    one, two = tmp_path / "one", tmp_path / "two"
    command = forked(sys.executable, "-c", KILLED_AFTER_AN_UPLOAD, *args)
    environment = {**os.environ, "HOME": str(one)}
    killed = subprocess.run(command, capture_output=True, text=True, timeout=RUN_SECONDS, env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (written,) = one.rglob("captions.jsonl")
    uploaded = bucket.cat("bucket/out/captions.jsonl")
    assert uploaded.count(b"\n") == 3 and written.read_bytes().count(b"\n") == 5
    # Another machine continues after what was uploaded.
    monkeypatch.setenv("HOME", str(two))
    code, _, err = call(*args, "--export", "csv")
    assert code == 0 and "3 videos already done, skipped" in err and f"uploaded to {url}" in err
    captions = [json.loads(line)["video"] for line in bucket.cat("bucket/out/captions.jsonl").splitlines()]
    assert len(captions) == 6 == len(set(captions)) and bucket.cat("bucket/out/captions.csv").count(b"\n") >= 7
    # The two captions that the first machine had not uploaded are those that the other has made.
    monkeypatch.setenv("HOME", str(one))
    code, _, err = call(*args)
    assert code == 0 and "6 videos already done" in err, err
    # To start over leaves the old captions under another name, here and there.
    code, _, err = call(*args, "--overwrite", "--limit", 1)
    assert code == 0 and bucket.cat("bucket/out/captions.jsonl").count(b"\n") == 1
    assert bucket.cat("bucket/out/captions.jsonl.old").count(b"\n") == 6


def test_captions_in_a_dataset_on_the_hub(hub, tmp_path):
    hub.files["README.md"] = b"x"
    url = "hf://datasets/ORG/NAME/out/captions.jsonl"
    one, two = machine(tmp_path, "one"), machine(tmp_path, "two")
    one.captions.write_text("a\n")
    with RemoteOutput(url, one):
        pass
    assert hub.files["out/captions.jsonl"] == b"a\n" and len(hub.commits) == 1
    RemoteOutput(url, two).download()
    assert two.captions.read_text() == "a\n"
    with pytest.raises(RemoteError, match="if it is private, run `hf auth login`"):
        RemoteOutput("hf://datasets/ORG/OTHER/captions.jsonl", one)
