"""The folder benchmark: all sides give the same captions, one that does not is detected, and rows are as timed."""

import importlib
from dataclasses import replace

import av
import pytest
import torch

from tests.tools.benches import load


@pytest.fixture(scope="module")
def folder():
    return load("folder")


@pytest.fixture(scope="module")
def paths(folder, tmp_path_factory):
    return folder.make_folder("720p", tmp_path_factory.mktemp("clips") / "new", folder.FolderConfig(clips=3, seconds=1))


@pytest.fixture
def bench(folder, paths):
    return folder.FolderBench("720p", paths, quick=True)


def test_size_and_length_of_the_clips(paths, folder, tmp_path):
    with av.open(str(paths[0])) as container:
        video, audio = container.streams
        assert (video.width, video.height) == (1280, 720) and len(list(container.decode(video))) == 30
        assert abs(float(audio.duration * audio.time_base) - 1) < 0.05
    for number, seed in enumerate((0, 0, 1)):
        folder.render(tmp_path / f"{number}.mp4", seconds=1, width=64, height=48, seed=seed)
    one, same, other = ((tmp_path / f"{number}.mp4").read_bytes() for number in range(3))
    assert one == same != other


def test_all_sides_give_the_same_captions(folder, bench):
    folder.check(bench)
    assert len(bench.ours()) == 3 and all(len(text.split()) == folder.QUICK_NEW_TOKENS for text in bench.ours())
    assert bench.waited > 0


@pytest.mark.parametrize("side", ["one at a time", "generate() one at a time"])
def test_a_side_with_other_captions_is_detected(folder, bench, side):
    original = bench.sides[side]
    bench.sides[side] = lambda: [*original()[:2], "something else"]
    with pytest.raises(ValueError, match=rf"'{side[:8]}.* captions 002\.mp4 differently: .*something else"):
        folder.check(bench)


def test_identical_captions_are_rejected(folder, bench):
    with torch.no_grad():
        bench.captioner.network.lm.get_output_embeddings().weight.zero_()
    with pytest.raises(ValueError, match="same caption"):
        folder.check(bench)


def test_the_ratio_of_prompt_and_answer_tokens(folder):
    """A clip of 5 s at 224 pixels: 5 frames of 8 rows of 9 tokens, and 60 audio tokens: 420."""
    model = importlib.import_module("model")
    captioner = model.make_captioner(replace(folder.MID, layers=1))
    clip = model.make_clip(captioner.processor, num_frames=5, side=224)
    assert len(captioner.processor.make_layout(clip)) == 5 * 8 * 9 + 60
    assert 420 / folder.MID_NEW_TOKENS == 20


@pytest.mark.slow
def test_rows(folder, monkeypatch):
    """Two clips and four times as many; the memory of one side is measured for real."""
    measured, measure = [], folder.run_isolated

    def run_isolated(script, *arguments, kind, memory_of):
        measured.append((kind, memory_of))
        first = measure(script, *arguments, kind=kind, memory_of=memory_of) if len(measured) == 1 else {}
        return first or {"process_mib": len(measured)}

    monkeypatch.setattr(folder, "run_isolated", run_isolated)
    every = folder.run(folder.FolderConfig(clips=2, seconds=1, repeats=1, quick=True))
    rows = [row for row in every if row["part"] == "folder captioning"]
    assert [row["name"] for row in rows] == [
        f"{count} clips, {kind}, against {side}"
        for kind, count in (("720p", 2), ("synthetic", 8))
        for side in ("one at a time", "generate() one at a time")
    ]
    parts = [row["name"] for row in every if row not in rows]
    what = ("reading", "encoders", "prefill and first token", "prefill and all tokens")
    assert parts == [f"{kind}: {name}" for kind in ("2 clips, 720p", "8 clips, synthetic") for name in what]
    assert measured == [
        (kind, side) for kind in ("720p", "synthetic") for side in ("ours", "one at a time", "generate() one at a time")
    ]
    assert 100 < rows[0]["ours_mib"] < 4000 and [row["other_mib"] for row in rows] == [2, 3, 5, 6]
    for row, count in zip(rows, (2, 2, 8, 8), strict=True):
        assert row["ratio"] == pytest.approx(row["other_seconds"] / row["ours_seconds"], rel=0.01)
        speed = 60 * count / row["ours_seconds"]
        assert abs(int(row["note"].split()[0]) - speed) <= 1 + 0.001 * speed and "waited" in row["note"]
