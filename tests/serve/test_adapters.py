"""Adapters that are loaded while the server runs: their captions, and what the routes refuse."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx2
import pytest
import torch
from safetensors.torch import load_file, save_file

from salmonn.caption.captioner import Captioner
from salmonn.caption.engine import Engine
from salmonn.caption.generator import CaptionRequest, Sampling
from salmonn.caption.loader import ClipReader
from salmonn.caption.server_connection import connect_captioner
from salmonn.caption.server_options import ServerOptions
from salmonn.model.adapters import Adapter, MergedAdapter, StackedAdapter, read_adapter, stack_adapters
from salmonn.model.loading import load_network
from salmonn.model.lora import LoraConfig, attach_lora, merge_in_float32, save_adapter
from salmonn.serve.adapters import MAX_ADAPTERS
from tests.limits import wait_until
from tests.serve.running import GatedCaptioner

SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=12)


@pytest.fixture(scope="module")
def adapters(random_model, tmp_path_factory):
    """Folder of the adapters of three rounds, `sum` of the first two, and `other` for another model."""
    folder = tmp_path_factory.mktemp("adapters")
    for number in range(1, 4):
        network = Captioner.load(random_model).network
        attach_lora(network, LoraConfig(rank=2 + number, alpha=8), seed=number)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(number)
            for name, parameter in network.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
        save_adapter(network, folder / f"round_{number}")
    assert stack_adapters([folder / "round_1", folder / "round_2"], folder / "sum") == StackedAdapter(rank=7)
    return folder


def load_merged(model, *folders) -> Captioner:
    captioner = Captioner.load(model)
    merge_in_float32(captioner.network, folders)
    return captioner


def texts(generator, requests) -> list[str]:
    return [caption.text for captions in generator.generate(requests) for caption in captions]


@torch.no_grad()
def test_a_stacked_adapter_is_the_sum_of_the_rounds(random_model, adapters):
    """And the weights are exactly those of the base again after it."""
    expected = load_merged(random_model, adapters / "round_1", adapters / "round_2").network
    network, plain = Captioner.load(random_model).network, Captioner.load(random_model).network
    weights = MergedAdapter(network)
    weights.use(read_adapter(adapters / "round_3", network))
    weights.use(read_adapter(adapters / "sum", network))
    for name, value in network.lm.named_parameters():
        assert torch.allclose(value, expected.lm.get_parameter(name), atol=1e-5), name
    by_peft = load_network(random_model, adapter=adapters / "sum").lm
    assert all(
        torch.allclose(value, expected.lm.get_parameter(name), atol=1e-5) for name, value in by_peft.named_parameters()
    )
    q_proj = "model.layers.0.self_attn.q_proj.weight"
    assert (network.lm.get_parameter(q_proj) - plain.lm.get_parameter(q_proj)).abs().max() > 0.1
    weights.use(None)
    assert all(torch.equal(value, plain.lm.get_parameter(name)) for name, value in network.lm.named_parameters())


def test_an_adapter_that_cannot_be_merged_leaves_the_base(random_model, adapters):
    """A failure in the middle, such as too little memory, undoes what has been merged."""
    network, plain = Captioner.load(random_model).network, Captioner.load(random_model).network
    weights, good = MergedAdapter(network), read_adapter(adapters / "sum", network)
    *names, last = good.factors
    one = good.factors[last]
    bad = Adapter({name: good.factors[name] for name in names} | {last: replace(one, a=one.a[1:])})
    for before in (None, good):
        weights.use(before)
        with pytest.raises(RuntimeError, match="shape"):
            weights.use(bad)
        assert weights.current is None
        for name, value in network.lm.named_parameters():
            assert torch.equal(value, plain.lm.get_parameter(name)), name


def test_a_sum_of_too_large_a_rank_is_approximated(random_model, adapters, tmp_path):
    """By the largest singular values: no matrix of this rank is closer."""
    rounds = [adapters / "round_1", adapters / "round_2"]
    assert stack_adapters(rounds, tmp_path / "exact", max_rank=7) == StackedAdapter(rank=7)
    stacked = stack_adapters(rounds, tmp_path / "approximated", max_rank=4)
    network = Captioner.load(random_model).network
    exact, near = (read_adapter(tmp_path / name, network).factors for name in ("exact", "approximated"))
    lost = total = 0.0
    for name, factors in exact.items():
        product, device = factors.product(torch.device("cpu")), torch.device("cpu")
        values = torch.linalg.svdvals(product)
        difference = product - near[name].product(device)
        assert torch.allclose(difference.norm(), values[4:].norm(), rtol=1e-3), name
        lost, total = lost + difference.square().sum().item(), total + product.square().sum().item()
    assert stacked.rank == 4 and stacked.error == pytest.approx((lost / total) ** 0.5, rel=1e-3) and stacked.error > 0.1


def test_requests_with_and_without_adapters(start, random_model, adapters, videos):
    """Each is answered by its own weights, however they arrive."""
    model = GatedCaptioner(Captioner.load(random_model))
    with ClipReader(workers=1) as reader:
        engine = Engine(model, reader)
        server = start(engine, adapter_dirs=(adapters,))
        try:
            for name in ("sum", "round_3"):
                answer = post(server, "load", lora_name=name, lora_path=str(adapters / name))
                assert (answer.status_code, answer.text) == (
                    200, f"Success: LoRA adapter '{name}' added successfully.",
                )  # fmt: skip
            requests = [CaptionRequest(video, sampling=SAMPLING, seed=seed) for seed, video in enumerate(videos[:3])]
            clients = {
                name: connect_captioner(ServerOptions(f"{server.url}/v1", name)) for name in ("toy", "sum", "round_3")
            }
            model.gate.clear()  # all requests are in the queue before the first is answered
            with ThreadPoolExecutor(3) as pool:
                served = {name: pool.submit(texts, client, requests) for name, client in clients.items()}
                wait_until(lambda: engine.num_active >= 5)
                model.gate.set()
            folders = {"toy": (), "sum": ("round_1", "round_2"), "round_3": ("round_3",)}
            for name, captions in served.items():
                local = load_merged(random_model, *(adapters / one for one in folders[name]))
                assert captions.result() == texts(local, requests), name
            assert len({tuple(captions.result()) for captions in served.values()}) == 3
            (one,) = clients["sum"].generate([replace(requests[0], prompt="What?")])
            assert one[0].model == "sum"
        finally:
            engine.close(grace_seconds=0)


def post(server, what, **body):
    return httpx2.post(f"{server.url}/v1/{what}_lora_adapter", json=body, trust_env=False)


def test_what_is_refused(start, adapters, tmp_path, random_plus):
    def refusal(what="load", name="a", path=adapters / "sum") -> tuple[int, str]:
        body = {"lora_name": name} | ({"lora_path": str(path)} if what == "load" else {})
        answer = post(server, what, **body)
        return answer.status_code, answer.json()["error"]["message"]

    folder = tmp_path / "adapters"
    shutil.copytree(adapters / "sum", folder / "good")
    for name, changes in {"dora": {"use_dora": True}, "broken": {}, "rank_0": {"r": 0}, "text": {"r": "8"}}.items():
        shutil.copytree(folder / "good", folder / name)
        path = folder / name / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    (folder / "broken" / "adapter_model.safetensors").write_bytes(b"no tensors")
    for name in ("list", "ranks", "scalar"):
        shutil.copytree(folder / "good", folder / name)
    (folder / "list" / "adapter_config.json").write_text("[]")
    tensors = load_file(folder / "good" / "adapter_model.safetensors")
    key = min(tensors).replace("lora_B", "lora_A")
    for name, tensor in {"ranks": tensors[key][1:], "scalar": torch.tensor(1.0)}.items():
        save_file(tensors | {key: tensor}, folder / name / "adapter_model.safetensors")
    (folder / "link").symlink_to(adapters)
    network = Captioner.load(random_plus).network
    attach_lora(network, LoraConfig(), seed=0)
    save_adapter(network, folder / "other")
    server = start(adapter_dirs=(folder,))
    assert refusal(name="toy", path=folder / "good") == (400, "the LoRA adapter 'toy' has already been loaded")
    for path in (adapters / "sum", folder / "link" / "sum", folder / ".." / ".."):
        assert refusal(path=path)[0] == 403
    assert refusal(path=folder / "none") == (404, f"No adapter found for {folder / 'none'}")
    assert "uses use_dora; only plain LoRA" in refusal(path=folder / "dora")[1]
    for name in ("broken", "rank_0", "text", "list", "ranks", "scalar"):
        status, message = refusal(path=folder / name)
        assert status == 400 and message.startswith("the adapter cannot be read: "), name
    assert "belongs to another model: model.language_model.layers.0" in refusal(path=folder / "other")[1]
    assert refusal("unload", "a") == (404, "the LoRA adapter 'a' cannot be found")
    for number in range(MAX_ADAPTERS):
        assert post(server, "load", lora_name=f"a{number}", lora_path=str(folder / "good")).status_code == 200
    assert refusal(path=folder / "good")[1].startswith(f"{MAX_ADAPTERS} adapters are loaded")
    models = httpx2.get(f"{server.url}/v1/models", trust_env=False).json()["data"]
    assert [(model["id"], model.get("parent")) for model in models[:2]] == [("toy", None), ("a0", "toy")]
    assert refusal(name="a1", path=folder / "good")[1] == "the LoRA adapter 'a1' has already been loaded"
    assert post(server, "unload", lora_name="a1").text == "Success: LoRA adapter 'a1' removed successfully."
    assert httpx2.get(f"{server.url}/v1/models/a1", trust_env=False).status_code == 404


def test_the_routes_are_off_by_default(start, adapters):
    assert post(start(), "load", lora_name="a", lora_path=str(adapters / "sum")).status_code == 404
