"""A dry run's estimates of parameters, tokens and memory, compared with real networks, clips and processes."""

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from salmonn.caption.processor import Processor
from salmonn.model import memory as memory_plan
from salmonn.model.families import PUBLISHED_CONFIGS
from salmonn.model.loading import Placement, load_config, load_network, offline_config
from salmonn.model.lora import LoraConfig, attach_lora
from salmonn.model.memory import GIB, NumberSizes, Stack, TrainedParts
from salmonn.train.dry_run import (
    TEXT_TOKENS,
    ClipShape,
    MemoryEstimate,
    MemoryPlan,
    Workload,
    build_on_meta,
    clips_per_micro_batch,
    count_parameters,
    gpu_margins,
    placeholder_inputs,
    placeholder_layout,
    weights_bytes,
)
from salmonn.train.loop import FitConfig
from tests.launch import forked
from tests.limits import RUN_SECONDS

LORA = LoraConfig(rank=128, alpha=256)
# From the model cards of Qwen2, Qwen2.5 and Qwen2.5-VL: decoder, vision tower with merger. Of Qwen3-VL, the sum of both
# is stated.
PARAMETERS = {
    "Qwen/Qwen3-VL-2B-Instruct": (1_720_574_976, 2_127_532_032 - 1_720_574_976),
    "Qwen/Qwen3-VL-4B-Instruct": (4_022_468_096, 4_437_815_808 - 4_022_468_096),
    "tsinghua-ee/D-ORCA-8B-0210": (8_190_735_360, 8_767_123_696 - 8_190_735_360),
    "Qwen/Qwen3-VL-8B-Instruct": (8_190_735_360, 8_767_123_696 - 8_190_735_360),
    # The decoder of Qwen2.5 3B with output embeddings of its own.
    "Qwen/Qwen2.5-Omni-3B": (3_085_938_688 + 151_936 * 2048, 668_684_288),
    "Qwen/Qwen2.5-Omni-7B": (7_615_616_512, 676_550_144),
    "AVoCaDO-Captioner/AVoCaDO": (7_615_616_512, 676_550_144),
    # Qwen3-30B-A3B with 128 tokens more.
    "Qwen/Qwen3-Omni-30B-A3B-Instruct": (30_532_122_624 + 2 * 128 * 2048, None),
    "Qwen/Qwen3-Omni-30B-A3B-Captioner": (30_532_122_624 + 2 * 128 * 2048, None),
    "tsinghua-ee/video-SALMONN-2": (7_615_616_512, None),
    "3B": (3_085_938_688, 668_684_288),
    "7B": (7_615_616_512, 676_550_144),
    "72B": (72_706_203_648, 704_573_696),
}
WHISPER_LARGE_ENCODER = 636_968_960  # with its 1500 fixed positions
# 32 layers as Whisper's but with biases of keys, three convolutions of 480 channels, and a projection of 16 mel bins.
QWEN3_OMNI_ENCODER = (
    32 * (4 * (1280**2 + 1280) + 2 * 1280 * 5120 + 5120 + 1280 + 4 * 1280)
    + (480 * 9 + 480) + 2 * (480 * 480 * 9 + 480) + 480 * 16 * 1280 + 2 * 1280
)  # fmt: skip


def adapted(config):
    network = build_on_meta(config)
    with torch.device("meta"):
        attach_lora(network, LORA, seed=0)
    return network


@pytest.mark.parametrize("model", PUBLISHED_CONFIGS)
def test_parameters_of_the_published_models(model):
    config = offline_config(model)
    network = adapted(config)
    counts = count_parameters(network)
    decoder, vision = next(counts for size, counts in PARAMETERS.items() if size == model or f"plus_{size}_" in model)
    assert counts["language model"].total == decoder and counts["language model"].trained == 0
    num_vision = sum(value.numel() for value in network.vision.parameters())
    assert vision in (None, num_vision)
    # r (in + out) for queries, keys and values of each layer.
    text = config.lm.get("text_config") or config.lm
    width = text["hidden_size"]
    audio = {
        "salmonn2": WHISPER_LARGE_ENCODER + 2 * 1280,  # with a norm
        "salmonn2-plus": WHISPER_LARGE_ENCODER,
        "d-orca": WHISPER_LARGE_ENCODER,
        "qwen2.5-omni": WHISPER_LARGE_ENCODER - 1500 * 1280 + 2 * width,  # its positions are no weights; two markers
        "qwen3-omni": QWEN3_OMNI_ENCODER,
    }
    assert counts["audio encoder"].total == audio.get(config.family, 0)
    head_width = text.get("head_dim") or width // text["num_attention_heads"]
    wide, narrow = (head_width * text[f"num_{kind}_heads"] for kind in ("attention", "key_value"))
    adapter = text["num_hidden_layers"] * 128 * (width + wide + 2 * (width + narrow))
    assert counts["LoRA"].total == counts["LoRA"].trained == adapter
    assert sum(part.total for part in counts.values()) == sum(value.numel() for value in network.parameters())


