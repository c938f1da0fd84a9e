"""What several tests need: synthetic clips, and a small model with random weights."""

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

# Bit for bit means the same device and the same order of sums: tests run on one thread of the processor.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch
from torch import nn

from salmonn.caption.captioner import Captioner
from salmonn.caption.inputs import Processor
from salmonn.caption.prompt import LIST_EVENTS
from salmonn.caption.tokenizer import HEARD, SEEN, train_tokenizer
from salmonn.media.synth import SynthConfig, make_clips
from salmonn.model.network import Network
from salmonn.model.settings import PLAIN_PROMPTS, tiny
from salmonn.train.references import ClipSet, all_texts

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> ClipSet:
    """Five synthetic clips with picture and sound."""
    root = tmp_path_factory.mktemp("clips")
    return ClipSet(make_clips(root, SynthConfig(clips=5, seed=3), workers=1), root)


@pytest.fixture(scope="session")
def videos(clips):
    """Paths of the five clips."""
    return [clips.root / reference.video for reference in clips.references]


@pytest.fixture(scope="session")
def random_model(clips, tmp_path_factory):
    """Folder of a model with random weights.

    They are larger than a fresh model's, which says much the same of every clip: answers of this one differ.
    """
    tokenizer = train_tokenizer([*all_texts(clips.references), *PLAIN_PROMPTS.values(), LIST_EVENTS], vocab_size=400)
    config = tiny(
        vocab_size=len(tokenizer),
        placeholder_ids=tuple(tokenizer.convert_tokens_to_ids([SEEN, HEARD])),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    network = Network(config)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    path = tmp_path_factory.mktemp("models") / "random"
    Captioner(network, Processor(tokenizer, config=config)).save(path)
    return path


@pytest.fixture
def captioner(random_model) -> Captioner:
    """The random model, read anew for each test, which may change it."""
    return Captioner.load(random_model)


@pytest.fixture(scope="session")
def processor(random_model) -> Processor:
    """The random model's processor."""
    return Captioner.load(random_model).processor


@pytest.fixture(scope="session")
def media(processor, videos):
    """The five clips as the model takes them."""
    return [processor.read(video) for video in videos]


@pytest.fixture(scope="session")
def load_recipe():
    """Import a recipe by its file, as recipes are no package."""

    def load(name: str):
        module = f"recipe_{name}"
        if module not in sys.modules:
            path = Path(__file__).parents[1] / "recipes" / f"{name}.py"
            spec = importlib.util.spec_from_file_location(module, path)
            sys.modules[module] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[module])
        return sys.modules[module]

    return load


@pytest.fixture
def fill_adapter() -> Callable[[nn.Module], None]:
    """Gives a fresh adapter something to say: its B is zero at first, and the policy is its reference."""

    def fill(network: nn.Module) -> None:
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)

    return fill


PARITY_DIR = Path(os.environ.get("PARITY_DIR", Path(__file__).parents[2] / "shared" / "parity"))


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> Callable[[str], Path]:
    """Folders of the parity fixtures, models in the published layout, with a tokenizer whose letters are bytes."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            source = PARITY_DIR / family
            if not source.is_dir():
                pytest.skip(f"no parity fixtures in {PARITY_DIR}: set PARITY_DIR")
            folder = tmp_path_factory.mktemp("published") / family
            folder.mkdir()
            (folder / "model.safetensors").symlink_to(source / "model.safetensors")
            tokenizer = train_tokenizer(["a"], vocab_size=263)
            tokenizer.save_pretrained(str(folder))
            config = json.loads((source / "config.json").read_text())
            seen, heard = tokenizer.convert_tokens_to_ids([SEEN, HEARD])
            known = {"video_token_id": seen, "audio_token_id": heard}
            config |= {key: token for key, token in known.items() if key in config}
            (folder / "config.json").write_text(json.dumps(config))
            made[family] = folder
        return made[family]

    return make
