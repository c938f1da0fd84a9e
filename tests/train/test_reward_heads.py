"""Named objectives: their values by hand, the ridge, the correction for length, and weights that follow the request."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from salmonn.model.pooling import AnswerStates
from salmonn.preference.comparisons import AnswerGroup
from salmonn.preference.heads import GatingNetwork, ObjectiveHead
from salmonn.preference.objectives import (
    OBJECTIVES,
    attach_objectives,
    find_max_words,
    judge_objectives,
    judged_objectives,
    objectives_of,
)
from salmonn.records import Caption, Comparison, Event, Mention, Reference, Score, Unscored
from salmonn.synthetic.judge import RuleJudge
from salmonn.train import reward_heads
from salmonn.train.reward_heads import LENGTH, ObjectiveConfig, correct_for_length, fit_objective_head, fit_ridge

RED, BLUE = Event("a red circle appears", "visual", 0, 1), Event("a blue star appears", "visual", 2, 3)
GREEN, TONE = Event("a green star leaves", "visual", 4, 5), Event("a low tone", "audio", 0, 1)
REFERENCE = Reference("a.mp4", (RED, TONE, BLUE, GREEN))


def test_objectives_by_hand():
    """Told: blue, red (both right, in the wrong order), green (wrong); no tone; one hallucination among 4 claims.

    Pairs of mentions in time: blue-red is reversed, blue-green and red-green are not.
    """
    mentions = (Mention(BLUE), Mention(RED), Mention(GREEN, is_correct=False))
    score = Score("a.mp4", 4, 1, 1, 1, num_words=30, num_repeated_words=6, missed=(TONE.text,), mentions=mentions)
    values = dict(zip(OBJECTIVES, objectives_of(score, REFERENCE), strict=True))
    expected = {"seen": 2 / 3, "heard": 0, "correct": 2 / 3, "faithful": 3 / 4, "ordered": 2 / 3, "unrepeated": 0.8}
    assert values == pytest.approx(expected | {"length": 0.5})
    silent = objectives_of(Score("a.mp4", 1, 1, 0, 0, num_words=90), Reference("a.mp4", (RED,)))
    assert silent == (0, None, 1, 1, None, 1, 1)  # no sound to hear, nothing in order


def test_long_captions_differ_in_length():
    """The 95th percentile of 100, 110, ..., 300 words is 290; that of the toy's short captions does not count."""
    long = [Score("a.mp4", 1, 1, 0, 0, sample=number, num_words=100 + 10 * number) for number in range(21)]
    assert find_max_words(long) == 290 and find_max_words(long[:1]) == 100
    assert find_max_words([replace(score, num_words=score.num_words // 10) for score in long]) == 60
    assert find_max_words([]) == 60
    captions = [Caption("a.mp4", f"text {score.sample}", sample=score.sample) for score in long]
    rows = judged_objectives(captions, long, {"a.mp4": REFERENCE})
    lengths = [dict(zip(OBJECTIVES, row, strict=True))["length"] for _, row in rows]
    assert lengths == pytest.approx([min((100 + 10 * number) / 290, 1) for number in range(21)])


def test_each_answer_gets_its_objectives():
    group = AnswerGroup(Comparison("a.mp4", "p", "", ""), (("x", True), ("y", True)), ((0, 1),), (0.5,))
    captions = [Caption("a.mp4", "y", "p", sample=0), Caption("a.mp4", "x", "p", sample=1)]
    scores = [Score("a.mp4", 4, 4, 0, 0, sample=0), Score("a.mp4", 4, 3, 0, 0, sample=1, mentions=(Mention(TONE),))]
    (attached,) = attach_objectives([group], captions, scores, {"a.mp4": REFERENCE})
    assert [row[1] for row in attached.objectives] == [1, 0]
    with pytest.raises(ValueError, match=r"1 judged videos have no reference, first a\.mp4"):
        attach_objectives([group], captions, scores, {})


def test_votes_are_judged_for_their_objectives():
    """Of two prompts about one clip; a clip without a reference has none, nor one with an answer without a score."""
    texts = {"right": "A red circle appears.", "wrong": "A green star blinks.", "empty": "unscored"}

    def group(video, *names, prompt="p"):
        return AnswerGroup(
            Comparison(video, prompt, "", ""), tuple((texts[one], True) for one in names), ((0, 1),), (None,)
        )

    class Judge(RuleJudge):
        def judge(self, tasks, **options):
            scored = zip(tasks, super().judge(tasks, **options), strict=True)
            return [Unscored("a.mp4", "?") if task.caption.text == "unscored" else score for task, score in scored]

    reference = Reference("b.mp4", (Event("a red circle appears", "visual", 0, 1),))
    groups = [
        group("a.mp4", "right", "wrong"),
        group("x.mp4", "right", "wrong"),
        group("a.mp4", "wrong", "right", prompt="q"),
        group("a.mp4", "right", "empty"),
    ]
    first, unknown, second, partly = judge_objectives(groups, Judge(), {"a.mp4": reference})
    right, wrong = first.objectives
    assert second.objectives == (wrong, right) and unknown.objectives == partly.objectives == ()
    assert dict(zip(OBJECTIVES, right, strict=True)) == {
        "seen": 1, "heard": None, "correct": 1, "faithful": 1, "ordered": None, "unrepeated": 1, "length": 4 / 60,
    }  # fmt: skip
    assert wrong[:4] == (0, None, 1, 0)


def test_the_ridge_has_an_intercept_and_leaves_out_unknown_values():
    torch.manual_seed(0)
    states = torch.randn(200, 3, dtype=torch.float64)
    values = torch.stack([2 * states[:, 0] + 0.5, -states[:, 1]], dim=1)
    values[50:100, 1] = float("nan")
    validation = torch.arange(200) % 5 == 0
    weight, bias = fit_ridge(states, values, validation=validation)
    assert weight.flatten().tolist() == pytest.approx([2, 0, 0, 0, -1, 0], abs=0.01)
    assert bias.tolist() == pytest.approx([0.5, 0], abs=0.01)
    known = ~values[:, 1].isnan()
    alone, _ = fit_ridge(states[known], values[known, 1:], validation=validation[known])
    assert alone[0].tolist() == pytest.approx(weight[1].tolist(), abs=0.01)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)], ids=["wide", "tall"])
