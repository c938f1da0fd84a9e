"""Captions through `transformers serve`, another project's server, with tiny models of random weights.

Its vision-language models drop the audio of a message silently; its audio models hear.
"""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2Config,
    WhisperFeatureExtractor,
)

from salmonn.caption.generator import CaptionRequest, Sampling
from salmonn.caption.prompt import train_tokenizer
from salmonn.caption.server_connection import connect_captioner
from salmonn.caption.server_options import ServerOptions
from salmonn.files import read_records
from salmonn.records import Caption
from tests.score.local_server import LocalServer, serve_locally

pytestmark = pytest.mark.slow  # test_server.py uses a scripted server

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% elif part.type == 'image' %}<image>"
    "{% elif part.type == 'audio' %}<|AUDIO|>{% endif %}{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


def make_tokenizer(*special: str):
    tokenizer = train_tokenizer(["a"], vocab_size=263)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


def text_config(tokenizer) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32768, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def save(model: PreTrainedModel, processor, folder: Path) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)  # a fresh model gives almost the same answer to every request
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


@pytest.fixture(scope="module")
def seeing(tmp_path_factory) -> LocalServer:
    """A LLaVA, which takes images alone."""
    folder = tmp_path_factory.mktemp("llava")
    tokenizer = make_tokenizer("<image>")
    image = tokenizer.convert_tokens_to_ids("<image>")
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=vision, text_config=text_config(tokenizer), image_token_id=image, image_seq_length=4
    )
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}), tokenizer, patch_size=14,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip
    save(LlavaForConditionalGeneration(config), processor, folder / "model")
    with serve_locally(folder / "model", log_path=folder / "log") as server:
        yield server


@pytest.fixture(scope="module")
def hearing(tmp_path_factory) -> LocalServer:
    """A Qwen2-Audio, which takes audio alone."""
    folder = tmp_path_factory.mktemp("qwen2audio")
    tokenizer = make_tokenizer("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")
    encoder = Qwen2AudioEncoderConfig(
        num_mel_bins=80, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=64, d_model=32
    )
    torch.manual_seed(0)
    config = Qwen2AudioConfig(
        audio_config=encoder, text_config=text_config(tokenizer),
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )  # fmt: skip
    processor = Qwen2AudioProcessor(WhisperFeatureExtractor(80), tokenizer, chat_template=TEMPLATE)
    save(Qwen2AudioForConditionalGeneration(config), processor, folder / "model")
    with serve_locally(folder / "model", log_path=folder / "log") as server:
        yield server


def test_a_model_without_ears(seeing, videos, call, tmp_path):
    """The server drops the audio, or, without the packages that read it, breaks with status 500."""
    with pytest.raises(ValueError, match=r"does not hear: two clips that differ in sound alone|does not take audio: "):
        connect_captioner(ServerOptions(seeing.base_url, seeing.model, server_input="frames", timeout_seconds=60.0))
    flags = ["--server", seeing.base_url, "--server-model", seeing.model, "--max-new-tokens", 12, "--workers", 1]
    code, _, err = call("caption", *videos, "--out", tmp_path / "seen.jsonl", *flags, "--modality", "visual")
    assert code == 0, err
    captions = read_records(tmp_path / "seen.jsonl", Caption)
    assert len(captions) == 5 and {one.modality for one in captions} == {"visual"}
    assert len({one.text for one in captions}) > 1  # the frames reach the model
    assert {one.model for one in captions} == {seeing.model}


@pytest.mark.skipif(find_spec("soundfile") is None, reason="the server reads audio with soundfile and soxr")
def test_a_hearing_model(hearing, videos):
    captioner = connect_captioner(ServerOptions(hearing.base_url, hearing.model, concurrency=1), modality="audio")
    assert captioner.input == "frames"
    sampling = Sampling(temperature=1.0, max_new_tokens=12)
    requests = [CaptionRequest(video, None, sampling, modality="audio", num_samples=2) for video in videos[:2]]
    answers = captioner.generate(requests)
    # The server ignores n; each sample is requested, with a seed of its own. It holds for one request at a time.
    assert len({one.text for pair in answers for one in pair}) == 4
    assert captioner.generate(requests) == answers
