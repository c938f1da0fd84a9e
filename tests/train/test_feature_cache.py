"""Clips' tokens on disk: what comes back, when it is made anew, how large the folder gets, what is read of it."""

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from salmonn.caption.captioner import Captioner
from salmonn.model.layout import ClipFeatures, Layout
from salmonn.train import feature_cache as tokens
from salmonn.train.data import ClipSource
from salmonn.train.evaluate import cache_features, encode_clips
from salmonn.train.feature_cache import (
    FeatureCache,
    FeatureCacheConfig,
    hash_encoders,
    hash_features,
    open_feature_cache,
)

MIB = 1 << 20


def make_block(rows: int = 3, columns: int = 4, *, dtype: torch.dtype = torch.float32) -> ClipFeatures:
    """Tokens that count, in a layout with all that one may have."""
    positions = torch.arange(rows).expand(3, -1)
    layout = Layout(torch.arange(rows).flip(0), positions, num_visual=rows - 1, timestamp_ids=(7, 11))
    return ClipFeatures(torch.arange(rows * columns, dtype=dtype).reshape(rows, columns), layout)


def same(one: ClipFeatures, other: ClipFeatures) -> bool:
    mine, theirs = one.layout, other.layout
    return (
        one.tokens.dtype == other.tokens.dtype
        and torch.equal(one.tokens, other.tokens)
        and torch.equal(mine.order, theirs.order)
        and torch.equal(mine.positions, theirs.positions)
        and (mine.num_visual, mine.timestamp_ids) == (theirs.num_visual, theirs.timestamp_ids)
    )


def store_of(folder: Path, *, max_bytes: float = 1 << 30) -> FeatureCache:
    folder.mkdir(exist_ok=True)
    return FeatureCache(folder, max_bytes=max_bytes, model="m")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_comes_back(tmp_path, dtype):
    store, block = store_of(tmp_path), make_block(dtype=dtype)
    assert store.save("a", block) and store.find_complete(["a", "b"]) == {"a"}
    assert same(store.load("a"), block)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_block_without_tokens_comes_back(tmp_path):
    nothing = ClipFeatures(torch.zeros(0, 4), Layout(torch.arange(0), torch.zeros(3, 0, dtype=torch.long), 0))
    store = store_of(tmp_path)
    assert store.save("a", nothing) and store.find_complete(["a"]) and same(store.load("a"), nothing)


def test_a_digest_tells_blocks_apart():
    block = make_block()
    others = [
        replace(block, tokens=block.tokens + 1),
        replace(block, tokens=block.tokens.double()),
        replace(block, tokens=block.tokens.reshape(4, 3)),
        replace(block, layout=replace(block.layout, order=block.layout.order.flip(0))),
        replace(block, layout=replace(block.layout, positions=block.layout.positions + 1)),
        replace(block, layout=replace(block.layout, num_visual=1)),
        replace(block, layout=replace(block.layout, timestamp_ids=(7,))),
    ]
    assert len({hash_features(one) for one in [block, *others]}) == 8 and hash_features(make_block()) == hash_features(
        block
    )


def resident() -> float:
    return psutil.Process().memory_info().rss / MIB


