"""A clip that several tests read."""

import pytest

from tests.media.grey_clips import tenths, write_clip


@pytest.fixture(scope="package")
def whole(tmp_path_factory):
    """Write 4 s at 10 frames per second, with a keyframe every second and audio of the same length."""
    path = tmp_path_factory.mktemp("whole") / "whole.mp4"
    return write_clip(path, picture=tenths(4), sound_seconds=4, gop=10, movflags="faststart")
