"""Fixtures of the tests of training."""

import pytest

from salmonn import dist
from salmonn.records import Comparison


@pytest.fixture
def costs(monkeypatch):
    """The costs of the items that were last distributed; all go to this process."""
    last_costs = []

    def balance(item_costs):
        last_costs[:] = item_costs
        return [list(range(len(item_costs)))]

    monkeypatch.setattr(dist, "balance", balance)
    return last_costs


@pytest.fixture
def pairs(clips):
    """Three pairs on three clips, of different lengths."""
    texts = [("a red star appears", "a tone", "the truth"), ("two", "a low tone is heard", "three"), ("x", "y", "z z")]
    return [
        Comparison(reference.video, f"Tell {number}.", *text)
        for number, (reference, text) in enumerate(zip(clips.references, texts, strict=False))
    ]


@pytest.fixture
def features_by_video(captioner, media, clips):
    tokens = captioner.encode(media)
    return {reference.video: features for reference, features in zip(clips.references, tokens, strict=True)}
