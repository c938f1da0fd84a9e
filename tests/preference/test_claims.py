"""Rewards by clause: credits and states by hand, and a fit that finds which clauses are right."""

from dataclasses import replace

import pytest
import torch

from salmonn.caption.processor import PromptRow
from salmonn.model.pooling import AnswerStates, pooled_width
from salmonn.preference.claims import attach_credits, clause_credits, pool_clauses, sum_clauses
from salmonn.preference.comparisons import AnswerGroup
from salmonn.preference.reward_model import head_width
from salmonn.preference.states import answer_states
from salmonn.records import Caption, Comparison, Event, Mention, Score
from salmonn.train.reward import RewardTrainingConfig
from salmonn.train.reward_heads import fit_claims

TEXT = "A red star blinks, and then a low tone is heard. A blue square leaves. A low tone is heard."
SCORE = Score(
    "a.mp4",
    num_events=4,
    missing=1,
    incorrect=1,
    hallucinated=2,
    mentions=(
        Mention(Event("e"), "a red star blinks"),
        Mention(Event("e"), "a low tone is heard"),
        Mention(Event("e"), "blue square leaves", is_correct=False),
        Mention(Event("e"), "words that are not there"),
    ),
    hallucinations=("a low tone is heard", "A red star"),
)


def test_credits_of_clauses_by_hand():
    """The second tone's quote is the second place; the star is right once and hallucinated once, so it is worth 0."""
    assert clause_credits(SCORE, TEXT) == (0.0, 1.0, 0.0, -1.0)
    assert clause_credits(SCORE, "") == ()
    group = AnswerGroup(Comparison("a.mp4", "p", TEXT, "x"), ((TEXT, True), ("x", True)), ((0, 1),), (0.5,))
    captions = [Caption("a.mp4", TEXT, "p"), Caption("a.mp4", "x", "p", sample=1)]
    (attached,) = attach_credits([group], captions, [SCORE, replace(SCORE, sample=1)])
    assert attached.credits == ((0.0, 1.0, 0.0, -1.0), (0.0,))


def test_states_of_clauses_by_hand(captioner):
    """Two layers of width 1: mean, last, maximum of the output, and the four figures; the end token is of no clause."""
    text = "Beeps, noise"
    num_tokens = len(captioner.processor.tokenizer.encode(text, add_special_tokens=False))
    tokens = torch.arange(4.0 * (num_tokens + 1)).reshape(-1, 4)
    states = pool_clauses(tokens, text, captioner.processor, width=1)
    starts = captioner.processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    num_first = sum(start < len("Beeps") for start, _ in starts["offset_mapping"])
    own = tokens[:num_first]
    figures = [own[:, 2].sum(), own[:, 2].min(), own[:, 3].mean(), own[:, 3].max()]
    expected = [1, *own[:, :2].mean(0), *own[-1, :2], own[:, 1].max(), *figures]
    assert states.shape == (2, 10) and states[0].tolist() == pytest.approx([float(value) for value in expected])
    assert states[1, 3:5].tolist() == tokens[num_tokens - 1, :2].tolist()
    assert pool_clauses(tokens, "", captioner.processor, width=1).shape == (0, 10)


def test_the_state_of_a_caption_is_the_sum_of_its_clauses(captioner, media):
    """Also for a caption without a clause, whose state is 0."""
    answers = [(TEXT, True), ("A low tone.", False), ("...", True)]
    rows = [PromptRow(0, "Tell.", text, finished=finished) for text, finished in answers]
    together = answer_states(captioner, rows, media, pooling="clauses")
    clauses = answer_states(captioner, rows, media, pooling="clauses", by_clause=True)
    assert clauses.answer.shape == (5, head_width(captioner, "clauses")) and clauses.prompt.shape[0] == 3
    assert torch.equal(sum_clauses(clauses, answers).answer, together.answer)
    assert together.answer[:, 0].tolist() == [4, 1, 0]
    assert pooled_width("clauses", width=8, num_layers=6) == 1 + 7 * 8 + 4


def test_a_fit_to_credits_finds_the_right_clauses():
    """Credits that are linear in the states are found, with the intercept as the weight of the number of clauses."""
    generator = torch.Generator().manual_seed(0)
    groups, states = [], []
    for _ in range(40):
        answer = torch.cat([torch.ones(6, 1), torch.randn(6, 3, generator=generator)], dim=1)
        values = (0.5 + 2 * answer[:, 1] - answer[:, 3]).tolist()
        group = AnswerGroup(Comparison("v", "p", "x", "y"), (("x", True), ("y", True)), ((0, 1),), (None,))
        groups.append(replace(group, credits=(tuple(values[:2]), tuple(values[2:]))))
        states.append(AnswerStates(answer[:1], answer))
    head = fit_claims(states, groups)
    assert head.score.weight[0].tolist() == pytest.approx([0.5, 2, 0, -1], abs=5e-3)
    with pytest.raises(ValueError, match="kind claims needs captions with a judge's scores"):
        fit_claims(states, [replace(groups[0], credits=())])


def test_claims_need_their_pooling():
    for options in ({"kind": "claims"}, {"pooling": "clauses"}):
        with pytest.raises(ValueError, match="kind claims and pooling clauses belong together"):
            RewardTrainingConfig(**options)
