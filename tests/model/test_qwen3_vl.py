"""Qwen3-VL against transformers' own processor and model: pixels, token layout, positions, logits, greedy tokens.

Transformers' video processor needs torchvision, so that `tests.qwen3_vl.expected_inputs` calls its methods one by one.
Which frames are sampled, and their sizes, is compared in tests/media/test_frame_sampling.py.
"""

import json
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import Qwen3VLForConditionalGeneration

from salmonn.caption.captioner import Captioner
from salmonn.caption.engine import Engine
from salmonn.caption.generator import CaptionRequest, Sampling
from salmonn.caption.loader import ClipReader
from salmonn.caption.processor import PromptRow
from salmonn.caption.prompt import train_tokenizer
from salmonn.conversations import Turn
from salmonn.media.clip import Clip
from salmonn.media.container import ClipError
from salmonn.model.decode_layers import make_decode_layers
from salmonn.model.loading import load_config
from salmonn.model.lora import LoraConfig, attach_lora, save_adapter
from salmonn.model.publish import write_adapter
from salmonn.model.towers import normalize
from salmonn.preference.losses import LossConfig, make_loss
from salmonn.records import Comparison
from salmonn.train.data import (
    ClipCache,
    ClipSource,
    SftBatches,
    TrainingExample,
    all_texts,
    make_examples,
    sft_loss,
)
from salmonn.train.encoding import encode_clips
from salmonn.train.feature_cache import FeatureCacheConfig, open_feature_cache
from salmonn.train.loop import FitConfig, FitContext, fit
from salmonn.train.preference import PreferenceBatches, PreferenceBatchLoss, PreferenceExample
from salmonn.train.reference_logps import compute_reference_logps
from tests.completions import decode_difference, generate
from tests.exactness import assert_close, assert_equal
from tests.qwen3_vl import expected_inputs, save_tiny

RATE = 12.5
# Rows, columns, numbers of frames; the second has an odd number of them, the third is a single one.
SHAPES = [(32, 48, [0, 6, 13, 19]), (64, 16, [0, 5, 11]), (16, 32, [0])]
PROMPTS = ["Tell.", "What can be seen?", "Which?"]


@pytest.fixture(scope="module")
def folder(clips, tmp_path_factory):
    tokenizer = train_tokenizer([*all_texts(clips.references), "seconds Describe this video."], vocab_size=400)
    return save_tiny(tmp_path_factory.mktemp("models") / "qwen3-vl", tokenizer)


@pytest.fixture(scope="module")
def published(folder):
    return Qwen3VLForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def captioner(folder):
    return Captioner.load(folder)


@pytest.fixture(scope="module")
def clips_of_sizes():
    """Clips of different sizes and lengths, as the reader returns them."""
    random = np.random.default_rng(0)
    return [
        Clip(
            path="clip.mp4",
            frames=random.integers(0, 256, (len(numbers), rows, columns, 3), dtype=np.uint8),
            frame_times=0.4 + np.array(numbers) / RATE,  # the video starts late
            waveform=None,
            start_seconds=0.0,
            video_seconds=2.0,
            duration_seconds=2.4,
        )
        for rows, columns, numbers in SHAPES
    ]


@pytest.fixture(scope="module")
def expected(published, captioner, clips_of_sizes):
    """What transformers makes of each clip with its prompt."""
    return [
        expected_inputs(
            published,
            captioner.processor.tokenizer,
            torch.from_numpy(clip.frames).permute(0, 3, 1, 2),
            frames_indices=numbers,
            rate=RATE,
            prompt=prompt,
        )
        for clip, (_, _, numbers), prompt in zip(clips_of_sizes, SHAPES, PROMPTS, strict=True)
    ]


@pytest.fixture(scope="module")
def inputs(captioner, clips_of_sizes):
    """Our batch of the three prompts."""
    clips = [captioner.processor.clip_inputs(clip) for clip in clips_of_sizes]
    return captioner.processor.collate([PromptRow(index, prompt) for index, prompt in enumerate(PROMPTS)], clips)


def test_pixels_and_grids(inputs, expected):
    for ours, theirs in zip(inputs.clip_inputs, expected, strict=True):
        assert [list(ours.grid)] == theirs["video_grid_thw"].tolist()
        pixels = normalize(ours.pixels, mean=[0.5] * 3, std=[0.5] * 3)
        assert_close(pixels, theirs["pixel_values_videos"], of="qwen3-vl", what="patches", atol=1e-6)


@torch.no_grad()
def test_features(captioner, published, inputs, expected):
    """The embedding of each visual token, and its two deep features."""
    ours = captioner.network.vision([clip.pixels for clip in inputs.clip_inputs], [c.grid for c in inputs.clip_inputs])
    for features, theirs in zip(ours, expected, strict=True):
        output = published.model.get_video_features(theirs["pixel_values_videos"], theirs["video_grid_thw"])
        # Each layer's features are of all videos together before transformers 5.2x, and of one video each from then on.
        deep = [one if isinstance(one, torch.Tensor) and one.ndim == 2 else one[0] for one in output.deepstack_features]
        parts = [output.pooler_output[0], *deep]
        what = "visual and deep features"
        assert_close(features, torch.cat(parts, dim=-1), of="qwen3-vl", what=what, atol=1e-5, rtol=1e-5)
        assert len(parts) == 3


