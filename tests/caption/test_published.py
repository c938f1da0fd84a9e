"""Published checkpoints from file to caption: inputs of clips and prompts in each family.

The models are the parity fixtures: random ones in the published layout, with a byte-level tokenizer.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from salmonn.caption.captioner import Captioner
from salmonn.caption.generator import Sampling
from salmonn.caption.processor import Processor, PromptRow
from salmonn.media.clip import Clip
from salmonn.model.families import from_published, get_family
from salmonn.model.loading import load_config
from tests.completions import complete

MEDIA = Path(__file__).parents[3] / "shared" / "media"
needs_media = pytest.mark.skipif(not MEDIA.is_dir(), reason=f"no media in {MEDIA}")
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
ANSWER = "<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(params=["salmonn2", "salmonn2-plus"])
def family(request) -> str:
    return request.param


def make_processor(folder: Path, **options) -> Processor:
    return Processor.load(folder, config=load_config(folder), **options)


def make_clip(*, frames: int, seconds: float, audio_seconds: float | None, side: int = 56) -> Clip:
    shape = (frames, side, side, 3)
    return Clip(
        path="clip.mp4",
        frames=np.zeros(shape if frames else (0, 0, 0, 3), np.uint8),
        frame_times=np.linspace(0, seconds, frames, endpoint=False),
        waveform=None if audio_seconds is None else np.zeros(round(audio_seconds * 16_000), np.float32),
        start_seconds=0.0,
        video_seconds=seconds if frames else 0.0,
        duration_seconds=max(seconds, audio_seconds or 0.0),
    )


def prompt_text(processor: Processor, clip: Clip, prompt: str = "Tell.") -> str:
    """Return the text of a prompt about a clip, with V for visual and A for audio tokens (salmonn2: . for either)."""
    media = processor.clip_inputs(clip)
    ids = processor.collate([PromptRow(0, prompt)], [media]).input_ids[0].tolist()
    texts = ["." if token < 0 else processor.tokenizer.decode([token]) for token in ids]
    return "".join(texts).replace("<|video_pad|>", "V").replace("<|audio_pad|>", "A")


def token_kinds(processor: Processor, clip: Clip) -> str:
    """Return the kind of each clip token: V visual, A audio, characters of timestamps, _ zeros."""
    media = processor.clip_inputs(clip)
    layout = processor.make_layout(media)
    timestamps = processor.tokenizer.convert_ids_to_tokens(list(layout.timestamp_ids))
    source = "V" * layout.num_visual + "A" * (len(media.mel) * 60) + "".join(timestamps) + "_"
    return "".join(source[index] for index in layout.order.tolist())


class TestPlus:
    """video-SALMONN 2+."""

    @pytest.fixture
    def processor(self, published) -> Processor:
        return make_processor(published("salmonn2-plus"))

    def test_video_and_audio(self, processor):
        # 12 frames of 3 s are 6 steps of 0.5 s. Each has 2 x 2 visual tokens and one audio window; the last step gets
        # the rest of the 60 windows of the audio's chunk.
        text = prompt_text(processor, make_clip(frames=12, seconds=3.0, audio_seconds=3.0))
        clip = "VVVVA" * 5 + "VVVV" + "A" * 55
        assert text == f"{SYSTEM}<|vision_start|>{clip}<|vision_end|>\nTell.{ANSWER}"

    def test_audio_shorter_than_the_video(self, processor):
        # The published code fails here: 70 s of video in steps of 10 s would need 20 windows each, but there are 60.
        text = prompt_text(processor, make_clip(frames=14, seconds=70.0, audio_seconds=1.5))
        clip = ("VVVV" + "A" * 20) * 3 + "VVVV" * 4
        assert text == f"{SYSTEM}<|vision_start|>{clip}<|vision_end|>\nTell.{ANSWER}"

    def test_audio_longer_than_the_video(self, processor):
        text = prompt_text(processor, make_clip(frames=4, seconds=2.0, audio_seconds=31.0))
        clip = "VVVV" + "AA" + "VVVV" + "A" * 118
        assert text == f"{SYSTEM}<|vision_start|>{clip}<|vision_end|>\nTell.{ANSWER}"

    def test_video_only_and_audio_only(self, processor):
        silent = prompt_text(processor, make_clip(frames=3, seconds=3.0, audio_seconds=None))
        assert silent == f"{SYSTEM}<|vision_start|>{'V' * 8}<|vision_end|>\nTell.{ANSWER}"
        audio_only = prompt_text(processor, make_clip(frames=0, seconds=0.0, audio_seconds=61.0))
        assert audio_only == f"{SYSTEM}<|vision_start|>{'A' * 180}<|vision_end|>\nTell.{ANSWER}"

    def test_positions_and_published_positions(self, published, processor):
        published_code = make_processor(published("salmonn2-plus"), published_positions=True)
        clip = make_clip(frames=4, seconds=2.0, audio_seconds=1.0)
        media = processor.clip_inputs(clip)
        grid = [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]
        layout = processor.make_layout(media)
        assert layout.positions.T.tolist()[:10] == [*grid, [0, 0, 0], [1, 0, 1], *([2, *cell[1:]] for cell in grid)]
        assert layout.next_position == 60
        layout = published_code.make_layout(media)
        # It treats the first 8 tokens as video, a step as a second, and the tokens after them as text.
        second_step = [[2, *cell[1:]] for cell in grid]
        assert layout.positions.T.tolist()[:10] == [*grid, *second_step, [3, 3, 3], [4, 4, 4]]
        assert layout.next_position == 63

    def test_text_after_a_silent_clip_continues_from_its_greatest_position(self, processor):
        # 1 s of 168 x 168: the rows and columns go up to 5, the time to 1.
        layout = processor.make_layout(
            processor.clip_inputs(make_clip(frames=4, seconds=1.0, audio_seconds=None, side=168))
        )
        assert layout.positions.max(1).values.tolist() == [1, 5, 5] and layout.next_position == 6


class TestSalmonn2:
    """video-SALMONN 2."""

    @pytest.fixture
    def processor(self, published) -> Processor:
        return make_processor(published("salmonn2"))

    def test_video_and_audio(self, processor):
        # 182 tokens a frame; the 60 audio tokens are split between the two frames, 30 each.
        clip = make_clip(frames=2, seconds=2.0, audio_seconds=2.0, side=384)
        assert token_kinds(processor, clip) == ("V" * 182 + "A" * 30) * 2
        assert prompt_text(processor, clip) == f"{SYSTEM}{'.' * 424}\n\nTell.{ANSWER}"

    def test_line_breaks_after_the_clip_are_two_tokens(self, processor):
        media = processor.clip_inputs(make_clip(frames=1, seconds=1.0, audio_seconds=None, side=384))
        ids = processor.collate([PromptRow(0, "Tell.")], [media]).input_ids[0].tolist()
        end = len(ids) - ids[::-1].index(-200)
        line_break = processor.tokenizer.encode("\n")
        assert ids[end : end + 2] == line_break * 2

    def test_timestamps_without_audio(self, processor):
        clip = make_clip(frames=3, seconds=31.5, audio_seconds=None, side=384)
        frame = "V" * 182
        assert token_kinds(processor, clip) == f"{frame}10.5{frame}21.0{frame}31.5"
        short = make_clip(frames=3, seconds=28.5, audio_seconds=None, side=384)
        assert token_kinds(processor, short) == f"{frame}9.5_{frame}19.0{frame}28.5"

    def test_audio_ends_with_the_video(self, processor, caplog):
        longer = processor.clip_inputs(make_clip(frames=2, seconds=2.0, audio_seconds=45.0, side=384))
        assert len(longer.mel) == 1
        notice = "ignoring the last 43.0 s of audio; this model takes 2.0 s"
        assert notice in caplog.text and longer.info.warnings == (notice,) and longer.info.is_complete
        shorter = processor.clip_inputs(make_clip(frames=40, seconds=40.0, audio_seconds=3.0, side=384))
        # Its 60 tokens are fewer than two a frame, so they are stretched to 80.
        assert len(processor.make_layout(shorter)) == 182 * 40 + 80

    def test_audio_only_up_to_the_longest_clip(self, processor, caplog):
        inputs = processor.clip_inputs(make_clip(frames=0, seconds=0.0, audio_seconds=125.0))
        assert len(inputs.mel) == 4 and "ignoring the last 15.0 s of audio; this model takes 110.0 s" in caplog.text

    def test_published_positions_are_rejected(self, published):
        with pytest.raises(ValueError, match="published positions are not defined for a salmonn2 model"):
            make_processor(published("salmonn2"), published_positions=True)


# Frames, grid of patches, chunks of audio, tokens; computed by hand from the rate, length and size of each file.
EXPECTED_SIZES = {
    "salmonn2": {
        "flipping_a_pancake.mkv": (11, (0, 0, 0), 1, 11 * 182 + 66),
        "nasa_13013.mp4": (13, (0, 0, 0), 1, 13 * 182 + 65),
        "av1_video.mkv": (5, (0, 0, 0), 0, 5 * 185),
        "h265_video.mp4": (1, (0, 0, 0), 0, 185),
        "jfk.flac": (0, (0, 0, 0), 1, 60),
        "video_90.mov": (1, (0, 0, 0), 0, 185),
        "corrupted.mp4": (5, (0, 0, 0), 0, 5 * 185),  # damaged at 3 s
    },
    "salmonn2-plus": {
        "flipping_a_pancake.mkv": (103, (52, 18, 30), 1, 52 * 9 * 15 + 60),
        "nasa_13013.mp4": (130, (65, 20, 34), 1, 65 * 10 * 17 + 60),
        "av1_video.mkv": (50, (25, 26, 46), 0, 25 * 13 * 23),
        "h265_video.mp4": (10, (5, 10, 10), 0, 5 * 5 * 5),
        "jfk.flac": (0, (0, 0, 0), 1, 60),
        "video_0.mov": (3, (2, 22, 40), 0, 2 * 11 * 20),
        "video_90.mov": (3, (2, 40, 22), 0, 2 * 11 * 20),
    },
}


@needs_media
@pytest.mark.parametrize(
    ("family", "name"),
    [(family, name) for family, names in EXPECTED_SIZES.items() for name in names],
    indirect=["family"],
)
def test_inputs_of_real_files(published, family, name):
    num_frames, grid, chunks, tokens = EXPECTED_SIZES[family][name]
    processor = make_processor(published(family))
    media = processor.read(MEDIA / name)
    assert (media.num_frames, media.grid, len(media.mel)) == (num_frames, grid, chunks)
    assert len(processor.make_layout(media)) == tokens


@needs_media
def test_the_default_prompt_is_the_published_one(published, family):
    captioner = Captioner.load(published(family))
    short = Sampling(max_new_tokens=4)
    caption = captioner.caption(MEDIA / "h265_video.mp4", sampling=short, modality="visual")
    assert (
        caption.prompt == captioner.default_prompt("visual") and "leaving out" in caption.prompt
    ) or family == "salmonn2"
    assert caption.model == str(published(family))
    other = captioner.caption(MEDIA / "h265_video.mp4", sampling=short, prompt="What is it?", modality="visual")
    assert other.prompt == "What is it?"
    assert captioner.default_sampling().max_new_tokens == 1024


@needs_media
def test_batched_captions_equal_separate_ones(published, family):
    """A silent video, an audio file, and a span of a video in one batch."""
    captioner = Captioner.load(published(family))
    processor = captioner.processor
    media = [
        processor.read(MEDIA / "h265_video.mp4"),
        processor.read(MEDIA / "jfk.flac"),
        processor.read(MEDIA / "nasa_13013.mp4", start_seconds=2.0, end_seconds=3.0),
    ]
    short = Sampling(max_new_tokens=6)
    prompts = ["What?", "Describe it.", "Tell."]
    batched = complete(captioner, media, prompts, sampling=short)
    separate = [
        complete(captioner, [clip], [prompt], sampling=short)[0] for clip, prompt in zip(media, prompts, strict=True)
    ]
    assert batched == separate and len(set(batched)) > 1


def test_a_tokenizer_of_another_model_is_rejected(published, tmp_path):
    folder = published("salmonn2-plus")
    text = (folder / "tokenizer.json").read_text().replace("<|vision_start|>", "<|other|>")
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").write_text(text)
    settings = (folder / "tokenizer_config.json").read_text().replace("<|vision_start|>", "<|other|>")
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text(settings)
    with pytest.raises(ValueError, match=r"the tokenizer lacks <\|vision_start\|>"):
        Captioner.load(tmp_path)


def test_defaults_of_a_published_config():
    """Missing values are the published classes' defaults, which are those of the 7B model."""
    config = from_published(
        {
            "model_type": "qwen2_5_vl",
            "architectures": ["video_SALMONN2_plus"],
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        }
    )
    assert (config.lm["hidden_size"], config.lm["vision_config"]["depth"]) == (3584, 32)
    assert (config.whisper["d_model"], config.qformer["hidden_size"]) == (1280, 3072)
    assert config.placeholder_ids == (151656, 151665) and config.tokens_per_chunk == 60
    flat = from_published({"model_type": "video_salmonn_2", "hidden_size": 3584})
    assert (flat.vision["num_hidden_layers"], get_family(flat).tokens_per_frame, flat.tokens_per_chunk) == (26, 182, 60)


