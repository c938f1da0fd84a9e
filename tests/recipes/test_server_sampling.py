"""mrDPO whose captions are sampled through this project's own service, which gets the adapter of each round."""

import json
from pathlib import Path

import httpx2
import pytest
import torch
from safetensors.torch import load_file

from salmonn.caption.captioner import Captioner
from salmonn.caption.engine import Engine
from salmonn.caption.generator import CaptionRequest, Sampling
from salmonn.caption.loader import ClipReader
from salmonn.files import read_records
from salmonn.records import Caption, Reference
from salmonn.serve.api import ServerConfig, Service
from salmonn.serve.fetch import FetchPolicy
from salmonn.serve.schema import ChatLimits
from salmonn.serve.sources import MediaSources
from tests.serve.running import RunningServer

FLAGS = {
    "rounds": 2, "sampling.num_samples": 4, "sampling.temperature": 0.9, "sampling.max_new_tokens": 30,
    "selection.min_gap": 0.0001, "fit.steps": 3, "fit.batch_size": 4, "fit.learning_rate": 0.01,
    "early_stopping.max_worsening": 9, "early_stopping.min_pairs": 1, "early_stopping.min_margin": "null",
    "kl.num_clips": 0, "feature_cache.folder": "null", "rebirth.fit.steps": 1, "rebirth.fit.batch_size": 4,
    "sampler.server_model": "toy", "sampler.workers": 0, "sampler.concurrency": 1,
    "sampler.allow_deaf": "true",  # 28 steps of training do not make a model that hears
}  # fmt: skip


@pytest.fixture
def server(trained_model, tmp_path):
    """A service of the start of the run, which may load adapters from a folder."""
    for name in ("adapters", "uploads"):
        (tmp_path / name).mkdir()
    settings = ServerConfig(
        name="toy",
        sources=MediaSources((), FetchPolicy()),
        limits=ChatLimits(40, max_tokens=500),
        adapter_dirs=(tmp_path / "adapters",),
    )
    with ClipReader(workers=1) as reader:
        engine = Engine(Captioner.load(trained_model / "model"), reader)
        running = RunningServer(Service(engine, settings, tmp_path / "uploads"), grace_seconds=5.0)
        yield running
        running.stop()
        engine.close(grace_seconds=0)


def sample_locally(model: Path, root: Path, references: list[Reference], *, seed: int, prompt: str) -> list[str]:
    """Sample as the service does: choice k of a clip has the clip's seed + k."""
    sampling = Sampling(temperature=0.9, top_p=0.95, max_new_tokens=30)
    requests = [
        CaptionRequest(root / reference.video, prompt, sampling, seed=seed * 1_000_003 + index + number)
        for index, reference in enumerate(references)
        for number in range(4)
    ]
    return [captions[0].text for captions in Captioner.load(model).generate(requests)]


def test_a_run_samples_through_the_service(server, launch, trained_model, sizes, tmp_path):
    """The captions of each round are those of the merged model of the round before."""
    out, model, clips_dir = tmp_path / "run", trained_model / "model", trained_model / "clips"
    flags = sizes | FLAGS | {"model": model, "clips_dir": clips_dir, "out": out}
    served = {"sampler.server": f"{server.url}/v1", "sampler.adapters_dir": tmp_path / "adapters"}
    result = launch("mrdpo", **flags | served)
    assert result.returncode == 0, result.stderr
    assert "captions are sampled by toy at" in result.stdout + result.stderr, result.stdout
    (path,) = clips_dir.glob("seed5-8/clips.jsonl")
    references = read_records(path, Reference)
    prompt = Captioner.load(model).default_prompt()
    texts = []
    for number, start in ((1, model), (2, out / "round_1" / "merged")):
        captions = read_records(out / f"round_{number}" / "captions.jsonl", Caption)
        assert [(one.video, one.sample) for one in captions] == [
            (reference.video, sample) for reference in references for sample in range(4)
        ]
        texts.append([one.text for one in captions])
        assert texts[-1] == sample_locally(start, path.parent, references, seed=number, prompt=prompt), number
        assert len(set(texts[-1])) > 8 and {one.prompt for one in captions} == {prompt}
    base = sample_locally(model, path.parent, references, seed=2, prompt=prompt)
    assert sum(one != other for one, other in zip(texts[1], base, strict=True)) > 8
    # Rebirth learns from greedy captions of the best round's model.
    best = json.loads((out / "summary.json").read_text())["best"]
    requests = [CaptionRequest(path.parent / one.video, prompt, Sampling(max_new_tokens=30)) for one in references]
    greedy = Captioner.load(out / best / "merged").generate(requests)
    captions = read_records(out / "rebirth" / "captions.jsonl", Caption)
    assert [one.text for one in captions] == [one.text for (one,) in greedy]
    # The adapters are unloaded, and the settings say where captions come from.
    assert not list((tmp_path / "adapters").iterdir())
    models = httpx2.get(f"{server.url}/v1/models", trust_env=False).json()["data"]
    assert [one["id"] for one in models] == ["toy"]
    settings = json.loads((out / "settings.json").read_text())
    assert settings["round_2/captions"]["sampler.server_model"] == "toy"
    # Captions of a server are not continued by the local model.
    result = launch("mrdpo", **{name: value for name, value in flags.items() if not name.startswith("sampler")})
    assert result.returncode != 0 and "sampler.server_model toy (now null)" in result.stderr


