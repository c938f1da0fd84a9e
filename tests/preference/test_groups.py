"""Groups of captions with advantages by hand."""

from dataclasses import replace

import pytest

from salmonn.preference.groups import make_groups
from salmonn.preference.rating import Rating
from salmonn.records import Caption, Reference


def test_advantages_by_hand():
    """Ratings 1, 2, 3 have mean 2 and standard deviation 1; equal ratings and unrated captions teach nothing."""
    captions = [Caption(f"{video}.mp4", f"caption {sample}", sample=sample) for video in "ab" for sample in range(4)]
    values = {("a.mp4", 0): 1.0, ("a.mp4", 2): 3.0, ("a.mp4", 3): 2.0} | {("b.mp4", sample): 0.5 for sample in range(4)}
    ratings = [Rating(video, {"total": -value}, {"total": -1.0}, sample) for (video, sample), value in values.items()]
    references = {name: Reference(name, caption=f"truth of {name}") for name in ("a.mp4", "b.mp4")}
    (group,) = make_groups(captions, ratings, references)
    assert [caption.sample for caption in group.captions] == [0, 2, 3] and group.ground_truth == "truth of a.mp4"
    assert group.advantages == pytest.approx((-1 / 1.0001, 1 / 1.0001, 0.0))
    # Captions that were cut off are not rewarded, and those without a token teach nothing.
    captions = [replace(one, finished=one.sample != 2, text=one.text if one.sample != 0 else "") for one in captions]
    (group,) = make_groups(captions, ratings, references)
    assert [caption.sample for caption in group.captions] == [0, 2, 3]
    assert group.advantages == pytest.approx((-1 / 1.0001, 0.0, 0.0))
    captions = [replace(one, finished=one.sample != 0) for one in captions]
    (group,) = make_groups(captions, ratings, references)
    assert [caption.sample for caption in group.captions] == [2, 3]
