"""Models without a family, through transformers' own processors and `generate`.

Video processors of transformers need torchvision. A tiny Qwen3-VL has one here whose parts that need none are called
one by one: its captions equal those of its family. A tiny Gemma 4 takes a video as images, and audio.
"""

import importlib.util

import pytest
import torch
from transformers import Gemma4Config, Gemma4ForConditionalGeneration, Qwen3VLForConditionalGeneration
from transformers.feature_extraction_utils import BatchFeature
from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from salmonn.caption.captioner import Captioner
from salmonn.caption.encode_ahead import make_encoder
from salmonn.caption.generator import CaptionRequest, Sampling, Span
from salmonn.caption.generic import check_hearing, is_generic, load_generic, make_generic
from salmonn.caption.limits import BatchLimits
from salmonn.caption.prompt import train_tokenizer
from salmonn.files import write_json
from salmonn.model.loading import load_config
from salmonn.records import Caption, Failure
from salmonn.train.data import all_texts
from tests.exactness import assert_close
from tests.qwen3_vl import save_tiny
from tests.torchvision_stub import torchvision_stub

with torchvision_stub():  # transformers before 5.2x imports it
    from transformers.models.gemma4.processing_gemma4 import Gemma4Processor

GREEDY = Sampling(max_new_tokens=10, logprobs=0)
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<|video_pad|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{{ '<|im_start|>assistant\n' }}"
)
GEMMA_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<|image|>"
    "{% elif part['type'] == 'audio' %}<|audio|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer(clips):
    return train_tokenizer([*all_texts(clips.references), "seconds Describe this video"], vocab_size=400)


class WithoutTorchvision(Qwen3VLVideoProcessor):
    """Qwen3-VL's video processor for frames that have the size of the tiny model."""

    patch_size, temporal_patch_size, merge_size = 8, 2, 2

    def __init__(self) -> None:
        pass

    def __call__(self, videos, *, video_metadata, **_):
        patches, *grid = self.patchify(((videos[0] / 255 - 0.5) / 0.5)[None], 8, 2, 2)
        return BatchFeature(
            {
                "pixel_values_videos": patches[0],
                "video_grid_thw": torch.tensor([grid]),
                "video_metadata": video_metadata,
            }
        )


class AnyVideoProcessor:
    """Part of a processor whose video processor is not one of transformers."""

    def check_argument_for_proper_class(self, argument_name, argument):
        return (
            None
            if argument_name == "video_processor"
            else super().check_argument_for_proper_class(argument_name, argument)
        )


class QwenProcessor(AnyVideoProcessor, Qwen3VLProcessor):
    """Qwen3-VL's processor with the video processor above."""


class ImagesAndAudio(AnyVideoProcessor, Gemma4Processor):
    """Gemma 4's processor without a video processor."""


@pytest.fixture(scope="module")
def qwen(tokenizer, tmp_path_factory):
    """The tiny Qwen3-VL as a model without a family, and as one of its family."""
    folder = save_tiny(tmp_path_factory.mktemp("models") / "qwen3-vl", tokenizer)
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder).eval()
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    processor = QwenProcessor(Qwen2VLImageProcessorPil(), tokenizer, WithoutTorchvision(), chat_template=QWEN_TEMPLATE)
    return make_generic(model, processor, name="tiny"), Captioner.load(folder)


def test_captions_equal_those_of_the_family(qwen, videos):
    """Greedy tokens and log-probabilities, of a span too, and the modality of a model without hearing."""
    generic, family = qwen
    requests = [
        CaptionRequest(videos[0], "Tell.", GREEDY, system=""),
        CaptionRequest(videos[1], "Which?", GREEDY, span=Span(1.0, 4.0), system=""),
    ]
    # The frames that the family samples, in their own size: 96 x 96, a multiple of its factor.
    sampler = family.processor.family.frame_sampler
    clips = [
        family.processor.read_spec("both", start_seconds=r.span.start_seconds, end_seconds=r.span.end_seconds).read(
            r.path
        )
        for r in requests
    ]
    assert sampler.frame_size(96, 96, 16) == clips[0].frames.shape[1:3]
    ours = family.generate(requests, clips=[family.processor.clip_inputs(clip) for clip in clips])
    theirs = generic.generate(requests, clips=[generic.processor.clip_inputs(clip) for clip in clips])
    for (expected,), (caption,) in zip(ours, theirs, strict=True):
        assert (caption.text, caption.num_tokens, caption.modality) == (expected.text, expected.num_tokens, "visual")
        logprobs = torch.tensor([[caption.logprob], [expected.logprob]])
        assert_close(*logprobs, of="other models (Qwen3-VL)", what="log-probability of a caption", atol=1e-3)
        assert caption.finished == expected.finished and caption.model == "tiny"


