"""Shared fixtures: synthetic clips, and small models with random weights."""

# ruff: noqa: E402
import copy
import fcntl
import gc
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

# Collecting garbage is a quarter of the time of importing, and afterwards each collection would visit what is imported.
gc.disable()

import pytest
import torch
from torch import nn

from salmonn import cli
from salmonn.caption import hearing, server_connection
from salmonn.caption.captioner import Captioner
from salmonn.caption.hearing import write_probe_clips
from salmonn.caption.processor import Processor
from salmonn.caption.prompt import LIST_EVENTS, train_tokenizer
from salmonn.model.config import PLAIN_PROMPTS
from salmonn.model.families.base import AUDIO_PAD, VIDEO_PAD
from salmonn.model.families.salmonn2 import tiny_config
from salmonn.model.network import Network
from salmonn.records import Reference
from salmonn.synthetic.render import SynthConfig, make_clips
from salmonn.train.data import ClipSet, all_texts
from tests.score.fake_llm_server import FakeLLMServer

gc.freeze()
gc.enable()
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Restore the number of threads, on which features depend: recipes that run in this process change it."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> ClipSet:
    """Five synthetic clips with video and audio."""
    root = tmp_path_factory.mktemp("clips")
    return ClipSet(make_clips(root, SynthConfig(clips=5, seed=3), workers=1), root)


@pytest.fixture(scope="session")
def videos(clips):
    """Paths of the five clips."""
    return [clips.root / reference.video for reference in clips.references]


def save_random_model(folder: Path, references: Sequence[Reference], *, layers: int = 6) -> Path:
    """Save a model of the size and family of the shipped one, with random weights.

    The weights are larger than those of a fresh model, whose captions are almost the same for every clip.
    """
    tokenizer = train_tokenizer([*all_texts(references), *PLAIN_PROMPTS.values(), LIST_EVENTS], vocab_size=400)
    config = tiny_config(
        vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    config.lm["num_hidden_layers"] = layers
    torch.manual_seed(0)
    network = Network(config)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    Captioner(network, Processor(tokenizer, config=config)).save(folder)
    return folder


@pytest.fixture(scope="session")
def random_model(clips, tmp_path_factory) -> Path:
    """Folder of a model of the size and family of the shipped one, with random weights."""
    return save_random_model(tmp_path_factory.mktemp("models") / "random", clips.references)


@pytest.fixture(scope="session")
def shallow_model(clips, tmp_path_factory) -> Path:
    """Folder of a random model with two decoder layers, for tests that compare many training runs."""
    return save_random_model(tmp_path_factory.mktemp("models") / "shallow", clips.references, layers=2)


@pytest.fixture(scope="session")
def random_plus(clips, tmp_path_factory):
    """Folder of a small salmonn2-plus with random weights: 48-pixel frames every 0.26 s, 2 x 2 tokens for each step."""
    tokenizer = train_tokenizer(all_texts(clips.references), vocab_size=400)
    ids = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    config = tiny_config(vocab_size=len(tokenizer), **ids)
    config.family = "salmonn2-plus"
    config.placeholder_ids = tuple(tokenizer.convert_tokens_to_ids([VIDEO_PAD, AUDIO_PAD]))
    config.frames = dict(
        interval_seconds=0.26,
        min_frames=2,
        max_frames=32,
        min_pixels=2304,
        max_pixels=2304,
        budget_fraction=0.0,
        factor=24,
    )
    rotary = dict(rope_type="default", rope_theta=10_000.0, mrope_section=[8, 4, 4])
    text = {key: value for key, value in config.lm.items() if key != "tie_word_embeddings"}
    vision = dict(
        depth=1, hidden_size=32, intermediate_size=64, num_heads=2, patch_size=8, spatial_merge_size=3,
        temporal_patch_size=2, window_size=48, fullatt_block_indexes=[0], out_hidden_size=128,
    )  # fmt: skip
    config.lm = dict(
        text_config=text | dict(rope_parameters=rotary, tie_word_embeddings=True), vision_config=vision, **ids,
        tie_word_embeddings=True, video_token_id=config.placeholder_ids[0],
    )  # fmt: skip
    config.vision = None
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "random-plus"
    Captioner(Network(config), Processor(tokenizer, config=config)).save(path)
    return path


@pytest.fixture(scope="session")
def plus(random_plus) -> Captioner:
    """The random salmonn2-plus; tests do not change it."""
    return Captioner.load(random_plus)


@pytest.fixture(scope="session")
def loaded_model(random_model) -> Captioner:
    """The random model; tests do not change it."""
    return Captioner.load(random_model)


@pytest.fixture
def captioner(loaded_model) -> Captioner:
    """A copy of the random model for each test, which may change it."""
    return copy.deepcopy(loaded_model)


@pytest.fixture(scope="session")
def processor(loaded_model) -> Processor:
    """The random model's processor."""
    return loaded_model.processor


@pytest.fixture(scope="session")
def probe_clips(tmp_path_factory) -> tuple[Path, Path]:
    """The clips of the hearing probe."""
    return write_probe_clips(tmp_path_factory.mktemp("probe"))


@pytest.fixture
def written_probe_clips(probe_clips, monkeypatch) -> None:
    """Let all hearing probes of this process use the same clips, instead of writing them each time."""
    for module in (hearing, server_connection):
        monkeypatch.setattr(module, "write_probe_clips", lambda folder: probe_clips)


@pytest.fixture(scope="session")
def media(processor, videos):
    """Model inputs of the five clips."""
    return [processor.read(video) for video in videos]


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Callable[[str, Callable[[Path], None]], Path]:
    """Make a folder once for all workers of pytest-xdist; the others wait for it."""

    def make_once(name: str, make: Callable[[Path], None]) -> Path:
        base = tmp_path_factory.getbasetemp()
        base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
        with (base / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (base / f"{name}.complete").exists():
                make(base / name)
                (base / f"{name}.complete").touch()
        return base / name

    return make_once


@pytest.fixture(scope="session")
def load_recipe():
    """Import a recipe from its file; recipes are not a package."""

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
def call(capsys):
    """Run the command line in this process; return exit code, stdout and stderr."""

    def in_process(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main([str(arg) for arg in args])
        return caught.value.code, *capsys.readouterr()

    return in_process


@pytest.fixture
def serve():
    """Start scripted servers; stop them after the test."""
    servers = []

    def start(script, **options) -> FakeLLMServer:
        servers.append(FakeLLMServer(script, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def fill_adapter() -> Callable[[nn.Module], None]:
    """Fill the B matrices of an adapter; they are zero at first, so that the policy equals its reference."""

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
    """Folders of the parity fixtures: models in the published layout, with a byte-level tokenizer."""
    folders: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in folders:
            source = PARITY_DIR / family
            if not source.is_dir():
                pytest.skip(f"no parity fixtures in {PARITY_DIR}: set PARITY_DIR")
            folder = tmp_path_factory.mktemp("published") / family
            folder.mkdir()
            (folder / "model.safetensors").symlink_to(source / "model.safetensors")
            tokenizer = train_tokenizer(["a"], vocab_size=263)
            tokenizer.save_pretrained(str(folder))
            config = json.loads((source / "config.json").read_text())
            video_token, audio_token = tokenizer.convert_tokens_to_ids([VIDEO_PAD, AUDIO_PAD])
            token_ids = {"video_token_id": video_token, "audio_token_id": audio_token}
            config |= {key: token for key, token in token_ids.items() if key in config}
            (folder / "config.json").write_text(json.dumps(config))
            folders[family] = folder
        return folders[family]

    return make