def test_parameters_of_a_real_network(random_model):
    """The network on the meta device has the same parts as the one in the folder."""
    real = load_network(random_model)
    attach_lora(real, LORA, seed=0)
    assert count_parameters(real) == count_parameters(adapted(load_config(random_model)))
    persistent = sum(value.nbytes for value in real.parameters())
    assert weights_bytes(real, Placement(dtype="float32")) == persistent
    adapter = sum(value.nbytes for name, value in real.named_parameters() if "lora_" in name)
    assert weights_bytes(real, Placement(dtype="float32"), merged=True) == persistent - adapter
    assert weights_bytes(real, Placement(dtype="bfloat16")) == (persistent - adapter) // 2 + adapter


def test_an_unknown_model_is_rejected():
    with pytest.raises(ValueError, match=r"unknown model no/such.*video-SALMONN2_plus_7B_full"):
        offline_config("no/such")


@pytest.fixture(scope="module")
def video_file(tmp_path_factory):
    """51 s of 320x180 video at 12 frames a second, with audio, and its shape."""
    shape = ClipShape(seconds=51.0, width=320, height=180, frames_per_second=12.0)
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    with av.open(str(path), "w") as file:
        video = file.add_stream("mpeg4", rate=12)
        video.width, video.height, video.pix_fmt = shape.width, shape.height, "yuv420p"
        audio = file.add_stream("aac", rate=16_000, layout="mono")
        for number in range(51 * 12):
            array = np.full((shape.height, shape.width, 3), number % 256, np.uint8)
            file.mux(video.encode(av.VideoFrame.from_ndarray(array)))
        wave = np.sin(np.arange(51 * 16_000) * 0.2).astype(np.float32)
        for start in range(0, len(wave), 1024):
            part = av.AudioFrame.from_ndarray(wave[None, start : start + 1024], format="fltp", layout="mono")
            part.sample_rate, part.pts, part.time_base = 16_000, start, Fraction(1, 16_000)
            file.mux(audio.encode(part))
        file.mux(video.encode(None))
        file.mux(audio.encode(None))
    return path, shape


@pytest.mark.parametrize(
    "model",
    [
        "tsinghua-ee/video-SALMONN-2",
        "tsinghua-ee/video-SALMONN2_plus_7B_full",
        "Qwen/Qwen3-VL-8B-Instruct",
        "tsinghua-ee/D-ORCA-8B-0210",
    ],
)
def test_tokens_of_a_real_clip(video_file, processor, model):
    path, shape = video_file
    config = offline_config(model)
    real = Processor(processor.tokenizer, config=config)
    media, placeholder = real.read(path), placeholder_inputs(config, shape)
    assert (media.num_frames, media.grid, media.times) == (
        placeholder.num_frames, placeholder.grid, pytest.approx(media.times)
    )  # fmt: skip
    assert media.pixels.shape == placeholder.pixels.shape and media.mel.shape == placeholder.mel.shape
    texts = real.family.timestamps(media)
    assert real.family.timestamps(placeholder) == texts
    expected = real.family.layout(media, timestamp_ids=[[0] * len(TEXT_TOKENS.findall(text)) for text in texts])
    assert torch.equal(expected.positions, placeholder_layout(config, placeholder).positions)


def test_timestamp_tokens_are_counted():
    """Without audio, video-SALMONN 2 has a timestamp after each frame; each counts as many tokens as the longest."""
    config = offline_config("tsinghua-ee/video-SALMONN-2")
    network = build_on_meta(config)
    placement, fit = Placement(dtype="bfloat16"), FitConfig()
    lengths = [
        len(
            MemoryPlan(
                network, config, placement=placement, fit=fit, work=Workload(clips=1, answers=1, modality=modality)
            ).layout
        )
        for modality in ("both", "visual")
    ]
    assert lengths[1] - (lengths[0] - 51 * 3) == 51 * 4


