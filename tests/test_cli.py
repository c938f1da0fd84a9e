"""Real command lines: their files, and one-sentence error messages with exit codes."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from salmonn import __version__
from salmonn.cli.caption_options import caption_parser
from salmonn.cli.main import COMMANDS, build_parser, name_flags
from salmonn.config import parse_config
from salmonn.files import read_records
from salmonn.records import Caption, Reference
from tests.launch import forked
from tests.limits import RUN_SECONDS

SALMONN = Path(sys.executable).with_name("salmonn")


def run(*args: object, fresh: bool = False) -> subprocess.CompletedProcess[str]:
    """Run the installed command in a fork of a process that has imported torch, or in a fresh process."""
    line = [str(SALMONN), *map(str, args)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = line if fresh else forked(*line)
    return subprocess.run(command, capture_output=True, text=True, timeout=RUN_SECONDS, check=False, env=env)


# What each command line needs no torch for, with its exit code and a part of its output.
WITHOUT_TORCH = {
    ("--help",): (0, "score"),
    ("caption", "--help"): (0, "--engine"),
    ("demo", "--help"): (0, "--judge.kind"),
    ("caption", "/nowhere", "--out", "x.jsonl"): (2, "no such file or folder"),
    ("caption", "tests", "--out", "x.txt"): (2, "--out x.txt must end in .jsonl, .csv or .parquet, or be -"),
    ("caption", "tests", "--out", "x.jsonl", "--segments", "0"): (2, "--segments must be above 0"),
    ("caption", "tests", "--out", "x.jsonl", "--limit", "0"): (2, "--limit must be at least 1"),
    ("caption", "tests", "--out", "x.jsonl", "--frames", "0"): (2, "error: --frames must be at least 1, got 0"),
    ("caption", "tests", "--out", "-", "--lines-per-file", "9"): (2, "--lines-per-file needs a file"),
}
RUN_EACH = """
import contextlib, io, json, sys
from salmonn.cli import main
for line in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            code = main(line)
        except SystemExit as end:
            code = end.code
    heavy = sorted({"torch", "transformers", "gradio"} & set(sys.modules))
    print(json.dumps([code, out.getvalue(), heavy]))
