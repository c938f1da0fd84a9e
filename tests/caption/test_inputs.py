"""What the network takes, pinned on clips made of known arrays."""

import numpy as np
import pytest
import torch

from salmonn.caption.inputs import Row, join_media, restrict_media
from salmonn.media.clip import Clip

SAMPLE_HZ = 16_000


def make_clip(*, frames: int = 3, samples: int | None = 24_000, start: float = 0.0, size: int = 48) -> Clip:
    """Frames of rising brightness at half a second each, and a tone; 24 000 samples are 1.5 s."""
    wave = None if samples is None else np.sin(np.arange(samples) * 0.2).astype(np.float32)
    pictures = np.zeros((frames, size, size, 3), np.uint8)
    pictures += 10 * np.arange(1, frames + 1, dtype=np.uint8).reshape(-1, 1, 1, 1)
    return Clip("made.mp4", pictures, start + 0.25 + 0.5 * np.arange(frames), wave, start, 1.5)


def test_media_of_a_clip(processor):
    media = processor.media(make_clip(start=4.0))
    assert media.frames.shape == (3, 3, 48, 48) and media.frames.dtype == torch.uint8
    assert media.frames[:, 0, 0, 0].tolist() == [10, 20, 30]
    assert media.frame_times[0].tolist() == [0.25, 0.75, 1.25]  # from the start of the span
    assert media.mel.shape == (1, 40, 800) and media.num_windows == (3,)


def test_colours_stay_with_their_places(processor):
    clip = make_clip(frames=1)
    clip.frames[0, 5, 7] = (1, 2, 3)  # row 5, column 7
    assert processor.media(clip).frames[0, :, 5, 7].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("samples", "chunks", "windows"),
    [
        (160, 1, 2),  # shorter than a second: as if a second
        (16_000, 1, 2),
        (16_001, 1, 2),  # one sample more is no third window
        (17_000, 1, 3),
        (112_000, 1, 14),  # 7 s
        (128_000, 1, 16),  # a whole chunk
        (132_000, 2, 17),  # 8.25 s
        (320_000, 3, 40),  # 20 s: 8 + 8 + 4
    ],
)
def test_windows_and_chunks_of_sound(processor, samples, chunks, windows):
    media = processor.media(make_clip(samples=samples))
    assert media.mel.shape == (chunks, 40, 800) and media.num_windows == (windows,)


@torch.no_grad()
@pytest.mark.parametrize("samples", [160, 128_000, 128_002, 132_000])
def test_every_length_of_sound_is_taken_by_the_network(captioner, samples):
    media = captioner.processor.media(make_clip(samples=samples))
    (tokens,) = captioner.network.encode(media)
    assert len(tokens) == captioner.processor.num_clip_tokens(media)


def test_a_chunk_holds_its_own_stretch_of_sound(processor):
    long = make_clip(samples=160_000)  # 10 s: 8 + 2
    mel = processor.media(long).mel
    alone = Clip("made.mp4", long.frames, long.frame_times, long.waveform[128_000:], 0.0, 2.0)
    assert torch.equal(processor.media(alone).mel[0], mel[1]) and not torch.equal(mel[0], mel[1])


def test_sound_alone_and_picture_alone(processor):
    silent = processor.media(make_clip(samples=None))
    assert silent.mel.shape == (0, 40, 800) and silent.num_windows == (0,)
    assert processor.num_clip_tokens(silent) == 30  # 3 frames of 10 tokens
    heard = processor.media(make_clip(frames=0))
    assert heard.frames.shape == (0, 3, 48, 48) and len(heard.frame_times[0]) == 0
    assert processor.num_clip_tokens(heard) == 3  # 1.5 s in windows of half a second


def test_frames_of_another_size_are_refused(processor):
    with pytest.raises(ValueError, match=r"made\.mp4.*48 x 48"):
        processor.media(make_clip(size=32))


