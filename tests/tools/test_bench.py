"""The bench runs, and what it prints is of the process that it started."""

import re

import av
import pytest

from tests.tools.benches import load


@pytest.mark.slow
def test_one_second(capsys, monkeypatch):
    bench = load("caption")
    monkeypatch.setattr("sys.argv", ["caption.py", "--seconds", "1"])
    bench.main()
    seconds, wall, processor, memory = map(float, re.findall(r"[\d.]+", capsys.readouterr().out.splitlines()[-2]))
    assert seconds == 1 and 1 < processor < 600 and wall > 1 and 100 < memory < 4000


def test_the_clip_is_as_long_as_asked(tmp_path):
    load("caption").render(tmp_path / "2.mp4", seconds=2)
    with av.open(str(tmp_path / "2.mp4")) as container:
        video, audio = container.streams
        assert (video.width, video.height) == (1280, 720) and len(list(container.decode(video))) == 60
        assert abs(float(audio.duration * audio.time_base) - 2) < 0.05
