"""Sampling through a scripted server that has vLLM's routes: what it is sent, and what its faults do."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from salmonn.caption import hearing, server_connection
from salmonn.caption.captioner import Captioner
from salmonn.caption.hearing import write_probe_clips
from salmonn.caption.processor import Processor
from salmonn.caption.server_adapters import AdapterLoader
from salmonn.files import read_json, read_records
from salmonn.media.clip import read_clip
from salmonn.model.loading import load_config
from salmonn.model.lora import LoraConfig, attach_lora, save_adapter
from salmonn.records import Caption
from salmonn.score.chat_client import ChatClient, LLMStoppedError
from salmonn.score.config import LLMConfig
from salmonn.train import server_sampling
from salmonn.train.sampling import SampleConfig
from salmonn.train.server_sampling import SamplerConfig, ServerSampler
from tests.caption.served_model import content_of, describe, images_of, sound_of
from tests.launch import forked
from tests.limits import RUN_SECONDS
from tests.omni_models import make_qwen2_5_omni
from tests.score.completions import FakeClock, use_fake_clock
from tests.score.fake_llm_server import Answer, FakeLLMServer

LORA = LoraConfig(rank=2, alpha=8)
SAMPLING = SampleConfig(temperature=0.9, top_p=0.8, num_samples=4, temperatures=(1.0, 0.5), max_new_tokens=20)
NOT_FOUND = Answer(body=b'{"detail":"Not Found"}', status=404)


@pytest.fixture(autouse=True)
def clock(monkeypatch) -> FakeClock:
    """Let retries take no real time."""
    return use_fake_clock(monkeypatch)


@pytest.fixture(scope="module")
def probe_clips(tmp_path_factory) -> tuple[Path, Path]:
    return write_probe_clips(tmp_path_factory.mktemp("probe"))


@pytest.fixture(autouse=True)
def rendered_once(probe_clips, monkeypatch) -> None:
    """Render the clips of the probes once."""
    for module in (hearing, server_connection, server_sampling):
        monkeypatch.setattr(module, "write_probe_clips", lambda folder: probe_clips)


@pytest.fixture(scope="module")
def omni(tmp_path_factory) -> Path:
    """A small Qwen2.5-Omni in the published layout."""
    return make_qwen2_5_omni(tmp_path_factory.mktemp("omni") / "model").folder


@pytest.fixture(scope="module")
def rounds(omni, tmp_path_factory) -> list[Path]:
    """The adapters of two rounds."""
    folders = []
    for number in (1, 2):
        network = Captioner.load(omni).network
        attach_lora(network, LORA, seed=number)
        with torch.random.fork_rng(), torch.no_grad():
            for name, parameter in network.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        folders.append(tmp_path_factory.mktemp("run") / f"round_{number}" / "adapter")
        save_adapter(network, folders[-1])
    return folders


class VLLM:
    """Script of a server that runs a model and its adapters, and looks at what it loads.

    Args:
        max_rank: value of --max-lora-rank.
        ignores_adapters: whether its answers are those without an adapter.
    """

    def __init__(self, *, max_rank: int = 512, ignores_adapters: bool = False) -> None:
        self.loaded: dict[str, dict[str, torch.Tensor]] = {}
        self.history: list[str] = []
        self.max_rank, self.ignores_adapters = max_rank, ignores_adapters

    def __call__(self, request: dict[str, Any], number: int) -> Answer:
        if "lora_path" in request:
            return self.load(request["lora_name"], Path(request["lora_path"]))
        if "lora_name" in request:
            self.history.append(f"unload {request['lora_name']}")
            found = self.loaded.pop(request["lora_name"], None)
            return Answer(body=b"Success") if found else Answer("cannot be found", status=404)
        name = request["model"]
        if name not in ("m", *self.loaded):
            return Answer(f"The model {name} does not exist.", status=404)
        text = describe(request) + ("" if self.ignores_adapters or name == "m" else " adapted")
        choices = [
            {"index": k, "message": {"content": f"{text} {request.get('seed', 0) + k}"}, "finish_reason": "stop"}
            for k in range(request.get("n", 1))
        ]
        return Answer(body=json.dumps({"choices": choices, "model": name}).encode())

    def load(self, name: str, folder: Path) -> Answer:
        self.history.append(f"load {name}")
        if name in self.loaded:
            return Answer(f"The lora adapter '{name}' has already been loaded.", status=400)
        rank = json.loads((folder / "adapter_config.json").read_text())["r"]
        if rank > self.max_rank:
            words = f"LoRA rank {rank} is greater than max_lora_rank {self.max_rank}."  # as vLLM 0.32.0 really answers
            return Answer(f"Call to add_lora method failed: Worker failed with error '{words}', please", status=500)
        self.loaded[name] = load_file(folder / "adapter_model.safetensors")
        return Answer(body=f"Success: LoRA adapter '{name}' added successfully.".encode())


def sampler_of(server: FakeLLMServer, model: Path, out: Path, **options) -> ServerSampler:
    return sampler_at(server.url, model, out, **options)


def sampler_at(url: str, model: Path, out: Path, *, max_adapters: int = 2, **options) -> ServerSampler:
    config = SamplerConfig(url, "m", workers=0, **options)
    processor = Processor.load(model, config=load_config(model))
    return ServerSampler(config, processor, model=str(model), lora=LORA, max_adapters=max_adapters, out=out)


def test_captions_of_a_round(serve, omni, rounds, clips, tmp_path):
    """The frames are those of local training, and the adapter is the sum of the rounds under the published names."""
    script = VLLM()
    server = serve(script)
    model = tmp_path / "model"
    shutil.copytree(omni, model)
    (model / "generation_config.json").write_text('{"repetition_penalty": 1.05}')
    sampler = sampler_of(server, model, tmp_path)
    sampler.connect()
    number, (test, unload) = len(server.requests), script.history
    assert re.fullmatch(rf"load {tmp_path.name}-[0-9a-f]{{8}}-test", test) and unload == f"un{test}"
    captions = sampler.sample(rounds, clips, SAMPLING, name="round_3", seed=7, folder=tmp_path / "round_3")
    assert not list((tmp_path / "adapters").iterdir()) and not (tmp_path / "round_3" / "captions.parts").exists()
    assert captions == read_records(tmp_path / "round_3" / "captions.jsonl", Caption)
    _, _, load, unload = script.history
    name = load.removeprefix("load ")
    assert load.startswith(test.removesuffix("test") + "round_2-") and unload == f"unload {name}" and not script.loaded
    chats = [request for request in server.requests[number:] if "messages" in request]
    assert len(chats) == 10 and {chat["model"] for chat in chats} == {name}
    processor, images = Captioner.load(omni).processor, [np.stack(images_of(chat)) for chat in chats]
    for index, reference in enumerate(clips.references):
        clip = read_clip(clips.root / reference.video, processor.family.frame_sampler)
        mine = [chat for chat, frames in zip(chats, images, strict=True) if np.array_equal(frames, clip.frames)]
        mine.sort(key=lambda chat: -chat["temperature"])
        assert [chat["temperature"] for chat in mine] == [1.0, 0.5], index
        assert np.abs(sound_of(mine[0]) - clip.waveform).max() < 1 / 32767
        seeds = [(7 * 1_000_003 + index + share * 15_485_863) % (1 << 31) for share in range(2)]
        names = ("seed", "n", "top_p", "max_tokens", "repetition_penalty")
        assert [tuple(chat[name] for name in names) for chat in mine] == [(seed, 2, 0.8, 20, 1.05) for seed in seeds]
        assert mine[0]["messages"][0] == {"role": "system", "content": processor.config.system_prompt}
        prompt = processor.config.default_prompt("both")
        assert content_of(mine[0])[-1] == {"type": "text", "text": prompt}
        expected = [(seed, 2 * share + k) for share, seed in enumerate(seeds) for k in range(2)]
        assert [(one.video, one.sample, one.prompt, one.model) for one in captions[4 * index : 4 * index + 4]] == [
            (reference.video, sample, prompt, name) for _, sample in expected
        ]
        assert [one.text.rsplit(" ", 1)[1] for one in captions[4 * index : 4 * index + 4]] == [
            str(seed + sample % 2) for seed, sample in expected
        ]


def test_the_names_and_the_sum_of_the_adapters(serve, omni, rounds, clips, tmp_path):
    script, seen = VLLM(), {}
    real = script.load

    def load(name: str, folder: Path) -> Answer:
        answer = real(name, folder)
        seen[name] = (script.loaded[name], json.loads((folder / "adapter_config.json").read_text()))
        return answer

    script.load = load
    sampler = sampler_of(serve(script), omni, tmp_path)
    one = replace(clips, references=clips.references[:1])
    sampler.sample(rounds, one, SAMPLING, name="round_3", seed=7, folder=tmp_path / "round_3")
    (random, config), (stacked, _) = seen.values()
    assert random.keys() == stacked.keys() and (config["r"], config["lora_alpha"]) == (4, 4)
    assert {name.removesuffix(".weight").rpartition(".")[2] for name in random} == {"lora_A", "lora_B"}
    ours = [load_file(folder / "adapter_model.safetensors") for folder in rounds]
    start = "base_model.model.thinker.model.layers."
    names = [name for name in stacked if "lora_A" in name]
    assert len(names) == 9 and all(name.startswith(start) for name in names)
    for name in names:
        key = name.replace(start, "base_model.model.model.layers.")
        product = stacked[name.replace("lora_A", "lora_B")] @ stacked[name]
        total = sum(4.0 * one[key.replace("lora_A", "lora_B")] @ one[key] for one in ours)
        assert torch.allclose(product, total, atol=1e-6) and total.abs().max() > 0.01, name


def test_a_stopped_run_resumes(serve, omni, rounds, clips, tmp_path, caplog):
    """Captions of finished clips are kept; those in flight when it stops are asked for again."""
    script, chats = VLLM(), []
    state = {"limit": 3}

    def scripted(request: dict[str, Any], number: int) -> Answer:
        if "messages" in request and "seed" in request:
            if len(chats) >= state["limit"]:
                return Answer("no such key", status=401)
            chats.append(request["seed"])
        return script(request, number)

    server, sampling = serve(scripted), replace(SAMPLING, temperatures=None, num_samples=2)

    def sample(**options):
        sampler = sampler_of(server, omni, tmp_path, concurrency=1, server_frame_format="jpeg", **options)
        return sampler.sample(rounds[:1], clips, sampling, name="round_2", seed=1, folder=tmp_path / "round_2")

    with pytest.raises(LLMStoppedError, match="API key"):
        sample()
    assert len(list((tmp_path / "round_2" / "captions.parts").glob("clip_*"))) == 3
    request = read_json(tmp_path / "round_2" / "captions.parts" / "request.json")
    assert (request["input"], request["frame_format"], request["parameters"]) == ("frames", "jpeg", None)
    # The adapter is unloaded and deleted.
    load, unload = script.history[-2:]
    name = load.removeprefix("load ")
    assert unload == f"unload {name}" and not script.loaded and not list((tmp_path / "adapters").iterdir())
    # One that is still loaded, as after a kill, is loaded again, and its files are deleted.
    script.loaded[name] = {}
    leftover = tmp_path / "adapters" / f".{name.rpartition('-round_')[0]}.tmp"
    leftover.mkdir()
    state["limit"] = 100
    captions = sample()
    assert len(captions) == 10 and len(chats) == len(set(chats)) == 5
    assert script.history[-4:] == [f"load {name}", f"unload {name}", f"load {name}", f"unload {name}"]
    assert not caplog.records or "other clips" not in caplog.text
    assert not list((tmp_path / "adapters").iterdir())
    # Complete captions need no server.
    server.close()
    assert sample() == captions


SCRIPT = """
import sys
from pathlib import Path

