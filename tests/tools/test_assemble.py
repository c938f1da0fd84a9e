"""An assembled video-SALMONN 2+ computes the same as the models from which it was assembled."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2Tokenizer,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from salmonn.caption.captioner import Captioner
from salmonn.caption.generator import Sampling
from salmonn.caption.prompt import train_tokenizer
from salmonn.media.clip import Clip
from salmonn.model.families.base import AUDIO_PAD, CHAT_TEMPLATE, CLIP_END, CLIP_START, TURN_END, VIDEO_PAD
from salmonn.model.loading import Placement, load_network
from tests.completions import complete

TOOL = Path(__file__).parents[2] / "tools" / "assemble.py"
SPECIAL = ["<|im_start|>", TURN_END, CLIP_START, CLIP_END, "<|image_pad|>", VIDEO_PAD]
QFORMER = dict(qformer_hidden=24, qformer_layers=2, qformer_heads=3)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Return a tokenizer with the class and special tokens of Qwen2.5-VL's, none of them for audio."""
    trained = json.loads(train_tokenizer(["a red circle appears"] * 9, vocab_size=290).backend_tokenizer.to_str())
    vocab = [word for word in trained["model"]["vocab"] if not word.startswith("<|")]
    tokenizer = Qwen2Tokenizer(
        vocab={word: number for number, word in enumerate(vocab)},
        merges=[tuple(merge) for merge in trained["model"]["merges"]],
        chat_template=CHAT_TEMPLATE,
        eos_token=TURN_END,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    return tokenizer


def qwen_config(tokenizer: Qwen2Tokenizer, *, tied: bool, vocab_size: int = 320) -> Qwen2_5_VLConfig:
    ids = tokenizer.convert_tokens_to_ids
    return Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=vocab_size,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
            rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[2, 3, 3]),
            tie_word_embeddings=tied,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        vision_config=dict(
            depth=2,
            hidden_size=32,
            intermediate_size=48,
            num_heads=2,
            out_hidden_size=64,
            window_size=56,
            fullatt_block_indexes=[1],
            initializer_range=0.2,
        ),
        tie_word_embeddings=tied,
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids(VIDEO_PAD),
        vision_start_token_id=ids(CLIP_START),
        vision_end_token_id=ids(CLIP_END),
    )


