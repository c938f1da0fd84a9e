"""Every command and every example of the documentation is checked, and run.

All command lines are read by the parsers of their programs, and what Python examples import and call is looked up.
Those of README.md, docs/python_api.md and docs/http_api.md are run as well; the other pages' by `make test-slow`.

What needs a published model runs on a small one. What trains for minutes or days runs for two steps, or as --dry-run
where it would need GPUs. Other people's programs (vllm, tensorboard, sbatch ...) are not started, but written down.
"""

import argparse
import ast
import contextlib
import importlib
import importlib.util
import inspect
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import tomllib
import warnings
from dataclasses import asdict, replace
from itertools import dropwhile
from pathlib import Path
from urllib.request import urlopen

import pytest

from salmonn import config
from salmonn.cli.main import build_parser
from salmonn.files import read_json, read_records, write_json, write_records, write_text
from salmonn.records import Caption, Reference
from salmonn.score.metrics import Rates
from salmonn.synthetic.render import SynthConfig, make_clips
from tests.caption.served_model import captioner, is_about_a_clip
from tests.launch import forked
from tests.limits import RUN_SECONDS, STEP_SECONDS
from tests.score.fake_llm_server import rule_judge_script

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [*sorted((ROOT / "docs").glob("*.md")), README]
BIN = Path(sys.executable).parent
# Programs that are not this project's, or would install something: each call is written down, and does nothing.
FOREIGN = ("vllm", "llama-server", "transformers", "tensorboard", "pip", "make", "sbatch")
SHIM = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$CALLS"
"""
# Programs of the shell.
SHELL = (".", "cat", "find")
# A recipe at toy size: two steps of one round. With settings of published models only its command line is read:
# tests/test_config.py runs each of their configurations with --dry-run, and so do the pages that name this flag.
READ_FLAGS = """
import runpy, sys
from salmonn import config
config.run_recipe = lambda main, config_type, **_: config.parse_config(config_type, description="")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
TORCHRUN = f"""#!{sys.executable} -ISE
import os, sys
args = sys.argv[1:]
while args and args[0].startswith("--"):
    if args.pop(0) == "--no-python":
        os.execvp(args[0], args)
small = os.environ["SMALL"].split()
if any("published" in arg for arg in args):
    os.execvp("python", ["python", *([] if "--dry-run" in args else ["-c", {READ_FLAGS!r}]), *args])
os.execvp("python", ["python", *args, *([] if "--help" in args else small)])
"""
# Commands of this project, as forks of a process that has imported torch.
FORKED = """#!/usr/bin/env bash
exec {} "$@"
"""
SMALL = (
    "--rounds 1 --sampling.num_samples 4 --sampling.temperature 0.9 --sampling.max_new_tokens 30 "
    "--selection.min_gap 0.0001 --fit.steps 2 --fit.batch_size 2 --rebirth.fit.steps 2 --rebirth.fit.batch_size 2 "
    "--synth.clips 4 --heldout_clips 2 "
    "--early_stopping.max_worsening 9 --early_stopping.min_pairs 1 --early_stopping.min_margin null --kl.num_clips 2"
)
# Run by tests of their own, with files that they need.
ELSEWHERE = {
    "python tools/convert.py": "tests/tools/test_convert.py",
    "python tools/merge.py": "tests/tools/test_merge.py",
    "python tools/export_lm.py": "tests/tools/test_export_lm.py",
    "python tools/raters.py": "tests/tools/test_raters.py",
    "salmonn demo --reward-model run/raters": "tests/webui/test_answers.py",
    "salmonn votes run/votes": "tests/preference/test_feedback_report.py",
    "salmonn caption clips --out captions_by_ray.jsonl": "tests/batch/test_ray_cluster.py",
    "salmonn caption clips --out captions_by_vllm.jsonl": "tests/caption/test_real_vllm_captioner.py",
    "salmonn caption clips --out structured.jsonl": "tests/batch/test_events_format.py",
    "python tools/assemble.py": "tests/tools/test_assemble.py",
    ".venv/bin/salmonn reward-benchmark data/reward_pairs.jsonl --model run": "tests/test_reward_benchmark_cli.py",
    "torchrun recipes/reward.py": "tests/recipes/test_reward.py",
    "torchrun recipes/mrdpo.py --reward.kind model": "tests/recipes/test_reward.py",
    "salmonn export run/round_1": "tests/preference/test_export.py",
    "salmonn push": "tests/test_push_cli.py",
    "salmonn reward captions.jsonl": "tests/test_reward_cli.py",
    "salmonn transcribe": "tests/test_transcribe_cli.py",  # with a model that needs no download
    ".venv/bin/salmonn score predictions.json": "tests/test_score_cli.py",  # a judge that answers as the published one
}


