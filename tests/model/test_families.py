"""The interface of model families: everything that differs between backbones goes through it."""

import re
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from salmonn.caption.captioner import Captioner
from salmonn.caption.generator import Sampling
from salmonn.caption.processor import Processor, PromptRow
from salmonn.model import families
from salmonn.model.config import SalmonnConfig
from salmonn.model.families import FAMILIES, PUBLISHED_CONFIGS, from_published, get_family
from salmonn.model.families.base import CHAT_TEMPLATE, CLIP_END, CLIP_START, PAD, TURN_END, TURN_START
from salmonn.model.families.salmonn2 import Salmonn2
from salmonn.model.loading import load_config
from salmonn.model.network import Network
from tests.completions import complete

ROOT = Path(__file__).parents[2]


class OtherFamily(Salmonn2):
    """A backbone that differs from its parent in each way that needs no other network."""

    name = "other"
    title = "a test model (other_type)"
    published_configs: ClassVar = {}
    penalizes_prompt = True
    turn_end = PAD
    chat_template = CHAT_TEMPLATE.replace(TURN_END, PAD)
    required_tokens: ClassVar = (PAD, TURN_START)

    @classmethod
    def can_read(cls, values):
        return values.get("model_type") == "other_type"

    def timestamps(self, clip):
        return [f"<{number}>" for number in range(clip.num_frames)]

    def surround_clip(self, before, after):
        return before + CLIP_START, [CLIP_END + after]


@pytest.fixture
def other(monkeypatch, random_model, tmp_path):
    """The random model as a member of another family, saved and loaded again."""
    monkeypatch.setattr(families, "FAMILIES", (*FAMILIES, OtherFamily))
    captioner = Captioner.load(random_model)
    config = SalmonnConfig.from_dict(captioner.network.config.to_dict() | {"family": "other"})
    network = Network(config)
    network.load_state_dict(captioner.network.state_dict())
    Captioner(network, Processor(captioner.processor.tokenizer, config=config)).save(tmp_path / "other")
    return Captioner.load(tmp_path / "other")


def test_a_backbone_is_added_by_one_class(other, videos):
    """Its timestamps, clip markers, ends of messages and penalty are used without changes elsewhere."""
    clip = other.processor.read(videos[0])
    layout = other.processor.make_layout(clip)
    timestamps = other.processor.tokenizer.decode(list(layout.timestamp_ids))
    assert timestamps == "".join(f"<{number}>" for number in range(clip.num_frames))
    (answer,) = complete(other, [clip], ["Tell."], sampling=Sampling(max_new_tokens=5))
    assert isinstance(answer.text, str) and isinstance(other.network.family, OtherFamily)
    inputs = other.processor.collate([PromptRow(0, "Tell.", "A star.")], [clip])
    markers = other.processor.tokenizer.convert_tokens_to_ids([CLIP_START, CLIP_END, TURN_END, PAD])
    assert [int((inputs.input_ids == marker).sum()) for marker in markers] == [1, 1, 0, 2]
    assert inputs.labels[0, -1] == markers[-1] and other.processor.stop_ids[0] == markers[-1]


def test_a_published_config_finds_its_family(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", (*FAMILIES, OtherFamily))
    config = from_published({"model_type": "other_type", "hidden_size": 64})
    assert config.family == "other" and isinstance(get_family(config), OtherFamily)


@pytest.mark.parametrize("name", PUBLISHED_CONFIGS)
def test_published_configs_are_read_by_one_family_each(name):
    values = PUBLISHED_CONFIGS[name]
    readers = [family for family in FAMILIES if family.can_read(values)]
    assert len(readers) == 1 and readers[0].published_configs[name] is values
    family = get_family(from_published(values))
    assert isinstance(family, readers[0]) and family.config.default_prompt("both") == readers[0].prompts["both"]


def test_an_unknown_family_is_rejected_with_a_list_of_families():
    with pytest.raises(ValueError, match="unknown family 'salmonn3'; known families are salmonn2, salmonn2-plus"):
        get_family(SalmonnConfig(family="salmonn3"))
    with pytest.raises(
        ValueError, match=r"'qwen2' is not supported; supported are video-SALMONN 2 .*video-SALMONN 2\+"
    ):
        from_published({"model_type": "qwen2"})


def test_frames_of_a_model_can_be_changed(random_model):
    config = load_config(random_model, frames={"max_frames": 3})
    assert config.frames == load_config(random_model).frames | {"max_frames": 3}
    assert get_family(config).frame_sampler.max_frames == 3
    with pytest.raises(ValueError, match="no option max_frame for a salmonn2 model; its options are frames_per_second"):
        load_config(random_model, frames={"max_frame": 3})


def test_rotary_positions():
    position_ids = torch.arange(12).reshape(3, 2, 2)
    plain, *spatial = (get_family(SalmonnConfig(family=family.name)) for family in FAMILIES)
    assert torch.equal(plain.rotary_positions(position_ids), position_ids[0])
    assert all(torch.equal(family.rotary_positions(position_ids), position_ids) for family in spatial)


def test_no_other_file_tests_a_familys_name():
    names = "|".join(re.escape(family.name) for family in FAMILIES)
    pattern = re.compile(rf"""\.family\s*(==|!=|in\b|not in\b)|(==|!=|\bin)\s*[(\["']+({names})["']""")
    files = [path for folder in ("salmonn", "recipes", "tools") for path in (ROOT / folder).rglob("*.py")]
    others = [path for path in files if "families" not in path.parts]
    assert len(others) > 90 and not [path for path in others if pattern.search(path.read_text(encoding="utf-8"))]
    assert pattern.search('if config.family == "salmonn2":') and pattern.search('name in ("salmonn2-plus", "x")')