"""


def test_help_and_wrong_usage_need_no_torch():
    """One fresh process for all command lines."""
    lines = json.dumps(list(WITHOUT_TORCH))
    command = [sys.executable, "-c", RUN_EACH]
    result = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=RUN_SECONDS, check=False)
    assert result.returncode == 0, result.stderr
    outcomes = [json.loads(line) for line in result.stdout.splitlines()]
    for line, (expected_code, text), (code, out, heavy) in zip(
        WITHOUT_TORCH, WITHOUT_TORCH.values(), outcomes, strict=True
    ):
        assert (code, heavy) == (expected_code, []) and text in out, line
        assert code == 0 or out.startswith("error: ")


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (
            "caption",
            [
                "paths",
                "--out",
                "--model",
                "--prompt",
                "--modality",
                "--start",
                "--end",
                "--temperature",
                "--workers",
                "--list",
                "--glob",
                "--overwrite",
                "--retry-failed",
                "--shard",
                "--segments",
                "--export",
                "--read-gib",
                "--engine",
            ],
        ),
        ("export", ["captions", "--to", "--subtitle-dir", "spreadsheet"]),
        ("score", ["captions", "--references", "--judge", "--base-url", "--passes", "--report", "--max-requests"]),
        ("compare", ["first", "second", "--force"]),
        ("events", ["references", "--out", "--judge"]),
        ("qa", ["answers"]),
        ("reward-benchmark", ["files", "--judge", "--model"]),
        ("plot", ["run", "--out"]),
        ("synth", ["--out", "--clips", "--seed", "--min-seconds"]),
    ],
)
def test_help_of_commands(call, command, options):
    code, out, _ = call(command, "--help")
    assert code == 0 and all(option in out for option in options)


FLAG = r"(?<![\w/.-])--[a-z][\w.-]*"


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - {"completion"}))  # which has no flags
def test_help_shows_flags_in_one_spelling(call, command):
    code, out, _ = call(command, "--help")
    flags = re.findall(FLAG, out)
    assert code == 0 and len(flags) >= 2 and not [flag for flag in flags if "_" in flag]


def test_help_of_recipes_shows_flags_in_the_same_spelling(load_recipe, capsys):
    with pytest.raises(SystemExit):
        parse_config(load_recipe("sft").SftConfig, description="A recipe.", args=["--help"])
    flags = re.findall(FLAG, capsys.readouterr().out)
    assert "--fit.batch-size" in flags and not [flag for flag in flags if "_" in flag]


@pytest.mark.parametrize("flag", ["--max-new-tokens", "--max_new_tokens", "--max_new-tokens"])
def test_both_spellings_of_a_flag_are_accepted(call, flag):
    """The value is not changed; errors show one spelling."""
    values = build_parser().parse_args(["caption", "a_b--c_d.mp4", "--out", "o_p", flag, "7"])
    assert values.caption.max_new_tokens == 7 and values.caption.out == Path("o_p")
    assert values.caption.paths == ["a_b--c_d.mp4"]
    code, _, err = call("caption", "a.mp4", "--out", "x", flag, "many")
    assert code == 2 and "error: --max-new-tokens:" in err and "max_new_tokens" not in err


def test_missing_arguments_are_named_as_they_are_written(call):
    assert "required: captions, --to (see salmonn --help)\n" in call("export")[2]
    assert "required: --out (see" in call("caption", "a.mp4")[2]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--temperature", "hot"], "--temperature: must be a number, got hot"),
        (["--workers", "x"], "--workers: must be a whole number, got x"),
        (["--bits", "5"], "--bits: must be one of 4, 8, got 5"),
        (["--modality", "smell"], "--modality: must be one of both, visual, audio, got smell"),
        (
            ["--export", "json"],
            "--export element 1: must be one of csv, parquet, datasets, webdataset, txt, srt, vtt, got json",
        ),
        (["--nope", "1"], "unrecognized arguments: --nope 1"),
    ],
)
def test_wrong_values_are_described_in_one_sentence(call, args, message):
    """Without the usage of forty flags and Python's names of types."""
    code, out, err = call("caption", "a.mp4", "--out", "x.jsonl", *args)
    assert (code, out, err) == (2, "", f"error: {message} (see salmonn caption --help)\n")


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ("max_new_tokens must be above 0", "--max-new-tokens must be above 0"),
        ("fps and num_frames exclude each other", "fps and --frames exclude each other"),
        ("clip.mp4: start_seconds is 9.0, after its end.", "clip.mp4: --start is 9.0, after its end."),
        ("top_p.", "--top-p."),
        ("/data/top_p/top_p.mp4 top_p.x batch_size=3 --top_p", "/data/top_p/top_p.mp4 top_p.x batch_size=3 --top_p"),
        ("min_gap is no flag of this command", "min_gap is no flag of this command"),
    ],
)
def test_errors_name_flags_where_a_user_typed_them(message, named):
    assert name_flags(message, caption_parser()) == named


def test_version_help_and_module(call):
    assert call("--version")[:2] == (0, f"salmonn {__version__}\n")
    assert call("help", "export")[1] == call("export", "--help")[1]
    assert "caption" in call("help")[1]
    as_module = "import runpy; runpy.run_module('salmonn', run_name='__main__')"
    command = forked(sys.executable, "-c", as_module, "--version")
    result = subprocess.run(command, capture_output=True, text=True, timeout=RUN_SECONDS, check=False)
    assert result.stdout == f"salmonn {__version__}\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["sal", "cap"], ["caption"]),
        (["salmonn", "caption", "--max-n"], ["--max-new-tokens"]),
        (["salmonn", "plot", "--o"], ["--out"]),
        (["salmonn", "plot", "fold"], []),
    ],
)
def test_completion(call, words, expected):
    code, script, _ = call("completion", "bash")
    script += f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _salmonn; echo ${{COMPREPLY[@]}}"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=RUN_SECONDS, check=False)
    assert code == 0 and result.stdout.split() == expected and not result.stderr
    assert call("completion", "zsh")[1].startswith("autoload -U bashcompinit")


