"""Preference batches and their loss on a real network: rows of each role, initial loss, direction of training."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from salmonn.conversations import Turn
from salmonn.model.lora import attach_lora
from salmonn.preference.groups import CaptionGroup
from salmonn.preference.losses import LossConfig, make_loss
from salmonn.records import Caption, Comparison, Mark
from salmonn.train.data import ClipSource, SftBatches, TrainingExample, sft_loss
from salmonn.train.loop import FitConfig, FitContext, fit
from salmonn.train.preference import (
    GroupExample,
    MixedBatches,
    MixedBatchLoss,
    PreferenceBatches,
    PreferenceBatchLoss,
    make_preference_examples,
)
from salmonn.train.reference_logps import compute_reference_logps
from tests.train.preference_batches import LORA, LOSS, answer_logp, make_batches, reference_logps, to_examples


@pytest.mark.parametrize("roles", [("chosen", "rejected", "ground_truth"), ("ground_truth", "chosen"), ("rejected",)])
def test_rows_of_each_role_contain_its_answers(captioner, pairs, features_by_video, roles):
    reference = [(-1.0, -10.0), (-2.0, -20.0), (-3.0, -30.0)]
    batches = make_batches(
        captioner, to_examples(pairs, features_by_video), reference=reference, batch_size=3, roles=roles
    )
    (batch,) = batches.micro_batches(0)
    tokenizer = captioner.processor.tokenizer
    answers = [tokenizer.decode(labels[labels != -100], skip_special_tokens=True) for labels in batch.inputs.labels]
    prompts = [tokenizer.decode(ids[ids >= 0]) for ids in batch.inputs.input_ids]  # placeholders are below 0
    order = [int(-value) - 1 for value in batch.reference_logps["chosen"]]
    assert sorted(order) == [0, 1, 2] and tuple(batch.rows) == roles and len(answers) == 3 * len(roles)
    assert batch.reference_logps["rejected"].tolist() == [-10.0 * (number + 1) for number in order]
    for role, rows in batch.rows.items():
        assert answers[rows] == [getattr(pairs[number], role) for number in order]
        assert all(pairs[number].prompt in prompt for number, prompt in zip(order, prompts[rows], strict=True))
        assert batch.inputs.clip_index[rows] == (0, 1, 2)
    for index, number in enumerate(order):
        assert torch.equal(batch.inputs.clip_features[index], features_by_video[pairs[number].video].tokens)


def test_a_mismatched_answer_is_another_clips_chosen_caption(captioner, pairs, features_by_video):
    loss = make_loss(LossConfig("kto", ce_weight=0.0))
    pairs = [pairs[0], replace(pairs[0], chosen="again", chosen_finished=False), pairs[1], pairs[2]]
    examples = make_preference_examples([(pair, features_by_video[pair.video]) for pair in pairs], loss.roles)
    others = [pairs[2], pairs[2], pairs[3], pairs[0]]  # the next of another clip
    expected = [
        answer_logp(captioner, pair, other.chosen, features_by_video[pair.video])
        for pair, other in zip(pairs, others, strict=True)
    ]
    attach_lora(captioner.network, LORA, seed=0)
    logps = compute_reference_logps(
        captioner.network, examples, captioner.processor, roles=loss.reference_roles, batch_size=2
    )
    assert [values["mismatched"] for values in logps] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="captions of other clips, and fewer than two clips have one"):
        make_preference_examples([(pairs[0], features_by_video[pairs[0].video])] * 2, loss.roles)
    # A fresh adapter equals its reference: 2 - s(0) - s(0).
    batches = PreferenceBatches(examples, logps, captioner.processor, roles=loss.roles, batch_size=4, seed=0)
    value, parts = PreferenceBatchLoss(loss)(captioner.network, *batches.micro_batches(0))
    assert value.item() == pytest.approx(1.0, abs=1e-4) and "ce" not in parts


def test_ranks_share_the_pairs(captioner, pairs, features_by_video, monkeypatch):
    reference = [(-1.0, -10.0), (-2.0, -20.0)]
    batches = make_batches(captioner, to_examples(pairs[:2], features_by_video), reference=reference, batch_size=2)
    (full,) = batches.micro_batches(0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        (part,) = batches.micro_batches(0)
        assert part.reference_logps["chosen"].tolist() == [full.reference_logps["chosen"][rank].item()]
        assert len(part.inputs.input_ids) == 3


def test_loss_of_a_fresh_adapter(captioner, pairs, features_by_video):
    """The policy equals its reference: log 2, plus the weighted mean cross-entropy of the ground truths."""
    expected = [
        -answer_logp(captioner, pair, pair.ground_truth, features_by_video[pair.video])
        / (len(captioner.processor.tokenizer.encode(pair.ground_truth)) + 1)
        for pair in pairs
    ]
    attach_lora(captioner.network, LORA, seed=0)
    batches = make_batches(captioner, to_examples(pairs, features_by_video), batch_size=3)
    batch_loss = PreferenceBatchLoss(make_loss(LossConfig(beta=0.1, ce_weight=0.25)))
    loss, figures = batch_loss(captioner.network, *batches.micro_batches(0))
    cross_entropy = sum(expected) / 3
    assert loss.item() == pytest.approx(math.log(2) + 0.25 * cross_entropy, rel=1e-5)
    assert figures["ce"] == pytest.approx(cross_entropy, rel=1e-5)
    assert figures["dpo"] == pytest.approx(math.log(2), rel=1e-5)
    assert abs(figures["chosen"]) < 1e-4 and abs(figures["rejected"]) < 1e-4


def test_figures_of_a_moved_policy(captioner, fill_adapter, pairs, features_by_video):
    attach_lora(captioner.network, LORA, seed=0)
    examples = to_examples(pairs[:1], features_by_video)
    (before,) = reference = reference_logps(captioner, examples)
    batches = make_batches(captioner, examples, reference=reference, batch_size=1)
    fill_adapter(captioner.network)
    captioner.network.eval()
    batch_loss = PreferenceBatchLoss(make_loss(LossConfig(beta=0.5, ce_weight=0.0)))
    loss, figures = batch_loss(captioner.network, *batches.micro_batches(0))
    pair, features = pairs[0], features_by_video[pairs[0].video]
    rewards = [
        0.5 * (answer_logp(captioner, pair, text, features) - reference)
        for text, reference in zip((pair.chosen, pair.rejected), before, strict=True)
    ]
    assert [figures["chosen"], figures["rejected"]] == pytest.approx(rewards, rel=1e-3)
    assert loss.item() == pytest.approx(math.log1p(math.exp(rewards[1] - rewards[0])), rel=1e-3)
    assert figures["accuracy"] == float(rewards[0] > rewards[1])


def test_a_caption_rated_alone(captioner, fill_adapter, pairs, features_by_video):
    """An absent answer has no tokens: BCO is log 2 for it, and an absent ground truth has no cross-entropy."""
    attach_lora(captioner.network, LORA, seed=0)
    full = replace(pairs[0], ground_truth="")
    chosen = replace(full, rejected="", rejected_finished=False)
    rejected = replace(full, chosen="", chosen_finished=False)
    loss = make_loss(LossConfig("bco_pair", beta=0.5, ce_weight=0.25))
    values = []
    for one in (full, chosen, rejected):
        examples = to_examples([one], features_by_video)
        (logps,) = compute_reference_logps(
            captioner.network, examples, captioner.processor, roles=loss.reference_roles, batch_size=1
        )
        batches = PreferenceBatches(examples, [logps], captioner.processor, roles=loss.roles, batch_size=1, seed=0)
        fill_adapter(captioner.network)
        value, parts = PreferenceBatchLoss(loss)(captioner.network.eval(), *batches.micro_batches(0))
        assert parts["ce"] == 0.0
        values.append(value.item())
    assert values[0] == pytest.approx(values[1] + values[2] - 2 * math.log(2), rel=1e-4)
    assert abs(values[1] - 2 * math.log(2)) > 1e-3 < abs(values[2] - 2 * math.log(2))


@pytest.mark.parametrize("is_swapped", [False, True])
def test_a_few_steps_prefer_the_chosen_answer(captioner, pairs, features_by_video, tmp_path, is_swapped):
    """Whichever of the two is chosen, the margin over the reference increases for it."""
    pair = pairs[0]
    if is_swapped:
        pair = Comparison(pair.video, pair.prompt, pair.rejected, pair.chosen, pair.ground_truth)
    attach_lora(captioner.network, LORA, seed=0)
    examples = to_examples([pair], features_by_video)
    (before,) = reference = reference_logps(captioner, examples)
    fit(
        captioner.network,
        make_batches(captioner, examples, reference=reference, batch_size=1),
        PreferenceBatchLoss(make_loss(LossConfig(ce_weight=0.0))),
        FitConfig(learning_rate=3e-3, steps=8, warmup_ratio=0.125, batch_size=1),
        context=FitContext("one pair", tmp_path),
    )
    figures = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert figures[-1]["chosen"] > figures[-1]["rejected"] + 0.1
    assert figures[-1]["loss"] < figures[0]["loss"] and figures[-1]["accuracy"] == 1.0
    after = [answer_logp(captioner, pair, text, features_by_video[pair.video]) for text in (pair.chosen, pair.rejected)]
    assert after[0] - before[0] > after[1] - before[1]


@pytest.fixture
def mixed(captioner, pairs, features_by_video):
    """Three pairs, and two clips with two questions each, per step, in micro-batches of one."""
    attach_lora(captioner.network, LORA, seed=0)
    options = {"seed": 0, "gradient_accumulation_steps": 9}
    preferences = make_batches(captioner, to_examples(pairs, features_by_video), batch_size=3, **options)
    turns = (Turn("How many?", "two"), Turn("Which?", "the star"))
    examples = [TrainingExample(ClipSource(Path(pair.video)), turns) for pair in pairs[:2]]
    features = {example.clip: features_by_video[str(example.clip.video)] for example in examples}
    questions = SftBatches(examples, captioner.processor, features.__getitem__, batch_size=2, first_rank=3, **options)
    return MixedBatches(preferences, questions)


def test_questions_are_weighted_by_their_fraction(captioner, fill_adapter, mixed):
    fill_adapter(captioner.network)
    network, loss = captioner.network.eval(), MixedBatchLoss(LOSS, qa_fraction=0.4)
    micro_batches = mixed.micro_batches(0)
    assert len(micro_batches) == 5
    total = sum(loss(network, batch)[0].item() for batch in micro_batches)
    dpo = sum(PreferenceBatchLoss(LOSS)(network, batch)[0].item() for batch in mixed.preferences.micro_batches(0))
    qa = sum(sft_loss(network, batch)[0].item() for batch in mixed.questions.micro_batches(0))
    assert total == pytest.approx(0.6 * dpo + 0.4 * qa, rel=1e-5) and dpo > 0 and qa > 0
    figures = [loss(network, batch)[1] for batch in micro_batches]
    assert sum(values.get("qa", 0.0) for values in figures) == pytest.approx(qa, rel=1e-5)
    pairs_only, _ = MixedBatchLoss(LOSS, qa_fraction=0.0)(network, micro_batches[0])
    assert torch.equal(pairs_only, PreferenceBatchLoss(LOSS)(network, micro_batches[0])[0])


@pytest.mark.parametrize("size", [2, 5])
def test_ranks_share_pairs_and_questions_evenly(mixed, monkeypatch, size):
    all_batches = mixed.micro_batches(0)
    monkeypatch.setenv("WORLD_SIZE", str(size))
    counts = []
    for rank in range(size):
        monkeypatch.setenv("RANK", str(rank))
        counts.append(len(mixed.micro_batches(0)))
    assert sum(counts) == len(all_batches) and max(counts) - min(counts) <= 1


def test_an_unfinished_answer_has_no_end(captioner, pairs, features_by_video):
    """Otherwise DPO would teach that the end of a message is unlikely in the middle of a sentence."""
    processor = captioner.processor
    cut_off = [replace(pair, rejected_finished=False) for pair in pairs]
    batches = make_batches(captioner, to_examples(cut_off, features_by_video), reference=[(0, 0)] * 3, batch_size=3)
    (batch,) = batches.micro_batches(0)
    for role, rows in batch.rows.items():
        last = [labels[labels != -100][-1].item() for labels in batch.inputs.labels[rows]]
        assert all((token == processor.stop_ids[0]) == (role != "rejected") for token in last), role


@pytest.fixture
def groups(clips):
    """Two clips with three and two samples."""
    texts = [("a red star appears", "a tone", "two"), ("x", "a low tone is heard")]
    advantages = [(1.0, -0.5, -0.5), (-0.7, 0.7)]
    return [
        CaptionGroup(
            tuple(Caption(reference.video, text, prompt="Tell.", sample=number) for number, text in enumerate(group)),
            values,
            ground_truth="the truth",
        )
        for reference, group, values in zip(clips.references, texts, advantages, strict=False)
    ]


def group_batches(captioner, groups, features_by_video, loss, **options):
    examples = [GroupExample(group, features_by_video[group.captions[0].video]) for group in groups]
    logps = compute_reference_logps(
        captioner.network, examples, captioner.processor, roles=loss.reference_roles, batch_size=2, per_token=True
    )
    options = {"batch_size": 2, "seed": 0} | options
    return PreferenceBatches(examples, logps, captioner.processor, roles=loss.roles, **options), logps


def test_samples_of_a_clip_share_its_prefix_and_are_weighed_by_advantage(
    captioner, fill_adapter, groups, features_by_video
):
    attach_lora(captioner.network, LORA, seed=0)
    captioner.network.eval()
    loss = make_loss(LossConfig("grpo", beta=0.0, ce_weight=0.0, clip_low=0.9, clip_high=9.0))
    batches, logps = group_batches(captioner, groups, features_by_video, loss)
    sums = [[sum(tokens) for tokens in one["sample"]] for one in logps]
    for group, of_group in zip(groups, sums, strict=True):
        pair = Comparison(group.captions[0].video, "Tell.", "", "")
        expected = [answer_logp(captioner, pair, one.text, features_by_video[pair.video]) for one in group.captions]
        assert of_group == pytest.approx(expected, rel=1e-5)
    (batch,) = batches.micro_batches(0)
    assert len(batch.inputs.input_ids) == 5 and len(batch.inputs.clip_features) == 2
    # At the start all ratios are 1: the loss of a clip is -sum(tokens * advantage) / sum(tokens).
    start, figures = PreferenceBatchLoss(loss)(captioner.network, batch)
    by_hand = [
        -sum(len(tokens) * value for tokens, value in zip(one["sample"], group.advantages, strict=True))
        / sum(map(len, one["sample"]))
        for one, group in zip(logps, groups, strict=True)
    ]
    assert start.item() == pytest.approx(sum(by_hand) / 2, rel=1e-4) and figures["clipped"] == 0
    # The same in micro-batches of one clip.
    fill_adapter(captioner.network)
    whole, _ = PreferenceBatchLoss(loss)(captioner.network, batch)
    batches.gradient_accumulation_steps = 2
    parts = [PreferenceBatchLoss(loss)(captioner.network, one)[0].item() for one in batches.micro_batches(0)]
    assert len(parts) == 2 and sum(parts) == pytest.approx(whole.item(), rel=1e-4)
    assert whole.item() != pytest.approx(start.item(), rel=1e-3)


def test_grpo_prefers_samples_with_an_advantage(captioner, groups, features_by_video, tmp_path):
    attach_lora(captioner.network, LORA, seed=0)
    loss = make_loss(LossConfig("grpo", ce_weight=0.1))
    batches, logps = group_batches(captioner, groups, features_by_video, loss)
    config = FitConfig(learning_rate=3e-4, steps=6, warmup_ratio=0.17, batch_size=2)
    fit(captioner.network, batches, PreferenceBatchLoss(loss), config, context=FitContext("groups", tmp_path))
    figures = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert figures[-1]["grpo"] < figures[0]["grpo"] - 0.05 and figures[-1]["kl_estimate"] > 0
    assert {"ce", "clipped"} <= set(figures[0]) and figures[0]["kl_estimate"] == pytest.approx(0, abs=1e-6)
    for group, before in zip(groups, logps, strict=True):
        pair = Comparison(group.captions[0].video, "Tell.", "", "")
        features = features_by_video[pair.video]
        gains = [
            answer_logp(captioner, pair, one.text, features) / len(tokens) - sum(tokens) / len(tokens)
            for one, tokens in zip(group.captions, before["sample"], strict=True)
        ]
        best = group.advantages.index(max(group.advantages))
        assert max(gains) == gains[best]


def test_marks_become_the_tokens_of_their_clauses(captioner, pairs, features_by_video):
    attach_lora(captioner.network, LORA, seed=0)
    loss = make_loss(LossConfig(ce_weight=0.0, per="clause"))
    marked = [
        replace(pairs[0], chosen_marks=(Mark(0, 10, is_right=True), Mark(11, 18))),  # "a red star", "appears"
        replace(pairs[1], rejected_marks=(Mark(2, 5),)),  # "low" of "a low tone is heard"
    ]
    examples = to_examples(marked, features_by_video)
    logps = compute_reference_logps(
        captioner.network, examples, captioner.processor, roles=loss.reference_roles, batch_size=2, per_token=True
    )
    batches = PreferenceBatches(
        examples, logps, captioner.processor, roles=loss.roles, batch_size=2, seed=0, gradient_accumulation_steps=1
    )
    (batch,) = batches.micro_batches(0)
    order = [batch.clips.index(pair.video) for pair in marked]
    chosen, rejected = batch.clauses["chosen"], batch.clauses["rejected"]
    tokenizer, first = captioner.processor.tokenizer, order[0]
    texts = []
    for column in range(2):
        ids = tokenizer.encode(marked[0].chosen, add_special_tokens=False)
        places = chosen.tokens[first, column].nonzero().flatten().tolist()
        texts.append(tokenizer.decode([ids[place] for place in places]).strip())
    assert texts == ["a red star", "appears"]
    assert chosen.signs[first].tolist() == [1, -1] and chosen.signs[order[1]].tolist() == [0, 0]
    assert rejected.signs[order[1]].tolist() == [-1] and rejected.tokens[order[1]].sum() >= 1
    # At the start each part is log 2; the second pair has one clause, the first two.
    value, figures = PreferenceBatchLoss(loss)(captioner.network.eval(), batch)
    assert value.item() == pytest.approx(2 * math.log(2), rel=1e-4)
    assert figures["clause"] == pytest.approx(math.log(2), rel=1e-4)
