"""The published scorer's rules, with hand-written replies and files."""

import json

import pytest

from salmonn.preference.reward import make_judge
from salmonn.records import Caption, Event, Reference, Score, Unscored
from salmonn.score.config import JudgeConfig
from salmonn.score.judge import ScoringTask
from salmonn.score.llm_judge import InvalidReplyError
from salmonn.score.published import CountPrompt, ListPrompt, collapse_repeats, collapse_task, published_rates
from salmonn.score.scoring import judge_passes
from tests.score.fake_llm_server import Answer

TASK = ScoringTask(
    Reference("v", (Event("a dog runs"), Event("it's raining"), Event("a man sings"))), Caption("v", "Text.")
)


def error_counts(score: Score) -> tuple[int, int, int]:
    return score.missing, score.incorrect, score.hallucinated


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # as requested
        (
            '{"Missed": 1, "Incorrect": 0, "Hallucination": 2, "Missed Event": ["a dog runs"], "Incorrect Event": [], '
            '"Hallucination Event": ["x", "y"]}',
            (1, 0, 2),
        ),
        # with prose around it, over several lines, as Python writes lists
        (
            'Sure!\n```python\n{"Missed": 1,\n "Incorrect": 1,\n "Hallucination": 0,\n "Missed Event": '
            '[\'a dog runs\'],\n "Incorrect Event": ["it\'s raining"],\n "Hallucination Event": []}\n```',
            (1, 1, 0),
        ),
        # counts are used as stated, whatever the lists and the number of events
        (
            '{"Missed": 7, "Incorrect": 0, "Hallucination": 0, "Missed Event": [], "Incorrect Event": [], '
            '"Hallucination Event": []}',
            (7, 0, 0),
        ),
    ],
)
def test_parses_lists_as_the_published_scorer(text, expected):
    assert error_counts(ListPrompt().parse(text, TASK)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "I see no errors.",
        '{"Missed": one, "Incorrect": 0, "Hallucination": 0, "Missed Event": [], "Incorrect Event": [], '
        '"Hallucination Event": []}',
        # a list that is not a literal is never evaluated
        '{"Missed": 1, "Incorrect": 0, "Hallucination": 0, "Missed Event": [open("/etc/passwd").read()], '
        '"Incorrect Event": [], "Hallucination Event": []}',
        # keys in another order
        '{"Incorrect": 0, "Missed": 1, "Hallucination": 0, "Missed Event": [], "Incorrect Event": []}',
        # a brace in the last list ends it too early
        '{"Missed": 0, "Incorrect": 0, "Hallucination": 1, "Missed Event": [], "Incorrect Event": [], '
        '"Hallucination Event": ["a } brace"]}',
    ],
)
def test_rejects_unparsable_lists(text):
    with pytest.raises(InvalidReplyError):
        ListPrompt().parse(text, TASK)


def test_counts_must_add_up():
    text = '{"Missed": 1, "Correct": %d, "Incorrect": 0, "Hallucination": 4}'
    assert error_counts(CountPrompt().parse(text % 2, TASK)) == (1, 0, 4)
    with pytest.raises(InvalidReplyError, match=r"1 \+ 1 \+ 0 events do not add up to 3"):
        CountPrompt().parse(text % 1, TASK)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so so so so so on", "so on"),  # "so " five times
        ("so so so so on", "so so so so on"),  # four times
        ("aaaaa b", "a b"),
        ("A dog runs. " * 5 + "The end.", "A dog runs. The end."),
        ("A dog runs. " * 4 + "The end.", "A dog runs. " * 4 + "The end."),
        # phrases of 50 characters or more need four
        (("x" + "0123456789" * 4 + "abcdefghi.") * 4, "x" + "0123456789" * 4 + "abcdefghi."),
        (("x" + "0123456789" * 4 + "abcdefghi.") * 3, ("x" + "0123456789" * 4 + "abcdefghi.") * 3),
        ("line\n" * 6, "line\n" * 6),  # no phrase spans lines
    ],
)
def test_collapse(text, expected):
    assert collapse_repeats(text) == expected


