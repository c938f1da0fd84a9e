"""Dialogue measures: quotations found by rules, and word errors by hand."""

import json

import pytest

from salmonn.files import read_json, write_records
from salmonn.records import Caption, Event, Reference, Score
from salmonn.score.dialogue import (
    DIALOGUE_MEASURES,
    DialogueRates,
    align_words,
    count_dialogue,
    dialogue_rates,
    normalize_words,
    spoken_words,
)
from salmonn.score.formats import read_scores, write_scores
from salmonn.score.judge import ScoringTask, restrict_to_span
from salmonn.score.quotations import quoted_speech
from salmonn.score.scoring import make_judge_info
from salmonn.score.stats import bootstrap_intervals, compare_sets
from salmonn.speech import Dialogue, SpeechEvent, SpokenWord, quote_words, speech_within
from salmonn.synthetic.judge import RuleJudge
from tests.score.fake_llm_server import Answer, request_contents


def said(*quotes, start=0.0) -> tuple[Event, ...]:
    """A speech event for each quotation, two seconds each."""
    return tuple(
        Event(quote_words(SpeechEvent(quote)), "speech", start + 2.0 * number, start + 2.0 * number + 2)
        for number, quote in enumerate(quotes)
    )


@pytest.mark.parametrize(
    ("caption", "speech"),
    [
        ('A man says, "Hello there." He turns. "How are you?" she asks.', ["Hello there.", "How are you?"]),
        ("A woman shouts 'don't go!' and the dogs' owner runs.", ["don't go!"]),
        ('A sign that says "EXIT" glows. A banner reads “SALE”. The film "Home" starts.', []),
        ('A sign reads "EXIT" as a boy calls out "wait".', ["wait"]),
        ('He reads aloud "one two", a page titled "Numbers".', ["one two"]),
        ('Man: "Hi." A so-called "loop" closes.', ["Hi."]),
        ('"Go," "Stop," she yells.', ["Go,", "Stop,"]),
        ('A voice is heard: "Ready?" "Yes!"', ["Ready?", "Yes!"]),
        ('The 5" screen shows a man. He says, "I am going', ["I am going"]),
        ("男子说\uff1a“你好。” 字幕写着“再见”", ["你好。"]),
        ("She says «Bonjour» and adds „Guten Tag“, then 「はい」.", ["Bonjour", "Guten Tag", "はい"]),
        ("A man says hello. Nobody is quoted.", []),
        ('She says "!"', []),
    ],
)
def test_quotations_that_are_speech(caption, speech):
    assert quoted_speech(caption) == speech


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't stop — it's CAFÉ-time!", "dont stop its café time"),
        ("Twenty-one, 1,000 and one hundred and five.", "21 1000 and 105"),
        ("two thousand three hundred forty", "2340"),
        ("one two three", "1 2 3"),
        ("nineteen ninety nine, zero zero seven", "19 99 0 0 7"),
        ("a hundred people", "a hundred people"),
        ("Um, you know, uh", "you know"),
        ("你好", "你 好"),
    ],
)
def test_normalized_words(text, words):
    assert normalize_words(text) == words.split()


@pytest.mark.parametrize(
    ("reference", "hypothesis", "expected"),
    [
        ("a b c d", "a x c d e", (2, 3)),  # one substituted, one inserted
        ("a b c", "b", (2, 1)),
        ("", "a b", (2, 0)),
        ("a b", "", (2, 0)),
        ("a b", "b a", (2, 1)),  # one omitted, one inserted, rather than two substituted: as many errors, more matches
        ("", "", (0, 0)),
    ],
)
def test_alignment_by_hand(reference, hypothesis, expected):
    assert align_words(reference.split(), hypothesis.split()) == expected


def test_counts_by_hand():
    """Of 7 spoken words, 4 agree, 1 is wrong and 2 are omitted; "EXIT" is no speech."""
    reference = Reference("v", (*said("Good morning, everyone.", "Take two steps back."), Event("a sign is seen")))
    caption = 'A sign reads "EXIT". A man says "good morning" and then "take 2 stairs".'
    assert count_dialogue(caption, reference) == Dialogue(num_spoken=7, num_quoted=5, num_matched=4, num_errors=3)
    assert count_dialogue(caption, reference).accuracy == pytest.approx(4 / 7)


