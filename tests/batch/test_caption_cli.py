"""End-to-end tests of `salmonn caption`: real files and processes, interrupted, resumed, retried and sharded."""

import hashlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from jsonargparse import Namespace

from salmonn.batch.discovery import Shard
from salmonn.cli.shape_options import SHAPE_SETTINGS
from salmonn.files import read_records
from salmonn.records import Caption, Failure
from tests.batch.ledger_records import EACH_ONCE, names
from tests.launch import forked
from tests.limits import RUN_SECONDS

BIN = Path(sys.executable).parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


# A run that is killed by SIGKILL while it writes its fourth caption.
KILLED_WHILE_WRITING = """
import os, signal, sys
from salmonn import cli
from salmonn.batch import ledger

append_records, calls = ledger.append_records, []

def append_or_die(path, records):
    calls.append(path)
    if len(calls) == 4:
        with path.open("ab") as file:
            file.write(b'{"video": "')
        os.kill(os.getpid(), signal.SIGKILL)
    append_records(path, records)

ledger.append_records = append_or_die
cli.main(sys.argv[1:])
"""


def test_a_killed_run_is_resumed(folder, random_model, tmp_path, caption):
    """After kill -9, all written captions are kept, and each video is captioned once."""
    out = tmp_path / "captions.jsonl"
    args = ["caption", folder, "--out", out, "--model", random_model, "--max-new-tokens", 6, "--workers", 1]
    command = forked(sys.executable, "-c", KILLED_WHILE_WRITING, *args, "--batch-size", 1)
    killed = subprocess.run(command, capture_output=True, text=True, timeout=RUN_SECONDS, env=ENVIRONMENT, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = out.read_bytes()
    before = before[: before.rindex(b"\n") + 1]
    assert before.count(b"\n") == 3
    code, err = caption(folder)
    assert code == 0 and out.read_bytes().startswith(before)
    captions = read_records(out, Caption)
    assert len(captions) == 6 == len({one.video for one in captions})
    assert "3 videos already done, skipped" in err
    # The captions are those of an unbroken run.
    assert caption(folder, out="unbroken.jsonl")[0] == 0
    unbroken = {one.video: one for one in read_records(tmp_path / "unbroken.jsonl", Caption)}
    assert {one.video: one for one in captions} == unbroken


def test_a_torn_line_is_cut_off_and_reported(folder, caption, tmp_path):
    out = tmp_path / "captions.jsonl"
    assert caption(folder, "--segments", 1)[0] == 0
    whole = sorted(out.read_text().splitlines())
    assert len(whole) == 12
    os.truncate(out, out.stat().st_size - 11)
    code, err = caption(folder, "--segments", 1)
    assert code == 0 and "a run was killed while writing" in err and "5 videos already done, skipped" in err
    assert sorted(out.read_text().splitlines()) == whole


def test_without_pending_videos_no_model_is_loaded(folder, caption, tmp_path, call):
    assert caption(folder)[0] == 0
    before = (tmp_path / "captions.jsonl").read_bytes()
    code, err = caption(folder, folder / "1.mp4")
    assert code == 0 and err == "nothing to do: no videos left to caption\n6 videos already done, skipped\n"
    assert (tmp_path / "captions.jsonl").read_bytes() == before


def test_a_changed_file_is_captioned_again(folder, caption, videos, tmp_path, call):
    assert caption(folder / "0.mp4", folder / "1.mp4")[0] == 0
    (folder / "1.mp4").unlink()
    (folder / "1.mp4").write_bytes(videos[2].read_bytes())
    assert caption(folder / "0.mp4", folder / "1.mp4", "--export", "csv")[0] == 0
    captions = read_records(tmp_path / "captions.jsonl", Caption)
    assert [Path(one.video).name for one in captions].count("1.mp4") == 2 and len(captions) == 3
    assert captions[-1].size_bytes == (folder / "1.mp4").stat().st_size
    assert (tmp_path / "captions.csv").read_text().count("1.mp4") == 1  # the later one
    assert captions[-1].text in (tmp_path / "captions.csv").read_text()


def busy_shards(folder, count):
    """Return the numbers of the shards, of a count of them, that hold a video of a folder: paths may hash to a few."""
    paths = [str(path) for path in folder.rglob("*.mp4")]
    return [number for number in range(1, count + 1) if any(map(Shard(number, count).holds, paths))]


def assert_captioned_by_shard(folder, out):
    """Each of two shards holds the captions of its videos; if all paths hash to one shard, the other writes no file."""
    for number in (1, 2):
        videos = [path for path in folder.rglob("*.mp4") if path.stem != "broken" and Shard(number, 2).holds(str(path))]
        file = out / f"captions-{number}-of-2.jsonl"
        assert (names(file) if videos else []) == sorted("/".join(path.parts[-2:]) for path in videos)


def test_shards_caption_all_videos(folder, caption, tmp_path):
    for shard in ("1/2", "2/2"):
        assert caption(folder, "--shard", shard)[0] == 0
    assert_captioned_by_shard(folder, tmp_path)
    # With another number of shards, nothing is left to do.
    for more in ((), ("--shard", f"{busy_shards(folder, 3)[0]}/3")):
        code, err = caption(folder, *more)
        assert code == 0 and "nothing to do: no videos left to caption\n" in err and "already done, skipped" in err
    assert not (tmp_path / "captions.jsonl").exists()


def test_shards_write_subtitles_of_what_one_process_captioned(folder, caption):
    """Each shard for its videos."""
    assert caption(folder)[0] == 0
    expected = set()
    for number in busy_shards(folder, 2):
        code, err = caption(folder, "--shard", f"{number}/2", "--export", "txt")
        assert code == 0 and err.startswith("no videos left to caption\n")
        expected |= {path.with_suffix(".txt") for path in folder.rglob("*.mp4") if Shard(number, 2).holds(str(path))}
        assert set(folder.rglob("*.txt")) == expected
    assert len(expected) == 6


def test_a_shard_and_a_process_without_shards(folder, caption, tmp_path):
    """It would caption the same videos, and --overwrite would rename files that the shard is writing."""
    from salmonn.batch.discovery import Shard
    from salmonn.batch.ledger import Ledger
    from salmonn.batch.ledger_files import LedgerFiles

    with Ledger(LedgerFiles(tmp_path / "captions.jsonl", Shard(1, 2)), job={}):
        for more in ((), ("--overwrite",), ("--shard", "1/3")):
            code, err = caption(folder, *more)
            assert code == 2 and "same number of shards" in err and ".captions-1-of-2.jsonl.lock is held" in err
        assert caption(folder, "--shard", "2/2")[0] == 0


def test_each_torchrun_process_takes_a_shard(folder, random_model, tmp_path):
    """One of two processes has a broken file; both exit with the same code."""
    (folder / "broken.mp4").write_bytes((folder / "0.mp4").read_bytes()[:2000])
    out = tmp_path / "captions.jsonl"
    args = ["caption", folder, "--out", out, "--model", random_model, "--max-new-tokens", 6, "--workers", 1]
    result = subprocess.run(
        forked(BIN / "torchrun", "--standalone", "--nproc-per-node=2", "--no-python", BIN / "salmonn", *args),
        capture_output=True, text=True, check=False, timeout=RUN_SECONDS, env=ENVIRONMENT,
    )  # fmt: skip
    assert_captioned_by_shard(folder, tmp_path)
    failed = [path for path in tmp_path.glob("*.failed.jsonl")]
    assert [names(path, Failure) for path in failed] == [["clips/broken.mp4"]]
    assert result.returncode == 1 and result.stderr.count("clips per minute") == len(busy_shards(folder, 2))


def test_a_list_from_stdin(folder, caption, tmp_path, monkeypatch):
    lines = f"{folder}/0.mp4\n{folder}/more\n{folder}/gone.mp4\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    code, err = caption("--list", "-")
    assert code == 1 and "4 captions" in err and "1 video failed" in err
    (failure,) = read_records(tmp_path / "captions.failed.jsonl", Failure)
    assert failure.video == str(folder / "gone.mp4") and failure.stage == "read" and failure.size_bytes is None
    assert "there is no such file" in failure.reason


def test_each_bad_path_is_one_failure(folder, caption, tmp_path):
    """A name that is too long, and a link to itself; the other videos are captioned."""
    (folder / "loop.mp4").symlink_to("loop.mp4")
    (tmp_path / "list.txt").write_text(f"{'x' * 5000}.mp4\n{folder}\n")
    code, err = caption("--list", tmp_path / "list.txt")
    assert code == 1 and "6 captions" in err and "2 videos failed" in err
    reasons = {one.video[-8:]: one.reason for one in read_records(tmp_path / "captions.failed.jsonl", Failure)}
    assert "File name too long" in reasons["xxxx.mp4"] and set(reasons) == {"xxxx.mp4", "loop.mp4"}
    code, err = caption("--retry-failed")
    assert code == 1 and "2 videos failed" in err


def test_a_name_that_is_not_utf8_keeps_its_reason(folder, caption, tmp_path):
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.mp4")).write_bytes(b"12345")
    for args in ([folder, "--workers", 1], ["--retry-failed"]):
        code, err = caption(*args)
        assert code == 1 and "1 video failed" in err
        (failure,) = read_records(tmp_path / "captions.failed.jsonl", Failure)
        assert failure.video == f"{folder}/caf\\xe9.mp4" and "is not valid UTF-8" in failure.reason


def test_files_that_are_skipped_are_counted_in_the_summary(folder, caption, videos):
    """Also the subtitle files that were written; nothing is logged for each of them."""
    for name in ("a.jpg", "b.jpg", "notes.txt"):
        (folder / name).touch()
    code, err = caption(folder, "--glob", "more/*", "*.jpg", "*.txt", "--export", "srt")
    assert code == 0 and "3 captions" in err and "3 files skipped because of the suffix: 2 .jpg, 1 .txt\n" in err
    assert err.count(".jpg") == 1
    code, err = caption(folder)
    assert "6 files skipped because of the suffix: 3 .srt, 2 .jpg, 1 .txt\n" in err
    code, err = caption(folder / "0.mp4")
    assert "because of the suffix" not in err


def test_a_list_separated_by_nul(folder, caption, tmp_path, monkeypatch):
    """As `find -print0` writes it; names may have line breaks."""
    os.link(folder / "0.mp4", folder / "two\nlines.mp4")
    lines = f"{folder}/two\nlines.mp4\0{folder}/1.mp4\0"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    assert caption("--list", "-")[0] == 0
    assert names(tmp_path / "captions.jsonl") == ["clips/1.mp4", "clips/two\nlines.mp4"]


def test_a_read_only_folder(folder, caption, tmp_path, monkeypatch):
    """Root may write to any folder, so the answer of the system is replaced."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    code, err = caption(folder / "0.mp4")
    assert (
        code == 2
        and err == f"error: the folder {tmp_path} is read-only; choose another one for the captions with --out\n"
    )


def test_globs(folder, caption, tmp_path):
    assert caption(folder, "--glob", "more/[01].mp4", "2.*")[0] == 0
    assert names(tmp_path / "captions.jsonl") == ["clips/2.mp4", "more/0.mp4", "more/1.mp4", "more/2.mp4"]


def test_failed_files_are_fixed_and_retried(folder, caption, videos, tmp_path):
    for name in ("bad.mp4", "worse.mp4"):
        (folder / name).write_bytes(videos[0].read_bytes()[:2000])
    failed = tmp_path / "captions.failed.jsonl"
    code, err = caption(folder)
    assert code == 1 and "6 captions" in err and "2 videos failed" in err
    assert [(one.stage, one.size_bytes) for one in read_records(failed, Failure)] == [("read", 2000)] * 2
    code, err = caption(folder)
    assert (
        code == 1
        and "nothing to do: no videos left to caption\n" in err
        and "2 videos skipped: failed in earlier runs" in err
        and "--retry-failed" in err
    )
    (folder / "bad.mp4").write_bytes(videos[0].read_bytes())
    # A retry does not list the folder.
    (folder / "new.mp4").write_bytes(videos[0].read_bytes())
    code, err = caption("--retry-failed")
    assert code == 1 and "1 caption written" in err and "1 video failed" in err
    assert names(failed, Failure) == ["clips/worse.mp4"]
    assert names(tmp_path / "captions.jsonl") == sorted([*EACH_ONCE, "clips/bad.mp4"])
    (folder / "worse.mp4").write_bytes(videos[1].read_bytes())
    assert caption("--retry-failed")[0] == 0 and not failed.exists()
    assert names(tmp_path / "captions.jsonl") == sorted([*EACH_ONCE, "clips/bad.mp4", "clips/worse.mp4"])
    assert caption("--retry-failed")[0] == 0


def test_many_failures_in_a_row_stop_the_run(folder, caption, tmp_path):
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"/gone/{number}.mp4\n" for number in range(500)))
    code, err = caption(folder / "0.mp4", "--list", listed, "--max-failures", 5)
    assert code == 2 and "5 videos failed in a row" in err and "--retry-failed" in err
    assert "/gone/4.mp4: there is no such file" in err and "Traceback" not in err
    assert 5 <= len(read_records(tmp_path / "captions.failed.jsonl", Failure)) < 500
    assert names(tmp_path / "captions.jsonl") == ["clips/0.mp4"]


def test_broken_files_among_good_ones_do_not_stop_the_run(folder, caption, videos):
    """Batches of similar length bring them together."""
    for number in range(3):
        (folder / f"{number}_broken.mp4").write_bytes(videos[0].read_bytes()[:1000])
    code, err = caption(folder, "--max-failures", 2)
    assert code == 1 and "6 captions" in err and "3 videos failed" in err


def test_full_files_are_renamed(folder, caption, tmp_path):
    (folder / "more" / "2.mp4").unlink()
    assert caption(folder, "--lines-per-file", 2)[0] == 0
    parts = ["captions.00001.jsonl", "captions.00002.jsonl", "captions.jsonl"]
    assert [len(read_records(tmp_path / name, Caption)) for name in parts] == [2, 2, 1]
    code, err = caption(folder)
    assert code == 0 and "5 videos already done, skipped" in err


def test_overwrite(folder, caption, tmp_path):
    assert caption(folder / "0.mp4")[0] == 0
    code, err = caption(folder / "1.mp4", "--overwrite", "--temperature", 1)
    assert code == 0 and "captions.jsonl.old" in err
    assert names(tmp_path / "captions.jsonl.old") == ["clips/0.mp4"] and names(tmp_path / "captions.jsonl") == [
        "clips/1.mp4"
    ]
    code, err = caption(folder / "1.mp4")
    assert code == 2 and "temperature 1.0 (now 0.0)" in err and "--overwrite" in err


def test_samples_depend_on_the_path_alone(folder, caption, tmp_path):
    """Not on the order, or on existing captions."""
    hot = ("--temperature", 1, "--seed", 5)
    assert caption(folder, *hot, out="one.jsonl")[0] == 0
    assert caption(folder / "more", *hot, out="two.jsonl")[0] == 0
    assert caption(folder / "2.mp4", folder, *hot, "--batch-size", 1, out="two.jsonl")[0] == 0
    one, two = (
        {caption.video: caption.text for caption in read_records(tmp_path / name, Caption)}
        for name in ("one.jsonl", "two.jsonl")
    )
    assert one == two and len(set(one.values())) > 3


def test_a_second_process_is_refused(folder, caption, tmp_path):
    from salmonn.batch.ledger import Ledger
    from salmonn.batch.ledger_files import LedgerFiles

    with Ledger(LedgerFiles(tmp_path / "captions.jsonl"), job={}):
        code, err = caption(folder)
    assert code == 2 and "another process is writing" in err


def test_a_full_disk(folder, caption, tmp_path):
    """The file may have 1800 bytes: exit code 2, a message, whole lines; the next run resumes."""
    out = tmp_path / "captions.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1800, before[1]))
    try:
        code, err = caption(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2 and "Traceback" not in err
    assert "cannot be written (File too large). Finished work is saved" in err
    assert 2 <= len(read_records(out, Caption)) < 6
    assert caption(folder)[0] == 0 and names(out) == EACH_ONCE


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--shard", "3/2"], "no shard 3 of 2"),
        (["--shard", "2"], "2/8"),
        (["--shard", "1/2", "--overwrite"], "other shards"),
        (["--overwrite", "--retry-failed"], "without --retry-failed"),
        (["--max-failures", "-1"], "--max-failures"),
        (["--lines-per-file", "0"], "--lines-per-file"),
        (["--list", "/nowhere.txt"], "/nowhere.txt"),
        (["--segments", "0"], "--segments must be above 0"),
        (["--read-seconds", "0"], "limits must be above 0"),
        (["--export", "docx"], "docx"),
        (["--engine", "ray", "--ray-actors", "0"], "--ray-actors"),
    ],
)
def test_usage_errors(folder, caption, tmp_path, args, words):
    code, err = caption(folder, *args)
    assert code == 2 and words in err and "Traceback" not in err
    assert not [path for path in tmp_path.iterdir() if path.suffix in {".jsonl", ".json"}]


def test_stop_strings_end_captions(folder, caption, tmp_path):
    assert caption(folder / "0.mp4", out="whole.jsonl")[0] == 0
    (whole,) = read_records(tmp_path / "whole.jsonl", Caption)
    stop = whole.text[2:5]
    assert caption(folder / "0.mp4", "--stop", "no such text", stop, "--logprobs")[0] == 0
    (stopped,) = read_records(tmp_path / "captions.jsonl", Caption)
    assert stopped.logprob < 0 and stopped.num_tokens > 0 and whole.logprob is None
    assert stopped.finished and stopped.text == whole.text[: whole.text.index(stop)].rstrip()


def test_the_settings_are_saved(folder, caption, tmp_path, random_model):
    assert caption(folder / "0.mp4", "--modality", "visual", "--prompt", "Say.")[0] == 0
    settings = json.loads((tmp_path / "captions.job.json").read_text())
    assert (settings["model"], settings["modality"], settings["prompt"]) == (str(random_model), "visual", "Say.")
    unset = {name for name, value in settings.items() if value is None}
    others = {
        "adapter",
        "start",
        "end",
        "segments",
        "min_shot",
        "shot_detector",
        "repetition_penalty",
        "bits",
        "frames",
        "context",
    }
    assert unset == others | set(SHAPE_SETTINGS)
    assert settings["max_new_tokens"] == 6


def test_a_model_that_was_trained_further_is_rejected(folder, random_model, tmp_path, call):
    """Recognized by size and time of its weights, or by its config."""
    model = tmp_path / "model"
    shutil.copytree(random_model, model)
    args = ("caption", folder / "0.mp4", "--out", tmp_path / "captions.jsonl", "--model", model, "--workers", 0)
    args = (*args, "--max-new-tokens", 6)
    assert call(*args)[0] == 0 and call(*args)[0] == 0
    weights, config = model / "model.safetensors", model / "config.json"
    for change in (weights.touch, lambda: config.write_text(config.read_text() + " ")):
        before = weights.stat().st_mtime_ns, config.read_text()
        change()
        code, _, err = call(*args)
        assert code == 2 and "other files of the model (they have changed since)" in err and "--overwrite" in err
        os.utime(weights, ns=(before[0], before[0]))
        config.write_text(before[1])
        assert call(*args)[0] == 0


def test_the_fingerprint_of_the_shipped_model(folder, call, tmp_path):
    """The times of the shipped model's files depend on the installation, so its config alone counts."""
    from salmonn.caption.captioner import SHIPPED_MODEL
    from salmonn.cli.caption import fingerprint_model

    digest = hashlib.blake2b((SHIPPED_MODEL / "config.json").read_bytes(), digest_size=16).hexdigest()
    settings = {"model": "built-in toy model", "model_files": digest}
    assert fingerprint_model(Namespace(model=None, adapter=None)) == settings
    assert fingerprint_model(Namespace(model="hub/id", adapter=None)) == {"model": "hub/id"}
    (tmp_path / "adapter_model.safetensors").write_bytes(b"1")
    one = fingerprint_model(Namespace(model=None, adapter=str(tmp_path)))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"12")
    assert one["adapter_files"] != fingerprint_model(Namespace(model=None, adapter=str(tmp_path)))["adapter_files"]