def test_tokens_by_hand():
    """51 s at 1 fps: 51 frames of 13 x 14 tokens, each with 3 of the 120 audio tokens. In 2+ 510 frames, two a step."""
    configs = {model: offline_config(model) for model in PUBLISHED_CONFIGS}
    tokens = {
        model: len(placeholder_layout(config, placeholder_inputs(config, ClipShape())))
        for model, config in configs.items()
    }
    assert tokens.pop("tsinghua-ee/video-SALMONN-2") == 51 * (13 * 14 + 3)
    # 102 frames of at most 25,165,824 / 102 pixels: 51 steps of 20 x 11 squares of 32, each with its time, such as
    # "<0.2 seconds>" or "<10.2 seconds>", and two markers.
    times = [number - 0.5 + 0.25 for number in range(1, 52)]
    text = sum(len("<0.2>") + len(["seconds"]) + 2 + (time > 10) for time in times)
    for size in ("2B", "4B", "8B"):
        assert tokens.pop(f"Qwen/Qwen3-VL-{size}-Instruct") == 51 * 20 * 11 + text
    # The same frames, of at most 128 * 176,400 / 102 pixels: 19 x 11 squares of 32; and audio.
    assert tokens.pop("tsinghua-ee/D-ORCA-8B-0210") == 51 * 19 * 11 + text + 120
    # 102 frames of 25,600 * 784 / 51 pixels: 51 steps of 16 x 29 squares of 28, 25 audio tokens a second, 4 markers.
    for name in ("Qwen/Qwen2.5-Omni-7B", "Qwen/Qwen2.5-Omni-3B", "AVoCaDO-Captioner/AVoCaDO"):
        assert tokens.pop(name) == 51 * (16 * 29 + 25) + 4
    # 102 frames of 768 * 1024 pixels: 51 steps of 20 x 36 squares of 32, 13 audio tokens a second, 4 markers.
    for name in ("Instruct", "Captioner"):
        assert tokens.pop(f"Qwen/Qwen3-Omni-30B-A3B-{name}") == 51 * (20 * 36 + 13) + 4
    # 61,250 * 0.95 * 768 / 510 pixels: 14 x 7 squares of 28.
    assert set(tokens.values()) == {255 * 14 * 7 + 120}
    name = "tsinghua-ee/video-SALMONN2_plus_7B_full"
    longer = offline_config(name, frames={"min_frames": 64})
    assert placeholder_inputs(longer, ClipShape(seconds=3.0)).num_frames == 64
    with pytest.raises(ValueError, match="no option min_framez for a salmonn2-plus model; its options are interval"):
        offline_config(name, frames={"min_framez": 1})


STACK = Stack(width=8, inner=32, layers=3, heads=4, kv_heads=2, head_width=2, gated=True)
HALF = NumberSizes(stored=2, computed=2)


def test_formulas_by_hand():
    # Norms 2 * 4 * 8, attention 2 * (8 + 4 + 4 + 8) and 4 * 4, inner part 3 * 2 * 32.
    assert memory_plan.saved_per_layer(STACK, HALF, TrainedParts(), rows=1) == 64 + 48 + 16 + 192
    # Three more of keys and values, 16 bytes each; three adapters of 8 numbers and 8 of dropout's.
    assert memory_plan.saved_per_layer(STACK, HALF, TrainedParts(adapted=3), rows=3) == 64 + 96 + 16 + 192 + 3 * 24
    sizes = {"tokens": 10, "rows": 1}
    assert memory_plan.saved_by_stack(STACK, HALF, TrainedParts(), **sizes, checkpointed=0) == 3 * 10 * 320
    assert memory_plan.saved_by_stack(STACK, HALF, TrainedParts(), **sizes, checkpointed=3) == 3 * 10 * 8 * 2
    assert memory_plan.saved_by_stack(STACK, HALF, TrainedParts(), **sizes, checkpointed=1) == 10 * (2 * 320 + 8 * 2)
    assert memory_plan.kv_cache_bytes(STACK, HALF, tokens=10) == 2 * 3 * 2 * 2 * 10 * 2
    assert memory_plan.logits_bytes(100, HALF, tokens=10) == 10 * 100 * 18
    assert memory_plan.logits_bytes(100, NumberSizes(4, 4), tokens=10) == 10 * 100 * 16
    assert MemoryEstimate({"a": 3, "b": 4}, {"c": 5, "d": 2}).peak == 12
    assert MemoryEstimate({"a": 3}, {"c": 5}, {"e": 7}).on_gpu == 15
    # Each of 10 tokens: four heads of 2 in float32 and twice in 16 bits; 8 numbers in float32.
    kernels = memory_plan.gpu_training(STACK, HALF, tokens=10, is_adapted=True)
    assert list(kernels.values()) == [10 * 8 * (4 + 4), 10 * 32, GIB]
    assert list(memory_plan.gpu_training(STACK, NumberSizes(4, 4), tokens=10, is_adapted=True).values())[1] == 0
    assert gpu_margins({"weights": 90, "inputs": 100}, {"c": 60, "d": 200}, kernels=7) == {
        "kernels": 7, "libraries": GIB, "fragmentation": 15
    }  # fmt: skip