def blocks(page, language):
    text = page.read_text(encoding="utf-8")
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(body) for _, body in found]


COMMANDED = [page for page in PAGES if blocks(page, "bash")]
SERVERS = {"http_api.md": "/health", "web_ui.md": "/"}
slow = pytest.mark.slow


def command_lines(script):
    """Return the words of each command of a script, without comments, here-documents, variables and redirections."""
    script = re.sub(r"<<'(\w+)'\n.*?^\1$", "", script.replace("\\\n", " "), flags=re.DOTALL | re.MULTILINE)
    commands = []
    for line in script.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|>")
        lexer.whitespace_split = True
        words = [[]]
        for word in lexer:
            words.append([]) if word == "|" else words[-1].append(word)
        commands += [one[: one.index(">")] if ">" in one else one for one in words]
    without_variables = [[*dropwhile(lambda word: re.match(r"[A-Z_]+=", word), one)] for one in commands]
    return [one for one in without_variables if one]


def read_command(program, *args):
    """Read a command line with the parser of its program; it ends the process if it refuses the line."""
    name, args = program.rpartition("/")[2], list(args)
    while name in ("torchrun", "sbatch") and args[0].startswith("--"):
        assert "=" in args[0] or args[0] in ("--standalone", "--no-python")
        args.pop(0)
    if name == "torchrun" and args[0] == "salmonn":
        read_command(*args)
    elif name == "salmonn":
        build_parser(args[0]).parse_args(args)
    elif name in ("torchrun", "python") and args[0] != "-m":
        read_flags(args[0], args[1:])
    elif name in ("sbatch", "one_machine.sh"):
        recipe, *flags = args[name == "sbatch" :]
        read_flags(f"recipes/{recipe}.py", flags)
    elif name == "make":
        targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert args[0] in targets
    elif name == "pip" and args[:2] == ["install", "-e"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(re.findall(r"\w+", args[2])) <= set(extras)
    else:
        assert name in (*FOREIGN, *SHELL, "python")


def read_flags(script, flags):
    """Read the command line of a recipe or tool, and make its config."""

    class Parsed(Exception):
        pass

    def parse_alone(parser, *_):
        parse(parser)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Parsed):
        patch.setattr(sys, "argv", [script, *flags])
        if "run_recipe(" in Path(script).read_text():
            patch.setattr(config, "run_recipe", lambda main, of, **_: config.parse_config(of, description=""))
        else:
            kind = config.FlagParser if "FlagParser(" in Path(script).read_text() else argparse.ArgumentParser
            parse = kind.parse_args
            patch.setattr(kind, "parse_args", parse_alone)
        runpy.run_path(script, run_name="__main__")


@pytest.mark.parametrize("page", COMMANDED, ids=lambda page: page.name)
def test_commands_are_accepted(page, monkeypatch):
    """All flags, which are not abbreviated, and values are known, and the files of this repository exist."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "all")
    commands = [command for script in blocks(page, "bash") for command in command_lines(script)]
    assert commands
    for command in commands:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                read_command(*command)
            except (SystemExit, AssertionError) as error:
                pytest.fail(f"{page.name}: {shlex.join(command)}: {error}")
        assert not [warning for warning in caught if "was expanded to" in str(warning.message)]
        own = [word for word in command if re.match(r"(recipes|tools|data|docs|demo|tests|salmonn)/", word)]
        assert not [word for word in own if not Path(word).exists()]


def resolve(node, names):
    """Return the object that an expression of imported names refers to; None for another expression."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute) and (owner := resolve(node.value, names)):
        return getattr(owner, node.attr, None) if inspect.isroutine(owner) else getattr(owner, node.attr)
    return None


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_examples_use_what_exists(page):
    """What is imported exists, and takes the arguments it is given."""
    tree = ast.parse("\n".join(blocks(page, "python")))
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            names |= {one.name: getattr(module, one.name) for one in node.names}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and resolve(node.func, names)]
    assert calls
    for call in calls:
        inspect.signature(resolve(call.func, names)).bind(*call.args, **{one.arg: one.value for one in call.keywords})


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """Three synthetic clips with their references."""
    folder = tmp_path_factory.mktemp("known")
    make_clips(folder, SynthConfig(clips=3, seed=7), workers=1)
    return folder


