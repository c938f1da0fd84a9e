"""Pairs that differ in repetition only, with texts corrected by hand."""

import pytest

from salmonn.preference.rating import Rating
from salmonn.preference.repetition_pairs import max_repetition_pairs, select_repetition_pairs
from salmonn.preference.selection import SelectionConfig
from salmonn.records import Caption, Reference, Score

DOGS = ("A big dog runs. Then the big dog runs. A cat sleeps.", "A big dog runs. A cat sleeps.")
# The second sound says the same in other words, so only a judge's quote finds it.
SOUNDS = ("A low tone plays. A cat sleeps, and we hear a deep tone.", "A low tone plays. A cat sleeps.")
IT = "A big dog runs. A big dog runs, and it barks loudly."  # "it" needs the repeated clause before it


def sample(text, *, repeated=5, number=0, video="v", quotes=(), finished=True) -> tuple[Caption, Rating]:
    """Return a caption of 10 words, as the judge counts them, with its rating."""
    score = Score(video, 10, 5, 0, 0, num_words=10, num_repeated_words=repeated, sample=number, repeated=quotes)
    parts = {"total": 0.5, "repetition": repeated / 10}
    rating = Rating(video, parts, {"total": -1.0, "repetition": -1.0}, sample=number, score=score)
    return Caption(video, text, "Tell.", sample=number, finished=finished), rating


def select(*sampled, max_pairs=9) -> list[tuple[str, str]]:
    captions, ratings = zip(*sampled, strict=True)
    references = {caption.video: Reference(caption.video, caption="the truth") for caption in captions}
    pairs = select_repetition_pairs(captions, ratings, references, max_pairs=max_pairs, source="rule")
    assert all(pair.margin == 0 and pair.source == "rule" and pair.prompt == "Tell." for pair in pairs)
    assert all(pair.ground_truth == "the truth" for pair in pairs)
    return [(pair.chosen, pair.rejected) for pair in pairs]


def test_the_caption_with_most_repetition_is_rejected_for_the_corrected_one():
    def sounds(repeated):
        return sample(SOUNDS[0], repeated=repeated, number=1, quotes=("we hear a deep tone",))

    dogs, clean = sample(DOGS[0], repeated=5), sample("A cat sleeps.", repeated=0, number=2)
    assert select(dogs, sounds(6), clean) == [SOUNDS[::-1]]
    assert select(sounds(5), dogs, clean) == [DOGS[::-1]]  # the lower sample number


@pytest.mark.parametrize(
    "other",
    [
        sample(IT, repeated=9),
        sample(DOGS[0] + " A big dog runs. A ca", repeated=9, finished=False),
        sample("A dog and a cat run.", repeated=9, quotes=("a cat",)),  # a part of a clause
        sample("A dog runs.", repeated=9, quotes=("a dog runs",)),  # nothing would be left
        sample("A dog runs.", repeated=0, quotes=("a dog runs",)),
    ],
)
def test_what_cannot_be_corrected_gives_no_pair(other):
    assert select(other) == []
    assert select(other, sample(DOGS[0], number=1)) == [DOGS[::-1]]


def test_captions_without_a_judges_score_are_left_out():
    caption, rating = sample(DOGS[0])
    unscored = Rating("v", rating.parts, rating.weights)
    assert select((caption, unscored)) == []
    assert select_repetition_pairs([caption], [], {}, max_pairs=1, source="") == []


def test_pairs_are_spread_over_the_clips():
    texts = [f"A dog of {name} runs." for name in "abcdef"]
    sampled = [sample(f"{text} {text}", video=str(number)) for number, text in enumerate(texts)]
    assert [chosen for chosen, _ in select(*sampled)] == texts
    assert [chosen for chosen, _ in select(*sampled, max_pairs=3)] == texts[::2]
    assert select(*sampled, max_pairs=0) == []


def test_the_fraction_is_of_all_pairs():
    assert [max_repetition_pairs(90, fraction) for fraction in (0.0, 0.1, 0.25, 0.5)] == [0, 10, 30, 90]
    assert max_repetition_pairs(89, 0.1) == 9
    for fraction in (-0.1, 1.0):
        with pytest.raises(ValueError, match="repetition_fraction must be"):
            SelectionConfig(repetition_fraction=fraction)
