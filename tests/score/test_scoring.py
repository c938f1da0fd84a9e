"""Selection of the reported pass, from hand-written passes."""

import pytest

from salmonn.records import Caption, Reference, Score, Unscored
from salmonn.score.judge import ScoringTask
from salmonn.score.scoring import judge_passes
from salmonn.synthetic.judge import RuleJudge

TASKS = [ScoringTask(Reference(name), Caption(name, "")) for name in "ab"]


class ScriptedJudge:
    """A judge that misses the given number of each caption's 4 events, pass by pass; None: unscored."""

    name, prompt_hash, is_deterministic = "scripted", "0", False

    def __init__(self, *passes):
        self.passes = list(passes)

    def check(self, reference):
        pass

    def judge(self, tasks, *, seed=0, progress=None):
        missed = self.passes.pop(0)
        return [
            Unscored(task.reference.video, "no") if count is None else Score(task.reference.video, 4, count, 0, 0)
            for task, count in zip(tasks, missed, strict=True)
        ]


def judge(*passes):
    scored = judge_passes(TASKS, ScriptedJudge(*passes), passes=len(passes), seed=7)
    return scored.results, scored.judge_info


def test_reports_the_median_pass():
    results, info = judge((4, 4), (0, 0), (2, 2), (1, 1))
    # 1, 0, 0.5, 0.25: of four the lower middle one
    assert (info.totals, info.reported_pass, info.seeds) == ((1.0, 0.0, 0.5, 0.25), 3, (7, 107, 207, 307))
    assert [result.missing for result in results] == [1, 1]


def test_totals_are_over_captions_that_all_passes_scored():
    # over both captions pass 2 would have 0 of 4, and be the lowest
    _, info = judge((0, 4), (0, None), (1, 4))
    assert info.totals == (0.0, 0.0, 0.25) and info.reported_pass == 1


def test_a_pass_without_scores_is_never_reported():
    _, info = judge((None, None), (4, 4), (2, 2))
    assert info.totals == (None, 1.0, 0.5) and info.reported_pass == 2
    results, info = judge((None, None))
    assert all(isinstance(result, Unscored) for result in results) and info.reported_pass == 0


@pytest.mark.parametrize(("judge", "passes", "message"), [(RuleJudge(), 2, "omit"), (ScriptedJudge(), 0, "at least 1")])
def test_rejects_invalid_numbers_of_passes(judge, passes, message):
    with pytest.raises(ValueError, match=message):
        judge_passes(TASKS, judge, passes=passes)