def test_collapses_only_truncated_captions():
    text = "so so so so so on"
    for finished, expected in ((True, text), (False, "so on")):
        task = ScoringTask(TASK.reference, Caption("v", text, finished=finished))
        assert collapse_task(task).caption.text == expected


def test_rates_with_and_without_unscored_videos():
    scores = [Score("a", 4, 1, 1, 0), Score("b", 3, 0, 1, 2)]
    rates = published_rates(scores)
    # 1 missed, 2 incorrect, 2 hallucinated of 7 events
    assert (rates.missing, rates.incorrect, rates.hallucination, rates.total) == (1 / 7, 2 / 7, 2 / 7, 5 / 7)
    assert rates.num_videos == 2
    all_videos = published_rates(scores, [TASK.reference])  # 3 more events, all missed
    assert (all_videos.missing, all_videos.total, all_videos.num_videos) == (4 / 10, 8 / 10, 3)
    with pytest.raises(ValueError, match="no video"):
        published_rates([])


def reply(missed: int) -> str:
    lists = ', "Missed Event": [], "Incorrect Event": [], "Hallucination Event": []}'
    return f'{{"Missed": {missed}, "Incorrect": 0, "Hallucination": 0' + lists


def config(server, tmp_path) -> JudgeConfig:
    return JudgeConfig(kind="openai", model="m", base_url=server.url, cache=tmp_path / "replies.sqlite", concurrency=1)


def test_an_empty_prediction_is_judged_like_any_other(serve, tmp_path):
    server = serve(lambda request, number: Answer(reply(2)))
    empty = ScoringTask(TASK.reference, Caption("v", ""))
    assert make_judge(config(server, tmp_path), published=True).judge([empty])[0].missing == 2
    assert len(server.requests) == 1


def test_requests_lists_nine_times_then_counts(serve, tmp_path):
    """Invalid replies are requested 1 + 8 times with lists, 3 times without, with a different seed each."""
    server = serve(lambda request, number: Answer("no"))
    (result,) = make_judge(config(server, tmp_path), published=True).judge([TASK], seed=5)
    assert isinstance(result, Unscored) and "12 attempts" in result.reason
    assert [request["seed"] for request in server.requests] == list(range(5, 17))
    has_lists = ["Missed Event" in request["messages"][0]["content"] for request in server.requests]
    assert has_lists == [True] * 9 + [False] * 3


def test_a_later_pass_keeps_scores_that_it_cannot_parse(serve, tmp_path):
    """Pass 1: w invalid once, then 1; pass 2: v 3, w is invalid and keeps 1; pass 3: v 2, w 0."""
    replies = {"v": ["0", "3", "2"], "w": ["no", "1", "no", "0"]}

    def script_reply(request, number):
        caption = request["messages"][1]["content"].rsplit("Description:\n", 1)[1].strip()
        reply_text = replies[json.loads(caption)].pop(0)
        return Answer(reply(int(reply_text)) if reply_text.isdigit() else reply_text)

    tasks = [ScoringTask(TASK.reference, Caption("v", "v")), ScoringTask(TASK.reference, Caption("w", "w"))]
    judge, single_attempt = (
        make_judge(config(serve(script_reply), tmp_path), published=True),
        make_judge(config(serve(script_reply), tmp_path), published=True),
    )
    single_attempt.templates = single_attempt.templates[:1]
    scored = judge_passes(tasks, judge, protocol="published", passes=3, seed=2024, rejudge=single_attempt)
    # (0 + 1) / 6, (3 + 1) / 6, (2 + 0) / 6: the median is the third
    assert scored.judge_info.totals == (1 / 6, 4 / 6, 2 / 6) and scored.judge_info.reported_pass == 2
    assert [result.missing for result in scored.results] == [2, 0]
    assert scored.judge_info.seeds == (2024, 2124, 2224) and replies == {"v": [], "w": []}