@pytest.mark.parametrize(
    ("batch", "gradient_accumulation_steps", "ranks", "expected"), [(8, 8, 8, 1), (8, 8, 1, 1), (128, 8, 8, 2)]
)
def test_clips_per_micro_batch(monkeypatch, batch, gradient_accumulation_steps, ranks, expected):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    assert (
        clips_per_micro_batch(FitConfig(batch_size=batch, gradient_accumulation_steps=gradient_accumulation_steps))
        == expected
    )


def test_quantized_weights_and_checkpointed_layers_need_less():
    config = offline_config("tsinghua-ee/video-SALMONN2_plus_7B_full")
    network = adapted(config)
    plan = {
        bits: MemoryPlan(
            network,
            config,
            placement=Placement(dtype="bfloat16", bits=bits),
            fit=FitConfig(precision="bfloat16"),
            work=Workload(clips=1, answers=3, cached_features=True),
        )
        for bits in (None, 8, 4)
    }
    weights = {bits: memory.captioning(max_new_tokens=1024).persistent["weights"] for bits, memory in plan.items()}
    matrices = 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    assert weights[None] - weights[8] == matrices
    assert weights[8] - weights[4] == matrices * 7 // 16
    row_bytes = 2 * 28 * 4 * 128 * 2  # of a token in the KV cache
    captions = {
        samples: plan[None].captioning(max_new_tokens=1000, batch_size=64, num_samples=samples).peak
        for samples in (1, 8)
    }
    assert captions[1] - captions[8] == 56 * (25_110 + 100) * row_bytes  # 64 prefixes instead of 8
    step = plan[None].training(checkpointed=True)
    assert step.peak < 0.25 * plan[None].training(checkpointed=False).peak
    assert step.persistent["gradients"] == 4 * 55_050_240 and step.persistent["Adam's moments"] == 8 * 55_050_240
    assert step.persistent["activations"] == 28 * 26_746 * 3584 * 2
    fewest = {size: plan[None].fewest_checkpointed(size) for size in (24, 40, 80, 141)}
    assert fewest[24] is None and 28 == fewest[40] > fewest[80] > fewest[141] > 0
    for size in (40, 80, 141):
        peaks = [plan[None].training(checkpointed=count).on_gpu for count in (fewest[size] - 1, fewest[size])]
        assert peaks[0] > size * GIB >= peaks[1]


@pytest.fixture(scope="module")
def medium(random_plus, tmp_path_factory):
    """Folder of config and tokenizer of a model large enough that its tensors are most of a process's memory."""
    folder = tmp_path_factory.mktemp("medium")
    config = load_config(random_plus)
    Processor.load(random_plus, config=config).save(folder)
    rope = dict(rope_type="default", rope_theta=10_000.0, mrope_section=[16, 8, 8])
    sizes = dict(vocab_size=16_000, hidden_size=512, intermediate_size=1536, num_hidden_layers=4)
    text = {key: value for key, value in config.lm["text_config"].items() if key != "layer_types"}
    text |= sizes | dict(num_attention_heads=8, num_key_value_heads=2, rope_parameters=rope)
    vision = dict(depth=2, hidden_size=256, intermediate_size=768, num_heads=4, patch_size=14, spatial_merge_size=2)
    vision |= dict(window_size=112, fullatt_block_indexes=[1], out_hidden_size=512)
    config.lm = config.lm | dict(text_config=text, vision_config=config.lm["vision_config"] | vision)
    config.frames = dict(interval_seconds=0.5, min_frames=16, max_frames=64, factor=28)
    config.save_pretrained(folder)
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is measured in /proc")
@pytest.mark.parametrize(
    "work", [pytest.param("training", marks=pytest.mark.slow), "training checkpointed", "captioning"]
)
def test_memory_of_a_real_process(random_plus, medium, work, capsys):
    """One step of guided DPO and one caption: the estimate is within 30 % of what the process grows by."""
    command = [sys.executable, Path(__file__).with_name("measure.py"), random_plus, medium, *work.split()]
    result = subprocess.run(forked(*command), capture_output=True, text=True, timeout=RUN_SECONDS, check=False)
    assert result.returncode == 0, result.stderr
    estimated, measured = map(int, result.stdout.split())
    with capsys.disabled():
        sys.stdout.write(f"\n{work}: estimated {estimated / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB\n")
    assert 0.7 * measured < estimated < 1.3 * measured