def test_a_batch_job_reads_files_with_our_reader(qwen, videos, tmp_path):
    """Failures do not stop it; a span, a sampled caption and a stop string are as for other models."""
    generic, _ = qwen
    hot = Sampling(temperature=1.0, max_new_tokens=12)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    requests = [CaptionRequest(path, "Tell.", hot, seed=3) for path in (videos[0], broken, videos[1])]
    results = list(generic.caption_many(requests, batch_size=2))
    assert [type(one) for one in results] == [Caption, Failure, Caption]
    again = list(generic.caption_many(requests[:1]))
    assert again[0].text == results[0].text and again[0].text != results[2].text
    stop = results[0].text[4:7]
    (cut,) = generic.caption_many(
        [CaptionRequest(videos[0], "Tell.", Sampling(1.0, max_new_tokens=12, stop=(stop,)), seed=3)]
    )
    assert cut.text == results[0].text[: results[0].text.index(stop)].rstrip() and cut.finished
    with pytest.raises(ValueError, match="modality audio: tiny has no audio input; use --modality visual"):
        generic.caption(videos[0], modality="audio")
    with pytest.raises(ValueError, match="a JSON schema needs a model with a family"):
        generic.caption(videos[0], sampling=Sampling(json_schema={"type": "object"}))


class Failing:
    """Raises an error in the second call."""

    def __init__(self, call, error) -> None:
        self.call, self.error, self.num_calls = call, error, 0

    def __call__(self, *args, **values):
        self.num_calls += 1
        if self.num_calls == 2:
            raise self.error
        return self.call(*args, **values)


@pytest.mark.parametrize("part", ["processor", "model"])
def test_a_clip_on_which_the_models_code_fails_does_not_stop_a_job(qwen, videos, monkeypatch, part):
    """Only what makes the GPU fail for every clip ends it."""
    generic, _ = qwen
    requests = [CaptionRequest(path, "Tell.", GREEDY) for path in videos[:3]]
    expected = list(generic.caption_many(requests))

    def run(error):
        processor = generic.processor.of_transformers
        owner, name = (processor, "apply_chat_template") if part == "processor" else (generic.network, "generate")
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, Failing(getattr(owner, name), error))
            return list(generic.caption_many(requests, batch_size=3))

    first, failed, last = run(RuntimeError("shape mismatch:\n3 and 4"))
    assert [first, last] == [expected[0], expected[2]] and (failed.video, failed.stage) == (str(videos[1]), "caption")
    reason = "the code of tiny in transformers fails on this clip (RuntimeError: shape mismatch: 3 and 4)"
    assert failed.reason == f"{videos[1]}: {reason}"
    with pytest.raises(torch.AcceleratorError):
        run(torch.AcceleratorError("CUDA error: device-side assert triggered"))


@pytest.fixture(scope="module")
def gemma(tokenizer):
    names = dict(image="<|image|>", boi="<|boi|>", eoi="<|eoi|>", audio="<|audio|>", boa="<|boa|>", eoa="<|eoa|>")
    tokenizer = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens={f"{k}_token": v for k, v in names.items()},
    )
    processor = ImagesAndAudio(
        Gemma4AudioFeatureExtractor(), Gemma4ImageProcessorPil(max_soft_tokens=70), tokenizer, None,
        chat_template=GEMMA_TEMPLATE,
    )  # fmt: skip
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    text = dict(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, global_head_dim=16, vocab_size_per_layer_input=len(tokenizer),
        hidden_size_per_layer_input=8, layer_types=["sliding_attention", "full_attention"], sliding_window=512,
        initializer_range=0.3,
    )  # fmt: skip
    vision = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        head_dim=16, position_embedding_size=128,
    )  # fmt: skip
    audio = dict(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, output_proj_dims=32, use_clipped_linears=False
    )
    torch.manual_seed(0)
    config = Gemma4Config(
        text_config=text, vision_config=vision, audio_config=audio, image_token_id=ids["image"],
        boi_token_id=ids["boi"], eoi_token_id=ids["eoi"], audio_token_id=ids["audio"], boa_token_id=ids["boa"],
        eoa_token_index=ids["eoa"], video_token_id=tokenizer.convert_tokens_to_ids("<|video|>"),
    )  # fmt: skip
    model = Gemma4ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return make_generic(model, processor, name="gemma")