@pytest.fixture
def sharded_flags(server, trained_model, sizes, tmp_path) -> dict[str, object]:
    """Flags of a run whose policy is trained by two processes with FSDP2 while the server samples."""
    return sizes | FLAGS | {
        "model": trained_model / "model", "clips_dir": trained_model / "clips", "strategy": "fsdp2", "rebirth": "null",
        "feature_cache.folder": tmp_path / "features",
        "sampler.server": f"{server.url}/v1", "sampler.adapters_dir": tmp_path / "adapters",
    }  # fmt: skip


def test_a_model_that_fits_on_no_gpu_is_trained_in_one_command(sharded_flags, launch, trained_model, tmp_path):
    """Two processes that load parts of the weights train and merge one round, and the server captions for them."""
    out, few = tmp_path / "run", {"rounds": 1, "fit.steps": 1, "sampling.num_samples": 2, "load_sharded": "true"}
    result = launch("mrdpo", processes=2, **sharded_flags | few | {"out": out})
    assert result.returncode == 0, result.stderr
    start, merged, adapter = (
        load_file(path)
        for path in (
            trained_model / "model" / "model.safetensors",
            out / "round_1" / "merged" / "model.safetensors",
            out / "round_1" / "adapter" / "adapter_model.safetensors",
        )
    )
    changed = {name for name in start if not torch.equal(start[name], merged[name])}
    assert len(changed) == len(adapter) / 2 == 18 and all("self_attn" in name for name in changed)
    for stage in ("sft", "round_1"):
        rates = json.loads((out / stage / "heldout" / "rates.json").read_text())
        assert rates["qa_accuracy"] is None and rates["clips"] == 3
    assert len(json.loads((out / "summary.json").read_text())["rounds"]) == 1


@pytest.mark.slow
def test_sharded_rounds_equal_those_of_whole_models(sharded_flags, launch, tmp_path):
    """Two processes that load parts of the weights merge the same model as two that load all of them."""
    for name in ("false", "true"):
        result = launch("mrdpo", processes=2, **sharded_flags | {"load_sharded": name, "out": tmp_path / name})
        assert result.returncode == 0, result.stderr
    for number in (1, 2):
        whole, parts = (tmp_path / name / f"round_{number}" for name in ("false", "true"))
        captions = [read_records(one / "captions.jsonl", Caption) for one in (whole, parts)]
        texts = [[(one.video, one.sample, one.text) for one in of_run] for of_run in captions]
        assert texts[0] == texts[1] and len(texts[0]) > 8
        expected, found = (load_file(one / "merged" / "model.safetensors") for one in (whole, parts))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        rates = json.loads((parts / "heldout" / "rates.json").read_text())
        assert rates["qa_accuracy"] is None and rates["clips"] > 0
    summary = json.loads((tmp_path / "true" / "summary.json").read_text())
    assert len(summary["rounds"]) == 2