def test_help_is_grouped_and_names_no_types(call):
    _, out, _ = call("caption", "--help")
    headings = re.findall(r"^(\w[^\n]*):$", out, re.MULTILINE)
    assert headings == [
        "options", "Input", "Prompt and sampling", "Context", "Shape of the captions",
        "One caption of a whole video", "Output", "Speed and limits", "Model", "Server instead of a local model",
    ]  # fmt: skip
    assert "type: " not in out and "null" not in out and "Literal" not in out
    assert (
        "{csv,parquet,datasets,webdataset,txt,srt,vtt}" in out
        and "(default: 20)" in out
        and "default: False" not in out
    )


def test_a_folder_with_one_broken_file(videos, random_model, tmp_path):
    folder = tmp_path / "videos"
    (folder / "deeper").mkdir(parents=True)
    shutil.copy(videos[0], folder / "a.mp4")
    (folder / "b.mp4").write_bytes(videos[0].read_bytes()[:2000])
    shutil.copy(videos[1], folder / "deeper" / "c.mp4")
    (folder / "notes.txt").write_text("no video")
    out = tmp_path / "captions.jsonl"
    begin = time.monotonic()
    result = run("caption", folder, "--out", out, "--model", random_model, "--max-new-tokens", 8)
    assert result.returncode == 1
    seconds = time.monotonic() - begin
    captions = read_records(out, Caption)
    # Batches are written as they end.
    assert sorted(caption.video for caption in captions) == [str(folder / "a.mp4"), str(folder / "deeper" / "c.mp4")]
    assert all(caption.text and caption.model == str(random_model) for caption in captions)
    assert "Traceback" not in result.stderr
    assert (
        str(folder / "b.mp4") in result.stderr and "2 captions" in result.stderr and "1 video failed" in result.stderr
    )
    found = re.search(r"; ([\d.]+) clips per minute \((\d+)% of the time waiting for files\)", result.stderr)
    # Three files in less than the process's total time.
    assert found and float(found[1]) > 60 * 3 / seconds and 0 <= int(found[2]) <= 100


def test_captions_do_not_depend_on_workers(call, videos, random_model, tmp_path):
    args = ("caption", *videos[:3], "--model", random_model, "--max-new-tokens", 6)
    texts = []
    for workers in (0, 2):
        out = tmp_path / f"{workers}.jsonl"
        assert call(*args, "--out", out, "--workers", workers)[0] == 0
        texts.append(out.read_text())
    assert texts[0] == texts[1]


def test_captions_are_those_of_the_captioner(call, captioner, videos, random_model, tmp_path):
    from salmonn.batch.discovery import path_number
    from salmonn.caption.generator import CaptionRequest, Sampling, Span

    out = tmp_path / "new" / "captions.jsonl"
    code, _, _ = call(
        "caption", videos[0], videos[1], "--out", out, "--model", random_model, "--max-new-tokens", 7,
        "--prompt", "Say.", "--modality", "visual", "--start", 1.0, "--end", 5.0,
        "--temperature", 1.0, "--top-p", 0.5, "--seed", 3, "--batch-size", 1,
    )  # fmt: skip
    assert code == 0
    sampling = Sampling(temperature=1.0, top_p=0.5, max_new_tokens=7)
    # The random seed is combined with the path.
    requests = [
        CaptionRequest(path, "Say.", sampling, Span(1.0, 5.0), "visual", seed=3 + path_number(str(path)))
        for path in videos[:2]
    ]
    batches = captioner.caption_batches(requests, batch_size=1)
    expected = [done.result for batch in batches for done in batch]
    found = read_records(out, Caption)
    assert [replace(caption, size_bytes=None, modified_ns=None) for caption in found] == expected
    stats = [path.stat() for path in videos[:2]]
    assert [(one.size_bytes, one.modified_ns) for one in found] == [(one.st_size, one.st_mtime_ns) for one in stats]