def test_a_video_as_images_with_audio(gemma, videos):
    caption = gemma.caption(videos[0], prompt="Tell.", sampling=GREEDY)
    assert caption.modality == "both" and caption.logprob < 0
    assert gemma.caption(videos[0], prompt="Tell.", sampling=GREEDY, modality="visual").logprob != caption.logprob
    assert gemma.caption(videos[0], prompt="Tell.", sampling=GREEDY, modality="audio").modality == "audio"


def test_a_gpu_needs_nothing_that_only_families_have(gemma, monkeypatch):
    """The limit of the KV cache and encoding ahead are for their networks."""
    monkeypatch.setattr(type(gemma.network), "device", torch.device("cuda"))
    assert gemma.limits(4) == BatchLimits(1) and make_encoder(gemma) is None
    with pytest.raises(ValueError, match="batch_size"):
        gemma.limits(0)


def test_a_deaf_model_is_reported(gemma, caplog, monkeypatch):
    """One that hears passes the probe; where nothing of its audio arrives, it is given frames alone."""
    check_hearing(gemma)
    assert gemma.processor.hears and not caplog.records
    monkeypatch.setattr(gemma.processor, "hears", True)
    audio = gemma.network.model.embed_audio
    hook = audio.register_forward_hook(lambda _, args, output: torch.zeros_like(output))
    check_hearing(gemma)
    hook.remove()
    assert not gemma.processor.hears and "gemma does not hear: two clips that differ in sound alone" in caplog.text


def test_what_is_generic(random_model, tmp_path):
    assert not is_generic(random_model)
    for model_type, expected in (("qwen3_vl", False), ("gemma4", True), ("qwen2", False)):
        write_json(tmp_path / "config.json", {"model_type": model_type})
        assert is_generic(tmp_path) is expected


def test_training_is_refused(tmp_path):
    write_json(tmp_path / "config.json", {"model_type": "gemma4"})
    assert is_generic(tmp_path)
    with pytest.raises(ValueError, match=r"'gemma4' is not supported; .* other models .* but they cannot be trained"):
        load_config(tmp_path)


def test_a_model_that_cannot_be_loaded_is_one_sentence(tmp_path, qwen):
    write_json(tmp_path / "config.json", {"model_type": "gemma4"})
    with pytest.raises(ValueError, match="transformers cannot load"):
        load_generic(tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed")
def test_the_command_line_says_what_a_model_needs(call, tokenizer, videos, tmp_path):
    """The whole way from `salmonn caption` to the processor, which needs torchvision."""
    folder = tmp_path / "model"
    tokenizer.save_pretrained(str(folder))
    write_json(folder / "config.json", {"model_type": "qwen2_5_vl"})
    write_json(folder / "preprocessor_config.json", {"processor_class": "Qwen2_5_VLProcessor"})
    args = ["caption", videos[0], "--out", tmp_path / "captions.jsonl", "--model", folder, "--workers", 0]
    code, _, error = call(*args)
    assert code == 2 and f"the processor of {folder} needs torchvision, which is not installed" in error
    code, _, error = call(*args, "--bits", 8)
    assert code == 2 and "--bits needs a model with a family (see salmonn models)" in error
    write_json(folder / "config.json", {"model_type": "qwen2"})
    code, _, error = call(*args)
    assert code == 2 and "'qwen2' is not supported; supported are video-SALMONN 2 (video_salmonn_2)" in error
