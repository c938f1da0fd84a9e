"""Hours of a round: the arithmetic by hand, and a 7B against figures that were computed elsewhere."""

from dataclasses import replace

import pytest
import torch

from salmonn.model.loading import Placement, offline_config
from salmonn.model.lora import LoraConfig, attach_lora
from salmonn.model.memory import Stack
from salmonn.train import round_time
from salmonn.train.dry_run import MemoryPlan, Workload, build_on_meta
from salmonn.train.loop import FitConfig
from salmonn.train.round_time import EstimateConfig, Gpu, RoundWork, estimate_hours, make_work, sum_hours

STACK = Stack(width=8, inner=32, layers=3, heads=4, kv_heads=2, head_width=2, gated=True)
WORK = RoundWork(
    STACK, weight_bytes=6000, model_bytes=7.2e12, bytes_per_number=2, encoder_flops=4.5e6, prefix_tokens=100,
    clips=80, num_samples=4, caption_tokens=10, rows=8, pairs=36, recomputed=0.5,
)  # fmt: skip
GPU = Gpu("slow", flops=1e7, bandwidth=1e6)


def test_flops_by_hand():
    # 3 layers of 8 x (2 x 2 x (4 + 2) + 3 x 32) weights; 100 tokens and three answers of 10.
    assert WORK.linear_flops(3) == 2 * 2880 * 130
    # Queries and keys: 100² / 2 + 3 (10 x 100 + 10² / 2); 4 FLOPs for each of 8 numbers in 3 layers.
    assert WORK.attention_flops(3) == 96 * (5000 + 3 * 1050)
    assert WORK.forward_flops(0) == 2 * 2880 * 100 + 96 * 5000 == 1_056_000
    # Half of the forward pass again, and a backward pass of 1 and 2.5 times the FLOPs.
    assert WORK.training_flops == 1.5 * (748_800 + 782_400) + 748_800 + 2.5 * 782_400


def test_hours_by_hand(monkeypatch):
    constants = dict(
        PREFILL_SHARE=0.5, TRAINING_SHARE=0.25, LAUNCHES_PER_LAYER=10, LAUNCH_SECONDS=1e-3, ROWS_ALIVE=0.5,
        LAUNCHED_STEPS=1, EVICT_FRACTION=0.4, PAGE_PASSES=3, PAGE_LENGTH=50, READ_SECONDS=2.0, NUM_READERS=4,
        DISK_BYTES=1e9, JUDGE_WEIGHTS=5e5, JUDGE_KV_BYTES=100, JUDGE_PREFIX_TOKENS=8, JUDGE_REPLY_TOKENS=2,
        JUDGE_ROWS=1000,
    )  # fmt: skip
    for name, value in constants.items():
        monkeypatch.setattr(round_time, name, value)
    # 48 bytes of the KV cache for each of 2 x 100 + 8 x 5 tokens. For 8 captions, 3 layers and 2 pages, 4 heads of 2
    # numbers in 2 bytes each are moved 3 times.
    launches, traffic = WORK.decode_step_seconds(GPU)
    assert launches == pytest.approx(0.03) and traffic == pytest.approx((6000 + 48 * 240 + 2304) / 1e6)
    seconds = {name: 3600 * value for name, value in estimate_hours(WORK, GPU, gpus=2, judge_gpus=4).items()}
    assert seconds == pytest.approx(
        {
            "encoding, once": 40 * 0.9,  # FLOPs; reading takes 0.5 s
            # 320 captions of 10 tokens in steps that generate 4. The rows change every 4 steps, the first of them is
            # launched, and the others are replayed.
            "sampling": (80 * 1_056_000 / 5e6 + 200 * 0.03 + 600 * traffic) / 2,
            # A question: 8 / 4 + 10 tokens of 10^6 FLOPs; 2 steps for a thousandth of 10^6 + 1000 x 100 x 19 bytes.
            "judging": 80 * (12e6 / 5e6 + 2 * 2.9e6 / 1000 / 1e6),
            "reference pass": 18 * (2 * 2880 * 120 + 96 * (5000 + 2 * 1050)) / 5e6,
            "training": 18 * 5_001_600 / 2.5e6,
            "merge": 3 * 7200,
        }
    )
    hours = {name: value / 3600 for name, value in seconds.items()}
    after = hours["reference pass"] + hours["training"] + hours["merge"]
    assert hours["judging"] > hours["sampling"] and sum_hours(hours) == pytest.approx(hours["judging"] + after)
    by_rule = estimate_hours(replace(WORK, is_judged_by_model=False), GPU, gpus=2, judge_gpus=4)
    assert by_rule["judging"] == 0 and sum_hours(by_rule) == pytest.approx(by_rule["sampling"] + after)
    fast = replace(GPU, bandwidth=1e5)  # memory traffic limits a step
    assert 3600 * estimate_hours(WORK, fast, gpus=2, judge_gpus=4)["sampling"] == pytest.approx(
        (80 * 1_056_000 / 5e6 + 800 * (6000 + 48 * 240 + 2304) / 1e5) / 2
    )


def test_a_7b_by_figures_from_elsewhere():
    """Computed by a reader of the code: 1.69 PFLOP a pair, 0.126 a clip's frames, 1.0 s a prefill on an H100."""
    sizes = offline_config("tsinghua-ee/video-SALMONN2_plus_7B_full")
    network = build_on_meta(sizes)
    with torch.device("meta"):
        attach_lora(network, LoraConfig(rank=128, alpha=256), seed=0)
    fit = FitConfig(steps=None, epochs=2.0, batch_size=8, precision="bfloat16", gradient_checkpointing=True)
    plan = MemoryPlan(
        network, sizes, placement=Placement(dtype="bfloat16"), fit=fit,
        work=Workload(clips=1, answers=3, cached_features=True),
    )  # fmt: skip
    work = make_work(plan, EstimateConfig(clips=1000), num_samples=8, batch_size=64, is_judged_by_model=True)
    assert (work.pairs, work.rows, work.recomputed, work.prefix_tokens) == (2000, 64, 1.0, 25_210)
    assert work.training_flops == pytest.approx(1.69e15, rel=0.02)
    assert work.encoder_flops == pytest.approx(0.126e15, rel=0.05)
    assert work.forward_flops(0) / 450e12 == pytest.approx(1.0, rel=0.05)
    assert work.weight_bytes == 2 * (7_615_616_512 - 152_064 * 3584)
    some = make_work(
        replace(plan, fit=replace(fit, gradient_checkpointing=7)), EstimateConfig(),
        num_samples=8, batch_size=4, is_judged_by_model=True,
    )  # fmt: skip
    assert (some.recomputed, some.rows, some.pairs) == (0.25, 8, 20_000)


def test_estimates_of_nothing_are_refused():
    with pytest.raises(ValueError, match=r"estimate\.gpus must be at least 1, got 0"):
        EstimateConfig(gpus=0)
