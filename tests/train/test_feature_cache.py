"""Clip features on disk: round trips, recomputation, the size limit, and memory mapping."""

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from salmonn.caption.captioner import Captioner
from salmonn.model.layout import ClipFeatures, ClipInfo, Layout
from salmonn.train import feature_cache as tokens
from salmonn.train.data import ClipSource
from salmonn.train.encoding import LAYOUT_BYTES_PER_TOKEN, _estimate, cache_features, encode_clips
from salmonn.train.feature_cache import (
    FeatureCache,
    FeatureCacheConfig,
    hash_encoders,
    hash_features,
    open_feature_cache,
)

MIB = 1 << 20


def make_features(rows: int = 3, columns: int = 4, *, dtype: torch.dtype = torch.float32) -> ClipFeatures:
    """Make features with distinct values, in a layout that uses all fields."""
    positions = torch.arange(rows).expand(3, -1)
    layout = Layout(torch.arange(rows).flip(0), positions, num_visual=rows - 1, timestamp_ids=(7, 11))
    info = ClipInfo("visual", is_complete=False, warnings=('lost "é"', "2 damaged video frames at 1.0 s"))
    return ClipFeatures(torch.arange(rows * columns, dtype=dtype).reshape(rows, columns), layout, info)


def is_same(first: ClipFeatures, second: ClipFeatures) -> bool:
    first_layout, second_layout = first.layout, second.layout
    return (
        first.tokens.dtype == second.tokens.dtype
        and torch.equal(first.tokens, second.tokens)
        and torch.equal(first_layout.order, second_layout.order)
        and torch.equal(first_layout.positions, second_layout.positions)
        and (first_layout.num_visual, first_layout.timestamp_ids)
        == (second_layout.num_visual, second_layout.timestamp_ids)
        and first.info == second.info
    )


def open_cache(folder: Path, *, max_bytes: float = 1 << 30) -> FeatureCache:
    folder.mkdir(exist_ok=True)
    return FeatureCache(folder, max_bytes=max_bytes, model="m")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path, dtype):
    cache, features = open_cache(tmp_path), make_features(dtype=dtype)
    assert cache.save("a", features) and cache.find_complete(["a", "b"]) == {"a"}
    assert is_same(cache.load("a"), features)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_round_trip_without_tokens(tmp_path):
    no_features = ClipFeatures(torch.zeros(0, 4), Layout(torch.arange(0), torch.zeros(3, 0, dtype=torch.long), 0))
    cache = open_cache(tmp_path)
    assert cache.save("a", no_features) and cache.find_complete(["a"]) and is_same(cache.load("a"), no_features)


def test_hashes_of_different_features_differ():
    features = make_features()
    others = [
        replace(features, tokens=features.tokens + 1),
        replace(features, tokens=features.tokens.double()),
        replace(features, tokens=features.tokens.reshape(4, 3)),
        replace(features, layout=replace(features.layout, order=features.layout.order.flip(0))),
        replace(features, layout=replace(features.layout, positions=features.layout.positions + 1)),
        replace(features, layout=replace(features.layout, num_visual=1)),
        replace(features, layout=replace(features.layout, timestamp_ids=(7,))),
    ]
    assert len({hash_features(each) for each in [features, *others]}) == 8
    assert hash_features(make_features()) == hash_features(features)


def resident_mib() -> float:
    return psutil.Process().memory_info().rss / MIB


