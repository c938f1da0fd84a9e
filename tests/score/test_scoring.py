"""Selection of the reported pass, from hand-written passes."""

import pytest

from salmonn.records import Caption, Event, Mention, Reference, Score, Unscored
from salmonn.score.formats import read_scores, write_scores
from salmonn.score.judge import ScoringTask, empty_caption_tasks, make_score, match_references, restrict_to_caption
from salmonn.score.scoring import judge_passes, make_judge_info, score_set
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


SEEN, LEAVES = Event("a red circle appears", "visual", 0, 1), Event("the red circle disappears", "visual", 4, 5)
TONE, SPEECH = Event("a low tone is heard", "audio", 2, 3), Event('a voice says: "we leave at nine"', "speech", 3, 4)
REFERENCE = Reference("v", (SEEN, TONE, SPEECH, LEAVES))


@pytest.mark.parametrize(
    ("modality", "counts", "hallucinations", "missed"),
    [
        # events, missing, incorrect, hallucinated, excluded
        ("both", (4, 1, 1, 1, 0), ("A star",), (LEAVES.text,)),
        (None, (4, 1, 1, 1, 0), ("A star",), (LEAVES.text,)),
        ("visual", (2, 1, 0, 2, 2), ("A star", "a high tone"), (LEAVES.text,)),
        ("audio", (2, 0, 1, 1, 2), ("A star",), ()),
    ],
)
def test_events_that_the_model_was_not_given_do_not_count(modality, counts, hallucinations, missed):
    """A wrong tone is hallucinated by a model that hears nothing; the speech, rightly mentioned, is no event of it."""
    task = ScoringTask(
        REFERENCE, Caption("v", 'A red circle, a high tone, "we leave at nine". A star.', modality=modality)
    )
    mentions = [Mention(SEEN, "A red circle"), Mention(TONE, "a high tone", is_correct=False), Mention(SPEECH, "leave")]
    score = make_score(task, missed=[LEAVES], mentions=mentions, hallucinations=["A star"])
    fields = (score.num_events, score.missing, score.incorrect, score.hallucinated, score.num_excluded)
    assert fields == counts and (score.hallucinations, score.missed) == (hallucinations, missed)
    assert score.num_events == len(restrict_to_caption(REFERENCE, task.caption).events)
    assert [mention.event for mention in score.mentions] == [
        one for one in (SEEN, TONE, SPEECH) if modality in ("both", None) or one.is_audible == (modality == "audio")
    ]
    assert (score.dialogue is None) == (modality == "visual")


def test_captions_of_a_part_and_missing_captions_have_a_modality_too(tmp_path):
    """Sounds that no caption of a set could mention are not missing where a video has no caption either."""
    judge = RuleJudge()
    reference = Reference("v", (SEEN, TONE, LEAVES))
    references = {"v": reference, "w": Reference("w", (SEEN, TONE))}
    deaf = [Caption("v", "A red circle appears.", modality="visual")]
    scored = score_set(references, deaf, judge)
    assert [(one.num_events, one.missing, one.num_excluded) for one in scored.scores] == [(2, 1, 1), (1, 1, 1)]
    for others in ([Caption("v", "A red circle appears.", modality="both")], [Caption("v", "A red circle appears.")]):
        scored = score_set(references, others, judge)
        assert [(one.num_events, one.missing, one.num_excluded) for one in scored.scores] == [(3, 2, 0), (2, 2, 0)]
    late = Caption("v", "", start_seconds=1.5, modality="visual")
    (task,) = match_references(references, [late], judge)
    assert task.reference.events == (TONE, LEAVES) and restrict_to_caption(reference, late).events == (LEAVES,)
    (task,) = empty_caption_tasks(references, [*deaf, late], judge)
    assert task.caption == Caption("w", "", modality="visual")

    write_scores(
        tmp_path / "s.jsonl", make_judge_info(judge), [*score_set(references, deaf, judge).scores, *scored.scores]
    )
    lines = (tmp_path / "s.jsonl").read_text().splitlines()[1:]
    assert ["num_excluded" in line for line in lines] == [True, True, False, False]  # absent as in files of before
    assert [one.num_excluded for one in read_scores(tmp_path / "s.jsonl").scores] == [1, 1, 0, 0]