def test_what_is_not_touched_is_not_read(tmp_path):
    """Six blocks of 16 MiB: to check them takes the room of one, to open them of none, to use one of that one."""
    store, big = store_of(tmp_path), make_block(1 << 12, 1 << 10)
    layout = make_block().layout
    for key in "abcdef":
        store.save(key, ClipFeatures(big.tokens, layout))
    del big
    before = resident()
    assert len(store.find_complete("abcdef")) == 6
    assert resident() - before < 24
    before = resident()
    blocks = [store.load(key) for key in "abcdef"]
    assert resident() - before < 8
    assert blocks[2].tokens.sum() > 0
    assert 8 < resident() - before < 24
    files = [file.path for file in psutil.Process().open_files()]
    assert not [path for path in files if path.startswith(str(tmp_path))]  # a run may have more clips than open files


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip(path: Path) -> None:
    """A bit of the tokens."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def other(path: Path) -> None:
    """A safetensors file of something else."""
    tokens.save_file({"weights": torch.zeros(2)}, str(path))


@pytest.mark.parametrize("damage", [cut_off, flip, empty, other])
def test_a_damaged_file_is_made_anew(tmp_path, caplog, damage):
    store, block = store_of(tmp_path), make_block()
    for key in "ab":
        store.save(key, block)
    damage(tmp_path / "a.safetensors")
    assert store.find_complete(["a", "b"]) == {"b"}
    assert "a.safetensors is damaged" in caplog.text
    assert store.save("a", block) and store.find_complete(["a", "b"]) == {"a", "b"}


def test_a_kill_leaves_nothing_that_is_taken(tmp_path, monkeypatch):
    """Half-written files count for nothing; those that nobody writes any more are cleared."""

    def killed(_, path, **__):
        Path(path).write_bytes(b"half of it")
        raise KeyboardInterrupt

    store = store_of(tmp_path)
    monkeypatch.setattr(tokens, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        store.save("a", make_block())
    assert not store.find_complete(["a"])
    tokens.remove_stale(tmp_path)
    (half,) = tmp_path.iterdir()  # another process may be at it
    os.utime(half, (time.time() - 3601,) * 2)
    tokens.remove_stale(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_that_a_process_does_not_see_ends_the_run(tmp_path):
    with pytest.raises(ValueError, match=r"process 0 cannot see .*gone.safetensors.*; share the folder"):
        store_of(tmp_path).load("gone")


def fill(folder: Path, keys: str, *, max_bytes: float = 1 << 30) -> FeatureCache:
    """A store with blocks of 1 MiB, the first ones used longest ago."""
    store = store_of(folder, max_bytes=max_bytes)
    for number, key in enumerate(keys):
        assert store.save(key, make_block(256, 1024))
        os.utime(folder / f"{key}.safetensors", (number, number))
    return store


def names(folder: Path) -> str:
    return "".join(sorted(path.stem for path in folder.glob("*.safetensors")))


def test_what_was_used_least_recently_makes_room(tmp_path):
    """Three MiB and a bit hold three blocks, each of 1 MiB with 8 kB of layout and names beside it."""
    fill(tmp_path, "abc")
    store = store_of(tmp_path, max_bytes=3.1 * MIB)
    assert store.find_complete(["a", "x"]) == {"a"}  # used by this run, and so the last to have been used too
    assert store.save("x", make_block(256, 1024)) and names(tmp_path) == "acx"
    assert store_of(tmp_path, max_bytes=3.1 * MIB).save("y", make_block(256, 1024)) and names(tmp_path) == "axy"


def test_no_file_of_this_run_makes_room(tmp_path):
    fill(tmp_path, "abc")
    store = store_of(tmp_path, max_bytes=3.1 * MIB)
    assert store.find_complete(list("abcx")) == set("abc")
    assert not store.save("x", make_block(256, 1024)) and names(tmp_path) == "abc"
    # Nor does another go where that would not be enough.
    store = store_of(tmp_path, max_bytes=3.1 * MIB)
    store.find_complete(["a"])
    assert not store.save("y", make_block(1024, 1024)) and names(tmp_path) == "abc"


def test_processes_leave_room_for_one_another(tmp_path, monkeypatch):
    """Of 2.1 MiB one process takes two blocks, and one of two processes the first alone: the other may be writing."""
    alone, shared = (store_of(tmp_path / name, max_bytes=2.1 * MIB) for name in ("alone", "shared"))
    for store in (alone, shared):
        store.find_complete("abc")
    assert [alone.save(key, make_block(256, 1024)) for key in "abc"] == [True, True, False]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert [shared.save(key, make_block(256, 1024)) for key in "ab"] == [True, False]


def test_a_full_disk_is_a_full_folder(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=MIB)
    monkeypatch.setattr(tokens.shutil, "disk_usage", lambda _: usage)
    assert not store_of(tmp_path).save("a", make_block(256, 1024))


def features_of(model, clips, cache=None) -> list[ClipFeatures]:
    """Features of a set's clips, in order."""
    (cached,) = cache_features(model, clips, name="clips", cache=cache)
    return [cached.features_of(reference) for reference in cached.references]


@pytest.mark.parametrize("family", ["captioner", "plus"])
def test_the_same_with_and_without_a_store(request, family, clips, tmp_path, monkeypatch):
    """Off, cold and warm, to the last bit; what is there is neither read nor encoded again."""
    model = request.getfixturevalue(family)
    off = features_of(model, clips)
    store = open_feature_cache(FeatureCacheConfig(tmp_path), model)
    cold = features_of(model, clips, store)
    assert len(names(tmp_path)) == 5 * 64
    again = open_feature_cache(FeatureCacheConfig(tmp_path), model)
    monkeypatch.setattr(model.processor, "read", None)
    warm = features_of(model, clips, again)
    assert all(same(one, two) and same(one, three) for one, two, three in zip(off, cold, warm, strict=True))
    assert len({hash_features(block) for block in off}) == 5


def test_a_clip_goes_through_the_towers_alone(captioner, clips, tmp_path):
    """Its tokens and its file do not depend on what others there are."""
    few = replace(clips, references=clips.references[3:4])
    (alone,) = features_of(captioner, few, open_feature_cache(FeatureCacheConfig(tmp_path), captioner))
    (before,) = tmp_path.iterdir()
    all_five = features_of(captioner, clips, open_feature_cache(FeatureCacheConfig(tmp_path), captioner))
    assert same(all_five[3], alone) and len(list(tmp_path.iterdir())) == 5 and before.is_file()


