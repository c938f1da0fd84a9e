"""Pairs of a repeated clause and a missing event in its place, with texts corrected by hand."""

import pytest

from salmonn.preference.rating import Rating
from salmonn.preference.repetition_pairs import max_repetition_pairs, select_repetition_pairs
from salmonn.preference.selection import SelectionConfig
from salmonn.records import Caption, Event, Mention, Reference, Score

TONE, DOG, RISE, FALL, CAT = (
    Event(text, modality, start, start + 1.0)
    for text, modality, start in (
        ("a low tone is heard", "audio", 0.0),
        ("a big dog runs", "visual", 1.0),
        ("a rising sweep is heard", "audio", 2.0),
        ("a falling sweep is heard", "audio", 3.0),
        ("a cat sleeps", "visual", 4.0),
    )
)
EVENTS = (TONE, DOG, RISE, FALL, CAT)
SWEEPS = "A low tone is heard. Next, a rising sweep is heard. Then we hear a sweep that climbs. Finally, a cat sleeps."
PAIR = (
    "A low tone is heard. Next, a rising sweep is heard. Then a falling sweep is heard",
    "A low tone is heard. Next, a rising sweep is heard. Then we hear a sweep that climbs",
)


def sample(
    text=SWEEPS, mentions=(TONE, RISE, CAT), *, quotes=("we hear a sweep that climbs",), words=5, number=0, video="v"
):
    """Return a caption with its rating by a judge that quotes mentions in the events' words."""
    missed = tuple(event.text for event in EVENTS if event not in mentions)
    score = Score(
        video, 5, len(missed), 0, 0, num_words=20, num_repeated_words=words, sample=number, missed=missed,
        mentions=tuple(Mention(event, event.text) for event in mentions), repeated=quotes,
    )  # fmt: skip
    parts = {"total": score.total, "repetition": words / 20}
    rating = Rating(video, parts, {"total": -1.0, "repetition": -1.0}, sample=number, score=score)
    return Caption(video, text, "Tell.", sample=number), rating


def select(*sampled, max_pairs=9) -> list[tuple[str, str]]:
    captions, ratings = zip(*sampled, strict=True)
    references = {caption.video: Reference(caption.video, EVENTS, caption="the truth") for caption in captions}
    pairs = select_repetition_pairs(captions, ratings, references, max_pairs=max_pairs, source="rule")
    assert all(pair.margin == 0 and pair.source == "rule" and pair.prompt == "Tell." for pair in pairs)
    assert all(pair.ground_truth == "the truth" for pair in pairs)
    assert not any(pair.chosen_finished or pair.rejected_finished for pair in pairs)  # the caption goes on
    return [(pair.chosen, pair.rejected) for pair in pairs]


def test_a_missing_event_that_fits_in_time_replaces_the_repeated_clause():
    """Of the dog, which is before the first sweep, and the other sweep, only the sweep fits behind the first."""
    assert select(sample()) == [PAIR]


def test_of_several_events_the_one_with_most_words_in_common_is_chosen():
    text = "A low tone is heard. A low tone is heard. A cat sleeps."
    # All others fit between the tone and the cat; a sweep shares "a" and "is heard" with the clause, the dog only "a".
    pair = ("A low tone is heard. A rising sweep is heard", "A low tone is heard. A low tone is heard")
    assert select(sample(text, (TONE, CAT), quotes=())) == [pair]


@pytest.mark.parametrize(
    "other",
    [
        sample(mentions=(TONE, RISE, FALL, CAT), words=9),  # only the dog is missing, and does not fit
        sample(quotes=("a sweep that is not in the caption",), words=9),
        sample(words=0),
    ],
)
def test_what_cannot_be_corrected_gives_no_pair(other):
    assert select(other) == []
    assert select(other, sample(number=1)) == [PAIR]


def test_a_clip_gives_one_pair_of_its_caption_with_most_repetition():
    text = "A cat sleeps. A cat sleeps."
    pair = ("A cat sleeps. A low tone is heard", "A cat sleeps. A cat sleeps")

    def cats(words):
        return sample(text, (CAT,), quotes=(), words=words, number=1)

    first = Event("a low tone is heard", "audio")  # without a time it fits everywhere
    assert not select(cats(6))  # everything else is before the cat
    captions, ratings = zip(sample(), cats(6), strict=True)
    references = {"v": Reference("v", (first, *EVENTS[1:]))}
    chosen = select_repetition_pairs(captions, ratings, references, max_pairs=1, source="")
    assert [(one.chosen, one.rejected) for one in chosen] == [pair]


def test_captions_without_a_judges_score_are_left_out():
    caption, rating = sample()
    assert select((caption, Rating("v", rating.parts, rating.weights))) == []
    assert select_repetition_pairs([caption], [], {}, max_pairs=1, source="") == []


def test_pairs_are_spread_over_the_clips():
    names = [f"A {name} tone." for name in "abcdef"]
    sampled = [sample(f"{name} {SWEEPS}", video=name) for name in names]
    assert [chosen for chosen, _ in select(*sampled)] == [f"{name} {PAIR[0]}" for name in names]
    assert [chosen for chosen, _ in select(*sampled, max_pairs=3)] == [f"{name} {PAIR[0]}" for name in names[::2]]
    assert select(*sampled, max_pairs=0) == []


def test_the_fraction_is_of_all_pairs():
    assert [max_repetition_pairs(90, fraction) for fraction in (0.0, 0.1, 0.25, 0.5)] == [0, 10, 30, 90]
    assert max_repetition_pairs(89, 0.1) == 9
    for fraction in (-0.1, 1.0):
        with pytest.raises(ValueError, match="repetition_fraction must be"):
            SelectionConfig(repetition_fraction=fraction)