def test_token_layout_and_positions(captioner, published, inputs, expected):
    """Text within a clip has the placeholder's id in our rows; its ids are those of the layout."""
    video_id = published.config.video_token_id
    for row, theirs in enumerate(expected):
        ids = inputs.input_ids[row, : int(inputs.attention_mask[row].sum())].clone()
        positions, _ = published.model.get_rope_index(**{k: v for k, v in theirs.items() if "pixel" not in k})
        layout = inputs.layouts[row]
        within = (ids == video_id).nonzero().flatten()[~layout.is_visual]
        ids[within] = torch.tensor(layout.timestamp_ids)
        assert_equal(ids.tolist(), theirs["input_ids"][0].tolist(), of="qwen3-vl", what="token ids")
        ours = inputs.position_ids[:, row, : len(ids)].tolist()
        assert_equal(ours, positions[:, 0].tolist(), of="qwen3-vl", what="positions")


@torch.no_grad()
def test_logits(captioner, published, inputs, expected):
    """Of the whole batch, packed, at the first token of each answer."""
    logits, _, order = captioner.network.prefill(inputs)
    for row, theirs in enumerate(expected):
        logits_of_row = published(**theirs).logits[0, -1]
        assert_close(logits[order.index(row)], logits_of_row, of="qwen3-vl", what="logits", atol=1e-4)


def test_decode_steps_with_fewer_kernels(captioner, inputs):
    """Queries and keys are normed before their rotation."""
    layers = make_decode_layers(captioner.network)
    assert layers is not None and decode_difference(captioner.network, inputs, layers) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_tokens(captioner, published, inputs, expected, penalty):
    """Also with a repetition penalty, which covers the prompt and the timestamps in it."""
    sampling = Sampling(max_new_tokens=10, repetition_penalty=penalty)
    ours = [[t.id for t in row] for row in generate(captioner.network, inputs, sampling=sampling, stop_ids=[-1])]
    for row, theirs in zip(ours, expected, strict=True):
        options = dict(max_new_tokens=10, do_sample=False, repetition_penalty=penalty, eos_token_id=None)
        generated = published.generate(**theirs, **options)
        ids = generated[0, theirs["input_ids"].shape[1] :].tolist()
        assert_equal(row, ids, of="qwen3-vl", what="greedy tokens")
    assert len({tuple(row) for row in ours}) == 3


ROWS = [
    PromptRow(0, "Tell.", "A red circle appears and then a low tone is heard."),
    PromptRow(1, "What can be seen?", "a star"),
    PromptRow(0, "Tell.", "two"),  # shares the prefix of the first row
]


@torch.no_grad()
def test_rows_that_share_a_prefix_equal_plain_rows(captioner, clips_of_sizes):
    """With the clips' deep features, from the towers and from features that were computed before."""
    network, processor = captioner.network, captioner.processor
    clips = [processor.clip_inputs(clip) for clip in clips_of_sizes[:2]]
    features = captioner.encode(clips)
    assert [one.tokens.shape for one in features] == [(len(processor.make_layout(clip)), 3 * 64) for clip in clips]
    batched = network(processor.collate(ROWS, clips))
    assert torch.equal(batched, network(processor.collate(ROWS, features)))
    for number, row in enumerate(ROWS):
        (plain,) = network(processor.collate([PromptRow(0, row.prompt, row.answer)], [clips[row.clip]]))
        assert torch.allclose(batched[number, : len(plain)], plain, atol=1e-5)
    # The deep features matter, and only for the tokens of the clip.
    without = [replace(one, tokens=F.pad(one.tokens[:, :64], (0, 128))) for one in features]
    assert (network(processor.collate(ROWS, without)) - batched).abs().max() > 1e-2
    is_text = ~features[0].layout.is_visual
    assert is_text.any() and not features[0].tokens[is_text, 64:].any()


def test_the_model_hears_nothing(captioner, folder, call, videos, tmp_path):
    """Of a file with sound, it reads the video, and the caption says so; sound alone is refused."""
    caption = captioner.caption(videos[0], sampling=Sampling(max_new_tokens=2))
    assert caption.modality == "visual" and caption.prompt == captioner.default_prompt("visual")
    with pytest.raises(ValueError, match="a qwen3-vl model has no audio input; use --modality visual"):
        captioner.caption(videos[0], modality="audio")
    sound = CaptionRequest(videos[0], "What?", modality="audio")
    with pytest.raises(ValueError, match="a qwen3-vl model has no audio input; use --modality visual"):
        list(captioner.caption_many([sound]))
    with (
        ClipReader(workers=1) as reader,
        closing(Engine(captioner, reader)) as engine,
        pytest.raises(ValueError, match="a qwen3-vl model has no audio input"),
    ):
        engine.submit(sound, on_event=lambda *event: None)
    args = ("caption", videos[0], "--out", tmp_path / "c.jsonl", "--model", folder, "--modality", "audio")
    code, _, err = call(*args, "--workers", 0)
    assert code == 2 and "\nerror: modality audio: a qwen3-vl model has no audio input; use --modality visual\n" in err
    with pytest.raises(ClipError, match="needs video and audio, but a qwen3-vl model has no audio input"):
        ClipCache(captioner.processor)(ClipSource(videos[0], needs_both=True))


