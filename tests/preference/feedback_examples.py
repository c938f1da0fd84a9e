"""Two captions, votes on them and ratings, as people give them."""

from dataclasses import replace

from salmonn.preference.feedback import Candidate, Feedback
from salmonn.records import Comparison

LEFT = Candidate("one", "A dog barks.", "Describe it.", temperature=0.8, seed=3, total=0.25)
RIGHT = Candidate("two", "A cat sleeps.", "Describe it.", seed=4, total=0.75)
VOTE = Feedback("2026-11-22T10:00:00+00:00", "vote", "holiday.mp4", LEFT, RIGHT, "second")
KEPT = replace(VOTE, kept_video="v.mp4")
PAIR = Comparison("videos/v.mp4", "Describe it.", RIGHT.text, LEFT.text, source="vote")


def rate(action, caption, rater="", **changes):
    """A rating of one caption of the clip v.mp4."""
    return replace(
        KEPT, action=action, first=replace(LEFT, text=caption), second=None, choice=None, rater=rater, **changes
    )
