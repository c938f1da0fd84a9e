"""The caption benchmark runs, and its figures are those of the process that it starts."""

import re

import av
import pytest

from tests.tools.benches import load


@pytest.mark.slow
def test_one_second(capsys, monkeypatch):
    bench = load("caption")
    monkeypatch.setattr("sys.argv", ["caption.py", "--seconds", "1"])
    bench.main()
    seconds, wall, cpu, memory = map(float, re.findall(r"[\d.]+", capsys.readouterr().out.splitlines()[-2]))
    assert seconds == 1 and 1 < cpu < 600 and wall > 1 and 100 < memory < 4000


def test_the_clip_has_the_requested_length(tmp_path):
    load("caption").render(tmp_path / "2.mp4", seconds=2)
    with av.open(str(tmp_path / "2.mp4")) as container:
        video, audio = container.streams
        assert (video.width, video.height) == (1280, 720) and len(list(container.decode(video))) == 60
        assert abs(float(audio.duration * audio.time_base) - 2) < 0.05