def test_repeating_a_quotation_never_helps():
    reference = Reference("v", said("go left", "go right", "go left"))
    once = count_dialogue('He says "go right" and "go left".', reference)
    again = count_dialogue('He says "go right" and "go left". He says "go left". He says "go right".', reference)
    assert once == Dialogue(6, 4, 4, 2)
    # "go left" is spoken twice, and so may be quoted twice. The second "go right" would raise the matches from 4 to 5.
    assert again == Dialogue(6, 8, 4, 4) and again.accuracy < once.accuracy
    both = count_dialogue('He says "go left", "go right" and "go left".', reference)
    assert both == Dialogue(6, 6, 6, 0) and both.accuracy == 1.0


def test_without_speech_or_without_words():
    silent = Reference("v", (Event("a dog barks", "audio"),))
    assert count_dialogue('A man says "stop it".', silent) == Dialogue(0, 2, 0, 2)
    assert count_dialogue('A man says "stop it".', silent).accuracy == 0.0
    assert count_dialogue("A dog barks.", silent) is None and spoken_words(silent) == []
    described = Reference("v", (Event("a man greets the crowd", "speech"),))
    assert count_dialogue('A man says "stop it".', described) is None and spoken_words(described) is None
    assert spoken_words(Reference("v", (*described.events, *said("Hi.")))) == ["hi"]


def test_speech_is_ordered_by_time_and_cut_to_the_span():
    reference = Reference("v", tuple(reversed(said("one", "two", "three"))))
    assert spoken_words(reference) == ["1", "2", "3"]
    part = restrict_to_span(reference, Caption("v", "", start_seconds=1.5, end_seconds=4.0))
    assert spoken_words(part) == ["2"]


def test_rates_by_hand():
    """docs/metrics.md, "Dialogue": three clips, the last without speech."""
    references = {
        "a": Reference("a", said("We leave at nine.", "Bring the map.")),
        "b": Reference("b", said("Stop!")),
        "c": Reference("c"),
    }
    texts = {
        "a": 'A woman says, "We leave at 9. Bring a map."',
        "b": 'A man shouts "Stop!" twice: "Stop!"',
        "c": 'A voice says "Hello."',
    }
    tasks = [ScoringTask(references[name], Caption(name, text)) for name, text in texts.items()]
    scores = [Score(name, 0, 0, 0, 0, dialogue=count_dialogue(texts[name], references[name])) for name in texts]
    assert [score.dialogue for score in scores] == [Dialogue(7, 7, 6, 1), Dialogue(1, 2, 1, 1), Dialogue(0, 1, 0, 1)]
    assert dialogue_rates(scores) == DialogueRates(
        wer=pytest.approx(3 / 8), recall=pytest.approx(7 / 8), hallucinated=pytest.approx(3 / 10),
        num_spoken=8, num_quoted=10, num_silent=1,
    )  # fmt: skip
    # Two clips: a and a (1 / 7), one of each (2 / 8), b and b (1 / 1).
    interval = bootstrap_intervals(scores[:2], measures=DIALOGUE_MEASURES)["dialogue_wer"]
    assert (interval.low, interval.high) == (pytest.approx(1 / 7), 1.0)
    assert dialogue_rates(scores[2:]) is None and dialogue_rates([]) is None
    # Both judges make their scores in one place; the events of speech are no synthetic ones.
    (score,) = RuleJudge().judge(tasks[2:])
    assert score.dialogue == Dialogue(0, 1, 0, 1)
    better = [Score("a", 0, 0, 0, 0, dialogue=Dialogue(7, 7, 7, 0)), *scores[1:]]
    difference = compare_sets(scores, better).differences["dialogue_wer"]
    assert (difference.difference, difference.wins) == (pytest.approx(-1 / 8), 1)
    assert "dialogue_wer" not in compare_sets(scores[2:], scores[2:]).differences


