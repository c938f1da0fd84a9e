"""What a person keeps of a draft: rewording keeps a claim, a changed fact does not."""

import pytest

from salmonn.score.persistence import share_kept


@pytest.mark.parametrize(
    ("draft", "text"),
    [
        ("A dog barks.", "The dog is barking."),  # articles, inflection
        ("The ball stopped.", "A ball stops."),
        ("A woman cries.", "The woman cried."),
        ("Three glasses pass by.", "3 glasses passed by."),
        ("A low-pitched tone rises.", "A low pitched tone is rising."),
        ("A dog barks loudly.", "A dog loudly barks."),
        ("A dog barks in the park.", "In the park a dog barks."),
        ("A dog barks, and a cat sleeps.", "A cat sleeps while a dog barks."),  # order of clauses
        ("A circle appears.", "A large red circle appears on the left."),  # additions
        ("A red circle appears and moves up.", "A red circle appears. It moves up."),  # sentences split,
        ("A red circle appears. It moves up.", "A red circle appears, then moves up."),  # and joined
        ("A red circle appears. It moves up.", "A red circle appears. The red circle moves up."),
        ("A door doesn't open.", "The door did not open."),
        ("A bird can\u2019t fly.", "The bird cannot fly."),
    ],
)
def test_rewording_keeps_a_claim(draft, text):
    assert share_kept(draft, text) == 1.0


@pytest.mark.parametrize(
    ("draft", "text"),
    [
        ("A dog barks.", "A cat barks."),  # another object,
        ("Two dogs bark.", "Three dogs bark."),  # number,
        ("A dog barks.", "Two dogs bark."),
        ("A red circle appears.", "A blue circle appears."),  # colour,
        ("A circle moves up.", "A circle moves down."),  # direction
        ("A circle moves from left to right.", "A circle moves from right to left."),
        ("A dog chases a cat.", "A cat chases a dog."),  # roles
        ("A red ball is above a blue box.", "A blue ball is above a red box."),
        ("The dog barks.", "The dog never barks."),
        ("A door opens.", "A door doesn't open."),
        ("A red circle appears.", "A circle appears. A red star blinks."),  # words of two clauses
        ("A dog barks.", ""),
    ],
)
def test_a_changed_fact_is_lost(draft, text):
    assert share_kept(draft, text) == 0.0


@pytest.mark.parametrize(
    ("draft", "text", "share"),
    [
        # Of two clauses the second is kept; "it" is another object below.
        ("A dog barks. A bird sings.", "A bird sang. A cat barks.", 0.0),  # irregular forms are other words
        ("A dog barks. A bird chirps.", "A bird chirped. A cat barks.", 0.5),
        ("A circle appears. It moves up.", "A circle appears. A star moves up.", 0.5),
        ("A circle appears. It moves up.", "A star appears. It moves up.", 0.0),
        ("A red string and a speeding train appear.", "A red string and speeding trains appear.", 1.0),
        ("", "A dog barks.", 1.0),
    ],
)
def test_shares(draft, text, share):
    assert share_kept(draft, text) == share
