"""D-ORCA: the token layout, positions and inputs of its published code, followed step by step on a small random model.

The published code needs a GPU and transformers 4.57, so that it is not run. Its rules are written down here (from
qwenvl/data/data_qwen.py and qwenvl/model/qwen3_vl/ of github.com/WeChatCV/D-ORCA), on the modules of transformers.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from salmonn.caption.captioner import Captioner
from salmonn.caption.generator import Sampling
from salmonn.caption.processor import PromptRow
from salmonn.caption.prompt import train_tokenizer
from salmonn.conversations import Turn
from salmonn.media.clip import Clip
from salmonn.model.families.base import AUDIO_PAD, VIDEO_PAD
from salmonn.model.lora import LoraConfig, attach_lora
from salmonn.train.data import ClipSource, SftBatches, TrainingExample, all_texts, sft_loss
from salmonn.train.loop import FitConfig, FitContext, fit
from tests.completions import generate
from tests.d_orca import save_tiny
from tests.exactness import assert_close, assert_equal

RATE, PROMPT = 4.0, "Tell."


@pytest.fixture(scope="module")
def captioner(clips, tmp_path_factory):
    """A model that was loaded from a checkpoint with the published names."""
    folder = tmp_path_factory.mktemp("models") / "d-orca"
    texts = [*all_texts(clips.references), "seconds Please describe this video"]
    tokenizer = train_tokenizer(texts, vocab_size=400)
    return Captioner.load(save_tiny(folder, tokenizer))


def make_clip(numbers, *, audio_seconds, rows=32, columns=48, seconds=5.0):
    random = np.random.default_rng(len(numbers))
    return Clip(
        path="clip.mp4",
        frames=random.integers(0, 256, (len(numbers), rows, columns, 3), dtype=np.uint8),
        frame_times=np.array(numbers) / RATE,
        waveform=None if audio_seconds is None else random.standard_normal(int(audio_seconds * 16_000)).astype("f4"),
        start_seconds=0.0,
        video_seconds=seconds if numbers else 0.0,
        duration_seconds=max(seconds, audio_seconds or 0.0),
    )


# Frames, and seconds of audio: one chunk of 60 tokens, two chunks, none, and audio alone.
CASES = [([0, 3, 7, 10, 14], 4.0), ([0, 19], 33.0), ([0, 6, 12], None), ([], 3.0)]


def published_text(numbers, audio_seconds, *, grid_area, seconds=5.0) -> str:
    """Return the prompt as `generate_id_target_3vl` writes it."""
    num_audio = 0 if audio_seconds is None else -int(-max(audio_seconds, 1) // 30) * 60
    if not numbers:
        clip = "<|audio_pad|>" * num_audio
    else:
        times = Qwen3VLProcessor._calculate_timestamps(None, list(numbers), RATE, 2)
        second_per_grid = 2 / (len(numbers) / seconds)
        starts = (torch.arange(len(times)) * second_per_grid * 2).long()
        counts = torch.diff(starts).tolist() if num_audio else [0] * (len(times) - 1)
        counts.append(num_audio - sum(counts))
        clip = "".join(
            f"<{time:.1f} seconds><|vision_start|>{'<|video_pad|>' * grid_area}{'<|audio_pad|>' * count}<|vision_end|>"
            for time, count in zip(times, counts, strict=True)
        )
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    return f"{system}<|im_start|>user\n{clip}\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"


def published_positions(ids, *, video_id, rows, columns):
    """Return the positions that `get_rope_index` computes: a run of video tokens has a grid, all others count up."""
    parts, current, index = [], 0, 0
    while index < len(ids):
        if ids[index] == video_id:
            cells = torch.arange(rows * columns)
            parts.append(torch.stack([0 * cells, cells // columns, cells % columns]) + current)
            current, index = int(parts[-1].max()) + 1, index + len(cells)
        else:
            parts.append(torch.full((3, 1), current))
            current, index = current + 1, index + 1
    return torch.cat(parts, dim=1)


@torch.no_grad()
def published_logits(network, inputs, ids, positions, video_id, audio_id):
    """Return the logits of a prompt as `Qwen3VLModel.forward` computes them."""
    clip = inputs.clip_inputs[0]
    embeds, deep, mask = network.lm.get_input_embeddings()(ids), {}, ids == video_id
    if clip.num_frames:
        output = network.vision.encoder((clip.pixels / 255 - 0.5) / 0.5, grid_thw=torch.tensor([clip.grid]))
        embeds[mask] = output.pooler_output
        deep = dict(visual_pos_masks=mask[None], deepstack_visual_embeds=output.deepstack_features)
    if len(clip.mel):
        audio = network.audio
        steps = audio.encoder(clip.mel).last_hidden_state.transpose(1, 2).unsqueeze(2)
        windows = F.unfold(steps, kernel_size=(1, 25), stride=(1, 25))
        windows = windows.view(len(clip.mel), -1, 25, windows.shape[-1]).permute(0, 3, 2, 1).flatten(0, 1)
        queries = audio.qformer.queries.expand(len(windows), -1, -1)
        hidden = audio.qformer.qformer(query_embeds=queries, encoder_hidden_states=windows).last_hidden_state
        embeds[ids == audio_id] = audio.projector(hidden).flatten(0, 1)
    hidden = network.lm.get_decoder()(inputs_embeds=embeds[None], position_ids=positions[:, None], **deep)
    return network.lm.lm_head(hidden.last_hidden_state)[0]


@pytest.mark.parametrize("case", CASES, ids=["both", "two chunks", "visual", "audio"])
def test_layout_positions_and_logits(captioner, case):
    numbers, audio_seconds = case
    processor, network = captioner.processor, captioner.network
    tokenizer = processor.tokenizer
    video_id, audio_id = tokenizer.convert_tokens_to_ids([VIDEO_PAD, AUDIO_PAD])
    text = published_text(numbers, audio_seconds, grid_area=2 * 3)
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False))
    inputs = processor.collate(
        [PromptRow(0, PROMPT)], [processor.clip_inputs(make_clip(numbers, audio_seconds=audio_seconds))]
    )
    (ours,), (layout,) = inputs.input_ids.clone(), inputs.layouts
    is_text = layout.order >= layout.num_visual + len(inputs.clip_inputs[0].mel) * 60
    ours[torch.isin(ours, torch.tensor([video_id, audio_id])).nonzero().flatten()[is_text]] = torch.tensor(
        layout.timestamp_ids, dtype=torch.long
    )
    assert_equal(ours.tolist(), ids.tolist(), of="d-orca", what="token ids")
    positions = published_positions(ids.tolist(), video_id=video_id, rows=2, columns=3)
    assert_equal(inputs.position_ids[:, 0].tolist(), positions.tolist(), of="d-orca", what="positions")
    expected = published_logits(network, inputs, ids, positions, video_id, audio_id)
    logits, _, _ = network.prefill(inputs)
    assert_close(logits[0], expected[-1], of="d-orca", what="logits", atol=1e-4)


def test_greedy_tokens_of_a_batch_of_different_clips(captioner):
    """Of clips with video and audio, one of them, or the other."""
    processor, network = captioner.processor, captioner.network
    clips = [processor.clip_inputs(make_clip(numbers, audio_seconds=audio)) for numbers, audio in CASES]
    options = dict(sampling=Sampling(max_new_tokens=12), stop_ids=[-1])
    batch = generate(network, processor.collate([PromptRow(index, PROMPT) for index in range(4)], clips), **options)
    assert batch == [
        generate(network, processor.collate([PromptRow(0, PROMPT)], [clip]), **options)[0] for clip in clips
    ]
    assert len({tuple(token.id for token in row) for row in batch}) > 1


@torch.no_grad()
def test_only_visual_tokens_have_deep_features(captioner):
    processor = captioner.processor
    (features,) = captioner.encode([processor.clip_inputs(make_clip(CASES[0][0], audio_seconds=4.0))])
    is_visual = features.layout.is_visual
    assert features.tokens[is_visual, 64:].abs().min() > 0 and not features.tokens[~is_visual, 64:].any()
    assert int((~is_visual).sum()) == 60 + len(features.layout.timestamp_ids)


def test_training_keeps_prefix_sharing_exact(captioner):
    network, processor = captioner.network, captioner.processor
    clips = [processor.clip_inputs(make_clip(numbers, audio_seconds=audio)) for numbers, audio in CASES[:2]]
    rows = [
        PromptRow(0, "Tell.", "a star"),
        PromptRow(1, "Which?", "two"),
        PromptRow(0, "Tell.", "a low tone is heard"),
    ]
    with torch.no_grad():
        shared = network(processor.collate(rows, captioner.encode(clips)))
        for number, row in enumerate(rows):
            (plain,) = network(processor.collate([PromptRow(0, row.prompt, row.answer)], [clips[row.clip]]))
            assert torch.allclose(shared[number, : len(plain)], plain, atol=1e-5)


def test_an_adapter_learns_captions(captioner, tmp_path):
    """Of clips with video and audio, whose features are computed once; it is removed again afterwards."""
    network, processor = captioner.network, captioner.processor
    clips = [processor.clip_inputs(make_clip(numbers, audio_seconds=audio)) for numbers, audio in CASES[:2]]
    features = dict(zip((ClipSource(Path("a")), ClipSource(Path("b"))), captioner.encode(clips), strict=True))
    examples = [TrainingExample(one, (Turn("Tell.", f"a red star and {n} tones"),)) for n, one in enumerate(features)]
    batches = SftBatches(examples, processor, features.__getitem__, batch_size=2, seed=0)
    attach_lora(network, LoraConfig(rank=8, dropout=0.0), seed=0)
    config = FitConfig(learning_rate=3e-3, steps=5, warmup_ratio=0.2, batch_size=2)
    fit(network, batches, sft_loss, config, context=FitContext("captions", tmp_path))
    network.lm = network.lm.unload()
    steps = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert steps[-1]["loss"] < 0.95 * steps[0]["loss"]
