"""Features of earlier clips: a further question about a clip neither reads nor encodes it again."""

import shutil
from dataclasses import replace

import pytest
import torch

from salmonn.caption.clip_cache import ClipCache
from salmonn.caption.engine import Engine
from salmonn.caption.generator import CaptionRequest, Sampling, Span
from salmonn.caption.loader import ClipReader
from salmonn.caption.read_spec import ReadSpec
from salmonn.media.frame_sampling import FixedRateSampler
from salmonn.model.layout import ClipFeatures, Layout
from tests.caption.engine_client import expected_text, stream_text

SHORT = Sampling(max_new_tokens=12)
SPEC = ReadSpec(FixedRateSampler(frames_per_second=1.0))


@pytest.fixture
def read(model, monkeypatch):
    """Names of the files that have been read, one entry for each time."""
    names, clip_inputs = [], model.processor.clip_inputs
    monkeypatch.setattr(
        model.processor, "clip_inputs", lambda clip: (names.append(clip.path.rpartition("/")[2]), clip_inputs(clip))[1]
    )
    return names


@pytest.fixture
def caching_engine(model):
    with ClipReader(workers=0) as reader:
        engine = Engine(model, reader, feature_cache_bytes=1 << 20)
        yield engine
        engine.close(grace_seconds=0)


def test_a_conversation_reads_its_clip_once(caching_engine, model, videos, tmp_path, read):
    path = tmp_path / "clip.mp4"
    shutil.copy(videos[0], path)
    request = CaptionRequest(path, sampling=SHORT)
    later = replace(request, prompt="What is heard?", history=[("", "A circle appears.")])
    part = replace(request, span=Span(1.0, 3.0))
    for one in (request, later, part, request):
        text = stream_text(caching_engine, one)
        expected = model.caption(path, prompt=one.prompt, history=one.history, span=one.span, sampling=SHORT)
        read.remove("clip.mp4")  # by model.caption
        assert text == expected.text
    assert read == ["clip.mp4"] * 2  # the whole, and the part
    shutil.copy(videos[1], path)  # another version of the file
    assert stream_text(caching_engine, request) == expected_text(model, CaptionRequest(videos[1], sampling=SHORT))
    assert read[:3] == ["clip.mp4"] * 3


def features(num_tokens):
    order = torch.arange(num_tokens)
    return ClipFeatures(torch.zeros(num_tokens, 4), Layout(order, torch.zeros(3, num_tokens), num_tokens))


def test_the_least_recently_used_clips_are_evicted(tmp_path):
    """Ten tokens of four numbers of four bytes are 160 bytes."""
    cache, keys = ClipCache(350), []
    for name in "abc":
        (tmp_path / name).write_text(name)
        keys.append(cache.key(tmp_path / name, SPEC))
    for key in keys[:2]:
        cache.put(key, features(10))
    assert cache.get(keys[0]) is not None
    cache.put(keys[2], features(10))
    assert [cache.get(key) is not None for key in keys] == [True, False, True]
    cache.put(keys[1], features(22))
    assert [cache.get(key) is None for key in keys] == [True, True, True]  # 352 bytes


def test_files_without_a_key(tmp_path):
    assert ClipCache(100).key(tmp_path / "absent.mp4", SPEC) is None
    assert ClipCache(100).get(None) is None
    assert ClipCache(0).key(tmp_path, SPEC) is None
