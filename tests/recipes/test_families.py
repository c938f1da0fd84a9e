"""The recipes on a small random model of each family of others than the authors: SFT, mrDPO, rebirth, captions."""

import json

import pytest
import torch

from salmonn.caption.captioner import Captioner
from salmonn.caption.generator import Sampling
from salmonn.caption.processor import PromptRow
from salmonn.caption.prompt import LIST_EVENTS, train_tokenizer
from salmonn.files import read_records
from salmonn.model.config import PLAIN_PROMPTS
from salmonn.model.loading import load_network
from salmonn.records import Reference
from salmonn.score.formats import read_scores
from salmonn.synthetic.render import SynthConfig, sample_clip
from salmonn.train.data import ClipSource, all_texts
from salmonn.train.encoding import encode_clips
from salmonn.train.feature_cache import FeatureCacheConfig, open_feature_cache
from tests import d_orca, qwen3_vl
from tests.omni_models import make_qwen2_5_omni, make_qwen3_omni
from tests.recipes.test_mrdpo import ROUND

SYNTH = SynthConfig(
    clips=8, seed=5, min_seconds=3, max_seconds=3, min_visual=1, max_visual=2, min_sounds=1, max_sounds=1
)
TRAINING = {
    "fit.steps": 12, "fit.batch_size": 6, "fit.warmup_ratio": 0.2, "fit.learning_rate": 0.003,
}  # fmt: skip
SEEN_ALONE = "[visual_caption,visual_questions]"


def make_model(family, folder):
    """Make a model whose tokenizer has the words of the clips, in the published layout."""
    references = [sample_clip(SYNTH, index=index)[1] for index in range(6)]
    texts = [*all_texts(references), *PLAIN_PROMPTS.values(), LIST_EVENTS]
    if family == "qwen2.5-omni":
        return make_qwen2_5_omni(folder, texts=texts, vocab_size=400).folder
    if family == "qwen3-omni":
        return make_qwen3_omni(folder, texts=texts, vocab_size=400).folder
    save_tiny = {"qwen3-vl": qwen3_vl.save_tiny, "d-orca": d_orca.save_tiny}[family]
    return save_tiny(folder, train_tokenizer(texts, vocab_size=400))


@pytest.fixture(scope="module")
def clips_dir(tmp_path_factory):
    """Folder of the clips, which all families share."""
    return tmp_path_factory.mktemp("clips")


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "family", ["qwen3-omni", "qwen3-vl", *(pytest.param(name, marks=SLOW) for name in ("qwen2.5-omni", "d-orca"))]
)
def test_all_stages(launch, sizes, clips_dir, tmp_path, family):
    """SFT learns from cached features; a round of mrDPO and rebirth (of one family) change what their adapters do."""
    start = Captioner.load(make_model(family, tmp_path / "published"))
    start.processor.set_frames({"min_pixels": 3136, "max_pixels": 3136})
    start.network.config.frames = start.processor.config.frames
    start.save(tmp_path / "start")
    hears, decoder = start.processor.family.hears, start.processor.family.decoder_prefix
    shared = sizes | {
        "clips_dir": clips_dir,
        "feature_cache.folder": tmp_path / "features",
        "synth.clips": 6,
        "heldout_clips": 2,
    }
    training = TRAINING | {
        "trainable": f"[lm.{decoder}layers,lm.lm_head]",
        "tasks": "[caption,questions]" if hears else SEEN_ALONE,
    }
    result = launch("sft", out=tmp_path / "sft", model=tmp_path / "start", **shared, **training)
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "features").glob("*.safetensors"))) >= 6
    losses = [json.loads(line)["loss"] for line in (tmp_path / "sft" / "steps.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.7 * losses[0]

    is_reborn = family == "qwen3-omni"  # the training of rebirth is that of SFT, with the adapter of the round
    few = (
        {"sampling.num_samples": 3} if is_reborn else {"sampling.num_samples": 3, "rebirth": "null", "kl.num_clips": 0}
    )
    result = launch("mrdpo", out=tmp_path / "mrdpo", model=tmp_path / "sft", **shared, **ROUND | few)
    assert result.returncode == 0, result.stderr
    before = load_network(tmp_path / "sft")
    assert before.family.name == family
    adapted = {
        f"lm.{decoder}layers.{layer}.self_attn.{part}_proj.weight"
        for layer in range(len(before.lm.get_decoder().layers))
        for part in "qkv"
    }
    for stage in ("round_1", "rebirth") if is_reborn else ("round_1",):
        after = load_network(tmp_path / "mrdpo" / stage / "merged").state_dict()
        assert {name for name, value in before.state_dict().items() if not value.equal(after[name])} == adapted
    check_merged(tmp_path / "mrdpo" / "round_1", clips_dir / "seed5-6", tmp_path / "features")


@torch.no_grad()
def check_merged(folder, clips_dir, features_dir):
    """Check the model of a round: it captions, and cached features and a shared prefix give what plain rows give."""
    captioner = Captioner.load(folder / "merged")
    hears = captioner.processor.family.hears
    references = read_records(clips_dir / "clips.jsonl", Reference)[:2]
    sources = [ClipSource(clips_dir / reference.video) for reference in references]
    caption = captioner.caption(sources[0].video, sampling=Sampling(max_new_tokens=4))
    assert caption.text and caption.modality == ("both" if hears else "visual")
    cached = sorted(features_dir.iterdir())
    cache = open_feature_cache(FeatureCacheConfig(features_dir), captioner)
    features = encode_clips(captioner, sources, name="clips", cache=cache)
    assert sorted(features_dir.iterdir()) == cached  # those of the start, whose encoders are the same
    texts = [(0, references[0].caption), (0, "a star"), (1, references[1].caption)]
    rows = [PromptRow(index, "Tell.", answer) for index, answer in texts]
    network, processor = captioner.network, captioner.processor
    shared = network(processor.collate(rows, [features[source] for source in sources]))
    for number, (index, answer) in enumerate(texts):
        plain_row = processor.collate([PromptRow(0, "Tell.", answer)], [processor.read(sources[index].video)])
        (plain,) = network(plain_row)
        assert torch.allclose(shared[number, : len(plain)], plain, atol=1e-5)
    for score in read_scores(folder / "scores.jsonl").scores:
        (reference,) = [one for one in read_records(clips_dir / "clips.jsonl", Reference) if one.video == score.video]
        num_audible = sum(event.is_audible for event in reference.events)
        assert num_audible and score.num_excluded == (0 if hears else num_audible)
        assert score.num_events + score.num_excluded == len(reference.events)
