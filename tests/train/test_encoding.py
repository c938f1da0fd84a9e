"""Encoding of a training set: the same features by any number of readers, and what a failure or a kill leaves."""

from dataclasses import replace

import pytest
import torch

from salmonn.caption.loader import ClipReader
from salmonn.caption.processor import PromptRow
from salmonn.media.container import ClipError
from salmonn.model.layout import ClipFeatures, ClipInputs
from salmonn.train import encoding
from salmonn.train.data import ClipSource
from salmonn.train.encoding import _encode_each, _num_workers, encode_clips
from salmonn.train.feature_cache import FeatureCache, FeatureCacheConfig, hash_features, open_feature_cache
from salmonn.train.left_out import LeftOut


class Killed(Exception):
    """Raised where the process would be killed."""


@pytest.fixture
def sources(videos, tmp_path):
    """A whole clip, a span, one with the audio of another file, and one that cannot be read; then the audio alone."""
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    return [
        ClipSource(videos[0]),
        ClipSource(videos[1], start_seconds=0.5, end_seconds=2.0),
        ClipSource(videos[2], audio=videos[3], needs_both=True),
        ClipSource(broken),
        ClipSource(videos[4], modality="audio", audio=videos[0]),
    ]


def test_workers_change_no_bit(captioner, sources, monkeypatch):
    """Two processes and a thread read what the processor reads, and clips are encoded alone."""
    readers = []
    monkeypatch.setattr(encoding, "ClipReader", lambda **options: readers.append(options) or ClipReader(**options))
    by_thread = encode_clips(captioner, sources, name="clips", left_out=LeftOut(None, max_failures=1))
    monkeypatch.setattr(encoding, "_num_workers", lambda costs: 2)
    by_workers = encode_clips(captioner, sources[::-1], name="clips", left_out=LeftOut(None, max_failures=1))
    assert [options["workers"] for options in readers] == [0, 2]
    assert by_thread.keys() == by_workers.keys() == set(sources) - {sources[3]}
    for source, features in by_thread.items():
        inputs = captioner.processor.read(
            source.video,
            sound=source.audio,
            modality=source.modality,
            start_seconds=source.start_seconds,
            end_seconds=source.end_seconds,
        )
        (alone,) = captioner.encode([inputs])
        assert hash_features(alone) == hash_features(features) == hash_features(by_workers[source])
        assert alone.info == features.info == by_workers[source].info


def test_a_clip_without_what_is_needed_is_left_out(captioner, sources, tmp_path):
    silent = replace(sources[0], modality="both", needs_both=True)
    captioner.processor.read_spec = lambda *args, **span: replace(  # as if the file had no audio
        type(captioner.processor).read_spec(captioner.processor, *args, **span), audio=False
    )
    left_out = LeftOut(tmp_path, max_failures=1)
    assert list(encode_clips(captioner, [silent, sources[1]], name="clips", left_out=left_out)) == [sources[1]]
    assert "has no audio, but this example needs video and audio" in left_out.clips[0].reason


def test_a_kill_loses_only_the_clips_under_way(captioner, videos, tmp_path, monkeypatch):
    """Killed while the fourth of five clips is encoded: the third is under way too, and two are in the cache."""
    sources, encode, encoded = [ClipSource(video) for video in videos], captioner.encode_on_device, []

    def encode_until_killed(clips):
        encoded.append(clips)
        if len(encoded) == 4:
            raise Killed
        return encode(clips)

    def open_cache() -> FeatureCache:
        return open_feature_cache(FeatureCacheConfig(tmp_path), captioner)

    monkeypatch.setattr(captioner, "encode_on_device", encode_until_killed)
    with pytest.raises(Killed):
        encode_clips(captioner, sources, name="clips", cache=open_cache())
    assert len(list(tmp_path.iterdir())) == 2
    encoded[:] = [None] * 4
    assert len(encode_clips(captioner, sources, name="clips", cache=open_cache())) == 5 and len(encoded) == 4 + 3


def test_the_next_clip_is_started_before_features_are_fetched(captioner, videos, monkeypatch):
    """A GPU then encodes while features are copied and saved. Errors pass at once."""
    events, encode = [], captioner.encode_on_device
    monkeypatch.setattr(captioner, "encode_on_device", lambda clips: events.append("start") or encode(clips))
    inputs = captioner.processor.read(videos[0], end_seconds=1.0)
    clips: list[tuple[int, ClipInputs | ClipError]] = [(7, inputs), (3, ClipError("gone")), (5, inputs)]
    for index, result in _encode_each(captioner, clips):
        events.append((index, isinstance(result, ClipFeatures)))
    assert events == ["start", (3, False), "start", (7, True), (5, True)]


def test_few_clips_start_no_workers(monkeypatch):
    assert _num_workers([]) == _num_workers([100.0] * 5) == 0
    monkeypatch.setattr(encoding, "default_num_workers", lambda count, num_processes: (count, num_processes))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert _num_workers([100.0] * 6) == (6, 8)


def test_inputs_for_a_gpu_are_pinned(captioner, videos, monkeypatch):
    inputs = captioner.processor.read(videos[0], end_seconds=1.0)
    assert inputs.pin_for(torch.device("cpu")) is inputs
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    inputs.pin_for(torch.device("cuda"))
    assert [id(tensor) for tensor in pinned] == [id(inputs.pixels), id(inputs.mel)]
    pinned.clear()
    (features,) = captioner.encode([inputs])
    for clip in (inputs, features):
        batch = captioner.processor.collate([PromptRow(0, "Tell.", "A tone.")], [clip])
        assert batch.pin_for(torch.device("cpu")) is batch
        batch.pin_for(torch.device("cuda"))
    assert [id(tensor) for tensor in pinned] == [id(inputs.pixels), id(inputs.mel), id(features.tokens)]