def test_layout_of_the_tokens(processor):
    media = processor.media(make_clip())
    inputs = processor.inputs([Row(0, "Tell.", "a tone")], [media])
    ids, labels = inputs.input_ids[0].tolist(), inputs.labels[0].tolist()
    text = "<|im_start|>user\n<|av_start|>" + "<|av|>" * 33 + "<|av_end|>Tell.<|im_end|>\n<|im_start|>assistant\n"
    assert processor.tokenizer.decode(ids) == text + "a tone<|im_end|>"  # 3 frames * 10 tokens + 3 windows = 33
    answer = [*processor.tokenizer.encode("a tone"), processor.tokenizer.eos_token_id]
    assert labels == [-100] * (len(ids) - len(answer)) + answer
    assert ids[-len(answer) :] == answer
    assert inputs.attention_mask.eq(1).all() and inputs.clip_index == (0,)


class Letters:
    """A tokenizer that gives each letter its number (a 1, b 2, ...) and the clip's placeholder 99."""

    pad_token_id, eos_token_id, all_special_tokens = 0, 50, ()

    def apply_chat_template(self, messages, **_):
        return messages[0]["content"]

    def encode(self, text, **_):
        text = text.replace("<|av_start|>", "").replace("<|av_end|>", "").replace("<|av|>", "*")
        return [99 if letter == "*" else ord(letter) - 96 for letter in text]


@pytest.fixture
def letters(processor):
    """The processor with `Letters`."""
    return type(processor)(Letters(), config=processor.config)


def test_padding_on_the_right_for_training(letters):
    clips = [torch.zeros(2, 5), torch.zeros(1, 5)]
    inputs = letters.inputs([Row(0, "ab", "c"), Row(1, "d", ""), Row(0, "e", "fgh")], clips)
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
    assert inputs.clip_index == (0, 1, 0) and inputs.media is None and len(inputs.blocks) == 2


def test_padding_on_the_left_for_generation(letters):
    inputs = letters.inputs([Row(0, "ab"), Row(1, "d")], [torch.zeros(2, 5), torch.zeros(1, 5)], pad_left=True)
    assert inputs.input_ids.tolist() == [[99, 99, 1, 2], [0, 0, 99, 4]]
    assert inputs.attention_mask.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert inputs.labels.eq(-100).all()


def test_join_media(processor):
    both, heard = processor.media(make_clip()), processor.media(make_clip(frames=0, samples=160_000))
    silent = processor.media(make_clip(frames=2, samples=None))
    joined = join_media([both, heard, silent])
    assert joined.frames[:, 0, 0, 0].tolist() == [10, 20, 30, 10, 20]
    assert [times.tolist() for times in joined.frame_times] == [[0.25, 0.75, 1.25], [], [0.25, 0.75]]
    assert joined.num_windows == (3, 20, 0) and len(joined.mel) == 3
    assert torch.equal(joined.mel[1:], heard.mel)


def test_restrict_media(processor):
    both = processor.media(make_clip())
    seen, heard = restrict_media(both, "visual"), restrict_media(both, "audio")
    assert torch.equal(seen.frames, both.frames) and len(seen.mel) == 0 and seen.num_windows == (0,)
    assert torch.equal(heard.mel, both.mel) and len(heard.frames) == len(heard.frame_times[0]) == 0
    whole = restrict_media(both, "both")
    assert torch.equal(whole.frames, both.frames) and torch.equal(whole.mel, both.mel)


@pytest.mark.parametrize(("kept", "asked"), [("visual", "audio"), ("audio", "visual")])
def test_nothing_left_is_refused(processor, kept, asked):
    media = restrict_media(processor.media(make_clip()), kept)
    with pytest.raises(ValueError, match=f"nothing left for use '{asked}'"):
        restrict_media(media, asked)


def test_a_real_clip(processor, videos, media, clips):
    """7.6 s at 2 frames a second: 15 frames from 0.25 s on, 16 windows (the last one begun)."""
    assert clips.references[0].duration_seconds == 7.6
    assert media[0].frames.shape == (15, 3, 48, 48) and media[0].num_windows == (16,)
    part = processor.read(videos[0], start_seconds=2.0, end_seconds=4.0)
    assert len(part.frames) == 4 and part.num_windows == (4,)
    assert part.frame_times[0].tolist() == [0.25, 0.75, 1.25, 1.75]
    assert torch.equal(part.frames, media[0].frames[4:8])  # 2.25, 2.75, 3.25, 3.75 s of the whole