def test_score_and_compare_report_dialogue(call, serve, tmp_path):
    """By a fake language model; the rule judge reads no speech events."""

    def judge_all_missed(request, number):
        events, _ = request_contents(request)
        missed = [{"number": one + 1, "class": "missed", "quote": ""} for one in range(len(events))]
        counts = {"correct": 0, "incorrect": 0, "missed": len(events), "hallucinated": 0}
        return Answer(json.dumps({"events": missed, "hallucinated": [], "counts": counts}))

    write_records(
        tmp_path / "r.jsonl", [Reference("a.mp4", said("We leave at nine.")), Reference("b.mp4", said("Go!"))]
    )
    captions = {"first": ('A man says "we leave".', 'A sign reads "GO".'), "second": ('"We leave at 9", he says.', "")}
    server = serve(judge_all_missed)
    for name, texts in captions.items():
        records = [Caption(f"{video}.mp4", text) for video, text in zip("ab", texts, strict=True)]
        write_records(tmp_path / f"{name}.jsonl", records)
        code, out, err = call(
            "score", tmp_path / f"{name}.jsonl", "--references", tmp_path / "r.jsonl", "--judge", "openai",
            "--base-url", server.url, "--model", "scripted", "--out", tmp_path / f"{name}.scores.jsonl",
            "--summary", tmp_path / f"{name}.json", "--report", tmp_path / f"{name}.html",
        )  # fmt: skip
        assert code == 0, err
    note = "Dialogue: word error rate 60.0%, recall 40.0% of 5 spoken words."
    assert note in (tmp_path / "first.html").read_text()
    dialogue = read_json(tmp_path / "first.json")["dialogue"]
    assert dialogue["rates"] == {
        "wer": 3 / 5, "recall": 2 / 5, "hallucinated": 0.0, "num_spoken": 5, "num_quoted": 2, "num_silent": 0,
    }  # fmt: skip
    assert dialogue["intervals"]["dialogue_wer"] == {"low": 0.5, "high": 1.0}
    assert dialogue["intervals"]["dialogue_recall"] == {"low": 0.0, "high": 0.5}
    assert "Dialogue word error rate" in out and "20.00" in out and "50.0 to 100.0" not in out
    code, out, _ = call("compare", tmp_path / "first.scores.jsonl", tmp_path / "second.scores.jsonl")
    row = next(line for line in out.splitlines() if "Dialogue word error rate" in line)
    assert code == 0 and [cell.strip() for cell in row.split("│")[2:5]] == ["60.00", "20.00", "-40.00"]


def test_scores_without_dialogue_are_written_as_before(tmp_path):
    write_scores(tmp_path / "s.jsonl", make_judge_info(RuleJudge()), [Score("v", 1, 1, 0, 0)])
    assert "dialogue" not in (tmp_path / "s.jsonl").read_text()
    assert read_scores(tmp_path / "s.jsonl").scores == [Score("v", 1, 1, 0, 0)]
    scored = Score("v", 1, 1, 0, 0, dialogue=Dialogue(1, 2, 1, 1))
    write_scores(tmp_path / "s.jsonl", make_judge_info(RuleJudge()), [scored])
    assert read_scores(tmp_path / "s.jsonl").scores == [scored]


def test_speech_of_a_span():
    words = tuple(SpokenWord(text, start, start + 0.5) for start, text in enumerate(("one", "two", "three")))
    timed = SpeechEvent("one two three", 0.0, 2.5, words)
    plain, unknown = SpeechEvent("hello", 4.0, 5.0), SpeechEvent("somewhen")
    assert speech_within([timed, plain, unknown], None, None) == [timed, plain, unknown]
    (cut, _) = speech_within([timed, plain, unknown], 1.0, 2.1)
    assert cut == SpeechEvent("two", 1.0, 1.5, words[1:2])
    assert speech_within([plain], 4.5, 6.0) == [plain] and speech_within([plain], 0.0, 4.5) == []
    assert quote_words(SpeechEvent('I said "no"\nagain', speaker="Anna")) == "Anna says: \"I said 'no' again\""
