"""Qwen-Omni against transformers, on random models: inputs, positions, log-probabilities and greedy tokens.

The model is transformers' thinker. Of its processor, the audio part and the methods that lay out tokens run as they
are; its video processor needs torchvision, so that of it `patchify` alone runs, on frames that are normalized here.
"""

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from salmonn.caption.captioner import Captioner
from salmonn.caption.generator import Sampling
from salmonn.caption.processor import PromptRow
from salmonn.media.clip import Clip
from salmonn.model.layout import ClipFeatures, ClipInputs, ModelInputs
from salmonn.model.loading import load_config
from salmonn.model.publish import write_published_layout
from salmonn.model.towers import normalize
from salmonn.train.feature_cache import FeatureCache
from tests.completions import generate
from tests.exactness import assert_close, assert_equal
from tests.omni_models import Published, make_clip, make_qwen2_5_omni, make_qwen3_omni, published_name
from tests.torchvision_stub import torchvision_stub

PROMPT, ANSWER = "Describe the video.", "a red circle moves"
CLIPS = {
    "video and audio": make_clip(frames=10, audio_seconds=5.0),
    "audio shorter than the video": make_clip(frames=10, audio_seconds=0.4, seed=1),
    "audio longer than the video": make_clip(frames=4, audio_seconds=7.43, seed=2),
    "video": make_clip(frames=6, seed=3),
    "audio": make_clip(audio_seconds=3.217, seed=4),
}
SYSTEM = (
    "<|im_start|>system\nYou are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, capable of "
    "perceiving auditory and visual inputs, as well as generating text and speech.<|im_end|>\n"
)


@dataclass(frozen=True)
class Kind:
    """What differs between the two families.

    Args:
        name: name of the family.
        make: maker of a random checkpoint.
        system: system message in front of a chat.
        video, audio: text of the chat for a video, with or without audio, and for audio alone.
        mean, std: normalization of pixels.
        published_grid_seconds: duration of a grid step of two frames a second in the default of transformers.
    """

    name: str
    make: Callable[..., Published]
    system: str
    video: str
    audio: str
    mean: Sequence[float]
    std: Sequence[float]
    published_grid_seconds: float


