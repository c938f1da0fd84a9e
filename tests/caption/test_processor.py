"""Model inputs of clips with known pixels and samples."""

import copy
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch

from salmonn.caption.processor import PromptRow, select_modality
from salmonn.media.clip import Clip
from salmonn.model.families.salmonn2_plus import interleave_by_time
from salmonn.model.layout import ClipFeatures, ClipInfo

SAMPLE_HZ = 16_000


def make_clip(*, frames: int = 3, samples: int | None = 24_000, start: float = 0.0, size: int = 48) -> Clip:
    """Make frames of 0.5 s with increasing brightness, and a tone; 24 000 samples are 1.5 s."""
    wave = None if samples is None else np.sin(np.arange(samples) * 0.2).astype(np.float32)
    pixels = np.zeros((frames, size, size, 3), np.uint8)
    pixels += 10 * np.arange(1, frames + 1, dtype=np.uint8).reshape(-1, 1, 1, 1)
    return Clip("clip.mp4", pixels, start + 0.25 + 0.5 * np.arange(frames), wave, start, 0.5 * frames, 1.5)


def test_inputs_of_a_clip(processor):
    media = processor.clip_inputs(make_clip(start=4.0))
    assert (media.grid, media.num_frames, media.seconds) == ((0, 0, 0), 3, 1.5)
    assert media.pixels.shape == (3, 3, 48, 48) and media.pixels.dtype == torch.uint8
    assert [frame.unique().tolist() for frame in media.pixels] == [[10], [20], [30]]
    assert media.mel.shape == (1, 40, 800)


@pytest.mark.parametrize(
    ("frames", "samples", "modality"), [(3, 24_000, "both"), (3, None, "visual"), (0, 160, "audio")]
)
@pytest.mark.parametrize("model", ["processor", "plus"])
def test_inputs_keep_what_is_known_about_the_file(request, model, frames, samples, modality):
    processor = request.getfixturevalue(model)
    processor = getattr(processor, "processor", processor)
    clip = replace(make_clip(frames=frames, samples=samples), warnings=("lost 1 s of audio",), is_complete=False)
    inputs = processor.clip_inputs(clip)
    assert inputs.info == ClipInfo(modality, is_complete=False, warnings=("lost 1 s of audio",))
    assert inputs.to("cpu").info == inputs.info


def test_inputs_from_two_files_keep_what_is_known_about_both(processor, monkeypatch):
    clips = {
        "a.mp4": replace(make_clip(samples=None), warnings=("lost a frame",)),
        "a.wav": replace(make_clip(frames=0), warnings=("lost 1 s of audio",), is_complete=False),
    }
    monkeypatch.setattr("salmonn.caption.read_spec.read_clip", lambda path, *_, **__: clips[str(path)])
    info = ClipInfo("both", is_complete=False, warnings=("lost a frame", "lost 1 s of audio"))
    assert processor.read("a.mp4", sound="a.wav").info == info
    assert processor.read("a.mp4", sound="a.wav", modality="visual").info == ClipInfo(
        "visual", warnings=("lost a frame",)
    )


def test_inputs_of_a_clip_in_2_plus(plus):
    media = plus.processor.clip_inputs(make_clip(start=4.0))
    # Three frames are two steps (the last frame is repeated); 48 / 8 = 6 patches a side.
    assert media.grid == (2, 6, 6) and (media.num_frames, media.seconds) == (3, 1.5)
    assert media.pixels.shape == (72, 3 * 2 * 8 * 8) and media.pixels.dtype == torch.uint8
    assert media.pixels[:36].unique().tolist() == [10, 20] and media.pixels[36:].unique().tolist() == [30]
    assert media.mel.shape == (1, 40, 800)


@pytest.mark.parametrize(
    ("samples", "chunks"),
    [(160, 1), (16_001, 1), (112_000, 1), (128_000, 1), (128_002, 1), (132_000, 2), (320_000, 3)],
)
@torch.no_grad()
def test_audio_of_any_duration_in_2_plus(plus, samples, chunks):
    media = plus.processor.clip_inputs(make_clip(samples=samples))
    assert media.mel.shape == (chunks, 40, 800)
    layout = plus.processor.make_layout(media)
    assert len(layout) == 2 * 4 + chunks * 16  # two steps of four tokens; 16 windows a chunk
    assert len(plus.network.encode([media], [layout])[0]) == len(layout)


