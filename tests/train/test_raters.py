"""Rater groups from grouped comparisons: votes, held-out agreement by rater, and the folder of an ideal-point model."""

import re
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from salmonn.files import write_records
from salmonn.model.pooling import AnswerStates
from salmonn.preference.agreement import OrderedVotes
from salmonn.preference.comparisons import AnswerGroup
from salmonn.preference.ideal_point import Encoded, IdealPointConfig, IdealPointHead, RaterModel, Votes
from salmonn.preference.mixture import (
    MixtureHead,
    PrototypeInfo,
    Rater,
    RaterGroup,
    WorstHead,
    choose_weights,
    group_raters,
)
from salmonn.records import Comparison
from salmonn.train.raters import (
    collect_votes,
    fit_rater_groups,
    measure_groups,
    measure_raters,
    print_groups,
    train_raters,
)
from salmonn.train.reward import RewardTrainer, RewardTrainingConfig

SMALL = IdealPointConfig(hidden=8, dropout=0.0, epochs=15, learning_rate=2e-2, batch_size=32)
INFO = PrototypeInfo("score", 32, 64, 128, sizes=(0.6, 0.4), entropy=0.5)


def group(video, texts, pairs, raters):
    answers = tuple((text, True) for text in texts)
    return AnswerGroup(Comparison(video, "Tell.", "", ""), answers, pairs, (None,) * len(pairs), raters)


def test_votes_of_groups():
    """Rows of groups follow each other; two groups of one video are one clip."""
    groups = [
        group("a.mp4", "xyz", ((2, 0), (0, 1)), ("ann", "bob")),
        group("b.mp4", "xy", ((1, 0),), ("bob",)),
        group("a.mp4", "xy", ((0, 1),), ("",)),
    ]
    votes = collect_votes(groups, {"ann": 0, "bob": 1, "": 2})
    assert [votes.better.tolist(), votes.worse.tolist()] == [[2, 0, 4, 5], [0, 1, 3, 6]]
    assert [votes.rater.tolist(), votes.clip.tolist()] == [[0, 1, 1, 2], [0, 0, 1, 0]]


def test_two_groups_of_raters_are_told_apart():
    """One prefers captions with more words, as their states say, the other those with fewer; 5 clips are held out."""
    texts = ("one", "one two three", "one two three four five six")
    groups = [group(f"{index}.mp4", texts, ((2, 0), (0, 1), (1, 2)), ("long", "short", "short")) for index in range(25)]
    states = [AnswerStates(torch.zeros(3, 2), torch.tensor([[1.0, 0.0], [3.0, 0.0], [6.0, 0.0]]))] * 25
    heldout = measure_raters(states, groups, num_train=20, num_prototypes=None, config=SMALL, seed=1)
    fitted = fit_rater_groups(states, groups, heldout, num_train=20, config=SMALL, seed=1)
    assert len(fitted.info.sizes) == 2 and sum(fitted.info.sizes) == pytest.approx(1)
    # More than one prototype is needed: with one, the raters' mean decides each of the 75 votes of two opinions.
    accuracy = {one.num_prototypes: one.accuracy for one in fitted.info.candidates}
    assert accuracy[1] == pytest.approx(0.5) and accuracy[2] == pytest.approx(1)
    assert [(one.rater, one.num_votes, one.num_heldout, one.agreement) for one in fitted.raters] == [
        ("long", 25, 5, 1.0), ("short", 50, 10, 1.0),
    ]  # fmt: skip
    assert all(sum(one.weights) == pytest.approx(1, abs=1e-5) for one in fitted.raters)
    assert (heldout.margins > 0).all() and len(heldout.margins) == 15
    # Each group's votes are all ordered right by its own reward, and all wrong by the other's. The prototypes that were
    # measured may have another order than those that are saved: exchanged, they give the same.
    own = [max((0, 1), key=one.weights.__getitem__) for one in fitted.raters]
    for number, num_votes in zip(own, (5, 10), strict=True):
        right, wrong = fitted.info.agreement[number][number], fitted.info.agreement[1 - number][number]
        assert (right.num_votes, right.accuracy, wrong.num_votes, wrong.accuracy) == (num_votes, 1, num_votes, 0)
        assert right.low == pytest.approx(5 / (5 + 1.96**2), abs=1e-4)  # all right: one vote for each of five clips
    rows = tuple(row[::-1] for row in heldout.agreement[::-1])
    exchanged = replace(heldout, model=exchange(heldout.model), agreement=rows)
    again = fit_rater_groups(states, groups, exchanged, num_train=20, config=SMALL, seed=1)
    assert again.info.agreement == fitted.info.agreement
    described = sorted(text.split(",")[0] for text in fitted.info.descriptions)
    assert described[0].startswith("words +") and described[1].startswith("words -")
    # The head of a rater, as it is saved and loaded.
    head = MixtureHead(fitted.model.head, torch.tensor(fitted.raters[1].weights))
    rewards = head.double()(states[0])
    assert rewards.dtype == torch.float64 and rewards.argmax() == 0