def save_qwen(path: Path, *, tied: bool, vocab_size: int = 320) -> Path:
    torch.manual_seed(1)
    tokenizer = qwen_tokenizer()
    Qwen2_5_VLForConditionalGeneration(qwen_config(tokenizer, tied=tied, vocab_size=vocab_size)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def save_whisper(path: Path, *, steps: int = 400) -> Path:
    torch.manual_seed(2)
    config = WhisperConfig(
        num_mel_bins=20, d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=48, decoder_layers=1,
        decoder_attention_heads=4, decoder_ffn_dim=48, max_source_positions=steps, vocab_size=60, init_std=0.2,
        pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=0,
    )  # fmt: skip
    WhisperForConditionalGeneration(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("assemble")


@pytest.fixture(scope="module")
def whisper(tmp_path_factory) -> Path:
    return save_whisper(tmp_path_factory.mktemp("sources") / "whisper")


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    """A Qwen2.5-VL with a flat config.json, as in the published models."""
    path = save_qwen(tmp_path_factory.mktemp("sources") / "untied", tied=False)
    values = json.loads((path / "config.json").read_text())
    text = values.pop("text_config")
    text["rope_theta"], text["rope_scaling"] = 1e6, {"type": "mrope", "mrope_section": [2, 3, 3]}
    text = {key: value for key, value in text.items() if key not in ("model_type", "rope_parameters", "layer_types")}
    (path / "config.json").write_text(json.dumps(values | text | {"torch_dtype": "bfloat16"}))
    return path


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def qwen(request, untied, tmp_path_factory) -> Path:
    """Untied embeddings as in Qwen2.5-VL 7B and 72B, and tied ones as in 3B."""
    return save_qwen(tmp_path_factory.mktemp("sources") / "tied", tied=True) if request.param else untied


@pytest.fixture(scope="module")
def assembled(tool, qwen, whisper, tmp_path_factory) -> Path:
    """The model assembled from them in float32."""
    out = tmp_path_factory.mktemp("assembled") / "base"
    tool.main(tool.AssembleConfig(out=out, lm=str(qwen), whisper=str(whisper), dtype="float32", **QFORMER))
    return out


@pytest.fixture(scope="module")
def network(assembled):
    return load_network(assembled)


@pytest.fixture(scope="module")
def source(qwen):
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(qwen, dtype=torch.float32).eval()


def is_close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= 1e-5)


@torch.no_grad()
def test_the_language_model_equals_qwen(network, source):
    ids = torch.randint(0, 260, (2, 12), generator=torch.Generator().manual_seed(0))
    theirs = source(input_ids=ids).logits
    assert is_close(network.lm(input_ids=ids).logits, theirs) and theirs.std() > 0.1
    embeddings = network.lm.get_input_embeddings().weight, network.lm.get_output_embeddings().weight
    assert (embeddings[0] is embeddings[1]) == source.config.tie_word_embeddings


@torch.no_grad()
def test_the_vision_tower_equals_qwen(network, source):
    pixels = torch.randn(2 * 4 * 6, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(0))
    theirs = source.model.visual(pixels, grid_thw=torch.tensor([[2, 4, 6]])).pooler_output
    assert is_close(network.vision.encode(pixels, [(2, 4, 6)]), theirs) and theirs.std() > 0.1


@torch.no_grad()
def test_the_audio_encoder_equals_whisper(network, whisper):
    mel = torch.randn(2, 20, 800, generator=torch.Generator().manual_seed(0))
    theirs = WhisperForConditionalGeneration.from_pretrained(whisper).eval().model.encoder(mel).last_hidden_state
    assert is_close(network.audio.encoder(mel).last_hidden_state, theirs) and theirs.std() > 0.1
    (features,) = network.audio([mel])
    assert features.shape == (2 * 16, 64) and features.std() > 0  # chunks of 8 s, a token each half second


def test_new_weights_are_initialized_like_bert(network):
    qformer, projector = network.audio.qformer, network.audio.projector
    assert (qformer.qformer.config.hidden_size, qformer.qformer.config.intermediate_size) == (24, 96)
    assert qformer.queries.shape == (1, 1, 24)
    assert all(layer.has_cross_attention for layer in qformer.qformer.encoder.layer)
    for name, weight in [*qformer.named_parameters(), *projector.named_parameters()]:
        if weight.ndim > 1 and weight.numel() > 500:
            assert weight.std().item() == pytest.approx(0.02, rel=0.15) and abs(weight.mean()) < 0.004, name
        elif weight.ndim == 1:
            expected = 1.0 if "norm.weight" in name.lower() else 0.0
            assert (weight == expected).all(), name


def test_the_tokenizer_gains_one_token(assembled, qwen, network):
    before, after = AutoTokenizer.from_pretrained(qwen), AutoTokenizer.from_pretrained(assembled)
    assert after.get_vocab() == before.get_vocab() | {AUDIO_PAD: len(before)}
    assert after.encode(f"red{AUDIO_PAD}circle") == [*before.encode("red"), len(before), *before.encode("circle")]
    assert set(after.all_special_tokens) == {*before.all_special_tokens, AUDIO_PAD}
    assert after.chat_template == before.chat_template
    assert tuple(network.config.placeholder_ids) == (before.get_vocab()[VIDEO_PAD], len(before))


def test_no_path_or_type_of_the_sources_is_saved(assembled, qwen, whisper):
    text = (assembled / "config.json").read_text()
    assert str(qwen) not in text and str(whisper) not in text
    values = json.loads(text)
    assert (values["model_type"], values["dtype"]) == ("salmonn", "float32") and text.count("dtype") == 1


def test_a_captioner_loads_it(assembled):
    captioner = Captioner.load(assembled)
    frames = np.arange(4 * 56 * 84 * 3).astype(np.uint8).reshape(4, 56, 84, 3)
    waveform = np.sin(np.arange(32_000) / 20).astype(np.float32)
    media = captioner.processor.clip_inputs(Clip("a.mp4", frames, np.arange(4) / 2, waveform, 0.0, 2.0, 2.0))
    (answer,) = complete(captioner, [media], ["What is it?"], sampling=Sampling(max_new_tokens=3))
    assert isinstance(answer.text, str)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture
def run_tool(monkeypatch, capfd):
    """Run the command in this process, which has loaded torch already; returns exit code and stderr."""

    def run(*args: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [str(TOOL), *args])
        capfd.readouterr()
        try:
            runpy.run_path(str(TOOL), run_name="__main__")
        except SystemExit as end:
            return int(end.code or 0), capfd.readouterr().err
        return 0, capfd.readouterr().err

    return run


def test_command_line_seed_and_dtype(run_tool, assembled, qwen, whisper, tmp_path):
    """The command's default dtype is bfloat16; its weights are those of float32, rounded."""
    flags = [f"--{name}={value}" for name, value in QFORMER.items()]
    command = [f"--lm={qwen}", f"--whisper={whisper}", f"--out={tmp_path / 'out'}", *flags]
    torch.manual_seed(99)  # the tool sets its own seed
    code, stderr = run_tool(*command)
    assert code == 0 and "weights from lm" in stderr and "weights from fresh" in stderr
    bf16, full = weights(tmp_path / "out"), weights(assembled)
    assert bf16.keys() == full.keys()
    assert all(torch.equal(bf16[name], full[name].to(torch.bfloat16)) for name in full)
    assert {tensor.dtype for tensor in bf16.values()} == {torch.bfloat16}
    network = load_network(tmp_path / "out", placement=Placement(dtype="bfloat16"))
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert network.audio([torch.randn(1, 20, 800)])[0].isfinite().all()
    code, stderr = run_tool(*command)
    assert code == 2 and "exists and is not empty" in stderr and "Traceback" not in stderr


def test_another_seed_changes_only_new_weights(tool, assembled, qwen, whisper, tmp_path):
    tool.main(tool.AssembleConfig(tmp_path / "out", str(qwen), str(whisper), dtype="float32", seed=1, **QFORMER))
    ours, other = weights(assembled), weights(tmp_path / "out")
    changed = {name for name in ours if not torch.equal(ours[name], other[name])}
    new = {name for name in ours if name.startswith(("audio.qformer.", "audio.projector."))}
    assert changed == {name for name in new if ours[name].ndim > 1}


class TestRejectedSources:
    """Errors name the invalid source, and nothing is written."""

    @pytest.fixture
    def rejection(self, tool, untied, whisper, tmp_path):
        def rejection(*, lm: object = untied, whisper: object = whisper, **values: object) -> str:
            before = sorted(tmp_path.iterdir())
            with pytest.raises(ValueError) as caught:
                tool.main(tool.AssembleConfig(tmp_path / "out", str(lm), str(whisper), **(QFORMER | values)))
            assert sorted(tmp_path.iterdir()) == before
            return str(caught.value)

        return rejection

    @pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2"])
    def test_another_language_model(self, rejection, tmp_path, kind):
        folder = tmp_path / "other"
        Qwen2Config().save_pretrained(folder)  # without weights: the type is checked first
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | {"model_type": kind}))
        assert f"--lm {folder} has model type '{kind}'; use a Qwen2.5-VL" in rejection(lm=folder)

    def test_swapped_sources(self, rejection, untied, whisper):
        assert f"--lm {whisper} has model type 'whisper'" in rejection(lm=whisper, whisper=untied)
        assert f"--whisper {untied} has model type 'qwen2_5_vl'; use a Whisper" in rejection(whisper=untied)

    def test_a_model_with_an_audio_tower(self, rejection, untied, tmp_path):
        folder = tmp_path / "plus"
        folder.mkdir()
        values = json.loads((untied / "config.json").read_text()) | {"audio_config": {}}
        (folder / "config.json").write_text(json.dumps(values))
        assert "already has an audio tower" in rejection(lm=folder)

    def test_no_folder(self, rejection, tmp_path):
        assert f"--lm {tmp_path / 'none'} is neither a model folder" in rejection(lm=tmp_path / "none")
        assert f"--whisper {tmp_path} has no config.json" in rejection(whisper=tmp_path)

    def test_too_few_embeddings(self, rejection, tmp_path):
        size = len(qwen_tokenizer())
        folder = save_qwen(tmp_path / "small", tied=False, vocab_size=size)
        assert f"{AUDIO_PAD} would have token id {size}, but --lm {folder} has only {size} embeddings" in rejection(
            lm=folder
        )

    @pytest.mark.parametrize("missing", [VIDEO_PAD, "chat template"])
    def test_another_tokenizer(self, rejection, untied, tmp_path, missing):
        folder = shutil.copytree(untied, tmp_path / "other")
        if missing == VIDEO_PAD:
            train = train_tokenizer(["a"], vocab_size=263)
            text = train.backend_tokenizer.to_str().replace(VIDEO_PAD, "<|other|>")
            (folder / "tokenizer.json").write_text(text)
            config = json.loads((folder / "tokenizer_config.json").read_text())
            config["extra_special_tokens"] = []
            (folder / "tokenizer_config.json").write_text(json.dumps(config))
        else:
            (folder / "chat_template.jinja").unlink()
        assert missing in rejection(lm=folder)

    @pytest.mark.parametrize("part", ["lm", "whisper"])
    def test_missing_weights(self, rejection, untied, whisper, tmp_path, part):
        folder = shutil.copytree({"lm": untied, "whisper": whisper}[part], tmp_path / "incomplete")
        tensors = weights(folder)
        removed = next(name for name in tensors if "layers.1" in name and "decoder" not in name)
        save_file({name: tensor for name, tensor in tensors.items() if name != removed}, folder / "model.safetensors",
                  metadata={"format": "pt"})  # fmt: skip
        message = rejection(**{part: folder})
        assert f"the weights of {folder} do not match" in message and removed.removeprefix("model.") in message
        (folder / "model.safetensors").unlink()
        assert f"the weights of {folder} are missing or damaged" in rejection(**{part: folder})

    def test_a_whisper_with_partial_windows(self, rejection, tmp_path):
        folder = save_whisper(tmp_path / "other_whisper", steps=410)
        assert "410 steps per chunk, not a multiple of the window of 25 steps" in rejection(whisper=folder)

    def test_heads_that_do_not_divide(self, rejection):
        assert "--qformer-hidden 24 is not a multiple of --qformer-heads 5" in rejection(qformer_heads=5)
        assert "must be at least 1" in rejection(qformer_layers=0)