def test_features_are_memory_mapped(tmp_path):
    """Six files of 16 MiB: finding and opening them needs no memory, using one of them only for that one."""
    cache, large = open_cache(tmp_path), make_features(1 << 12, 1 << 10)
    layout = make_features().layout
    for key in "abcdef":
        cache.save(key, ClipFeatures(large.tokens, layout))
    del large
    cache = open_cache(tmp_path)  # the first one has verified what it wrote
    before = resident_mib()
    assert len(cache.find_complete("abcdef")) == 6
    all_features = [cache.load(key) for key in "abcdef"]
    assert resident_mib() - before < 8
    assert all_features[2].read_tokens().sum() > 0
    assert 8 < resident_mib() - before < 24
    files = [file.path for file in psutil.Process().open_files()]
    # No file stays open: there may be more clips than the limit of open files.
    assert not [path for path in files if path.startswith(str(tmp_path))]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip_bit(path: Path) -> None:
    """Flip a bit of the tokens."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def replace_content(path: Path) -> None:
    """Write a safetensors file with other tensors."""
    tokens.save_file({"weights": torch.zeros(2)}, str(path))


@pytest.mark.parametrize("damage", [truncate, empty, replace_content])
def test_a_damaged_file_is_replaced(tmp_path, caplog, damage):
    cache, features = open_cache(tmp_path), make_features()
    for key in "ab":
        cache.save(key, features)
    damage(tmp_path / "a.safetensors")
    assert cache.find_complete(["a", "b"]) == {"b"}
    assert "a.safetensors is damaged" in caplog.text
    assert cache.save("a", features) and cache.find_complete(["a", "b"]) == {"a", "b"}


def test_a_file_with_other_content_is_removed_when_it_is_first_used(tmp_path):
    cache, features = open_cache(tmp_path), make_features()
    for key in "ab":
        cache.save(key, features)
    flip_bit(tmp_path / "a.safetensors")
    cache = open_cache(tmp_path)
    assert cache.find_complete(["a", "b"]) == {"a", "b"}
    assert torch.equal(cache.load("b").read_tokens(), features.tokens)
    damaged = cache.load("a")
    assert hash_features(damaged) == hash_features(features)  # as written with them, without reading them
    with pytest.raises(ValueError, match=r"a.safetensors is damaged .* has been removed; start this run again"):
        damaged.read_tokens()
    assert cache.find_complete(["a", "b"]) == {"b"}


def test_a_run_whose_features_do_not_fit_does_not_start(captioner, clips, tmp_path, monkeypatch):
    """The figures are known from the files' headers, before a clip is encoded."""
    sizes = [
        features.tokens.nbytes + LAYOUT_BYTES_PER_TOKEN * len(features) for features in features_of(captioner, clips)
    ]
    estimates = [_estimate(clips.source(one), captioner, may_fail=False)[1] for one in clips.references]
    assert all(size == pytest.approx(estimate, rel=0.1) for size, estimate in zip(sizes, estimates, strict=True))
    cache = open_cache(tmp_path, max_bytes=0.7 * sum(sizes))
    monkeypatch.setattr(captioner, "encode_on_device", None)
    monkeypatch.setattr(tokens.psutil, "virtual_memory", lambda: SimpleNamespace(available=0.1 * sum(sizes)))
    with pytest.raises(ValueError, match=r"features of 5 clips take about 0\.0 GiB, .*feature_cache.max_gib is 0\.0"):
        features_of(captioner, clips, cache)
    # Several processes would all keep what does not fit.
    monkeypatch.setattr(tokens.psutil, "virtual_memory", lambda: SimpleNamespace(available=10 * sum(sizes)))
    cache.require_room(sum(sizes), num_clips=5, name="clips")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(tokens.dist, "gather", lambda values: values)
    with pytest.raises(ValueError, match="features of 5 clips"):
        cache.require_room(sum(sizes), num_clips=5, name="clips")