@pytest.fixture(scope="module")
def published_model(random_plus, tmp_path_factory):
    """A model in place of the published ones: random weights, which do not end an answer, and short answers."""
    folder = tmp_path_factory.mktemp("models") / "published"
    shutil.copytree(random_plus, folder)
    write_json(folder / "config.json", read_json(folder / "config.json") | {"max_new_tokens": 16})
    return folder


def write_benchmark_data(folder):
    """Write some rows of the reward benchmark's data, and one in the format of RAG-RewardBench."""
    for name in ("reward_pairs", "reward_best_of_4"):
        rows = (ROOT / "data" / f"{name}.jsonl").read_text().splitlines(keepends=True)
        write_text(folder / "data" / f"{name}.jsonl", "".join(rows[::50]))
    row = {"prompt": "Documents: ... Question: Who?", "chosen": "A.", "reject": "B.", "subset": "musique"}
    write_text(folder / "RAG-RewardBench" / "reason.jsonl", json.dumps(row) + "\n")


@pytest.fixture
def stage(known, published_model, serve, tmp_path):
    """A folder that has what the pages speak of, and the programs that they call; returns what runs a script there."""
    shutil.copytree(known, tmp_path / "clips")
    for name in ("recipes", "tools", "docs", "pyproject.toml", "Makefile", "salmonn"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "FOLDER").symlink_to(ROOT / "salmonn" / "tiny")  # any model
    references = read_records(known / "clips.jsonl", Reference)
    beside = [replace(one, video=f"clips/{one.video}") for one in references]
    for name in ("references.jsonl", "heldout.jsonl", "events.jsonl"):
        write_records(tmp_path / name, beside)
    for name in ("videos", "votes", "home/Videos", "bin"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("try", "my_videos"):
        shutil.copytree(tmp_path / "clips", tmp_path / name)
    texts = [Caption(one.video, one.caption) for one in beside]
    write_records(tmp_path / "captions.given", texts)
    for name in ("run", "run/mrdpo"):
        write_text(tmp_path / name / "steps.jsonl", '{"step": 0, "loss": 2.0}\n{"step": 1, "loss": 1.0}\n')
        write_json(tmp_path / name / "summary.json", asdict(Rates(0.5, 0.25, 0.75, 0.125, clips=3)))
    for video in sorted((known / "videos").glob("*.mp4"))[:2]:
        shutil.copy(video, tmp_path / "home" / "Videos")
    write_benchmark_data(tmp_path)
    judge = serve(judge_or_caption)
    programs = {name: SHIM for name in FOREIGN} | {"torchrun": TORCHRUN}
    programs |= {name: FORKED.format(shlex.join(forked(BIN / name))) for name in ("python", "salmonn")}
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{BIN}:{os.environ['PATH']}", "HOME": str(tmp_path / "home"), "SMALL": SMALL,
        "CALLS": str(tmp_path / "calls"), "PYTHONPATH": str(ROOT), "OPENAI_API_KEY": "none",
        "OPENAI_BASE_URL": judge.url,
    }  # fmt: skip

    def run(script, *, timeout=900):
        for said, meant in {
            ". .venv/bin/activate": "true",  # before the next one, or the tests' own environment would be activated
            ".venv/bin/": "",
            "python -m venv .venv": "true",
            "http://localhost:8000/v1": judge.url,
            "--base-url URL": f"--base-url {judge.url}",
            "--clips 20 ": "--clips 3 ",  # which are captioned afterwards
        }.items():
            script = script.replace(said, meant)
        script = re.sub(r"tsinghua-ee/\S+", str(published_model), script)
        script = re.sub(r"--port (8000|7860)", f"--port {run.port}", script)
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip

    run.folder, run.environment, run.port = tmp_path, environment, free_port()
    return run