@torch.no_grad()
def test_a_published_adapter_is_one_for_transformers(folder, inputs, expected, tmp_path):
    """PEFT loads it onto transformers' model, with the logits of ours; and we load what PEFT saves."""
    network = Captioner.load(folder).network
    attach_lora(network, LoraConfig(rank=4, dropout=0.0), seed=0)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.3)
    network.eval()
    save_adapter(network, tmp_path / "adapter")
    (tmp_path / "published").mkdir()
    write_adapter(tmp_path / "adapter", tmp_path / "published", base=str(folder))
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder).eval()
    theirs = PeftModel.from_pretrained(model, tmp_path / "published").eval()
    logits, _, order = network.prefill(inputs)
    for row, one in enumerate(expected):
        assert torch.allclose(logits[order.index(row)], theirs(**one).logits[0, -1], atol=1e-4)
    theirs.save_pretrained(tmp_path / "peft")
    again, _, _ = Captioner.load(folder, adapter=tmp_path / "peft").network.prefill(inputs)
    assert torch.allclose(again, logits, atol=1e-4)


def test_examples_are_about_what_the_model_perceives(captioner, clips):
    prompts = captioner.processor.config.prompts
    examples = make_examples(clips, ["visual_caption", "visual_events"], prompts=prompts)
    assert [(one.clip.modality, len(one.turns)) for one in examples] == [("visual", 2)] * 5
    assert examples[0].turns[0] == Turn(captioner.default_prompt("visual"), clips.references[0].visual_caption)
    with pytest.raises(ValueError, match="tasks audio_caption are about sound, but this model has no audio input"):
        make_examples(clips, ["visual_caption", "audio_caption"], prompts=prompts)


def test_a_saved_model_is_the_same(captioner, videos, tmp_path):
    captioner.save(tmp_path / "saved")
    assert load_config(tmp_path / "saved").family == "qwen3-vl"
    request = CaptionRequest(videos[0], sampling=Sampling(max_new_tokens=8))
    assert [one.text for one in Captioner.load(tmp_path / "saved").generate([request])[0]] == [
        one.text for one in captioner.generate([request])[0]
    ]


@pytest.mark.parametrize("stage", ["sft", "mrdpo"])
def test_training_on_cached_features(folder, clips, videos, tmp_path, stage):
    """An adapter learns captions (SFT and rebirth), or pairs with the reference captions (a round of mrDPO)."""
    captioner = Captioner.load(folder)
    sources = [ClipSource(video) for video in videos]
    cache = open_feature_cache(FeatureCacheConfig(tmp_path / "features"), captioner)
    encode_clips(captioner, sources, name="clips", cache=cache)
    features = encode_clips(captioner, sources, name="clips", cache=cache)  # from the files
    assert len(list((tmp_path / "features").iterdir())) == 5
    attach_lora(captioner.network, LoraConfig(rank=8, dropout=0.0), seed=0)
    captions = [reference.caption for reference in clips.references]
    config = FitConfig(learning_rate=3e-3, steps=6, warmup_ratio=0.17, batch_size=5)
    examples = [TrainingExample(s, (Turn("Tell.", text),)) for s, text in zip(sources, captions, strict=True)]
    batches = SftBatches(examples, captioner.processor, features.__getitem__, batch_size=5, seed=0)
    loss = sft_loss
    if stage == "mrdpo":
        rejected = [" ".join(reversed(text.split())) for text in captions]
        pairs = [
            PreferenceExample(Comparison(str(s.video), "Tell.", *texts), features[s])
            for s, *texts in zip(sources, captions, rejected, captions, strict=True)
        ]
        gdpo = make_loss(LossConfig())
        reference = compute_reference_logps(
            captioner.network, pairs, captioner.processor, roles=gdpo.reference_roles, batch_size=5
        )
        batches = PreferenceBatches(pairs, reference, captioner.processor, batch_size=5, roles=gdpo.roles, seed=0)
        loss = PreferenceBatchLoss(gdpo)
    fit(captioner.network, batches, loss, config, context=FitContext(stage, tmp_path))
    steps = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert steps[-1]["loss"] < 0.95 * steps[0]["loss"]
    if stage == "mrdpo":
        assert steps[0]["dpo"] == pytest.approx(0.6931, abs=1e-3) and steps[-1]["chosen"] > steps[-1]["rejected"]