def test_the_ridge_minimizes_its_objective(shape):
    """The gradient of |X w + b - y|^2 + alpha |w|^2 is 0, whichever of the two systems of equations is solved."""
    torch.manual_seed(0)
    states, values = torch.randn(shape, dtype=torch.float64), torch.randn(shape[0], dtype=torch.float64)
    weight, bias = fit_ridge(states, values.unsqueeze(1), validation=torch.zeros(shape[0], dtype=torch.bool))
    std, mean = torch.std_mean(states, dim=0)  # the strength is that for columns of deviation 1
    standardized, scaled = (states - mean) / std, weight[0] * std
    error = states @ weight[0] + bias - values
    assert torch.allclose(
        standardized.T @ error + reward_heads.ALPHAS[-1] * scaled, torch.zeros(shape[1], dtype=torch.float64)
    )
    assert error.mean().abs() < 1e-9 and scaled.abs().max() > 1e-4


def test_weights_are_normalized_over_the_objectives():
    """Logits (log 2, 0, 0) and (0, log 8, 0): two requests, (2, k), over which ArmoRM's code would normalize."""
    gate = GatingNetwork((2, 3))
    assert gate(torch.randn(2, 2)).flatten().tolist() == pytest.approx([1 / 3] * 6)
    with torch.no_grad():
        gate.weight[0, 0], gate.weight[1, 1] = math.log(2), math.log(8)
    weights = gate(torch.eye(2))
    assert weights.flatten().tolist() == pytest.approx([1 / 2, 1 / 4, 1 / 4, 1 / 10, 8 / 10, 1 / 10])
    constant = GatingNetwork((3,))
    with torch.no_grad():
        constant.bias[2] = math.log(2)
    assert constant(torch.randn(2, 2)).flatten().tolist() == pytest.approx([1 / 4, 1 / 4, 1 / 2] * 2)


def test_the_correction_changes_the_reward():
    head = ObjectiveHead(1, (2,))
    with torch.no_grad():
        head.regression_layer.weight.copy_(torch.tensor([[1.0], [2.0]]))
        head.regression_layer.bias.zero_()
    states = AnswerStates(torch.zeros(1, 1), torch.tensor([[1.0]]), torch.zeros(1, 1))
    assert head(states).item() == pytest.approx(0.5 * 1 + 0.5 * 2)
    head.reward_transform_matrix[1, 0] = -0.25  # a quarter of the second is taken from the first
    assert head(states).item() == pytest.approx(0.5 * (1 - 0.25 * 2) + 0.5 * 2)


