"""Pairs of what a caption says next and a clause said again, with texts written by hand."""

import pytest

from salmonn.preference.rating import Rating
from salmonn.preference.repeat_negatives import select_repeat_negatives
from salmonn.preference.selection import SelectionConfig
from salmonn.records import Caption, Event, Mention, Reference, Score

TONE, DOG, HORN = (
    Event("a low tone is heard", "audio"),
    Event("a dog runs", "visual"),
    Event("a horn blows", "audio"),
)
START = "First, a low tone is heard."
TEXT = f"{START} After that, a dog runs while a cat sleeps."


def sample(text=TEXT, mentions=(TONE, DOG), *, total=0.5, number=0, video="v", words=0, finished=True):
    """Return a caption with its rating by a judge that quotes mentions in the events' words."""
    score = Score(
        video, 3, 1, 0, 0, num_words=12, num_repeated_words=words, sample=number,
        mentions=tuple(Mention(event, event.text) for event in mentions),
    )  # fmt: skip
    rating = Rating(video, {"total": total}, {"total": -1.0}, sample=number, score=score)
    return Caption(video, text, "Tell.", sample=number, finished=finished), rating


def select(*sampled, fraction=1.0, events=(TONE, DOG), **options) -> list[tuple[str, str]]:
    """Return chosen and rejected texts; "<end>" stands for the end of a finished one."""
    captions, ratings = zip(*sampled, strict=True)
    references = {caption.video: Reference(caption.video, events, caption="the truth") for caption in captions}
    pairs = select_repeat_negatives(captions, ratings, references, fraction=fraction, source="rule", **options)
    assert all(pair.margin == 0 and pair.source == "rule" and pair.ground_truth == "the truth" for pair in pairs)
    assert all(pair.prompt == "Tell." and not pair.rejected_finished for pair in pairs)
    return [(pair.chosen + "<end>" * pair.chosen_finished, pair.rejected) for pair in pairs]


def test_what_follows_a_sentence_is_chosen_over_the_last_sound_or_sight_before():
    videos = [f"{number}.mp4" for number in range(32)]
    pairs = select(*(sample(video=video) for video in videos))
    assert set(pairs) == {
        (TEXT, f"{START} After that, a low tone is heard."),
        (f"{TEXT}<end>", f"{TEXT} After that, a low tone is heard."),
        (f"{TEXT}<end>", f"{TEXT} After that, a dog runs."),
    }
    assert pairs == select(*(sample(video=video) for video in videos))  # the choice is that of the text and the video


def test_only_what_was_said_before_is_repeated():
    text = "A horn blows, and then a low tone is heard."
    assert select(sample(text, (HORN, TONE))) == [(f"{text}<end>", f"{text} A low tone is heard.")]


def test_wrong_mentions_are_not_repeated():
    caption, rating = sample("A low tone is heard.", ())
    object.__setattr__(rating.score, "mentions", (Mention(TONE, TONE.text, is_correct=False),))
    assert select((caption, rating)) == []


def test_without_a_score_the_last_clause_is_repeated():
    caption, rating = sample("It rains and Bob sings!")
    assert select((caption, Rating("v", rating.parts, rating.weights))) == [
        (f"{caption.text}<end>", "It rains and Bob sings! Bob sings.")
    ]


@pytest.mark.parametrize(
    "better",
    [
        sample("A dog runs. A dog runs.", (DOG,), total=0.1, number=1),
        sample("A dog runs.", (DOG,), total=0.1, number=1, words=3),  # the judge finds what rules do not
        sample("A dog runs.", (DOG,), total=0.1, number=1, finished=False),
        sample("A dog runs", (DOG,), total=0.1, number=1),  # no sentence ends
        sample("A cat sleeps.", (), total=0.1, number=1),
    ],
)
def test_of_the_captions_that_can_be_used_the_best_is(better):
    assert select(better) == []
    worse = sample("A horn blows.", (HORN,), total=0.9, number=2)
    assert [chosen.removesuffix("<end>") for chosen, _ in select(worse, better, sample())] == [TEXT]


def test_a_share_of_the_clips_gets_a_pair():
    sampled = [sample(f"{name} runs. A dog runs.", (DOG,), video=name) for name in "abcd"]
    assert [chosen[0] for chosen, _ in select(*sampled, fraction=0.5)] == ["a", "c"]
    assert select(*sampled, fraction=0.0) == []
    for fraction in (-0.1, 1.1):
        with pytest.raises(ValueError, match="repeat_negatives is a share of the clips from 0 to 1"):
            SelectionConfig(repeat_negatives=fraction)


def test_the_control_inserts_a_clause_about_what_the_clip_does_not_have():
    own, other = sample("A low tone is heard.", (TONE,)), sample("There, a horn blows.", (HORN,), video="w")
    assert select(own, other, foreign=True)[0] == ("A low tone is heard.<end>", "A low tone is heard. A horn blows.")
    # What happens in the clip would not be wrong: with the horn among its events, nothing is left to insert.
    assert select(own, other, foreign=True, events=(TONE, HORN)) == []