@pytest.mark.parametrize("samples", [160, 16_001, 24_000, 320_000])
@torch.no_grad()
def test_audio_of_any_duration(captioner, samples):
    """Cut to the duration of the video, 1.5 s: a chunk of 16 windows, stretched to 6 for each of the three frames."""
    media = captioner.processor.clip_inputs(make_clip(samples=samples))
    layout = captioner.processor.make_layout(media)
    assert media.mel.shape == (1, 40, 800) and len(layout) == 3 * (12 + 6)
    assert len(captioner.network.encode([media], [layout])[0]) == len(layout)
    long_mel = captioner.processor.clip_inputs(make_clip(samples=320_000)).mel
    short_mel = captioner.processor.clip_inputs(make_clip(samples=24_000)).mel
    assert torch.equal(long_mel, short_mel)


def test_each_chunk_has_its_own_audio(plus):
    long = make_clip(samples=160_000)  # 10 s: 8 + 2
    mel = plus.processor.clip_inputs(long).mel
    second = replace(long, waveform=long.waveform[128_000:])
    assert torch.equal(plus.processor.clip_inputs(second).mel[0], mel[1]) and not torch.equal(mel[0], mel[1])


@pytest.mark.parametrize(("model", "num_visual"), [("processor", 3 * 12), ("plus", 2 * 4)])
def test_audio_only_and_video_only(request, model, num_visual):
    processor = request.getfixturevalue(model)
    processor = getattr(processor, "processor", processor)
    silent = processor.clip_inputs(make_clip(samples=None))
    assert silent.mel.shape == (0, 40, 800) and processor.make_layout(silent).is_visual.tolist() == [True] * num_visual
    audible = processor.clip_inputs(make_clip(frames=0))
    assert (audible.num_frames, len(audible.pixels)) == (0, 0)
    assert processor.make_layout(audible).is_visual.tolist() == [False] * 16


def test_layout_of_the_tokens(processor):
    media = processor.clip_inputs(make_clip())
    inputs = processor.collate([PromptRow(0, "Tell.", "a tone")], [media])
    ids, labels = inputs.input_ids[0], inputs.labels[0].tolist()
    num_clip_tokens = 3 * (12 + 6)
    clip_positions = (ids == -200).nonzero().flatten().tolist()
    assert clip_positions == list(range(clip_positions[0], clip_positions[0] + num_clip_tokens))
    text = (
        processor.tokenizer.decode(ids[: clip_positions[0]]),
        processor.tokenizer.decode(ids[clip_positions[-1] + 1 :]),
    )
    assert text == ("<|im_start|>user\n", "\n\nTell.<|im_end|>\n<|im_start|>assistant\na tone<|im_end|>")
    answer = [*processor.tokenizer.encode("a tone"), processor.tokenizer.eos_token_id]
    assert labels == [-100] * (len(ids) - len(answer)) + answer
    assert inputs.position_ids[:, 0].tolist() == [list(range(len(ids)))] * 3


def test_layout_of_the_tokens_of_2_plus(plus):
    processor = plus.processor
    media = processor.clip_inputs(make_clip())
    inputs = processor.collate([PromptRow(0, "Tell.", "a tone")], [media])
    ids, labels = inputs.input_ids[0].tolist(), inputs.labels[0].tolist()
    # Frames of 0.5 s, two per step: step 0 is followed by two windows of audio, step 1 by the other 14.
    clip = "<|video_pad|>" * 4 + "<|audio_pad|>" * 2 + "<|video_pad|>" * 4 + "<|audio_pad|>" * 14
    text = f"<|im_start|>user\n<|vision_start|>{clip}<|vision_end|>\nTell.<|im_end|>\n<|im_start|>assistant\n"
    assert processor.tokenizer.decode(ids) == text + "a tone<|im_end|>"
    answer = [*processor.tokenizer.encode("a tone"), processor.tokenizer.eos_token_id]
    assert labels == [-100] * (len(ids) - len(answer)) + answer
    assert inputs.attention_mask.eq(1).all() and inputs.clip_index == (0,)
    time = inputs.position_ids[0, 0].tolist()
    start = ids.index(processor.config.placeholder_ids[0])
    assert time[start : start + 10] == [start] * 4 + [start, start + 1] + [start + 2] * 4
    assert time[-len(answer) :] == list(range(time[-1] - len(answer) + 1, time[-1] + 1))


def test_a_prompt_longer_than_the_context_is_reported(processor, caplog):
    media = processor.clip_inputs(make_clip())
    processor.collate([PromptRow(0, "Tell. " * 100)], [media])
    assert not caplog.text
    processor.collate([PromptRow(0, "Tell. " * 4000)], [media])
    assert "exceed the 4096 that the language model was trained for" in caplog.text