KINDS = {
    "qwen2.5-omni": Kind(
        "qwen2.5-omni", make_qwen2_5_omni, SYSTEM,
        "<|vision_bos|><|VIDEO|><|vision_eos|>", "<|audio_bos|><|AUDIO|><|audio_eos|>",
        OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, 1.0,
    ),
    "qwen3-omni": Kind(
        "qwen3-omni", make_qwen3_omni, "",
        "<|vision_start|><|video_pad|><|vision_end|>", "<|audio_start|><|audio_pad|><|audio_end|>",
        IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, 2.0,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A clip with a prompt and an answer: our inputs and those of transformers."""

    clip: Clip
    media: ClipInputs
    ours: ModelInputs
    theirs: dict[str, Any]


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> Kind:
    return KINDS[request.param]


@pytest.fixture(scope="module")
def published(kind, tmp_path_factory) -> Published:
    return kind.make(tmp_path_factory.mktemp("omni") / "model")


@pytest.fixture(scope="module")
def captioner(published) -> Captioner:
    return Captioner.load(published.folder)


@pytest.fixture(scope="module")
def video_processor() -> Any:
    """The class of transformers' video processor, which imports torchvision for methods that are not used here."""
    with torchvision_stub():
        from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    return Qwen2VLVideoProcessor


@pytest.fixture(scope="module")
def cases(captioner, published, kind) -> dict[str, Case]:
    return {name: make_case(captioner, published, kind, clip) for name, clip in CLIPS.items()}


def make_case(captioner: Captioner, published: Published, kind: Kind, clip: Clip, **options: float) -> Case:
    media = captioner.processor.clip_inputs(clip)
    ours = captioner.processor.collate([PromptRow(0, PROMPT, ANSWER)], [media])
    text = (
        f"{kind.system}<|im_start|>user\n{kind.video if clip.has_video else kind.audio}{PROMPT}<|im_end|>\n"
        f"<|im_start|>assistant\n{ANSWER}<|im_end|>"
    )
    theirs = published.process(text, grid=media.grid if clip.has_video else None, waveform=clip.waveform, **options)
    if clip.has_video:
        theirs["pixel_values_videos"] = normalize(media.pixels, mean=kind.mean, std=kind.std)
    return Case(clip, media, ours, theirs)


def token_ids(captioner: Captioner, inputs: ModelInputs) -> list[int]:
    """Return the ids of a row with those of the clip's markers, which have placeholders in our inputs."""
    layout = inputs.layouts[0]
    video, audio = captioner.processor.config.placeholder_ids
    num_audio = len(layout) - layout.num_visual - len(layout.timestamp_ids)
    source = [video] * layout.num_visual + [audio] * num_audio + list(layout.timestamp_ids)
    clip = iter(source[index] for index in layout.order.tolist())
    return [next(clip) if token in (video, audio) else token for token in inputs.input_ids[0].tolist()]


def answers(inputs: dict[str, Any], length: int) -> Iterator[tuple[str, Any]]:
    """Yield the inputs without the answer."""
    for name, value in inputs.items():
        yield name, value[:, :-length] if name in ("input_ids", "attention_mask") else value


def test_patches(cases, kind, video_processor):
    for case in cases.values():
        if not case.clip.has_video:
            continue
        frames = torch.from_numpy(case.clip.frames).permute(0, 3, 1, 2)[None] / 255
        mean, std = (torch.tensor(values)[:, None, None] for values in (kind.mean, kind.std))
        processor = video_processor.__new__(video_processor)
        patches, *grid = processor.patchify((frames - mean) / std, 14, 2, 2)
        assert tuple(grid) == case.media.grid
        ours = normalize(case.media.pixels, mean=kind.mean, std=kind.std)
        assert_close(ours, patches[0], of=kind.name, what="patches", atol=1e-5)


def test_log_mel(cases, kind):
    for case in cases.values():
        if case.clip.has_audio:
            mask = case.theirs["feature_attention_mask"][0].bool()
            expected = case.theirs["input_features"][:, :, mask]
            assert_close(case.media.mel, expected, of=kind.name, what="log-mel", atol=1e-5)


def test_token_layout(captioner, cases):
    for case in cases.values():
        ids = case.theirs["input_ids"][0].tolist()
        assert_equal(token_ids(captioner, case.ours), ids, of=captioner.processor.config.family, what="token ids")


def test_published_positions(published, kind, cases):
    """Of the default of transformers, which takes the frames of Qwen3-Omni for one a second."""
    captioner = Captioner.load(published.folder, published_positions=True)
    theirs = {
        name: make_case(captioner, published, kind, CLIPS[name], seconds_per_grid=kind.published_grid_seconds)
        for name in ("video and audio", "audio longer than the video", "video")
    }
    test_token_layout(captioner, theirs)
    test_positions(published, theirs, kind)
    moved = [not torch.equal(theirs[name].ours.position_ids, cases[name].ours.position_ids) for name in theirs]
    assert moved == [kind.published_grid_seconds != 1.0] * 3


def test_positions(published, cases, kind):
    for case in cases.values():
        inputs = case.theirs
        mask = inputs.get("feature_attention_mask")
        positions, _ = published.model.get_rope_index(
            inputs["input_ids"],
            video_grid_thw=inputs.get("video_grid_thw"),
            attention_mask=inputs["attention_mask"],
            use_audio_in_video=inputs.get("use_audio_in_video", False),
            audio_seqlens=None if mask is None else mask.sum(-1),
            second_per_grids=inputs.get("video_second_per_grid"),
        )
        assert_equal(case.ours.position_ids.tolist(), positions.tolist(), of=kind.name, what="positions")


@torch.no_grad()
def test_log_probabilities(captioner, published, cases, kind):
    for case in cases.values():
        ours = captioner.network(case.ours, distributions=True)
        logits = published.model(**case.theirs).logits[0, -len(ours) - 1 : -1]
        assert ours.std() > 0.5  # not the same for all tokens
        assert_close(ours, logits.log_softmax(-1), of=kind.name, what="log-probabilities", atol=1e-4)


def test_greedy_tokens(captioner, published, cases, kind):
    """Alone with transformers, and here in one batch of all kinds, in which prompts are of different lengths."""
    num_answer = int((cases["video"].ours.labels != -100).sum())
    expected = []
    for case in cases.values():
        inputs = dict(answers(case.theirs, num_answer))
        ids = published.model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=0)
        expected.append(ids[0, inputs["input_ids"].shape[1] :].tolist())
    rows = [PromptRow(index, PROMPT) for index in range(len(cases))]
    inputs = captioner.processor.collate(rows, [case.media for case in cases.values()])
    found = generate(captioner.network, inputs, sampling=Sampling(max_new_tokens=12), stop_ids=[-1])
    assert_equal([[token.id for token in row] for row in found], expected, of=kind.name, what="greedy tokens")
    assert len({tuple(ids) for ids in expected}) > 1


@torch.no_grad()
def test_rows_share_a_prefix_and_features_are_cached(captioner, cases, tmp_path):
    media = [cases["video and audio"].media, cases["audio"].media]
    rows = [
        PromptRow(0, PROMPT, ANSWER),
        PromptRow(0, PROMPT, "no"),
        PromptRow(0, "Who?", "a"),
        PromptRow(1, "?", ANSWER),
    ]
    batch = captioner.processor.collate(rows, media)
    together = captioner.network(batch)
    for row, logps in zip(rows, together, strict=True):
        alone = captioner.network(captioner.processor.collate([replace(row, clip=0)], [media[row.clip]]))[0]
        assert (logps[: len(alone)] - alone).abs().max() < 1e-5
    cache = FeatureCache(tmp_path, max_bytes=1e9, model="model")
    for number, tokens in enumerate(captioner.network.encode(media, batch.layouts)):
        assert cache.save(str(number), ClipFeatures(tokens, batch.layouts[number]))
    features = [cache.load(str(number)) for number in range(2)]
    assert [one.layout.text_start for one in features] == [layout.text_start for layout in batch.layouts]
    cached = captioner.processor.collate(rows, features)
    assert torch.equal(cached.position_ids, batch.position_ids)
    assert (captioner.network(cached) - together).abs().max() < 1e-6


def test_frames_that_do_not_follow_the_rate_keep_their_real_times(captioner, kind):
    """6 frames of 12 s are a grid step of 4 s."""
    media = captioner.processor.clip_inputs(make_clip(frames=6, seconds=12.0))
    family = captioner.processor.family
    ids, rate = [[1], [2]], family.default_positions_per_second
    for published, step in ((False, 4 * rate), (True, int(kind.published_grid_seconds * rate))):
        times = family.layout(media, timestamp_ids=ids, published_positions=published).positions[0]
        assert times.unique().tolist() == [0, 1, 1 + step, 1 + 2 * step, 2 + 2 * step]


def test_audio_beyond_five_minutes_is_cut_off_where_transformers_does(captioner, published):
    media = captioner.processor.clip_inputs(make_clip(audio_seconds=302.5))
    is_cut = published.audio_options.get("truncation", True)
    assert media.mel.shape[-1] == (30_000 if is_cut else 30_250)
    warning = "ignoring the last 2.5 s of audio; this model takes 300.0 s"
    assert media.info.warnings == ((warning,) if is_cut else ())


def test_a_few_samples_of_audio_have_one_token(captioner):
    media = captioner.processor.clip_inputs(make_clip(audio_seconds=0.001))
    layout = captioner.processor.make_layout(media)
    assert len(layout) == 3 and layout.positions[0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("part", ["audio_config", "vision_config"])
def test_a_checkpoint_without_a_part_is_rejected(published, tmp_path, part):
    values = json.loads((published.folder / "config.json").read_text())
    values["thinker_config"][part] = None
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"the thinker's config has no {part}; use a checkpoint that"):
        load_config(tmp_path)


def test_a_trained_model_is_written_in_the_published_layout(captioner, published, tmp_path):
    captioner.save(tmp_path / "model")
    (tmp_path / "out").mkdir()
    write_published_layout(tmp_path / "model", tmp_path / "out", base=str(published.folder))
    written, base = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", published.folder))
    assert written.keys() == base.keys() and all(torch.equal(written[name], base[name]) for name in base)


@pytest.mark.parametrize("are_renamed", [False, True])
@torch.no_grad()
def test_an_adapter_of_ms_swift(published, cases, tmp_path, are_renamed):
    """It adapts a whole Omni model, whose thinker has other names in older versions of transformers, too."""
    omni = torch.nn.Module()
    omni.thinker = copy.deepcopy(published.model)
    projections = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
    pattern = rf"^(thinker\.model(?=\.)(?!\.visual|\.audio_tower).*\.({projections}))$"
    adapted = get_peft_model(omni, LoraConfig(r=4, lora_alpha=8, target_modules=pattern)).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.3)
    adapted.save_pretrained(tmp_path)
    (tmp_path / "additional_config.json").write_text('{"lora_dtype": null, "lorap_lr_ratio": null}')
    assert isinstance(json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"], str)
    if are_renamed:
        start, weights = "base_model.model.thinker.", load_file(tmp_path / "adapter_model.safetensors")
        weights = {
            f"base_model.model.{published_name(name.removeprefix(start))}": value for name, value in weights.items()
        }
        assert all(name.startswith(f"{start}model.layers.") for name in weights)
        save_file(weights, tmp_path / "adapter_model.safetensors")
    network, plain = (Captioner.load(published.folder, adapter=adapter).network for adapter in (tmp_path, None))
    for name, case in cases.items():
        ours = network(case.ours, distributions=True)
        theirs = omni.thinker(**case.theirs).logits[0, -len(ours) - 1 : -1].log_softmax(-1)
        assert (ours - theirs).abs().max() < 1e-4, name
        assert (ours - plain(case.ours, distributions=True)).abs().max() > 0.1, name