def exchange(model):
    """Return a model with two prototypes in the other order."""
    head = deepcopy(model.head)
    for parameter in head.project[-1].parameters():
        parameter.data = parameter.data.flip(0)
    return RaterModel(head, model.weights.flip(1))


def test_agreement_of_groups_by_hand(capsys):
    """Two prototypes and three raters, of whom the last has no vote that the model was fitted to.

    The captions' rewards are (3, 0), (2, 1) and (0, 2) for the prototypes. Ann's votes, of the first group, are ordered
    right twice and wrong once by the first reward, and the other way round by the second; Bob's by the second only.
    """
    head = IdealPointHead(2, 1, num_prototypes=2, config=SMALL)
    model = RaterModel(head, torch.tensor([[0.8, 0.2], [0.3, 0.7], [0.9, 0.1]]))
    encoded = Encoded(torch.tensor([[3.0, 0.0], [2.0, 1.0], [0.0, 2.0]]))
    votes = Votes(*torch.tensor([[0, 1, 0, 0], [1, 2, 0, 1], [2, 0, 0, 2], [2, 0, 1, 0], [0, 2, 2, 3]]).T)
    first, second = measure_groups(model, encoded, votes, known=torch.tensor([0, 1]))
    assert [(one.num_votes, one.accuracy) for one in first] == [(3, pytest.approx(2 / 3)), (1, 0.0)]
    assert [(one.num_votes, one.accuracy) for one in second] == [(3, pytest.approx(1 / 3)), (1, 1.0)]
    # The variance over clips is 3 / 2 * (1/9 + 1/9 + 4/9) / 9 = 1/9, as that of 2 votes with a share of 2/3.
    assert (first[0].low, first[0].high) == pytest.approx((0.1594, 0.9548), abs=1e-4)
    # Carl is placed if there is one group only, and a group without votes has no share.
    one = RaterModel(IdealPointHead(2, 1, num_prototypes=1, config=SMALL), torch.ones(3, 1))
    ((only,),) = measure_groups(one, Encoded(encoded.points[:, :1]), votes, known=torch.tensor([0, 1]))
    assert (only.num_votes, only.accuracy) == (5, pytest.approx(3 / 5))
    empty = measure_groups(model, encoded, votes, known=torch.tensor([1]))[0][0]
    assert empty == OrderedVotes(0, None, 0.0, 1.0)

    def printed(agreement):
        print_groups(replace(INFO, descriptions=("words +0.90", "words -0.70")[: len(agreement)], agreement=agreement))
        return " ".join(re.sub(r"[^\w%.()+:-]", " ", capsys.readouterr().out).split())

    assert printed(()) == ""
    text = printed(((first[0], empty), second))
    assert "reward group 1 (3 votes) group 2 (0 votes)" in text and "1: words +0.90 66.7 % (" in text
    assert "2: words -0.70 33.3 % (" in text and ") 100.0 % (" in text
    assert printed(((only,),)).startswith("The raters are one group whose reward orders 60.0 % (")


def test_prototypes_are_named_by_objectives():
    """One rater prefers what is seen, the other what is not; unknown values say nothing, nor does a clip without any.

    `ordered` is unknown for one answer, and the mean of the others for the fit; `correct` falls as `seen` rises.
    """
    texts = ("one two three", "one", "one two")
    known = ((0.0, 0.0), (0.4, None), (1.0, 1.0))
    rows = tuple((seen, None, 1 - seen / 2, 1.0, ordered, 1.0, 0.05) for seen, ordered in known)
    votes = ((2, 0), (1, 0), (2, 1), (0, 2), (0, 1), (1, 2))
    groups = [
        replace(group(f"{index}.mp4", texts, votes, ("ann",) * 3 + ("bob",) * 3), objectives=rows if index else ())
        for index in range(20)
    ]
    states = [AnswerStates(torch.zeros(3, 2), torch.tensor([[0.0, 0.0], [2.0, 0.0], [5.0, 0.0]]))] * 20
    heldout = measure_raters(states, groups, num_train=16, num_prototypes=2, config=SMALL, seed=1)
    found = fit_rater_groups(states, groups, heldout, num_train=16, config=SMALL, seed=1).info.descriptions
    named = [dict(part.rsplit(" ", 1) for part in text.split(", ")) for text in found]
    assert all(set(one) == {"seen", "correct", "ordered"} for one in named)
    signs = {(float(one["seen"]) > 0, float(one["correct"]) > 0) for one in named}
    assert signs == {(True, False), (False, True)}


def test_one_rater_has_one_prototype():
    """Without cross-validation, which could choose more by chance: 5 clips are too few to tell."""
    groups = [group(f"{index}.mp4", "xy", ((0, 1),), ("ann",)) for index in range(5)]
    states = [AnswerStates(torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [3.0, 0.0]]))] * 5
    heldout = measure_raters(states, groups, num_train=4, num_prototypes=None, config=SMALL, seed=1)
    assert heldout.num_prototypes == 1 and not heldout.candidates