def test_the_correction_for_length():
    """A predicted objective that follows length, although the true one does not, is corrected; a true one is not."""
    torch.manual_seed(0)
    length = torch.rand(4000, dtype=torch.float64)
    count = len(OBJECTIVES)
    labels = torch.rand(4000, count, dtype=torch.float64)
    labels[:, LENGTH], labels[:, 1] = length, 0.5 * length + 0.1 * labels[:, 1]
    predicted = labels.clone()
    predicted[:, 0] = labels[:, 0] + 0.6 * length
    gold = correct_for_length(predicted, labels, debias="gold")
    assert gold[LENGTH, 0].item() == pytest.approx(-0.6, abs=0.11) and gold[LENGTH, 1] == 0
    assert torch.equal(gold.diag(), torch.ones(count, dtype=torch.float64))
    assert correct_for_length(predicted, labels, debias="published")[LENGTH, 1] < -0.4  # what was earned, too
    assert torch.equal(correct_for_length(predicted, labels, debias="none"), torch.eye(count, dtype=torch.float64))


def make_group(number, values, pairs):
    """Return the states and comparisons of a clip whose answers' states are their objectives."""
    answers = tuple((str(answer), True) for answer in range(len(values)))
    return AnswerGroup(
        Comparison(f"{number}", "p", "", ""),
        answers,
        tuple(pairs),
        (None,) * len(pairs),
        objectives=tuple(tuple(row) for row in values.tolist()),
    )


def test_the_weights_follow_the_request():
    """One request asks for more of the first objective, the other for more of the second, which is 1 minus the first.

    Any fixed weights are therefore wrong in one half of the comparisons. The prompts' states show the clip alone.
    """
    generator = torch.Generator().manual_seed(1)
    states, groups = [], []
    for number in range(60):
        values = torch.rand(6, len(OBJECTIVES), generator=generator)
        values[:, 1] = 1 - values[:, 0]
        request = torch.eye(2)[number % 2]
        prompt = torch.randn(2, generator=generator)
        states.append(AnswerStates(prompt.expand(6, 2), values, request.expand(6, 2)))
        order = values[:, number % 2].argsort(descending=True).tolist()
        groups.append(make_group(number, values, list(pairwise(order))))
    rights = []
    for gate in (True, False):
        head = fit_objective_head(states, groups, ObjectiveConfig(gate=gate, debias="none"))
        margins = [
            float(rewards[better] - rewards[worse])
            for rewards, group in zip(map(head, states), groups, strict=True)
            for better, worse in group.pairs
        ]
        rights.append(sum(margin > 0 for margin in margins) / len(margins))
        weights = head.weights(AnswerStates(torch.zeros(2, 2), torch.zeros(2, len(OBJECTIVES)), torch.eye(2)))
        assert weights.sum(1).tolist() == pytest.approx([1, 1])
        assert torch.equal(weights[0], weights[1]) != gate
        if gate:
            assert weights[0, 0] > 0.8 and weights[1, 1] > 0.8
    assert rights[0] == 1 and 0.4 < rights[1] < 0.6
    with pytest.raises(ValueError, match="pass --references"):
        fit_objective_head(states, [replace(group, objectives=()) for group in groups], ObjectiveConfig())


def test_comparisons_are_not_learned_by_heart(monkeypatch):
    """Each request is another, and comparisons are chance: the penalty, chosen by other clips, makes weights equal."""
    generator = torch.Generator().manual_seed(2)
    states, groups = [], []
    for number in range(60):
        values = torch.rand(2, len(OBJECTIVES), generator=generator)
        request = torch.randn(80, generator=generator)
        states.append(AnswerStates(request.expand(2, 80), values, request.expand(2, 80)))
        groups.append(make_group(number, values, [(0, 1)]))

    def spread():
        head = fit_objective_head(states, groups, ObjectiveConfig(debias="none"))
        weights = torch.cat([head.weights(one)[:1] for one in states])
        return float(weights.std(0).max())

    assert spread() < 0.02
    monkeypatch.setattr(reward_heads, "GATE_STRENGTHS", (1e-6,))
    assert spread() > 0.1


def test_a_single_request_has_constant_weights():
    """Its state is the same for all clips up to rounding, which must not be scaled up."""
    generator = torch.Generator().manual_seed(3)
    request, states, groups = torch.randn(80, generator=generator), [], []
    for number in range(30):
        values = torch.rand(4, len(OBJECTIVES), generator=generator)
        rounded = request * (1 + 1e-7 * torch.randn(80, generator=generator))
        states.append(AnswerStates(rounded.expand(4, 80), values, rounded.expand(4, 80)))
        groups.append(make_group(number, values, list(pairwise(values[:, 2].argsort(descending=True).tolist()))))
    head = fit_objective_head(states, groups, ObjectiveConfig(debias="none"))
    other = AnswerStates(states[0].prompt, states[0].answer, 2 * request.flip(0).expand(4, 80))
    assert head.weights(states[0])[0, 2] > 0.9
    assert torch.allclose(head.weights(other), head.weights(states[0]), atol=1e-3)