def judge_or_caption(request, number):
    """The script of the server at http://localhost:8000/v1: it judges captions, and makes some."""
    return (captioner() if is_about_a_clip(request) else rule_judge_script)(request, number)


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def without_those_elsewhere(script):
    """A script without the commands that other tests run."""
    lines = script.replace("\\\n", " ").splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith(tuple(ELSEWHERE)))


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=() if page == README else slow) for page in COMMANDED if page.name not in SERVERS],
    ids=lambda page: page.name,
)
def test_commands_run(stage, page):
    if "--out captions.jsonl" not in page.read_text():  # else the page makes them
        (stage.folder / "captions.given").rename(stage.folder / "captions.jsonl")
    for script in blocks(page, "bash"):
        result = stage(without_those_elsewhere(script))
        assert result.returncode == 0, f"{page.name}:\n{script}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    for script in blocks(page, "python"):
        result = python(stage, script)
        assert result.returncode == 0, f"{page.name}:\n{script}\n{result.stderr[-4000:]}"
    lines = without_those_elsewhere("\n".join(blocks(page, "bash"))).splitlines()
    for line in lines:
        if "salmonn caption" in line and "--shard" not in line:  # each share has a file of its own
            out = stage.folder / re.search(r"--out (\S+)", line)[1]
            assert read_records(out, Caption), f"{page.name}: {line}: no captions"
    calls = (stage.folder / "calls").read_text().splitlines() if (stage.folder / "calls").exists() else []
    foreign = {line.split()[0] for line in lines if line.strip()} & set(FOREIGN)
    assert foreign <= {call.split()[0] for call in calls}, "a real program was started"


def python(stage, script):
    return subprocess.run(
        forked(sys.executable, "-c", script),
        cwd=stage.folder, env=stage.environment, capture_output=True, text=True, timeout=RUN_SECONDS, check=False,
    )  # fmt: skip


def test_the_python_page(stage):
    """Its blocks build on one another."""
    result = python(stage, "\n".join(blocks(ROOT / "docs" / "python_api.md", "python")))
    assert result.returncode == 0, result.stderr
    assert "Total 0." in result.stdout and "What can be heard? -> " in result.stdout


@pytest.mark.parametrize("name", ["http_api.md", pytest.param("web_ui.md", marks=slow)])
def test_servers_start_answer_and_end(stage, name):
    page = ROOT / "docs" / name
    (script,) = blocks(page, "bash")
    log = stage.folder / "server.log"
    with log.open("w") as out:
        command = script.replace("--port 8000", f"--port {stage.port}").replace("--port 7860", f"--port {stage.port}")
        server = subprocess.Popen(
            ["bash", "-c", f"exec {command}"], cwd=stage.folder, env=stage.environment, stdout=out, stderr=out
        )
    try:
        wait_for(f"http://127.0.0.1:{stage.port}{SERVERS[name]}", server, log)
        for example in blocks(page, "python"):
            result = python(stage, example.replace("127.0.0.1:8000", f"127.0.0.1:{stage.port}"))
            assert result.returncode == 0, result.stderr
            assert len(result.stdout.split()) > 3
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=STEP_SECONDS) == 0, log.read_text()


def wait_for(address, server, log, *, seconds=600):
    end = time.monotonic() + seconds
    while True:
        assert server.poll() is None and time.monotonic() < end, log.read_text()
        with contextlib.suppress(OSError), urlopen(address, timeout=5) as answer:
            assert answer.status == 200
            return
        time.sleep(0.3)


@pytest.mark.parametrize("command", ELSEWHERE)
def test_the_others_have_tests(command):
    tool = "test_published_protocol" if "predictions" in command else Path(command.split()[1]).stem
    assert tool in (ROOT / ELSEWHERE[command]).read_text()
    assert any(command in page.read_text() for page in PAGES)


def test_the_site_is_made_without_warnings(tmp_path):
    """Strict: a link that leads nowhere, or a page that no list names, ends it."""
    result = subprocess.run(
        [str(BIN / "mkdocs"), "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, timeout=RUN_SECONDS, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    index = (tmp_path / "site" / "index.html").read_text()
    assert "fonts.googleapis" not in index and "Getting started" in index
