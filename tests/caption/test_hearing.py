"""The hearing probe: clips that differ in sound alone, on models that hear, do not hear, and answer at random."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from salmonn.caption.captioner import Captioner
from salmonn.caption.generator import SHIPPED_MODEL, CaptionRequest
from salmonn.caption.hearing import probe_hearing, write_probe_clips
from salmonn.media.clip import read_clip
from salmonn.media.frame_sampling import FixedRateSampler
from salmonn.records import Caption


class Deafened:
    """A local model that is given the frames alone."""

    def __init__(self, captioner: Captioner) -> None:
        self.name = "a deaf model"
        self._captioner = captioner

    def generate(self, requests: Sequence[CaptionRequest]) -> list[list[Caption]]:
        return self._captioner.generate([replace(request, modality="visual") for request in requests])


class Scripted:
    """A generator with given answers and log-probabilities."""

    name = "scripted"

    def __init__(self, *answers: tuple[str, float | None]) -> None:
        self._answers = answers

    def generate(self, requests: Sequence[CaptionRequest]) -> list[list[Caption]]:
        return [
            [Caption(str(request.path), *answer[:1], logprob=answer[1])]
            for request, answer in zip(requests, self._answers, strict=True)
        ]


def test_probe_clips_differ_in_sound_alone(tmp_path):
    beeps, noise = (read_clip(path, FixedRateSampler(frames_per_second=10.0)) for path in write_probe_clips(tmp_path))
    assert len(beeps.frames) == 15 and np.array_equal(beeps.frames, noise.frames)
    # Beeps are silent every other quarter of a second; noise never is.
    quarters = [clip.waveform[:48_000].reshape(12, 4000)[:, 500:-500].std(axis=1) for clip in (beeps, noise)]
    assert quarters[0][::2].min() > 0.3 and quarters[0][1::2].max() < 0.02 and quarters[1].min() > 0.15


def test_a_hearing_and_a_deaf_model():
    toy = Captioner.load(SHIPPED_MODEL)
    assert probe_hearing(toy).heard
    deaf = Deafened(toy)
    hearing = probe_hearing(deaf)
    assert hearing.heard is False and len(set(hearing.answers)) == 1


@pytest.mark.parametrize(
    ("answers", "heard"),
    [
        ([("a", None), ("b", None), ("a", None), ("b", None)], True),
        ([("a", None), ("a", None), ("a", None), ("a", None)], False),
        # The same words with other probabilities.
        ([("a", -1.0), ("a", -1.5), ("a", -1.0), ("a", -1.5)], True),
        ([("a", -1.0), ("a", -1.005), ("a", -1.0), ("a", -1.005)], False),
        # Rounding of 0.05 between identical requests hides a gap of 0.3.
        ([("a", -1.0), ("a", -1.3), ("a", -1.05), ("a", -1.3)], False),
        # A server that ignores the temperature.
        ([("a", -1.0), ("b", -1.0), ("c", -1.0), ("b", -1.0)], None),
        ([("a", None), ("b", None), ("a", None), ("a", None)], None),
    ],
)
def test_verdicts(answers, heard):
    assert probe_hearing(Scripted(*answers)).heard is heard
