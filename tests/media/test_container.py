"""Durations by header, without decoding."""

import numpy as np
import pytest
from av import AudioFrame
from av import open as av_open

from salmonn.media.container import ClipError, declared_seconds


def write_tone(path, seconds: float) -> None:
    """Write a WAV file of a tone, 8 kHz mono."""
    with av_open(str(path), "w") as file:
        stream = file.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = AudioFrame.from_ndarray(np.ones((1, round(8000 * seconds)), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


def test_declared_duration(tmp_path, videos, clips):
    write_tone(tmp_path / "tone.wav", 2.5)
    assert declared_seconds(tmp_path / "tone.wav") == pytest.approx(2.5)
    # The duration of synthetic clips is that of their reference, to about a frame.
    for video, reference in zip(videos, clips.references, strict=True):
        last = max(event.end_seconds for event in reference.events)
        assert last - 0.1 <= declared_seconds(video) <= 60


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "note.mp4").write_text("no video")
    for name in ("note.mp4", "gone.mp4"):
        with pytest.raises(ClipError, match=name):
            declared_seconds(tmp_path / name)