def test_partial_files_of_killed_processes_are_ignored(tmp_path, monkeypatch):
    """Partial files are ignored, and removed once no process writes them any more."""

    def interrupt(_, path, **__):
        Path(path).write_bytes(b"half of it")
        raise KeyboardInterrupt

    cache = open_cache(tmp_path)
    monkeypatch.setattr(tokens, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cache.save("a", make_features())
    assert not cache.find_complete(["a"])
    tokens.remove_stale(tmp_path)
    (partial,) = tmp_path.iterdir()  # another process may be writing it
    os.utime(partial, (time.time() - 3601,) * 2)
    tokens.remove_stale(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_that_a_process_cannot_see_stops_the_run(tmp_path):
    with pytest.raises(ValueError, match=r"process 0 cannot see .*gone.safetensors.*; share the folder"):
        open_cache(tmp_path).load("gone")


def fill_cache(folder: Path, keys: str, *, max_bytes: float = 1 << 30) -> FeatureCache:
    """Fill a cache with features of 1 MiB; the first ones were used least recently."""
    cache = open_cache(folder, max_bytes=max_bytes)
    for number, key in enumerate(keys):
        assert cache.save(key, make_features(256, 1024))
        os.utime(folder / f"{key}.safetensors", (number, number))
    return cache


def names(folder: Path) -> str:
    return "".join(sorted(path.stem for path in folder.glob("*.safetensors")))


def test_least_recently_used_files_are_evicted(tmp_path):
    """3.1 MiB hold three files, each of 1 MiB of tokens and 8 kB of layout and names."""
    fill_cache(tmp_path, "abc")
    cache = open_cache(tmp_path, max_bytes=3.1 * MIB)
    assert cache.find_complete(["a", "x"]) == {"a"}  # used by this run, so it is not evicted
    assert cache.save("x", make_features(256, 1024)) and names(tmp_path) == "acx"
    assert open_cache(tmp_path, max_bytes=3.1 * MIB).save("y", make_features(256, 1024)) and names(tmp_path) == "axy"


def test_files_of_this_run_are_not_evicted(tmp_path):
    fill_cache(tmp_path, "abc")
    cache = open_cache(tmp_path, max_bytes=3.1 * MIB)
    assert cache.find_complete(list("abcx")) == set("abc")
    assert not cache.save("x", make_features(256, 1024)) and names(tmp_path) == "abc"
    # Nothing is evicted if that would not free enough.
    cache = open_cache(tmp_path, max_bytes=3.1 * MIB)
    cache.find_complete(["a"])
    assert not cache.save("y", make_features(1024, 1024)) and names(tmp_path) == "abc"


def test_processes_leave_space_for_one_another(tmp_path, monkeypatch):
    """2.1 MiB hold two files for one process; one of two processes writes only one, since the other may be writing."""
    single, shared = (open_cache(tmp_path / name, max_bytes=2.1 * MIB) for name in ("single", "shared"))
    for cache in (single, shared):
        cache.find_complete("abc")
    assert [single.save(key, make_features(256, 1024)) for key in "abc"] == [True, True, False]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert [shared.save(key, make_features(256, 1024)) for key in "ab"] == [True, False]


def test_nothing_is_saved_on_a_full_disk(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=MIB)
    monkeypatch.setattr(tokens.shutil, "disk_usage", lambda _: usage)
    assert not open_cache(tmp_path).save("a", make_features(256, 1024))


def features_of(model, clips, cache=None) -> list[ClipFeatures]:
    """Features of a set's clips, in order."""
    (cached,) = cache_features(model, clips, name="clips", cache=cache)
    return [cached.features_of(reference) for reference in cached.references]


@pytest.mark.parametrize("family", ["captioner", "plus"])
def test_features_are_the_same_with_and_without_a_cache(request, family, clips, tmp_path, monkeypatch):
    """Without a cache, with a cold and with a warm one, bit for bit; cached clips are neither read nor encoded."""
    model = request.getfixturevalue(family)
    uncached = features_of(model, clips)
    cache = open_feature_cache(FeatureCacheConfig(tmp_path), model)
    cold = features_of(model, clips, cache)
    assert len(names(tmp_path)) == 5 * 64
    reopened = open_feature_cache(FeatureCacheConfig(tmp_path), model)
    monkeypatch.setattr(model.processor, "clip_inputs", None)
    warm = features_of(model, clips, reopened)
    assert all(
        is_same(first, second) and is_same(first, third)
        for first, second, third in zip(uncached, cold, warm, strict=True)
    )
    assert len({hash_features(features) for features in uncached}) == 5


def test_a_clip_is_encoded_independently_of_others(captioner, clips, tmp_path):
    """Its tokens and its file do not depend on other clips."""
    subset = replace(clips, references=clips.references[3:4])
    (single,) = features_of(captioner, subset, open_feature_cache(FeatureCacheConfig(tmp_path), captioner))
    (before,) = tmp_path.iterdir()
    all_five = features_of(captioner, clips, open_feature_cache(FeatureCacheConfig(tmp_path), captioner))
    assert is_same(all_five[3], single) and len(list(tmp_path.iterdir())) == 5 and before.is_file()


def test_features_that_do_not_fit_stay_in_memory(captioner, clips, tmp_path, caplog):
    uncached = features_of(captioner, clips)
    largest = max(features.tokens.nbytes + 32 * len(features) for features in uncached)
    config = FeatureCacheConfig(tmp_path, max_gib=2.5 * largest / (1 << 30))
    all_features = features_of(captioner, clips, open_feature_cache(config, captioner))
    num_cached = len(list(tmp_path.iterdir()))
    assert num_cached in (2, 3) and all(
        is_same(first, second) for first, second in zip(uncached, all_features, strict=True)
    )
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2.5 * largest
    (record,) = caplog.records
    assert (
        f"the features of {5 - num_cached} of 5 clips" in record.message
        and "raise feature_cache.max_gib" in record.message
    )


def test_only_the_damaged_file_is_recomputed(captioner, clips, tmp_path, monkeypatch):
    config = FeatureCacheConfig(tmp_path)
    loaded = features_of(captioner, clips, open_feature_cache(config, captioner))
    first = [hash_features(features) for features in loaded]
    del loaded  # it maps the file
    truncate(min(tmp_path.iterdir()))
    read, prepare = [], captioner.prepare
    monkeypatch.setattr(captioner, "prepare", lambda clip: read.append(clip.path) or prepare(clip))
    second = features_of(captioner, clips, open_feature_cache(config, captioner))
    assert len(read) == 1 and [hash_features(features) for features in second] == first


def touch(video: Path) -> None:
    stat = video.stat()
    os.utime(video, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


def lengthen(video: Path) -> None:
    """Append a byte without changing the modification time."""
    stat = video.stat()
    with video.open("ab") as file:
        file.write(b"\0")
    os.utime(video, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_keys_of_different_clips_differ(videos, tmp_path):
    video, other_path, audio = tmp_path / "a.mp4", tmp_path / "b.mp4", tmp_path / "c.wav"
    for path in (video, other_path, audio):
        shutil.copy2(videos[0], path)
    cache, source = open_cache(tmp_path / "tokens"), ClipSource(video)
    sources = [
        source,
        replace(source, video=other_path),
        replace(source, modality="audio"),
        replace(source, start_seconds=1.0),
        replace(source, end_seconds=1.0),
        replace(source, audio=audio),
        replace(source, needs_both=True),
    ]
    keys = cache.keys(sources)
    assert len(set(keys)) == 7
    assert cache.keys([ClipSource(Path(os.path.relpath(video)))]) == keys[:1]  # relative paths are resolved
    touch(video)
    touched = cache.keys(sources)
    lengthen(video)
    assert not {*keys[:1], *keys[2:]} & set(touched) and touched[1] == keys[1]
    assert not {*touched[:1], *touched[2:]} & set(cache.keys(sources))
    touch(audio)
    assert cache.keys(sources)[5] not in (keys[5], touched[5])
    assert FeatureCache(tmp_path, max_bytes=1, model="other").keys([sources[1]]) != keys[1:2]


def test_the_hash_depends_on_all_that_affects_features(random_model, captioner, monkeypatch):
    before = hash_encoders(captioner)
    network = captioner.network
    assert hash_encoders(Captioner.load(random_model)) == before
    with torch.no_grad():
        network.get_parameter("lm.model.layers.0.self_attn.q_proj.weight").add_(1)
    assert hash_encoders(captioner) == before  # rounds change the decoder, but not the features
    hashes = {before}
    for name in ("vision.newline", "audio.projector.0.bias", "lm.model.embed_tokens.weight"):
        with torch.no_grad():
            network.get_parameter(name).flatten()[0] += 1
        hashes.add(hash_encoders(captioner))
    hashes.add(hash_encoders(Captioner.load(random_model, frames={"max_frames": 9})))
    captioner.processor.config.timestamp_tokens = True
    hashes.add(hash_encoders(captioner))
    monkeypatch.setattr(tokens.torch, "get_num_threads", lambda: 7)  # the number of threads changes rounding
    hashes.add(hash_encoders(captioner))
    assert len(hashes) == 7


def test_a_clip_is_encoded_once(captioner, videos, monkeypatch):
    encoded, encode = [], captioner.encode_on_device
    monkeypatch.setattr(captioner, "encode_on_device", lambda media: encoded.append(media) or encode(media))
    whole, part = ClipSource(videos[0]), ClipSource(videos[0], end_seconds=2.0)
    all_features = encode_clips(captioner, [whole, part, whole], name="clips")
    assert len(encoded) == 2 and set(all_features) == {whole, part}
    assert len(all_features[part]) < len(all_features[whole])


def test_a_folder_that_a_process_cannot_see_stops_the_run(captioner, tmp_path, monkeypatch):
    monkeypatch.setattr(tokens.dist, "is_main", lambda: False)
    with pytest.raises(ValueError, match=r"cannot see .*gone, which process 0 has created"):
        open_feature_cache(FeatureCacheConfig(tmp_path / "gone"), captioner)


def test_an_invalid_size_is_rejected():
    with pytest.raises(ValueError, match="folder null to keep features in memory"):
        FeatureCacheConfig(max_gib=0.0)


def test_only_a_single_process_keeps_all_features_in_memory(monkeypatch):
    assert open_feature_cache(FeatureCacheConfig(folder=None), None) is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="this run has 2; set a folder that all of them see"):
        open_feature_cache(FeatureCacheConfig(folder=None), None)