def test_out_is_replaced_only_on_request(call, videos, random_model, tmp_path):
    """Even then it is renamed, not deleted."""
    out = tmp_path / "captions.jsonl"
    out.write_text("precious")
    args = ("caption", videos[0], "--out", out, "--model", random_model, "--max-new-tokens", 4)
    code, _, err = call(*args)
    assert code == 2 and str(out) in err and "--overwrite" in err and "Traceback" not in err
    assert out.read_text() == "precious"
    assert call(*args, "--overwrite")[0] == 0
    assert len(read_records(out, Caption)) == 1 and (tmp_path / "captions.jsonl.old").read_text() == "precious"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["/nowhere/none.mp4"], "/nowhere/none.mp4"),
        (["{empty}"], "no video or audio file"),
        (["{video}", "--modle", "x"], "modle"),
        (["{video}", "--temperature", "hot"], "temperature"),
        (["{video}", "--temperature", "-1"], "temperature must be"),
        (["{video}", "--top-p", "2"], "error: --top-p must be"),
        (["{video}", "--max-new-tokens", "2.5"], "--max-new-tokens"),
        (["{video}", "--max-new-tokens", "0"], "error: --max-new-tokens must be"),
        (["{video}", "--modality", "smell"], "smell"),
        (["{video}", "--start", "5", "--end", "2"], "span"),
        (["{video}", "--model", "{empty}"], "no model in"),
        (["{video}", "--prompt", "<|video_pad|>"], "special token"),
        ([], "paths"),
        (["{video}", "--batch-size", "-1"], "--batch-size must be at least 1"),
        (["{video}", "--workers", "-1"], "--workers must be"),
    ],
)
def test_wrong_usage_of_caption(call, videos, random_model, tmp_path, args, message):
    (tmp_path / "empty").mkdir()
    args = [arg.format(video=videos[0], empty=tmp_path / "empty") for arg in args]
    model = [] if "--model" in args else ["--model", random_model]
    code, _, err = call("caption", *args, *model, "--out", tmp_path / "out.jsonl")
    assert code == 2 and message in err and "Traceback" not in err


def test_an_error_leaves_no_empty_file(call, videos, random_model, tmp_path):
    out = tmp_path / "out.jsonl"
    assert call("caption", videos[0], "--out", out, "--model", random_model, "--prompt", "<|video_pad|>")[0] == 2
    assert not out.exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "subcommand"),
        (["describe"], "describe"),
        (["caption", "a.mp4"], "out"),
        (["score", "none.jsonl"], "references"),
        (["synth", "--out", "x", "--clips", "-1"], "-1"),
        (["synth", "--out", "x", "--clips", "many"], "clips"),
    ],
)
def test_wrong_usage(call, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(*args)
    assert code == 2 and message in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_error_messages_are_one_sentence(tmp_path):
    result = run("caption", tmp_path, "--out", tmp_path / "out.jsonl")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


SHORT = ("--seed", 9, "--min-seconds", 3, "--max-seconds", 3, "--min-visual", 1, "--max-visual", 2, "--min-sounds", 1,
         "--max-sounds", 1)  # fmt: skip


def test_synth_twice_gives_the_same_bytes(call, tmp_path, monkeypatch):
    """The second run gets uninitialized memory with other contents."""
    assert call("synth", "--out", tmp_path / "one", "--clips", 2, *SHORT)[0] == 0
    monkeypatch.setenv("MALLOC_PERTURB_", "85")
    assert run("synth", "--out", tmp_path / "two", "--clips", 2, *SHORT, fresh=True).returncode == 0
    one, two = (
        {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).digest() for path in root.rglob("*.*")}
        for root in (tmp_path / "one", tmp_path / "two")
    )
    assert set(one) == {"clips.jsonl", "synth.json", "videos/clip_00000.mp4", "videos/clip_00001.mp4"}
    assert len(set(one.values())) == 4
    assert one == two


def test_synth_rejects_a_folder_of_other_clips(call, tmp_path):
    assert call("synth", "--out", tmp_path, "--clips", 1, *SHORT)[0] == 0
    code, _, err = call("synth", "--out", tmp_path, "--clips", 1, *SHORT, "--seed", 10)
    assert code == 2 and "another config" in err


def test_synth_resumes(call, tmp_path):
    args = (*SHORT, "--out", tmp_path)
    assert call("synth", "--clips", 1, *args)[0] == 0
    first = (tmp_path / "videos" / "clip_00000.mp4").stat().st_mtime_ns
    assert call("synth", "--clips", 2, *args)[0] == 0
    assert (tmp_path / "videos" / "clip_00000.mp4").stat().st_mtime_ns == first
    assert len(read_records(tmp_path / "clips.jsonl", Reference)) == 2