class CharTokenizer:
    """Tokenizer with one token per character: a 1, b 2, ..."""

    all_special_tokens = ()
    special: ClassVar[dict[str, int]] = {
        "<|endoftext|>": 0,
        "<|im_start|>": 49,
        "<|im_end|>": 50,
        "<|vision_start|>": 51,
        "<|vision_end|>": 52,
        "<|video_pad|>": 99,
        "<|audio_pad|>": 98,
    }

    def get_vocab(self):
        return self.special

    def convert_tokens_to_ids(self, tokens):
        return self.special[tokens] if isinstance(tokens, str) else [self.special[token] for token in tokens]

    def convert_ids_to_tokens(self, ids):
        return ["<|clip|>" for _ in ids]

    def apply_chat_template(self, messages, **_):
        return messages[0]["content"]

    def encode(self, text, **_):
        plain = text.replace("<|vision_start|>", "").replace("<|vision_end|>", "").replace("\n", "")
        return [ord(char) - 96 for char in plain]


def test_a_tokenizer_without_placeholders_is_rejected(plus):
    """Before anything is loaded; otherwise the first clip with audio would fail."""
    tokenizer = CharTokenizer()
    tokenizer.special = {token: number for token, number in CharTokenizer.special.items() if number < 90}
    with pytest.raises(ValueError, match=r"the tokenizer lacks <\|video_pad\|>, <\|audio_pad\|>"):
        type(plus.processor)(tokenizer, config=plus.processor.config)


@pytest.fixture
def chars(processor):
    """The processor with `CharTokenizer`."""
    config = copy.deepcopy(processor.config)
    config.placeholder_ids = (99, 98)
    return type(processor)(CharTokenizer(), config=config)


def make_features(length: int) -> ClipFeatures:
    """Features of `length` visual tokens in a row."""
    return ClipFeatures(torch.zeros(length, 5), interleave_by_time((1, 1, length), num_audio=0, second_per_grid=1.0))


def test_padding_on_the_right_for_training(chars):
    clips = [make_features(2), make_features(1)]
    inputs = chars.collate([PromptRow(0, "ab", "c"), PromptRow(1, "d", ""), PromptRow(0, "e", "fgh")], clips)
    assert inputs.input_ids.tolist() == [
        [99, 99, 1, 2, 3, 50, 0],
        [99, 4, 50, 0, 0, 0, 0],
        [99, 99, 5, 6, 7, 8, 50],
    ]
    assert inputs.attention_mask.tolist() == [[1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]]
    assert inputs.labels.tolist() == [
        [-100, -100, -100, -100, 3, 50, -100],
        [-100, -100, 50, -100, -100, -100, -100],
        [-100, -100, -100, 6, 7, 8, 50],
    ]
    assert inputs.clip_index == (0, 1, 0) and inputs.clip_inputs == () and len(inputs.clip_features) == 2


def test_prompts_without_answers_for_generation(chars):
    inputs = chars.collate([PromptRow(0, "ab"), PromptRow(1, "d")], [make_features(2), make_features(1)])
    assert inputs.input_ids.tolist() == [[99, 99, 1, 2], [99, 4, 0, 0]]
    assert inputs.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert inputs.labels.eq(-100).all()


def test_select_modality(processor):
    both = processor.clip_inputs(make_clip())
    visual, audio = select_modality(both, "visual"), select_modality(both, "audio")
    assert torch.equal(visual.pixels, both.pixels) and len(visual.mel) == 0 and visual.grid == both.grid
    assert torch.equal(audio.mel, both.mel) and (audio.num_frames, len(audio.pixels)) == (0, 0)
    unchanged = select_modality(both, "both")
    assert torch.equal(unchanged.pixels, both.pixels) and torch.equal(unchanged.mel, both.mel)
    assert [one.info.modality for one in (visual, audio, unchanged)] == ["visual", "audio", "both"]


@pytest.mark.parametrize(("present", "requested"), [("visual", "audio"), ("audio", "visual")])
def test_a_missing_modality_is_rejected(processor, present, requested):
    media = select_modality(processor.clip_inputs(make_clip()), present)
    with pytest.raises(ValueError, match=f"modality '{requested}' is not available"):
        select_modality(media, requested)


def test_a_file_and_a_span_of_it(processor, videos):
    full = processor.read(videos[0])
    part = processor.read(videos[0], start_seconds=1.0, end_seconds=3.0)
    assert (part.seconds, part.num_frames, full.num_frames) == (2.0, 4, 16)


def test_a_span_of_a_file_in_2_plus(plus, videos):
    full = plus.processor.read(videos[0])
    part = plus.processor.read(videos[0], start_seconds=1.0, end_seconds=3.0)
    assert part.seconds == 2.0 and part.num_frames == 8  # 2 / 0.26, rounded
    assert full.num_frames > 20 and full.grid[1:] == part.grid[1:] == (6, 6)
