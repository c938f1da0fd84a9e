"""What vLLM is given, and what is refused before anything is loaded; test_real_vllm_captioner.py runs vLLM itself."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from salmonn.caption import vllm_export
from salmonn.caption.captioner import Captioner
from salmonn.caption.generator import CaptionRequest
from salmonn.caption.prompt import Prompt
from salmonn.caption.vllm_export import LM, TOWERS, split_model
from salmonn.caption.vllm_prompt import to_vllm_prompt
from salmonn.cli import vllm_options
from salmonn.model.families.base import TURN_START
from tests.omni_models import make_qwen2_5_omni


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_export, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.mark.parametrize("name", ["random_model", "random_plus"])
def test_towers_alone_encode_as_the_whole_model(name, request, cache, videos):
    model = request.getfixturevalue(name)
    folder = split_model(model, dtype="float32")
    whole, towers = Captioner.load(model), Captioner.load(folder / TOWERS)
    (expected,), (found,) = (one.encode([one._read(CaptionRequest(videos[0]))]) for one in (whole, towers))
    assert torch.equal(found.tokens, expected.tokens)
    assert not len(towers.network.lm.get_decoder().layers)
    with safe_open(folder / TOWERS / "model.safetensors", framework="pt") as saved:
        assert not any("layers" in key or "lm_head" in key for key in saved.keys() if key.startswith("lm."))  # noqa: SIM118
    prompts = [to_vllm_prompt(one, Prompt("Tell."), found) for one in (whole, towers)]
    assert prompts[0]["prompt_token_ids"] == prompts[1]["prompt_token_ids"]


def test_a_model_is_split_once(random_model, cache, tmp_path, monkeypatch):
    model = tmp_path / "model"
    shutil.copytree(random_model, model)
    write = vllm_export.write_language_model

    def fail(captioner, folder):
        write(captioner, folder)
        raise OSError("no space left on device")

    monkeypatch.setattr(vllm_export, "write_language_model", fail)
    with pytest.raises(OSError, match="no space"):
        split_model(model, dtype="float32")
    assert not [path for path in cache.rglob("*") if path.name == "config.json"]
    monkeypatch.setattr(vllm_export, "write_language_model", write)
    (lock,) = cache.glob("*.lock")
    left = lock.with_suffix(".half") / ".killed.tmp"
    left.mkdir(parents=True, exist_ok=True)
    folder = split_model(model, dtype="float32")
    assert {path.name for path in folder.iterdir()} == {LM, TOWERS} and set(cache.iterdir()) == {folder, lock}
    monkeypatch.setattr(vllm_export, "write_language_model", fail)
    assert split_model(model, dtype="float32") == folder
    for dtype, config in (("bfloat16", {}), ("float32", {"max_new_tokens": 7})):  # another type, another model
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        with pytest.raises(OSError, match="no space"):
            split_model(model, dtype=dtype)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"vLLM needs a copy of the model \(0.0 GB\).*has 0.0 GB left"):
        split_model(model, dtype="float32")


def test_other_families_are_refused(tmp_path, cache):
    make_qwen2_5_omni(tmp_path / "omni", texts=["a red circle"])
    with pytest.raises(ValueError, match=r"is a qwen2\.5-omni model; only video-SALMONN 2 and 2"):
        split_model(tmp_path / "omni", dtype="float32")
    assert not cache.exists()


def test_a_penalty_for_the_answer_alone_does_not_count_the_prompt(captioner, videos):
    """vLLM counts the ids of the prompt: all of them are the token that never occurs in an answer."""
    (clip,) = captioner.encode([captioner._read(CaptionRequest(videos[0]))])
    plain = to_vllm_prompt(captioner, Prompt("Tell."), clip)
    penalized = to_vllm_prompt(captioner, Prompt("Tell."), clip, is_penalized=True)
    turn_start = captioner.processor.tokenizer.convert_tokens_to_ids(TURN_START)
    ids, fields = plain["prompt_token_ids"], plain["multi_modal_data"]["video"]
    start = int(fields["clip_start"])
    assert ids[start : start + len(clip)] == [turn_start] * len(clip)
    assert penalized["prompt_token_ids"] == [turn_start] * len(ids)
    whole = penalized["multi_modal_data"]["video"]
    assert int(whole["clip_start"]) == 0 and torch.equal(whole["prompt_positions"], fields["prompt_positions"])
    embedded = captioner.network.lm.get_input_embeddings()(torch.tensor(ids))
    embedded[start : start + len(clip)] = clip.tokens
    assert torch.equal(whole["clip_tokens"][0], embedded)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format", "events"], "--format events needs the local engine"),
        (["--bits", "4"], "--bits has no effect with --engine vllm"),
        (["--device-map", "auto"], "--device-map has no effect"),
        (["--ray-actors", "2"], "--ray-actors has no effect"),
        (["--vllm-args", '{"dtype": "float16"}'], "--vllm-args has dtype, which --dtype sets"),
        (["--engine", "local", "--vllm-args", "{}"], "--vllm-args needs --engine vllm"),
        (["--server", "http://localhost:1/v1", "--server-model", "m"], "--engine is for local models"),
    ],
)
def test_flags_that_are_refused(call, videos, tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr(vllm_options, "find_spec", lambda name: True)
    code, _, err = call("caption", videos[0], "--out", tmp_path / "out.jsonl", "--engine", "vllm", *flags)
    assert code == 2 and message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_vllm_is_not_installed(call, videos, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_options, "find_spec", lambda name: None)
    code, _, err = call("caption", videos[0], "--out", tmp_path / "out.jsonl", "--engine", "vllm")
    assert code == 2 and "in a separate environment, with pip install 'salmonn[vllm]' in it" in err
    assert not list(tmp_path.iterdir())
