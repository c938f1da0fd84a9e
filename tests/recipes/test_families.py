"""The recipes on a small random model of each family that comes as it is from transformers: SFT, mrDPO, rebirth."""

import json

import pytest

from salmonn.caption.captioner import Captioner
from salmonn.caption.prompt import LIST_EVENTS
from salmonn.model.config import PLAIN_PROMPTS
from salmonn.model.loading import load_network
from salmonn.synthetic.render import SynthConfig, sample_clip
from salmonn.train.data import all_texts
from tests.omni_models import make_qwen2_5_omni, make_qwen3_omni
from tests.recipes.test_mrdpo import ROUND

TRAINING = {
    "trainable": "[lm.model.layers,lm.lm_head]", "tasks": "[caption,questions]", "fit.steps": 24, "fit.batch_size": 6,
    "fit.warmup_ratio": 0.1, "fit.learning_rate": 0.003,
}  # fmt: skip


@pytest.mark.parametrize(("family", "make"), [("qwen2.5-omni", make_qwen2_5_omni), ("qwen3-omni", make_qwen3_omni)])
def test_all_stages(launch, sizes, tmp_path, family, make):
    """SFT learns from cached features; one round of mrDPO and rebirth change only what their adapters change."""
    synth = SynthConfig(
        clips=8, seed=5, min_seconds=3, max_seconds=3, min_visual=1, max_visual=2, min_sounds=1, max_sounds=1
    )
    references = [sample_clip(synth, index=index)[1] for index in range(6)]
    texts = [*all_texts(references), *PLAIN_PROMPTS.values(), LIST_EVENTS]
    start = Captioner.load(make(tmp_path / "published", texts=texts, vocab_size=400).folder)
    start.processor.set_frames({"min_pixels": 3136, "max_pixels": 3136})
    start.network.config.frames = start.processor.config.frames
    start.save(tmp_path / "start")
    shared = sizes | {
        "clips_dir": tmp_path / "clips",
        "feature_cache.folder": tmp_path / "features",
        "synth.clips": 6,
        "heldout_clips": 2,
    }
    result = launch("sft", out=tmp_path / "sft", model=tmp_path / "start", **shared, **TRAINING)
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "features").glob("*.safetensors"))) >= 6
    losses = [json.loads(line)["loss"] for line in (tmp_path / "sft" / "steps.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.7 * losses[0]
    result = launch(
        "mrdpo", out=tmp_path / "mrdpo", model=tmp_path / "sft", **shared, **ROUND | {"sampling.num_samples": 3}
    )
    assert result.returncode == 0, result.stderr
    before = load_network(tmp_path / "sft")
    assert before.family.name == family
    adapted = {
        f"lm.model.layers.{layer}.self_attn.{part}_proj.weight"
        for layer in range(len(before.lm.get_decoder().layers))
        for part in "qkv"
    }
    for stage in ("round_1", "rebirth"):
        after = load_network(tmp_path / "mrdpo" / stage / "merged").state_dict()
        assert {name for name, value in before.state_dict().items() if not value.equal(after[name])} == adapted
