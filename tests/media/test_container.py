"""The length that a file states, without decoding it."""

import numpy as np
import pytest
from av import AudioFrame
from av import open as av_open

from salmonn.media.container import ClipError, declared_seconds


def write_sound(path, seconds: float) -> None:
    """A tone of 8 kHz mono."""
    with av_open(str(path), "w") as file:
        stream = file.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = AudioFrame.from_ndarray(np.ones((1, round(8000 * seconds)), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


def test_the_length_that_a_file_states(tmp_path, videos, clips):
    write_sound(tmp_path / "tone.wav", 2.5)
    assert declared_seconds(tmp_path / "tone.wav") == pytest.approx(2.5)
    # Synthetic clips last as long as their reference says, to a frame or so.
    for video, reference in zip(videos, clips.references, strict=True):
        last = max(event.end_seconds for event in reference.events)
        assert last - 0.1 <= declared_seconds(video) <= 60


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "note.mp4").write_text("no video")
    for name in ("note.mp4", "gone.mp4"):
        with pytest.raises(ClipError, match=name):
            declared_seconds(tmp_path / name)
