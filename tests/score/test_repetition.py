"""Repetition against words counted by hand."""

import pytest

from salmonn.score.repetition import count_repeated_words, find_repeated_spans, remove_clauses


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", (0, 0)),
        ("A dog runs. A cat sleeps.", (0, 6)),
        ("It blinks. It blinks. It blinks.", (4, 6)),
        ("A dog runs. Then, the dog runs!", (4, 7)),
        ("A big dog runs, and a cat sleeps, and then a big dog runs.", (6, 14)),
        ("The big dog runs and the big dog barks and the big dog runs and the big dog barks", (10, 19)),
        # the worked example of the docstring
        ("A red star blinks. It moves up, and then the red star blinks. A red st", (9, 16)),
        # "it" and omitted subjects refer to another object here
        ("A red circle appears and it blinks. A blue star appears and it blinks.", (0, 14)),
        ("A red circle appears, then moves to the left. A blue star appears, then moves to the left.", (0, 18)),
        ("A red circle appears, and it blinks, and it blinks.", (3, 10)),
        # good prose mentions things again
        ("A man and a woman stand. A man and a woman sit.", (0, 12)),
        ("A red circle, a star and a cross appear. Then a red circle, a star and a cross vanish.", (0, 19)),
        # loops within a clause, of three times or more
        ("the red cat the red cat the red cat", (6, 9)),
        ("It is a very very good day.", (0, 7)),
        ("beep, beep, beep", (2, 3)),
        # a last clause only counts as cut off if the text has no end
        ("The red star moves up. A dog barks. The red star mov", (4, 12)),
        ("The red star moves up. A dog barks. The red star moves.", (0, 12)),
        ("The red star moves up. A dog barks. The r", (0, 10)),
    ],
)
def test_count_repeated_words(text, expected):
    assert count_repeated_words(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A dog runs. A cat sleeps.", []),
        ("A dog runs. Then, the dog runs!", ["Then, the dog runs"]),
        ("The big dog runs and the big dog barks and the big dog runs.", ["and the big dog runs"]),
        ("the red  cat the red cat the red cat", ["the red cat the red cat"]),
        (
            "A red star blinks. It moves up, and then the red star blinks. A red st",
            ["and then the red star blinks", "A red st"],
        ),
    ],
)
def test_find_repeated_spans(text, expected):
    assert [text[start:end] for start, end in find_repeated_spans(text)] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A dog runs. A cat sleeps.", "A dog runs. A cat sleeps."),
        # whole sentences, and the conjunctions and commas of clauses
        ("A dog runs. Then, the dog runs! A cat sleeps.", "A dog runs. A cat sleeps."),
        ("A big dog runs, and a cat sleeps, and then a big dog runs.", "A big dog runs, and a cat sleeps."),
        (
            "A low tone plays. A cat sleeps, a low tone plays and a dog barks.",
            "A low tone plays. A cat sleeps and a dog barks.",
        ),
        # the clause after it starts the sentence
        ("A big dog runs. Meanwhile, the big dog runs while a cat sleeps.", "A big dog runs. A cat sleeps."),
        (
            "A big dog runs. The big dog runs, and finally the cat sleeps, and it dreams.",
            "A big dog runs. The cat sleeps, and it dreams.",
        ),
        # "it" would be another dog
        (
            "A red dog runs. A blue dog sits. A red dog runs, and it barks.",
            "A red dog runs. A blue dog sits. A red dog runs, and it barks.",
        ),
        (
            "A big dog sits, and it barks loudly. A cat sleeps. The big dog sits, and it barks loudly. A cat sleeps.",
            "A big dog sits, and it barks loudly. A cat sleeps.",
        ),
        # the end of a caption that was cut off
        ("A red star blinks. It moves up, and then the red star blinks. A red st", "A red star blinks. It moves up."),
    ],
)
def test_remove_repeated_clauses(text, expected):
    assert remove_clauses(text, find_repeated_spans(text)) == expected


def test_remove_clauses_that_lie_in_the_places():
    text = "A dog runs, and a low tone plays."
    start = text.index("a low")
    assert remove_clauses(text, [(start, len(text) - 1)]) == "A dog runs."
    assert remove_clauses(text, [(start, start + 5), (start + 6, len(text) - 1)]) == "A dog runs."
    assert remove_clauses(text, [(start, start + 5)]) == text  # a part of the clause
    assert remove_clauses(text, [(0, len(text))]) == ""