def test_the_saved_model_is_fitted_to_all_clips():
    """A rater who only voted on held-out clips is unknown when these are predicted, and known to the saved model.

    Ann prefers the longer caption, Bob the shorter; Cy, who votes like Bob, has voted on held-out clips alone. With the
    mean of Ann's and Bob's weights, his votes are predicted by chance at best.
    """
    texts = ("one", "one two three four")
    groups = [group(f"{index}.mp4", texts, ((1, 0), (0, 1)), ("ann", "bob")) for index in range(20)]
    groups += [group(f"{index}.mp4", texts, ((0, 1),), ("cy",)) for index in range(20, 30)]
    states = [AnswerStates(torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [4.0, 0.0]]))] * 30
    heldout = measure_raters(states, groups, num_train=20, num_prototypes=2, config=SMALL, seed=1)
    fitted = fit_rater_groups(states, groups, heldout, num_train=20, config=SMALL, seed=1)
    ann, bob, cy = fitted.raters
    assert (cy.num_votes, cy.num_heldout) == (10, 10) and bob.num_heldout == 0
    preferred = [max((0, 1), key=one.weights.__getitem__) for one in (ann, bob, cy)]
    assert preferred[0] != preferred[1] == preferred[2] and max(cy.weights) > 0.8
    assert cy.agreement == float((heldout.margins > 0).float().mean())
    assert heldout.margins.abs().max() < 0.5  # the mean of two opposite raters
    assert len(fitted.rewards) == 60


@pytest.mark.parametrize(
    ("raters", "told"),
    [
        (("", ""), "no comparison has the id of a rater, so all count as those of one rater: there are no groups"),
        (("ann", "ann"), "all comparisons count as those of one rater: there are no groups of raters to find, and one"),
        (("ann", ""), "1 of 2 comparisons have no rater's id; together they count as those of one rater"),
        (("ann", "bob"), ""),
    ],
)
def test_missing_raters_are_told_before_training(raters, told, caplog, tmp_path):
    class StartedError(Exception):
        pass

    def load():
        raise StartedError

    groups = [group(f"{rater}{index}.mp4", "xy", ((0, 1),), (rater,)) for index, rater in enumerate(raters)]
    with pytest.raises(StartedError):
        train_raters(RewardTrainer(load, RewardTrainingConfig(), tmp_path), groups, {}, root=tmp_path, config=SMALL)
    assert told in caplog.text if told else not caplog.text


def test_whose_reward(tmp_path):
    write_records(tmp_path / "raters.jsonl", [Rater("ann", (0.25, 0.75), 3), Rater("", (1.0, 0.0), 1)])
    assert choose_weights(tmp_path, INFO) is None
    assert choose_weights(tmp_path, INFO, rater="ann").tolist() == [0.25, 0.75]
    assert choose_weights(tmp_path, INFO, prototype=2).tolist() == [0.0, 1.0]
    assert choose_weights(tmp_path, replace(INFO, means=(0.0, 0.0), stds=(1.0, 1.0)), prototype="worst") is None
    for given, message in (
        ({"prototype": "worst"}, "has no scales of the prototypes, which worst needs: train it again"),
        ({"rater": "bob"}, "knows no rater 'bob': raters.jsonl lists them"),
        ({"prototype": 3}, "has 2 prototypes, counted from 1; got 3"),
        ({"prototype": 0}, "has 2 prototypes, counted from 1; got 0"),
        ({"rater": "ann", "prototype": 1}, "leave out one of them"),
    ):
        with pytest.raises(ValueError, match=message):
            choose_weights(tmp_path, INFO, **given)
    with pytest.raises(ValueError, match="one reward for all: train with --kind ideal-point"):
        choose_weights(tmp_path, None, rater="ann")


def test_smallest_standardized_reward():
    """Standardized, the rewards are (1, -1), (0.5, 0) and (-0.5, 1): the second caption is the best for both groups."""
    head = IdealPointHead(2, 1, num_prototypes=2, config=SMALL)
    head.project = torch.nn.Identity()
    states = AnswerStates(torch.zeros(3, 1), torch.tensor([[3.0, 0.0], [2.0, 1.0], [0.0, 2.0]]))
    worst = WorstHead(head, (1.0, 1.0), (2.0, 1.0)).double()
    assert worst(states).tolist() == [-1.0, 0.0, -0.5]


def test_groups_of_raters_by_hand():
    """Two raters of the first prototype predict 3 of 4 and 1 of 2 votes, that is 4 of 6; the second has no votes."""
    raters = [Rater("a", (0.9, 0.1), 9, 4, 0.75), Rater("b", (0.2, 0.8), 5), Rater("c", (0.7, 0.3), 3, 2, 0.5)]
    first, second = group_raters(INFO, raters)
    assert first == RaterGroup("", 0.6, 2, 6, pytest.approx(2 / 3)) and second == RaterGroup("", 0.4, 1, 0, None)
    rows = tuple((OrderedVotes(4, share, 0.1, 0.9), OrderedVotes(0, None, 0.0, 1.0)) for share in (0.75, 0.5))
    assert [one.ordered for one in group_raters(replace(INFO, agreement=rows), raters)] == list(rows)