class TestCheck:
    """Each weight must come from one source, and none may be unused."""

    @pytest.fixture
    def parts(self, tool, network):
        weights = network.state_dict(keep_vars=True)
        shapes = {name: tensor.shape for name, tensor in weights.items()}
        sources: dict[str, list] = {"lm": [], "whisper": [], "fresh": []}
        for name, tensor in weights.items():
            origin = "lm" if name.startswith(("lm.", "vision.")) else "whisper" if "audio.encoder" in name else "fresh"
            sources[origin].append(tensor)
        return shapes, sources

    def test_complete_sources(self, tool, network, parts):
        shapes, sources = parts
        summary = tool.check_sources(network, shapes=shapes, sources=sources)
        lm = len({id(tensor) for tensor in sources["lm"]})
        assert summary == f"{lm} weights from lm, {len(sources['whisper'])} weights from whisper, " + (
            f"{len(sources['fresh'])} weights from fresh"
        )

    @pytest.mark.parametrize("mistake", ["none", "two", "unused", "shape", "unset"])
    def test_inconsistent_sources(self, tool, network, parts, mistake):
        shapes, sources = parts
        messages = {
            "none": "come from one source",
            "two": "come from one source",
            "unused": "were not used",
            "shape": "do not match",
        }
        bias = network.audio.projector.bias.detach().clone()
        if mistake == "none":
            sources["whisper"].pop()
        elif mistake == "two":
            sources["fresh"].append(sources["lm"][0])
        elif mistake == "unused":
            sources["whisper"].append(torch.ones(1))
        elif mistake == "shape":
            shapes["audio.projector.bias"] = torch.Size([65])
        else:
            network.audio.projector.bias.data.fill_(torch.nan)
        try:
            with pytest.raises(ValueError, match=messages.get(mistake, "without a finite value.*audio.projector.bias")):
                tool.check_sources(network, shapes=shapes, sources=sources)
        finally:
            network.audio.projector.bias.data.copy_(bias)
