"""Ranges of words, ends of sentences, and cutting at them."""

import pytest

from salmonn.caption.length import WordRange, cut_at_sentence, drop_unfinished_sentence, sentence_ends


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("A dog runs. It barks!", ["A dog runs.", "It barks!"]),
        ('He says "Stop!" Then he goes.', ['He says "Stop!"', "Then he goes."]),
        ('"Stop!" he says. Then he goes.', ['"Stop!" he says.', "Then he goes."]),
        ("Mr. Smith and J. R. Jones meet Dr. No. They talk.", ["Mr. Smith and J. R. Jones meet Dr. No. They talk."]),
        ("It costs 3.5 euros, e.g. here. Next.", ["It costs 3.5 euros, e.g. here.", "Next."]),
        ("1. A dog runs. 2 cats sleep.", ["1. A dog runs.", "2 cats sleep."]),
        ("Wait... what? Yes… He nods.", ["Wait... what?", "Yes…", "He nods."]),
        ("一只狗在跑。它在叫。好", ["一只狗在跑。", "它在叫。"]),
        ("A heading\n\nA dog runs", ["A heading"]),
        ("A dog and", []),
        ("", []),
    ],
)
def test_sentences(text, sentences):
    ends = sentence_ends(text)
    starts = [0, *ends]
    assert [text[start:end].strip() for start, end in zip(starts, ends, strict=False)] == sentences


def test_a_text_is_cut_at_the_last_sentence_that_fits():
    text = "One two three. Four five. Six seven eight nine."
    assert [cut_at_sentence(text, number) for number in (9, 8, 5, 4, 3, 2)] == [
        text, "One two three. Four five.", "One two three. Four five.", "One two three.", "One two three.", "",
    ]  # fmt: skip


def test_an_unfinished_sentence_is_dropped_unless_it_is_the_only_one():
    assert drop_unfinished_sentence("A dog runs. It ba") == "A dog runs."
    assert drop_unfinished_sentence("A dog ru") == "A dog ru"


def test_ranges():
    words = WordRange.parse(" 80 - 120")
    assert (words.minimum, words.maximum, str(words)) == (80, 120, "80-120")
    assert [words.distance(number) for number in (79, 80, 120, 125)] == [-1, 0, 0, 5]
    assert WordRange.parse("7\u20137") == WordRange(7, 7)


@pytest.mark.parametrize("text", ["80", "eighty", "80-", "-5", "80-120 words", "", "1-2-3"])
def test_what_is_no_range(text):
    with pytest.raises(ValueError, match="must be a smallest and a largest number, such as 80-120"):
        WordRange.parse(text)


@pytest.mark.parametrize("text", ["120-80", "0-5", "0-0"])
def test_impossible_ranges(text):
    with pytest.raises(ValueError, match=f"the range of words {text} is impossible"):
        WordRange.parse(text)