def test_what_does_not_fit_stays_in_memory(captioner, clips, tmp_path, caplog):
    off = features_of(captioner, clips)
    largest = max(block.tokens.nbytes + 32 * len(block) for block in off)
    config = FeatureCacheConfig(tmp_path, max_gib=2.5 * largest / (1 << 30))
    blocks = features_of(captioner, clips, open_feature_cache(config, captioner))
    kept = len(list(tmp_path.iterdir()))
    assert kept in (2, 3) and all(same(one, two) for one, two in zip(off, blocks, strict=True))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2.5 * largest
    (record,) = caplog.records
    assert (
        f"the features of {5 - kept} of 5 clips" in record.message and "raise feature_cache.max_gib" in record.message
    )


def test_one_damaged_file_among_good_ones(captioner, clips, tmp_path, monkeypatch):
    config = FeatureCacheConfig(tmp_path)
    given = features_of(captioner, clips, open_feature_cache(config, captioner))
    first = [hash_features(block) for block in given]
    del given  # which the file is mapped to
    flip(min(tmp_path.iterdir()))
    read, encode = [], captioner.processor.read
    monkeypatch.setattr(captioner.processor, "read", lambda *args, **given: read.append(args) or encode(*args, **given))
    second = features_of(captioner, clips, open_feature_cache(config, captioner))
    assert len(read) == 1 and [hash_features(block) for block in second] == first


def touch(video: Path) -> None:
    stat = video.stat()
    os.utime(video, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


def lengthen(video: Path) -> None:
    """With the time that it had."""
    stat = video.stat()
    with video.open("ab") as file:
        file.write(b"\0")
    os.utime(video, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_key_tells_clips_apart(videos, tmp_path):
    video, elsewhere, sound = tmp_path / "a.mp4", tmp_path / "b.mp4", tmp_path / "c.wav"
    for path in (video, elsewhere, sound):
        shutil.copy2(videos[0], path)
    store, one = store_of(tmp_path / "tokens"), ClipSource(video)
    kinds = [
        one,
        replace(one, video=elsewhere),
        replace(one, modality="audio"),
        replace(one, start_seconds=1.0),
        replace(one, end_seconds=1.0),
        replace(one, audio=sound),
        replace(one, needs_both=True),
    ]
    keys = store.keys(kinds)
    assert len(set(keys)) == 7
    assert store.keys([ClipSource(Path(os.path.relpath(video)))]) == keys[:1]  # by whichever path it is named
    touch(video)
    touched = store.keys(kinds)
    lengthen(video)
    assert not {*keys[:1], *keys[2:]} & set(touched) and touched[1] == keys[1]
    assert not {*touched[:1], *touched[2:]} & set(store.keys(kinds))
    touch(sound)
    assert store.keys(kinds)[5] not in (keys[5], touched[5])
    assert FeatureCache(tmp_path, max_bytes=1, model="other").keys([kinds[1]]) != keys[1:2]


def test_a_model_is_told_by_what_gives_the_tokens(random_model, captioner, monkeypatch):
    before = hash_encoders(captioner)
    network = captioner.network
    assert hash_encoders(Captioner.load(random_model)) == before
    with torch.no_grad():
        network.get_parameter("lm.model.layers.0.self_attn.q_proj.weight").add_(1)
    assert hash_encoders(captioner) == before  # rounds move the decoder, and its clips stay as they are
    seen = {before}
    for name in ("vision.newline", "audio.projector.0.bias", "lm.model.embed_tokens.weight"):
        with torch.no_grad():
            network.get_parameter(name).flatten()[0] += 1
        seen.add(hash_encoders(captioner))
    seen.add(hash_encoders(Captioner.load(random_model, frames={"max_frames": 9})))
    captioner.processor.config.timestamp_tokens = True
    seen.add(hash_encoders(captioner))
    monkeypatch.setattr(tokens.torch, "get_num_threads", lambda: 7)  # sums of more threads are rounded otherwise
    seen.add(hash_encoders(captioner))
    assert len(seen) == 7


def test_a_clip_is_encoded_once_for_all_that_is_asked_of_it(captioner, videos, monkeypatch):
    encoded, encode = [], captioner.encode
    monkeypatch.setattr(captioner, "encode", lambda media: encoded.append(media) or encode(media))
    one, part = ClipSource(videos[0]), ClipSource(videos[0], end_seconds=2.0)
    blocks = encode_clips(captioner, [one, part, one], name="clips")
    assert len(encoded) == 2 and set(blocks) == {one, part}
    assert len(blocks[part]) < len(blocks[one])


def test_a_folder_that_a_process_does_not_see_ends_the_run(captioner, tmp_path, monkeypatch):
    monkeypatch.setattr(tokens.dist, "is_main", lambda: False)
    with pytest.raises(ValueError, match=r"cannot see .*gone, which process 0 has created"):
        open_feature_cache(FeatureCacheConfig(tmp_path / "gone"), captioner)


def test_an_impossible_size_is_refused():
    with pytest.raises(ValueError, match="folder null to keep features in memory"):
        FeatureCacheConfig(max_gib=0.0)
    assert open_feature_cache(FeatureCacheConfig(folder=None), None) is None
