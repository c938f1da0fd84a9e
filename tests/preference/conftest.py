"""Folders of people's feedback."""

from dataclasses import replace

import pytest

from salmonn.preference.feedback import FeedbackStore
from tests.preference.feedback_examples import VOTE


@pytest.fixture
def store(tmp_path):
    return FeedbackStore(tmp_path / "votes")


@pytest.fixture
def video(tmp_path):
    path = tmp_path / "a visitor's [1].MP4"
    path.write_bytes(b"frames")
    return path


@pytest.fixture
def votes(store, tmp_path):
    """Two votes of ann, one on a video that bob voted on, too; and a copy, which has no rater."""
    for name, rater, text in (("a", "ann", "A dog yawns."), ("b", "ann", ""), ("b", "bob", "A cat purrs.")):
        path = tmp_path / f"{name}.mp4"
        path.write_bytes(name.encode())
        store.add(replace(VOTE, rater=rater, text=text, video=path.name), path)
    store.add(replace(VOTE, action="copy", second=None, choice=None))
    return store