def test_a_plain_qwen_is_rejected(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl", "vision_config": {}}))
    with pytest.raises(ValueError, match="model type 'qwen2_5_vl'"):
        load_config(tmp_path)


def test_an_image_is_a_clip_of_one_frame(published, tmp_path):
    """At most 61,250 pixels: 500 x 300 becomes 308 x 168, that is 22 x 12 patches."""
    path = tmp_path / "photo.png"
    Image.new("RGB", (500, 300), "red").save(path)
    processor = make_processor(published("salmonn2-plus"))
    media = processor.read(path)
    assert (media.num_frames, media.grid, len(media.mel)) == (1, (1, 12, 22), 0)
    layout = processor.make_layout(media)
    assert layout.positions[0].max() == 0 and layout.next_position == 11  # after the largest column
    assert make_processor(published("salmonn2")).read(path).pixels.shape == (1, 3, 384, 384)


def test_the_repetition_penalty_of_a_checkpoint(published, family, tmp_path):
    """The published code generates with the checkpoint's repetition penalty; a saved model keeps it."""
    for path in published(family).iterdir():
        (tmp_path / path.name).symlink_to(path)
    assert load_config(tmp_path).repetition_penalty == 1.0
    (tmp_path / "generation_config.json").write_text('{"repetition_penalty": 1.05, "do_sample": true}')
    captioner = Captioner.load(tmp_path)
    assert captioner.network.config.repetition_penalty == 1.05
    captioner.save(tmp_path / "saved")
    assert load_config(tmp_path / "saved").repetition_penalty == 1.05


@pytest.mark.parametrize(("seconds", "chunks"), [(29.99, 1), (30.0, 1), (30.001, 2), (60.05, 3)])
def test_audio_chunks_are_counted_exactly(published, seconds, chunks):
    processor = make_processor(published("salmonn2-plus"))
    assert len(processor.clip_inputs(make_clip(frames=0, seconds=0.0, audio_seconds=seconds)).mel) == chunks


@pytest.mark.parametrize("values", [{"mm_pooling_position": "before"}, {"mm_spatial_pool_mode": "average"}])
def test_unsupported_pooling_is_rejected(values):
    with pytest.raises(ValueError, match="pools patches in an unsupported way"):
        from_published({"model_type": "video_salmonn_2", "hidden_size": 3584, "model_args": values})


def test_training_arguments_in_a_published_config():
    args = {"second_per_window": 0.333333, "second_stride": 0.333333, "num_speech_query_token": 1}
    values = {"model_type": "video_salmonn_2", "hidden_size": 3584, "model_args": args, "mm_spatial_pool_stride": None}
    config = from_published(values)
    assert (config.window_steps, config.stride_steps, config.tokens_per_chunk, config.pool) == (17, 17, 88, 2)
