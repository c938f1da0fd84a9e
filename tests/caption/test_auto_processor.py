"""The processor in transformers: loaded by AutoProcessor, saved and loaded again, with the inputs of `Processor`."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoProcessor, ProcessorMixin
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from salmonn.caption.auto_processor import SalmonnProcessor
from salmonn.caption.captioner import Captioner
from salmonn.caption.generator import Sampling
from salmonn.caption.streaming import collate
from salmonn.model.publish import write_own_layout
from tests.completions import generate


@pytest.fixture(scope="module")
def processor(random_model):
    return AutoProcessor.from_pretrained(random_model)


def assert_equal(value, expected):
    """Compare model inputs, tensors to the bit."""
    assert type(value) is type(expected)
    if dataclasses.is_dataclass(expected):
        for field in dataclasses.fields(expected):
            assert_equal(getattr(value, field.name), getattr(expected, field.name))
    elif isinstance(expected, tuple | list):
        assert len(value) == len(expected)
        for one, other in zip(value, expected, strict=True):
            assert_equal(one, other)
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(value, expected)
    else:
        assert value == expected


def test_inputs_are_those_of_the_processor(processor, random_model, videos):
    assert isinstance(processor, SalmonnProcessor) and isinstance(processor, ProcessorMixin)
    captioner = Captioner.load(random_model)
    own = captioner.processor
    clips = [own.read(video) for video in videos[:2]]
    expected = collate(own, clips, ["What moves?", "What is heard?"])
    batch = processor(["What moves?", "What is heard?"], videos=[str(videos[0]), videos[1]])
    assert_equal(batch["inputs"], expected)
    assert_equal(batch.to("cpu").to(torch.float32)["inputs"], expected)
    # Default prompt, one video, the picture alone; and its sound alone, from the file or as a clip.
    expected = collate(own, [own.read(videos[0], modality="visual")], [own.config.default_prompt("visual")])
    assert_equal(processor(videos=videos[0], modality="visual")["inputs"], expected)
    expected = collate(own, [own.read(videos[1], modality="audio")], ["What is heard?"])
    assert_equal(processor("What is heard?", audio=videos[1])["inputs"], expected)
    clip = own.read_spec("audio").read(videos[1])
    assert_equal(processor("What is heard?", videos=clip)["inputs"], expected)
    # The picture of one file with the sound of another.
    expected = collate(own, [own.read(videos[0], sound=videos[1])], ["x"])
    assert_equal(processor("x", videos=videos[0], audio=videos[1])["inputs"], expected)


def test_a_caption_by_the_auto_classes(processor, random_model, videos):
    network = AutoModel.from_pretrained(random_model).eval()
    sampling = Sampling(max_new_tokens=6)
    caption = Captioner(network, processor.processor).caption(videos[0], prompt="What moves?", sampling=sampling)
    expected = Captioner.load(random_model).caption(videos[0], prompt="What moves?", sampling=sampling)
    assert caption.text and caption.text == expected.text
    inputs = processor("What moves?", videos=videos[0])
    (tokens,) = generate(network, **inputs, sampling=sampling, stop_ids=processor.processor.stop_ids)
    text = processor.decode([token.id for token in tokens], skip_special_tokens=True)
    assert text.strip() == expected.text
    assert network(**inputs).shape == (1, inputs["inputs"].input_ids.shape[1] - 1)


def test_saved_and_loaded_again(processor, random_model, videos, tmp_path):
    processor.save_pretrained(tmp_path / "alone")
    again = AutoProcessor.from_pretrained(tmp_path / "alone")
    assert_equal(again("x", videos=videos[0])["inputs"], processor("x", videos=videos[0])["inputs"])
    config = json.loads((tmp_path / "alone" / "config.json").read_text())
    (tmp_path / "alone" / "config.json").write_text(json.dumps(config | {"system_prompt": "Another one."}))
    with pytest.raises(ValueError, match="is of another model"):
        processor.save_pretrained(tmp_path / "alone")
    # Beside a model, as `salmonn push` writes it, the config stays as it is.
    (tmp_path / "repo").mkdir()
    write_own_layout(random_model, tmp_path / "repo")
    before = (tmp_path / "repo" / "config.json").read_bytes()
    processor.save_pretrained(tmp_path / "repo")
    assert (tmp_path / "repo" / "config.json").read_bytes() == before
    assert isinstance(AutoProcessor.from_pretrained(tmp_path / "repo"), SalmonnProcessor)
    code = get_class_from_dynamic_module("modeling_salmonn.SalmonnProcessor", str(tmp_path / "repo"))
    assert code is SalmonnProcessor
    for name in ("config.json", "processor_config.json"):
        auto_map = json.loads((tmp_path / "repo" / name).read_text())["auto_map"]
        assert auto_map["AutoProcessor"] == "modeling_salmonn.SalmonnProcessor"


def test_other_inputs_are_refused(processor, random_model, videos, tmp_path):
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    for arguments, message in (
        ({"text": "x"}, "needs videos or audio"),
        ({"text": ["x", "y"], "videos": videos[0]}, "2 prompts, 1 videos and 0 audio files"),
        ({"text": "x", "videos": frames}, "a ndarray has no times"),
        ({"text": "x", "videos": videos[0], "images": [frames]}, "takes videos and audio"),
        ({"text": "x", "videos": videos[0], "return_tensors": "np"}, "returns tensors of PyTorch"),
        ({"text": "\ud800", "videos": videos[0]}, "unpaired surrogate"),
    ):
        with pytest.raises(ValueError, match=message):
            processor(**arguments)
    with pytest.raises(ValueError, match="writes the chat format itself"):
        processor.apply_chat_template([{"role": "user", "content": "x"}])
    with pytest.raises(ValueError, match="has no option min_pixels"):
        AutoProcessor.from_pretrained(random_model, min_pixels=3)
    with pytest.raises(ValueError, match="salmonn push"):
        processor.save_pretrained(tmp_path, push_to_hub=True)