from salmonn import dist
from salmonn.files import read_records
from salmonn.records import Reference
from salmonn.train.data import ClipSet
from tests.train.test_server_sampling import SAMPLING, sampler_at

url, model, root, out, *rounds = sys.argv[1:]
dist.setup()
clips = ClipSet(read_records(Path(root) / "clips.jsonl", Reference), Path(root)).head(3)
sampler = sampler_at(url, Path(model), Path(out), concurrency=5)
sampler.sample([Path(one) for one in rounds], clips, SAMPLING, name="round_3", seed=7, folder=Path(out) / "round_3")
"""


def test_two_processes_share_the_clips(serve, omni, rounds, clips, tmp_path):
    script = VLLM()
    server = serve(script)
    (tmp_path / "script.py").write_text(SCRIPT)
    launcher = Path(sys.executable).with_name("torchrun")
    arguments = [tmp_path / "script.py", server.url, omni, clips.root, tmp_path / "two", *rounds]
    result = subprocess.run(
        forked(launcher, "--standalone", "--nproc_per_node=2", *arguments),
        capture_output=True, text=True, timeout=RUN_SECONDS, check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert [line.partition(" ")[0] for line in script.history] == ["load", "unload"] * 2  # by one process
    sampler = sampler_at(server.url, omni, tmp_path / "one")
    few = clips.head(3)
    expected = sampler.sample(rounds, few, SAMPLING, name="round_3", seed=7, folder=tmp_path / "one" / "round_3")
    found = read_records(tmp_path / "two" / "round_3" / "captions.jsonl", Caption)
    assert [replace(one, model="") for one in found] == [replace(one, model="") for one in expected]


def test_a_clip_that_the_server_rejects(serve, omni, clips, tmp_path):
    script = VLLM()
    long = describe_of(clips, omni)

    def scripted(request: dict[str, Any], number: int) -> Answer:
        if "seed" in request and describe(request) == long:
            return Answer("maximum context length is 2048 tokens", status=400)
        return script(request, number)

    sampler = sampler_of(serve(scripted), omni, tmp_path, max_adapters=0, server_frame_format="jpeg")
    with pytest.raises(ValueError, match=r"does not caption 1 of 5 clips, first .*mp4: .*context length.* are kept"):
        sampler.sample([], clips, SAMPLING, name="round_1", seed=1, folder=tmp_path / "round_1")
    assert len(list((tmp_path / "round_1" / "captions.parts").glob("clip_*"))) == 4


def describe_of(clips, model: Path) -> str:
    """Return what the scripted server says about the second clip."""
    sampler = Captioner.load(model).processor.family.frame_sampler
    clip = read_clip(clips.root / clips.references[1].video, sampler)
    pcm = (np.clip(clip.waveform, -1, 1) * 32767).round().astype("<i2") / 32767
    return f"{len(clip.frames)} frames, 0 files, sound {pcm.std():.3f}"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (NOT_FOUND, "does not load adapters while it runs .*VLLM_ALLOW_RUNTIME_LORA_UPDATING=True.*--lora-dirs"),
        (Answer("LoRA rank 48 is greater than max_lora_rank 16.", status=400), "rank 48: .*--max-lora-rank 64"),
        (Answer("No adapter found for /a/b", status=404), "cannot read the adapter in .*adapters_dir"),
        (Answer("lora_path must be below a folder of --lora-dirs", status=403), "cannot read the adapter in"),
        (Answer("LoRA is not enabled. Use --enable-lora", status=400), "does not take adapters: .*--enable-lora"),
        (Answer("expected target modules in ['qkv']", status=400), "does not load the adapter in .*target modules"),
        (Answer("busy", status=503), "is unavailable: .*busy"),
        (Answer("no", status=401), "API key"),
    ],
)
def test_faults_of_the_load_route(serve, tmp_path, answer, message):
    server = serve(lambda request, number: answer)
    client = ChatClient(LLMConfig(model="m", base_url=server.url, retry_seconds=5), saved="")
    with pytest.raises(ValueError, match=message):
        AdapterLoader(client).load("a", tmp_path, rank=48)


def test_a_busy_server_loads_in_the_end_and_sglang_elsewhere(serve, tmp_path):
    answers = [Answer("busy", status=503), NOT_FOUND, Answer(body=b'{"success": true}'), Answer(body=b"{}")]
    server = serve(lambda request, number: answers[number])
    loader = AdapterLoader(ChatClient(LLMConfig(model="m", base_url=server.url), saved=""))
    assert loader.load("a", tmp_path, rank=8) == "m:a" and loader.is_sglang
    loader.unload("a")
    assert server.paths == [
        "/v1/load_lora_adapter", "/v1/load_lora_adapter", "/load_lora_adapter", "/unload_lora_adapter",
    ]  # fmt: skip
    assert server.requests[2] == {"lora_name": "a", "lora_path": str(tmp_path)}


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        (VLLM(ignores_adapters=True), {}, "gives the same answer with and without an adapter .*ignores the adapter"),
        (VLLM(max_rank=8), {"max_adapters": 5}, "rank 10: .*LoRA rank 10 is greater .*--max-lora-rank 16"),
        (VLLM(max_rank=1000), {"max_adapters": 300}, r"adapter of rank 600.*--max-lora-rank is at most 512"),
    ],
)
def test_a_server_that_will_not_do_is_found_at_the_start(serve, omni, tmp_path, script, options, message):
    with pytest.raises(ValueError, match=message):
        sampler_of(serve(script), omni, tmp_path, **options).connect()
    assert not script.loaded and not list((tmp_path / "adapters").iterdir())


def test_runs_of_the_same_name_share_a_server(serve, omni, tmp_path):
    script = VLLM()
    server = serve(script)
    for parent in ("a", "b"):
        sampler_of(server, omni, tmp_path / parent / "run", adapters_dir=tmp_path / "adapters").connect()
    first, _, second, _ = script.history
    assert first.startswith("load run-") and second.startswith("load run-") and first != second


def test_a_deaf_server_and_unknown_names(serve, omni, random_model, tmp_path):
    def deaf(request: dict[str, Any], number: int) -> Answer:
        return Answer("A video.")

    with pytest.raises(ValueError, match=r"does not hear.*--sampler\.allow-deaf") as error:
        sampler_of(serve(deaf), omni, tmp_path, max_adapters=0).connect()
    assert "modality" not in str(error.value)
    sampler_of(serve(deaf), omni, tmp_path, max_adapters=0, allow_deaf=True).connect()
    with pytest.raises(ValueError, match=r"names that the weights of .* as --sampler\.base"):
        sampler_of(serve(VLLM()), random_model, tmp_path).connect()


def test_settings_that_have_no_effect():
    with pytest.raises(ValueError, match=r"sampler\.base has no effect without sampler\.server"):
        SamplerConfig(base="a/b")
    with pytest.raises(ValueError, match=r"pass --sampler\.server-model"):
        SamplerConfig("http://localhost:8000/v1")
    with pytest.raises(ValueError, match=r"set frames, such as --frames\.max-pixels"):
        SamplerConfig("http://localhost:8000/v1", "m", server_max_pixels=10_000)
    config = SamplerConfig("http://localhost:8000/v1", "m", concurrency=9, max_requests=5)
    assert (config.share(4).concurrency, config.share(4).max_requests) == (2, 1)
    with pytest.raises(ValueError, match=r"8 processes cannot share sampler\.max_requests 5"):
        config.share(8)
